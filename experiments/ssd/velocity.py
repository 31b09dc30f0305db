"""Table 1 (upper half) of the SSD paper on the digits: a model that predicts velocity, Eq. 16-17.

    python -m experiments.ssd.velocity               half an hour on two CPU cores

The schedule is the linear interpolant. With 10 Euler steps, t = s - 0.1 and the target is the
fixed teacher's. With 50 Euler steps and with 250 steps of the SDE, t = s - 0.005 and the target is
that of a moving average of the student, or the fixed teacher's.

Learning rate and steps are chosen at 10 steps on teachers 0 and 1. The results are of teachers 10,
11, 12 with three seeds (250 steps: one), without guidance, and for 10 steps also with guidance 1.5.
"""
import itertools
from functools import partial

from experiments.runner import (
    FEW_HELD_OUT_TEACHERS,
    FEW_TUNING_TEACHERS,
    SEEDS,
    Row,
    cells,
    choose,
    continued,
    noise_seed,
    path,
    run,
    table,
    teacher,
)
from experiments.ssd.tables import Setting, student

SETTINGS = [Setting(1, lr, steps)
            for lr, steps in itertools.product([1e-5, 5e-5, 2e-4], [50, 200])]


def choose_setting(base, cfg):
    """The learning rate and steps at 10 steps and this scale of guidance."""
    def row(number):
        return Row(10, cfg, noise_seed(number))

    tried = {}
    for setting in SETTINGS:
        command = partial(student_of, base, setting)
        tried[setting] = cells(command, row, FEW_TUNING_TEACHERS, seeds=[0])
    plain = cells(lambda number, seed: base[number], row, FEW_TUNING_TEACHERS, seeds=[0])
    get = run([tried, plain])
    print(f"\n10 steps, guidance {cfg:g} (change of FD / pixel distance / accuracy):")
    return choose(get, plain, tried)


def student_of(base, setting, number, seed, flags="--nfe 10"):
    return student("ssd", path(base[number]), setting, seed, flags)


def held_out_rows(base, setting, cfg, nfe, solver):
    """-> {name: cells} of one number of steps."""
    def reported(command, nfe=nfe):
        def row(number):
            return Row(nfe, cfg, noise_seed(number), solver)
        return cells(command, row, FEW_HELD_OUT_TEACHERS, seeds)

    def unchanged(number, seed):
        return base[number]

    def control(number, seed):
        return continued(path(base[number]), seed, setting.lr, setting.steps)

    seeds = [0] if nfe == 250 else SEEDS
    rows = {"base": reported(unchanged)}
    if nfe < 250:
        rows["continued training"] = reported(control)
    if nfe == 10:
        command = partial(student_of, base, setting)
        rows["Eq. 17, t = s - 0.1, fixed teacher"] = reported(command)
        rows["base, 50 steps"] = reported(unchanged, nfe=50)
        return rows
    for kind in ("ema", "fixed"):
        flags = f"--nfe 250 --interval 0.005 --teacher {kind}"
        command = partial(student_of, base, setting, flags=flags)
        rows[f"Eq. 17, t = s - 0.005, {kind} teacher"] = reported(command)
    return rows


def main():
    base = {number: teacher(number, prediction="velocity")
            for number in FEW_TUNING_TEACHERS + FEW_HELD_OUT_TEACHERS}
    run(base)
    tables = {}
    for cfg in (1.0, 1.5):
        setting = choose_setting(base, cfg)
        for nfe, solver in ((10, "euler"), (50, "euler"), (250, "sde")):
            if cfg == 1.0 or nfe == 10:
                tables[nfe, solver, cfg] = held_out_rows(base, setting, cfg, nfe, solver)
    get = run(tables)
    for (nfe, solver, cfg), rows in tables.items():
        print(f"\n{nfe} steps, {solver}, guidance {cfg:g}")
        table(get, rows, against=("base", "continued training") if nfe < 250 else ("base",))


if __name__ == "__main__":
    main()
