"""SSD: explicit self step-distillation (Ma et al., "Diffusion Model is Effectively Its Own Teacher", CVPR 2025).

Algorithm 1 for an N-step solver Psi with nodes eta_1 > ... > eta_N; theta-: frozen copy, theta: student, both start as the base model.

    repeat
        x0 ~ q_data,  n ~ U{1..N-1},  s = eta_n,  t = eta_(n+1)                        s > t: s is noisier
        x_s = alpha_s x0 + sigma_s eps                                                 Eq. 1
        eps_s = eps_theta-(x_s, s)
        x_t = Psi(eps_s, s -> t),  eps_t = eps_theta-(x_t, t)                          one DDIM step
        L = | lam eps_t + (1 - lam) eps_s - eps_theta(x_s, s) |^2                      Eq. 5, 7, w_t = 1
    until converged;  sample as ever: N steps.

lam weighs the cleaner step here, in iSSD the noisier one. lam = 1 is Eq. 10, which hurts a model that predicts eps. For one that predicts the velocity
of the linear interpolant (SiT, REPA) it is Eq. 17, and the default: v_theta(x_s, s) against v_theta-(x_t, t), t = s - 0.1 for 10 steps from a fixed
teacher, t = s - 0.005 for 250 from "the ema one" (sampled by --solver sde there). With prompts (Stable Diffusion) both predictions that guidance
combines are matched, each by itself, and x_t is made with guidance drawn from 5 to 15.

Differences from the paper. Algorithm 1 draws n up to N, where no t is left: n stops at N-1, save where the grid ends at t = 0 (the velocity, latent
diffusion). The loss is a mean, on the prediction's channels only; a network that predicts v or x0 is read as one that predicts eps. x_t is made
without guidance (--guided); the label is dropped for 1 sample in 10, in all forwards of a step alike, a prompt never. AdamW, constant learning rate,
no weight decay, no EMA. We take "the ema one" for a moving average of the student, from the base model on, with REPA's decay of 0.9999.

    python ssd.py                                                           the digits, a minute and a half on two CPU cores
    python ssd.py --model SiT-XL/2 --ckpt REPA.pt --nfe 10 --batch-size 16  one GPU
    torchrun --nproc_per_node 8 ssd.py --model DiT-XL/2 --nfe 10            as in the paper

Writes runs/ssd/{last.pt, log.jsonl, metrics.json, samples.png}.
"""
import copy
import math
import time

import torch

import checkpoints
import data
import runtime
import train
from runtime import Guard, Log, Processes, StepRandom, Stop, UserError, say
from solvers import PROJECTIONS, add_noise, column, ddim_step, guide, make_schedule, to_x0_eps

# ---- Method -------------------------------------------------------------------------------------------


def as_eps(schedule, x, out, t, prediction):
    """What Eq. 5 is about, eps, whatever the network predicts; a velocity stays one (Eq. 17)."""
    return out if prediction in ("eps", "velocity") else to_x0_eps(schedule, x, out, t, prediction)[1]


def ssd_loss(student, teacher, schedule, x0, y, s, t, noise, lam, prediction="eps", guided=None, project=None):
    """Eq. 7 with the target of Eq. 5 -> (loss, info). Three forwards and a backward.

    x0, noise (B, C, H, W); y (B,) labels, already dropped; s > t (B,) neighbouring nodes of the solver's grid; 0 <= lam <= 1.
    student, teacher, guided: net(x, t, y); guided, if given, makes the solver's step in the teacher's place. project: as the sampler's.
    info: the states x_s and x_t and the prediction between them, for plots and tests.
    """
    C = x0.shape[1]                                                           # channels beyond C hold a learned variance
    x_s = add_noise(schedule, x0, noise, s)                                   # (B, C, H, W)           Eq. 1
    with torch.no_grad():
        out_s = teacher(x_s, s, y)[:, :C]                                     # (B, C, H, W)           Alg. 1, line 7
        step = guided(x_s, s, y)[:, :C] if guided else out_s
        x_t = ddim_step(schedule, x_s, step, s, t, prediction, project)       # (B, C, H, W)           line 9
        out_t = teacher(x_t, t, y)[:, :C]                                     # (B, C, H, W)           line 10
        eps_s, eps_t = as_eps(schedule, x_s, out_s, s, prediction), as_eps(schedule, x_t, out_t, t, prediction)
        target = torch.lerp(eps_s, eps_t, lam)                                # lam eps_t + (1 - lam) eps_s   Eq. 5
    eps_student = as_eps(schedule, x_s, student(x_s, s, y)[:, :C], s, prediction)                 #    line 11
    return (target - eps_student).square().mean(), {"x_s": x_s, "x_t": x_t, "step": step}         #    Eq. 7


def ssd_text_loss(student, teacher, schedule, x0, y, null, s, t, noise, lam, cfg, prediction="eps", project=None):
    """Section A.2: both predictions of guidance are matched, each by itself; the solver's step is guided. -> (loss, info).

    y (B, T, D) prompts; null (1, T, D) the empty prompt; cfg (B,) scales of guidance. The rest as in ssd_loss.
    """
    C, y2 = x0.shape[1], torch.cat([y, null.expand_as(y)])                    # (2B, T, D): with prompts, then without
    both = lambda net, x, t: net(torch.cat([x, x]), torch.cat([t, t]), y2)[:, :C]                                        # (2B, C, H, W)
    eps = lambda x, out, t: as_eps(schedule, torch.cat([x, x]), out, torch.cat([t, t]), prediction)
    x_s = add_noise(schedule, x0, noise, s)                                                                              # Eq. 1
    with torch.no_grad():
        out_s = both(teacher, x_s, s)
        cond, uncond = out_s.chunk(2)
        x_t = ddim_step(schedule, x_s, uncond + column(cfg, x_s) * (cond - uncond), s, t, prediction, project)
        target = torch.lerp(eps(x_s, out_s, s), eps(x_t, both(teacher, x_t, t), t), lam)                                 # Eq. 5, for each
    loss = 2 * (target - eps(x_s, both(student, x_s, s), s)).square().mean()                                             # Eq. 7, their sum
    return loss, {"x_s": x_s, "x_t": x_t}


# ---- Training -----------------------------------------------------------------------------------------


def main(args):
    proc, began = Processes(args.amp), time.perf_counter()
    info = train.describe_base(args)
    fill_defaults(args, info)
    proc.check_batch(args.batch_size, args.accumulate)
    schedule, pred, project = make_schedule(info["schedule"]).to(proc.device), info["prediction"], PROJECTIONS[info["threshold"]]
    grid, pairs = train.self_grid(args, info, schedule)
    train.self_checks(args, info, pairs)
    if args.dry_run:
        return say(proc, plan(args, info, proc, grid))

    # The base model is the teacher; the student starts as its copy, and so does its average where that is the teacher:
    base, base_info = train.base_model(args)
    student = proc.student(copy.deepcopy(base), args)
    average = proc.place(copy.deepcopy(base), args).eval().requires_grad_(False) if args.teacher == "ema" else None
    base = proc.frozen(base, args)
    net = getattr(student, "module", student)
    opt = runtime.adamw(net, args.lr)
    info = {**base_info, "method": "ssd", "grid": grid, "nfe": args.nfe, "cfg": args.cfg, "only_node": grid[args.only_step - 1] if args.only_step else None}

    # Resume:
    state, start = checkpoints.prepare(args, proc), 0
    if state:
        start = state["step"]
        net.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])
        if average:
            average.load_state_dict(state["average"])
        del state
        if start >= args.steps and train.measured(args):
            return train.report(args, proc)

    # Setup data; without any, the base model's own samples (the paper's Table 8):
    base_net, student_net, teacher_net = proc.mixed(base), proc.mixed(student), proc.mixed(average or base)
    dataset, source = train.training_data(args, base_net, base_info, proc)
    if dataset.text:
        info["null"], null = dataset.null, dataset.null.to(proc.device)
    guided = guide(teacher_net, args.cfg) if args.guided == "step" else None
    if args.guided == "all":
        student_net, teacher_net = guide(student_net, args.cfg), guide(teacher_net, args.cfg)

    nodes = torch.tensor(grid, device=proc.device)
    first, end = (args.only_step - 1, args.only_step) if args.only_step else (0, pairs)  # nodes count from 0, --only-step from 1
    guard, stop = Guard(proc), Stop(proc, args)
    log = Log(args, proc, start, args.steps, "ssd", train.cost(args, info, units(args, info)))
    stream = data.batches(dataset, proc, args.seed, args.batch_size, start)
    for step in range(start, args.steps):
        x0, y = next(stream)
        rng = StepRandom(proc, args.seed, step, args.batch_size)
        dropped = rng.uniform() < args.drop
        if args.interval:  # Eq. 17 off the solver's grid
            s = args.interval + (1 - args.interval) * rng.uniform()
            t = s - args.interval
        else:
            n = rng.integers(first, end)
            s, t = nodes[n], nodes[n + 1]
        noise = rng.normal(x0.shape[1:])
        if dataset.text:
            cfg = args.text_cfg[0] + (args.text_cfg[1] - args.text_cfg[0]) * rng.uniform()
            loss_of = lambda x0, y, s, t, noise, cfg: ssd_text_loss(student_net, teacher_net, schedule, x0, y, null, s, t, noise, args.lam, cfg, pred, project)[0]
        else:
            y, cfg = torch.where(dropped, info["classes"], y), None  # important! once per sample, so that all forwards agree
            loss_of = lambda x0, y, s, t, noise, _: ssd_loss(student_net, teacher_net, schedule, x0, y, s, t, noise, args.lam, pred, guided, project)[0]
        loss = proc.backward(student, loss_of, args.accumulate, x0, y, s, t, noise, cfg)
        guard.update(opt, loss, step)
        if average:
            torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in net.parameters()], 1 - TEACHER_EMA)

        save, ended = stop.after(done := step + 1)
        if log.step(done, loss):
            guard.check(args.out)
        if save:
            guard.check(args.out)
            weights = net.state_dict()  # the paper keeps no average: "ema" are the same tensors, stored once
            checkpoints.save(args, proc, {"model": weights, "ema": weights, "opt": opt.state_dict(), "step": done, **info, **({"average": average.state_dict()} if average else {})})
        if ended and done < args.steps:
            runtime.stopped(args, proc, done)
    log.close()
    stop.restore()

    # Measure before, after and the controls on the same noise and labels:
    entries = train.self_entries(args, proc, base_net, proc.mixed(net.eval()), info, source) if args.eval_samples else {}
    train.measure(args, proc, "ssd", time.perf_counter() - began, entries, lam=args.lam)


def units(args, info):
    """Forwards of a step, a backward counting as two."""
    return 10 if info["arch"].get("context") == "text" or args.guided == "all" else 7 if args.guided == "step" else 5


def plan(args, info, proc, grid):
    """What --dry-run prints."""
    what = f"lam {args.lam}" + (f", t = s - {args.interval or 1 / args.nfe:g}, {args.teacher} teacher" if info["prediction"] == "velocity" else "")
    return train.self_plan("SSD", args, info, proc, grid, units(args, info), what, copies=2 if args.teacher == "ema" else 1)


# ---- Arguments ----------------------------------------------------------------------------------------

# Where the supplement has it: lam of Table 10 is 0.30 everywhere; learning rate, batch and steps: train.PAPER_SELF.
# Section A.2: 384,000 images with captions, one epoch. Section A.3 gives REPA's learning rate and no batch or length: those of DiT-XL/2.
TEXT = dict(lr=1e-6, batch_size=96, steps=4000, lam=0.30)
TEACHER_EMA = 0.9999
# The digits: guided as everywhere in the paper, where SSD gains, without guidance it does not (README); chosen by experiments/ssd_guidance.py.
DIGITS = dict(lr=1e-4, batch_size=64, steps=100, lam=0.10, cfg=1.5, data="digits", eval_samples=2000, log_every=20, save_every=50)


def fill_defaults(args, info):
    args.nfe = (info["nfe"] or 10) if args.nfe is None else args.nfe
    if args.nfe < 2:
        raise UserError(f"--nfe {args.nfe}: SSD pairs neighbouring steps and needs at least 2")
    flow = info["prediction"] == "velocity"
    preset = dict(train.self_preset(info), lam=0.30)
    if info["arch"].get("context") == "text":
        preset |= TEXT
    if train.is_digits(info):
        preset = DIGITS
    train.fill(args, info, {**preset, **({"lam": 1.0} if flow else {})})
    if info["arch"].get("context") == "text" and (args.data.startswith("synthetic") or args.guided != "no"):
        raise UserError("a model with prompts needs --data FOLDER, made by `python data.py encode`, and guides as the paper does: leave --guided out")
    if args.interval is None and args.only_step is None and flow and 1 / args.nfe < 0.005:
        args.interval = 0.005
    args.teacher = args.teacher or ("ema" if flow and (args.interval or 1 / args.nfe) < 0.01 else "fixed")
    if args.interval is not None and not (flow and 0 < args.interval < 1 and args.only_step is None):
        raise UserError(f"--interval {args.interval}: between 0 and 1, for models that predict velocity, and not with --only-step")
    if args.teacher == "ema" and not flow:
        raise UserError("--teacher ema is for models that predict velocity")
    if not 0 <= args.text_cfg[0] <= args.text_cfg[1] < math.inf:
        raise UserError(f"--text-cfg {args.text_cfg[0]:g} {args.text_cfg[1]:g}: two scales of guidance in their order")


def parser():
    p = runtime.Parser(prog="ssd.py", description=__doc__, formatter_class=runtime.Raw)
    train.self_arguments(p)
    p.add_argument("--lam", type=float, help="weight of the cleaner step in Eq. 5; default: Table 10, velocity 1 (Eq. 17)")
    p.add_argument("--interval", type=float, metavar="S-T", help="velocity: distance of s and t, off the grid (default: the grid's, at least 0.005)")
    p.add_argument("--teacher", choices=["fixed", "ema"], help="ema: a moving average of the student (default for s - t below 0.01)")
    p.add_argument("--text-cfg", type=float, nargs=2, default=[5.0, 15.0], metavar="SCALE", help="with prompts: range of the guidance that makes x_t")
    runtime.common_arguments(p, "runs/ssd")
    return p


if __name__ == "__main__":
    runtime.run(main, parser().parse_args())
