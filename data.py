"""Training data, and samples from a model: the embedded digits, torchvision's sets, image folders, cached
latents, and a pool of samples that the model itself made.

A data set here has: shape (C, H, W), classes (K; label K is the null one), scale (None for pixels, else the
factor latents were multiplied by), text (None, or (tokens, dim) of its embedded captions) and len(). Pixels are in [-1, 1].
`python data.py encode` makes such caches of images and prompts: see encode.py.
"""
import itertools
import json
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

import runtime
from checkpoints import local_first
from runtime import CACHE, StepRandom, UserError, bar, generator, write_text
from solvers import PROJECTIONS, fused, guide, make_schedule, sample, solver_grid

ASSETS = Path(__file__).parent / "assets"
ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}  # of images
TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}
CHUNK = 250  # samples are drawn in chunks of this many, each from its own seed: the same on any number of processes


# ---- Data sets --------------------------------------------------------------------------------------


class Pixels:
    """Images held in memory on the training device: x (N, C, H, W) uint8, y (N,) long."""

    scale, text, workers = None, None, 0

    def __init__(self, x, y, classes, flip, name):
        self.x, self.y, self.classes, self.flip, self.name = torch.as_tensor(x), torch.as_tensor(y).long(), classes, flip, name
        self.shape = tuple(self.x.shape[1:])

    def __len__(self):
        return len(self.x)

    def rows(self, index, flip, rng):
        if self.x.device != rng.g.device:
            self.x, self.y = self.x.to(rng.g.device), self.y.to(rng.g.device)
        x = to_float(self.x[index])
        return (torch.where(flip.bool().view(-1, 1, 1, 1), x.flip(-1), x) if self.flip else x), self.y[index]


def walk(folder):
    """Every folder from this one down, links followed -> (path, names of folders in it, names of images), sorted. What is hidden does not count."""
    for path, inner, names in os.walk(folder, followlinks=True):
        inner[:], names = (sorted(n for n in some if not n.startswith((".", "__MACOSX"))) for some in (inner, names))
        yield path, inner, [n for n in names if Path(n).suffix.lower() in ENDINGS]


def image_files(folder):
    """All images below a folder, in order. Raises UserError when there are none."""
    files = sorted(Path(path, name) for path, _, names in walk(folder) for name in names)
    if not files:
        raise UserError(f"{folder}: no images there (looked for {', '.join(sorted(ENDINGS))})")
    return files


class ImageFolder(torch.utils.data.Dataset):
    """Images below a folder, cropped as ADM does. Sub-folders are classes, in alphabetical order; without
    sub-folders there is no class (K = 0) and every label is the null one."""

    scale, text, workers, flip = None, None, 4, True

    def __init__(self, root, size):
        self.name, self.size, self.shape = str(root), size, (3, size, size)
        _, folders, beside = next(walk(root))
        if folders and beside:
            raise UserError(f"--data {root}: {beside[0]} lies beside folders, which are classes; move it into one, or away")
        self.classes, self.files = len(folders), [(f, k) for k, d in enumerate(folders or [""]) for f in image_files(Path(root, d))]

    def __len__(self):
        return len(self.files)

    def __getitem__(self, item):
        index, flip = item
        path, label = self.files[index]
        x = read_image(path, self.size)
        return torch.from_numpy(np.ascontiguousarray(x[:, ::-1] if flip else x)).permute(2, 0, 1), label

    def finish(self, item, rng):
        return to_float(item[0]), item[1]


class Latents(torch.utils.data.Dataset):
    """Cached latents, memory-mapped: latents.npy (N, F, S, C, H, W), labels.npy (N,), meta.json {"classes", "scale"}.

    F = 2 holds the latent of the image and of its mirror image (F = 1: the image only); S = 2 holds mean and standard deviation of
    the autoencoder's posterior, sampled each time one is read (S = 1: the latent itself). Already multiplied by scale.
    With captions labels.npy holds rows of embeddings.npy (M, T, D), which take the labels' place, and null (1, T, D) is that of no caption.
    """

    workers, flip = 2, True

    def __init__(self, root):
        root, self.name = Path(root), str(root)
        try:
            self.x, self.y = np.load(root / "latents.npy", mmap_mode="r"), np.load(root / "labels.npy")
            meta = json.loads((root / "meta.json").read_text())
            self.classes, self.scale, self.text, self.null = int(meta["classes"]), None if meta["scale"] is None else float(meta["scale"]), None, None
            if (root / "embeddings.npy").exists():
                self.embeddings, self.null = load_prompts(root)
                self.classes, self.text = 0, tuple(self.null.shape[1:])
        except (OSError, ValueError, KeyError, EOFError, TypeError) as e:
            raise UserError(f"--data {root}: cannot be read ({e}); make it again")
        if self.x.ndim != 6 or self.x.dtype.kind != "f" or not {*self.x.shape[1:3]} <= {1, 2} or self.y.shape != self.x.shape[:1] or not self.y.size or self.y.dtype.kind not in "iu":
            raise UserError(f"--data {root}: latents.npy is {self.x.dtype} {self.x.shape}, labels.npy {self.y.dtype} {self.y.shape}; want floats (N, 1 or 2, 1 or 2, C, H, W), integers (N,)")
        if self.text and not 0 <= self.y.min() <= self.y.max() < len(self.embeddings):
            raise UserError(f"--data {root}: labels.npy names rows that embeddings.npy with its {len(self.embeddings)} does not have; make it again")
        self.shape = self.x.shape[3:]

    def __len__(self):
        return len(self.x)

    def __getitem__(self, item):
        index, flip = item
        x = self.x[index, flip % self.x.shape[1]].astype(np.float32)       # (S, C, H, W)
        if not np.isfinite(x).all():
            raise UserError(f"--data {self.name}: entry {index} is not finite; make the cache again")
        return torch.from_numpy(x), torch.from_numpy(self.embeddings[self.y[index]].astype(np.float32)) if self.text else int(self.y[index])

    def finish(self, item, rng):
        x, y = item
        return (x[:, 0] + x[:, 1] * rng.normal(self.shape) if x.shape[1] == 2 else x[:, 0]), y


def load_prompts(root):
    """A folder's embeddings, an array (M, T, D) that stays on the disk, and null, a tensor (1, T, D) float32. Raises OSError, ValueError."""
    rows, null = np.load(Path(root) / "embeddings.npy", mmap_mode="r"), np.load(Path(root) / "null.npy")
    if rows.ndim != 3 or null.shape != (1, *rows.shape[1:]):
        raise ValueError(f"embeddings.npy is {rows.shape}, null.npy {null.shape}; want (M, T, D) and (1, T, D)")
    return rows, torch.from_numpy(null).float()


def read_image(path, size=None):
    """An image file -> (H, W, 3) uint8; with `size`, cropped and scaled to (size, size, 3) as ADM does. Raises UserError."""
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"more than 8 bits a channel, mode {image.mode}")
            image = image.convert("RGB")
            return center_crop(image, size) if size else np.array(image)
    except (OSError, ValueError, SyntaxError, struct.error, zlib.error, Image.DecompressionBombError) as e:
        raise UserError(f"image {path}: cannot be read ({e}); mend or remove it")


def center_crop(image, size):
    """ADM's crop of a PIL image: halve with a box filter while the short side is at least 2 size, scale it to size with a
    bicubic filter, cut the middle out. Returns (size, size, 3) uint8."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = np.array(image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC))
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top:top + size, left:left + size]


def to_float(x):
    """uint8 -> float32 in [-1, 1]."""
    return x.float() / 127.5 - 1


def to_uint8(x):
    """[-1, 1] -> uint8, rounded to the nearest as upstream DiT's sample_ddp.py does."""
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8)


def digits():
    """The embedded set: 1,797 real handwritten digits of 8x8 pixels (17 grey levels, here spread over 0..255)."""
    with np.load(ASSETS / "digits8.npz") as f:
        x, y = f["x"], f["y"]
    return Pixels(np.round(x[:, None] * (255 / 16)).astype(np.uint8), y, 10, flip=False, name="digits")


def check_name(name):
    """Raise UserError when load(name) cannot but fail."""
    if name not in ("digits", *TORCHVISION) and not (name and Path(name).is_dir()) and not name.endswith(".npz"):
        raise UserError(f"--data {name}: neither a known set (digits, {', '.join(TORCHVISION)}) nor a folder nor an .npz")


def load(name, image_size=256, classes=None):
    """--data NAME: digits, mnist, fashion-mnist, cifar10, a folder of images, an .npz of them as sample.py writes it, or a folder of cached latents.
    classes: more classes than the data shows; data without labels has none. Raises UserError."""
    check_name(name)
    if name == "digits":
        data = digits()
    elif name in TORCHVISION:
        import torchvision
        try:
            raw = local_first(lambda: getattr(torchvision.datasets, TORCHVISION[name])(CACHE / "data", train=True, download=True))
        except Exception as e:  # urllib's, torchvision's own RuntimeError of several lines, zipfile's, ...
            raise UserError(f"--data {name}: torchvision cannot fetch it into {CACHE / 'data'} ({' '.join(str(e).split())}); put its files there yourself")
        x = np.asarray(raw.data)
        data = Pixels(x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2), raw.targets, 10, flip=name == "cifar10", name=name)
    elif Path(name, "latents.npy").exists():
        data = Latents(name)
    elif Path(name).is_dir():
        data = ImageFolder(name, image_size)
    else:
        try:
            with np.load(name) as f:
                x, y = f["arr_0"], f["arr_1"] if "arr_1" in f else np.zeros(0, int)
            if x.dtype != np.uint8 or x.ndim != 4 or not len(x) or x.shape[1] != x.shape[2] or y.shape not in ((0,), x.shape[:1]) or y.dtype.kind not in "iu":
                raise ValueError(f"arr_0 is {x.dtype} {x.shape}, arr_1 {y.dtype} {y.shape}; want uint8 (N, H, H, C) and integers (N,)")
        except Exception as e:  # a damaged file fails in as many ways as there are members
            raise UserError(f"--data {name}: cannot be read ({str(e)[:160]}); make it again")
        data = Pixels(x.transpose(0, 3, 1, 2), y if len(y) else np.zeros(len(x)), int(y.max(initial=-1)) + 1, flip=True, name=name)
    labels = labels_of(data)
    if data.classes:
        data.classes = classes or data.classes
        for label in (labels.min(), labels.max()):
            if not 0 <= label < data.classes:
                raise UserError(f"--data {name}: label {label} is out of range for {data.classes} classes (0..{data.classes - 1})")
    return data


def labels_of(data):
    return np.asarray([k for _, k in data.files] if isinstance(data, ImageFolder) else data.y)


def check_fits(data, info):
    """Raise UserError unless a network with this info can train on this data."""
    arch = info["arch"]
    want = (arch["in_channels"], arch["input_size"], arch["input_size"])
    if tuple(data.shape) != want:
        raise UserError(f"--data {data.name} has shape {tuple(data.shape)}, the network wants {want}")
    if (data.scale is None) != (info["scale"] is None) or data.scale and abs(data.scale / info["scale"] - 1) > 1e-3:
        raise UserError(f"--data {data.name} holds {f'latents times {data.scale:g}' if data.scale else 'images'}, the network wants "
                        f"{'images' if info['scale'] is None else 'latents times %g' % info['scale']}")
    if data.classes > info["classes"] > 0:
        raise UserError(f"--data {data.name} has {data.classes} classes, the network knows {info['classes']}")
    if (arch.get("context") == "text") != (data.text is not None):
        raise UserError(f"--data {data.name} has captions, the network takes labels" if data.text else
                        f"--data {data.name} has no captions, which this network is conditioned on; make it with python data.py encode --prompts")
    if data.text and data.text[1] != arch["context_dim"]:
        raise UserError(f"--data {data.name} has captions of dimension {data.text[1]}, the network wants {arch['context_dim']}")
    if 0 in (data.classes, info["classes"]) and not data.text:  # no labels, or none that the network knows: each is its null label
        if isinstance(data, ImageFolder):
            data.files = [(f, info["classes"]) for f, _ in data.files]
        else:
            data.y = data.y * 0 + info["classes"]


# ---- Batches ----------------------------------------------------------------------------------------


def batches(data, proc, seed, batch, start):
    """Endless (x0, y): this rank's rows of the global batches of steps start, start + 1, ... on the device.

    Every epoch is a permutation drawn from (seed, epoch), and batches run on across its end, so that what a step sees depends
    on (seed, step) alone. x0 (B / world, C, H, W) float32, y (B / world,) long, of data with captions (B / world, T, D) float32.
    """
    def plan():
        order, epoch = None, -1
        for step in itertools.count(start):
            rows = []
            for position in range(step * batch, (step + 1) * batch):
                if position // len(data) != epoch:
                    epoch = position // len(data)
                    order = torch.randperm(len(data), generator=generator("cpu", seed, epoch, 2)).tolist()
                rows.append(order[position % len(data)])
            flips = torch.randint(0, 2, (batch,), generator=generator("cpu", seed, step, 3))
            yield proc.rows(rows), proc.rows(flips)

    if data.workers == 0:
        for step, chosen in zip(itertools.count(start), plan()):
            yield data.rows(*(torch.as_tensor(v).to(proc.device, non_blocking=True) for v in chosen), StepRandom(proc, seed, step, batch))
    loader = DataLoader(data, batch_sampler=([*zip(r, f.tolist())] for r, f in plan()), num_workers=min(data.workers, os.cpu_count()),
                        pin_memory=proc.device.type == "cuda", worker_init_fn=one_thread)
    for step, (x, y) in zip(itertools.count(start), plainly(loader)):
        x, y = x.to(proc.device, non_blocking=True), y.to(proc.device, non_blocking=True)
        yield data.finish((x, y), StepRandom(proc, (seed << 8) + 1, step, batch))


def plainly(loader):
    """The loader's items; a UserError in a worker comes without the traceback that the loader wraps it in."""
    try:
        yield from loader
    except UserError as e:
        raise UserError(str(e).strip().splitlines()[-1].split("UserError: ")[-1])


def one_thread(worker):
    torch.set_num_threads(1)


# ---- Samples ----------------------------------------------------------------------------------------


def sample_chunks(net, info, proc, num, seed, nfe=None, cfg=None, solver=None, label=None, todo=None, prompts=None, desc="sampling"):
    """Sample `num` images, labels in turn; yields (first index, x (n, C, H, W) float32, y (n,)) of this rank's chunks.

    Sample i depends on (seed, i) alone. nfe, cfg, solver: None means as the checkpoint was trained (its own grid and guidance).
    label: all of this class. todo(chunk) -> bool: skip chunks that are already there. prompts: a tensor or array (M, T, D) for a
    network conditioned on text, of which sample i takes row y = i % M. Raises UserError.
    """
    arch, K = info["arch"], info["classes"] if prompts is None else len(prompts)
    if (arch.get("context") == "text") != (prompts is not None):
        raise UserError("this model is conditioned on text: it needs prompts (sample.py --prompts)" if prompts is None else
                        "this model takes labels: leave --prompts out")
    if prompts is not None and prompts.shape[-1] != arch["context_dim"]:
        raise UserError(f"the prompts have dimension {prompts.shape[-1]}, the network wants {arch['context_dim']}")
    schedule = make_schedule(info["schedule"]).to(proc.device)
    nfe = (info["nfe"] or 50) if nfe is None else nfe
    solver, cfg = solver or info["solver"], info["cfg"] if cfg is None else cfg
    grid = solver_grid(schedule, solver, nfe, info["grid"])
    if info.get("only_node") not in (None, *grid[:-1]) or info.get("only_node") is not None and solver in ("plms", "dpm2", "fused", "heun"):
        raise UserError(f"this network was trained for one step, at t = {info['only_node']:g}; sample it with its own --nfe and solver")
    if info.get("cfg_interval") and cfg != 1 and solver == "fused":
        raise UserError("--solver fused: this model is guided at some of its steps only, whose features do not fit together; give --cfg 1")
    if info.get("null") is not None:
        if prompts.shape[1:] != info["null"].shape[1:]:
            raise UserError(f"the prompts have shape {tuple(prompts.shape[1:])}, the empty prompt of this model {tuple(info['null'].shape[1:])}")
        info = {**info, "null": info["null"].to(proc.device)}
    nets = [node_net(net, info, t, cfg) for t in grid[:-1]]
    if fuse := solver == "fused":
        nets, solver = fused(nets, [node_net(info.get("source", net), info, t, cfg) for t in grid[:-1]], info["lam"]), "ddim"
    chunks = [c for c in range((num + CHUNK - 1) // CHUNK) if c % proc.world == proc.rank and (todo is None or todo(c))]
    with bar(proc, len(chunks) * (len(nets) if fuse else nfe), f"{desc} ({nfe} evaluations)") as progress:
        for c in chunks:
            n = min(CHUNK, num - c * CHUNK)
            noise = torch.randn(n, arch["in_channels"], arch["input_size"], arch["input_size"],
                                generator=generator(proc.device, seed, c, 4), device=proc.device)
            y = torch.arange(c * CHUNK, c * CHUNK + n, device=proc.device) % max(K, 1) if label is None else torch.full((n,), label, device=proc.device)
            fresh = generator(proc.device, seed, c, 6)
            cond = y if prompts is None else torch.as_tensor(prompts[y.cpu()]).to(proc.device, torch.float32)
            x = sample(nets, noise, cond, schedule, grid, info["prediction"], on_step=progress.update, solver=solver,
                       project=PROJECTIONS[info["threshold"]], noise=lambda x: torch.randn(x.shape, generator=fresh, device=x.device))
            yield c * CHUNK, x, y


def node_net(net, info, t, cfg):
    """The network at node t: guided where guidance acts (cfg_interval), the base model where this one was not trained (only_node)."""
    low, high = info.get("cfg_interval") or (-1, math.inf)
    if info.get("only_node") not in (None, t):
        net = info.get("elsewhere")
        if net is None:
            raise UserError(f"this network was trained for t = {info['only_node']:g} only, its base makes all other steps: python sample.py --elsewhere BASE")
    return guide(net, cfg if low <= t <= high else 1.0, null=info.get("null"))


def sample_images(net, info, proc, num, seed, nfe=None, cfg=None, solver=None, prompts=None, desc="sampling"):
    """Samples of a pixel model as (num, C, H, W) uint8 and their labels (num,), the same on every rank."""
    parts = [(i, to_uint8(x).cpu().numpy(), y.cpu().numpy()) for i, x, y in sample_chunks(net, info, proc, num, seed, nfe, cfg, solver, prompts=prompts, desc=desc)]
    return proc.gather([(i, x) for i, x, _ in parts]), proc.gather([(i, y) for i, _, y in parts])


def synthetic(net, info, proc, folder, num, seed, nfe=10, cfg=1.5):
    """A pool of `num` samples of the model itself (Table 8 of the SSD paper), as cached latents; returns its folder.

    Made once: chunks are written as they are done, by all ranks into one (shared) folder, and a broken run continues. The folder's
    name tells the weights (by their fingerprint) and the settings.
    """
    folder = Path(folder) / f"synthetic-{fingerprint(net)}-{nfe}steps-cfg{cfg:g}-seed{seed}-{num}"
    if proc.any(not (folder / "meta.json").exists())[0]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            chunks = lambda todo: sample_chunks(net, info, proc, num, seed, nfe, cfg, todo=todo, desc="synthetic data")
            x = write_pieces(proc, folder, "latents", range(num), lambda todo: ((first, x[:, None, None]) for first, x, _ in chunks(todo)))
            if proc.main:
                os.replace(x, folder / "latents.npy")
                save_array(folder / "labels.npy", np.arange(num) % max(info["classes"], 1))
                write_text(folder / "meta.json", json.dumps({"classes": info["classes"], "scale": info["scale"], "nfe": nfe, "cfg": cfg, "seed": seed}))
        except OSError as e:
            raise UserError(f"cannot write the synthetic data into {folder} ({e}); free some space, see that all machines share this folder, and repeat the command")
        proc.barrier()
    return folder


def write_pieces(proc, folder, name, keys, produce):
    """Make an array of float16 rows, one for each of keys, on all ranks; returns its file, which the caller then moves to folder/name.npy.

    produce(todo) yields (first row, rows) for this rank's chunks c with todo(c). They are written as they are done, and in the end moved into
    one file one by one; a broken run continues, also with other keys, of which the chunks that are the same are kept.
    """
    crc = lambda keys: f"{zlib.crc32(repr(keys).encode()):08x}"
    piece = lambda c: folder / f"{name}-{c:06d}-{crc(keys[c * CHUNK:(c + 1) * CHUNK])}.npy"
    whole, chunks = folder / f"{name}-{crc(keys)}.part", range((len(keys) + CHUNK - 1) // CHUNK)
    if proc.any(not whole.exists())[0]:  # else all are done, and some are moved already
        for first, x in produce(lambda c: not piece(c).exists()):
            if not x.half().isfinite().all():
                raise UserError(f"{name} {first} to {first + len(x) - 1} are not finite, or too large for float16; look at the model, and at --scale")
            save_array(piece(first // CHUNK), x.half().cpu().numpy())
        proc.barrier()
    if proc.main:
        for old in {*folder.glob(f"{name}-{'?' * 8}.part")} - {whole}:  # of keys that are no more
            old.unlink()
        if not whole.exists() and not all(piece(c).exists() for c in chunks):
            raise UserError(f"{folder} lacks what other processes wrote: all machines must share this folder")
        whole.touch()
        with open(whole, "r+b") as f:
            for c in filter(lambda c: piece(c).exists(), chunks):
                x = np.load(piece(c))
                f.seek(0)
                np.lib.format.write_array_header_1_0(f, {"descr": "<f2", "fortran_order": False, "shape": (len(keys), *x.shape[1:])})
                f.seek(f.tell() + c * CHUNK * x[0].nbytes)
                f.write(x.tobytes())
                f.flush(), os.fsync(f.fileno())
                piece(c).unlink()
        for old in folder.glob(f"{name}-{'?' * 6}-{'?' * 8}.npy"):
            old.unlink()
    return whole


def save_array(path, x):
    """Write an .npy file atomically."""
    part = path.with_suffix(".tmp")
    try:
        with open(part, "wb") as f:
            np.save(f, x)
            f.flush(), os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({e.strerror or e}); what is there already is kept: free some space and repeat the command")


def fingerprint(net):
    """Eight hexadecimal digits that depend on every weight."""
    total = sum(float(p.detach().double().abs().sum()) * (1 + i % 7) for i, p in enumerate(getattr(net, "net", net).parameters()))
    return np.float64(total).tobytes()[::-1].hex()[4:12]


def save_grid(blocks, path, columns=20):
    """Blocks of images, each (n, C, H, W) uint8 -> one PNG with the blocks one below the other; small images enlarged."""
    from torchvision.utils import make_grid as tile
    zoom = max(1, 32 // blocks[0].shape[2])
    enlarge = lambda x: torch.as_tensor(x).repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    bands = [tile(enlarge(images), nrow=columns, padding=4, pad_value=90) for images in blocks]  # (3, height, width)
    line = torch.full((3, 3, bands[0].shape[2]), 255, dtype=torch.uint8)
    image = Image.fromarray(torch.cat([part for band in bands for part in (line, band)][1:], 1).permute(1, 2, 0).numpy())
    temporary = Path(path).with_suffix(".tmp")
    image.save(temporary, "PNG")
    os.replace(temporary, path)


if __name__ == "__main__":  # python data.py encode
    import encode
    runtime.run(encode.main, encode.parser().parse_args())
