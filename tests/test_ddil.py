"""DDIL and what it stands on: closed forms, then the command with tiny sizes."""
import re
import signal

import pytest
import torch
from conftest import ROOT, checkpoint, losses, inside, torchrun, weights
from test_runs import same, start_and_signal

import checkpoints
import data
import ddil
import models
from runtime import Processes, StepRandom, UserError
from solvers import PROJECTIONS, add_noise, ddim_step, halve_grid, lcm_grid, make_grid, make_schedule, mixed_rollout, renoise, sample, to_x0_eps, walk

SCHEDULE = make_schedule("linear")


class Toy:
    """A small net(z, t, y, w) in float64 with a few parameters, smooth in all its inputs."""

    num_classes, guidance = 10, False

    def __init__(self, *p):
        self.p = torch.tensor(p, dtype=torch.float64, requires_grad=True)

    def __call__(self, z, t, y, w=None):
        a, b, c = self.p
        shape = lambda v: v.view(-1, 1, 1, 1).to(z.dtype)
        return torch.tanh(a * z + b * z.flip(-1)) + c * shape(t / 1000) + 0.1 * shape(y) + (0 if w is None else 0.05 * shape(w))


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    return torch.randn(6, 1, 4, 4, generator=g, dtype=torch.float64), torch.randint(0, 10, (6,), generator=g)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("project", ["off", "clamp"])
def test_one_step_with_the_target_is_the_teachers_two(batch, prediction, project):
    z, y = batch
    grid, teacher, project = make_grid("uniform", 16), Toy(0.6, -0.5, 0.3), PROJECTIONS[project]
    for i in (0, 3, 7):
        t, mid, u = (torch.full((6,), grid[2 * i + n]) for n in range(3))
        target = ddil.pd_target(teacher, SCHEDULE, z, (y,), t, mid, u, prediction, project)
        two = walk(teacher, SCHEDULE, grid, (y,), prediction, project)(z, slice(None), grid[2 * i], grid[2 * i + 2])
        assert (ddim_step(SCHEDULE, z, target, t, u, "x0") - two).abs().max() < 1e-10
        assert not target.requires_grad
        # a student that gives this target has no loss; another one has Eq. 1, which is also max(|dx|^2, |deps|^2)
        alpha, sigma = SCHEDULE.at(t, z)
        for weight in ("snr", "output"):
            assert ddil.pd_loss(lambda *_: target, SCHEDULE, z, (y,), t, target, "x0", weight) < 1e-25
        other = target + torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=z.dtype)
        eps = lambda x0: (z - alpha * x0) / sigma
        want = torch.maximum((other - target).square().mean((1, 2, 3)), (eps(other) - eps(target)).square().mean((1, 2, 3))).mean()
        assert ddil.pd_loss(lambda *_: other, SCHEDULE, z, (y,), t, target, "x0") == pytest.approx(float(want), rel=1e-9)


def test_eps_students_and_eq_1():
    """At t = 999 an error of eps weighs 1 / SNR = 24,900 in Eq. 1; as outputs all timesteps weigh the same."""
    z, y, t = torch.randn(2, 1, 4, 4, dtype=torch.float64), torch.zeros(2, dtype=torch.long), torch.tensor([999, 999])
    x0, eps = to_x0_eps(SCHEDULE, z, torch.zeros_like(z), t)
    loss = lambda weight: float(ddil.pd_loss(lambda *_: torch.full_like(z, 0.1), SCHEDULE, z, (y,), t, x0, "eps", weight))
    assert loss("output") == pytest.approx(0.01) and loss("snr") == pytest.approx(0.01 * float((SCHEDULE.sigma[999] / SCHEDULE.alpha[999]) ** 2), rel=1e-9)
    assert 24_000 < loss("snr") / loss("output") < 25_000


def test_rollouts_of_one_model_alone(batch):
    """Student probability 0 and 1: bit for bit the teacher's and the student's own chains."""
    z, y = batch
    grid = make_grid("uniform", 8)
    nodes, student, teacher = halve_grid(grid), Toy(0.5, 0.2, 0.1), Toy(0.6, -0.5, 0.3)
    ways = walk(student, SCHEDULE, nodes, (y,), "v"), walk(teacher, SCHEDULE, grid, (y,), "v")
    pure = [mixed_rollout(*ways, z, nodes, lambda i: torch.full((6,), bool(who))) for who in (0, 1)]
    chain = lambda net, grid: sample(net, z, y, SCHEDULE, grid, "v", keep=True)
    assert all(torch.equal(a, b) for a, b in zip(pure[0], chain(teacher, grid)[::2]))
    assert all(torch.equal(a, b) for a, b in zip(pure[1], chain(student, nodes)))
    half = mixed_rollout(*ways, z, nodes, lambda i: torch.arange(6) % 2 == 0)  # and every row goes its own way
    assert all(torch.allclose(h[::2], s[::2]) and torch.allclose(h[1::2], t[1::2]) for h, s, t in zip(half, pure[1], pure[0]))
    assert not torch.allclose(pure[0][-1], pure[1][-1])
    # LCM's student: the x0 it predicts, noised anew, is the lcm solver
    fresh = {t: torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(t), dtype=torch.float64) for t in nodes[1:-1] + nodes[:1]}
    drawn = iter([fresh[t] for t in nodes[:-1]])
    rolled = [z]
    for t, u in zip(nodes[:-1], nodes[1:]):
        rolled.append(renoise(student, SCHEDULE, fresh, (y,), "v")(rolled[-1], slice(None), t, u))
    assert all(torch.allclose(a, b) for a, b in zip(rolled, sample(student, z, y, SCHEDULE, nodes, "v", keep=True, solver="lcm", noise=lambda x: next(drawn))))


@pytest.mark.parametrize("beta", [0.15, 0.8])
def test_the_mixture_is_the_prior(beta):
    """20,000 transitions: who made the last one, and whether the student was ever at work before (methods.md's table, its rows by state)."""
    rng, n = StepRandom(Processes("off"), 0, 1, 2500), 8
    trail = mixed_rollout(lambda x, rows, t, u: x * 10 + 1, lambda x, rows, t, u: x * 10, torch.zeros(2500, dtype=torch.float64), list(range(n, -1, -1)), lambda i: rng.uniform() < beta)
    last = torch.stack(trail[1:]) % 10
    assert abs(float(last.mean()) - beta) < 0.02
    for j in (1, 2, 4, 7):
        assert abs(float((trail[j] > 0).double().mean()) - (1 - (1 - beta) ** j)) < 0.03


def test_share_of_aggregated_states():
    """p = 0.25 and 0.5 of 20,000 states, whose last transition was the student's with probability 0.0375 and 0.40."""
    rng = StepRandom(Processes("off"), 3, 5, 20_000)
    for p, beta, student in ((0.25, 0.15, 0.0375), (0.5, 0.8, 0.40)):
        take, coin = rng.uniform() < p, rng.uniform() < beta
        assert abs(float(take.double().mean()) - p) < 0.02 and abs(float((take & coin).double().mean()) - student) < 0.02


def test_guidance_as_an_input(tiny):
    """At first the input is ignored; then the loss asks for guided outputs, and sampling passes the scale."""
    from solvers import guide
    net, x, t, y = models.with_guidance(tiny), torch.randn(3, 1, 8, 8), torch.tensor([10, 500, 999]), torch.tensor([1, 2, 10])
    assert torch.equal(net(x, t, y, torch.tensor([1.0, 4.0, 9.0])), tiny(x, t, y)) and models.build(net.arch).guidance
    w = torch.tensor([1.0, 2.0, 4.0])
    target = ddil.guided(tiny, x, t, y, w)
    for i in range(3):
        torch.testing.assert_close(target[i:i + 1], guide(tiny, float(w[i]))(x[i:i + 1], t[i:i + 1], y[i:i + 1]), rtol=1e-4, atol=1e-6)
    assert ddil.guidance_loss(lambda *a: target, tiny, x, t, y, w) == 0 < ddil.guidance_loss(net, tiny, x, t, y, w)
    models.fill_random(net)
    sampled = guide(net, 3.0)(x, t, y)
    assert torch.equal(sampled, net(x, t, y, torch.full((3,), 3.0))) and not torch.equal(sampled, net(x, t, y, torch.ones(3)))


def test_consistency_of_one_point():
    """All data in one point m: x0 = m is the exact consistency function up to LCM's boundary, and the teacher steps along the solution."""
    m, grid = 0.3, lcm_grid(50)

    def exact(z, t, *_):  # v = alpha eps - sigma x0
        alpha, sigma = SCHEDULE.at(t, z)
        return alpha * (z - alpha * m) / sigma - sigma * m
    exact.num_classes = 10
    noise, y, w = torch.randn(49, 1, 4, 4, dtype=torch.float64), torch.zeros(49, dtype=torch.long), torch.full((49,), 2.0)
    t, u = torch.tensor(grid[:49]), torch.tensor(grid[1:50])
    z = add_noise(SCHEDULE, torch.full_like(noise, m), noise, t)
    assert (ddil.consistency(exact, SCHEDULE, z, t, (y,)) - m).abs().max() < 1e-4
    assert ddil.lcm_loss(exact, exact, exact, SCHEDULE, z, t, u, y, w) < 1e-6
    wrong = lambda z, t, *_: exact(z, t) + 0.5
    assert ddil.lcm_loss(wrong, exact, exact, SCHEDULE, z, t, u, y, w) > 0.05
    clean = ddil.lcm_loss(exact, wrong, exact, SCHEDULE, z[:1] * 0 + m, t[:1] * 0 + 19, u[:1] * 0 - 1, y[:1], w[:1])
    assert clean < 1e-2  # at the clean end the target is the point itself, whatever the network says


def test_distribution_matching_pulls_towards_the_teacher():
    """Where the critic's x0 lies below the teacher's, the sample moves up, by their difference over |x - x0 of the teacher|; equal ones do not move it."""
    at = lambda m: lambda z, t, *_: torch.full_like(z, m)
    x = torch.full((2, 1, 4, 4), 0.1, dtype=torch.float64, requires_grad=True)
    t, y, w, noise = torch.tensor([100, 700]), torch.zeros(2, dtype=torch.long), torch.ones(2), torch.randn(2, 1, 4, 4, dtype=torch.float64)
    teacher = at(0.9)
    teacher.num_classes = 10
    for m, pull in ((0.5, 0.5), (0.9, 0.0)):
        critic = lambda z, t, y: (at(m)(z, t, y), torch.zeros(len(z), dtype=z.dtype))
        loss = ddil.dmd_loss(x, critic, teacher, SCHEDULE, t, y, w, noise, "x0", gan=0.0)
        grad = torch.autograd.grad(loss, x)[0] * x.numel()
        torch.testing.assert_close(grad, torch.full_like(grad, -pull))


def test_critic(tiny):
    """Learns the score of samples only, and its head to tell them from data; the student's loss falls as samples pass for data."""
    critic = ddil.Critic(models.fill_random(models.build(tiny.arch)))
    x, y, t, noise = torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.long), torch.full((4,), 300), torch.randn(4, 1, 8, 8)
    out, logit = critic(x, t, y)
    torch.testing.assert_close(out, critic.net(x, t, y))
    assert logit.shape == (4,)
    fixed = lambda a, b: lambda z, t, y: (torch.zeros_like(z), torch.tensor([a] * 4 + [b] * 4))
    loss = lambda a, b: ddil.critic_loss(fixed(a, b), SCHEDULE, x, y, x, y, t, noise, "eps", gan=1.0) - noise.square().mean()
    assert loss(-20.0, 20.0) < 1e-6 < loss(0.0, 0.0) < loss(20.0, -20.0)
    assert loss(0.0, 0.0) == pytest.approx(2 * 0.693147, rel=1e-5)


def test_method_block_stands_alone():
    """The Method section runs with torch and what it imports from solvers."""
    text = (ROOT / "ddil.py").read_text()
    imports = re.search(r"from solvers import \((.*?)\)", text, re.S)[0]
    space = {}
    exec("import torch\nimport torch.nn as nn\nimport torch.nn.functional as F\n" + imports + text.split("# ---- Method")[1].split("\n", 1)[1].split("# ---- Training")[0], space)
    z, y, t = torch.randn(4, 1, 4, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.long), torch.full((4,), 900)
    target = space["pd_target"](Toy(0.6, -0.5, 0.3), SCHEDULE, z, (y,), t, t - 100, t - 200)
    assert space["pd_loss"](Toy(0.5, -0.5, 0.3), SCHEDULE, z, (y,), t, target) > 0


# ---- The command


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny):
    path = tmp_path_factory.mktemp("base") / "v.pt"
    torch.save(checkpoint(tiny, prediction="v"), path)
    return path


def words(base, out, *more):
    return ["ddil.py", "--ckpt", base, "--stages", "8:12", "4:12", "--batch-size", 8, "--lr", 1e-3, "--reuse", 0.3, 0.3, "--eval-samples", 0, "--log-every", 1, "--save-every", 3,
            "--out", out, *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base):
    out = tmp_path_factory.mktemp("whole")
    inside(*words(base, out))
    return out


@pytest.mark.parametrize("step", [8, 17])
def test_resume_in_the_middle_of_a_stage(tmp_path, base, whole, step):
    """Killed in either stage: weights, losses and D end bit for bit the same."""
    start_and_signal(words(base, tmp_path), tmp_path, step, signal.SIGKILL)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert len(state["buffer"]["i"]) > 0 and state["nfe"] == (4 if step == 8 else 2)
    inside(*words(base, tmp_path))
    a, b = (torch.load(f / "last.pt", weights_only=True) for f in (tmp_path, whole))
    assert same(a["model"], b["model"]) and same(a["buffer"], b["buffer"]) and losses(tmp_path) == losses(whole) and min(losses(whole)) > 0


def test_two_processes_agree_with_one_and_hold_the_same_states(tmp_path, base, whole):
    torchrun(2, *words(base, tmp_path))
    one, two = losses(whole), losses(tmp_path)
    assert len(one) == 24 and all(b == pytest.approx(a, rel=1e-3) for a, b in zip(one, two))
    a, b = (torch.load(f / "last.pt", weights_only=True) for f in (whole, tmp_path))
    assert torch.equal(a["buffer"]["i"], b["buffer"]["i"]) and torch.equal(a["buffer"]["c0"], b["buffer"]["c0"])
    assert (a["buffer"]["z"] - b["buffer"]["z"]).abs().max() < 1e-3
    start = torch.load(base, weights_only=True)["model"]
    assert max(float((a["model"][k] - start[k]).abs().max()) for k in start) > 1e-3


def test_checkpoints_say_what_they_are(tmp_path, base, whole):
    """Every stage leaves its student, with the grid it was made for; sample.py and issd.py take it as it is."""
    four, two = (checkpoints.load_model(whole / f"nfe{n}.pt")[1] for n in (4, 2))
    assert four["grid"] == halve_grid(make_grid("uniform", 8)) and two["grid"] == halve_grid(four["grid"]) == [999, 499, -1]
    assert (two["nfe"], two["prediction"], two["method"], two["threshold"], two["solver"]) == (2, "v", "ddil", "clamp", "ddim")
    assert not same(weights(whole), torch.load(whole / "nfe4.pt", weights_only=True)["model"])
    inside("sample.py", "--ckpt", whole / "nfe4.pt", "--num-samples", 3, "--out", tmp_path / "x.npz")
    done = inside("issd.py", "--ckpt", whole / "nfe4.pt", "--steps", 2, "--batch-size", 4, "--eval-samples", 0, "--out", tmp_path / "issd", "--data", "digits")
    assert "is ready" in done and checkpoints.load_model(tmp_path / "issd" / "last.pt")[1]["grid"] == four["grid"]


@pytest.mark.parametrize("objective, more", [("lcm", ()), ("dmd2", ()), ("pd", ("--stages", "w:6", "4:6"))])
def test_the_other_objectives_resume_and_sample(tmp_path, base, objective, more):
    command = lambda out: ["ddil.py", "--ckpt", base, "--objective", objective, *(more or ("--steps", 12, "--nfe", 2)), "--batch-size", 8, "--lr", 1e-3, "--reuse", 0.5, 0.5,
                           "--eval-samples", 0, "--log-every", 1, "--save-every", 4, "--out", out]
    inside(*command(tmp_path / "a"))
    start_and_signal(command(tmp_path / "b"), tmp_path / "b", 9, signal.SIGKILL)
    inside(*command(tmp_path / "b"))
    a, b = (torch.load(tmp_path / f / "last.pt", weights_only=True) for f in "ab")
    assert same(a["model"], b["model"]) and losses(tmp_path / "a") == losses(tmp_path / "b") and min(losses(tmp_path / "a")) > 0
    start = torch.load(base, weights_only=True)["model"]
    assert max(float((a["model"][k] - start[k]).abs().max()) for k in start) > 1e-4
    net, info = checkpoints.load_model(tmp_path / "a" / "last.pt")
    x, _ = data.sample_images(Processes("off").mixed(net), info, Processes("off"), 3, 0)
    assert x.shape == (3, 1, 8, 8) and x.std() > 0 and info["solver"] == ("ddim" if objective == "pd" else "lcm")
    if objective == "pd":  # a network that takes w is halved further, but not taught w again
        with pytest.raises(UserError, match="takes the scale of guidance as an input already"):
            ddil.main(ddil.parser().parse_args(f"--ckpt {tmp_path}/a/last.pt --objective lcm --eval-samples 0 --dry-run".split()))


def test_without_dagger_it_is_progressive_distillation(tmp_path, base, whole):
    """No rollout, no state from D; the file's method says pd."""
    inside(*words(base, tmp_path, "--dagger", 0, 0))
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["method"] == "pd" and not state["buffer"] and losses(tmp_path) != losses(whole)
