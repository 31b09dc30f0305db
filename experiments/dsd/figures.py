"""The figures of experiments/dsd/README.md, drawn from results.jsonl beside this file.

    python -m experiments.dsd.figures

Needs matplotlib. Bars are standard deviations over three teachers (from scratch: over three seeds),
where the table has them.
"""
import json
from pathlib import Path

from PIL import Image

from experiments.figures import curve, figure

ASSETS = Path(__file__).parents[2] / "assets"
FD = "FD digits-cnn"
FD_AXIS = "FD (digits-cnn)"
NFES = [2, 4, 8, 16]

# Colours by method, the same in all figures.
COLOURS = {"base": "black", "continued training": "tab:gray", "TSD": "tab:blue",
           "DSDN": "tab:cyan", "DSDI": "tab:green", "DSDI, TSD": "tab:green", "DSDGL": "tab:red",
           "DSDGEXP": "tab:orange", "PD, equal updates": "tab:purple",
           "PD, its 2-step student": "tab:pink"}


def load(table):
    """-> {row: {column: number, or {"mean": ..., "sd": ...}}} of a table of results.jsonl."""
    rows = {}
    for line in Path(__file__).with_name("results.jsonl").read_text().splitlines():
        result = json.loads(line)
        if result["table"] == table:
            name = result["row"].split(" (")[0]
            rows[name] = result["columns"]
    return rows


def points(row, pattern, values):
    """The cells of a row whose columns are the pattern with a value in place of {}.

    -> (values, means, standard deviations or None), without the cells that the table leaves empty.
    """
    found, means, spreads = [], [], []
    for value in values:
        cell = row.get(pattern.format(value))
        if cell is None:
            continue
        has_spread = isinstance(cell, dict)
        found.append(value)
        means.append(cell["mean"] if has_spread else cell)
        spreads.append(cell["sd"] if has_spread else None)
    return found, means, None if None in spreads else spreads


def plain_numbers(axis, ticks):
    """Numbers such as 2 and 16, not powers of ten, on a logarithmic axis."""
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)


def against_steps(file, table, names, fd_ticks):
    """FD against the number of steps. Bars of one number of steps stand side by side."""
    rows = load(table)
    names = [name for name in names if name in rows]
    with figure(ASSETS / file, "DDIM steps (network evaluations, NFE)", FD_AXIS) as axes:
        axes.set_prop_cycle(color=[COLOURS[name] for name in names])
        for i, name in enumerate(names):
            steps, means, spreads = points(rows[name], "{} steps: " + FD, NFES)
            aside = 1.018 ** (i - (len(names) - 1) / 2)
            curve(axes, [aside * n for n in steps], means, spreads, name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        plain_numbers(axes.xaxis, NFES)
        plain_numbers(axes.yaxis, fd_ticks)
    shrink(ASSETS / file)  # many colours


def shrink(path):
    """Save a PNG with a palette: less than half the bytes, the same look."""
    with Image.open(path) as image:
        palette = image.convert("RGB").quantize(128, Image.Quantize.MEDIANCUT)
    palette.save(path, optimize=True)


def over_training(file, measure, ylabel):
    """A measure against the number of updates. The table has no spread."""
    updates = [0, 64, 128, 256, 512]
    with figure(ASSETS / file, "updates", ylabel) as axes:
        axes.set_prop_cycle(color=["tab:red", "tab:blue"] * 2)
        for name, row in load("Oversaturation").items():
            found, means, _ = points(row, "{}: " + measure, updates)
            curve(axes, found, means, None, name)
            if "no guidance" not in name:
                axes.lines[-1].set_linestyle("--")
        axes.set_xticks(updates)


def allocation(file, part):
    """The share of the updates in every bin of timesteps."""
    edges = list(range(0, 1001, 125))
    bins = [f"{a}-{b - 1}" for a, b in zip(edges, edges[1:])]
    with figure(ASSETS / file, "timestep (0: data, 999: noise)", f"share of {part} (%)") as axes:
        for name, row in load("Fig. 4: timesteps").items():
            _, shares, _ = points(row, "{}: " + part, bins)
            axes.stairs(shares, edges, color=COLOURS[name], linewidth=2, label=name)
        axes.set_xticks(edges)
        axes.set_ylim(0, 38)


def from_scratch():
    """FD against the cost of training."""
    units = {"ordinary loss": 3, "Eq. 1, N = 128": 4, "Eq. 1, N = 16": 4}  # forward units
    updates = [500, 1000, 1333, 2000, 2667, 4000]
    with figure(ASSETS / "dsd_scratch.png", "cost of training (forward units)", FD_AXIS) as axes:
        for name, row in load("Fig. 3: from scratch").items():
            found, means, spreads = points(row, "{}: " + FD, updates)
            curve(axes, [units[name] * n for n in found], means, spreads, name)
        axes.set_yscale("log")
        plain_numbers(axes.yaxis, [3, 5, 10, 20, 30])


def main():
    variants = [name for name in COLOURS if name != "PD, its 2-step student"]
    against_steps("dsd_steps_unguided.png", "The variants, no guidance", variants,
                  [15, 20, 30, 50, 80])
    against_steps("dsd_steps_guided.png", "The variants, guidance", variants, [10, 15, 20, 30])
    against_steps("dsd_steps_v.png", "Teachers that predict v", list(COLOURS),
                  [3, 5, 10, 20, 30, 50, 70])
    over_training("dsd_dynamics_fd.png", FD, FD_AXIS)
    over_training("dsd_dynamics_overshoot.png", "overshoot",
                  "overshoot beyond [-1, 1] (hundredths)")
    allocation("dsd_allocation.png", "updates")
    allocation("dsd_allocation_lr.png", "updates times learning rate")
    from_scratch()


if __name__ == "__main__":
    main()
