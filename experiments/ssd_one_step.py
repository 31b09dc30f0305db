"""Fig. 4b of the SSD paper on the digits: only one of ten steps is distilled, all others are the base model's.

    python experiments/ssd_one_step.py               ten minutes on two CPU cores

Teachers 10, 11, 12, one seed, settings of ssd_tables.py; the gain in Frechet distance by the node whose network is the student's.
"""
from common import NETWORKS, draw, path, run, teacher, values

HELD_OUT = [10, 11, 12]


def main():
    import numpy as np
    base = {T: teacher(T) for T in HELD_OUT}
    more = lambda T: (10, 1.0, T + 100, None, {"elsewhere": path(base[T])})
    curves = {"iSSD": {}, "SSD": {}}
    for n in range(1, 10):
        for name, kind, lam in (("iSSD", "issd", 0.1), ("SSD", "ssd", 0.1)):
            curves[name][n + (kind == "issd")] = [[(f"{kind} --ckpt {path(base[T])} --nfe 10 --lam {lam} --lr 5e-5 --steps 50 --batch-size 64 --seed 0 --data digits --only-step {n}", more(T))]
                                                  for T in HELD_OUT]
    plain = [[(base[T], (10, 1.0, T + 100))] for T in HELD_OUT]
    run([(base[T], []) for T in HELD_OUT])
    get = run([(command, [row]) for group in [*curves["iSSD"].values(), *curves["SSD"].values(), plain] for cell in group for command, row in cell])
    print("| the student at node | " + " | ".join(f"{name}: gain {n}" for name in curves for n in NETWORKS) + " |\n|" + "---|" * 5)
    gain = lambda cells, network: (values(get, plain, "fd", network) - values(get, cells, "fd", network))[:, 0]
    for node in range(1, 11):
        cells = [gain(c[node], n) if node in c else None for c in curves.values() for n in NETWORKS]
        print(f"| {node} | " + " | ".join("" if g is None else f"{g.mean():+.2f} +- {g.std(ddof=1):.2f}" for g in cells) + " |")
    draw("ssd_one_step", "the student's node (1: noisiest)", "gain in Frechet distance (digits-cnn)",
         {name: (list(c), np.array([gain(cells, "digits-cnn") for cells in c.values()])) for name, c in curves.items()})


if __name__ == "__main__":
    main()
