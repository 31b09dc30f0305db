"""Fig. 4c of the SSD paper on the digits: teacher, fused student and plain student while iSSD trains; and longer than is good.

    python experiments/ssd_dynamics.py               fifteen minutes on two CPU cores

Ten nodes, no guidance, teachers 10, 11, 12, one seed. The fused student is the network that is trained: Eq. 6 while sampling, features from the teacher
(19 evaluations).
"""
import argparse

from common import draw, path, run, teacher, values

HELD_OUT, STEPS = [10, 11, 12], [10, 25, 50, 100, 200]


def main(args):
    import numpy as np
    base = {T: teacher(T) for T in HELD_OUT}
    run([(base[T], []) for T in HELD_OUT])
    student = lambda T, n: f"issd --ckpt {path(base[T])} --nfe 10 --lam {args.lam} --lr 5e-5 --steps {n} --batch-size 64 --seed 0 --data digits"
    plain = lambda T: (10, 1.0, T + 100)
    fused = lambda T: (19, 1.0, T + 100, "fused", {"lam": args.lam, "source": path(base[T])})
    rows = {"teacher": {n: [[(base[T], plain(T))] for T in HELD_OUT] for n in [0] + STEPS},
            "fused student": {0: [[(base[T], fused(T))] for T in HELD_OUT]} | {n: [[(student(T, n), fused(T))] for T in HELD_OUT] for n in STEPS},
            "student": {0: [[(base[T], plain(T))] for T in HELD_OUT]} | {n: [[(student(T, n), plain(T))] for T in HELD_OUT] for n in STEPS}}
    get = run([(c, [row]) for curve in rows.values() for cells in curve.values() for cell in cells for c, row in cell])
    print(f"Frechet distance (digits-cnn), lam {args.lam}\n| steps of training | " + " | ".join(map(str, [0] + STEPS)) + " |\n|" + "---|" * (2 + len(STEPS)))
    for name, curve in rows.items():
        v = {n: values(get, cells, "fd")[:, 0] for n, cells in curve.items()}
        print(f"| {name} | " + " | ".join(f"{x.mean():.2f} +- {x.std(ddof=1):.2f}" for x in v.values()) + " |")
    draw("ssd_dynamics", "steps of training", "Frechet distance (digits-cnn)",
         {name: (list(curve), np.array([values(get, cells, "fd")[:, 0] for cells in curve.values()])) for name, curve in rows.items()})


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--lam", type=float, default=0.1)
    main(p.parse_args())
