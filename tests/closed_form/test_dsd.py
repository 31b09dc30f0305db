"""DSD's losses, its allocation of updates and its settings."""
import itertools
from collections import Counter

import pytest
import torch
from toys import Smooth, states_and_labels

import ddil
import dsd
import models
import train
from kit.base import describe_base
from solvers import (
    add_noise,
    ddim_invert,
    ddim_step,
    guide,
    make_grid,
    make_schedule,
    predictor,
    sample_states,
)

SCHEDULE = make_schedule("linear")
GRID = make_grid("uniform", 16)


@pytest.fixture
def batch():
    return states_and_labels()


def nodes(k):
    """t, t', t'' of update k of a trajectory of 16 steps."""
    return [torch.full((6,), node) for node in GRID[2 * k:2 * k + 3]]


# ---- Algorithm 2 -------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("k", [0, 3, 7])
def test_algorithm_2_as_printed(batch, prediction, k):
    """x', x'' and the loss from the states of two DDIM steps, each by its own formula; the
    trajectory goes on from z_t''."""
    z, y = batch
    net = Smooth()
    t, mid, u = nodes(k)
    loss, aux = dsd.dsd_loss(net, SCHEDULE, z, t, mid, u, y, prediction=prediction)
    z_u = aux["z_u"]
    predict = predictor(net, y, SCHEDULE, prediction)
    states = sample_states(predict, z, SCHEDULE, GRID[2 * k:2 * k + 3])
    torch.testing.assert_close(z_u, states[2], rtol=1e-10, atol=1e-10)
    x1 = ddim_invert(SCHEDULE, z, states[1], t, mid)
    x2 = ddim_invert(SCHEDULE, z, states[2], t, u)

    # A DDIM step inverts exactly:
    x_theta = dsd.predict(net, SCHEDULE, z, t, y, None, prediction).detach()
    torch.testing.assert_close(x1, x_theta, rtol=1e-8, atol=1e-8)
    one_step = ddim_step(SCHEDULE, z, x2, t, u, "x0")
    torch.testing.assert_close(one_step, z_u, rtol=1e-8, atol=1e-8)

    alpha, sigma = SCHEDULE.alpha_sigma(t, z)
    of_x0 = (x1 - x2).square().mean((1, 2, 3))
    of_eps = ((z - alpha * x1) / sigma - (z - alpha * x2) / sigma).square().mean((1, 2, 3))
    by_hand = torch.maximum(of_x0, of_eps).mean()
    assert loss.item() == pytest.approx(float(by_hand), rel=1e-8)
    assert loss.item() > 0
    assert not z_u.requires_grad


def test_the_gradient_flows_through_the_first_step_alone(batch):
    z, y = batch
    t, mid, u = nodes(3)
    first = Smooth()
    second = Smooth()
    turn = itertools.cycle((first, second))
    loss, _ = dsd.dsd_loss(lambda *a: next(turn)(*a), SCHEDULE, z, t, mid, u, y)
    loss.backward()
    assert second.p.grad is None
    assert float(first.p.grad.abs().min()) > 0
    net = Smooth()
    dsd.dsd_loss(net, SCHEDULE, z, t, mid, u, y)[0].backward()
    torch.testing.assert_close(net.p.grad, first.p.grad)

    # The target is a constant, which the prediction approaches:
    x1 = dsd.predict(net, SCHEDULE, z, t, y)
    target, _ = dsd.two_steps(net, SCHEDULE, z, x1, t, mid, u, y)
    alpha, sigma = SCHEDULE.alpha_sigma(t, z)
    weight = (alpha / sigma).square().clamp(min=1)
    direct = (weight * (dsd.predict(net, SCHEDULE, z, t, y) - target).square()).mean()
    torch.testing.assert_close(torch.autograd.grad(direct, net.p)[0], net.p.grad)


def test_two_evaluations_an_update_three_with_a_teacher(batch):
    """Guided ones count as one, of twice as many rows."""
    z, y = batch
    net = Smooth()
    teacher = Smooth(0.5, 0.2, 0.1)
    t, mid, u = nodes(2)
    w = torch.linspace(1, 3, 6, dtype=torch.float64)
    for scale, rows in ((None, 6), (w, 12)):
        net.calls.clear()
        dsd.dsd_loss(net, SCHEDULE, z, t, mid, u, y, scale)
        assert net.calls == [(rows, True), (rows, False)]
        net.calls.clear()
        teacher.calls.clear()
        dsd.dsd_loss(net, SCHEDULE, z, t, mid, u, y, scale, teacher=teacher)
        assert net.calls == [(rows, True)]
        assert teacher.calls == [(rows, False)] * 2

    # Progressive distillation:
    net.calls.clear()
    teacher.calls.clear()
    target = ddil.pd_target(teacher, SCHEDULE, z, (y,), t, mid, u)
    ddil.pd_loss(net, SCHEDULE, z, (y,), t, target)
    assert len(net.calls + teacher.calls) == 3


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("k", [0, 4, 7])
def test_the_two_targets_differ_by_a_factor(batch, prediction, k):
    """x'' - x' = (1 - rho) (x_theta(z_t') - x'): the gradient by 1 - rho, the loss by its
    square."""
    z, y = batch
    net = Smooth()
    t, mid, u = nodes(k)
    rho = share_of_the_first_step(*(int(v[0]) for v in (t, mid, u)))
    x1 = dsd.predict(net, SCHEDULE, z, t, y, None, prediction).detach()
    targets = {}
    loss = {}
    gradient = {}
    for kind in ("pd", "next"):
        targets[kind], _ = dsd.two_steps(net, SCHEDULE, z, x1, t, mid, u, y, None, prediction,
                                         kind)
        loss[kind], _ = dsd.dsd_loss(net, SCHEDULE, z, t, mid, u, y, None, prediction, kind)
        gradient[kind] = torch.autograd.grad(loss[kind], net.p)[0]
    moved = (1 - rho) * (targets["next"] - x1)
    torch.testing.assert_close(targets["pd"] - x1, moved, rtol=1e-7, atol=1e-9)
    ratio = (loss["pd"] / loss["next"]).item()
    assert ratio == pytest.approx((1 - rho) ** 2, rel=1e-7)
    torch.testing.assert_close(gradient["pd"], (1 - rho) * gradient["next"], rtol=1e-7, atol=0)
    assert (rho == 0) == (k == 7)
    assert 0 <= rho < 0.5


def share_of_the_first_step(*times):
    """rho, from alpha / sigma at t, t', t''; 0 where t'' is clean."""
    r = []
    for t in times:
        r.append(float(SCHEDULE.alpha[t] / SCHEDULE.sigma[t]) if t >= 0 else float("inf"))
    return (r[1] - r[0]) / (r[2] - r[0])


def test_a_model_that_knows_its_one_datum_has_nothing_to_learn(batch):
    """The exact denoiser of one point predicts it everywhere."""
    z, y = batch
    point = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    for k in (0, 5):
        t, mid, u = nodes(k)
        loss, _ = dsd.dsd_loss(lambda z, t, y: point.expand_as(z), SCHEDULE, z, t, mid, u, y, None,
                               "x0")
        assert float(loss) < 1e-24


def test_a_model_of_gaussian_data_has_something_to_learn(batch):
    """The exact denoiser of N(0, c^2) has a loss. For a student that met the target, one step is
    the two."""
    z, y = batch
    c = 0.5
    t, mid, u = nodes(5)

    def exact(z, t, y):
        alpha, sigma = SCHEDULE.alpha_sigma(t, z)
        return alpha * c ** 2 / (alpha ** 2 * c ** 2 + sigma ** 2) * z

    def flow(v):
        alpha, sigma = SCHEDULE.alpha_sigma(v, z)
        return (alpha ** 2 * c ** 2 + sigma ** 2).sqrt()

    loss, aux = dsd.dsd_loss(exact, SCHEDULE, z, t, mid, u, y, None, "x0")
    z_u = aux["z_u"]
    assert float(loss) > 1e-6
    x1 = exact(z, t, y)
    target, _ = dsd.two_steps(exact, SCHEDULE, z, x1, t, mid, u, y, None, "x0")
    torch.testing.assert_close(ddim_step(SCHEDULE, z, target, t, u, "x0"), z_u)

    # Towards the exact flow, along which these samples shrink less: one step shrinks too much.
    assert float(target.norm() / x1.norm()) > 1
    truth = z * flow(u) / flow(t)
    one_step = ddim_step(SCHEDULE, z, x1, t, u, "x0")
    assert float((z_u - truth).norm()) < 0.6 * float((one_step - truth).norm())


def test_with_a_teacher_of_the_same_weights_the_loss_is_the_same(batch):
    z, y = batch
    t, mid, u = nodes(1)
    for w in (None, torch.linspace(1, 3, 6, dtype=torch.float64)):
        own, own_aux = dsd.dsd_loss(Smooth(), SCHEDULE, z, t, mid, u, y, w)
        taught, aux = dsd.dsd_loss(Smooth(), SCHEDULE, z, t, mid, u, y, w, teacher=Smooth())
        assert torch.equal(own, taught)
        assert torch.equal(own_aux["z_u"], aux["z_u"])

    # The trajectory is the teacher's own:
    teacher = Smooth(0.5, 0.2, 0.1)
    _, aux = dsd.dsd_loss(Smooth(), SCHEDULE, z, t, mid, u, y, teacher=teacher)
    _, alone = dsd.dsd_loss(teacher, SCHEDULE, z, t, mid, u, y)
    assert torch.equal(aux["z_u"], alone["z_u"])


def test_a_scale_of_guidance_for_each_sample(batch, tiny):
    z, y = batch
    net = Smooth()
    t = torch.full((6,), 500)
    each = guide(net, torch.tensor([1.0, 1.5, 1.5, 3.0, 3.0, 3.0]))(z, t, y)
    for w, rows in ((1.0, [0]), (1.5, [1, 2]), (3.0, [3, 4, 5])):
        torch.testing.assert_close(each[rows], guide(net, w)(z, t, y)[rows])
    takes_w = models.fill_random(models.with_guidance(tiny))
    x = torch.randn(2, 1, 8, 8)
    each = guide(takes_w, torch.tensor([1.5, 1.5]))(x, t[:2], y[:2])
    assert torch.equal(each, guide(takes_w, 1.5)(x, t[:2], y[:2]))


# ---- Updates and learning rate -----------------------------------------------------------------


SPANS = [  # P, and for every variant the least and the most updates at a depth
    (5000, dict(dsdi=(828, 840), tsd=(828, 840), dsdgl=(138, 176), dsdgexp=(126, 377))),
    (4000, dict(dsdi=(656, 672), tsd=(656, 672), dsdgl=(104, 144), dsdgexp=(93, 302))),
]


@pytest.mark.parametrize("P, spans", SPANS)
def test_allocation_of_updates(P, spans):
    for variant, span in spans.items():
        halves = variant in ("dsdi", "tsd")
        depths = [64, 32, 16, 8, 4, 2] if halves else list(range(64, 0, -2))
        updates = dsd.allocate(variant, 64, P)
        count = Counter(n for n, _ in updates)
        assert len(updates) == P
        assert list(count) == depths
        assert (min(count.values()), max(count.values())) == span
        assert all(c % (n // 2) == 0 for n, c in count.items())  # whole trajectories
        assert [k for n, k in updates if n == 8] == [0, 1, 2, 3] * (count[8] // 4)
        if variant == "dsdgexp":
            assert count[2] == max(count.values())
            assert count[2] / count[64] == pytest.approx(2.7, rel=0.15)


@pytest.mark.parametrize("P, trajectories, last", [(5000, 157, (64, 7)), (4000, 125, (64, 31))])
def test_allocation_of_updates_at_one_depth(P, trajectories, last):
    """5,000 end within the 157th trajectory, 4,000 at the end of the 125th."""
    updates = dsd.allocate("dsdn", 64, P)
    assert len(updates) == P
    assert {n for n, _ in updates} == {64}
    assert sum(k == 0 for _, k in updates) == -(-P // 32) == trajectories
    assert updates[-1] == last


def test_learning_rate():
    rates = [dsd.learning_rate(n, 4000) for n in range(4000)]
    assert rates[0] == 1 / 200
    assert rates[199] == rates[200] == max(rates) == 1
    assert rates[-1] == pytest.approx(0.1, abs=1e-5)
    assert all(b <= a for a, b in zip(rates[200:], rates[201:]))
    assert dsd.learning_rate(0, 1) == 1


# ---- From scratch ------------------------------------------------------------------------------


def test_equation_1(batch):
    """alpha alone is the ordinary loss; beta alone that of Algorithm 2 without its weight. It takes
    one evaluation more than the former."""
    x0, y = batch
    noise = torch.randn(6, 1, 4, 4, dtype=torch.float64)
    net = Smooth()
    t = torch.tensor([999, 700, 400, 100, 9, 3])
    plain, _ = train.diffusion_loss(net, SCHEDULE, x0, y, t, noise, "v")
    net.calls.clear()
    loss, aux = dsd.training_loss(net, SCHEDULE, x0, y, t, noise)
    assert net.calls == [(6, True), (6, False)]
    assert torch.equal(aux["plain"], plain.detach())
    weighted = 0.85 * float(aux["plain"]) + 0.15 * float(aux["own"])
    assert loss.item() == pytest.approx(weighted)

    # 1000 / 128 = 8 apart, but never below 0 and clean:
    mid = torch.tensor([991, 692, 392, 92, 1, 0])
    u = torch.tensor([983, 684, 384, 84, -1, -1])
    z = add_noise(SCHEDULE, x0, noise, t)
    x1 = dsd.predict(net, SCHEDULE, z, t, y, None, "v").detach()
    target, _ = dsd.two_steps(net, SCHEDULE, z, x1, t, mid, u, y, None, "v")
    own = float((x1 - target).square().mean())
    assert float(aux["own"]) == pytest.approx(own, rel=1e-9)
    assert float(aux["own"]) > 0

    alone, _ = dsd.training_loss(net, SCHEDULE, x0, y, t, noise, alpha=1, beta=0)
    ordinary, _ = train.diffusion_loss(net, SCHEDULE, x0, y, t, noise, "v")
    gradient = torch.autograd.grad(alone, net.p)[0]
    assert torch.equal(gradient, torch.autograd.grad(ordinary, net.p)[0])


# ---- Settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name, steps, lr, betas, ema, w", [
    ("LDM-ImageNet", 5000, 1e-7, (0.99, 0.999), 0.9995, [1, 3]),
    ("LDM-CelebAHQ", 4000, 1e-6, (0.9, 0.98), 0.995, [1, 1]),
    ("LDM-Bedroom", 4000, 1e-6, (0.9, 0.98), 0.995, [1, 1]),
])
def test_presets_are_table_3(name, steps, lr, betas, ema, w):  # noqa: PLR0913
    args = dsd.parser().parse_args(["--model", name])
    spec = describe_base(args)
    updates = dsd.apply_dsd_defaults(args, spec)
    assert (args.steps, args.lr, args.ema) == (steps, lr, ema)
    assert dsd.settings_of(spec)["betas"] == betas
    assert (args.depth, args.w) == (64, w)
    assert len(updates) == steps
    assert updates[0] == (64, 0)
