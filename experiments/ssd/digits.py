"""Does iSSD work on the digits? 10 steps, no guidance.

    python -m experiments.ssd.digits                   about an hour on two CPU cores
    python -m experiments.ssd.digits --lam-max 1       lam 0.15: more gain, less class accuracy

1. Make the teachers: python train.py --seed 0, 1, and so on.
2. Choose lam and steps for every reading of Algorithm 2 on teachers 0 to 6, one seed. A setting is
   allowed that loses at most 0.003 of accuracy and nothing of pixel distance against its base
   model. Of those the choice has the largest mean gain in Frechet distance (digits-cnn).
3. Report the choice on held-out teachers 7 to 21 with three seeds each, on other noise, and also
   with a feature network that was not used to choose (digits-mlp). Gains are paired within a
   teacher and averaged over its seeds; the standard error is over teachers.
4. If accuracy or pixel distance are then worse than after continued training by more than their
   spread, repeat with a smaller lam (--lam-max).
"""
import argparse
import itertools

from experiments.runner import (
    HEADER,
    HELD_OUT_TEACHERS,
    TUNING_TEACHERS,
    Row,
    cells,
    changes,
    changes_text,
    columns,
    continued,
    gains_text,
    path,
    pick,
    print_header,
    run,
    teacher,
    values,
)
from experiments.ssd.tables import Setting, student

READINGS = ["teacher", "student", "literal"]
LAMS = [0.05, 0.1, 0.15, 0.25]
RATES = [5e-5]
STEPS = [50, 100]


def students(reading, setting, row, teachers, **seeds):
    """Cells of iSSD's students."""
    def command(number, seed):
        return student(f"issd --reading {reading}", path(teacher(number)), setting, seed)
    return cells(command, row, teachers, **seeds)


def choose_setting(get, base, tried, lam_max):
    """The setting of one reading; prints all settings' changes. tried: {setting: cells}."""
    change = {setting: changes(get, base, its_cells) for setting, its_cells in tried.items()}
    small = {setting: c for setting, c in change.items() if setting.lam <= lam_max}
    best, allowed = pick(small)
    none = "" if allowed else ", so the best of all"
    print(f"{len(allowed)} of {len(change)} settings allowed{none}; chosen {best}")
    ways = list(itertools.product(RATES, STEPS))
    print("| lam \\ lr, steps | " + " | ".join(f"{lr:g}, {steps}" for lr, steps in ways) + " |")
    print("|" + "---|" * (1 + len(ways)))
    for lam in LAMS:
        texts = [changes_text(change[Setting(lam, *way)], digits=(1, 2, 3)) for way in ways]
        print(f"| {lam} | " + " | ".join(texts) + " |")
    return best


def choose_settings(args):
    """-> {reading: Setting}."""
    def row(number):
        return Row(10, noise=0)

    settings = [Setting(*s) for s in itertools.product(LAMS, RATES, STEPS)]
    tried = {}
    for reading in READINGS:
        tried[reading] = {setting: students(reading, setting, row, TUNING_TEACHERS, seeds=[0])
                          for setting in settings}
    base = cells(lambda number, seed: teacher(number), row, TUNING_TEACHERS, seeds=[0])
    get = run([tried, base], args.jobs)
    chosen = {}
    for reading in READINGS:
        print(f"\n{reading}: ", end="")
        chosen[reading] = choose_setting(get, base, tried[reading], args.lam_max)
    return chosen


def held_out_rows(args, chosen):
    """-> {name: cells} of the report."""
    def row(number, nfe=10):
        return Row(nfe, noise=100 + number)

    def base(number, seed):
        return teacher(number)

    def control(number, seed):
        setting = chosen[args.reading]
        return continued(path(teacher(number)), seed, setting.lr, setting.steps)

    rows = {
        "base": cells(base, row, args.held_out),
        "base, 50 steps": cells(base, lambda number: row(number, 50), args.held_out),
        "continued training": cells(control, row, args.held_out),
    }
    for reading in READINGS:
        rows[f"iSSD, reading {reading}"] = students(reading, chosen[reading], row, args.held_out)
    return rows


def report(get, rows):
    """The table: as runner.table, and the spread over seeds."""
    controls = ["base", "continued training"]
    print_header(HEADER, "gain on base", "gain on continued", "spread over seeds")
    for name, its_cells in rows.items():
        texts = columns(get, its_cells)
        for control in controls:
            texts.append("" if name == control else gains_text(get, rows[control], its_cells))
        spread = values(get, its_cells, "fd").std(1, ddof=1).mean()
        print(f"| {name} | " + " | ".join(texts) + f" | {spread:.2f} |")


def main(args):
    run([teacher(number) for number in TUNING_TEACHERS + args.held_out], args.jobs)
    chosen = choose_settings(args)
    rows = held_out_rows(args, chosen)
    get = run(rows, args.jobs)
    print(f"\nheld-out teachers {args.held_out}, three seeds each: "
          "mean +- standard deviation over teachers (of means over seeds)")
    report(get, rows)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    p.add_argument("--reading", choices=READINGS, default="teacher",
                   help="whose learning rate and steps the continued training takes")
    p.add_argument("--lam-max", type=float, default=0.1, help="largest lam to choose")
    p.add_argument("--held-out", type=int, nargs="+", default=HELD_OUT_TEACHERS, metavar="TEACHER",
                   help="teachers of the report")
    main(p.parse_args())
