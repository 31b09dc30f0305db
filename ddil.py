"""DDIL: distillation with imitation learning, over progressive distillation (PD), LCM or DMD2.

Garrepalli et al., "DDIL: Diversity Enhancing Diffusion Distillation with Imitation Learning",
https://arxiv.org/abs/2410.11971 (only its supplement was at hand).

PD halves the steps stage by stage. The student trains on data with noise added, but once it samples
it visits states of its own making. DDIL aggregates such states (DAgger) and has the teacher label
them too. One stage, teacher theta of N steps, student eta of N/2 steps, k = T/N:

    eta <- theta
    repeat
        with probability p: (z_t, t) ~ D                     Algorithm 2: the aggregated states
        else: z_t = alpha_t x + sigma_t eps,  x ~ data,      forward process
              t = 2kj, j ~ U{1..N/2}
        z_(t-k), z_(t-2k) = two DDIM steps of the teacher from z_t
        x* = (z_(t-2k) - r z_t) / (alpha_(t-2k) - r alpha_t),  r = sigma_(t-2k) / sigma_t
        L = max(1, alpha_t^2 / sigma_t^2) | x_eta(z_t) - x* |^2          Eq. 1
        now and then: D <- D + rollouts from noise;          Algorithm 1
              the student takes each interval of 2k with probability beta (one step),
              else the teacher takes it (two steps)
    theta <- eta, N <- N/2                                   and on to the next stage

p, beta = 0.25, 0.15 in the first 60 % of a stage, then 0.5, 0.8. --dagger 0 0 is plain PD
(Salimans & Ho, https://arxiv.org/abs/2202.00512).
--objective lcm: consistency distillation (Luo et al., https://arxiv.org/abs/2310.04378).
--objective dmd2: distribution matching (Yin et al., https://arxiv.org/abs/2405.14867).
With either, DDIL's mixture says where z_t comes from.

Differences from the paper:
- eps = sigma z + alpha v. Its algorithms print a minus.
- Its t ~ U[0, 1] k is drawn from the student's nodes. Its time t is our t - 1, rounded where k is
  no integer (999, 937, 874, ... for N = 16), and clean is -1. Our index i counts from noise.
- Whether the student or the teacher goes is drawn anew for every trajectory and every interval.
- A state in D keeps its label and its scale of guidance. Its noise eps is not kept: no loss needs
  eps.
- D keeps the states that a step has reached. A student of one step reaches none before the end, and
  LCM's and DMD2's students restart from new noise: there D keeps the starting noise, too.
- D and Adam start anew in every stage.
- The paper's PD teacher takes guidance as an input; here only with --stages w:STEPS first.
- The paper samples with DPM-Solver++(2M). Here: DDIM, whose step Eq. 1 is about, unless sample.py
  --solver dpm++.
- The paper is silent on PD's learning rate, batch and stages. In PD the learning rate falls to 0
  within a stage and the gradient is clipped at 1, as in Salimans & Ho; DMD2 clips at 10.
- The paper is silent on the size of D. Here D keeps the last 4 rollouts, and new ones are made so
  often that a state is used 2 (later 3) times on average before it leaves D. This adds 4 to 5 %
  network evaluations to PD (the paper: less than 5 %), to LCM, whose guided teacher takes many
  steps, 33 and later 12 %.
- Thresholded (reflected diffusion) are the predictions of the teacher in targets, of both networks
  in rollouts, of teacher and critic in DMD2, and of the student in sampling. Not thresholded: the
  student's predictions in a loss, and the stage w:STEPS.
- DMD2's student is sampled as LCM's, through LCM's boundary function, which is nearly the identity.
- LCM keeps the student, not its average.
- Without --data, a released model trains on its own samples, of 50 steps: these are the data that
  the states come from, and made in the student's few steps they would be poor.
- Labels are dropped for 1 sample in 10 where no scale of guidance is drawn and the base model knows
  the null label.

    python ddil.py                                                     the digits, on a CPU
    python ddil.py --model DiT-XL/2 --accumulate 8 --stages w:10000 32:10000 16:10000 8:20000
    torchrun --nproc_per_node 8 ddil.py --model DiT-XL/2 --objective lcm        eight GPUs

Writes runs/ddil/{last.pt, nfe8.pt, ..., log.jsonl, metrics.json, samples.png}.
"""
import copy
import itertools
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

import models
import train
from kit import checkpoints, data
from kit.base import (
    apply_method_defaults,
    can_drop,
    can_guide,
    check_null,
    describe_base,
    is_digits,
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
    has_condition,
    in_millions,
    labels_line,
    nodes_line,
    resources,
    step_flops,
)
from kit.processes import Processes, StepRandom
from kit.run import Run, adamw, set_lr, update_average
from solvers import (
    PROJECTIONS,
    add_noise,
    column,
    ddim_invert,
    ddim_step,
    from_x0_eps,
    halve_grid,
    lcm_boundary,
    lcm_grid,
    make_grid,
    make_schedule,
    schedule_grid,
    to_x0_eps,
)

# ---- Method: imitation learning ----------------------------------------------------------------
# Networks are net(z, t, *cond): states z (B, C, H, W), float32 or float64; timesteps t (B,), -1 is
# clean; cond is (labels,) or (labels, scales of guidance), each (B, ...). t > mid > u are t, t - k
# and t - 2k. Channels beyond C hold a learned variance and are cut off.
#
#     D = Aggregated(device)
#     student = ddim_path(student_net, schedule, nodes, cond, "v")      # one step per interval
#     teacher = ddim_path(teacher_net, schedule, grid, cond, "v")       # two steps per interval
#     states = mixed_rollout(student, teacher, noise, nodes[:-1], lambda n: torch.rand(B) < beta)
#     D.add(torch.cat(states[1:]), i, cond_of_each)                     # i: index of each in nodes
#     z_t, i, cond = D.mix(rng, p, z_t, i, cond)                        # Algorithm 2
#     target = pd_target(teacher_net, schedule, z_t, cond, t, mid, u)
#     loss, _ = pd_loss(student_net, schedule, z_t, cond, t, target)
#
# rng.uniform() gives (B,) in [0, 1), rng.integers(low, high) gives (B,).


@torch.no_grad()
def mixed_rollout(student_path, teacher_path, z, nodes, student_goes):
    """Algorithm 1: from noise z (B, C, H, W) along `nodes`, a list of numbers; the student or the
    teacher takes each interval.

    A path is a function path(z, rows, t, u): the states z of the chosen rows go from node t to node
    u, two numbers; rows (B,) bool tells which rows of the batch they are.
    student_goes(n) -> (B,) bool: which samples the student takes through interval n.
    Returns all len(nodes) states.
    """
    states = [z]
    for n, (t, u) in enumerate(zip(nodes[:-1], nodes[1:])):
        chosen = student_goes(n)
        reached = torch.empty_like(z)
        for path, rows in ((student_path, chosen), (teacher_path, ~chosen)):
            if rows.any():
                reached[rows] = path(states[-1][rows], rows, t, u)
        states.append(reached)
    return states


def ddim_path(net, schedule, grid, cond, prediction="v", project=None):
    """The path by DDIM along all nodes of `grid` between t and u. net(z, t, *cond)."""
    def step(z, rows, t, u):
        own = [c[rows] for c in cond]
        nodes = grid[grid.index(t):grid.index(u) + 1]
        for a, b in zip(nodes[:-1], nodes[1:]):
            times = torch.full((len(z),), a, device=z.device)
            out = net(z, times, *own)[:, :z.shape[1]]
            z = ddim_step(schedule, z, out, a, b, prediction, project)
        return z
    return step


def renoise_path(net, schedule, noise, cond, prediction="v", project=None):
    """The path of LCM's sampler: predict x0, then noise it anew with noise[t] (B, C, H, W)."""
    def step(z, rows, t, u):
        own = [c[rows] for c in cond]
        times = torch.full((len(z),), t, device=z.device)
        out = net(z, times, *own)[:, :z.shape[1]]
        x0, _ = to_x0_eps(schedule, z, out, t, prediction, project)
        x0 = lcm_boundary(schedule, z, x0, t)
        return add_noise(schedule, x0, noise[t][rows], u)
    return step


def mixture(local, steps, dagger, beta, reuse, states):  # noqa: PLR0913
    """The schedule of the mixture -> (p, beta, whether a new rollout is due) at a step of a stage.

    local      the step within a stage of so many steps
    dagger     (p, p later): which share of the batch comes from D; later is after 60 % of the stage
    beta       (beta, beta later): how often the student goes in a rollout
    reuse      how often a state is used, on average, before it leaves D
    states     how many states of a trajectory a rollout adds
    """
    switch = math.ceil(0.6 * steps)
    later = 1 if local >= switch else 0
    p = dagger[later]
    if not p:
        return 0, 0, False
    period = max(1, round(reuse[later] * states / p))
    return p, beta[later], (local - later * switch) % period == 0


class Aggregated:
    """D, the aggregated states. They are the same on all processes.

    parts: z (n, C, H, W); i (n,), the index of the node where each state lies; cond, each (n, ...).
    """

    def __init__(self, device):
        self.device = device
        self.parts = []

    def add(self, z, i, cond, keep=4):
        """D <- D + one rollout; the last `keep` rollouts stay."""
        new = [z, i, *cond]
        if self.parts:
            most = keep * len(z)
            new = [torch.cat([old, more])[-most:] for old, more in zip(self.parts, new)]
        self.parts = new

    def mix(self, rng, p, z, i, cond):
        """Algorithm 2: with probability p a state of D in place of a sample's own.

        -> (z, i, cond), and whatever comes with a state stays with it.
        """
        take = rng.uniform() < p
        j = rng.integers(0, len(self.parts[0]))
        mixed = []
        for part, own in zip(self.parts, (z, i, *cond)):
            mask = take.view(-1, *[1] * (own.ndim - 1))
            mixed.append(torch.where(mask, part[j], own))
        return mixed[0], mixed[1], tuple(mixed[2:])

    def state_dict(self):
        return {str(i): part for i, part in enumerate(self.parts)}

    def load_state_dict(self, held):
        self.parts = [part.to(self.device) for _, part in sorted(held.items())]


# ---- Method: progressive distillation ----------------------------------------------------------


def pd_target(teacher, schedule, z_t, cond, t, mid, u,  # noqa: PLR0913
              prediction="v", project=None):
    """x*: the x0 whose one DDIM step t -> u lands where the teacher's t -> mid -> u do."""
    C = z_t.shape[1]
    with torch.no_grad():
        out = teacher(z_t, t, *cond)[:, :C]
        z = ddim_step(schedule, z_t, out, t, mid, prediction, project)           # z_(t-k)
        out = teacher(z, mid, *cond)[:, :C]
        z = ddim_step(schedule, z, out, mid, u, prediction, project)             # z_(t-2k)
        return ddim_invert(schedule, z_t, z, t, u)                               # x*


def pd_loss(student, schedule, z_t, cond, t, target, prediction="v", weight="snr"):
    """Eq. 1 -> (loss, aux). weight "snr": max(1, SNR) on x0, as printed; "output": the plain
    distance of the network's outputs.

    A network that predicts eps has x0 = (z - sigma eps) / alpha: at t = 999 of the linear schedule
    Eq. 1 weighs its error by 1 / SNR = 25,000. For eps take weight="output", as this script does.
    """
    alpha, sigma = schedule.alpha_sigma(t, z_t)
    out = student(z_t, t, *cond)[:, :z_t.shape[1]]                               # (B, C, H, W)
    if weight == "output":
        eps = (z_t - alpha * target) / sigma
        goal = from_x0_eps(schedule, target, eps, t, prediction)
        return (out - goal).square().mean(), {}
    x0, _ = to_x0_eps(schedule, z_t, out, t, prediction)
    snr = (alpha / sigma).square()
    return (snr.clamp(min=1) * (x0 - target).square()).mean(), {"x0": x0.detach()}    # Eq. 1


def guided_output(net, z, t, y, w):
    """Classifier-free guidance with a scale w (B,) for each sample, 1 is none:
    out_null + w (out_y - out_null).

    It acts on every channel, since the student learns the whole guided output. solvers.guide acts
    on 3 of DiT's 4 channels, as upstream samples. net.num_classes is the null label.
    """
    null = torch.full_like(y, net.num_classes)
    out = net(torch.cat([z, z]), torch.cat([t, t]), torch.cat([y, null]))[:, :z.shape[1]]
    cond, uncond = out.chunk(2)
    return uncond + column(w, z) * (cond - uncond)


def guidance_loss(student, teacher, z_t, t, y, w):
    """The student takes w as an input and gives in one evaluation what the guided teacher gives in
    two (Meng et al., https://arxiv.org/abs/2210.03142, stage one) -> (loss, aux)."""
    with torch.no_grad():
        target = guided_output(teacher, z_t, t, y, w)
    out = student(z_t, t, y, w)[:, :z_t.shape[1]]
    return (out - target).square().mean(), {"target": target}


# ---- Method: consistency distillation ----------------------------------------------------------


def consistency(net, schedule, z, t, cond, prediction="v"):
    """x0 in one evaluation: LCM's f(z, t), which is z at t = 0."""
    out = net(z, t, *cond)[:, :z.shape[1]]
    x0, _ = to_x0_eps(schedule, z, out, t, prediction)
    return lcm_boundary(schedule, z, x0, t)


def lcm_loss(student, target, teacher, schedule, z_t, t, u, y, w,  # noqa: PLR0913
             prediction="v", project=None, c=1e-3):
    """f_student(z_t, t) against f_target(z_u, u), pseudo-Huber distance -> (loss, aux).

    z_u is the guided teacher's DDIM step over 20 timesteps. u = -1 is the clean end, where
    f(z) = z. target: a moving average of the student.
    """
    with torch.no_grad():
        out = guided_output(teacher, z_t, t, y, w)
        z_u = ddim_step(schedule, z_t, out, t, u, prediction, project)
        goal = consistency(target, schedule, z_u, u.clamp(min=0), (y, w), prediction)  # f(z, 0) = z
    d = consistency(student, schedule, z_t, t, (y, w), prediction) - goal
    return ((d.square() + c ** 2).sqrt() - c).mean(), {"z_u": z_u, "goal": goal}


# ---- Method: distribution matching -------------------------------------------------------------


class Critic(nn.Module):
    """DMD2's second network: the score of what the student makes, and on its middle block a head
    that tells data from samples."""

    def __init__(self, net):
        super().__init__()
        dim = net.arch["hidden_size"]
        self.net = net
        self.num_classes = net.num_classes
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.SiLU(),
                                  nn.Linear(dim, 1))

    @property
    def blocks(self):
        return self.net.blocks

    def forward(self, z, t, y):
        """-> the network's output (B, C, H, W); logits (B,), large for data."""
        features = []

        def store(l, h):
            features.append(h)
            return h
        out = self.net(z, t, y, tap=store)
        middle = features[len(self.net.blocks) // 2]                             # (B, T, D)
        return out[:, :z.shape[1]], self.head(middle.mean(1))[:, 0]


def critic_loss(critic, schedule, fake, y_fake, real, y_real, t, noise,  # noqa: PLR0913
                prediction="v", gan=1e-2):
    """The denoising loss on the student's samples, and the head's loss on noised samples and data;
    one forward for both halves -> (loss, aux), aux the two terms."""
    t2 = torch.cat([t, t])
    z = add_noise(schedule, torch.cat([fake, real]), torch.cat([noise, noise]), t2)
    out, logit = critic(z, t2, torch.cat([y_fake, y_real]))
    target = from_x0_eps(schedule, fake, noise, t, prediction)
    denoising = (out[:len(fake)] - target).square().mean()
    logit_fake, logit_real = logit.chunk(2)
    verdict = (F.softplus(logit_fake) + F.softplus(-logit_real)).mean()
    aux = {"denoising": denoising.detach(), "verdict": verdict.detach()}
    return denoising + gan * verdict, aux


def dmd_loss(x, critic, teacher, schedule, t, y, w, noise,  # noqa: PLR0913
             prediction="v", project=None, gan=5e-3):
    """Distribution matching: the student's sample x moves along the difference of the two denoised
    x0, and away from the head's verdict "sample" -> (loss, aux), aux the two terms.

    The gradient wanted is that of x alone.
    """
    z = add_noise(schedule, x, noise, t)
    fake_out, logit = critic(z, t, y)
    with torch.no_grad():
        real_out = guided_output(teacher, z, t, y, w)
        real, _ = to_x0_eps(schedule, z, real_out, t, prediction, project)
        fake, _ = to_x0_eps(schedule, z, fake_out, t, prediction, project)
        scale = (x - real).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-6)
        direction = (fake - real) / scale
    matching = 0.5 * (x - (x - direction).detach()).square().mean()
    verdict = F.softplus(-logit).mean()
    aux = {"matching": matching.detach(), "verdict": verdict.detach()}
    return matching + gan * verdict, aux


# ---- Training: the objectives ------------------------------------------------------------------


@dataclass
class Stage:
    """Steps begin..end of a run, in which a teacher along `grid` makes a student along `nodes`.

    kind     "w", "pd", "lcm" or "dmd2"
    file     where the student is kept
    starts   the timesteps at which the student trains, and the end; PD: the same as nodes
    grid     999, 937, 874, ..., -1; nodes: 999, 874, ..., -1. A "w" stage has neither.
    """

    kind: str
    steps: int
    file: str
    starts: list
    grid: Optional[list] = None
    nodes: Optional[list] = None
    begin: int = 0

    @property
    def end(self):
        return self.begin + self.steps


@dataclass
class Networks:
    """The student and what its objective needs.

    net       the student's weights
    student   net for losses: with autocast, and under DDP, which averages gradients
    sampler   net for rollouts: with autocast, without DDP: no gradients, batches of any size
    teacher   with autocast
    """

    net: Any
    wrapped: Any                # for run.parts(): what DDP made of net
    student: Any
    sampler: Any
    opt: Any
    teacher: Any = None
    target: Any = None          # LCM: a moving average of the student
    critic: Any = None          # DMD2
    critic_wrapped: Any = None
    critic_opt: Any = None


@dataclass
class Setting:
    """What does not change from stage to stage."""

    args: Any
    proc: Processes
    schedule: Any
    prediction: str
    project: Any
    shape: tuple                # of a state, (C, H, W)
    classes: int                # K, the null label
    data_classes: int           # 0: every label is the null one
    drop: float                 # the share of labels that are dropped
    draws_scales: bool          # whether the condition holds scales of guidance


class Objective:
    """One way to train the student of a stage.

    paths(cond, rng) gives the student's and the teacher's path of Algorithm 1. update(...) makes
    one step: z_t (B, C, H, W) at timesteps starts[i], with its condition; x0, y0: the step's data.
    """

    def __init__(self, stage, nets, setting):
        self.stage = stage
        self.nets = nets
        self.setting = setting
        self.starts = torch.tensor(stage.starts, device=setting.proc.device)
        # Which states of a rollout D keeps: from the first one that a step has reached, or the
        # starting noise, too (see "Differences from the paper").
        self.first_kept = 1 if stage.kind == "pd" and len(stage.nodes) > 2 else 0


class ProgressiveDistillation(Objective):
    """The student's one step does what the teacher's two do."""

    def __init__(self, stage, nets, setting):
        super().__init__(stage, nets, setting)
        self.grid = torch.tensor(stage.grid, device=setting.proc.device)

    def paths(self, cond, rng):
        s = self.setting
        student = ddim_path(self.nets.sampler, s.schedule, self.stage.nodes, cond, s.prediction,
                            s.project)                              # one step per interval
        teacher = ddim_path(self.nets.teacher, s.schedule, self.stage.grid, cond, s.prediction,
                            s.project)                              # two steps per interval
        return student, teacher

    def update(self, run, rng, z_t, i, cond, x0, y0):
        s = self.setting
        times = (self.starts[i],                                    # t, the same as grid[2 i]
                 self.grid[2 * i + 1],                              # t - k
                 self.grid[2 * i + 2])                              # t - 2k
        for z, t, mid, u, *c in run.parts(z_t, *times, *cond):
            target = pd_target(self.nets.teacher, s.schedule, z, c, t, mid, u, s.prediction,
                               s.project)                           # x*
            loss, _ = pd_loss(self.nets.student, s.schedule, z, c, t, target, s.prediction,
                              s.args.weight)                        # Eq. 1
            run.backward(loss)
        run.optimizer_step(self.nets.opt, clip=1.0)


class GuidanceAsInput(Objective):
    """The stage w:STEPS. It knows no rollouts."""

    def update(self, run, rng, z_t, i, cond, x0, y0):
        for z, t, y, w in run.parts(z_t, self.starts[i], *cond):
            loss, _ = guidance_loss(self.nets.student, self.nets.teacher, z, t, y, w)
            run.backward(loss)
        run.optimizer_step(self.nets.opt, clip=1.0)


def paths_of_few_steps(objective, cond, rng):
    """Algorithm 1 for LCM and DMD2: the student's own sampler, and the guided teacher's DDIM."""
    s = objective.setting
    nets = objective.nets
    stage = objective.stage
    fresh = {t: rng.normal(s.shape) for t in stage.nodes[:-1]}
    own = cond if nets.net.guidance else cond[:1]

    def guided_teacher(z, t, y, w):
        return guided_output(nets.teacher, z, t, y, w)
    student = renoise_path(nets.sampler, s.schedule, fresh, own, s.prediction, s.project)
    teacher = ddim_path(guided_teacher, s.schedule, stage.grid, cond, s.prediction, s.project)
    return student, teacher


class ConsistencyDistillation(Objective):
    """LCM."""

    def __init__(self, stage, nets, setting):
        super().__init__(stage, nets, setting)
        self.target = setting.proc.autocast(nets.target)

    def paths(self, cond, rng):
        return paths_of_few_steps(self, cond, rng)

    def update(self, run, rng, z_t, i, cond, x0, y0):
        s = self.setting
        for z, t, u, y, w in run.parts(z_t, self.starts[i], self.starts[i + 1], *cond):
            loss, _ = lcm_loss(self.nets.student, self.target, self.nets.teacher, s.schedule, z, t,
                               u, y, w, s.prediction, s.project)
            run.backward(loss)
        run.optimizer_step(self.nets.opt, clip=1.0)
        update_average(self.nets.target, self.nets.net, TARGET_EMA)


class DistributionMatching(Objective):
    """DMD2: the critic trains at every step, and its loss is logged; the student at every fifth."""

    def __init__(self, stage, nets, setting):
        super().__init__(stage, nets, setting)
        self.critic = setting.proc.autocast(nets.critic)
        self.critic_in_training = setting.proc.autocast(nets.critic_wrapped)

    def paths(self, cond, rng):
        return paths_of_few_steps(self, cond, rng)

    def noise_level(self, rng):
        """Timesteps (B,) and noise (B, C, H, W) at which samples and data are looked at."""
        T = self.setting.schedule.T
        level = rng.integers(round(0.02 * T), round(0.98 * T))
        return level, rng.normal(self.setting.shape)

    def update(self, run, rng, z_t, i, cond, x0, y0):
        t = self.starts[i]
        self.update_critic(run, rng, z_t, t, cond[0], x0, y0)
        if run.step % CRITIC_UPDATES == 0:
            self.update_student(run, rng, z_t, t, cond)

    def update_critic(self, run, rng, z_t, t, y, x0, y0):
        s = self.setting
        with torch.no_grad():
            fake = consistency(self.nets.sampler, s.schedule, z_t, t, (y,), s.prediction)
        level, noise = self.noise_level(rng)
        rows = (fake, y, x0, y0, level, noise)
        for part in run.parts(*rows, net=self.nets.critic_wrapped):
            loss, _ = critic_loss(self.critic_in_training, s.schedule, *part, s.prediction)
            run.backward(loss)
        run.optimizer_step(self.nets.critic_opt, clip=10.0)

    def update_student(self, run, rng, z_t, times, cond):
        s = self.setting
        for z, t, level, noise, y, w in run.parts(z_t, times, *self.noise_level(rng), *cond):
            x = consistency(self.nets.student, s.schedule, z, t, (y,), s.prediction)
            leaf = x.detach().requires_grad_()
            pull, _ = dmd_loss(leaf, self.critic, self.nets.teacher, s.schedule, level, y, w,
                               noise, s.prediction, s.project)
            # <x, d pull / dx>: its gradient reaches the student and leaves the critic without one.
            loss = (x * torch.autograd.grad(pull, leaf)[0]).sum()
            run.backward(loss)
        run.optimizer_step(self.nets.opt, clip=10.0, logged=False)


OBJECTIVES = {"pd": ProgressiveDistillation, "w": GuidanceAsInput, "lcm": ConsistencyDistillation,
              "dmd2": DistributionMatching}


# ---- Training ----------------------------------------------------------------------------------


def main(args):
    proc = Processes(args.amp)
    began = time.perf_counter()
    args.ckpt = resolve_checkpoint(args)
    base_spec = describe_base(args, "v")
    stages = apply_ddil_defaults(args, base_spec)
    proc.check_batch(args.batch_size, args.accumulate)
    schedule = make_schedule(base_spec["schedule"]).to(proc.device)
    if args.dry_run:
        return say(proc, plan(args, base_spec, stages, proc))

    # Setup networks: the base model is the first teacher; the student starts as its copy.
    base, _, args.ckpt = load_base(args, proc, train.make_teacher, "v")
    args.model = base_spec["name"]
    learns_w = stages[0].kind in ("w", "lcm")
    nets = setup_networks(args, proc, base, learns_w)
    frozen = proc.frozen(base, args)
    before = proc.autocast(frozen)
    draws_scales = bool(nets.net.guidance or nets.critic)
    spec = {**base_spec, "arch": nets.net.arch, "threshold": args.threshold,
            "method": "ddil" if any(args.dagger) else args.objective,
            "cfg": 1.0 if nets.critic else args.cfg,
            "solver": "ddim" if args.objective == "pd" else "lcm",
            # Where scales are drawn, no label is dropped:
            "knows_null": base_spec["knows_null"] and not draws_scales,
            "w": args.w if nets.net.guidance else None, "reading": None}

    # Resume, also in the middle of a stage:
    D = Aggregated(proc.device)
    state = {"model": nets.net, "opt": nets.opt, "target": nets.target, "critic": nets.critic,
             "critic_opt": nets.critic_opt, "buffer": D}
    fixed = ["steps"] if any(args.dagger) else []  # the mixture's schedule depends on them
    run = Run(args, proc, args.objective, nets.wrapped, state, spec, fixed=fixed)
    if run.is_finished and is_measured(args):
        return print_finished(args, proc)
    if run.step:
        frozen = proc.frozen(models.build(run.extra["teacher"]["arch"]), args)
        frozen.load_state_dict(run.extra["teacher"]["weights"])

    # Setup data; where there is none, the base model's own samples:
    dataset, source = training_data(args, before, base_spec, proc, run)
    batches = data.batches(dataset, proc, args.seed, args.batch_size, run.step)
    setting = Setting(args, proc, schedule, spec["prediction"], PROJECTIONS[args.threshold],
                      tuple(dataset.shape), spec["classes"], dataset.classes,
                      drop=DROP if can_drop(base_spec) else 0, draws_scales=draws_scales)

    for stage in stages:
        if run.step >= stage.end:                        # it was done before an interruption
            continue
        if run.step == stage.begin > 0:
            # theta <- eta, and the student goes on from the same weights; the stage has N/2
            frozen = proc.frozen(copy.deepcopy(nets.net), args)
            nets.opt = adamw(nets.net, args.lr)
            D = Aggregated(proc.device)
        nets.teacher = proc.autocast(frozen)
        run.state.update(opt=nets.opt, buffer=D)
        run.extra["teacher"] = {"arch": frozen.arch, "weights": frozen.state_dict()}
        run.flops = step_flops(args, base_spec, FORWARDS[stage.kind])
        spec["grid"] = stage.nodes
        spec["nfe"] = stage.nodes and len(stage.nodes) - 1
        train_stage(run, stage, nets, setting, D, batches)

    # Measure before, after and the controls on the same noise and labels, all thresholded alike:
    entries = table_entries(args, proc, base_spec, stages, source) if args.eval_samples else {}
    method = args.objective + (" + ddil" if any(args.dagger) else "")
    finish(args, proc, method, began, entries)


def train_stage(run, stage, nets, setting, D, batches):
    """Train the student for the rest of one stage."""
    args = setting.args
    objective = OBJECTIVES[stage.kind](stage, nets, setting)
    kept = len(stage.nodes) - 1 - objective.first_kept if stage.nodes else 0
    p = 0
    for step, rng in run.steps(stage.end, copy=stage.file):
        local = step - stage.begin
        if stage.kind != "w":
            p, beta, is_due = mixture(local, stage.steps, args.dagger, args.beta, args.reuse, kept)
            if is_due:
                add_rollout(D, objective, step, beta)                            # Algorithm 1
        x0, y0 = next(batches)
        cond = draw_condition(setting, rng, y0)
        i = rng.integers(0, len(stage.starts) - 1)
        noise = rng.normal(setting.shape)
        z_t = add_noise(setting.schedule, x0, noise, objective.starts[i])        # forward process
        if p:
            z_t, i, cond = D.mix(rng, p, z_t, i, cond)                           # Algorithm 2
        if args.objective == "pd":  # falls to 0 within a stage
            set_lr(nets.opt, args.lr * (1 - local / stage.steps))
        objective.update(run, rng, z_t, i, cond, x0, y0)


def setup_networks(args, proc, base, learns_w):
    """The student and what its objective needs; new weights are drawn from --seed."""
    torch.manual_seed(args.seed)
    if learns_w and not base.guidance:
        net = models.with_guidance(base)
    else:
        net = copy.deepcopy(base)
    wrapped = proc.student(net, args)
    nets = Networks(net, wrapped, student=proc.autocast(wrapped), sampler=proc.autocast(net),
                    opt=adamw(net, args.lr))
    if args.objective == "lcm":
        nets.target = copy.deepcopy(net).eval().requires_grad_(False)
    if args.objective == "dmd2":
        nets.critic = Critic(copy.deepcopy(base))
        nets.critic_wrapped = proc.student(nets.critic, args)
        nets.critic_opt = adamw(nets.critic, args.lr)
    return nets


def draw_condition(setting, rng, y):
    """If guidance is distilled: labels and scales. Otherwise: labels, some of them dropped so that
    the student can still be guided."""
    if setting.draws_scales:
        low, high = setting.args.w
        return y, low + (high - low) * rng.uniform()
    return (train.drop_labels(y, setting.classes, rng.uniform() < setting.drop),)


def add_rollout(D, objective, step, beta):
    """Algorithm 1: D <- D + the states of a new rollout, with its own random numbers."""
    setting = objective.setting
    stage = objective.stage
    args = setting.args
    proc = setting.proc
    rng = StepRandom(proc, (args.seed << 8) + 2, step, args.batch_size)  # a seed no run has
    y = rng.integers(0, setting.data_classes or 1)
    if not setting.data_classes:
        y = torch.full_like(y, setting.classes)
    cond = draw_condition(setting, rng, y)
    noise = rng.normal(setting.shape)
    student_path, teacher_path = objective.paths(cond, rng)

    def student_goes(_):
        return rng.uniform() < beta
    # The last interval is left out: its end is clean, where nothing trains.
    states = mixed_rollout(student_path, teacher_path, noise, stage.nodes[:-1], student_goes)

    first = objective.first_kept
    z = torch.stack(states[first:])                                        # (node, B, C, H, W)
    index = [stage.starts.index(t) for t in stage.nodes[first:-1]]
    i = torch.tensor(index, device=proc.device).repeat_interleave(args.batch_size)
    whole = [proc.gather_share(c).repeat(len(index)) for c in cond]
    D.add(proc.gather_share(z, 1).flatten(0, 1), i, whole, KEEP)


def table_entries(args, proc, base_spec, stages, source):
    """The rows of the table: the base model, continued training, the student of every stage."""
    def at(net, nodes):
        nfe = len(nodes) - 1
        spec = {**base_spec, "threshold": args.threshold, "grid": nodes, "nfe": nfe}
        return Entry(net, spec, nfe, args.cfg)

    before = proc.autocast(proc.frozen(checkpoints.load_model(args.ckpt)[0]))
    halvings = [stage for stage in stages if stage.nodes]
    first = halvings[0].grid
    last = halvings[-1].nodes
    entries = {"before": at(before, last), f"before, {len(first) - 1} steps": at(before, first)}
    if not base_spec["arch"].get("guidance"):  # whose input the ordinary loss does not know
        say(proc, f"the control: the ordinary loss for {args.steps} more steps")
        control = train.train_control(args, source)
        entries["continued training"] = at(proc.autocast(proc.frozen(control)), last)
    for stage in halvings:
        is_last = stage is stages[-1]
        file = Path(args.out) / ("last.pt" if is_last else stage.file)
        net, made = checkpoints.load_model(file)
        name = "after" if is_last else f"after, {made['nfe']} steps"
        entries[name] = Entry(proc.autocast(proc.frozen(net)), made, made["nfe"], made["cfg"])
    return entries


def plan(args, spec, stages, proc):
    """What --dry-run prints."""
    takes_w = stages[0].kind in ("w", "lcm") or bool(spec["arch"].get("guidance"))
    student = {**spec, "arch": {**spec["arch"], "guidance": takes_w}}
    guidance = guidance_line(student, args.cfg)
    scales = labels_line(spec, DROP)
    if args.objective == "dmd2":
        scales = guidance_line(spec, args.cfg).replace("evaluation", "evaluation of the teacher")
        guidance = "1 forward per evaluation"
    elif takes_w:
        scales = f"scales of guidance {args.w[0]:g} to {args.w[1]:g}"
    mixture = "none, plain distillation (--dagger 0 0)"
    if any(args.dagger):
        mixture = (f"{args.dagger[0]:g} then {args.dagger[1]:g} from aggregated states, student "
                   f"probability {args.beta[0]:g} then {args.beta[1]:g}, each used "
                   f"{args.reuse[0]:g} then {args.reuse[1]:g} times; the cost is without rollouts")
    lines = [
        f"DDIL ({args.objective}) of {spec['name']}, {in_millions(spec['arch'])} parameters, "
        f"predicting {spec['prediction']}, on {args.data}",
        f"sampling     {args.nfe} steps at t = {nodes_line(stages[-1].nodes)}; {guidance}; "
        f"threshold {args.threshold}",
        f"training     {scales}",
        f"mixture      {mixture}",
    ]
    total = 0
    for stage in stages:
        what = "guidance becomes an input"
        if stage.nodes:
            what = (f"{len(stage.grid) - 1} -> {len(stage.nodes) - 1} steps at "
                    f"t = {nodes_line(stage.nodes)}")
        flops = stage.steps * step_flops(args, spec, FORWARDS[stage.kind])
        total += flops
        lines.append(f"{stage.kind:12} {what}; {stage.steps:,} steps of {batch_line(args, proc)}, "
                     f"lr {args.lr:g}, {flops:.3g} FLOP")
    # LCM has an average; DMD2's critic has gradients and Adam, and twice the rows:
    copies, frozen, rows = {"pd": (1, 1, 1), "lcm": (2, 1, 1), "dmd2": (5, 1, 2)}[args.objective]
    lines += resources(args, proc, spec["arch"], total / args.steps, weight_copies=copies,
                       frozen=frozen, rows=rows)
    return "\n".join(lines)


# ---- Settings ----------------------------------------------------------------------------------

# Forwards of a step; both halves of guidance count, and a backward counts as two.
FORWARDS = {"w": 5, "pd": 5, "lcm": 6, "dmd2": 9}
DROP = 0.1           # of labels
KEEP = 4             # rollouts in D; the paper is silent
TARGET_EMA = 0.95    # LCM's
CRITIC_UPDATES = 5   # DMD2's, per update of the student

# Stages N:STEPS from a teacher of N steps; w:STEPS makes guidance an input first. The paper:
# 40,000 updates to 4 steps; it does not say where it starts. It is silent on learning rates: those
# of LCM and DMD2 are their own.
PAPER = dict(stages=["32:10000", "16:10000", "8:20000"], steps=20_000, batch_size=256, nfe=4,
             data="synthetic:50", eval_samples=0, log_every=100, save_every=1000)
PAPER_LR = {"pd": 1e-5, "lcm": 1e-6, "dmd2": 5e-7}

# The digits: chosen by experiments/ddil/digits.py, without DDIL's mixture.
DIGITS = dict(stages=["16:100", "8:100", "4:100"], steps=400, batch_size=64, nfe=4, data="digits",
              eval_samples=2000, log_every=20, save_every=50)
DIGITS_LR = {"pd": 1e-3, "lcm": 3e-5, "dmd2": 1e-4}


def apply_ddil_defaults(args, spec):
    """Fill missing arguments from the settings above -> the stages. Raises UserError."""
    refuse_for_the_objective(args, spec)
    settings, lr = (DIGITS, DIGITS_LR) if is_digits(spec) else (PAPER, PAPER_LR)
    own = {**settings, "lr": lr[args.objective], "w": spec["w"] or [1.0, 2.0]}
    apply_method_defaults(args, spec, own, synthetic=50)
    check_null(args, spec)
    if args.grid is None:
        args.grid = "uniform"
    if args.threshold is None:
        args.threshold = "clamp" if spec["scale"] is None else "quantile"
    if args.weight is None:
        args.weight = "output" if spec["prediction"] == "eps" else "snr"
    if args.objective == "dmd2":
        args.w = [args.cfg, args.cfg]
    schedule = make_schedule(spec["schedule"])
    check_model(args, spec, schedule)
    stages = make_stages(args, spec, schedule)

    if all(len(stage.nodes) == 2 for stage in stages if stage.nodes):
        refuse_without_effect(args, "beta", "with students of one step, whose rollouts are noise")
    check_guidance(args, spec, learns_w=stages[0].kind in ("w", "lcm"))
    args.steps = stages[-1].end
    args.nfe = len(stages[-1].nodes) - 1
    check_positive(args)
    return stages


def refuse_for_the_objective(args, spec):
    """Raise UserError for flags that have no effect with this --objective and this model."""
    learns_w = args.objective == "lcm" or (args.stages or [""])[0].startswith("w")
    takes_w = spec["arch"].get("guidance")
    if args.objective == "pd":
        refuse_without_effect(args, "steps nfe", "with --objective pd: they follow from --stages")
    else:
        refuse_without_effect(args, "stages grid weight", f"with --objective {args.objective}")
    if args.objective == "dmd2":
        refuse_without_effect(args, "w", "with --objective dmd2, whose guidance is --cfg")
    elif not learns_w and not takes_w:
        refuse_without_effect(args, "w", "without a stage w:STEPS")
    if not any(args.dagger):
        refuse_without_effect(args, "beta reuse", "with --dagger 0 0")


def check_guidance(args, spec, learns_w):
    """Raise UserError where a student cannot learn the guidance that is asked for."""
    low, high = args.w
    takes_w = spec["arch"].get("guidance")
    if takes_w and (learns_w or args.objective == "dmd2"):
        raise UserError("this model takes the scale of guidance as an input already: halve its "
                        "steps with --objective pd --stages N:STEPS")
    wants_guidance = learns_w or args.objective == "dmd2"
    if wants_guidance and not can_guide(spec) and (args.objective == "pd" or has_condition(spec)):
        raise UserError("guidance cannot be distilled from this model: it knows no classes, or has "
                        "not learned the null label; take --objective pd without a stage w:STEPS")
    if takes_w and spec["w"] and not spec["w"][0] <= low <= high <= spec["w"][1]:
        raise UserError("--w {:g} {:g}: this model knows scales of guidance from {:g} to {:g}"
                        .format(low, high, *spec["w"]))
    if (learns_w or takes_w) and not low <= args.cfg <= high:
        raise UserError(f"--cfg {args.cfg:g}: the student learns guidance from {low:g} to "
                        f"{high:g}; widen --w, or sample within it")


def check_model(args, spec, schedule):
    """Raise UserError for what this script cannot do."""
    is_text = spec["arch"].get("context") == "text"
    if schedule.continuous or spec["only_node"] is not None or is_text:
        raise UserError("this model's time is continuous, it is a student of one step, or takes "
                        "prompts; ddil.py wants discrete steps, all of them, and labels or none")
    are_probabilities = all(0 <= v <= 1 for v in (*args.dagger, *args.beta))
    are_positive = all(0 < v < math.inf for v in args.reuse)
    low, high = args.w
    if not are_probabilities or not are_positive or not 1 <= low <= high < math.inf:
        raise UserError("--dagger and --beta are probabilities, --reuse is positive, --w (of dmd2 "
                        "--cfg) is two scales of guidance of at least 1 in their order")
    needs_dit = args.objective != "pd" or args.stages[0].startswith("w")
    if needs_dit and "hidden_size" not in spec["arch"]:
        raise UserError("--objective lcm and dmd2 and a stage w:STEPS want a DiT, this network is "
                        "a U-Net: halve its steps with --objective pd --stages N:STEPS")


def make_stages(args, spec, schedule):
    """The stages of an objective, one after the other."""
    T = schedule.T
    if args.objective == "pd":
        stages = parse_stages(args, spec, schedule)
    elif args.objective == "lcm":
        every = lcm_grid(50, T)
        stages = [Stage("lcm", args.steps, f"nfe{args.nfe}.pt", starts=every, grid=every,
                        nodes=lcm_grid(args.nfe, T))]
    else:
        nodes = make_grid("uniform", args.nfe, T)
        stages = [Stage("dmd2", args.steps, f"nfe{args.nfe}.pt", starts=nodes, nodes=nodes,
                        grid=make_grid("uniform", 8 * args.nfe, T))]
    begins = itertools.accumulate([0] + [stage.steps for stage in stages])
    for stage, begin in zip(stages, begins):
        stage.begin = begin
    return stages


def parse_stages(args, spec, schedule):
    """--stages w:STEPS N:STEPS ... -> the stages of PD. Raises UserError."""
    stages = []
    nodes = None
    for text in args.stages:
        match = re.fullmatch(r"(w|[1-9]\d*):([1-9]\d*)", text)
        if not match or (match[1] == "w" and stages):
            raise UserError(f"--stages {text}: write N:STEPS, as 16:10000; before the first one "
                            "may stand w:STEPS")
        steps = int(match[2])
        if match[1] == "w":
            every = list(range(schedule.T)) + [-1]
            stages.append(Stage("w", steps, "guidance.pt", starts=every))
            continue
        N = int(match[1])
        if nodes and len(nodes) - 1 != N:
            raise UserError(f"--stages {' '.join(args.stages)}: a stage from {N} steps cannot "
                            f"follow one that ends at {len(nodes) - 1}")
        keeps_own_grid = spec["nfe"] == N and isinstance(spec["grid"], list)
        grid = nodes
        if grid is None and keeps_own_grid:
            refuse_without_effect(args, "grid", "with a model that has its own grid of these steps")
            grid = spec["grid"]
        elif grid is None:
            grid = schedule_grid(schedule, args.grid, N)
        nodes = halve_grid(grid)
        stages.append(Stage("pd", steps, f"nfe{len(nodes) - 1}.pt", starts=nodes, grid=grid,
                            nodes=nodes))
    if nodes is None:
        raise UserError("--stages: at least one of the form N:STEPS, N the teacher's number of "
                        "steps")
    return stages


def parser():
    p = make_parser("ddil.py", __doc__)
    group = p.add_argument_group("the method")
    group.add_argument("--objective", choices=["pd", "lcm", "dmd2"], default="pd",
                       help="what DDIL's mixture goes with")
    group.add_argument("--stages", nargs="+", metavar="N:STEPS",
                       help="pd: halvings of a teacher of N steps, as 32:10000 16:10000 8:20000; "
                            "w:STEPS before them makes guidance an input "
                            "(default: these three; digits 16:100 8:100 4:100)")
    group.add_argument("--dagger", type=float, nargs=2, default=[0.25, 0.5], metavar="P",
                       help="probability of a state from D, in both parts of a stage; 0 0 is "
                            "plain distillation")
    group.add_argument("--beta", type=float, nargs=2, default=[0.15, 0.8], metavar="P",
                       help="probability of the student at every interval of a rollout")
    group.add_argument("--reuse", type=float, nargs=2, default=[2, 3], metavar="TIMES",
                       help="how often a state is used, on average, before it leaves D")
    group.add_argument("--weight", choices=["snr", "output"],
                       help="snr: Eq. 1; output: plain distance of outputs (default: snr; output "
                            "for eps)")
    group.add_argument("--grid", choices=["uniform", "dit"],
                       help="where the first teacher's steps lie (default: uniform, or a distilled "
                            "model's own; dit: for iSSD's Tables 5 and 6)")
    group.add_argument("--threshold", choices=list(PROJECTIONS),
                       help="where predicted x0 is projected to (default: clamp for pixels, "
                            "quantile for latents)")
    group.add_argument("--w", type=float, nargs=2, metavar="SCALE",
                       help="range of the guidance that the student learns as an input (default: "
                            "1 2; the base model's own where it takes guidance as an input)")
    add_base_arguments(p, model="DiT-{S,B,L,XL}/{2,4,8}; the released weights are fetched where "
                                "there are any",
                       ckpt="a checkpoint's path or URL, ours or upstream's (default: a v teacher "
                            "of the digits, made here)")
    add_data_arguments(p, "digits, mnist, cifar10, ..., a folder of images or cached latents, or "
                          "synthetic:STEPS (default: digits, else synthetic, that is synthetic:50)")
    group = p.add_argument_group("training")
    group.add_argument("--steps", type=int, help="of lcm or dmd2 (default: 20,000; digits 400)")
    group.add_argument("--batch-size", type=int,
                       help="of all processes together (default: 256; digits 64)")
    group.add_argument("--lr", type=float, help="default: by objective, see Settings")
    group = p.add_argument_group("sampling and measuring")
    group.add_argument("--nfe", type=int, help="steps of the lcm or dmd2 student (default: 4)")
    group.add_argument("--cfg", type=float,
                       help="guidance when sampling, 1 is none; dmd2: the teacher's "
                            "(default: the base model's)")
    group.add_argument("--eval-samples", type=int,
                       help="samples per row of the table (default: digits 2000, else 0)")
    add_run_arguments(p, "runs/ddil")
    return p


if __name__ == "__main__":
    run_script(main, parser().parse_args())
