"""DSD: direct self-distillation ("Self-Distillation for Diffusion"): while a model samples, its next step teaches the one before. No data, no teacher.

Algorithm 2, for every depth i of a schedule: U_i trajectories of N_i steps (t counts the nodes of the N_i-step grid, 0 is clean):

    z_N ~ N(0, I), a label, a scale of guidance w ~ U[1, 3]
    for t = N_i, N_i - 2, ..., 2:   t' = t - 1, t'' = t - 2
        z_t'  = alpha_t'  x_theta(z_t)  + sigma_t'/sigma_t   (z_t  - alpha_t  x_theta(z_t))            two DDIM steps
        z_t'' = alpha_t'' x_theta(z_t') + sigma_t''/sigma_t' (z_t' - alpha_t' x_theta(z_t'))
        x'  = (z_t'  - sigma_t'/sigma_t  z_t) / (alpha_t'  - sigma_t'/sigma_t  alpha_t)  =  x_theta(z_t)
        x'' = (z_t'' - sigma_t''/sigma_t z_t) / (alpha_t'' - sigma_t''/sigma_t alpha_t)                detached
        L = max(1, alpha_t^2 / sigma_t^2) | x' - x'' |^2,  one update, on from z_t''                   two evaluations

--variant dsdn: N constant; dsdi: N halves; dsdgl: N falls by 2, both with (nearly) as many updates at every depth; dsdgexp: N falls by 2, with more and
more (App. J). tsd: as dsdi, but a frozen teacher makes both steps (three evaluations), and the student replaces it when a depth ends.
--from-scratch: training DSD, L = alpha | v_hat - v |^2 + beta | x' - x'' |^2 on data (Eq. 1).

Differences from the paper. Its U_i would make half of its P updates: ours are doubled, P in all (--steps). Its Eq. 2 (dsdgexp) does not add up
as printed; shares e^(1/(N_i - 2)) seem to be meant. Its text has another target, x_theta(z_t'), in the same direction (--target next). Silent: batch (its
authors' code: 1; here 8), warm-up (5 %), one w per sample and trajectory, guidance of the samples, N of the pairs in Eq. 1 (128). The loss is a mean, its
gradient clipped at 1; no thresholds; EMA weights are sampled, TSD's teacher is the raw student. Nodes: round(T j / N) - 1, also to sample.

    python dsd.py                                                   the digits, a minute and a half on two CPU cores
    python dsd.py --model LDM-ImageNet --ckpt model.ckpt            one GPU
    torchrun --nproc_per_node 8 dsd.py --model LDM-CelebAHQ --ckpt model.ckpt --variant dsdi

Writes runs/dsd/{last.pt, log.jsonl, metrics.json, samples.png}.
"""
import argparse
import copy
import math
import time
from collections import Counter
from itertools import accumulate

import torch

import checkpoints
import models
import runtime
import train
from runtime import EMA, Guard, Log, Processes, StepRandom, Stop, UserError, say
from solvers import add_noise, ddim_invert, ddim_step, from_x0_eps, guide, make_grid, make_schedule, schedule_grid, to_x0_eps

# ---- Method -------------------------------------------------------------------------------------------
# x0, z_t, noise (B, C, H, W); timesteps t > mid > u (B,), nodes of a solver's grid or its end; y (B,) labels; w (B,) scales of guidance, 1 is none, or None.


def predict(net, schedule, z_t, t, y, w=None, prediction="eps"):
    """x_theta(z_t), guided by w: (B, C, H, W)."""
    out = (net if w is None else guide(net, w))(z_t, t, y)[:, :z_t.shape[1]]
    return to_x0_eps(schedule, z_t, out, t, prediction)[0]


@torch.no_grad()
def two_steps(net, schedule, z_t, x1, t, mid, u, y, w=None, prediction="eps", target="pd"):
    """Two DDIM steps t -> mid -> u from z_t, of which x1 = x_theta(z_t) is known, so one evaluation -> (x'', z_t''), both (B, C, H, W).

    target "pd": the x0 whose one step t -> u lands where the two do (Alg. 2); "next": what the network predicts at mid (the text).
    """
    z_mid = ddim_step(schedule, z_t, x1, t, mid, "x0")                                   # z_t'
    x2 = predict(net, schedule, z_mid, mid, y, w, prediction)                            # x_theta(z_t')
    z_u = ddim_step(schedule, z_mid, x2, mid, u, "x0")                                   # z_t''
    return {"pd": ddim_invert(schedule, z_t, z_u, t, u), "next": x2}[target], z_u        # x''


def dsd_loss(student, schedule, z_t, t, mid, u, y, w=None, prediction="eps", target="pd", teacher=None):
    """One update of Algorithm 2 -> (loss, z_t''). Two evaluations, the second without gradient; with a teacher (TSD) three."""
    x1 = predict(student, schedule, z_t, t, y, w, prediction)                            # x': a DDIM step inverts exactly
    with torch.no_grad():
        first = x1 if teacher is None else predict(teacher, schedule, z_t, t, y, w, prediction)
    x2, z_u = two_steps(student if teacher is None else teacher, schedule, z_t, first, t, mid, u, y, w, prediction, target)
    alpha, sigma = schedule.at(t, z_t)
    weight = (alpha / sigma).square().clamp(min=1)                                       # w(lambda_t), the truncated SNR
    return (weight * (x1 - x2).square()).mean(), z_u                                     # w |x' - x''|^2


def training_loss(net, schedule, x0, y, t, noise, prediction="v", alpha=0.85, beta=0.15, N=128, target="pd"):
    """Eq. 1 -> (loss, its two terms): the ordinary loss, and that of Algorithm 2 from z_t made of data. Two evaluations, the second without gradient.

    t (B,) long, from 0 to T - 1; t' and t'' lie T / N and 2 T / N below, or where the data is near, at 0 and clean.
    """
    k, z_t = max(1, round(schedule.T / N)), add_noise(schedule, x0, noise, t)
    out = net(z_t, t, y)[:, :x0.shape[1]]                                                # v_hat
    x1, _ = to_x0_eps(schedule, z_t, out, t, prediction)                                 # x'
    x2, _ = two_steps(net, schedule, z_t, x1, t, (t - k).clamp(min=0), (t - 2 * k).clamp(min=-1), y, None, prediction, target)
    plain = (out - from_x0_eps(schedule, x0, noise, t, prediction)).square().mean()      # |v_hat - v|^2
    own = (x1 - x2).square().mean()                                                      # |x' - x''|^2
    return alpha * plain + beta * own, {"plain": plain.detach(), "own": own.detach()}


# ---- Training -----------------------------------------------------------------------------------------


def allocate(variant, N, P):
    """The P updates from N steps downwards: a list of (N_i, k), update k of the N_i / 2 of a trajectory. U_i is rounded so that the total stays exact;
    DSDN may end within a trajectory. Raises UserError."""
    halvings = variant in ("dsdi", "tsd")
    if not 2 <= N <= 1000 or N % 2 or (halvings and N & (N - 1)):
        raise UserError(f"--depth {N}: {variant} takes steps in pairs, down to 2: give {'a power of 2' if halvings else 'an even number'}")
    depths = [N] if variant == "dsdn" else [N >> i for i in range(N.bit_length() - 1)] if halvings else list(range(N, 0, -2))
    shares = [math.exp(1 / max(n - 2, 1)) if variant == "dsdgexp" else 1.0 for n in depths]             # App. J
    updates = []
    for n, share in zip(depths, accumulate(shares)):
        U = (P * share / sum(shares) - len(updates)) / (n // 2)                                          # U_i = 2 P / (|N| N_i)
        U = math.ceil(U) if variant == "dsdn" else int(U + 0.5)
        if U < 1 or P < N // 2:
            raise UserError(f"--steps {P}: too few for one trajectory at every depth from {N} down; give more, or a smaller --depth")
        updates += [(n, k) for _ in range(U) for k in range(n // 2)]
    return updates[:P]


def rate(step, steps, warmup=0.05, floor=0.1):
    """Factor of the learning rate: linear warm-up over 5 % of the steps, then half a cosine from 1 to 10 %."""
    begin = max(1, round(warmup * steps))
    cosine = 0.5 + 0.5 * math.cos(math.pi * (step - begin) / max(steps - begin, 1))
    return (step + 1) / begin if step < begin else floor + (1 - floor) * cosine


def main(args):
    if args.from_scratch:
        return from_scratch(args)
    proc, began = Processes(args.amp), time.perf_counter()
    info = train.describe_base(args)
    schedule, pred = make_schedule(info["schedule"]).to(proc.device), info["prediction"]
    updates = fill_defaults(args, info, schedule)
    proc.check_batch(args.batch_size, args.accumulate)
    kind = None if schedule.continuous else "uniform"
    grids = {N: schedule_grid(schedule, kind, N) for N in dict(updates)}
    if args.dry_run:
        return say(proc, plan(args, info, proc, updates))

    # The base model is the student; with TSD its frozen copy the teacher:
    net, info = train.base_model(args)
    teacher = proc.frozen(copy.deepcopy(net), args) if args.variant == "tsd" else None
    student, ema, opt = proc.student(net, args), EMA(net, args.ema), runtime.adamw(net, args.lr, args.betas)
    info = {**info, "method": args.variant, "grid": kind, "nfe": args.nfe, "cfg": args.cfg, "solver": "ddim"}

    # Resume, also in the middle of a trajectory:
    state, start = checkpoints.prepare(args, proc), 0
    if state:
        start, z = state["step"], proc.rows(state["z"]).to(proc.device)
        ema.load(state["ema"])
        for part, key in ((net, "model"), (opt, "opt"), (teacher, "teacher")):
            if part is not None:
                part.load_state_dict(state[key])
        del state
        if start >= args.steps and train.measured(args):
            return train.report(args, proc)

    B, K, shape = args.batch_size, info["classes"], (net.arch["in_channels"], *[net.arch["input_size"]] * 2)
    student_out, teacher_out = proc.mixed(student), teacher and proc.mixed(teacher)
    guard, stop, log = Guard(proc), Stop(proc, args), Log(args, proc, start, args.steps, args.variant, train.cost(args, info, units(args, info)))
    for step in range(start, args.steps):
        N, k = updates[step]
        if k == 0 or step == start:  # a trajectory has the random numbers of its first update
            rng = StepRandom(proc, args.seed, step - k, B)
            noise, y = rng.normal(shape), rng.integers(0, max(K, 1))
            w = args.w[0] + (args.w[1] - args.w[0]) * rng.uniform() if K and args.w != [1, 1] else None
            z = noise if k == 0 else z
        if teacher and step and updates[step - 1][0] != N:  # important! TSD's student becomes the teacher of the next depth
            teacher_out = proc.mixed(teacher := proc.frozen(copy.deepcopy(net), args))
        t, mid, u = (torch.full((len(y),), node, device=proc.device) for node in grids[N][2 * k:2 * k + 3])
        loss_of = lambda *rows: dsd_loss(student_out, schedule, *rows, pred, args.target, teacher_out)
        loss, z = proc.backward(student, loss_of, args.accumulate, z, t, mid, u, y, w)
        for group in opt.param_groups:
            group["lr"] = args.lr * rate(step, args.steps)
        guard.update(opt, loss, step, clip=1.0)
        ema.update(net, step)

        save, ended = stop.after(done := step + 1)
        if log.step(done, loss):
            guard.check(args.out)
        if save:
            guard.check(args.out)
            checkpoints.save(args, proc, {"model": net.state_dict(), "ema": ema.state_dict(net), "opt": opt.state_dict(), "step": done, **info,
                                      "z": proc.whole(z), "teacher": teacher and teacher.state_dict()})
        if ended and done < args.steps:
            runtime.stopped(args, proc, done)
    log.close(), stop.restore(), proc.barrier()  # the others read what rank 0 has written

    # Measure before, after and the control on the same noise and labels, at other numbers of steps, too:
    entries = {}
    if args.eval_samples:
        say(proc, f"the control: the ordinary loss for {args.steps} more steps")
        nets = {"before": checkpoints.load_model(args.ckpt)[0], "continued training": train.continued(args, "digits"), "after": checkpoints.load_model(f"{args.out}/last.pt")[0]}
        entries = rows(proc, {name: (net, info) for name, net in nets.items()}, args, (2, 4, 8))
    train.measure(args, proc, args.variant, time.perf_counter() - began, entries)


def rows(proc, nets, args, nfes):
    """{name: (network, info)} -> what train.measure() takes: every network at --nfe steps and at nfes."""
    return {name + (f", {nfe} steps" if nfe != args.nfe else ""): (proc.mixed(proc.frozen(net)), {**info, "nfe": nfe}, nfe, args.cfg)
            for nfe in sorted({args.nfe, *nfes}) for name, (net, info) in nets.items()}


def from_scratch(args):
    """Training DSD: train.py with Eq. 1 for its loss. The control is train.py with its own, for as many steps."""
    began, args.data = time.perf_counter(), args.data or "digits"
    if args.ckpt or args.variant or args.w or (args.model or "").startswith("SiT"):
        raise UserError("--from-scratch trains a new network with discrete steps: leave --ckpt, --variant and --w out, and take no SiT")
    preset = {**SCRATCH, **(SCRATCH_DIGITS if args.data == "digits" else {})}
    vars(args).update({k: v for k, v in preset.items() if getattr(args, k, None) is None})
    check(args)
    if args.eval_samples and (args.data != "digits" or args.eval_samples < 2):
        raise UserError(f"--eval-samples {args.eval_samples}: at least 2, and only for the digits; else 0, and fid.py measures what sample.py makes")
    own = train.parser().parse_args([])
    vars(own).update({k: v for k, v in vars(args).items() if k in vars(own)}, prediction="v")
    train.fill_defaults(own)
    vars(args).update({k: v for k, v in vars(own).items() if k in vars(args)})
    both = argparse.Namespace(**vars(own), **{k: getattr(args, k) for k in ("mix", "depth", "target", "nfe", "cfg")})  # compared on resume
    last = train.main(both, lambda *batch: training_loss(*batch, *args.mix, args.depth, args.target), "dsd-scratch")
    proc, entries = Processes(args.amp), {}
    if args.dry_run:
        return say(proc, f"Eq. 1: alpha {args.mix[0]:g}, beta {args.mix[1]:g}, pairs of {args.depth} steps, target {args.target}")
    if train.measured(args):
        return train.report(args, proc)
    proc.barrier()  # important! or rank 0 writes what another has not yet looked for
    if args.eval_samples:
        say(proc, f"the control: the ordinary loss for {args.steps} steps")
        plain = train.main(argparse.Namespace(**{**vars(own), "out": f"{args.out}/plain"}))
        entries = rows(proc, {"plain training": checkpoints.load_model(plain), "after": checkpoints.load_model(last)}, args, (4, 10))
    train.measure(args, proc, "dsd-scratch", time.perf_counter() - began, entries)


def units(args, info):  # forwards of an update, a backward counting as two
    return (5 if args.variant == "tsd" else 4) * (2 if info["classes"] and args.w != [1, 1] else 1)


def plan(args, info, proc, updates):
    """What --dry-run prints."""
    cost, depths = train.cost(args, info, units(args, info)), ", ".join(f"{n}: {count}" for n, count in Counter(n for n, _ in updates).items())
    return "\n".join([
        f"{args.variant.upper()} of {info['name']}, {models.count(info['arch'])[0] / 1e6:.1f}M parameters, predicting {info['prediction']}; no data",
        f"updates      {args.steps:,} of batch {args.batch_size} ({proc.world} x {args.batch_size // proc.world}), by depth {depths}",
        f"training     lr {args.lr:g} -> {args.lr / 10:g}, Adam betas {args.betas[0]:g} {args.betas[1]:g}, EMA {args.ema:g}, guidance {args.w[0]:g} to {args.w[1]:g}, target {args.target}",
        f"units        {units(args, info)} forward units an update, a backward counts as two",
        *train.resources(args, proc, info["arch"], info["arch"], cost, 2, int(args.variant == "tsd"), 2 if info["classes"] and args.w != [1, 1] else 1)])


# ---- Arguments ----------------------------------------------------------------------------------------

# Table 3: P, lr, Adam's betas, EMA (the body swaps the two P). Models it does not know take the row of their kind.
TABLE_3 = {True: dict(steps=5000, lr=1e-7, betas=[0.99, 0.999], ema=0.9995),   # with classes: ImageNet-256
           False: dict(steps=4000, lr=1e-6, betas=[0.9, 0.98], ema=0.995)}     # without: CelebA-HQ, LSUN-Bedroom
PAPER = dict(variant="dsdn", batch_size=8, depth=64, nfe=4, w=[1.0, 3.0], eval_samples=0, log_every=100, save_every=500)
DIGITS = dict(variant="dsdgl", steps=256, lr=1e-5, betas=[0.9, 0.98], ema=0.9, batch_size=64, depth=16, nfe=4, w=[1.0, 1.0],
              eval_samples=2000, log_every=32, save_every=64)  # chosen by experiments/dsd_digits.py
# From scratch: CelebA, 64x64; LSUN Bedroom 50,000 and Church 40,000 steps, both at 4e-4. Batch, and a warm-up of 1,000 steps, as in the authors' code.
SCRATCH = dict(steps=65_000, lr=1e-4, batch_size=128, warmup=1000, image_size=64, mix=[0.85, 0.15], depth=128, nfe=128, cfg=1.0, eval_samples=0)
SCRATCH_DIGITS = {**train.DIGITS, **dict(nfe=50, eval_samples=2000)}


def fill_defaults(args, info, schedule):
    """Defaults for the digits and for the rest; returns the updates."""
    if args.data or args.mix:
        raise UserError("--data and --mix are for --from-scratch: a model that distils itself needs no data")
    train.fill(args, info, DIGITS if train.is_digits(info) else {**PAPER, **TABLE_3[info["classes"] > 0]})
    check(args)
    if info["arch"].get("context") == "text" or info["arch"].get("guidance") or info["only_node"] is not None or info["schedule"] == "edm":
        raise UserError("this model takes prompts or the scale of guidance as an input, is a student of one step, or has EDM's schedule; give --ckpt a whole one with labels or none")
    if not 0 < args.w[0] <= args.w[1] < math.inf:
        raise UserError(f"--w {args.w[0]:g} {args.w[1]:g}: two scales of guidance in their order")
    if info["cfg_interval"] and args.w != [1, 1]:
        raise UserError("this model is guided at some of its steps only, which DSD does not know: add --w 1 1")
    return allocate(args.variant, args.depth, args.steps)


def check(args):  # what both ways have in common
    make_grid("uniform", args.nfe)
    runtime.check_positive(args, "depth")
    if not 0 <= (args.ema or 0) < 1 or not all(0 <= v < math.inf for v in args.mix or []) or not math.isfinite(args.cfg):
        raise UserError("--ema must lie between 0 and 1, --mix takes two weights that are not negative, --cfg a number")


def parser():
    p = runtime.Parser(prog="dsd.py", description=__doc__, formatter_class=runtime.Raw)
    p.add_argument("--variant", choices=["dsdn", "dsdi", "dsdgl", "dsdgexp", "tsd"], help="how the number of steps falls (default dsdn, digits dsdgl)")
    p.add_argument("--from-scratch", action="store_true", help="training DSD (Eq. 1) in place of all this")
    p.add_argument("--model", help="LDM-ImageNet, LDM-CelebAHQ, LDM-Bedroom, DiT-XL/2, ...; the released weights are fetched where there are any")
    p.add_argument("--image-size", type=int, help="of the released weights (default: what they were made for); from scratch of a folder's images (64)")
    p.add_argument("--ckpt", help="the base model: a checkpoint's path or URL, ours or upstream's; default: an eps teacher of the digits, made here")
    p.add_argument("--data", help="from scratch: digits, mnist, cifar10, ..., a folder of images or cached latents")
    p.add_argument("--mix", type=float, nargs=2, metavar="WEIGHT", help="from scratch: alpha and beta of Eq. 1 (default 0.85 0.15)")
    p.add_argument("--depth", type=int, metavar="N", help="steps of the first depth (default 64, digits 16); from scratch: of the grid that spaces pairs (128)")
    p.add_argument("--target", choices=["pd", "next"], default="pd", help="x'' as in Algorithm 2, or the next prediction, as in the text")
    p.add_argument("--w", type=float, nargs=2, metavar="SCALE", help="range of the guidance under which the model samples itself (default 1 3; digits 1 1, none)")
    p.add_argument("--ema", type=float, help="decay of the averaged weights, 0 keeps none (default: Table 3)")
    p.add_argument("--nfe", type=int, help="sampling steps afterwards (default 4; from scratch 128, digits 50)")
    p.add_argument("--cfg", type=float, help="guidance when sampling (1: none)")
    p.add_argument("--steps", type=int, help="P, updates in all (default: Table 3; digits 256)")
    p.add_argument("--batch-size", type=int, help="of all processes together (default 8, digits 64)")
    p.add_argument("--lr", type=float, help="at its height (default: Table 3)")
    p.add_argument("--eval-samples", type=int, help="samples per row of the table (digits: 2000, else 0)")
    runtime.common_arguments(p, "runs/dsd")
    p.set_defaults(betas=None, classes=None)  # Table 3's; the data's own
    return p


if __name__ == "__main__":
    runtime.run(main, parser().parse_args())
