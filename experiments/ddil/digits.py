"""Does DDIL help on the digits? Each objective with and without its mixture, at equal updates.

    python -m experiments.ddil.digits            about an hour on two CPU cores

Teachers predict v. The learning rate of each objective is chosen WITHOUT the mixture on two tuning
teachers with one seed, by the mean Frechet distance (digits-cnn) over all numbers of steps. Then
both variants run on three held-out teachers, with three seeds each (without thresholding with one).
All rows have 2,000 samples of the same noise. Gains are paired within a teacher and seed; their
standard error is over the teachers' means.

Settings: pd (halvings 16 -> 8 -> 4 -> 2 -> 1), weak (the same with a fifth of the updates), jump
(from the teacher's own 4 steps to 2, then to 1: longer steps), lcm and dmd2 (4 steps). Each setting
runs with and without thresholding.
"""
import argparse
from dataclasses import dataclass

import numpy as np

from experiments.runner import (
    COLUMNS,
    FEW_TUNING_TEACHERS,
    HEADER,
    SEEDS,
    V_HELD_OUT_TEACHERS,
    Row,
    cells,
    gains_text,
    path,
    plus_minus,
    print_header,
    run,
    teacher,
    training_seconds,
    values,
)
from solvers import make_grid

NOISE = 1000  # seed of all samples
BASE_NFES = [16, 8, 4, 2, 1]
MIXTURES = {
    "ddil": "",
    "plain": "--dagger 0 0",
    "backward": "--dagger 1 1 --beta 1 1",  # DMD2's own simulation: the student's rollouts alone
}
STUDENT_RATES = [3e-4, 1e-3, 3e-3]
OTHER_RATES = [3e-5, 1e-4, 3e-4, 1e-3]


@dataclass
class Setting:
    flags: str
    rates: list            # learning rates to choose from
    nfes: list             # the numbers of steps that it makes a student for
    without: str = "plain"  # the mixture of the comparison


SETTINGS = {
    "pd": Setting("--stages 16:100 8:100 4:100 2:100", STUDENT_RATES, [8, 4, 2, 1]),
    "weak": Setting("--stages 16:20 8:20 4:20 2:20", STUDENT_RATES, [8, 4, 2, 1]),
    "jump": Setting("--stages 4:100 2:100", STUDENT_RATES, [2, 1]),
    "lcm": Setting("--objective lcm --steps 400 --nfe 4", OTHER_RATES, [4]),
    "dmd2": Setting("--objective dmd2 --steps 400 --nfe 4", OTHER_RATES, [4], "backward"),
}


def base(number):
    return teacher(number, prediction="v")


@dataclass(frozen=True)
class Arm:
    """A row of the table: a setting with one mixture."""

    setting: str
    mixture: str
    threshold: str
    lr: float

    def command(self, number, seed):
        words = f"{SETTINGS[self.setting].flags} {MIXTURES[self.mixture]}".strip()
        return (f"ddil --ckpt {path(base(number))} {words} --threshold {self.threshold} "
                f"--seed {seed} --lr {self.lr:g}")

    def cells(self, nfe, teachers=V_HELD_OUT_TEACHERS, seeds=None):
        """seeds None: as many as the docstring says."""
        if seeds is None:
            seeds = SEEDS if self.threshold == "clamp" else SEEDS[:1]
        return cells(self.command, lambda number: Row(nfe, noise=NOISE), teachers, seeds,
                     f"nfe{nfe}.pt")

    def all_cells(self, *of):
        """{nfe: cells}, the most steps first."""
        return {nfe: self.cells(nfe, *of) for nfe in SETTINGS[self.setting].nfes}


def base_cells(nfe):
    changes = {"threshold": "clamp", "grid": make_grid("uniform", nfe), "nfe": nfe}
    return cells(lambda number, seed: base(number),
                 lambda number: Row(nfe, noise=NOISE, changes=changes),
                 V_HELD_OUT_TEACHERS, seeds=[0])


def choose_rates(names):
    """{setting: learning rate}, chosen without the mixture."""
    tried = {}
    for name in names:
        tried[name] = {}
        for lr in SETTINGS[name].rates:
            arm = Arm(name, SETTINGS[name].without, "clamp", lr)
            tried[name][lr] = arm.all_cells(FEW_TUNING_TEACHERS, [0])
    get = run(tried)

    chosen = {}
    for name in names:
        score = {}
        for lr, by_nfe in tried[name].items():
            score[lr] = np.mean([values(get, found, "fd") for found in by_nfe.values()])
        chosen[name] = min(score, key=score.get)
        print(f"{name}: lr {chosen[name]:g} of "
              + ", ".join(f"{lr:g} ({fd:.1f})" for lr, fd in score.items()))
    return chosen


def print_row(get, name, nfe, found, gain=""):
    texts = [str(nfe)]
    for network, metric, digits in COLUMNS:
        texts.append(plus_minus(values(get, found, metric, network).mean(1), digits))
    texts.append(f"{values(get, found, 'recall').mean():.2f}")
    print(f"| {name} | " + " | ".join(texts) + f" | {gain} |")


def print_setting(get, name, lr):
    """The rows of a setting, without the mixture and with it."""
    for threshold in ("clamp", "off"):
        plain = Arm(name, SETTINGS[name].without, threshold, lr)
        mixed = Arm(name, "ddil", threshold, lr)
        for arm in (plain, mixed):
            label = f"{name} {arm.mixture}" + (" off" if threshold == "off" else "")
            for nfe, found in arm.all_cells().items():
                gain = gains_text(get, plain.cells(nfe), found) if arm is mixed else ""
                print_row(get, label, nfe, found, gain)


def time_ratio(name, lr):
    """CPU time of training with the mixture over that without."""
    seconds = {}
    for mixture in (SETTINGS[name].without, "ddil"):
        arm = Arm(name, mixture, "clamp", lr)
        of_runs = []
        for number in V_HELD_OUT_TEACHERS:
            of_runs += [training_seconds(arm.command(number, seed)) for seed in SEEDS]
        seconds[mixture] = np.mean(of_runs)
    return seconds["ddil"] / seconds[SETTINGS[name].without]


def main(args):
    run([base(number) for number in FEW_TUNING_TEACHERS + V_HELD_OUT_TEACHERS])
    chosen = choose_rates(args.settings)

    rows = {"base": {nfe: base_cells(nfe) for nfe in BASE_NFES}}
    for name in args.settings:
        for threshold in ("clamp", "off"):
            for mixture in (SETTINGS[name].without, "ddil"):
                arm = Arm(name, mixture, threshold, chosen[name])
                rows[arm] = arm.all_cells()
    get = run(rows, args.jobs)

    print("\nThe last column is the gain of the mixture in FD (cnn, mlp; se over teachers).")
    print_header("steps", HEADER, "recall", "gain")
    for nfe in BASE_NFES:
        print_row(get, "base", nfe, rows["base"][nfe])
    for name in args.settings:
        print_setting(get, name, chosen[name])
    for name in args.settings:
        ratio = time_ratio(name, chosen[name])
        print(f"{name}: CPU time with the mixture {ratio:.2f} times that without")


def parser():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS),
                   help="default: all")
    p.add_argument("--jobs", type=int, default=2, help="processes of one thread each (default: 2)")
    return p


if __name__ == "__main__":
    main(parser().parse_args())
