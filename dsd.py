"""DSD: direct self-distillation ("Self-Distillation for Diffusion"): while a model samples, its next step teaches the one before. No data, no copy.

Algorithm 2, for every depth i of a schedule of U_i trajectories with N_i steps (t counts the nodes of the N_i-step grid, 0 is clean):

    z_N ~ N(0, I), a label, a scale of guidance w ~ U[1, 3]
    for t = N_i, N_i - 2, ..., 2:   t' = t - 1, t'' = t - 2
        z_t'  = alpha_t'  x_theta(z_t)  + sigma_t'/sigma_t   (z_t  - alpha_t  x_theta(z_t))            two DDIM steps
        z_t'' = alpha_t'' x_theta(z_t') + sigma_t''/sigma_t' (z_t' - alpha_t' x_theta(z_t'))
        x'  = (z_t'  - sigma_t'/sigma_t  z_t) / (alpha_t'  - sigma_t'/sigma_t  alpha_t)  =  x_theta(z_t)
        x'' = (z_t'' - sigma_t''/sigma_t z_t) / (alpha_t'' - sigma_t''/sigma_t alpha_t)                detached
        L = max(1, alpha_t^2 / sigma_t^2) | x' - x'' |^2,  one update, on from z_t''                   two evaluations

--variant: dsdn, N constant; dsdi, N halves; dsdgl, N falls by 2; dsdgexp, the same with ever more updates (App. J). All but the first spend (nearly) the same
number of updates on every depth. tsd is progressive distillation without data: as dsdi, but a frozen teacher makes both steps (three evaluations),
and the student replaces it when a depth ends. --from-scratch is training DSD, alpha | v_hat - v |^2 + beta | x' - x'' |^2 on data (Eq. 1).

Differences from the paper. Its U_i would make half of the P updates it reports: ours are twice that, P in all (--steps), in whole trajectories. Its
Eq. 2 (dsdgexp) adds up to nothing like P as printed: shares e^(1/(N_i - 2)) are what it seems to mean. The text's target is x_theta(z_t'): --target next;
x'' = (1 - rho) x_theta(z_t') + rho x', the same direction. Silent: batch (its authors' code: 1; here 8), warm-up (5 %), one w per trajectory and sample,
the guidance of its samples, N of the pairs in Eq. 1 (128). The gradient is clipped at 1; EMA weights are sampled, TSD's teacher is the raw student.
Nodes are T j / N for every N, also to sample. A network that predicts eps has x = (z - sigma eps) / alpha: see --weight.

    python dsd.py                                                   the digits, two minutes on two CPU cores
    python dsd.py --model LDM-ImageNet --ckpt model.ckpt            one GPU
    torchrun --nproc_per_node 8 dsd.py --model LDM-CelebAHQ --ckpt model.ckpt --variant dsdi

Writes runs/dsd/{last.pt, log.jsonl, metrics.json, samples.png}.
"""
import argparse
import copy
import math
import time
from itertools import accumulate, groupby
from pathlib import Path

import torch

import checkpoints
import models
import runtime
import train
from runtime import EMA, Guard, Log, Processes, StepRandom, Stop, UserError, say
from solvers import PROJECTIONS, add_noise, ddim_invert, ddim_step, from_x0_eps, guide, make_grid, make_schedule, schedule_grid, to_x0_eps

# ---- Method -------------------------------------------------------------------------------------------
# z, noise, x0 (B, C, H, W); timesteps t > mid > u (B,), -1 clean; y (B,) labels; w (B,) scales of guidance, 1 is none, or None.


def predict(net, schedule, z, t, y, w=None, prediction="eps"):
    """x_theta(z_t), guided: (B, C, H, W)."""
    net = net if w is None else guide(net, w)
    return to_x0_eps(schedule, z, net(z, t, y)[:, :z.shape[1]], t, prediction)[0]


@torch.no_grad()
def step_on(net, schedule, z, x1, t, mid, u, y, w=None, prediction="eps", target="pd", project=None):
    """From z_t and x1 = x_theta(z_t) two DDIM steps, one evaluation -> (x'', z_t'').

    target "pd": the x0 whose one step t -> u lands where the two do (Alg. 2); "next": what the network predicts at t' (the text).
    """
    z1 = ddim_step(schedule, z, x1, t, mid, "x0", project)                               # z_t'
    x2 = predict(net, schedule, z1, mid, y, w, prediction)                               # x_theta(z_t')
    z2 = ddim_step(schedule, z1, x2, mid, u, "x0", project)                              # z_t''
    return (x2 if target == "next" else ddim_invert(schedule, z, z2, t, u)), z2          # x''


def dsd_loss(student, schedule, z, t, mid, u, y, w=None, prediction="eps", target="pd", weight="snr", project=None, teacher=None):
    """One update of Algorithm 2 -> (loss, z_t''). Without a teacher two evaluations, the second of them without gradient; with one (TSD) three.

    weight "snr": max(1, SNR_t), as in the paper; "output": the distance of the networks' outputs, which is SNR_t for one that predicts eps.
    """
    x1 = predict(student, schedule, z, t, y, w, prediction)                              # x': a DDIM step inverts exactly
    first = x1 if teacher is None else predict_detached(teacher, schedule, z, t, y, w, prediction)
    x2, z2 = step_on(teacher or student, schedule, z, first, t, mid, u, y, w, prediction, target, project)
    alpha, sigma = schedule.at(t, z)
    if weight == "output":
        out = lambda x0: from_x0_eps(schedule, x0, (z - alpha * x0) / sigma, t, prediction)
        return (out(x1) - out(x2)).square().mean(), z2
    return ((alpha / sigma).square().clamp(min=1) * (x1 - x2).square()).mean(), z2       # w(lambda_t) |x' - x''|^2


predict_detached = torch.no_grad()(predict)


def training_loss(net, schedule, x0, y, t, noise, prediction="v", alpha=0.85, beta=0.15, N=128, target="pd"):
    """Eq. 1 -> (loss, its two terms): the ordinary loss, and that of Algorithm 2 from z_t made of data; one evaluation more than the former.

    t (B,) from 0 to T - 1; t' and t'' lie T / N and 2 T / N below, or where the data is near, at 0 and clean.
    """
    k, z = max(1, round(schedule.T / N)), add_noise(schedule, x0, noise, t)
    out = net(z, t, y)[:, :x0.shape[1]]
    x1, _ = to_x0_eps(schedule, z, out, t, prediction)
    x2, _ = step_on(net, schedule, z, x1, t, (t - k).clamp(min=0), (t - 2 * k).clamp(min=-1), y, None, prediction, target)
    plain = (out - from_x0_eps(schedule, x0, noise, t, prediction)).square().mean()      # |v_hat - v|^2
    own = (x1 - x2).square().mean()                                                      # |x' - x''|^2
    return alpha * plain + beta * own, {"plain": plain.detach(), "own": own.detach()}


def allocate(variant, N, P):
    """The plan of P updates from N steps downwards: a list of (N_i, k), update k of a trajectory of N_i steps, which has N_i / 2 of them.

    DSDN may end within a trajectory; elsewhere U_i is rounded so that the total stays exact. Raises UserError.
    """
    halvings = variant in ("dsdi", "tsd")
    if N < 2 or N % 2 or (halvings and N & (N - 1)):
        raise UserError(f"--depth {N}: {variant} takes steps in pairs, down to 2: give {'a power of 2' if halvings else 'an even number'}")
    depths = [N] if variant == "dsdn" else [N >> i for i in range(N.bit_length() - 1)] if halvings else list(range(N, 0, -2))
    shares = [math.exp(1 / max(n - 2, 1)) if variant == "dsdgexp" else 1.0 for n in depths]             # App. J
    where = []
    for n, share in zip(depths, accumulate(shares)):
        U = (P * share / sum(shares) - len(where)) / (n // 2)                                            # 2 P / (|N| N_i)
        U = math.ceil(U) if variant == "dsdn" else int(U + 0.5)
        if U < 1:
            raise UserError(f"--steps {P}: too few for one trajectory at every depth from {N} down; give more, or a smaller --depth")
        where += [(n, k) for _ in range(U) for k in range(n // 2)]
    return where[:P]


def rate(step, steps, warmup=0.05, floor=0.1):
    """Factor of the learning rate: linear warm-up over 5 % of the steps, then half a cosine from 1 to 10 %."""
    begin = max(1, round(warmup * steps))
    if step < begin:
        return (step + 1) / begin
    return floor + (1 - floor) * (0.5 + 0.5 * math.cos(math.pi * (step - begin) / max(steps - begin, 1)))


# ---- Training -----------------------------------------------------------------------------------------


def main(args):
    if args.from_scratch:
        return from_scratch(args)
    proc, began = Processes(args.amp), time.perf_counter()
    info = train.describe_base(args)
    where = fill_defaults(args, info)
    proc.check_batch(args.batch_size)
    schedule, pred, project = make_schedule(info["schedule"]).to(proc.device), info["prediction"], PROJECTIONS[info["threshold"]]
    spacing = None if schedule.continuous else "uniform"
    grids = {N: schedule_grid(schedule, spacing, N) for N, _ in where}
    if args.dry_run:
        return say(proc, plan(args, info, proc, where))

    # The base model is the student; with TSD its frozen copy the teacher:
    base, base_info = train.base_model(args)
    net = copy.deepcopy(base)
    base = proc.frozen(base)
    student, teacher = proc.student(net, args.compile), base if args.variant == "tsd" else None
    ema, opt = EMA(net, args.ema), runtime.adamw(net, args.lr, args.betas)
    base_info = {**base_info, "grid": spacing, "nfe": args.nfe, "cfg": args.cfg}
    info = {**base_info, "method": args.variant}

    # Resume, also in the middle of a trajectory:
    state, start = runtime.prepare(args, proc), 0
    if state:
        start, z = state["step"], proc.rows(state["z"]).to(proc.device)
        net.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])
        ema.load(state["ema"])
        if teacher:
            teacher = proc.frozen(models.build(net.arch), args.compile)
            teacher.load_state_dict(state["teacher"])
        del state
        if start >= args.steps and train.measured(args):
            return train.report(args, proc)

    B, K, shape = args.batch_size, info["classes"], (net.arch["in_channels"], *[net.arch["input_size"]] * 2)
    student_out, teacher_out = proc.mixed(student), teacher and proc.mixed(teacher)
    guard, stop, log = Guard(proc), Stop(proc), Log(args, proc, start, args.steps, args.variant)
    for step in range(start, args.steps):
        N, k = where[step]
        if k == 0 or step == start:  # of one trajectory, whose first update gives it its random numbers
            rng = StepRandom(proc, args.seed, step - k, B)
            noise, y = rng.normal(shape), rng.integers(0, max(K, 1))
            w = args.w[0] + (args.w[1] - args.w[0]) * rng.uniform() if K and args.w != [1, 1] else None
        if k == 0:
            z = noise
        if teacher and step and where[step - 1][0] != N:  # important! TSD's student becomes the teacher of the next depth
            teacher = proc.frozen(copy.deepcopy(net), args.compile)
            teacher_out = proc.mixed(teacher)
        t, mid, u = (torch.full((len(y),), node, device=proc.device) for node in grids[N][2 * k:2 * k + 3])
        loss, z = dsd_loss(student_out, schedule, z, t, mid, u, y, w, pred, args.target, args.weight, project, teacher_out)
        loss.backward()
        for group in opt.param_groups:
            group["lr"] = args.lr * rate(step, args.steps)
        guard.update(opt, loss, step, clip=1.0)
        ema.update(net, step)

        done, ended = step + 1, stop.now()
        if log.step(done, loss):
            guard.check(args.out)
        if done % args.save_every == 0 or done == args.steps or ended:
            guard.check(args.out)
            runtime.save(args, proc, {"model": net.state_dict(), "ema": ema.state_dict(net), "opt": opt.state_dict(), "step": done, **info,
                                      "z": proc.whole(z), "teacher": teacher and teacher.state_dict()})
        if ended and done < args.steps:
            runtime.stopped(args, proc, done)
    log.close()
    stop.restore()

    # Measure before, after and the control on the same noise and labels, also at other numbers of steps, at which the student was trained as well:
    entries = {}
    if args.eval_samples:
        say(proc, f"the control: the ordinary loss for {args.steps} more steps")
        control = proc.mixed(proc.frozen(train.continued(args, "digits")))
        before, after = proc.mixed(base), proc.mixed(proc.frozen(checkpoints.load_model(Path(args.out) / "last.pt")[0]))
        at = lambda net, info, nfe: (net, {**info, "nfe": nfe}, nfe, args.cfg)
        for nfe in sorted({2, 4, 8, args.nfe}):
            more = f", {nfe} steps" if nfe != args.nfe else ""
            entries |= {"before" + more: at(before, base_info, nfe), "after" + more: at(after, info, nfe)}
        entries["continued training"] = at(control, base_info, args.nfe)
    train.measure(args, proc, args.variant, time.perf_counter() - began, entries)


def from_scratch(args):
    """Training DSD: train.py with Eq. 1 for its loss. The control is train.py with its own, for as many steps."""
    began, args.data = time.perf_counter(), args.data or "digits"
    if args.ckpt or (args.model or "").startswith("SiT"):
        raise UserError("--from-scratch trains a new network that predicts v: leave --ckpt out, and take a model with discrete steps")
    for key, value in (SCRATCH_DIGITS if args.data == "digits" else SCRATCH).items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    runtime.check_positive(args, "depth", "nfe")
    own = train.parser().parse_args([])
    vars(own).update({k: v for k, v in vars(args).items() if k in vars(own)}, prediction="v")
    train.fill_defaults(own)
    vars(args).update({k: v for k, v in vars(own).items() if k in vars(args)})
    more = dict(mix=args.mix, depth=args.depth, target=args.target)  # go into the checkpoint, and are compared on resume
    loss = lambda *batch: training_loss(*batch, *args.mix, args.depth, args.target)
    last = train.main(argparse.Namespace(**vars(own), **more), loss, "dsd-scratch")
    if args.dry_run:
        return
    proc, entries = Processes(args.amp), {}
    if train.measured(args):
        return train.report(args, proc)
    if args.eval_samples:
        say(proc, f"the control: the ordinary loss for {args.steps} steps")
        plain = train.main(argparse.Namespace(**{**vars(own), "out": f"{args.out}/plain"}))
        nets = {"plain training": checkpoints.load_model(plain), "after": checkpoints.load_model(last)}
        train.fill(args, nets["after"][1], {})  # may refuse to measure
        entries = {name + (f", {nfe} steps" if nfe != args.nfe else ""): (proc.mixed(proc.frozen(net)), info, nfe, args.cfg)
                   for nfe in sorted({4, 10, args.nfe}) for name, (net, info) in nets.items()}
    train.measure(args, proc, "dsd-scratch", time.perf_counter() - began, entries)


def plan(args, info, proc, where):
    """What --dry-run prints."""
    params, flops = models.count(info["arch"])
    units = (5 if args.variant == "tsd" else 4) * (2 if info["classes"] and args.w != [1, 1] else 1)  # forwards an update, a backward counting as two
    depths = [f"{n}: {updates}" for n, updates in ((n, len(list(g))) for n, g in groupby(n for n, _ in where))]
    return "\n".join([
        f"{args.variant.upper()} of {info['name']}, {params / 1e6:.1f}M parameters, predicting {info['prediction']}; no data",
        f"updates      {args.steps:,} of {args.batch_size} ({proc.world} x {args.batch_size // proc.world}), by depth {', '.join(depths)}",
        f"optimiser    lr {args.lr:g} -> {args.lr / 10:g}, Adam betas {args.betas[0]:g} {args.betas[1]:g}, EMA {args.ema:g}, guidance {args.w[0]:g} to {args.w[1]:g}, weight {args.weight}, target {args.target}",
        f"cost         {units} forward units an update: {units * args.batch_size * flops:.3g} FLOP, {args.steps * units * args.batch_size * flops:.3g} FLOP in all",
        f"checkpoint   {args.out}/last.pt, {params * 16 / 2 ** 30:.2g} GiB, every {args.save_every} steps"])


# ---- Arguments ----------------------------------------------------------------------------------------

# Table 3: P, lr, Adam's betas, EMA; the body swaps the two P. Models it does not know take the row of their kind.
TABLE_3 = {True: dict(steps=5000, lr=1e-7, betas=(0.99, 0.999), ema=0.9995),   # with classes: ImageNet-256
           False: dict(steps=4000, lr=1e-6, betas=(0.9, 0.98), ema=0.995)}     # without: CelebA-HQ, LSUN-Bedroom
PAPER = dict(batch_size=8, depth=64, nfe=4, w=[1.0, 3.0], weight="snr", eval_samples=0, log_every=100, save_every=500)
DIGITS = dict(steps=256, lr=1e-5, betas=(0.9, 0.98), ema=0.9, batch_size=64, depth=16, nfe=4, w=[1.0, 1.0], weight="snr", eval_samples=2000, log_every=32, save_every=64)

# From scratch: CelebA at 64x64 for 65,000 steps; LSUN Bedroom 50,000 and Church 40,000, both at 4e-4. Batch, warm-up: silent; those of the authors' code.
SCRATCH = dict(steps=65_000, lr=1e-4, batch_size=128, warmup=1000, depth=128, nfe=128, eval_samples=0)
SCRATCH_DIGITS = dict(depth=128, nfe=50, eval_samples=2000)


def fill_defaults(args, info):
    """Defaults for the digits and for the rest; returns the plan of all updates."""
    if args.data:
        raise UserError("--data is for --from-scratch: a model that distils itself makes its own")
    train.fill(args, info, DIGITS if train.is_digits(info) else {**PAPER, **TABLE_3[info["classes"] > 0]})
    args.betas = list(args.betas)
    make_grid("uniform", args.nfe)
    if not 0 <= args.ema < 1:
        raise UserError(f"--ema {args.ema}: must lie between 0 and 1")
    if not 0 < args.w[0] <= args.w[1] < math.inf:
        raise UserError(f"--w {args.w[0]:g} {args.w[1]:g}: two scales of guidance in their order")
    return allocate(args.variant, args.depth, args.steps)


def parser():
    p = runtime.Parser(prog="dsd.py", description=__doc__, formatter_class=runtime.Raw)
    p.add_argument("--variant", choices=["dsdn", "dsdi", "dsdgl", "dsdgexp", "tsd"], default="dsdgl", help="how the number of steps falls")
    p.add_argument("--from-scratch", action="store_true", help="training DSD (Eq. 1) in place of all this")
    p.add_argument("--model", help="LDM-ImageNet, LDM-CelebAHQ, LDM-Bedroom, DiT-XL/2, ...; the released weights are fetched where there are any")
    p.add_argument("--image-size", type=int, help="of the released weights (default: what they were made for)")
    p.add_argument("--ckpt", help="the base model: a checkpoint's path or URL, ours or upstream's")
    p.add_argument("--data", help="for --from-scratch: digits, mnist, cifar10, ..., a folder of images or cached latents")
    p.add_argument("--classes", type=int, help="number of classes, where the data does not tell")
    p.add_argument("--mix", type=float, nargs=2, default=[0.85, 0.15], metavar="WEIGHT", help="alpha and beta of Eq. 1")
    p.add_argument("--depth", type=int, metavar="N", help="steps of the first depth (default 64, digits 16); from scratch: of the grid that spaces pairs (128)")
    p.add_argument("--target", choices=["pd", "next"], default="pd", help="x'' as in Algorithm 2, or the next prediction, as in the text")
    p.add_argument("--weight", choices=["snr", "output"], help="snr: max(1, SNR); output: plain distance of outputs")
    p.add_argument("--w", type=float, nargs=2, metavar="SCALE", help="range of the guidance under which the model samples itself; 1 1 is none")
    p.add_argument("--ema", type=float, help="decay of the averaged weights; 0 keeps none")
    p.add_argument("--betas", type=float, nargs=2, metavar="BETA", help="Adam's")
    p.add_argument("--nfe", type=int, help="sampling steps afterwards (default 4)")
    p.add_argument("--cfg", type=float, help="guidance when sampling (1: none)")
    p.add_argument("--steps", type=int, help="P, updates in all (default: Table 3)")
    p.add_argument("--batch-size", type=int, help="of all processes together")
    p.add_argument("--lr", type=float)
    p.add_argument("--eval-samples", type=int, help="samples per row of the table (digits: 2000, else 0)")
    runtime.common_arguments(p, "runs/dsd")
    return p


if __name__ == "__main__":
    runtime.run(main, parser().parse_args())
