"""KD: closed forms, then the command with tiny sizes."""
import re
import signal

import pytest
import torch
from conftest import ROOT, checkpoint, inside, losses, torchrun
from test_runs import same, start_and_signal

import checkpoints
import kd
import models
import train
from runtime import UserError
from solvers import SIGMA_DATA, add_noise, from_x0_eps, guide, make_schedule, to_x0_eps

S = make_schedule("edm")


class Toy(torch.nn.Module):
    """A small net(x, t, y) or, with guidance, net(x, t, y, w), in float64; its null label is 10."""

    num_classes = 10

    def __init__(self, *p, guidance=False):
        super().__init__()
        self.p, self.guidance, self.calls = torch.nn.Parameter(torch.tensor(p or (0.6, -0.5, 0.3), dtype=torch.float64)), guidance, 0

    def forward(self, x, t, y, w=None):
        self.calls += 1
        a, b, c = self.p
        shape = lambda v: v.view(-1, 1, 1, 1).to(x.dtype)
        return torch.tanh(a * x + b * x.flip(-1)) + c * shape(t.log()) + 0.1 * shape(y) + (0 if w is None else 0.05 * shape(w))


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    normal = lambda: torch.randn(6, 1, 4, 4, generator=g, dtype=torch.float64)
    return normal(), torch.randint(0, 10, (6,), generator=g), torch.tensor([0.05, 0.2, 0.5, 1.0, 3.0, 20.0], dtype=torch.float64), normal()


def denoised(net, x0, y, t, noise, *w):
    x = add_noise(S, x0, noise, t)
    return to_x0_eps(S, x, net(x, t, y, *w), t, "edm")[0]


def lam(t):
    return ((t ** 2 + SIGMA_DATA ** 2) / (t * SIGMA_DATA) ** 2).view(-1, 1, 1, 1)


def test_equations_3_5_6_and_8_in_the_papers_terms(batch):
    """With denoised images and lambda_sigma, as printed."""
    (x0, y, t, noise), student, teacher = batch, Toy(0.5, 0.2, 0.1), Toy()
    D, target = denoised(student, x0, y, t, noise), denoised(teacher, x0, y, t, noise)
    loss = lambda **kw: kd.kd_loss(student, teacher, S, x0, y, t, noise, **kw).item()
    eq5, eq3 = (lam(t) * (D - target).square()).mean().item(), (lam(t) * (D - x0).square()).mean().item()
    assert loss() == pytest.approx(eq5, rel=1e-9) and loss(alpha=1.0) == pytest.approx(eq3, rel=1e-9) and eq5 > 1e-3
    assert loss(alpha=0.3) == pytest.approx(0.7 * eq5 + 0.3 * eq3, rel=1e-9)
    # Eq. 12 and 13: the mixed loss is either of the two, a product and a constant
    dot = lambda a, b: (lam(t) * a * b).mean().item()
    assert loss(alpha=0.3) == pytest.approx(eq5 + 2 * 0.3 * dot(D - target, target - x0) + 0.3 * dot(target - x0, target - x0), rel=1e-9)
    assert loss(alpha=0.3) == pytest.approx(eq3 + 2 * 0.7 * dot(D - x0, x0 - target) + 0.7 * dot(target - x0, target - x0), rel=1e-9)
    # Eq. 6: the paper's w is ours less one
    w, taking, uncond = torch.linspace(1, 4, 6, dtype=torch.float64), Toy(0.5, 0.2, 0.1, guidance=True), Toy(0.1, 0.3, -0.2)
    uncond.num_classes = 0
    null = denoised(uncond, x0, torch.zeros_like(y), t, noise)
    goal = w.view(-1, 1, 1, 1) * target - (w - 1).view(-1, 1, 1, 1) * null
    eq6 = (lam(t) * (denoised(taking, x0, y, t, noise, w) - goal).square()).mean().item()
    assert kd.kd_loss(taking, kd.guided_by(teacher, uncond), S, x0, y, t, noise, w).item() == pytest.approx(eq6, rel=1e-9)
    own = w.view(-1, 1, 1, 1) * target - (w - 1).view(-1, 1, 1, 1) * denoised(teacher, x0, torch.full_like(y, 10), t, noise)  # one network with a null label
    eq6 = (lam(t) * (denoised(taking, x0, y, t, noise, w) - own).square()).mean().item()
    assert kd.kd_loss(taking, teacher, S, x0, y, t, noise, w).item() == pytest.approx(eq6, rel=1e-9)


def test_gradients_and_evaluations(batch):
    """The teacher has no gradient; a student that is its teacher has no loss; score matching does not ask the teacher; a guided student takes one evaluation."""
    (x0, y, t, noise), student, teacher = batch, Toy(0.5, 0.2, 0.1), Toy()
    kd.kd_loss(student, teacher, S, x0, y, t, noise).backward()
    assert teacher.p.grad is None and float(student.p.grad.abs().min()) > 0 and (student.calls, teacher.calls) == (1, 1)
    assert kd.kd_loss(teacher, Toy(), S, x0, y, t, noise).item() == 0
    teacher.calls = 0
    kd.kd_loss(student, teacher, S, x0, y, t, noise, alpha=1.0)
    assert teacher.calls == 0
    taking = Toy(guidance=True)
    guide(taking, 1.5)(x0, t, y)
    assert taking.calls == 1
    pair = kd.guided_by(Toy(), Toy())
    torch.testing.assert_close(guide(pair, 1.0)(x0, t, y), Toy()(x0, t, y))


@pytest.mark.parametrize("prediction, schedule", [("eps", "linear"), ("v", "cosine"), ("velocity", "interpolant")])
def test_other_networks(batch, prediction, schedule):
    """DiT in eps, v and velocity form: the same loss of outputs, with alpha = 1 that of train.py."""
    (x0, y, t, noise), schedule = batch, make_schedule(schedule)
    t = torch.tensor([0.1, 0.2, 0.4, 0.6, 0.8, 0.9], dtype=torch.float64) if schedule.continuous else torch.tensor([1, 10, 100, 500, 900, 999])
    net = lambda x, t, y: torch.tanh(x) + (0 if prediction == "velocity" else 0.001) * t.view(-1, 1, 1, 1)
    dsm = kd.kd_loss(net, None, schedule, x0, y, t, noise, prediction=prediction, alpha=1.0)
    assert dsm.item() == train.diffusion_loss(net, schedule, x0, y, t, noise, prediction)[0].item()
    target = from_x0_eps(schedule, x0, noise, t, prediction)
    assert target.shape == x0.shape and kd.kd_loss(net, net, schedule, x0, y, t, noise, prediction=prediction).item() == 0


def test_average():
    """A half-life in images, at first a twentieth of what was seen: after many images a weight that was 1 and is 0 has halved every half-life."""
    value = 1.0
    for step in range(1000):  # of 10 images, all beyond the ramp-up
        value *= kd.ema_decay(1_000_000 + 10 * step, 10, 1000)
    assert value == pytest.approx(0.5 ** 10)
    assert kd.ema_decay(100, 5, 1000) == pytest.approx(0.5) and kd.ema_decay(0, 512, 500_000) == 0


def test_method_block_stands_alone(batch):
    text = (ROOT / "kd.py").read_text()
    block = text.split("# ---- Method ")[1].split("\n", 1)[1].split("# ---- Training")[0]
    names = re.search(r"^from solvers import (.*)$", text, re.M)[1].replace(" ", "").split(",")
    import solvers
    space = {"torch": torch, **{n: getattr(solvers, n) for n in names}}
    exec(block, space)
    x0, y, t, noise = batch
    assert torch.equal(space["kd_loss"](Toy(0.5, 0.2, 0.1), Toy(), S, x0, y, t, noise), kd.kd_loss(Toy(0.5, 0.2, 0.1), Toy(), S, x0, y, t, noise))


# The command.


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    net = models.fill_random(models.build(models.make_arch("DDPM++-8x1", 8, 1, 10)))
    path = tmp_path_factory.mktemp("teacher") / "edm.pt"
    torch.save(checkpoint(net, name="DDPM++-8x1", **{k: v for k, v in checkpoints.EDM.items() if k not in ("scale", "cfg")}), path)
    return path


def uncond_of(teacher, folder):
    """A second teacher, without classes."""
    net, held = models.fill_random(models.build(models.make_arch("DDPM++-8x1", 8, 1, 0)), seed=1), torch.load(teacher, weights_only=True)
    torch.save({**held, "model": net.state_dict(), "ema": net.state_dict(), "arch": net.arch, "classes": 0, "name": "DDPM++-8x1-uncond"}, folder / "uncond.pt")
    return folder / "uncond.pt"


def words(teacher, out, *more):
    return ["kd.py", "--ckpt", teacher, "--steps", 8, "--batch-size", 8, "--eval-samples", 0, "--log-every", 1, "--save-every", 3, "--out", out, *more]


GUIDED = ("--w", 1, 4, "--dropout", 0.1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, teacher):
    out = tmp_path_factory.mktemp("whole")
    inside(*words(teacher, out, *GUIDED))
    return out


def test_resume_and_two_processes(tmp_path, teacher, whole):
    start_and_signal(words(teacher, tmp_path / "one", *GUIDED), tmp_path / "one", 4, signal.SIGKILL)
    inside(*words(teacher, tmp_path / "one", *GUIDED))
    a, b = (torch.load(f / "last.pt", weights_only=True) for f in (tmp_path / "one", whole))
    assert same(a["model"], b["model"]) and same(a["ema"], b["ema"]) and not same(b["model"], b["ema"]) and losses(tmp_path / "one") == losses(whole)
    assert b["arch"]["guidance"] and b["method"] == "kd" and min(losses(whole)) > 0
    torchrun(2, *words(teacher, tmp_path / "two", *GUIDED))
    assert losses(tmp_path / "two") == pytest.approx(losses(whole), rel=1e-4)
    inside("sample.py", "--ckpt", whole / "last.pt", "--num-samples", 2, "--cfg", 1.5, "--out", tmp_path / "x.png")


def test_dit_into_a_smaller_dit(tmp_path, ckpt):
    inside(*words(ckpt, tmp_path / "out", "--student", "DiT-Na/2", "--nfe", 10))
    net, info = checkpoints.load_model(tmp_path / "out" / "last.pt")
    assert info["name"] == "DiT-Na/2" and info["prediction"] == "eps" and info["nfe"] == 10 and min(losses(tmp_path / "out")) > 0


def test_two_teachers_and_the_table(tmp_path, teacher):
    command = words(teacher, tmp_path / "out", "--uncond", uncond_of(teacher, tmp_path), "--w", 1, 4, "--cfg", 1.25, "--eval-samples", 70, "--nfe", 5)
    out = inside(*command)
    assert all(row in out for row in ("before, 9 evaluations", "score matching", "after kd")) and (tmp_path / "out" / "samples.png").exists()
    assert inside(*command) in out
    dsm = torch.load(tmp_path / "out" / "dsm" / "last.pt", weights_only=True)
    assert "guidance" not in dsm["arch"] and dsm["args"]["alpha"] == 1 and dsm["args"]["dropout"] == dsm["args"]["drop"] == 0.1


def test_the_plan_counts_what_the_paper_counts():
    """273 GFLOPs of the guided student s-96 in 10 steps, 424 of its teacher in 3: the abstract's, each within 0.6 %."""
    plan = inside("kd.py", "--model", "DDPM++-t", "--student", "DDPM++-96", "--w", 1, 4, "--cfg", 1.5, "--dry-run")
    numbers = {int(n): tuple(map(float, v)) for n, *v in re.findall(r"(\d+) steps, +\d+ evaluations: student ([\d.]+), teacher ([\d.]+)", plan)}
    assert numbers[10][0] == pytest.approx(273, rel=0.006) and numbers[3][1] == pytest.approx(424, rel=0.006)
    assert "half-life 500,000" in plan and "lr 0.001 after 19,531" in plan and "on cifar10" in plan and "without classes DDPM++-t-uncond" in plan
    plan = inside("kd.py", "--model", "DDPM++-t-uncond", "--batch-size", 128, "--dry-run")
    assert "labels dropped 0," in plan and "after 78,125 steps" in plan and "dropout 0," in plan
    plan = inside("kd.py", "--model", "DiT-XL/2", "--student", "DiT-S/2", "--dry-run")  # upstream's DiT knows the null label
    assert "labels dropped 0.1," in plan and "lr 0.0001 after 0 steps" in plan and "dropout" not in plan and "steps, " not in plan.split("sampling")[1]
    plan = inside("kd.py", "--model", "SD-v1.5", "--data", "latents", "--dry-run")
    assert "into SD-KD, 309.0M" in plan and "labels dropped 0.1" in plan and "half-life 3,548,672" in plan


class Seen(Exception):
    pass


def first_steps(monkeypatch, n, *command):
    """The arguments of kd_loss in the first n steps of a command, and what Guard.update and EMA.update were given."""
    calls, loss = [], kd.kd_loss

    def spy(student, teacher, schedule, x0, y, t, noise, w, prediction, alpha):
        calls.append(dict(student=student.net, teacher=teacher, y=y, t=t, w=w, prediction=prediction, alpha=alpha, dropout=getattr(student.net, "dropout", None), training=student.net.training))
        if len(calls) > n:
            raise Seen
        return loss(student, teacher, schedule, x0, y, t, noise, w, prediction, alpha)

    monkeypatch.setattr(kd, "kd_loss", spy)
    with pytest.raises(Seen):
        inside(*command)
    monkeypatch.undo()
    return calls


def test_the_loop_gives_the_loss_what_the_command_says(tmp_path, teacher, ckpt, monkeypatch):
    uncond = uncond_of(teacher, tmp_path)
    a, b, _ = first_steps(monkeypatch, 2, *words(teacher, tmp_path / "a", "--uncond", uncond, "--w", 2, 4, "--batch-size", 32, "--dropout", 0.2))
    assert float(a["w"].min()) >= 2 and float(a["w"].max()) <= 4 and len(a["w"].unique()) == 32 and not torch.equal(a["w"], b["w"]) and float(torch.cat([a["w"], b["w"]]).min()) < 2.3
    assert (a["alpha"], a["prediction"], a["dropout"], a["training"]) == (0, "edm", 0.2, True) and a["teacher"].guidance and (a["y"] < 10).all()
    x, t, y, w = torch.randn(4, 1, 8, 8), torch.full((4,), 0.5), torch.arange(4), torch.full((4,), 2.0)
    cond, other = checkpoints.load_model(teacher)[0].eval(), checkpoints.load_model(uncond)[0].eval()
    torch.testing.assert_close(a["teacher"](x, t, y, w), 2 * cond(x, t, y) - other(x, t, y))
    a, *_ = first_steps(monkeypatch, 1, *words(ckpt, tmp_path / "b", "--student", "DiT-Na/2", "--nfe", 10, "--drop", 0.5, "--alpha", 0.25, "--batch-size", 64))
    assert (a["alpha"], a["prediction"], a["w"]) == (0.25, "eps", None) and 16 < int((a["y"] == 10).sum()) < 48 and a["training"] and not a["teacher"].net.training
    a, *_ = first_steps(monkeypatch, 1, *words(teacher, tmp_path / "c", "--drop", 0))
    assert (a["y"] < 10).all() and a["dropout"] == 0


def test_rate_average_and_what_is_written(tmp_path, teacher, monkeypatch):
    """Two steps by hand: the learning rate in its ramp-up, the average by the images of the whole batch."""
    rates, decays, update, average = [], [], kd.Guard.update, kd.EMA.update
    monkeypatch.setattr(kd.Guard, "update", lambda self, opt, *more: (rates.append(opt.param_groups[0]["lr"]), update(self, opt, *more)))
    monkeypatch.setattr(kd.EMA, "update", lambda self, net, n, decay=None: (decays.append(decay), average(self, net, n, decay)))
    inside(*words(teacher, tmp_path, "--warmup", 4, "--lr", 0.01, "--half-life", 100, "--cfg", 2.5, "--w", 2, 4, "--nfe", 7))
    assert rates == pytest.approx([0.0025, 0.005, 0.0075] + [0.01] * 5)
    assert decays == pytest.approx([0.5 ** (8 / max(min(100, 0.05 * 8 * n), 1e-8)) for n in range(1, 9)])
    made = torch.load(tmp_path / "last.pt", weights_only=True)
    assert (made["cfg"], made["nfe"], made["solver"], made["prediction"], made["classes"]) == (2.5, 7, "heun", "edm", 10)


REFUSED = {  # command -> what the line says; none of them trains anything
    "--w 2 4 --cfg 1": "learns guidance from 2 to 4", "--w 1 4 --alpha 0.5": "neither with --alpha", "--w 1 4 --drop 0.1": "nor with --drop", "--w 4 1": "in their order",
    "--uncond x.pt": "say how far with --w", "--nfe 10": "odd", "--nfe 1": "--nfe 1", "--student DiT-Na/2": "EDM's teachers want a DDPM++", "--student DDPM++-8x1-uncond": "the same classes",
    "--student DDPM++-48x1": "unknown", "--half-life 0": "must be positive", "--alpha 2": "between 0 and 1",
}


@pytest.mark.parametrize("more", REFUSED)
def test_refusals(tmp_path, teacher, more):
    with pytest.raises(UserError, match=REFUSED[more]):
        inside("kd.py", "--ckpt", teacher, "--dry-run", "--out", tmp_path / "x", *more.split())
    assert not (tmp_path / "x").exists()


def test_refusals_of_other_teachers(tmp_path, teacher, ckpt):
    dry = lambda *more: inside("kd.py", "--dry-run", "--out", tmp_path / "x", *more)
    for more, says in ((["--ckpt", ckpt], "say which network the student is"), (["--ckpt", ckpt, "--student", "DDPM++-8x1"], "others a DiT"),
                       (["--model", "LDM-ImageNet", "--student", "LDM-ImageNet", "--w", 1, 4], "without --w"), (["--model", "LDM-ImageNet", "--student", "SD-KD"], "those with prompts"),
                       (["--model", "SD-v1.5"], "give --data LATENTS"), (["--model", "DDPM++-t", "--drop", 0.1], "no null label"), (["--model", "DDPM++-t", "--cfg", 2], "no null label")):
        with pytest.raises(UserError, match=says):
            dry(*more)
    with pytest.raises(UserError, match="must be like the teacher, but without classes"):
        inside(*words(teacher, tmp_path / "y", "--w", 1, 4, "--uncond", teacher))
    inside(*words(teacher, tmp_path / "z", "--w", 1, 4, "--uncond", uncond_of(teacher, tmp_path), "--data", "synthetic:3", "--steps", 1))  # the base model's own samples
