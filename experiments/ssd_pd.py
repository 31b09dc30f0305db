"""Tables 5 and 6 and Fig. 4a of the SSD paper on the digits: iSSD on progressively distilled models, with that model's own steps.

    python experiments/ssd_pd.py                     half an hour on two CPU cores

PD 64 -> 32, 20 -> 10 -> 5 and 16 -> 8 -> 4 of eps teachers (plain PD: no DDIL, no thresholding, 100 updates a halving), then iSSD, SSD and continued training on each, no guidance.
lam is chosen for each number of steps on teachers 0 and 1, reported on teachers 10, 11, 12 with three seeds; iSSD with lam 0.05 too.
"""
from common import choose, continued, draw, path, run, table, teacher, values

TUNE, HELD_OUT, SEEDS = [0, 1], [10, 11, 12], [0, 1, 2]
CHAINS = {32: "64:100", 10: "20:100", 5: "20:100 10:100", 8: "16:100", 4: "16:100 8:100"}
LAMS, HOW = [0.02, 0.05, 0.1, 0.2], (5e-5, 50)


def main():
    base, noise = {T: teacher(T) for T in TUNE + HELD_OUT}, lambda T: T + 100 * (T in HELD_OUT)
    longest = {5: 5, 10: 5, 4: 4, 8: 4, 32: 32}  # the chain whose stage it is
    pd = lambda T, nfe: f"ddil --ckpt {path(base[T])} --dagger 0 0 --grid dit --threshold off --lr 3e-4 --batch-size 64 --seed 0 --data digits --stages {CHAINS[longest[nfe]]}"
    at = lambda T, nfe: path(pd(T, nfe), f"nfe{nfe}.pt")
    common = f"--lr {HOW[0]:g} --steps {HOW[1]} --batch-size 64 --data digits"
    student = lambda kind, T, nfe, seed, lam: f"{kind} --ckpt {at(T, nfe)} --lam {lam} {common} --seed {seed}"
    run([(c, []) for c in base.values()])
    run([(pd(T, nfe), []) for T in base for nfe in CHAINS])
    row = lambda T, nfe: (nfe, 1.0, noise(T))
    file = lambda nfe: f"nfe{nfe}.pt"

    jobs = [(student(kind, T, nfe, 0, lam), [row(T, nfe)]) for T in TUNE for nfe in CHAINS for lam in LAMS for kind in ("issd", "ssd")]
    get = run(jobs + [(pd(T, nfe), [row(T, nfe)], file(nfe)) for T in TUNE for nfe in CHAINS])
    best = {}
    for nfe in CHAINS:
        for kind in ("issd", "ssd"):
            print(f"{nfe} steps, {kind} (change of FD / pixel distance / accuracy):")
            best[nfe, kind] = choose(get, [[(pd(T, nfe), row(T, nfe), file(nfe))] for T in TUNE], {lam: [[(student(kind, T, nfe, 0, lam), row(T, nfe))] for T in TUNE] for lam in LAMS})

    of = lambda nfe, command: [[(command(T, s), row(T, nfe)) for s in SEEDS] for T in HELD_OUT]
    tables = {}
    for nfe in CHAINS:
        tables[nfe] = {"base": of(nfe, lambda T, s: base[T]), "PD": [[(pd(T, nfe), row(T, nfe), file(nfe))] for T in HELD_OUT],
                       "PD, continued training": of(nfe, lambda T, s: continued(at(T, nfe), s, *HOW))}
        for kind, name in (("ssd", "SSD"), ("issd", "iSSD")):
            tables[nfe][f"PD + {name}, lam {best[nfe, kind]}"] = of(nfe, lambda T, s, kind=kind: student(kind, T, nfe, s, best[nfe, kind]))
        tables[nfe]["PD + iSSD, lam 0.05"] = of(nfe, lambda T, s: student("issd", T, nfe, s, 0.05))
    get = run([(c[0], [c[1]], *c[2:]) for rows in tables.values() for cells in rows.values() for cell in cells for c in cell])
    for nfe, rows in tables.items():
        print(f"\n{nfe} steps, distilled by halving: {CHAINS[nfe]}")
        table(get, rows, against=("PD", "PD, continued training"))
    steps = sorted(CHAINS)
    import numpy as np
    curve = lambda i: (steps, np.array([values(get, list(tables[n].values())[i], "fd").mean(1) for n in steps]))
    draw("ssd_pd", "steps", "Frechet distance (digits-cnn)", {"base": curve(0), "PD": curve(1), "PD + iSSD": curve(4)})


if __name__ == "__main__":
    main()
