"""Networks, and loading their weights.

DiT (Peebles & Xie, "Scalable Diffusion Models with Transformers") with the module layout and the
state-dict keys of its upstream repository (facebookresearch/DiT, models.py), so that released weights
load strictly and a student saved here opens there.

Two differences from upstream. Labels are dropped by the training script and not inside the network, so
that every forward of one iteration sees the same label. And the network can be watched or edited:
`forward(x, t, y, tap)` passes every block's output, and the network's output, through `tap(l, h) -> h`.
"""
import hashlib
import http.client
import json
import os
import platform
import re
import struct
import time
import urllib.error
import urllib.request
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from runtime import UserError, write_text

# ---------------------------------------------------------------------------------------------------
# DiT
# ---------------------------------------------------------------------------------------------------


def modulate(h, shift, scale):
    """adaLN: h (B, T, D), shift and scale (B, D)."""
    return h * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def sinusoid(t, dim, max_period=10000.0):
    """t (B,), integer or fractional -> (B, dim): cosines first, then sines, in float32."""
    freqs = torch.exp(-np.log(max_period) * torch.arange(dim // 2, device=t.device, dtype=torch.float32) / (dim // 2))
    angle = t[:, None].float() * freqs
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def sincos_2d(dim, side):
    """Fixed position embedding (side * side, dim), float64. The first half encodes the column, as upstream."""
    omega = 10000.0 ** (-np.arange(dim // 4) / (dim / 4.0))
    rows, cols = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    angles = [np.outer(p.reshape(-1), omega) for p in (cols, rows)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, in_channels, dim):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)                  # (B, T, D)


class TimestepEmbedder(nn.Module):
    def __init__(self, dim, frequencies=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.frequencies = frequencies

    def forward(self, t):
        return self.mlp(sinusoid(t, self.frequencies).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Row `num_classes` is the null label of classifier-free guidance."""

    def __init__(self, num_classes, dim):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, y):
        return self.embedding_table(y)


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, h):
        B, T, D = h.shape
        q, k, v = self.qkv(h).view(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v)                     # (B, heads, T, D / heads)
        return self.proj(h.transpose(1, 2).reshape(B, T, D))


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, h):
        return self.fc2(F.gelu(self.fc1(h), approximate="tanh"))


class DiTBlock(nn.Module):
    """Attention and MLP, each gated and modulated by the condition (adaLN-Zero)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, h, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        h = h + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(h), shift1, scale1))
        h = h + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(h), shift2, scale2))
        return h


class FinalLayer(nn.Module):
    def __init__(self, dim, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, h, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(h), shift, scale))


class DiT(nn.Module):
    """Diffusion transformer on a square image or latent.

    input_size   side of the input, pixels (of the latent: an image's side / 8)
    num_classes  K; labels are 0..K-1 and K is the null label, so K = 0 is an unconditional network
    learn_sigma  twice as many output channels: the prediction, then the interpolation coefficients of
                 the reverse variance (only the DDPM sampler reads them)
    guidance     takes the scale w of guidance as an input: its embedding starts at zero, so that a network
                 without one opens here unchanged (ours, after Meng et al., "On Distillation of Guided Diffusion Models")
    """

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 num_classes=1000, learn_sigma=True, guidance=False):
        super().__init__()
        self.arch = dict(net="DiT", input_size=input_size, patch_size=patch_size, in_channels=in_channels,
                         hidden_size=hidden_size, depth=depth, num_heads=num_heads, num_classes=num_classes,
                         learn_sigma=learn_sigma, **({"guidance": True} if guidance else {}))
        self.patch_size, self.num_classes, self.guidance = patch_size, num_classes, guidance
        self.sample_shape = (in_channels, input_size, input_size)
        side, out_channels = input_size // patch_size, in_channels * (2 if learn_sigma else 1)
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.w_embedder = TimestepEmbedder(hidden_size) if guidance else None
        self.pos_embed = nn.Parameter(torch.zeros(1, side * side, hidden_size), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, out_channels)
        if self.pos_embed.device.type != "meta":
            self.initialize_weights()

    def initialize_weights(self):
        """Upstream's: Xavier for linear layers, small embeddings, and zero gates, so the output starts at zero."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        dim, side = self.arch["hidden_size"], self.arch["input_size"] // self.patch_size
        self.pos_embed.data.copy_(torch.from_numpy(sincos_2d(dim, side)))
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        zero = [b.adaLN_modulation[1] for b in self.blocks] + [self.final_layer.adaLN_modulation[1], self.final_layer.linear]
        for layer in zero + ([self.w_embedder.mlp[2]] if self.guidance else []):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def unpatchify(self, h):
        B, T, _ = h.shape
        side, p = int(T ** 0.5), self.patch_size
        h = h.view(B, side, side, p, p, -1)                             # (B, rows, cols, p, p, C)
        return torch.einsum("nhwpqc->nchpwq", h).reshape(B, -1, side * p, side * p)

    def forward(self, x, t, y, w=None, tap=None):
        """Noisy x (B, C, H, W), timesteps t (B,), labels y (B,) long, guidance scales w (B,) if it takes them -> (B, C or 2C, H, W).

        tap(l, h) -> h sees the output of block l = 0..depth-1, (B, T, D), and at l = depth the network's
        output, (B, C or 2C, H, W); what it returns takes the place of what it was given.
        """
        tap = tap or (lambda l, h: h)
        h = self.x_embedder(x) + self.pos_embed                         # (B, T, D), T = (H / patch) * (W / patch)
        c = self.t_embedder(t) + self.y_embedder(y)                     # (B, D)
        if self.guidance:
            c = c + self.w_embedder(1000 * w)
        for l, block in enumerate(self.blocks):
            h = tap(l, block(h, c))                                     # (B, T, D)
        return tap(len(self.blocks), self.unpatchify(self.final_layer(h, c)))


SIZES = {  # upstream's table; Ti is ours, for the embedded 8x8 digits
    "Ti": dict(hidden_size=64, depth=3, num_heads=2),
    "S": dict(hidden_size=384, depth=12, num_heads=6),
    "B": dict(hidden_size=768, depth=12, num_heads=12),
    "L": dict(hidden_size=1024, depth=24, num_heads=16),
    "XL": dict(hidden_size=1152, depth=28, num_heads=16),
}


def make_arch(name, input_size, in_channels, num_classes, learn_sigma):
    """'DiT-XL/2' and the data's shape -> keyword arguments of the network, with its class under "net"."""
    match = re.fullmatch(r"DiT-(Ti|S|B|L|XL)/(\d+)", name)
    if not match or int(match[2]) not in (1, 2, 4, 8):
        raise UserError(f"--model {name}: unknown; choose DiT-{{{','.join(SIZES)}}}/{{1,2,4,8}}, for example DiT-XL/2")
    patch = int(match[2])
    if input_size % patch:
        raise UserError(f"--model {name}: patches of {patch} do not tile a {input_size}x{input_size} input")
    return dict(net="DiT", input_size=input_size, patch_size=patch, in_channels=in_channels, num_classes=num_classes,
                learn_sigma=learn_sigma, **SIZES[match[1]])


def build(arch):
    """A network from the "arch" entry of a checkpoint."""
    arch = dict(arch)
    return {"DiT": DiT}[arch.pop("net")](**arch)


def with_guidance(net):
    """A DiT -> the same function as a network that takes the scale of guidance as an input, which it ignores at first."""
    new = build({**net.arch, "guidance": True})
    missing, extra = new.load_state_dict(net.state_dict(), strict=False)
    if extra or any(not k.startswith("w_embedder.") for k in missing):
        raise UserError("this network cannot be made to take the scale of guidance")
    return new


def fill_random(net, std=0.02, seed=0):
    """Fill all parameters with N(0, std^2). A fresh DiT outputs exactly zero, which makes tests and
    benchmarks of a distillation loss vacuous; this one does not."""
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data.copy_(torch.randn(p.shape, generator=g) * std)
    return net


def count(arch):
    """(parameters, floating-point operations of one forward of one sample), counted on the meta device; 2 per multiply-add."""
    with torch.device("meta"):
        net, x = build(arch), torch.empty(1, arch["in_channels"], arch["input_size"], arch["input_size"])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(x, torch.zeros(1), torch.zeros(1, dtype=torch.long), torch.ones(1))
    return sum(p.numel() for p in net.parameters()), counter.get_total_flops()


# ---------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------

UPSTREAM = {
    ("DiT-XL/2", 256): "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt",
    ("DiT-XL/2", 512): "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-512x512.pt",
}

# What an upstream DiT file does not say of itself.
DIT_DEFAULTS = dict(prediction="eps", schedule="linear", scale=0.18215, grid=None, nfe=None, cfg=1.5, method=None, solver="ddim", threshold="off")


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


def read_file(path):
    """Any checkpoint file -> what it holds (a dict), on the CPU. Raises UserError when it cannot be read."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path}: no such file; give --ckpt an existing one")
    try:
        if ".safetensors" in path.name:  # also while it is being fetched
            return read_safetensors(path)
        torch.serialization.add_safe_globals([Namespace])  # upstream DiT pickles its arguments
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
    ("model.diffusion_model.*", with the average under "model_ema.*", whose names have lost their dots).
    `wanted`: the keys the network has.
    """
    for key in ("ema", "model", "state_dict"):
        if isinstance(ckpt.get(key), dict):
            ckpt = ckpt[key]
            break
    sd = {re.sub(r"^(module\.|_orig_mod\.)+", "", k): v for k, v in ckpt.items() if isinstance(v, torch.Tensor)}
    if any(k.startswith("model.diffusion_model.") for k in sd):
        averaged = {k: "model_ema.diffusion_model" + k.replace(".", "") for k in wanted}
        if all(a in sd for a in averaged.values()):
            return {k: sd[a] for k, a in averaged.items()}
        cut = "model.diffusion_model."
        return {k[len(cut):]: v for k, v in sd.items() if k.startswith(cut)}
    return sd


def load_weights(net, ckpt, name, hint="check --model and --image-size"):
    """Strict load of find_weights(ckpt) into net (float32). A UserError names the first few differences."""
    own = net.state_dict()
    sd = find_weights(ckpt, own.keys())
    if any(".to_q." in k or k.startswith(("down_blocks.", "transformer_blocks.")) for k in sd) and not sd.keys() & own.keys():
        raise UserError(f"checkpoint {name}: these are diffusers' key names; convert it to the upstream (CompVis or DiT) layout first")
    missing, extra = [k for k in own if k not in sd], [k for k in sd if k not in own]
    shapes = [f"{k} {tuple(sd[k].shape)} instead of {tuple(own[k].shape)}" for k in own if k in sd and sd[k].shape != own[k].shape]
    wrong = [f"{what} {len(keys)}: {', '.join(keys[:3])}" for what, keys in (("missing", missing), ("unexpected", extra), ("misshaped", shapes)) if keys]
    if wrong:
        raise UserError(f"checkpoint {name} does not fit the network ({'; '.join(wrong)}); {hint}")
    net.load_state_dict(sd)
    return net


def describe(ckpt, name=None, image_size=256):
    """What a checkpoint is, without its weights: prediction, schedule, scale, classes, grid, nfe, cfg, solver,
    threshold, method, arch, name.

    ckpt: a path, or None for the released network called `name`. Our own files say all this themselves; for upstream DiT
    weights it follows from `name` ("DiT-XL/2") and `image_size` (256 or 512).
    """
    held = read_file(ckpt) if ckpt else {}
    if "format" in held:
        if held["format"] != 1:
            raise UserError(f"checkpoint {ckpt}: format {held['format']}, this code reads format 1")
        if name and name != held["name"]:
            raise UserError(f"checkpoint {ckpt} holds {held['name']}, not --model {name}; leave --model out")
        held = {"solver": "ddim", "threshold": "off", **held}
        return {k: held[k] for k in ("name", "arch", "classes", *DIT_DEFAULTS)}
    if not name:
        raise UserError(f"checkpoint {ckpt} does not say what it is; name it with --model, for example DiT-XL/2")
    table = find_weights(held, ()).get("y_embedder.embedding_table.weight")
    classes = 1000 if table is None else len(table) - 1
    return dict(DIT_DEFAULTS, name=name, classes=classes, arch=make_arch(name, image_size // 8, 4, classes, True))


def load_model(path, name=None, image_size=256):
    """A checkpoint's path -> (network in eval mode on the CPU, its describe())."""
    ckpt = read_file(path)
    info = describe(path, name, image_size)
    with torch.device("meta"):
        net = build(info["arch"])
    return load_weights(net.to_empty(device="cpu"), ckpt, path).eval(), info


# ---------------------------------------------------------------------------------------------------
# Downloads
# ---------------------------------------------------------------------------------------------------


def local_first(work):
    """work() on local rank 0, and when that has ended well on the others; returns its result on each. For downloads."""
    first, result, error = os.environ.get("LOCAL_RANK", "0") == "0", None, None
    if first:
        try:
            result = work()
        except Exception as e:
            error = e
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
    path = Path(folder) / hashlib.sha256(url.encode()).hexdigest()[:8] / url.rsplit("/", 1)[-1]  # many URLs end in the same name

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
    with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=60) as response:
        length = int(response.headers.get("Content-Length") or 0)
        version = hashlib.sha256(f"{length} {response.headers.get('ETag')} {response.headers.get('Last-Modified')}".encode()).hexdigest()[:8]
    part = path.with_name(f"{path.name}.{version}.{platform.node()}.part")  # another version, another machine: another name
    for old in path.parent.glob(f"{path.name}.*.{platform.node()}.part"):
        if old != part or old.stat().st_size > length > 0:
            old.unlink()
    have = part.stat().st_size if part.exists() else 0
    if not length or have < length:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=60) as response:
            if have and getattr(response, "status", None) != 206:  # this server cannot continue
                have = 0
            with open(part, "ab" if have else "wb") as f, tqdm(total=length or None, initial=have, unit="B", unit_scale=True, desc=path.name) as bar:
                while block := response.read(1 << 20):
                    f.write(block)
                    bar.update(len(block))
    if length and part.stat().st_size != length:
        raise ConnectionError(f"connection closed after {part.stat().st_size:,} of {length:,} bytes")
    return part


def upstream_checkpoint(name, image_size, folder):
    """Fetch the released weights of `name` once into `folder`; returns their path."""
    url = UPSTREAM.get((name, image_size))
    if url is None:
        known = ", ".join(f"{n} at {r}" for n, r in UPSTREAM)
        raise UserError(f"no released weights for {name} at {image_size} (there are: {known}); give --ckpt PATH, or train it with train.py")
    return fetch(url, folder, check=lambda path: load_model(path, name, image_size))
