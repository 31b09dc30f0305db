"""FID, sFID, Inception Score, precision and recall as the ADM evaluator defines them, without TensorFlow, on all ranks.

    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz                           against ADM's reference batch
    torchrun --nproc_per_node 8 fid.py A B                                              the same numbers, sooner
    python fid.py ref PATH/TO/imagenet/train --image-size 256 --out stats.npz           makes a reference
    python fid.py runs/issd/last.pt digits --num-samples 2000 --features digits-cnn     samples a checkpoint and measures it

A (the samples) and B (the reference) are each a folder of images, an .npz of images (arr_0: uint8, NHWC), an .npz of
statistics (from `ref`, an ADM reference batch, or mu and sigma of another tool), a checkpoint of a pixel model, or digits, mnist,
fashion-mnist, cifar10.

Numbers from different feature networks are different quantities, and so are numbers from differently resized images. The
network and the resizing make up the name that is printed with every result and stored in every file of statistics:

    inception-2015-12-05/adm            the default: TensorFlow 1's bilinear resizing, as the ADM evaluator; fetched once (95 MB)
    inception-2015-12-05/pytorch-fid    --resize pytorch-fid: that tool's bilinear resizing
    torchvision-resnet50, ...           --features torchvision-NAME: any classifier of torchvision
    keras-resnet50-HASH                 --features FILE: the weights of Keras Applications' ResNet-50
    digits-cnn, digits-mlp              --features digits-cnn: small classifiers of the embedded digits

The Inception Score is taken over chunks of 5,000 samples in their order, as published: samples should
not be sorted by class. Folders are read in alphabetical order, sub-folders included.

Differences from the ADM evaluator: distances for precision and recall are exact instead of half precision; the Frechet distance needs
no matrix square root and is right for singular covariances; a reference of more than 10,000 images keeps for
precision and recall the 10,000 whose pixels have the smallest hash, whatever their order.
"""
import hashlib
import json
import math
import os
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import runtime
from data import digits, to_float
from features import RESIZE, in_slices, load_features, open_images
from runtime import Processes, UserError, bar, say

# ---- Metrics: plain functions on arrays -------------------------------------------------------------


class Statistics:
    """Streamed mean and unbiased covariance of features in float64."""

    def __init__(self, dim, device="cpu"):
        where = dict(dtype=torch.float64, device=device)
        self.count, self.total, self.outer = torch.zeros((), **where), torch.zeros(dim, **where), torch.zeros(dim, dim, **where)

    def update(self, features):
        """features (n, dim), any float dtype."""
        f = features.to(self.total)
        self.count += len(f)
        self.total += f.sum(0)
        self.outer += f.T @ f
        return self

    def reduce(self, proc):
        """Sum over ranks."""
        for t in (self.count, self.total, self.outer):
            proc.sum(t)
        return self

    def result(self):
        """mean (dim,), covariance (dim, dim). Raises UserError below 2 samples."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 images, there are {int(self.count)}")
        mean = self.total / self.count
        return mean, (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), in float64, on the device of what is given.

    mu (d,), sigma (d, d) symmetric, finite. With R_i R_i^T = sigma_i the trace of the root is the sum of the singular values of R_1^T R_2.
    Singular covariances are fine; a warning tells of a rank below the number of features that vary at all.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(v, dtype=torch.float64) for v in (mu1, sigma1, mu2, sigma2))
    if not len(mu1) == len(mu2) == len(sigma1) == len(sigma2):
        raise UserError(f"a distance between {len(mu1)} and {len(mu2)} features does not exist; use the same network for both")
    root1, root2 = square_root(sigma1), square_root(sigma2)
    for sigma, root in ((sigma1, root1), (sigma2, root2)):
        varying = int((sigma.diagonal() > 1e-14 * sigma.diagonal().max()).sum())
        if root.shape[1] < varying:
            warnings.warn(f"a covariance of {varying} features has rank {root.shape[1]}: too few images for a distance that says much", stacklevel=2)
    cross = root1.T @ root2
    gram = cross @ cross.T if len(cross) <= cross.shape[1] else cross.T @ cross
    trace = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace)


def square_root(sigma):
    """R (d, rank) with R R^T = sigma: a Cholesky factor where there is one, else from the eigenvectors above rounding."""
    root, failed = torch.linalg.cholesky_ex(sigma)
    pivots = root.diagonal()
    if not failed and pivots.min() > 1e-7 * pivots.max():
        return root
    values, vectors = torch.linalg.eigh(sigma)
    keep = values > len(values) * torch.finfo(values.dtype).eps * values.max()
    return vectors[:, keep] * values[keep].sqrt()


def inception_score(logits, split=5000):
    """exp of the mean KL(p(y|x) || p(y)) over chunks of `split` images in their order, averaged over chunks.

    logits (n, classes): the published score takes the 1,008 logits of the FID Inception network without their bias.
    """
    scores = []
    for part in torch.as_tensor(logits).split(split):
        logp = part.double().log_softmax(1)
        marginal = logp.logsumexp(0) - np.log(len(part))
        scores.append((logp.exp() * (logp - marginal)).sum(1).mean().exp())
    return float(torch.stack(scores).mean())


def precision_recall(real, fake, k=3, block=4096, quiet=True):
    """Improved precision and recall (Kynkaanniemi et al. 2019), block by block: -> (precision, recall).

    real (n, d), fake (m, d). A sample counts as covered by a set when it lies within the distance of one of the set's points to that
    point's k-th neighbour in the set. precision: the share of fake covered by real; recall: the other way round. Memory beyond the inputs
    does not depend on n and m.
    """
    real, fake = torch.as_tensor(real), torch.as_tensor(fake)
    if min(len(real), len(fake)) <= k:
        raise UserError(f"precision and recall with {k} neighbours need more than {k} images on each side, there are {len(real)} and {len(fake)}")
    parts = lambda x: [slice(i, i + block) for i in range(0, len(x), block)]

    def distances(a, b):
        """Squared, (n, m). important! float64, and no rounding noise around 0: equal pairs must give equal distances for `<=` to mean something."""
        a, b = a.double(), b.double()
        norms = a.square().sum(1)[:, None] + b.square().sum(1)
        d = torch.addmm(norms, a, b.T, alpha=-2)
        return d.masked_fill_(d < 1e-11 * norms, 0).float()

    r, f = len(parts(real)), len(parts(fake))
    progress = tqdm(total=(r * (r + 1) + f * (f + 1)) // 2 + r * f, desc="precision and recall", disable=quiet, leave=False, mininterval=0.3 if sys.stderr.isatty() else 10)

    def radii(x):
        nearest = torch.full((len(x), k + 1), torch.inf, device=x.device)  # with itself
        keep = lambda rows, d: nearest[rows].copy_(torch.cat([nearest[rows], d], 1).topk(k + 1, largest=False).values)
        for i, rows in enumerate(parts(x)):
            for columns in parts(x)[i:]:
                d = distances(x[rows], x[columns])
                keep(rows, d)
                if columns != rows:
                    keep(columns, d.T)
                progress.update()
        return nearest[:, k]

    radius_real, radius_fake = radii(real), radii(fake)
    precise, recalled = (torch.zeros(len(x), dtype=torch.bool, device=x.device) for x in (fake, real))
    for i in parts(real):
        for j in parts(fake):
            d = distances(real[i], fake[j])
            precise[j] |= (d <= radius_real[i, None]).any(0)
            recalled[i] |= (d <= radius_fake[j]).any(1)
            progress.update()
    progress.close()
    return float(precise.double().mean()), float(recalled.double().mean())


# ---- Measuring --------------------------------------------------------------------------------------

REFERENCE = 10_000  # images of a reference kept for precision and recall, as in ADM's reference batches


@contextmanager
def full_precision():
    """No TF32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


@torch.no_grad()
def measure(images, net, proc, batch=64, keep=None, quiet=False):
    """Run all images through net, on all ranks; the same result on each of them. Returns a dict:

    name, count, features (the network's name); mu, sigma of the features; mu_s, sigma_s of the spatial ones, where there are any; kept: at most
    `keep` features (n, dim) for precision and recall; complete: they are all; labels (n,), where the images have them, all were kept and net can tell them.
    """
    keep = min(keep or images.count, images.count)
    plain, spatial = Statistics(net.dim, proc.device), Statistics(net.spatial or 1, proc.device)
    keys, kept, labels = [np.empty(0, np.uint64)], [torch.empty(0, net.dim, device=proc.device)], [torch.empty(0, dtype=torch.long)]
    with bar(proc, images.count, "features of " + Path(images.name.split(",")[0]).name, quiet=quiet) as progress, full_precision():
        for first, x, y in images.batches(proc, batch):
            if keep == images.count:  # all, in their order
                keys.append(np.arange(first, first + len(x), dtype=np.uint64))
            else:  # those with the smallest hash of their pixels: the same ones in any order
                keys.append(np.array([int.from_bytes(hashlib.blake2b(v.tobytes(), digest_size=8).digest(), "big") for v in x.cpu().permute(0, 2, 3, 1).numpy()], np.uint64))
            with torch.inference_mode():
                f, s = net(x.to(proc.device, non_blocking=True))
            plain.update(f)
            if net.spatial:
                spatial.update(s)
            kept.append(f)
            if y is not None:
                labels.append(y.cpu())
            if sum(map(len, keys)) > keep + max(keep, 1000):
                keys, kept = smallest(keep, keys, kept)
            progress.update(min(len(x) * proc.world, images.count - progress.n))
    if keep < images.count:
        keys, kept = smallest(keep, keys, kept)
    everyone = lambda parts: [proc.gather([(proc.rank, part)]) for part in parts]
    keys, kept, labels = everyone([np.concatenate(keys), torch.cat(kept).cpu().numpy(), torch.cat(labels).cpu().numpy()])
    order = np.argsort(keys, kind="stable")[:keep]
    out = {"name": images.name, "count": images.count, "features": net.name, "kept": kept[order], "complete": keep == images.count}
    out["mu"], out["sigma"] = plain.reduce(proc).result()
    if net.spatial:
        out["mu_s"], out["sigma_s"] = spatial.reduce(proc).result()
    if hasattr(net, "classify") and len(labels) == len(order) == images.count:
        out["labels"] = labels[order]
    if not out["mu"].isfinite().all():
        raise UserError(f"{images.name}: features are not finite; look at the weights of {net.name}")
    return out


def smallest(n, keys, rows):
    """Lists of arrays and of tensors -> the rows with the n smallest keys, in the order of their keys, as lists of one."""
    keys, rows = np.concatenate(keys), torch.cat(rows)
    order = np.argsort(keys, kind="stable")[:n]
    return [keys[order]], [rows[torch.from_numpy(order).to(rows.device)]]


def distances(a, b, net=None, device="cpu", quiet=True):
    """What measure() or open_statistics() gave for samples and reference -> {"fd", "sfd", "is", "precision", "recall", "accuracy"}, those that exist."""
    t = lambda v: torch.as_tensor(v, device=device)
    row = {"fd": frechet_distance(*(t(m[k]) for m in (a, b) for k in ("mu", "sigma")))}
    if "mu_s" in a and "mu_s" in b:
        row["sfd"] = frechet_distance(*(t(m[k]) for m in (a, b) for k in ("mu_s", "sigma_s")))
    if "kept" in a and "kept" in b:
        if hasattr(net, "logits") and a["complete"]:
            row["is"] = inception_score(net.logits(t(a["kept"])))
        if min(len(a["kept"]), len(b["kept"])) > 3:
            row["precision"], row["recall"] = precision_recall(t(b["kept"]), t(a["kept"]), quiet=quiet)
        else:
            warnings.warn("precision and recall need more than 3 images on each side and are left out", stacklevel=2)
    if "labels" in a:
        with full_precision():
            row["accuracy"] = float((net.classify(t(a["kept"])).argmax(1) == t(a["labels"])).double().mean())
    return row


def evaluate(images, labels, proc, features="digits-cnn"):
    """What the method scripts call: images (n, 1, 8, 8) uint8 and the labels (n,) they were made for, against all 1,797 real digits.

    Returns {"fd": Frechet distance of features, "precision", "recall", "accuracy": share of images that the network gives their label,
    "pixel_fd": Frechet distance of pixels in [-1, 1]}. One network can be fooled, hence the last.
    """
    net, real, fake = load_features(features, device=proc.device), digits(), data.Pixels(images, labels, 10, False, "samples")
    measured = [measure(in_slices(x.name, x.x.permute(0, 2, 3, 1).numpy(), x.y), net, proc, batch=1000, quiet=True) for x in (fake, real)]
    row = distances(*measured, net, proc.device)
    row["pixel_fd"] = frechet_distance(*(v for x in (fake, real) for v in Statistics(64).update(to_float(x.x).flatten(1)).result()))
    return row


def compare(entries, proc, num, seed, features="digits-cnn"):
    """Sample every entry {name: (net, info, nfe, cfg)} from the same noise and labels.

    Returns ({name: evaluate(...)}, {name: the first 40 images}), the same on every rank.
    """
    rows, images = {}, {}
    for name, (net, info, nfe, cfg) in entries.items():
        x, y = data.sample_images(net, info, proc, num, seed, nfe, cfg, desc=name)
        rows[name], images[name] = evaluate(x, y, proc, features), x[:40]
    return rows, images


def summary(metrics):
    """metrics.json -> what a method script prints."""
    head = f"{metrics['samples']} samples, NFE {metrics['nfe']}, guidance {metrics['cfg']:g}; features {metrics['features']}, reference {metrics['reference']}"
    before = {"before": metrics["before"]} if metrics["before"] else {}  # a model from scratch has none
    return f"{head}\n{table({**before, **metrics['controls'], 'after ' + metrics['method']: metrics['after']}, metrics['features'])}"


def table(rows, features):
    """{name: distances(...)} -> lines of a table. Only numbers from the FID Inception network are called FID."""
    fd = "FID" if features.startswith("inception-2015-12-05/") else "FD"
    heads = {"fd": (fd, 2), "sfd": ("s" + fd, 2), "is": ("Inception Score", 2), "precision": ("precision", 3), "recall": ("recall", 3),
             "accuracy": ("class accuracy", 3), "pixel_fd": ("pixel distance", 3)}
    heads = {k: h for k, h in heads.items() if any(k in r for r in rows.values())}
    width = {k: max(len(h), 7) + 3 for k, (h, _) in heads.items()}
    first = max(24, *(len(name) for name in rows))
    lines = [" " * first + "".join(f"{h:>{width[k]}}" for k, (h, _) in heads.items())]
    return "\n".join(lines + [f"{name:{first}}" + "".join(f"{r[k]:{width[k]}.{d}f}" for k, (_, d) in heads.items()) for name, r in rows.items()])


# ---- Command line -----------------------------------------------------------------------------------


def open_statistics(statistics, path, unnamed):
    """The arrays of an .npz -> what measure() returned when they were made. unnamed: the resizing of files that do not say it."""
    made = str(statistics["features"]) if "features" in statistics else None
    if made is None:
        resize = "adm" if "mu_s" in statistics else unnamed  # only ADM's reference batches carry spatial statistics without a name
        if resize is None:
            raise UserError(f"{path} does not say which resizing made it: add --unnamed adm (ADM, EDM and other TensorFlow-like tools) or --unnamed pytorch-fid")
        made = f"inception-2015-12-05/{resize}"
    count = np.asarray(statistics.get("count", 0))
    if count.ndim or count.dtype.kind not in "iu":
        raise UserError(f"{path}: count is {count.dtype} {count.shape}; want an integer")
    out = {"name": path, "features": made, "count": int(count) or None}
    out.update({k: np.asarray(statistics[k]) for k in ("mu", "sigma", "mu_s", "sigma_s", "kept", "complete") if k in statistics})
    for mu, sigma in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if mu in out:
            m, s = out[mu], out.get(sigma, np.empty(0))
            if m.ndim != 1 or not len(m) or s.shape != (len(m), len(m)) or m.dtype.kind != "f" or s.dtype.kind != "f":
                raise UserError(f"{path}: {mu} is {m.dtype} {m.shape}, {sigma} {s.dtype} {s.shape}; want floats (d,) and (d, d)")
            if not (np.isfinite(m).all() and np.isfinite(s).all() and np.allclose(s, s.T, atol=1e-6 * np.abs(s).max())):
                raise UserError(f"{path}: {mu} or {sigma} is not finite, or {sigma} not symmetric; make it again")
    if "kept" in out and (out["kept"].ndim != 2 or out["kept"].shape[1] != len(out["mu"]) or out["kept"].dtype.kind != "f" or not np.isfinite(out["kept"]).all()):
        raise UserError(f"{path}: kept is {out['kept'].shape} or not finite; want the features (n, {len(out['mu'])}) of some images")
    return out


def main(args):
    proc = Processes()
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    args.batch_size = args.batch_size if args.batch_size is not None else 8 if proc.device.type == "cpu" else 64
    runtime.check_positive(args, "batch_size", "image_size")
    if args.num_samples is not None and args.num_samples < 2:
        raise UserError(f"--num-samples {args.num_samples}: a covariance needs at least 2 images")
    if args.cfg is not None and not math.isfinite(args.cfg):
        raise UserError(f"--cfg {args.cfg}: must be a number")
    if args.samples == "ref":
        return make_reference(args, proc)

    # Everything is opened before anything is measured:
    paths = args.samples, args.reference
    opened = open_images(args.samples, args, proc, args.num_samples), open_images(args.reference, args, proc)
    net = load_features(args.features, args.resize, proc.device) if any(images for images, _ in opened) else None
    if opened[0][1] is not None and args.num_samples:
        raise UserError(f"--num-samples {args.num_samples}: {args.samples} holds statistics of all its images; leave it out")
    held = [statistics and open_statistics(statistics, path, args.unnamed) for path, (_, statistics) in zip(paths, opened)]
    name, dim = (net.name, net.dim) if net else (held[0]["features"], len(held[0]["mu"]))
    for path, h in zip(paths, held):
        if h and h["features"] != name:
            mend = f"add --resize {h['features'][21:]}" if h["features"][:21] == name[:21] == "inception-2015-12-05/" else "add the --features it was made with"
            raise UserError(f"{path} was made with {h['features']}, {'now it is' if net else paths[0] + ' with'} {name}: numbers of different networks or resizings "
                            f"do not mix; {mend if net else 'make one of them again'}")
        if h and len(h["mu"]) != dim:
            raise UserError(f"{path} holds statistics of {len(h['mu'])} features, {name} has {dim}")
    a, b = ({**(measure(images, net, proc, args.batch_size, keep) if images else {}), **(h or {})}
            for (images, _), h, keep in zip(opened, held, (None, REFERENCE)))
    if not proc.main:
        return
    row = distances(a, b, net, proc.device, quiet=False)
    if args.json:
        return say(proc, json.dumps({"samples": a["name"], "samples_count": a["count"], "reference": b["name"], "reference_count": b["count"],
                                     "reference_kept": len(b.get("kept", ())), "features": a["features"], **row}))
    for what, m in (("samples", a), ("reference", b)):
        count = f"{m['count']:,} images" if m["count"] else "statistics, of how many images it does not say"
        some = f", {len(m['kept']):,} of them for precision and recall" if len(m.get("kept", ())) not in (0, m["count"]) else ""
        say(proc, f"{what:12}{m['name']}: {count}{some}")
    say(proc, f"{'features':12}{a['features']}\n{table({'': row}, a['features'])}")


def make_reference(args, proc):
    """python fid.py ref PATH --out stats.npz"""
    images, statistics = open_images(args.reference, args, proc, args.num_samples)
    if statistics is not None:
        raise UserError(f"{args.reference} holds statistics already: it is a reference")
    if not args.out or not args.out.endswith(".npz"):
        raise UserError("ref makes a file: give --out a name ending in .npz")
    part = Path(args.out).with_suffix(".tmp")
    try:  # before hours of work
        if Path(args.out).is_dir():
            raise IsADirectoryError(None, "it is a folder")
        part.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
    except OSError as e:
        raise UserError(f"--out {args.out}: cannot write ({e.strerror or e}); choose another place")
    m = measure(images, load_features(args.features, args.resize, proc.device), proc, args.batch_size, REFERENCE)
    if proc.main:
        try:
            with open(part, "wb") as f:
                np.savez(f, **{k: np.asarray(v.cpu() if torch.is_tensor(v) else v) for k, v in m.items()})
            os.replace(part, args.out)
        except OSError as e:
            part.unlink(missing_ok=True)
            raise UserError(f"--out {args.out}: cannot write ({e.strerror or e}); free some space and repeat the command")
    say(proc, f"{args.out}: statistics of {m['count']:,} images of {m['name']}, {len(m['kept']):,} kept for precision and recall; features {m['features']}")


def parser():
    p = runtime.Parser(prog="fid.py", description=__doc__, formatter_class=runtime.Raw)
    p.add_argument("samples", help="A, or the word ref to make a reference of B")
    p.add_argument("reference", help="B")
    p.add_argument("--features", default="inception", help="inception, a file with its weights or Keras's ResNet-50's, torchvision-NAME, digits-cnn, digits-mlp")
    p.add_argument("--resize", choices=list(RESIZE), default="adm", help="how images reach the 299x299 of Inception")
    p.add_argument("--unnamed", choices=list(RESIZE), help="how statistics were made that do not say it themselves")
    p.add_argument("--image-size", type=int, help="crop and scale the images of folders to this size, as ADM does")
    p.add_argument("--num-samples", type=int, help="take this many samples (default: all; of a checkpoint 50,000)")
    p.add_argument("--nfe", type=int, help="steps of a checkpoint; default: as trained, else 50")
    p.add_argument("--cfg", type=float, help="guidance of a checkpoint (1: none); default: as trained")
    p.add_argument("--seed", type=runtime.seed, default=0, help="of a checkpoint's samples")
    p.add_argument("--batch-size", type=int, help="images a forward and process (default: 64 on GPU, 8 on CPU, where it is fastest)")
    p.add_argument("--out", help="where ref writes the statistics")
    p.add_argument("--json", action="store_true", help="print one line of JSON instead of the table")
    return p


if __name__ == "__main__":
    runtime.run(main, parser().parse_args())
