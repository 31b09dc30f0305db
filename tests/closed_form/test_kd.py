"""KD's loss against the paper's equations with denoised images, and its average."""
import pytest
import torch
from toys import SmoothInLogTime, noised_batch

import kd
import train
from solvers import (
    SIGMA_DATA,
    add_noise,
    from_x0_eps,
    guide,
    guide_with,
    make_schedule,
    to_x0_eps,
)

S = make_schedule("edm")


@pytest.fixture
def batch():
    return noised_batch()


def denoised(net, x0, y, t, noise, *w):
    """D_theta(x0 + noise; t, y)."""
    x = add_noise(S, x0, noise, t)
    return to_x0_eps(S, x, net(x, t, y, *w), t, "edm")[0]


def weighted(t, a, b):
    """The mean of lambda_sigma a b."""
    weight = (t ** 2 + SIGMA_DATA ** 2) / (t * SIGMA_DATA) ** 2
    return (weight.view(-1, 1, 1, 1) * a * b).mean().item()


def loss_of(*args, **kwargs):
    return kd.kd_loss(*args, **kwargs)[0].item()


def test_equations_3_5_and_8_in_the_papers_terms(batch):
    """With denoised images and lambda_sigma, as printed."""
    x0, y, t, noise = batch
    student = SmoothInLogTime(0.5, 0.2, 0.1)
    teacher = SmoothInLogTime()
    D = denoised(student, x0, y, t, noise)
    target = denoised(teacher, x0, y, t, noise)

    def loss(alpha):
        return loss_of(student, teacher, S, *batch, alpha=alpha)

    eq5 = weighted(t, D - target, D - target)
    eq3 = weighted(t, D - x0, D - x0)
    assert loss_of(student, teacher, S, *batch) == pytest.approx(eq5, rel=1e-9)
    assert loss(1.0) == pytest.approx(eq3, rel=1e-9)
    assert eq5 > 1e-3
    assert loss(0.3) == pytest.approx(0.7 * eq5 + 0.3 * eq3, rel=1e-9)

    # Eq. 12 and 13: the mixed loss is either of the two, a product and a constant.
    constant = weighted(t, target - x0, target - x0)
    eq12 = eq5 + 2 * 0.3 * weighted(t, D - target, target - x0) + 0.3 * constant
    eq13 = eq3 + 2 * 0.7 * weighted(t, D - x0, x0 - target) + 0.7 * constant
    assert loss(0.3) == pytest.approx(eq12, rel=1e-9)
    assert loss(0.3) == pytest.approx(eq13, rel=1e-9)

    _, aux = kd.kd_loss(student, teacher, S, *batch, alpha=0.3)
    assert float(aux["kd"]) == pytest.approx(eq5, rel=1e-9)
    assert float(aux["dsm"]) == pytest.approx(eq3, rel=1e-9)


def test_equation_6_in_the_papers_terms(batch):
    """The paper's w is ours less one. The teacher is two networks, or one with a null label."""
    x0, y, t, noise = batch
    w = torch.linspace(1, 4, 6, dtype=torch.float64)
    column = w.view(-1, 1, 1, 1)
    teacher = SmoothInLogTime()
    student = SmoothInLogTime(0.5, 0.2, 0.1, guidance=True)
    uncond = SmoothInLogTime(0.1, 0.3, -0.2)
    uncond.num_classes = 0
    D = denoised(student, x0, y, t, noise, w)
    cond = denoised(teacher, x0, y, t, noise)
    null = denoised(uncond, x0, torch.zeros_like(y), t, noise)
    own_null = denoised(teacher, x0, torch.full_like(y, 10), t, noise)
    both = guide_with(teacher, uncond)
    for source, without in ((both, null), (teacher, own_null)):
        target = column * cond - (column - 1) * without
        eq6 = weighted(t, D - target, D - target)
        assert loss_of(student, source, S, x0, y, t, noise, w) == pytest.approx(eq6, rel=1e-9)


def test_gradients_and_evaluations(batch):
    """The teacher has no gradient; a student that is its teacher has no loss; score matching does
    not ask the teacher; a guided student takes one evaluation."""
    x0, y, t, noise = batch
    student = SmoothInLogTime(0.5, 0.2, 0.1)
    teacher = SmoothInLogTime()
    kd.kd_loss(student, teacher, S, *batch)[0].backward()
    assert teacher.p.grad is None
    assert float(student.p.grad.abs().min()) > 0
    assert (len(student.calls), len(teacher.calls)) == (1, 1)
    assert loss_of(teacher, SmoothInLogTime(), S, *batch) == 0
    teacher.calls.clear()
    kd.kd_loss(student, teacher, S, *batch, alpha=1.0)
    assert teacher.calls == []
    taking = SmoothInLogTime(guidance=True)
    guide(taking, 1.5)(x0, t, y)
    assert len(taking.calls) == 1
    pair = guide_with(SmoothInLogTime(), SmoothInLogTime())
    unguided = guide(pair, 1.0)(x0, t, y)
    torch.testing.assert_close(unguided, SmoothInLogTime()(x0, t, y))


@pytest.mark.parametrize("prediction, schedule", [
    ("eps", "linear"), ("v", "cosine"), ("velocity", "interpolant")])
def test_other_networks(batch, prediction, schedule):
    """DiT in eps, v and velocity form: the same loss of outputs; with alpha = 1 that of
    train.py."""
    x0, y, t, noise = batch
    schedule = make_schedule(schedule)
    of_time = 0.001
    t = torch.tensor([1, 10, 100, 500, 900, 999])
    if schedule.continuous:
        of_time = 0
        t = torch.tensor([0.1, 0.2, 0.4, 0.6, 0.8, 0.9], dtype=torch.float64)

    def net(x, t, y):
        return torch.tanh(x) + of_time * t.view(-1, 1, 1, 1)

    dsm = loss_of(net, None, schedule, x0, y, t, noise, prediction=prediction, alpha=1.0)
    ordinary, _ = train.diffusion_loss(net, schedule, x0, y, t, noise, prediction)
    assert dsm == ordinary.item()
    target = from_x0_eps(schedule, x0, noise, t, prediction)
    assert target.shape == x0.shape
    assert loss_of(net, net, schedule, x0, y, t, noise, prediction=prediction) == 0


def test_with_prompts_v_is_weighed_as_eps():
    """Stable Diffusion's weight is that of eps: differences of v count alpha^2 times."""
    schedule = make_schedule("sd")
    g = torch.Generator().manual_seed(0)
    x0, noise, a, b = torch.randn(4, 6, 1, 4, 4, generator=g, dtype=torch.float64)
    t = torch.tensor([1, 50, 300, 500, 950, 999])

    def loss(alpha, **more):
        batch = (schedule, x0, None, t, noise)
        return loss_of(lambda *_: a, lambda *_: b, *batch, alpha=alpha, **more)

    def eps(out):
        x = add_noise(schedule, x0, noise, t)
        return to_x0_eps(schedule, x, out, t, "v")[1]

    kd_eps = (eps(a) - eps(b)).square().mean().item()
    dsm_eps = (eps(a) - noise).square().mean().item()
    for alpha, want in ((0, kd_eps), (1, dsm_eps), (0.3, 0.7 * kd_eps + 0.3 * dsm_eps)):
        assert loss(alpha, prediction="v", of_eps=True) == pytest.approx(want)
    assert loss(0, prediction="v") == pytest.approx((a - b).square().mean().item())
    assert loss(0, prediction="eps", of_eps=True) == loss(0, prediction="eps")


def test_average():
    """A half-life in images, at first a twentieth of what was seen: after many images a weight that
    was 1 and is 0 has halved every half-life."""
    value = 1.0
    for step in range(1000):  # of 10 images, all beyond the ramp-up
        value *= kd.ema_decay(1_000_000 + 10 * step, 10, 1000)
    assert value == pytest.approx(0.5 ** 10)
    assert kd.ema_decay(100, 5, 1000) == pytest.approx(0.5)
    assert kd.ema_decay(0, 512, 500_000) == 0
