"""Tables 5, 6 and Fig. 4a of the SSD paper on the digits: iSSD after progressive distillation.

    python -m experiments.ssd.pd                     half an hour on two CPU cores

Plain progressive distillation (no DDIL, no thresholding, 100 updates per halving) of eps teachers:
64 -> 32, 20 -> 10 -> 5 and 16 -> 8 -> 4 steps. Each of these models is the base of iSSD, SSD and
continued training, with the model's own steps and no guidance. lam is chosen for each number of
steps on teachers 0 and 1. The results are of teachers 10, 11, 12 with three seeds; iSSD with lam
0.05 is there too.
"""
import numpy as np

from experiments.runner import (
    FEW_HELD_OUT_TEACHERS,
    FEW_TUNING_TEACHERS,
    SEEDS,
    cells,
    choose,
    continued,
    draw,
    path,
    run,
    table,
    teacher,
    values,
)
from experiments.ssd.tables import Setting, student, unguided

# Steps of the distilled model: the stages that make it.
CHAINS = {32: "64:100", 10: "20:100", 5: "20:100 10:100", 8: "16:100", 4: "16:100 8:100"}
LONGEST = {32: 32, 10: 5, 5: 5, 8: 4, 4: 4}  # the chain that passes through this number of steps
NAMES = {"ssd": "SSD", "issd": "iSSD"}
LAMS = [0.02, 0.05, 0.1, 0.2]


def distilled(number, nfe):
    """The command that makes a teacher's model of `nfe` steps, in the file nfe<nfe>.pt."""
    return (f"ddil --ckpt {path(teacher(number))} --dagger 0 0 --grid dit --threshold off "
            f"--lr 3e-4 --batch-size 64 --seed 0 --data digits --stages {CHAINS[LONGEST[nfe]]}")


def distilled_path(number, nfe):
    return path(distilled(number, nfe), f"nfe{nfe}.pt")


def distilled_cells(nfe, teachers):
    return cells(lambda number, seed: distilled(number, nfe), unguided(nfe), teachers, [0],
                 file=f"nfe{nfe}.pt")


def students(script, nfe, lam, teachers, seeds):
    """Cells of SSD or iSSD on the distilled model of `nfe` steps."""
    def command(number, seed):
        return student(script, distilled_path(number, nfe), Setting(lam), seed, flags="")
    return cells(command, unguided(nfe), teachers, seeds)


def choose_lams():
    """-> {(steps, script): lam}."""
    tried, plain = {}, {}
    for nfe in CHAINS:
        plain[nfe] = distilled_cells(nfe, FEW_TUNING_TEACHERS)
        for script in ("issd", "ssd"):
            tried[nfe, script] = {lam: students(script, nfe, lam, FEW_TUNING_TEACHERS, [0])
                                  for lam in LAMS}
    get = run([tried, plain])
    chosen = {}
    for (nfe, script), settings in tried.items():
        print(f"{nfe} steps, {script} (change of FD / pixel distance / accuracy):")
        chosen[nfe, script] = choose(get, plain[nfe], settings)
    return chosen


def held_out_rows(chosen, nfe):
    """-> {name: cells} of one number of steps."""
    def control(number, seed):
        setting = Setting(0)
        return continued(distilled_path(number, nfe), seed, setting.lr, setting.steps)

    def reported(script, lam):
        return students(script, nfe, lam, FEW_HELD_OUT_TEACHERS, SEEDS)

    rows = {
        "base": cells(lambda number, seed: teacher(number), unguided(nfe), FEW_HELD_OUT_TEACHERS),
        "PD": distilled_cells(nfe, FEW_HELD_OUT_TEACHERS),
        "PD, continued training": cells(control, unguided(nfe), FEW_HELD_OUT_TEACHERS),
    }
    for script, name in NAMES.items():
        lam = chosen[nfe, script]
        rows[f"PD + {name}, lam {lam}"] = reported(script, lam)
    rows["PD + iSSD, lam 0.05"] = reported("issd", 0.05)
    return rows


def main():
    teachers = FEW_TUNING_TEACHERS + FEW_HELD_OUT_TEACHERS
    run([teacher(number) for number in teachers])
    chains = []
    for number in teachers:
        chains += [distilled(number, nfe) for nfe in CHAINS]
    run(chains)

    chosen = choose_lams()
    tables = {nfe: held_out_rows(chosen, nfe) for nfe in CHAINS}
    get = run(tables)
    for nfe, rows in tables.items():
        print(f"\n{nfe} steps, distilled by halving: {CHAINS[nfe]}")
        table(get, rows, against=("PD", "PD, continued training"))

    steps = sorted(CHAINS)
    curves = {}
    for name, kind in (("base", "base"), ("PD", "PD"), ("PD + iSSD", "issd")):
        points = []
        for nfe in steps:
            row = f"PD + iSSD, lam {chosen[nfe, 'issd']}" if kind == "issd" else kind
            points.append(values(get, tables[nfe][row], "fd").mean(1))
        curves[name] = steps, np.array(points)
    draw("ssd_pd", "steps", "Frechet distance (digits-cnn)", curves)


if __name__ == "__main__":
    main()
