"""The figures of experiments/ddil/README.md, drawn from results.jsonl beside this file.

    python -m experiments.ddil.figures

Needs matplotlib. Bars are standard deviations over three teachers, where the table has them.
"""
import json
from dataclasses import dataclass
from pathlib import Path

from experiments.figures import curve, figure

ASSETS = Path(__file__).parents[2] / "assets"
FD = "FD digits-cnn"
WITH_DDIL = "with DDIL, FD digits-cnn"
FD_AXIS = "FD (digits-cnn)"


@dataclass
class Curve:
    label: str
    rows: list
    column: str
    colour: str
    aside: float = 1.0  # factor of the number of steps: bars stand side by side


def load(table):
    """-> [(row, {column: number, or {"mean": ..., "sd": ...}})] of a table of results.jsonl."""
    rows = []
    for line in Path(__file__).with_name("results.jsonl").read_text().splitlines():
        result = json.loads(line)
        if result["table"] == table:
            rows.append((result["row"], result["columns"]))
    return rows


def select(rows, *beginnings):
    """The columns of the rows whose names begin so."""
    return [columns for name, columns in rows if name.startswith(beginnings)]


def plain_numbers(axis, ticks):
    """Numbers such as 2 and 16, not powers of ten, on a logarithmic axis."""
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)


def against_steps():
    """FD against the number of steps."""
    rows = load("With and without the mixture")
    halvings = [f"PD {n} -> {n // 2}" for n in (16, 8, 4, 2)]
    curves = [
        Curve("base", select(rows, "base"), FD, "black"),
        Curve("PD", select(rows, *halvings), FD, "tab:blue", 0.985),
        Curve("PD + DDIL", select(rows, *halvings), WITH_DDIL, "tab:orange", 1.015),
        Curve("LCM", select(rows, "LCM"), FD, "tab:green", 0.985),
        Curve("LCM + DDIL", select(rows, "LCM"), WITH_DDIL, "tab:olive", 1.015),
        Curve("DMD2", select(rows, "DMD2"), FD, "tab:purple", 1.05),
        Curve("DMD2 + DDIL", select(rows, "DMD2"), WITH_DDIL, "tab:pink", 1.08),
    ]
    file = ASSETS / "ddil_steps.png"
    with figure(file, "sampling steps (network evaluations, NFE)", FD_AXIS) as axes:
        axes.set_prop_cycle(color=[each.colour for each in curves])
        for each in curves:
            steps = [each.aside * row["steps"] for row in each.rows]
            means = [row[each.column]["mean"] for row in each.rows]
            spreads = [row[each.column]["sd"] for row in each.rows]
            curve(axes, steps, means, spreads, each.label)
        (control,) = select(load("The bare command"), "continued training")
        axes.plot([2], [control[FD]], "x", color="tab:gray", label="continued training")
        axes.set_xscale("log")
        axes.set_yscale("log")
        plain_numbers(axes.xaxis, [1, 2, 4, 8, 16])
        plain_numbers(axes.yaxis, [5, 10, 20, 30, 50, 80])


def taking_turns():
    """FD against the share of a trajectory that the teacher takes."""
    rows = select(load("Covariate shift: taking turns"), "teacher with p")
    file = ASSETS / "ddil_turns.png"
    with figure(file, "probability that the teacher takes an interval", FD_AXIS) as axes:
        curve(axes, [row["share"] for row in rows], [row[FD] for row in rows], None, None)
        axes.set_ylim(0, 16)


def diversity():
    """Distances within a class and to the teacher's images, as bars."""
    rows = load("Diversity and map")
    bars = {"diversity": "diversity within a class",
            "same noise": "to the teacher's image, same noise",
            "other noise": "to the teacher's image, other noise"}
    with figure(ASSETS / "ddil_diversity.png", "", "mean distance (LPIPS)") as axes:
        for i, (column, label) in enumerate(bars.items()):
            places = [place for place, (_, row) in enumerate(rows) if column in row]
            heights = [row[column] for _, row in rows if column in row]
            axes.bar([place + 0.27 * (i - 1) for place in places], heights, 0.25, label=label)
        axes.set_xticks(range(len(rows)), [name for name, _ in rows])
        axes.set_ylim(0, 0.35)


def main():
    against_steps()
    taking_turns()
    diversity()


if __name__ == "__main__":
    main()
