"""Files of weights: reading what others have written, and strict loading.

A checkpoint of ours is a plain dictionary that says what it holds. Other files are read, too:
upstream's, raw state dicts, Lightning's, safetensors, and EDM's pickled networks.

What a checkpoint says of itself, without its weights, is its `spec`: see describe().
"""
import io
import json
import pickle
import re
import struct
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

from kit.cli import UserError, cache_folder, user_errors
from kit.download import fetch
from models import CLASS_TABLE, DDPMPP, SIGMA_DATA, UNETS, build, make_arch

# ---- Released weights --------------------------------------------------------------------------

# The links that the upstream repositories give: READMEs, download scripts, LDM's notebook.
# EDM's files (DDPM++) are for non-commercial use.
DROPBOX = "https://www.dl.dropboxusercontent.com/scl/fi"
EDM_FILES = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained"
UPSTREAM = {
    ("DiT-XL/2", 256): "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt",
    ("DiT-XL/2", 512): "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-512x512.pt",
    ("SiT-XL/2", 256): f"{DROPBOX}/as9oeomcbub47de5g4be0/SiT-XL-2-256.pt"
                       "?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=0",
    ("SiT-XL/2-REPA", 256): f"{DROPBOX}/cxedbs4da5ugjq5wg3zrg/last.pt"
                            "?rlkey=8otgrdkno0nd89po3dpwngwcc&st=apcc645o&dl=0",
    ("LDM-ImageNet", 256): "https://ommer-lab.com/files/latent-diffusion/nitro/cin/model.ckpt",
    ("DDPM++-t", 32): f"{EDM_FILES}/edm-cifar10-32x32-cond-vp.pkl",
    ("DDPM++-t-uncond", 32): f"{EDM_FILES}/edm-cifar10-32x32-uncond-vp.pkl",
}

# Released too, but not as one file at one address.
LDM_ARCHIVE = "model.ckpt, unpacked from https://ommer-lab.com/files/latent-diffusion/{}.zip"
NOT_FETCHED = {
    "LDM-CelebAHQ": LDM_ARCHIVE.format("celeba"),
    "LDM-FFHQ": LDM_ARCHIVE.format("ffhq"),
    "LDM-Bedroom": LDM_ARCHIVE.format("lsun_bedrooms"),
    "LDM-Churches": LDM_ARCHIVE.format("lsun_churches"),
    "SD-v1.5": "v1-5-pruned-emaonly.ckpt or .safetensors, from where its licence was accepted",
}

# What upstream's files do not say of themselves: the values of DiT, then what differs for others.
#   scale         the factor of latents, None for pixels; a file with its own "scale_factor" wins
#   cfg_interval  [low, high]: guidance acts at t within this interval only
#   only_node     the one t for which a student was trained
#   knows_null    whether the network has learned the null label, so that it can be guided
#   w             [low, high]: the scales of guidance that it takes as an input; None: none
#   reading       iSSD: whose features were fused in training (issd.py --reading)
#   class_names   of its classes, in their order; None: not known
#   null          the embedding of the empty prompt, (1, T, D)
DIT_DEFAULTS = dict(prediction="eps", schedule="linear", scale=0.18215, grid=None, nfe=None,
                    cfg=1.5, cfg_interval=None, method=None, solver="ddim", threshold="off",
                    only_node=None, null=None, knows_null=True, w=None,
                    reading=None, class_names=None)
SIT_SPEC = dict(prediction="velocity", schedule="interpolant")
REPA_SPEC = dict(SIT_SPEC, cfg=1.8, cfg_interval=[0.0, 0.7])
# 35 evaluations are 18 steps of Heun's method, upstream's for CIFAR-10.
EDM_SPEC = dict(prediction="edm", schedule="edm", scale=None, cfg=1.0, solver="heun", nfe=35,
                knows_null=False)
LDM_SPEC = dict(schedule="ldm", scale=1.0, cfg=1.0)
UNET_DEFAULTS = {
    "SD-v1.5": dict(schedule="sd", cfg=7.5),
    "LDM-ImageNet": dict(LDM_SPEC, cfg=1.5),
    "LDM-Churches": dict(LDM_SPEC, schedule="ldm-churches"),
}


# ---- Reading files -----------------------------------------------------------------------------

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}

# Lightning's files name this class. An empty class in its place is enough.
LIGHTNING = type("ModelCheckpoint", (),
                 {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})
LIGHTNING_PREFIX = "model.diffusion_model."


def read_safetensors(path):
    """A safetensors file -> {name: tensor}.

    The format: the header's length (8 bytes, little-endian), a JSON header, raw tensors.
    """
    raw = np.memmap(path, dtype=np.uint8, mode="c")
    header_length = struct.unpack("<Q", raw[:8].tobytes())[0]
    start = 8 + header_length
    header = json.loads(raw[8:start].tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for key, entry in header.items():
        begin, end = entry["data_offsets"]
        if start + end > len(raw):
            raise ValueError(f"{key} ends beyond the file")
        content = torch.from_numpy(np.array(raw[start + begin:start + end]))
        tensors[key] = content.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def read_pickle(path):
    """A pickled network of EDM -> {"ema": state dict, "network": its class's name, "sigma_data"}.

    Nothing that the file brings is run. Such a file holds objects with the source of their classes
    (torch_utils.persistence). Here every object becomes an Inert, which keeps what the object was
    made from. Besides them there are tensors and plain containers. Every other name is refused.
    """
    names = _names_in_pickles()

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if (module, name) not in names:
                raise pickle.UnpicklingError(f"it names {module}.{name}")
            return names[module, name]

    with open(path, "rb") as f:
        net = Unpickler(f).load()["ema"]
    return {"ema": _weights_of(net), "network": net.args[0]["class_name"],
            "sigma_data": _state_of(net).get("sigma_data")}


def _names_in_pickles():
    """{(module, name): what stands for it} for read_pickle.

    Everything here is made anew for every file, since a pickle may set attributes of what it names.
    """
    class Inert:
        def __new__(cls, *args):
            self = super().__new__(cls)
            self.args = args
            self.state = None
            return self

        def __init__(self, *args):
            pass

        def __setstate__(self, state):
            self.state = state

    def load_storage(raw):
        return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)

    def make_tensor(storage, offset, size, stride, *_):
        return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, False, OrderedDict())

    def make_parameter(tensor, *_):
        return tensor

    return {
        ("torch._utils", "_rebuild_tensor_v2"): make_tensor,
        ("torch._utils", "_rebuild_parameter"): make_parameter,
        ("torch.storage", "_load_from_bytes"): load_storage,
        ("collections", "OrderedDict"): OrderedDict,
        ("dnnlib.util", "EasyDict"): dict,
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): Inert,
        ("torch.nn.modules.container", "ModuleDict"): Inert,
        ("numpy.core.multiarray", "scalar"): Inert,
        ("numpy.core.multiarray", "_reconstruct"): Inert,
        ("numpy._core.multiarray", "scalar"): Inert,
        ("numpy._core.multiarray", "_reconstruct"): Inert,
        ("numpy", "dtype"): Inert,
        ("numpy", "ndarray"): Inert,
    }


def _state_of(module):
    """The attributes of an unpickled module. Persistent objects keep them in their one argument."""
    return module.state or module.args[0]["state"]


def _weights_of(module, prefix=""):
    """The state dict of an unpickled module and of all modules below it."""
    state = _state_of(module)
    not_saved = state.get("_non_persistent_buffers_set", ())
    weights = {}
    for name, tensor in {**state["_parameters"], **state["_buffers"]}.items():
        if isinstance(tensor, torch.Tensor) and name not in not_saved:
            weights[prefix + name] = tensor
    for name, child in state["_modules"].items():
        if child is not None:
            weights.update(_weights_of(child, f"{prefix}{name}."))
    return weights


def read_file(path):
    """Any checkpoint file -> the dict that it holds, on the CPU. Raises UserError."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path}: no such file; give --ckpt an existing one")
    try:
        if ".safetensors" in path.name:  # the ending is not the last one while it is downloaded
            return read_safetensors(path)
        if ".pkl" in path.name:
            return read_pickle(path)
        torch.serialization.add_safe_globals([Namespace, LIGHTNING])  # DiT pickles its arguments
        mmap = zipfile.is_zipfile(path)
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as e:  # a damaged file fails in as many ways as there are formats
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise UserError(f"checkpoint {path}: cannot be read ({type(e).__name__}: {reason[:160]}); "
                        "it is damaged or not a file of weights")
    if not isinstance(held, dict) or not held:
        raise UserError(f"checkpoint {path}: holds no weights")
    return held


# ---- Strict loading ----------------------------------------------------------------------------


def find_weights(ckpt, wanted):
    """The state dict inside a checkpoint, under plain names.

    ckpt: our dict, or upstream's ("ema" before "model" before "state_dict"), or a raw state dict.
    Keys may have the prefixes of DDP ("module.") and torch.compile ("_orig_mod."), or be those of
    Lightning files of latent diffusion. wanted: the keys that the network has.
    """
    for key in ("ema", "model", "state_dict"):
        if isinstance(ckpt.get(key), dict):
            ckpt = ckpt[key]
            break
    weights = {}
    for key, value in ckpt.items():
        if isinstance(value, torch.Tensor):
            weights[re.sub(r"^(module\.|_orig_mod\.)+", "", key)] = value
    if any(key.startswith(LIGHTNING_PREFIX) for key in weights):
        return _lightning_weights(weights, wanted)
    return weights


def _lightning_weights(weights, wanted):
    """The network in a Lightning file of latent diffusion: its average where the file has one.

    The weights are "model.diffusion_model.*". The average lies under "model_ema.*", whose names
    have lost their dots. The table of classes lies beside both.
    """
    beside = {key: weights[key] for key in wanted if key in weights}
    averaged = {}
    for key in wanted:
        if key not in beside:
            averaged[key] = "model_ema.diffusion_model" + key.replace(".", "")
    if averaged and all(name in weights for name in averaged.values()):
        return {key: weights[name] for key, name in averaged.items()} | beside
    plain = {key[len(LIGHTNING_PREFIX):]: value for key, value in weights.items()
             if key.startswith(LIGHTNING_PREFIX)}
    return plain | beside


def load_weights(net, ckpt, name, hint="check --model and --image-size"):
    """Load find_weights(ckpt) strictly into net, and return net.

    Raises UserError, which calls the checkpoint `name`, names the first few differences and ends
    with `hint`.
    """
    own = net.state_dict()
    ignored = getattr(net, "ignored", ())
    weights = {key: value for key, value in find_weights(ckpt, own.keys()).items()
               if not key.startswith(ignored)}
    if any(map(_is_diffusers_key, weights)) and not weights.keys() & own.keys():
        raise UserError(f"checkpoint {name}: these are diffusers' key names; convert it to the "
                        "upstream (CompVis or DiT) layout first")
    differences = _differences(own, weights)
    if differences:
        raise UserError(f"checkpoint {name} does not fit the network ({differences}); {hint}")
    net.load_state_dict(weights)
    return net


def _is_diffusers_key(key):
    return ".to_q." in key or key.startswith(("down_blocks.", "transformer_blocks."))


def _differences(own, weights):
    """In words: where the state dict `weights` differs from the network's own; "" where nowhere."""
    missing = [key for key in own if key not in weights]
    unexpected = [key for key in weights if key not in own]
    misshaped = []
    for key in own:
        if key in weights and weights[key].shape != own[key].shape:
            found, want = tuple(weights[key].shape), tuple(own[key].shape)
            misshaped.append(f"{key} {found} instead of {want}")
    parts = []
    for what, keys in (("missing", missing), ("unexpected", unexpected), ("misshaped", misshaped)):
        if keys:
            parts.append(f"{what} {len(keys)}: {', '.join(keys[:3])}")
    return "; ".join(parts)


# ---- What a checkpoint is ----------------------------------------------------------------------


@user_errors()
def describe(ckpt, name=None, image_size=None):
    """The spec of a checkpoint: what it is, without its weights.

    ckpt        a path, or None for the released network called `name`
    name        "DiT-XL/2"; for files that do not say what they are
    image_size  in pixels; None: what the released network was made for

    Returns a dict with the keys of DIT_DEFAULTS and with name, classes and arch. Our own files say
    all this themselves. For upstream's files it follows from name, image_size and the shapes of the
    weights. Raises UserError.
    """
    held = read_file(ckpt) if ckpt else {}
    if "format" in held:
        return _describe_ours(ckpt, held, name)
    weights = find_weights(held, [CLASS_TABLE])
    if any(key.startswith("model.enc.") for key in weights):
        return describe_edm(ckpt, held, weights, name)
    if not name:
        raise UserError(f"checkpoint {ckpt} does not say what it is; name it with --model, "
                        "for example DiT-XL/2")
    if name in UNETS:
        changes, arch = _describe_unet(name, image_size, held, weights)
    elif name.startswith("DDPM++"):
        changes, arch = EDM_SPEC, make_arch(name, image_size or 32, 3, 10)  # CIFAR-10's
    else:
        changes, arch = _describe_transformer(name, image_size, weights)
    return dict(DIT_DEFAULTS, **changes, name=name, classes=arch["num_classes"], arch=arch)


def _describe_ours(ckpt, held, name):
    """describe() of a file of ours."""
    if held["format"] != 1:
        raise UserError(f"checkpoint {ckpt}: format {held['format']}, this code reads format 1")
    _check_name(ckpt, name, held["name"])
    held = {**DIT_DEFAULTS, **held}
    return {key: held[key] for key in ("name", "arch", "classes", *DIT_DEFAULTS)}


def _check_name(ckpt, name, own):
    """Raise UserError when the user calls the checkpoint something else than what it is."""
    if name and name != own:
        raise UserError(f"checkpoint {ckpt} holds {own}, not --model {name}; leave --model out")


def _count_classes(weights):
    """The number of classes, without the null one. 1000 where no table of labels tells."""
    table = weights.get(CLASS_TABLE, weights.get("y_embedder.embedding_table.weight"))
    return 1000 if table is None else len(table) - 1


def _describe_unet(name, image_size, held, weights):
    """A latent-diffusion U-Net -> (how its spec differs from DIT_DEFAULTS, its arch)."""
    made_for = 512 if name == "SD-v1.5" else 256
    side = UNETS[name]["input_size"] * (image_size or made_for) // made_for
    arch = make_arch(name, side, UNETS[name]["in_channels"], _count_classes(weights))
    changes = dict(UNET_DEFAULTS.get(name, LDM_SPEC))
    beside = held.get("state_dict", held)
    if "scale_factor" in beside:  # measured on the data when its training began
        changes["scale"] = float(beside["scale_factor"])
    return changes, arch


def _describe_transformer(name, image_size, weights):
    """A DiT or SiT -> (how its spec differs from DIT_DEFAULTS, its arch)."""
    repa = name.endswith("-REPA") or any(key.startswith("projectors.") for key in weights)
    side = (image_size or 256) // 8
    arch = make_arch(name, side, 4, _count_classes(weights), learn_sigma=not repa)
    last = weights.get("final_layer.linear.weight")
    if last is not None:
        arch["learn_sigma"] = len(last) == 2 * arch["in_channels"] * arch["patch_size"] ** 2
    if arch["net"] == "DiT":
        return {}, arch
    if repa:
        return REPA_SPEC, arch
    arch["reverse"] = True
    return SIT_SPEC, arch


def describe_edm(ckpt, held, weights, name):
    """describe() of one of EDM's networks, which the keys and shapes of its weights tell."""
    network = held.get("network", "EDMPrecond")
    sigma_data = held.get("sigma_data", SIGMA_DATA)
    if network != "EDMPrecond" or sigma_data != SIGMA_DATA:
        raise UserError(f"checkpoint {ckpt} is a {network} with sigma_data {sigma_data}; "
                        f"of EDM's only EDMPrecond with {SIGMA_DATA} is known")
    try:
        arch = _edm_arch(weights)
    except (LookupError, ValueError, TypeError, ArithmeticError):
        raise UserError(f"checkpoint {ckpt}: these are not the weights of a DDPM++; of EDM's "
                        "networks (DDPM++, NCSN++, ADM) only that one is known")
    own = _edm_name(arch)
    _check_name(ckpt, name, own)
    return dict(DIT_DEFAULTS, **EDM_SPEC, name=own, classes=arch["num_classes"], arch=arch)


def _edm_arch(weights):
    """The arch of a DDPM++ from its weights. Other networks of EDM raise some error."""
    def columns(key):
        return weights[key].shape[1] if key in weights else 0

    sides = set()
    for key in weights:
        sides.update(int(side) for side in re.findall(r"^model\.enc\.(\d+)x", key))
    sides = sorted(sides, reverse=True)
    levels = [f"model.enc.{side}x{side}_block" for side in sides]
    top = f"{sides[0]}x{sides[0]}"
    channels, in_channels = weights[f"model.enc.{top}_conv.weight"].shape[:2]
    blocks = sum(key.startswith(levels[0]) and key.endswith(".conv0.weight") for key in weights)
    mult = [len(weights[level + "0.conv0.weight"]) // channels for level in levels]
    if f"model.dec.{top}_aux_conv.weight" not in weights:
        raise LookupError("ADM, which has no such weights")
    attention = [side for side, level in zip(sides, levels) if level + "0.qkv.weight" in weights]
    return dict(net="DDPM++", model_channels=channels, num_blocks=blocks, channel_mult=mult,
                input_size=sides[0], in_channels=in_channels, attn_resolutions=attention,
                num_classes=columns("model.map_label.weight"),
                augment_dim=columns("model.map_augment.weight"))


def _edm_name(arch):
    """"DDPM++-t", "DDPM++-16x1", with "-uncond" without classes; "DDPM++" for unusual levels."""
    width = ""
    if set(arch["channel_mult"]) == {2}:
        width = f"{arch['model_channels']}x{arch['num_blocks']}"
        known = [name for name in DDPMPP if DDPMPP[name] == width]
        width = "-" + (known[0] if known else width)
    return "DDPM++" + width + ("" if arch["num_classes"] else "-uncond")


# ---- Networks ----------------------------------------------------------------------------------


@user_errors()
def load_model(path, name=None, image_size=None):
    """A checkpoint's path or URL -> (network in eval mode on the CPU, its spec).

    name, image_size: see describe(). Raises UserError.
    """
    path = local_path(path, name, image_size)
    ckpt = read_file(path)
    spec = describe(path, name, image_size)
    with torch.device("meta"):
        net = build(spec["arch"])
    return load_weights(net.to_empty(device="cpu"), ckpt, path).eval(), spec


def upstream_checkpoint(name, image_size, folder):
    """Fetch the released weights of `name` once into `folder`; returns their path.

    image_size: in pixels; None: 32 for DDPM++, 256 for the others. Raises UserError.
    """
    image_size = image_size or (32 if name.startswith("DDPM++") else 256)
    url = UPSTREAM.get((name, image_size))
    if name in NOT_FETCHED:
        raise UserError(f"the weights of {name} are not fetched; get {NOT_FETCHED[name]}, "
                        "and give --ckpt PATH")
    if url is None:
        known = ", ".join(f"{model} at {size}" for model, size in UPSTREAM)
        raise UserError(f"no released weights for {name} at {image_size} (there are: {known}); "
                        "give --ckpt PATH, or train it with train.py")
    return _fetch_model(url, name, image_size, folder)


def local_path(path, name=None, image_size=None):
    """Where the checkpoint is on this machine: a URL is fetched, once. Raises UserError."""
    return _fetch_model(path, name, image_size, cache_folder()) if "://" in str(path) else path


def _fetch_model(url, name, image_size, folder):
    """Download a checkpoint, which counts only when the network can be loaded from it."""
    def check(path):
        load_model(path, name, image_size)
    return fetch(url, folder, check)
