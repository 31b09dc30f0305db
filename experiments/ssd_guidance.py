"""Does self step-distillation gain when sampling is guided? 10 steps, guidance 1.5, as everywhere in the SSD paper.

    python experiments/ssd_guidance.py               three quarters of an hour on two CPU cores

A teacher trained for 1,000 steps is as ImageNet's are: guidance helps it at many steps (50: Frechet distance 48 -> 16, class accuracy 0.86 -> 0.97), and 10 steps are
clearly worse than 50. One trained for 2,000 is not: guidance already costs diversity. Arms: method and reading x what is guided in training
(nothing; the solver's step; all forwards) x label drop. lam is chosen for each (rule: common.choose) on teachers 0 and 1, one seed, reported on 10, 11, 12 with three seeds.
"""
import itertools

from common import choose, continued, path, run, table, teacher, values

TUNE, HELD_OUT, SEEDS = [0, 1], [10, 11, 12], [0, 1, 2]
METHODS = {f"iSSD, reading {r}": (f"issd --reading {r}", [0.05, 0.1, 0.2, 0.3], (5e-5, 50)) for r in ("teacher", "student", "literal")}
METHODS["SSD"] = ("ssd", [0.1, 0.3, 0.5, 1.0], (1e-4, 100))
FORMS = {"no": "nothing guided", "step": "the step guided", "all": "all guided"}


def student(method, base, form, seed, lam, drop=0.1, times=1):
    script, *reading = METHODS[method][0].split()
    lr, steps = METHODS[method][2][0], times * METHODS[method][2][1]
    return " ".join([script, f"--ckpt {path(base)} --nfe 10 --cfg 1.5 --lam {lam}", *reading, f"--guided {form} --drop {drop} --lr {lr:g} --steps {steps} --batch-size 64 --seed {seed}"])


def main():
    weak, strong = ({T: teacher(T, steps=n) for T in TUNE + HELD_OUT} for n in (1000, 2000))
    row = lambda T, nfe=10, cfg=1.5: (nfe, cfg, T + 100 * (T in HELD_OUT))
    run([(c, []) for c in [*weak.values(), *strong.values()]])
    arms = list(itertools.product(METHODS, FORMS, (0.1, 0.0)))
    tried = {(m, f, d): {lam: [[(student(m, weak[T], f, 0, lam, d), row(T))] for T in TUNE] for lam in METHODS[m][1]} for m, f, d in arms}
    base = [[(weak[T], row(T))] for T in TUNE]
    get = run([(c, [r]) for group in tried.values() for cells in [*group.values(), base] for cell in cells for c, r in cell])
    best = {}
    for arm, group in tried.items():
        print(f"\n{arm[0]}, {FORMS[arm[1]]}, label dropped {arm[2]:.0%} (lam: change of FD / pixel distance / accuracy)")
        best[arm] = choose(get, base, group)
    print("\nlabel drop 10 % against none, difference of the best FD by arm: " + ", ".join(
        f"{min((values(get, tried[m, f, 0.1][lam], 'fd') - values(get, tried[m, f, 0.0][lam], 'fd')).mean() for lam in [best[m, f, 0.1]]):+.2f}" for m, f, d in arms if d))

    def rows(base, methods, forms):
        of = lambda command, *r: [[(command(T, s), row(T, *r)) for s in SEEDS] for T in HELD_OUT]
        out = {"base": of(lambda T, s: base[T]), "base, 50 steps": of(lambda T, s: base[T], 50), "base, unguided": of(lambda T, s: base[T], 10, 1.0),
               "base, 50 steps, unguided": of(lambda T, s: base[T], 50, 1.0), "continued training": of(lambda T, s: continued(path(base[T]), s, 5e-5, 50))}
        for m, f in itertools.product(methods, forms):
            lam = best[m, f, 0.1]
            out[f"{m}, {FORMS[f]}, lam {lam}"] = of(lambda T, s, m=m, f=f, lam=lam: student(m, base[T], f, s, lam))
            if f == "no" and m == "iSSD, reading teacher":  # at the cost of "all guided"
                out[f"{m}, {FORMS[f]}, lam {lam}, twice the steps"] = of(lambda T, s, m=m, f=f, lam=lam: student(m, base[T], f, s, lam, times=2))
        return out
    tables = {"teachers of 1,000 steps": rows(weak, METHODS, FORMS), "teachers of 2,000 steps": rows(strong, ["iSSD, reading teacher", "iSSD, reading student", "SSD"], ["no", "all"])}
    get = run([(c, [r]) for table in tables.values() for cells in table.values() for cell in cells for c, r in cell])
    for name, t in tables.items():
        print(f"\n{name}")
        table(get, t, against=("base", "continued training"))


if __name__ == "__main__":
    main()
