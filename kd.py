"""KD: knowledge distillation into a smaller network.

Dockhorn et al., "Distilling the Knowledge in Diffusion Models", CVPR 2023 workshop on Generative
Models for Computer Vision, https://cs.uwaterloo.ca/~y328yu/publication/dockhorn-rby-23

A student D_theta, smaller than its frozen teacher D_phi and made of random weights, learns what the
teacher says of any noisy image:

    repeat
        (x0, c) ~ data,  ln sigma ~ N(-1.2, 1.2^2),  n ~ N(0, sigma^2 I),  x = x0 + n
        L = lambda_sigma | D_theta(x; sigma, c) - D_phi(x; sigma, c) |^2               Eq. 5
    sample with Heun's method: N steps, 2N - 1 evaluations

--w, guided distillation: the student takes the strength w ~ U[w_min, w_max] as an input, and gives
in one evaluation what guidance gives in two:

        L = lambda_sigma | D_theta(x; sigma, c, w) - D_phi^w(x; sigma, c) |^2          Eq. 6
        D_phi^w(x; sigma, c) = (1 + w) D_phi(x; sigma, c) - w D_phi(x; sigma)          Eq. 4

The paper's teachers are two networks, with classes and without (--uncond). One network that knows
the null label serves as well. --drop: Eq. 5 with the label dropped, for a student that is guided as
usual. --alpha: mixed training, (1 - alpha) Eq. 5 + alpha Eq. 3 (Eq. 8). --alpha 1 is the baseline,
denoising score matching (Eq. 3), with its dropout.

Differences from the paper:
- Scales of guidance are the other scripts': ours is 1 + w, and 1 is none.
- Student and teacher share the preconditioning, for which lambda_sigma c_out^2 = 1: the loss is the
  mean square of the outputs' difference. So any pair of our networks with the same prediction takes
  part (DiT -> smaller DiT), with the times of its own schedule. With prompts the loss is that of
  eps, also for networks that predict v: A.2 takes the weighting of Stable Diffusion.
- The average's half-life is printed as 50 million images, the whole of the run. EDM, which the
  paper follows, has 0.5 million and a ramp-up, and so have we.
- EDM replaces gradients that are not finite (nan_to_num); here they stop the run.
- No augmentation (--flip mirrors half of the images); EDM's own pipeline has no plain mirroring.
- The paper does not say how the student takes w. Here w is embedded as the noise level is, starting
  at zero.

    python kd.py                                                           the digits, on a CPU
    python kd.py --model DDPM++-t-uncond --student DDPM++-96 --data cifar10          one GPU
    torchrun --nproc_per_node 8 kd.py --model DDPM++-t --student DDPM++-96 --w 1 4 --data cifar10

Writes runs/kd/{last.pt, log.jsonl, metrics.json, samples.png}.
"""
import copy
import math
import time
from pathlib import Path

import torch

import models
import train
from kit import checkpoints, data
from kit.base import (
    apply_method_defaults,
    can_drop,
    describe_base,
    is_digits,
    keep_pool,
    load_base,
    resolve_checkpoint,
    training_data,
)
from kit.cli import (
    UserError,
    add_base_arguments,
    add_data_arguments,
    add_run_arguments,
    check_positive,
    make_parser,
    refuse_without_effect,
    run_script,
    say,
)
from kit.evaluate import Entry, finish, is_measured, print_finished
from kit.plan import (
    batch_line,
    guidance_line,
    halves,
    in_millions,
    labels_line,
    resources,
)
from kit.processes import Processes
from kit.run import EMA, Run, adamw, set_lr
from kit.sampling import check_uncond, load_uncond
from solvers import add_noise, from_x0_eps, guide, guide_with, make_schedule, solver_grid

# ---- Method ------------------------------------------------------------------------------------


def kd_loss(student, teacher, schedule, x0, y, t, noise, w=None,  # noqa: PLR0913
            prediction="edm", alpha=0.0, of_eps=False):
    """Eq. 5; with scales w Eq. 6; with alpha > 0 Eq. 8, of which alpha = 1 is Eq. 3 -> (loss, aux).

    student, teacher   net(x, t, y), or net(x, t, y, w) where they take w
    x0, noise          (B, C, H, W), clean data and N(0, I)
    y                  (B,) labels, already dropped
    t                  (B,) times of the schedule
    w                  (B,) scales of guidance, or None
    of_eps             for v on a VP schedule: weigh the differences as those of eps
    aux                {"kd", "dsm"}: the two terms, as far as they are there

    A mean square of outputs is lambda_sigma |D - D|^2 where both share their preconditioning,
    since lambda_sigma c_out^2 = 1.
    """
    C = x0.shape[1]
    x_t = add_noise(schedule, x0, noise, t)                            # (B, C, H, W)
    if w is not None:                                                  # both halves, or w as input
        student = guide(student, w)
        teacher = guide(teacher, w)
    out = student(x_t, t, y)[:, :C]                                    # (B, C, H, W)  D_theta
    weight = 1
    if of_eps and prediction == "v":                                   # eps = sigma x_t + alpha v
        weight = schedule.alpha_sigma(t, x_t)[0].square()              # alpha^2       A.2
    loss = 0.0
    aux = {}
    if alpha < 1:
        with torch.no_grad():
            target = teacher(x_t, t, y)[:, :C]                         # D_phi, or D_phi^w of Eq. 4
        kd = (weight * (out - target).square()).mean()                 # Eq. 5, 6
        loss = (1 - alpha) * kd
        aux["kd"] = kd.detach()
    if alpha > 0:
        clean = from_x0_eps(schedule, x0, noise, t, prediction)
        dsm = (weight * (out - clean).square()).mean()                 # Eq. 3
        loss = loss + alpha * dsm
        aux["dsm"] = dsm.detach()
    return loss, aux                                                   # Eq. 8


def ema_decay(images, batch, half_life):
    """Decay of the average at a step, before which so many images were seen: a half-life in images,
    at first a twentieth of these (EDM, training/training_loop.py)."""
    half_life = min(half_life, 0.05 * images)
    return 0.5 ** (batch / max(half_life, 1e-8))


# ---- Training ----------------------------------------------------------------------------------


def main(args):
    proc = Processes(args.amp)
    began = time.perf_counter()
    args.ckpt = resolve_checkpoint(args)
    spec = describe_base(args, "edm")
    arch = apply_kd_defaults(args, spec)
    proc.check_batch(args.batch_size, args.accumulate)
    if args.dry_run:
        return say(proc, plan(args, spec, proc, arch))

    # Setup the teacher, which is frozen:
    base, base_spec, args.ckpt = load_base(args, proc, train.make_teacher, "edm")
    args.model = base_spec["name"]
    before = proc.autocast(proc.frozen(base, args))
    teacher = before
    if args.uncond:
        uncond = proc.frozen(load_uncond(args.uncond, base_spec), args)
        teacher = guide_with(before, proc.autocast(uncond))                # Eq. 4
        both = [*base.parameters(), *uncond.parameters()]
        teacher.parameters = both.copy  # of which a pool of samples takes the fingerprint
        base_spec["knows_null"] = True  # as a pair they can be guided

    if not train_student(args, proc, base_spec, arch, teacher, teacher):
        return print_finished(args, proc)

    # Teacher, student and the baseline, score matching for as many steps, on the same noise and
    # labels:
    entries = {}
    if args.eval_samples:
        nets = {"before": (teacher, base_spec)}
        if args.alpha < 1:
            say(proc, f"the control: score matching (Eq. 3) for {args.steps} steps")
            own = baseline_arguments(args)
            own_arch = {k: v for k, v in arch.items() if k != "guidance"}
            train_student(own, proc, base_spec, own_arch, teacher, before)
            nets["score matching"] = load_student(proc, own.out)
        nets["after"] = load_student(proc, args.out)
        entries = table_entries(args, nets)
    finish(args, proc, "kd", began, entries)


def train_student(args, proc, base_spec, arch, source, teacher):
    """Train a student of this arch; returns False where that was done and measured before.

    source: what makes synthetic data, also for the baseline. teacher: what the student learns from.
    """
    torch.manual_seed(args.seed)
    net = models.build(arch)
    wrapped = proc.student(net, args)
    student = proc.autocast(wrapped)
    ema = EMA(net, 1.0)
    opt = adamw(net, args.lr)
    is_text = arch.get("context") == "text"
    spec = {**base_spec, "name": args.student, "arch": arch, "method": "kd", "nfe": args.nfe,
            "cfg": args.cfg, "knows_null": is_text or args.drop > 0, "w": args.w, "reading": None}
    schedule = make_schedule(spec["schedule"]).to(proc.device)

    # Resume:
    state = {"model": net, "opt": opt, "ema": ema}
    what = "kd" if args.alpha < 1 else "score matching"
    run = Run(args, proc, what, wrapped, state, spec, flops_of_step(args, base_spec, arch))
    keep_pool(args, run)
    if run.is_finished:
        return not is_measured(args)

    # Setup data; where there is none, the teacher's own samples:
    dataset, _ = training_data(args, source, base_spec, proc, run)
    spec["null"] = dataset.null if dataset.text else None
    null = dataset.null.to(proc.device) if dataset.text else spec["classes"]
    batches = data.batches(dataset, proc, args.seed, args.batch_size, run.step)

    for step, rng in run.steps():
        x0, y = next(batches)
        # Where a network has dropout, its masks depend on (seed, step) alone, too:
        net.dropout = args.dropout
        net.rng = rng
        t = train.training_times(schedule, rng)
        y = train.drop_labels(y, null, rng.uniform() < args.drop)
        w = draw_scales(args, rng)
        noise = rng.normal(x0.shape[1:])
        for part in run.parts(x0, y, t, noise, w):
            loss, _ = kd_loss(student, teacher, schedule, *part, spec["prediction"], args.alpha,
                              is_text)
            run.backward(loss)
        # As in EDM, by what was seen before this step: the first one has rate and decay 0.
        set_lr(opt, args.lr * (min(1, step / args.warmup) if args.warmup else 1))
        run.optimizer_step(opt)
        ema.update(step, ema_decay(step * args.batch_size, args.batch_size, args.half_life))
    return True


def draw_scales(args, rng):
    """(B,) scales of guidance between the two of --w, or None."""
    if not args.w:
        return None
    low, high = args.w
    return low + (high - low) * rng.uniform()


def baseline_arguments(args):
    """The arguments of the baseline, denoising score matching (Eq. 3)."""
    own = copy.copy(args)
    own.out = f"{args.out}/dsm"
    own.alpha = 1.0
    own.dropout = train.DROPOUT
    own.drop = 0.1 if args.w else args.drop  # it is guided as usual, so it must know the null label
    own.w = None
    own.uncond = None
    own.eval_samples = 0
    own.sample_every = 0
    return own


def load_student(proc, out):
    """A finished student -> (network, spec)."""
    net, spec = checkpoints.load_model(f"{out}/last.pt")
    return proc.autocast(proc.frozen(net)), spec


def describe_uncond(args):
    """What --uncond is, without its weights; None for a URL. Raises UserError."""
    path = args.uncond
    if path.startswith("DDPM++"):
        return checkpoints.describe(None, path)
    if "://" in path:
        return None
    if not Path(path).exists():
        raise UserError(f"--uncond {path}: no such file; give a checkpoint or DDPM++-t-uncond")
    return checkpoints.describe(path)


def table_entries(args, nets):
    """{name: (network, spec)} -> entries of the table: every network at --nfe and at 9."""
    entries = {}
    for nfe in sorted({args.nfe, 9}):
        for name, (net, spec) in nets.items():
            if nfe != args.nfe:
                name += f", {nfe} evaluations"
            entries[name] = Entry(net, spec, nfe, args.cfg)
    return entries


def flops_of_step(args, spec, arch):
    """Floating-point operations of a step: the student's forward and backward, the teacher's
    forwards."""
    forwards_of_teacher = 0
    if args.alpha < 1:
        forwards_of_teacher = 2 if args.w else 1
    flops = 3 * models.count(arch)[1] + forwards_of_teacher * models.count(spec["arch"])[1]
    return flops * args.batch_size


def plan(args, spec, proc, arch):
    """What --dry-run prints."""
    student_flops = models.count(arch)[1]
    teacher_flops = models.count(spec["arch"])[1]
    guidance = labels_line(spec, args.drop)
    if args.w:
        guidance = (f"scales of guidance {args.w[0]:g} to {args.w[1]:g}, without classes "
                    f"{args.uncond or 'the teacher itself'}")
    dropout = f", dropout {args.dropout:g}" if arch["net"] == "DDPM++" else ""
    is_heun = spec["solver"] == "heun"
    nfes = {5, 9, 19, 35, args.nfe} if is_heun else {10, 20, 50, args.nfe}
    of_teacher = 2 if args.uncond else halves(spec["arch"], args.cfg)

    sampling = []
    for nfe in sorted(nfes):
        steps = f"{(nfe + 1) // 2:2} steps, " if is_heun else ""
        student = nfe * student_flops * halves(arch, args.cfg) / 1e9
        teacher = nfe * teacher_flops * of_teacher / 1e9
        sampling.append(f"             {steps}{nfe:2} evaluations: student {student:.4g}, teacher "
                        f"{teacher:.4g}")
    return "\n".join([
        f"KD of {spec['name']}, {in_millions(spec['arch'])} parameters, "
        f"{teacher_flops / 1e9:.4g} GFLOP per forward and sample, into {args.student}, "
        f"{in_millions(arch)}, {student_flops / 1e9:.4g} GFLOP",
        f"training     {args.steps:,} steps of {batch_line(args, proc)}, lr {args.lr:g} after "
        f"{args.warmup:,} steps, half-life {args.half_life:,} images, {guidance}, "
        f"alpha {args.alpha:g}{dropout}, on {args.data}",
        *resources(args, proc, arch, flops_of_step(args, spec, arch), base_arch=spec["arch"],
                   weight_copies=2, frozen=2 if args.uncond else 1),
        f"sampling     {args.nfe} evaluations; "
        f"student: {guidance_line({**spec, 'arch': arch}, args.cfg)}; GFLOP per sample at",
        *sampling,
    ])


# ---- Settings ----------------------------------------------------------------------------------

# A.1; the learning rate's ramp-up over 10 million images and the half-life as in EDM.
WARMUP_IMAGES = 10_000_000
PAPER = dict(student="DDPM++-96", steps=100_000, batch_size=512, lr=1e-3, half_life=500_000,
             nfe=19, eval_samples=0, log_every=100, save_every=1000)
# A.2; the half-life is that of Stable Diffusion's average, 0.9999 per step.
SD = dict(PAPER, student="SD-KD", lr=3e-4, warmup=0, half_life=6931 * 512, nfe=50)
# Networks that the paper has not: the learning rate of upstream DiT.
OTHER = dict(PAPER, student=None, lr=1e-4, warmup=0, nfe=50)

# The digits. The learning rate was chosen by experiments/kd/digits.py.
DIGITS = dict(data="digits", steps=600, batch_size=96, lr=1e-2, warmup=50, half_life=10_000,
              eval_samples=2000, log_every=50, save_every=200)
DIGITS_EDM = dict(student="DDPM++-8x1")
DIGITS_DIT = dict(lr=3e-3)  # train.py's


def settings_of(spec):
    """The settings for a teacher."""
    is_edm = spec["prediction"] == "edm"
    if is_edm:
        settings = PAPER
    elif spec["arch"].get("context") == "text":
        settings = SD
    else:
        settings = OTHER
    if is_digits(spec):
        settings = {**settings, **DIGITS, **(DIGITS_EDM if is_edm else DIGITS_DIT)}
    return settings


def apply_kd_defaults(args, spec):
    """Fill missing arguments from the settings above -> the student's arch. Raises UserError."""
    check_teacher(args, spec)
    settings = settings_of(spec)
    is_text = spec["arch"].get("context") == "text"
    knows_null = is_text or can_drop(spec)
    if not (args.student or settings["student"]):
        raise UserError(f"say which network the student is, a smaller one of {spec['name']}'s "
                        "kind, as --student DiT-S/2")
    if args.w and args.model == "DDPM++-t" and not args.ckpt and not args.uncond:
        args.uncond = "DDPM++-t-uncond"  # the paper's second teacher
    if args.dropout is None:
        args.dropout = train.DROPOUT if args.alpha == 1 else 0.0  # the baseline's alone (A.1)
    if args.drop is None:
        args.drop = 0.1 if knows_null and not args.w else 0.0
    if args.batch_size is None:
        args.batch_size = settings["batch_size"]
    if args.flip is None:
        args.flip = False
    own = {"data": "cifar10", "warmup": round(WARMUP_IMAGES / max(args.batch_size, 1)), **settings}
    if args.w:
        own["cfg"] = min(max(spec["cfg"], args.w[0]), args.w[1])
    steps = spec["nfe"] or 50  # of the teacher's samples
    is_cifar = spec["arch"]["input_size"] == 32 and spec["scale"] is None
    if not is_cifar and not is_digits(spec):
        own["data"] = f"synthetic:{steps}"
    apply_method_defaults(args, spec, own, synthetic=steps)
    check_arguments(args, spec, knows_null)
    return student_arch(args, spec)


def check_teacher(args, spec):
    """Raise UserError where this teacher cannot do what is asked for."""
    if spec["arch"].get("guidance") or spec["only_node"] is not None:
        raise UserError("this teacher takes the scale of guidance as an input, or makes one step "
                        "only; give --ckpt a whole one")
    if args.uncond and not args.w:
        raise UserError("--uncond is the second network of guided distillation: say how far with "
                        "--w 1 4")
    if not args.w:
        return
    other = args.uncond and describe_uncond(args)
    if other:
        check_uncond(args.uncond, other, spec)
    low, high = args.w
    is_range = 1 <= low <= high < math.inf
    if not is_range or not spec["classes"] or args.alpha or args.drop:
        raise UserError("--w takes two scales of guidance of at least 1 in their order, wants a "
                        "teacher with classes, and goes neither with --alpha nor with --drop")


def check_arguments(args, spec, knows_null):
    """Raise UserError where the arguments do not go together."""
    check_positive(args, "half_life", "nfe")
    schedule = make_schedule(spec["schedule"])
    solver_grid(schedule, spec["solver"], args.nfe, spec["grid"])  # can the student be sampled so?
    are_shares = 0 <= args.alpha <= 1 and 0 <= args.drop <= 1 and 0 <= args.dropout < 1
    if not are_shares or args.warmup < 0:
        raise UserError("--alpha, --drop and --dropout must lie between 0 and 1, --warmup must not "
                        "be negative")
    if spec["arch"].get("context") == "text" and args.data.startswith("synthetic"):
        raise UserError("a model with prompts cannot make its own data: give --data LATENTS, which "
                        "`python -m kit.encode` makes")
    needs_null = args.drop or (not args.uncond and (args.w or args.cfg != 1))
    if spec["classes"] and not knows_null and needs_null:
        raise UserError("this teacher knows classes and no null label: guided distillation wants "
                        "--uncond CKPT, and without --w leave --drop and --cfg out")
    if args.w and not args.w[0] <= args.cfg <= args.w[1]:
        raise UserError(f"--cfg {args.cfg:g}: the student learns guidance from {args.w[0]:g} to "
                        f"{args.w[1]:g}; widen --w, or sample within it")


def student_arch(args, spec):
    """The student's arch, with the teacher's shape. Raises UserError."""
    teacher = spec["arch"]
    arch = models.make_arch(args.student, teacher["input_size"], teacher["in_channels"],
                            spec["classes"])
    same_kind = (arch["net"] == "DDPM++") == (spec["prediction"] == "edm")
    same_context = (arch.get("context") == "text") == (teacher.get("context") == "text")
    if not same_kind or not same_context or (args.w and arch["net"] == "UNet"):
        raise UserError(f"--student {args.student}: EDM's teachers want a DDPM++, those with "
                        "prompts a U-Net with prompts, others a DiT, SiT or (without --w) a U-Net")
    is_text = teacher.get("context") == "text"
    same_prompts = not is_text or arch["context_dim"] == teacher["context_dim"]
    if not same_prompts or arch["num_classes"] != teacher["num_classes"]:
        raise UserError(f"--student {args.student}: must know the same classes or prompts as the "
                        "teacher")
    if arch["net"] != "DDPM++":
        refuse_without_effect(args, "dropout", "with a student that is no DDPM++")
    return {**arch, "guidance": True} if args.w else arch


def parser():
    p = make_parser("kd.py", __doc__)
    group = p.add_argument_group("the method")
    group.add_argument("--student", help="of the teacher's kind: DDPM++-{32,64,96,128}, SD-KD, "
                                         "DiT-S/2, ... (default: DDPM++-96; digits DDPM++-8x1)")
    group.add_argument("--w", type=float, nargs=2, metavar="SCALE",
                       help="guided distillation: range of the scales that the student takes as an "
                            "input; 1 4 is the paper's 0 to 3")
    group.add_argument("--uncond", metavar="CKPT",
                       help="the teacher without classes, for --w: path, URL or DDPM++-t-uncond "
                            "(default: with --model DDPM++-t that one; else the teacher itself "
                            "with the null label)")
    group.add_argument("--alpha", type=float, default=0.0,
                       help="Eq. 8: weight of score matching; 1 is the baseline")
    group.add_argument("--drop", type=float, metavar="P",
                       help="probability of the null label (default: 0.1 where the teacher knows "
                            "it and --w is not given, else 0)")
    group.add_argument("--dropout", type=float, metavar="P",
                       help="in DDPM++ students (default: 0; 0.1 with --alpha 1)")
    add_base_arguments(p, model="the teacher: DDPM++-t-uncond, DDPM++-t, DiT-XL/2, ...; released "
                                "weights are fetched where there are any",
                       ckpt="the teacher: a checkpoint's path or URL, ours or upstream's "
                            "(default: a DDPM++ of the digits, made here)",
                       image_size="of the released weights (default: what they were made for)")
    add_data_arguments(p, "digits, mnist, cifar10, ..., a folder of images or cached latents, or "
                          "synthetic:STEPS (default: digits; cifar10 at 32 pixels; else "
                          "synthetic, the teacher's own samples at its own number of steps or 50)")
    group = p.add_argument_group("training")
    group.add_argument("--steps", type=int, help="default: 100,000; digits 600")
    group.add_argument("--batch-size", type=int,
                       help="of all processes together (default: 512; digits 96)")
    group.add_argument("--lr", type=float, help="default: by network, see Settings")
    group.add_argument("--warmup", type=int,
                       help="steps over which the learning rate rises (default: 10 million images; "
                            "networks the paper has not, 0)")
    group.add_argument("--half-life", type=float, metavar="IMAGES",
                       help="of the averaged weights (default: 500,000)")
    group = p.add_argument_group("sampling and measuring")
    group.add_argument("--nfe", type=int,
                       help="evaluations of the network when sampling; Heun's N steps take 2N - 1 "
                            "(default: 19)")
    group.add_argument("--cfg", type=float,
                       help="guidance when sampling, 1 is none (default: the teacher's)")
    group.add_argument("--eval-samples", type=int,
                       help="samples per row of the table (default: digits 2000, else 0)")
    add_run_arguments(p, "runs/kd")
    return p


if __name__ == "__main__":
    run_script(main, parser().parse_args())
