import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests run on the CPU, on every machine
import torch

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.fixture
def golden():
    return lambda name: np.load(GOLDEN / name)


@pytest.fixture(scope="session")
def tiny():
    """A checkpoint of a tiny random network in our format; see models.fill_random for why random."""
    import models
    net = models.fill_random(models.build(models.make_arch("DiT-Ti/2", 8, 1, 10, False)))
    return net


@pytest.fixture(scope="session")
def ckpt(tmp_path_factory, tiny):
    path = tmp_path_factory.mktemp("ckpt") / "base.pt"
    torch.save(checkpoint(tiny), path)
    return str(path)


def checkpoint(net, **changes):
    sd = net.state_dict()
    return {"format": 1, "model": sd, "ema": sd, "opt": {}, "step": 1, "args": {}, "name": "DiT-Ti/2", "arch": net.arch, "prediction": "eps",
            "schedule": "linear", "scale": None, "classes": 10, "grid": None, "nfe": None, "cfg": 1.0, "method": "train", **changes}


def script(*words, env=None, check=True, timeout=300, cwd=None):
    """Run `python WORDS` in the project as a user would."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=cwd or ROOT, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(env or {})})
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def inside(name, *words):
    """The same in this process, which spares its start; returns what it printed."""
    import contextlib
    import importlib
    import io
    module = importlib.import_module(Path(name).stem)
    with contextlib.redirect_stdout(out := io.StringIO()):
        module.main(module.parser().parse_args([str(w) for w in words]))
    return out.getvalue()


def torchrun(n, *words, **kw):
    return script("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", n, *words, **kw)


def weights(folder):
    return torch.load(Path(folder) / "last.pt", weights_only=True)["model"]


def losses(folder):
    import json
    return [json.loads(line)["loss"] for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
