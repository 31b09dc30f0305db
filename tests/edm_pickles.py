"""Networks pickled as EDM's code does it, which tests read and try to misuse."""
import pickle
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch


def make_modules(monkeypatch):
    """Stand-ins under the names of upstream's modules, to pickle as upstream does."""
    for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

    def rebuild(meta):
        pytest.fail("the file's object was rebuilt")

    rebuild.__module__ = "torch_utils.persistence"
    rebuild.__name__ = "_reconstruct_persistent_obj"
    rebuild.__qualname__ = rebuild.__name__
    sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj = rebuild
    easy = type("EasyDict", (dict,), {"__module__": "dnnlib.util"})
    sys.modules["dnnlib.util"].EasyDict = easy


class Persistent:
    """An object of torch_utils.persistence: it pickles the source of its class beside its state."""

    def __init__(self, kind, source, **state):
        self.meta = dict(
            type="class", version=6, module_src=source, class_name=kind, state=state
        )

    def __reduce__(self):
        rebuild = sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj
        return rebuild, (self.meta,), None


def group_keys(keys):
    """["a.b", "a.c", "d"] -> {"a": ["b", "c"], "d": []}."""
    children = OrderedDict()
    for key in keys:
        head, _, rest = key.partition(".")
        children.setdefault(head, [])
        if rest:
            children[head].append(rest)
    return children


def module_state(sd, keys, path):
    """What the module at `path` (such as "model.enc.") holds; keys: its own and its children's."""
    parameters = OrderedDict()
    buffers = OrderedDict()
    modules = OrderedDict()
    for name, rest in group_keys(keys).items():
        if rest:
            modules[name] = module(sd, rest, name, f"{path}{name}.")
        elif name == "resample_filter":
            buffers[name] = sd[path + name]
        else:
            parameters[name] = torch.nn.Parameter(sd[path + name])
    return dict(
        training=False,
        _parameters=parameters | {"unused": None},
        _buffers=buffers,
        _non_persistent_buffers_set=set(),
        _backward_hooks=OrderedDict(),
        _modules=modules,
    )


def module(sd, keys, name, path):
    """A module inside the network: enc and dec are plain ModuleDicts, others are persistent."""
    state = module_state(sd, keys, path)
    if name in ("enc", "dec"):
        held = torch.nn.ModuleDict()
        held.__dict__.update(state)
        return held
    state["_modules"]["none"] = None
    return Persistent("UNetBlock", "", **state, skip_scale=np.sqrt(0.5))


def network(sd, kind="EDMPrecond", source="", sigma_data=0.5):
    """What a file of EDM's holds, for this state dict. Needs make_modules()."""
    easy = sys.modules["dnnlib.util"].EasyDict
    state = module_state(sd, list(sd), "")
    state["_modules"]["none"] = None
    arguments = easy(label_dim=10)
    net = Persistent(kind, source, **state, sigma_data=sigma_data, _init_kwargs=arguments)
    return {
        "ema": net,
        "loss_fn": Persistent("EDMLoss", source, sigma_data=0.5),
        "augment_pipe": None,
        "dataset_kwargs": easy(path="x"),
    }


def write(path, held, protocol=None):
    path.write_bytes(pickle.dumps(held, protocol=protocol))
