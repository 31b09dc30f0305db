"""DDIL's losses, rollouts and mixture where the answer follows from the definitions."""

import pytest
import torch
from toys import Smooth, states_and_labels

import ddil
import models
from kit.processes import Processes, StepRandom
from solvers import (
    PROJECTIONS,
    add_noise,
    ddim_step,
    guide,
    halve_grid,
    lcm_grid,
    make_grid,
    make_schedule,
    predictor,
    sample_states,
    to_x0_eps,
)

SCHEDULE = make_schedule("linear")
ALL = slice(None)


@pytest.fixture
def batch():
    return states_and_labels()


# ---- Progressive distillation ------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("project", ["off", "clamp"])
def test_one_step_with_the_target_is_the_teachers_two(batch, prediction, project):
    z, y = batch
    grid = make_grid("uniform", 16)
    teacher = Smooth(0.6, -0.5, 0.3)
    project = PROJECTIONS[project]
    path = ddil.ddim_path(teacher, SCHEDULE, grid, (y,), prediction, project)
    for i in (0, 3, 7):
        t, mid, u = (torch.full((6,), node) for node in grid[2 * i:2 * i + 3])
        target = ddil.pd_target(teacher, SCHEDULE, z, (y,), t, mid, u, prediction, project)
        two = path(z, ALL, grid[2 * i], grid[2 * i + 2])
        assert (ddim_step(SCHEDULE, z, target, t, u, "x0") - two).abs().max() < 1e-10
        assert not target.requires_grad
        check_equation_1(z, y, t, target)


def check_equation_1(z, y, t, target):
    """A student that gives this target has no loss. Another one has Eq. 1, which is also
    max(|dx|^2, |deps|^2)."""
    alpha, sigma = SCHEDULE.alpha_sigma(t, z)
    for weight in ("snr", "output"):
        loss, _ = ddil.pd_loss(lambda *_: target, SCHEDULE, z, (y,), t, target, "x0", weight)
        assert loss < 1e-25
    g = torch.Generator().manual_seed(1)
    other = target + torch.randn(z.shape, generator=g, dtype=z.dtype)

    def eps(x0):
        return (z - alpha * x0) / sigma

    of_x0 = (other - target).square().mean((1, 2, 3))
    of_eps = (eps(other) - eps(target)).square().mean((1, 2, 3))
    want = torch.maximum(of_x0, of_eps).mean()
    loss, _ = ddil.pd_loss(lambda *_: other, SCHEDULE, z, (y,), t, target, "x0")
    assert loss == pytest.approx(float(want), rel=1e-9)


def test_eps_students_and_eq_1():
    """At t = 999 Eq. 1 weighs an error of eps by 1 / SNR = 24,900; as outputs all timesteps weigh
    the same."""
    z = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    y = torch.zeros(2, dtype=torch.long)
    t = torch.tensor([999, 999])
    x0, _ = to_x0_eps(SCHEDULE, z, torch.zeros_like(z), t)

    def loss(weight):
        out = torch.full_like(z, 0.1)
        return float(ddil.pd_loss(lambda *_: out, SCHEDULE, z, (y,), t, x0, "eps", weight)[0])

    inverse_snr = float((SCHEDULE.sigma[999] / SCHEDULE.alpha[999]) ** 2)
    assert loss("output") == pytest.approx(0.01)
    assert loss("snr") == pytest.approx(0.01 * inverse_snr, rel=1e-9)
    assert 24_000 < loss("snr") / loss("output") < 25_000


# ---- Imitation learning ------------------------------------------------------------------------


def test_rollouts_of_one_model_alone(batch):
    """Student probability 0 and 1: to the bit the teacher's and the student's own chains."""
    z, y = batch
    grid = make_grid("uniform", 8)
    nodes = halve_grid(grid)
    student = Smooth(0.5, 0.2, 0.1)
    teacher = Smooth(0.6, -0.5, 0.3)
    paths = (ddil.ddim_path(student, SCHEDULE, nodes, (y,), "v"),
             ddil.ddim_path(teacher, SCHEDULE, grid, (y,), "v"))
    by_teacher = ddil.mixed_rollout(*paths, z, nodes, lambda n: torch.zeros(6, dtype=torch.bool))
    by_student = ddil.mixed_rollout(*paths, z, nodes, lambda n: torch.ones(6, dtype=torch.bool))
    chain = sample_states(predictor(teacher, y, SCHEDULE, "v"), z, SCHEDULE, grid)[::2]
    assert len(by_teacher) == len(chain)
    assert all(torch.equal(a, b) for a, b in zip(by_teacher, chain))
    chain = sample_states(predictor(student, y, SCHEDULE, "v"), z, SCHEDULE, nodes)
    assert len(by_student) == len(chain)
    assert all(torch.equal(a, b) for a, b in zip(by_student, chain))

    # Every row has its own path:
    mixed = ddil.mixed_rollout(*paths, z, nodes, lambda n: torch.arange(6) % 2 == 0)
    for state, s, t in zip(mixed, by_student, by_teacher):
        assert torch.allclose(state[::2], s[::2])
        assert torch.allclose(state[1::2], t[1::2])
    assert not torch.allclose(by_teacher[-1], by_student[-1])


def test_the_path_of_lcm_is_the_lcm_solver(batch):
    """LCM's student: the x0 that it predicts, noised anew."""
    z, y = batch
    nodes = halve_grid(make_grid("uniform", 8))
    student = Smooth(0.5, 0.2, 0.1)
    fresh = {}
    for t in nodes[:-1]:
        g = torch.Generator().manual_seed(t)
        fresh[t] = torch.randn(6, 1, 4, 4, generator=g, dtype=torch.float64)
    path = ddil.renoise_path(student, SCHEDULE, fresh, (y,), "v")
    rolled = [z]
    for t, u in zip(nodes[:-1], nodes[1:]):
        rolled.append(path(rolled[-1], ALL, t, u))
    drawn = iter([fresh[t] for t in nodes[:-1]])
    states = sample_states(predictor(student, y, SCHEDULE, "v"), z, SCHEDULE, nodes, "lcm",
                           lambda x: next(drawn))
    assert len(rolled) == len(states)
    assert all(torch.allclose(a, b) for a, b in zip(rolled, states))


@pytest.mark.parametrize("beta", [0.15, 0.8])
def test_the_mixture_is_the_prior(beta):
    """20,000 intervals: who took the last one, and whether the student was ever at work before."""
    rng = StepRandom(Processes("off"), 0, 1, 2500)
    zeros = torch.zeros(2500, dtype=torch.float64)
    nodes = list(range(8, -1, -1))

    # The digits of a state tell who came here; the student writes 1, the teacher 0:
    states = ddil.mixed_rollout(lambda x, rows, t, u: x * 10 + 1, lambda x, rows, t, u: x * 10,
                                zeros, nodes, lambda n: rng.uniform() < beta)
    last = torch.stack(states[1:]) % 10
    assert abs(float(last.mean()) - beta) < 0.02
    for j in (1, 2, 4, 7):
        share = float((states[j] > 0).double().mean())
        assert abs(share - (1 - (1 - beta) ** j)) < 0.03


@pytest.mark.parametrize("p, beta, student", [(0.25, 0.15, 0.0375), (0.5, 0.8, 0.40)])
def test_share_of_aggregated_states(p, beta, student):
    """p = 0.25 and 0.5 of 20,000 states come from D; the student made the last step of a share
    0.0375 and 0.40 of all states."""
    n = 20_000
    rng = StepRandom(Processes("off"), 3, 5, n)
    came_by_student = (rng.uniform() < beta).double().view(-1, 1, 1, 1)
    D = ddil.Aggregated(torch.device("cpu"))
    D.add(1 + came_by_student, torch.ones(n, dtype=torch.long), (torch.ones(n),), ddil.KEEP)
    zeros = torch.zeros(n, 1, 1, 1, dtype=torch.float64)
    z, node, cond = D.mix(rng, p, zeros, torch.zeros(n, dtype=torch.long), (torch.zeros(n),))
    assert abs(float((z > 0).double().mean()) - p) < 0.02
    assert abs(float((z == 2).double().mean()) - student) < 0.02
    assert torch.equal(node.bool(), (z > 0).flatten())  # what comes with a state stays with it
    assert torch.equal(cond[0].bool(), (z > 0).flatten())


def test_aggregated_states_keep_the_last_rollouts():
    D = ddil.Aggregated(torch.device("cpu"))
    for rollout in range(6):
        mine = torch.full((3,), rollout)
        D.add(mine.view(-1, 1, 1, 1).double(), mine, (mine, mine / 2), ddil.KEEP)
    want = torch.tensor([2, 3, 4, 5]).repeat_interleave(3)  # the last four
    copy = ddil.Aggregated(torch.device("cpu"))
    copy.load_state_dict(D.state_dict())
    for held in (D, copy):
        z, node, label, scale = held.parts
        assert torch.equal(z.flatten(), want.double())
        assert torch.equal(node, want)
        assert torch.equal(label, want)
        assert torch.equal(scale, want / 2)


# ---- Guidance as an input, consistency, distribution matching ----------------------------------


def test_guidance_as_an_input(tiny):
    """At first the input is ignored; then the loss asks for guided outputs, and sampling passes
    the scale."""
    net = models.with_guidance(tiny)
    x = torch.randn(3, 1, 8, 8)
    t = torch.tensor([10, 500, 999])
    y = torch.tensor([1, 2, 10])
    assert torch.equal(net(x, t, y, torch.tensor([1.0, 4.0, 9.0])), tiny(x, t, y))
    assert models.build(net.arch).guidance
    w = torch.tensor([1.0, 2.0, 4.0])
    target = ddil.guided_output(tiny, x, t, y, w)
    for i in range(3):
        one = slice(i, i + 1)
        alone = guide(tiny, float(w[i]))(x[one], t[one], y[one])
        torch.testing.assert_close(target[one], alone, rtol=1e-4, atol=1e-6)
    assert ddil.guidance_loss(lambda *_: target, tiny, x, t, y, w)[0] == 0
    assert ddil.guidance_loss(net, tiny, x, t, y, w)[0] > 0

    models.fill_random(net)
    sampled = guide(net, 3.0)(x, t, y)
    assert torch.equal(sampled, net(x, t, y, torch.full((3,), 3.0)))
    assert not torch.equal(sampled, net(x, t, y, torch.ones(3)))


def test_consistency_of_one_point():
    """All data in one point m: x0 = m is the exact consistency function up to LCM's boundary, and
    the teacher steps along the solution."""
    m = 0.3
    grid = lcm_grid(50)

    def exact(z, t, *_):  # v = alpha eps - sigma x0
        alpha, sigma = SCHEDULE.alpha_sigma(t, z)
        return alpha * (z - alpha * m) / sigma - sigma * m

    def wrong(z, t, *_):
        return exact(z, t) + 0.5

    exact.num_classes = 10
    noise = torch.randn(49, 1, 4, 4, dtype=torch.float64)
    y = torch.zeros(49, dtype=torch.long)
    w = torch.full((49,), 2.0)
    t = torch.tensor(grid[:49])
    u = torch.tensor(grid[1:50])
    z = add_noise(SCHEDULE, torch.full_like(noise, m), noise, t)
    assert (ddil.consistency(exact, SCHEDULE, z, t, (y,)) - m).abs().max() < 1e-4
    assert ddil.lcm_loss(exact, exact, exact, SCHEDULE, z, t, u, y, w)[0] < 1e-6
    assert ddil.lcm_loss(wrong, exact, exact, SCHEDULE, z, t, u, y, w)[0] > 0.05

    # At the clean end the target is the point itself, whatever the network says:
    point = torch.full_like(z[:1], m)
    clean, _ = ddil.lcm_loss(exact, wrong, exact, SCHEDULE, point, torch.tensor([19]),
                             torch.tensor([-1]), y[:1], w[:1])
    assert clean < 1e-2


def test_distribution_matching_pulls_towards_the_teacher():
    """Where the critic's x0 lies below the teacher's, the sample moves up, by their difference over
    |x - x0 of the teacher|. Equal ones do not move it."""
    def always(m):
        return lambda z, t, *_: torch.full_like(z, m)

    x = torch.full((2, 1, 4, 4), 0.1, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([100, 700])
    y = torch.zeros(2, dtype=torch.long)
    w = torch.ones(2)
    noise = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    teacher = always(0.9)
    teacher.num_classes = 10
    for m, pull in ((0.5, 0.5), (0.9, 0.0)):
        out = always(m)

        def critic(z, t, y, out=out):
            return out(z, t, y), torch.zeros(len(z), dtype=z.dtype)

        loss, _ = ddil.dmd_loss(x, critic, teacher, SCHEDULE, t, y, w, noise, "x0", gan=0.0)
        grad = torch.autograd.grad(loss, x)[0] * x.numel()
        torch.testing.assert_close(grad, torch.full_like(grad, -pull))


def test_critic(tiny):
    """It learns the score of samples only, and its head to tell them from data; its loss falls as
    the head tells them apart."""
    critic = ddil.Critic(models.fill_random(models.build(tiny.arch)))
    x = torch.randn(4, 1, 8, 8)
    y = torch.zeros(4, dtype=torch.long)
    t = torch.full((4,), 300)
    noise = torch.randn(4, 1, 8, 8)
    out, logit = critic(x, t, y)
    torch.testing.assert_close(out, critic.net(x, t, y))
    assert logit.shape == (4,)

    def loss(of_samples, of_data):
        def fixed(z, t, y):
            return torch.zeros_like(z), torch.tensor([of_samples] * 4 + [of_data] * 4)
        total, _ = ddil.critic_loss(fixed, SCHEDULE, x, y, x, y, t, noise, "eps", gan=1.0)
        return total - noise.square().mean()

    assert loss(-20.0, 20.0) < 1e-6 < loss(0.0, 0.0) < loss(20.0, -20.0)
    assert loss(0.0, 0.0) == pytest.approx(2 * 0.693147, rel=1e-5)


# ---- The stages --------------------------------------------------------------------------------


def test_when_a_rollout_is_due():
    """p and beta change after 60 % of a stage; a state of D is used --reuse times on average."""
    mixtures = []
    for local in range(100):  # 7 states of a trajectory in a rollout
        mixtures.append(ddil.mixture(local, 100, [0.25, 0.5], [0.15, 0.8], [2, 3], 7))
    assert {m[:2] for m in mixtures[:60]} == {(0.25, 0.15)}
    assert {m[:2] for m in mixtures[60:]} == {(0.5, 0.8)}
    due = [n for n, m in enumerate(mixtures) if m[2]]
    assert due == [0, 56, 60]  # every 2 * 7 / 0.25 steps, then every 3 * 7 / 0.5
