"""The commands themselves: resume, signals, several processes, precision."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, inside, losses, script, torchrun, weights

STEPS = 24


def words(ckpt, out, *more):
    return ["issd.py", "--ckpt", ckpt, "--steps", STEPS, "--batch-size", 8, "--lr", 1e-3, "--eval-samples", 0, "--log-every", 1, "--save-every", 5, "--out", out, *more]


def same(a, b):
    return all(torch.equal(v, b[k]) for k, v in a.items()) and a.keys() == b.keys()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, ckpt):
    out = tmp_path_factory.mktemp("whole")
    inside(*words(ckpt, out))
    return out


def children(pid):
    """The processes whose parent is pid."""
    parent = lambda p: int(open(f"/proc/{p}/stat").read().rsplit(")", 1)[1].split()[1])
    return [int(p) for p in os.listdir("/proc") if p.isdigit() and os.path.exists(f"/proc/{p}/stat") and parent(p) == pid]


def start(command, out, step):
    """Start the command, wait until step `step` is logged; returns the process."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    p = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log, deadline = out / "log.jsonl", time.time() + 120
    while not (log.exists() and len(log.read_text().splitlines()) >= step):
        assert time.time() < deadline and p.poll() is None, p.communicate()
        time.sleep(0.002)
    return p


def start_and_signal(command, out, step, sig, workers=False):
    """Start the command, wait until step `step` is logged, send the signal (workers: to every worker of torchrun); returns the ended process."""
    p = start(command, out, step)
    for pid in (children(p.pid) if workers else [p.pid]):
        os.kill(pid, sig)
    p.output = p.communicate(timeout=60)
    return p


@pytest.mark.parametrize("step", [2, 9, 17])
def test_sigkill_then_the_same_command_is_bit_identical(tmp_path, ckpt, whole, step):
    p = start_and_signal(words(ckpt, tmp_path), tmp_path, step, signal.SIGKILL)
    assert p.returncode == -signal.SIGKILL
    assert (tmp_path / "last.pt").exists() == (step > 5)
    script(*words(ckpt, tmp_path))
    assert same(weights(tmp_path), weights(whole)) and losses(tmp_path) == losses(whole)
    a, b = (torch.load(f / "last.pt", weights_only=True)["opt"]["state"] for f in (tmp_path, whole))
    assert all(torch.equal(a[i][k], b[i][k]) for i in a for k in a[i])


def test_sigterm_saves_at_the_end_of_the_step(tmp_path, ckpt, whole):
    p = start_and_signal(words(ckpt, tmp_path, "--save-every", 1000), tmp_path, 7, signal.SIGTERM)
    assert p.returncode == 143 and "saved; the same command continues" in p.output[1]
    assert 7 <= torch.load(tmp_path / "last.pt", weights_only=True)["step"] < STEPS
    inside(*words(ckpt, tmp_path, "--save-every", 1000))
    assert same(weights(tmp_path), weights(whole)) and losses(tmp_path) == losses(whole)


def test_a_teacher_with_an_average_resumes_exactly(tmp_path):
    command = lambda out: ["train.py", "--steps", STEPS, "--batch-size", 8, "--log-every", 1, "--save-every", 5, "--out", out]
    inside(*command(tmp_path / "a"))
    start_and_signal(command(tmp_path / "b"), tmp_path / "b", 12, signal.SIGKILL)
    inside(*command(tmp_path / "b"))
    a, b = (torch.load(tmp_path / f / "last.pt", weights_only=True) for f in "ab")
    assert same(a["model"], b["model"]) and same(a["ema"], b["ema"]) and not same(a["model"], a["ema"])


def test_a_finished_run_prints_its_table_and_changed_arguments_are_refused(tmp_path, ckpt, whole):
    before = (whole / "last.pt").stat().st_mtime_ns
    again = inside(*words(ckpt, whole))
    assert "is ready" in again and "step 1/" not in again
    changed = script(*words(ckpt, whole, "--lam", 0.2, "--reading", "student"), check=False)
    assert changed.returncode == 2 and changed.stderr.strip().count("\n") == 0
    assert "--lam 0.1, now it is 0.2" in changed.stderr
    assert script(*words(ckpt, whole, "--resume", "never"), check=False).returncode == 2
    assert (whole / "last.pt").stat().st_mtime_ns == before


def test_two_processes_agree_with_one(tmp_path, ckpt):
    """20 float32 steps with loss > 0 at the same global batch; and so does bf16, which runs on CPU too."""
    run = lambda out, *more: ["issd.py", "--ckpt", ckpt, "--steps", 20, "--batch-size", 8, "--lr", 1e-4, "--eval-samples", 0, "--log-every", 1, "--out", out, *more]
    inside(*run(tmp_path / "one"))
    torchrun(2, *run(tmp_path / "two"))
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 20 and min(one) > 0
    assert all(b == pytest.approx(a, rel=1e-4) for a, b in zip(one, two))
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max(float((a[k] - b[k]).abs().max()) for k in a) < 1e-5
    start = torch.load(ckpt, weights_only=True)["model"]
    assert max(float((a[k] - start[k]).abs().max()) for k in a) > 1e-3
    inside(*run(tmp_path / "half", "--amp", "bf16"))
    half = losses(tmp_path / "half")
    assert all(b == pytest.approx(a, rel=0.15) for a, b in zip(one, half)) and half != one


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="finds the workers in /proc")
def test_sigterm_is_agreed_by_two_processes_and_one_resumes_them(tmp_path, ckpt, whole):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, *words(ckpt, tmp_path / "y", "--save-every", 1000)]
    p = start_and_signal(command, tmp_path / "y", 6, signal.SIGTERM, workers=True)
    assert p.returncode != 0 and "saved; the same command continues" in p.output[1] and 6 <= torch.load(tmp_path / "y" / "last.pt", weights_only=True)["step"] <= STEPS
    inside(*words(ckpt, tmp_path / "y"))
    assert max(float((weights(tmp_path / "y")[k] - v).abs().max()) for k, v in weights(whole).items()) < 1e-4
    assert [r["step"] for r in map(json.loads, (tmp_path / "y" / "log.jsonl").read_text().splitlines())] == list(range(1, STEPS + 1))


def test_the_main_job_in_small(tmp_path):
    """`python issd.py` with fewer steps and samples: teacher, distillation, control, table, picture."""
    done = script("-c", "import sys, train, issd, runtime; train.DIGITS['steps'] = 30; runtime.run(issd.main, issd.parser().parse_args(sys.argv[1:]))",
                  "--steps", 4, "--eval-samples", 60, "--out", tmp_path / "runs", cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    metrics = json.loads((tmp_path / "runs" / "metrics.json").read_text())
    assert set(metrics["before"]) == set(metrics["after"]) == {"fd", "precision", "recall", "accuracy", "pixel_fd"}
    assert set(metrics["controls"]) == {"before, 50 steps", "continued training"} and metrics["samples"] == 60 and metrics["features"] == "digits-cnn"
    assert "pixel distance" in done.stdout and "after issd" in done.stdout
    from PIL import Image
    assert Image.open(tmp_path / "runs" / "samples.png").size == (20 * 36 + 4, 2 * (2 * 36 + 4) + 3)
    assert (tmp_path / "runs" / "teacher-digits" / "last.pt").exists()
    assert metrics["after"] != metrics["before"] != metrics["controls"]["continued training"]


def test_dry_runs_touch_nothing(tmp_path):
    plan = script("issd.py", "--model", "DiT-XL/2", "--nfe", 10, "--dry-run", "--out", tmp_path / "x", env={"MINDISTILL_CACHE": str(tmp_path / "cache")}).stdout
    for text in ("lam 0.25", "lr 5e-06", "batch 128", "8,007 steps", "237.2 GFLOP", "1.52e+14 FLOP a step", "50,000 samples", "GiB a process"):
        assert text in plan, plan
    assert "3 forward units" in inside("train.py", "--dry-run", "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists() and not (tmp_path / "cache").exists()


def test_training_objectives_run_and_are_sampled(tmp_path):
    """v and velocity teachers from the command line; sample.py follows what the file says."""
    for prediction, schedule in (("v", "cosine"), ("velocity", "interpolant")):
        out = tmp_path / prediction
        inside("train.py", "--prediction", prediction, "--schedule", schedule, "--steps", 12, "--batch-size", 8, "--log-every", 4, "--out", out)
        assert len(losses(out)) == 3 and min(losses(out)) > 0
        inside("sample.py", "--compare", out / "last.pt", out / "last.pt", "--nfe", 5, "--out", out / "x.png")
        assert (out / "x.png").exists()


def test_the_latent_path_in_small(tmp_path):
    """What the eight-GPU command does, in miniature and on two processes: a latent model with learned variance, its own
    guided samples as training data, no measurement, and latents from sample.py."""
    import numpy as np
    from test_errors import latents
    x = np.random.default_rng(0).normal(size=(16, 2, 2, 4, 8, 8)).astype(np.float16)
    folder = latents(tmp_path / "latents", x, np.arange(16) % 5, classes=5, scale=0.18215)
    inside("train.py", "--data", folder, "--model", "DiT-Ti/2", "--steps", 4, "--batch-size", 4, "--lr", 1e-2, "--out", tmp_path / "base", "--log-every", 1)
    base = torch.load(tmp_path / "base" / "last.pt", weights_only=True)
    assert base["arch"]["learn_sigma"] and base["scale"] == 0.18215 and base["classes"] == 5 and min(losses(tmp_path / "base")) > 0
    done = torchrun(2, "issd.py", "--ckpt", tmp_path / "base" / "last.pt", "--data", "synthetic:3", "--steps", 3, "--batch-size", 4, "--lr", 1e-3,
                    "--log-every", 1, "--out", tmp_path / "issd", env={"MINDISTILL_CACHE": str(tmp_path / "cache")})
    assert "12 samples of the base model itself, 3 steps, guidance 1.5" in done.stdout and "quality is not measured" in done.stdout
    assert len(losses(tmp_path / "issd")) == 3 and min(losses(tmp_path / "issd")) > 0 and len(list((tmp_path / "cache").glob("synthetic-*-3steps-cfg1.5-*-12"))) == 1
    inside("sample.py", "--ckpt", tmp_path / "issd" / "last.pt", "--num-samples", 3, "--out", tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as f:
        assert f["arr_0"].shape == (3, 4, 8, 8) and f["arr_0"].dtype == np.float32
    assert script("sample.py", "--ckpt", tmp_path / "issd" / "last.pt", "--out", tmp_path / "x.png", check=False).returncode == 2
