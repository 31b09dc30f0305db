"""Signals for a whole process group, as `timeout`, batch systems and Ctrl-C send them, while data
comes through processes that read."""
import os
import signal
import time

import numpy as np
import pytest
from conftest import make_latents, weights
from processes import children, start_workers, wait_for_step
from small_data import folder


def write_data(path, kind):
    if kind == "images":
        folder(path / "images", each=40)
        return str(path / "images"), ["--image-size", 8]
    x = np.random.default_rng(0).normal(size=(80, 1, 1, 3, 8, 8)).astype(np.float16)
    return make_latents(path / "latents", x, np.arange(80) % 2, classes=2, scale=1.0), []


@pytest.mark.parametrize("kind, count, number", [
    ("images", 1, signal.SIGTERM), ("latents", 1, signal.SIGTERM), ("latents", 2, signal.SIGTERM),
    ("images", 1, signal.SIGINT)])
def test_a_signal_for_the_group(tmp_path, kind, count, number):
    """It is saved, the exit code is 143, nobody is left, and the run can go on."""
    data, more = write_data(tmp_path, kind)
    out = tmp_path / "out"
    words = ["train.py", "--data", data, *more, "--model", "DiT-Na/4", "--steps", 100_000,
             "--batch-size", 8, "--log-every", 1, "--out", out]
    started = start_workers(count, words, group=True)
    wait_for_step(started[0], out, 3)
    readers = [pid for p in started for pid in children(p.pid)]
    for pid in readers:  # important! They get it first, and training goes on meanwhile
        os.kill(pid, number)
    time.sleep(0.5)
    for p in started:
        os.killpg(p.pid, number)
    errors = "".join(p.communicate(60)[1] for p in started)
    assert [p.returncode for p in started] == [143] * count, errors
    assert "Traceback" not in errors and "saved; the same command continues" in errors
    assert len(weights(out)) > 10
    assert len(readers) >= 2 * count
    assert not any(os.path.exists(f"/proc/{pid}/exe") for pid in readers)
