"""Diffusion arithmetic: noise schedules, what a network's output means, timestep grids, solvers,
guidance. This file imports torch and numpy and nothing else: copy it alone into your project.

To sample a network of your own:

    def net(x, t, y):                                      # states (B, C, H, W), timesteps (B,)
        return unet(x, t, encoder_hidden_states=y).sample  # (B, C or more, H, W)

    schedule = make_schedule("sd").to("cuda")              # the noise that net was trained with
    guided = guide(net, 4.0, null=nothing)                 # nothing: y of an empty prompt (1, ...)
    predict = predictor(guided, y, schedule, "eps")        # net predicts eps, x0, v or velocity
    grid = solver_grid(schedule, "dpm++", nfe=20)
    x = sample(predict, torch.randn(8, 4, 32, 32, device="cuda"), schedule, grid, "dpm++")

Notation: x_t = alpha_t x0 + sigma_t eps; t is a node of the grid, u is the next, less noisy one.
lmb = log(alpha / sigma), as in the DPM-Solver papers. States are (B, C, H, W), timesteps are (B,)
or one number. All arithmetic is in the dtype of the state, which is float32 or float64; half
precision stays inside the network.
"""
import math
from dataclasses import dataclass, field
from functools import partial
from typing import Callable

import numpy as np
import torch

# ---- Noise schedules ----------------------------------------------------------------------------


def column(v, x):
    """A number or a tensor (B,) -> shaped to multiply x (B, C, H, W), in the dtype of x.

    A number becomes a tensor on the device of x, without a copy from the host.
    Raises TypeError for states in half precision.
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"solver arithmetic wants float32 or float64 states, got {x.dtype}")
    if isinstance(v, torch.Tensor):
        return v.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    return x.new_full([1] * x.ndim, v)


class VP:
    """Discrete variance-preserving schedule: alpha_t^2 = prod(1 - beta), sigma_t^2 = 1 - alpha_t^2.

    Timesteps are the integers 0 to T - 1, and -1 is the clean end (alpha = 1, sigma = 0). The
    float64 tables `alpha` and `sigma` (T + 1,) hold the clean end as their last entry.
    Between integers log alpha is linear, as in DPM-Solver; middle() gives times between integers.
    `beta` and `post_logvar` (T,) are for the loss of a learned variance.
    """

    continuous = False  # timesteps are integers
    grid = None         # any grid of integers fits

    def __init__(self, betas, latent_diffusion=False):
        alpha_bar = torch.cumprod(1 - betas, 0)
        previous = torch.cat([torch.ones(1, dtype=alpha_bar.dtype), alpha_bar[:-1]])
        post_var = betas * (1 - previous) / (1 - alpha_bar)

        self.T = len(betas)
        self.latent_diffusion = latent_diffusion
        self.alpha = torch.cat([alpha_bar.sqrt(), alpha_bar.new_ones(1)])
        self.sigma = torch.cat([(1 - alpha_bar).sqrt(), alpha_bar.new_zeros(1)])
        self.beta = betas
        # Upstream's "clipped" variance: entry 0 would be log 0, so it repeats entry 1.
        self.post_logvar = torch.cat([post_var[1:2], post_var[1:]]).log()
        # (T,), numpy: np.interp reads them on the host.
        self.log_alpha = (0.5 * alpha_bar.log()).numpy()
        self.lmb = (0.5 * (alpha_bar / (1 - alpha_bar)).log()).numpy()

    def to(self, device):
        """Moves the tables to a device; it must be the device of the states."""
        for name in ("alpha", "sigma", "beta", "post_logvar"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def alpha_sigma(self, t, x):
        """alpha_t and sigma_t, shaped to multiply x. t: int, float in [0, T - 1] or long (B,)."""
        if isinstance(t, float):
            log_alpha = np.interp(t, np.arange(self.T), self.log_alpha)
            sigma = np.sqrt(-np.expm1(2 * log_alpha))
            return column(np.exp(log_alpha), x), column(sigma, x)
        return column(self.alpha[t], x), column(self.sigma[t], x)

    def middle(self, t, u):
        """The time, a float, whose lmb is half way between those of t and u (numbers >= 0)."""
        times = np.arange(self.T)
        lmb = np.interp([t, u], times, self.lmb).mean()
        return float(np.interp(-lmb, -self.lmb, times))


class Interpolant:
    """Linear interpolant of flow models (SiT): alpha_t = 1 - t, sigma_t = t, 1 is noise, 0 clean.

    Timesteps are real numbers in [0, 1]. A VP schedule has the same four attributes.
    """

    T = 1000                  # grids of integers are laid on so many steps
    continuous = True         # timesteps are real numbers
    latent_diffusion = False  # not a schedule of the latent diffusion code
    grid = "sit"              # the only grid of make_grid that fits

    def to(self, device):
        return self

    def alpha_sigma(self, t, x):
        """alpha_t and sigma_t, shaped to multiply x. t: a number or a tensor (B,) in [0, 1]."""
        return column(1 - t, x), column(t, x)


class EDM(Interpolant):
    """The process of Karras et al. (EDM): alpha = 1, sigma = t.

    The time is the noise level; sampling starts at 80 and ends at 0.
    """

    grid = "edm"

    def alpha_sigma(self, t, x):
        """alpha_t and sigma_t, shaped to multiply x. t: a number >= 0 or a tensor (B,)."""
        return column(1.0, x), column(t, x)


def make_schedule(name, T=1000):
    """The schedule of that name; T is the number of steps of a discrete one.

    linear        beta from 0.0001 to 0.02 for T = 1000: DDPM, DiT
    cosine        Nichol & Dhariwal, "Improved DDPM", Eq. 17
    ldm, ldm-churches, sd  linear in sqrt(beta): latent diffusion, Stable Diffusion
    interpolant   SiT and other flow models
    edm           Karras et al.

    Raises ValueError for another name.
    """
    if name == "interpolant":
        return Interpolant()
    if name == "edm":
        return EDM()
    if name == "linear":
        first = 1e-4 * 1000 / T
        last = 0.02 * 1000 / T
        return VP(torch.linspace(first, last, T, dtype=torch.float64))
    if name == "cosine":
        time = torch.arange(T + 1, dtype=torch.float64) / T
        alpha_bar = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        return VP((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999))

    latent = {"ldm": (0.0015, 0.0195), "ldm-churches": (0.0015, 0.0155), "sd": (0.00085, 0.012)}
    if name in latent:
        first, last = latent[name]
        roots = torch.linspace(first ** 0.5, last ** 0.5, T, dtype=torch.float64)
        return VP(roots ** 2, latent_diffusion=True)
    raise ValueError(f"schedule {name}: unknown; "
                     "choose linear, cosine, ldm, sd, interpolant or edm")


def add_noise(schedule, x0, eps, t):
    """x_t = alpha_t x0 + sigma_t eps. x0, eps: (B, C, H, W); t: one number or (B,)."""
    alpha, sigma = schedule.alpha_sigma(t, x0)
    return alpha * x0 + sigma * eps


# ---- What a network's output means --------------------------------------------------------------

SIGMA_DATA = 0.5  # EDM's guess of the standard deviation of the data
UNKNOWN_PREDICTION = "prediction {}: unknown; choose eps, x0, v, velocity or edm"


def to_x0_eps(schedule, x, out, t, prediction="eps", project=None):
    """The output `out` of a network at x_t -> the pair (x0, eps) that it means, both like x.

    eps, x0    the noise or the clean sample itself
    v          alpha eps - sigma x0, on a VP schedule
    velocity   eps - x0, on the interpolant
    edm        on EDM's schedule: F of D = c_skip x + c_out F (EDM's Eq. 7 and Table 1), where D
               is x0; F is a v in units of the data

    x, out: (B, C, H, W); t: one number or (B,), not a clean end. project(x0) -> x0 brings the
    prediction into the data's domain (PROJECTIONS); eps then follows from the projected x0.
    Raises ValueError for another prediction.
    """
    alpha, sigma = schedule.alpha_sigma(t, x)
    if prediction == "eps":
        x0 = (x - sigma * out) / alpha
        eps = out
    elif prediction == "x0":
        x0 = out
        eps = (x - alpha * out) / sigma
    elif prediction == "v":
        x0 = alpha * x - sigma * out
        eps = sigma * x + alpha * out
    elif prediction == "velocity":
        x0 = x - sigma * out
        eps = x + alpha * out
    elif prediction == "edm":
        norm = (sigma ** 2 + SIGMA_DATA ** 2).sqrt()
        x0 = SIGMA_DATA * (SIGMA_DATA / norm * x + sigma * out) / norm
        eps = (sigma / norm * x - SIGMA_DATA * out) / norm
    else:
        raise ValueError(UNKNOWN_PREDICTION.format(prediction))

    if project:
        x0 = project(x0)
        eps = (x - alpha * x0) / sigma
    return x0, eps


def from_x0_eps(schedule, x0, eps, t, prediction="eps"):
    """The inverse of to_x0_eps: the output that a network should give at x_t, like x0.

    x0, eps: (B, C, H, W); t: one number or (B,). Raises ValueError for another prediction.
    """
    alpha, sigma = schedule.alpha_sigma(t, x0)
    if prediction == "eps":
        return eps
    if prediction == "x0":
        return x0
    if prediction == "v":
        return alpha * eps - sigma * x0
    if prediction == "velocity":
        return eps - x0
    if prediction == "edm":
        norm = (sigma ** 2 + SIGMA_DATA ** 2).sqrt()
        return (sigma / SIGMA_DATA * x0 - SIGMA_DATA * eps) / norm
    raise ValueError(UNKNOWN_PREDICTION.format(prediction))


def clamp_pixels(x0):
    """For pixels, which lie in [-1, 1]."""
    return x0.clamp(-1, 1)


def clamp_quantile(x0, q=0.995, floor=1.0):
    """For latents, whose range is unknown: clamps each sample of x0 (B, C, H, W) to +- a bound.

    The bound is the q-quantile of the sample's absolute values, at least `floor`.
    """
    bound = column(x0.flatten(1).abs().quantile(q, dim=1).clamp(min=floor), x0)
    return x0.clamp(-bound, bound)


# Thresholding: a discretised reflected diffusion.
PROJECTIONS = {"off": None, "clamp": clamp_pixels, "quantile": clamp_quantile}


# ---- Timestep grids: the nodes from noisy to clean, then the end point without an evaluation ----


def make_grid(name, nfe, T=1000):
    """Descending list of nfe + 1 timesteps: nfe nodes, then the end point.

    dit      evenly from T - 1 to 0, then clean (-1): DiT's create_diffusion(str(nfe))
    ddim     multiples of an integer stride that gives exactly nfe nodes, then clean:
             create_diffusion("ddim" + str(nfe))
    ldm      multiples of T // nfe, plus one, then t = 0 (not clean): latent diffusion
    uniform  round(T j / nfe) - 1, then clean: defined for every nfe
    sit      nfe + 1 real numbers from 1 to 0, for the interpolant
    edm      nfe noise levels from 80 to 0.002, evenly in their seventh root, then 0: EDM's Eq. 5

    Raises ValueError for another name or where the grid does not exist for this nfe.
    """
    if nfe < 1 or (name not in ("sit", "edm") and nfe > T):
        raise ValueError(f"--nfe {nfe}: must lie between 1 and the schedule's {T} steps")
    if name == "dit":
        if nfe == 1:
            return [T - 1, -1]
        return [round(i * (T - 1) / (nfe - 1)) for i in range(nfe - 1, -1, -1)] + [-1]
    if name == "ddim":
        for stride in range(1, T + 1):
            nodes = range(0, T, stride)
            if len(nodes) == nfe:
                return [*reversed(nodes), -1]
        raise ValueError(f"--grid ddim: no integer stride gives {nfe} of {T} steps; "
                         "use --grid dit or uniform")
    if name == "ldm":
        nodes = range(0, T, T // nfe)
        if len(nodes) != nfe or nodes[-1] + 1 >= T:
            raise ValueError(f"--grid ldm: {nfe} steps do not fit, upstream would take "
                             f"{len(nodes)} from t = {nodes[-1] + 1} of {T}; "
                             "use --grid dit or uniform")
        return [n + 1 for n in reversed(nodes)] + [0]
    if name == "uniform":
        return [round(T * j / nfe) - 1 for j in range(nfe, 0, -1)] + [-1]
    if name == "sit":
        return [1 - i / nfe for i in range(nfe + 1)]
    if name == "edm":
        high = 80 ** (1 / 7)
        low = 0.002 ** (1 / 7)
        return [(high + i / max(nfe - 1, 1) * (low - high)) ** 7 for i in range(nfe)] + [0.0]
    raise ValueError(f"--grid {name}: unknown; choose dit, ddim, ldm, uniform, sit or edm")


def schedule_grid(schedule, name, nfe):
    """make_grid for a schedule. name None chooses the schedule's own grid.

    The own grid is sit for the interpolant, edm for EDM, ldm for the schedules of latent diffusion
    where nfe divides T, and dit for all others.
    Raises ValueError where the name does not go with the schedule.
    """
    if name is None:
        if schedule.grid:
            name = schedule.grid
        elif schedule.latent_diffusion and schedule.T % nfe == 0 and 1 < nfe < schedule.T:
            name = "ldm"
        else:
            name = "dit"
    required = name if name in ("sit", "edm") else None
    if required != schedule.grid:
        raise ValueError(f"--grid {name} does not go with this model's schedule; leave it out")
    return make_grid(name, nfe, schedule.T)


def halve_grid(grid):
    """Every second node of a teacher's grid, then the same end point.

    999, 946, 894, ..., 53, 0, -1 -> 999, 894, ..., 53, -1. Raises ValueError for an odd number
    of nodes.
    """
    if (len(grid) - 1) % 2:
        raise ValueError(f"a grid of {len(grid) - 1} steps cannot be halved")
    return grid[:-1:2] + grid[-1:]


def lcm_grid(nfe, T=1000, skip=20):
    """nfe of the nodes that a consistency model knows, evenly from the noisiest, then clean.

    Consistency was distilled on the T / skip nodes skip j - 1. Raises ValueError for nfe beyond
    their number.
    """
    nodes = list(range(skip - 1, T, skip))[::-1]
    if not 1 <= nfe <= len(nodes):
        raise ValueError(f"--nfe {nfe}: must lie between 1 and the {len(nodes)} nodes "
                         "that a consistency model knows")
    return [nodes[len(nodes) * i // nfe] for i in range(nfe)] + [-1]


# ---- The arithmetic of one step -----------------------------------------------------------------


def ddim_step(schedule, x, out, t, u, prediction="eps", project=None):
    """Deterministic DDIM from t to u: x_u = alpha_u x0(x_t) + sigma_u eps(x_t).

    out: the network's output at x_t, read by to_x0_eps. On the interpolant this is Euler's step.
    """
    x0, eps = to_x0_eps(schedule, x, out, t, prediction, project)
    return add_noise(schedule, x0, eps, u)


def ddim_invert(schedule, x_t, x_u, t, u):
    """The one constant x0 whose DDIM step carries x_t to x_u; all are (B, C, H, W).

    x0 = (x_u - r x_t) / (alpha_u - r alpha_t) with r = sigma_u / sigma_t. For neighbouring t and u
    the denominator is small; use float64 states where that matters.
    """
    alpha_t, sigma_t = schedule.alpha_sigma(t, x_t)
    alpha_u, sigma_u = schedule.alpha_sigma(u, x_t)
    r = sigma_u / sigma_t
    return (x_u - r * x_t) / (alpha_u - r * alpha_t)


def dpmpp_step(schedule, x, x0, t, u, before=None):
    """DPM-Solver++(2M) from t to u; x0: the prediction at x_t.

    before: (x0, timestep) of the step before, or None for a first-order step, which is DDIM's.
    """
    alpha_t, sigma_t = schedule.alpha_sigma(t, x)
    alpha_u, sigma_u = schedule.alpha_sigma(u, x)
    if before is not None:
        x0_s, s = before
        alpha_s, sigma_s = schedule.alpha_sigma(s, x)
        lmb_s = (alpha_s / sigma_s).log()
        lmb_t = (alpha_t / sigma_t).log()
        lmb_u = (alpha_u / sigma_u).log()
        x0 = x0 + (x0 - x0_s) * (lmb_u - lmb_t) / (2 * (lmb_t - lmb_s))
    return sigma_u / sigma_t * x + (alpha_u - sigma_u / sigma_t * alpha_t) * x0


def lcm_boundary(schedule, x, x0, t):
    """The consistency function of LCM, f = c_skip x_t + c_out x0, which is x_t at t = 0.

    As in the upstream scheduler, sigma_data is 0.5 and the time is multiplied by 10.
    """
    t = column(torch.as_tensor(t, device=x.device) * 10, x)
    return (0.25 * x + t * (t ** 2 + 0.25).sqrt() * x0) / (t ** 2 + 0.25)


# ---- Guidance and fused features: wrappers of networks ------------------------------------------


def guide(net, cfg, channels=None, null=None):
    """Classifier-free guidance: out_null + cfg (out_y - out_null), both in one forward of 2 B rows.

    cfg: the scale, 1 is no guidance; a tensor (B,) is one scale per sample.
    channels: how many are guided, the others stay conditional. The default is the network's own
    `cfg_channels`, else all. It is 3 for DiT, also on its 4-channel latents: its authors call that
    unintended, but the published numbers have it.
    null (1, ...): the condition of "nothing". The default is the null label, which is
    net.num_classes; a network with num_classes = 0 has none and comes back as it is.
    A network that was distilled to take the scale as an input gets it, in a single evaluation.
    """
    inner = getattr(net, "net", net)
    if getattr(inner, "guidance", False):
        def distilled(x, t, y, **kw):
            scale = torch.zeros_like(t, dtype=torch.float32) + cfg
            return net(x, t, y, scale, **kw)

        return distilled

    per_sample = isinstance(cfg, torch.Tensor)
    if not per_sample and cfg == 1:
        return net
    if null is None and not net.num_classes:
        return net
    if not channels:
        channels = getattr(inner, "cfg_channels", None)

    def guided(x, t, y, **kw):
        if null is None:
            nothing = torch.full_like(y, net.num_classes)
        else:
            nothing = null.to(y).expand_as(y)
        out = net(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, nothing]), **kw)
        cond, uncond = out.chunk(2)
        c = channels or cond.shape[1]
        scale = column(cfg, x) if per_sample else cfg
        mixed = uncond[:, :c] + scale * (cond[:, :c] - uncond[:, :c])
        return torch.cat([mixed, cond[:, c:]], dim=1)

    return guided


def guide_with(cond, uncond):
    """Guidance with two networks: uncond + w (cond - uncond), Eq. 4 of the KD paper.

    Returns net(x, t, y, w), a network that takes the scale w (B,) as an input, 1 is no guidance:
    guide(guide_with(cond, uncond), cfg) fixes it. cond(x, t, y) knows the labels, uncond(x, t, y)
    has none: it gets its own null label. Further channels (a learned variance) are those of cond.
    """
    def net(x, t, y, w):
        C = x.shape[1]
        w = column(w, x)
        null = torch.full_like(y, uncond.num_classes)
        out = cond(x, t, y)
        mixed = w * out[:, :C] - (w - 1) * uncond(x, t, null)[:, :C]
        return torch.cat([mixed, out[:, C:]], dim=1)

    net.guidance = True
    net.num_classes = cond.num_classes
    return net


def fused(students, sources, lam):
    """Eq. 6 of the SSD paper while sampling (Fig. 4c): one network per node, for predictor().

    Each fuses, with weight lam in [0, 1], the features that the source computed at the node before.
    students, sources: one net(x, t, y, tap) per node; tap(l, h) -> h sees the features of layer l.
    There are two evaluations per node, one at the last.
    """
    before = []  # the source's features at the node before, by layer

    def network_at(i):
        def net(x, t, y):
            features = []

            def fuse(l, h):
                return torch.lerp(h, before[l], lam) if i else h

            def record(l, h):
                features.append(h)
                return h

            out = students[i](x, t, y, tap=fuse)
            if i < len(students) - 1:
                sources[i](x, t, y, tap=record)
            before[:] = features
            return out

        return net

    return [network_at(i) for i in range(len(students))]


# ---- Solvers: one step of each, all with the same signature --------------------------------------
#
# step(predict, schedule, x, t, u, traj) -> x_u, where predict(x, t) -> (x0, eps, head) is one
# evaluation of the network; see predictor().


@dataclass
class Trajectory:
    """What a step may need to know about the trajectory around it."""

    noise: Callable      # noise(x) -> N(0, I) in the shape of x
    nodes: int           # the number of steps
    last: bool = False   # this step is the last one
    memory: list = field(default_factory=list)  # what multistep solvers keep, the newest first


def _ddim(predict, schedule, x, t, u, traj):
    x0, eps, _ = predict(x, t)
    return add_noise(schedule, x0, eps, u)


def _ddpm(predict, schedule, x, t, u, traj):
    """DDPM's ancestral step (its Eq. 7) between any two nodes.

    The head (-1 to 1) places the log variance between that of the posterior and log beta, as in
    Improved DDPM. Without a head the variance is beta.
    """
    x0, _, head = predict(x, t)
    alpha_t, sigma_t = schedule.alpha_sigma(t, x)
    alpha_u, sigma_u = schedule.alpha_sigma(u, x)
    beta = 1 - (alpha_t / alpha_u) ** 2
    mean = alpha_u * beta / sigma_t ** 2 * x0 + alpha_t / alpha_u * (sigma_u / sigma_t) ** 2 * x
    if u == -1:
        return mean
    share = (head + 1) / 2 if head.shape[1] else 1
    log_var = beta.log() + (1 - share) * 2 * (sigma_u / sigma_t).log()
    return mean + (0.5 * log_var).exp() * traj.noise(x)


ADAMS_BASHFORTH = [[1.0], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12],
                   [55 / 24, -59 / 24, 37 / 24, -9 / 24]]


def _plms(predict, schedule, x, t, u, traj):
    """PNDM's linear multistep: DDIM along an extrapolated eps.

    The first step has no past, so it evaluates the network at both of its ends.
    """
    _, newest, _ = predict(x, t)
    traj.memory[:] = [newest, *traj.memory[:3]]
    if len(traj.memory) == 1:
        _, ahead, _ = predict(ddim_step(schedule, x, newest, t, u), u)
        eps = (newest + ahead) / 2
    else:
        weights = ADAMS_BASHFORTH[len(traj.memory) - 1]
        eps = sum(w * e for w, e in zip(weights, traj.memory))
    return ddim_step(schedule, x, eps, t, u)


def _heun(predict, schedule, x, t, u, traj):
    """Heun's method in sigma / alpha, of which x / alpha is a function with slope eps.

    That is DDIM along the mean eps of both ends; the last step takes the eps of its first end.
    On EDM's schedule this is EDM's Algorithm 1.
    """
    _, eps, _ = predict(x, t)
    if not traj.last:
        _, ahead, _ = predict(ddim_step(schedule, x, eps, t, u), u)
        eps = (eps + ahead) / 2
    return ddim_step(schedule, x, eps, t, u)


def _dpm2(predict, schedule, x, t, u, traj=None, middle=None):
    """DPM-Solver-2, single step: DDIM along the eps at a time between t and u.

    middle: that time, by default half way in lmb (Eq. 9 of the SSD paper). A step to the clean
    end (u = -1) is of first order, because lmb is infinite there.
    """
    _, eps, _ = predict(x, t)
    if u != -1:
        m = schedule.middle(t, u) if middle is None else middle
        lmb = []
        for time in (t, m, u):
            alpha, sigma = schedule.alpha_sigma(time, x)
            lmb.append(torch.log(alpha / sigma))
        lmb_t, lmb_m, lmb_u = lmb

        _, eps_m, _ = predict(ddim_step(schedule, x, eps, t, m), m)
        # The quotient (lmb_u - lmb_t) / (2 (lmb_m - lmb_t)) is 1 half way.
        eps = eps + (eps_m - eps) * (lmb_u - lmb_t) / (2 * (lmb_m - lmb_t))
    return ddim_step(schedule, x, eps, t, u)


def _dpmpp(predict, schedule, x, t, u, traj):
    """DPM-Solver++(2M).

    The last step is of first order where it ends clean or where there are fewer than 15 steps.
    """
    x0, _, _ = predict(x, t)
    first_order = not traj.memory or traj.last and (u == -1 or traj.nodes < 15)
    before = None if first_order else traj.memory[0]
    traj.memory[:] = [(x0, t)]
    return dpmpp_step(schedule, x, x0, t, u, before)


def _lcm(predict, schedule, x, t, u, traj):
    """Multistep consistency sampling: predict the clean sample, then add new noise."""
    x0, _, _ = predict(x, t)
    x = lcm_boundary(schedule, x, x0, t)
    return x if traj.last else add_noise(schedule, x, traj.noise(x), u)


def _sde(predict, schedule, x, t, u, traj):
    """Euler-Maruyama on the interpolant with REPA's diffusion w(t) = 2t.

    The drift is v - w score / 2 = v + eps, because score = -eps / t.
    """
    x0, eps, _ = predict(x, t)
    x = x + (u - t) * (eps - x0 + eps)
    return x if traj.last else x + (2 * t * (t - u)) ** 0.5 * traj.noise(x)


STEPS = {"ddim": _ddim, "ddpm": _ddpm, "plms": _plms, "dpm2": _dpm2, "dpm++": _dpmpp, "lcm": _lcm,
         "euler": _ddim, "sde": _sde, "heun": _heun}
SOLVERS = (*STEPS, "fused")

# Which solvers go with a schedule, by schedule.grid.
SOLVERS_OF_GRID = {
    None: ["ddim", "ddpm", "plms", "dpm2", "dpm++", "lcm", "heun", "fused"],
    "sit": ["ddim", "euler", "sde", "fused"],
    "edm": ["heun", "ddim", "euler", "fused"],
}


def solver_grid(schedule, solver, nfe, own=None):
    """The grid along which `solver` makes nfe evaluations of the network.

    own: a model's own grid, taken where its number of nodes is right; or the name of its grids.

    ddim, euler, ddpm, dpm++  one per node; euler is the name of ddim on the continuous schedules
    plms         one per node, two at the first
    dpm2         two per step; an even nfe ends at t = 0, which is not quite clean; an odd nfe adds
                 a last first-order step
    lcm          one per node; the nodes are those on which consistency was distilled
    sde          one per node, from 1 to 0.04, then 0 (REPA)
    fused, heun  two per node, one at the last

    Raises ValueError where solver, schedule and nfe do not go together.
    """
    choices = SOLVERS_OF_GRID[schedule.grid]
    if solver not in choices:
        raise ValueError(f"--solver {solver} does not go with this model's schedule; "
                         f"choose {', '.join(choices)}")
    nodes = _count_nodes(solver, nfe)
    if solver == "sde":
        return [*np.linspace(1, 0.04, nfe).tolist(), 0.0]
    if solver == "dpm2":
        grid = make_grid("dit", nodes, schedule.T)
        return grid if nfe % 2 else grid[:-1]
    if isinstance(own, list) and len(own) - 1 == nodes:
        return own
    if solver == "lcm":
        return lcm_grid(nfe, schedule.T)
    name = own if isinstance(own, str) else None
    return schedule_grid(schedule, name, nodes)


def _count_nodes(solver, nfe):
    """How many nodes a solver visits in nfe evaluations."""
    odd = solver in ("fused", "heun")
    least = {"plms": 3, "dpm2": 2, "sde": 2, "fused": 3, "heun": 3}.get(solver, 0)
    if nfe < least or (odd and nfe % 2 == 0):
        kind = "an odd number, " if odd else ""
        raise ValueError(f"--nfe {nfe}: {solver} needs {kind}at least {least}")
    if solver == "plms":
        return nfe - 1
    if solver == "dpm2":
        return nfe // 2 + 1
    if odd:
        return (nfe + 1) // 2
    return nfe


# ---- The sampling loop --------------------------------------------------------------------------


def predictor(net, y, schedule, prediction="eps", project=None):
    """One evaluation of a network: predict(x, t, dtype=None) -> (x0, eps, head).

    net(x, t, y) -> (B, C or more, H, W): the first C channels are the prediction, the others are
    the head, which tells a learned variance. t reaches the network as a tensor (B,).
    y (B, ...): the conditions, of any kind that net takes. prediction, project: as in to_x0_eps.

    predict: x is (B, C, H, W) and t is one int or float. x0 and eps are like x; the head is
    (B, 0 or more, H, W). dtype is what the network sees, by default the dtype of x; the results
    have the dtype of x.
    """

    def predict(x, t, dtype=None):
        dtype = dtype or x.dtype
        time_dtype = dtype if isinstance(t, float) else torch.long
        time = torch.full((len(x),), t, device=x.device, dtype=time_dtype)
        out = net(x.to(dtype), time, y).to(x.dtype)

        channels = x.shape[1]
        x0, eps = to_x0_eps(schedule, x, out[:, :channels], t, prediction, project)
        return x0, eps, out[:, channels:]

    return predict


@torch.no_grad()
def sample(predict, x, schedule, grid, solver="ddim", noise=torch.randn_like):
    """From noise x (B, C, H, W) along `grid` (solver_grid) to the state at its end.

    predict: predictor(), or a list of one per node, for different networks along the way.
    solver: a key of STEPS. noise(x): new noise in the shape of x, for the stochastic solvers.
    On EDM's schedule the first state is 80 times the noise, and states are float64 along the way;
    the network and the result have the dtype of x. Raises ValueError for an unknown solver.
    """
    end = x
    for state in _states(predict, x, schedule, grid, solver, noise):
        end = state
    return end.to(x.dtype)


@torch.no_grad()
def sample_states(predict, x, schedule, grid, solver="ddim", noise=torch.randn_like):
    """As sample(), but returns the list of all len(grid) states, the noise first."""
    states = _states(predict, x, schedule, grid, solver, noise)
    return [state.to(x.dtype) for state in states]


def _states(predict, x, schedule, grid, solver, noise):
    """Yields the states along the grid, one per entry."""
    if solver not in STEPS:
        raise ValueError(f"--solver {solver}: unknown; choose {', '.join(STEPS)}")
    steps = len(grid) - 1
    predictors = predict if isinstance(predict, list) else [predict] * steps
    traj = Trajectory(noise, nodes=len(predictors))
    dtype = x.dtype
    if isinstance(schedule, EDM):
        x = x.double() * grid[0]
    yield x

    for i in range(steps):
        traj.last = i == steps - 1
        evaluate = partial(predictors[i], dtype=dtype)
        x = STEPS[solver](evaluate, schedule, x, grid[i], grid[i + 1], traj)
        yield x
