"""Table 4 of the SSD paper on the digits: samplers on the base model, and DDIM on the student, at equal numbers of network evaluations.

    python experiments/ssd_samplers.py               after ssd_tables.py, whose models it takes: ten minutes on two CPU cores

Teachers 10, 11, 12, no guidance; the students of ssd_tables.py with the settings given here (three seeds).
"""
import argparse

from common import path, run, table, teacher
from ssd_tables import HELD_OUT, SEEDS, issd, ssd


def main(args):
    base, noise = {T: teacher(T) for T in HELD_OUT}, lambda T: T + 100
    tables = {}
    for nfe in (10, 20):
        rows = {f"base, {solver}": [[(base[T], (nfe, 1.0, noise(T), solver))] for T in HELD_OUT] for solver in ("ddim", "ddpm", "plms", "dpm2", "dpm++")}
        rows["SSD, ddim"] = [[(ssd(path(base[T]), nfe, s, args.ssd[0], (args.ssd[1], int(args.ssd[2]))), (nfe, 1.0, noise(T))) for s in SEEDS] for T in HELD_OUT]
        rows["iSSD, ddim"] = [[(issd(path(base[T]), nfe, s, args.issd[0], (args.issd[1], int(args.issd[2]))), (nfe, 1.0, noise(T))) for s in SEEDS] for T in HELD_OUT]
        tables[nfe] = rows
    get = run([(command, [row]) for rows in tables.values() for row in rows.values() for cells in row for command, row in cells])
    for nfe, rows in tables.items():
        print(f"\n{nfe} evaluations")
        table(get, rows, against=("base, ddim",))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ssd", type=float, nargs=3, default=[0.1, 5e-5, 50], metavar=("LAM", "LR", "STEPS"))
    p.add_argument("--issd", type=float, nargs=3, default=[0.15, 5e-5, 50], metavar=("LAM", "LR", "STEPS"))
    main(p.parse_args())
