import math

import numpy as np
import pytest
import torch

import solvers
from runtime import UserError
from solvers import SOLVERS, add_noise, ddim_invert, ddim_step, from_x0_eps, halve_grid, make_grid, make_schedule, sample, solver_grid, to_x0_eps

VP = ["linear", "cosine", "ldm", "sd"]


def states(n=6, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, 2, 4, 4, generator=g, dtype=dtype) for _ in range(2)]


def test_schedules_equal_upstream(golden):
    f = golden("dit_schedule.npz")
    linear = make_schedule("linear")
    np.testing.assert_allclose(linear.alpha[:-1] ** 2, f["alphas_cumprod_full"], rtol=1e-12)
    np.testing.assert_allclose(make_schedule("cosine").beta, f["betas_cosine_1000"], rtol=1e-12)
    g = golden("ldm_schedule.npz")
    for name in ("sd", "ldm"):
        np.testing.assert_allclose(make_schedule(name).beta, g[f"{name}_betas"], rtol=1e-12)
        np.testing.assert_allclose(make_schedule(name).alpha[:-1] ** 2, g[f"{name}_alphas_cumprod"], rtol=1e-12)


@pytest.mark.parametrize("name", VP)
def test_clean_end(name):
    s = make_schedule(name)
    torch.testing.assert_close(s.alpha ** 2 + s.sigma ** 2, torch.ones(1001, dtype=torch.float64), rtol=0, atol=1e-15)
    assert s.alpha[-1] == 1 and s.sigma[-1] == 0
    x0, eps = states()
    assert torch.equal(add_noise(s, x0, eps, torch.full((6,), -1)), x0)


def test_grids_equal_upstream(golden):
    f = golden("dit_schedule.npz")
    for n in (2, 4, 8, 10, 16, 20, 25, 50, 100, 250, 1000):
        grid = make_grid("dit", n)
        assert grid == f[f"use_timesteps_{n}"][::-1].tolist() + [-1]
        if f"alphas_cumprod_{n}" in f:
            np.testing.assert_allclose(make_schedule("linear").alpha[grid[:-1]].flip(0) ** 2, f[f"alphas_cumprod_{n}"], rtol=1e-12)
    for n in (10, 20, 25, 50, 100, 250):
        assert make_grid("ddim", n) == f[f"use_timesteps_ddim{n}"][::-1].tolist() + [-1]
    g = golden("ldm_schedule.npz")
    for n in (10, 20, 25, 50, 200):
        grid = make_grid("ldm", n)
        assert grid == g[f"ddim_timesteps_{n}"][::-1].tolist() + [0]
        s = make_schedule("sd")
        np.testing.assert_allclose(s.alpha[grid[1:]].flip(0) ** 2, g[f"sd_ddim_alphas_prev_{n}"], rtol=1e-12)


def test_grid_by_hand():
    assert make_grid("dit", 10) == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0, -1]
    assert halve_grid(make_grid("dit", 20)) == [999, 894, 789, 684, 578, 473, 368, 263, 158, 53, -1]
    assert halve_grid(halve_grid(make_grid("dit", 16))) == [999, 733, 466, 200, -1]
    assert make_grid("uniform", 64)[-2:] == [15, -1] and len(make_grid("uniform", 62)) == 63 and make_grid("uniform", 1) == [999, -1]
    assert make_grid("sit", 4) == [1, 0.75, 0.5, 0.25, 0]
    for bad in (("dit", 0), ("dit", 1001), ("ddim", 64), ("ldm", 64), ("nothing", 10)):
        with pytest.raises(UserError):
            make_grid(*bad)
    with pytest.raises(UserError):
        halve_grid(make_grid("dit", 5))


@pytest.mark.parametrize("prediction,name", [(p, s) for p in ("eps", "x0", "v") for s in VP] + [("velocity", "interpolant")])
def test_conversions_invert_each_other(prediction, name):
    s = make_schedule(name)
    x0, eps = states()
    t = torch.tensor([1, 20, 250, 500, 900, 990]) if not s.continuous else torch.linspace(0.05, 0.95, 6).double()
    x = add_noise(s, x0, eps, t)
    back = to_x0_eps(s, x, from_x0_eps(s, x0, eps, t, prediction), t, prediction)
    torch.testing.assert_close(back[0], x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(back[1], eps, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", VP + ["interpolant"])
def test_ddim_inverts(name):
    """One DDIM step with the inverse's x0 lands where it was told to, and the inverse of a step is its x0."""
    s = make_schedule(name)
    x0, eps = states()
    for t, u in ((999, 888), (555, 444), (111, 0), (20, -1)) if not s.continuous else ((1.0, 0.9), (0.5, 0.4), (0.1, 0.0)):
        x = add_noise(s, x0, eps, t)
        x_u = ddim_step(s, x, x0, t, u, "x0")
        torch.testing.assert_close(ddim_invert(s, x, x_u, t, u), x0, rtol=1e-9, atol=1e-9)
        anywhere = torch.randn_like(x)
        torch.testing.assert_close(ddim_step(s, x, ddim_invert(s, x, anywhere, t, u), t, u, "x0"), anywhere, rtol=1e-9, atol=1e-9)


def test_ddim_is_dpm_solver_1_and_eulers_step():
    x0, eps = states()
    s = make_schedule("linear")
    lmb = (s.alpha / s.sigma).log()
    for t, u in ((999, 888), (555, 444), (111, 0)):
        x = add_noise(s, x0, eps, t)
        h = lmb[u] - lmb[t]
        dpm1 = s.alpha[u] / s.alpha[t] * x - s.sigma[u] * torch.expm1(h) * eps
        torch.testing.assert_close(ddim_step(s, x, eps, t, u), dpm1, rtol=1e-12, atol=1e-12)
    flow, v = make_schedule("interpolant"), eps - x0
    x = add_noise(flow, x0, eps, 0.7)
    torch.testing.assert_close(ddim_step(flow, x, v, 0.7, 0.4, "velocity"), x + (0.4 - 0.7) * v, rtol=1e-12, atol=1e-12)


class Continuous:
    """The linear VP schedule of the SDE papers for real t in [0, 1000]; beta from 0.1 to 20 over the unit interval."""
    continuous, T = False, 1000

    def log_alpha(self, t):
        t = torch.as_tensor(t, dtype=torch.float64) / 1000
        return -0.25 * t ** 2 * 19.9 - 0.05 * t

    def at(self, t, x):
        log_alpha = self.log_alpha(t)
        return solvers.column(log_alpha.exp(), x), solvers.column((-torch.expm1(2 * log_alpha)).sqrt(), x)

    def lmb(self, t):
        log_alpha = self.log_alpha(t)
        return float(log_alpha - 0.5 * torch.log(-torch.expm1(2 * log_alpha)))

    def middle(self, t, u):
        """Where lmb is half way: log alpha = -log(1 + exp(-2 lmb)) / 2 is quadratic in t."""
        lmb = (self.lmb(t) + self.lmb(u)) / 2
        log_alpha = -0.5 * math.log1p(math.exp(-2 * lmb))
        return 1000 * 2 * -log_alpha / (0.05 + math.sqrt(0.05 ** 2 + 19.9 * -log_alpha))


class Gaussian:
    """The exact network of data N(mu, c^2): eps(x, t) = sigma (x - alpha mu) / (alpha^2 c^2 + sigma^2), and its exact ODE."""
    num_classes, mu, c = 0, 0.3, 0.5

    def __init__(self, s):
        self.s = s

    def __call__(self, x, t, y):
        alpha, sigma = self.s.at(t, x)
        return sigma * (x - alpha * self.mu) / (alpha ** 2 * self.c ** 2 + sigma ** 2)

    def exact(self, x, t, u):
        (alpha_t, sigma_t), (alpha_u, sigma_u) = self.s.at(t, x), self.s.at(u, x)
        std = lambda alpha, sigma: (alpha ** 2 * self.c ** 2 + sigma ** 2).sqrt()
        return alpha_u * self.mu + std(alpha_u, sigma_u) / std(alpha_t, sigma_t) * (x - alpha_t * self.mu)


def test_sampler_follows_the_exact_ode_to_first_order():
    s = make_schedule("linear")
    x = torch.randn(4, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    net, y = Gaussian(s), torch.zeros(4, dtype=torch.long)
    errors = []
    for n in (50, 100, 200):
        end = sample(net, x, y, s, make_grid("uniform", n))
        errors.append(float((end - net.exact(x, 999, -1)).abs().max()))
    assert errors[-1] < 0.05
    assert all(1.7 < a / b < 2.3 for a, b in zip(errors, errors[1:])), errors


def test_sampler_keeps_its_trajectory_and_counts_evaluations():
    s = make_schedule("linear")
    calls = []
    net = Gaussian(s)
    counted = lambda x, t, y: calls.append(t[0].item()) or net(x, t, y)
    x = torch.randn(4, 1, 2, 2)
    states = sample(counted, x, torch.zeros(4, dtype=torch.long), s, make_grid("dit", 10), keep=True)
    assert calls == make_grid("dit", 10)[:-1] and len(states) == 11 and states[0] is x
    torch.testing.assert_close(states[-1], sample(net, x, torch.zeros(4, dtype=torch.long), s, make_grid("dit", 10)))


def test_guidance_is_one_forward():
    calls = []

    class Net:
        num_classes = 3

        def __call__(self, x, t, y):
            calls.append(len(x))
            return x * (1 + y.view(-1, 1, 1, 1))
    x, t, y = torch.ones(2, 4, 1, 1), torch.tensor([1, 2]), torch.tensor([0, 1])
    out = solvers.guide(Net(), 2.0, channels=3)(x, t, y)
    assert calls == [4]
    assert out[:, 0].flatten().tolist() == [4 + 2 * (1 - 4), 4 + 2 * (2 - 4)] and out[:, 3].flatten().tolist() == [1, 2]
    assert isinstance(solvers.guide(net := Net(), 1), Net) and net


def test_half_precision_states_are_refused():
    with pytest.raises(TypeError):
        add_noise(make_schedule("linear"), torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16), torch.zeros(1, 1, 1, 1), 5)


# ---- Whole trajectories against diffusers, on Gaussian data with its exact score

CASES = {"ddim": ["ddim_trailing_a1", "ddim_leading_a1", "ddim_trailing_a0", "ddim_leading_a0", "ddim_leading_offset1_a0", "dpm1_eps_linspace_sigmamin"],
         "dpm++": ["dpmpp2m_linspace_zero", "dpmpp2m_trailing_zero", "dpmpp2m_leading_zero", "dpmpp2m_linspace_sigmamin"],
         "lcm": ["lcm_orig50"], "plms": ["plms_leading_offset1", "plms_leading", "plms_trailing"], "dpm2": ["dpm2s_eps_sigmamin"]}


@pytest.mark.parametrize("solver, case", [(solver, case) for solver, cases in CASES.items() for case in cases])
def test_solvers_against_diffusers(golden, solver, case):
    """Its grids end clean, or ("a0", "sigmamin", and always for PLMS) at t = 0."""
    f = golden("schedulers.npz")
    key, calls = f"linear/{case}/10", []
    schedule, var = make_schedule("linear"), float(f["s_data"]) ** 2
    mu, x = (torch.from_numpy(f[k]) for k in ("mu", "x_T"))

    def eps(x, t, y):
        calls.append(int(t[0]))
        alpha, sigma = schedule.at(t, x)
        return sigma * (x - alpha * mu) / (alpha ** 2 * var + sigma ** 2)

    nodes, want = f[f"{key}/timesteps"].astype(int).tolist(), f[f"{key}/traj"]
    noise, end = iter(torch.from_numpy(f["lcm_noise"])), [0 if "a0" in case or "sigmamin" in case or solver == "plms" else -1]
    if solver == "dpm2":  # diffusers looks at every second node of its grid, we at the middle in lmb: the step alone
        look = lambda x, t: (None, eps(x, torch.full((4,), t), None), None)
        for i, (t, m, u) in enumerate(zip(nodes[::2], nodes[1::2], nodes[2::2] + end)):
            np.testing.assert_allclose(ddim_step(schedule, x, look(x, t)[1], t, m), want[2 * i + 1], atol=1e-9)
            x = solvers._dpm2(look, schedule, x, t, u, middle=m)
            np.testing.assert_allclose(x, want[2 * i + 2], atol=1e-9)
        return
    grid = (nodes[:1] + nodes[2:] if solver == "plms" else nodes) + end
    got = sample(eps, x, None, schedule, grid, keep=True, solver=solver, noise=lambda x: next(noise))
    np.testing.assert_allclose(torch.stack(got)[-9:], want[-9:], atol=1e-9)
    assert calls == nodes  # PLMS looks twice at its second node
    if solver == "lcm":
        assert solvers.lcm_grid(10) == grid and solvers.lcm_grid(4) == [999, 759, 499, 259, -1]
    with pytest.raises(UserError, match="--solver"):
        sample(eps, x, None, schedule, grid, solver="unipc")


# ---- The other solvers


@pytest.mark.parametrize("solver, least, most", [("ddim", 0.8, 1.2), ("dpm2", 1.8, 2.2), ("dpm++", 1.8, 2.2), ("plms", 1.8, 9)])
def test_order_of_convergence(solver, least, most):
    """Against the exact solution, t from 999 to 20 on real-valued nodes, N = 40..320: the error falls as N ** -order."""
    s = Continuous()
    net, x = Gaussian(s), torch.randn(4, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = []
    for n in (40, 80, 160, 320):
        end = sample(net, x, torch.zeros(4), s, [999 + (20 - 999) * i / n for i in range(n + 1)], solver=solver)
        errors.append(float((end - net.exact(x, 999.0, 20.0)).abs().max()))
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert all(least < o for o in orders) and orders[-1] < most, orders


def test_real_valued_times_of_a_discrete_schedule():
    s, x = make_schedule("linear"), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for t in (0, 500, 999):
        for a, b in zip(s.at(float(t), x), s.at(t, x)):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    m = s.middle(900, 800)
    lmb = [float((a / b).log()) for a, b in (s.at(t, x) for t in (900, m, 800))]
    assert 800 < m < 900 and abs(lmb[1] - (lmb[0] + lmb[2]) / 2) < 1e-4  # lmb is linear between integers there, log alpha here


def test_ancestral_sampling_of_a_gaussian_and_its_variance(golden):
    """The exact posterior of Gaussian data: the chain ends in the data's mean and variance. And upstream's bounds of the variance."""
    s, n = make_schedule("linear"), 20000
    net, g = Gaussian(s), torch.Generator().manual_seed(0)

    def learned(x, t, y):  # var(x_u | x_t) = posterior + (alpha_u beta / sigma_t^2)^2 var(x0 | x_t), as a head between the bounds
        i = grid.index(int(t[0]))
        (alpha, sigma), (alpha_u, sigma_u) = s.at(grid[i], x), s.at(grid[i + 1], x)
        beta = 1 - (alpha / alpha_u) ** 2
        lower = beta * (sigma_u / sigma) ** 2
        var = lower + (alpha_u * beta / sigma ** 2) ** 2 * (net.c ** 2 * sigma ** 2 / (alpha ** 2 * net.c ** 2 + sigma ** 2))
        share = (var / lower).log() / (beta / lower).log() if i < len(grid) - 2 else torch.zeros_like(var)
        return torch.cat([net(x, t, y), (2 * share - 1).expand_as(x)], 1)

    grid = make_grid("dit", 100)
    x = torch.randn(n, 1, 1, 1, dtype=torch.float64, generator=g)
    noise = lambda x: torch.randn(x.shape, generator=g, dtype=x.dtype)
    end = sample(learned, x, None, s, grid, solver="ddpm", noise=noise)
    # the last step returns the mean of x0, whose variance is that of the data but for what t = 0 leaves open
    assert abs(float(end.mean()) - net.mu) < 0.015 and abs(float(end.std()) - net.c) < 0.01

    f = golden("dit_schedule.npz")
    grid = make_grid("dit", 10)
    for head, want in ((1.0, np.log(f["betas_10"])), (-1.0, f["post_logvar_clipped_10"])):
        for i in range(8):  # the two last steps have no noise, or the clipped entry
            t, u = grid[i], grid[i + 1]
            step = lambda noise: solvers._ddpm(lambda x, t: (torch.zeros_like(x), None, torch.full_like(x, head)), s, x[:1], t, u, noise=noise)
            std = step(torch.ones_like) - step(torch.zeros_like)
            np.testing.assert_allclose(2 * np.log(float(std)), want[9 - i], rtol=1e-9)


def test_euler_and_the_sde_of_velocity_models():
    """Gaussian data on the interpolant: v = (x - mu) (t - c^2 (1 - t)) / ((1 - t)^2 c^2 + t^2) - mu. Euler converges to the exact ODE, the SDE to the data's law."""
    s, mu, c = make_schedule("interpolant"), 0.3, 0.5

    def velocity(x, t, y):
        t = t.double().view(-1, 1, 1, 1)
        var = (1 - t) ** 2 * c ** 2 + t ** 2
        return (x - (1 - t) * mu) * (t - (1 - t) * c ** 2) / var - mu

    g = torch.Generator().manual_seed(0)
    x = torch.randn(20000, 1, 1, 1, dtype=torch.float64, generator=g)
    errors = [float((sample(velocity, x, None, s, solver_grid(s, "euler", n), "velocity", solver="euler") - (mu + c * x)).abs().max()) for n in (50, 100, 200)]
    assert all(1.8 < a / b < 2.2 for a, b in zip(errors, errors[1:])), errors
    grid = solver_grid(s, "sde", 250)
    assert len(grid) == 251 and grid[0] == 1 and abs(grid[-2] - 0.04) < 1e-12 and grid[-1] == 0
    end = sample(velocity, x, None, s, grid, "velocity", solver="sde", noise=lambda x: torch.randn(x.shape, generator=g, dtype=x.dtype))
    assert abs(float(end.mean()) - mu) < 0.015 and abs(float(end.std()) - c) < 0.01


@pytest.mark.parametrize("solver", SOLVERS)
def test_evaluations_are_counted_truly(solver, tiny):
    """--nfe is what the network is called, however the solver spends it."""
    import data
    from runtime import Processes
    flow = solver in ("euler", "sde")
    calls, hooked = [], tiny.register_forward_hook(lambda *_: calls.append(1))
    info = dict(schedule="interpolant" if flow else "linear", prediction="velocity" if flow else "eps", arch=tiny.arch, classes=10, grid=None, nfe=None, cfg=1.0,
                solver=solver, threshold="off", lam=0.1)
    for nfe in (9, 11) if solver in ("fused", "heun") else (9, 10):
        calls.clear()
        x, _ = data.sample_images(Processes("off").mixed(tiny), info, Processes("off"), 3, 0, nfe)
        assert len(calls) == nfe and x.shape == (3, 1, 8, 8)
    hooked.remove()


def test_a_network_for_every_node_and_fused_features():
    s, x = make_schedule("linear"), torch.randn(2, 1, 2, 2, dtype=torch.float64)
    grid, y = make_grid("dit", 3), torch.zeros(2)
    net = lambda a: lambda x, t, y, tap=lambda l, h: h: tap(1, a * tap(0, x + 1) ** 2)
    by_hand = x
    for a, (t, u) in zip((1, 2, 3), zip(grid[:-1], grid[1:])):
        by_hand = ddim_step(s, by_hand, a * (by_hand + 1) ** 2, t, u)
    torch.testing.assert_close(sample([net(1), net(2), net(3)], x, y, s, grid), by_hand)

    nets, lam, by_hand, before = solvers.fused([net(1)] * 3, [net(2)] * 3, 0.25), 0.25, x, None
    for t, u in zip(grid[:-1], grid[1:]):
        h = by_hand + 1
        h = h if before is None else lam * before[0] + (1 - lam) * h
        out = h ** 2 if before is None else lam * before[1] + (1 - lam) * h ** 2
        before = by_hand + 1, 2 * (by_hand + 1) ** 2
        by_hand = ddim_step(s, by_hand, out, t, u)
    for _ in range(2):  # the second time as the first: nothing is left over from the trajectory before
        torch.testing.assert_close(sample(nets, x, y, s, grid), by_hand)


def test_what_a_solver_cannot_do():
    vp, flow = make_schedule("linear"), make_schedule("interpolant")
    for schedule, solver, nfe in ((flow, "plms", 10), (vp, "sde", 10), (vp, "plms", 2), (vp, "fused", 10), (vp, "dpm2", 1)):
        with pytest.raises(UserError, match="--solver|--nfe"):
            solver_grid(schedule, solver, nfe)
    own = [900, 400, 100, -1]
    assert solver_grid(vp, "ddim", 3, own) is own and solver_grid(vp, "plms", 4, own) is own and solver_grid(vp, "ddim", 4, own) != own
    assert solver_grid(vp, "dpm2", 4) == [999, 500, 0] and solver_grid(vp, "dpm2", 5) == [999, 500, 0, -1]
