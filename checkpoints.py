"""Files of weights: reading what others have written, strict loading, downloads.

A checkpoint of ours is a plain dictionary that says what it holds. Taken as well: upstream's files, raw state dicts, Lightning's,
safetensors, EDM's pickled networks.
"""
import hashlib
import http.client
import io
import json
import os
import pickle
import platform
import re
import socket
import struct
import time
import urllib.error
import urllib.request
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from models import CLASS_TABLE, DDPMPP, UNETS, build, make_arch
from runtime import CACHE, UserError, flag, write_text
from solvers import SIGMA_DATA

# ---- Reading and loading ----------------------------------------------------------------------------

UPSTREAM = {  # the links that the upstream repositories give: READMEs, download scripts, LDM's notebook
    ("DiT-XL/2", 256): "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt",
    ("DiT-XL/2", 512): "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-512x512.pt",
    ("SiT-XL/2", 256): "https://www.dl.dropboxusercontent.com/scl/fi/as9oeomcbub47de5g4be0/SiT-XL-2-256.pt?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=0",
    ("SiT-XL/2-REPA", 256): "https://www.dl.dropboxusercontent.com/scl/fi/cxedbs4da5ugjq5wg3zrg/last.pt?rlkey=8otgrdkno0nd89po3dpwngwcc&st=apcc645o&dl=0",
    ("LDM-ImageNet", 256): "https://ommer-lab.com/files/latent-diffusion/nitro/cin/model.ckpt",
    ("DDPM++-t", 32): "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-cond-vp.pkl",  # for non-commercial use
    ("DDPM++-t-uncond", 32): "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-uncond-vp.pkl",
}
NOT_FETCHED = {  # released too, but not as one file at one address
    **{name: f"model.ckpt, unpacked from https://ommer-lab.com/files/latent-diffusion/{archive}.zip" for name, archive in
       {"LDM-CelebAHQ": "celeba", "LDM-FFHQ": "ffhq", "LDM-Bedroom": "lsun_bedrooms", "LDM-Churches": "lsun_churches"}.items()},
    "SD-v1.5": "v1-5-pruned-emaonly.ckpt or .safetensors, from where its licence was accepted",
}

# What upstream's files do not say of themselves: DiT's, then in what the others differ. cfg_interval [low, high]: guided only for
# t within it. only_node: the one t for which a student was trained. null: the empty prompt, (1, T, D). The scale of a file that has its own ("scale_factor") comes from there.
DIT_DEFAULTS = dict(prediction="eps", schedule="linear", scale=0.18215, grid=None, nfe=None, cfg=1.5, cfg_interval=None, method=None,
                    solver="ddim", threshold="off", only_node=None, null=None)
SIT = dict(prediction="velocity", schedule="interpolant")
REPA = dict(SIT, cfg=1.8, cfg_interval=[0.0, 0.7])
EDM = dict(prediction="edm", schedule="edm", scale=None, cfg=1.0, solver="heun", nfe=35)  # 18 steps, upstream's for CIFAR-10
LDM = dict(schedule="ldm", scale=1.0, cfg=1.0)
UNET_DEFAULTS = {"SD-v1.5": dict(schedule="sd", cfg=7.5), "LDM-ImageNet": dict(LDM, cfg=1.5), "LDM-Churches": dict(LDM, schedule="ldm-churches")}

# Lightning's files name this class; an empty one will do.
LIGHTNING = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})


def read_safetensors(path):
    """A safetensors file: an 8-byte little-endian length, a JSON header, raw tensors."""
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
              "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
    raw = np.memmap(path, dtype=np.uint8, mode="c")
    size = struct.unpack("<Q", raw[:8].tobytes())[0]
    header = json.loads(raw[8:8 + size].tobytes())
    header.pop("__metadata__", None)
    out = {}
    for key, v in header.items():
        begin, end = (8 + size + o for o in v["data_offsets"])
        if end > len(raw):
            raise ValueError(f"{key} ends beyond the file")
        out[key] = torch.from_numpy(np.array(raw[begin:end])).view(dtypes[v["dtype"]]).reshape(v["shape"])
    return out


def read_pickle(path):
    """A pickled network of EDM's -> {"ema": state dict, "network": its class's name, "sigma_data"}, without running anything that the file brings.

    Such a file holds objects with the source of their classes (torch_utils.persistence). Here every object becomes an Inert that keeps what it was
    made from; besides them there are tensors and plain containers, and every other name is refused. The names stand in a dictionary made anew for
    every file, since a pickle may set attributes of what it gets hold of.
    """
    class Inert:
        def __new__(cls, *args):
            self = super().__new__(cls)
            self.args, self.state = args, None
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

    known = {("torch._utils", "_rebuild_tensor_v2"): make_tensor, ("torch._utils", "_rebuild_parameter"): make_parameter,
             ("torch.storage", "_load_from_bytes"): load_storage, ("collections", "OrderedDict"): OrderedDict, ("dnnlib.util", "EasyDict"): dict,
             ("torch_utils.persistence", "_reconstruct_persistent_obj"): Inert, ("torch.nn.modules.container", "ModuleDict"): Inert,
             **{(f"numpy.{core}.multiarray", name): Inert for core in ("core", "_core") for name in ("scalar", "_reconstruct")},
             ("numpy", "dtype"): Inert, ("numpy", "ndarray"): Inert}

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if (module, name) not in known:
                raise pickle.UnpicklingError(f"it names {module}.{name}")
            return known[module, name]

    def state_of(module):  # of persistent objects it lies in the one argument
        return module.state or module.args[0]["state"]

    def flatten(module, prefix=""):
        state = state_of(module)
        for name, tensor in {**state["_parameters"], **state["_buffers"]}.items():
            if isinstance(tensor, torch.Tensor) and name not in state.get("_non_persistent_buffers_set", ()):
                weights[prefix + name] = tensor
        for name, child in state["_modules"].items():
            if child is not None:
                flatten(child, f"{prefix}{name}.")

    with open(path, "rb") as f:
        net = Unpickler(f).load()["ema"]
    weights = {}
    flatten(net)
    return {"ema": weights, "network": net.args[0]["class_name"], "sigma_data": state_of(net).get("sigma_data")}


def read_file(path):
    """Any checkpoint file -> what it holds (a dict), on the CPU. Raises UserError when it cannot be read."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path}: no such file; give --ckpt an existing one")
    try:
        if ".safetensors" in path.name:  # also while it is being fetched
            return read_safetensors(path)
        if ".pkl" in path.name:
            return read_pickle(path)
        torch.serialization.add_safe_globals([Namespace, LIGHTNING])  # upstream DiT pickles its arguments
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as e:  # a damaged file fails in as many ways as there are formats
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise UserError(f"checkpoint {path}: cannot be read ({type(e).__name__}: {reason[:160]}); it is damaged or not a file of weights")
    if not isinstance(held, dict) or not held:
        raise UserError(f"checkpoint {path}: holds no weights")
    return held


def find_weights(ckpt, wanted):
    """The state dict inside a checkpoint, under plain names.

    Takes our dict or upstream's ("ema" before "model" before "state_dict"), a raw state dict, the prefixes of
    DDP ("module.") and torch.compile ("_orig_mod."), and Lightning files of latent diffusion
    ("model.diffusion_model.*", with the average under "model_ema.*", whose names have lost their dots; the table of classes lies beside).
    `wanted`: the keys the network has.
    """
    for key in ("ema", "model", "state_dict"):
        if isinstance(ckpt.get(key), dict):
            ckpt = ckpt[key]
            break
    sd = {re.sub(r"^(module\.|_orig_mod\.)+", "", k): v for k, v in ckpt.items() if isinstance(v, torch.Tensor)}
    if any(k.startswith("model.diffusion_model.") for k in sd):
        beside = {k: sd[k] for k in wanted if k in sd}
        averaged = {k: "model_ema.diffusion_model" + k.replace(".", "") for k in wanted if k not in beside}
        if averaged and all(a in sd for a in averaged.values()):
            return {k: sd[a] for k, a in averaged.items()} | beside
        cut = "model.diffusion_model."
        return {k[len(cut):]: v for k, v in sd.items() if k.startswith(cut)} | beside
    return sd


def load_weights(net, ckpt, name, hint="check --model and --image-size"):
    """Strict load of find_weights(ckpt) into net (float32). A UserError names the first few differences."""
    own = net.state_dict()
    sd = find_weights(ckpt, own.keys())
    sd = {k: v for k, v in sd.items() if not k.startswith(getattr(net, "ignored", ()))}
    if any(".to_q." in k or k.startswith(("down_blocks.", "transformer_blocks.")) for k in sd) and not sd.keys() & own.keys():
        raise UserError(f"checkpoint {name}: these are diffusers' key names; convert it to the upstream (CompVis or DiT) layout first")
    missing, extra = [k for k in own if k not in sd], [k for k in sd if k not in own]
    shapes = [f"{k} {tuple(sd[k].shape)} instead of {tuple(own[k].shape)}" for k in own if k in sd and sd[k].shape != own[k].shape]
    wrong = [f"{what} {len(keys)}: {', '.join(keys[:3])}" for what, keys in (("missing", missing), ("unexpected", extra), ("misshaped", shapes)) if keys]
    if wrong:
        raise UserError(f"checkpoint {name} does not fit the network ({'; '.join(wrong)}); {hint}")
    net.load_state_dict(sd)
    return net


def describe_edm(ckpt, held, sd, name):
    """describe() of one of EDM's networks, which the keys and shapes of its weights tell."""
    if (held.get("network", "EDMPrecond"), held.get("sigma_data", SIGMA_DATA)) != ("EDMPrecond", SIGMA_DATA):
        raise UserError(f"checkpoint {ckpt} is a {held['network']} with sigma_data {held['sigma_data']}; of EDM's only EDMPrecond with {SIGMA_DATA} is known")
    try:
        sides = sorted({int(side) for k in sd for side in re.findall(r"^model\.enc\.(\d+)x", k)}, reverse=True)
        levels, top = [f"model.enc.{side}x{side}_block" for side in sides], f"{sides[0]}x{sides[0]}"
        channels, in_channels = sd[f"model.enc.{top}_conv.weight"].shape[:2]
        blocks = sum(k.startswith(levels[0]) and k.endswith(".conv0.weight") for k in sd)
        mult = [len(sd[level + "0.conv0.weight"]) // channels for level in levels]
        sd[f"model.dec.{top}_aux_conv.weight"]  # ADM has none
    except (LookupError, ValueError, TypeError, ArithmeticError):
        raise UserError(f"checkpoint {ckpt}: these are not the weights of a DDPM++; of EDM's networks (DDPM++, NCSN++, ADM) only that one is known")
    attention = [side for side, level in zip(sides, levels) if level + "0.qkv.weight" in sd]
    columns = lambda key: sd[key].shape[1] if key in sd else 0
    arch = dict(net="DDPM++", model_channels=channels, num_blocks=blocks, channel_mult=mult, input_size=sides[0], in_channels=in_channels, attn_resolutions=attention,
                num_classes=columns("model.map_label.weight"), augment_dim=columns("model.map_augment.weight"))
    size = f"{channels}x{blocks}"
    size = "-" + next((n for n in DDPMPP if DDPMPP[n] == size), size) if set(mult) == {2} else ""
    own = "DDPM++" + size + ("" if arch["num_classes"] else "-uncond")
    if name and name != own:
        raise UserError(f"checkpoint {ckpt} holds {own}, not --model {name}; leave --model out")
    return dict(DIT_DEFAULTS, **EDM, name=own, classes=arch["num_classes"], arch=arch)


def describe(ckpt, name=None, image_size=None):
    """What a checkpoint is, without its weights: prediction, schedule, scale, classes, grid, nfe, cfg, cfg_interval, solver,
    threshold, method, only_node, null, arch, name.

    ckpt: a path, or None for the released network called `name`. Our own files say all this themselves; for upstream's it follows
    from `name` ("DiT-XL/2"), `image_size` (None: what it was made for) and the shapes of the weights.
    """
    held = read_file(ckpt) if ckpt else {}
    if "format" in held:
        if held["format"] != 1:
            raise UserError(f"checkpoint {ckpt}: format {held['format']}, this code reads format 1")
        if name and name != held["name"]:
            raise UserError(f"checkpoint {ckpt} holds {held['name']}, not --model {name}; leave --model out")
        held = {**DIT_DEFAULTS, **held}
        return {k: held[k] for k in ("name", "arch", "classes", *DIT_DEFAULTS)}
    sd = find_weights(held, [CLASS_TABLE])
    if any(k.startswith("model.enc.") for k in sd):
        return describe_edm(ckpt, held, sd, name)
    if not name:
        raise UserError(f"checkpoint {ckpt} does not say what it is; name it with --model, for example DiT-XL/2")
    table, last = sd.get(CLASS_TABLE, sd.get("y_embedder.embedding_table.weight")), sd.get("final_layer.linear.weight")
    classes = 1000 if table is None else len(table) - 1
    if name in UNETS:
        made_for, more = 512 if name == "SD-v1.5" else 256, dict(UNET_DEFAULTS.get(name, LDM))
        side = UNETS[name]["input_size"] * (image_size or made_for) // made_for
        arch = make_arch(name, side, UNETS[name]["in_channels"], classes)
        if "scale_factor" in held.get("state_dict", held):  # measured on the data when its training began
            more["scale"] = float(held.get("state_dict", held)["scale_factor"])
    elif name.startswith("DDPM++"):
        arch, more = make_arch(name, image_size or 32, 3, 10), EDM  # CIFAR-10's
    else:
        repa = name.endswith("-REPA") or any(k.startswith("projectors.") for k in sd)
        arch = make_arch(name, (image_size or 256) // 8, 4, classes, learn_sigma=not repa)
        if last is not None:
            arch["learn_sigma"] = len(last) == 2 * arch["in_channels"] * arch["patch_size"] ** 2
        more = {} if arch["net"] == "DiT" else REPA if repa else SIT
        if more is SIT:
            arch["reverse"] = True
    return dict(DIT_DEFAULTS, **more, name=name, classes=arch["num_classes"], arch=arch)


def load_model(path, name=None, image_size=None):
    """A checkpoint's path or URL -> (network in eval mode on the CPU, its describe())."""
    ckpt = read_file(path := local(path, name, image_size))
    info = describe(path, name, image_size)
    with torch.device("meta"):
        net = build(info["arch"])
    return load_weights(net.to_empty(device="cpu"), ckpt, path).eval(), info


# ---- Downloads --------------------------------------------------------------------------------------


TIMEOUT = 60  # seconds without a byte


def local_first(work):
    """work() on local rank 0, and when that has ended well on the others; returns its result on each. For downloads."""
    first, result, error, patience = os.environ.get("LOCAL_RANK", "0") == "0", None, None, socket.getdefaulttimeout()
    if first:
        try:
            socket.setdefaulttimeout(TIMEOUT)  # torchvision sets none
            result = work()
        except Exception as e:
            error = e
        socket.setdefaulttimeout(patience)
    if dist.is_initialized():
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, str(error) if error else None)
        error = error or next((UserError(e) for e in errors if e), None)
    if error:
        raise error
    return result if first else work()


def file_hash(path):
    """sha256 in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def fetch(url, folder, check, sha256="", flag="--ckpt", tries=3):
    """Download url below folder once; returns the path. Local rank 0 works, the others wait for it.

    The file grows under a temporary name and continues where it broke off (within `tries`, and in the next run).
    It takes its name only when it has its full length, the published `sha256` (or its beginning) where there is one, and check(path)
    raises no UserError; the hash is recorded beside it. Raises UserError, leaving no file of that name. flag: what takes a path instead.
    """
    path = Path(folder) / hashlib.sha256(url.encode()).hexdigest()[:8] / url.split("?")[0].rsplit("/", 1)[-1]  # many URLs end in the same name

    def work():
        if path.exists():
            return path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = _download(url, path, flag, tries)
            digest = file_hash(part)
            try:
                if not digest.startswith(sha256):
                    raise UserError(f"sha256 is {digest}, published is {sha256}")
                check(part)
            except UserError as e:
                part.unlink()
                raise UserError(f"{url} does not hold what it should and was deleted ({e})")
            write_text(path.with_name(path.name + ".sha256"), f"{digest}  {path.name}\n")
            os.replace(part, path)
        except OSError as e:
            raise UserError(f"cannot fetch {url} into {path.parent}: {e.strerror or e}; free some space, or download it yourself and give {flag} PATH")
        return path

    return local_first(work)


def _download(url, path, flag, tries):
    for attempt in range(tries):
        try:
            return _download_once(url, path)
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as e:
            reason = getattr(e, "reason", e)
            if isinstance(e, urllib.error.HTTPError) and e.code < 500:
                break
            time.sleep(attempt)
    kept = next(iter(path.parent.glob(path.name + ".*.part")), None)
    kept = f"{kept.stat().st_size:,} bytes are kept in {kept}, the same command continues" if kept else "nothing was kept"
    raise UserError(f"cannot fetch {url}: {reason} ({kept}); check the connection, or download it yourself and give {flag} PATH")


def _download_once(url, path):
    with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT) as response:
        length = int(response.headers.get("Content-Length") or 0)
        version = hashlib.sha256(f"{length} {response.headers.get('ETag')} {response.headers.get('Last-Modified')}".encode()).hexdigest()[:8]
    part = path.with_name(f"{path.name}.{version}.{platform.node()}.part")  # another version, another machine: another name
    for old in path.parent.glob(f"{path.name}.*.{platform.node()}.part"):
        if old != part or old.stat().st_size > length > 0:
            old.unlink()
    have = part.stat().st_size if part.exists() else 0
    if not length or have < length:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            if have and getattr(response, "status", None) != 206:  # this server cannot continue
                have = 0
            with open(part, "ab" if have else "wb") as f, tqdm(total=length or None, initial=have, unit="B", unit_scale=True, desc=path.name) as bar:
                while block := response.read1(1 << 20):  # what has come, so that nothing is lost when no more does
                    f.write(block)
                    bar.update(len(block))
    if length and part.stat().st_size != length:
        raise ConnectionError(f"connection closed after {part.stat().st_size:,} of {length:,} bytes")
    return part


def upstream_checkpoint(name, image_size, folder):
    """Fetch the released weights of `name` once into `folder`; returns their path."""
    image_size = image_size or (32 if name.startswith("DDPM++") else 256)
    url = UPSTREAM.get((name, image_size))
    if name in NOT_FETCHED:
        raise UserError(f"the weights of {name} are not fetched; get {NOT_FETCHED[name]}, and give --ckpt PATH")
    if url is None:
        known = ", ".join(f"{n} at {r}" for n, r in UPSTREAM)
        raise UserError(f"no released weights for {name} at {image_size} (there are: {known}); give --ckpt PATH, or train it with train.py")
    return fetch(url, folder, check=lambda path: load_model(path, name, image_size))


def local(path, name=None, image_size=None):
    """Where the checkpoint is: a URL is fetched, once."""
    return fetch(path, CACHE, check=lambda file: load_model(file, name, image_size)) if "://" in str(path) else path


# ---- A run's own file -------------------------------------------------------------------------------

NOT_COMPARED = {"out", "resume", "log_every", "save_every", "eval_samples", "dry_run", "compile", "accumulate", "grad_checkpointing", "save_minutes",  # may change between launches
                "pool", "betas"}  # follow from what is compared


def prepare(args, proc):
    """Make --out; return the checkpoint to continue from, or None. Its arguments must be these arguments."""
    if not args.out:
        raise UserError("--out is empty; name a folder")
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if proc.main:
            (out / "log.jsonl").open("a").close()
    except OSError as e:
        raise UserError(f"--out {out}: cannot write there ({e.strerror}); choose another folder")
    last = out / "last.pt"
    if args.resume == "never" and last.exists():
        raise UserError(f"{last} exists and --resume never would overwrite it; choose another --out or delete it")
    if not last.exists():
        for control in ("continued", "plain", "dsm"):
            if (out / control / "last.pt").exists():
                raise UserError(f"{out / control} is left of a run that is no more: delete it, or choose another --out")
        return None
    try:
        state = torch.load(last, map_location="cpu", weights_only=True)
        saved = state["args"]
    except Exception as e:
        raise UserError(f"{last}: cannot be read ({type(e).__name__}); it is damaged: delete it or choose another --out")
    now = plain(args)
    for key in sorted((saved.keys() | now.keys()) - NOT_COMPARED):
        if saved.get(key) != now.get(key):
            raise UserError(f"{out} holds a run with {flag(key)} {saved.get(key)}, now it is {now.get(key)}; "
                            f"repeat the old command to continue it, or choose another --out")
    return state


def plain(args):
    return {k: v if isinstance(v, (int, float, str, bool, type(None))) else str(v) for k, v in vars(args).items()}


def save(args, proc, state, name="last.pt"):
    """Write args.out/name on rank 0: to a temporary file, flushed to the disk, then moved into place."""
    if proc.main:
        last = Path(args.out) / name
        temporary = last.with_suffix(".tmp")
        try:
            with open(temporary, "wb") as f:
                torch.save({"format": 1, **state, "args": plain(args)}, f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, last)
        except (OSError, RuntimeError) as e:
            temporary.unlink(missing_ok=True)
            kept = "the one before it stands" if last.exists() else "none was saved before"
            raise UserError(f"cannot save {last} ({e.strerror if isinstance(e, OSError) else str(e).splitlines()[0][:80]}); {kept}. Free some space and repeat the command")
