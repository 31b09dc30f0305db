"""Diversity and the map from noise to image after distillation (supplement, section F and Table 5).

    python ddil.py && python experiments/ddil_diversity.py                            on what that made
    python experiments/ddil_diversity.py --lpips FOLDER A.pt B.pt                     FOLDER: vgg16_features_fp16.pth, lpips_v0.1_vgg_lin.pth

Diversity: mean distance between several images of one condition (here a class), over the conditions. Map: mean distance between the teacher's and
the student's image from the same noise, next to that between two images of the class from different noise: small means that the map was kept.
The distance is LPIPS (VGG-16, images enlarged to 64 pixels) where its weights are given, else the Euclidean distance of digits-cnn features;
the two are different quantities, and the table says which it shows.
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import checkpoints
import data
from features import load_features
from runtime import Processes


class LPIPS:
    """Learned perceptual distance v0.1 (Zhang et al. 2018), VGG-16: features normalised over channels, squared differences weighted and averaged."""

    name = "LPIPS (VGG-16)"

    def __init__(self, folder):
        import torchvision
        self.net = torchvision.models.vgg16().features.eval()
        self.net.load_state_dict({k: v.float() for k, v in torch.load(Path(folder) / "vgg16_features_fp16.pth", weights_only=True).items()})
        lin = torch.load(Path(folder) / "lpips_v0.1_vgg_lin.pth", weights_only=True)
        self.weights = [lin[f"lin{i}.model.1.weight"] for i in range(5)]
        self.ends = 3, 8, 15, 22, 29  # relu1_2, 2_2, 3_3, 4_3, 5_3

    def features(self, x):
        """x (n, C, H, W) in [-1, 1] -> five feature maps, each of unit length at every position and scaled by the root of its weights."""
        x = F.interpolate(x.expand(-1, 3, -1, -1), size=(64, 64), mode="bilinear") if x.shape[2] < 64 else x
        x = (x - torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
        maps = []
        for i, layer in enumerate(self.net):
            x = layer(x)
            if i in self.ends:
                maps.append(x / (x.norm(dim=1, keepdim=True) + 1e-10) * self.weights[len(maps)].sqrt() / (x.shape[2] * x.shape[3]) ** 0.5)
        return [m.flatten(1) for m in maps]

    def __call__(self, a, b):
        return sum((p - q).square().sum(1) for p, q in zip(a, b))


class Features:
    """Euclidean distance of the penultimate features of digits-cnn."""

    name = "distance of digits-cnn features"

    def __init__(self):
        self.net = load_features("digits-cnn")

    def features(self, x):
        return [self.net(data.to_uint8(x))[0]]

    def __call__(self, a, b):
        return (a[0] - b[0]).norm(dim=1)


@torch.no_grad()
def main(args):
    proc, metric = Processes("off"), LPIPS(args.lpips) if args.lpips else Features()
    images, n, pick = {}, args.per_class, lambda maps, rows: [m[rows] for m in maps]
    for name, path, nfe in [("teacher, 32 steps", args.teacher, 32)] + [(p, p, None) for p in args.students]:
        net, info = checkpoints.load_model(path)
        x, y = data.sample_images(proc.mixed(proc.frozen(net)), info, proc, n * max(info["classes"], 1), args.seed, nfe, desc=name)
        images[name] = metric.features(data.to_float(torch.from_numpy(x)))
    y = torch.from_numpy(y)
    i, j = torch.triu_indices(len(y), len(y), 1)
    i, j = i[y[i] == y[j]], j[y[i] == y[j]]
    teacher, rows = images["teacher, 32 steps"], {}
    for name, maps in images.items():
        rows[name] = float(metric(pick(maps, i), pick(maps, j)).mean()), float(metric(teacher, maps).mean()), float(metric(pick(teacher, i), pick(maps, j)).mean())
    print(f"{n} images of each of {int(y.max()) + 1} classes, {metric.name}\n{'':32}{'diversity':>12}{'to teacher, same noise':>26}{'other noise':>14}")
    for name, row in rows.items():
        print(f"{name[-30:]:32}" + "".join(f"{v:{w}.3f}" for v, w in zip(row, (12, 26, 14))))
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return print("no picture: pip install matplotlib")
    fig, axis = plt.subplots(figsize=(7, 4))
    for k, label in enumerate(("diversity", "to the teacher, same noise", "to the teacher, other noise")):
        axis.bar([v + 0.27 * k for v in range(len(rows))], [r[k] for r in rows.values()], 0.25, label=label)
    axis.set_xticks([v + 0.27 for v in range(len(rows))], [r[-20:] for r in rows], rotation=20)
    axis.set_ylabel(metric.name)
    axis.legend()
    fig.tight_layout()
    fig.savefig(args.out)
    print(f"drawn: {args.out}")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("students", nargs="*", default=[f"runs/ddil/nfe{n}.pt" for n in (8, 4, 2)])
    p.add_argument("--teacher", default="runs/teacher-digits-v/last.pt")
    p.add_argument("--lpips", help="folder with the LPIPS weights")
    p.add_argument("--per-class", type=int, default=30)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", default="ddil_diversity.png")
    main(p.parse_args())
