"""Fig. 4 of the DSD paper: how often each variant trains each timestep (a), and the same times the learning rate (b). Computed, nothing is trained.

    python experiments/dsd_allocation.py --steps 5000 --depth 64         a second

A share is of all updates (of the sum of all learning rates), at the timestep t of z_t, the one whose prediction gets the gradient.
"""
import argparse

from common import ROOT

VARIANTS = ["dsdn", "dsdi", "dsdgl", "dsdgexp"]  # tsd as dsdi


def allocation(variant, N, P, T=1000):
    """-> times t of all P updates, their factors of the learning rate, the depths N_i; arrays (P,)."""
    import numpy as np
    import dsd
    from solvers import make_grid
    where = dsd.allocate(variant, N, P)
    grids = {n: make_grid("uniform", n, T) for n, _ in where}
    return np.array([grids[n][2 * k] for n, k in where]), np.array([dsd.rate(i, P) for i in range(P)]), np.array([n for n, _ in where])


def main(args):
    import numpy as np
    ROOT.mkdir(parents=True, exist_ok=True)
    plans = {v: allocation(v, args.depth, args.steps) for v in VARIANTS}
    edges = np.linspace(0, 1000, 9)
    bins = [f"{a:.0f}-{b - 1:.0f}" for a, b in zip(edges, edges[1:])]
    for part, weight in (("a", lambda rate: np.ones_like(rate)), ("b", lambda rate: rate)):
        print(f"Fig. 4{part}: share in percent of {'updates' if part == 'a' else 'updates times learning rate'} by timestep\n| | " + " | ".join(bins) + " |\n|" + "---|" * (len(bins) + 1))
        for v, (t, rate, _) in plans.items():
            print(f"| {v} | " + " | ".join(f"{100 * x:.1f}" for x in np.histogram(t, edges, weights=weight(rate))[0] / weight(rate).sum()) + " |")
    print("depth: updates; share of the learning rate in percent")
    for v, (t, rate, depth) in plans.items():
        print(f"{v}: " + ", ".join(f"{n}: {(depth == n).sum()}; {100 * rate[depth == n].sum() / rate.sum():.1f}" for n in sorted(set(depth.tolist()), reverse=True)))
    try:
        import matplotlib
    except ImportError:
        return print("no picture: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.5), sharex=True)
    for axis, part, weight in zip(axes, "ab", (lambda r: np.ones_like(r), lambda r: r)):
        for v, (t, rate, _) in plans.items():
            axis.hist(t, np.linspace(0, 1000, 33), weights=weight(rate) / weight(rate).sum(), histtype="step", label=v)
        axis.set_yscale("log"), axis.set_title(part), axis.set_xlabel("timestep")
    axes[0].set_ylabel("share"), axes[0].legend(), axes[0].invert_xaxis()
    fig.tight_layout(), fig.savefig(ROOT / "dsd_allocation.png", dpi=120)
    print(f"drawn: {ROOT / 'dsd_allocation.png'}")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=5000)
    p.add_argument("--depth", type=int, default=64)
    main(p.parse_args())
