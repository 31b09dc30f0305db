"""Figures 2, 3 and 4 of the KD paper in miniature, on the digits. Heun's method, N steps, 2N - 1 evaluations.

    python experiments/kd_digits.py 3        KD against score matching for the same student, over training
    python experiments/kd_digits.py 2        distance against cost for students of several sizes; N = 3, 5, 10, 18
    python experiments/kd_digits.py 4        the guided student (one evaluation) against its guided teacher (two); w = 0.25 and 0.5, ours 1.25 and 1.5
                                             (half an hour each on two CPU cores)

Teachers DDPM++-16x1 10, 11, 12, three seeds each (at 2,000 steps, and where labels are dropped, one). The learning rates of KD and of score matching are chosen in the same way, on teachers 0 and 1 (one seed,
600 steps, 19 evaluations, by digits-cnn). Cost: floating-point operations of a sample, 2 per multiply-add; a guided teacher runs twice.
"""
import argparse

from common import NETWORKS, draw, path, run, teacher, values

TUNE, HELD_OUT, SEEDS = [0, 1], [10, 11, 12], [0, 1, 2]
RATES, POINTS, LAST = [1e-3, 3e-3, 1e-2, 3e-2], [100, 200, 400, 800, 2000], 800
EVALUATIONS, SIZES = [5, 9, 19, 35], ["4x1", "8x1", "12x1"]
ARMS = {"KD": "", "score matching": "--alpha 1", "score matching, no dropout": "--alpha 1 --dropout 0"}


def base(T):
    return teacher(T, "DDPM++-16x1", steps=1000)


def student(T, seed, more="", lr=3e-3, steps=LAST, size="8x1"):
    return f"kd --ckpt {path(base(T))} --student DDPM++-{size} --lr {lr:g} --steps {steps} --seed {seed} {more}".strip()


def held_out(make, row, seeds=SEEDS):
    """Cells as values() and table() take them: per teacher the seeds' (command, row). make(T, seed); row(T)."""
    return [[(make(T, seed), row(T)) for seed in seeds] for T in HELD_OUT]


def measured(cells):
    """{key: cells} -> get, with every cell trained and measured."""
    return run([(c, [row]) for grid in cells.values() for line in grid for c, row in line])


def show(get, title, cells):
    print(f"\n{title}\n| | FD digits-cnn | FD digits-mlp | pixel distance | accuracy |\n|---|---|---|---|---|")
    for name, cell in cells.items():
        v = [values(get, cell, what, net).mean(1) for what, net in (("fd", "digits-cnn"), ("fd", "digits-mlp"), ("pixel_fd", "digits-cnn"), ("accuracy", "digits-cnn"))]
        print(f"| {name} | " + " | ".join(f"{x.mean():.{d}f} +- {x.std(ddof=1):.{d}f}" for x, d in zip(v, (2, 2, 3, 3))) + " |")


def gain(get, a, b):
    """How far b lies below a, paired within a teacher and seed; standard error over teachers."""
    g = [(values(get, a, "fd", n) - values(get, b, "fd", n)) for n in NETWORKS]  # a teacher has no seeds, and is set against each of its students'
    return ", ".join(f"{x.mean():.2f} (se {x.mean(1).std(ddof=1) / len(x) ** 0.5:.2f}, {int((x > 0).sum())} of {x.size})" for x in g)


def rates():
    """The learning rate of KD and of score matching."""
    cell = lambda T, arm, lr: [(student(T, 0, ARMS[arm], lr, 600), (19, 1.0, T + 100))]
    cells = {(arm, lr): [cell(T, arm, lr) for T in TUNE] for arm in ("KD", "score matching") for lr in RATES}
    run([(base(T), []) for T in TUNE + HELD_OUT])
    get, chosen = measured(cells), {}
    for arm in ("KD", "score matching"):
        fd = {lr: values(get, cells[arm, lr], "fd").mean() for lr in RATES}
        chosen[arm] = min(fd, key=fd.get)
        print(f"{arm}: FD by learning rate {', '.join(f'{lr:g}: {v:.2f}' for lr, v in fd.items())}; chosen {chosen[arm]:g}")
    return {arm: chosen["score matching" if arm.startswith("score") else "KD"] for arm in ARMS}


def figure_3():
    import numpy as np
    lr = rates()
    cells = {(arm, n): held_out(lambda T, s: student(T, s, ARMS[arm], lr[arm], n), lambda T: (19, 1.0, T + 100), SEEDS if n <= LAST else [0])
             for arm in ARMS for n in POINTS if "no dropout" not in arm or n in (200, 800, 2000)}
    cells["teacher"] = held_out(lambda T, s: base(T), lambda T: (19, 1.0, T + 100), [0])
    get = measured(cells)
    for n in POINTS:
        arms = [arm for arm in ARMS if (arm, n) in cells]
        show(get, f"{n} steps, 19 evaluations", {arm: cells[arm, n] for arm in arms} | {"teacher": cells["teacher"]})
        for arm in arms[1:]:
            print(f"gain of KD on {arm}: {gain(get, cells[arm, n], cells['KD', n])}")
    draw("kd_training", "steps", "FD digits-cnn", {arm: (POINTS, np.array([values(get, cells[arm, n], "fd").mean(1) for n in POINTS])) for arm in list(ARMS)[:2]})


def costs():
    """GFLOP of one evaluation by size."""
    import models
    return {size: models.count(models.make_arch(f"DDPM++-{size}", 8, 1, 10))[1] / 1e9 for size in SIZES + ["16x1"]}


def figure_2():
    import numpy as np
    lr, cost = rates()["KD"], costs()
    makes = {size: (lambda T, s, size=size: student(T, s, lr=lr, size=size)) for size in SIZES} | {"16x1": lambda T, s: base(T)}
    cells = {(size, n): held_out(make, lambda T: (n, 1.0, T + 100), [0] if size == "16x1" else SEEDS) for size, make in makes.items() for n in EVALUATIONS}
    get = measured(cells)
    for n in EVALUATIONS:
        show(get, f"{n} evaluations", {f"{'teacher' if size == '16x1' else 'student'} {size}, {n * cost[size]:.3f} GFLOP": cells[size, n] for size in makes})
    draw("kd_sizes", "GFLOP a sample", "FD digits-cnn",
         {size: ([n * cost[size] for n in EVALUATIONS], np.array([values(get, cells[size, n], "fd").mean(1) for n in EVALUATIONS])) for size in makes})


def figure_4():
    import numpy as np
    lr, cost = rates()["KD"], costs()
    arms = {"student of Eq. 6": (lambda T, s: student(T, s, "--w 1 4", lr), cost["8x1"]), "student of Eq. 5, labels dropped": (lambda T, s: student(T, s, "--drop 0.1", lr), 2 * cost["8x1"]),
            "teacher": (lambda T, s: base(T), 2 * cost["16x1"])}
    cells = {(arm, w, n): held_out(make, lambda T: (n, 1 + w, T + 100), SEEDS if "Eq. 6" in arm else [0]) for arm, (make, _) in arms.items() for w in (0.25, 0.5) for n in EVALUATIONS}
    get = measured(cells)
    for w in (0.25, 0.5):
        for n in EVALUATIONS:
            show(get, f"w = {w}, {n} steps' evaluations", {f"{arm}, {n * each:.3f} GFLOP": cells[arm, w, n] for arm, (_, each) in arms.items()})
        print(f"the student with 19 evaluations against the teacher with 5: {gain(get, cells['teacher', w, 5], cells['student of Eq. 6', w, 19])}")
        draw(f"kd_guided-{w}", "GFLOP a sample", "FD digits-cnn",
             {arm: ([n * each for n in EVALUATIONS], np.array([values(get, cells[arm, w, n], "fd").mean(1) for n in EVALUATIONS])) for arm, (_, each) in arms.items()})


def main(args):
    {2: figure_2, 3: figure_3, 4: figure_4}[args.figure]()


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("figure", type=int, choices=[2, 3, 4])
    main(p.parse_args())
