"""Training data: the embedded digits, torchvision's sets, image folders, .npz, cached latents.

A data set here has

    shape    (C, H, W)
    classes  K; label K is the null one, K = 0 stands for no classes
    scale    None for pixels, which lie in [-1, 1]; else the factor that latents were multiplied by
    text     None, or (tokens, dim) of its embedded captions
    name     as --data gives it

and len(). `python -m kit.encode` makes caches of latents from images and prompts.
"""
import itertools
import json
import os
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

import fid
from kit.cli import UserError, cache_folder
from kit.download import local_first
from kit.processes import StepRandom, generator

ASSETS = Path(__file__).parents[1] / "assets"
ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}  # of images
TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}


# ---- Data sets ---------------------------------------------------------------------------------


class Pixels:
    """Images held in memory, on the training device once they are used.

    x: (N, C, H, W) uint8. y: (N,) labels. flip: whether half of what is read is mirrored.
    """

    scale = None
    text = None
    workers = 0

    def __init__(self, x, y, classes, flip, name):
        self.x = torch.as_tensor(x)
        self.y = torch.as_tensor(y).long()
        self.classes = classes
        self.flip = flip
        self.name = name
        self.shape = tuple(self.x.shape[1:])

    def __len__(self):
        return len(self.x)

    def take(self, index, flip):
        """Images (B, C, H, W) float32 in [-1, 1] and their labels (B,), on the device of index.

        index: (B,). flip: (B,), 1 for a mirror image.
        """
        if self.x.device != index.device:
            self.x = self.x.to(index.device)
            self.y = self.y.to(index.device)
        x = to_float(self.x[index])
        if self.flip:
            x = torch.where(flip.bool().view(-1, 1, 1, 1), x.flip(-1), x)
        return x, self.y[index]


class ImageFolder(torch.utils.data.Dataset):
    """Images below a folder, cropped as ADM does.

    Sub-folders are classes, in alphabetical order. Without sub-folders there are no classes (K = 0)
    and every label is the null one.
    """

    scale = None
    text = None
    workers = 4
    flip = True

    def __init__(self, root, size):
        self.name = str(root)
        self.size = size
        self.shape = (3, size, size)
        _, folders, beside = next(list_folder(root))
        if folders and beside:
            raise UserError(f"--data {root}: {beside[0]} lies beside folders, which are classes; "
                            "move it into one, or away")
        self.classes = len(folders)
        self.files = []  # pairs of path and label
        for label, folder in enumerate(folders or [""]):
            for file in image_files(Path(root, folder)):
                self.files.append((file, label))

    def __len__(self):
        return len(self.files)

    def __getitem__(self, item):
        """item: (index, flip) -> ((3, size, size) uint8, label)."""
        index, flip = item
        path, label = self.files[index]
        x = read_image(path, self.size)
        x = np.ascontiguousarray(x[:, ::-1] if flip else x)
        return torch.from_numpy(x).permute(2, 0, 1), label

    def finish(self, x, rng):
        """A batch of what __getitem__ returns, on the device -> float32 in [-1, 1]."""
        return to_float(x)


class Latents(torch.utils.data.Dataset):
    """Cached latents, memory-mapped.

        latents.npy  (N, F, S, C, H, W), already multiplied by scale
        labels.npy   (N,)
        meta.json    {"classes", "scale"}

    F = 2 holds the latent of the image and of its mirror image; F = 1: of the image only.
    S = 2 holds mean and standard deviation of the autoencoder's posterior, which is sampled each
    time an entry is read; S = 1: the latent itself.

    With captions there are also

        embeddings.npy  (M, T, D); labels.npy holds indices of its rows, which stand for the labels
        null.npy        (1, T, D), the embedding of no caption
    """

    workers = 2
    flip = True

    def __init__(self, root):
        self.name = str(root)
        try:
            self._open(Path(root))
        except (OSError, ValueError, KeyError, EOFError, TypeError) as e:
            raise UserError(f"--data {root}: cannot be read ({e}); make it again")
        self._check()
        self.shape = self.x.shape[3:]

    def _open(self, root):
        self.x = np.load(root / "latents.npy", mmap_mode="r")
        self.y = np.load(root / "labels.npy")
        meta = json.loads((root / "meta.json").read_text())
        self.classes = int(meta["classes"])
        self.scale = None if meta["scale"] is None else float(meta["scale"])
        self.text = None
        self.null = None
        if (root / "embeddings.npy").exists():
            self.embeddings, self.null = load_prompts(root)
            self.classes = 0
            self.text = tuple(self.null.shape[1:])

    def _check(self):
        """Raise UserError unless the arrays fit together."""
        x, y = self.x, self.y
        good_latents = x.ndim == 6 and x.dtype.kind == "f" and {*x.shape[1:3]} <= {1, 2}
        good_labels = y.shape == x.shape[:1] and y.size and y.dtype.kind in "iu"
        if not good_latents or not good_labels:
            raise UserError(f"--data {self.name}: latents.npy is {x.dtype} {x.shape}, labels.npy "
                            f"{y.dtype} {y.shape}; want floats (N, 1 or 2, 1 or 2, C, H, W), "
                            "integers (N,)")
        if self.text and not 0 <= y.min() <= y.max() < len(self.embeddings):
            raise UserError(f"--data {self.name}: labels.npy names rows that embeddings.npy with "
                            f"its {len(self.embeddings)} does not have; make it again")

    def __len__(self):
        return len(self.x)

    def __getitem__(self, item):
        """item: (index, flip) -> ((S, C, H, W) float32, label or embedding (T, D) float32)."""
        index, flip = item
        x = self.x[index, flip % self.x.shape[1]].astype(np.float32)
        if not np.isfinite(x).all():
            raise UserError(f"--data {self.name}: entry {index} is not finite; "
                            "make the cache again")
        if self.text:
            y = torch.from_numpy(self.embeddings[self.y[index]].astype(np.float32))
        else:
            y = int(self.y[index])
        return torch.from_numpy(x), y

    def finish(self, x, rng):
        """A batch (B, S, C, H, W) -> latents (B, C, H, W); S = 2: samples of their posteriors."""
        if x.shape[1] == 1:
            return x[:, 0]
        mean, std = x[:, 0], x[:, 1]
        return mean + std * rng.normal(self.shape)


def digits():
    """The embedded set: 1,797 real handwritten digits of 8x8 pixels.

    Their 17 grey levels are spread over 0..255.
    """
    with np.load(ASSETS / "digits8.npz") as f:
        x, y = f["x"], f["y"]
    x = np.round(x[:, None] * (255 / 16)).astype(np.uint8)
    return Pixels(x, y, 10, flip=False, name="digits")


# ---- Files -------------------------------------------------------------------------------------


def list_folder(folder):
    """Every folder from this one down, links followed -> (path, names of folders in it, names of
    images in it), sorted. Hidden files and folders are left out."""
    def visible(names):
        return sorted(name for name in names if not name.startswith((".", "__MACOSX")))

    for path, folders, files in os.walk(folder, followlinks=True):
        folders[:] = visible(folders)  # os.walk goes into what is left
        yield path, folders, [n for n in visible(files) if Path(n).suffix.lower() in ENDINGS]


def image_files(folder):
    """The paths of all images below a folder, in order. Raises UserError when there are none."""
    files = []
    for path, _, names in list_folder(folder):
        files.extend(Path(path, name) for name in names)
    if not files:
        endings = ", ".join(sorted(ENDINGS))
        raise UserError(f"{folder}: no images there (looked for {endings})")
    return sorted(files)


def load_prompts(root):
    """A folder of embedded prompts -> (embeddings, null).

    embeddings: an array (M, T, D) that stays on the disk. null: a tensor (1, T, D) float32, the
    embedding of the empty prompt. Raises OSError, ValueError, EOFError.
    """
    embeddings = np.load(Path(root) / "embeddings.npy", mmap_mode="r")
    null = np.load(Path(root) / "null.npy")
    if embeddings.ndim != 3 or null.shape != (1, *embeddings.shape[1:]):
        raise ValueError(f"embeddings.npy is {embeddings.shape}, null.npy {null.shape}; "
                         "want (M, T, D) and (1, T, D)")
    return embeddings, torch.from_numpy(null).float()


def read_image(path, size=None):
    """fid.read_image, which raises UserError here."""
    try:
        return fid.read_image(path, size)
    except ValueError as e:
        raise UserError(str(e))


def to_float(x):
    """uint8 -> float32 in [-1, 1]."""
    return x.float() / 127.5 - 1


def to_uint8(x):
    """[-1, 1] -> uint8, rounded to the nearest as in upstream DiT's sample_ddp.py."""
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8)


# ---- --data NAME -------------------------------------------------------------------------------


def check_name(name):
    """Raise UserError when load(name) is sure to fail."""
    is_folder = name and Path(name).is_dir()
    if name not in ("digits", *TORCHVISION) and not is_folder and not name.endswith(".npz"):
        raise UserError(f"--data {name}: neither a known set (digits, {', '.join(TORCHVISION)}) "
                        "nor a folder nor an .npz")


def load(name, image_size=256, classes=None):
    """The data set that --data NAME means. Raises UserError.

    name        digits, mnist, fashion-mnist, cifar10, a folder of images, an .npz of images as
                sample.py writes it, or a folder of cached latents
    image_size  to which a folder's images are cropped
    classes     for a data set that does not show all of its classes; data without labels has none
    """
    check_name(name)
    if name == "digits":
        data = digits()
    elif name in TORCHVISION:
        data = _load_torchvision(name)
    elif Path(name, "latents.npy").exists():
        data = Latents(name)
    elif Path(name).is_dir():
        data = ImageFolder(name, image_size)
    else:
        data = _load_npz(name)
    if data.classes:
        data.classes = classes or data.classes
        _check_labels(data)
    return data


def _load_torchvision(name):
    """One of torchvision's sets, downloaded once into the cache folder. Raises UserError."""
    import torchvision
    folder = cache_folder() / "data"

    def download():
        dataset = getattr(torchvision.datasets, TORCHVISION[name])
        return dataset(folder, train=True, download=True)

    try:
        raw = local_first(download)
    except Exception as e:  # urllib's, zipfile's, torchvision's own RuntimeError of several lines
        reason = " ".join(str(e).split())
        raise UserError(f"--data {name}: torchvision cannot fetch it into {folder} "
                        f"({reason}); put its files there yourself")
    x = np.asarray(raw.data)
    x = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2)
    return Pixels(x, raw.targets, 10, flip=name == "cifar10", name=name)


def _load_npz(path):
    """Images in an .npz, as ADM and sample.py write it: arr_0 uint8 NHWC, arr_1 labels or absent.

    Raises UserError.
    """
    try:
        with np.load(path) as f:
            x = f["arr_0"]
            y = f["arr_1"] if "arr_1" in f else np.zeros(0, int)
        good_images = x.dtype == np.uint8 and x.ndim == 4 and len(x) and x.shape[1] == x.shape[2]
        good_labels = y.shape in ((0,), x.shape[:1]) and y.dtype.kind in "iu"
        if not good_images or not good_labels:
            raise ValueError(f"arr_0 is {x.dtype} {x.shape}, arr_1 {y.dtype} {y.shape}; "
                             "want uint8 (N, H, H, C) and integers (N,)")
    except Exception as e:  # a damaged file fails in as many ways as there are members
        raise UserError(f"--data {path}: cannot be read ({str(e)[:160]}); make it again")
    classes = int(y.max(initial=-1)) + 1
    labels = y if len(y) else np.zeros(len(x))
    return Pixels(x.transpose(0, 3, 1, 2), labels, classes, flip=True, name=path)


def labels_of(data):
    """The labels of a data set, (N,)."""
    if isinstance(data, ImageFolder):
        return np.asarray([label for _, label in data.files])
    return np.asarray(data.y)


def _check_labels(data):
    """Raise UserError unless 0 <= label < data.classes."""
    labels = labels_of(data)
    for label in (labels.min(), labels.max()):
        if not 0 <= label < data.classes:
            raise UserError(f"--data {data.name}: label {label} is out of range for "
                            f"{data.classes} classes (0..{data.classes - 1})")


# ---- Data and network --------------------------------------------------------------------------


def check_fits(data, spec):
    """Raise UserError unless a network with this spec can train on this data.

    Where the data has no labels, or none that the network knows, each label becomes the network's
    null label.
    """
    arch = spec["arch"]
    want = (arch["in_channels"], arch["input_size"], arch["input_size"])
    if tuple(data.shape) != want:
        raise UserError(f"--data {data.name} has shape {tuple(data.shape)}, "
                        f"the network wants {want}")
    _check_scale(data, spec["scale"])
    if data.classes > spec["classes"] > 0:
        raise UserError(f"--data {data.name} has {data.classes} classes, "
                        f"the network knows {spec['classes']}")
    _check_captions(data, arch)
    if 0 in (data.classes, spec["classes"]) and not data.text:
        _replace_labels(data, spec["classes"])


def _check_scale(data, scale):
    """Raise UserError unless both are pixels, or both are latents of one scale (within 0.1 %)."""
    differ = (data.scale is None) != (scale is None)
    if data.scale and not differ:
        differ = abs(data.scale / scale - 1) > 1e-3
    if not differ:
        return
    holds = f"latents times {data.scale:g}" if data.scale else "images"
    wants = "images" if scale is None else f"latents times {scale:g}"
    raise UserError(f"--data {data.name} holds {holds}, the network wants {wants}")


def _check_captions(data, arch):
    """Raise UserError unless the data has the captions that the network takes."""
    takes_text = arch.get("context") == "text"
    if data.text and not takes_text:
        raise UserError(f"--data {data.name} has captions, the network takes labels")
    if takes_text and not data.text:
        raise UserError(f"--data {data.name} has no captions, which this network is conditioned "
                        "on; make it with python -m kit.encode --prompts")
    if data.text and data.text[1] != arch["context_dim"]:
        raise UserError(f"--data {data.name} has captions of dimension {data.text[1]}, "
                        f"the network wants {arch['context_dim']}")


def _replace_labels(data, label):
    """Give every sample this label."""
    if isinstance(data, ImageFolder):
        data.files = [(file, label) for file, _ in data.files]
    else:
        data.y = data.y * 0 + label


# ---- Batches -----------------------------------------------------------------------------------


def batches(data, proc, seed, batch, start):
    """Endless (x0, y): this rank's rows of the global batches of steps start, start + 1, and so on,
    on the device.

    Every epoch is a permutation drawn from (seed, epoch), and batches run on across its end, so
    that what a step sees depends on (seed, step) alone.

    x0  (B / world, C, H, W) float32
    y   (B / world,) long; of data with captions (B / world, T, D) float32
    """
    plan = _plan_batches(len(data), proc, seed, batch, start)
    if data.workers == 0:
        for index, flip in plan:
            index = torch.as_tensor(index).to(proc.device, non_blocking=True)
            yield data.take(index, flip.to(proc.device, non_blocking=True))
    items = (list(zip(index, flip.tolist())) for index, flip in plan)
    loader = DataLoader(data, batch_sampler=items, num_workers=min(data.workers, os.cpu_count()),
                        pin_memory=proc.device.type == "cuda", worker_init_fn=one_thread)
    for step, (x, y) in zip(itertools.count(start), unwrap_worker_errors(loader)):
        x = x.to(proc.device, non_blocking=True)
        y = y.to(proc.device, non_blocking=True)
        yield data.finish(x, StepRandom(proc, (seed << 8) + 1, step, batch)), y


def _plan_batches(length, proc, seed, batch, start):
    """Endless (indices, flips) of this rank's rows of the global batches from step `start` on.

    indices: a list of B / world numbers below length. flips: (B / world,) of 0 and 1.
    """
    epoch = -1
    order = None
    for step in itertools.count(start):
        index = []
        for position in range(step * batch, (step + 1) * batch):
            if position // length != epoch:
                epoch = position // length
                rng = generator("cpu", seed, epoch, 2)
                order = torch.randperm(length, generator=rng).tolist()
            index.append(order[position % length])
        flips = torch.randint(0, 2, (batch,), generator=generator("cpu", seed, step, 3))
        yield proc.take_share(index), proc.take_share(flips)


def unwrap_worker_errors(loader):
    """The loader's items. A UserError in a worker comes without the traceback around it."""
    try:
        yield from loader
        return
    except UserError as e:
        last_line = str(e).strip().splitlines()[-1]
        e.__traceback__ = None
    # important! Nothing keeps the loader's frames any longer, so that its processes end now.
    raise UserError(last_line.split("UserError: ")[-1])


def one_thread(worker):
    """worker_init_fn of a DataLoader whose processes share the CPU's cores."""
    torch.set_num_threads(1)
