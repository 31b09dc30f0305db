"""Ratios of the evaluator: the Frechet distance, Inception features, and the memory of precision and recall.

    python benchmarks/fid.py                          about three minutes on two CPU cores
    python benchmarks/fid.py --pr 50000               precision and recall of 50,000 x 50,000 x 2,048: five minutes more

The network has random weights (its speed does not depend on them). Times are medians, everything in one process, interleaved.
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

sys.path.insert(0, str(Path(__file__).parents[1]))
import features
import fid
from runtime import Processes


def frechet(proc, repeats, d=2048, n=3000):
    """Against scipy's square root of the product, as the FID tools call it, and against the nuclear norm of the centred data."""
    g = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -2, d, dtype=torch.float64)
    x, y = (torch.randn(n, d, generator=g, dtype=torch.float64) * s for s in (scale, scale.flip(0)))
    a, b = ([v.to(proc.device) for v in fid.Statistics(d).update(z).result()] for z in (x, y))
    s1, s2 = (v.cpu().numpy() for v in (a[1], b[1]))

    def tool():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            product = s1.dot(s2)
            try:
                root = scipy.linalg.sqrtm(product, disp=False)[0]
            except TypeError:  # scipy 1.18 has no disp
                root = scipy.linalg.sqrtm(product)
        return float((a[0] - b[0]).square().sum()) + np.trace(s1) + np.trace(s2) - 2 * np.trace(root).real

    centred = [z - z.mean(0) for z in (x, y)]
    nuclear = torch.linalg.svdvals(centred[0] @ centred[1].T).sum() / (n - 1)
    exact = float((x.mean(0) - y.mean(0)).square().sum() + sum(z.square().sum() for z in centred) / (n - 1) - 2 * nuclear)
    t = seconds(repeats, proc, ours=lambda: fid.frechet_distance(*a, *b), scipy=tool)
    print(f"Frechet distance, {d} features: {t['scipy'].median() / t['ours'].median():.1f} times as fast as scipy {scipy.__version__}'s sqrtm of the product; "
          f"relative error {abs(fid.frechet_distance(*a, *b) / exact - 1):.1e}, there {abs(tool() / exact - 1):.1e}")


def extraction(proc, repeats, batch):
    """At 299 px, against the same network as plain float32 eager code with separate batch norm."""
    torch.manual_seed(0)
    weights = {k: v for k, v in torchvision.models.Inception3(num_classes=1008, aux_logits=False, init_weights=False).state_dict().items()}
    plain, folded = features.Inception(dict(weights), "x", "adm").to(proc.device), features.Inception(dict(weights), "x", "adm").fold().to(proc.device)
    images = torch.randint(0, 256, (batch, 299, 299, 3), dtype=torch.uint8).to(proc.device).permute(0, 3, 1, 2)
    with fid.full_precision():
        t = seconds(repeats, proc, plain=torch.no_grad()(lambda: plain(images.contiguous())), ours=torch.inference_mode()(lambda: folded(images)))
        with torch.no_grad():
            differ = max(float((p - q).abs().max() / p.abs().max()) for p, q in zip(plain(images), folded(images)))
    print(f"Inception features, batch {batch}: {t['plain'].median() / t['ours'].median():.2f} times as fast as plain; they differ by {differ:.1e} of the largest")


def memory(proc, n, d=2048):
    """Peak memory of precision and recall beyond its inputs."""
    real, fake = (torch.randn(n, d, generator=torch.Generator().manual_seed(s)).to(proc.device) for s in (0, 1))
    cuda = proc.device.type == "cuda"
    peak = lambda: torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    before, began = torch.cuda.memory_allocated() if cuda else peak(), time.perf_counter()
    precision, recall = fid.precision_recall(real, fake, quiet=False)
    print(f"precision and recall, {n:,} x {n:,} x {d}: {(peak() - before) / 2 ** 30:.2f} GiB beyond the inputs of {2 * real.numel() * 4 / 2 ** 30:.2f} GiB, "
          f"{(time.perf_counter() - began) / 60:.1f} minutes; precision {precision:.4f}, recall {recall:.4f}")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--pr", type=int, default=10_000, help="samples on each side for precision and recall")
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--repeats", type=int, default=5)
    args = p.parse_args()
    proc = Processes("off")
    memory(proc, args.pr)  # first, while the peak is low
    extraction(proc, args.repeats, args.batch_size)
    frechet(proc, args.repeats)
