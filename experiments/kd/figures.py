"""The figures of experiments/kd/README.md, drawn from results.jsonl beside this file.

    python -m experiments.kd.figures

Needs matplotlib. Bars are standard deviations over three teachers.
"""
import json
from pathlib import Path

from experiments.figures import curve, figure

ASSETS = Path(__file__).parents[2] / "assets"
FD = "FD (digits-cnn)"
EVALUATIONS = [5, 9, 19, 35]  # of Heun's method in 3, 5, 10 and 18 steps
SIZES = {"DDPM++-4x1": "student, 17,000 parameters",
         "DDPM++-8x1": "student, 67,000 parameters",
         "DDPM++-12x1": "student, 149,000 parameters",
         "teacher, DDPM++-16x1": "teacher, 264,000 parameters"}


def load(table):
    """-> {row: {column: number, or {"mean": ..., "sd": ...}}} of a table of results.jsonl."""
    rows = {}
    for line in Path(__file__).with_name("results.jsonl").read_text().splitlines():
        result = json.loads(line)
        if result["table"] == table:
            rows[result["row"]] = result["columns"]
    return rows


def plain_numbers(axis, ticks):
    """Ticks as they are, not as powers of ten."""
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)


def points(row, evaluations=EVALUATIONS):
    """-> FD: means and standard deviations at these numbers of evaluations."""
    cells = [row[f"{n} evaluations: FD digits-cnn"] for n in evaluations]
    return [cell["mean"] for cell in cells], [cell["sd"] for cell in cells]


def costs(row, evaluations=EVALUATIONS):
    """-> GFLOP of a sample at these numbers of evaluations."""
    return [row[f"{n} evaluations: GFLOP"] for n in evaluations]


def training():
    """Fig. 3: the same student by KD and by score matching."""
    rows = load("Fig. 3: training")
    teacher = rows.pop("teacher (1,000 steps)")["FD digits-cnn"]["mean"]
    labels = {"KD": "KD", "score matching, dropout 0.1": "score matching, dropout 0.1",
              "score matching, no dropout": "score matching, no dropout"}
    with figure(ASSETS / "kd_training.png", "training steps of the student",
                FD + ", 19 evaluations") as axes:
        for name, label in labels.items():
            steps, means, spreads = [], [], []
            for row, columns in rows.items():
                cell = columns.get(f"{name}: FD digits-cnn")
                if cell:
                    steps.append(int(row.split()[0].rstrip(",")))
                    means.append(cell["mean"])
                    spreads.append(cell["sd"])
            curve(axes, steps, means, spreads, label)
        axes.axhline(teacher, color="grey", linestyle="--", linewidth=1, label="teacher")
        axes.set_xscale("log")
        axes.set_yscale("log")
        plain_numbers(axes.xaxis, [100, 200, 400, 800, 2000])
        plain_numbers(axes.yaxis, [2, 5, 10, 20, 50])


def fd_against_evaluations():
    """Fig. 2, against evaluations, with the control of Fig. 3."""
    rows = load("Fig. 2: sizes")
    control = load("Fig. 3: training")["800 training steps"]
    control = control["score matching, dropout 0.1: FD digits-cnn"]["mean"]
    with figure(ASSETS / "kd_fd_nfe.png", "network evaluations per sample", FD) as axes:
        for name, label in SIZES.items():
            curve(axes, EVALUATIONS, *points(rows[name]), label)
        axes.plot([19], [control], "kx", markersize=9, markeredgewidth=2, zorder=5,
                  label="control: 67,000 parameters, score matching")
        axes.set_xscale("log")
        axes.set_yscale("log")
        plain_numbers(axes.xaxis, EVALUATIONS)
        plain_numbers(axes.yaxis, [2, 5, 10, 20, 50, 100, 200, 400])


def sizes():
    """Fig. 2: distance against cost, at 10 and 18 steps."""
    rows, evaluations = load("Fig. 2: sizes"), [19, 35]
    with figure(ASSETS / "kd_sizes.png", "GFLOP per sample", FD) as axes:
        for name, label in SIZES.items():
            row = rows[name]
            curve(axes, costs(row, evaluations), *points(row, evaluations), label)
        axes.set_xscale("log")
        plain_numbers(axes.xaxis, [0.02, 0.05, 0.1, 0.2, 0.5])


def guided():
    """Fig. 4: distance against cost under guidance, w = 0.25."""
    rows = load("Fig. 4: guided, w = 0.25")
    labels = {"student of Eq. 6": "student of Eq. 6",
              "student of Eq. 5, labels dropped": "student of Eq. 5",
              "teacher": "teacher"}
    with figure(ASSETS / "kd_guided.png", "GFLOP per sample", FD + ", w = 0.25") as axes:
        for name, label in labels.items():
            curve(axes, costs(rows[name]), *points(rows[name]), label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        plain_numbers(axes.xaxis, [0.02, 0.05, 0.1, 0.2, 0.5, 1])
        plain_numbers(axes.yaxis, [2, 5, 10, 20, 50, 100, 200, 400])


def main():
    training()
    fd_against_evaluations()
    sizes()
    guided()
    print(f"drawn: {ASSETS}/kd_*.png")


if __name__ == "__main__":
    main()
