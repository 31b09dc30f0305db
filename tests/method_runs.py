"""What the tests of the method scripts share: runs that stop, what they leave and print."""
import re
from pathlib import Path

import pytest
import torch
from conftest import checkpoint, inside

import models
from kit import checkpoints
from kit.run import Stop


def load(folder):
    """The checkpoint that a run left."""
    return torch.load(Path(folder) / "last.pt", weights_only=True)


def stop_after(step, *command):
    """Run a command until it sees a signal after this step, saves and exits."""
    def check(self, done):
        return done == step, done == step  # save now? has a signal ended the run?

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stop, "check", check)
        with pytest.raises(SystemExit):
            inside(*command)


def report_of(said):
    """The table at the end of what a run prints, and what follows it."""
    begin = re.search(r"^\d+ samples, NFE ", said, re.M).start()
    return said[begin:]


def total_difference(a, b):
    """The sum of all absolute differences of two state dicts."""
    return sum(float((a[k] - b[k]).abs().sum()) for k in a)


def write_edm_teacher(folder):
    """The file of a tiny EDM network of the digits."""
    net = models.fill_random(models.build(models.make_arch("DDPM++-8x1", 8, 1, 10)))
    spec = {k: v for k, v in checkpoints.EDM_SPEC.items() if k not in ("scale", "cfg")}
    torch.save(checkpoint(net, name="DDPM++-8x1", **{**spec, "knows_null": True}),
               folder / "edm.pt")
    return folder / "edm.pt"


def write_uncond(teacher, folder):
    """The file of a second teacher, which knows no classes."""
    net = models.fill_random(models.build(models.make_arch("DDPM++-8x1", 8, 1, 0)), seed=1)
    weights = net.state_dict()
    held = torch.load(teacher, weights_only=True)
    held.update(model=weights, ema=weights, arch=net.arch, classes=0, name="DDPM++-8x1-uncond")
    torch.save(held, folder / "uncond.pt")
    return folder / "uncond.pt"
