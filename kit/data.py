"""Training data: the embedded digits, torchvision's sets, image folders, .npz, cached latents.

A data set here has

    shape        (C, H, W)
    classes      K; label K is the null one, K = 0 stands for no classes
    class_names  of the classes, a list, where the data tells them; else None
    scale        None for pixels, which lie in [-1, 1]; else the factor of latents
    text         None, or (tokens, dim) of its embedded captions
    flip         whether half of what is read is mirrored
    workers      processes that read
    name         as --data gives it
    identity     what a later launch compares: a dict of numbers and names

and len(). `python -m kit.encode` makes caches of latents from images and prompts.
"""
import atexit
import itertools
import json
import multiprocessing
import os
import signal
import warnings
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

import fid
from kit.checkpoints import imagenet_names
from kit.cli import UserError, cache_folder, user_errors
from kit.download import local_first
from kit.processes import StepRandom, generator

ASSETS = Path(__file__).parents[1] / "assets"
TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


# ---- Data sets ---------------------------------------------------------------------------------


class Pixels:
    """Images held in memory, on the training device once they are used.

    x: (N, C, H, W) uint8. y: (N,) labels.
    """

    scale = None
    text = None
    workers = 0
    flip = False

    def __init__(self, x, y, classes, name, class_names=None):
        self.x = torch.as_tensor(x)
        self.y = torch.as_tensor(y).long()
        self.classes = classes
        self.class_names = class_names
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
        x = torch.where(flip.bool().view(-1, 1, 1, 1), x.flip(-1), x)
        return x, self.y[index]

    def content(self):
        """Bytes that change when the images do: those of at most 10,000 of them."""
        step = len(self.x) // 10_000 + 1
        return self.x[::step].contiguous().numpy()


class ImageFolder(torch.utils.data.Dataset):
    """Images below a folder, cropped as ADM does.

    Sub-folders are classes, in alphabetical order; where all names are numbers, in the order of the
    numbers. Without sub-folders there are no classes (K = 0) and every label is the null one.
    size: None takes the images' own, see own_size().
    """

    scale = None
    text = None
    workers = 4
    flip = False

    def __init__(self, root, size=None):
        self.name = str(root)
        listed = list_folder(root)
        _, folders, beside = listed[0]
        if folders and beside:
            raise UserError(f"--data {root}: {beside[0]} lies beside folders, which are classes; "
                            "move it into one, or away")
        _refuse_splits(root, folders)
        folders = in_order(folders)
        self.classes = len(folders)
        self.class_names = folders or None
        self.files = []  # pairs of path and label
        files_of = {name: [] for name in folders or [""]}
        for path, _, names in listed:
            first, *_ = Path(path).relative_to(root).parts or [""]
            files_of.get(first, []).extend(Path(path, name) for name in names)
        for label, (folder, files) in enumerate(files_of.items()):
            if not files:
                raise UserError(f"--data {Path(root, folder)}: no images there; put some there, or "
                                "move the folder away")
            self.files += [(file, label) for file in sorted(files)]
        deep = [path for path, _, names in listed if names and Path(path) != Path(root)
                and Path(path).parent != Path(root)]
        if deep:
            warnings.warn(f"--data {root}: folders below a class count to it, such as {deep[0]}",
                          stacklevel=2)
        self.size = size or own_size([file for file, _ in self.files])
        self.shape = (3, self.size, self.size)

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

    def content(self):
        """Bytes that change when the names of the images do, or the sizes of 10,000 of them."""
        names = [os.path.relpath(file, self.name) for file, _ in self.files]
        some = self.files[::len(self.files) // 10_000 + 1]
        return repr((names, [os.path.getsize(file) for file, _ in some])).encode()


class Latents(torch.utils.data.Dataset):
    """Cached latents, memory-mapped.

        latents.npy  (N, F, S, C, H, W), already multiplied by scale
        labels.npy   (N,)
        meta.json    {"classes", "scale"}, and "class_names" where they are known

    F = 2 holds the latent of the image and of its mirror image; F = 1: of the image only.
    S = 2 holds mean and standard deviation of the autoencoder's posterior, which is sampled each
    time an entry is read; S = 1: the latent itself.

    With captions there are also

        embeddings.npy  (M, T, D); labels.npy holds indices of its rows, which stand for the labels
        null.npy        (1, T, D), the embedding of no caption
    """

    workers = 2
    flip = False

    def __init__(self, root):
        self.name = str(root)
        try:
            self._open(Path(root))
        except (OSError, ValueError, KeyError, EOFError, TypeError) as e:
            raise UserError(f"--data {root}: cannot be read ({e}); make it again")
        self._check()
        self.shape = self.x.shape[3:]
        self._check_numbers()

    def __getstate__(self):
        """What a process that reads gets: it opens the files itself, where they are many GB."""
        return {k: v for k, v in vars(self).items() if k not in ("x", "embeddings")}

    def __setstate__(self, state):
        vars(self).update(state)
        self._map(Path(self.name))

    def _map(self, root):
        """The arrays that stay on the disk."""
        self.x = np.load(root / "latents.npy", mmap_mode="r")
        if (root / "embeddings.npy").exists():
            self.embeddings, self.null = load_prompts(root)

    def _open(self, root):
        self.null = None
        self._map(root)
        self.y = np.load(root / "labels.npy")
        meta = json.loads((root / "meta.json").read_text())
        self.classes = _number_of_classes(meta["classes"])
        self.class_names = _names_of_classes(meta.get("class_names"), self.classes)
        self.scale = None if meta["scale"] is None else float(meta["scale"])
        if self.scale is not None and not 0 < self.scale < float("inf"):
            raise ValueError(f"meta.json has the scale {self.scale}; want a positive number")
        self.text = None
        if self.null is not None:
            self.classes = 0
            self.text = tuple(self.null.shape[1:])

    def _check(self):
        """Raise UserError unless the arrays fit together."""
        x, y = self.x, self.y
        if not isinstance(x, np.ndarray) or not isinstance(y, np.ndarray):
            raise UserError(f"--data {self.name}: latents.npy or labels.npy is an .npz by another "
                            "name; want arrays as np.save writes them")
        good_latents = x.ndim == 6 and x.dtype.kind == "f" and {*x.shape[1:3]} <= {1, 2}
        good_labels = y.shape == x.shape[:1] and y.size and y.dtype.kind in "iu"
        if not good_latents or not good_labels:
            raise UserError(f"--data {self.name}: latents.npy is {x.dtype} {x.shape}, labels.npy "
                            f"{y.dtype} {y.shape}; want floats (N, 1 or 2, 1 or 2, C, H, W), "
                            "integers (N,)")
        if self.text and not 0 <= y.min() <= y.max() < len(self.embeddings):
            raise UserError(f"--data {self.name}: labels.npy names rows that embeddings.npy with "
                            f"its {len(self.embeddings)} does not have; make it again")

    def _check_numbers(self):
        """Look at 256 entries: refuse what cannot be, warn of what is unlikely."""
        step = len(self.x) // 256 + 1
        some = np.array(self.x[::step, 0], np.float32)               # (n, S, C, H, W)
        mean, std = some[:, 0], some[:, 1:]
        if (std < 0).any():
            raise UserError(f"--data {self.name}: standard deviations, the second entry of axis 2 "
                            "of latents.npy, are negative; if they are logarithms of variances, "
                            "store exp(0.5 * logvar) there")
        variance = mean.astype(np.float64).var() + np.square(std).sum() / mean.size
        spread = variance ** 0.5
        if self.scale and np.isfinite(spread) and not 0.3 < spread < 3:
            warnings.warn(f"--data {self.name}: the latents have a standard deviation of "
                          f"{spread:.2g} and networks expect about 1; are they multiplied by "
                          f"their scale, {self.scale:g}?", stacklevel=2)

    def __len__(self):
        return len(self.x)

    def content(self):
        """Nothing: a pool that is made again differs in its last bits."""
        return b""

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


def _number_of_classes(value):
    """meta.json's number of classes. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value // 1:
        raise ValueError(f"meta.json has {value} classes; want a whole number")
    if not 0 <= value < 2 ** 31:
        raise ValueError(f"meta.json has {value} classes; want 0 or more")
    return int(value)


def _names_of_classes(names, classes):
    """meta.json's names of classes, or None. Raises ValueError."""
    if names is None:
        return None
    are_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not are_names or len(names) != classes or len(set(names)) < classes:
        raise ValueError(f"meta.json has the class_names {str(names)[:60]}; want a list of "
                         f"{classes} different names")
    return names


def digits():
    """The embedded set: 1,797 real handwritten digits of 8x8 pixels.

    Their 17 grey levels are spread over 0..255.
    """
    with np.load(ASSETS / "digits8.npz") as f:
        x, y = f["x"], f["y"]
    x = np.round(x[:, None] * (255 / 16)).astype(np.uint8)
    return Pixels(x, y, 10, "digits", [str(k) for k in range(10)])


# ---- Files -------------------------------------------------------------------------------------


@user_errors()
def list_folder(folder):
    """fid.list_folder, which raises UserError here."""
    return fid.list_folder(folder)


def in_order(folders):
    """Names of class folders as labels count them: numbers by their value, else the alphabet."""
    if all(name.isdecimal() for name in folders):
        return sorted(folders, key=lambda name: (int(name), name))
    return sorted(folders)


def _refuse_splits(root, folders):
    """Raise UserError where the folders are train/ and val/, not classes."""
    named = [name for name in folders if name.lower() in SPLITS]
    deep = [name for name in named if any(p.is_dir() for p in Path(root, name).iterdir())]
    if named and (deep or len(named) == len(folders)):
        train = [name for name in named if name.lower().startswith("train")]
        part = (train or deep or named)[0]
        raise UserError(f"--data {root}: its folders ({', '.join(folders[:4])}) look like parts "
                        f"of a data set, not like classes; give --data {Path(root, part)}")


def own_size(files):
    """The size of square crops where --image-size does not say it: the short side of the images
    where 100 of them agree and have less than 256 pixels, else 256."""
    sides = set()
    for file in files[::len(files) // 100 + 1]:
        with user_errors():
            sides.add(min(fid.size_of(file)))
    if len(sides) == 1:
        return min(256, *sides)
    return 256


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
    except ValueError as e:  # without the image the data would be other data
        raise UserError(str(e).replace("mend or remove it", "put a good image under its name"))


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


def load(name, image_size=None, classes=None, flip=None, workers=None):
    """The data set that --data NAME means. Raises UserError.

    name        digits, mnist, fashion-mnist, cifar10, a folder of images, an .npz of images as
                sample.py writes it, or a folder of cached latents
    image_size  to which a folder's images are cropped; None: see own_size()
    classes     of an .npz with labels, which may not show all of its classes
    flip        whether half of what is read is mirrored; None: as default_flip() says
    workers     processes that read images or latents; None: 4 and 2
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
        data = _load_npz(name, classes)
    if data.classes:
        _check_labels(data)
    data.flip = default_flip(data) if flip is None else flip
    if isinstance(data, Latents) and data.x.shape[1] == 1:
        if flip:
            raise UserError(f"--data {name}: holds no latents of mirror images; leave --flip out, "
                            "or encode the images with python -m kit.encode")
        data.flip = False
    if workers is not None and not isinstance(data, Pixels):
        data.workers = workers
    data.identity = _identity(data)
    return data


def default_flip(data):
    """Whether training mirrors images unless it is told: CIFAR-10 and ImageNet, as the papers'
    networks were trained; nothing else, since text, digits or organs have a left and a right."""
    if data.class_names:
        return set(data.class_names) <= set(imagenet_names()) or data.name == "cifar10"
    return isinstance(data, Latents) and data.classes == 1000


def _identity(data):
    """What tells one data set from another: numbers, names, and a hash of its content."""
    content = zlib.crc32(data.content())
    content = zlib.crc32(np.ascontiguousarray(labels_of(data), np.int64), content)
    return {"count": len(data), "classes": data.classes, "class_names": data.class_names,
            "content": f"{content:08x}"}


def what_changed(before, now):
    """In words, how a data set differs from what it was: two identities -> a text, or None."""
    old, new = before["class_names"] or [], now["class_names"] or []
    if old != new:
        gone = [name for name in old if name not in new]
        more = [name for name in new if name not in old]
        if not gone and not more:
            return f"its classes have another order: {shorten(old)}, now {shorten(new)}"
        parts = [f"it lacks the class {shorten(gone)}"] if gone else []
        parts += [f"it has the new class {shorten(more)}"] if more else []
        return " and ".join(parts)
    for key, what in (("classes", "classes"), ("count", "entries")):
        if before[key] != now[key]:
            return f"it had {before[key]:,} {what} and has {now[key]:,}"
    if before["content"] != now["content"]:
        return "it holds other files, images or labels"
    return None


def shorten(names, most=4):
    """A few names of a list, as text."""
    return ", ".join(map(str, names[:most])) + (", ..." if len(names) > most else "")


def summary(data):
    """One line about the data that a training script prints."""
    classes = f", {data.classes} classes" if data.classes else ""
    size = "x".join(map(str, data.shape))
    mirrored = "half of them mirrored (--no-flip)" if data.flip else "not mirrored (--flip)"
    return f"data: {data.name}, {len(data):,} of {size}{classes}, {mirrored}"


def _load_torchvision(name):
    """One of torchvision's sets, downloaded once into the cache folder. Raises UserError."""
    import torchvision
    folder = cache_folder() / "data"

    def download():
        dataset = getattr(torchvision.datasets, TORCHVISION[name])
        return dataset(folder, train=True, download=True)

    try:
        raw = local_first(download, lock=folder / TORCHVISION[name])
    except Exception as e:  # urllib's, zipfile's, torchvision's own RuntimeError of several lines
        reason = " ".join(str(e).split())
        raise UserError(f"--data {name}: torchvision cannot fetch it into {folder} "
                        f"({reason}); put its files there yourself")
    x = np.asarray(raw.data)
    x = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2)
    names = [str(k) for k in range(10)]  # MNIST's own say "0 - zero"
    return Pixels(x, raw.targets, 10, name, names if name == "mnist" else list(raw.classes))


def _load_npz(path, classes=None):
    """Images in an .npz, as ADM and sample.py write it: arr_0 uint8 NHWC, arr_1 labels or absent.

    classes: how many there are; None: as many as the labels show. Raises UserError.
    """
    try:
        with np.load(path) as f:
            x = f["arr_0"]
            y = f["arr_1"] if "arr_1" in f else np.zeros(0, int)
        good_images = x.dtype == np.uint8 and x.ndim == 4 and len(x) and x.shape[1] == x.shape[2]
        good_labels = y.shape in ((0,), x.shape[:1]) and y.dtype.kind in "iu"
        if not good_images or not good_labels or x.shape[3] == 0:
            raise ValueError(f"arr_0 is {x.dtype} {x.shape}, arr_1 {y.dtype} {y.shape}; "
                             "want uint8 (N, H, H, C) and integers (N,)")
        if len(y) and y.max() >= 2 ** 31:
            raise ValueError(f"arr_1 holds {y.max()}, which is no class")
        if x[:100].max() <= 1:
            warnings.warn(f"--data {path}: arr_0 holds nothing but 0 and 1, which is black; "
                          "images go from 0 to 255", stacklevel=2)
        y = y.astype(np.int64)
    except Exception as e:  # a damaged file fails in as many ways as there are members
        raise UserError(f"--data {path}: cannot be read ({str(e)[:160]}); make it again")
    if not len(y):
        return Pixels(x.transpose(0, 3, 1, 2), np.zeros(len(x)), 0, path)
    return Pixels(x.transpose(0, 3, 1, 2), y, classes or int(y.max()) + 1, path)


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


def check_fits(data, spec, trust_labels=False):
    """Raise UserError unless a network with this spec can train on this data.

    Labels become the network's: by the names of the classes where both sides know them. Where the
    data has no labels, or none that the network knows, each label becomes the null label.
    trust_labels: label i of the data is the network's class i, whatever the names (--trust-labels).
    """
    arch = spec["arch"]
    _check_scale(data, spec["scale"])
    want = (arch["in_channels"], arch["input_size"], arch["input_size"])
    if tuple(data.shape) != want:
        raise UserError(f"--data {data.name} has shape {tuple(data.shape)}, "
                        f"the network wants {want}")
    _check_captions(data, arch)
    if data.text:
        return
    if 0 in (data.classes, spec["classes"]):
        if data.classes:
            warnings.warn(f"--data {data.name}: its {data.classes} classes are left out, since the "
                          "network has none", stacklevel=2)
        elif spec["classes"]:
            warnings.warn(f"--data {data.name} has no classes: all its samples get the null label",
                          stacklevel=2)
        data.classes = 0
        _replace_labels(data, [spec["classes"]] * (int(labels_of(data).max()) + 1))
    else:
        _replace_labels(data, _class_numbers(data, spec, trust_labels))


def _class_numbers(data, spec, trust_labels):
    """The network's class for every label of the data, a list of numbers. Raises UserError."""
    names, known = data.class_names, spec.get("class_names")
    if data.classes > spec["classes"]:
        raise UserError(f"--data {data.name} has {data.classes} classes, "
                        f"the network knows {spec['classes']}")
    if trust_labels:
        return _trusted_numbers(data, spec)
    if names and known:
        strange = [name for name in names if name not in known]
        if strange:
            raise UserError(f"--data {data.name}: the network knows no class {shorten(strange)} "
                            f"(it knows {shorten(known)}); rename the folders, or add "
                            "--trust-labels where label i means the network's class i")
        return [known.index(name) for name in names]
    if data.classes < spec["classes"]:
        whose = "the network's" if names else "the data's"
        raise UserError(f"--data {data.name} shows {data.classes} of the network's "
                        f"{spec['classes']} classes, and the names of {whose} classes are not "
                        "known, so that labels may mean others; add --trust-labels where label i "
                        "means the network's class i")
    return list(range(data.classes))


def _trusted_numbers(data, spec):
    """_class_numbers() with --trust-labels: folders whose names are numbers mean these numbers."""
    names = data.class_names
    if not names or not all(name.isdecimal() for name in names):
        return list(range(data.classes))
    numbers = [int(name) for name in names]
    if max(numbers) >= spec["classes"] or len(set(numbers)) < len(numbers):
        raise UserError(f"--data {data.name}: the folder names {shorten(names)} are no numbers of "
                        f"the network's classes, 0 to {spec['classes'] - 1}; rename them")
    return numbers


def _check_scale(data, scale):
    """Raise UserError unless both are pixels, or both are latents of one scale (within 0.1 %)."""
    differ = (data.scale is None) != (scale is None)
    if data.scale and not differ:
        differ = abs(data.scale / scale - 1) > 1e-3
    if not differ:
        return
    if data.scale is None:
        raise UserError(f"--data {data.name} holds images, the network wants latents times "
                        f"{scale:g}; encode them first: python -m kit.encode --data {data.name} "
                        "--out LATENTS")
    wants = "images" if scale is None else f"latents times {scale:g}"
    raise UserError(f"--data {data.name} holds latents times {data.scale:g}, the network wants "
                    f"{wants}")


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


def _replace_labels(data, numbers):
    """Give every sample with label i the label numbers[i]."""
    if isinstance(data, ImageFolder):
        data.files = [(file, numbers[label]) for file, label in data.files]
    elif isinstance(data, Pixels):
        data.y = torch.tensor(numbers)[data.y]
    else:
        data.y = np.array(numbers)[data.y]


# ---- Batches -----------------------------------------------------------------------------------


def batches(data, proc, seed, batch, start):
    """Endless (x0, y): this rank's rows of the global batches of steps start, start + 1, and so on,
    on the device.

    Every epoch is a permutation drawn from (seed, epoch), and batches run on across its end, so
    that what a step sees depends on (seed, step) alone.

    x0  (B / world, C, H, W) float32
    y   (B / world,) long; of data with captions (B / world, T, D) float32
    """
    plan = _plan_batches(data, proc, seed, batch, start)
    if isinstance(data, Pixels):
        for index, flip in plan:
            index = torch.as_tensor(index).to(proc.device, non_blocking=True)
            yield data.take(index, flip.to(proc.device, non_blocking=True))
    items = (list(zip(index, flip.tolist())) for index, flip in plan)
    loader = DataLoader(data, batch_sampler=items, num_workers=min(data.workers, os.cpu_count()),
                        pin_memory=proc.device.type == "cuda", worker_init_fn=start_worker)
    for step, (x, y) in zip(itertools.count(start), unwrap_worker_errors(loader)):
        x = x.to(proc.device, non_blocking=True)
        y = y.to(proc.device, non_blocking=True)
        yield data.finish(x, StepRandom(proc, (seed << 8) + 1, step, batch)), y


def _plan_batches(data, proc, seed, batch, start):
    """Endless (indices, flips) of this rank's rows of the global batches from step `start` on.

    indices: a list of B / world numbers below len(data). flips: (B / world,) of 0 and 1.
    """
    length = len(data)
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
        flips = torch.zeros(batch, dtype=torch.long)
        if data.flip:
            flips.random_(0, 2, generator=generator("cpu", seed, step, 3))
        yield proc.take_share(index), proc.take_share(flips)


def unwrap_worker_errors(loader):
    """The loader's items. An error in a worker comes as one line, without the traceback."""
    try:
        with signals_held():
            items = iter(loader)
        atexit.unregister(end_workers)
        atexit.register(end_workers)
        yield from items
        return
    except UserError as e:
        line = str(e).strip().splitlines()[-1].split("UserError: ")[-1]
        e.__traceback__ = None
    except (RuntimeError, OSError) as e:
        line = _explain_lost_worker(str(e))
        if line is None:
            raise
        e.__traceback__ = None
    # important! Nothing keeps the loader's frames any longer, so that its processes end now.
    items = None
    raise UserError(line)


def _explain_lost_worker(text):
    """What to say when a process that reads data has ended; None: something else went wrong."""
    if any(sign in text for sign in ("shared memory", "Bus error", "/torch_", "/dev/shm")):
        return ("the processes that read data find too little shared memory (/dev/shm); give "
                "--workers 0, or make it larger (docker run --shm-size 8g)")
    if "DataLoader worker" in text:
        return (f"a process that reads data has ended ({text.splitlines()[0][:100]}); there may "
                "be too little memory: give fewer --workers, or 0")
    return None


def end_workers():
    """At the exit of this process: end what still reads, which no SIGTERM ends."""
    if hasattr(signal, "SIGCHLD"):  # torch's handler would complain
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


@contextmanager
def signals_held():
    """Processes that start here get no SIGTERM and no Ctrl-C before start_worker() ignores them.
    What comes meanwhile reaches this process afterwards."""
    numbers = {signal.SIGTERM, signal.SIGINT}
    before = None
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(worker):
    """worker_init_fn of a DataLoader whose processes share the CPU's cores.

    A signal for the whole group, as batch systems and Ctrl-C send it, must not end them: the
    training process saves first and then ends them.
    """
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
