"""ssd.py with tiny sizes: teachers that move, one step alone, own samples, prompts."""
import json
import os
import signal

import numpy as np
import pytest
import torch
from conftest import (
    are_equal,
    checkpoint,
    inside,
    largest_difference,
    losses,
    weights,
)
from method_runs import load, total_difference
from processes import workers
from tiny_networks import unet_arch

import models
from kit import cache, checkpoints, data
from kit.cli import UserError
from kit.processes import Processes, generator
from kit.run import Log
from kit.sampling import SampleOptions, sample_chunks, sample_images
from solvers import make_grid, make_schedule, predictor, sample

COMMON = "--batch-size 8 --lr 1e-3 --eval-samples 0 --save-every 3 --log-every 1".split()
PD_GRID = [999, 733, 466, 200, -1]


def run(*words):
    return inside("ssd.py", *words)


@pytest.fixture(scope="module")
def flow(tmp_path_factory, tiny):
    path = tmp_path_factory.mktemp("flow") / "base.pt"
    torch.save(checkpoint(tiny, prediction="velocity", schedule="interpolant"), path)
    return path


def test_a_teacher_that_moves_resumes_exactly(tmp_path, flow, monkeypatch):
    """Stopped by a signal in 3 of 6 steps and continued, to the bit. Its average is one: it moved,
    less than the student."""
    words = ("--ckpt", flow, "--nfe", 10, "--interval", 0.005, "--steps", 6, *COMMON)
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    run(*words, "--out", whole)
    log = Log.after_step

    def stopping(self, done):
        if done == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return log(self, done)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Log, "after_step", stopping)
        run(*words, "--out", parts)
    assert load(parts)["step"] < 6
    run(*words, "--out", parts)

    start = torch.load(flow, weights_only=True)["model"]
    a = load(whole)
    b = load(parts)
    assert are_equal(a["model"], b["model"])
    assert are_equal(a["average"], b["average"])
    assert 0 < total_difference(a["average"], start) < 0.01 * total_difference(a["model"], start)
    assert losses(whole) == losses(parts)


def test_one_node_and_the_base_model_elsewhere(tmp_path, ckpt, tiny):
    run("--ckpt", ckpt, *"--cfg 1 --nfe 5 --only-step 2 --steps 3 --lam 0.5".split(), *COMMON,
        "--out", tmp_path)
    net, spec = checkpoints.load_model(tmp_path / "last.pt")
    grid = make_grid("dit", 5)
    assert spec["only_node"] == grid[1]

    proc = Processes("off")
    student = proc.autocast(net)
    with pytest.raises(UserError, match="--base"):
        sample_images(student, spec, proc, 4, SampleOptions())
    options = SampleOptions(base=proc.autocast(tiny))
    got, _ = sample_images(student, spec, proc, 4, options)

    noise = torch.randn(4, 1, 8, 8, generator=generator("cpu", 0, 0, 4))
    schedule = make_schedule("linear")
    y = torch.arange(4)
    predict = [predictor(one, y, schedule) for one in (tiny, net, tiny, tiny, tiny)]
    want = sample(predict, noise, schedule, grid)
    assert (got == data.to_uint8(want).numpy()).all()


def test_a_distilled_model_keeps_its_grid_and_two_processes_agree(tmp_path, tiny):
    pd = tmp_path / "pd.pt"
    torch.save(checkpoint(tiny, grid=PD_GRID, nfe=4, method="pd"), pd)
    words = ("--ckpt", pd, "--steps", 3, *COMMON)
    run(*words, "--out", tmp_path / "one")
    workers(2, "ssd.py", *words, "--out", tmp_path / "two")
    assert checkpoints.describe(tmp_path / "one" / "last.pt")["grid"] == PD_GRID
    a = weights(tmp_path / "one")
    b = weights(tmp_path / "two")
    assert largest_difference(a, b) < 1e-5
    assert losses(tmp_path / "one") != []
    assert not are_equal(a, tiny.state_dict())


def test_t_zero_is_a_time_of_a_velocity_model(tmp_path, flow):
    plan = run("--ckpt", flow, *"--nfe 250 --only-step 250 --eval-samples 0 --dry-run".split(),
               "--out", tmp_path / "x")
    assert "pair 250 only" in plan


def test_it_trains_on_its_own_samples_and_tells_the_plan(tmp_path, ckpt, tiny, monkeypatch):
    monkeypatch.setenv("MINDISTILL_CACHE", str(tmp_path / "cache"))
    out = run("--ckpt", ckpt, *"--nfe 4 --data synthetic:3 --steps 2".split(), *COMMON,
              "--out", tmp_path / "x")
    assert len(losses(tmp_path / "x")) == 2
    assert "16 samples of the base model itself, 3 steps" in out
    assert list((tmp_path / "cache").glob("synthetic-*"))

    # A student of one step: its data are made with the base model's own steps, by it alone.
    asked = []

    def spy(net, spec, *args, **kwargs):
        asked.append(spec["grid"])
        return sample_chunks(net, spec, *args, **kwargs)

    monkeypatch.setattr(cache.sampling, "sample_chunks", spy)
    torch.save(checkpoint(tiny, grid=PD_GRID, nfe=4, method="pd"), tmp_path / "pd.pt")
    run("--ckpt", tmp_path / "pd.pt", *"--data synthetic:4 --only-step 2 --steps 1".split(),
        *COMMON, "--out", tmp_path / "z")
    assert asked == [PD_GRID]

    out = run(*"--model SiT-XL/2-REPA --nfe 250 --dry-run".split(), "--out", tmp_path / "y")
    assert "t = s - 0.005, ema teacher" in out
    assert "675" in out
    assert not (tmp_path / "y").exists()


# ---- Prompts: from cached latents and embeddings to samples ------------------------------------


@pytest.fixture
def prompts(tmp_path):
    """A folder of latents and prompts, as `python -m kit.encode` makes it."""
    g = np.random.default_rng(0)
    folder = tmp_path / "cache"
    folder.mkdir()
    x = g.standard_normal((12, 2, 2, 4, 8, 8)).astype(np.float16)
    x[:, :, 1] = abs(x[:, :, 1])  # standard deviations
    np.save(folder / "latents.npy", x)
    np.save(folder / "labels.npy", np.arange(12) % 5)
    np.save(folder / "embeddings.npy", g.standard_normal((5, 7, 12)).astype(np.float16))
    np.save(folder / "null.npy", g.standard_normal((1, 7, 12)).astype(np.float16))
    (folder / "meta.json").write_text(json.dumps({"classes": 0, "scale": 0.18215}))
    return folder


def test_a_text_model_trains_on_one_and_two_processes_and_is_sampled(tmp_path, prompts):
    net = models.fill_random(models.build(unet_arch("text")))
    torch.save(checkpoint(net, name="SD-v1.5", schedule="sd", scale=0.18215, classes=0, cfg=7.5),
               tmp_path / "base.pt")
    one = tmp_path / "one"
    two = tmp_path / "two"
    words = ("--ckpt", tmp_path / "base.pt", "--data", prompts,
             *"--steps 3 --nfe 4 --batch-size 4 --lr 1e-3 --log-every 1 --save-every 3".split())
    run(*words, "--out", one)
    workers(2, "ssd.py", *words, "--out", two)
    start = net.state_dict()
    # Sums, since a bias before a norm has no gradient, and Adam divides by it:
    moved = total_difference(weights(one), start)
    assert total_difference(weights(one), weights(two)) < 1e-3 * moved
    assert moved > 0.1
    assert all(loss > 0 for loss in losses(one))
    torch.testing.assert_close(torch.tensor(losses(one)), torch.tensor(losses(two)), rtol=1e-4,
                               atol=1e-7)

    spec = checkpoints.describe(one / "last.pt")
    # Latent diffusion's own grid, whose end is a time that the network knows:
    assert spec["grid"] == [751, 501, 251, 1, 0]
    null = torch.from_numpy(np.load(prompts / "null.npy")).float()
    torch.testing.assert_close(spec["null"], null)
    inside("sample.py", "--ckpt", one / "last.pt", "--prompts", prompts, "--num-samples", 3,
           "--out", tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as f:
        assert f["arr_0"].shape == (3, 4, 8, 8)
        assert np.isfinite(f["arr_0"]).all()
        assert f["arr_1"].tolist() == [0, 1, 2]
