"""Why does progressive distillation gain so much more than DSD for as many updates? TSD taken apart on the digits.

    python experiments/dsd_why.py                    fifteen minutes on two CPU cores

PD, TSD and DSD differ in three things: whether z_t is noised data or a state of the teacher's own sampling, whether the teacher is frozen or the student itself,
and whether a batch holds random timesteps or a single one, which then moves along the trajectory. 256 updates 16 -> 8 -> 4 -> 2, the weight max(1, SNR) and the
plain distance of outputs, three learning rates (DSD's warm-up and cosine), no averaging, no guidance; teachers 0 and 1, one seed. Random timesteps of the own
states are drawn from the last trajectory.
"""
import argparse
import itertools
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from common import NETWORKS, path, run, teacher

TEACHERS, P, RATES = [0, 1], 256, [1e-5, 1e-4, 1e-3]


def job(key):
    """(teacher, states, batch, weight, learning rate) -> {steps: distances}."""
    T, states, batch, weight, lr = key
    import copy
    import torch
    torch.set_num_threads(1)
    import checkpoints, data, ddil, dsd, fid, runtime
    from runtime import Guard, Processes, StepRandom
    from solvers import add_noise, make_grid, make_schedule, sample
    proc, schedule, B, out = Processes("off"), make_schedule("linear"), 64, {}
    net, info = checkpoints.load_model(path(teacher(T)))
    opt, guard = runtime.adamw(net.train(), lr, (0.9, 0.98)), Guard(proc)
    where = [w for w in dsd.allocate("tsd", 16, P * 4 // 3) if w[0] > 2][:P]  # the paper's last depth would end at one step
    stream = data.batches(data.load("digits"), proc, 0, B, 0)
    for step, (N, k) in enumerate(where):
        if step == 0 or where[step - 1][0] != N:
            grid, frozen = torch.tensor(make_grid("uniform", N)), copy.deepcopy(net).eval()
        (x0, y), rng = next(stream), StepRandom(proc, 0, step, B)
        source = net if states == "own (DSD)" else frozen
        if states != "data (PD)" and k == 0:  # a trajectory of the teacher, with labels of its own
            labels = rng.integers(0, 10)
            way = torch.stack(sample(source, rng.normal((1, 8, 8)), labels, schedule, grid.tolist(), keep=True))
        k = torch.full((B,), k) if batch == "one timestep" else rng.integers(0, N // 2)
        t, mid, u = grid[2 * k], grid[2 * k + 1], grid[2 * k + 2]
        z, y = (add_noise(schedule, x0, rng.normal((1, 8, 8)), t), y) if states == "data (PD)" else (way[2 * k, torch.arange(B)], labels)
        goal = ddil.pd_target(source, schedule, z, (y,), t, mid, u, "eps")
        loss = ddil.pd_loss(net, schedule, z, (y,), t, goal, "eps", weight)
        loss.backward()
        opt.param_groups[0]["lr"] = lr * dsd.rate(step, P)
        guard.update(opt, loss, step, clip=1.0)
    guard.check(".")
    for nfe in (2, 4, 8):
        x, y = data.sample_images(proc.mixed(net.eval()), {**info, "grid": "uniform"}, proc, 2000, T + 100, nfe, 1.0)
        out[nfe] = {name: fid.evaluate(x, y, proc, name) for name in NETWORKS}
    return key, out


def main(_):
    import numpy as np
    os.environ["OMP_NUM_THREADS"] = "1"
    run([(teacher(T), []) for T in TEACHERS])
    settings = list(itertools.product(("data (PD)", "teacher's (TSD)", "own (DSD)"), ("random timesteps", "one timestep"), ("snr", "output"), RATES))
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        done = dict(pool.map(job, [(T, *s) for s in settings for T in TEACHERS]))
    print("FD digits-cnn, digits-mlp, accuracy\n| states | batch | weight | learning rate | 2 steps | 4 steps | 8 steps |\n|" + "---|" * 7)
    for s in settings:
        v = lambda nfe, net, what: np.mean([done[T, *s][nfe][net][what] for T in TEACHERS])
        print("| " + " | ".join(map(str, s)) + " | " + " | ".join(f"{v(n, 'digits-cnn', 'fd'):.2f}, {v(n, 'digits-mlp', 'fd'):.2f}, {v(n, 'digits-cnn', 'accuracy'):.3f}" for n in (2, 4, 8)) + " |")
    print("done", file=sys.stderr)


if __name__ == "__main__":
    main(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args())
