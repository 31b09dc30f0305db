"""Does a model that teaches itself under guidance oversaturate? Measured over training.

    python -m experiments.dsd.dynamics               ten minutes on two CPU cores

Measures: Frechet distance, pixel distance, accuracy, contrast and overshoot (how far pixels lie
beyond [-1, 1]). Four steps on uniform nodes, three held-out teachers, one seed. The arms: guidance
1 to 3 in training and 1.5 in sampling, or none in either; a network that is its own teacher
(DSDGL), or a teacher that changes at the end of a depth only (TSD). The learning rate is one for
all arms. Every length has its own warm-up and cosine.
"""
import argparse
from dataclasses import dataclass

import numpy as np

from experiments.runner import (
    FEW_HELD_OUT_TEACHERS,
    Row,
    cells,
    draw,
    path,
    plus_minus,
    run,
    teacher,
    values,
)

UPDATES = [0, 64, 128, 256, 512]
MEASURES = {"fd": 2, "pixel_fd": 3, "accuracy": 3, "contrast": 3, "beyond": 2}  # name: digits


@dataclass
class Arm:
    variant: str
    w: str      # range of guidance in training
    cfg: float  # guidance of the samples


ARMS = {
    "dsdgl, w 1 to 3": Arm("dsdgl", "1 3", 1.5),
    "tsd, w 1 to 3": Arm("tsd", "1 3", 1.5),
    "dsdgl, unguided": Arm("dsdgl", "1 1", 1.0),
    "tsd, unguided": Arm("tsd", "1 1", 1.0),
}


def cells_of(arm, updates, lr):
    """The cells of an arm after so many updates, 0: the teachers themselves."""
    def command(number, seed):
        base = teacher(number)
        if updates == 0:
            return base
        return (f"dsd --ckpt {path(base)} --variant {arm.variant} --w {arm.w} --lr {lr:g} "
                f"--steps {updates} --seed {seed}")

    def row(number):
        return Row(4, arm.cfg, noise=number + 100, changes={"grid": "uniform"})

    return cells(command, row, FEW_HELD_OUT_TEACHERS, seeds=[0])


def main(args):
    run([teacher(number) for number in FEW_HELD_OUT_TEACHERS])
    rows = {}
    for name, arm in ARMS.items():
        rows[name] = {updates: cells_of(arm, updates, args.lr) for updates in UPDATES}
    get = run(rows)

    for measure, digits in MEASURES.items():
        print(f"\n{measure}, learning rate {args.lr:g}")
        print("| updates | " + " | ".join(map(str, UPDATES)) + " |")
        print("|" + "---|" * (1 + len(UPDATES)))
        for name, by_updates in rows.items():
            texts = []
            for found in by_updates.values():
                texts.append(plus_minus(values(get, found, measure)[:, 0], digits))
            print(f"| {name} | " + " | ".join(texts) + " |")

    curves = {}
    for name, by_updates in rows.items():
        beyond = [values(get, found, "beyond")[:, 0] for found in by_updates.values()]
        curves[name] = (UPDATES, np.array(beyond))
    draw("dsd_dynamics", "updates", "pixels beyond the range (hundredths)", curves)


def parser():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--lr", type=float, default=1e-5, help="of all arms (default: 1e-5)")
    return p


if __name__ == "__main__":
    main(parser().parse_args())
