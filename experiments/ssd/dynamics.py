"""Fig. 4c of the SSD paper on the digits: teacher, fused student and student while iSSD trains.

    python -m experiments.ssd.dynamics               fifteen minutes on two CPU cores

Training goes on for longer than is good. Ten nodes, no guidance, teachers 10, 11, 12, one seed.
The fused student is the network that is trained: it applies Eq. 6 while sampling, with features
from the teacher (19 evaluations).
"""
import argparse

import numpy as np

from experiments.runner import (
    FEW_HELD_OUT_TEACHERS,
    Row,
    cells,
    draw,
    noise_seed,
    path,
    plus_minus,
    run,
    teacher,
    values,
)
from experiments.ssd.tables import Setting, student, unguided

STEPS = [0, 10, 25, 50, 100, 200]


def curves_of(base, lam):
    """-> {name: {steps of training: cells}}."""
    def row_fused(number):
        changes = {"lam": lam, "features_from": path(base[number])}
        return Row(19, noise=noise_seed(number), solver="fused", changes=changes)

    def teachers(number, seed):
        return base[number]

    rows = {"teacher": unguided(10), "fused student": row_fused, "student": unguided(10)}
    curves = {name: {} for name in rows}
    for steps in STEPS:
        def students(number, seed, steps=steps):
            if steps == 0:
                return base[number]
            return student("issd", path(base[number]), Setting(lam, steps=steps), seed)
        for name, row in rows.items():
            command = teachers if name == "teacher" else students
            curves[name][steps] = cells(command, row, FEW_HELD_OUT_TEACHERS, seeds=[0])
    return curves


def main(args):
    base = {number: teacher(number) for number in FEW_HELD_OUT_TEACHERS}
    run(base)
    curves = curves_of(base, args.lam)
    get = run(curves)
    print(f"Frechet distance (digits-cnn), lam {args.lam}")
    print("| steps of training | " + " | ".join(str(steps) for steps in STEPS) + " |")
    print("|" + "---|" * (1 + len(STEPS)))
    drawn = {}
    for name, curve in curves.items():
        v = np.array([values(get, point, "fd")[:, 0] for point in curve.values()])
        print(f"| {name} | " + " | ".join(plus_minus(point, 2) for point in v) + " |")
        drawn[name] = STEPS, v
    draw("ssd_dynamics", "steps of training", "Frechet distance (digits-cnn)", drawn)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--lam", type=float, default=0.1)
    main(p.parse_args())
