
import numpy as np
import pytest
import torch

import solvers
from runtime import UserError
from solvers import add_noise, ddim_invert, ddim_step, from_x0_eps, halve_grid, make_grid, make_schedule, sample, to_x0_eps

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


class Gaussian:
    """The exact network of data N(mu, c^2): eps(x, t) = sigma (x - alpha mu) / (alpha^2 c^2 + sigma^2), and its exact ODE."""
    num_classes, mu, c = 0, 0.3, 0.5

    def __init__(self, s):
        self.s = s

    def __call__(self, x, t, y):
        alpha, sigma = self.s.at(t, x)
        return sigma * (x - alpha * self.mu) / (alpha ** 2 * self.c ** 2 + sigma ** 2)

    def exact(self, x, t, u):
        std = lambda v: (self.s.alpha[v] ** 2 * self.c ** 2 + self.s.sigma[v] ** 2).sqrt()
        return self.s.alpha[u] * self.mu + std(u) / std(t) * (x - self.s.alpha[t] * self.mu)


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


# ---- DPM-Solver++(2M) and LCM against diffusers, on Gaussian data with its exact score


@pytest.mark.parametrize("case", ["dpmpp2m_linspace_zero", "dpmpp2m_trailing_zero", "lcm_orig50"])
def test_solvers_against_diffusers(golden, case):
    f = golden("schedulers.npz")
    got, key = {}, f"linear/{case}/10"
    schedule, var = make_schedule("linear"), float(f["s_data"]) ** 2
    mu, x = (torch.from_numpy(f[k]) for k in ("mu", "x_T"))

    def eps(x, t, y):
        alpha, sigma = schedule.at(t, x)
        return sigma * (x - alpha * mu) / (alpha ** 2 * var + sigma ** 2)

    noise = iter(torch.from_numpy(f["lcm_noise"]))
    grid = [int(t) for t in f[f"{key}/timesteps"]] + [-1]
    got = sample(eps, x, None, schedule, grid, keep=True, solver="lcm" if "lcm" in case else "dpm++", noise=lambda x: next(noise))
    np.testing.assert_allclose(torch.stack(got), f[f"{key}/traj"], atol=1e-9)
    if "lcm" in case:
        from solvers import lcm_grid
        assert lcm_grid(10) == grid and lcm_grid(4) == [999, 759, 499, 259, -1]
    with pytest.raises(UserError, match="--solver"):
        sample(eps, x, None, schedule, grid, solver="euler")
