"""Schedules, grids, variances and solvers against numbers of the upstream codes."""
import numpy as np
import pytest
import torch

import solvers
from solvers import ddim_step, lcm_grid, make_grid, make_schedule, predictor, sample, sample_states


def test_schedules_equal_upstream(golden):
    dit = golden("dit_schedule.npz")
    linear = make_schedule("linear")
    np.testing.assert_allclose(linear.alpha[:-1] ** 2, dit["alphas_cumprod_full"], rtol=1e-12)
    np.testing.assert_allclose(make_schedule("cosine").beta, dit["betas_cosine_1000"], rtol=1e-12)
    ldm = golden("ldm_schedule.npz")
    for name in ("sd", "ldm"):
        s = make_schedule(name)
        np.testing.assert_allclose(s.beta, ldm[f"{name}_betas"], rtol=1e-12)
        np.testing.assert_allclose(s.alpha[:-1] ** 2, ldm[f"{name}_alphas_cumprod"], rtol=1e-12)


def test_grids_equal_upstream(golden):
    dit = golden("dit_schedule.npz")
    alpha = make_schedule("linear").alpha
    for n in (2, 4, 8, 10, 16, 20, 25, 50, 100, 250, 1000):
        grid = make_grid("dit", n)
        assert grid == dit[f"use_timesteps_{n}"][::-1].tolist() + [-1]
        if f"alphas_cumprod_{n}" in dit:
            ours = alpha[grid[:-1]].flip(0) ** 2
            np.testing.assert_allclose(ours, dit[f"alphas_cumprod_{n}"], rtol=1e-12)
    for n in (10, 20, 25, 50, 100, 250):
        assert make_grid("ddim", n) == dit[f"use_timesteps_ddim{n}"][::-1].tolist() + [-1]

    ldm = golden("ldm_schedule.npz")
    alpha = make_schedule("sd").alpha
    for n in (10, 20, 25, 50, 200):
        grid = make_grid("ldm", n)
        assert grid == ldm[f"ddim_timesteps_{n}"][::-1].tolist() + [0]
        ours = alpha[grid[1:]].flip(0) ** 2
        np.testing.assert_allclose(ours, ldm[f"sd_ddim_alphas_prev_{n}"], rtol=1e-12)


def ddpm_std(schedule, t, u, head):
    """The standard deviation of one ancestral step whose network has this head."""
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)

    def predict(x, t):
        return torch.zeros_like(x), None, torch.full_like(x, head)

    ends = []
    for noise in (torch.ones_like, torch.zeros_like):
        traj = solvers.Trajectory(noise, nodes=10)
        ends.append(solvers.STEPS["ddpm"](predict, schedule, x, t, u, traj))
    return float(ends[0] - ends[1])


def test_bounds_of_the_learned_variance_equal_upstream(golden):
    dit = golden("dit_schedule.npz")
    s = make_schedule("linear")
    grid = make_grid("dit", 10)
    bounds = ((1.0, np.log(dit["betas_10"])), (-1.0, dit["post_logvar_clipped_10"]))
    for head, want in bounds:
        for i in range(8):  # the last two steps have no noise, or the clipped entry
            std = ddpm_std(s, grid[i], grid[i + 1], head)
            np.testing.assert_allclose(2 * np.log(std), want[9 - i], rtol=1e-9)


# ---- Whole trajectories against diffusers, on Gaussian data with its exact score -----------------

CASES = {
    "ddim": ["ddim_trailing_a1", "ddim_leading_a1", "ddim_trailing_a0", "ddim_leading_a0",
             "ddim_leading_offset1_a0", "dpm1_eps_linspace_sigmamin"],
    "dpm++": ["dpmpp2m_linspace_zero", "dpmpp2m_trailing_zero", "dpmpp2m_leading_zero",
              "dpmpp2m_linspace_sigmamin"],
    "lcm": ["lcm_orig50"],
    "plms": ["plms_leading_offset1", "plms_leading", "plms_trailing"],
    "dpm2": ["dpm2s_eps_sigmamin"],
}
PAIRS = [(solver, case) for solver, cases in CASES.items() for case in cases]


class Upstream:
    """A trajectory of diffusers, and the network for which it was computed."""

    def __init__(self, file, case, solver):
        key = f"linear/{case}/10"
        self.schedule = make_schedule("linear")
        self.mu = torch.from_numpy(file["mu"])
        self.var = float(file["s_data"]) ** 2
        self.x = torch.from_numpy(file["x_T"])
        self.nodes = file[f"{key}/timesteps"].astype(int).tolist()
        self.states = file[f"{key}/traj"]
        # Upstream's grids end clean, or at t = 0: "a0", "sigmamin", and always for PLMS.
        ends_at_0 = "a0" in case or "sigmamin" in case or solver == "plms"
        self.end = 0 if ends_at_0 else -1
        self.calls = []

    def net(self, x, t, y):
        self.calls.append(int(t[0]))
        alpha, sigma = self.schedule.alpha_sigma(t, x)
        return sigma * (x - alpha * self.mu) / (alpha ** 2 * self.var + sigma ** 2)


def check_dpm2(upstream):
    """diffusers looks at every second node of its grid, we at the middle in lmb: steps alone."""
    s = upstream.schedule
    predict = predictor(upstream.net, None, s)
    x = upstream.x
    nodes = [*upstream.nodes, upstream.end]
    for i, (t, m, u) in enumerate(zip(nodes[::2], nodes[1::2], nodes[2::2])):
        _, eps, _ = predict(x, t)
        np.testing.assert_allclose(ddim_step(s, x, eps, t, m), upstream.states[2 * i + 1],
                                   atol=1e-9)
        x = solvers.STEPS["dpm2"](predict, s, x, t, u, middle=m)
        np.testing.assert_allclose(x, upstream.states[2 * i + 2], atol=1e-9)


@pytest.mark.parametrize("solver, case", PAIRS)
def test_solvers_against_diffusers(golden, solver, case):
    file = golden("schedulers.npz")
    upstream = Upstream(file, case, solver)
    if solver == "dpm2":
        check_dpm2(upstream)
        return
    nodes = upstream.nodes
    if solver == "plms":  # it evaluates its second node twice
        nodes = nodes[:1] + nodes[2:]
    grid = [*nodes, upstream.end]
    noise = iter(torch.from_numpy(file["lcm_noise"]))

    predict = predictor(upstream.net, None, upstream.schedule)
    got = sample_states(predict, upstream.x, upstream.schedule, grid, solver,
                        noise=lambda x: next(noise))
    np.testing.assert_allclose(torch.stack(got)[-9:], upstream.states[-9:], atol=1e-9)
    assert upstream.calls == upstream.nodes
    if solver == "lcm":
        assert lcm_grid(10) == grid
        assert lcm_grid(4) == [999, 759, 499, 259, -1]


def test_unknown_solvers_are_refused():
    s = make_schedule("linear")
    with pytest.raises(ValueError, match="--solver unipc: unknown; choose ddim"):
        sample(None, torch.zeros(1, 1, 1, 1), s, [5, -1], "unipc")
