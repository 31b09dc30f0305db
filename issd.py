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

Differences from the paper. Algorithm 2 draws n up to N, where no t is left: n stops at N-1 (save where the grid ends
at t = 0: velocity, latent diffusion). It takes the stored features from the student in line 8, Eq. 6 from the frozen teacher: --reading. Fused are the outputs of all blocks and the network's own;
the loss is a mean, on the prediction's channels only; the label is dropped for 1 sample in 10, in all forwards of a step alike (on the
digits it makes no difference). AdamW, constant learning rate, no weight decay, no EMA. Guidance: the paper samples with 1.5 and does not say
whether it trains so; its 40 minutes fit 5 forwards a step, a backward counting as two: that is, no. On digits that guidance helps, iSSD trained without it
gains under guidance, too; --guided all, at twice the cost, gains more (README).

    python issd.py                                                          the digits, about a minute on two CPU cores
    python issd.py --model DiT-XL/2 --nfe 10 --batch-size 16                one GPU
    torchrun --nproc_per_node 8 issd.py --model DiT-XL/2 --nfe 10           as in the paper

Writes runs/issd/{last.pt, log.jsonl, metrics.json, samples.png}.
"""
import copy
import time

import torch

import checkpoints
import data
import runtime
import train
from runtime import Guard, Log, Processes, StepRandom, Stop, UserError, say
from solvers import PROJECTIONS, add_noise, ddim_step, guide, make_schedule

# ---- Method -------------------------------------------------------------------------------------------


def issd_loss(student, teacher, schedule, x0, y, s, t, noise, lam, reading="teacher", prediction="eps", guided=None, project=None):
    """Eq. 7 -> (loss, info). student and teacher: net(x, t, y, tap) with tap(l, h) -> h on every layer's output.

    x0, noise (B, C, H, W); y (B,) labels, already dropped; s > t (B,) neighbouring nodes of the solver's grid; 0 <= lam <= 1.
    reading: who evaluates (x_s, s), that is, whose eps makes x_t and whose features are fused.
        "teacher"  both the frozen teacher's: Eq. 6 and line 7                               5 forwards, a backward counting as two
        "student"  both the student's: line 8 and its heading                                5
        "literal"  line 7 by the teacher, line 8 by the student, as printed                  6
    guided: net(x, t, y) that makes the solver's step in their place, if given; project: as the sampler's.
    info: the states x_s and x_t and the prediction eps_s between them, for plots and tests.
    """
    C = x0.shape[1]                                                           # channels beyond C hold a learned variance
    x_s = add_noise(schedule, x0, noise, s)                                   # (B, C, H, W)           Eq. 1

    with torch.no_grad():
        features = []                                                         # L x (B, T, D), then the output
        store = lambda l, h: features.append(h) or h
        source = teacher if reading == "teacher" else student
        eps_s = source(x_s, s, y, tap=store)[:, :C]                           # (B, C, H, W)           Alg. 2, lines 7-8
        if guided or reading == "literal":                                    # then another network makes the step
            eps_s = (guided or teacher)(x_s, s, y)[:, :C]                     #                        line 7
        x_t = ddim_step(schedule, x_s, eps_s, s, t, prediction, project)      # (B, C, H, W)           line 10
        eps_teacher = teacher(x_t, t, y)[:, :C]                               # (B, C, H, W)           line 12

    fuse = lambda l, h: torch.lerp(h, features[l], lam)                       # lam f_s + (1 - lam) h  Eq. 6; l = 0 here is its l = 2
    eps_student = student(x_t, t, y, tap=fuse)[:, :C]                         # (B, C, H, W)           line 11
    loss = (eps_teacher - eps_student).square().mean()                        #                        Eq. 7
    return loss, {"x_s": x_s, "x_t": x_t, "eps_s": eps_s}


# ---- Training -----------------------------------------------------------------------------------------


def main(args):
    proc, began = Processes(args.amp), time.perf_counter()
    info = train.describe_base(args)
    fill_defaults(args, info)
    proc.check_batch(args.batch_size, args.accumulate)
    schedule, project = make_schedule(info["schedule"]).to(proc.device), PROJECTIONS[info["threshold"]]
    grid, pairs = train.self_grid(args, info, schedule)
    train.self_checks(args, info, pairs)
    if args.dry_run:
        return say(proc, plan(args, info, proc, grid))

    # The base model is the teacher; the student starts as its copy:
    base, base_info = train.base_model(args)
    student = proc.student(copy.deepcopy(base), args)
    teacher = proc.frozen(base, args)
    net = getattr(student, "module", student)
    opt = runtime.adamw(net, args.lr)
    learns = grid[args.only_step] if args.only_step else None  # the student's node is the later one, t
    info = {**base_info, "method": "issd", "grid": grid, "nfe": args.nfe, "cfg": args.cfg, "only_node": learns}

    # Resume:
    state, start = checkpoints.prepare(args, proc), 0
    if state:
        start = state["step"]
        net.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])
        del state
        if start >= args.steps and train.measured(args):
            return train.report(args, proc)

    # Setup data; without any, the base model's own samples (the paper's Table 8):
    student_net, base_net = proc.mixed(student), proc.mixed(teacher)
    dataset, source = train.training_data(args, base_net, base_info, proc)
    teacher_net = base_net
    guided = guide(base_net, args.cfg) if args.guided == "step" else None
    if args.guided == "all":
        student_net, teacher_net = guide(student_net, args.cfg), guide(base_net, args.cfg)

    def loss_of(x0, y, s, t, noise):
        return issd_loss(student_net, teacher_net, schedule, x0, y, s, t, noise, args.lam, args.reading, info["prediction"], guided, project)[0]

    nodes = torch.tensor(grid, device=proc.device)
    first, end = (args.only_step - 1, args.only_step) if args.only_step else (0, pairs)  # nodes count from 0, --only-step from 1
    guard, stop = Guard(proc), Stop(proc, args)
    log = Log(args, proc, start, args.steps, "issd", train.cost(args, info, units(args)))
    stream = data.batches(dataset, proc, args.seed, args.batch_size, start)
    for step in range(start, args.steps):
        x0, y = next(stream)
        rng = StepRandom(proc, args.seed, step, args.batch_size)
        y = torch.where(rng.uniform() < args.drop, info["classes"], y)  # important! once per sample, so that all forwards agree
        n = rng.integers(first, end)
        loss = proc.backward(student, loss_of, args.accumulate, x0, y, nodes[n], nodes[n + 1], rng.normal(x0.shape[1:]))
        guard.update(opt, loss, step)

        save, ended = stop.after(done := step + 1)
        if log.step(done, loss):
            guard.check(args.out)
        if save:
            guard.check(args.out)
            weights = net.state_dict()  # the paper keeps no average: "ema" are the same tensors, stored once
            checkpoints.save(args, proc, {"model": weights, "ema": weights, "opt": opt.state_dict(), "step": done, **info})
        if ended and done < args.steps:
            runtime.stopped(args, proc, done)
    log.close()
    stop.restore()

    # Measure before, after and the controls on the same noise and labels:
    entries = train.self_entries(args, proc, base_net, proc.mixed(net.eval()), info, source) if args.eval_samples else {}
    train.measure(args, proc, "issd", time.perf_counter() - began, entries, lam=args.lam, reading=args.reading)


def units(args):
    """Forwards of a step, a backward counting as two."""
    if args.guided == "step":
        return 7
    unguided = 6 if args.reading == "literal" else 5
    return 2 * unguided if args.guided == "all" else unguided


def plan(args, info, proc, grid):
    """What --dry-run prints."""
    return train.self_plan("iSSD", args, info, proc, grid, units(args), f"lam {args.lam}, reading {args.reading}")


# ---- Arguments ----------------------------------------------------------------------------------------

# lam by NFE: Table 9, above its line and (LAM_DISTILLED) below. The paper is silent on other NFE; fill_defaults takes the nearest.
LAM = {("XL", 256): {50: 0.30, 20: 0.25, 10: 0.25}, ("XL", 512): {50: 0.30, 20: 0.25, 10: 0.25}, ("L", 256): {50: 0.25, 20: 0.25, 10: 0.25},
       ("B", 256): {50: 0.35, 20: 0.25, 10: 0.25}, ("S", 256): {50: 0.05, 20: 0.10, 10: 0.05}}
LAM_DISTILLED = {32: 0.20, 10: 0.25, 5: 0.05, 4: 0.05}
# The digits: chosen by experiments/issd_digits.py (for so small a network as DiT-S Table 9 has 0.05 to 0.10, too).
DIGITS = dict(lr=5e-5, batch_size=64, steps=50, lam=0.10, data="digits", eval_samples=2000, log_every=10, save_every=25)


def fill_defaults(args, info):
    """The paper's numbers for (model, resolution, nfe). Where it has none for this nfe, those of the nearest one."""
    args.nfe = (info["nfe"] or 10) if args.nfe is None else args.nfe
    if args.nfe < 2:
        raise UserError(f"--nfe {args.nfe}: iSSD pairs neighbouring steps and needs at least 2")
    if info["arch"].get("context") == "text":
        raise UserError("issd.py does not know prompts, for which the paper has the explicit form: take ssd.py")
    nearest = lambda table: table[min(table, key=lambda nfe: abs(nfe - args.nfe))]
    lam = nearest(LAM_DISTILLED if info["method"] in ("pd", "ddil") else LAM[train.size_of(info)])
    train.fill(args, info, DIGITS if train.is_digits(info) else dict(train.self_preset(info), lam=lam))


def parser():
    p = runtime.Parser(prog="issd.py", description=__doc__, formatter_class=runtime.Raw)
    train.self_arguments(p)
    p.add_argument("--lam", type=float, help="fusion weight of Eq. 6, of the noisier step; default: Table 9")
    p.add_argument("--reading", choices=["teacher", "student", "literal"], default="teacher", help="whose features are fused: see issd_loss")
    runtime.common_arguments(p, "runs/issd")
    return p


if __name__ == "__main__":
    runtime.run(main, parser().parse_args())
