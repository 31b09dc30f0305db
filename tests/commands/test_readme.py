"""The README: every command in it is run here at a tiny size, or is marked "not run"."""
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, checkpoint, inside
from PIL import Image

import models

README = (ROOT / "README.md").read_text()

# What makes a command of the README small: flags appended to it, in place of its own.
SMALLER = {
    "python issd.py": "--steps 2 --eval-samples 12",
    "python ssd.py": "--steps 2 --eval-samples 12",
    "python ddil.py": "--stages 4:2 --eval-samples 12",
    "python dsd.py": "--steps 8 --depth 4 --eval-samples 12",
    "python kd.py": "--steps 2 --eval-samples 12",
    "python issd.py --lam 0.2": "--steps 2 --eval-samples 12",
    "python train.py --data images": "--steps 2 --batch-size 4",
    "python issd.py --ckpt runs/own/last.pt": "--steps 2 --batch-size 4",
    "python sample.py --compare": "--num-samples 4",
    "python sample.py --ckpt runs/own-issd/last.pt": "--num-samples 6 --nfe 3",
    "python fid.py samples.npz images": "--features inception.pth --batch-size 4",
    "python issd.py --model DiT-XL/2": "",
}


def commands(heading=None):
    """The commands of the README's bash blocks, or of those below one heading."""
    text = README
    if heading:
        text = re.split(r"^## ", text, flags=re.M)
        text = next(part for part in text if part.startswith(heading))
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", text, flags=re.M | re.S):
        found += [line for line in block.splitlines() if line.strip()]
    return found


def are_run(commands):
    """Those that are run here: not the installation, nor what is marked."""
    installation = ("git clone", "cd ", "pip install")
    return [c for c in commands
            if not c.startswith(installation) and not c.endswith("# not run")]


def smaller(command):
    """The flags that make it small; the longest beginning of it that is known counts."""
    known = [start for start in SMALLER if command.startswith(start)]
    assert known, f"{command}: neither known to this test nor marked '# not run'"
    return SMALLER[max(known, key=len)].split()


def run(command, *more):
    """A command of the README, small, in the folder where we are; returns what it printed."""
    file, *words = command.split()[1:]
    return inside(file, *words, *smaller(command), *more)


def test_every_command_is_tested_or_marked():
    found = are_run(commands())
    assert len(found) >= 8
    for command in found:
        smaller(command)


def test_length():
    assert len(README.splitlines()) < 265
    assert len(README.split()) < 2600


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        target = re.sub(r"\s+", "", target)
        if "://" not in target and not target.startswith("#"):
            assert (ROOT / target.split("#")[0]).exists(), target


@pytest.fixture
def home(tmp_path, monkeypatch):
    """We are in a folder with 6 images in two class folders."""
    folder = tmp_path
    monkeypatch.chdir(folder)
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(3):
            x = rng.integers(0, 256, (70, 90, 3), np.uint8)
            Image.fromarray(x).save(folder / "images" / name / f"{i}.png")
    return folder


def test_quick_start_and_change_something(home, ckpt):
    """With a checkpoint in place of the teacher, whose training another test covers."""
    for command in are_run([*commands("Quick start"), *commands("Change something")]):
        said = run(command, "--ckpt", ckpt)
        assert "after issd" in said and "pixel distance" in said
    assert (home / "runs" / "issd-lam-0.2" / "samples.png").exists()
    said = inside("sample.py", "--ckpt", "runs/issd/last.pt", "--nfe", 2)
    assert "40 samples" in said and (home / "samples.png").exists()


@pytest.mark.parametrize("method", ["ssd", "ddil", "dsd", "kd"])
def test_the_table_of_methods(home, tiny, method):
    command = f"python {method}.py"
    assert f"`{command}`" in README
    base = {}
    if method == "ddil":
        base = dict(prediction="v")
    torch.save(checkpoint(tiny, **base), home / f"{method}.pt")
    words = ["--ckpt", home / f"{method}.pt"]
    if method == "kd":
        words += ["--student", "DiT-Na/2", "--nfe", 3]
    said = run(command, *words)
    assert "before" in said and "after" in said
    assert (home / "runs" / method / "samples.png").exists()


def test_your_own_images(home):
    from torchvision.models import inception
    net = inception.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    weights = models.fill_random(net).state_dict()
    torch.save({k: v for k, v in weights.items() if "num_batches" not in k},
               home / "inception.pth")
    said = [run(command) for command in commands("Your own images")]
    assert len(said) == 5
    assert "warning" not in said[0]
    assert "FD" in said[-1] or "FID" in said[-1]
    assert (home / "compare.png").exists() and (home / "samples.npz").exists()


def test_the_plan_that_is_shown(home):
    plan, = are_run(commands("Released weights"))
    said = run(plan)
    shown = re.search(r"^```\n(iSSD of .*?)^```", README, flags=re.M | re.S)[1]
    for line in shown.splitlines():
        line = line.split("<-")[0].split("...")[0].rstrip()
        assert line in said, f"{line}\n\n{said}"


def copied(name):
    """A python block of the README that holds this name."""
    blocks = re.findall(r"^```python\n(.*?)^```", README, flags=re.M | re.S)
    return next(block for block in blocks if name in block)


def test_copying_the_frechet_distance(capsys):
    from fid import frechet_distance
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(50, 8, generator=rng)
    code = copied("frechet_distance").replace("2048", "8")
    exec(code, {"features_a": a, "features_b": (a + 1).numpy()})
    assert float(capsys.readouterr().out) == pytest.approx(8, rel=1e-6)
    assert callable(frechet_distance)


class Foreign(torch.nn.Module):
    """A network that is not ours: blocks in a row, label and time added."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Conv2d(1, 1, 3, padding=1) for _ in range(3))

    def forward(self, x, t, y):
        for block in self.blocks:
            x = x + block(x).tanh() + t.view(-1, 1, 1, 1) / 1000 + y.view(-1, 1, 1, 1) / 10
        return x


def test_copying_issd_loss_to_a_foreign_network():
    """The block is run as it stands."""
    from issd import issd_loss
    model = Foreign()
    names = {"model": model, "issd_loss": issd_loss, "x0": torch.randn(4, 1, 8, 8),
             "y": torch.arange(4)}
    exec(copied("def tapped"), names)
    assert names["loss"] > 0
    assert model.blocks[0].weight.grad.abs().sum() > 0
    assert names["frozen"].blocks[0].weight.grad is None
    student = names["student"]
    seen = []

    def record(l, h):
        seen.append(l)
        return h
    student(names["x0"], names["n"], names["y"], tap=record)
    assert seen == [0, 1, 2, 3]
    assert not model.blocks[0]._forward_hooks
