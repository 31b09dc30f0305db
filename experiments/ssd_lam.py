"""Fig. 4d of the SSD paper on the digits: the weight lam, which in SSD is that of the cleaner step, in iSSD of the noisier one.

    python experiments/ssd_lam.py                    twenty minutes on two CPU cores

Ten steps, no guidance, teachers 10, 11, 12, one seed, 50 updates at a learning rate of 5e-5.
"""
from common import draw, path, run, table, teacher, values

HELD_OUT, LAMS = [10, 11, 12], [0.05, 0.1, 0.2, 0.3, 0.5]


def main():
    import numpy as np
    base = {T: teacher(T) for T in HELD_OUT}
    run([(base[T], []) for T in HELD_OUT])
    row = lambda T: (10, 1.0, T + 100)
    student = lambda kind, T, lam: f"{kind} --ckpt {path(base[T])} --nfe 10 --lam {lam} --lr 5e-5 --steps 50 --batch-size 64 --seed 0 --data digits"
    kinds = {"SSD": "ssd", "iSSD, teacher's features": "issd --reading teacher", "iSSD, student's": "issd --reading student"}
    rows = {(name, lam): [[(student(kind, T, lam), row(T))] for T in HELD_OUT] for name, kind in kinds.items() for lam in LAMS}
    plain = [[(base[T], row(T))] for T in HELD_OUT]
    get = run([(c, [r]) for cells in [*rows.values(), plain] for cell in cells for c, r in cell])
    table(get, {"base": plain} | {f"{name}, lam {lam}": cells for (name, lam), cells in rows.items()})
    zero = values(get, plain, "fd")[:, 0]
    draw("ssd_lam", "lam", "Frechet distance (digits-cnn)", {name: ([0] + LAMS, np.array([zero] + [values(get, rows[name, lam], "fd")[:, 0] for lam in LAMS])) for name in kinds})


if __name__ == "__main__":
    main()
