"""Tables 1 (lower half), 2, 3, 7 and 8 of the SSD paper on the digits: two model sizes, 10, 20 and 50 steps, no guidance.

    python experiments/ssd_tables.py                  about an hour on two CPU cores

Base (also at 250 steps), continued training, Eq. 10 (SSD with lam 1), SSD, iSSD in its two readings, iSSD on synthetic data of 10 and 20 steps. lam, learning rate
and steps are chosen at 10 steps on teachers 0 and 1 (one seed, digits-cnn; the rule: common.choose), and reported on teachers 10, 11, 12 with three
seeds each, on other noise. Eq. 10 takes SSD's learning rate and steps, synthetic data iSSD's settings.
"""
import itertools

from common import choose, continued, path, run, table, teacher

TUNE, HELD_OUT, SEEDS = [0, 1], [10, 11, 12], [0, 1, 2]
SSD = list(itertools.product([0.1, 0.2, 0.3, 0.5], [(5e-5, 50), (1e-4, 100)]))
ISSD = {"teacher": [(lam, (5e-5, 50)) for lam in (0.05, 0.1, 0.15)], "student": [(lam, (5e-5, 50)) for lam in (0.05, 0.1, 0.15)]}


def ssd(ckpt, nfe, seed, lam, how, data="digits"):
    return f"ssd --ckpt {ckpt} --nfe {nfe} --lam {lam} --lr {how[0]:g} --steps {how[1]} --batch-size 64 --seed {seed} --data {data}"


def issd(ckpt, nfe, seed, lam, how, reading="teacher", data="digits"):
    return f"issd --ckpt {ckpt} --nfe {nfe} --lam {lam} --reading {reading} --lr {how[0]:g} --steps {how[1]} --batch-size 64 --seed {seed} --data {data}"


def main(model):
    print(f"\n### {model}\n")
    base = {T: teacher(T, model) for T in TUNE + HELD_OUT}
    noise = lambda T: T + 100 * (T in HELD_OUT)
    run([(c, []) for c in base.values()])
    settings = {"SSD": {s: lambda T, s=s: ssd(path(base[T]), 10, 0, *s) for s in SSD}} | {
        f"iSSD, reading {r}": {s: lambda T, r=r, s=s: issd(path(base[T]), 10, 0, *s, r) for s in ss} for r, ss in ISSD.items()}
    cells = lambda command, nfe, Ts=TUNE: [[(command(T), (nfe, 1.0, noise(T)))] for T in Ts]
    every = [c for group in settings.values() for command in group.values() for c in sum(cells(command, 10), [])]
    get = run([(command, [row]) for command, row in every + sum(cells(base.get, 10), [])])
    best = {}
    for name, group in settings.items():
        print(f"{name} (change of FD / pixel distance / accuracy):")
        best[name] = choose(get, cells(base.get, 10), {s: cells(command, 10) for s, command in group.items()})

    tables, jobs = {}, []
    for nfe in (10, 20, 50):
        of = lambda command: [[(command(T, seed), (nfe, 1.0, noise(T))) for seed in SEEDS] for T in HELD_OUT]
        lam, how = best["SSD"]
        rows = {"base": of(lambda T, s: base[T]), "continued training": of(lambda T, s: continued(path(base[T]), s, *how)),
                "Eq. 10 (lam 1)": of(lambda T, s: ssd(path(base[T]), nfe, s, 1.0, how)), f"SSD, lam {lam}": of(lambda T, s: ssd(path(base[T]), nfe, s, lam, how))}
        for r in ISSD:
            l2, h2 = best[f"iSSD, reading {r}"]
            rows[f"iSSD, reading {r}, lam {l2}"] = of(lambda T, s, r=r, l2=l2, h2=h2: issd(path(base[T]), nfe, s, l2, h2, r))
        l2, h2 = best["iSSD, reading teacher"]
        for steps in (10, 20) if nfe == 10 else (10,):
            rows[f"the same on samples of {steps} steps"] = of(lambda T, s, steps=steps: issd(path(base[T]), nfe, s, l2, h2, data=f"synthetic:{steps}"))
        tables[nfe] = rows
        jobs += [c for row in rows.values() for cells in row for c in cells]
    long = [[(base[T], (250, 1.0, noise(T)))] for T in HELD_OUT]
    get = run([(command, [row]) for command, row in jobs] + [(command, [row]) for cells in long for command, row in cells])
    print("\nbase at 250 steps")
    table(get, {"base, 250 steps": long})
    for nfe, rows in tables.items():
        print(f"\n{nfe} steps")
        table(get, rows, against=("base", "continued training"))


if __name__ == "__main__":
    for model in ("DiT-Ti/2", "DiT-Na/2"):
        main(model)
