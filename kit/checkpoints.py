"""Files of weights: reading what others have written, and strict loading.

A checkpoint of ours is a plain dictionary that says what it holds. Other files are read, too:
upstream's, raw state dicts, Lightning's, safetensors, and EDM's pickled networks; see
kit/unpickle.py.

What a checkpoint says of itself, without its weights, is its `spec`: see describe().
"""
import json
import os
import re
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import torch

from kit.cli import UserError, cache_folder, user_errors
from kit.download import fetch
from kit.unpickle import is_network, load_edm, load_torch, weights_of
from models import CLASS_TABLE, DDPMPP, SIGMA_DATA, UNETS, build, make_arch, sincos_2d

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

# How other training scripts mark a transformer in the arguments that they save: upstream's REPA has
# these, and SiT's "path_type" and "prediction" can be others than the released ones.
REPA_ARGUMENTS = {"proj_coeff", "enc_type", "encoder_depth"}
KNOWN_ARGUMENTS = {"path_type": ("linear",), "prediction": ("velocity", "v")}

CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
                 "truck"]


def imagenet_names():
    """The names of ImageNet's 1,000 class folders, in the order of the labels."""
    file = Path(__file__).parents[1] / "assets" / "imagenet_synsets.txt"
    return file.read_text().split()


# ---- Reading files -----------------------------------------------------------------------------

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}

ZIP = (b"PK\x03\x04", b"PK\x05\x06")

# How torch.save began before it wrote zip files.
LEGACY_TORCH = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def read_safetensors(path):
    """A safetensors file -> {name: tensor}. The numbers stay on the disk until they are used.

    The format: the header's length (8 bytes, little-endian), a JSON header, raw tensors.
    """
    raw = np.memmap(path, dtype=np.uint8, mode="c")
    header_length = struct.unpack("<Q", raw[:8].tobytes())[0]
    start = 8 + header_length
    header = json.loads(raw[8:start].tobytes())
    raw = torch.from_numpy(raw)
    header.pop("__metadata__", None)
    tensors = {}
    for key, entry in header.items():
        begin, end = entry["data_offsets"]
        if start + end > len(raw):
            raise ValueError(f"{key} ends beyond the file")
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{key} has the type {entry['dtype']}, which is not read")
        dtype = DTYPES[entry["dtype"]]
        content = raw[start + begin:start + end]
        if (start + begin) % dtype.itemsize:
            content = content.clone()  # where it begins, such numbers cannot begin in memory
        tensors[key] = content.view(dtype).reshape(entry["shape"])
    return tensors


def read_file(path):
    """Any checkpoint file -> the dict that it holds, on the CPU. Raises UserError."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path}: {explain_missing(path)}")
    with open(path, "rb") as f:
        head = f.read(1024)
    other = other_kind(path, head)
    if other:
        raise UserError(f"checkpoint {path}: cannot be read, it is {other}")
    try:
        held = read_weights(path, head)
    except Exception as e:  # a damaged file fails in as many ways as there are formats
        reason = one_line(e)
        if reason.startswith("it names"):
            raise UserError(f"checkpoint {path}: cannot be read, {reason}, which has no place "
                            "beside weights; nothing of it was run: save its state dict alone, or "
                            "get the file elsewhere")
        raise UserError(f"checkpoint {path}: cannot be read ({type(e).__name__}: {reason}); "
                        "it is damaged or not a file of weights")
    if not isinstance(held, dict) or not (held or is_network(held)):
        raise UserError(f"checkpoint {path}: holds no weights")
    return held


def read_weights(path, head):
    """read_file() by the format that the first bytes tell."""
    if head[8:9] == b"{":
        return read_safetensors(path)
    if head.startswith(ZIP):
        return load_torch(path, mmap=True)
    if LEGACY_TORCH in head[:20]:
        return load_torch(path)
    if head.startswith(b"\x80"):
        return load_edm(path)
    raise ValueError("no known format")


def one_line(error):
    """What an error says, in one line without control characters."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip() or "no reason"
    return "".join(c if c.isprintable() else "?" for c in text.splitlines()[0])[:160]


# ---- What is no file of weights ----------------------------------------------------------------

SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors", ".pkl", ".bin")
IMAGES = (".png", ".jpg", ".jpeg", ".webp")
TAKES = f"--ckpt takes a file of weights ({', '.join(SUFFIXES)})"
CONVERT = "convert it to the upstream (CompVis or DiT) layout first"

# How other kinds of files begin.
BEGINNINGS = {
    b"\x93NUMPY": f"an array, such as samples or latents; {TAKES}",
    b"\x89PNG": f"an image; {TAKES}",
    b"\xff\xd8\xff": f"an image; {TAKES}",
    b"\x89HDF": f"an HDF5 file; {TAKES}",
    b"GGUF": f"a GGUF file, whose weights are rounded; {TAKES}",
    b"\x1f\x8b": "a packed archive; unpack it and give the file of weights",
    b"BZh": "a packed archive; unpack it and give the file of weights",
    b"7z\xbc\xaf": "a packed archive; unpack it and give the file of weights",
    b"Rar!": "a packed archive; unpack it and give the file of weights",
}


def explain_missing(path):
    """What to say of a path that is no file."""
    if path.is_dir():
        return explain_folder(path)
    if is_model_name(str(path)):
        return f"no such file; {path} is a network's name, which is given with --model"
    if len(path.parts) == 2 and not path.parent.exists() and path.suffix not in SUFFIXES:
        return ("no such file; names of the Hugging Face hub are not fetched: give the path or the "
                "URL of one file, or --model DiT-XL/2 alone for the released weights")
    return "no such file; give --ckpt an existing one"


def explain_folder(path):
    """What to say of a folder."""
    names = sorted(os.listdir(path))
    files = [name for name in names if name.endswith(SUFFIXES)]
    if "last.pt" in names:
        return f"is a folder; give --ckpt {path / 'last.pt'}"
    if "model_index.json" in names or any("diffusion_pytorch_model" in name for name in names):
        return f"is a folder in diffusers' layout; {CONVERT}"
    if any(name.endswith(".distcp") for name in names):
        return ("is a checkpoint in parts; make one file of it: python -m "
                f"torch.distributed.checkpoint.format_utils dcp_to_torch {path} whole.pt")
    if files:
        return f"is a folder; give --ckpt one of its files, for example {path / files[0]}"
    if holds_images(path):
        return f"is a folder of images, which are given with --data; {TAKES}"
    return f"is a folder without a file of weights; {TAKES}"


def holds_images(path):
    """Do images lie in a folder, or in one of the folders there?"""
    for entry in [path, *path.iterdir()]:
        if entry.is_dir() and any(name.lower().endswith(IMAGES) for name in os.listdir(entry)):
            return True
    return False


def is_model_name(text):
    """Is this the name of a network, such as DiT-XL/2?"""
    try:
        make_arch(text, 64, 4, 10)
    except ValueError:
        return False
    return True


def other_kind(path, head):
    """What a file is, if not weights, and what to do; None where it may be weights.

    head: its first 1,024 bytes.
    """
    if not head:
        return "empty; copy or download it again"
    for beginning, kind in BEGINNINGS.items():
        if head.startswith(beginning):
            return kind
    if head.startswith(ZIP):
        return kind_of_zip(path)
    if b"\0" not in head and is_text(head):
        return kind_of_text(head)
    if tarfile.is_tarfile(path):
        return "a packed archive; unpack it and give the file of weights"
    return None


def kind_of_zip(path):
    """other_kind() of a zip file. torch.save's hold a data.pkl."""
    if not zipfile.is_zipfile(path):
        return "damaged, it ends too early; copy or download it again"
    names = zipfile.ZipFile(path).namelist()
    last = {name.rsplit("/", 1)[-1].lower() for name in names}
    if "constants.pkl" in last:
        return "a TorchScript archive, which holds a program; torch.save its state_dict() instead"
    if "data.pkl" in last:
        return None
    if any(name.endswith(".npy") for name in last):
        return f"an .npz of arrays, such as samples or latents; {TAKES}"
    return (f"a zip archive of other files ({', '.join(names[:2])}); unpack it and give the file "
            "of weights")


def is_text(head):
    """Are these bytes, which may end within a character, UTF-8?"""
    try:
        head.decode()
    except UnicodeDecodeError as e:
        return e.start >= len(head) - 3 > 0
    return True


def kind_of_text(head):
    """other_kind() of a text file."""
    text = head.decode(errors="replace").lstrip("\ufeff \t\r\n").lower()
    if text.startswith("version https://git-lfs"):
        return "git-lfs's pointer to the weights, not the weights; fetch them with: git lfs pull"
    if text.startswith("<"):
        return ("a web page, saved in place of the file that it offers; download the file itself")
    return f"a text file; {TAKES}"


# ---- Strict loading ----------------------------------------------------------------------------


# Keys that one network has and nothing beside it: the network lies where one of them lies.
LANDMARK = re.compile(r"(|.*\.)(final_layer\.linear\.weight|input_blocks\.0\.0\.weight|"
                      r"model\.enc\.\d+x\d+_conv\.weight)")

# What torch.compile, FSDP and activation checkpointing put into the middle of keys.
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

# Words that say nothing of which network it is, and those that say it is an average.
PLAIN_WORDS = {"model", "module", "net", "network", "state_dict", "model_state_dict",
               "diffusion_model", "unet", "transformer", "backbone", "denoiser"}
AVERAGE = re.compile(r"(?<![a-z])(ema|swa|avg|average|averaged|shadow)(?![a-z])")
LORA = re.compile(r"(^|[._])lora(_A|_B|_down|_up|_a|_b)?[._]")


def find_weights(ckpt, name, net=None):
    """The state dict inside a checkpoint, under plain names: an average where the file has one.

    ckpt  our dict, or anything that holds one network: its keys may have any prefix, as those of
          DDP, FSDP, torch.compile and Lightning, and lie in dictionaries of any names
    name  what errors call the checkpoint
    net   the network, which a list of averaged parameters needs for their names. Without it the
          list is left out

    Raises UserError.
    """
    if "format" in ckpt:
        return ckpt["ema"]
    try:
        tensors = {WRAPPERS.sub("", key): value for key, value in _named_tensors(ckpt).items()}
        shadow = _shadow_parameters(ckpt)
    except (RecursionError, AttributeError, LookupError, TypeError):
        raise UserError(f"checkpoint {name}: what it holds makes no sense; save its state dict "
                        "alone")
    prefix = _network_prefix(tensors, name)
    is_average = prefix is not None and _rank(prefix) < 2
    _refuse_others(ckpt, tensors, name, shadow or prefix is not None)
    weights = {}
    if prefix is not None:
        weights = _under(tensors, prefix)
        if not is_average:
            weights.update(_lightning_average(tensors, prefix, weights))
    elif not shadow:
        inside = [key for key in ("ema", "model", "state_dict") if isinstance(ckpt.get(key), dict)]
        weights = _under(tensors, f"{inside[0]}." if inside else "")
    if shadow and net is not None and not is_average:
        weights.update(_name_parameters(shadow, net, name))
    return weights


def _named_tensors(held, prefix=""):
    """Nested dictionaries -> {keys joined by dots: tensor}."""
    tensors = {}
    for key, value in (weights_of(held) if is_network(held) else held).items():
        if isinstance(value, torch.Tensor):
            tensors[f"{prefix}{key}"] = value
        elif isinstance(value, dict) and isinstance(key, str):
            tensors.update(_named_tensors(value, f"{prefix}{key}."))
    return tensors


def _under(tensors, prefix):
    """The tensors whose keys have this prefix, without it."""
    return {key[len(prefix):]: value for key, value in tensors.items() if key.startswith(prefix)}


def _network_prefix(tensors, name):
    """The prefix of the network to use, or None where there is none. Raises UserError."""
    ranked = {}
    for key, value in tensors.items():
        match = LANDMARK.fullmatch(key)
        if match:  # two names of one network share their tensors
            ranked.setdefault(_rank(match[1]), {}).setdefault(value.data_ptr(), match[1])
    if not ranked:
        return None
    best = list(ranked[min(ranked)].values())
    if len(best) > 1:
        names = ", ".join(prefix.rstrip(".") or "the top" for prefix in best)
        raise UserError(f"checkpoint {name}: holds several networks ({names}); torch.save the "
                        "state dict of the one to use alone")
    return best[0]


def _rank(prefix):
    """How much a prefix looks like that of the network to use, from 0 on: an average, something of
    an average, a network that is not called anything else, another one."""
    words = [word for word in prefix.lower().split(".")[:-1] if word not in PLAIN_WORDS]
    averages = [bool(AVERAGE.search(word)) for word in words]
    if not words:
        return 2
    if averages[-1]:
        return 0
    return 1 if any(averages) else 3


def _lightning_average(tensors, prefix, weights):
    """What lies beside a network in a Lightning file of latent diffusion -> {key: tensor}.

    The network is "model.*" or "model.diffusion_model.*". Its average lies under "model_ema.*",
    whose names have lost their dots; frozen weights are not averaged. The table of classes lies
    beside both.
    """
    match = re.fullmatch(r"(|.*\.)model\.(|.*\.)", prefix)
    if not match:
        return {}
    root, inside = match.groups()
    found = {}
    for key in weights:
        averaged = f"{root}model_ema." + (inside + key).replace(".", "")
        if averaged in tensors:
            found[key] = tensors[averaged]
    if root + CLASS_TABLE in tensors:
        found[CLASS_TABLE] = tensors[root + CLASS_TABLE]
    return found


def _shadow_parameters(held):
    """The averaged parameters that torch_ema, diffusers and others keep as a list, or None."""
    shadow = held.get("shadow_params")
    if isinstance(shadow, list) and shadow and isinstance(shadow[0], torch.Tensor):
        return shadow
    for value in held.values():
        if isinstance(value, dict) and _shadow_parameters(value):
            return _shadow_parameters(value)
    return None


def _name_parameters(shadow, net, name):
    """A list in the order of net.parameters(), all or only trained ones -> {key: tensor}."""
    parameters = dict(net.named_parameters())
    parameters.pop(CLASS_TABLE, None)  # upstream keeps it beside the network
    keys = list(parameters)
    if len(shadow) != len(keys):
        keys = [key for key in keys if parameters[key].requires_grad]
    if len(shadow) != len(keys) or net.arch["net"] == "DDPM++":
        raise UserError(f"checkpoint {name}: its list of {len(shadow)} averaged parameters, which "
                        f"has no names, does not fit the network's {len(parameters)}; give a file "
                        "of named weights")
    return dict(zip(keys, shadow))


def _refuse_others(ckpt, tensors, name, has_network):
    """Raise UserError where a file holds weights of another kind, or none."""
    complaint = None
    if any(LORA.search(key) for key in tensors):
        complaint = ("has a LoRA, additions to some layers of a network; merge it into the base "
                     "model's weights first")
    elif has_network:
        return
    elif any(map(_is_diffusers_key, tensors)):
        complaint = f"these are diffusers' key names; {CONVERT}"
    elif any("flat_param" in key for key in tensors):
        complaint = "holds FSDP's flattened parameters; save the full state dict"
    elif not tensors:
        parts = [ckpt, *(value for value in ckpt.values() if isinstance(value, dict))]
        optimiser = any("param_groups" in part for part in parts)
        complaint = f"holds {'the state of an optimiser and ' if optimiser else ''}no weights"
    if complaint:
        raise UserError(f"checkpoint {name}: {complaint}")


def _is_diffusers_key(key):
    return ".to_q." in key or key.startswith(("down_blocks.", "transformer_blocks."))


def load_weights(net, ckpt, name, hint="check --model and --image-size"):
    """Load find_weights(ckpt) strictly into net, and return net. Raises UserError."""
    net.load_state_dict(fitting_weights(net, ckpt, name, hint))
    return net


def fitting_weights(net, ckpt, name, hint="check --model and --image-size"):
    """find_weights(ckpt), which has just the keys and shapes of net, which may be on "meta".

    Raises UserError, which calls the checkpoint `name`, names the first few differences and ends
    with `hint`.
    """
    own = net.state_dict()
    ignored = getattr(net, "ignored", ())
    weights = {key: value for key, value in find_weights(ckpt, name, net).items()
               if not key.startswith(ignored)}
    if "pos_embed" in own and "pos_embed" not in weights:  # it is computed and never trained
        side = net.arch["input_size"] // net.arch["patch_size"]
        embedding = torch.from_numpy(sincos_2d(net.arch["hidden_size"], side))
        weights["pos_embed"] = embedding.float()[None]
    differences = _differences(own, weights)
    if differences:
        raise UserError(f"checkpoint {name} does not fit the network ({differences}); {hint}")
    return weights


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


class Undecided(UserError):
    """The file is fine, and does not tell something that a flag can say."""


@user_errors()
def describe(ckpt, name=None, image_size=None, classes=None):
    """The spec of a checkpoint: what it is, without its weights.

    ckpt        a path, or None for the released network called `name`
    name        "DiT-XL/2"; for files that do not say what they are
    image_size  in pixels; None: what the released network was made for
    classes     how many; for files that do not say whether they have a null label

    Returns a dict with the keys of DIT_DEFAULTS and with name, classes and arch. Our own files say
    all this themselves. For upstream's files it follows from name, image_size, the arguments that
    they carry and the shapes of the weights, which must be those of the network. Raises UserError.
    """
    if not ckpt:
        return _describe(None, {}, name, image_size, classes)
    held = read_file(ckpt)
    spec = _describe(ckpt, held, name, image_size, classes)
    fitting_weights(build_without_memory(spec["arch"]), held, ckpt)
    return spec


def build_without_memory(arch):
    """The network on torch's meta device: keys and shapes without numbers."""
    with torch.device("meta"):
        return build(arch)


def _describe(ckpt, held, name, image_size, classes):
    """describe() of what read_file() has read; {} for a released network."""
    if "format" in held:
        return _describe_ours(ckpt, held, name)
    weights = find_weights(held, ckpt) if held else {}
    if any(key.startswith("model.enc.") for key in weights):
        return describe_edm(ckpt, held, weights, name)
    said = _arguments_of(held)
    if not name and is_model_name(str(said.get("model"))):
        name = said["model"]
    if not name:
        raise Undecided(f"checkpoint {ckpt} does not say what it is; name it with --model, "
                        "for example DiT-XL/2")
    if held and not weights:  # only a list of parameters: any network of the name knows their names
        some = build_without_memory(make_arch(name, 64, 4, 1000, learn_sigma=True))
        weights = find_weights(held, ckpt, some)
    if name in UNETS:
        changes, arch = _describe_unet(name, image_size, held, weights)
    elif name.startswith("DDPM++"):
        changes, arch = EDM_SPEC, make_arch(name, image_size or 32, 3, 10)  # CIFAR-10's
    else:
        side = _input_side(ckpt, image_size, weights, said)
        changes, arch = _describe_transformer(ckpt, name, side, weights, said)
    _count_labels(ckpt, arch, weights, said, classes)
    return _spec(name, arch, changes)


def _spec(name, arch, changes):
    """The spec of a network of others. changes: how it differs from DIT_DEFAULTS."""
    spec = dict(DIT_DEFAULTS, **changes, name=name, classes=arch["num_classes"], arch=arch)
    if arch["net"] == "DDPM++":
        spec["knows_null"] = False
        if (arch["num_classes"], arch["input_size"]) == (10, 32):
            spec["class_names"] = CIFAR10_NAMES
    elif not _has_null(arch):
        spec.update(knows_null=False, cfg=1.0, cfg_interval=None)
    if arch["num_classes"] == 1000 and arch["net"] != "DDPM++":
        spec["class_names"] = imagenet_names()
    return spec


def _has_null(arch):
    """Is there a null label, or an empty prompt, from which guidance could start?"""
    if arch.get("context") == "text":
        return True
    return arch["num_classes"] > 0 and arch.get("null_label", True)


def _arguments_of(held):
    """The arguments of the training script that a file carries -> dict, {} where it has none."""
    for key in ("args", "hyper_parameters"):
        value = held.get(key)
        if isinstance(value, dict):
            state = getattr(value, "state", None)  # of a Namespace that was not rebuilt
            return state if isinstance(state, dict) else value
    return {}


def _describe_ours(ckpt, held, name):
    """describe() of a file of ours."""
    if held["format"] != 1:
        raise UserError(f"checkpoint {ckpt}: format {held['format']}, this code reads format 1")
    missing = [key for key in ("name", "arch", "classes", "ema") if held.get(key) is None]
    if missing:
        raise UserError(f"checkpoint {ckpt}: lacks {', '.join(missing)}, which every checkpoint of "
                        "format 1 has; it is damaged: give another")
    _check_name(ckpt, name, held["name"])
    held = {**DIT_DEFAULTS, **held}
    spec = {key: held[key] for key in ("name", "arch", "classes", *DIT_DEFAULTS)}
    spec["knows_null"] = spec["knows_null"] and _has_null(spec["arch"])
    return spec


def _check_name(ckpt, name, own):
    """Raise UserError when the user calls the checkpoint something else than what it is."""
    if name and name != own:
        raise UserError(f"checkpoint {ckpt} holds {own}, not --model {name}; leave --model out")


def _count_labels(ckpt, arch, weights, said, classes):
    """Set arch["num_classes"], and arch["null_label"] to False where the file has no null label.

    The rows of the label table are the classes and, if labels were dropped in training, the null
    label. said: the file's own arguments. classes: the user's. Raises UserError.
    """
    table = weights.get(CLASS_TABLE, weights.get("y_embedder.embedding_table.weight"))
    if table is None or not ("patch_size" in arch or arch.get("context") == "class"):
        return
    rows = len(table)
    possible = [(rows - 1, True), (rows, False)]
    dropout = said.get("class_dropout_prob", said.get("cfg_prob"))
    fitting = [p for p in possible if said.get("num_classes", p[0]) == p[0]]
    if isinstance(dropout, (int, float)):
        fitting = [p for p in fitting if p[1] == (dropout > 0)]
    if len(fitting) != 1:
        fitting = [p for p in possible if p[0] == classes]
    if not fitting and rows % 10 == 1:  # 1: unconditional; 11, 101, 1001: round numbers and null
        fitting = possible[:1]
    if not fitting:
        given = "" if classes is None else f", and --classes {classes} fits neither"
        raise Undecided(f"checkpoint {ckpt}: its table of labels has {rows} rows, and it does not "
                        f"say whether the last one is the null label{given}; give --classes {rows} "
                        f"if it is a class, --classes {rows - 1} if it is the null label")
    arch["num_classes"], has_null = fitting[0]
    if not has_null:
        arch["null_label"] = False


def _describe_unet(name, image_size, held, weights):
    """A latent-diffusion U-Net -> (how its spec differs from DIT_DEFAULTS, its arch)."""
    made_for = 512 if name == "SD-v1.5" else 256
    side = UNETS[name]["input_size"] * (image_size or made_for) // made_for
    arch = make_arch(name, side, UNETS[name]["in_channels"], 1000)
    changes = dict(UNET_DEFAULTS.get(name, LDM_SPEC))
    beside = held.get("state_dict", held)
    if "scale_factor" in beside:  # measured on the data when its training began
        changes["scale"] = float(beside["scale_factor"])
    return changes, arch


def _input_side(ckpt, image_size, weights, said):
    """The side of the latents of a DiT or SiT. Raises UserError."""
    if weights and "pos_embed" not in weights and not image_size:
        image_size = said.get("image_size") or said.get("resolution")
        if not isinstance(image_size, int):
            raise Undecided(f"checkpoint {ckpt}: has no pos_embed, so that nothing tells the size "
                            "of its images; give --image-size, for example 256")
    return (image_size or 256) // 8


def _describe_transformer(ckpt, name, side, weights, said):
    """A DiT or SiT -> (how its spec differs from DIT_DEFAULTS, its arch).

    SiT's networks make 2C channels and count time from noise. REPA's make C and count it as we do.
    """
    repa = name.endswith("-REPA") or bool(said.keys() & REPA_ARGUMENTS)
    repa = repa or any(key.startswith("projectors.") for key in weights)
    arch = make_arch(name, side, 4, 1000, learn_sigma=not repa)
    last = weights.get("final_layer.linear.weight")
    if last is not None:
        arch["learn_sigma"] = len(last) == 2 * arch["in_channels"] * arch["patch_size"] ** 2
    if arch["net"] == "DiT":
        return {}, arch
    if repa and arch["learn_sigma"]:
        raise UserError(f"checkpoint {ckpt}: is called REPA's, by --model or by itself, but makes "
                        "8 channels as SiT's own networks do, and the two count time in opposite "
                        "directions; give SiT's file without -REPA, or REPA's own")
    for key, known in KNOWN_ARGUMENTS.items():
        if str(said.get(key, known[0])).lower() not in known:
            raise UserError(f"checkpoint {ckpt}: was trained with {key} {said[key]}; only "
                            f"{known[0]} is known")
    if not arch["learn_sigma"]:
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
    return _spec(own, arch, EDM_SPEC)


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
def load_model(path, name=None, image_size=None, classes=None):
    """A checkpoint's path or URL -> (network in eval mode on the CPU, its spec).

    name, image_size, classes: see describe(). Raises UserError.
    """
    path = local_path(path, name, image_size, classes)
    held = read_file(path)
    spec = _describe(path, held, name, image_size, classes)
    net = build_without_memory(spec["arch"]).to_empty(device="cpu")
    return load_weights(net, held, path).eval(), spec


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


def local_path(path, name=None, image_size=None, classes=None):
    """Where the checkpoint is on this machine: a URL is fetched, once. Raises UserError."""
    if "://" not in str(path):
        return path
    return _fetch_model(path, name, image_size, cache_folder(), classes)


def _fetch_model(url, name, image_size, folder, classes=None):
    """Download a checkpoint, which counts only when the network can be loaded from it, or when the
    user has only to say more about it."""
    def check(path):
        try:
            load_model(path, name, image_size, classes)
        except Undecided:  # it is asked for when the file has its name
            pass
    return fetch(url, folder, check)
