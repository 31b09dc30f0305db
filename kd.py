"""KD: knowledge distillation into a smaller network (Dockhorn et al., "Distilling the Knowledge in Diffusion Models").

A student D_theta, smaller than its frozen teacher D_phi and made of random weights, learns what the teacher says of any noisy image:

    repeat
        (x0, c) ~ data,  ln sigma ~ N(-1.2, 1.2^2),  n ~ N(0, sigma^2 I),  x = x0 + n
        L = lambda_sigma | D_theta(x; sigma, c) - D_phi(x; sigma, c) |^2                                            Eq. 5
    sample with Heun's method: N steps, 2N - 1 evaluations.

--w, guided distillation: the student takes the strength w ~ U[w_min, w_max] as an input, and does in one evaluation what guidance does in two:

        L = lambda_sigma | D_theta(x; sigma, c, w) - D_phi^w(x; sigma, c) |^2                                       Eq. 6
        D_phi^w(x; sigma, c) = (1 + w) D_phi(x; sigma, c) - w D_phi(x; sigma)                                       Eq. 4

The paper's teachers are two networks, with classes and without (--uncond); one that knows the null label serves as well. --drop: Eq. 5 with the label
dropped, for a student that is guided as usual. --alpha: mixed training, (1 - alpha) Eq. 5 + alpha Eq. 3 (Eq. 8); --alpha 1 is the
baseline, denoising score matching (Eq. 3), with its dropout.

Differences from the paper. Scales of guidance are the other scripts': ours is 1 + w, 1 is none. Student and teacher share the preconditioning, for
which lambda_sigma c_out^2 = 1: the loss is the mean square of the outputs' difference, and any pair of our networks with the same prediction takes part
(DiT -> smaller DiT), with its own times. The average's half-life is printed as 50 million images, the whole of the run; EDM, which it follows, has 0.5 million,
and a ramp-up: so have we. EDM replaces gradients that are not finite (nan_to_num); here they stop the run. No augmentation. How the student takes w, the
paper does not say: embedded as the noise level is, starting at zero.

    python kd.py                                                                      the digits, minutes on two CPU cores
    python kd.py --model DDPM++-t-uncond --student DDPM++-96 --data cifar10           one GPU
    torchrun --nproc_per_node 8 kd.py --model DDPM++-t --student DDPM++-96 --w 1 4 --data cifar10

Writes runs/kd/{last.pt, log.jsonl, metrics.json, samples.png}.
"""
import argparse
import math
import time

import torch

import checkpoints
import data
import models
import runtime
import train
from runtime import EMA, Guard, Log, Processes, StepRandom, Stop, UserError, say
from solvers import add_noise, column, from_x0_eps, guide, make_schedule, solver_grid

# ---- Method -------------------------------------------------------------------------------------------


def guided_by(cond, uncond):
    """Eq. 4 with two networks -> net(x, t, y, w) as of one that takes the scale w (B,) as an input: 1 + the paper's, 1 is no guidance."""
    def net(x, t, y, w):
        C, w, nothing = x.shape[1], column(w, x), torch.full_like(y, uncond.num_classes)
        return w * cond(x, t, y)[:, :C] - (w - 1) * uncond(x, t, nothing)[:, :C]                   # (B, C, H, W)
    net.guidance, net.num_classes = True, cond.num_classes
    return net


def kd_loss(student, teacher, schedule, x0, y, t, noise, w=None, prediction="edm", alpha=0.0):
    """Eq. 5; with scales of guidance w (B,) Eq. 6; with alpha > 0 Eq. 8, of which alpha = 1 is Eq. 3 -> the loss.

    x0, noise (B, C, H, W); y (B,) labels, already dropped; t (B,) times of the schedule. student, teacher: net(x, t, y), or net(x, t, y, w) where they
    take w. A mean square of outputs is lambda_sigma |D - D|^2 where the preconditioning is one and the same, since lambda_sigma c_out^2 = 1.
    """
    C, x_t = x0.shape[1], add_noise(schedule, x0, noise, t)
    guided = lambda net: net if w is None else guide(net, w)                                       # both halves, or w as an input
    out, loss = guided(student)(x_t, t, y)[:, :C], 0.0                                             # (B, C, H, W)
    if alpha < 1:
        with torch.no_grad():
            target = guided(teacher)(x_t, t, y)[:, :C]                                             # D_phi, or D_phi^w of Eq. 4
        loss = (1 - alpha) * (out - target).square().mean()                                        # Eq. 5, 6
    if alpha > 0:
        loss = loss + alpha * (out - from_x0_eps(schedule, x0, noise, t, prediction)).square().mean()   # Eq. 3
    return loss                                                                                    # Eq. 8


def ema_decay(images, batch, half_life):
    """Decay of the average at a step: a half-life in images, at first a twentieth of the images seen (EDM)."""
    return 0.5 ** (batch / max(min(half_life, 0.05 * images), 1e-8))


# ---- Training -----------------------------------------------------------------------------------------


def main(args):
    proc, began = Processes(args.amp), time.perf_counter()
    info = train.describe_base(args, "edm")
    arch = fill_defaults(args, info)
    proc.check_batch(args.batch_size, args.accumulate)
    schedule, pred = make_schedule(info["schedule"]).to(proc.device), info["prediction"]
    if args.dry_run:
        return say(proc, plan(args, info, proc, arch))

    # The teacher is frozen; the student starts from random weights:
    base, base_info = train.base_model(args, "edm")
    teacher = base_out = proc.mixed(proc.frozen(base, args))
    torch.manual_seed(args.seed)
    net = models.build(arch)
    student, ema, opt = proc.student(net, args), EMA(net, 1.0), runtime.adamw(net, args.lr)
    info = {**base_info, "name": args.student, "arch": arch, "method": "kd", "nfe": args.nfe, "cfg": args.cfg}
    if args.uncond:
        teacher = guided_by(base_out, proc.mixed(proc.frozen(load_uncond(args, base_info), args)))

    # Resume:
    state, start = checkpoints.prepare(args, proc), 0
    if state:
        start = state["step"]
        net.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])
        ema.load(state["ema"])
        del state
        if start >= args.steps and train.measured(args):
            return train.report(args, proc)

    # Setup data; without any, the teacher's own samples:
    dataset, _ = train.training_data(args, base_out, base_info, proc)
    info["null"], null = (dataset.null, dataset.null.to(proc.device)) if dataset.text else (None, info["classes"])
    B, student_out = args.batch_size, proc.mixed(student)
    guard, stop, log = Guard(proc), Stop(proc, args), Log(args, proc, start, args.steps, "kd", cost(args, base_info, arch))
    stream = data.batches(dataset, proc, args.seed, B, start)
    for step in range(start, args.steps):
        (x0, y), rng = next(stream), StepRandom(proc, args.seed, step, B)
        net.dropout, net.rng = args.dropout, rng  # where a network has dropout, its masks depend on (seed, step) alone, too
        t = train.training_times(schedule, rng)
        y = torch.where((rng.uniform() < args.drop).view(-1, *[1] * (y.ndim - 1)), null, y)
        w = args.w[0] + (args.w[1] - args.w[0]) * rng.uniform() if args.w else None
        loss_of = lambda *rows: kd_loss(student_out, teacher, schedule, *rows, pred, args.alpha)
        loss = proc.backward(student, loss_of, args.accumulate, x0, y, t, rng.normal(x0.shape[1:]), w)
        for group in opt.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / max(args.warmup, 1))
        guard.update(opt, loss, step)
        ema.update(net, step, ema_decay((step + 1) * B, B, args.half_life))

        save, ended = stop.after(done := step + 1)
        if log.step(done, loss):
            guard.check(args.out)
        if save:
            guard.check(args.out)
            checkpoints.save(args, proc, {"model": net.state_dict(), "ema": ema.state_dict(net), "opt": opt.state_dict(), "step": done, **info})
        if ended and done < args.steps:
            runtime.stopped(args, proc, done)
    log.close(), stop.restore()
    proc.barrier()  # the others read what rank 0 has written

    # Teacher, student and the baseline, score matching for as many steps, on the same noise and labels:
    entries = {}
    if args.eval_samples:
        files = {"after": f"{args.out}/last.pt"}
        if args.alpha < 1:
            say(proc, f"the control: score matching (Eq. 3) for {args.steps} steps")
            main(argparse.Namespace(**{**vars(args), "alpha": 1.0, "dropout": train.DROPOUT, "w": None, "uncond": None, "out": f"{args.out}/dsm", "eval_samples": 0,
                                       "drop": 0.1 if args.w else args.drop}))  # guided as usual, so it must know the null label
            files = {"score matching": f"{args.out}/dsm/last.pt", **files}
        nets = {"before": (teacher, base_info), **{k: (proc.mixed(proc.frozen(net)), made) for k, (net, made) in ((k, checkpoints.load_model(f)) for k, f in files.items())}}
        entries = {name + (f", {nfe} evaluations" if nfe != args.nfe else ""): (net, made, nfe, args.cfg) for nfe in sorted({args.nfe, 9}) for name, (net, made) in nets.items()}
    train.measure(args, proc, "kd", time.perf_counter() - began, entries)


def load_uncond(args, info):
    """The second network of Eq. 4, which knows no classes. Raises UserError."""
    path = args.uncond
    if path.startswith("DDPM++"):
        path = checkpoints.upstream_checkpoint(path, None, runtime.CACHE)
    elif "://" in path:
        path = checkpoints.fetch(path, runtime.CACHE, check=checkpoints.load_model, flag="--uncond")
    net, other = checkpoints.load_model(path)
    shape = lambda arch: (arch["in_channels"], arch["input_size"])
    if other["classes"] or any(other[k] != info[k] for k in ("prediction", "schedule", "scale")) or shape(other["arch"]) != shape(info["arch"]):
        raise UserError(f"--uncond {args.uncond}: must be like the teacher, but without classes")
    return net


def cost(args, info, arch):
    """Floating-point operations of a step: the student's forward and backward, the teacher's forwards."""
    student, teacher = models.count(arch)[1], models.count(info["arch"])[1]
    return (3 * student + (teacher * (2 if args.w else 1) if args.alpha < 1 else 0)) * args.batch_size


def plan(args, info, proc, arch):
    """What --dry-run prints."""
    (params, flops), (teacher_params, teacher_flops) = models.count(arch), models.count(info["arch"])
    guided, heun = args.cfg != 1 and info["classes"] > 0, info["solver"] == "heun"
    each = lambda flops, nfe, halves: f"{nfe * flops * halves / 1e9:.4g}"
    line = lambda nfe: (f"             {(nfe + 1) // 2:2} steps, {nfe:2} evaluations" if heun else f"             {nfe:2} evaluations") + \
        f": student {each(flops, nfe, 2 if guided and not args.w else 1)}, teacher {each(teacher_flops, nfe, 2 if guided else 1)}"
    return "\n".join([
        f"KD of {info['name']}, {teacher_params / 1e6:.1f}M parameters, {teacher_flops / 1e9:.4g} GFLOP a forward and sample, into {args.student}, {params / 1e6:.1f}M, {flops / 1e9:.4g} GFLOP",
        f"training     {args.steps:,} steps of {args.batch_size} ({proc.world} x {args.batch_size // proc.world}), lr {args.lr:g} after {args.warmup:,} steps, half-life {args.half_life:,} images, "
        + (f"scales of guidance {args.w[0]:g} to {args.w[1]:g}, without classes {args.uncond or 'the teacher itself'}" if args.w else f"labels dropped {args.drop:g}")
        + f", alpha {args.alpha:g}" + (f", dropout {args.dropout:g}" if arch["net"] == "DDPM++" else "") + f", on {args.data}",
        *train.resources(args, proc, info["arch"], arch, cost(args, info, arch), 2, 2 if args.uncond else 1),
        f"sampling     {args.nfe} evaluations, guidance {args.cfg:g}; GFLOP a sample at", *map(line, sorted({5, 9, 19, 35, args.nfe} if heun else {10, 20, 50, args.nfe}))])


# ---- Arguments ----------------------------------------------------------------------------------------

# A.1; the learning rate's ramp-up over 10 million images and the half-life as in EDM.
PAPER = dict(student="DDPM++-96", steps=100_000, batch_size=512, lr=1e-3, half_life=500_000, nfe=19, eval_samples=0, log_every=100, save_every=1000)
SD = dict(PAPER, student="SD-KD", lr=3e-4, warmup=0, half_life=6931 * 512, nfe=50)  # A.2; Stable Diffusion's average of 0.9999 a step
OTHER = dict(PAPER, student=None, lr=1e-4, warmup=0, nfe=50)  # networks that the paper has not: the learning rate of upstream DiT
DIGITS = dict(data="digits", steps=600, batch_size=96, lr=1e-2, warmup=50, half_life=10_000, eval_samples=2000, log_every=50, save_every=200)  # lr: experiments/kd_digits.py


def fill_defaults(args, info):
    """Defaults for the digits and for the rest; returns the student's arch. Raises UserError."""
    edm, text, K = info["prediction"] == "edm", info["arch"].get("context") == "text", info["classes"]
    knows_null = text or K and (info["method"] or not edm)  # released DDPM++ have not learned the null label
    if info["arch"].get("guidance") or info["only_node"] is not None:
        raise UserError("this teacher takes the scale of guidance as an input, or makes one step only; give --ckpt a whole one")
    if args.uncond and not args.w:
        raise UserError("--uncond is the second network of guided distillation: say how far with --w 1 4")
    if args.w and not (1 <= args.w[0] <= args.w[1] < math.inf and K) or args.w and (args.alpha or args.drop):
        raise UserError("--w takes two scales of guidance of at least 1 in their order, wants a teacher with classes, and goes neither with --alpha nor with --drop")
    if args.w and not args.ckpt and args.model == "DDPM++-t" and not args.uncond:
        args.uncond = "DDPM++-t-uncond"  # the paper's second teacher
    preset = PAPER if edm else SD if text else OTHER
    if train.is_digits(info):
        preset = {**preset, **DIGITS, **(dict(student="DDPM++-8x1") if edm else dict(lr=3e-3))}  # of a DiT: train.py's
    if not (args.student or preset["student"]):
        raise UserError(f"say which network the student is, a smaller one of {info['name']}'s kind, as --student DiT-S/2")
    cifar = info["arch"]["input_size"] == 32 and info["scale"] is None
    args.dropout = args.dropout if args.dropout is not None else train.DROPOUT if args.alpha == 1 else 0.0  # the baseline's alone (A.1)
    args.drop = args.drop if args.drop is not None else 0.1 if knows_null and not args.w else 0.0
    args.batch_size = args.batch_size if args.batch_size is not None else preset["batch_size"]
    own = min(max(info["cfg"], args.w[0]), args.w[1]) if args.w else info["cfg"]
    train.fill(args, info, {"data": "cifar10" if cifar else f"synthetic:{info['nfe'] or 50}", "warmup": round(1e7 / max(args.batch_size, 1)), "cfg": own, **preset})
    runtime.check_positive(args, "half_life", "nfe")
    solver_grid(make_schedule(info["schedule"]), info["solver"], args.nfe, info["grid"])  # can the student be sampled so?
    if not 0 <= args.alpha <= 1 or not 0 <= args.drop <= 1 or not 0 <= args.dropout < 1 or args.warmup < 0:
        raise UserError("--alpha, --drop and --dropout must lie between 0 and 1, --warmup must not be negative")
    if text and args.data.startswith("synthetic"):
        raise UserError("a model with prompts cannot make its own data: give --data LATENTS, which data.py encode makes")
    if not knows_null and K and (args.drop or not args.uncond and (args.w or args.cfg != 1)):
        raise UserError("this teacher knows classes and no null label: guided distillation wants --uncond CKPT, and without --w leave --drop and --cfg out")
    if args.w and not args.w[0] <= args.cfg <= args.w[1]:
        raise UserError(f"--cfg {args.cfg:g}: the student learns guidance from {args.w[0]:g} to {args.w[1]:g}; widen --w, or sample within it")
    arch = models.make_arch(args.student, info["arch"]["input_size"], info["arch"]["in_channels"], K)
    if (arch["net"] == "DDPM++") != edm or (arch.get("context") == "text") != text or (args.w and arch["net"] == "UNet"):
        raise UserError(f"--student {args.student}: EDM's teachers want a DDPM++, those with prompts a U-Net with prompts, others a DiT, SiT or (without --w) a U-Net")
    if text and arch["context_dim"] != info["arch"]["context_dim"] or arch["num_classes"] != info["arch"]["num_classes"]:
        raise UserError(f"--student {args.student}: must know the same classes or prompts as the teacher")
    return {**arch, "guidance": True} if args.w else arch


def parser():
    p = runtime.Parser(prog="kd.py", description=__doc__, formatter_class=runtime.Raw)
    p.add_argument("--model", help="the teacher: DDPM++-t-uncond, DDPM++-t, DiT-XL/2, ...; released weights are fetched where there are any")
    p.add_argument("--image-size", type=int, help="of the released weights (default: what they were made for)")
    p.add_argument("--ckpt", help="the teacher: a checkpoint's path or URL, ours or upstream's; default: a DDPM++ of the digits, made here")
    p.add_argument("--student", help="of the teacher's kind: DDPM++-{32,64,96,128} (default 96, digits 8x1), SD-KD, DiT-S/2, ...")
    p.add_argument("--data", help="digits, mnist, cifar10, ..., a folder of images or cached latents, or synthetic:STEPS")
    p.add_argument("--classes", type=int, help="number of classes, where the data does not tell")
    p.add_argument("--w", type=float, nargs=2, metavar="SCALE", help="guided distillation: range of the scales that the student takes as an input; 1 4 is the paper's 0 to 3")
    p.add_argument("--uncond", metavar="CKPT", help="the teacher without classes, for --w: path, URL or DDPM++-t-uncond (default with --model DDPM++-t); else the teacher itself with the null label")
    p.add_argument("--drop", type=float, metavar="P", help="probability of the null label, where the teacher knows it and --w is not given (default 0.1)")
    p.add_argument("--alpha", type=float, default=0.0, help="Eq. 8: weight of score matching; 1 is the baseline")
    p.add_argument("--dropout", type=float, metavar="P", help="in DDPM++ students (default 0; 0.1 with --alpha 1)")
    p.add_argument("--half-life", type=float, metavar="IMAGES", help="of the averaged weights (default 500,000)")
    p.add_argument("--nfe", type=int, help="evaluations of the network when sampling; Heun's N steps take 2N - 1 (default 19)")
    p.add_argument("--cfg", type=float, help="guidance when sampling (1: none)")
    p.add_argument("--steps", type=int)
    p.add_argument("--batch-size", type=int, help="of all processes together")
    p.add_argument("--lr", type=float)
    p.add_argument("--warmup", type=int, help="steps over which the learning rate rises (default: 10 million images; networks the paper has not, 0)")
    p.add_argument("--eval-samples", type=int, help="samples per row of the table (digits: 2000, else 0)")
    runtime.common_arguments(p, "runs/kd")
    return p


if __name__ == "__main__":
    runtime.run(main, parser().parse_args())
