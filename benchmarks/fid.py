"""Ratios of fid.py: the Frechet distance, Inception features, the memory of precision and recall.

    python benchmarks/fid.py                about three minutes on two CPU cores
    python benchmarks/fid.py --pr 50000     precision and recall of 50,000 x 50,000 images:
                                            five minutes more

The network has random weights: its speed does not depend on them. Times are medians. Everything
runs in one process, in turn.
"""
import argparse
import resource
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import scipy
import torch
import torchvision
from issd_step import seconds

sys.path.insert(0, str(Path(__file__).parents[1]))  # before this folder, which has a fid.py, too
import fid
from kit.processes import Processes

DIM = 2048


# ---- Frechet distance --------------------------------------------------------------------------


def frechet(proc, repeats, n=3000):
    """Against scipy's root of the product, as the FID tools call it, and the exact value."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -2, DIM, dtype=torch.float64)
    x = torch.randn(n, DIM, generator=generator, dtype=torch.float64) * scale
    y = torch.randn(n, DIM, generator=generator, dtype=torch.float64) * scale.flip(0)
    mu1, sigma1 = fid.Statistics(DIM).update(x).result()
    mu2, sigma2 = fid.Statistics(DIM).update(y).result()
    moments = [v.to(proc.device) for v in (mu1, sigma1, mu2, sigma2)]

    def ours():
        return fid.frechet_distance(*moments)

    def tool():
        return scipy_distance(mu1, sigma1.numpy(), mu2, sigma2.numpy())

    t = seconds(repeats, proc, ours=ours, scipy=tool)
    exact = exact_distance(x, y)
    ratio = t["scipy"].median() / t["ours"].median()
    error, their_error = abs(ours() / exact - 1), abs(tool() / exact - 1)
    print(f"Frechet distance, {DIM} features: {ratio:.1f} times as fast as scipy "
          f"{scipy.__version__}'s sqrtm of the product; relative error {error:.1e}, "
          f"there {their_error:.1e}")


def scipy_distance(mu1, sigma1, mu2, sigma2):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        product = sigma1.dot(sigma2)
        try:
            root = scipy.linalg.sqrtm(product, disp=False)[0]
        except TypeError:  # scipy 1.18 has no disp
            root = scipy.linalg.sqrtm(product)
    traces = np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root).real
    return float((mu1 - mu2).square().sum()) + traces


def exact_distance(x, y):
    """Between Gaussians fitted to x (n, d) and y (n, d), by the nuclear norm of the centred data.
    """
    mean_x, mean_y = x.mean(0), y.mean(0)
    a, b = x - mean_x, y - mean_y
    squares = a.square().sum() + b.square().sum()
    nuclear = torch.linalg.svdvals(a @ b.T).sum()
    return float((mean_x - mean_y).square().sum() + (squares - 2 * nuclear) / (len(x) - 1))


# ---- Inception features ------------------------------------------------------------------------


def extraction(proc, repeats, batch):
    """At 299 pixels, against the same network as plain float32 eager code with separate batch
    norm."""
    torch.manual_seed(0)
    net = torchvision.models.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    weights = net.state_dict()
    plain = fid.Inception(weights, "x", "adm").to(proc.device)
    folded = fid.Inception(weights, "x", "adm").fold().to(proc.device)
    images = torch.randint(0, 256, (batch, 299, 299, 3), dtype=torch.uint8)
    images = images.to(proc.device).permute(0, 3, 1, 2)

    @torch.no_grad()
    def without():
        return plain(images.contiguous())

    @torch.inference_mode()
    def ours():
        return folded(images)

    with fid.full_precision():
        t = seconds(repeats, proc, plain=without, ours=ours)
        largest = 0
        for p, q in zip(without(), ours()):
            largest = max(largest, float((p - q).abs().max() / p.abs().max()))
    ratio = t["plain"].median() / t["ours"].median()
    print(f"Inception features, batch {batch}: {ratio:.2f} times as fast as plain; they differ by "
          f"{largest:.1e} of the largest")


# ---- Precision and recall ----------------------------------------------------------------------


def memory(proc, n):
    """Peak memory of precision and recall beyond its inputs."""
    cuda = proc.device.type == "cuda"

    def peak():
        if cuda:
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    sides = []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        sides.append(torch.randn(n, DIM, generator=generator).to(proc.device))
    before = torch.cuda.memory_allocated() if cuda else peak()
    began = time.perf_counter()
    precision, recall = fid.precision_recall(*sides, quiet=False)
    minutes = (time.perf_counter() - began) / 60
    beyond = (peak() - before) / 2 ** 30
    inputs = 2 * sides[0].numel() * 4 / 2 ** 30
    print(f"precision and recall, {n:,} x {n:,} x {DIM}: {beyond:.2f} GiB beyond the inputs of "
          f"{inputs:.2f} GiB, {minutes:.1f} minutes; precision {precision:.4f}, "
          f"recall {recall:.4f}")


def main(args):
    proc = Processes("off")
    memory(proc, args.pr)  # first, while the peak is low
    extraction(proc, args.repeats, args.batch_size)
    frechet(proc, args.repeats)


def parser():
    what, _, details = __doc__.partition("\n\n")
    p = argparse.ArgumentParser(description=what, epilog=details,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--pr", type=int, default=10_000, metavar="N",
                   help="samples on each side for precision and recall (default: %(default)s)")
    p.add_argument("--batch-size", type=int, default=8, metavar="N",
                   help="images per forward of Inception (default: %(default)s)")
    p.add_argument("--repeats", type=int, default=5, metavar="N",
                   help="of each measurement (default: %(default)s)")
    return p


if __name__ == "__main__":
    main(parser().parse_args())
