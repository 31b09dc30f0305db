"""Table 4 of the SSD paper on the digits: samplers at equal numbers of network evaluations.

    python -m experiments.ssd.samplers               ten minutes on two CPU cores

Five samplers on the base model, DDIM on the students, no guidance; teachers 10, 11, 12, three
seeds. Run this after experiments.ssd.tables: the students are the same, and then they are there
already. --ssd and --issd give the settings that were chosen there.
"""
import argparse

from experiments.runner import (
    FEW_HELD_OUT_TEACHERS,
    SEEDS,
    Row,
    cells,
    noise_seed,
    run,
    table,
    teacher,
)
from experiments.ssd.tables import Setting, students

SOLVERS = ["ddim", "ddpm", "plms", "dpm2", "dpm++"]


def samples_of_base(base, solver, nfe):
    """Cells of the base model under one sampler."""
    def row(number):
        return Row(nfe, noise=noise_seed(number), solver=solver)
    return cells(lambda number, seed: base[number], row, FEW_HELD_OUT_TEACHERS, seeds=[0])


def main(args):
    base = {number: teacher(number) for number in FEW_HELD_OUT_TEACHERS}
    run(base)
    chosen = {"SSD": ("ssd", args.ssd), "iSSD": ("issd --reading teacher", args.issd)}
    tables = {}
    for nfe in (10, 20):
        rows = {f"base, {solver}": samples_of_base(base, solver, nfe) for solver in SOLVERS}
        for name, (script, (lam, lr, steps)) in chosen.items():
            rows[f"{name}, ddim"] = students(base, script, Setting(lam, lr, int(steps)), nfe,
                                             FEW_HELD_OUT_TEACHERS, SEEDS)
        tables[nfe] = rows
    get = run(tables)
    for nfe, rows in tables.items():
        print(f"\n{nfe} evaluations")
        table(get, rows, against=("base, ddim",))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    setting = dict(type=float, nargs=3, metavar=("LAM", "LR", "STEPS"))
    p.add_argument("--ssd", default=[0.1, 5e-5, 50], **setting)
    p.add_argument("--issd", default=[0.15, 5e-5, 50], **setting)
    main(p.parse_args())
