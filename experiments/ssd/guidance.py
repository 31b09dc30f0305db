"""Does self step-distillation gain when sampling is guided? 10 steps, guidance 1.5 as in the paper.

    python -m experiments.ssd.guidance               three quarters of an hour on two CPU cores

A teacher trained for 1,000 steps behaves as ImageNet's do: guidance helps it at many steps (at 50
the Frechet distance falls from 48 to 16, class accuracy rises from 0.86 to 0.97), and 10 steps are
clearly worse than 50. A teacher trained for 2,000 steps does not: guidance already costs diversity.

Arms: method and reading, times what is guided in training (nothing; the solver's step; all
forwards), times label drop. lam is chosen for each arm (the rule is runner.pick) on teachers 0 and
1, one seed. The results are of teachers 10, 11, 12 with three seeds.
"""
import itertools
from dataclasses import dataclass

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
    values,
)
from experiments.ssd.tables import Setting, student


@dataclass(frozen=True)
class Method:
    script: str
    lams: tuple
    lr: float
    steps: int


ISSD = ((0.05, 0.1, 0.2, 0.3), 5e-5, 50)
METHODS = {
    "iSSD, reading teacher": Method("issd --reading teacher", *ISSD),
    "iSSD, reading student": Method("issd --reading student", *ISSD),
    "iSSD, reading literal": Method("issd --reading literal", *ISSD),
    "SSD": Method("ssd", (0.1, 0.3, 0.5, 1.0), 1e-4, 100),
}
GUIDED = {"no": "nothing guided", "step": "the step guided", "all": "all guided"}
DROPS = (0.1, 0.0)


@dataclass(frozen=True)
class Arm:
    """A method's name, what is guided in training, and the share of labels that are dropped."""

    method: str
    guided: str
    drop: float

    def __str__(self):
        return f"{self.method}, {GUIDED[self.guided]}"

    def students(self, base, lam, teachers, seeds, times=1):
        """Cells at 10 steps, guidance 1.5; base: {number: command}; times: as many updates."""
        method = METHODS[self.method]
        setting = Setting(lam, method.lr, times * method.steps)
        flags = f"--nfe 10 --cfg 1.5 --guided {self.guided} --drop {self.drop}"

        def command(number, seed):
            return student(method.script, path(base[number]), setting, seed, flags)
        return cells(command, row(), teachers, seeds)


ARMS = [Arm(*parts) for parts in itertools.product(METHODS, GUIDED, DROPS)]


def row(nfe=10, cfg=1.5):
    """-> row(number) for cells()."""
    return lambda number: Row(nfe, cfg, noise_seed(number))


def choose_lams(base):
    """-> {arm: lam}; prints all that was tried."""
    tried = {}
    for arm in ARMS:
        tried[arm] = {lam: arm.students(base, lam, FEW_TUNING_TEACHERS, [0])
                      for lam in METHODS[arm.method].lams}
    plain = cells(lambda number, seed: base[number], row(), FEW_TUNING_TEACHERS, [0])
    get = run([tried, plain])
    chosen = {}
    for arm, settings in tried.items():
        print(f"\n{arm}, label dropped {arm.drop:.0%} "
              "(lam: change of FD / pixel distance / accuracy)")
        chosen[arm] = choose(get, plain, settings)

    differences = []
    for arm in ARMS:
        if arm.drop:
            lam = chosen[arm]
            without = tried[Arm(arm.method, arm.guided, 0.0)][lam]
            difference = values(get, tried[arm][lam], "fd") - values(get, without, "fd")
            differences.append(f"{difference.mean():+.2f}")
    print("\nlabel drop 10 % against none, difference of the best FD by arm: "
          + ", ".join(differences))
    return chosen


def held_out_rows(base, chosen, methods, guided):
    """-> {name: cells} of the arms with these methods and forms of guidance."""
    def unchanged(number, seed):
        return base[number]

    def control(number, seed):
        return continued(path(base[number]), seed, 5e-5, 50)

    rows = {
        "base": cells(unchanged, row(), FEW_HELD_OUT_TEACHERS),
        "base, 50 steps": cells(unchanged, row(50), FEW_HELD_OUT_TEACHERS),
        "base, unguided": cells(unchanged, row(10, 1.0), FEW_HELD_OUT_TEACHERS),
        "base, 50 steps, unguided": cells(unchanged, row(50, 1.0), FEW_HELD_OUT_TEACHERS),
        "continued training": cells(control, row(), FEW_HELD_OUT_TEACHERS),
    }
    for method, form in itertools.product(methods, guided):
        arm = Arm(method, form, 0.1)
        lam = chosen[arm]
        rows[f"{arm}, lam {lam}"] = arm.students(base, lam, FEW_HELD_OUT_TEACHERS, SEEDS)
        if form == "no" and method == "iSSD, reading teacher":  # at the cost of "all guided"
            rows[f"{arm}, lam {lam}, twice the steps"] = arm.students(
                base, lam, FEW_HELD_OUT_TEACHERS, SEEDS, times=2)
    return rows


def main():
    teachers = FEW_TUNING_TEACHERS + FEW_HELD_OUT_TEACHERS
    weak = {number: teacher(number, steps=1000) for number in teachers}
    strong = {number: teacher(number, steps=2000) for number in teachers}
    run([weak, strong])
    chosen = choose_lams(weak)

    few = ["iSSD, reading teacher", "iSSD, reading student", "SSD"]
    tables = {
        "teachers of 1,000 steps": held_out_rows(weak, chosen, METHODS, GUIDED),
        "teachers of 2,000 steps": held_out_rows(strong, chosen, few, ["no", "all"]),
    }
    get = run(tables)
    for name, rows in tables.items():
        print(f"\n{name}")
        table(get, rows, against=("base", "continued training"))


if __name__ == "__main__":
    main()
