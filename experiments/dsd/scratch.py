"""Fig. 3 of the DSD paper on the digits: Eq. 1 against the ordinary loss, both from scratch.

    python -m experiments.dsd.scratch                twenty minutes on two CPU cores

Eq. 1 compares pairs of neighbours on grids of N = 128 and 16 steps. v prediction, the digits' usual
training but for a constant learning rate of 2e-3, three seeds. The averaged weights are measured on
the way, with 2,000 samples of 10 and 50 steps. An update of Eq. 1 costs two evaluations (four
forward units, a backward counts as two), one of the ordinary loss costs one (three forward units).
"""
import argparse
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

import dsd
import models
import train
from experiments.runner import (
    COLUMNS,
    HEADER,
    NETWORKS,
    ROOT,
    SEEDS,
    draw,
    in_processes,
    plus_minus,
    print_header,
    silence,
    standard_error,
)
from kit import data
from kit.evaluate import measure_digits
from kit.processes import Processes, StepRandom
from kit.run import EMA, Guard, adamw, set_lr
from kit.sampling import SampleOptions, sample_images
from solvers import make_schedule

NFES = [10, 50]
AT = [500, 1000, 2000]  # updates at which Eq. 1 is measured


@dataclass(frozen=True)
class Arm:
    points: tuple       # updates at which it is measured
    evaluations: int    # per update
    units: int          # forward units per update
    N: int = None       # steps of the grid that spaces pairs; None: the ordinary loss


# The ordinary loss is measured at equal updates, units and evaluations.
ARMS = {
    "plain": Arm((500, 667, 1000, 1333, 2000, 2667, 4000), 1, 3),
    "N 128": Arm((*AT,), 2, 4, 128),
    "N 16": Arm((*AT,), 2, 4, 16),
}


@dataclass(frozen=True)
class Job:
    seed: int
    name: str  # of the arm


@dataclass
class Point:
    """What is measured after some updates."""

    metrics: dict       # {nfe: {feature network: metrics}}
    ratio: float = 0.0  # Eq. 1: its second term over its first, of the last batch


def new_network(args):
    """The digits' DiT with random weights, as train.py makes it."""
    torch.manual_seed(args.seed)
    net = models.build(models.make_arch("DiT-Ti/2", 8, 1, 10))
    torch.nn.init.normal_(net.y_embedder.embedding_table.weight, std=args.label_std)
    return net


def measure(net, proc, seed):
    """-> {nfe: {feature network: metrics}}."""
    spec = dict(schedule="linear", prediction="v", arch=net.arch, classes=10, grid="uniform",
                nfe=None, cfg=1.0, solver="ddim", threshold="off")
    found = {}
    for nfe in NFES:
        options = SampleOptions(seed=100 + seed, nfe=nfe)
        with silence():
            x, y = sample_images(net, spec, proc, 2000, options, "sampling")
        found[nfe] = {name: measure_digits(x, y, proc, name) for name in NETWORKS}
    return found


def train_arm(job):
    """-> {updates: Point}. Runs in a process of its own."""
    torch.set_num_threads(1)
    arm = ARMS[job.name]
    words = f"--prediction v --seed {job.seed} --steps {max(arm.points)} --lr 2e-3 --decay constant"
    args = train.parser().parse_args(words.split())
    train.apply_train_defaults(args)
    proc, schedule, B = Processes("off"), make_schedule("linear"), args.batch_size
    loss_of = train.diffusion_loss
    if arm.N:
        loss_of = partial(dsd.training_loss, N=arm.N)

    net = new_network(args)
    averaged = models.build(net.arch).eval()
    ema, opt, guard = EMA(net, args.ema), adamw(net, args.lr), Guard(proc)
    stream = data.batches(data.load("digits"), proc, job.seed, B, 0)
    points = {}
    for step in range(args.steps):
        x0, y = next(stream)
        rng = StepRandom(proc, job.seed, step, B)
        t = rng.integers(0, 1000)
        y = torch.where(rng.uniform() < 0.1, 10, y)
        noise = rng.normal(x0.shape[1:])
        loss, terms = loss_of(net, schedule, x0, y, t, noise, "v")
        loss.backward()
        set_lr(opt, args.lr * train.learning_rate(step, args))
        guard.step(opt, loss, step, args.clip)
        ema.update(step)

        if step + 1 in arm.points:
            guard.check(ROOT)
            averaged.load_state_dict(ema.weights)
            ratio = float(terms["own"] / terms["plain"]) if terms else 0.0
            points[step + 1] = Point(measure(averaged, proc, job.seed), ratio)
    return points


class Results:
    """What all jobs have measured."""

    def __init__(self, done):
        self.done = done  # {Job: {updates: Point}}

    def values(self, name, updates, nfe, metric="fd", network="digits-cnn"):
        """Of an arm: (seeds,)."""
        found = []
        for seed in SEEDS:
            point = self.done[Job(seed, name)][updates]
            found.append(point.metrics[nfe][network][metric])
        return np.array(found)

    def ratio(self, name, updates):
        return np.mean([self.done[Job(seed, name)][updates].ratio for seed in SEEDS])


def print_rows(results, nfe):
    print(f"\n{nfe} steps")
    print_header("updates", "evaluations", "units", HEADER)
    for name, arm in ARMS.items():
        for n in arm.points:
            texts = []
            for network, metric, digits in COLUMNS:
                texts.append(plus_minus(results.values(name, n, nfe, metric, network), digits))
            print(f"| {name} | {n} | {arm.evaluations * n} | {arm.units * n} | "
                  + " | ".join(texts) + " |")


def print_gains(results, nfe):
    """How far Eq. 1 lies below the ordinary loss at equal cost, paired within a seed."""
    for name in ("N 128", "N 16"):
        for what, factor in (("updates", 1), ("units", 4 / 3), ("evaluations", 2)):
            texts = []
            for n in AT:
                pair = []
                for network in NETWORKS:
                    plain = results.values("plain", round(n * factor), nfe, network=network)
                    g = plain - results.values(name, n, nfe, network=network)
                    pair.append(f"{g.mean():.2f} (se {standard_error(g):.2f})")
                texts.append(f"{n}: " + ", ".join(pair))
            print(f"gain of {name} at equal {what} (cnn, mlp; se over seeds): " + "; ".join(texts))


def draw_curves(results, nfe):
    curves = {}
    for name, arm in ARMS.items():
        fd = [results.values(name, n, nfe) for n in arm.points]
        curves[name] = ([arm.units * n for n in arm.points], np.array(fd))
    draw(f"dsd_scratch-{nfe}", "forward units", "Frechet distance (digits-cnn)", curves)


def main(args):
    jobs = []
    for name in ARMS:
        jobs += [Job(seed, name) for seed in SEEDS]
    results = Results(dict(in_processes(train_arm, jobs)))
    for nfe in NFES:
        print_rows(results, nfe)
        print_gains(results, nfe)
        draw_curves(results, nfe)
    texts = []
    for name in ("N 128", "N 16"):
        texts += [f"{name}, {n} updates: {results.ratio(name, n):.1e}" for n in AT]
    print("\nthe second term over the first, last batch: " + "; ".join(texts))


def parser():
    return argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


if __name__ == "__main__":
    main(parser().parse_args())
