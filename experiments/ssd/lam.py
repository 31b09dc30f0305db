"""Fig. 4d of the SSD paper on the digits: the weight lam.

    python -m experiments.ssd.lam                    twenty minutes on two CPU cores

In SSD lam is the weight of the cleaner step, in iSSD that of the noisier one. Ten steps, no
guidance, teachers 10, 11, 12, one seed, 50 updates at a learning rate of 5e-5.
"""
import numpy as np

from experiments.runner import (
    FEW_HELD_OUT_TEACHERS,
    cells,
    draw,
    path,
    run,
    table,
    teacher,
    values,
)
from experiments.ssd.tables import Setting, student, unguided

LAMS = [0.05, 0.1, 0.2, 0.3, 0.5]
SCRIPTS = {
    "SSD": "ssd",
    "iSSD, teacher's features": "issd --reading teacher",
    "iSSD, student's": "issd --reading student",
}


def students(base, script, lam):
    """Cells of one weight."""
    def command(number, seed):
        return student(script, path(base[number]), Setting(lam), seed)
    return cells(command, unguided(10), FEW_HELD_OUT_TEACHERS, seeds=[0])


def main():
    base = {number: teacher(number) for number in FEW_HELD_OUT_TEACHERS}
    run(base)
    plain = cells(lambda number, seed: base[number], unguided(10), FEW_HELD_OUT_TEACHERS, [0])
    rows = {"base": plain}
    for name, script in SCRIPTS.items():
        for lam in LAMS:
            rows[f"{name}, lam {lam}"] = students(base, script, lam)
    get = run(rows)
    table(get, rows)

    curves = {}
    for name in SCRIPTS:
        points = [plain] + [rows[f"{name}, lam {lam}"] for lam in LAMS]
        curves[name] = [0] + LAMS, np.array([values(get, p, "fd")[:, 0] for p in points])
    draw("ssd_lam", "lam", "Frechet distance (digits-cnn)", curves)


if __name__ == "__main__":
    main()
