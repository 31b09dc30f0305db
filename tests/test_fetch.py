"""Downloads against a server on this machine: whole, truncated, wrong, absent, continued."""
import gzip
import hashlib
import http.server
import io
import socket
import threading

import numpy as np
import pytest
import torch
import torchvision
from conftest import checkpoint, inside, script, torchrun

import checkpoints
import data
import features
import models
from checkpoints import fetch
from runtime import UserError


class Server(http.server.BaseHTTPRequestHandler):
    body, cut, ranges, pace = b"", None, True, None  # pace "slow": little by little; "stalls": silent after the cut, with the connection open

    def do_GET(self):
        begin = int(self.headers.get("Range", "bytes=0-")[6:-1]) if self.ranges else 0
        Server.seen.append(begin)
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(self.body) - begin))
        self.end_headers()
        if self.command == "HEAD":
            return
        end = min(len(self.body), Server.cut) if Server.cut else len(self.body)
        if Server.pace == "slow":
            for i in range(begin, end, 1000):
                self.wfile.write(self.body[i:min(i + 1000, end)])
                threading.Event().wait(0.02)
        else:
            self.wfile.write(self.body[begin:end])
        if Server.pace == "stalls" and end < len(self.body):
            self.wfile.flush(), threading.Event().wait(1.5)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    Server.seen, Server.cut, Server.ranges, Server.pace = [], None, True, None
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}/x.pt"
    httpd.shutdown()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(checkpoints.time, "sleep", lambda _: None)


def accept(path):
    pass


def names(folder):
    return sorted(f.name for f in folder.rglob("*") if f.is_file())


def test_whole_file_once(server, tmp_path):
    Server.body = b"a" * 100_000
    path = fetch(server, tmp_path, accept)
    assert path.read_bytes() == Server.body and names(tmp_path) == ["x.pt", "x.pt.sha256"]
    asked = len(Server.seen)
    assert fetch(server, tmp_path, accept) == path and len(Server.seen) == asked


def test_truncated_is_no_file_and_continues_in_the_next_run(server, tmp_path):
    Server.body, Server.cut = bytes(range(256)) * 40, 6000
    with pytest.raises(UserError, match="6,000 of 10,240 bytes.*the same command continues"):
        fetch(server, tmp_path, accept)
    assert [n.endswith(".part") for n in names(tmp_path)] == [True]
    Server.cut, Server.seen = None, []
    assert fetch(server, tmp_path, accept).read_bytes() == Server.body
    assert 6000 in Server.seen and names(tmp_path) == ["x.pt", "x.pt.sha256"]


def test_a_slow_server_and_one_that_falls_silent(server, tmp_path, monkeypatch):
    """Slow is no error; after TIMEOUT seconds without a byte the download is tried again from where it is."""
    monkeypatch.setattr(checkpoints, "TIMEOUT", 0.3)
    Server.body, Server.pace = bytes(range(256)) * 100, "slow"  # a byte every 20 ms, half a second in all
    assert fetch(server, tmp_path / "slow", accept).read_bytes() == Server.body
    Server.pace, Server.cut, Server.seen = "stalls", 6000, []
    with pytest.raises(UserError, match="timed out.*6,000 bytes are kept"):
        fetch(server, tmp_path / "silent", accept)
    assert 6000 in Server.seen
    Server.cut = None
    assert fetch(server, tmp_path / "silent", accept).read_bytes() == Server.body


def idx(x):
    """An array in the format of MNIST's files, compressed."""
    return gzip.compress(bytes([0, 0, 8, x.ndim]) + b"".join(n.to_bytes(4, "big") for n in x.shape) + x.tobytes())


@pytest.mark.parametrize("server_is", ["wrong", "truncated", "silent", "absent"])
def test_torchvisions_data_sets(server, tmp_path, monkeypatch, server_is):
    """Their files from a bad server are one line and no data set; from a good one, afterwards, they are read."""
    files = {f"{part}-{kind}": idx(np.random.RandomState(0).randint(0, 10, (20, 28, 28)[:ndim]).astype(np.uint8)) for part in ("train", "t10k")
             for kind, ndim in (("images-idx3-ubyte.gz", 3), ("labels-idx1-ubyte.gz", 1))}
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", [(name, hashlib.md5(body).hexdigest()) for name, body in files.items()])
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [server.replace("x.pt", "")])
    monkeypatch.setattr(data, "CACHE", tmp_path)
    monkeypatch.setattr(checkpoints, "TIMEOUT", 0.3)
    good = lambda self: files[self.path.split("/")[-1]]
    bad = {"wrong": lambda self: b"<html>not a data set</html>", "truncated": lambda self: good(self)[:50], "silent": good, "absent": good}[server_is]
    monkeypatch.setattr(Server, "body", property(bad))
    Server.cut, Server.pace = (50, "stalls") if server_is == "silent" else (None, None)
    if server_is == "absent":
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(UserError, match="--data mnist: torchvision cannot fetch it"):
        data.load("mnist")
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [server.replace("x.pt", "")])
    monkeypatch.setattr(Server, "body", property(good))
    Server.cut = Server.pace = None
    assert data.load("mnist").x.shape == (20, 1, 28, 28) and socket.getdefaulttimeout() is None


@pytest.mark.parametrize("server_is", ["wrong", "truncated"])
def test_torchvisions_weights(server, tmp_path, monkeypatch, server_is):
    buffer = io.BytesIO()
    torch.save(torchvision.models.squeezenet1_1().state_dict(), buffer)
    whole = buffer.getvalue()
    name = f"squeeze-{hashlib.sha256(whole).hexdigest()[:8]}.pth"
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict",
                        lambda self, *a, **kw: torch.hub.load_state_dict_from_url(server.replace("x.pt", name), check_hash=True, progress=False))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    Server.body = b"<html>" if server_is == "wrong" else whole[:1000]
    with pytest.raises(UserError, match="torchvision cannot fetch its weights"):
        features.load_features("torchvision-squeezenet1_1")
    assert names(tmp_path) == []


def test_a_server_that_cannot_continue_begins_again(server, tmp_path):
    Server.body, Server.cut, Server.ranges = bytes(range(256)) * 40, 6000, False
    with pytest.raises(UserError):
        fetch(server, tmp_path, accept)
    Server.cut = None
    assert fetch(server, tmp_path, accept).read_bytes() == Server.body


def test_wrong_contents_and_wrong_hash_are_deleted(server, tmp_path):
    Server.body = b"<html>not weights</html>"
    from checkpoints import load_model
    with pytest.raises(UserError, match="does not hold what it should and was deleted"):
        fetch(server, tmp_path, lambda path: load_model(path, "DiT-XL/2"))
    assert names(tmp_path) == []
    with pytest.raises(UserError, match="published is 00"):
        fetch(server, tmp_path, accept, sha256="00")
    assert names(tmp_path) == []


def test_two_urls_that_end_alike_and_a_part_that_is_too_long(server, tmp_path):
    Server.body = b"first"
    one = fetch(server, tmp_path, accept)
    Server.body = b"second"
    two = fetch(server.replace("/x.pt", "/other/x.pt"), tmp_path, accept)
    assert one.read_bytes() == b"first" and two.read_bytes() == b"second" and one != two
    Server.cut = 3
    with pytest.raises(UserError):
        fetch(server + ".pt", tmp_path, accept)
    part = next(tmp_path.rglob("*.part"))
    part.write_bytes(b"x" * 99)
    Server.cut = None
    assert fetch(server + ".pt", tmp_path, accept).read_bytes() == b"second"


def test_safetensors_by_url(server, tmp_path, tiny):
    from test_models import write_safetensors
    write_safetensors(tmp_path / "x.safetensors", tiny.state_dict())
    Server.body = (tmp_path / "x.safetensors").read_bytes()
    path = fetch(server.replace("x.pt", "x.safetensors"), tmp_path / "c", lambda p: checkpoints.load_weights(models.build(tiny.arch), checkpoints.read_file(p), p))
    assert path.name == "x.safetensors"


def test_no_server_and_file_urls(tmp_path):
    with pytest.raises(UserError, match="nothing was kept"):
        fetch("http://127.0.0.1:9/x.pt", tmp_path / "c", accept)
    with pytest.raises(UserError, match="cannot fetch"):
        fetch("http://127.0.0.1:9/a b.pt", tmp_path / "c", accept)
    assert names(tmp_path / "c") == []
    (tmp_path / "y.bin").write_bytes(b"abc")
    assert fetch((tmp_path / "y.bin").as_uri(), tmp_path / "c", accept).read_bytes() == b"abc"
    with pytest.raises(UserError):
        fetch((tmp_path / "missing.bin").as_uri(), tmp_path / "c", accept)


def test_the_command_fetches_its_base_model(server, tmp_path, tiny):
    buffer = io.BytesIO()
    torch.save(checkpoint(tiny), buffer)
    Server.body = buffer.getvalue()
    run = lambda url=server, **kw: script("issd.py", "--ckpt", url, "--steps", 2, "--batch-size", 4, "--eval-samples", 0, "--out", tmp_path / "out",
                              env={"MINDISTILL_CACHE": str(tmp_path / "cache")}, **kw)
    Server.cut = 1000
    failed = run(check=False)
    assert failed.returncode == 2 and failed.stderr.count("error:") == 1 and not [n for n in names(tmp_path / "cache") if not n.endswith(".part")]
    Server.cut, whole = None, Server.body
    for url, body, words in ((server, b"<html>not weights</html>", "does not hold what it should and was deleted"), ("http://127.0.0.1:9/y.pt", whole, "nothing was kept")):
        Server.body = body
        failed = run(url, check=False)
        assert failed.returncode == 2 and failed.stderr.count("error:") == 1 and words in failed.stderr and names(tmp_path / "cache") == []
    Server.body = whole
    torchrun(2, "issd.py", "--ckpt", server, "--steps", 2, "--batch-size", 4, "--eval-samples", 0, "--out", tmp_path / "out",
             env={"MINDISTILL_CACHE": str(tmp_path / "cache")})
    assert next((tmp_path / "cache").rglob("x.pt")).read_bytes() == Server.body and (tmp_path / "out" / "last.pt").exists()


def test_every_script_takes_a_url(server, tmp_path, ckpt, monkeypatch):
    monkeypatch.setattr(checkpoints, "CACHE", tmp_path / "cache")
    Server.body = open(ckpt, "rb").read()
    inside("sample.py", "--ckpt", server, "--num-samples", 2, "--nfe", 2, "--out", tmp_path / "x.npz")
    inside("train.py", "--ckpt", server, "--steps", 1, "--batch-size", 4, "--out", tmp_path / "t")
    assert (tmp_path / "x.npz").exists() and (tmp_path / "t" / "last.pt").exists() and len(Server.seen) == 2  # a look and a fetch, once
