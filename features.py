"""What fid.py measures on: the networks it looks at images through, and the places where images come from.

A network maps uint8 images (n, C, H, W) to features (n, dim), float32, and spatial features (n, spatial), or None where it has none. `name` says
what it is: network and resizing for FID's Inception, as numbers from different ones are different quantities.

    inception-2015-12-05/adm            FID's Inception-v3 behind TensorFlow 1's bilinear resizing, as the ADM evaluator has it
    inception-2015-12-05/pytorch-fid    the same behind that tool's resizing
    torchvision-resnet50, ...           any classifier of torchvision
    keras-resnet50-HASH                 a file with the weights of Keras Applications' ResNet-50
    digits-cnn, digits-mlp              small classifiers of the embedded digits (made by experiments/digits_nets.py)
"""
import os
import re
import zipfile
import zlib
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

import checkpoints
import data
import runtime
from data import ASSETS, to_float, to_uint8
from runtime import UserError

# ---- Networks ---------------------------------------------------------------------------------------

# The weights of TensorFlow's inception-2015-12-05 as ported by pytorch-fid; the name ends in the beginning of its sha256.
INCEPTION = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
AVERAGE = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)  # TensorFlow leaves the padding out
MAXIMUM = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)


class Inception(nn.Module):
    """The Inception-v3 of FID: torchvision's layers, but the poolings of TensorFlow's graph of 2015, and 1,008 outputs.

    features: the 2,048 of pool_3. spatial features: mixed_6/conv before normalisation, its first 7 channels, (17, 17, 7) flattened.
    """

    dim, spatial = 2048, 2023

    def __init__(self, weights, name, resize):
        super().__init__()
        from torchvision.models import inception  # here: it takes a second, which most commands need not wait
        net = inception.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
        weights = checkpoints.find_weights(weights, net.state_dict().keys())
        for key, value in net.state_dict().items():
            if key.endswith("num_batches_tracked"):  # not in the published file, and of no use here
                weights.setdefault(key, value)
        self.net = checkpoints.load_weights(net, weights, name, hint="it is not the Inception network of FID").eval()
        self.name, self.resize = f"{name}/{resize}", RESIZE[resize]
        self.register_buffer("conv", net.Mixed_6d.branch1x1.conv.weight[:7].detach().clone(), persistent=False)
        for block in (net.Mixed_5b, net.Mixed_5c, net.Mixed_5d):
            block.forward = partial(mixed_5, block)
        for block in (net.Mixed_6b, net.Mixed_6c, net.Mixed_6d, net.Mixed_6e):
            block.forward = partial(mixed_6, block)
        net.Mixed_7b.forward = partial(mixed_7, net.Mixed_7b, AVERAGE)
        net.Mixed_7c.forward = partial(mixed_7, net.Mixed_7c, MAXIMUM)

    def fold(self):
        """Batch norm into the convolution before it, and channels last: the same function, sooner."""
        for m in self.net.modules():
            if isinstance(getattr(m, "bn", None), nn.BatchNorm2d):
                m.conv, m.bn = fuse_conv_bn_eval(m.conv, m.bn), nn.Identity()
        return self.to(memory_format=torch.channels_last)

    def forward(self, images):
        x = self.resize(images.expand(-1, 3, -1, -1).float())
        for name, layer in self.net.named_children():
            if name == "avgpool":
                break
            if name == "Mixed_6d":
                spatial = F.conv2d(x, self.conv).permute(0, 2, 3, 1).flatten(1)
            x = layer(x)
        return x.mean((2, 3)), spatial

    def logits(self, features):
        """Features (n, 2048) -> the logits of the Inception Score (n, 1008), in float64, without the bias."""
        return features.double() @ self.net.fc.weight.double().T


def mixed_5(m, x):
    return torch.cat([m.branch1x1(x), m.branch5x5_2(m.branch5x5_1(x)), m.branch3x3dbl_3(m.branch3x3dbl_2(m.branch3x3dbl_1(x))),
                      m.branch_pool(AVERAGE(x))], 1)


def mixed_6(m, x):
    return torch.cat([m.branch1x1(x), m.branch7x7_3(m.branch7x7_2(m.branch7x7_1(x))),
                      m.branch7x7dbl_5(m.branch7x7dbl_4(m.branch7x7dbl_3(m.branch7x7dbl_2(m.branch7x7dbl_1(x))))), m.branch_pool(AVERAGE(x))], 1)


def mixed_7(m, pool, x):
    a, b = m.branch3x3_1(x), m.branch3x3dbl_2(m.branch3x3dbl_1(x))
    return torch.cat([m.branch1x1(x), m.branch3x3_2a(a), m.branch3x3_2b(a), m.branch3x3dbl_3a(b), m.branch3x3dbl_3b(b), m.branch_pool(pool(x))], 1)


def resize_adm(x, size=299):
    """0..255 -> the input of TensorFlow's graph: output pixel i looks at i * (in / out), with neither half-pixel centres nor smoothing."""
    for axis in (2, 3):
        n = x.shape[axis]
        at = torch.arange(size, device=x.device) * torch.tensor(n / size, dtype=torch.float32, device=x.device)
        low = at.long()
        weight = (at - low).view(-1, 1) if axis == 2 else at - low
        x = torch.lerp(x.index_select(axis, low), x.index_select(axis, (low + 1).clamp(max=n - 1)), weight)
    return (x - 128) / 128


def resize_pytorch_fid(x, size=299):
    """0..255 -> [-1, 1], as pytorch-fid: half-pixel centres, no smoothing."""
    return 2 * F.interpolate(x / 255, size=(size, size), mode="bilinear", align_corners=False) - 1


RESIZE = {"adm": resize_adm, "pytorch-fid": resize_pytorch_fid}


class DigitsNet(nn.Module):
    """Small classifiers of the embedded digits, (n, 1, 8, 8); their 64 penultimate activations are the features.

    "cnn" is the network of all tables. "mlp" is another family, trained apart: a referee for results that were chosen with the first.
    """

    dim, spatial = 64, None

    def __init__(self, kind):
        super().__init__()
        if kind == "cnn":
            self.body = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                                      nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(256, 64), nn.ReLU())
        else:
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.GELU())
        self.head = nn.Linear(64, 10)
        self.name = f"digits-{kind}"

    def forward(self, images):
        if images.shape[1:] != (1, 8, 8):
            raise UserError(f"{self.name} looks at images of 8x8 pixels with one channel, these are {tuple(images.shape[1:])}; choose other --features")
        return self.body(to_float(images)), None

    def classify(self, features):
        return self.head(features)


class TorchvisionNet(nn.Module):
    """Any classifier of torchvision with its own preprocessing; the features are what its last linear layer looks at."""

    spatial = None

    def __init__(self, name):
        super().__init__()
        import torchvision
        try:
            weights = torchvision.models.get_model_weights(name).DEFAULT
            self.net = checkpoints.local_first(lambda: torchvision.models.get_model(name, weights=weights))
        except ValueError as e:
            raise UserError(f"--features torchvision-{name}: {e}")
        except (OSError, RuntimeError) as e:
            raise UserError(f"--features torchvision-{name}: torchvision cannot fetch its weights ({e}); put them into {torch.hub.get_dir()}/checkpoints yourself")
        self.name, self.prepare = f"torchvision-{name}", weights.transforms()
        last = ([None] + [m for m in self.net.modules() if isinstance(m, nn.Linear)])[-1]
        if last is None:
            raise UserError(f"--features torchvision-{name}: has no linear layer, whose input would be its features; choose another")
        self.dim = last.in_features
        last.register_forward_pre_hook(lambda m, inputs: setattr(self, "features", inputs[0]))

    def forward(self, images):
        self.net(self.prepare(images.expand(-1, 3, -1, -1)))
        return self.features, None


class KerasResNet50(nn.Module):
    """The ImageNet ResNet-50 of Keras Applications, images bilinearly at 224x224; features: the 2,048 of its last pooling.

    Torchvision's network, but a block's stride is that of its first convolution, normalisation has eps 1e-3, and the input is BGR less its mean;
    the convolutions' biases are taken off the running means behind them. weights: stem.conv.weight, layer2.0.a.bn.bias, layer2.0.proj.conv.bias, ...
    """

    dim, spatial = 2048, None

    def __init__(self, weights, name):
        super().__init__()
        from torchvision.models import resnet50
        self.name, self.net = name, resnet50()
        self.net.fc = nn.Identity()
        held = {}
        for key, value in weights.items():
            key = re.sub(r"^layer(\d)", lambda m: f"layer{int(m[1]) - 1}", key).replace("stem.", "a.").replace("proj.conv", "downsample.0").replace("proj.bn", "downsample.1")
            key = re.sub(r"\b([abc])\.(conv|bn)\b", lambda m: f"{m[2]}{' abc'.index(m[1])}", key)
            if not key.startswith(("fc.", "mean")):
                held[key] = value.float()
        for key in [k for k in held if re.search(r"(conv\d|downsample\.0)\.bias$", k)]:
            behind = key.replace("conv", "bn").replace("downsample.0", "downsample.1").replace("bias", "running_mean")
            held[behind] = held[behind] - held.pop(key)
        self.net = checkpoints.load_weights(self.net, held, name, hint="it is not Keras's ResNet-50").eval()
        for m in self.net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eps = 1e-3
            elif hasattr(m, "conv3"):
                m.conv1.stride, m.conv2.stride = m.conv2.stride, m.conv1.stride
        self.register_buffer("mean", torch.tensor([103.939, 116.779, 123.68]).view(1, 3, 1, 1), persistent=False)

    def forward(self, images):
        x = F.interpolate(images.expand(-1, 3, -1, -1).float(), (224, 224), mode="bilinear", antialias=True)
        return self.net(x.flip(1) - self.mean), None


def load_features(name="inception", resize="adm", device="cpu"):
    """The feature network of --features: inception (fetched once), a file with its weights or Keras's ResNet-50, torchvision-NAME, digits-cnn or digits-mlp.

    It maps uint8 images (n, C, H, W) to features (n, dim) and spatial features (n, spatial) or None; its `name` says what it is.
    """
    if name in ("digits-cnn", "digits-mlp"):
        net = DigitsNet(name.removeprefix("digits-"))
        net.load_state_dict(torch.load(ASSETS / f"digits_{name[-3:]}.pt", weights_only=True))
    elif name.startswith("torchvision-"):
        net = TorchvisionNet(name.removeprefix("torchvision-"))
    elif name == "inception" or Path(name).suffix in (".pth", ".pt"):
        published = re.search(r"-([0-9a-f]{8})\.", INCEPTION)[1]
        path = Path(name)
        if name == "inception":
            path = checkpoints.fetch(INCEPTION, runtime.CACHE, check=checkpoints.read_file, sha256=published, flag="--features")
        if not path.is_file():
            raise UserError(f"--features {path}: no such file")
        held, digest = checkpoints.read_file(path), checkpoints.file_hash(path)
        told = re.search(r"inception.*-([0-9a-f]{8})\.", path.name)
        if told and not digest.startswith(told[1]):
            raise UserError(f"{path}: its sha256 begins with {digest[:8]}, not as its name says; it is damaged: fetch it again")
        known = digest.startswith(published)
        if "stem.conv.weight" in held:
            net = KerasResNet50(held, f"keras-resnet50-{digest[:8]}")
        else:
            net = Inception(held, "inception-2015-12-05" if known else f"inception-{digest[:8]}", resize).fold()
    else:
        raise UserError(f"--features {name}: unknown; choose inception, a .pth file with its weights, torchvision-NAME, digits-cnn or digits-mlp")
    return net.to(device).eval().requires_grad_(False)


# ---- Images -----------------------------------------------------------------------------------------

# batches(proc, size) yields (position of the first, images (n, C, H, W) uint8, labels (n,) or None): this rank's share of the batches.
Images = namedtuple("Images", "name count batches")


class Slices(torch.utils.data.Dataset):
    """Images by slice, as (uint8 tensor (n, C, H, W), labels or None). x: an NHWC array, or paths to read at `size`."""

    def __init__(self, x, y=None, size=None):
        self.x, self.y, self.size = x, y, size

    def __getitem__(self, s):
        x = self.x[s]
        if isinstance(x, list):
            images = [data.read_image(path, self.size) for path in x]
            for path, image in zip(x, images):
                if image.shape != images[0].shape:
                    raise UserError(f"{path} is {image.shape[1]}x{image.shape[0]}, {x[0]} is {images[0].shape[1]}x{images[0].shape[0]}; "
                                    f"--image-size N crops and scales all to one size, as ADM does")
            x = np.stack(images)
        return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2), None if self.y is None else torch.as_tensor(self.y[s])


def in_slices(name, x, y=None, num=None, size=None, workers=0):
    """The first `num` of x as Images; see Slices for x, y, size. Raises UserError when there are fewer, or fewer than 2."""
    if len(x) < max(num or 0, 2):
        raise UserError(f"{name}: {len(x)} images, {f'--num-samples asks for {num}' if num else 'at least 2 are needed'}")
    x = x[:num]

    def batches(proc, batch):
        mine = [slice(i, min(i + batch, len(x))) for i in range(0, len(x), batch)][proc.rank::proc.world]
        loader = torch.utils.data.DataLoader(Slices(x, y, size), sampler=mine, batch_size=None, num_workers=min(workers, len(mine), os.cpu_count()),
                                             pin_memory=proc.device.type == "cuda", worker_init_fn=data.one_thread)
        for s, (images, labels) in zip(mine, data.plainly(loader)):
            yield s.start, images, labels
    return Images(name, len(x), batches)


def from_checkpoint(path, num, nfe, cfg, seed, proc):
    if "format" not in checkpoints.read_file(path):
        raise UserError(f"{path} does not say how to sample it: do that with sample.py --model, and give the .npz")
    net, info = checkpoints.load_model(path)
    if info["scale"] is not None:
        raise UserError(f"{path} makes latents, not images: sample them, decode them with the model's autoencoder, and give the images")
    denoise = proc.mixed(proc.frozen(net))

    def batches(proc, batch):
        for first, x, y in data.sample_chunks(denoise, info, proc, num, seed, nfe, cfg, desc=Path(path).name):
            if not x.isfinite().all():
                raise UserError(f"{path}: samples {first} to {first + len(x) - 1} are not finite; look at the checkpoint")
            for i in range(0, len(x), batch):
                yield first + i, to_uint8(x[i:i + batch]), y[i:i + batch]
    return Images(f"{path}, NFE {info['nfe'] or 50 if nfe is None else nfe}, guidance {info['cfg'] if cfg is None else cfg:g}, seed {seed}", num, batches)


def npz_member(path, name):
    """One array of an .npz, mapped from the disk where it is stored uncompressed: every rank reads its own part only."""
    with zipfile.ZipFile(path) as z:
        member = z.getinfo(name + ".npy")
        if member.compress_type != zipfile.ZIP_STORED:
            return np.load(path)[name]
        with open(path, "rb") as f:
            f.seek(member.header_offset + 26)
            f.seek(sum(np.frombuffer(f.read(4), "<u2").tolist()), os.SEEK_CUR)  # the name and the extra field
            version = np.lib.format.read_magic(f)
            shape, fortran, dtype = (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(f)
            if dtype.hasobject:  # important! they would be addresses
                raise ValueError(f"{name} holds Python objects")
            return np.memmap(path, dtype, "r", f.tell(), shape, "F" if fortran else "C")


def check_images(x, path):
    """x if it holds images as uint8 (N, H, W, 1 or 3), with more grey levels than 0 and 1."""
    if x.dtype != np.uint8:
        raise UserError(f"{path}: arr_0 is {x.dtype}, want uint8 from 0 to 255")
    if x.ndim != 4 or x.shape[3] not in (1, 3):
        raise UserError(f"{path}: arr_0 has shape {x.shape}, want (N, H, W, 3) or (N, H, W, 1)")
    if len(x) and x[:100].max() <= 1:
        raise UserError(f"{path}: arr_0 holds nothing but 0 and 1; want uint8 from 0 to 255")
    return x


def open_images(path, args, proc, num=None):
    """A folder, an .npz of images, a checkpoint or the name of a set -> (Images of its first `num`, or None;
    the arrays of statistics that an .npz holds, or None)."""
    if path in ("digits", *data.TORCHVISION):
        x = data.load(path)
        return in_slices(path, x.x.permute(0, 2, 3, 1).numpy(), x.y, num), None
    if Path(path).is_dir():
        return in_slices(path, data.image_files(path), None, num, args.image_size, workers=8), None
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file or folder")
    if Path(path).suffix in (".pt", ".pth", ".ckpt"):
        return from_checkpoint(path, num or 50_000, args.nfe, args.cfg, args.seed, proc), None
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("no zip archive")
        with np.load(path) as f:
            keys = set(f.files)
            statistics = {k: f[k] for k in keys - {"arr_0", "arr_1"}} if {"mu", "sigma"} <= keys else None
        images = check_images(npz_member(path, "arr_0"), path) if "arr_0" in keys else None
        labels = np.array(npz_member(path, "arr_1")) if images is not None and "arr_1" in keys else None
        if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu"):
            labels = None  # something else than one class for each image
    except (OSError, ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as e:
        raise UserError(f"{path}: cannot be read as .npz ({type(e).__name__}: {str(e)[:100]}); it is damaged or something else")
    if images is None and statistics is None:
        raise UserError(f"{path}: holds neither images (arr_0) nor statistics (mu and sigma), but {', '.join(sorted(keys)[:5]) or 'nothing'}")
    return None if images is None else in_slices(path, images, labels, num), statistics
