"""issd.py: what a student is when it is sampled. Resume, signals and processes: test_runs.py."""
import numpy as np
import torch
from conftest import are_equal, inside, weights

from kit import checkpoints, data
from kit.processes import generator
from solvers import guide, make_grid, make_schedule, predictor, sample


def test_a_student_samples_without_fusion_and_as_it_was_trained(tmp_path, ckpt):
    """sample.py needs no flags: grid, nfe and guidance are in the file. Its samples are plain DDIM
    of the plain network."""
    run = tmp_path / "run"
    command = "issd.py --nfe 7 --steps 3 --batch-size 8 --eval-samples 0 --lr 1e-2 --cfg 2"
    inside(*command.split(), "--ckpt", ckpt, "--out", run)
    inside("sample.py", "--ckpt", run / "last.pt", "--num-samples", 5, "--out", tmp_path / "x.npz")
    net, spec = checkpoints.load_model(run / "last.pt")
    assert (spec["nfe"], spec["cfg"], spec["method"]) == (7, 2, "issd")
    assert spec["grid"] == make_grid("dit", 7)

    noise = torch.randn(5, 1, 8, 8, generator=generator("cpu", 0, 0, 4))
    schedule = make_schedule("linear")
    predict = predictor(guide(net, 2.0), torch.arange(5), schedule)
    x = sample(predict, noise, schedule, make_grid("dit", 7))
    with np.load(tmp_path / "x.npz") as f:
        assert f["arr_0"].shape == (5, 8, 8, 1)
        assert f["arr_0"].dtype == np.uint8
        assert f["arr_1"].tolist() == [0, 1, 2, 3, 4]
        np.testing.assert_array_equal(f["arr_0"], data.to_uint8(x).numpy().transpose(0, 2, 3, 1))
    base = torch.load(ckpt, weights_only=True)["model"]
    assert not are_equal(weights(run), base)
    assert (run / "metrics.json").exists()
    assert spec["reading"] == "teacher"
    inside(*"ssd.py --steps 1 --batch-size 8 --eval-samples 0".split(), "--ckpt", run / "last.pt",
           "--out", tmp_path / "ssd")
    assert checkpoints.describe(tmp_path / "ssd" / "last.pt")["reading"] is None


def test_own_samples_stay_the_same_when_steps_grow(tmp_path, ckpt, monkeypatch):
    """The pool is as large as the run that began with it wanted."""
    monkeypatch.setenv("MINDISTILL_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "run"
    words = ["issd.py", "--ckpt", ckpt, "--out", out, "--batch-size", 8, "--nfe", 3,
             *"--data synthetic --lam 0.1 --eval-samples 0".split()]
    inside(*words, "--steps", 2)
    held = torch.load(out / "last.pt", weights_only=True)
    held["args"]["steps"] = 4
    torch.save(held, out / "last.pt")
    said = inside(*words, "--steps", 4)
    assert "16 samples of the base model itself, 3 steps" in said
    pool, = (tmp_path / "cache").glob("synthetic-*")
    assert pool.name.endswith("-16")
    whole = torch.load(out / "last.pt", weights_only=True)
    assert (whole["step"], whole["pool_size"]) == (4, 16)
