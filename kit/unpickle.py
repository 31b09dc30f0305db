"""Pickled files of weights, read without running anything that they bring.

A pickle is a program: it names functions and says what to call them with. Here no name is looked
up. Tensors, plain containers and numbers are made by the functions in this file. An object of any
other class becomes an Inert, which keeps what it was made from and does nothing. A name of Python
itself that has no place beside weights, such as os.system, is refused.
"""
import io
import os
import pickle
import re
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

# ---- Names -------------------------------------------------------------------------------------

# Modules of Python whose objects stand beside weights, with the names, or "" for all.
HARMLESS = {
    "builtins": "bool bytearray bytes complex dict float frozenset int list long object range set "
                "slice str tuple unicode xrange",
    "collections": "Counter OrderedDict defaultdict deque",
    "functools": "partial",
    "time": "struct_time",
    "types": "MappingProxyType NoneType SimpleNamespace",
    **dict.fromkeys(("argparse", "datetime", "decimal", "enum", "fractions", "logging", "numbers",
                     "pathlib", "pathlib._local", "re", "typing", "uuid", "zoneinfo"), ""),
}

# What EDM's networks name besides. In their files every other name is refused.
EDM = {
    ("dnnlib.util", "EasyDict"),
    ("torch_utils.persistence", "_reconstruct_persistent_obj"),
    ("torch.nn.modules.container", "ModuleDict"),
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
}

PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # as protocols 0 to 2 call them

def names_of_the_library():
    """The names of the modules that come with Python, which 3.9 does not list itself."""
    if hasattr(sys, "stdlib_module_names"):
        return sys.stdlib_module_names
    files = Path(os.__file__).parent.iterdir()
    return {*sys.builtin_module_names, *(file.stem for file in files)}


STANDARD = names_of_the_library()


class Inert(dict):
    """Stands for an object of a class that is not known. It may have been a dictionary."""

    dump_patches = False  # what torch asks the networks of old files for

    def __new__(cls, *args, **kwargs):
        self = super().__new__(cls)
        self.args = args
        self.state = None
        return self

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        self.state = state

    def append(self, item):
        pass

    extend = add = append
    __eq__ = object.__eq__
    __ne__ = object.__ne__
    __hash__ = object.__hash__


def is_harmless(module, name):
    """May a file of weights name this? Whatever is no part of Python may be, since it is not run.
    """
    if module in HARMLESS:
        return not HARMLESS[module] or name in HARMLESS[module].split()
    return module.split(".")[0] not in STANDARD


def make_unpickler(is_allowed):
    """A class of unpicklers for one file. is_allowed(module, name): what may become an Inert.

    Everything that the file can reach is made anew, since a pickle may set attributes of what it
    names.
    """
    known = stand_ins()

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            module = PYTHON_2.get(module, module)
            if (module, name) not in known:
                if not is_allowed(module, name):
                    raise pickle.UnpicklingError(f"it names {module}.{name}")
                known[module, name] = type("Inert", (Inert,), {})
            return known[module, name]

    return Unpickler


def stand_ins():
    """{(module, name): the function or class that is called in its place}."""
    def make_tensor(storage, offset, size, stride, *_):
        if not isinstance(storage, (torch.TypedStorage, torch.UntypedStorage)):
            raise pickle.UnpicklingError("a tensor without numbers")
        return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, False, OrderedDict())

    def make_parameter(tensor, *_):
        return tensor

    def make_typed(function, kind, args, state):
        if function not in (make_tensor, make_parameter):
            raise pickle.UnpicklingError("a tensor that no known function makes")
        return function(*args)

    def load_storage(raw):
        return load_torch(io.BytesIO(raw))

    def make_set(items=()):
        return set(items)

    def encode(text, encoding):
        """Bytes, as protocols 0 to 2 write them."""
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"a text in {encoding}")
        return text.encode("latin1")

    def make_object(kind, *_):
        if not (isinstance(kind, type) and issubclass(kind, Inert)):
            raise pickle.UnpicklingError("an object without a class")
        return kind()

    def make_number(dtype, raw=b""):
        """A number of numpy's -> Python's."""
        code = dtype.args[0]
        order = dtype.state[1] if dtype.state else "="
        if not re.fullmatch(r"[biufc]\d+", code):
            return Inert()
        return np.frombuffer(raw, np.dtype(code).newbyteorder(order))[0].item()

    return {
        ("torch._utils", "_rebuild_tensor"): make_tensor,
        ("torch._utils", "_rebuild_tensor_v2"): make_tensor,
        ("torch._utils", "_rebuild_parameter"): make_parameter,
        ("torch._utils", "_rebuild_parameter_with_state"): make_parameter,
        ("torch._tensor", "_rebuild_from_type_v2"): make_typed,
        ("torch.storage", "_load_from_bytes"): load_storage,
        ("collections", "OrderedDict"): OrderedDict,
        ("builtins", "set"): make_set,
        ("builtins", "frozenset"): make_set,
        ("_codecs", "encode"): encode,
        ("copyreg", "_reconstructor"): make_object,
        ("copyreg", "__newobj__"): make_object,
        ("numpy.core.multiarray", "scalar"): make_number,
        ("numpy._core.multiarray", "scalar"): make_number,
    }


# ---- Files -------------------------------------------------------------------------------------


def load_torch(file, mmap=False):
    """What torch.save() has written: a path, or the bytes as io.BytesIO -> its content, on the CPU.

    torch's own safe reading comes first. It refuses most objects, which make_unpickler() takes.
    """
    if isinstance(file, io.BytesIO):
        refuse_program(file)
        file.seek(0)
    else:
        with open(file, "rb") as f:
            refuse_program(f)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other protocols than torch's own
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
        except Exception:  # another object, or a damaged file, which fails again
            pass
        if isinstance(file, io.BytesIO):
            file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=False, mmap=mmap,
                          pickle_module=restricted_pickle())


def refuse_program(file):
    """important! torch.load would run a TorchScript archive, whatever its arguments say."""
    if file.read(4) == b"PK\x03\x04":
        file.seek(0)
        if "constants.pkl" in torch._C.PyTorchFileReader(file).get_all_records():
            raise pickle.UnpicklingError("it is a TorchScript archive")


def restricted_pickle():
    """What torch.load uses in place of the module pickle."""
    unpickler = make_unpickler(is_harmless)

    def load(file, **kwargs):
        return unpickler(file, **kwargs).load()

    return SimpleNamespace(__name__="restricted", Unpickler=unpickler, load=load)


def load_edm(path):
    """A pickled network of EDM -> {"ema": state dict, "network": its class's name, "sigma_data"}.

    Such a file holds objects with the source of their classes (torch_utils.persistence).
    """
    def is_allowed(module, name):
        return (module, name) in EDM or (module in HARMLESS and is_harmless(module, name))

    with open(path, "rb") as f:
        held = make_unpickler(is_allowed)(f).load()
    net = held.get("ema") if isinstance(held, dict) else None
    if not isinstance(net, Inert):
        raise ValueError("a pickle of something else than one of EDM's networks")
    return {"ema": weights_of(net), "network": net.args[0]["class_name"],
            "sigma_data": state_of(net).get("sigma_data")}


# ---- What an Inert was -------------------------------------------------------------------------


def state_of(module):
    """The attributes of an unpickled object. Persistent ones keep them in their one argument."""
    return module.state or module.args[0]["state"]


def is_network(value):
    """Is this what is left of a torch.nn.Module?"""
    return isinstance(value, Inert) and isinstance(value.state, dict) and "_modules" in value.state


def weights_of(module, prefix=""):
    """The state dict of an unpickled network and of all modules below it."""
    state = state_of(module)
    not_saved = state.get("_non_persistent_buffers_set", ())
    weights = {}
    for name, tensor in {**state["_parameters"], **state["_buffers"]}.items():
        if isinstance(tensor, torch.Tensor) and name not in not_saved:
            weights[prefix + name] = tensor
    for name, child in state["_modules"].items():
        if child is not None:
            weights.update(weights_of(child, f"{prefix}{name}."))
    return weights
