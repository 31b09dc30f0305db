"""The table at the end of every method: before, after and the controls, on the same noise and
labels. Method scripts measure networks for the embedded digits; fid.py measures all others."""
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch

import fid
from kit.cli import say
from kit.data import digits, to_float
from kit.features import load_features
from kit.processes import write_text
from kit.sampling import SampleOptions, sample_images, save_grid


@dataclass
class Entry:
    """One row of the table.

    net     a network as Processes.autocast() gives it, or any net(x, t, y)
    spec    its description
    nfe     evaluations per sample
    cfg     scale of guidance; 1 is none
    base    the network of all other steps, for a student of one step
    uncond  the network without classes that guides this one, where it does not guide itself
    """

    net: Any
    spec: dict
    nfe: int
    cfg: float
    base: Optional[Any] = None
    uncond: Optional[Any] = None


def measure_digits(images, labels, proc, features="digits-cnn"):
    """images (n, 1, 8, 8) uint8 and the labels (n,) they were made for, against all 1,797 digits.

    Returns {"fd": Frechet distance of features, "precision", "recall", "accuracy": the share of
    images that the network gives their label, "pixel_fd": Frechet distance of pixels in [-1, 1]}.
    One network can be fooled, hence the last.
    """
    net = load_features(features, device=proc.device)
    real = digits()
    measured = []
    pixels = []
    for name, x, y in (("samples", images, labels), ("digits", real.x.numpy(), real.y.numpy())):
        source = fid.images_from_array(name, x.transpose(0, 2, 3, 1), y)
        measured.append(fid.feature_statistics(source, net, proc.device, batch=1000, quiet=True))
        flat = to_float(torch.from_numpy(x)).flatten(1)
        pixels += fid.Statistics(64).update(flat).result()
    row = fid.compare_statistics(*measured, net, proc.device)
    row["pixel_fd"] = fid.frechet_distance(*pixels)
    return row


def compare(entries, proc, num, seed, features="digits-cnn", batch=None):
    """Sample every Entry of {name: Entry} from the same noise and labels.

    batch: how many samples go through a network at once, as in SampleOptions.
    Returns ({name: measure_digits(...)}, {name: the first 40 images}), the same on every rank.
    """
    rows = {}
    images = {}
    for name, entry in entries.items():
        options = SampleOptions(seed=seed, nfe=entry.nfe, cfg=entry.cfg, base=entry.base,
                                uncond=entry.uncond, batch=batch)
        x, y = sample_images(entry.net, entry.spec, proc, num, options, desc=name)
        rows[name] = measure_digits(x, y, proc, features)
        images[name] = x[:40]
    return rows, images


# ---- The end of every method -------------------------------------------------------------------


PICTURES = ("before", "plain training", "after")  # in samples.png, from above


def finish(args, proc, method, began, entries, **more):
    """Measure; write metrics.json and samples.png; print the table.

    entries   {"before": Entry, "after": Entry, further names: controls}, or {} where nothing is
              to be measured
    began     time.perf_counter() at the beginning of the script
    more      further keys of metrics.json
    """
    batch = getattr(args, "sample_batch_size", None)
    rows, images = compare(entries, proc, args.eval_samples, args.seed, batch=batch)
    if proc.is_main:
        out = Path(args.out)
        if entries:
            save_grid([images[k] for k in PICTURES if k in images], out / "samples.png")
        metrics = {
            "method": method, "model": args.model, "nfe": args.nfe, "seed": args.seed,
            "steps": args.steps, "samples": args.eval_samples,
            "features": "digits-cnn" if entries else None,
            "reference": "all 1,797 digits" if entries else None,
            "cfg": args.cfg, "before": rows.pop("before", None), "after": rows.pop("after", None),
            "controls": rows, **more, "seconds": round(time.perf_counter() - began, 1),
        }
        write_text(out / "metrics.json", json.dumps(metrics, indent=2))
    proc.barrier()
    print_report(args, proc)


def is_measured(args):
    """Has a finished run its metrics.json, with as many samples as asked for now?"""
    try:
        metrics = json.loads((Path(args.out) / "metrics.json").read_text())
        return metrics["samples"] == args.eval_samples
    except (OSError, ValueError, LookupError, TypeError):  # none yet, or a damaged one
        return False


def print_finished(args, proc):
    """Say that a run is finished, how to train again, and print its table."""
    say(proc, f"{args.out} is finished: here is its table; to train again, give another --out or "
              f"delete {args.out}")
    print_report(args, proc)


def print_report(args, proc):
    """Print the table of a finished run and name what it left."""
    out = args.out
    metrics = json.loads((Path(out) / "metrics.json").read_text())
    base = f" --base {args.ckpt}" if getattr(args, "only_step", None) else ""
    if metrics["samples"]:
        say(proc, summary(metrics))
        known = {"after": True, "before": metrics["before"], **metrics["controls"]}
        drawn = ", ".join(name for name in PICTURES if known.get(name))
        say(proc, f"pictures: {out}/samples.png, from above: {drawn}; log: {out}/log.jsonl")
    else:
        say(proc, "quality is not measured here (--eval-samples 0)")
        say(proc, f"log: {out}/log.jsonl")
    say(proc, f"{out}/last.pt is ready: python sample.py --ckpt {out}/last.pt{base} "
              "--num-samples 100 --out samples.npz")


def summary(metrics):
    """metrics.json -> the table that a method script prints."""
    rows = {}
    if metrics["before"]:  # a model from scratch has none
        rows["before"] = metrics["before"]
    rows.update(metrics["controls"])
    rows["after " + metrics["method"]] = metrics["after"]
    head = (f"{metrics['samples']} samples, NFE {metrics['nfe']}, guidance {metrics['cfg']:g}; "
            f"features {metrics['features']}, reference {metrics['reference']}")
    return f"{head}\n{fid.table(rows, metrics['features'])}"
