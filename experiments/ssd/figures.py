"""The figures of experiments/ssd/README.md, drawn from results.jsonl beside this file.

    python -m experiments.ssd.figures

Needs matplotlib. Bars are standard deviations over three teachers, where the table has them.
"""
import json
from pathlib import Path

from experiments.figures import curve, figure

ASSETS = Path(__file__).parents[2] / "assets"
FD = "FD (digits-cnn)"


def load(table):
    """-> {row: {column: number, or {"mean": ..., "sd": ...}}} of a table of results.jsonl."""
    rows = {}
    for line in Path(__file__).with_name("results.jsonl").read_text().splitlines():
        result = json.loads(line)
        if result["table"] == table:
            rows[result["row"]] = result["columns"]
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
        found.append(value)
        means.append(cell["mean"] if isinstance(cell, dict) else cell)
        spreads.append(cell["sd"] if isinstance(cell, dict) else None)
    return found, means, None if None in spreads else spreads


def steps_axis(axes, steps):
    """A logarithmic axis whose ticks are the numbers of steps that were measured."""
    axes.set_xscale("log")
    axes.set_xticks(steps, [str(n) for n in steps])
    axes.minorticks_off()


def fd_against_steps():
    """Tables 1, 2, 3, 7, 8: base, control and students at 10, 20 and 50 steps."""
    rows, steps = load("Tables 1, 2, 3, 7, 8: DiT-Ti/2"), [10, 20, 50]
    labels = {"base": "base model", "continued training": "continued training (control)",
              "SSD": "SSD", "iSSD": "iSSD"}
    with figure(ASSETS / "ssd_fd_nfe.png", "DDIM steps (network evaluations)", FD) as axes:
        for i, (name, label) in enumerate(labels.items()):
            found, means, spreads = points(rows[name], "{} steps: FD digits-cnn", steps)
            shifted = [n * (1 + 0.012 * (i - 1.5)) for n in found]  # bars side by side
            curve(axes, shifted, means, spreads, label)
        steps_axis(axes, steps)
        axes.set_ylim(bottom=0)


def after_distillation():
    """Tables 5 and 6: the base model, PD, and what follows PD."""
    rows, steps = load("Tables 5, 6, Fig. 4a: PD"), [4, 5, 8, 10, 32]
    labels = {"base": "base model", "PD": "PD", "PD + continued training": "PD, continued training",
              "PD + SSD, lam 0.02": "PD + SSD, lam 0.02",
              "PD + iSSD, lam 0.05": "PD + iSSD, lam 0.05",
              "PD + iSSD, chosen lam: 0.2 (at 5 and 4 steps 0.1)": "PD + iSSD, chosen lam"}
    with figure(ASSETS / "ssd_pd.png", "DDIM steps (network evaluations)", FD) as axes:
        for name, label in labels.items():
            curve(axes, *points(rows[name], "{} steps: FD digits-cnn", steps), label)
        steps_axis(axes, steps)
        axes.set_yscale("log")
        ticks = [10, 20, 30, 40, 50]
        axes.set_yticks(ticks, [str(n) for n in ticks])
        axes.minorticks_off()


def lam():
    """Fig. 4d; lam 0 is the base model."""
    rows, lams = load("Fig. 4d: lam"), [0.05, 0.1, 0.2, 0.3, 0.5]
    base = load("Tables 1, 2, 3, 7, 8: DiT-Ti/2")["base"]["10 steps: FD digits-cnn"]["mean"]
    labels = {"SSD": "SSD (lam weighs the cleaner step)",
              "iSSD": "iSSD, the frozen teacher's features",
              "iSSD, --reading student": "iSSD, the student's features"}
    with figure(ASSETS / "ssd_lam.png", "lam (weight of the fusion)", FD + ", 10 steps") as axes:
        for name, label in labels.items():
            found, means, _ = points(rows[name], "lam {}: FD digits-cnn", lams)
            curve(axes, [0, *found], [base, *means], None, label)
        axes.axhline(base, color="grey", linestyle="--", linewidth=1, label="base model")
        axes.set_ylim(bottom=0)


def dynamics():
    """Fig. 4c: FD while iSSD trains."""
    rows, updates = load("Fig. 4c: dynamics"), [0, 10, 25, 50, 100, 200]
    with figure(ASSETS / "ssd_dynamics.png", "training steps of iSSD", FD + ", 10 steps") as axes:
        labels = {"fused student (19 evaluations)": "fused student (19 evaluations)",
                  "student (10 evaluations)": "plain student (10 evaluations)"}
        for name, label in labels.items():
            curve(axes, *points(rows[name], "{} training steps: FD digits-cnn", updates), label)
        teacher = rows["teacher"]["0 training steps: FD digits-cnn"]["mean"]
        axes.axhline(teacher, color="grey", linestyle="--", linewidth=1, label="teacher")


def main():
    fd_against_steps()
    after_distillation()
    lam()
    dynamics()
    print(f"drawn: {ASSETS}/ssd_*.png")


if __name__ == "__main__":
    main()
