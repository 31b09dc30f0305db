"""EDM's networks: hostile files, other networks, and flags that do not go with them."""
import io
import os
import pickle
from collections import OrderedDict

import edm_pickles
import pytest
import torch
from conftest import inside
from tiny_networks import EDM_ARCH, digits_net

import models
from kit import checkpoints
from kit.cli import UserError
from solvers import make_schedule, solver_grid

EDM = make_schedule("edm")


@pytest.fixture(scope="module")
def sd():
    return models.fill_random(models.build(EDM_ARCH)).state_dict()


def test_grids_that_do_not_go_with_edms_schedule():
    for solver, nfe in (("heun", 10), ("heun", 1), ("plms", 9), ("sde", 9)):
        with pytest.raises(ValueError, match="--nfe|--solver"):
            solver_grid(EDM, solver, nfe)
    with pytest.raises(ValueError, match="does not go with"):
        solver_grid(make_schedule("interpolant"), "heun", 9)
    with pytest.raises(ValueError, match="--grid dit"):
        solver_grid(EDM, "ddim", 9, "dit")


# ---- Hostile files -----------------------------------------------------------------------------


class Call:
    """An object whose file asks the reader to call function(*arguments)."""

    def __init__(self, function, *arguments):
        self.function = function
        self.arguments = arguments

    def __reduce__(self):
        return self.function, self.arguments


def hostile_file(where, sd, executed):
    """The bytes of a network's file that would create the file `executed`, by this way."""
    harm = Call(os.system, f"touch {executed}")
    held = edm_pickles.network(sd)
    buffers = held["ema"].meta["state"]["_buffers"]
    if where == "top":
        held = harm
    elif where == "beside":
        held["loss_fn"] = harm
    elif where == "storage":
        inner = pickle.dumps(harm, protocol=2)
        buffers["x"] = Call(torch.storage._load_from_bytes, inner)
    elif where == "storage zip":
        inner = io.BytesIO()
        torch.save(harm, inner)
        buffers["x"] = Call(torch.storage._load_from_bytes, inner.getvalue())
    elif where == "state":
        held["ema"].meta["state"]["harm"] = [harm]
    elif where == "builtins":
        held["ema"] = Call(eval, f"open({str(executed)!r}, 'w')")
    elif where == "getattr":
        return b"\x80\x04cbuiltins\ngetattr\n(cos\npath\nVexists\ntR."
    return pickle.dumps(held, protocol=4)


WAYS = [
    ("top", "it names posix.system"),
    ("beside", "it names posix.system"),
    ("storage", "posix.system"),
    ("state", "it names posix.system"),
    ("storage zip", "posix.system"),
    ("getattr", "it names builtins.getattr"),
    ("builtins", "it names builtins.eval"),
]


@pytest.mark.parametrize("where, reason", WAYS)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_hostile_pickles_are_refused(tmp_path, monkeypatch, sd, where, reason):
    """Nothing that the file names is called, also not by the bytes of a tensor, which are a file
    of their own."""
    edm_pickles.make_modules(monkeypatch)
    executed = tmp_path / "executed"
    (tmp_path / "net.pkl").write_bytes(hostile_file(where, sd, executed))
    with pytest.raises(UserError, match="cannot be read") as refusal:
        checkpoints.load_model(tmp_path / "net.pkl")
    assert not executed.exists()
    line = str(refusal.value)
    refused_by_torch = where.startswith("storage") and "weights_only" in line
    assert reason in line or refused_by_torch, line


def test_a_pickle_changes_nothing_outside(tmp_path):
    """What a file sets on the objects that it may name does not last: the names are made anew for
    every file."""
    names = (
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n",
        b"ccollections\nOrderedDict\n",
    )
    for name in names:
        build = b"N}U\x07changedI01\ns\x86b."  # BUILD with (None, {"changed": True})
        (tmp_path / "net.pkl").write_bytes(b"\x80\x02" + name + build)
        with pytest.raises(UserError, match="cannot be read"):
            checkpoints.read_file(tmp_path / "net.pkl")
        assert not hasattr(torch._utils._rebuild_tensor_v2, "changed")
        assert not hasattr(OrderedDict, "changed")
    others = (pickle.dumps({"model": 1}), pickle.dumps({"ema": OrderedDict()}))
    for content in (b"", b"not a pickle", *others):
        (tmp_path / "net.pkl").write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            checkpoints.read_file(tmp_path / "net.pkl")


# ---- Other networks, and flags -----------------------------------------------------------------


def test_other_networks_of_edm_are_refused(tmp_path, monkeypatch, sd):
    edm_pickles.make_modules(monkeypatch)
    for changes, message in (
        (dict(kind="VPPrecond"), "a VPPrecond with sigma_data 0.5"),
        (dict(sigma_data=1.0), "sigma_data 1.0"),
    ):
        edm_pickles.write(tmp_path / "x.pkl", edm_pickles.network(sd, **changes))
        with pytest.raises(UserError, match=message):
            checkpoints.describe(tmp_path / "x.pkl")

    without_end = {key: value for key, value in sd.items() if "aux_conv" not in key}
    misshaped = sd | {"model.enc.16x16_conv.weight": torch.zeros(())}
    for bad in (without_end, {"model.enc.x": torch.zeros(1)}, misshaped):
        torch.save(bad, tmp_path / "x.pt")
        with pytest.raises(UserError, match="only that one is known"):
            checkpoints.describe(tmp_path / "x.pt")

    torch.save(sd | {"model.map_noise.freqs": torch.zeros(8)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="unexpected 1: model.map_noise.freqs"):
        checkpoints.load_model(tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"holds DDPM\+\+, not --model DDPM\+\+-t"):
        checkpoints.describe(tmp_path / "x.pt", "DDPM++-t")


def test_what_does_not_go_with_edms_networks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (["--prediction", "v"], ["--schedule", "cosine"]):
        with pytest.raises(UserError, match="have their own prediction"):
            inside("train.py", "--model", "DDPM++-8x1", *words)
    torch.save({"ema": digits_net().state_dict()}, tmp_path / "x.pt")
    words = ["--ckpt", "x.pt", "--eval-samples", 0]
    with pytest.raises(UserError, match="has EDM's schedule"):
        inside("issd.py", *words, "--data", "digits")
    with pytest.raises(UserError, match="has EDM's schedule"):
        inside("dsd.py", *words)
