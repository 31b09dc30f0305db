"""Distances between sets of images: the Frechet distance, and the feature networks under it.

    python fid.py digits-net --kind cnn --seed 0 --out assets/digits_cnn.pt     # made the feature network of the digits
    python fid.py digits-net --kind mlp --seed 1 --out assets/digits_mlp.pt     # made the second one, the referee

Numbers from different feature networks are different quantities; every result names its network, its sample count and
its reference.
"""
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import runtime
from data import ASSETS, digits, sample_images, to_float
from runtime import UserError

# ---------------------------------------------------------------------------------------------------
# The Frechet distance
# ---------------------------------------------------------------------------------------------------


class Statistics:
    """Streamed mean and unbiased covariance of features in float64."""

    def __init__(self, dim, device="cpu"):
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.total = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features):
        """features (n, dim), any float dtype."""
        f = features.to(self.total)
        self.count += len(f)
        self.total += f.sum(0)
        self.outer += f.T @ f
        return self

    def result(self):
        """mean (dim,), covariance (dim, dim). Raises UserError below 2 samples."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 images, there are {int(self.count)}")
        mean = self.total / self.count
        return mean, (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), in float64.

    mu (d,), sigma (d, d) symmetric. The trace of the root is the sum of the roots of the eigenvalues of
    R^T sigma2 R with R R^T = sigma1: symmetric, so none is negative but by rounding, and singular covariances are fine.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(v, dtype=torch.float64) for v in (mu1, sigma1, mu2, sigma2))
    root, failed = torch.linalg.cholesky_ex(sigma1)
    if failed:
        values, vectors = torch.linalg.eigh(sigma1)
        root = vectors * values.clamp(min=0).sqrt()
    cross = torch.linalg.eigvalsh(root.T @ sigma2 @ root).clamp(min=0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross)


# ---------------------------------------------------------------------------------------------------
# Feature networks
# ---------------------------------------------------------------------------------------------------


class DigitsNet(nn.Module):
    """Small classifiers of the embedded digits; their 64 penultimate activations are the features.

    "cnn" is the network of all tables. "mlp" is another family, trained apart: a referee for results that were chosen with the first.
    """

    def __init__(self, kind):
        super().__init__()
        if kind == "cnn":
            self.body = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                                      nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(256, 64), nn.ReLU())
        else:
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.GELU())
        self.head = nn.Linear(64, 10)
        self.name, self.dim = f"digits-{kind}", 64

    def forward(self, x):
        """(n, 1, 8, 8) in [-1, 1] -> features (n, 64), logits (n, 10)."""
        f = self.body(x)
        return f, self.head(f)


def load_features(name):
    """The feature network of --features NAME: "digits-cnn" or "digits-mlp"."""
    kind = name.removeprefix("digits-")
    if kind not in ("cnn", "mlp"):
        raise UserError(f"feature network {name}: unknown; choose digits-cnn or digits-mlp")
    net = DigitsNet(kind)
    net.load_state_dict(torch.load(ASSETS / f"digits_{kind}.pt", weights_only=True))
    return net.eval().requires_grad_(False)


@torch.inference_mode()
def evaluate(images, labels, features="digits-cnn"):
    """Images (n, 1, 8, 8) uint8 and the labels (n,) they were made for, against all 1,797 real digits.

    Returns {"fd": Frechet distance of features, "accuracy": share of images that the network gives their label,
    "pixel_fd": Frechet distance of pixels in [-1, 1]}. One network can be fooled, hence the other two.
    """
    net, real = load_features(features), digits()
    if len(images) <= net.dim:
        print(f"warning: {len(images)} images for {net.dim} features: the covariance is singular, the distance says little")
    fake, real = to_float(torch.as_tensor(images)), to_float(real.x)
    f_fake, logits = net(fake)
    distance = lambda a, b: frechet_distance(*Statistics(a.shape[1]).update(a).result(), *Statistics(b.shape[1]).update(b).result())
    return {"fd": distance(f_fake, net(real)[0]), "accuracy": float((logits.argmax(1) == torch.as_tensor(labels)).double().mean()),
            "pixel_fd": distance(fake.flatten(1), real.flatten(1))}


def compare(entries, proc, num, seed, features="digits-cnn"):
    """Sample every entry {name: (net, info, nfe, cfg)} from the same noise and labels.

    Returns ({name: evaluate(...)}, {name: the first 40 images}), the same on every rank.
    """
    rows, images = {}, {}
    for name, (net, info, nfe, cfg) in entries.items():
        x, y = sample_images(net, info, proc, num, seed, nfe, cfg, desc=name)
        rows[name], images[name] = evaluate(x, y, features), x[:40]
    return rows, images


def table(metrics):
    """metrics.json -> the table that a method script prints."""
    head = f"{metrics['samples']} samples, {metrics['nfe']} steps, guidance {metrics['cfg']:g}; features {metrics['features']}, reference {metrics['reference']}"
    rows = {"before": metrics["before"], **metrics["controls"], f"after {metrics['method']}": metrics["after"]}
    lines = [head, f"{'':24}{'Frechet distance':>18}{'class accuracy':>16}{'pixel distance':>16}"]
    return "\n".join(lines + [f"{name:24}{r['fd']:18.2f}{r['accuracy']:16.3f}{r['pixel_fd']:16.3f}" for name, r in rows.items()])


def train_digits_net(kind, seed, out, epochs=60):
    """Train on the first 1,437 digits, print the accuracy on the last 360 (other writers), save float16 weights."""
    data, g = digits(), torch.Generator().manual_seed(seed)
    x, y = to_float(data.x), data.y
    torch.manual_seed(seed)
    net = DigitsNet(kind)
    opt = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 2e-3, total_steps=epochs * 15)
    for _ in range(epochs):
        for index in torch.randperm(1437, generator=g)[:1425].view(15, 95):
            noisy = x[index] + 0.2 * torch.randn(95, 1, 8, 8, generator=g)
            loss = F.cross_entropy(net(noisy)[1], y[index])
            opt.zero_grad()
            loss.backward()
            opt.step()
            schedule.step()
    net.eval()
    print(f"digits-{kind}: accuracy {(net(x[1437:])[1].argmax(1) == y[1437:]).double().mean():.3f} on the 360 held-out digits")
    torch.save({k: v.half() for k, v in net.state_dict().items()}, out)


def main(args):
    train_digits_net(args.kind, args.seed, args.out)


if __name__ == "__main__":
    p = runtime.Parser(description=__doc__.splitlines()[0])
    commands = p.add_subparsers(dest="command", required=True)
    c = commands.add_parser("digits-net", help="train a feature network of the digits")
    c.add_argument("--kind", choices=["cnn", "mlp"], default="cnn")
    c.add_argument("--seed", type=int, default=0)
    c.add_argument("--out", required=True)
    args = p.parse_args()
    runtime.run(main, args)
