"""Schedules, conversions, grids and solvers against numbers by hand and exact solutions."""
import math

import pytest
import torch

import models
import solvers
from solvers import (
    PROJECTIONS,
    add_noise,
    ddim_invert,
    ddim_step,
    from_x0_eps,
    guide,
    halve_grid,
    make_grid,
    make_schedule,
    predictor,
    sample,
    sample_states,
    solver_grid,
    to_x0_eps,
)

VP = ["linear", "cosine", "ldm", "sd"]


def states(n=6, dtype=torch.float64):
    """x0 and eps, (n, 2, 4, 4)."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, 2, 4, 4, generator=g, dtype=dtype) for _ in range(2)]


# ---- Schedules, conversions, grids, single steps -------------------------------------------------


@pytest.mark.parametrize("name", VP)
def test_clean_end(name):
    s = make_schedule(name)
    one = torch.ones(1001, dtype=torch.float64)
    torch.testing.assert_close(s.alpha ** 2 + s.sigma ** 2, one, rtol=0, atol=1e-15)
    assert s.alpha[-1] == 1
    assert s.sigma[-1] == 0
    x0, eps = states()
    assert torch.equal(add_noise(s, x0, eps, torch.full((6,), -1)), x0)


def test_grid_by_hand():
    assert make_grid("dit", 10) == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0, -1]
    assert halve_grid(make_grid("dit", 20)) == [999, 894, 789, 684, 578, 473, 368, 263, 158, 53, -1]
    assert halve_grid(halve_grid(make_grid("dit", 16))) == [999, 733, 466, 200, -1]
    assert make_grid("uniform", 64)[-2:] == [15, -1]
    assert len(make_grid("uniform", 62)) == 63
    assert make_grid("uniform", 1) == [999, -1]
    assert make_grid("sit", 4) == [1, 0.75, 0.5, 0.25, 0]
    for bad in (("dit", 0), ("dit", 1001), ("ddim", 64), ("ldm", 64), ("nothing", 10)):
        with pytest.raises(ValueError):
            make_grid(*bad)
    with pytest.raises(ValueError):
        halve_grid(make_grid("dit", 5))


PAIRS = [(prediction, name) for prediction in ("eps", "x0", "v") for name in VP]


@pytest.mark.parametrize("prediction, name",
                         [*PAIRS, ("velocity", "interpolant"), ("edm", "edm")])
def test_conversions_invert_each_other(prediction, name):
    s = make_schedule(name)
    x0, eps = states()
    if s.continuous:
        t = torch.linspace(0.05, 0.95, 6).double()
    else:
        t = torch.tensor([1, 20, 250, 500, 900, 990])
    x = add_noise(s, x0, eps, t)
    out = from_x0_eps(s, x0, eps, t, prediction)
    x0_back, eps_back = to_x0_eps(s, x, out, t, prediction)
    torch.testing.assert_close(x0_back, x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(eps_back, eps, rtol=1e-9, atol=1e-9)


def test_unknown_predictions_are_refused():
    s = make_schedule("linear")
    x0, eps = states()
    for convert in (to_x0_eps, from_x0_eps):
        with pytest.raises(ValueError, match="prediction score: unknown; choose eps"):
            convert(s, x0, eps, 5, "score")


@pytest.mark.parametrize("name", [*VP, "interpolant"])
def test_ddim_inverts(name):
    """A DDIM step with the inverse's x0 ends where it should; the inverse of a step is its x0."""
    s = make_schedule(name)
    x0, eps = states()
    if s.continuous:
        steps = ((1.0, 0.9), (0.5, 0.4), (0.1, 0.0))
    else:
        steps = ((999, 888), (555, 444), (111, 0), (20, -1))
    for t, u in steps:
        x = add_noise(s, x0, eps, t)
        x_u = ddim_step(s, x, x0, t, u, "x0")
        torch.testing.assert_close(ddim_invert(s, x, x_u, t, u), x0, rtol=1e-9, atol=1e-9)
        anywhere = torch.randn_like(x)
        back = ddim_step(s, x, ddim_invert(s, x, anywhere, t, u), t, u, "x0")
        torch.testing.assert_close(back, anywhere, rtol=1e-9, atol=1e-9)


def test_ddim_is_dpm_solver_1_and_eulers_step():
    x0, eps = states()
    s = make_schedule("linear")
    lmb = (s.alpha / s.sigma).log()
    for t, u in ((999, 888), (555, 444), (111, 0)):
        x = add_noise(s, x0, eps, t)
        h = lmb[u] - lmb[t]
        dpm1 = s.alpha[u] / s.alpha[t] * x - s.sigma[u] * torch.expm1(h) * eps
        torch.testing.assert_close(ddim_step(s, x, eps, t, u), dpm1, rtol=1e-12, atol=1e-12)

    flow = make_schedule("interpolant")
    v = eps - x0
    x = add_noise(flow, x0, eps, 0.7)
    euler = x + (0.4 - 0.7) * v
    step = ddim_step(flow, x, v, 0.7, 0.4, "velocity")
    torch.testing.assert_close(step, euler, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_a_projected_prediction_still_explains_the_state(prediction):
    schedule = make_schedule("linear")
    t = torch.tensor([100, 700])
    x = 3 * torch.randn(2, 1, 4, 4, dtype=torch.float64)
    out = torch.randn_like(x)
    x0, eps = to_x0_eps(schedule, x, out, t, prediction, PROJECTIONS["clamp"])
    alpha, sigma = schedule.alpha_sigma(t, x)
    assert x0.abs().max() == 1
    torch.testing.assert_close(alpha * x0 + sigma * eps, x)


def test_half_precision_states_are_refused():
    x = torch.zeros(1, 1, 1, 1)
    with pytest.raises(TypeError):
        add_noise(make_schedule("linear"), x.bfloat16(), x, 5)


def test_real_valued_times_of_a_discrete_schedule():
    s = make_schedule("linear")
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for t in (0, 500, 999):
        real = s.alpha_sigma(float(t), x)
        torch.testing.assert_close(real, s.alpha_sigma(t, x), rtol=1e-12, atol=1e-12)
    m = s.middle(900, 800)
    lmb = []
    for t in (900, m, 800):
        alpha, sigma = s.alpha_sigma(t, x)
        lmb.append(float((alpha / sigma).log()))
    assert 800 < m < 900
    # middle() takes lmb as linear between integers, alpha_sigma() takes log alpha as linear.
    assert abs(lmb[1] - (lmb[0] + lmb[2]) / 2) < 1e-4


# ---- Guidance ------------------------------------------------------------------------------------


def test_guidance_is_one_forward():
    calls = []

    class Net:
        num_classes = 3

        def __call__(self, x, t, y):
            calls.append(len(x))
            return x * (1 + y.view(-1, 1, 1, 1))

    x = torch.ones(2, 4, 1, 1)
    t = torch.tensor([1, 2])
    y = torch.tensor([0, 1])
    out = guide(Net(), 2.0, channels=3)(x, t, y)
    assert calls == [4]
    assert out[:, 0].flatten().tolist() == [4 + 2 * (1 - 4), 4 + 2 * (2 - 4)]
    assert out[:, 3].flatten().tolist() == [1, 2]
    net = Net()
    assert guide(net, 1) is net


def test_dit_guides_three_channels_by_itself():
    net = models.fill_random(models.build(models.make_arch("DiT-Ti/2", 8, 4, 10, False)))
    x = torch.randn(2, 4, 8, 8)
    t = torch.tensor([9, 99])
    y = torch.tensor([1, 2])
    out = guide(net, 4.0)(x, t, y)
    cond = net(x, t, y)
    torch.testing.assert_close(out[:, 3], cond[:, 3])
    assert (out[:, :3] - cond[:, :3]).abs().amax((0, 2, 3)).min() > 1e-3


# ---- Whole trajectories, against exact solutions -------------------------------------------------


class Continuous:
    """The linear VP schedule of the SDE papers for real t in [0, 1000].

    beta goes from 0.1 to 20 over the unit interval.
    """

    continuous = False
    T = 1000

    def log_alpha(self, t):
        t = torch.as_tensor(t, dtype=torch.float64) / 1000
        return -0.25 * t ** 2 * 19.9 - 0.05 * t

    def alpha_sigma(self, t, x):
        log_alpha = self.log_alpha(t)
        sigma = (-torch.expm1(2 * log_alpha)).sqrt()
        return solvers.column(log_alpha.exp(), x), solvers.column(sigma, x)

    def lmb(self, t):
        log_alpha = self.log_alpha(t)
        return float(log_alpha - 0.5 * torch.log(-torch.expm1(2 * log_alpha)))

    def middle(self, t, u):
        """Where lmb is half way: log alpha = -log(1 + exp(-2 lmb)) / 2 is quadratic in t."""
        lmb = (self.lmb(t) + self.lmb(u)) / 2
        log_alpha = -0.5 * math.log1p(math.exp(-2 * lmb))
        return 1000 * 2 * -log_alpha / (0.05 + math.sqrt(0.05 ** 2 + 19.9 * -log_alpha))


class Gaussian:
    """The exact network of data N(mu, c^2), and the exact solution of its ODE.

    eps(x, t) = sigma (x - alpha mu) / (alpha^2 c^2 + sigma^2)
    """

    num_classes = 0
    mu = 0.3
    c = 0.5

    def __init__(self, s):
        self.s = s

    def var(self, alpha, sigma):
        return alpha ** 2 * self.c ** 2 + sigma ** 2

    def __call__(self, x, t, y):
        alpha, sigma = self.s.alpha_sigma(t, x)
        return sigma * (x - alpha * self.mu) / self.var(alpha, sigma)

    def exact(self, x, t, u):
        alpha_t, sigma_t = self.s.alpha_sigma(t, x)
        alpha_u, sigma_u = self.s.alpha_sigma(u, x)
        ratio = self.var(alpha_u, sigma_u).sqrt() / self.var(alpha_t, sigma_t).sqrt()
        return alpha_u * self.mu + ratio * (x - alpha_t * self.mu)


def first_states(n):
    """Noise (n, 1, 2, 2) and its generator."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 1, 2, 2, dtype=torch.float64, generator=g)


def test_sampler_follows_the_exact_ode_to_first_order():
    s = make_schedule("linear")
    x = first_states(4)
    net = Gaussian(s)
    errors = []
    for n in (50, 100, 200):
        end = sample(predictor(net, None, s), x, s, make_grid("uniform", n))
        errors.append(float((end - net.exact(x, 999, -1)).abs().max()))
    assert errors[-1] < 0.05
    assert all(1.7 < a / b < 2.3 for a, b in zip(errors, errors[1:])), errors


@pytest.mark.parametrize("solver, least, most", [("ddim", 0.8, 1.2), ("dpm2", 1.8, 2.2),
                                                 ("dpm++", 1.8, 2.2), ("plms", 1.8, 9)])
def test_order_of_convergence(solver, least, most):
    """Against the exact solution, t from 999 to 20 on real-valued nodes, N = 40 to 320.

    The error falls as N ** -order.
    """
    s = Continuous()
    net = Gaussian(s)
    x = first_states(4)
    errors = []
    for n in (40, 80, 160, 320):
        grid = [999 + (20 - 999) * i / n for i in range(n + 1)]
        end = sample(predictor(net, None, s), x, s, grid, solver)
        errors.append(float((end - net.exact(x, 999.0, 20.0)).abs().max()))
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert all(least < order for order in orders), orders
    assert orders[-1] < most, orders


def test_sampler_keeps_its_trajectory_and_counts_evaluations():
    s = make_schedule("linear")
    grid = make_grid("dit", 10)
    net = Gaussian(s)
    calls = []

    def counted(x, t, y):
        calls.append(t[0].item())
        return net(x, t, y)

    x = torch.randn(4, 1, 2, 2)
    kept = sample_states(predictor(counted, None, s), x, s, grid)
    assert calls == grid[:-1]
    assert len(kept) == 11
    assert kept[0] is x
    torch.testing.assert_close(kept[-1], sample(predictor(net, None, s), x, s, grid))


def test_ancestral_sampling_of_a_gaussian_and_its_variance():
    """The exact posterior of Gaussian data: the chain ends in the data's mean and variance.

    For upstream's bounds of the variance see tests/golden/test_solvers_golden.py.
    """
    s = make_schedule("linear")
    net = Gaussian(s)
    grid = make_grid("dit", 100)
    g = torch.Generator().manual_seed(0)

    def learned(x, t, y):
        """The network with a head, which gives the exact variance of x_u given x_t:

        posterior + (alpha_u beta / sigma_t^2)^2 var(x0 | x_t), as a place between the bounds.
        """
        i = grid.index(int(t[0]))
        alpha, sigma = s.alpha_sigma(grid[i], x)
        alpha_u, sigma_u = s.alpha_sigma(grid[i + 1], x)
        beta = 1 - (alpha / alpha_u) ** 2
        lower = beta * (sigma_u / sigma) ** 2
        var_x0 = net.c ** 2 * sigma ** 2 / net.var(alpha, sigma)
        var = lower + (alpha_u * beta / sigma ** 2) ** 2 * var_x0
        if i < len(grid) - 2:
            share = (var / lower).log() / (beta / lower).log()
        else:
            share = torch.zeros_like(var)
        return torch.cat([net(x, t, y), (2 * share - 1).expand_as(x)], 1)

    def noise(x):
        return torch.randn(x.shape, generator=g, dtype=x.dtype)

    x = torch.randn(20000, 1, 1, 1, dtype=torch.float64, generator=g)
    end = sample(predictor(learned, None, s), x, s, grid, "ddpm", noise)
    # The last step returns the mean of x0: its variance lacks only what t = 0 leaves open.
    assert abs(float(end.mean()) - net.mu) < 0.015
    assert abs(float(end.std()) - net.c) < 0.01


def test_euler_and_the_sde_of_velocity_models():
    """Gaussian data on the interpolant:

    v = (x - mu) (t - c^2 (1 - t)) / ((1 - t)^2 c^2 + t^2) - mu.
    Euler converges to the exact ODE, the SDE to the law of the data.
    """
    s = make_schedule("interpolant")
    mu = 0.3
    c = 0.5
    g = torch.Generator().manual_seed(0)

    def velocity(x, t, y):
        t = t.double().view(-1, 1, 1, 1)
        var = (1 - t) ** 2 * c ** 2 + t ** 2
        return (x - (1 - t) * mu) * (t - (1 - t) * c ** 2) / var - mu

    def noise(x):
        return torch.randn(x.shape, generator=g, dtype=x.dtype)

    predict = predictor(velocity, None, s, "velocity")
    x = torch.randn(20000, 1, 1, 1, dtype=torch.float64, generator=g)
    errors = []
    for n in (50, 100, 200):
        end = sample(predict, x, s, solver_grid(s, "euler", n), "euler")
        errors.append(float((end - (mu + c * x)).abs().max()))
    assert all(1.8 < a / b < 2.2 for a, b in zip(errors, errors[1:])), errors

    grid = solver_grid(s, "sde", 250)
    assert len(grid) == 251
    assert grid[0] == 1
    assert abs(grid[-2] - 0.04) < 1e-12
    assert grid[-1] == 0
    end = sample(predict, x, s, grid, "sde", noise)
    assert abs(float(end.mean()) - mu) < 0.015
    assert abs(float(end.std()) - c) < 0.01


def test_edm_states_are_float64_along_the_way():
    """The network and the result have the dtype of the noise; the first state is 80 times it."""
    s = make_schedule("edm")
    seen = []

    def net(x, t, y):
        seen.append((x.dtype, t.dtype, float(t[0])))
        return torch.zeros_like(x)

    grid = make_grid("edm", 3)
    x = torch.randn(2, 1, 2, 2)
    kept = sample_states(predictor(net, None, s, "edm"), x, s, grid, "heun")
    assert {dtype for dtype, _, _ in seen} == {torch.float32}
    assert {dtype for _, dtype, _ in seen} == {torch.float32}
    assert [t for _, _, t in seen] == pytest.approx([80, grid[1], grid[1], grid[2], grid[2]])
    torch.testing.assert_close(kept[0], 80 * x)
    assert {state.dtype for state in kept} == {torch.float32}

    predict = predictor(net, None, s, "edm")
    x0, eps, head = predict(x.double(), 80.0, torch.float32)
    assert (x0.dtype, eps.dtype, head.shape) == (torch.float64, torch.float64, (2, 0, 2, 2))


# ---- A network per node --------------------------------------------------------------------------


def squares(a):
    """A network of two layers with a tap: 1. h = x + 1, 2. a h^2."""
    def net(x, t, y, tap=None):
        if tap is None:
            return a * (x + 1) ** 2
        return tap(1, a * tap(0, x + 1) ** 2)

    return net


def test_a_network_for_every_node_and_fused_features():
    s = make_schedule("linear")
    x = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    grid = make_grid("dit", 3)

    by_hand = x
    for a, t, u in zip((1, 2, 3), grid[:-1], grid[1:]):
        by_hand = ddim_step(s, by_hand, a * (by_hand + 1) ** 2, t, u)
    predict = [predictor(squares(a), None, s) for a in (1, 2, 3)]
    torch.testing.assert_close(sample(predict, x, s, grid), by_hand)

    lam = 0.25
    nets = solvers.fused([squares(1)] * 3, [squares(2)] * 3, lam)
    by_hand = x
    before = None
    for t, u in zip(grid[:-1], grid[1:]):
        h = by_hand + 1
        if before is None:
            out = h ** 2
        else:
            h = lam * before[0] + (1 - lam) * h
            out = lam * before[1] + (1 - lam) * h ** 2
        before = (by_hand + 1, 2 * (by_hand + 1) ** 2)
        by_hand = ddim_step(s, by_hand, out, t, u)
    predict = [predictor(net, None, s) for net in nets]
    for _ in range(2):  # the second trajectory is like the first: nothing is left over
        torch.testing.assert_close(sample(predict, x, s, grid), by_hand)


def test_what_a_solver_cannot_do():
    vp = make_schedule("linear")
    flow = make_schedule("interpolant")
    impossible = ((flow, "plms", 10), (vp, "sde", 10), (vp, "plms", 2), (vp, "fused", 10),
                  (vp, "dpm2", 1))
    for schedule, solver, nfe in impossible:
        with pytest.raises(ValueError, match="--solver|--nfe"):
            solver_grid(schedule, solver, nfe)

    own = [900, 400, 100, -1]
    assert solver_grid(vp, "ddim", 3, own) is own
    assert solver_grid(vp, "plms", 4, own) is own
    assert solver_grid(vp, "ddim", 4, own) != own
    assert solver_grid(vp, "dpm2", 4) == [999, 500, 0]
    assert solver_grid(vp, "dpm2", 5) == [999, 500, 0, -1]
