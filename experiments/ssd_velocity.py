"""Table 1 of the SSD paper, upper half, on the digits: a model that predicts the velocity of the linear interpolant, with and without Eq. 16-17.

    python experiments/ssd_velocity.py               half an hour on two CPU cores

10 Euler steps: t = s - 0.1 from the fixed teacher; 50 and 250 steps: t = s - 0.005 from a moving average of the student, and from the fixed teacher; the SDE
with 250 steps. Learning rate and steps are chosen at 10 steps on teachers 0 and 1, reported on teachers 10, 11, 12 with three seeds
(250 steps: one); without guidance, 10 steps also with 1.5.
"""
import itertools

from common import choose, continued, path, run, table, teacher

TUNE, HELD_OUT, SEEDS = [0, 1], [10, 11, 12], [0, 1, 2]
SETTINGS = list(itertools.product([1e-5, 5e-5, 2e-4], [50, 200]))


def main():
    base = {T: teacher(T, prediction="velocity") for T in TUNE + HELD_OUT}
    noise = lambda T: T + 100 * (T in HELD_OUT)
    student = lambda T, seed, lr, steps, nfe=10, more="": f"ssd --ckpt {path(base[T])} --nfe {nfe} --lam 1 --lr {lr:g} --steps {steps} --batch-size 64 --seed {seed} --data digits{more}"
    run([(c, []) for c in base.values()])
    tables = {}
    for cfg in (1.0, 1.5):
        cells = lambda command: [[(command(T), (10, cfg, noise(T)))] for T in TUNE]
        settings = {s: cells(lambda T: student(T, 0, *s)) for s in SETTINGS}
        get = run([(command, [row]) for group in [*settings.values(), cells(base.get)] for cell in group for command, row in cell])
        print(f"\n10 steps, guidance {cfg:g} (change of FD / pixel distance / accuracy):")
        lr, steps = choose(get, cells(base.get), settings)

        def of(command, nfe, solver):
            return [[(command(T, s), (nfe, cfg, noise(T), solver)) for s in SEEDS[:1 if nfe == 250 else 3]] for T in HELD_OUT]
        for nfe, solver in ((10, "euler"), (50, "euler"), (250, "sde"))[:1 if cfg > 1 else 3]:
            rows = {"base": of(lambda T, s: base[T], nfe, solver)}
            if nfe < 250:
                rows["continued training"] = of(lambda T, s: continued(path(base[T]), s, lr, steps), nfe, solver)
            if nfe == 10:
                rows["Eq. 17, t = s - 0.1, fixed teacher"] = of(lambda T, s: student(T, s, lr, steps), nfe, solver)
                rows["base, 50 steps"] = of(lambda T, s: base[T], 50, solver)
            else:
                rows |= {f"Eq. 17, t = s - 0.005, {who} teacher": of(lambda T, s, who=who: student(T, s, lr, steps, 250, f" --interval 0.005 --teacher {who}"), nfe, solver)
                         for who in ("ema", "fixed")}
            tables[nfe, solver, cfg] = rows
        get = run([(command, [row]) for rows in tables.values() for row in rows.values() for cell in row for command, row in cell])
    for (nfe, solver, cfg), rows in tables.items():
        print(f"\n{nfe} steps, {solver}, guidance {cfg:g}")
        table(get, rows, against=("base", "continued training") if nfe < 250 else ("base",))


if __name__ == "__main__":
    main()
