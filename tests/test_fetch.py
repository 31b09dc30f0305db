"""Downloads against a server on this machine: whole, truncated, wrong, absent, continued."""
import http.server
import threading

import pytest
import torch
from conftest import checkpoint, script, torchrun

import checkpoints
import models
from checkpoints import fetch
from runtime import UserError


class Server(http.server.BaseHTTPRequestHandler):
    body, cut, ranges = b"", None, True

    def do_GET(self):
        begin = int(self.headers.get("Range", "bytes=0-")[6:-1]) if self.ranges else 0
        Server.seen.append(begin)
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(self.body) - begin))
        self.end_headers()
        if self.command == "HEAD":
            return
        end = min(len(self.body), Server.cut) if Server.cut else len(self.body)
        self.wfile.write(self.body[begin:end])

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    Server.seen, Server.cut, Server.ranges = [], None, True
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
    import io
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
