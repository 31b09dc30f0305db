"""FID, sFID, Inception Score, precision and recall as the ADM evaluator defines them, without
TensorFlow, on one process or many.

This file works alone: copy it. It needs torch, torchvision, numpy, pillow and tqdm.

    # against ADM's reference batch
    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz

    # the same numbers, sooner
    torchrun --nproc_per_node 8 fid.py A B

    # make a reference
    python fid.py ref PATH/TO/imagenet/train --image-size 256 --out stats.npz

    # sample a checkpoint and measure the samples; this needs kit: minDistill's folder of that
    # name beside this file
    python fid.py runs/issd/last.pt digits --num-samples 2000 --features digits-cnn

A is the samples and B the reference. Each of them is one of

    a folder of images     all that Pillow decodes, of animations the first picture; sub-folders
                           included, in alphabetical order
    an .npz of images      arr_0: uint8 (N, H, W, C), as ADM writes it
    an .npz of statistics  made by `ref`, an ADM reference batch, or mu and sigma of another tool
    a checkpoint           of a pixel model, whose samples are measured; needs kit
    the name of a set      digits, mnist, fashion-mnist or cifar10; needs kit

Numbers from different feature networks are different quantities, and so are numbers from images
that were resized differently. The network and the resizing make up a name, which is printed with
every result and stored in every file of statistics. Numbers under different names do not mix:

    inception-2015-12-05/adm          the default. TensorFlow 1's bilinear resizing, as the ADM
                                      evaluator; the weights are fetched once (95 MB)
    inception-2015-12-05/pytorch-fid  --resize pytorch-fid: the bilinear resizing of that tool
    torchvision-resnet50              --features torchvision-NAME: any classifier of torchvision
    keras-resnet50-HASH               --features FILE: the weights of Keras Applications' ResNet-50
    digits-cnn, digits-mlp            --features digits-cnn: small classifiers of the digits

The last three need kit.

--num-samples N takes a random choice of N images, which --seed draws: of a set that is sorted by
class the first N would be of a few classes only. A checkpoint makes N samples.

As for the evaluators, an image is what its pixels say: a rotation that a camera noted beside them
(EXIF) is not carried out, and of a transparent image the colours count and the transparency does
not.

The Inception Score is the mean over chunks of 5,000 samples in their order, as published. Samples
should therefore not be sorted by class.

Differences from the ADM evaluator:

    Distances for precision and recall are computed in float64 instead of half precision, so that
    equal distances compare as equal.

    The Frechet distance needs no matrix square root, so that it is right for singular covariances.

    A reference of more than 10,000 images keeps for precision and recall the 10,000 whose pixels
    have the smallest hash, so that their order does not matter.

As a library:

    a feature network   net(images) -> (features (n, dim), spatial features (n, spatial) or None)
                        for images (n, C, H, W) uint8. Any callable with the attributes name, dim
                        and spatial (None where there are no spatial features). Where it has them,
                        logits(features) gives the Inception Score, classify(features) the accuracy.
    a source of images  Images(name, count, batches): see there.

    net = load_inception()
    a = feature_statistics(images_from_array("samples", x), net)
    b = feature_statistics(images_from_files("real", image_files("PATH")), net, keep=REFERENCE)
    print(table({"": compare_statistics(a, b, net)}, net.name))

Wrong input raises ValueError with a message of one line. In an initialised torch.distributed group
every rank opens the images and calls feature_statistics, and every rank gets the statistics of all
images.
"""
import argparse
import codecs
import dataclasses
import difflib
import hashlib
import http.client
import importlib
import json
import math
import os
import pickle
import platform
import re
import socket
import struct
import sys
import time
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from scipy.linalg import lapack
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

# ---- Metrics: functions of arrays --------------------------------------------------------------


class Statistics:
    """Mean and unbiased covariance of features that come batch by batch, in float64."""

    def __init__(self, dim, device="cpu"):
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.total = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features):
        """Add features (n, dim), an array or a tensor of any float dtype. Returns self."""
        f = torch.as_tensor(features).to(self.total)
        self.count += len(f)
        self.total += f.sum(0)
        self.outer += f.T @ f
        return self

    def reduce(self):
        """Add up the statistics of all ranks of an initialised torch.distributed group."""
        for tensor in (self.count, self.total, self.outer):
            sum_over_ranks(tensor)
        return self

    def result(self):
        """-> mean (dim,), covariance (dim, dim). Raises ValueError for fewer than 2 samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, there are {int(self.count)}")
        mean = self.total / self.count
        outer = self.outer - self.count * torch.outer(mean, mean)
        return mean, outer / (self.count - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), in float64.

    mu (d,), sigma (d, d) symmetric and finite; arrays or tensors, on any one device.
    With R_i R_i^T = sigma_i, the trace of the root is the sum of the singular values of R_1^T R_2,
    so singular covariances are fine. Warns when the rank of a covariance is below the number of
    features that vary at all. Raises ValueError when the two sides have different d.
    """
    mu1, sigma1 = as_float64(mu1), as_float64(sigma1)
    mu2, sigma2 = as_float64(mu2), as_float64(sigma2)
    if not len(mu1) == len(mu2) == len(sigma1) == len(sigma2):
        raise ValueError(f"a distance between {len(mu1)} and {len(mu2)} features does not exist; "
                         "use the same network for both")
    root1 = square_root(sigma1)
    root2 = square_root(sigma2)
    for sigma, root in ((sigma1, root1), (sigma2, root2)):
        variances = sigma.diagonal()
        varying = int((variances > 1e-14 * variances.max()).sum())
        if root.shape[1] < varying:
            warnings.warn(f"a covariance of {varying} features has rank {root.shape[1]}: "
                          "too few images for a distance that says much", stacklevel=2)
    cross = root1.T @ root2                                                      # (rank1, rank2)
    gram = cross @ cross.T if len(cross) <= cross.shape[1] else cross.T @ cross
    trace = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace)


def as_float64(array):
    return torch.as_tensor(array, dtype=torch.float64)


def square_root(sigma):
    """R (d, rank) with R R^T = sigma: the Cholesky factor where it exists. Otherwise the one with
    pivots, which ends where what is left of sigma is within rounding of 0."""
    root, failed = torch.linalg.cholesky_ex(sigma)
    diagonal = root.diagonal()
    if not failed and diagonal.min() > 1e-7 * diagonal.max():
        return root
    factor, pivots, rank, _ = lapack.dpstrf(sigma.cpu().numpy(), lower=1)
    root = np.zeros((len(sigma), rank))
    root[pivots - 1] = np.tril(factor)[:, :rank]
    return torch.from_numpy(root).to(sigma.device)


def inception_score(logits, split=5000):
    """exp of the mean KL(p(y|x) || p(y)), averaged over chunks of `split` images in their order.

    logits (n, classes). The published score takes the 1,008 logits of the FID Inception network
    without their bias: Inception.logits.
    """
    scores = []
    for chunk in torch.as_tensor(logits).split(split):
        logp = chunk.double().log_softmax(1)                                     # (n, classes)
        marginal = logp.logsumexp(0) - np.log(len(chunk))                        # (classes,)
        kl = (logp.exp() * (logp - marginal)).sum(1)                             # (n,)
        scores.append(kl.mean().exp())
    return float(torch.stack(scores).mean())


def precision_recall(real, fake, k=3, block=4096, quiet=True):
    """Improved precision and recall (Kynkaanniemi et al. 2019) -> (precision, recall) in [0, 1].

    real (n, d), fake (m, d): features. A set covers a sample when the sample lies within the
    distance of one of the set's points to that point's k-th neighbour in the set.
    precision: the share of fake that real covers. recall: the share of real that fake covers.
    Works in blocks of so many rows: the memory beyond the inputs does not depend on n and m.
    Raises ValueError when one side has no more than k samples.
    """
    real = torch.as_tensor(real)
    fake = torch.as_tensor(fake)
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision and recall with {k} neighbours need more than {k} images on "
                         f"each side, there are {len(real)} and {len(fake)}")
    r, f = len(row_blocks(real, block)), len(row_blocks(fake, block))
    pairs = (r * (r + 1) + f * (f + 1)) // 2 + r * f
    with progress_bar(pairs, "precision and recall", quiet) as progress:
        radius_real = neighbour_radii(real, k, block, progress)
        radius_fake = neighbour_radii(fake, k, block, progress)
        precise = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
        recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
        for i in row_blocks(real, block):
            for j in row_blocks(fake, block):
                d = squared_distances(real[i], fake[j])
                precise[j] |= (d <= radius_real[i, None]).any(0)
                recalled[i] |= (d <= radius_fake[j]).any(1)
                progress.update()
    return float(precise.double().mean()), float(recalled.double().mean())


def neighbour_radii(x, k, block, progress):
    """x (n, d) -> the squared distance of each point to its k-th neighbour, (n,)."""
    nearest = torch.full((len(x), k + 1), torch.inf, device=x.device)  # each point itself counts

    def keep_nearest(rows, d):
        candidates = torch.cat([nearest[rows], d], 1)
        nearest[rows] = candidates.topk(k + 1, largest=False).values

    blocks = row_blocks(x, block)
    for i, rows in enumerate(blocks):
        for columns in blocks[i:]:
            d = squared_distances(x[rows], x[columns])
            keep_nearest(rows, d)
            if columns != rows:
                keep_nearest(columns, d.T)
            progress.update()
    return nearest[:, k]


def squared_distances(a, b):
    """a (n, d), b (m, d) -> |a_i - b_j|^2, (n, m) float32.

    important! float64, and no rounding noise around 0: equal pairs must give equal distances, or
    `<=` would mean nothing.
    """
    a, b = a.double(), b.double()
    norms = a.square().sum(1)[:, None] + b.square().sum(1)
    d = torch.addmm(norms, a, b.T, alpha=-2)
    return d.masked_fill_(d < 1e-11 * norms, 0).float()


def row_blocks(x, block):
    return [slice(i, i + block) for i in range(0, len(x), block)]


# ---- Inception ---------------------------------------------------------------------------------

# The weights of TensorFlow's inception-2015-12-05 (Apache 2.0), as pytorch-fid ported them. The
# name ends in the beginning of the file's sha256.
INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
PUBLISHED = "inception-2015-12-05"


class Inception(nn.Module):
    """The Inception-v3 of FID: the layers of torchvision's, the poolings of TensorFlow's graph.

    weights: a state dict under pytorch-fid's names. name: what to call them. resize: key of RESIZE.
    features          the 2,048 channels of pool_3
    spatial features  mixed_6/conv before its normalisation, the first 7 channels, (17, 17, 7)
    Raises ValueError when the weights do not fit.
    """

    dim = 2048
    spatial = 17 * 17 * 7

    def __init__(self, weights, name, resize):
        super().__init__()
        from torchvision.models import inception  # takes a second, which the rest need not wait
        net = inception.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
        load_weights(net, weights, name)
        self.net = net.eval()
        self.name = f"{name}/{resize}"
        self.resize = RESIZE[resize]
        spatial_conv = net.Mixed_6d.branch1x1.conv.weight[:7].detach().clone()
        self.register_buffer("conv", spatial_conv, persistent=False)
        for block in (net.Mixed_5b, net.Mixed_5c, net.Mixed_5d):
            block.forward = partial(mixed_5, block)
        for block in (net.Mixed_6b, net.Mixed_6c, net.Mixed_6d, net.Mixed_6e):
            block.forward = partial(mixed_6, block)
        net.Mixed_7b.forward = partial(mixed_7, net.Mixed_7b, average_pool)
        net.Mixed_7c.forward = partial(mixed_7, net.Mixed_7c, max_pool)

    def fold(self):
        """Fold batch norms into the convolutions before them and put channels last: the same
        function, but faster. Returns self."""
        for module in self.net.modules():
            if isinstance(getattr(module, "bn", None), nn.BatchNorm2d):
                module.conv = fuse_conv_bn_eval(module.conv, module.bn)
                module.bn = nn.Identity()
        return self.to(memory_format=torch.channels_last)

    def forward(self, images):
        """images (n, 1 or 3, H, W) uint8 -> features (n, 2048), spatial features (n, 2023)."""
        x = self.resize(images.expand(-1, 3, -1, -1).float())                    # (n, 3, 299, 299)
        for name, layer in self.net.named_children():
            if name == "avgpool":
                break
            if name == "Mixed_6d":
                spatial = F.conv2d(x, self.conv)                                 # (n, 7, 17, 17)
            x = layer(x)
        return x.mean((2, 3)), spatial.permute(0, 2, 3, 1).flatten(1)

    def logits(self, features):
        """Features (n, 2048) -> logits of the Inception Score (n, 1008): float64, no bias."""
        return features.double() @ self.net.fc.weight.double().T


def average_pool(x):
    """3x3, stride 1. TensorFlow does not count the padding."""
    return F.avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)


def max_pool(x):
    return F.max_pool2d(x, kernel_size=3, stride=1, padding=1)


def chain(x, *layers):
    for layer in layers:
        x = layer(x)
    return x


def mixed_5(block, x):
    """Mixed_5b, 5c and 5d: torchvision's InceptionA with TensorFlow's pooling."""
    return torch.cat([
        block.branch1x1(x),
        chain(x, block.branch5x5_1, block.branch5x5_2),
        chain(x, block.branch3x3dbl_1, block.branch3x3dbl_2, block.branch3x3dbl_3),
        chain(x, average_pool, block.branch_pool),
    ], 1)


def mixed_6(block, x):
    """Mixed_6b to 6e: torchvision's InceptionC with TensorFlow's pooling."""
    return torch.cat([
        block.branch1x1(x),
        chain(x, block.branch7x7_1, block.branch7x7_2, block.branch7x7_3),
        chain(x, block.branch7x7dbl_1, block.branch7x7dbl_2, block.branch7x7dbl_3,
              block.branch7x7dbl_4, block.branch7x7dbl_5),
        chain(x, average_pool, block.branch_pool),
    ], 1)


def mixed_7(block, pool, x):
    """Mixed_7b and 7c: torchvision's InceptionE. In TensorFlow's graph 7c pools by maximum."""
    wide = block.branch3x3_1(x)
    deep = chain(x, block.branch3x3dbl_1, block.branch3x3dbl_2)
    return torch.cat([
        block.branch1x1(x),
        block.branch3x3_2a(wide),
        block.branch3x3_2b(wide),
        block.branch3x3dbl_3a(deep),
        block.branch3x3dbl_3b(deep),
        chain(x, pool, block.branch_pool),
    ], 1)


def resize_adm(x, size=299):
    """(n, C, H, W) in [0, 255] -> the input of TensorFlow's graph, (n, C, size, size) in [-1, 1).

    Output pixel i looks at i * (in / out): no half-pixel centres, no smoothing.
    """
    for axis in (2, 3):
        n = x.shape[axis]
        step = torch.tensor(n / size, dtype=torch.float32, device=x.device)
        position = torch.arange(size, device=x.device) * step
        low = position.long()
        high = (low + 1).clamp(max=n - 1)
        weight = position - low
        if axis == 2:
            weight = weight.view(-1, 1)
        x = torch.lerp(x.index_select(axis, low), x.index_select(axis, high), weight)
    return (x - 128) / 128


def resize_pytorch_fid(x, size=299):
    """(n, C, H, W) in [0, 255] -> (n, C, size, size) in [-1, 1]. Half-pixel centres, no smoothing.
    """
    x = F.interpolate(x / 255, size=(size, size), mode="bilinear", align_corners=False)
    return 2 * x - 1


RESIZE = {"adm": resize_adm, "pytorch-fid": resize_pytorch_fid}


def load_inception(path=None, resize="adm", device="cpu"):
    """FID's Inception, ready to measure.

    path: a file of its weights; None: the published one, which is fetched once. resize: a key of
    RESIZE. The name of the network tells the file: "inception-2015-12-05/adm" stands for the
    published weights only, any other file gives "inception-HASH/adm". Raises ValueError.
    """
    published = hash_in_name(INCEPTION_URL)
    path = Path(path or fetch(INCEPTION_URL, cache_folder(), published))
    weights = read_weights(path)
    digest = file_hash(path)
    told = hash_in_name(path.name)
    if told and not digest.startswith(told):
        raise ValueError(f"{path}: its sha256 begins with {digest[:8]}, not as its name says; "
                         "it is damaged: fetch it again")
    name = PUBLISHED if digest.startswith(published) else f"inception-{digest[:8]}"
    net = Inception(weights, name, resize).fold()
    return net.to(device).eval().requires_grad_(False)


def hash_in_name(name):
    """The beginning of the sha256 that the name of a file of Inception weights tells, or None."""
    found = re.search(r"inception.*-([0-9a-f]{8})\.", name)
    return found[1] if found else None


def read_weights(path):
    """A .pth file of weights -> its state dict, under plain names. Raises ValueError."""
    if not path.is_file():
        raise ValueError(f"--features {path}: no such file")
    try:
        mapped = zipfile.is_zipfile(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the pickle's age
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as e:  # a damaged file fails in many ways
        raise ValueError(f"checkpoint {path}: cannot be read ({why_unreadable(path, e)}); give the "
                         "file of weights, or fetch it again")
    if not isinstance(held, dict) or not held:
        raise ValueError(f"checkpoint {path}: holds no weights")
    for key in ("ema", "model", "state_dict"):
        if isinstance(held.get(key), dict):
            held = held[key]
            break
    return {key.removeprefix("module."): value for key, value in held.items()
            if isinstance(value, torch.Tensor)}


def why_unreadable(path, error):
    """Why torch.load raised this error, without torch's advice to load what is not safe."""
    with open(path, "rb") as f:
        head = f.read(1000)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # a letter may be cut at the end
        is_text = b"\0" not in head
    except UnicodeDecodeError:
        is_text = False
    if is_text:
        return "it is a text file, not weights" if head else "it is empty"
    unsafe = re.search("Unsupported (?:global|class): *(?:GLOBAL )?([a-zA-Z_0-9.]+)", str(error))
    if unsafe:
        return f"it holds not only weights but {unsafe[1]}"
    if isinstance(error, pickle.UnpicklingError):
        return "it is not a file that torch has saved"
    return (str(error) or type(error).__name__).splitlines()[0][:160]


def load_weights(net, weights, name):
    """Strict load into net. A ValueError names the first few differences."""
    own = net.state_dict()
    weights = dict(weights)
    for key, value in own.items():
        if key.endswith("num_batches_tracked"):  # not in the published file, and of no use here
            weights.setdefault(key, value)
    missing = [key for key in own if key not in weights]
    unexpected = [key for key in weights if key not in own]
    misshaped = [f"{key} {tuple(weights[key].shape)} instead of {tuple(own[key].shape)}"
                 for key in own if key in weights and weights[key].shape != own[key].shape]
    wrong = []
    for what, keys in (("missing", missing), ("unexpected", unexpected), ("misshaped", misshaped)):
        if keys:
            wrong.append(f"{what} {len(keys)}: {', '.join(keys[:3])}")
    if wrong:
        raise ValueError(f"checkpoint {name} does not fit the network ({'; '.join(wrong)}); "
                         "it is not the Inception network of FID")
    net.load_state_dict(weights)


# ---- Images ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Images:
    """A source of images.

    name     printed with the results
    count    number of images
    batches  batches(rank, world, size) yields the batches of at most `size` images that this rank
             of `world` measures: (position of the first image among all, images (n, C, H, W) uint8,
             labels (n,) or None)
    choice   where they are some of a set: how many of how many, in words
    """

    name: str
    count: int
    batches: Callable
    choice: Optional[str] = None


def images_from_array(name, x, labels=None, num=None, seed=0):
    """x (N, H, W, C) uint8, with labels (N,) or None, as Images. num: a random choice of so many.

    Raises ValueError when there are fewer than num, or fewer than 2.
    """
    return images_from_dataset(name, ArrayRows(x, labels), num, seed=seed)


def images_from_files(name, paths, size=None, num=None, workers=8, seed=0):
    """The image files, a list, as Images. num: a random choice of so many.

    size: crop and scale each image to size x size, as ADM does; None: they must be of one size.
    workers: processes that read. In a torch.distributed group every rank calls this. Raises
    ValueError when there are fewer than num, or fewer than 2, or of different sizes.
    """
    images = images_from_dataset(name, FileRows(paths, size), num, workers, seed)
    if size is None:
        check_sizes([paths[i] for i in choose_images(len(paths), images.count, seed)])
    return images


class ArrayRows(torch.utils.data.Dataset):
    """dataset[array of n positions] -> arrays: images (n, H, W, C) uint8, labels (n,) or None."""

    def __init__(self, x, labels):
        self.x = x
        self.labels = labels

    def __len__(self):
        return len(self.x)

    def __getitem__(self, rows):
        images = np.asarray(self.x[rows])  # of an array on the disk, too, these rows are a copy
        return images, None if self.labels is None else np.asarray(self.labels[rows])


class FileRows(torch.utils.data.Dataset):
    """dataset[array of n positions] -> images (n, H, W, 3) uint8, None; or the ValueError met.

    The error is returned, not raised: a DataLoader would wrap it in its worker's traceback.
    """

    def __init__(self, paths, size):
        self.paths = paths
        self.size = size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, rows):
        try:
            return np.stack([read_image(self.paths[i], self.size) for i in rows]), None
        except ValueError as e:
            return e


def images_from_dataset(name, dataset, num=None, workers=0, seed=0):
    """What dataset[array of positions] gives, as Images: see ArrayRows. num: a random choice of so
    many, in random order."""
    total = len(dataset)
    if total < max(num or 0, 2):
        wanted = f"--num-samples asks for {num}" if num else "at least 2 are needed"
        raise ValueError(f"{name}: {total} images, {wanted}")
    order = choose_images(total, num, seed)
    choice = None
    if len(order) < total:
        choice = f"{num:,} of {total:,} images, a random choice (seed {seed})"

    def batches(rank, world, size):
        mine = range(0, len(order), size)[rank::world]
        loader = torch.utils.data.DataLoader(
            dataset, sampler=[order[i:i + size] for i in mine], batch_size=None,
            collate_fn=as_arrays, worker_init_fn=use_one_thread,
            num_workers=min(workers, len(mine), os.cpu_count()))
        for first, item in zip(mine, loader):
            if isinstance(item, ValueError):
                raise item
            images, labels = item
            labels = None if labels is None else torch.from_numpy(labels)
            yield first, torch.from_numpy(images).permute(0, 3, 1, 2), labels

    return Images(name, len(order), batches, choice)


def choose_images(total, num, seed):
    """The positions of `num` (None: all) of `total` images, (num,). All: in their order. Fewer: a
    choice that depends on the seed alone, in random order."""
    if num is None or num == total:
        return np.arange(total)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(total, generator=generator)[:num].numpy()


def as_arrays(item):
    """A collate_fn. Arrays come from workers through pipes; tensors would come through /dev/shm,
    which is small in many containers."""
    return item


def use_one_thread(worker):
    torch.set_num_threads(1)


# Documents, videos and data: Pillow knows their names, or opens them with other programs' help.
NO_IMAGES = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"}
# What systems put beside images, in lower case.
JUNK = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "lost+found",
        "$recycle.bin", "system volume information"}


def image_endings():
    """The endings of the files that Pillow decodes on this machine: {".png", ...}, lower case."""
    known = Image.registered_extensions()
    decoded = ({*Image.OPEN} | {"MPO"}) - NO_IMAGES  # MPO is read as a JPEG
    return {name for name, kind in known.items() if kind in decoded}


def list_folder(folder):
    """A folder and all folders below it, links followed -> [(path, names of folders in it, names of
    images in it)], the names in alphabetical order.

    Hidden files and JUNK are left out. One warning tells what else is left out: files that are no
    images, links that lead back to a folder above them. Raises ValueError for a folder that cannot
    be read.
    """
    endings = image_endings()
    found, others, loops = [], [], []
    for path, folders, files in os.walk(folder, followlinks=True, onerror=refuse_unreadable):
        below, names = visible(folders), visible(files)
        back = [name for name in below if leads_back(Path(path, name))]
        folders[:] = [name for name in below if name not in back]  # os.walk goes into these
        images = [name for name in names if ending(name) in endings]
        found.append((path, folders, images))
        loops += [Path(path, name) for name in back]
        others += [Path(path, name) for name in names if ending(name) not in endings]
    warn_of_left_out(folder, others, loops)
    return found


def visible(names):
    """The names in order, without hidden ones and JUNK."""
    return sorted(n for n in names if not n.startswith(".") and n.lower() not in JUNK)


def ending(name):
    """Of a file's name, in lower case: ".jpg" of "PHOTO.JPG"."""
    return os.path.splitext(name)[1].lower()


def refuse_unreadable(error):
    raise ValueError(f"{error.filename}: the folder cannot be read ({error.strerror}); mend that, "
                     "or move it away")


def leads_back(path):
    """Is this path a link to a folder through which the path itself leads, or to one above it?"""
    if not path.is_symlink():
        return False
    target = path.resolve()
    for folder in path.absolute().parents:
        real = folder.resolve()
        if target == real or target in real.parents:
            return True
    return False


def warn_of_left_out(folder, others, loops):
    """One warning, from rank 0, of the files that are no images and the links that lead back."""
    by_ending = {}
    for file in others:
        by_ending.setdefault(ending(file.name) or "without ending", []).append(file)
    kinds = sorted(by_ending.items(), key=lambda kind: -len(kind[1]))
    told = [f"{len(files):,} {kind} ({files[0].relative_to(folder)})" for kind, files in kinds]
    if told[6:]:
        rest = sum(len(files) for _, files in kinds[5:])
        told[5:] = [f"{rest:,} of {len(told) - 5} more endings"]
    parts = []
    if told:
        parts.append(f"files left out because Pillow does not decode them: {', '.join(told)}")
    if loops:
        more = f" and {len(loops) - 1:,} more" if loops[1:] else ""
        parts.append("links not followed because they lead back to a folder above them: "
                     f"{loops[0].relative_to(folder)}{more}")
    rank, _ = rank_and_world()
    if parts and rank == 0:
        warnings.warn(f"{folder}: {'; '.join(parts)}", stacklevel=3)


def image_files(folder):
    """The paths of all images below a folder, in order: see list_folder.

    Raises ValueError when there are none.
    """
    files = [Path(path, name) for path, _, names in list_folder(folder) for name in names]
    if not files:
        raise ValueError(f"{folder}: no images there (of any kind that Pillow decodes: .png, .jpg, "
                         ".webp, .tif and others)")
    return sorted(files)


def check_sizes(paths):
    """Raise ValueError unless all image files are of one size, as their headers tell it.

    In a torch.distributed group every rank calls this and looks at its share.
    """
    rank, world = rank_and_world()
    problem = None
    with progress_bar(len(paths), "sizes of the images") as progress:
        i = 0
        try:
            width, height = size_of(paths[0])
            for i in range(rank, len(paths), world):
                size = size_of(paths[i])
                if size != (width, height):
                    raise ValueError(
                        f"{paths[i]} is {size[0]}x{size[1]}, {paths[0]} is {width}x{height}; "
                        "--image-size N crops and scales all to one size, as ADM does")
                progress.update(min(world, len(paths) - progress.n))
        except ValueError as e:
            problem = i, str(e)
    problems = [p for p in gather_objects(problem) if p]
    if problems:
        raise ValueError(min(problems)[1])


def size_of(path):
    """(width, height) of an image file. Raises ValueError."""
    with open_image(path) as image:
        return image.size


@contextmanager
def open_image(path):
    """The PIL image in a file, its first picture if it has many. What goes wrong with it becomes a
    ValueError that names the file."""
    try:
        if not os.path.isfile(path):  # a pipe would be waited for
            raise ValueError("it is no file, or a link to none")
        with Image.open(path) as image:
            raw = str(image.tile[0][-1]) if image.tile else ""  # of colours that Pillow would cut
            if image.mode[0] in "IF" or ";16" in raw:
                raise ValueError(f"more than 8 bits per channel, mode {image.mode}")
            yield image
    except MemoryError:
        raise
    except Exception as e:  # a damaged file fails in as many ways as there are formats
        reason = " ".join(str(e).split()) or type(e).__name__
        raise ValueError(f"image {path}: cannot be read ({reason[:200]}); mend or remove it")


def read_image(path, size=None):
    """An image file -> (H, W, 3) uint8; with `size`, (size, size, 3) as ADM crops and scales it.

    Of an animation or a file of several pages the first picture counts. As for the evaluators, a
    rotation noted beside the pixels (EXIF) is not carried out, and transparency is dropped.
    Raises ValueError when the file is damaged or has more than 8 bits per channel.
    """
    with open_image(path) as image:
        image = image.convert("RGB")
        return center_crop(image, size) if size else np.array(image)


def center_crop(image, size):
    """ADM's crop of a PIL image -> (size, size, 3) uint8.

    Halve the image with a box filter while its short side is at least 2 size, scale the short side
    to size with a bicubic filter, and cut the middle out.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    pixels = np.array(image.resize((width, height), Image.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top:top + size, left:left + size]


# What reading a damaged .npz raises.
DAMAGED = (OSError, ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile,
           zlib.error)


def open_npz(path, num=None, seed=0):
    """An .npz -> (its images as Images, or None; its statistics, or None). num: a random choice of
    so many of its images.

    The statistics are a dict of arrays, for read_statistics. An ADM reference batch has both.
    Raises ValueError.
    """
    try:
        keys, images, labels, arrays = read_npz(path)
    except DAMAGED as e:
        raise ValueError(f"{path}: cannot be read as .npz ({type(e).__name__}: {str(e)[:100]}); "
                         "it is damaged or something else")
    if images is None and arrays is None:
        found = ", ".join(sorted(keys)[:5]) or "nothing"
        raise ValueError(f"{path}: holds neither images (arr_0) nor statistics (mu and sigma), "
                         f"but {found}")
    if images is None:
        return None, arrays
    check_images(images, path)
    return images_from_array(path, images, labels, num, seed), arrays


def read_npz(path):
    """-> the names of all arrays; images; labels; statistics as {name: array}. None: absent."""
    if not zipfile.is_zipfile(path):
        raise ValueError("no zip archive")
    images = labels = arrays = None
    with np.load(path) as f:
        keys = set(f.files)
        if {"mu", "sigma"} <= keys:
            arrays = {key: f[key] for key in keys - {"arr_0", "arr_1"}}
    if "arr_0" in keys:
        images = read_npz_array(path, "arr_0")
        if "arr_1" in keys:
            labels = np.array(read_npz_array(path, "arr_1"))
            if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
                warnings.warn(f"{path}: arr_1 is {labels.dtype} {labels.shape}, not one class for "
                              "each image, and is left out", stacklevel=2)
                labels = None
            else:
                labels = labels.astype(np.int64)
    return keys, images, labels, arrays


def check_bytes(path, name):
    """Raise ValueError where an array of an .npz is not what was stored, by its checksum, which a
    mapped array passes by. Rank 0 reads it, which costs little beside measuring."""
    problem = None
    if rank_and_world()[0] == 0:
        try:
            with zipfile.ZipFile(path) as z, z.open(name + ".npy") as member:
                while member.read(1 << 24):
                    pass
        except DAMAGED as e:
            problem = str(e)
    problem = gather_objects(problem)[0]
    if problem:
        raise ValueError(problem)


def read_npz_array(path, name):
    """One array of an .npz. Where it is stored uncompressed it is mapped from the disk, so that
    every rank reads its own part only."""
    with zipfile.ZipFile(path) as z:
        member = z.getinfo(name + ".npy")
    if member.compress_type != zipfile.ZIP_STORED:
        with np.load(path) as f:
            return f[name]
    check_bytes(path, name)
    with open(path, "rb") as f:
        f.seek(member.header_offset + 26)  # the lengths of the member's name and of its extra field
        name_length, extra_length = struct.unpack("<HH", f.read(4))
        f.seek(name_length + extra_length, os.SEEK_CUR)
        version = np.lib.format.read_magic(f)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(f)
        else:
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(f)
        if dtype.hasobject:  # important! They would be addresses
            raise ValueError(f"{name} holds Python objects")
        return np.memmap(path, dtype, "r", f.tell(), shape, "F" if fortran else "C")


def check_images(x, path):
    """Raise ValueError unless x holds images: uint8 (N, H, W, 1 or 3), not only 0 and 1."""
    if x.dtype != np.uint8:
        raise ValueError(f"{path}: arr_0 is {x.dtype}, want uint8 from 0 to 255")
    if x.ndim != 4 or x.shape[3] not in (1, 3):
        raise ValueError(f"{path}: arr_0 has shape {x.shape}, want (N, H, W, 3) or (N, H, W, 1)")
    if len(x) and x[:100].max() <= 1:
        raise ValueError(f"{path}: arr_0 holds nothing but 0 and 1; want uint8 from 0 to 255")


# ---- Measuring ---------------------------------------------------------------------------------

REFERENCE = 10_000  # images of a reference kept for precision and recall, as in ADM's batches


@dataclasses.dataclass
class FeatureStatistics:
    """What is measured of a set of images; None where it is absent. A file of a reference is an
    .npz of these fields. Arrays or tensors."""

    name: str                         # of the images
    count: Optional[int]              # number of images; None: the file does not say it
    features: str                     # name of the feature network and the resizing
    kept: Any = None                  # features of some images, for precision and recall, (n, dim)
    complete: Optional[bool] = None   # kept are the features of all images, in their order
    mu: Any = None                    # mean of the features, (dim,)
    sigma: Any = None                 # their covariance, (dim, dim)
    mu_s: Any = None                  # the same of the spatial features
    sigma_s: Any = None
    labels: Any = None                # of the images, (n,); only where the network can tell them
    choice: Optional[str] = None      # where they are some of a set: how many of how many, in words

    def arrays(self):
        """{field: array} of the fields that are there."""
        return {key: np.asarray(value.cpu() if torch.is_tensor(value) else value)
                for key, value in vars(self).items() if value is not None}


@torch.no_grad()
def feature_statistics(images, net, device="cpu", batch=64, keep=None, quiet=False):
    """Run all images through net -> FeatureStatistics.

    images  a source of images, see Images
    net     a feature network on `device`: see the top of this file
    batch   images per forward
    keep    keep the features of at most so many images for precision and recall; None: of all

    In a torch.distributed group every rank measures its share and gets the result for all images.
    Raises ValueError when features are not finite, or for fewer than 2 images.
    """
    rank, world = rank_and_world()
    plain = Statistics(net.dim, device)
    spatial = Statistics(net.spatial, device) if net.spatial else None
    kept = KeptFeatures(min(keep or images.count, images.count), images.count, net.dim, device)
    desc = "features of " + Path(images.name.split(",")[0]).name
    with progress_bar(images.count, desc, quiet) as progress, full_precision():
        for first, x, labels in images.batches(rank, world, batch):
            with torch.inference_mode():
                features, spatial_features = net(x.to(device, non_blocking=True))
            plain.update(features)
            if spatial:
                spatial.update(spatial_features)
            kept.add(first, x, features, labels)
            progress.update(min(len(x) * world, images.count - progress.n))

    stats = FeatureStatistics(images.name, images.count, net.name, choice=images.choice)
    stats.kept, labels = kept.gather()
    stats.complete = kept.complete
    stats.mu, stats.sigma = plain.reduce().result()
    if spatial:
        stats.mu_s, stats.sigma_s = spatial.reduce().result()
    if hasattr(net, "classify") and len(labels) == images.count:
        stats.labels = labels
    if not stats.mu.isfinite().all():
        raise ValueError(f"{images.name}: features are not finite; look at the weights of "
                         f"{net.name}")
    return stats


class KeptFeatures:
    """The features of `limit` of `count` images, for precision and recall.

    Every image has a key, and the images with the smallest keys are kept. Where all are kept, the
    key is the position: they stay in order. Else the key is a hash of the pixels: the same images
    are kept whatever their order.
    """

    def __init__(self, limit, count, dim, device):
        self.limit = limit
        self.complete = limit == count
        self.keys = [np.empty(0, np.uint64)]
        self.features = [torch.empty(0, dim, device=device)]
        self.labels = [torch.empty(0, dtype=torch.long)]

    def add(self, first, images, features, labels):
        """Add a batch whose first image is number `first`."""
        if self.complete:
            self.keys.append(np.arange(first, first + len(images), dtype=np.uint64))
        else:
            self.keys.append(pixel_hashes(images))
        self.features.append(features)
        if labels is not None:
            self.labels.append(labels.cpu())
        if sum(map(len, self.keys)) > self.limit + max(self.limit, 1000):
            self.drop_largest()

    def drop_largest(self):
        """Forget all but the `limit` images with the smallest keys."""
        keys = np.concatenate(self.keys)
        order = np.argsort(keys, kind="stable")[:self.limit]
        features = torch.cat(self.features)
        self.keys = [keys[order]]
        self.features = [features[torch.from_numpy(order).to(features.device)]]

    def gather(self):
        """-> features (limit, dim) of all ranks in order of their keys, and labels (limit,), which
        are empty where not every image that is kept has one. On every rank."""
        if not self.complete:
            self.drop_largest()
        keys = gather_arrays(np.concatenate(self.keys))
        features = gather_arrays(torch.cat(self.features).cpu().numpy())
        labels = gather_arrays(torch.cat(self.labels).cpu().numpy())
        order = np.argsort(keys, kind="stable")[:self.limit]
        labels = labels[order] if self.complete and len(labels) == len(order) else labels[:0]
        return features[order], labels


def pixel_hashes(images):
    """images (n, C, H, W) uint8 -> (n,) uint64."""
    hashes = []
    for image in images.cpu().permute(0, 2, 3, 1).numpy():
        digest = hashlib.blake2b(image.tobytes(), digest_size=8).digest()
        hashes.append(int.from_bytes(digest, "big"))
    return np.array(hashes, np.uint64)


@contextmanager
def full_precision():
    """Switch TF32 off, whose products keep only 10 bits of each factor."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def read_statistics(path, arrays, reference_resize=None):
    """The arrays of an .npz -> FeatureStatistics. Raises ValueError when they cannot be that.

    path: the file, for messages. arrays: a mapping such as np.load(path). reference_resize: the
    resizing behind files that do not name it.
    """
    if "mu" not in arrays or "sigma" not in arrays:
        raise ValueError(f"{path}: holds no statistics (mu and sigma)")
    name = name_of_features(path, arrays, reference_resize)
    count = np.asarray(arrays.get("count", 0))
    if count.ndim or count.dtype.kind not in "iu" or count < 0:
        raise ValueError(f"{path}: count is {count.dtype} {count.shape}; want an integer >= 0")
    stats = FeatureStatistics(path, int(count) or None, features=name)
    for key in ("mu", "sigma", "mu_s", "sigma_s", "kept", "complete"):
        if key in arrays:
            setattr(stats, key, np.asarray(arrays[key]))
    if "choice" in arrays:
        stats.choice = str(arrays["choice"])
    check_moments(path, "mu", stats.mu, "sigma", stats.sigma)
    if stats.mu_s is not None:
        check_moments(path, "mu_s", stats.mu_s, "sigma_s", stats.sigma_s)
    if stats.kept is not None:
        shape, dim = stats.kept.shape, len(stats.mu)
        if len(shape) != 2 or shape[1] != dim or not is_finite(stats.kept):
            raise ValueError(f"{path}: kept is {shape} or not finite; "
                             f"want the features (n, {dim}) of some images")
    return stats


def name_of_features(path, arrays, reference_resize):
    """The name of the network and the resizing that made a file of statistics."""
    if "features" in arrays:
        return str(arrays["features"])
    resize = "adm" if tells_resizing(arrays) else reference_resize
    if resize is None:
        raise ValueError(f"{path} does not say which resizing made it: add --reference-resize adm "
                         "(ADM, EDM and other TensorFlow-like tools) or --reference-resize "
                         "pytorch-fid")
    return f"{PUBLISHED}/{resize}"


def tells_resizing(arrays):
    """Do these arrays say which resizing made them? Of the files that do not name it, only ADM's
    reference batches carry spatial statistics."""
    return "features" in arrays or "mu_s" in arrays


def check_moments(path, mu_name, mu, sigma_name, sigma):
    """Raise ValueError unless mu (d,) is finite and sigma (d, d) finite and symmetric."""
    sigma = np.empty(0) if sigma is None else sigma
    floats = mu.dtype.kind == sigma.dtype.kind == "f"
    if mu.ndim != 1 or not len(mu) or sigma.shape != (len(mu), len(mu)) or not floats:
        raise ValueError(f"{path}: {mu_name} is {mu.dtype} {mu.shape}, {sigma_name} {sigma.dtype} "
                         f"{sigma.shape}; want floats (d,) and (d, d)")
    rounding = 1e-6 * np.abs(sigma).max()
    if not (is_finite(mu) and is_finite(sigma) and np.allclose(sigma, sigma.T, atol=rounding)):
        raise ValueError(f"{path}: {mu_name} or {sigma_name} is not finite, or {sigma_name} not "
                         "symmetric; make it again")


def is_finite(array):
    return array.dtype.kind == "f" and np.isfinite(array).all()


def compare_statistics(a, b, net=None, device="cpu", quiet=True):
    """FeatureStatistics of samples and of a reference -> the numbers that exist, as a dict.

    "fd" Frechet distance, "sfd" that of spatial features, "is" Inception Score, "precision" and
    "recall" in [0, 1], "accuracy" the share of samples to which net gives their label.
    net: the network that made them; it is needed for "is" and "accuracy".
    """
    def tensor(array):
        return torch.as_tensor(array, device=device)

    row = {}
    row["fd"] = frechet_distance(tensor(a.mu), tensor(a.sigma), tensor(b.mu), tensor(b.sigma))
    if a.mu_s is not None and b.mu_s is not None:
        row["sfd"] = frechet_distance(tensor(a.mu_s), tensor(a.sigma_s),
                                      tensor(b.mu_s), tensor(b.sigma_s))
    if a.kept is not None and b.kept is not None:
        if hasattr(net, "logits") and a.complete:
            row["is"] = inception_score(net.logits(tensor(a.kept)))
        if min(len(a.kept), len(b.kept)) > 3:
            real, fake = tensor(b.kept), tensor(a.kept)
            row["precision"], row["recall"] = precision_recall(real, fake, quiet=quiet)
        else:
            warnings.warn("precision and recall need more than 3 images on each side and are left "
                          "out", stacklevel=2)
    if a.labels is not None:
        with full_precision():
            found = net.classify(tensor(a.kept)).argmax(1)
            row["accuracy"] = float((found == tensor(a.labels)).double().mean())
    return row


COLUMNS = {  # key of compare_statistics: head, decimals. "pixel_fd" is added by minDistill
    "fd": ("FD", 2),
    "sfd": ("sFD", 2),
    "is": ("Inception Score", 2),
    "precision": ("precision", 3),
    "recall": ("recall", 3),
    "accuracy": ("class accuracy", 3),
    "pixel_fd": ("pixel distance", 3),
}


def table(rows, features):
    """{name: what compare_statistics gave} -> the lines of a table, one string.

    features: the name of the feature network. Only numbers from the published FID Inception are
    called FID, all others FD.
    """
    columns = {key: v for key, v in COLUMNS.items() if any(key in row for row in rows.values())}
    first = max(24, *(len(name) for name in rows))
    lines = [" " * first]
    lines += [f"{name:{first}}" for name in rows]
    for key, (head, decimals) in columns.items():
        if features.startswith(PUBLISHED + "/"):
            head = head.replace("FD", "FID")
        width = max(len(head), 7) + 3
        lines[0] += f"{head:>{width}}"
        for i, row in enumerate(rows.values(), 1):
            rounded = round(row[key], decimals) + 0.0  # -0.0 becomes 0.0
            lines[i] += f"{rounded:{width}.{decimals}f}"
    return "\n".join(lines)


# ---- Download and processes --------------------------------------------------------------------

TIMEOUT = 60  # seconds without a byte, after which a download is tried again


def cache_folder():
    """Where downloads are kept: MINDISTILL_CACHE, or ~/.cache/mindistill."""
    folder = os.environ.get("MINDISTILL_CACHE")
    if folder:
        return Path(folder)
    try:
        return Path.home() / ".cache" / "mindistill"
    except RuntimeError:
        raise ValueError("there is no home folder for downloads: name one in MINDISTILL_CACHE")


def file_hash(path):
    """sha256 in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        for block in iter(partial(f.read, 1 << 22), b""):
            digest.update(block)
    return digest.hexdigest()


def local_first(work, lock=None):
    """work() on local rank 0 and, when that has ended well, on the other ranks, which find what it
    has fetched. Returns what work() returns. An error on one rank is raised on all ranks.

    lock: what is fetched, a path. Of several jobs one works at a time.
    """
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    result = error = None
    if is_first:
        try:
            with one_at_a_time(lock) if lock else nullcontext():
                result = work()
        except Exception as e:
            error = e
    errors = gather_objects(None if error is None else str(error) or type(error).__name__)
    if error:
        raise error
    for message in filter(None, errors):
        raise ValueError(message)
    return result if is_first else work()


def fetch(url, folder, sha256="", check=None, flag="--features", tries=3):
    """Download url below folder, once; returns the path. Local rank 0 downloads, the others wait,
    and so do other jobs that want the file.

    The file grows under a temporary name. A download that breaks off is continued, by the next of
    `tries` and by the next run. The file takes its own name only when

        it has its full length,
        its sha256 begins with `sha256`,
        check(path) raises no ValueError.

    The hash is recorded beside the file. `flag` takes a path instead of the download; messages
    name the flag. Raises ValueError; then there is no file of that name.
    """
    address = hashlib.sha256(url.encode()).hexdigest()[:8]  # many addresses end in the same name
    path = Path(folder) / address / url.split("?")[0].rsplit("/", 1)[-1]

    def work():
        try:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                with one_at_a_time(path):
                    if not path.exists():
                        part = download(url, path, flag, tries)
                        digest = check_download(part, url, sha256, check)
                        path.with_name(path.name + ".sha256").write_text(f"{digest}  {path.name}\n")
                        os.replace(part, path)
        except OSError as e:
            raise ValueError(f"cannot fetch {url} into {path.parent}: {e.strerror or e}; free some "
                             f"space, or download it yourself and give {flag} PATH")
        return path

    return local_first(work)


@contextmanager
def one_at_a_time(path):
    """Of all processes that want to make this file or folder, one at a time does what follows. The
    others wait, and say so."""
    file = open_lock(Path(path))
    try:
        yield
    finally:
        if file:
            file.close()


def open_lock(path):
    """An open file: until it is closed, nobody else has the lock of this path. None where there are
    no locks: on Windows, on some file systems."""
    try:
        import fcntl
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path.with_name(path.name + ".lock"), "w")
    except (ImportError, OSError):
        return None
    with suppress(OSError):
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            tqdm.write(f"waiting for another process that downloads {path.name}", file=sys.stderr)
            fcntl.lockf(file, fcntl.LOCK_EX)
    return file


def download(url, path, flag, tries):
    """Download url beside path, in up to `tries` tries; returns the temporary file. Raises
    ValueError, OSError."""
    for attempt in range(tries):
        try:
            return download_rest(url, path)
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError,
                socket.timeout) as e:  # which is TimeoutError since Python 3.10
            reason = getattr(e, "reason", e)
            if isinstance(e, urllib.error.HTTPError) and e.code < 500:
                break  # the server refuses: to ask again does not help
            time.sleep(attempt)
    raise ValueError(f"cannot fetch {url}: {reason} ({what_is_kept(path)}); check the connection, "
                     f"or download it yourself and give {flag} PATH")


def check_download(part, url, sha256, check):
    """The hash of a downloaded file. A wrong file is deleted and is a ValueError."""
    digest = file_hash(part)
    try:
        if not digest.startswith(sha256):
            raise ValueError(f"sha256 is {digest}, published is {sha256}")
        if check:
            check(part)
    except ValueError as e:
        if not is_for_the_user(e):
            raise
        part.unlink()
        raise ValueError(f"{url} does not hold what it should and was deleted ({e})")
    return digest


def what_is_kept(path):
    """In words: the part of a file that broken downloads have left."""
    for part in path.parent.glob(path.name + ".*.part"):
        size = part.stat().st_size
        return f"{size:,} bytes are kept in {part}, the same command continues"
    return "nothing was kept"


def download_rest(url, path):
    """Download what is missing of url; returns its temporary file, which has the full length."""
    length, version = ask_server(url)
    mine = f"{platform.node()}.part"  # another machine has a file of its own
    part = path.with_name(f"{path.name}.{version}.{mine}")
    for old in path.parent.glob(f"{path.name}.*.{mine}"):
        if old != part or old.stat().st_size > length > 0:
            old.unlink()
    have = part.stat().st_size if part.exists() else 0
    if not length or have < length:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            if have and getattr(response, "status", None) != 206:  # this server cannot continue
                have = 0
            write_stream(response, part, have, length, path.name)
    size = part.stat().st_size
    if length and size != length:
        raise ConnectionError(f"connection closed after {size:,} of {length:,} bytes")
    return part


def ask_server(url):
    """-> length of the file (0: the server does not say it), a hash that stands for its version."""
    request = urllib.request.Request(url, method="HEAD")
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        headers = response.headers
    length = int(headers.get("Content-Length") or 0)
    version = f"{length} {headers.get('ETag')} {headers.get('Last-Modified')}"
    return length, hashlib.sha256(version.encode()).hexdigest()[:8]


def write_stream(response, part, have, length, desc):
    """Append what comes to the file, which has `have` bytes; 0: begin the file anew."""
    progress = tqdm(total=length or None, initial=have, unit="B", unit_scale=True, desc=desc)
    with open(part, "ab" if have else "wb") as f, progress:
        # read1 gives what has come, so that nothing is lost when no more comes.
        for block in iter(partial(response.read1, 1 << 20), b""):
            f.write(block)
            progress.update(len(block))


def in_group():
    """Is this process part of an initialised torch.distributed group?"""
    return dist.is_available() and dist.is_initialized()


def rank_and_world():
    """(rank of this process, number of ranks); (0, 1) without a group."""
    return (dist.get_rank(), dist.get_world_size()) if in_group() else (0, 1)


def start_process():
    """Join the group when torchrun started this process; returns its device."""
    cuda = torch.cuda.is_available()
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not in_group():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    if not cuda:
        return torch.device("cpu")
    device = torch.device("cuda", choose_gpu())
    torch.cuda.set_device(device)
    return device


def choose_gpu():
    """The index of this process's GPU: its local rank, or 0 where each task sees its own GPU alone.
    Raises ValueError where two processes would share one."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    gpus = torch.cuda.device_count()
    index = 0 if gpus == 1 else local_rank
    seen = gather_objects((platform.node(), os.environ.get("CUDA_VISIBLE_DEVICES"), index))
    if index >= gpus or len(set(seen)) < len(seen):
        raise ValueError("--nproc_per_node is larger than this machine's number of GPUs, "
                         f"{gpus}; start as many processes as there are GPUs")
    return index


def sum_over_ranks(tensor):
    """Sum a tensor over all ranks, in place."""
    if rank_and_world()[1] > 1:
        dist.all_reduce(tensor)


def gather_objects(value):
    """A list of every rank's value, on every rank."""
    _, world = rank_and_world()
    if world == 1:
        return [value]
    values = [None] * world
    dist.all_gather_object(values, value)
    return values


def gather_arrays(array):
    """Every rank's rows, one after another, on every rank."""
    return np.concatenate(gather_objects(array))


def progress_bar(total, desc, quiet=False):
    """A progress bar on rank 0's stderr. Where stderr is a file, the bar is drawn now and then."""
    rank, _ = rank_and_world()
    return tqdm(total=total, desc=desc, disable=quiet or rank > 0, leave=False,
                mininterval=0.3 if sys.stderr.isatty() else 10)


def say(text):
    """Print on rank 0 alone, without breaking a progress bar."""
    rank, _ = rank_and_world()
    if rank == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


class Tolerant:
    """A stream whose reader may be gone, or whose disk may be full: neither ends the work."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, call, *args):
        try:
            call(*args)
        except (OSError, ValueError):  # what follows, and what its buffer holds, goes nowhere
            nowhere = open(os.devnull, "w")
            with suppress(OSError, ValueError, AttributeError):
                os.dup2(nowhere.fileno(), self.stream.fileno())
            self.stream = nowhere

    def __getattr__(self, name):
        return getattr(self.stream, name)


def keep_streams():
    """Let the program go on where stdout or stderr is closed, or cannot be written."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w")
        if not isinstance(stream, Tolerant):
            setattr(sys, name, Tolerant(stream))


def run_script(main, args):
    """main(args). What the user can mend becomes one line from one rank and exit code 2."""
    keep_streams()
    try:
        main(args)
    except KeyboardInterrupt:
        exit_with("interrupted; repeat the command", 130)
    except (ValueError, OSError, RuntimeError, MemoryError) as e:
        line, code = explain(e)
        if line is None:
            raise
        exit_with(line, code)
    if in_group():
        sys.stdout.flush()
        sys.stderr.flush()
        # important! Taking the group down may wait for ever for a rank that has ended, and a thread
        # of gloo that drops its last tensor while the interpreter is ending aborts the process.
        os._exit(0)


def explain(error):
    """The line and the exit code for an error; (None, 0) where only a traceback explains it."""
    if isinstance(error, ValueError):
        return (f"error: {error}", 2) if is_for_the_user(error) else (None, 0)
    if isinstance(error, OSError):
        file = f": {error.filename}" if error.filename else ""
        return f"error: {error.strerror or error}{file}; mend it and repeat the command", 2
    no_memory = (MemoryError, torch.cuda.OutOfMemoryError)
    if isinstance(error, no_memory) or "can't allocate memory" in str(error):
        return "error: out of memory; lower --batch-size", 2
    if in_group() and "onnection" in str(error):
        reason = str(error).splitlines()[0][:100]
        return f"error: another process of this job was lost ({reason}); repeat the command", 1
    return None, 0


def is_for_the_user(error):
    """True when this project raised the error, and not a library that it called."""
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals["__name__"]
    return module.split(".")[0] in (__name__, "kit", "models", "solvers")


def exit_with(line, code):
    """Print one line, from the first process of the job that has something to say, and exit."""
    if not in_group() or is_first_to_speak():
        tqdm.write(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    if in_group():
        time.sleep(1)  # rank 0 may keep the store in which the others ask whether they are first
        os._exit(code)  # a broken process group would hang an orderly exit
    sys.exit(code)


def is_first_to_speak():
    """True for the first process of the job that asks."""
    try:
        return dist.distributed_c10d._get_default_store().add("spoken", 1) == 1
    except Exception:  # the process that kept the store is the one that was lost
        return True


# ---- Command line ------------------------------------------------------------------------------

# Where it is there, this module opens what this file does not know: named sets, checkpoints.
EXTENSION = "kit.features"
SETS = ("digits", "mnist", "fashion-mnist", "cifar10")
CHECKPOINTS = (".pt", ".pth", ".ckpt")


@dataclasses.dataclass
class Side:
    """Samples or reference, opened: its images, its statistics, or both; and the names of the
    arguments that have had an effect on it."""

    path: str
    images: Optional[Images]
    stats: Optional[FeatureStatistics]
    used: set


def open_side(path, args, num=None):
    """path of the command line -> Side with its images; num: a random choice of so many. Raises
    ValueError."""
    images = arrays = stats = None
    used = set()
    file = Path(path)
    if path in SETS or (file.is_file() and file.suffix in CHECKPOINTS):
        images = require_kit(path).open_source(path, args, num)
        if path not in SETS:
            used.update(SAMPLING)
    elif file.is_dir():
        images = images_from_files(path, image_files(path), args.image_size, num, seed=args.seed)
        used.add("image_size")
    elif not file.is_file():
        raise ValueError(f"{path}: no such file or folder")
    else:
        images, arrays = open_npz(path, num, args.seed)
    if arrays is not None:
        stats = read_statistics(path, arrays, args.reference_resize)
        if not tells_resizing(arrays):
            used.add("reference_resize")
    if images:
        used.add("features")
        if images.choice:
            used.add("seed")
    return Side(path, images, stats, used)


# The flags that do not have an effect on every input: why they had none.
SAMPLING = ("nfe", "cfg", "seed", "uncond", "labels", "sample_batch_size")
NO_EFFECT = {
    "nfe": "without a checkpoint",
    "cfg": "without a checkpoint",
    "uncond": "without a checkpoint",
    "labels": "without a checkpoint",
    "sample_batch_size": "without a checkpoint",
    "seed": "where neither a checkpoint is sampled nor some of many images are chosen",
    "image_size": "without a folder of images",
    "features": "where nothing but statistics is compared",
    "resize": "where no images go through Inception",
    "reference_resize": "without a file of statistics that does not say its resizing",
    "out": "without ref",
    "json": "with ref, which makes a file",
}


def refuse_without_effect(args, used):
    """Raise ValueError for a flag on the command line that has had no effect. used: the names of
    those that have had one."""
    for name, reason in NO_EFFECT.items():
        if name in args.given and name not in used:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} has no effect {reason}; leave it out")


def resizes(net):
    """{"resize"} where images reach the network by args.resize."""
    return {"resize"} if hasattr(net, "resize") else set()


def load_features(name, resize="adm", device="cpu"):
    """The network of --features. Raises ValueError."""
    if name == "inception":
        return load_inception(None, resize, device)
    kit = import_kit()
    if not kit and (Path(name).is_file() or Path(name).suffix in (".pth", ".pt")):
        return load_inception(name, resize, device)
    return require_kit(f"--features {name}").load_features(name, resize, device)


def import_kit():
    """The module EXTENSION, which knows checkpoints, named sets and other networks; None where
    this file is alone."""
    # Where this file is the script, the extension must not load it a second time.
    sys.modules.setdefault("fid", sys.modules[__name__])
    try:
        return importlib.import_module(EXTENSION)
    except ModuleNotFoundError as e:
        if e.name not in (EXTENSION, EXTENSION.split(".")[0]):
            raise
        return None


def require_kit(what):
    """import_kit() for an input that this file alone does not know. Raises ValueError."""
    kit = import_kit()
    if kit is None:
        raise ValueError(f"{what}: fid.py alone measures folders of images and .npz files, with "
                         "--features inception or FILE.pth; all else needs minDistill's folder "
                         "kit beside it")
    return kit


def main(args):
    device = start_process()
    check_arguments(args, device)
    if args.samples == "ref":
        make_reference(args, device)
        return

    # Everything is opened before anything is measured:
    a = open_side(args.samples, args, args.num_samples)
    b = open_side(args.reference, args)
    if a.stats and args.num_samples:
        raise ValueError(f"--num-samples {args.num_samples}: {a.path} holds statistics of all its "
                         "images; leave it out")
    net = load_features(args.features, args.resize, device) if a.images or b.images else None
    refuse_without_effect(args, a.used | b.used | resizes(net) | {"json"})
    check_same_features(a, b, net)

    samples = measure_side(a, net, device, args.batch_size)
    reference = measure_side(b, net, device, args.batch_size, keep=REFERENCE)
    rank, _ = rank_and_world()
    if rank > 0:
        return
    row = compare_statistics(samples, reference, net, device, quiet=False)
    if args.json:
        say(json.dumps({
            "samples": samples.name, "samples_count": samples.count,
            "samples_choice": samples.choice,
            "reference": reference.name, "reference_count": reference.count,
            "reference_choice": reference.choice,
            "reference_kept": 0 if reference.kept is None else len(reference.kept),
            "features": samples.features, **row}))
        return
    say(describe("samples", samples))
    say(describe("reference", reference))
    say(f"{'features':12}{samples.features}")
    say(table({"": row}, samples.features))


def check_arguments(args, device):
    """Raise ValueError for numbers that cannot be; choose the batch size."""
    if args.batch_size is None:
        args.batch_size = 8 if device.type == "cpu" else 64
    for flag, value in (("--batch-size", args.batch_size), ("--image-size", args.image_size)):
        if value is not None and value <= 0:
            raise ValueError(f"{flag} {value}: must be positive")
    if args.num_samples is not None and args.num_samples < 2:
        raise ValueError(f"--num-samples {args.num_samples}: a covariance needs at least 2 images")
    if args.cfg is not None and not math.isfinite(args.cfg):
        raise ValueError(f"--cfg {args.cfg}: must be a number")
    if args.cfg == 0:
        raise ValueError("--cfg 0: guidance gives out_null + cfg (out_y - out_null), so that 1 "
                         "means no guidance and 0 would ignore the labels; give --cfg 1")


def check_same_features(a, b, net):
    """Raise ValueError when files of statistics come from another network or resizing."""
    name = net.name if net else a.stats.features
    dim = net.dim if net else len(a.stats.mu)
    for side in (a, b):
        if not side.stats:
            continue
        made_with = side.stats.features
        if made_with != name:
            now = "now it is" if net else f"{a.path} with"
            raise ValueError(f"{side.path} was made with {made_with}, {now} {name}: numbers of "
                             "different networks or resizings do not mix; "
                             + (how_to_match(made_with, name) if net else "make one of them again"))
        if len(side.stats.mu) != dim:
            raise ValueError(f"{side.path} holds statistics of {len(side.stats.mu)} features, "
                             f"{name} has {dim}")


def how_to_match(made_with, name):
    """The flags that choose the network of a file of statistics."""
    if made_with.startswith(PUBLISHED + "/") and name.startswith(PUBLISHED + "/"):
        return f"add --resize {made_with.removeprefix(PUBLISHED + '/')}"
    return "add the --features it was made with"


def measure_side(side, net, device, batch, keep=None):
    """FeatureStatistics of a side.

    The statistics in its file count. What the file lacks is measured on the images in the file:
    ADM's reference batches hold statistics of all images, and some of the images.
    """
    if not side.images:
        return side.stats
    measured = feature_statistics(side.images, net, device, batch, keep)
    if not side.stats:
        return measured
    for key, value in vars(side.stats).items():
        if value is None and key not in ("count", "choice"):  # of these only the file knows
            setattr(side.stats, key, getattr(measured, key))
    return side.stats


def describe(side, stats):
    """One line of the report: the images, their number, how many of them were kept."""
    kept = 0 if stats.kept is None else len(stats.kept)
    some = f", {kept:,} of them for precision and recall" if kept not in (0, stats.count) else ""
    return f"{side:12}{stats.name}: {number_of_images(stats)}{some}"


def number_of_images(stats):
    if stats.choice or not stats.count:
        return stats.choice or "statistics, of how many images it does not say"
    return f"{stats.count:,} images"


def make_reference(args, device):
    """python fid.py ref PATH --out stats.npz"""
    side = open_side(args.reference, args, args.num_samples)
    if side.stats:
        raise ValueError(f"{args.reference} holds statistics already: it is a reference")
    if not args.out or not args.out.endswith(".npz"):
        raise ValueError("ref makes a file: give --out a name ending in .npz")
    both = (args.out, args.reference)
    if all(map(os.path.exists, both)) and os.path.samefile(*both):
        raise ValueError(f"--out {args.out} is what is measured, and would be lost; give another "
                         "name")
    part = Path(args.out).with_suffix(".tmp")
    try:  # before hours of work
        if Path(args.out).is_dir():
            raise IsADirectoryError(None, "it is a folder")
        part.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        part.unlink(missing_ok=True)  # by another process of this job
    except OSError as e:
        raise ValueError(f"--out {args.out}: cannot write ({e.strerror or e}); choose another "
                         "place")
    net = load_features(args.features, args.resize, device)
    refuse_without_effect(args, side.used | resizes(net) | {"out"})
    stats = feature_statistics(side.images, net, device, args.batch_size, REFERENCE)
    rank, _ = rank_and_world()
    if rank == 0:
        try:
            with open(part, "wb") as f:
                np.savez(f, **stats.arrays())
            os.replace(part, args.out)
        except OSError as e:
            part.unlink(missing_ok=True)
            raise ValueError(f"--out {args.out}: cannot write ({e.strerror or e}); free some space "
                             "and repeat the command")
    say(f"{args.out}: statistics of {stats.name}: {number_of_images(stats)}, {len(stats.kept):,} "
        f"kept for precision and recall; features {stats.features}")


class Parser(argparse.ArgumentParser):
    """Its arguments have `given`, the names of those that stand on the command line."""

    aliases = {}  # what other programs call our flags, without dashes: our flag

    def parse_args(self, words=None, namespace=None):
        words = sys.argv[1:] if words is None else words
        args, unknown = self.parse_known_args(words, namespace)
        if unknown:
            self.error(self.explain_unknown(unknown))
        args.given = self.names_given(words)
        return args

    def names_given(self, words):
        """The names of the arguments that stand on the command line, as a frozenset."""
        defaults = {action: action.default for action in self._actions}
        try:
            for action in self._actions:
                action.default = argparse.SUPPRESS
            given, _ = self.parse_known_args(words, argparse.Namespace())
        finally:
            for action, default in defaults.items():
                action.default = default
        return frozenset(vars(given))

    def explain_unknown(self, words):
        """What to say of words that are no flags."""
        known = [name for action in self._actions for name in action.option_strings]
        word = words[0].split("=")[0].replace("_", "-")
        close = [self.aliases.get(word.lstrip("-"))]
        if close[0] not in known:
            close = difflib.get_close_matches(word, known, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return f"unrecognized arguments: {' '.join(words)}{hint}"

    def error(self, message):  # under torchrun only rank 0 complains about the command line
        if os.environ.get("RANK", "0") == "0":
            print(f"{self.prog}: error: {message} (see --help)", file=sys.stderr)
        sys.exit(2)


def seed(text):
    """The type of --seed."""
    if not 0 <= int(text) < 2 ** 63:
        raise argparse.ArgumentTypeError(f"{text}: must lie between 0 and 2^63 - 1")
    return int(text)


def parser():
    what, _, explanation = __doc__.partition("\n\n")
    p = Parser(prog="fid.py", usage="%(prog)s A B [flags]", description=what, epilog=explanation,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("samples", metavar="A",
                   help="the samples, or the word ref: make a reference of B")
    p.add_argument("reference", metavar="B", help="the reference")

    group = p.add_argument_group("images")
    group.add_argument("--num-samples", type=int, metavar="N",
                       help="measure N samples, a random choice where there are more (default: "
                            "all; a checkpoint makes 50,000)")
    group.add_argument("--seed", type=seed, default=0,
                       help="of that choice, and of a checkpoint's noise (default: %(default)s)")
    group.add_argument("--image-size", type=int, metavar="N",
                       help="crop and scale the images of folders to N x N, as ADM does "
                            "(default: as they are)")

    group = p.add_argument_group("feature network")
    group.add_argument("--features", default="inception",
                       help="inception; a file with its weights or those of Keras's ResNet-50; "
                            "torchvision-NAME, digits-cnn, digits-mlp (default: %(default)s)")
    group.add_argument("--resize", choices=list(RESIZE), default="adm",
                       help="how images reach Inception's 299 x 299 (default: %(default)s)")
    group.add_argument("--reference-resize", choices=list(RESIZE),
                       help="how statistics were made that do not say it themselves "
                            "(default: they are refused)")
    group.add_argument("--batch-size", type=int, metavar="N",
                       help="images per forward and process (default: 64 on a GPU; 8 on a CPU, "
                            "where that is fastest)")

    group = p.add_argument_group("samples of a checkpoint")
    group.add_argument("--nfe", type=int, help="steps (default: as trained, else 50)")
    group.add_argument("--cfg", type=float,
                       help="scale of guidance, 1 for none (default: as trained)")
    group.add_argument("--uncond", metavar="PATH",
                       help="a network without classes that guides one which has not learned the "
                            "null label, as EDM's")
    group.add_argument("--labels", choices=["balanced", "random"],
                       help="balanced: all classes in turn; random: drawn for each sample "
                            "(default: balanced)")
    group.add_argument("--sample-batch-size", type=int, metavar="N",
                       help="samples at once, of each process; guidance doubles the rows (default: "
                            "what costs at most 16 TFLOP, and at most 250)")

    group = p.add_argument_group("output")
    group.add_argument("--out", metavar="FILE.npz", help="where ref writes the statistics")
    group.add_argument("--json", action="store_true",
                       help="print one line of JSON instead of the table")
    return p


def short_warning(message, *_, **__):
    return f"warning: {message}\n"


if __name__ == "__main__":
    warnings.formatwarning = short_warning
    run_script(main, parser().parse_args())
