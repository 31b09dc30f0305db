"""Does a model that teaches itself under guidance oversaturate? Distance, accuracy, contrast and overshoot against the length of training.

    python experiments/dsd_dynamics.py               ten minutes on two CPU cores

Four steps on uniform nodes, teachers 10, 11, 12, one seed. Guidance 1 to 3 in training and 1.5 in sampling, against none in either, and against a
teacher that changes at the end of a depth only (TSD). The learning rate is one for all; every length has its own warm-up and cosine.
"""
import argparse

from common import draw, path, run, teacher, values

HELD_OUT, STEPS, UNIFORM = [10, 11, 12], [64, 128, 256, 512], {"grid": "uniform"}
ARMS = {"dsdgl, w 1 to 3": ("dsdgl", "1 3", 1.5), "tsd, w 1 to 3": ("tsd", "1 3", 1.5), "dsdgl, unguided": ("dsdgl", "1 1", 1.0), "tsd, unguided": ("tsd", "1 1", 1.0)}
MEASURES = {"fd": 2, "pixel_fd": 3, "accuracy": 3, "contrast": 3, "beyond": 2}


def main(args):
    import numpy as np
    base = {T: teacher(T) for T in HELD_OUT}
    run([(base[T], []) for T in HELD_OUT])
    student = lambda T, n, v, w: base[T] if n == 0 else f"dsd --ckpt {path(base[T])} --variant {v} --w {w} --lr {args.lr:g} --steps {n} --seed 0"
    cells = {(arm, n): [[(student(T, n, v, w), (4, cfg, T + 100, None, UNIFORM))] for T in HELD_OUT] for arm, (v, w, cfg) in ARMS.items() for n in [0] + STEPS}
    get = run([(c, [row]) for grid in cells.values() for teacher in grid for c, row in teacher])
    for what, digits in MEASURES.items():
        print(f"\n{what}, learning rate {args.lr:g}\n| updates | " + " | ".join(map(str, [0] + STEPS)) + " |\n|" + "---|" * (2 + len(STEPS)))
        for arm in ARMS:
            v = [values(get, cells[arm, n], what)[:, 0] for n in [0] + STEPS]
            print(f"| {arm} | " + " | ".join(f"{x.mean():.{digits}f} +- {x.std(ddof=1):.{digits}f}" for x in v) + " |")
    draw("dsd_dynamics", "updates", "pixels beyond the range, hundredths",
         {arm: ([0] + STEPS, np.array([values(get, cells[arm, n], "beyond")[:, 0] for n in [0] + STEPS])) for arm in ARMS})


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--lr", type=float, default=1e-5)
    main(p.parse_args())
