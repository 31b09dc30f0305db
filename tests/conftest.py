"""What the tests share: golden numbers, a tiny checkpoint, scripts run in this process."""
import contextlib
import importlib
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests run on the CPU, on every machine
os.environ["OMP_NUM_THREADS"] = "1"
import torch
from processes import ROOT

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    """Every test sees the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def golden():
    """golden(name): the arrays of a file in tests/golden."""
    def load(name):
        return np.load(GOLDEN / name)
    return load


@pytest.fixture(scope="session")
def tiny():
    """A tiny network with random weights; see models.fill_random for why random."""
    import models
    arch = models.make_arch("DiT-Ti/2", 8, 1, 10, False)
    return models.fill_random(models.build(arch))


@pytest.fixture(scope="session")
def ckpt(tmp_path_factory, tiny):
    """A checkpoint of that network in our format."""
    path = tmp_path_factory.mktemp("ckpt") / "base.pt"
    torch.save(checkpoint(tiny), path)
    return str(path)


def checkpoint(net, **changes):
    """A network -> what train.py would have saved of it."""
    weights = net.state_dict()
    return {"format": 1, "model": weights, "ema": weights, "opt": {}, "step": 1, "args": {},
            "name": "DiT-Ti/2", "arch": net.arch, "prediction": "eps", "schedule": "linear",
            "scale": None, "classes": 10, "grid": None, "nfe": None, "cfg": 1.0,
            "method": "train", **changes}


def inside(name, *words):
    """Run `python NAME WORDS` in this process: inside("issd.py", "--steps", 3), or
    inside("kit.encode", ...). Returns what the script printed."""
    from kit.cli import user_errors
    module = importlib.import_module(name.removesuffix(".py"))
    out = io.StringIO()
    with contextlib.redirect_stdout(out), user_errors():
        module.main(module.parser().parse_args([str(w) for w in words]))
    return out.getvalue()


def weights(folder):
    return torch.load(Path(folder) / "last.pt", weights_only=True)["model"]


def log_lines(folder):
    """The lines of a log about steps; the first line holds the arguments."""
    first, *lines = (Path(folder) / "log.jsonl").read_text().splitlines()
    assert "args" in json.loads(first)
    return [json.loads(line) for line in lines]


def losses(folder):
    return [line["loss"] for line in log_lines(folder)]


def largest_difference(a, b):
    """Between two state dicts, over the keys of b."""
    return max(float((a[k] - v).abs().max()) for k, v in b.items())


def are_equal(a, b):
    """Whether two state dicts are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def make_latents(folder, x, y, classes=10, scale=None):
    """A folder of cached latents, as --data takes it."""
    folder.mkdir()
    np.save(folder / "latents.npy", x)
    np.save(folder / "labels.npy", y)
    (folder / "meta.json").write_text(json.dumps({"classes": classes, "scale": scale}))
    return str(folder)


# ---- Wrong input -------------------------------------------------------------------------------

SCRIPTS = {name: name for name in ("issd", "ssd", "train", "sample", "fid", "ddil", "dsd", "kd")}
SCRIPTS["encode"] = "kit.encode"


def load_script(script):
    return importlib.import_module(SCRIPTS[script])


@pytest.fixture
def fails(capsys, monkeypatch, tmp_path):
    """fails("issd", words...) runs it in this process, in tmp_path, and returns its one line of
    complaint. The exit code must be 2."""
    monkeypatch.chdir(tmp_path)

    def call(script, *words):
        monkeypatch.setattr(sys, "argv", [script + ".py"])
        from kit.cli import run_script
        module = load_script(script)
        with pytest.raises(SystemExit) as e:
            args = module.parser().parse_args([str(w) for w in words])
            run_script(module.main, args)
        complaints = []
        for line in capsys.readouterr().err.replace("\r", "\n").split("\n"):
            if "error" in line:
                complaints.append(line.replace("\x1b[A", "").strip())
        assert e.value.code == 2 and len(complaints) == 1, complaints
        assert ": error: " in complaints[0]
        return complaints[0]
    return call


def quick(ckpt, out="out", *more):
    """Two small steps, without measuring."""
    words = ["--ckpt", ckpt, "--steps", 2, "--batch-size", 4, "--eval-samples", 0, "--out", out]
    return [*words, *more]
