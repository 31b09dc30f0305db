"""The experiments' common ground: jobs, the rule of choice, tables. The scripts take hours."""
import importlib
import json
import time
from dataclasses import replace

import numpy as np
import PIL.features
import pytest
import torch
from conftest import ROOT, weights

from experiments import figures, runner
from experiments.kd import cifar
from experiments.runner import Cell, Job, Row
from kit.cli import UserError

SCRIPTS = sorted(f"{p.parent.name}.{p.stem}" for p in (ROOT / "experiments").glob("*/*.py"))


@pytest.mark.parametrize("name", [*SCRIPTS, "digits_nets", "pictures"])
def test_scripts_import_and_say_what_they_do(name):
    module = importlib.import_module(f"experiments.{name}")
    assert f"python -m experiments.{name}" in module.__doc__ and callable(module.main)


def test_a_job_trains_once_and_measures_what_is_asked(tmp_path, ckpt, monkeypatch):
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    command = (f"issd --ckpt {ckpt} --nfe 3 --only-step 1 --steps 2 --batch-size 4 --data digits")
    cells = [Cell(command, Row(3, changes={"base": ckpt})),
             Cell(command, Row(2, changes={"only_node": None}))]
    first = runner.train_and_measure(Job(command, cells))
    made = (tmp_path / runner.path(command)).stat().st_mtime_ns
    assert [set(m) for m in first] == [{"digits-cnn", "digits-mlp"}] * 2
    assert first[0] != first[1]
    assert {"fd", "pixel_fd", "accuracy", "beyond", "contrast"} <= set(first[0]["digits-cnn"])
    assert runner.training_seconds(command) > 0
    assert runner.train_and_measure(Job(command, cells[:1])) == first[:1]
    assert (tmp_path / runner.path(command)).stat().st_mtime_ns == made


def test_processes_of_their_own_keep_what_is_done(tmp_path, ckpt, monkeypatch):
    monkeypatch.setenv("MINDISTILL_EXPERIMENTS", str(tmp_path))  # for the new process
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    command = f"issd --ckpt {ckpt} --nfe 2 --steps 1 --batch-size 2 --data digits"
    cell = Cell(command, Row(1))
    cells = {"a row": [[cell], [cell]]}
    first = runner.run(cells)(cell)
    again = runner.run(cells)(cell)
    key, metrics = json.loads((tmp_path / "results.jsonl").read_text())  # one line
    assert key[1:] == ["last.pt", [1, 1.0, None, 0, {}]]
    assert first == again == metrics


NUMBERS = {  # FD, pixel distance, accuracy
    "base": (20.0, 1.0, 0.98),
    "wild": (10.0, 1.1, 0.98),
    "sloppy": (11.0, 0.9, 0.97),
    "good": (15.0, 0.9, 0.978),
    "better": (14.0, 1.0, 0.98),
}


def get(cell):
    """Made-up metrics; the noise of a row stands for the teacher, and is added to FD."""
    fd, pixel_fd, accuracy = NUMBERS[cell.command]
    metrics = {"fd": fd + cell.row.noise, "pixel_fd": pixel_fd, "accuracy": accuracy}
    return {network: metrics for network in runner.NETWORKS}


def two_teachers(name):
    """The second is worse by 4 in every row."""
    def row(number):
        return Row(10, noise=number)
    return runner.cells(lambda number, seed: name, row, [0, 4], [0])


def test_the_rule_of_choice_and_paired_gains(capsys):
    def choose(*names):
        settings = {name: two_teachers(name) for name in names}
        return runner.choose(get, two_teachers("base"), settings)

    assert choose("wild", "sloppy", "good", "better") == "better"
    assert choose("wild", "sloppy") == "wild"  # none keeps both: the least distance
    capsys.readouterr()
    rows = {"base": two_teachers("base"), "good": two_teachers("good")}
    runner.table(get, rows, against=("base",))
    assert ("| good | 17.00 +- 2.83 | 17.00 +- 2.83 | 0.900 +- 0.000 | 0.978 +- 0.000 "
            "| 5.00 (se 0.00), 5.00 (se 0.00) |") in capsys.readouterr().out


def test_95_percent_intervals_are_of_students_t():
    v = np.array([1.0, 2.0, 4.0])
    assert runner.half_width_95(v) == pytest.approx(4.302653 * v.std(ddof=1) / 3 ** 0.5)
    v = np.arange(15.0)
    assert runner.half_width_95(v) == pytest.approx(2.144787 * v.std(ddof=1) / 15 ** 0.5)
    assert np.isnan(runner.half_width_95(v[:1]))


def test_figures(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    from PIL import Image
    with figures.figure(tmp_path / "one.png", "steps", "distance") as axes:
        figures.curve(axes, [1, 2], [2.0, 1.0], [0.1, 0.2], "student")
        figures.curve(axes, [1, 2], [3.0, 2.0], None, "teacher")
    assert Image.open(tmp_path / "one.png").size == (700, 420)
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    runner.draw("two", "steps", "distance", {"student": ([1, 2], np.ones((2, 3)))})
    assert f"drawn: {tmp_path / 'two.png'}" in capsys.readouterr().out


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    """A folder of upstream's binary batches, of 30 random images with soft edges."""
    folder = tmp_path_factory.mktemp("cifar-10-batches-bin")
    rng = np.random.default_rng(0)
    for i in range(5):
        x = rng.integers(0, 256, (6, 3, 8, 8), np.uint8).repeat(4, 2).repeat(4, 3)
        labels = rng.integers(0, 10, (6, 1), np.uint8)
        np.concatenate([labels, x.reshape(6, -1)], 1).tofile(folder / f"data_batch_{i + 1}.bin")
    return str(folder)


@pytest.mark.skipif(not PIL.features.check("avif"), reason="an older Pillow")
def test_cifar_packed(batches, tmp_path, capsys):
    packed = str(tmp_path / "packed.npz")
    cifar.main(cifar.parser().parse_args(["pack", "--data", batches, "--packed", packed]))
    x, y = cifar.read(batches)
    back, labels = cifar.read(packed)
    assert x.shape == back.shape == (30, 32, 32, 3) and back.dtype == np.uint8
    assert (y == labels).all()
    assert np.abs(back.astype(int) - x).mean() < 3 and "30 images" in capsys.readouterr().out
    for wrong in (str(tmp_path), str(tmp_path / "nowhere")):
        with pytest.raises(UserError, match="neither cifar10, nor a folder"):
            cifar.read(wrong)


@pytest.fixture
def random_resnet18(tmp_path, monkeypatch):
    """Random weights of a smaller network, where torchvision looks for them."""
    import torchvision
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    name = torchvision.models.ResNet18_Weights.DEFAULT.url.rsplit("/", 1)[1]
    torch.save(torchvision.models.resnet18().state_dict(), folder / name)
    return "torchvision-resnet18"


@pytest.fixture
def jobs(monkeypatch):
    """Small jobs in place of the KD paper's."""
    row = [cifar.Row(3)]
    small = "--batch-size 2 --warmup 1 --save-every 1000"
    student = f"kd --ckpt OUT/teacher/last.pt --student DDPM++-8x1 --eval-samples 0 {small}"
    jobs = [cifar.Job("teacher", f"train --model DDPM++-8x1 {small}", 40, row),
            cifar.Job("kd-2", student, 2, row), cifar.Job("kd-4", student, 4, row, "kd-2")]
    monkeypatch.setattr(cifar, "kd", lambda few: jobs)
    return jobs


def test_cifar_stages(batches, tmp_path, random_resnet18, jobs, capsys):
    def stage(out, features, seconds=None):
        words = ["kd", "--tiny", "--data", batches, "--samples", "6", "--out", str(tmp_path / out),
                 "--features", features]
        args = cifar.parser().parse_args(words)
        stage = cifar.Stage(args)
        if seconds:
            stage.end = time.monotonic() + seconds
        stage.report(stage.work())
        return stage, capsys.readouterr().out

    # Stopped by the clock, then continued: the weights of a run that is not stopped. A job that
    # goes on from another one: the weights of one run.
    jobs.append(cifar.Job("once", jobs[1].command, 4, []))
    assert "4 of 4 jobs are done; give --features" in stage("whole", "none")[1]
    del jobs[3:]
    said = stage("parts", "none", seconds=0.5)[1]
    assert "0 of 3 jobs are done; the same command continues" in said
    done, said = stage("parts", random_resnet18)
    assert "all is measured" in said and f"features {random_resnet18}" in said
    assert "| FD |" in said and "not yet" not in said and (done.folder / "samples.png").exists()
    for a, b in (("whole/kd/teacher", "parts/kd/teacher"), ("whole/kd/kd-4", "parts/kd/kd-4"),
                 ("whole/kd/kd-4", "whole/kd/once")):
        one, other = weights(tmp_path / a), weights(tmp_path / b)
        assert all(torch.equal(one[k], other[k]) for k in one)

    # Nothing is done twice, and nothing over something else:
    lines = done.lines.read_text()
    known = [json.loads(line) for line in lines.splitlines()]
    assert len(known) == 6
    assert np.isfinite([value["fd"] for key, value in known if len(key) > 1]).all()
    again = stage("parts", random_resnet18)[1]
    assert again.splitlines()[-1] == said.splitlines()[-1] and done.lines.read_text() == lines
    jobs[1] = replace(jobs[1], steps=3)
    with pytest.raises(UserError, match="kd-2 was made by another command"):
        stage("parts", "none")
