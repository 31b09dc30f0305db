"""SSD's losses against Eq. 5, 7 and 17 by hand, and the paper's numbers."""
import pytest
import torch
from test_solvers import Gaussian
from toys import Scale, pair_batch

import ssd
from kit.base import describe_base
from kit.processes import Processes
from solvers import add_noise, ddim_step, make_grid, make_schedule, to_x0_eps

# ---- Labels ------------------------------------------------------------------------------------


def test_equation_5_by_hand():
    b = pair_batch()
    lam = 0.3
    teacher = Scale(0.5)
    student = Scale(0.6)
    x_s = add_noise(b["schedule"], b["x0"], b["noise"], b["s"])
    eps_s = teacher.prediction(x_s, b["s"], b["y"])
    x_t = ddim_step(b["schedule"], x_s, eps_s, b["s"], b["t"])
    eps_t = teacher.prediction(x_t, b["t"], b["y"])
    target = lam * eps_t + (1 - lam) * eps_s  # lam weighs the cleaner step
    want = (target.detach() - student.prediction(x_s, b["s"], b["y"])).square().mean()
    want_grad = torch.autograd.grad(want, student.w)[0]

    teacher.calls.clear()
    student.calls.clear()
    loss, aux = ssd.ssd_loss(student, teacher, lam=lam, **b)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, student.w)[0], want_grad)
    assert teacher.calls == [(b["s"].tolist(), False), (b["t"].tolist(), False)]
    assert student.calls == [(b["s"].tolist(), True)]
    torch.testing.assert_close(aux["x_t"], x_t)


def test_lam_zero_is_an_exact_no_op(tiny):
    b = pair_batch()
    for amp in ("off", "bf16"):
        net = Processes(amp).autocast(tiny)
        assert ssd.ssd_loss(net, net, lam=0.0, **b)[0] == 0
        assert ssd.ssd_loss(net, net, lam=0.3, **b)[0] > 0


def test_a_guided_step_changes_only_the_way(tiny):
    """solver_net makes x_t; the loss compares what teacher and student predict."""
    b = pair_batch()
    loss, aux = ssd.ssd_loss(tiny, tiny, lam=1.0, solver_net=lambda x, t, y: 0 * x, **b)
    still = ddim_step(b["schedule"], aux["x_s"], torch.zeros_like(b["x0"]), b["s"], b["t"])
    torch.testing.assert_close(aux["x_t"], still)
    want = (tiny(aux["x_t"], b["t"], b["y"]) - tiny(aux["x_s"], b["s"], b["y"])).square().mean()
    torch.testing.assert_close(loss, want)


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_equation_5_is_about_eps_whatever_the_network_predicts(prediction):
    """A network that predicts v, and the eps network that says the same, have the same loss."""
    b = pair_batch()
    teacher = Scale(0.5)
    student = Scale(0.6)

    def as_eps(net):
        def eps(x, t, y):
            return to_x0_eps(b["schedule"], x, net.prediction(x, t, y), t, prediction)[1]
        return eps

    own, _ = ssd.ssd_loss(student, teacher, lam=0.3, prediction=prediction, **b)
    of_eps, _ = ssd.ssd_loss(as_eps(student), as_eps(teacher), lam=0.3, **b)
    torch.testing.assert_close(own, of_eps)

    teacher.d = 0.1
    student.d = 0.2
    more = {"lam": 0.3, "cfg": torch.full((4,), 7.5), "null": torch.tensor([10]), **b}
    own, _ = ssd.ssd_text_loss(student, teacher, prediction=prediction, **more)
    of_eps, _ = ssd.ssd_text_loss(as_eps(student), as_eps(teacher), **more)
    torch.testing.assert_close(own, of_eps, rtol=1e-4, atol=1e-5)


def test_equation_17_on_one_point():
    """All data at mu: v(x, t) = (x - mu) / t is constant along its trajectories, so that Eq. 16 is
    exact and the loss of Eq. 17 is zero. The loss of another field is not."""
    mu = 0.4

    def exact(x, t, y):
        return (x - mu) / t.view(-1, 1, 1, 1)

    def other(x, t, y):
        return exact(x, t, y) + x

    g = torch.Generator().manual_seed(0)
    noise = torch.randn(6, 1, 4, 4, dtype=torch.float64, generator=g)
    s = torch.linspace(0.2, 1, 6, dtype=torch.float64)
    b = {"schedule": make_schedule("interpolant"), "x0": torch.full_like(noise, mu), "y": None,
         "s": s, "t": s - 0.1, "noise": noise, "lam": 1.0, "prediction": "velocity"}
    loss, aux = ssd.ssd_loss(exact, exact, **b)
    assert loss < 1e-25
    assert ssd.ssd_loss(exact, other, **b)[0] > 0.1
    line = mu + (s - 0.1).view(-1, 1, 1, 1) * (noise - mu)
    torch.testing.assert_close(aux["x_t"], line)  # Euler's step lands on it


def test_student_learns_what_dpm_solver_2_knows():
    """Gaussian data: the target of Eq. 5, taken as the prediction at x_s, carries ten steps nearer
    to the exact solution than DDIM. lam = 1 (Eq. 10) carries them farther."""
    s = make_schedule("linear")
    g = torch.Generator().manual_seed(0)
    x = torch.randn(8, 1, 2, 2, dtype=torch.float64, generator=g)
    net = Gaussian(s)
    grid = make_grid("dit", 10)

    def error(lam):
        z = x
        for t, u in zip(grid[:-2], grid[1:-1]):
            eps = net(z, t, None)
            eps_u = net(ddim_step(s, z, eps, t, u), u, None)
            z = ddim_step(s, z, torch.lerp(eps, eps_u, lam), t, u)
        return float((z - net.exact(x, 999, 0)).abs().max())

    assert error(0.3) < 0.5 * error(0.0) < 0.5 * error(1.0)


# ---- Prompts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["labels", "prompts"])
def test_both_predictions_of_guidance_are_matched(kind):
    b = pair_batch()
    y = b.pop("y")
    null = torch.tensor([10])
    if kind == "prompts":
        y = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(1))
        null = torch.zeros(1, 3, 5)
    lam = 0.3
    cfg = torch.tensor([5.0, 7.5, 10.0, 15.0])
    teacher = Scale(0.5, d=0.1)
    student = Scale(0.6, d=0.2)

    nothing = null.expand_as(y)
    x_s = add_noise(b["schedule"], b["x0"], b["noise"], b["s"])
    cond = teacher.prediction(x_s, b["s"], y)
    uncond = teacher.prediction(x_s, b["s"], nothing)
    guided = uncond + cfg.view(-1, 1, 1, 1) * (cond - uncond)
    x_t = ddim_step(b["schedule"], x_s, guided, b["s"], b["t"])
    want = 0
    for c, eps_s in ((y, cond), (nothing, uncond)):
        target = lam * teacher.prediction(x_t, b["t"], c) + (1 - lam) * eps_s
        want = want + (target - student.prediction(x_s, b["s"], c)).square().mean()

    loss, aux = ssd.ssd_text_loss(student, teacher, y=y, null=null, lam=lam, cfg=cfg, **b)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(aux["x_t"], x_t)
    assert ssd.ssd_text_loss(teacher, teacher, y=y, null=null, lam=0.0, cfg=cfg, **b)[0] == 0


# ---- Settings ----------------------------------------------------------------------------------


def chosen(*words):
    """The arguments with all defaults filled in."""
    args = ssd.parser().parse_args(words)
    ssd.apply_ssd_defaults(args, describe_base(args))
    return args


def test_presets_are_the_papers():
    a = chosen("--model", "DiT-XL/2", "--nfe", "50", "--image-size", "512")
    assert (a.lam, a.lr, a.batch_size, a.steps) == (0.30, 5e-6, 64, 8007)
    assert (a.cfg, a.data, a.interval) == (1.5, "synthetic:50", None)
    a = chosen("--model", "SiT-XL/2-REPA", "--nfe", "10")
    assert (a.lam, a.lr, a.cfg, a.interval, a.teacher) == (1.0, 5e-6, 1.8, None, "fixed")
    a = chosen("--model", "SiT-XL/2-REPA", "--nfe", "250")
    assert (a.lam, a.interval, a.teacher) == (1.0, 0.005, "ema")
    a = chosen("--model", "SiT-XL/2-REPA", "--nfe", "10", "--interval", "0.1")
    assert a.teacher == "fixed"
    assert chosen("--model", "SiT-XL/2-REPA", "--nfe", "200").teacher == "ema"
    a = chosen("--model", "SD-v1.5", "--data", "somewhere.npz")
    assert (a.lam, a.lr, a.batch_size, a.steps) == (0.30, 1e-6, 96, 4000)
    assert (a.cfg, a.text_cfg) == (7.5, [5.0, 15.0])
