"""Diffusion arithmetic: noise schedules, what a network's output means, timestep grids, solvers, guidance.

Notation: x_t = alpha_t x0 + sigma_t eps. States and outputs are (B, C, H, W), timesteps (B,) or a single number.
Everything is computed in the dtype of the state, float32 or float64; half precision stays inside the network.
"""
import math

import numpy as np
import torch

from runtime import UserError

# ---- Noise schedules --------------------------------------------------------------------------------


def column(v, x):
    """(B,) or a scalar -> broadcastable against x (B, C, H, W), in the dtype of x; a number is made on its device, without a copy from the host."""
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"solver arithmetic wants float32 or float64 states, got {x.dtype}")
    return v.to(x.dtype).view(-1, *[1] * (x.ndim - 1)) if isinstance(v, torch.Tensor) else x.new_full([1] * x.ndim, v)


class VP:
    """Discrete variance-preserving schedule: alpha_t^2 = prod(1 - beta), sigma_t^2 = 1 - alpha_t^2.

    Timesteps are integers 0..T-1, and -1 is the clean end (alpha = 1, sigma = 0): the tables, float64, carry it as their last entry. Between
    integers log alpha is linear, as in DPM-Solver, and middle() looks there. `beta` and `post_logvar` (T,) serve the learned-variance term.
    """

    def __init__(self, betas, latent_diffusion=False):
        abar = torch.cumprod(1 - betas, 0)
        before = torch.cat([torch.ones(1, dtype=abar.dtype), abar[:-1]])
        post_var = betas * (1 - before) / (1 - abar)
        self.T, self.continuous, self.latent_diffusion, self.grid = len(betas), False, latent_diffusion, None
        self.alpha = torch.cat([abar.sqrt(), abar.new_ones(1)])
        self.sigma = torch.cat([(1 - abar).sqrt(), abar.new_zeros(1)])
        self.beta, self.post_logvar = betas, torch.cat([post_var[1:2], post_var[1:]]).log()  # "clipped": entry 0 would be log 0
        self.log_alpha, self.lmb = (0.5 * abar.log()).numpy(), (0.5 * (abar / (1 - abar)).log()).numpy()  # (T,), stay on the host

    def to(self, device):
        for name in ("alpha", "sigma", "beta", "post_logvar"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def at(self, t, x):
        """alpha_t and sigma_t for t, an int, a float >= 0 or (B,) long, shaped to multiply x."""
        if isinstance(t, float):
            log_alpha = np.interp(t, np.arange(self.T), self.log_alpha)
            return column(np.exp(log_alpha), x), column(np.sqrt(-np.expm1(2 * log_alpha)), x)
        return column(self.alpha[t], x), column(self.sigma[t], x)

    def middle(self, t, u):
        """The time, a float, at which lmb is half way between those of t and u (floats or ints >= 0)."""
        times = np.arange(self.T)
        return float(np.interp(-np.interp([t, u], times, self.lmb).mean(), -self.lmb, times))


class Interpolant:
    """Linear interpolant of flow models (SiT): alpha_t = 1 - t, sigma_t = t, t in [0, 1], t = 1 is noise."""

    T, continuous, latent_diffusion, grid = 1000, True, False, "sit"  # T: what grids of integers are laid on; grid: the only one it takes

    def to(self, device):
        return self

    def at(self, t, x):
        return column(1 - t, x), column(t, x)


class EDM(Interpolant):
    """The process of Karras et al. ("EDM"): alpha = 1, sigma = t, so that the time is the noise level, sampled from 80 to 0."""

    grid = "edm"

    def at(self, t, x):
        return column(1.0, x), column(t, x)


def make_schedule(name, T=1000):
    """'linear' (DDPM, DiT), 'cosine' (Nichol & Dhariwal), 'ldm', 'ldm-churches' and 'sd' (linear in sqrt(beta)), 'interpolant' (SiT), 'edm'."""
    f64 = dict(dtype=torch.float64)
    if name in ("interpolant", "edm"):
        return Interpolant() if name == "interpolant" else EDM()
    if name == "linear":
        return VP(torch.linspace(1e-4 * 1000 / T, 0.02 * 1000 / T, T, **f64))
    if name == "cosine":
        abar = torch.cos((torch.arange(T + 1, **f64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
        return VP((1 - abar[1:] / abar[:-1]).clamp(max=0.999))
    if name in ("ldm", "ldm-churches", "sd"):
        first, last = {"ldm": (0.0015, 0.0195), "ldm-churches": (0.0015, 0.0155), "sd": (0.00085, 0.012)}[name]
        return VP(torch.linspace(first ** 0.5, last ** 0.5, T, **f64) ** 2, latent_diffusion=True)
    raise UserError(f"schedule {name}: unknown; choose linear, cosine, ldm, sd, interpolant or edm")


def add_noise(schedule, x0, eps, t):
    """x_t = alpha_t x0 + sigma_t eps."""
    alpha, sigma = schedule.at(t, x0)
    return alpha * x0 + sigma * eps


# ---- What a network's output means: prediction in {"eps", "x0", "v", "velocity", "edm"} -------------

SIGMA_DATA = 0.5  # EDM's guess of the data's standard deviation


def to_x0_eps(schedule, x, out, t, prediction="eps", project=None):
    """A network's output at x_t -> its (x0, eps). v = alpha eps - sigma x0 (VP); velocity = eps - x0 (interpolant).
    edm, on its own schedule: the F of D = c_skip x + c_out F (EDM's Eq. 7 and Table 1), a v in units of the data; D is x0.

    project(x0) -> x0 brings the prediction into the data's domain (PROJECTIONS); eps then follows from it.
    """
    alpha, sigma = schedule.at(t, x)
    if prediction == "eps":
        x0, eps = (x - sigma * out) / alpha, out
    elif prediction == "x0":
        x0, eps = out, (x - alpha * out) / sigma
    elif prediction == "v":
        x0, eps = alpha * x - sigma * out, sigma * x + alpha * out
    elif prediction == "velocity":
        x0, eps = x - sigma * out, x + alpha * out
    elif prediction == "edm":
        norm = (sigma ** 2 + SIGMA_DATA ** 2).sqrt()
        x0, eps = SIGMA_DATA * (SIGMA_DATA / norm * x + sigma * out) / norm, (sigma / norm * x - SIGMA_DATA * out) / norm
    else:
        raise UserError(f"prediction {prediction}: unknown; choose eps, x0, v, velocity or edm")
    if project:
        x0 = project(x0)
        eps = (x - alpha * x0) / sigma
    return x0, eps


def clamp_quantile(x0, q=0.995, floor=1.0):
    """For latents, whose range is unknown: each sample to +- the q-quantile of its own absolute values, at least floor."""
    bound = column(x0.flatten(1).abs().quantile(q, dim=1).clamp(min=floor), x0)
    return x0.clamp(-bound, bound)


# Thresholding, a discretised reflected diffusion; pixels lie in [-1, 1].
PROJECTIONS = {"off": None, "clamp": lambda x0: x0.clamp(-1, 1), "quantile": clamp_quantile}


def from_x0_eps(schedule, x0, eps, t, prediction="eps"):
    """The inverse of to_x0_eps: the output a network of this kind should give."""
    alpha, sigma = schedule.at(t, x0)
    return {"eps": lambda: eps, "x0": lambda: x0, "v": lambda: alpha * eps - sigma * x0, "velocity": lambda: eps - x0,
            "edm": lambda: (sigma / SIGMA_DATA * x0 - SIGMA_DATA * eps) / (sigma ** 2 + SIGMA_DATA ** 2).sqrt()}[prediction]()


# ---- Timestep grids: nfe nodes from noisy to clean, then the end point, where no network is evaluated 


def schedule_grid(schedule, name, nfe):
    """make_grid for a schedule; name None is the own grid of the interpolant and of EDM, ldm for latent diffusion's schedules where nfe divides T,
    and dit for all others. Raises UserError where they do not match."""
    name = name or schedule.grid or ("ldm" if schedule.latent_diffusion and schedule.T % nfe == 0 and 1 < nfe < schedule.T else "dit")
    if (name if name in ("sit", "edm") else None) != schedule.grid:
        raise UserError(f"--grid {name} does not go with this model's schedule; leave it out")
    return make_grid(name, nfe, schedule.T)


def make_grid(name, nfe, T=1000):
    """Descending list of nfe + 1 timesteps, the last one being the end point.

    dit      even, from T-1 to 0, both included, then clean (-1): upstream DiT's create_diffusion(str(nfe))
    ddim     multiples of an integer stride that gives exactly nfe nodes, then clean: create_diffusion("ddim" + str(nfe))
    ldm      multiples of T // nfe, plus one, then t = 0 (not clean): upstream latent diffusion
    uniform  round(T j / nfe) - 1, then clean: defined for every nfe
    sit      nfe + 1 real numbers from 1 to 0 for the interpolant
    edm      nfe noise levels from 80 to 0.002, evenly in their seventh root, then 0: EDM's Eq. 5
    """
    if nfe < 1 or (name not in ("sit", "edm") and nfe > T):
        raise UserError(f"--nfe {nfe}: must lie between 1 and the schedule's {T} steps")
    if name == "dit":
        return [round(i * (T - 1) / (nfe - 1)) for i in range(nfe - 1, -1, -1)] + [-1] if nfe > 1 else [T - 1, -1]
    if name == "ddim":
        for stride in range(1, T + 1):
            if len(range(0, T, stride)) == nfe:
                return list(range(0, T, stride))[::-1] + [-1]
        raise UserError(f"--grid ddim: no integer stride gives {nfe} of {T} steps; use --grid dit or uniform")
    if name == "ldm":
        nodes = list(range(0, T, T // nfe))
        if len(nodes) != nfe or nodes[-1] + 1 >= T:
            raise UserError(f"--grid ldm: {nfe} steps do not fit, upstream would take {len(nodes)} from t = {nodes[-1] + 1} of {T}; use --grid dit or uniform")
        return [n + 1 for n in nodes][::-1] + [0]
    if name == "uniform":
        return [round(T * j / nfe) - 1 for j in range(nfe, 0, -1)] + [-1]
    if name == "sit":
        return [1 - i / nfe for i in range(nfe + 1)]
    if name == "edm":
        return [(80 ** (1 / 7) + i / max(nfe - 1, 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(nfe)] + [0.0]
    raise UserError(f"--grid {name}: unknown; choose dit, ddim, ldm, uniform, sit or edm")


def halve_grid(grid):
    """Every second node of a teacher's grid: 999, 946, 894, ..., 0 -> 999, 894, ..., 53, then the same end point."""
    if (len(grid) - 1) % 2:
        raise UserError(f"a grid of {len(grid) - 1} steps cannot be halved")
    return grid[:-1:2] + grid[-1:]


# ---- Solvers ----------------------------------------------------------------------------------------


def ddim_step(schedule, x, out, t, u, prediction="eps", project=None):
    """Deterministic DDIM from t to u, x_u = alpha_u x0(x_t) + sigma_u eps(x_t); on the interpolant this is Euler's step."""
    x0, eps = to_x0_eps(schedule, x, out, t, prediction, project)
    return add_noise(schedule, x0, eps, u)


def dpmpp_step(schedule, x, x0, t, u, before=None):
    """DPM-Solver++(2M) from t to u. before: (x0, timestep) of the step before, None for a first-order step (which is DDIM's)."""
    (alpha_t, sigma_t), (alpha_u, sigma_u) = schedule.at(t, x), schedule.at(u, x)
    if before is not None:
        x0_s, (alpha_s, sigma_s) = before[0], schedule.at(before[1], x)
        lmb_s, lmb_t, lmb_u = ((a / s).log() for a, s in ((alpha_s, sigma_s), (alpha_t, sigma_t), (alpha_u, sigma_u)))
        x0 = x0 + (x0 - x0_s) * (lmb_u - lmb_t) / (2 * (lmb_t - lmb_s))
    return sigma_u / sigma_t * x + (alpha_u - sigma_u / sigma_t * alpha_t) * x0


def lcm_boundary(schedule, x, x0, t):
    """The consistency function of LCM, f = c_skip x_t + c_out x0, which is x_t at t = 0; sigma_data = 0.5, time times 10."""
    t = column(torch.as_tensor(t, device=x.device) * 10, x)
    return (0.25 * x + t * (t ** 2 + 0.25).sqrt() * x0) / (t ** 2 + 0.25)


def lcm_grid(nfe, T=1000, skip=20):
    """nfe of the T / skip nodes skip j - 1 on which consistency was distilled, evenly from the noisiest, then clean."""
    nodes = list(range(skip - 1, T, skip))[::-1]
    if not 1 <= nfe <= len(nodes):
        raise UserError(f"--nfe {nfe}: must lie between 1 and the {len(nodes)} nodes that a consistency model knows")
    return [nodes[len(nodes) * i // nfe] for i in range(nfe)] + [-1]


def ddim_invert(schedule, x_t, x_u, t, u):
    """The one constant x0 whose DDIM step carries x_t to x_u: x0 = (x_u - r x_t) / (alpha_u - r alpha_t), r = sigma_u / sigma_t.
    For neighbouring t and u the denominator is small; use float64 states where that matters."""
    (alpha_t, sigma_t), (alpha_u, sigma_u) = schedule.at(t, x_t), schedule.at(u, x_t)
    r = sigma_u / sigma_t
    return (x_u - r * x_t) / (alpha_u - r * alpha_t)


def guide(net, cfg, channels=None, null=None):
    """Classifier-free guidance, both halves in one forward: out_null + cfg (out_y - out_null); cfg = 1 is no guidance, (B,) a scale for each sample.

    channels: how many are guided, the others stay conditional; default: the network's own `cfg_channels`, else all. It is 3 for DiT, also on its
    4-channel latents (its authors call that unintended, but its published numbers have it). null: the condition of "nothing",
    (1, ...); default: the null label. A network that was distilled to take the scale as an input gets it, in a single evaluation.
    """
    inner = getattr(net, "net", net)
    if getattr(inner, "guidance", False):  # it takes the scale as an input
        return lambda x, t, y, **kw: net(x, t, y, torch.zeros_like(t, dtype=torch.float32) + cfg, **kw)
    each = isinstance(cfg, torch.Tensor)
    if not each and cfg == 1 or (null is None and not net.num_classes):  # nothing to guide with
        return net
    channels = channels or getattr(inner, "cfg_channels", None)

    def guided(x, t, y, **kw):
        nothing = torch.full_like(y, net.num_classes) if null is None else null.to(y).expand_as(y)
        cond, uncond = net(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, nothing]), **kw).chunk(2)
        c, scale = channels or cond.shape[1], column(cfg, x) if each else cfg
        return torch.cat([uncond[:, :c] + scale * (cond[:, :c] - uncond[:, :c]), cond[:, c:]], dim=1)

    return guided


# One step of every solver: step(look, schedule, x, t, u, ...) -> x_u. look(x, t) is one evaluation of the network: (x0, eps, head), where
# head (B, 0 or C, H, W) tells a learned variance. memory: a list that lives as long as the trajectory, of `nodes` steps. noise(x) ~ N(0, I).


def _ddim(look, schedule, x, t, u, **_):
    x0, eps, _ = look(x, t)
    return add_noise(schedule, x0, eps, u)


def _ddpm(look, schedule, x, t, u, noise, **_):
    """DDPM's ancestral step (its Eq. 7) between any two nodes; the log variance lies where the head says between that of the posterior and beta, else it is beta."""
    x0, _, head = look(x, t)
    (alpha_t, sigma_t), (alpha_u, sigma_u) = schedule.at(t, x), schedule.at(u, x)
    beta = 1 - (alpha_t / alpha_u) ** 2
    mean = alpha_u * beta / sigma_t ** 2 * x0 + alpha_t / alpha_u * (sigma_u / sigma_t) ** 2 * x
    if u == -1:
        return mean
    share = (head + 1) / 2 if head.shape[1] else 1
    return mean + (0.5 * (beta.log() + (1 - share) * 2 * (sigma_u / sigma_t).log())).exp() * noise(x)


ADAMS_BASHFORTH = [[1.0], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]


def _plms(look, schedule, x, t, u, memory, **_):
    """PNDM's linear multistep: DDIM along an extrapolated eps; the first step looks at both of its ends."""
    memory[:] = [look(x, t)[1], *memory[:3]]
    if len(memory) == 1:
        eps = (memory[0] + look(ddim_step(schedule, x, memory[0], t, u), u)[1]) / 2
    else:
        eps = sum(w * e for w, e in zip(ADAMS_BASHFORTH[min(len(memory), 4) - 1], memory))
    return ddim_step(schedule, x, eps, t, u)


def _heun(look, schedule, x, t, u, last, **_):
    """Heun's method in sigma / alpha, of which x / alpha is a function with slope eps: DDIM along the mean eps of both ends, the last step along the
    first. On EDM's schedule it is EDM's Algorithm 1."""
    eps = look(x, t)[1]
    if not last:
        eps = (eps + look(ddim_step(schedule, x, eps, t, u), u)[1]) / 2
    return ddim_step(schedule, x, eps, t, u)


def _dpm2(look, schedule, x, t, u, middle=None, **_):
    """DPM-Solver-2, single step: DDIM along the eps at a point between, by default half way in lmb (Eq. 9 of the SSD paper); to the clean end of first order."""
    eps = look(x, t)[1]
    if u != -1:
        m = schedule.middle(t, u) if middle is None else middle
        lmb_t, lmb_m, lmb_u = (torch.log(alpha / sigma) for alpha, sigma in (schedule.at(v, x) for v in (t, m, u)))
        eps = eps + (look(ddim_step(schedule, x, eps, t, m), m)[1] - eps) * (lmb_u - lmb_t) / (2 * (lmb_m - lmb_t))  # the factor is 1 half way
    return ddim_step(schedule, x, eps, t, u)


def _dpmpp(look, schedule, x, t, u, memory, last, nodes, **_):
    """DPM-Solver++(2M); the last step is of first order when it ends clean or there are fewer than 15."""
    x0 = look(x, t)[0]
    x = dpmpp_step(schedule, x, x0, t, u, None if not memory or last and (u == -1 or nodes < 15) else memory[0])
    memory[:] = [(x0, t)]
    return x


def _lcm(look, schedule, x, t, u, last, noise, **_):
    x = lcm_boundary(schedule, x, look(x, t)[0], t)
    return x if last else add_noise(schedule, x, noise(x), u)


def _sde(look, schedule, x, t, u, last, noise, **_):
    """Euler-Maruyama on the interpolant with diffusion w(t) = 2t as REPA: drift v - w score / 2 = v + eps, since score = -eps / t."""
    x0, eps, _ = look(x, t)
    x = x + (u - t) * (eps - x0 + eps)
    return x if last else x + (2 * t * (t - u)) ** 0.5 * noise(x)


STEPS = {"ddim": _ddim, "ddpm": _ddpm, "plms": _plms, "dpm2": _dpm2, "dpm++": _dpmpp, "lcm": _lcm, "euler": _ddim, "sde": _sde, "heun": _heun}
SOLVERS = (*STEPS, "fused")
KNOWN_TO = {None: [s for s in SOLVERS if s not in ("euler", "sde")],  # by schedule.grid
            "sit": ["ddim", "euler", "sde", "fused"], "edm": ["heun", "ddim", "euler", "fused"]}


def solver_grid(schedule, solver, nfe, own=None):
    """The grid along which `solver` makes nfe evaluations of the network. own: a model's own grid, taken where its number of nodes is right, or the name of its grids.

    ddim, euler, ddpm, dpm++  one a node; euler is ddim's name on the interpolant and on EDM's schedule
    plms   two at the first node
    dpm2   two a step; an even nfe ends at t = 0, which is not quite clean, an odd one adds a last first-order step
    lcm    the nodes on which consistency was distilled
    sde    from 1 to 0.04, then 0 (REPA)
    fused, heun  two a node, save at the last: see fused()
    """
    if solver not in KNOWN_TO[schedule.grid]:
        raise UserError(f"--solver {solver} does not go with this model's schedule; choose {', '.join(KNOWN_TO[schedule.grid])}")
    least, odd = {"plms": 3, "dpm2": 2, "sde": 2, "fused": 3, "heun": 3}.get(solver, 0), solver in ("fused", "heun")
    if nfe < least or odd and nfe % 2 == 0:
        raise UserError(f"--nfe {nfe}: {solver} needs {'an odd number, ' if odd else ''}at least {least}")
    nodes = {"plms": nfe - 1, "dpm2": nfe // 2 + 1}.get(solver, (nfe + 1) // 2 if odd else nfe)
    if solver == "sde":
        return np.linspace(1, 0.04, nfe).tolist() + [0.0]
    if solver == "dpm2":
        grid = make_grid("dit", nodes, schedule.T)
        return grid if nfe % 2 else grid[:-1]
    if isinstance(own, list) and len(own) - 1 == nodes:
        return own
    return lcm_grid(nfe, schedule.T) if solver == "lcm" else schedule_grid(schedule, own if isinstance(own, str) else None, nodes)


@torch.no_grad()
def sample(net, x, y, schedule, grid, prediction="eps", keep=False, on_step=lambda: None, solver="ddim", project=None, noise=torch.randn_like):
    """Along `grid` (solver_grid) from noise x (B, C, H, W) with conditions y (B, ...).

    net(x, t, y) -> (B, C or more, H, W), of which the first C channels are the prediction; it must take the dtype of x; or a list of networks, one a node.
    on_step() is called after every evaluation. Returns x at the end of the grid, or with keep=True the list of all len(grid) states.
    On EDM's schedule the first state is 80 times the noise, and states are float64 along the way.
    """
    if solver not in STEPS:
        raise UserError(f"--solver {solver}: unknown; choose {', '.join(STEPS)}")
    nets, memory, dtype = net if isinstance(net, list) else [net] * (len(grid) - 1), [], x.dtype
    states = [x := x.double() * grid[0] if isinstance(schedule, EDM) else x]
    for i, (t, u) in enumerate(zip(grid[:-1], grid[1:])):
        def look(x, t):
            time = torch.full((len(x),), t, device=x.device, dtype=dtype if isinstance(t, float) else torch.long)
            out = nets[i](x.to(dtype), time, y).to(x.dtype)
            on_step()
            return (*to_x0_eps(schedule, x, out[:, :x.shape[1]], t, prediction, project), out[:, x.shape[1]:])

        x = STEPS[solver](look, schedule, x, t, u, memory=memory, last=i == len(grid) - 2, nodes=len(nets), noise=noise)
        states = states + [x] if keep else [x]
    return [x.to(dtype) for x in states] if keep else x.to(dtype)


def fused(students, sources, lam):
    """Eq. 6 of the SSD paper while sampling (Fig. 4c): networks for sample(), each fusing what the source computed at the node before.

    students, sources: a net(x, t, y, tap) for every node. Two evaluations a node, one at the last.
    """
    before = []

    def node(i):
        def net(x, t, y):
            if i == 0:
                before.clear()
            features = []
            out = students[i](x, t, y, tap=lambda l, h: torch.lerp(h, before[l], lam) if i else h)
            if i < len(students) - 1:
                sources[i](x, t, y, tap=lambda l, h: features.append(h) or h)
            before[:] = features
            return out
        return net

    return [node(i) for i in range(len(students))]


def walk(net, schedule, grid, cond, prediction="eps", project=None):
    """-> step(x, rows, t, u): rows of a batch from t to u by DDIM along all nodes of grid between them; net(x, t, *cond), cond of the whole batch."""
    def step(x, rows, t, u):
        nodes, own = grid[grid.index(t):grid.index(u) + 1], [c[rows] for c in cond]
        for t, u in zip(nodes[:-1], nodes[1:]):
            x = ddim_step(schedule, x, net(x, torch.full((len(x),), t, device=x.device), *own)[:, :x.shape[1]], t, u, prediction, project)
        return x
    return step


def renoise(net, schedule, noise, cond, prediction="eps", project=None):
    """-> step(x, rows, t, u) of the LCM solver: predict x0, then noise it anew with noise[t] (B, C, H, W)."""
    def step(x, rows, t, u):
        out = net(x, torch.full((len(x),), t, device=x.device), *[c[rows] for c in cond])[:, :x.shape[1]]
        x0 = lcm_boundary(schedule, x, to_x0_eps(schedule, x, out, t, prediction, project)[0], t)
        return add_noise(schedule, x0, noise[t][rows], u)
    return step


@torch.no_grad()
def mixed_rollout(student_step, teacher_step, x, nodes, pick):
    """Sample along `nodes` from noise x (B, C, H, W) with two models, every stretch gone by one of them: step(x[rows], rows, t, u) -> x_u.

    pick(i) -> bool (B,), true where the student goes stretch i. Returns all len(nodes) states.
    """
    states = [x]
    for i, (t, u) in enumerate(zip(nodes[:-1], nodes[1:])):
        chosen, new = pick(i), torch.empty_like(x)
        for step, rows in ((student_step, chosen), (teacher_step, ~chosen)):
            if rows.any():
                new[rows] = step(states[-1][rows], rows, t, u)
        states.append(new)
    return states
