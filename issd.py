"""iSSD: implicit self step-distillation (Ma et al., "Diffusion Model is Effectively Its Own Teacher", CVPR 2025).

Algorithm 2 for an N-step solver Psi with nodes eta_1 > ... > eta_N; theta-: frozen copy, theta: student, both start as the base model.

    repeat
        x0 ~ q_data,  n ~ U{1..N-1},  s = eta_n,  t = eta_(n+1)                        s > t: s is noisier
        x_s = alpha_s x0 + sigma_s eps                                                 Eq. 1
        eps_s = eps_theta-(x_s, s);  store every layer's output f_l(x_s^(l), s)        no gradient
        x_t = Psi(eps_s, s -> t)                                                       one DDIM step
        student: x~_t^(l) = lam f_l-1(x_s^(l-1), s) + (1 - lam) f_theta,l-1(x~_t^(l-1), t)      Eq. 6, l = 2..L+1
        L = | eps_theta-(x_t, t) - x~_t^(L+1) |^2                                      Eq. 7, w_t = 1
    until converged;  sample as ever: N steps, nothing stored, nothing fused.

Differences from the paper. Algorithm 2 draws n up to N, where no t is left: n stops at N-1. It takes the stored features
from the student in line 8, Eq. 6 from the frozen teacher: --reading. Fused are the outputs of all blocks and the network's own;
the loss is a mean, on the prediction's channels only; x_t is made without guidance; the label is dropped for 1 sample in 10,
in all forwards of a step alike. AdamW, constant learning rate, no weight decay, no EMA.

    python issd.py                                                          the digits, a minute and a half on two CPU cores
    python issd.py --model DiT-XL/2 --nfe 10 --batch-size 16                one GPU
    torchrun --nproc_per_node 8 issd.py --model DiT-XL/2 --nfe 10           as in the paper

Writes runs/issd/{last.pt, log.jsonl, metrics.json, samples.png}.
"""
import copy
import time

import torch

import data
import models
import runtime
import train
from runtime import Guard, Log, Processes, StepRandom, Stop, UserError, say
from solvers import add_noise, ddim_step, make_schedule, schedule_grid

# ---- Method -------------------------------------------------------------------------------------------


def issd_loss(student, teacher, schedule, x0, y, s, t, noise, lam, reading="teacher", prediction="eps"):
    """Eq. 7 -> (loss, info). student and teacher: net(x, t, y, tap) with tap(l, h) -> h on every layer's output.

    x0, noise (B, C, H, W); y (B,) labels, already dropped; s > t (B,) neighbouring nodes of the solver's grid; 0 <= lam <= 1.
    reading: who evaluates (x_s, s), that is, whose eps makes x_t and whose features are fused.
        "teacher"  both the frozen teacher's: Eq. 6 and line 7                               5 forward units
        "student"  both the student's: line 8 and its heading                                5
        "literal"  line 7 by the teacher, line 8 by the student, as printed                  6
    info: the states x_s and x_t and the prediction eps_s between them, for plots and tests.
    """
    C = x0.shape[1]                                                           # channels beyond C hold a learned variance
    x_s = add_noise(schedule, x0, noise, s)                                   # (B, C, H, W)           Eq. 1

    with torch.no_grad():
        features = []                                                         # L x (B, T, D), then the output
        store = lambda l, h: features.append(h) or h
        source = teacher if reading == "teacher" else student
        eps_s = source(x_s, s, y, tap=store)[:, :C]                           # (B, C, H, W)           Alg. 2, lines 7-8
        if reading == "literal":
            eps_s = teacher(x_s, s, y)[:, :C]
        x_t = ddim_step(schedule, x_s, eps_s, s, t, prediction)               # (B, C, H, W)           line 10
        eps_teacher = teacher(x_t, t, y)[:, :C]                               # (B, C, H, W)           line 12

    fuse = lambda l, h: torch.lerp(h, features[l], lam)                       # lam f_s + (1 - lam) h  Eq. 6
    eps_student = student(x_t, t, y, tap=fuse)[:, :C]                         # (B, C, H, W)           line 11
    loss = (eps_teacher - eps_student).square().mean()                        #                        Eq. 7
    return loss, {"x_s": x_s, "x_t": x_t, "eps_s": eps_s}


# ---- Training -----------------------------------------------------------------------------------------


def main(args):
    proc, began = Processes(args.amp), time.perf_counter()
    info = train.describe_base(args)
    fill_defaults(args, info)
    proc.check_batch(args.batch_size)
    schedule = make_schedule(info["schedule"]).to(proc.device)
    own_grid = args.grid is None and info["grid"] and info["nfe"] == args.nfe  # a progressively distilled model keeps its grid
    grid = info["grid"] if own_grid else schedule_grid(schedule, args.grid, args.nfe)
    if args.dry_run:
        return say(proc, plan(args, info, proc, grid))

    # The base model is the teacher; the student starts as its copy:
    base, info = train.base_model(args)
    student = proc.student(copy.deepcopy(base), args.compile)
    teacher = proc.frozen(base, args.compile)
    net = getattr(student, "module", student)
    opt = runtime.adamw(net, args.lr)
    info = {**info, "method": "issd", "grid": grid, "nfe": args.nfe, "cfg": args.cfg}

    # Resume:
    state, start = runtime.prepare(args, proc), 0
    if state:
        start = state["step"]
        net.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])
        del state
        if start >= args.steps and train.measured(args):
            return train.report(args, proc)

    # Setup data; without any, the base model's own samples (the paper's Table 8):
    student_eps, teacher_eps = proc.mixed(student), proc.mixed(teacher)
    dataset, source = train.training_data(args, teacher_eps, info, proc)

    nodes = torch.tensor(grid, device=proc.device)
    guard, stop = Guard(proc), Stop(proc)
    log = Log(args, proc, start, args.steps, "issd")
    stream = data.batches(dataset, proc, args.seed, args.batch_size, start)
    for step in range(start, args.steps):
        x0, y = next(stream)
        rng = StepRandom(proc, args.seed, step, args.batch_size)
        y = torch.where(rng.uniform() < 0.1, info["classes"], y)  # important! once per sample, so that all forwards agree
        n = rng.integers(0, args.nfe - 1)
        loss, _ = issd_loss(student_eps, teacher_eps, schedule, x0, y, nodes[n], nodes[n + 1], rng.normal(x0.shape[1:]),
                            args.lam, args.reading, info["prediction"])
        loss.backward()
        guard.update(opt, loss, step)

        done, ended = step + 1, stop.now()
        if log.step(done, loss):
            guard.check(args.out)
        if done % args.save_every == 0 or done == args.steps or ended:
            guard.check(args.out)
            weights = net.state_dict()  # the paper keeps no average: "ema" are the same tensors, stored once
            runtime.save(args, proc, {"model": weights, "ema": weights, "opt": opt.state_dict(), "step": done, **info})
        if ended and done < args.steps:
            runtime.stopped(args, proc, done)
    log.close()
    stop.restore()

    # Measure before, after and the controls on the same noise and labels:
    entries = {}
    if args.eval_samples:
        say(proc, f"the control: the ordinary loss for {args.steps} more steps")
        control = proc.mixed(proc.frozen(train.continued(args, source)))
        entries = {
            "before": (teacher_eps, info, args.nfe, args.cfg),
            "before, 50 steps": (teacher_eps, info, 50, args.cfg),
            "continued training": (control, info, args.nfe, args.cfg),
            "after": (proc.mixed(net.eval()), info, args.nfe, args.cfg),
        }
    train.measure(args, proc, "issd", time.perf_counter() - began, entries, lam=args.lam, reading=args.reading)


def plan(args, info, proc, grid):
    """What --dry-run prints: the run in numbers, from the tables below and the shape of the network."""
    arch, GiB = info["arch"], 2 ** 30
    params, flops = models.count(arch)
    units = 6 if args.reading == "literal" else 5  # forwards of an iteration; the backward counts as two
    rows = args.batch_size // proc.world
    tokens = (arch["input_size"] // arch["patch_size"]) ** 2 * arch["hidden_size"] * arch["depth"] * rows
    half = proc.bf16 or info["scale"] is not None  # the plan of a latent model speaks of a GPU, also when it is made without one
    fixed, moving = params * (16 + (2 if half else 4)), tokens * ((48 if half else 80) + 4)  # bytes; see below
    lines = [f"iSSD of {info['name']}, {params / 1e6:.1f}M parameters, {flops / 1e9:.4g} GFLOP a forward and sample",
             f"sampling     {args.nfe} steps at t = {', '.join(f'{t:.4g}' for t in grid[:3])}, ..., {grid[-2]:.4g}; guidance {args.cfg:g}",
             f"training     lam {args.lam}, reading {args.reading}, lr {args.lr:g}, batch {args.batch_size} ({proc.world} x {rows}), {args.steps:,} steps",
             f"data         {args.data}"]
    if args.data.startswith("synthetic:"):
        steps = int(args.data[10:]) * (1 if args.cfg == 1 else 2)
        lines[-1] += (f": {args.pool:,} samples of the base model, made first, {steps} forwards each, {args.pool * steps * flops:.3g} FLOP, "
                      f"{args.pool * 2 * arch['in_channels'] * arch['input_size'] ** 2 / GiB:.2g} GiB on disk")
    lines += [f"cost         {units} forward units a step: {units * args.batch_size * flops:.3g} FLOP a step, {args.steps * units * args.batch_size * flops:.3g} FLOP in all",
              f"memory       about {(fixed + moving) / GiB:.3g} GiB a process: weights, gradients, Adam, teacher {fixed / GiB:.3g}; activations, stored features {moving / GiB:.3g}",
              f"checkpoint   {args.out}/last.pt, {params * 12 / GiB:.2g} GiB, every {args.save_every} steps",
              f"quality      {f'{args.eval_samples:,} samples a row, before, after and two controls' if args.eval_samples else 'not measured'}"]
    return "\n".join(lines)  # activations: 48 bytes a token, channel and block under bf16 (80 in float32), counted with saved_tensors_hooks


# ---- Arguments ----------------------------------------------------------------------------------------

# Learning rate, batch and epochs of ImageNet by (size, resolution): section A.1 of the supplement, Tables 2 and 3.
TRAINING = {("XL", 256): (5e-6, 128, 0.8), ("XL", 512): (5e-6, 64, 0.4), ("L", 256): (5e-6, 256, 0.2), ("B", 256): (5e-6, 256, 0.2), ("S", 256): (1e-5, 512, 0.2)}
# lam by NFE: Table 9, above its line and (LAM_DISTILLED) below. The paper is silent on other NFE; fill_defaults takes the nearest.
LAM = {("XL", 256): {50: 0.30, 20: 0.25, 10: 0.25}, ("XL", 512): {50: 0.30, 20: 0.25, 10: 0.25}, ("L", 256): {50: 0.25, 20: 0.25, 10: 0.25},
       ("B", 256): {50: 0.35, 20: 0.25, 10: 0.25}, ("S", 256): {50: 0.05, 20: 0.10, 10: 0.05}}
LAM_DISTILLED = {32: 0.20, 10: 0.25, 5: 0.05, 4: 0.05}
IMAGENET = 1_281_167
# The digits: chosen by experiments/issd_digits.py (for so small a network as DiT-S Table 9 has 0.05 to 0.10, too).
DIGITS = dict(lr=5e-5, batch_size=64, steps=50, lam=0.10, data="digits", eval_samples=2000, log_every=10, save_every=25)


def fill_defaults(args, info):
    """The paper's numbers for (model, resolution, nfe). Where it has none for this nfe, those of the nearest one."""
    args.nfe = (info["nfe"] or 10) if args.nfe is None else args.nfe
    if args.nfe < 2:
        raise UserError(f"--nfe {args.nfe}: iSSD pairs neighbouring steps and needs at least 2")
    args.cfg = info["cfg"] if args.cfg is None else args.cfg
    size, side = info["name"].split("-")[1].split("/")[0], info["arch"]["input_size"] * (8 if info["scale"] else 1)
    digits = (info["arch"]["in_channels"], side, info["classes"]) == (1, 8, 10)
    nearest = lambda table: table[min(table, key=lambda nfe: abs(nfe - args.nfe))]
    if digits:
        preset = DIGITS
    else:
        size = "S" if size == "Ti" else size
        lr, batch, epochs = TRAINING.get((size, side)) or TRAINING[size, 256]
        lam = nearest(LAM_DISTILLED if info["method"] in ("pd", "ddil") else LAM.get((size, side)) or LAM[size, 256])
        preset = dict(lr=lr, batch_size=batch, steps=round(epochs * IMAGENET / batch), lam=lam, data="synthetic:10", eval_samples=0, log_every=100, save_every=1000)
    for key, value in preset.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    runtime.check_positive(args, "steps", "batch_size", "lr", "log_every", "save_every")
    if not 0 <= args.lam <= 1:
        raise UserError(f"--lam {args.lam}: must lie between 0 and 1")
    if args.eval_samples and (not digits or args.eval_samples < 2):
        raise UserError(f"--eval-samples {args.eval_samples}: at least 2, and only for the digits; else 0, and fid.py measures what sample.py makes")
    train.check_pool(args)


def parser():
    p = runtime.Parser(prog="issd.py", description=__doc__, formatter_class=runtime.Raw)
    p.add_argument("--model", help="DiT-{S,B,L,XL}/{2,4,8}; the released weights are fetched where there are any")
    p.add_argument("--image-size", type=int, default=256, choices=[256, 512], help="of the released weights")
    p.add_argument("--ckpt", help="the base model: a checkpoint's path or URL, ours or upstream's")
    p.add_argument("--data", help="digits, mnist, cifar10, ..., a folder of images or cached latents, or synthetic:STEPS")
    p.add_argument("--classes", type=int, help="number of classes, where the data does not tell")
    p.add_argument("--nfe", type=int, help="sampling steps, in training and afterwards (default 10)")
    p.add_argument("--grid", choices=["dit", "ddim", "ldm", "uniform", "sit"], help="where those steps lie (default: the base model's own, or dit)")
    p.add_argument("--lam", type=float, help="fusion weight of Eq. 6, of the noisier step; default: Table 9")
    p.add_argument("--reading", choices=["teacher", "student", "literal"], default="teacher", help="whose features are fused: see issd_loss")
    p.add_argument("--steps", type=int, help="default: the paper's epochs of ImageNet at its own batch size")
    p.add_argument("--batch-size", type=int, help="of all processes together")
    p.add_argument("--lr", type=float)
    p.add_argument("--cfg", type=float, help="guidance when sampling (1: none); training is unguided")
    p.add_argument("--eval-samples", type=int, help="samples per row of the table (digits: 2000, else 0)")
    runtime.common_arguments(p, "runs/issd")
    return p


if __name__ == "__main__":
    runtime.run(main, parser().parse_args())
