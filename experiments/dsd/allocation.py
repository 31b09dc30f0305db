"""Fig. 4 of the DSD paper: how often each variant trains each timestep.

    python -m experiments.dsd.allocation --steps 5000 --depth 64         a second

Part (a) is the share of all updates, part (b) the share of the sum of all learning rates. Both are
by timestep t of z_t, at which the prediction gets the gradient. Computed, nothing is trained.
"""
import argparse
from dataclasses import dataclass

import numpy as np

import dsd
from experiments import figures
from experiments.runner import ROOT
from solvers import make_grid

VARIANTS = ["dsdn", "dsdi", "dsdgl", "dsdgexp"]  # tsd has the allocation of dsdi
PARTS = {"a": "updates", "b": "updates times learning rate"}
BINS, FINE_BINS = 8, 32  # of the table, of the picture
T = 1000


@dataclass
class Allocation:
    """The updates of one training run, three arrays (P,)."""

    times: np.ndarray   # timestep of z_t
    rates: np.ndarray   # factor of the learning rate
    depths: np.ndarray  # N_i, the number of steps of the trajectory

    def shares(self, part, bins):
        """Shares of the timesteps' bins in percent, (bins,); they sum to 100."""
        weights = self.rates if part == "b" else np.ones_like(self.rates)
        edges = np.linspace(0, T, bins + 1)
        return 100 * np.histogram(self.times, edges, weights=weights)[0] / weights.sum()


def allocation(variant, N, P):
    """The Allocation of P updates from N steps downwards."""
    updates = dsd.allocate(variant, N, P)
    grids = {n: make_grid("uniform", n, T) for n, _ in updates}
    times = [grids[n][2 * k] for n, k in updates]
    rates = [dsd.learning_rate(i, P) for i in range(P)]
    return Allocation(np.array(times), np.array(rates), np.array([n for n, _ in updates]))


def print_shares(plans, part):
    edges = np.linspace(0, T, BINS + 1)
    names = [f"{a:.0f}-{b - 1:.0f}" for a, b in zip(edges, edges[1:])]
    print(f"Fig. 4{part}: share in percent of {PARTS[part]} by timestep")
    print("| | " + " | ".join(names) + " |")
    print("|" + "---|" * (len(names) + 1))
    for variant, plan in plans.items():
        cells = [f"{share:.1f}" for share in plan.shares(part, BINS)]
        print(f"| {variant} | " + " | ".join(cells) + " |")


def print_depths(plans):
    print("depth: updates; share of the learning rate in percent")
    for variant, plan in plans.items():
        texts = []
        for depth in np.unique(plan.depths)[::-1]:
            chosen = plan.depths == depth
            share = 100 * plan.rates[chosen].sum() / plan.rates.sum()
            texts.append(f"{depth}: {chosen.sum()}; {share:.1f}")
        print(f"{variant}: " + ", ".join(texts))


def draw(plans, part):
    file = ROOT / f"dsd_allocation-{part}.png"
    edges = np.linspace(0, T, FINE_BINS + 1)
    try:
        with figures.figure(file, "timestep", f"share of {PARTS[part]} (%)") as axes:
            axes.set_yscale("log")
            axes.invert_xaxis()  # as a trajectory goes
            for variant, plan in plans.items():
                axes.stairs(plan.shares(part, FINE_BINS), edges, label=variant)
    except ImportError as error:
        print(f"no picture: {error}")
        return
    print(f"drawn: {file}")


def main(args):
    plans = {variant: allocation(variant, args.depth, args.steps) for variant in VARIANTS}
    for part in PARTS:
        print_shares(plans, part)
    print_depths(plans)
    for part in PARTS:
        draw(plans, part)


def parser():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=5000, help="updates in all (default: 5000)")
    p.add_argument("--depth", type=int, default=64, help="steps of the first depth (default: 64)")
    return p


if __name__ == "__main__":
    main(parser().parse_args())
