"""DDIL: distilling diffusion models with imitation learning, over progressive distillation (PD), LCM or DMD2.

PD halves the steps stage by stage. The student trains on data with noise added, but once it samples it visits states of its own making.
DDIL aggregates such states (DAgger) and has the teacher label them too. One stage, teacher theta of N steps, student eta of N/2, k = T/N:

    eta <- theta
    repeat
        with probability p: (z_t, t) ~ D                                         the aggregated states           Alg. 2
        else: z_t = alpha_t x + sigma_t eps,  x ~ data,  t = 2ki, i ~ U{1..N/2}                                  forward process
        z_(t-k), z_(t-2k) = two DDIM steps of the teacher from z_t
        x* = (z_(t-2k) - r z_t) / (alpha_(t-2k) - r alpha_t),  r = sigma_(t-2k) / sigma_t
        L = max(1, alpha_t^2 / sigma_t^2) | x_eta(z_t) - x* |^2                                                  Eq. 1
        now and then: D <- D + rollouts from noise in which every 2k is gone by the student with                 Alg. 1
                      probability beta (one step), else by the teacher (two steps)
    theta <- eta, N <- N/2

p, beta = 0.25, 0.15 in the first 60 % of a stage, then 0.5, 0.8. --dagger 0 0 is plain PD (Salimans & Ho 2022).

--objective lcm: consistency distillation (Luo et al. 2023). --objective dmd2: distribution matching (Yin et al. 2024). With either, DDIL's
mixture says where z_t comes from.

Differences from the paper, of which only the supplement was at hand. eps = sigma z + alpha v (its algorithms print a minus); t is drawn from the student's
nodes; every trajectory and transition has its own coin; a state keeps its condition; a student of one step, whose rollouts have no state in
between, aggregates their starting noise. The paper's PD teacher takes guidance as an input: here only with --stages w:STEPS first. It samples with
DPM-Solver++(2M): here DDIM, whose step Eq. 1 is about, unless sample.py --solver dpm++. Silent: PD's learning rate, batch, stages, the size of D. Here D
keeps the last 4 rollouts, and a new one is made when every state was used 2 (later 3) times, which adds 4 to 5 % network evaluations to PD (LCM's guided
teacher walks far: 33, later 12 %); the learning rate falls to 0 within a stage, and the gradient is clipped at 1, as in PD. Thresholded (reflected diffusion) are the predictions
of the teacher, in rollouts, in DMD2's critic and in sampling, not the student's in a loss. LCM keeps the student, not its average.

    python ddil.py                                                       the digits, a minute and a half on two CPU cores
    python ddil.py --model DiT-XL/2 --stages w:10000 32:10000 16:10000 8:20000 --batch-size 16           one GPU
    torchrun --nproc_per_node 8 ddil.py --model DiT-XL/2 --objective lcm

Writes runs/ddil/{last.pt, nfe8.pt, ..., log.jsonl, metrics.json, samples.png}.
"""
import copy
import itertools
import math
import re
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import checkpoints
import data
import models
import runtime
import train
from runtime import Guard, Log, Processes, StepRandom, Stop, UserError, say
from solvers import (PROJECTIONS, add_noise, column, ddim_invert, ddim_step, from_x0_eps, halve_grid, lcm_boundary, lcm_grid, make_grid, make_schedule,
                     mixed_rollout, renoise, schedule_grid, to_x0_eps, walk)

# ---- Method -------------------------------------------------------------------------------------------
# States z (B, C, H, W), timesteps t > mid > u (B,), -1 clean; cond: what a network takes after them, (labels,) or (labels, guidance scales).


def pd_target(teacher, schedule, z_t, cond, t, mid, u, prediction="v", project=None):
    """The x0 whose one DDIM step t -> u lands where the teacher's two steps t -> mid -> u do."""
    C = z_t.shape[1]
    with torch.no_grad():
        z = ddim_step(schedule, z_t, teacher(z_t, t, *cond)[:, :C], t, mid, prediction, project)     # z_(t-k)
        z = ddim_step(schedule, z, teacher(z, mid, *cond)[:, :C], mid, u, prediction, project)       # z_(t-2k)
        return ddim_invert(schedule, z_t, z, t, u)                                                   # x*


def pd_loss(student, schedule, z_t, cond, t, target, prediction="v", weight="snr"):
    """Eq. 1. weight "snr": max(1, SNR) on x0, as printed; "output": the plain distance of the network's outputs.

    A network that predicts eps has x0 = (z - sigma eps) / alpha: at t = 999 Eq. 1 weighs its error by 1 / SNR = 25,000. Take "output".
    """
    alpha, sigma = schedule.at(t, z_t)
    out = student(z_t, t, *cond)[:, :z_t.shape[1]]                                                   # (B, C, H, W)
    if weight == "output":
        return (out - from_x0_eps(schedule, target, (z_t - alpha * target) / sigma, t, prediction)).square().mean()
    x0, _ = to_x0_eps(schedule, z_t, out, t, prediction)
    return ((alpha / sigma).square().clamp(min=1) * (x0 - target).square()).mean()                   # Eq. 1


def guided(net, z, t, y, w):
    """Classifier-free guidance of every channel with a scale for each sample: out_null + w (out_y - out_null), w = 1 is none."""
    null = torch.full_like(y, net.num_classes)
    cond, uncond = net(torch.cat([z, z]), torch.cat([t, t]), torch.cat([y, null]))[:, :z.shape[1]].chunk(2)
    return uncond + column(w, z) * (cond - uncond)


def guidance_loss(student, teacher, z_t, t, y, w):
    """The student takes w as an input and gives in one evaluation what the guided teacher gives in two (Meng et al. 2023, stage one)."""
    with torch.no_grad():
        target = guided(teacher, z_t, t, y, w)
    return (student(z_t, t, y, w)[:, :z_t.shape[1]] - target).square().mean()


def consistency(net, schedule, z, t, cond, prediction="v"):
    """x0 in one evaluation: LCM's f(z, t), which is z at t = 0."""
    return lcm_boundary(schedule, z, to_x0_eps(schedule, z, net(z, t, *cond)[:, :z.shape[1]], t, prediction)[0], t)


def lcm_loss(student, target, teacher, schedule, z_t, t, u, y, w, prediction="v", project=None, c=1e-3):
    """f_student(z_t, t) against f_target(z_u, u), z_u the guided teacher's DDIM step over 20 timesteps; pseudo-Huber distance.

    u = -1 is the clean end, where f(z) = z; target: a moving average of the student.
    """
    with torch.no_grad():
        z_u = ddim_step(schedule, z_t, guided(teacher, z_t, t, y, w), t, u, prediction, project)
        goal = consistency(target, schedule, z_u, u.clamp(min=0), (y, w), prediction)                # f(z, 0) = z
    d = consistency(student, schedule, z_t, t, (y, w), prediction) - goal
    return ((d.square() + c ** 2).sqrt() - c).mean()


class Critic(nn.Module):
    """DMD2's second network: the score of what the student makes, and on its middle block a head that tells data from samples."""

    def __init__(self, net):
        super().__init__()
        self.net, self.num_classes, dim = net, net.num_classes, net.arch["hidden_size"]
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, 1))

    blocks = property(lambda self: self.net.blocks)

    def forward(self, z, t, y):
        """-> the network's output (B, C, H, W), logits (B,), large for data."""
        features = []
        out = self.net(z, t, y, tap=lambda l, h: features.append(h) or h)
        return out[:, :z.shape[1]], self.head(features[len(self.net.blocks) // 2].mean(1))[:, 0]


def critic_loss(critic, schedule, fake, y_fake, real, y_real, t, noise, prediction="v", gan=1e-2):
    """The denoising loss on the student's samples, and the head's on noised samples and data; one forward for both halves."""
    t2, noise2 = torch.cat([t, t]), torch.cat([noise, noise])
    out, logit = critic(add_noise(schedule, torch.cat([fake, real]), noise2, t2), t2, torch.cat([y_fake, y_real]))
    denoising = (out[:len(fake)] - from_x0_eps(schedule, fake, noise, t, prediction)).square().mean()
    logit_fake, logit_real = logit.chunk(2)
    return denoising + gan * (F.softplus(logit_fake) + F.softplus(-logit_real)).mean()


def dmd_loss(x, critic, teacher, schedule, t, y, w, noise, prediction="v", project=None, gan=5e-3):
    """Distribution matching (DMD): the student's sample x moves along the difference of the two denoised x0; and the head's verdict.

    The gradient wanted is that of x alone.
    """
    z = add_noise(schedule, x, noise, t)
    fake_out, logit = critic(z, t, y)
    with torch.no_grad():
        real, fake = (to_x0_eps(schedule, z, out, t, prediction, project)[0] for out in (guided(teacher, z, t, y, w), fake_out))
        direction = (fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-6)
    return 0.5 * (x - (x - direction).detach()).square().mean() + gan * F.softplus(-logit).mean()


def collect(student, teacher, schedule, kind, grid, nodes, cond, rng, beta, shape, prediction="v", project=None):
    """Algorithm 1: rollouts from noise in which every stretch is gone by the student with probability beta. The states at nodes[:-1], (n, B, C, H, W)."""
    noise = rng.normal(shape)
    if kind == "pd":
        ways = (walk(net, schedule, way, cond, prediction, project) for net, way in ((student, nodes), (teacher, grid)))
    else:  # the student's own sampler; the guided teacher's DDIM
        fresh = {t: rng.normal(shape) for t in nodes[:-1]}
        ways = (renoise(student, schedule, fresh, cond[:1 + student.net.guidance], prediction, project),
                walk(lambda *zty_w: guided(teacher, *zty_w), schedule, grid, cond, prediction, project))
    return torch.stack(mixed_rollout(*ways, noise, nodes[:-1], lambda i: rng.uniform() < beta))


# ---- Training -----------------------------------------------------------------------------------------


def main(args):
    proc, began = Processes(args.amp), time.perf_counter()
    info = train.describe_base(args, "v")
    stages = fill_defaults(args, info)
    proc.check_batch(args.batch_size, args.accumulate)
    schedule, pred, project = make_schedule(info["schedule"]).to(proc.device), info["prediction"], PROJECTIONS[args.threshold]
    if args.dry_run:
        return say(proc, plan(args, info, stages, proc))

    # The base model is the first teacher; the student starts as its copy, with an input for w where it is to learn guidance:
    base, _ = train.base_model(args, "v")
    torch.manual_seed(args.seed)  # of what is new: the embedding of w, the critic's head
    takes_w = base.guidance or stages[0]["kind"] in ("w", "lcm")
    net = models.with_guidance(base) if takes_w and not base.guidance else copy.deepcopy(base)
    student = proc.student(net, args)
    target = copy.deepcopy(net).eval().requires_grad_(False) if args.objective == "lcm" else None
    critic = Critic(copy.deepcopy(base)) if args.objective == "dmd2" else None
    critic_ddp = critic and proc.student(critic, args)
    teacher = proc.frozen(base, args)
    opt, critic_opt = runtime.adamw(net, args.lr), critic and runtime.adamw(critic, args.lr)
    base_info, info = info, {**info, "arch": net.arch, "method": "ddil" if any(args.dagger) else args.objective, "cfg": 1.0 if critic else args.cfg,
                             "threshold": args.threshold, "solver": "ddim" if args.objective == "pd" else "lcm"}

    # Resume, also in the middle of a stage:
    state, start, buffer = checkpoints.prepare(args, proc), 0, {}
    if state:
        start, buffer = state["step"], {k: v.to(proc.device) for k, v in state["buffer"].items()}
        teacher = proc.frozen(models.build(state["teacher"]["arch"]), args)
        teacher.load_state_dict(state["teacher"]["weights"])
        for part, key in ((net, "model"), (opt, "opt"), (target, "target"), (critic, "critic"), (critic_opt, "critic_opt")):
            if part is not None and state[key] is not None:
                part.load_state_dict(state[key])
        del state
        if start >= args.steps and train.measured(args):
            return train.report(args, proc)

    # Setup data; without any, the base model's own samples:
    dataset, source = train.training_data(args, proc.mixed(base), base_info, proc)
    B, K, shape = args.batch_size, info["classes"], tuple(dataset.shape)
    guard, stop, log = Guard(proc), Stop(proc, args), Log(args, proc, start, args.steps, args.objective, unit := train.cost(args, info, 1))
    stream = data.batches(dataset, proc, args.seed, B, start)
    for s in stages:
        s.update({k + "_t": torch.tensor(s[k], device=proc.device) for k in ("grid", "starts") if s[k]})
    clip = 10.0 if critic else 1.0  # DMD2's; PD's

    def condition(rng, y):
        """Labels, some dropped where guidance is not distilled and has to stay possible; scales of guidance, where it is."""
        if takes_w or critic:
            return y, args.w[0] + (args.w[1] - args.w[0]) * rng.uniform()
        return (torch.where(rng.uniform() < 0.1, K, y),)

    for step in range(start, args.steps):
        stage = next(s for s in stages if step < s["end"])
        log.flops = unit * UNITS[stage["kind"]]
        kind, grid, nodes, local, length = stage["kind"], stage["grid"], stage["nodes"], step - stage["begin"], stage["end"] - stage["begin"]
        if local == 0 and step > 0:  # theta <- eta; D and the optimiser start anew
            teacher, opt, buffer = proc.frozen(copy.deepcopy(net), args), runtime.adamw(net, args.lr), {}
        for group in opt.param_groups:
            group["lr"] = args.lr * (1 - local / length if args.objective == "pd" else 1)
        student_out, teacher_out, starts = proc.mixed(student), proc.mixed(teacher), stage["starts_t"]

        # Algorithm 1, whenever the states in D were used args.reuse times:
        phase = int(local >= (switch := math.ceil(0.6 * length)))
        p, beta = (0, 0) if kind == "w" else (args.dagger[phase], args.beta[phase])
        first = 1 if kind == "pd" and len(nodes) > 2 else 0  # noise itself is kept where it is all there is, or LCM's and DMD2's student starts from it
        kept = nodes[first:-1] if p else []
        if p and (local - phase * switch) % max(1, round(args.reuse[phase] * len(kept) / max(p, 1e-6))) == 0:
            rng = StepRandom(proc, (args.seed << 8) + 2, step, B)
            cond = condition(rng, rng.integers(0, dataset.classes) if dataset.classes else torch.full_like(rng.integers(0, 1), K))
            z = collect(proc.mixed(net), teacher_out, schedule, kind, grid, nodes, cond, rng, beta, shape, pred, project)[first:]  # (node, sample, ...)
            index = torch.tensor([stage["starts"].index(t) for t in kept], device=proc.device)
            new = {"z": proc.whole(z, 1).flatten(0, 1), "i": index.repeat_interleave(B), **{f"c{n}": proc.whole(c).repeat(len(kept)) for n, c in enumerate(cond)}}
            buffer = {k: torch.cat([buffer[k], v])[-KEEP * len(v):] if buffer else v for k, v in new.items()}

        # Algorithm 2, states from data, and with probability p from D:
        rng, (x0, y0) = StepRandom(proc, args.seed, step, B), next(stream)
        cond, i = condition(rng, y0), rng.integers(0, len(starts) - 1)
        z = add_noise(schedule, x0, rng.normal(shape), starts[i])
        if p:
            take, j = rng.uniform() < p, rng.integers(0, len(buffer["i"]))
            z = torch.where(take.view(-1, 1, 1, 1), buffer["z"][j], z)
            i, *cond = (torch.where(take, buffer[k][j], v) for k, v in zip(("i", "c0", "c1"), (i, *cond)))
        t = starts[i]

        if kind == "w":
            loss_of = lambda z, t, i, *cond: guidance_loss(student_out, teacher_out, z, t, *cond)
        elif kind == "pd":
            def loss_of(z, t, i, *cond):
                goal = pd_target(teacher_out, schedule, z, cond, t, stage["grid_t"][2 * i + 1], stage["grid_t"][2 * i + 2], pred, project)
                return pd_loss(student_out, schedule, z, cond, t, goal, pred, args.weight)
        elif kind == "lcm":
            loss_of = lambda z, t, i, *cond: lcm_loss(student_out, proc.mixed(target), teacher_out, schedule, z, t, starts[i + 1], *cond, pred, project)
        else:  # DMD2: the critic at every step, whose loss is logged, the student at every fifth
            y, level = cond[0], lambda: (rng.integers(round(0.02 * schedule.T), round(0.98 * schedule.T)), rng.normal(shape))
            with torch.no_grad():
                fake = consistency(proc.mixed(net), schedule, z, t, (y,), pred)
            loss = proc.backward(critic_ddp, lambda *rows: critic_loss(proc.mixed(critic_ddp), schedule, *rows, pred), args.accumulate, fake, y, x0, y0, *level())
            guard.update(critic_opt, loss, step, clip)
            if step % CRITIC_UPDATES == 0:
                def loss_of(z, t, u, noise, *cond):
                    x = consistency(student_out, schedule, z, t, cond[:1], pred)
                    leaf = x.detach().requires_grad_()
                    pull = dmd_loss(leaf, proc.mixed(critic), teacher_out, schedule, u, *cond, noise, pred, project)
                    return (x * torch.autograd.grad(pull, leaf)[0]).sum()  # past the critic's own parameters
                guard.update(opt, proc.backward(student, loss_of, args.accumulate, z, t, *level(), *cond), step, clip)
        if kind != "dmd2":
            loss = proc.backward(student, loss_of, args.accumulate, z, t, i, *cond)
            guard.update(opt, loss, step, clip)
        if target is not None:
            torch._foreach_lerp_(list(target.parameters()), [v.detach() for v in net.parameters()], 1 - TARGET_EMA)

        save, ended = stop.after(done := step + 1)
        if log.step(done, loss):
            guard.check(args.out)
        if save or done == stage["end"]:
            guard.check(args.out)
            weights = net.state_dict()
            state = {"model": weights, "ema": weights, "step": done, **info, "grid": nodes, "nfe": nodes and len(nodes) - 1}
            if done == stage["end"]:
                checkpoints.save(args, proc, {**state, "opt": {}}, stage["file"])
            checkpoints.save(args, proc, {**state, "opt": opt.state_dict(), "buffer": buffer, "teacher": {"arch": teacher.arch, "weights": teacher.state_dict()},
                                      "target": target and target.state_dict(), "critic": critic and critic.state_dict(),
                                      "critic_opt": critic_opt and critic_opt.state_dict()})
        if ended and done < args.steps:
            runtime.stopped(args, proc, done)
    log.close(), stop.restore()

    # Measure before, after and the controls on the same noise and labels, all of them thresholded alike:
    entries = {}
    if args.eval_samples:
        before = proc.mixed(proc.frozen(checkpoints.load_model(args.ckpt)[0]))
        at = lambda net, nodes: (net, {**base_info, "threshold": args.threshold, "grid": nodes, "nfe": len(nodes) - 1}, len(nodes) - 1, args.cfg)
        halvings = [s for s in stages if s["nodes"]]
        first, last = halvings[0]["grid"], halvings[-1]["nodes"]
        entries = {"before": at(before, last), f"before, {len(first) - 1} steps": at(before, first)}
        if not info["arch"].get("guidance"):  # whose input the ordinary loss does not know
            say(proc, f"the control: the ordinary loss for {args.steps} more steps")
            entries["continued training"] = at(proc.mixed(proc.frozen(train.continued(args, source))), last)
        for s in halvings:
            student, made = checkpoints.load_model(Path(args.out) / ("last.pt" if s is stages[-1] else s["file"]))
            entries["after" if s is stages[-1] else f"after, {made['nfe']} steps"] = proc.mixed(proc.frozen(student)), made, made["nfe"], made["cfg"]
    train.measure(args, proc, args.objective + " + ddil" * any(args.dagger), time.perf_counter() - began, entries)


def plan(args, info, stages, proc):
    """What --dry-run prints."""
    params, flops = models.count(info["arch"])
    lines = [f"DDIL ({args.objective}) of {info['name']}, {params / 1e6:.1f}M parameters, predicting {info['prediction']}, on {args.data}; guidance {args.cfg:g}, threshold {args.threshold}",
             f"mixture      {args.dagger[0]:g} then {args.dagger[1]:g} from aggregated states, student probability {args.beta[0]:g} then {args.beta[1]:g}, each used {args.reuse[0]:g} then {args.reuse[1]:g} times"]
    for s in stages:
        n = s["end"] - s["begin"]
        nodes = f"{len(s['grid']) - 1} -> {len(s['nodes']) - 1} steps at t = {', '.join(map(str, s['nodes'][:4]))}, ..." if s["nodes"] else "guidance becomes an input"
        lines.append(f"{s['kind']:12} {nodes}; {n:,} steps of {args.batch_size} ({proc.world} x {args.batch_size // proc.world}), lr {args.lr:g}, {n * UNITS[s['kind']] * args.batch_size * flops:.3g} FLOP")
    mean = sum((s["end"] - s["begin"]) * UNITS[s["kind"]] for s in stages) / args.steps * args.batch_size * flops
    copies = {"pd": (1, 1, 1), "lcm": (2, 1, 1), "dmd2": (5, 1, 2)}[args.objective]  # LCM's average; DMD2's critic has gradients and Adam, and twice the rows
    return "\n".join([*lines, *train.resources(args, proc, info["arch"], info["arch"], mean, *copies)])


# ---- Arguments ----------------------------------------------------------------------------------------

UNITS = {"w": 5, "pd": 5, "lcm": 6, "dmd2": 9}  # forwards of an iteration, two halves of guidance counted apart; a backward counts as two
KEEP = 4  # rollouts in D; the paper is silent
TARGET_EMA, CRITIC_UPDATES = 0.95, 5  # LCM's; DMD2's, per update of the student
# Stages N:STEPS from a teacher of N steps; w:STEPS makes guidance an input first. The paper: 40,000 updates to 4 steps; where it starts it does not say.
# Learning rates: silent; those of LCM and DMD2 are their own.
PAPER = dict(stages=["32:10000", "16:10000", "8:20000"], steps=20_000, batch_size=256, nfe=4, data="synthetic:50", eval_samples=0, log_every=100, save_every=1000)
PAPER_LR = {"pd": 1e-5, "lcm": 1e-6, "dmd2": 5e-7}
# The digits: chosen by experiments/ddil_digits.py, without DDIL's mixture.
DIGITS = dict(stages=["16:100", "8:100", "4:100"], steps=400, batch_size=64, nfe=4, data="digits", eval_samples=2000, log_every=20, save_every=50)
DIGITS_LR = {"pd": 1e-3, "lcm": 3e-5, "dmd2": 1e-4}


def fill_defaults(args, info):
    """Defaults for the digits and for the rest; returns the stages: {kind, begin, end, file, grid: the teacher's, nodes: the student's, starts: where it trains}."""
    digits = train.is_digits(info)
    if args.objective == "pd" and (args.steps or args.nfe):
        raise UserError("--steps and --nfe follow from --stages in progressive distillation; leave them out")
    train.fill(args, info, {**(DIGITS if digits else PAPER), "lr": (DIGITS_LR if digits else PAPER_LR)[args.objective]})
    args.threshold = args.threshold or ("clamp" if info["scale"] is None else "quantile")
    args.weight = args.weight or ("output" if info["prediction"] == "eps" else "snr")
    args.w = [args.cfg, args.cfg] if args.objective == "dmd2" else args.w
    schedule = make_schedule(info["schedule"])
    if schedule.continuous or info["only_node"] is not None or info["arch"].get("context") == "text":
        raise UserError("this model's time is continuous, it is a student of one step, or takes prompts; ddil.py wants discrete steps, all of them, and labels or none")
    if not all(0 <= v <= 1 for v in (*args.dagger, *args.beta)) or not all(0 < v < math.inf for v in args.reuse) or not 1 <= args.w[0] <= args.w[1] < math.inf:
        raise UserError("--dagger and --beta are probabilities, --reuse is positive, --w (of dmd2 --cfg) is two scales of guidance of at least 1 in their order")
    if (args.objective != "pd" or args.stages[0].startswith("w")) and "hidden_size" not in info["arch"]:
        raise UserError("--objective lcm and dmd2 and a stage w:STEPS want a DiT, this network is a U-Net: halve its steps with --stages N:STEPS")
    stages, nodes = [], None
    if args.objective == "pd":
        for text in args.stages:
            match = re.fullmatch(r"(w|[1-9]\d*):([1-9]\d*)", text)
            if not match or (match[1] == "w" and stages):
                raise UserError(f"--stages {text}: write N:STEPS, as 16:10000; before the first one may stand w:STEPS")
            steps = int(match[2])
            if match[1] == "w":
                stages.append(dict(kind="w", steps=steps, grid=None, nodes=None, starts=list(range(schedule.T)) + [-1], file="guidance.pt"))
                continue
            N = int(match[1])
            if nodes and len(nodes) - 1 != N:
                raise UserError(f"--stages {' '.join(args.stages)}: a stage from {N} steps cannot follow one that ends at {len(nodes) - 1}")
            grid = nodes or (info["grid"] if info["nfe"] == N and isinstance(info["grid"], list) else schedule_grid(schedule, args.grid, N))
            nodes = halve_grid(grid)
            stages.append(dict(kind="pd", steps=steps, grid=grid, nodes=nodes, starts=nodes, file=f"nfe{len(nodes) - 1}.pt"))
        if nodes is None:
            raise UserError("--stages: at least one of the form N:STEPS, N the teacher's number of steps")
    elif args.objective == "lcm":
        nodes, all_nodes = lcm_grid(args.nfe, schedule.T), lcm_grid(50, schedule.T)
        stages.append(dict(kind="lcm", steps=args.steps, grid=all_nodes, nodes=nodes, starts=all_nodes, file=f"nfe{args.nfe}.pt"))
    else:
        nodes = make_grid("uniform", args.nfe, schedule.T)
        stages.append(dict(kind="dmd2", steps=args.steps, grid=make_grid("uniform", 8 * args.nfe, schedule.T), nodes=nodes, starts=nodes, file=f"nfe{args.nfe}.pt"))
    learns_w = stages[0]["kind"] in ("w", "lcm")
    if info["arch"].get("guidance") and (learns_w or args.objective == "dmd2"):
        raise UserError("this model takes the scale of guidance as an input already: halve its steps with --stages N:STEPS")
    if learns_w and not args.w[0] <= args.cfg <= args.w[1]:
        raise UserError(f"--cfg {args.cfg:g}: the student learns guidance from {args.w[0]:g} to {args.w[1]:g}; widen --w, or sample within it")
    ends = list(itertools.accumulate(s.pop("steps") for s in stages))
    for s, begin, end in zip(stages, [0] + ends, ends):
        s.update(begin=begin, end=end)
    args.steps, args.nfe = ends[-1], len(nodes) - 1
    runtime.check_positive(args)
    train.check_data(args)
    return stages


def parser():
    p = runtime.Parser(prog="ddil.py", description=__doc__, formatter_class=runtime.Raw)
    p.add_argument("--objective", choices=["pd", "lcm", "dmd2"], default="pd")
    p.add_argument("--model", help="DiT-{S,B,L,XL}/{2,4,8}; the released weights are fetched where there are any")
    p.add_argument("--image-size", type=int, choices=[256, 512], help="of the released weights (default: what they were made for)")
    p.add_argument("--ckpt", help="the base model: a checkpoint's path or URL, ours or upstream's; default: a v teacher of the digits, made here")
    p.add_argument("--data", help="digits, mnist, cifar10, ..., a folder of images or cached latents, or synthetic:STEPS")
    p.add_argument("--classes", type=int, help="number of classes, where the data does not tell")
    p.add_argument("--stages", nargs="+", metavar="N:STEPS", help="halvings of a teacher of N steps, as 32:10000 16:10000 8:20000; w:STEPS before them makes guidance an input")
    p.add_argument("--grid", choices=["uniform", "dit"], default="uniform", help="where the first teacher's steps lie (dit: for iSSD's Tables 5 and 6)")
    p.add_argument("--weight", choices=["snr", "output"], help="snr: Eq. 1; output: plain distance of outputs (default for eps)")
    p.add_argument("--dagger", type=float, nargs=2, default=[0.25, 0.5], metavar="P", help="probability of a state from D, in both parts of a stage; 0 0 is plain distillation")
    p.add_argument("--beta", type=float, nargs=2, default=[0.15, 0.8], metavar="P", help="probability of the student at every transition of a rollout")
    p.add_argument("--reuse", type=float, nargs=2, default=[2, 3], metavar="TIMES", help="how often a state in D is used before new ones are made")
    p.add_argument("--threshold", choices=list(PROJECTIONS), help="where predicted x0 is projected to; default: clamp for pixels, quantile for latents")
    p.add_argument("--w", type=float, nargs=2, default=[1.0, 2.0], metavar="SCALE", help="range of the guidance that the student learns as an input")
    p.add_argument("--cfg", type=float, help="guidance when sampling (1: none); dmd2: the teacher's")
    p.add_argument("--nfe", type=int, help="steps of the lcm or dmd2 student (default 4)")
    p.add_argument("--steps", type=int, help="of lcm or dmd2")
    p.add_argument("--batch-size", type=int, help="of all processes together")
    p.add_argument("--lr", type=float)
    p.add_argument("--eval-samples", type=int, help="samples per row of the table (digits: 2000, else 0)")
    runtime.common_arguments(p, "runs/ddil")
    return p


if __name__ == "__main__":
    runtime.run(main, parser().parse_args())
