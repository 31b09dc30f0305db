"""What sample.py leaves on the disk, also when it is killed; one job makes a pool for several."""
import errno
import io
import json
import os
import signal
import time

import numpy as np
import pytest
import torch
from conftest import checkpoint, inside
from PIL import Image
from processes import Command, start_workers, workers

import models
from kit import processes, sampling, store
from kit.cli import UserError
from kit.processes import Processes
from kit.store import Parts, Pictures, write_npz


def command(ckpt, out, *more, num=14):
    return ["--ckpt", ckpt, "--nfe", 2, "--num-samples", num, "--out", out, *more]


def draw(ckpt, out, *more, **kw):
    return inside("sample.py", *command(ckpt, out, *more, **kw))


def content(path):
    """What is there: the bytes of a file, or {name: bytes} of a folder."""
    if path.is_file():
        return path.read_bytes()
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(sampling, "CHUNK", 4)


@pytest.fixture
def breaks(monkeypatch):
    """breaks(n): the job is interrupted after n chunks; breaks(None): it is not."""
    def choose(n):
        left = [n]

        def wrap(add):
            def wrapped(self, *chunk):
                if left[0] == 0:
                    raise KeyboardInterrupt
                left[0] = left[0] and left[0] - 1
                add(self, *chunk)
            return wrapped

        for kind, add in originals.items():
            monkeypatch.setattr(kind, "add", wrap(add))

    originals = {kind: kind.add for kind in (Parts, Pictures)}
    return choose


# ---- Formats -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, dtype", [((7, 8, 8, 1), np.uint8), ((9, 4, 2, 2), np.float32),
                                          ((4, 6, 6, 3), np.uint8)])
def test_an_npz_is_what_numpy_writes(shape, dtype, tmp_path, small_chunks):
    x = np.random.default_rng(0).integers(0, 255, shape).astype(dtype)
    y = np.arange(len(x)) % 3
    parts = Parts(tmp_path / "parts")
    parts.claim(Processes("off"), {})
    for first in range(0, len(x), 4):
        parts.add(first, x[first:first + 4], None)
    write_npz(tmp_path / "x.npz", parts, y)
    parts.delete()
    want = io.BytesIO()
    np.savez(want, x, y)
    assert (tmp_path / "x.npz").read_bytes() == want.getvalue()
    assert os.listdir(tmp_path) == ["x.npz"]


def test_all_formats_hold_the_same_samples(tmp_path, ckpt, small_chunks):
    said = draw(ckpt, tmp_path / "x.npz")
    assert f"x.npz: 14 samples of {ckpt}, labels balanced" in said
    draw(ckpt, tmp_path / "folder")
    draw(ckpt, tmp_path / "grid.png")
    draw(ckpt, f"{tmp_path}/with.dot/", num=1)
    assert sorted(os.listdir(tmp_path)) == ["folder", "grid.png", "with.dot", "x.npz"]
    assert sorted(os.listdir(tmp_path / "with.dot")) == [".samples.json", "000000-0.png"]
    with np.load(tmp_path / "x.npz") as f:
        x, y = f["arr_0"], f["arr_1"]
    assert x.shape == (14, 8, 8, 1) and x.dtype == np.uint8
    names = sorted(name for name in os.listdir(tmp_path / "folder") if name[0] != ".")
    assert names == [f"{i:06d}-{y[i]}.png" for i in range(14)]
    for name, image in zip(names, x):
        np.testing.assert_array_equal(Image.open(tmp_path / "folder" / name), image[..., 0])
    sampling.save_grid([x.transpose(0, 3, 1, 2)], tmp_path / "want.png")
    assert content(tmp_path / "want.png") == content(tmp_path / "grid.png")


def test_names_of_pictures_without_classes_and_with_colours(tmp_path):
    net = models.fill_random(models.build(models.make_arch("DiT-Na/2", 8, 3, 0, False)))
    torch.save(checkpoint(net, name="DiT-Na/2", classes=0), tmp_path / "x.pt")
    said = draw(tmp_path / "x.pt", tmp_path / "x", num=2)
    assert "labels" not in said
    assert Image.open(tmp_path / "x" / "000001.png").mode == "RGB"


# ---- Killed and continued ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.npz", "folder", "x.png"])
def test_an_interrupted_command_continues(name, tmp_path, ckpt, small_chunks, breaks):
    """At any chunk; twice; nothing is made again and nothing is left behind."""
    (tmp_path / "whole").mkdir()
    draw(ckpt, tmp_path / "whole" / name)
    want = content(tmp_path / "whole" / name)
    for first, second in ((0, 1), (1, 2)):
        folder = tmp_path / f"{first}-{second}"
        folder.mkdir()
        for n in (first, second):
            breaks(n)
            with pytest.raises(KeyboardInterrupt):
                draw(ckpt, folder / name)
        breaks(4 - first - second)  # enough only where what was done is kept
        said = draw(ckpt, folder / name)
        assert content(folder / name) == want
        assert os.listdir(folder) == [name]
        assert f"{first + second} of 4 chunks" in said
        breaks(None)


def test_a_folder_that_is_finished_says_so(tmp_path, ckpt, small_chunks, breaks):
    assert "finished already" not in draw(ckpt, tmp_path / "x")
    breaks(0)
    assert "finished already; to sample again, delete it" in draw(ckpt, tmp_path / "x")
    breaks(None)
    (tmp_path / "x" / "000006-6.png").unlink()
    assert "finished already" not in draw(ckpt, tmp_path / "x")
    assert (tmp_path / "x" / "000006-6.png").exists()
    with pytest.raises(UserError, match="with --seed 0, now it is 1; delete .*another --out"):
        draw(ckpt, tmp_path / "x", "--seed", 1)


def test_a_finished_file_is_replaced_by_a_whole_one(tmp_path, ckpt, small_chunks, breaks):
    draw(ckpt, tmp_path / "x.npz")
    before = content(tmp_path / "x.npz")
    breaks(2)
    with pytest.raises(KeyboardInterrupt):
        draw(ckpt, tmp_path / "x.npz", "--seed", 1)
    assert content(tmp_path / "x.npz") == before
    breaks(None)
    draw(ckpt, tmp_path / "x.npz", "--seed", 1)
    assert content(tmp_path / "x.npz") != before


@pytest.mark.parametrize("name", ["x.npz", "folder"])
@pytest.mark.parametrize("words, message", [
    (["--seed", 1], "with --seed 0, now it is 1"),
    (["--num-samples", 15], "with --num-samples 14, now it is 15"),
    (["--nfe", 3], "with --nfe 2, now it is 3"),
    (["--cfg", 2], "with --cfg 1.0, now it is 2.0"),
    (["--solver", "dpm++"], "with --solver ddim, now it is dpm"),
    (["--label", 3], "without --label, now it is 3"),
    (["--labels", "random"], "with --labels balanced, now it is random"),
    (["--ckpt", "other"], "with another --ckpt"),
])
def test_other_settings_do_not_continue(name, words, message, tmp_path, ckpt, tiny, small_chunks,
                                        breaks):
    if words[0] == "--ckpt":
        other = models.fill_random(models.build(tiny.arch), seed=7)
        torch.save(checkpoint(other), tmp_path / "other.pt")
        words = ["--ckpt", tmp_path / "other.pt"]
    breaks(1)
    with pytest.raises(KeyboardInterrupt):
        draw(ckpt, tmp_path / name)
    breaks(0)
    with pytest.raises(UserError, match=message):
        draw(ckpt, tmp_path / name, *words)
    breaks(None)
    draw(ckpt, tmp_path / name)


def test_settings_of_which_nothing_was_made_do_not_bind(tmp_path, ckpt, small_chunks, breaks):
    for name in ("x.npz", "folder"):
        breaks(0)
        with pytest.raises(KeyboardInterrupt):
            draw(ckpt, tmp_path / name)
        breaks(None)
        draw(ckpt, tmp_path / name, "--seed", 1)


@pytest.mark.parametrize("where", ["a chunk", "the file"])
@pytest.mark.parametrize("name", ["x.npz", "folder", "x.png"])
def test_a_full_disk_keeps_what_is_there(name, where, tmp_path, ckpt, small_chunks, monkeypatch):
    draw(ckpt, tmp_path / "whole" / name)
    calls = []

    def full(function, after):
        def wrapped(*args, **kw):
            calls.append(1)
            if len(calls) > after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **kw)
        return wrapped

    with monkeypatch.context() as m:
        if where == "the file":
            m.setattr(np.lib.format, "write_array_header_1_0",
                      full(np.lib.format.write_array_header_1_0, 0))
            m.setattr(store.os, "replace", full(os.replace, 9))
            m.setattr(sampling.os, "replace", full(os.replace, 9))
        elif name == "folder":
            m.setattr(Image.Image, "save", full(Image.Image.save, 6))
        else:
            m.setattr(processes.np, "save", full(np.save, 2))
        if where == "the file" and name == "x.png":
            m.setattr(Image.Image, "save", full(Image.Image.save, 0))
        with pytest.raises(UserError, match="No space left.*repeat the command") as e:
            draw(ckpt, tmp_path / name)
    assert "\n" not in str(e.value)
    said = draw(ckpt, tmp_path / name)
    assert content(tmp_path / name) == content(tmp_path / "whole" / name)
    assert name != "x.npz" or where == "the file" or "2 of 4 chunks" in said


def test_two_models_are_compared_after_an_interruption(tmp_path, ckpt, tiny, small_chunks, breaks):
    other = models.fill_random(models.build(tiny.arch), seed=7)
    torch.save(checkpoint(other), tmp_path / "b.pt")
    words = ["--compare", ckpt, tmp_path / "b.pt", "--nfe", 2, "--num-samples", 6]
    inside("sample.py", *words, "--out", tmp_path / "whole.png")
    for n in (1, 2):
        breaks(n)
        with pytest.raises(KeyboardInterrupt):
            inside("sample.py", *words, "--out", tmp_path / "x.png")
    breaks(1)
    inside("sample.py", *words, "--out", tmp_path / "x.png")
    assert content(tmp_path / "x.png") == content(tmp_path / "whole.png")
    assert sorted(os.listdir(tmp_path)) == ["b.pt", "whole.png", "x.png"]


def test_no_rank_holds_all_samples(tmp_path, ckpt, small_chunks, monkeypatch):
    """Nothing is gathered, and one chunk at once is read again."""
    alive = []
    load = Parts.load

    def spy(self, c):
        rows = load(self, c)
        alive.append(len(rows))
        return rows

    def refuse(*_):
        raise AssertionError("all samples are gathered")

    monkeypatch.setattr(Parts, "load", spy)
    monkeypatch.setattr(Processes, "gather", refuse)
    draw(ckpt, tmp_path / "x.npz")
    assert max(alive) == 4


# ---- Real kills, and two processes ---------------------------------------------------------------


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """A checkpoint whose chunks take a while."""
    net = models.fill_random(models.build(models.make_arch("DiT-Na/2", 8, 1, 10, False)))
    path = tmp_path_factory.mktemp("slow") / "x.pt"
    torch.save(checkpoint(net, name="DiT-Na/2"), path)
    return path


def wait_for_chunks(started, folder, n):
    deadline = time.time() + 60
    while len(list(folder.glob("0*"))) < n:
        assert time.time() < deadline and all(p.poll() is None for p in started)
        time.sleep(0.005)


def test_processes_killed_twice_write_what_one_writes(tmp_path, slow):
    draw(slow, tmp_path / "one.npz", num=1300)
    out = tmp_path / "two" / "x.npz"
    words = ["sample.py", *command(slow, out, num=1300)]
    parts = out.with_name("x.npz.parts")
    for world, n, sig in ((1, 1, signal.SIGKILL), (2, 3, signal.SIGTERM)):
        started = start_workers(world, words)
        wait_for_chunks(started, parts, n)
        for p in started:
            os.kill(p.pid, sig)
        for p in started:
            p.communicate(timeout=30)
    done = workers(2, *words)
    assert "chunks of 250 samples are in" in done.stdout
    assert content(out) == content(tmp_path / "one.npz")
    assert os.listdir(out.parent) == ["x.npz"]


def test_one_command_at_a_time(tmp_path, slow):
    words = command(slow, tmp_path / "x.npz", "--nfe", 50, num=2000)
    first = Command(["sample.py", *words])
    wait_for_chunks([first], tmp_path / "x.npz.parts", 1)
    with pytest.raises(UserError, match="another process is writing into"):
        inside("sample.py", *words)
    first.kill()
    first.communicate()


# ---- Pools ---------------------------------------------------------------------------------------

POOL = """
import sys, time
import torch
from kit import sampling
from kit.cache import synthetic_pool
from kit.checkpoints import load_model
from kit.processes import Processes
sampling.CHUNK = 5
proc = Processes("off")
net, spec = load_model(sys.argv[1])
def slow(x, t, y):
    print("call", flush=True)
    time.sleep(float(sys.argv[3]))
    return net(x, t, y)
slow.net = net
slow.num_classes = 10
options = sampling.SampleOptions(seed=0, nfe=1, cfg=1.0)
print(synthetic_pool(slow, spec, proc, sys.argv[2], 40, options), flush=True)
"""


def finished(started):
    outputs = [p.communicate(timeout=60) for p in started]
    assert [p.returncode for p in started] == [0] * len(started), outputs
    return [out for out, _ in outputs]


def test_jobs_that_want_one_pool_make_it_once(tmp_path, ckpt):
    """Three of one process each and one of two, at the same time."""
    words = ["-c", POOL, ckpt, tmp_path, 0.05]
    started = [Command(words) for _ in range(3)] + start_workers(2, words)
    outputs = finished(started)
    assert sum(out.count("call") for out in outputs) == 8
    assert 1 <= sum("another job is making" in out for out in outputs) <= 3
    assert len({out.splitlines()[-1] for out in outputs}) == 1
    (pool,) = tmp_path.glob("synthetic-*")
    x = np.load(pool / "latents.npy")
    assert x.shape == (40, 1, 1, 1, 8, 8) and (x.reshape(40, -1) != 0).any(1).all()
    assert json.loads((pool / "meta.json").read_text())["classes"] == 10


def test_the_next_job_continues_where_the_maker_was_killed(tmp_path, ckpt):
    maker = Command(["-c", POOL, ckpt, tmp_path, 0.2])
    deadline = time.time() + 60
    while len(list(tmp_path.glob("synthetic-*/latents-*.npy"))) < 3:
        assert time.time() < deadline
        time.sleep(0.005)
    waiting = Command(["-c", POOL, ckpt, tmp_path, 0])
    while "another job" not in (waiting.folder / "stdout").read_text():
        assert time.time() < deadline
        time.sleep(0.005)
    maker.kill()
    maker.communicate()
    (out,) = finished([waiting])
    assert 1 <= out.count("call") <= 5
