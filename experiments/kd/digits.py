"""Figures 2, 3 and 4 of the KD paper in miniature, on the digits.

    python -m experiments.kd.digits 3        KD against score matching for the same student
    python -m experiments.kd.digits 2        distance against cost for students of several sizes
    python -m experiments.kd.digits 4        the guided student against its guided teacher
                                             (half an hour each on two CPU cores)

Heun's method, N steps, 2N - 1 evaluations: N = 3, 5, 10, 18 in figures 2 and 4. In figure 4 the
student takes one evaluation where the guided teacher takes two; w = 0.25 and 0.5, which are our
scales 1.25 and 1.5.

Three held-out teachers DDPM++-16x1, three seeds each (one seed at 2,000 steps, and where labels are
dropped). The learning rates of KD and of score matching are chosen in the same way, on two tuning
teachers (one seed, 600 steps, 19 evaluations, by digits-cnn). Cost: floating-point operations of a
sample, 2 per multiply-add; a guided teacher runs twice.
"""
import argparse
from dataclasses import dataclass

import numpy as np

import models
from experiments.runner import (
    FEW_HELD_OUT_TEACHERS,
    FEW_TUNING_TEACHERS,
    NETWORKS,
    SEEDS,
    Row,
    cells,
    draw,
    path,
    run,
    standard_error,
    table,
    teacher,
    values,
)

RATES = [1e-3, 3e-3, 1e-2, 3e-2]
POINTS = [100, 200, 400, 800, 2000]  # steps of training in figure 3
LAST = 800                           # steps in the other figures; beyond it there is one seed
EVALUATIONS = [5, 9, 19, 35]
SIZES, TEACHER_SIZE = ["4x1", "8x1", "12x1"], "16x1"
KD, MATCHING, MATCHING_DRY = "KD", "score matching", "score matching, no dropout"
FLAGS = {KD: "", MATCHING: "--alpha 1", MATCHING_DRY: "--alpha 1 --dropout 0"}
DRY_POINTS = [200, 800, 2000]        # where score matching without dropout is measured


def base(number, seed=0):
    """The command of a teacher; seed: of a student, a teacher has none beside its number."""
    return teacher(number, f"DDPM++-{TEACHER_SIZE}", steps=1000)


def student(number, seed, flags="", lr=3e-3, steps=LAST, size="8x1"):
    command = (f"kd --ckpt {path(base(number))} --student DDPM++-{size} --lr {lr:g} "
               f"--steps {steps} --seed {seed} {flags}")
    return command.strip()


def cells_of(command, nfe, cfg=1.0, seeds=SEEDS, teachers=FEW_HELD_OUT_TEACHERS):
    return cells(command, lambda number: Row(nfe, cfg, noise=number + 100), teachers, seeds)


def gain(get, a, b):
    """How far b lies below a, paired within a teacher and seed; standard error over teachers.

    A teacher has no seeds: it is set against each of its students'.
    """
    texts = []
    for network in NETWORKS:
        g = values(get, a, "fd", network) - values(get, b, "fd", network)
        error = standard_error(g.mean(1))
        texts.append(f"{g.mean():.2f} (se {error:.2f}, {int((g > 0).sum())} of {g.size})")
    return ", ".join(texts)


def show(get, title, rows):
    print(f"\n{title}")
    table(get, rows)


def distances(get, found):
    """Lists of cells -> array (cells, teachers) for draw()."""
    return np.array([values(get, each, "fd").mean(1) for each in found])


def choose_rates():
    """{arm: learning rate}."""
    run([base(number) for number in FEW_TUNING_TEACHERS + FEW_HELD_OUT_TEACHERS])
    tried = {}
    for arm in (KD, MATCHING):
        tried[arm] = {}
        for lr in RATES:
            def command(number, seed, arm=arm, lr=lr):
                return student(number, seed, FLAGS[arm], lr, 600)
            tried[arm][lr] = cells_of(command, 19, seeds=[0], teachers=FEW_TUNING_TEACHERS)
    get = run(tried)

    chosen = {}
    for arm, by_rate in tried.items():
        fd = {lr: values(get, found, "fd").mean() for lr, found in by_rate.items()}
        chosen[arm] = min(fd, key=fd.get)
        texts = [f"{lr:g}: {value:.2f}" for lr, value in fd.items()]
        print(f"{arm}: FD by learning rate {', '.join(texts)}; chosen {chosen[arm]:g}")
    chosen[MATCHING_DRY] = chosen[MATCHING]
    return chosen


def figure_3():
    """Distance over training."""
    rates = choose_rates()
    by_steps = {}
    for steps in POINTS:
        by_steps[steps] = {}
        for arm, flags in FLAGS.items():
            if arm == MATCHING_DRY and steps not in DRY_POINTS:
                continue

            def command(number, seed, arm=arm, flags=flags, steps=steps):
                return student(number, seed, flags, rates[arm], steps)
            seeds = SEEDS if steps <= LAST else [0]
            by_steps[steps][arm] = cells_of(command, 19, seeds=seeds)
    of_teacher = cells_of(base, 19, seeds=[0])
    get = run([by_steps, of_teacher])

    for steps, arms in by_steps.items():
        show(get, f"{steps} steps, 19 evaluations", {**arms, "teacher": of_teacher})
        for arm in list(arms)[1:]:
            print(f"gain of KD on {arm}: {gain(get, arms[arm], arms[KD])}")
    curves = {}
    for arm in (KD, MATCHING):
        fd = distances(get, [by_steps[steps][arm] for steps in POINTS])
        curves[arm] = (POINTS, fd)
    draw("kd_training", "steps of training", "FD digits-cnn", curves)


def costs():
    """{size: GFLOP of one evaluation}."""
    found = {}
    for size in [*SIZES, TEACHER_SIZE]:
        found[size] = models.count(models.make_arch(f"DDPM++-{size}", 8, 1, 10))[1] / 1e9
    return found


def figure_2():
    """Distance against cost."""
    rate, cost = choose_rates()[KD], costs()
    rows = {}
    for size in cost:
        rows[size] = {}
        for nfe in EVALUATIONS:
            def command(number, seed, size=size):
                return student(number, seed, lr=rate, size=size)
            if size == TEACHER_SIZE:
                rows[size][nfe] = cells_of(base, nfe, seeds=[0])
            else:
                rows[size][nfe] = cells_of(command, nfe)
    get = run(rows)

    for nfe in EVALUATIONS:
        shown = {}
        for size in rows:
            role = "teacher" if size == TEACHER_SIZE else "student"
            shown[f"{role} {size}, {nfe * cost[size]:.3f} GFLOP"] = rows[size][nfe]
        show(get, f"{nfe} evaluations", shown)
    curves = {}
    for size, by_nfe in rows.items():
        gflop = [nfe * cost[size] for nfe in EVALUATIONS]
        curves[size] = (gflop, distances(get, by_nfe.values()))
    draw("kd_sizes", "GFLOP per sample", "FD digits-cnn", curves)


@dataclass
class Guided:
    """A row of figure 4."""

    command: object  # (number, seed) -> the command
    cost: float      # GFLOP per evaluation, both halves of guidance counted
    seeds: tuple = (0,)


def figure_4():
    """Guidance in one evaluation against two."""
    rate, cost = choose_rates()[KD], costs()
    arms = {
        "student of Eq. 6": Guided(
            lambda number, seed: student(number, seed, "--w 1 4", rate), cost["8x1"], SEEDS),
        "student of Eq. 5, labels dropped": Guided(
            lambda number, seed: student(number, seed, "--drop 0.1", rate), 2 * cost["8x1"]),
        "teacher": Guided(base, 2 * cost[TEACHER_SIZE]),
    }
    for w in (0.25, 0.5):
        rows = {}
        for name, arm in arms.items():
            rows[name] = {}
            for nfe in EVALUATIONS:
                rows[name][nfe] = cells_of(arm.command, nfe, 1 + w, arm.seeds)
        get = run(rows)

        for nfe in EVALUATIONS:
            shown = {}
            for name, arm in arms.items():
                shown[f"{name}, {nfe * arm.cost:.3f} GFLOP"] = rows[name][nfe]
            show(get, f"w = {w}, {nfe} steps' evaluations", shown)
        better = gain(get, rows["teacher"][5], rows["student of Eq. 6"][19])
        print(f"the student with 19 evaluations against the teacher with 5: {better}")
        curves = {}
        for name, arm in arms.items():
            gflop = [nfe * arm.cost for nfe in EVALUATIONS]
            curves[name] = (gflop, distances(get, rows[name].values()))
        draw(f"kd_guided-{w}", "GFLOP per sample", "FD digits-cnn", curves)


def main(args):
    figures = {2: figure_2, 3: figure_3, 4: figure_4}
    figures[args.figure]()


def parser():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("figure", type=int, choices=[2, 3, 4], help="of the paper")
    return p


if __name__ == "__main__":
    main(parser().parse_args())
