"""train.py and sample.py with EDM's networks."""
import numpy as np
import pytest
import torch
from conftest import inside, losses, weights

import models
from kit import checkpoints

QUICK = ["--data", "digits", "--batch-size", 8, "--log-every", 1, "--warmup", 2]


def test_training_resuming_and_sampling(tmp_path):
    whole = tmp_path / "whole"
    half = tmp_path / "half"
    words = ["--model", "DDPM++-8x1", *QUICK, "--decay", "constant"]
    inside("train.py", *words, "--steps", 6, "--out", whole)
    inside("train.py", *words, "--steps", 3, "--out", half)
    held = torch.load(half / "last.pt", weights_only=True)
    assert (held["name"], held["scale"]) == ("DDPM++-8x1", None)
    assert (held["prediction"], held["schedule"]) == ("edm", "edm")
    assert (held["nfe"], held["solver"]) == (35, "heun")

    # Continued, the run has the same bits as the whole one, also with dropout:
    held["args"]["steps"] = 6
    torch.save(held, half / "last.pt")
    inside("train.py", *words, "--steps", 6, "--out", half)
    a = weights(whole)
    b = weights(half)
    for key, value in a.items():
        assert torch.equal(value, b[key]), key
    assert len(losses(half)) == 6

    ckpt = whole / "last.pt"
    net, _ = checkpoints.load_model(ckpt)
    assert net.arch == models.make_arch("DDPM++-8x1", 8, 1, 10)
    words = ["--num-samples", 12, "--nfe", 5, "--cfg", 2, "--out", tmp_path / "x.npz"]
    inside("sample.py", "--ckpt", ckpt, *words)
    with np.load(tmp_path / "x.npz") as file:
        assert file["arr_0"].shape == (12, 8, 8, 1)
        assert file["arr_0"].std() > 0
    for solver in ("ddim", "euler"):
        words = ["--num-samples", 3, "--nfe", 4, "--solver", solver, "--out", tmp_path / "x.png"]
        inside("sample.py", "--ckpt", ckpt, *words)
    with pytest.raises(ValueError, match="--nfe 4: heun needs an odd number"):
        inside("sample.py", "--ckpt", ckpt, "--nfe", 4, "--out", tmp_path / "x.png")


def test_training_without_classes(tmp_path):
    words = ["--model", "DDPM++-8x1-uncond", *QUICK, "--steps", 2, "--out", tmp_path]
    assert "is ready" in inside("train.py", *words)
    ckpt = tmp_path / "last.pt"
    assert checkpoints.describe(ckpt)["classes"] == 0
    words = ["--num-samples", 3, "--nfe", 3, "--out", tmp_path / "x.png"]
    inside("sample.py", "--ckpt", ckpt, *words)


def test_plan_of_the_teacher_of_cifar10():
    plan = inside("train.py", "--model", "DDPM++-t", "--dry-run")
    assert "edm training of DDPM++-t" in plan
    assert "37.5M parameters" in plan  # two levels
