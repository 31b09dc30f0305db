"""Tables 1 (lower half), 2, 3, 7 and 8 of the SSD paper on the digits: two model sizes, unguided.

    python -m experiments.ssd.tables                 about an hour on two CPU cores

Rows at 10, 20 and 50 steps: the base model (also at 250 steps), continued training, Eq. 10 (SSD
with lam 1), SSD, iSSD in two of its readings, iSSD on synthetic data of 10 and 20 steps. lam,
learning rate and steps are chosen at 10 steps on teachers 0 and 1 (one seed, digits-cnn; the rule
is runner.pick). The results are of teachers 10, 11, 12 with three seeds each, on other noise.
Eq. 10 takes SSD's learning rate and steps. iSSD on synthetic data takes the settings of iSSD.
"""
import itertools
from typing import NamedTuple

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


class Setting(NamedTuple):
    """What is chosen for a student; its batch is 64."""

    lam: float
    lr: float = 5e-5
    steps: int = 50

    def __str__(self):
        return f"lam {self.lam}, lr {self.lr:g}, {self.steps} steps"


SSD_SETTINGS = [Setting(lam, *how) for lam, how in
                itertools.product([0.1, 0.2, 0.3, 0.5], [(5e-5, 50), (1e-4, 100)])]
ISSD_SETTINGS = [Setting(lam) for lam in (0.05, 0.1, 0.15)]
SETTINGS = {
    "ssd": SSD_SETTINGS,
    "issd --reading teacher": ISSD_SETTINGS,
    "issd --reading student": ISSD_SETTINGS,
}
NAMES = {
    "ssd": "SSD",
    "issd --reading teacher": "iSSD, reading teacher",
    "issd --reading student": "iSSD, reading student",
}


def student(script, ckpt, setting, seed, flags="--nfe 10", data="digits"):
    """The command of a student; script: "ssd" or "issd", also with flags of its own."""
    return (f"{script} --ckpt {ckpt} --lam {setting.lam} --lr {setting.lr:g} "
            f"--steps {setting.steps} --batch-size 64 --seed {seed} --data {data} {flags}")


def unguided(nfe):
    """-> row(number) for cells(): nfe steps without guidance."""
    return lambda number: Row(nfe, noise=noise_seed(number))


def students(base, script, setting, nfe, teachers, seeds, data="digits"):
    """Cells of students of `nfe` steps; base: {number of the teacher: command}."""
    def command(number, seed):
        return student(script, path(base[number]), setting, seed, f"--nfe {nfe}", data)
    return cells(command, unguided(nfe), teachers, seeds)


def choose_settings(base):
    """-> {script: Setting}, at 10 steps."""
    tried = {}
    for script, settings in SETTINGS.items():
        tried[script] = {setting: students(base, script, setting, 10, FEW_TUNING_TEACHERS, [0])
                         for setting in settings}
    plain = cells(lambda number, seed: base[number], unguided(10), FEW_TUNING_TEACHERS, [0])
    get = run([tried, plain])
    chosen = {}
    for script, settings in tried.items():
        print(f"{NAMES[script]} (change of FD / pixel distance / accuracy):")
        chosen[script] = choose(get, plain, settings)
    return chosen


def held_out_rows(base, chosen, nfe):
    """-> {name: cells} of one number of steps."""
    def reported(script, setting, data="digits"):
        return students(base, script, setting, nfe, FEW_HELD_OUT_TEACHERS, SEEDS, data)

    def control(number, seed):
        return continued(path(base[number]), seed, ssd.lr, ssd.steps)

    ssd = chosen["ssd"]
    rows = {
        "base": cells(lambda number, seed: base[number], unguided(nfe), FEW_HELD_OUT_TEACHERS),
        "continued training": cells(control, unguided(nfe), FEW_HELD_OUT_TEACHERS),
        "Eq. 10 (lam 1)": reported("ssd", ssd._replace(lam=1.0)),
    }
    for script, setting in chosen.items():
        rows[f"{NAMES[script]}, lam {setting.lam}"] = reported(script, setting)
    for steps in (10, 20) if nfe == 10 else (10,):
        script = "issd --reading teacher"
        rows[f"{NAMES[script]}, on samples of {steps} steps"] = reported(
            script, chosen[script], f"synthetic:{steps}")
    return rows


def main(model):
    print(f"\n### {model}\n")
    base = {number: teacher(number, model)
            for number in FEW_TUNING_TEACHERS + FEW_HELD_OUT_TEACHERS}
    run(base)
    chosen = choose_settings(base)

    tables = {nfe: held_out_rows(base, chosen, nfe) for nfe in (10, 20, 50)}
    long = cells(lambda number, seed: base[number], unguided(250), FEW_HELD_OUT_TEACHERS, [0])
    get = run([tables, long])
    print("\nbase at 250 steps")
    table(get, {"base, 250 steps": long})
    for nfe, rows in tables.items():
        print(f"\n{nfe} steps")
        table(get, rows, against=("base", "continued training"))


if __name__ == "__main__":
    for name in ("DiT-Ti/2", "DiT-Na/2"):
        main(name)
