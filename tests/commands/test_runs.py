"""The commands themselves: resume, signals, several processes, precision."""
import json
import os
import signal

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    are_equal,
    inside,
    largest_difference,
    log_lines,
    losses,
    make_latents,
    weights,
)
from PIL import Image
from processes import finish, script, start_and_signal, start_workers, wait_for_step, workers

STEPS = 24


def words(ckpt, out, *more):
    command = (f"issd.py --ckpt {ckpt} --steps {STEPS} --batch-size 8 --lr 1e-3 --eval-samples 0 "
               f"--log-every 1 --save-every 5 --out {out}")
    return [*command.split(), *more]


def load(folder):
    return torch.load(folder / "last.pt", weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, ckpt):
    out = tmp_path_factory.mktemp("whole")
    inside(*words(ckpt, out))
    return out


@pytest.mark.parametrize("step", [2, 9, 17])
def test_sigkill_then_the_same_command_is_bit_identical(tmp_path, ckpt, whole, step):
    p = start_and_signal(words(ckpt, tmp_path), tmp_path, step, signal.SIGKILL)
    assert p.returncode == -signal.SIGKILL
    assert (tmp_path / "last.pt").exists() == (step > 5)
    said = script(*words(ckpt, tmp_path)).stdout
    assert ("continuing from step" in said) == (step > 5)
    assert are_equal(weights(tmp_path), weights(whole))
    assert losses(tmp_path) == losses(whole)
    a = load(tmp_path)["opt"]["state"]
    b = load(whole)["opt"]["state"]
    for i in a:
        assert all(torch.equal(a[i][k], b[i][k]) for k in a[i])


def test_sigterm_saves_at_the_end_of_the_step(tmp_path, ckpt, whole):
    p = start_and_signal(words(ckpt, tmp_path, "--save-every", 1000), tmp_path, 7, signal.SIGTERM)
    assert p.returncode == 143
    assert "saved; the same command continues" in p.output[1]
    assert 7 <= load(tmp_path)["step"] < STEPS
    inside(*words(ckpt, tmp_path, "--save-every", 1000))
    assert are_equal(weights(tmp_path), weights(whole))
    assert losses(tmp_path) == losses(whole)


def test_a_teacher_with_an_average_resumes_exactly(tmp_path):
    def command(out):
        text = f"train.py --steps {STEPS} --batch-size 8 --log-every 1 --save-every 5 --out {out}"
        return text.split()
    inside(*command(tmp_path / "a"))
    start_and_signal(command(tmp_path / "b"), tmp_path / "b", 12, signal.SIGKILL)
    inside(*command(tmp_path / "b"))
    a = load(tmp_path / "a")
    b = load(tmp_path / "b")
    assert are_equal(a["model"], b["model"])
    assert are_equal(a["ema"], b["ema"])
    assert not are_equal(a["model"], a["ema"])


def test_a_finished_run_prints_its_table_and_changed_arguments_are_refused(tmp_path, ckpt, whole):
    before = (whole / "last.pt").stat().st_mtime_ns
    again = inside(*words(ckpt, whole))
    assert "is ready" in again and "step 1/" not in again
    assert f"{whole} is finished" in again and "to train again, give another --out" in again
    changed = script(*words(ckpt, whole, "--lam", 0.2, "--reading", "student"), check=False)
    assert changed.returncode == 2
    assert changed.stderr.strip().count("\n") == 0
    assert "--lam 0.1, now it is 0.2" in changed.stderr
    assert script(*words(ckpt, whole, "--resume", "never"), check=False).returncode == 2
    assert (whole / "last.pt").stat().st_mtime_ns == before


def test_the_log_tells_rate_time_and_memory_and_the_arguments_once(whole):
    first = json.loads((whole / "log.jsonl").read_text().splitlines()[0])
    assert first["args"]["lam"] == 0.1 and first["args"]["steps"] == STEPS
    lines = log_lines(whole)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(line["lr"] == 1e-3 and line["memory_gib"] > 0 for line in lines)
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds) and seconds[-1] > 0


def test_samples_while_it_trains(tmp_path, ckpt, whole):
    """--sample-every draws the same noise at every step and changes no weight."""
    inside(*words(ckpt, tmp_path, "--sample-every", 8))
    pictures = sorted(f.name for f in tmp_path.glob("samples-*.png"))
    assert pictures == ["samples-000008.png", "samples-000016.png", "samples-000024.png"]
    assert are_equal(weights(tmp_path), weights(whole))
    inside("sample.py", "--ckpt", tmp_path / "last.pt", "--out", tmp_path / "after.png")
    last = np.array(Image.open(tmp_path / pictures[-1]))
    assert np.array_equal(last, np.array(Image.open(tmp_path / "after.png")))
    assert not np.array_equal(last, np.array(Image.open(tmp_path / pictures[0])))


def test_two_processes_agree_with_one(tmp_path, ckpt):
    """20 float32 steps with loss > 0 at the same global batch; bf16 runs on a CPU, too."""
    def run(out, *more):
        text = (f"issd.py --ckpt {ckpt} --steps 20 --batch-size 8 --lr 1e-4 --eval-samples 0 "
                f"--log-every 1 --out {out}")
        return [*text.split(), *more]
    inside(*run(tmp_path / "one"))
    workers(2, *run(tmp_path / "two"))
    one = losses(tmp_path / "one")
    two = losses(tmp_path / "two")
    assert len(one) == len(two) == 20 and min(one) > 0
    assert two == pytest.approx(one, rel=1e-4)
    a = weights(tmp_path / "one")
    assert largest_difference(a, weights(tmp_path / "two")) < 1e-5
    assert largest_difference(a, torch.load(ckpt, weights_only=True)["model"]) > 1e-3
    inside(*run(tmp_path / "half", "--amp", "bf16"))
    half = losses(tmp_path / "half")
    assert half == pytest.approx(one, rel=0.15) and half != one


def test_sigterm_is_agreed_by_two_processes_and_one_resumes_them(tmp_path, ckpt, whole):
    out = tmp_path / "y"
    started = start_workers(2, words(ckpt, out, "--save-every", 1000))
    wait_for_step(started[0], out, 6)
    for p in started:
        os.kill(p.pid, signal.SIGTERM)
    done = finish(started, check=False)
    assert [p.returncode for p in started] == [143, 143]
    assert "saved; the same command continues" in done.stderr
    assert 6 <= load(out)["step"] <= STEPS
    inside(*words(ckpt, out))
    assert largest_difference(weights(out), weights(whole)) < 1e-4
    assert [line["step"] for line in log_lines(out)] == list(range(1, STEPS + 1))


SMALL_MAIN_JOB = """
import sys, train, issd
from kit.cli import run_script
train.DIGITS['steps'] = 30
run_script(issd.main, issd.parser().parse_args(sys.argv[1:]))
"""


def test_the_main_job_in_small(tmp_path):
    """`python issd.py` with fewer steps and samples: teacher, distillation, control, table."""
    out = tmp_path / "runs"
    done = script("-c", SMALL_MAIN_JOB, "--steps", 4, "--eval-samples", 60, "--out", out,
                  cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    metrics = json.loads((out / "metrics.json").read_text())
    keys = {"fd", "precision", "recall", "accuracy", "pixel_fd"}
    assert set(metrics["before"]) == set(metrics["after"]) == keys
    assert set(metrics["controls"]) == {"before, 50 steps", "continued training"}
    assert metrics["samples"] == 60 and metrics["features"] == "digits-cnn"
    assert "teacher: runs/teacher-digits/last.pt" in done.stdout
    assert "pixel distance" in done.stdout and "after issd" in done.stdout
    assert f"pictures: {out}/samples.png, from above: before, after; log: {out}/" in done.stdout
    size = Image.open(out / "samples.png").size
    assert size == (20 * 36 + 4, 2 * (2 * 36 + 4) + 3)
    assert (out / "teacher-digits" / "last.pt").exists()
    assert metrics["after"] != metrics["before"] != metrics["controls"]["continued training"]


def test_dry_runs_touch_nothing(tmp_path):
    plan = script("issd.py", "--model", "DiT-XL/2", "--nfe", 10, "--dry-run", "--out",
                  tmp_path / "x", env={"MINDISTILL_CACHE": str(tmp_path / "cache")}).stdout
    for text in ("lam 0.25", "lr 5e-06", "batch 128", "8,007 steps", "237.2 GFLOP",
                 "1.52e+14 FLOP per step", "50,000 samples", "GiB per process"):
        assert text in plan, plan
    assert "3 forward units" in inside("train.py", "--dry-run", "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists() and not (tmp_path / "cache").exists()


def test_training_objectives_run_and_are_sampled(tmp_path):
    """v and velocity teachers from the command line; sample.py follows what the file says."""
    for prediction, schedule in (("v", "cosine"), ("velocity", "interpolant")):
        out = tmp_path / prediction
        inside(*f"train.py --prediction {prediction} --schedule {schedule} --steps 12 "
                f"--batch-size 8 --log-every 4 --out {out}".split())
        assert len(losses(out)) == 3 and min(losses(out)) > 0
        last = out / "last.pt"
        inside("sample.py", "--compare", last, last, "--nfe", 5, "--out", out / "x.png")
        assert (out / "x.png").exists()


def test_the_latent_path_in_small(tmp_path):
    """What the eight-GPU command does, in miniature and on two processes: a latent model with
    learned variance, its own guided samples as training data, no measurement, and latents from
    sample.py."""
    x = np.random.default_rng(0).normal(size=(16, 2, 2, 4, 8, 8)).astype(np.float16)
    x[:, :, 1] = abs(x[:, :, 1])  # standard deviations
    folder = make_latents(tmp_path / "latents", x, np.arange(16) % 5, classes=5, scale=0.18215)
    base = tmp_path / "base"
    inside(*f"train.py --data {folder} --model DiT-Ti/2 --steps 4 --batch-size 4 --lr 1e-2 "
            f"--out {base} --log-every 1".split())
    held = load(base)
    assert held["arch"]["learn_sigma"] and held["scale"] == 0.18215 and held["classes"] == 5
    assert min(losses(base)) > 0

    out = tmp_path / "issd"
    done = workers(2, *f"issd.py --ckpt {base}/last.pt --data synthetic:3 --steps 3 "
                        f"--batch-size 4 --lr 1e-3 --log-every 1 --out {out}".split(),
                    env={"MINDISTILL_CACHE": str(tmp_path / "cache")})
    assert "12 samples of the base model itself, 3 steps, guidance 1.5" in done.stdout
    assert "quality is not measured" in done.stdout
    assert len(losses(out)) == 3 and min(losses(out)) > 0
    assert len(list((tmp_path / "cache").glob("synthetic-*-3steps-cfg1.5-*-12"))) == 1

    sample = ["sample.py", "--ckpt", out / "last.pt"]
    inside(*sample, "--num-samples", 3, "--out", tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as f:
        assert f["arr_0"].shape == (3, 4, 8, 8) and f["arr_0"].dtype == np.float32
    assert script(*sample, "--out", tmp_path / "x.png", check=False).returncode == 2
