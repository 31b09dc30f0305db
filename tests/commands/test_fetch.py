"""Downloads against a server on this machine: whole, truncated, wrong, absent, continued."""
# ruff: noqa: F401, F811  (server is a fixture)
import errno
import fcntl
import gzip
import hashlib
import io
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import checkpoint, inside, quick
from fake_server import Server, server
from processes import Command, finish, workers
from small_data import write_safetensors

import fid
import models
from kit import checkpoints, data, features
from kit.cli import UserError
from kit.download import fetch

NOWHERE = "http://127.0.0.1:9/"  # nothing listens there


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(fid.time, "sleep", lambda _: None)


def accept(path):
    pass


def names(folder):
    """Of all files below a folder, but for locks, which are empty and stay."""
    return sorted(f.name for f in folder.rglob("*") if f.is_file() and f.suffix != ".lock")


def file_of(net):
    """The bytes of a checkpoint of ours."""
    buffer = io.BytesIO()
    torch.save(checkpoint(net), buffer)
    return buffer.getvalue()


# ---- fetch -------------------------------------------------------------------------------------


def test_whole_file_once(server, tmp_path):
    Server.body = b"a" * 100_000
    path = fetch(server, tmp_path, accept)
    assert path.read_bytes() == Server.body
    assert names(tmp_path) == ["x.pt", "x.pt.sha256"]
    asked = len(Server.seen)
    assert fetch(server, tmp_path, accept) == path
    assert len(Server.seen) == asked


def test_truncated_is_no_file_and_continues_in_the_next_run(server, tmp_path):
    Server.body = bytes(range(256)) * 40
    Server.cut = 6000
    with pytest.raises(UserError, match="6,000 of 10,240 bytes.*the same command continues"):
        fetch(server, tmp_path, accept)
    assert [n.endswith(".part") for n in names(tmp_path)] == [True]
    Server.cut = None
    Server.seen = []
    assert fetch(server, tmp_path, accept).read_bytes() == Server.body
    assert 6000 in Server.seen
    assert names(tmp_path) == ["x.pt", "x.pt.sha256"]


def test_a_slow_server_and_one_that_falls_silent(server, tmp_path, monkeypatch):
    """Slow is no error. After TIMEOUT seconds without a byte the download is tried again from
    where it is."""
    monkeypatch.setattr(fid, "TIMEOUT", 0.3)
    Server.body = bytes(range(256)) * 100
    Server.pace = "slow"  # 1,000 bytes every 20 ms, half a second in all
    assert fetch(server, tmp_path / "slow", accept).read_bytes() == Server.body
    Server.pace = "stalls"
    Server.cut = 6000
    Server.seen = []
    with pytest.raises(UserError, match="timed out.*6,000 bytes are kept"):
        fetch(server, tmp_path / "silent", accept)
    assert 6000 in Server.seen
    Server.cut = None
    assert fetch(server, tmp_path / "silent", accept).read_bytes() == Server.body


def test_a_server_that_cannot_continue_begins_again(server, tmp_path):
    Server.body = bytes(range(256)) * 40
    Server.cut = 6000
    Server.ranges = False
    with pytest.raises(UserError):
        fetch(server, tmp_path, accept)
    Server.cut = None
    assert fetch(server, tmp_path, accept).read_bytes() == Server.body


def test_wrong_contents_and_wrong_hash_are_deleted(server, tmp_path):
    def load(path):
        checkpoints.load_model(path, "DiT-XL/2")

    Server.body = b"<html>not weights</html>"
    with pytest.raises(UserError, match="does not hold what it should and was deleted"):
        fetch(server, tmp_path, load)
    assert names(tmp_path) == []
    with pytest.raises(UserError, match="published is 00"):
        fetch(server, tmp_path, accept, sha256="00")
    assert names(tmp_path) == []


def test_two_urls_that_end_alike_and_a_part_that_is_too_long(server, tmp_path):
    Server.body = b"first"
    one = fetch(server, tmp_path, accept)
    Server.body = b"second"
    two = fetch(server.replace("/x.pt", "/other/x.pt"), tmp_path, accept)
    assert one.read_bytes() == b"first"
    assert two.read_bytes() == b"second"
    assert one != two
    Server.cut = 3
    with pytest.raises(UserError):
        fetch(server + ".pt", tmp_path, accept)
    part = next(tmp_path.rglob("*.part"))
    part.write_bytes(b"x" * 99)
    Server.cut = None
    assert fetch(server + ".pt", tmp_path, accept).read_bytes() == b"second"


def test_safetensors_by_url(server, tmp_path, tiny):
    def load(path):
        held = checkpoints.read_file(path)
        checkpoints.load_weights(models.build(tiny.arch), held, path)

    write_safetensors(tmp_path / "x.safetensors", tiny.state_dict())
    Server.body = (tmp_path / "x.safetensors").read_bytes()
    path = fetch(server.replace("x.pt", "x.safetensors"), tmp_path / "c", load)
    assert path.name == "x.safetensors"


def test_no_server_and_file_urls(tmp_path):
    with pytest.raises(UserError, match="nothing was kept"):
        fetch(NOWHERE + "x.pt", tmp_path / "c", accept)
    with pytest.raises(UserError, match="cannot fetch"):
        fetch(NOWHERE + "a b.pt", tmp_path / "c", accept)
    assert names(tmp_path / "c") == []
    (tmp_path / "y.bin").write_bytes(b"abc")
    path = fetch((tmp_path / "y.bin").as_uri(), tmp_path / "c", accept)
    assert path.read_bytes() == b"abc"
    with pytest.raises(UserError):
        fetch((tmp_path / "missing.bin").as_uri(), tmp_path / "c", accept)


# ---- Several jobs ------------------------------------------------------------------------------

JOBS = {  # what two jobs do at once: work() gives the path of the file
    "kit": """
from kit.download import fetch
def work():
    return fetch(url, folder, lambda path: None)
""",
    "fid": """
import fid
def work():
    return fid.fetch(url, folder)
""",
    "another library": """
import os, urllib.request
from kit.download import local_first
def work():
    path = folder + "/x.pt"
    if not os.path.exists(path):
        urllib.request.urlretrieve(url, path)
    return path
work = functools.partial(local_first, work, folder + "/x.pt")
""",
}


@pytest.mark.parametrize("job", JOBS)
def test_two_jobs_want_the_same_file(server, tmp_path, job):
    """One fetches it, the other waits, says so, and uses it."""
    Server.body = bytes(range(256)) * 40
    Server.gate = threading.Event()
    code = f"import functools\nurl = {server!r}\nfolder = {str(tmp_path / 'new')!r}\n{JOBS[job]}"
    code += "\nprint(len(open(work(), 'rb').read()))"
    both = [Command(["-c", code]) for _ in range(2)]
    deadline = time.monotonic() + 60
    while not any("waiting" in (p.folder / "stderr").read_text() for p in both):
        assert time.monotonic() < deadline
        threading.Event().wait(0.02)
    Server.gate.set()
    done = finish(both)
    assert done.stdout == "10240\n" * 2
    assert done.stderr.count("waiting for another process that downloads x.pt\n") == 1
    assert len(Server.seen) == (1 if job == "another library" else 2)  # a look and a fetch, once


def test_where_there_are_no_locks(server, tmp_path, monkeypatch):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    Server.body = b"abc"
    assert fetch(server, tmp_path, accept).read_bytes() == b"abc"


# ---- What torchvision fetches ------------------------------------------------------------------


def idx(x):
    """An array in the format of MNIST's files, compressed."""
    shape = b"".join(n.to_bytes(4, "big") for n in x.shape)
    return gzip.compress(bytes([0, 0, 8, x.ndim]) + shape + x.tobytes())


def mnist_files():
    """{name: content} of MNIST's four files, with 20 random images."""
    images = np.random.RandomState(0).randint(0, 10, (20, 28, 28)).astype(np.uint8)
    labels = np.random.RandomState(0).randint(0, 10, (20,)).astype(np.uint8)
    files = {}
    for part in ("train", "t10k"):
        files[f"{part}-images-idx3-ubyte.gz"] = idx(images)
        files[f"{part}-labels-idx1-ubyte.gz"] = idx(labels)
    return files


@pytest.mark.parametrize("server_is", ["wrong", "truncated", "silent", "absent"])
def test_torchvisions_data_sets(server, tmp_path, monkeypatch, server_is):
    """From a bad server: one line and no data set. Afterwards from a good one: they are read."""
    files = mnist_files()
    hashes = [(name, hashlib.md5(body).hexdigest()) for name, body in files.items()]
    mnist = torchvision.datasets.MNIST
    mirror = server.replace("x.pt", "")
    monkeypatch.setattr(mnist, "resources", hashes)
    monkeypatch.setattr(mnist, "mirrors", [NOWHERE if server_is == "absent" else mirror])
    monkeypatch.setenv("MINDISTILL_CACHE", str(tmp_path))
    monkeypatch.setattr(fid, "TIMEOUT", 0.3)

    def good(self):
        return files[self.path.split("/")[-1]]

    def bad(self):
        if server_is == "wrong":
            return b"<html>not a data set</html>"
        return good(self)[:50] if server_is == "truncated" else good(self)

    monkeypatch.setattr(Server, "body", property(bad))
    if server_is == "silent":
        Server.cut = 50
        Server.pace = "stalls"
    with pytest.raises(UserError, match="--data mnist: torchvision cannot fetch it"):
        data.load("mnist")
    monkeypatch.setattr(mnist, "mirrors", [mirror])
    monkeypatch.setattr(Server, "body", property(good))
    Server.cut = None
    Server.pace = None
    assert data.load("mnist").x.shape == (20, 1, 28, 28)
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("server_is", ["wrong", "truncated"])
def test_torchvisions_weights(server, tmp_path, monkeypatch, server_is):
    buffer = io.BytesIO()
    torch.save(torchvision.models.squeezenet1_1().state_dict(), buffer)
    whole = buffer.getvalue()
    name = f"squeeze-{hashlib.sha256(whole).hexdigest()[:8]}.pth"

    def get_state_dict(self, *_, **__):
        url = server.replace("x.pt", name)
        return torch.hub.load_state_dict_from_url(url, check_hash=True, progress=False)

    weights = torchvision.models._api.WeightsEnum
    monkeypatch.setattr(weights, "get_state_dict", get_state_dict)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    Server.body = b"<html>" if server_is == "wrong" else whole[:1000]
    with pytest.raises(UserError, match="torchvision cannot fetch its weights"):
        features.load_features("torchvision-squeezenet1_1")
    assert names(tmp_path) == []


# ---- The commands ------------------------------------------------------------------------------


def test_the_command_fetches_its_base_model(server, fails, tmp_path, tiny, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("MINDISTILL_CACHE", str(cache))
    whole = file_of(tiny)
    Server.body = whole
    Server.cut = 1000
    assert "1,000 of" in fails("issd", *quick(server))
    assert all(n.endswith(".part") for n in names(cache))
    Server.cut = None
    Server.body = b"<html>not weights</html>"
    assert "does not hold what it should and was deleted" in fails("issd", *quick(server))
    assert names(cache) == []
    Server.body = whole
    assert "nothing was kept" in fails("issd", *quick(NOWHERE + "y.pt"))
    assert names(cache) == []
    workers(2, "issd.py", *quick(server, tmp_path / "out"), env={"MINDISTILL_CACHE": cache})
    assert next(cache.rglob("x.pt")).read_bytes() == whole
    assert (tmp_path / "out" / "last.pt").exists()


def test_every_script_takes_a_url(server, tmp_path, ckpt, monkeypatch):
    monkeypatch.setenv("MINDISTILL_CACHE", str(tmp_path / "cache"))
    Server.body = Path(ckpt).read_bytes()
    inside("sample.py", "--ckpt", server, "--num-samples", 2, "--nfe", 2,
           "--out", tmp_path / "x.npz")
    inside("train.py", "--ckpt", server, "--steps", 1, "--batch-size", 4, "--out", tmp_path / "t")
    assert (tmp_path / "x.npz").exists()
    assert (tmp_path / "t" / "last.pt").exists()
    assert len(Server.seen) == 2  # a look and a fetch, once
