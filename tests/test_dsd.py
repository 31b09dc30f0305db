"""DSD: closed forms, then the command with tiny sizes."""
import itertools
import re
import signal
from collections import Counter

import pytest
import torch
from conftest import ROOT, checkpoint, inside, losses, torchrun, weights
from test_runs import same, start_and_signal

import checkpoints
import ddil
import dsd
import models
import runtime
import train
from runtime import Processes, StepRandom
from solvers import add_noise, ddim_invert, ddim_step, guide, make_grid, make_schedule, sample

SCHEDULE = make_schedule("linear")
GRID = make_grid("uniform", 16)


class Toy(torch.nn.Module):
    """A small net(z, t, y) in float64, smooth in all its inputs, that counts its evaluations."""

    num_classes = 10

    def __init__(self, *p):
        super().__init__()
        self.p, self.calls = torch.nn.Parameter(torch.tensor(p or (0.6, -0.5, 0.3), dtype=torch.float64)), []

    def forward(self, z, t, y):
        self.calls.append((len(z), torch.is_grad_enabled()))
        a, b, c = self.p
        shape = lambda v: v.view(-1, 1, 1, 1).to(z.dtype)
        return torch.tanh(a * z + b * z.flip(-1)) + c * shape(t / 1000) + 0.1 * shape(y)


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    return torch.randn(6, 1, 4, 4, generator=g, dtype=torch.float64), torch.randint(0, 10, (6,), generator=g)


def nodes(k):
    return [torch.full((6,), GRID[2 * k + n]) for n in range(3)]


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("k", [0, 3, 7])
def test_algorithm_2_as_printed(batch, prediction, k):
    """x', x'' and the loss from the states of two DDIM steps, each by its own formula; the way goes on from z_t''."""
    (z, y), net, (t, mid, u) = batch, Toy(), nodes(k)
    loss, z2 = dsd.dsd_loss(net, SCHEDULE, z, t, mid, u, y, prediction=prediction)
    with torch.no_grad():
        states = sample(net, z, y, SCHEDULE, [int(v[0]) for v in (t, mid, u)], prediction, keep=True)
    torch.testing.assert_close(z2, states[2], rtol=1e-10, atol=1e-10)
    x1, x2 = (ddim_invert(SCHEDULE, z, s, t, v) for s, v in zip(states[1:], (mid, u)))
    torch.testing.assert_close(x1, dsd.predict(net, SCHEDULE, z, t, y, None, prediction).detach(), rtol=1e-8, atol=1e-8)  # a DDIM step inverts exactly
    torch.testing.assert_close(ddim_step(SCHEDULE, z, x2, t, u, "x0"), z2, rtol=1e-8, atol=1e-8)
    alpha, sigma = SCHEDULE.at(t, z)
    by_hand = torch.maximum((x1 - x2).square().mean((1, 2, 3)), ((z - alpha * x1) / sigma - (z - alpha * x2) / sigma).square().mean((1, 2, 3)))
    assert loss.item() == pytest.approx(float(by_hand.mean()), rel=1e-8) and loss.item() > 0 and not z2.requires_grad


def test_the_gradient_flows_through_the_first_step_alone(batch):
    (z, y), (t, mid, u) = batch, nodes(3)
    first, second = Toy(), Toy()
    turn = itertools.cycle((first, second))
    loss, _ = dsd.dsd_loss(lambda *a: next(turn)(*a), SCHEDULE, z, t, mid, u, y)
    loss.backward()
    assert second.p.grad is None and float(first.p.grad.abs().min()) > 0
    net = Toy()
    dsd.dsd_loss(net, SCHEDULE, z, t, mid, u, y)[0].backward()
    torch.testing.assert_close(net.p.grad, first.p.grad)
    goal, _ = dsd.two_steps(net, SCHEDULE, z, dsd.predict(net, SCHEDULE, z, t, y), t, mid, u, y)  # a constant that the prediction runs after
    alpha, sigma = SCHEDULE.at(t, z)
    direct = ((alpha / sigma).square().clamp(min=1) * (dsd.predict(net, SCHEDULE, z, t, y) - goal).square()).mean()
    torch.testing.assert_close(torch.autograd.grad(direct, net.p)[0], net.p.grad)


def test_two_evaluations_an_update_three_with_a_teacher(batch):
    """Guided ones count as one, of twice as many rows."""
    (z, y), net, teacher, (t, mid, u) = batch, Toy(), Toy(0.5, 0.2, 0.1), nodes(2)
    w = torch.linspace(1, 3, 6, dtype=torch.float64)
    for scale, rows in ((None, 6), (w, 12)):
        for teach in (None, teacher):
            net.calls.clear(), teacher.calls.clear()
            dsd.dsd_loss(net, SCHEDULE, z, t, mid, u, y, scale, teacher=teach)
            assert net.calls == [(rows, True)] + [(rows, False)] * (teach is None) and teacher.calls == [(rows, False)] * 2 * (teach is not None)
    net.calls.clear(), teacher.calls.clear()  # progressive distillation
    ddil.pd_loss(net, SCHEDULE, z, (y,), t, ddil.pd_target(teacher, SCHEDULE, z, (y,), t, mid, u))
    assert len(net.calls + teacher.calls) == 3


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_two_targets_differ_by_a_factor(batch, prediction):
    """x'' - x' = (1 - rho) (x_theta(z_t') - x'): the gradient by 1 - rho, the loss by (1 - rho)^2."""
    z, y = batch
    for k in (0, 4, 7):
        net, (t, mid, u) = Toy(), nodes(k)
        r = [float(SCHEDULE.alpha[v[0]] / SCHEDULE.sigma[v[0]]) if v[0] >= 0 else float("inf") for v in (t, mid, u)]
        rho = (r[1] - r[0]) / (r[2] - r[0])
        x1 = dsd.predict(net, SCHEDULE, z, t, y, None, prediction).detach()
        goals = [dsd.two_steps(net, SCHEDULE, z, x1, t, mid, u, y, None, prediction, target)[0] for target in ("pd", "next")]
        torch.testing.assert_close(goals[0] - x1, (1 - rho) * (goals[1] - x1), rtol=1e-7, atol=1e-9)
        loss = [dsd.dsd_loss(net, SCHEDULE, z, t, mid, u, y, None, prediction, target)[0] for target in ("pd", "next")]
        gradient = [torch.autograd.grad(l, net.p)[0] for l in loss]
        assert float(loss[0] / loss[1]) == pytest.approx((1 - rho) ** 2, rel=1e-7)
        torch.testing.assert_close(gradient[0], (1 - rho) * gradient[1], rtol=1e-7, atol=0)
        assert (rho == 0) == (k == 7) and 0 <= rho < 0.5


def test_a_model_that_knows_its_one_datum_has_nothing_to_learn(batch):
    """The exact denoiser of one point predicts it everywhere; that of N(0, c^2) does not, and with a student that met the target one step is the two."""
    (z, y), point = batch, torch.randn(1, 1, 4, 4, dtype=torch.float64)
    for k in (0, 5):
        t, mid, u = nodes(k)
        assert float(dsd.dsd_loss(lambda z, t, y: point.expand_as(z), SCHEDULE, z, t, mid, u, y, None, "x0")[0]) < 1e-24
    c = 0.5

    def exact(z, t, y):
        alpha, sigma = SCHEDULE.at(t, z)
        return alpha * c ** 2 / (alpha ** 2 * c ** 2 + sigma ** 2) * z
    t, mid, u = nodes(5)
    loss, z2 = dsd.dsd_loss(exact, SCHEDULE, z, t, mid, u, y, None, "x0")
    assert float(loss) > 1e-6
    goal, _ = dsd.two_steps(exact, SCHEDULE, z, exact(z, t, y), t, mid, u, y, None, "x0")
    torch.testing.assert_close(ddim_step(SCHEDULE, z, goal, t, u, "x0"), z2)
    assert float(goal.norm() / exact(z, t, y).norm()) > 1  # towards the exact flow, along which these samples shrink less: one step undershoots
    flow = lambda v: (SCHEDULE.at(v, z)[0] ** 2 * c ** 2 + SCHEDULE.at(v, z)[1] ** 2).sqrt()
    truth, one = z * flow(u) / flow(t), ddim_step(SCHEDULE, z, exact(z, t, y), t, u, "x0")
    assert float((z2 - truth).norm()) < 0.6 * float((one - truth).norm())


def test_with_a_teacher_of_the_same_weights_the_loss_is_the_same(batch):
    (z, y), (t, mid, u) = batch, nodes(1)
    for w in (None, torch.linspace(1, 3, 6, dtype=torch.float64)):
        own, taught = (dsd.dsd_loss(Toy(), SCHEDULE, z, t, mid, u, y, w, teacher=teacher) for teacher in (None, Toy()))
        assert torch.equal(own[0], taught[0]) and torch.equal(own[1], taught[1])
    other = dsd.dsd_loss(Toy(), SCHEDULE, z, t, mid, u, y, teacher=Toy(0.5, 0.2, 0.1))  # the way is the teacher's own
    assert torch.equal(other[1], dsd.dsd_loss(Toy(0.5, 0.2, 0.1), SCHEDULE, z, t, mid, u, y)[1])


def test_a_scale_of_guidance_for_each_sample(batch, tiny):
    (z, y), net, t = batch, Toy(), torch.full((6,), 500)
    each = guide(net, torch.tensor([1.0, 1.5, 1.5, 3.0, 3.0, 3.0]))(z, t, y)
    for w, rows in ((1.0, [0]), (1.5, [1, 2]), (3.0, [3, 4, 5])):
        torch.testing.assert_close(each[rows], guide(net, w)(z, t, y)[rows])
    one = models.fill_random(models.with_guidance(tiny))  # a network that takes the scale
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(guide(one, torch.tensor([1.5, 1.5]))(x, t[:2], y[:2]), guide(one, 1.5)(x, t[:2], y[:2]))


@pytest.mark.parametrize("P, dsdi, dsdgl, gexp", [(5000, (828, 840), (138, 176), (126, 377)), (4000, (656, 672), (104, 144), (93, 302))])
def test_allocation_of_updates(P, dsdi, dsdgl, gexp):
    for variant, depths, span in (("dsdi", [64, 32, 16, 8, 4, 2], dsdi), ("tsd", [64, 32, 16, 8, 4, 2], dsdi), ("dsdgl", list(range(64, 0, -2)), dsdgl),
                                  ("dsdgexp", list(range(64, 0, -2)), gexp)):
        where = dsd.allocate(variant, 64, P)
        count = Counter(n for n, _ in where)
        assert len(where) == P and list(count) == depths and (min(count.values()), max(count.values())) == span
        assert all(updates % (n // 2) == 0 for n, updates in count.items())  # whole trajectories
        assert [k for n, k in where if n == 8] == [0, 1, 2, 3] * (count[8] // 4)
        if variant == "dsdgexp":
            assert count[2] == max(count.values()) and count[2] / count[64] == pytest.approx(2.7, rel=0.15)
    where = dsd.allocate("dsdn", 64, P)
    assert len(where) == P and {n for n, _ in where} == {64} and -(-P // 32) == {5000: 157, 4000: 125}[P]
    assert where[-1] == ((64, 7) if P == 5000 else (64, 31))  # within the 157th trajectory; at the end of the 125th


def test_learning_rate():
    rates = [dsd.rate(n, 4000) for n in range(4000)]
    assert rates[0] == 1 / 200 and rates[199] == rates[200] == max(rates) == 1 and rates[-1] == pytest.approx(0.1, abs=1e-5)
    assert all(b <= a for a, b in zip(rates[200:], rates[201:])) and dsd.rate(0, 1) == 1


def test_equation_1(batch):
    """alpha alone is the ordinary loss; beta alone that of Algorithm 2 without its weight; one evaluation more than the former."""
    (x0, y), noise, net = batch, torch.randn(6, 1, 4, 4, dtype=torch.float64), Toy()
    t = torch.tensor([999, 700, 400, 100, 9, 3])
    plain = train.diffusion_loss(net, SCHEDULE, x0, y, t, noise, "v")[0]
    net.calls.clear()
    loss, terms = dsd.training_loss(net, SCHEDULE, x0, y, t, noise)
    assert net.calls == [(6, True), (6, False)]
    assert torch.equal(terms["plain"], plain.detach()) and float(loss) == pytest.approx(0.85 * float(terms["plain"]) + 0.15 * float(terms["own"]))
    z = add_noise(SCHEDULE, x0, noise, t)
    x1 = dsd.predict(net, SCHEDULE, z, t, y, None, "v").detach()
    mid, u = torch.tensor([991, 692, 392, 92, 1, 0]), torch.tensor([983, 684, 384, 84, -1, -1])  # 1000 / 128 = 8 apart, but never below 0 and clean
    goal, _ = dsd.two_steps(net, SCHEDULE, z, x1, t, mid, u, y, None, "v")
    assert float(terms["own"]) == pytest.approx(float((x1 - goal).square().mean()), rel=1e-9) and float(terms["own"]) > 0
    a = torch.autograd.grad(dsd.training_loss(net, SCHEDULE, x0, y, t, noise, alpha=1, beta=0)[0], net.p)[0]
    assert torch.equal(a, torch.autograd.grad(train.diffusion_loss(net, SCHEDULE, x0, y, t, noise, "v")[0], net.p)[0])


def test_method_block_stands_alone(batch):
    text = (ROOT / "dsd.py").read_text()
    block = text.split("# ---- Method ")[1].split("\n", 1)[1].split("# ---- Training")[0]
    names = re.search(r"^from solvers import (.*)$", text, re.M)[1].replace(" ", "").split(",")
    import solvers
    space = {"torch": torch, **{n: getattr(solvers, n) for n in names}}
    exec(block, space)
    (z, y), (t, mid, u) = batch, nodes(3)
    assert torch.equal(space["dsd_loss"](Toy(), SCHEDULE, z, t, mid, u, y)[0], dsd.dsd_loss(Toy(), SCHEDULE, z, t, mid, u, y)[0])


# The command. 12 updates from 4 steps: dsdi makes 3 trajectories of 2 updates, then 6 of one; dsdn six of 4 steps.


def words(base, out, *more):
    return ["dsd.py", "--ckpt", base, "--depth", 4, "--steps", 12, "--batch-size", 8, "--lr", 1e-3, "--ema", 0.5, "--eval-samples", 0, "--log-every", 1, "--save-every", 3,
            "--out", out, *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, ckpt):
    out = tmp_path_factory.mktemp("whole")
    inside(*words(ckpt, out, "--variant", "dsdn", "--depth", 8, "--w", 1, 3))
    return out


def stopped(monkeypatch, out, step, *command):
    """Run until a signal is seen after this step, as it would be; returns the checkpoint."""
    monkeypatch.setattr(runtime.Stop, "after", lambda self, done: (done == step, done == step))
    with pytest.raises(SystemExit):
        inside(*command)
    monkeypatch.undo()
    return torch.load(out / "last.pt", weights_only=True)


def test_resume_in_the_middle_of_a_trajectory(tmp_path, ckpt, whole, monkeypatch):
    """Saved within a trajectory of four updates: the state goes on from where it was, under the same labels and guidance."""
    again = words(ckpt, tmp_path, "--variant", "dsdn", "--depth", 8, "--w", 1, 3)
    stopped(monkeypatch, tmp_path, 6, *again)
    start_and_signal(again, tmp_path, 8, signal.SIGKILL)
    inside(*again)
    a, b = (torch.load(f / "last.pt", weights_only=True) for f in (tmp_path, whole))
    assert same(a["model"], b["model"]) and same(a["ema"], b["ema"]) and torch.equal(a["z"], b["z"]) and losses(tmp_path) == losses(whole) and min(losses(whole)) > 0
    start = torch.load(ckpt, weights_only=True)["model"]
    assert all(max(float((b[part][k] - start[k]).abs().max()) for k in start) > 1e-3 for part in ("model", "ema")) and not same(b["model"], b["ema"])
    group, = b["opt"]["param_groups"]
    assert group["lr"] == pytest.approx(1e-3 * dsd.rate(11, 12)) and list(group["betas"]) == [0.9, 0.98]


@pytest.mark.parametrize("w, velocity", [((1, 1), False), ((1, 3), False), ((1, 3), True)])
def test_the_trajectory_is_that_of_the_sampler(tmp_path, tiny, monkeypatch, w, velocity):
    """With next to no learning rate the states are those of sample() from the same noise, labels and scales, on the grid of that depth."""
    arch = {**tiny.arch, "learn_sigma": not velocity}
    net, flow = models.fill_random(models.build(arch)), dict(prediction="velocity", schedule="interpolant") if velocity else {}
    torch.save(checkpoint(net, **flow), tmp_path / "base.pt")
    command = words(tmp_path / "base.pt", tmp_path / "out", "--variant", "dsdn", "--depth", 8, "--steps", 8, "--lr", 1e-12, "--w", *w)
    state = stopped(monkeypatch, tmp_path / "out", 7, *command)  # the third update of the second trajectory: six of eight steps
    rng = StepRandom(Processes("off"), 0, 4, 8)
    noise, y = rng.normal((1, 8, 8)), rng.integers(0, 10)
    scale = w[0] + (w[1] - w[0]) * rng.uniform()
    schedule = make_schedule("interpolant" if velocity else "linear")
    grid = make_grid("sit" if velocity else "uniform", 8)
    want = sample(guide(net.eval(), scale) if w[1] > 1 else net, noise, y, schedule, grid, "velocity" if velocity else "eps", keep=True)[6]
    assert len(y.unique()) > 3 and (state["z"] - want).abs().max() < 1e-5 * want.abs().max()


def test_flags_reach_the_loss(tmp_path, ckpt):
    """The first loss of --target next is that of --target pd over (1 - rho)^2, at the pair 999, 749, 499 of four steps."""
    first = {}
    for target in ("pd", "next"):
        inside(*words(ckpt, tmp_path / target, "--variant", "dsdn", "--steps", 2, "--target", target))
        first[target] = losses(tmp_path / target)[0]
    r = [float(SCHEDULE.alpha[t] / SCHEDULE.sigma[t]) for t in (999, 749, 499)]
    assert first["pd"] / first["next"] == pytest.approx((1 - (r[1] - r[0]) / (r[2] - r[0])) ** 2, rel=1e-3)


def test_two_processes_agree_with_one(tmp_path, ckpt, whole):
    torchrun(2, *words(ckpt, tmp_path, "--variant", "dsdn", "--depth", 8, "--w", 1, 3))
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-4, abs=1e-8)  # the smallest is 1e-8, of differences of 1e-4
    a, b = (torch.load(f / "last.pt", weights_only=True) for f in (tmp_path, whole))
    assert all((a["model"][k] - b["model"][k]).abs().max() < 1e-4 for k in a["model"]) and (a["z"] - b["z"]).abs().max() < 1e-3


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("stop", [4, 6, 9])  # in the middle of the first depth; where the student is about to become the teacher; later
def test_tsd_resumes(tmp_path, ckpt, stop, amp, monkeypatch):
    whole, part, more = tmp_path / "whole", tmp_path / "part", ("--variant", "tsd", "--amp", amp)
    inside(*words(ckpt, whole, *more))
    state = stopped(monkeypatch, part, stop, *words(ckpt, part, *more))
    base = torch.load(ckpt, weights_only=True)["model"]
    stored = lambda sd: {k: v.bfloat16() if state["teacher"][k].dtype == torch.bfloat16 else v for k, v in sd.items()}
    assert state["step"] == stop and same(state["teacher"], stored(base)) == (stop <= 6) and (amp == "bf16") == any(v.dtype == torch.bfloat16 for v in state["teacher"].values())
    inside(*words(ckpt, part, *more))
    assert same(weights(part), weights(whole)) and losses(part) == losses(whole) and min(losses(whole)) > 0
    if stop == 6:  # the teacher of the second depth is the student, not its average, as it was when the first ended
        end = torch.load(whole / "last.pt", weights_only=True)["teacher"]
        assert same(end, stored(state["model"])) and not same(end, stored(state["ema"]))
    inside(*words(ckpt, tmp_path / "dsdi", "--variant", "dsdi", "--amp", amp))
    assert losses(tmp_path / "dsdi")[0] == losses(whole)[0] and losses(tmp_path / "dsdi")[1:] != losses(whole)[1:]  # bit for bit the same at first


def test_the_student_is_sampled_as_it_was_trained(tmp_path, ckpt, whole):
    """On uniform nodes, however many; issd.py takes it as it is."""
    net, info = checkpoints.load_model(whole / "last.pt")
    assert (info["grid"], info["nfe"], info["method"]) == ("uniform", 4, "dsdn") and same(net.state_dict(), torch.load(whole / "last.pt", weights_only=True)["ema"])
    for nfe in (None, 2):
        inside("sample.py", "--ckpt", whole / "last.pt", "--num-samples", 3, "--out", tmp_path / "x.png", *(("--nfe", nfe) if nfe else ()))
    import data
    grids = []
    original, data.solver_grid = data.solver_grid, lambda *a: grids.append(original(*a)) or grids[-1]
    try:
        for nfe in (None, 2, 5):
            data.sample_images(Processes("off").mixed(net), info, Processes("off"), 2, 0, nfe)
    finally:
        data.solver_grid = original
    assert grids == [make_grid("uniform", n) for n in (4, 2, 5)]
    done = inside("issd.py", "--ckpt", whole / "last.pt", "--nfe", 6, "--steps", 2, "--batch-size", 4, "--eval-samples", 0, "--out", tmp_path / "issd", "--data", "digits")
    assert "is ready" in done and checkpoints.load_model(tmp_path / "issd" / "last.pt")[1]["grid"] == make_grid("uniform", 6)


def test_latent_diffusion_unet_on_one_and_two_processes(tmp_path):
    """With classes, guided, and two processes with TSD; and without classes."""
    arch = dict(net="UNet", input_size=8, in_channels=3, model_channels=32, num_res_blocks=1, channel_mult=[1, 2], attention_resolutions=[2], num_heads=1)
    total = lambda u, v: sum(float((u[k] - v[k]).abs().sum()) for k in u)
    for classes, more in ((10, ("--variant", "tsd", "--w", 1, 3)), (0, ())):
        net = models.fill_random(models.build({**arch, "num_classes": classes, **(dict(context="class", context_dim=12) if classes else {})}))
        ckpt, out = tmp_path / f"{classes}.pt", [tmp_path / f"{classes}-{n}" for n in (1, 2)]
        torch.save(checkpoint(net, name="LDM-ImageNet", schedule="ldm", scale=1.0, classes=classes, cfg=1.5), ckpt)
        inside(*words(ckpt, out[0], "--batch-size", 4, "--steps", 6, *more))
        assert min(losses(out[0])) > 0 and total(weights(out[0]), net.state_dict()) > 0.1
        inside("sample.py", "--ckpt", out[0] / "last.pt", "--num-samples", 2, "--out", tmp_path / "x.npz")
        if classes:
            torchrun(2, *words(ckpt, out[1], "--batch-size", 4, "--steps", 6, *more))
            assert total(weights(out[0]), weights(out[1])) < 1e-3 * total(weights(out[0]), net.state_dict())
            assert losses(out[0]) == pytest.approx(losses(out[1]), rel=1e-4)


def test_a_velocity_model_distils_itself(tmp_path, tiny):
    torch.save(checkpoint(tiny, prediction="velocity", schedule="interpolant"), tmp_path / "flow.pt")
    inside(*words(tmp_path / "flow.pt", tmp_path / "out", "--variant", "tsd", "--w", 1, 2))
    assert min(losses(tmp_path / "out")) > 0 and checkpoints.load_model(tmp_path / "out" / "last.pt")[1]["grid"] is None


def test_presets_are_table_3():
    def chosen(*words):
        args = dsd.parser().parse_args([str(w) for w in words])
        return args, dsd.fill_defaults(args, train.describe_base(args), SCHEDULE)
    for name, row in (("LDM-ImageNet", (5000, 1e-7, [0.99, 0.999], 0.9995)), ("LDM-CelebAHQ", (4000, 1e-6, [0.9, 0.98], 0.995)), ("LDM-Bedroom", (4000, 1e-6, [0.9, 0.98], 0.995))):
        args, where = chosen("--model", name)
        assert (args.steps, args.lr, args.betas, args.ema) == row and (args.depth, args.w, len(where), where[0]) == (64, [1, 3], row[0], (64, 0))
    plan = inside("dsd.py", "--model", "LDM-ImageNet", "--variant", "dsdi", "--dry-run")
    assert "401.4M" in plan and "64: 832, 32: 832, 16: 840, 8: 828, 4: 834, 2: 834" in plan and "lr 1e-07 -> 1e-08" in plan and "8 forward units" in plan
    assert "4 forward units" in inside("dsd.py", "--model", "LDM-Bedroom", "--image-size", 128, "--dry-run")
    assert "10 forward units" in inside("dsd.py", "--model", "LDM-ImageNet", "--variant", "tsd", "--dry-run")


def test_from_scratch(tmp_path, monkeypatch):
    """Eq. 1 trains, resumes exactly, takes the same batches as its control, and says 4 units a step."""
    command = ["dsd.py", "--from-scratch", "--steps", 8, "--batch-size", 8, "--eval-samples", 4, "--nfe", 4, "--log-every", 1, "--save-every", 3]
    inside(*command, "--out", tmp_path / "a")
    assert "4 forward units" in inside(*command, "--out", tmp_path / "x", "--dry-run")
    stopped(monkeypatch, tmp_path / "b", 4, *command, "--out", tmp_path / "b")
    out = inside(*command, "--out", tmp_path / "b")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b")) and losses(tmp_path / "a") == losses(tmp_path / "b") and "plain training" in out
    _, info = checkpoints.load_model(tmp_path / "a" / "last.pt")
    assert (info["prediction"], info["method"]) == ("v", "dsd-scratch") and losses(tmp_path / "a") != losses(tmp_path / "a" / "plain")
    assert inside(*command, "--out", tmp_path / "b") in out
    for flag, value in (("--depth", 8), ("--target", "next")):
        inside(*command, flag, value, "--out", tmp_path / flag, "--eval-samples", 0)
        assert losses(tmp_path / flag)[0] > losses(tmp_path / "a")[0]
    inside(*command, "--mix", 1, 0, "--out", tmp_path / "c", "--eval-samples", 0)
    assert same(weights(tmp_path / "c"), weights(tmp_path / "a" / "plain")) and losses(tmp_path / "c") == losses(tmp_path / "a" / "plain")  # without beta it is train.py


def test_the_table_of_the_digits(tmp_path, ckpt, monkeypatch):
    """Every row is of its own network, at its own number of steps, on uniform nodes."""
    asked, measure = {}, train.measure
    monkeypatch.setattr(train, "measure", lambda args, proc, method, seconds, entries: asked.update(entries) or measure(args, proc, method, seconds, entries))
    command = ["dsd.py", "--ckpt", ckpt, "--steps", 12, "--depth", 4, "--batch-size", 8, "--lr", 1e-3, "--eval-samples", 12, "--out", tmp_path]
    out = inside(*command)
    files = {"before": ckpt, "after": tmp_path / "last.pt", "continued training": tmp_path / "continued" / "last.pt"}
    assert set(asked) == {name + more for name in files for more in ("", ", 2 steps", ", 8 steps")}
    for name, (net, info, nfe, cfg) in asked.items():
        stem, _, steps = name.partition(", ")
        assert same(net.net.state_dict(), torch.load(files[stem], weights_only=True)["ema"]) and (info["grid"], nfe, cfg) == ("uniform", int(steps.split()[0]) if steps else 4, 1.0)
    import json
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["nfe"] == 4 and metrics["before"]["fd"] > 0 and set(metrics["controls"]) == set(asked) - {"before", "after"}
    assert (tmp_path / "samples.png").exists() and inside(*command) in out
