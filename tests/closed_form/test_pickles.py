"""Files of weights with other objects beside them: the weights are read, and nothing is run."""
import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import functools
import pathlib
import pickle
import sys
import types
import uuid
import warnings
import zipfile

import edm_pickles
import numpy as np
import pytest
import torch
from tiny_networks import EDM_ARCH, assert_same_weights, small_dit

import models
from kit import checkpoints, unpickle

# ---- Metadata ----------------------------------------------------------------------------------


@pytest.fixture
def foreign(monkeypatch):
    """foreign(name, base=object, **attributes): a class of a library that is there only while a
    test writes its file."""
    modules = []

    def make(name, base=object, **attributes):
        path, _, kind = name.rpartition(".")
        parts = path.split(".")
        for n in range(len(parts)):
            modules.append(".".join(parts[:n + 1]))
            sys.modules.setdefault(modules[-1], types.ModuleType(modules[-1]))
        cls = type(kind, (base,), {"__module__": path, **attributes})
        setattr(sys.modules[path], kind, cls)
        return cls

    yield make
    for name in modules:
        sys.modules.pop(name, None)


def metadata(foreign):
    """{what it is: something that others save beside weights}."""
    config = foreign("omegaconf.dictconfig.DictConfig")()
    config._content = {"lr": 1e-4, "any": foreign("omegaconf.nodes.AnyNode")()}
    listed = foreign("somewhere.List", list)([1, 2])
    mapped = foreign("somewhere.EasyDict", dict)(a=1)
    mapped.b = 2
    checkpointing = foreign("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
    early = foreign("pytorch_lightning.callbacks.early_stopping.EarlyStopping")
    color = enum.Enum("Color", "RED")
    color.__module__ = "somewhere"
    sys.modules["somewhere"].Color = color
    made = dataclasses.make_dataclass("Settings", ["lr"])
    made.__module__ = "somewhere"
    sys.modules["somewhere"].Settings = made
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.lr_scale = 0.5
    return {
        "numpy": [np.float64(0.5), np.int64(3), np.bool_(True), np.arange(3.0), np.dtype("f4"),
                  np.float32, np.array(["a", None], object), np.str_("x")],
        "paths": [pathlib.Path("x"), pathlib.PurePosixPath("y"), pathlib.PureWindowsPath("z")],
        "sets": [{1, 2}, frozenset("a"), range(3), slice(1), 1j, bytearray(b"a"), b"a", b""],
        "times": [datetime.datetime.now(), datetime.timedelta(1), datetime.timezone.utc],
        "arguments": [argparse.Namespace(lr=1, out=pathlib.Path("x")), types.SimpleNamespace(a=1)],
        "containers": [collections.defaultdict(list, a=[1]), collections.deque([1], 3),
                       collections.Counter("aab"), collections.OrderedDict(a=1)],
        "numbers": [decimal.Decimal("0.1"), uuid.uuid4()],
        "classes": [int, torch.float16, torch.device("cpu"), torch.Size([1]), made(1e-4),
                    color.RED, functools.partial(made, 1), torch.optim.AdamW],
        "foreign": [config, listed, mapped, {checkpointing: {"best": 1}, early: {}}],
        "networks": [torch.nn.Linear(2, 2), parameter],
    }


KINDS = ["numpy", "paths", "sets", "times", "arguments", "containers", "numbers", "classes",
         "foreign", "networks"]


@pytest.mark.parametrize("form", ["zip", "legacy", "protocol 4"])
def test_harmless_metadata_is_taken(tmp_path, foreign, form):
    sd = small_dit().state_dict()
    options = {"zip": {}, "legacy": dict(_use_new_zipfile_serialization=False),
               "protocol 4": dict(pickle_protocol=4)}[form]
    beside = metadata(foreign)
    assert list(beside) == KINDS
    for kind in KINDS:
        torch.save({"args": None, "ema": sd, "beside": beside[kind]}, tmp_path / f"{kind}.pt",
                   **options)
    del beside
    for name in [name for name in sys.modules if name.split(".")[0] in ("omegaconf", "somewhere")]:
        del sys.modules[name]
    for kind in KINDS:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            held = checkpoints.read_file(tmp_path / f"{kind}.pt")
        assert_same_weights(checkpoints.load_weights(small_dit(), held, kind), sd)
        if kind == "numpy":
            assert held["beside"][:3] == [0.5, 3, True]
        if kind == "arguments":
            assert held["beside"][0].state["lr"] == 1


def test_a_whole_network_in_place_of_its_state_dict(tmp_path):
    net = small_dit()
    torch.save(net, tmp_path / "net.pt")
    torch.save({"model": net, "args": None}, tmp_path / "inside.pt")
    for name in ("net.pt", "inside.pt"):
        held = checkpoints.read_file(tmp_path / name)
        assert_same_weights(checkpoints.load_weights(small_dit(), held, name), net.state_dict())


# ---- EDM's pickles -----------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_edms_pickles_of_every_protocol(tmp_path, monkeypatch, protocol):
    edm_pickles.make_modules(monkeypatch)
    sd = models.fill_random(models.build(EDM_ARCH)).state_dict()
    edm_pickles.write(tmp_path / "net.pkl", edm_pickles.network(sd), protocol)
    net, spec = checkpoints.load_model(tmp_path / "net.pkl")
    assert_same_weights(net, sd)
    assert spec["classes"] == 10
    assert not spec["knows_null"]
    if protocol == 2:  # the name of the file tells nothing
        (tmp_path / "net.pkl").rename(tmp_path / "net.pt")
        assert checkpoints.describe(tmp_path / "net.pt") == spec


# ---- Hostile files -----------------------------------------------------------------------------

HARM = (b"cos\nsystem\n", b"cposix\nsystem\n", b"csubprocess\nPopen\n", b"c__builtin__\neval\n",
        b"cbuiltins\nexec\n", b"cbuiltins\ngetattr\n", b"c__builtin__\n__import__\n",
        b"cbuiltins\nopen\n", b"cimportlib\nimport_module\n", b"cpickle\nloads\n",
        b"ccode\nInteractiveInterpreter\n", b"coperator\nattrgetter\n", b"ctypes\nCodeType\n",
        b"cfunctools\nreduce\n", b"ccodecs\nopen\n", b"c_codecs\ndecode\n", b"cshutil\nrmtree\n")


def zip_of(content, path):
    """A file as torch.save() writes it, whose pickle is `content`."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as f:
        f.writestr("x/data.pkl", content)
        f.writestr("x/version", "3\n")
        f.writestr("x/byteorder", "little")


@pytest.mark.parametrize("name", HARM)
def test_names_of_python_are_refused(tmp_path, name):
    """Also where nothing is called."""
    spelled = name[1:-1].decode().replace("\n", ".").replace("__builtin__", "builtins")
    for call in (b"", b"(Vtouch executed\ntR"):
        zip_of(b"\x80\x02}(X\x01\x00\x00\x00a" + name + call + b"u.", tmp_path / "x.pt")
        with pytest.raises(checkpoints.UserError) as refusal:
            checkpoints.read_file(tmp_path / "x.pt")
        assert f"cannot be read, it names {spelled}, which" in str(refusal.value)
        assert str(refusal.value).isprintable()
        assert "weights_only" not in str(refusal.value)


def test_names_that_are_no_part_of_python_are_not_run(tmp_path, monkeypatch):
    """A module that is there, and that a file may name, is not even imported."""
    (tmp_path / "gadget.py").write_text("raise SystemExit('it was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    names = (b"cgadget\nrun\n", b"cnumpy.testing._private.utils\nrunstring\n",
             b"ctorch.hub\nload\n", b"c__main__\nmain\n", b"\x8c\x06gadget\x8c\x03a.b\x93")
    for name in names:
        zip_of(b"\x80\x04}(X\x01\x00\x00\x00a" + name + b"(Vtouch executed\ntRu.",
               tmp_path / "x.pt")
        made = checkpoints.read_file(tmp_path / "x.pt")["a"]
        assert isinstance(made, unpickle.Inert)
        assert made.args == ("touch executed",)


ABUSES = {
    # Functions of this project's, called with what they were not made for:
    "a tensor of a text": b"ctorch._utils\n_rebuild_tensor_v2\n(Vx\nI0\n(I1\nt(I1\ntI00\nNtR",
    "a number of another type": b"cnumpy.core.multiarray\nscalar\n(Vx\nVy\ntR",
    "a text in another encoding": b"c_codecs\nencode\n(Vx\nVrot13\ntR",
    "a tensor by another function":
        b"ctorch._tensor\n_rebuild_from_type_v2\n(ccollections\nOrderedDict\nN(tNtR",
    "an object of a real class": b"ccopy_reg\n_reconstructor\n(ccollections\nOrderedDict\nNNtR",
    "a storage of no storage": b"ctorch.storage\n_load_from_bytes\n(Vx\ntR",
    # Attributes set on what was named:
    "attributes of a class": b"ca\nb\n}Vargs\nI1\nsb",
    "attributes of OrderedDict": b"ccollections\nOrderedDict\nN}Vchanged\nI1\ns\x86b",
}


@pytest.mark.parametrize("way", ABUSES)
def test_what_may_be_named_cannot_be_abused(tmp_path, way):
    zip_of(b"\x80\x02}(X\x01\x00\x00\x00a" + ABUSES[way] + b"u.", tmp_path / "x.pt")
    with pytest.raises(checkpoints.UserError, match="cannot be read"):
        checkpoints.read_file(tmp_path / "x.pt")
    assert not hasattr(collections.OrderedDict, "changed")
    assert unpickle.Inert().args == ()


def test_a_number_of_object_type_stays_inert(tmp_path):
    """numpy itself would unpickle the bytes of such a number."""
    inner = pickle.dumps(print)
    raw = b"B" + len(inner).to_bytes(4, "little") + inner
    number = b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(VO8\nI00\nI01\ntR" + raw + b"tR"
    zip_of(b"\x80\x03}(X\x01\x00\x00\x00a" + number + b"u.", tmp_path / "x.pt")
    assert isinstance(checkpoints.read_file(tmp_path / "x.pt")["a"], unpickle.Inert)


def test_dictionaries_that_hold_themselves(tmp_path):
    zip_of(b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.", tmp_path / "x.pt")
    with pytest.raises(checkpoints.UserError, match="makes no sense"):
        checkpoints.load_model(tmp_path / "x.pt", "DiT-Ti/2")
    zip_of(b"\x80\x02}(X\x01\x00\x00\x00aca\nb\n)\x81}X\x08\x00\x00\x00_modulesNsbu.",
           tmp_path / "x.pt")
    with pytest.raises(checkpoints.UserError, match="makes no sense"):
        checkpoints.load_model(tmp_path / "x.pt", "DiT-Ti/2")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_programs_are_not_run(tmp_path):
    """Also as the bytes of a tensor's numbers. torch.load would run them, whatever it is told."""
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "x.pt")
    program = (tmp_path / "x.pt").read_bytes()
    with pytest.raises(pickle.UnpicklingError, match="TorchScript"):
        unpickle.load_torch(tmp_path / "x.pt")
    inside = b"ctorch.storage\n_load_from_bytes\n(B" + len(program).to_bytes(4, "little")
    zip_of(b"\x80\x03}(X\x01\x00\x00\x00a" + inside + program + b"tRu.", tmp_path / "x.pt")
    with pytest.raises(checkpoints.UserError, match="cannot be read .*TorchScript"):
        checkpoints.read_file(tmp_path / "x.pt")


def test_a_file_changes_nothing_of_this_project(tmp_path):
    """What a file sets on a function that it may name does not last."""
    change = b"c_codecs\nencode\nN}V__defaults__\n(Vlatin1\nts\x86b"
    zip_of(b"\x80\x02}(X\x01\x00\x00\x00a" + change + b"u.", tmp_path / "x.pt")
    made = checkpoints.read_file(tmp_path / "x.pt")["a"]
    assert made.__defaults__ == ("latin1",)
    assert unpickle.stand_ins()["_codecs", "encode"].__defaults__ is None
