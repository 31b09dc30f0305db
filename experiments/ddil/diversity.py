"""Diversity and the map from noise to image after distillation (supplement, section F, Table 5).

    python ddil.py && python -m experiments.ddil.diversity       on what that made
    python -m experiments.ddil.diversity --lpips FOLDER A.pt B.pt

FOLDER holds vgg16_features_fp16.pth and lpips_v0.1_vgg_lin.pth.

Diversity: the mean distance between several images of one condition (here a class), averaged over
the conditions. Map: the mean distance between the teacher's and the student's image from the same
noise, beside that between two images of the class from different noise. A small value means that
the student kept the map.

The distance is LPIPS (VGG-16, images enlarged to 64 pixels) where its weights are given, else the
Euclidean distance of digits-cnn features. The two are different quantities, and the table says
which one it shows.
"""
import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from experiments import figures
from kit import data
from kit.checkpoints import load_model
from kit.features import load_features
from kit.processes import Processes
from kit.sampling import SampleOptions, sample_images

TEACHER_NFE = 32
SIZE = 64  # pixels of an image for LPIPS, at least


class LPIPS:
    """Learned perceptual distance v0.1 (Zhang et al. 2018), VGG-16.

    Features are normalised over channels; their squared differences are weighted and averaged.
    """

    name = "LPIPS (VGG-16)"
    ends = (3, 8, 15, 22, 29)  # relu1_2, 2_2, 3_3, 4_3, 5_3

    def __init__(self, folder):
        import torchvision
        self.net = torchvision.models.vgg16().features.eval()
        half = torch.load(Path(folder) / "vgg16_features_fp16.pth", weights_only=True)
        self.net.load_state_dict({key: value.float() for key, value in half.items()})
        lin = torch.load(Path(folder) / "lpips_v0.1_vgg_lin.pth", weights_only=True)
        self.weights = [lin[f"lin{i}.model.1.weight"] for i in range(len(self.ends))]
        self.mean = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
        self.std = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)

    def features(self, x):
        """x (n, C, H, W) in [-1, 1] -> five tensors (n, D).

        Each is a feature map of unit length at every position, scaled by the root of its weights,
        so that their squared distance is LPIPS.
        """
        if x.shape[2] < SIZE:
            x = F.interpolate(x.expand(-1, 3, -1, -1), size=(SIZE, SIZE), mode="bilinear")
        x = (x - self.mean) / self.std
        maps = []
        for i, layer in enumerate(self.net):
            x = layer(x)
            if i in self.ends:
                unit = x / (x.norm(dim=1, keepdim=True) + 1e-10)
                root = self.weights[len(maps)].sqrt() / (x.shape[2] * x.shape[3]) ** 0.5
                maps.append((unit * root).flatten(1))
        return maps

    def __call__(self, a, b):
        """Features of n pairs of images -> distances (n,)."""
        return sum((p - q).square().sum(1) for p, q in zip(a, b))


class DigitsFeatures:
    """Euclidean distance of the penultimate features of digits-cnn."""

    name = "distance of digits-cnn features"

    def __init__(self):
        self.net = load_features("digits-cnn")

    def features(self, x):
        """x (n, 1, 8, 8) in [-1, 1] -> one tensor (n, 64)."""
        return [self.net(data.to_uint8(x))[0]]

    def __call__(self, a, b):
        """Features of n pairs of images -> distances (n,)."""
        return (a[0] - b[0]).norm(dim=1)


@dataclass
class Distances:
    """A row of the table: mean distances."""

    diversity: float    # between images of a class
    same_noise: float   # to the teacher's image of the same noise
    other_noise: float  # to the teacher's image of the class from other noise


def features_of(file, nfe, metric, args):
    """Samples of a checkpoint -> their features, their labels (n,); nfe None: its own."""
    proc = Processes("off")
    net, spec = load_model(file)
    num = args.per_class * max(spec["classes"], 1)
    options = SampleOptions(seed=args.seed, nfe=nfe)
    net = proc.autocast(proc.frozen(net))
    images, labels = sample_images(net, spec, proc, num, options, file)
    return metric.features(data.to_float(torch.from_numpy(images))), torch.from_numpy(labels)


def compare(metric, teacher, features, labels):
    """-> Distances. All pairs of two images of one class."""
    i, j = torch.triu_indices(len(labels), len(labels), 1)
    same_class = labels[i] == labels[j]
    i, j = i[same_class], j[same_class]

    def mean_over_pairs(first):
        of_first = [f[i] for f in first]
        return float(metric(of_first, [f[j] for f in features]).mean())

    return Distances(mean_over_pairs(features), float(metric(teacher, features).mean()),
                     mean_over_pairs(teacher))


def print_table(rows, metric, args, classes):
    print(f"{args.per_class} images of each of {classes} classes, {metric.name}")
    print(f"{'':32}{'diversity':>12}{'to teacher, same noise':>26}{'other noise':>14}")
    for name, row in rows.items():
        print(f"{name[-30:]:32}{row.diversity:12.3f}{row.same_noise:26.3f}{row.other_noise:14.3f}")


def draw(file, rows, metric):
    bars = {"diversity": "diversity", "same_noise": "to the teacher, same noise",
            "other_noise": "to the teacher, other noise"}
    try:
        with figures.figure(file, "", metric.name) as axes:
            for k, (key, label) in enumerate(bars.items()):
                places = [place + 0.27 * k for place in range(len(rows))]
                axes.bar(places, [getattr(row, key) for row in rows.values()], 0.25, label=label)
            axes.set_xticks([place + 0.27 for place in range(len(rows))],
                            [name[-20:] for name in rows], rotation=20)
            axes.set_ylim(0, 1.35 * axes.get_ylim()[1])  # the legend stands above the bars
    except ImportError as error:
        print(f"no picture: {error}")
        return
    print(f"drawn: {file}")


@torch.no_grad()
def main(args):
    metric = LPIPS(args.lpips) if args.lpips else DigitsFeatures()
    teacher, labels = features_of(args.teacher, TEACHER_NFE, metric, args)
    rows = {f"teacher, {TEACHER_NFE} steps": compare(metric, teacher, teacher, labels)}
    for student in args.students:
        features, labels = features_of(student, None, metric, args)
        rows[student] = compare(metric, teacher, features, labels)
    print_table(rows, metric, args, classes=int(labels.max()) + 1)
    draw(args.out, rows, metric)


def parser():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("students", nargs="*", metavar="CKPT",
                   default=[f"runs/ddil/nfe{n}.pt" for n in (8, 4, 2)])
    p.add_argument("--teacher", metavar="CKPT", default="runs/teacher-digits-v/last.pt")
    p.add_argument("--lpips", metavar="FOLDER", help="folder with the LPIPS weights")
    p.add_argument("--per-class", type=int, default=30, help="images per class (default: 30)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", default="ddil_diversity.png", help="the picture")
    return p


if __name__ == "__main__":
    main(parser().parse_args())
