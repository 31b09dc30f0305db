"""Fig. 4b of the SSD paper on the digits: only one of ten steps is distilled.

    python -m experiments.ssd.one_step               ten minutes on two CPU cores

The base model makes all other steps. Teachers 10, 11, 12, one seed, no guidance, lam 0.1, 50
updates at a learning rate of 5e-5. The table shows the gain in Frechet distance for each node at
which the student's network is called. Node 1 is the noisiest.
"""
import numpy as np

from experiments.runner import (
    FEW_HELD_OUT_TEACHERS,
    NETWORKS,
    Row,
    cells,
    draw,
    gain,
    noise_seed,
    path,
    run,
    teacher,
)
from experiments.ssd.tables import Setting, student, unguided

METHODS = {"iSSD": "issd", "SSD": "ssd"}


def students(base, script, step):
    """Cells of students of one pair of nodes, `step` and the next."""
    def command(number, seed):
        return student(script, path(base[number]), Setting(0.1), seed,
                       f"--nfe 10 --only-step {step}")

    def row(number):
        return Row(10, noise=noise_seed(number), changes={"base": path(base[number])})
    return cells(command, row, FEW_HELD_OUT_TEACHERS, seeds=[0])


def text(get, plain, node_cells, network):
    """A gain with its standard deviation over teachers."""
    if node_cells is None:
        return ""
    g = gain(get, plain, node_cells, network)
    return f"{g.mean():+.2f} +- {g.std(ddof=1):.2f}"


def main():
    base = {number: teacher(number) for number in FEW_HELD_OUT_TEACHERS}
    run(base)
    plain = cells(lambda number, seed: base[number], unguided(10), FEW_HELD_OUT_TEACHERS, [0])
    curves = {}
    for name, script in METHODS.items():
        # Of a pair of nodes SSD trains the network at the first one, iSSD at the second.
        later = 1 if name == "iSSD" else 0
        curves[name] = {step + later: students(base, script, step) for step in range(1, 10)}
    get = run([curves, plain])

    titles = []
    for name in curves:
        titles += [f"{name}: gain {network}" for network in NETWORKS]
    print("| the student at node | " + " | ".join(titles) + " |\n|" + "---|" * 5)
    for node in range(1, 11):
        texts = []
        for curve in curves.values():
            texts += [text(get, plain, curve.get(node), network) for network in NETWORKS]
        print(f"| {node} | " + " | ".join(texts) + " |")

    drawn = {}
    for name, curve in curves.items():
        drawn[name] = list(curve), np.array([gain(get, plain, c) for c in curve.values()])
    draw("ssd_one_step", "the student's node (1: noisiest)",
         "gain in Frechet distance (digits-cnn)", drawn)


if __name__ == "__main__":
    main()
