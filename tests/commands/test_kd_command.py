"""kd.py with tiny sizes: what the loop hands on, resume, tables, plans."""
import re
import signal

import pytest
import torch
from conftest import are_equal, inside, losses
from method_runs import load, report_of, write_edm_teacher, write_uncond
from processes import start_and_signal, workers

import kd
from kit import cache, checkpoints
from kit.run import EMA, Guard
from kit.sampling import sample_chunks

GUIDED = ("--w", 1, 4, "--dropout", 0.1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_edm_teacher(tmp_path_factory.mktemp("teacher"))


def words(teacher, out, *more):
    command = "kd.py --steps 8 --batch-size 8 --eval-samples 0 --log-every 1 --save-every 3"
    return [*command.split(), "--ckpt", teacher, "--out", out, *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, teacher):
    out = tmp_path_factory.mktemp("whole")
    inside(*words(teacher, out, *GUIDED))
    return out


def test_resume_and_two_processes(tmp_path, teacher, whole):
    one = tmp_path / "one"
    start_and_signal(words(teacher, one, *GUIDED), one, 4, signal.SIGKILL)
    inside(*words(teacher, one, *GUIDED))
    a = load(one)
    b = load(whole)
    assert are_equal(a["model"], b["model"])
    assert are_equal(a["ema"], b["ema"])
    assert not are_equal(b["model"], b["ema"])
    assert losses(one) == losses(whole)
    assert b["arch"]["guidance"]
    assert b["method"] == "kd"
    assert min(losses(whole)) > 0

    workers(2, *words(teacher, tmp_path / "two", *GUIDED))
    assert losses(tmp_path / "two") == pytest.approx(losses(whole), rel=1e-4)
    inside("sample.py", "--ckpt", whole / "last.pt", "--num-samples", 2, "--cfg", 1.5,
           "--out", tmp_path / "x.png")


def test_dit_into_a_smaller_dit(tmp_path, ckpt):
    inside(*words(ckpt, tmp_path, "--student", "DiT-Na/2", "--nfe", 10))
    _, spec = checkpoints.load_model(tmp_path / "last.pt")
    assert (spec["name"], spec["prediction"], spec["nfe"]) == ("DiT-Na/2", "eps", 10)
    assert min(losses(tmp_path)) > 0


def test_two_teachers_and_the_table(tmp_path, teacher):
    out = tmp_path / "out"
    command = words(teacher, out, "--uncond", write_uncond(teacher, tmp_path),
                    *"--w 1 4 --cfg 1.25 --eval-samples 70 --nfe 5".split())
    said = inside(*command)
    for row in ("before, 9 evaluations", "score matching", "after kd"):
        assert row in said
    assert (out / "samples.png").exists()
    assert report_of(inside(*command)) == report_of(said)
    dsm = load(out / "dsm")
    assert "quality is not measured" not in said
    assert "score matching step 8/8" in said  # the control's own name
    assert "guidance" not in dsm["arch"]
    assert (dsm["knows_null"], dsm["w"]) == (True, None)
    made = load(out)
    assert (made["knows_null"], made["w"], made["cfg"]) == (False, [1, 4], 1.25)
    assert dsm["args"]["alpha"] == 1
    assert dsm["args"]["dropout"] == dsm["args"]["drop"] == 0.1


def test_two_teachers_make_their_data_together(tmp_path, teacher, monkeypatch):
    """The first has not learned the null label. The baseline takes the same samples; with another
    second teacher there are others."""
    monkeypatch.setenv("MINDISTILL_CACHE", str(tmp_path / "cache"))
    first = torch.load(teacher, weights_only=True)
    torch.save({**first, "knows_null": False}, tmp_path / "first.pt")
    uncond = write_uncond(teacher, tmp_path)
    asked = []

    def spy(net, *more, **named):
        if "synthetic data" in more:
            asked.append(net)
        return sample_chunks(net, *more, **named)

    monkeypatch.setattr(cache.sampling, "sample_chunks", spy)
    command = "--w 1 4 --cfg 2 --data synthetic:3 --steps 1 --eval-samples 4".split()
    inside(*words(tmp_path / "first.pt", tmp_path / "z", "--uncond", uncond, *command))
    assert len(losses(tmp_path / "z")) == len(losses(tmp_path / "z" / "dsm")) == 1
    assert len(asked) == 1 and asked[0].guidance

    other = torch.load(uncond, weights_only=True)
    other["ema"] = {k: v * 1.01 for k, v in other["model"].items()}
    torch.save(other, tmp_path / "other.pt")
    inside(*words(tmp_path / "first.pt", tmp_path / "y", "--uncond", tmp_path / "other.pt",
                  *command, "--eval-samples", 0))
    assert len(list((tmp_path / "cache").glob("synthetic-*"))) == len(asked) == 2


@pytest.mark.parametrize("drop", [0, 0.1])
def test_a_student_knows_the_null_label_if_labels_were_dropped(tmp_path, teacher, drop):
    inside(*words(teacher, tmp_path, "--steps", 1, "--drop", drop))
    made = load(tmp_path)
    assert (made["knows_null"], made["w"]) == (drop > 0, None)


# ---- Plans -------------------------------------------------------------------------------------


def plan_of(words):
    return inside("kd.py", *words.split(), "--dry-run")


def test_the_plan_counts_what_the_paper_counts():
    """273 GFLOPs of the guided student s-96 in 10 steps, 424 of its teacher in 3: the abstract's,
    each within 0.6 %."""
    plan = plan_of("--model DDPM++-t --student DDPM++-96 --w 1 4 --cfg 1.5")
    pattern = r"(\d+) steps, +\d+ evaluations: student ([\d.]+), teacher ([\d.]+)"
    gflops = {int(n): (float(a), float(b)) for n, a, b in re.findall(pattern, plan)}
    assert gflops[10][0] == pytest.approx(273, rel=0.006)
    assert gflops[3][1] == pytest.approx(424, rel=0.006)
    for text in ("half-life 500,000", "lr 0.001 after 19,531", "on cifar10",
                 "without classes DDPM++-t-uncond"):
        assert text in plan

    plan = plan_of("--model DDPM++-t-uncond --batch-size 128")
    for text in ("no labels,", "after 78,125 steps", "dropout 0,"):
        assert text in plan

    plan = plan_of("--model DiT-XL/2 --student DiT-S/2")  # upstream's DiT knows the null label
    for text in ("labels dropped 0.1,", "lr 0.0001 after 0 steps"):
        assert text in plan
    assert "dropout" not in plan
    assert "steps, " not in plan.split("sampling")[1]

    plan = plan_of("--model SD-v1.5 --data latents")
    for text in ("into SD-KD, 309.0M", "prompts dropped 0.1", "half-life 3,548,672"):
        assert text in plan


# ---- The loop ----------------------------------------------------------------------------------


class Seen(Exception):
    """Ends a command when enough steps were seen."""


def first_steps(monkeypatch, n, *command):
    """The arguments of kd_loss in the first n steps of a command, and how the student stood."""
    calls = []
    loss = kd.kd_loss

    def spy(student, teacher, *rest):
        if len(calls) == n:
            raise Seen
        _schedule, _x0, y, _t, _noise, w, prediction, alpha, _of_eps = rest
        net = student.net
        calls.append(dict(teacher=teacher, y=y, w=w, prediction=prediction, alpha=alpha,
                          dropout=getattr(net, "dropout", None), training=net.training))
        return loss(student, teacher, *rest)

    with monkeypatch.context() as patch, pytest.raises(Seen):
        patch.setattr(kd, "kd_loss", spy)
        inside(*command)
    return calls


def test_the_loop_gives_the_loss_what_the_command_says(tmp_path, teacher, ckpt, monkeypatch):
    uncond = write_uncond(teacher, tmp_path)
    command = words(teacher, tmp_path / "a", "--uncond", uncond,
                    *"--w 2 4 --batch-size 32 --dropout 0.2".split())
    a, b = first_steps(monkeypatch, 2, *command)
    assert float(a["w"].min()) >= 2
    assert float(a["w"].max()) <= 4
    assert len(a["w"].unique()) == 32
    assert not torch.equal(a["w"], b["w"])
    assert float(torch.cat([a["w"], b["w"]]).min()) < 2.3
    assert (a["alpha"], a["prediction"], a["dropout"], a["training"]) == (0, "edm", 0.2, True)
    assert a["teacher"].guidance
    assert (a["y"] < 10).all()

    x = torch.randn(4, 1, 8, 8)
    t = torch.full((4,), 0.5)
    y = torch.arange(4)
    cond = checkpoints.load_model(teacher)[0].eval()
    other = checkpoints.load_model(uncond)[0].eval()
    guided = a["teacher"](x, t, y, torch.full((4,), 2.0))
    torch.testing.assert_close(guided, 2 * cond(x, t, y) - other(x, t, y))


def test_the_loop_drops_labels_and_mixes_losses(tmp_path, teacher, ckpt, monkeypatch):
    command = words(ckpt, tmp_path / "b",
                    *"--student DiT-Na/2 --nfe 10 --drop 0.5 --alpha 0.25 --batch-size 64".split())
    a = first_steps(monkeypatch, 1, *command)[0]
    assert (a["alpha"], a["prediction"], a["w"]) == (0.25, "eps", None)
    assert 16 < int((a["y"] == 10).sum()) < 48
    assert a["training"]
    assert not a["teacher"].net.training
    a = first_steps(monkeypatch, 1, *words(teacher, tmp_path / "c", "--drop", 0))[0]
    assert (a["y"] < 10).all()
    assert a["dropout"] == 0


def test_rate_average_and_what_is_written(tmp_path, teacher, monkeypatch):
    """The learning rate in its ramp-up, the average by the images of the whole batch."""
    rates = []
    decays = []
    step = Guard.step
    average = EMA.update

    def guard_step(self, opt, *more):
        rates.append(opt.param_groups[0]["lr"])
        step(self, opt, *more)

    def ema_update(self, n, decay=None):
        decays.append(decay)
        average(self, n, decay)

    monkeypatch.setattr(Guard, "step", guard_step)
    monkeypatch.setattr(EMA, "update", ema_update)
    inside(*words(teacher, tmp_path, *"--warmup 4 --lr 0.01 --half-life 100".split(),
                  *"--cfg 2.5 --w 2 4 --nfe 7".split()))
    assert rates == pytest.approx([0, 0.0025, 0.005, 0.0075] + [0.01] * 4)
    half_lives = [min(100, 0.05 * 8 * n) for n in range(1, 8)]
    assert decays == pytest.approx([0] + [0.5 ** (8 / half_life) for half_life in half_lives])
    made = load(tmp_path)
    assert (made["cfg"], made["nfe"], made["solver"]) == (2.5, 7, "heun")
    assert (made["prediction"], made["classes"]) == ("edm", 10)
