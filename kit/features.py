"""What fid.py measures with, as far as only this project knows it.

Feature networks beside FID's Inception (--features):

    digits-cnn, digits-mlp  small classifiers of the embedded digits, made by
                            experiments/digits_nets.py
    torchvision-NAME        any classifier of torchvision
    keras-resnet50-HASH     a file with the weights of Keras Applications' ResNet-50

Sources of images beside folders and .npz files: checkpoints of pixel models, and the sets digits,
mnist, fashion-mnist and cifar10. The top of fid.py says what a network and a source are.
"""
import re
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import fid
from kit import checkpoints, data, sampling
from kit.cli import UserError, cache_folder, user_errors
from kit.download import local_first
from kit.processes import Processes
from kit.sampling import SampleOptions

# ---- Feature networks --------------------------------------------------------------------------


class DigitsNet(nn.Module):
    """A small classifier of the embedded digits; its 64 penultimate activations are the features.

    kind: "cnn" is the network of all tables. "mlp" is another family, trained apart: a referee for
    results that were chosen with the first.
    """

    dim = 64
    spatial = None

    def __init__(self, kind):
        super().__init__()
        if kind == "cnn":
            self.body = nn.Sequential(
                nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),                       # (n, 32, 8, 8)
                nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
                nn.MaxPool2d(2),                                                 # (n, 64, 4, 4)
                nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
                nn.AvgPool2d(2),                                                 # (n, 64, 2, 2)
                nn.Flatten(),
                nn.Linear(256, 64), nn.ReLU())
        else:
            self.body = nn.Sequential(
                nn.Flatten(),
                nn.Linear(64, 256), nn.GELU(),
                nn.Linear(256, 64), nn.GELU())
        self.head = nn.Linear(64, 10)
        self.name = f"digits-{kind}"

    def forward(self, images):
        """images (n, 1, 8, 8) uint8 -> features (n, 64), None. Raises UserError for others."""
        shape = tuple(images.shape[1:])
        if shape != (1, 8, 8):
            raise UserError(f"{self.name} looks at images of 8x8 pixels with one channel, these "
                            f"are {shape}; choose other --features")
        return self.body(data.to_float(images)), None

    def classify(self, features):
        """Features (n, 64) -> logits (n, 10)."""
        return self.head(features)


class TorchvisionNet(nn.Module):
    """A classifier of torchvision with its own preprocessing, its weights fetched once.

    name: as torchvision.models.get_model takes it. The features are the input of its last linear
    layer. Raises UserError.
    """

    spatial = None

    def __init__(self, name):
        super().__init__()
        import torchvision
        try:
            weights = torchvision.models.get_model_weights(name).DEFAULT
        except ValueError as e:
            raise UserError(f"--features torchvision-{name}: {e}")

        def get_model():
            return torchvision.models.get_model(name, weights=weights)

        if torch.hub.get_dir().startswith("~"):  # there is no home folder
            torch.hub.set_dir(str(cache_folder() / "torch"))
        folder = Path(torch.hub.get_dir(), "checkpoints")
        try:
            self.net = local_first(get_model, folder / name)
        except (OSError, RuntimeError, ValueError) as e:
            raise UserError(f"--features torchvision-{name}: torchvision cannot fetch its weights "
                            f"({e}); put them into {folder} yourself")
        self.name = f"torchvision-{name}"
        self.prepare = weights.transforms()
        linear = [module for module in self.net.modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise UserError(f"--features torchvision-{name}: has no linear layer, whose input "
                            "would be its features; choose another")
        self.dim = linear[-1].in_features
        linear[-1].register_forward_pre_hook(self._remember)

    def _remember(self, module, inputs):
        self.features = inputs[0]

    def forward(self, images):
        """images (n, 1 or 3, H, W) uint8 -> features (n, dim), None."""
        x = self.prepare(images.expand(-1, 3, -1, -1))
        self.net(x)
        return self.features, None


class KerasResNet50(nn.Module):
    """The ImageNet ResNet-50 of Keras Applications; the 2,048 of its last pooling are the features.

    Images are resized bilinearly to 224x224. It is torchvision's network, but

        the stride of a block is that of its first convolution,
        the normalisation has eps 1e-3,
        the input is BGR less its mean,
        convolutions have biases, which are taken off the running means behind them here.

    weights: stem.conv.weight, layer2.0.a.bn.bias, layer2.0.proj.conv.bias, ...
    name: what to call them. Raises UserError when they do not fit.
    """

    dim = 2048
    spatial = None

    def __init__(self, weights, name):
        super().__init__()
        from torchvision.models import resnet50
        self.name = name
        net = resnet50()
        net.fc = nn.Identity()
        weights = keras_to_torchvision(weights)
        checkpoints.load_weights(net, weights, name, hint="it is not Keras's ResNet-50")
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 1e-3
            elif hasattr(module, "conv3"):  # a block
                first, second = module.conv1, module.conv2
                first.stride, second.stride = second.stride, first.stride
        self.net = net.eval()
        mean = torch.tensor([103.939, 116.779, 123.68]).view(1, 3, 1, 1)
        self.register_buffer("mean", mean, persistent=False)

    def forward(self, images):
        """images (n, 1 or 3, H, W) uint8 -> features (n, 2048), None."""
        x = images.expand(-1, 3, -1, -1).float()
        x = F.interpolate(x, (224, 224), mode="bilinear", antialias=True)
        return self.net(x.flip(1) - self.mean), None


def keras_to_torchvision(weights):
    """KerasResNet50's weights -> a state dict of torchvision's ResNet-50 without fc."""
    renamed = {}
    for key, value in weights.items():
        key = torchvision_key(key)
        if not key.startswith(("fc.", "mean")):
            renamed[key] = value.float()
    for key in list(renamed):
        if re.search(r"(conv\d|downsample\.0)\.bias$", key):
            behind = key.replace("conv", "bn").replace("downsample.0", "downsample.1")
            running_mean = behind.replace("bias", "running_mean")
            renamed[running_mean] = renamed[running_mean] - renamed.pop(key)
    return renamed


def torchvision_key(key):
    """"layer2.0.a.bn.bias" -> "layer1.0.bn1.bias", "stem.conv.weight" -> "conv1.weight"."""
    def stage(match):
        return f"layer{int(match[1]) - 1}"

    def number(match):
        return f"{match[2]}{'abc'.index(match[1]) + 1}"

    key = re.sub(r"^layer(\d)", stage, key)
    key = key.replace("stem.", "a.")
    key = key.replace("proj.conv", "downsample.0")
    key = key.replace("proj.bn", "downsample.1")
    return re.sub(r"\b([abc])\.(conv|bn)\b", number, key)


@user_errors()
def load_features(name="inception", resize="adm", device="cpu"):
    """The feature network that --features NAME means, on `device` and in eval mode.

    name    inception (fetched once), a file with its weights or those of Keras's ResNet-50,
            torchvision-NAME, digits-cnn or digits-mlp
    resize  how images reach Inception: a key of fid.RESIZE

    Raises UserError.
    """
    if name in ("digits-cnn", "digits-mlp"):
        kind = name.removeprefix("digits-")
        net = DigitsNet(kind)
        path = data.ASSETS / f"digits_{kind}.pt"
        net.load_state_dict(torch.load(path, weights_only=True))
    elif name.startswith("torchvision-"):
        net = TorchvisionNet(name.removeprefix("torchvision-"))
    elif name == "inception":
        net = fid.load_inception(None, resize)
    elif Path(name).is_file() or Path(name).suffix in (".pth", ".pt"):
        net = load_file(Path(name), resize)
    else:
        raise UserError(f"--features {name}: unknown; choose inception, a .pth file with its "
                        "weights, torchvision-NAME, digits-cnn or digits-mlp")
    return net.to(device).eval().requires_grad_(False)


def load_file(path, resize):
    """The network whose weights a file holds: Keras's ResNet-50, or Inception."""
    weights = fid.read_weights(path)
    if "stem.conv.weight" in weights:
        return KerasResNet50(weights, f"keras-resnet50-{fid.file_hash(path)[:8]}")
    return fid.load_inception(path, resize)


# ---- Sources of images -------------------------------------------------------------------------


def open_source(path, args, num=None):
    """The images of a named set, or what a checkpoint makes, as fid.Images.

    path    digits, mnist, fashion-mnist, cifar10 (num None: all; else a random choice of so many),
            or the file of a checkpoint (num None: 50,000)
    args    with seed for that choice; with nfe, cfg, seed, labels, uncond, sample_batch_size for
            the samples of a checkpoint

    Raises UserError.
    """
    if path in fid.SETS:
        dataset = data.load(path)
        x = dataset.x.permute(0, 2, 3, 1).numpy()
        return fid.images_from_array(path, x, dataset.y, num, args.seed)
    options = SampleOptions(seed=args.seed, nfe=args.nfe, cfg=args.cfg, labels=args.labels,
                            batch=args.sample_batch_size)
    return images_of_checkpoint(path, num or 50_000, options, Processes(), args.uncond)


def images_of_checkpoint(path, num, options, proc, uncond=None):
    """`num` samples of the pixel model in a checkpoint of ours, made as they are measured.

    options: SampleOptions. uncond: the checkpoint of the network that guides it, or None.
    Returns fid.Images, whose labels are those the samples were made for. Raises UserError, also
    while sampling.
    """
    if "format" not in checkpoints.read_file(path):
        raise UserError(f"{path} does not say how to sample it: do that with sample.py --model, "
                        "and give the .npz")
    net, spec = checkpoints.load_model(path)
    if spec["scale"] is not None:
        raise UserError(f"{path} makes latents, not images: sample them, decode them with the "
                        "model's autoencoder, and give the images")
    if uncond:
        guiding = proc.autocast(proc.frozen(sampling.load_uncond(uncond, spec)))
        options = replace(options, uncond=guiding)
    options = sampling.settle_options(options, spec, net)  # now, not when images are asked for
    denoise = proc.autocast(proc.frozen(net))

    def batches(rank, world, size):
        # rank and world are those of proc, by which sample_chunks shares the chunks out.
        for first, x, y in sampling.sample_chunks(denoise, spec, proc, num, options,
                                                  desc=Path(path).name):
            for i in range(0, len(x), size):
                yield first + i, data.to_uint8(x[i:i + size]), y[i:i + size]

    chosen = sampling.describe_labels(spec, options)
    guided = f" with {uncond}" if uncond else ""
    name = (f"{path}, NFE {options.nfe}, guidance {options.cfg:g}{guided}, seed {options.seed}"
            f"{chosen}")
    return fid.Images(name, num, batches)
