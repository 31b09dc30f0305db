"""DSD: direct self-distillation. While a model samples, its next step teaches the step before.

"Self-Distillation for Diffusion", https://openreview.net/forum?id=QKqWnNkwPL
No data and no teacher are needed.

Algorithm 2, for every depth i of a schedule: U_i trajectories of N_i steps (t counts the nodes of
the grid of N_i steps, 0 is clean):

    z_N ~ N(0, I), a label, a scale of guidance w ~ U[1, 3]
    for t = N_i, N_i - 2, ..., 2:   t' = t - 1, t'' = t - 2
        two DDIM steps:
        z_t'  = alpha_t'  x_theta(z_t)  + sigma_t'/sigma_t   (z_t  - alpha_t  x_theta(z_t))
        z_t'' = alpha_t'' x_theta(z_t') + sigma_t''/sigma_t' (z_t' - alpha_t' x_theta(z_t'))
        x'  = (z_t'  - sigma_t'/sigma_t  z_t) / (alpha_t'  - sigma_t'/sigma_t  alpha_t)
            = x_theta(z_t)
        x'' = (z_t'' - sigma_t''/sigma_t z_t) / (alpha_t'' - sigma_t''/sigma_t alpha_t)    detached
        L = max(1, alpha_t^2 / sigma_t^2) | x' - x'' |^2
        one update; continue from z_t''                                        two evaluations

--variant dsdn: N stays constant. dsdi: N halves. dsdgl: N falls by 2, with (nearly) as many updates
at every depth, as in dsdi. dsdgexp: N falls by 2, with more and more updates (Appendix J). tsd: as
dsdi, but a frozen teacher makes both steps (three evaluations), and the student replaces the
teacher when a depth ends.

--from-scratch: training DSD, L = alpha | v_hat - v |^2 + beta | x' - x'' |^2 on data (Eq. 1).

Differences from the paper:
- Its U_i would make half of its P updates. Ours are doubled: P in all (--steps).
- Its Eq. 2 (dsdgexp) does not add up as printed. Shares e^(1/(N_i - 2)) seem to be meant.
- Its text has another target, x_theta(z_t'), in the same direction: --target next.
- The paper is silent on the batch (its authors' code: 1; here 8), on the warm-up (here 5 %), on
  whether w is drawn per sample (here one per sample and trajectory), on guidance of the samples,
  and on N of the pairs in Eq. 1 (here 128).
- The loss is a mean, its gradient is clipped at 1, and x0 is not thresholded.
- The EMA weights are sampled; TSD's teacher is the raw student.
- Nodes lie at round(T j / N) - 1, in training and in sampling.

    python dsd.py                                                    the digits, on a CPU
    python dsd.py --model LDM-ImageNet --ckpt model.ckpt             one GPU
    torchrun --nproc_per_node 8 dsd.py --model LDM-CelebAHQ --ckpt model.ckpt --variant dsdi

Writes runs/dsd/{last.pt, log.jsonl, metrics.json, samples.png}.
"""
import argparse
import copy
import math
import time
from collections import Counter
from functools import partial
from itertools import accumulate

import torch

import train
from kit import checkpoints
from kit.base import (
    apply_method_defaults,
    can_guide,
    check_null,
    describe_base,
    is_digits,
    is_image_folder,
    load_base,
    resolve_checkpoint,
)
from kit.cli import (
    UserError,
    add_base_arguments,
    add_data_arguments,
    add_run_arguments,
    apply_defaults,
    arguments,
    check_cfg,
    check_positive,
    make_parser,
    refuse_without_effect,
    run_script,
    say,
)
from kit.evaluate import Entry, finish, is_measured, print_finished
from kit.plan import batch_line, guidance_line, in_millions, resources, step_flops
from kit.processes import Processes, StepRandom
from kit.run import EMA, Run, adamw, set_lr
from solvers import (
    add_noise,
    ddim_invert,
    ddim_step,
    from_x0_eps,
    guide,
    make_grid,
    make_schedule,
    schedule_grid,
    to_x0_eps,
)

# ---- Method ------------------------------------------------------------------------------------
# x0, z_t, noise (B, C, H, W). Timesteps t > mid > u (B,), nodes of a solver's grid or its end.
# y (B,) labels. w (B,) scales of guidance, 1 is none; or None.


def predict(net, schedule, z_t, t, y, w=None, prediction="eps"):
    """x_theta(z_t), guided by w: (B, C, H, W)."""
    if w is not None:
        net = guide(net, w)
    out = net(z_t, t, y)[:, :z_t.shape[1]]
    return to_x0_eps(schedule, z_t, out, t, prediction)[0]


@torch.no_grad()
def two_steps(net, schedule, z_t, x1, t, mid, u, y, w=None,  # noqa: PLR0913
              prediction="eps", target="pd"):
    """Two DDIM steps t -> mid -> u from z_t -> (x'', z_t''), both (B, C, H, W).

    x1 = x_theta(z_t) is known, so this is one evaluation.
    target "pd": the x0 whose one step t -> u lands where the two do (Algorithm 2);
    target "next": what the network predicts at mid (the paper's text).
    """
    z_mid = ddim_step(schedule, z_t, x1, t, mid, "x0")                            # z_t'
    x2 = predict(net, schedule, z_mid, mid, y, w, prediction)                     # x_theta(z_t')
    z_u = ddim_step(schedule, z_mid, x2, mid, u, "x0")                            # z_t''
    if target == "pd":
        x2 = ddim_invert(schedule, z_t, z_u, t, u)                                # x''
    return x2, z_u


def dsd_loss(student, schedule, z_t, t, mid, u, y, w=None,  # noqa: PLR0913
             prediction="eps", target="pd", teacher=None):
    """One update of Algorithm 2 -> (loss, aux), aux {"z_u": z_t''}, where the trajectory goes on.

    Two evaluations, the second without gradient; with a teacher (TSD) three.
    """
    x1 = predict(student, schedule, z_t, t, y, w, prediction)       # x', since a DDIM step inverts
    first = x1
    if teacher is not None:
        with torch.no_grad():
            first = predict(teacher, schedule, z_t, t, y, w, prediction)
    stepping = student if teacher is None else teacher
    x2, z_u = two_steps(stepping, schedule, z_t, first, t, mid, u, y, w, prediction, target)
    alpha, sigma = schedule.alpha_sigma(t, z_t)
    weight = (alpha / sigma).square().clamp(min=1)                  # w(lambda_t), the truncated SNR
    loss = (weight * (x1 - x2).square()).mean()                     # w |x' - x''|^2
    return loss, {"z_u": z_u}


def training_loss(net, schedule, x0, y, t, noise, prediction="v",  # noqa: PLR0913
                  alpha=0.85, beta=0.15, N=128, target="pd"):
    """Eq. 1 -> (loss, aux): the ordinary loss, and that of Algorithm 2 from z_t made of data.

    t (B,) long, from 0 to T - 1. t' and t'' lie T / N and 2 T / N below; where the data is near,
    at 0 and clean. Two evaluations, the second without gradient. aux: both terms.
    """
    k = max(1, round(schedule.T / N))
    z_t = add_noise(schedule, x0, noise, t)
    out = net(z_t, t, y)[:, :x0.shape[1]]                           # v_hat
    x1, _ = to_x0_eps(schedule, z_t, out, t, prediction)            # x'
    mid = (t - k).clamp(min=0)
    u = (t - 2 * k).clamp(min=-1)
    x2, _ = two_steps(net, schedule, z_t, x1, t, mid, u, y, None, prediction, target)    # x''
    target_out = from_x0_eps(schedule, x0, noise, t, prediction)
    plain = (out - target_out).square().mean()                      # |v_hat - v|^2
    own = (x1 - x2).square().mean()                                 # |x' - x''|^2
    return alpha * plain + beta * own, {"plain": plain.detach(), "own": own.detach()}


# ---- Training ----------------------------------------------------------------------------------


def allocate(variant, N, P):
    """The P updates from N steps downwards: a list of (N_i, k), update k of the N_i / 2 of a
    trajectory.

    U_i is rounded so that the total stays exact; DSDN may end within a trajectory. Raises
    UserError.
    """
    halves = variant in ("dsdi", "tsd")
    if not 2 <= N <= 1000 or N % 2 or (halves and N & (N - 1)):
        allowed = "a power of 2" if halves else "an even number"
        raise UserError(f"--depth {N}: {variant} takes steps in pairs, down to 2: give {allowed}")
    if variant == "dsdn":
        depths = [N]
    elif halves:
        depths = [N >> i for i in range(N.bit_length() - 1)]
    else:
        depths = list(range(N, 0, -2))
    shares = [1.0] * len(depths)
    if variant == "dsdgexp":                                        # Appendix J
        shares = [math.exp(1 / max(n - 2, 1)) for n in depths]

    updates = []
    for n, share in zip(depths, accumulate(shares)):
        U = (P * share / sum(shares) - len(updates)) / (n // 2)     # U_i = 2 P / (|N| N_i)
        U = math.ceil(U) if variant == "dsdn" else int(U + 0.5)
        if U < 1 or P < N // 2:
            raise UserError(f"--steps {P}: too few for one trajectory at every depth from {N} "
                            "down; give more, or a smaller --depth")
        updates += U * [(n, k) for k in range(n // 2)]
    return updates[:P]


def learning_rate(step, steps, warmup=0.05, floor=0.1):
    """Factor of --lr: linear warm-up over 5 % of the steps, then half a cosine from 1 to 10 %."""
    begin = max(1, round(warmup * steps))
    if step < begin:
        return (step + 1) / begin
    cosine = 0.5 + 0.5 * math.cos(math.pi * (step - begin) / max(steps - begin, 1))
    return floor + (1 - floor) * cosine


def main(args):
    if args.from_scratch:
        return from_scratch(args)
    proc = Processes(args.amp)
    began = time.perf_counter()
    args.ckpt = resolve_checkpoint(args)
    spec = describe_base(args)
    schedule = make_schedule(spec["schedule"]).to(proc.device)
    updates = apply_dsd_defaults(args, spec)
    proc.check_batch(args.batch_size, args.accumulate)
    kind = None if schedule.continuous else "uniform"
    grids = {N: schedule_grid(schedule, kind, N) for N, _ in updates}
    forwards = forwards_per_step(args, spec)
    if args.dry_run:
        return say(proc, plan(args, spec, proc, updates))

    # Setup networks: the base model is the student; with TSD its frozen copy is the teacher.
    net, base_spec, args.ckpt = load_base(args, proc, train.make_teacher)
    args.model = base_spec["name"]
    frozen = proc.frozen(copy.deepcopy(net), args) if args.variant == "tsd" else None
    wrapped = proc.student(net, args)
    student = proc.autocast(wrapped)
    teacher = proc.autocast(frozen) if frozen else None
    ema = EMA(net, args.ema)
    opt = adamw(net, args.lr, settings_of(spec)["betas"])
    spec = {**base_spec, "method": args.variant, "grid": kind, "nfe": args.nfe, "cfg": args.cfg,
            "solver": "ddim", "reading": None}

    # Resume, also in the middle of a trajectory:
    state = {"model": net, "opt": opt, "ema": ema, "teacher": frozen}
    flops = step_flops(args, spec, forwards)
    run = Run(args, proc, args.variant, wrapped, state, spec, flops, fixed=["steps"])
    if run.is_finished and is_measured(args):
        return print_finished(args, proc)
    z = None
    if run.step:
        z = proc.take_share(run.extra["z"]).to(proc.device)
    start = run.step

    for step, _ in run.steps():
        N, k = updates[step]
        if k == 0 or step == start:
            # A trajectory has the random numbers of its first update:
            rng = StepRandom(proc, args.seed, step - k, args.batch_size)
            noise = rng.normal(net.sample_shape)
            y = rng.integers(0, max(spec["classes"], 1))
            w = draw_scales(args, spec, rng)
            z = noise if k == 0 else z
        if teacher and step and updates[step - 1][0] != N:
            # important! TSD's student becomes the teacher of the next depth
            frozen = proc.frozen(copy.deepcopy(net), args)
            teacher = proc.autocast(frozen)
            state["teacher"] = frozen
        t, mid, u = times_of(grids[N], k, y)
        reached = []
        for part in run.parts(z, t, mid, u, y, w):
            loss, aux = dsd_loss(student, schedule, *part, spec["prediction"], args.target,
                                 teacher)
            run.backward(loss)
            reached.append(aux["z_u"])
        z = torch.cat(reached)
        run.extra["z"] = partial(proc.gather_share, z)   # called when a checkpoint is written
        set_lr(opt, args.lr * learning_rate(step, args.steps))
        run.optimizer_step(opt, clip=1.0)
        ema.update(step)

    # Measure before, after and the control on the same noise and labels:
    entries = measure_at(args, proc, spec) if args.eval_samples else {}
    finish(args, proc, args.variant, began, entries)


def draw_scales(args, spec, rng):
    """(B,) scales of guidance between the two of --w, or None where there is no guidance."""
    if not is_guided(args, spec):
        return None
    low, high = args.w
    return low + (high - low) * rng.uniform()


def is_guided(args, spec):
    return spec["classes"] > 0 and args.w != [1, 1]


def times_of(grid, k, y):
    """t, t', t'' of update k of a trajectory, each (B,)."""
    return [torch.full((len(y),), node, device=y.device) for node in grid[2 * k:2 * k + 3]]


def measure_at(args, proc, spec):
    """The rows of the table, also at other numbers of steps."""
    say(proc, f"the control: the ordinary loss for {args.steps} more steps")
    nets = {
        "before": checkpoints.load_model(args.ckpt)[0],
        "continued training": train.train_control(args, "digits"),
        "after": checkpoints.load_model(f"{args.out}/last.pt")[0],
    }
    return table_entries(args, proc, {name: (net, spec) for name, net in nets.items()}, (2, 4, 8))


def table_entries(args, proc, nets, nfes):
    """{name: (network, spec)} -> entries of the table: every network at --nfe steps and at nfes."""
    entries = {}
    for nfe in sorted({args.nfe, *nfes}):
        for name, (net, spec) in nets.items():
            if nfe != args.nfe:
                name += f", {nfe} steps"
            denoise = proc.autocast(proc.frozen(net))
            entries[name] = Entry(denoise, {**spec, "nfe": nfe}, nfe, args.cfg)
    return entries


def forwards_per_step(args, spec):
    """Forwards of an update; a backward counts as two."""
    forwards = 5 if args.variant == "tsd" else 4
    return 2 * forwards if is_guided(args, spec) else forwards


def plan(args, spec, proc, updates):
    """What --dry-run prints."""
    forwards = forwards_per_step(args, spec)
    counts = Counter(n for n, _ in updates)
    depths = ", ".join(f"{n}: {count}" for n, count in counts.items())
    beta1, beta2 = settings_of(spec)["betas"]
    guidance = "no guidance"
    if is_guided(args, spec):
        guidance = f"guidance {args.w[0]:g} to {args.w[1]:g}"
    return "\n".join([
        f"{args.variant.upper()} of {spec['name']}, {in_millions(spec['arch'])} parameters, "
        f"predicting {spec['prediction']}; no data",
        f"updates      {args.steps:,} of batch {batch_line(args, proc)}, by depth {depths}",
        f"sampling     {args.nfe} steps; {guidance_line(spec, args.cfg)}",
        f"training     lr {args.lr:g} -> {args.lr / 10:g}, Adam betas {beta1:g} {beta2:g}, "
        f"EMA {args.ema:g}, {guidance}, target {args.target}",
        f"units        {forwards} forward units per update, a backward counts as two",
        *resources(args, proc, spec["arch"], step_flops(args, spec, forwards), weight_copies=2,
                   frozen=int(args.variant == "tsd"), rows=2 if is_guided(args, spec) else 1),
    ])


# ---- Training from scratch ---------------------------------------------------------------------


def from_scratch(args):
    """Training DSD: train.py with Eq. 1 as its loss. The control is train.py with its own loss,
    for as many steps."""
    began = time.perf_counter()
    own = from_scratch_arguments(args)
    args.steps = own.steps
    args.batch_size = own.batch_size
    args.lr = own.lr
    args.model = own.model
    alpha, beta = args.loss_weights

    def objective(net, schedule, x0, y, t, noise, prediction):
        return training_loss(net, schedule, x0, y, t, noise, prediction, alpha, beta, args.depth,
                             args.target)

    # What the loss depends on is compared when a run resumes:
    compared = argparse.Namespace(**vars(own), loss_weights=args.loss_weights, depth=args.depth,
                                  target=args.target, nfe=args.nfe, cfg=args.cfg)
    last = train.main(compared, objective, "dsd-scratch", quiet=True)
    proc = Processes(args.amp)
    if args.dry_run:
        return say(proc, f"Eq. 1: alpha {alpha:g}, beta {beta:g}, pairs of {args.depth} steps, "
                         f"target {args.target}")
    if is_measured(args):
        return print_finished(args, proc)
    proc.barrier()  # important! or rank 0 writes what another has not yet looked for

    entries = {}
    if args.eval_samples:
        say(proc, f"the control: the ordinary loss for {args.steps} steps")
        plain = argparse.Namespace(**{**vars(own), "out": f"{args.out}/plain", "sample_every": 0})
        nets = {"plain training": checkpoints.load_model(train.main(plain, quiet=True)),
                "after": checkpoints.load_model(last)}
        entries = table_entries(args, proc, nets, (4, 10))
    finish(args, proc, "dsd-scratch", began, entries)


def from_scratch_arguments(args):
    """Fill missing arguments -> the arguments of train.py. Raises UserError."""
    if args.data is None:
        args.data = "digits"
    refuse_without_effect(args, "ckpt variant w", "with --from-scratch, which trains a new network "
                                                  "on data")
    if (args.model or "").startswith("SiT"):
        raise UserError(f"--model {args.model}: --from-scratch wants discrete steps; take no SiT")
    warmup = None  # train.py's
    if not args.eval_samples and (args.data != "digits" or args.eval_samples == 0):
        refuse_without_effect(args, "nfe cfg", "with --from-scratch where nothing is measured")
    if args.data == "digits":
        apply_defaults(args, dict(nfe=50, eval_samples=2000))
    else:
        warmup = SCRATCH["warmup"]
        apply_defaults(args, {k: SCRATCH[k] for k in ("steps", "lr", "batch_size")})
    apply_defaults(args, {k: SCRATCH[k] for k in ("loss_weights", "depth", "nfe", "cfg",
                                                  "eval_samples")})
    if args.image_size is None and is_image_folder(args.data):
        args.image_size = SCRATCH["image_size"]
    if not args.loss_weights[1]:
        refuse_without_effect(args, "depth target", "with --loss-weights ALPHA 0, which is "
                                                    "train.py's loss")
    check_arguments(args)
    if args.eval_samples and (args.data != "digits" or args.eval_samples < 2):
        raise UserError(f"--eval-samples {args.eval_samples}: at least 2, and only for the digits; "
                        "else 0, and fid.py measures what sample.py makes")
    own = arguments(
        train.parser(), prediction="v", data=args.data, model=args.model, steps=args.steps,
        classes=args.classes, trust_labels=args.trust_labels, flip=args.flip, workers=args.workers,
        image_size=args.image_size, batch_size=args.batch_size, lr=args.lr, warmup=warmup,
        ema=args.ema, seed=args.seed, out=args.out, resume=args.resume, log_every=args.log_every,
        save_every=args.save_every, save_minutes=args.save_minutes,
        sample_every=args.sample_every, dry_run=args.dry_run, accumulate=args.accumulate,
        grad_checkpointing=args.grad_checkpointing, amp=args.amp, compile=args.compile)
    own.given = args.given
    train.apply_train_defaults(own)
    return own


# ---- Settings ----------------------------------------------------------------------------------

# Table 3: P, lr, Adam's betas, EMA (the body swaps the two P). Models it does not know take the
# row of their kind.
TABLE_3 = {
    "classes": dict(steps=5000, lr=1e-7, betas=(0.99, 0.999), ema=0.9995),      # ImageNet-256
    "no classes": dict(steps=4000, lr=1e-6, betas=(0.9, 0.98), ema=0.995),      # CelebA-HQ, LSUN
}
PAPER = dict(variant="dsdn", batch_size=8, depth=64, nfe=4, w=[1.0, 3.0], eval_samples=0,
             log_every=100, save_every=500)

# The digits: chosen by experiments/dsd/digits.py.
DIGITS = dict(variant="dsdgl", steps=256, lr=1e-5, betas=(0.9, 0.98), ema=0.9, batch_size=64,
              depth=16, nfe=4, w=[1.0, 1.0], eval_samples=2000, log_every=32, save_every=64)

# From scratch. CelebA, 64x64: 65,000 steps (LSUN Bedroom: 50,000 and Church: 40,000 steps, both at
# lr 4e-4). Batch, and a warm-up of 1,000 steps, as in the authors' code.
SCRATCH = dict(steps=65_000, lr=1e-4, batch_size=128, warmup=1000, image_size=64,
               loss_weights=[0.85, 0.15], depth=128, nfe=128, cfg=1.0, eval_samples=0)


def settings_of(spec):
    """The settings for a base model."""
    if is_digits(spec):
        return DIGITS
    return {**PAPER, **TABLE_3["classes" if spec["classes"] else "no classes"]}


def apply_dsd_defaults(args, spec):
    """Fill missing arguments from the settings above -> allocate()'s updates. Raises UserError."""
    of_data = "data loss_weights classes trust_labels flip workers"
    refuse_without_effect(args, of_data, "without --from-scratch: a model that distils itself "
                                         "needs no data")
    settings = {k: v for k, v in settings_of(spec).items() if k != "betas"}
    if not can_guide(spec):
        settings["w"] = [1.0, 1.0]
    apply_method_defaults(args, spec, settings)
    check_arguments(args)
    check_null(args, spec)
    if args.depth == 2:
        refuse_without_effect(args, "target", "with --depth 2, where both targets are the same")
    arch = spec["arch"]
    takes_more = arch.get("context") == "text" or arch.get("guidance")
    if takes_more or spec["only_node"] is not None or spec["schedule"] == "edm":
        raise UserError("this model takes prompts or the scale of guidance as an input, is a "
                        "student of one step, or has EDM's schedule; give --ckpt a whole one with "
                        "labels or none")
    low, high = args.w
    if not 0 < low <= high < math.inf:
        raise UserError(f"--w {low:g} {high:g}: two scales of guidance in their order")
    if spec["classes"] and not can_guide(spec) and args.w != [1, 1]:
        raise UserError(f"--w {low:g} {high:g}: this model has not learned the null label, on "
                        "which guidance rests; leave --w out")
    if spec["cfg_interval"] and args.w != [1, 1]:
        raise UserError("this model is guided at some of its steps only, which DSD does not know: "
                        "add --w 1 1")
    return allocate(args.variant, args.depth, args.steps)


def check_arguments(args):
    """What both ways have in common. Raises ValueError."""
    make_grid("uniform", args.nfe)
    check_positive(args, "depth")
    check_cfg(args.cfg)
    weights_are_fine = all(0 <= v < math.inf for v in args.loss_weights or [])
    if not 0 <= (args.ema or 0) < 1 or not weights_are_fine:
        raise UserError("--ema must lie between 0 and 1, --loss-weights takes two weights that are "
                        "not negative")


def parser():
    p = make_parser("dsd.py", __doc__)
    group = p.add_argument_group("the method")
    group.add_argument("--variant", choices=["dsdn", "dsdi", "dsdgl", "dsdgexp", "tsd"],
                       help="how the number of steps falls (default: dsdn, digits dsdgl)")
    group.add_argument("--depth", type=int, metavar="N",
                       help="steps of the first depth (default: 64, digits 16); from scratch: of "
                            "the grid that spaces pairs (default: 128)")
    group.add_argument("--target", choices=["pd", "next"], default="pd",
                       help="x'' as in Algorithm 2, or the next prediction, as in the text")
    group.add_argument("--w", type=float, nargs=2, metavar="SCALE",
                       help="range of the guidance under which the model samples itself (default: "
                            "1 3; digits 1 1, none)")
    add_base_arguments(p, model="LDM-ImageNet, LDM-CelebAHQ, LDM-Bedroom, DiT-XL/2, ...; the "
                                "released weights are fetched where there are any",
                       ckpt="a checkpoint's path or URL, ours or upstream's (default: an eps "
                            "teacher of the digits, made here)",
                       image_size="of the released weights (default: what they were made for); "
                                  "from scratch of a folder's images (default: 64)")
    group = p.add_argument_group("from scratch")
    group.add_argument("--from-scratch", action="store_true",
                       help="training DSD (Eq. 1) in place of all this")
    group.add_argument("--loss-weights", type=float, nargs=2, metavar=("ALPHA", "BETA"),
                       help="alpha and beta of Eq. 1 (default: 0.85 0.15)")
    add_data_arguments(p, "from scratch: digits, mnist, cifar10, ..., a folder of images or cached "
                          "latents (default: digits)")
    group = p.add_argument_group("training")
    group.add_argument("--steps", type=int,
                       help="P, updates in all (default: Table 3; digits 256)")
    group.add_argument("--batch-size", type=int,
                       help="of all processes together (default: 8, digits 64)")
    group.add_argument("--lr", type=float, help="at its height (default: Table 3)")
    group.add_argument("--ema", type=float,
                       help="decay of the averaged weights, 0 keeps none (default: Table 3)")
    group = p.add_argument_group("sampling and measuring")
    group.add_argument("--nfe", type=int,
                       help="sampling steps afterwards (default: 4; from scratch 128, digits 50)")
    group.add_argument("--cfg", type=float,
                       help="guidance when sampling, 1 is none (default: the base model's)")
    group.add_argument("--eval-samples", type=int,
                       help="samples per row of the table (default: digits 2000, else 0)")
    add_run_arguments(p, "runs/dsd")
    return p


if __name__ == "__main__":
    run_script(main, parser().parse_args())
