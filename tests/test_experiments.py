"""The experiments' common ground: jobs, the rule of choice, tables. The scripts themselves take hours."""
import importlib
import json
import sys
import time

import numpy as np
import PIL.features
import pytest
import torch
from conftest import ROOT, weights

sys.path.insert(0, str(ROOT / "experiments"))
import cifar
import common
from runtime import UserError


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "experiments").glob("*_*.py")) + ["cifar"])
def test_scripts_import_and_say_what_they_do(name):
    module = importlib.import_module(name)
    assert f"python experiments/{name}.py" in module.__doc__ and callable(module.main)


def test_a_job_trains_once_and_measures_what_is_asked(tmp_path, ckpt, monkeypatch):
    monkeypatch.setattr(common, "ROOT", tmp_path)
    command = f"issd --ckpt {ckpt} --nfe 3 --only-step 1 --steps 2 --batch-size 4 --data digits"
    rows = [[3, 1.0, None, 0, {"elsewhere": ckpt}], [2, 1.0, None, 0, {"only_node": None}]]
    first = common.one((command, "last.pt", rows))
    made = (tmp_path / common.path(command)).stat().st_mtime_ns
    assert [set(m) for m in first] == [{"digits-cnn", "digits-mlp"}] * 2 and first[0] != first[1]
    assert common.one((command, "last.pt", rows[:1])) == first[:1] and (tmp_path / common.path(command)).stat().st_mtime_ns == made


def test_the_rule_of_choice_and_paired_gains(capsys):
    numbers = {"base": (20.0, 1.0, 0.98), "wild": (10.0, 1.1, 0.98), "sloppy": (11.0, 0.9, 0.97), "good": (15.0, 0.9, 0.978), "better": (14.0, 1.0, 0.98)}
    get = lambda command, row: {n: dict(zip(("fd", "pixel_fd", "accuracy"), (numbers[command][0] + row, *numbers[command][1:]))) for n in common.NETWORKS}
    cells = lambda name: [[(name, 0)], [(name, 4)]]  # two teachers, the second worse by 4 in every row
    assert common.choose(get, cells("base"), {n: cells(n) for n in ("wild", "sloppy", "good", "better")}) == "better"
    assert common.choose(get, cells("base"), {n: cells(n) for n in ("wild", "sloppy")}) == "wild"  # none keeps both: the least distance
    capsys.readouterr()
    common.table(get, {"base": cells("base"), "good": cells("good")}, against=("base",))
    assert "| good | 17.00 +- 2.83 | 17.00 +- 2.83 | 0.900 +- 0.000 | 0.978 +- 0.000 | 5.00 (se 0.00), 5.00 (se 0.00) |" in capsys.readouterr().out


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    """A folder of upstream's binary batches, of 60 random images with soft edges."""
    folder, rng = tmp_path_factory.mktemp("cifar-10-batches-bin"), np.random.default_rng(0)
    for i in range(5):
        x = rng.integers(0, 256, (12, 3, 8, 8), np.uint8).repeat(4, 2).repeat(4, 3)
        np.concatenate([rng.integers(0, 10, (12, 1), np.uint8), x.reshape(12, -1)], 1).tofile(folder / f"data_batch_{i + 1}.bin")
    return str(folder)


@pytest.mark.skipif(not PIL.features.check("avif"), reason="an older Pillow")
def test_cifar_packed(batches, tmp_path, capsys):
    words = ["pack", "--data", batches, "--packed", str(tmp_path / "packed.npz")]
    cifar.main(cifar.parser().parse_args(words))
    (x, y), (back, labels) = cifar.read(batches), cifar.read(words[-1])
    assert x.shape == back.shape == (60, 32, 32, 3) and (y == labels).all() and back.dtype == np.uint8
    assert np.abs(back.astype(int) - x).mean() < 3 and "60 images" in capsys.readouterr().out
    for wrong in (str(tmp_path), str(tmp_path / "nowhere")):
        with pytest.raises(UserError, match="neither cifar10, nor a folder"):
            cifar.read(wrong)


def test_cifar_stages(batches, tmp_path, monkeypatch, capsys):
    import torchvision  # random weights of a smaller network, where torchvision looks for them
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "hub" / "checkpoints" / torchvision.models.ResNet18_Weights.DEFAULT.url.rsplit("/", 1)[1])
    row, small = [(3, 1.0, "last.pt")], "--batch-size 2 --warmup 1 --save-every 1000"
    student = f"kd --ckpt OUT/teacher/last.pt --student DDPM++-8x1 --eval-samples 0 {small}"
    jobs = [cifar.Job("teacher", f"train --model DDPM++-8x1 {small}", 40, row), cifar.Job("kd-2", student, 2, row), cifar.Job("kd-4", student, 4, row, "kd-2")]
    monkeypatch.setattr(cifar, "kd", lambda few: jobs)

    def stage(out, features, seconds=None):
        stage = cifar.Stage(cifar.parser().parse_args(["kd", "--tiny", "--data", batches, "--samples", "6", "--out", str(tmp_path / out), "--features", features]))
        stage.end = time.monotonic() + seconds if seconds else stage.end
        stage.report(stage.work())
        return stage, capsys.readouterr().out

    # Stopped by the clock, then continued: the weights of a run that is not stopped, and a job that goes on from another those of one run.
    jobs.append(cifar.Job("once", student, 4, []))
    assert "4 of 4 jobs are done; give --features" in stage("whole", "none")[1]
    del jobs[3:]
    assert "0 of 3 jobs are done; the same command continues" in stage("parts", "none", seconds=0.5)[1]
    done, said = stage("parts", "torchvision-resnet18")
    assert "all is measured" in said and "features torchvision-resnet18" in said and "| FD |" in said and "not yet" not in said and (done.folder / "samples.png").exists()
    for a, b in (("whole/kd/teacher", "parts/kd/teacher"), ("whole/kd/kd-4", "parts/kd/kd-4"), ("whole/kd/kd-4", "whole/kd/once")):
        one, other = weights(tmp_path / a), weights(tmp_path / b)
        assert all(torch.equal(one[k], other[k]) for k in one)

    # Nothing is done twice, and nothing over something else:
    lines = done.lines.read_text()
    assert len(lines.splitlines()) == 6 and np.isfinite([v["fd"] for k, v in map(json.loads, lines.splitlines()) if len(k) > 1]).all()
    assert stage("parts", "torchvision-resnet18")[1].splitlines()[-1] == said.splitlines()[-1] and done.lines.read_text() == lines
    jobs[1] = jobs[1]._replace(steps=3)
    with pytest.raises(UserError, match="kd-2 was made by another command"):
        stage("parts", "none")
