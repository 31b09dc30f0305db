"""Fig. 3 of the DSD paper on the digits: Eq. 1 against the ordinary loss, both from scratch, over training.

    python experiments/dsd_scratch.py                twenty minutes on two CPU cores

Pairs of neighbours on grids of N = 128 and 16 steps. v prediction, the digits' usual training but for a constant learning rate of 2e-3, seeds 0, 1, 2; the averaged weights are measured on the way, 2,000 samples of 10
and 50 steps. An update of Eq. 1 costs two evaluations (four units, a backward counting as two), one of the ordinary loss one (three units).
"""
import argparse
import itertools
import os
from functools import partial
from multiprocessing import get_context

from common import NETWORKS, ROOT, draw

SEEDS, NFES = [0, 1, 2], [10, 50]
AT = [500, 1000, 2000]
POINTS = {"plain": [500, 667, 1000, 1333, 2000, 2667, 4000], "N 128": AT, "N 16": AT}  # updates


def arm(job):
    seed, name = job
    import torch
    torch.set_num_threads(1)
    import data, dsd, fid, models, runtime, train
    from runtime import EMA, Guard, Processes, StepRandom
    from solvers import make_schedule
    args = train.parser().parse_args(["--prediction", "v", "--seed", str(seed), "--steps", str(max(POINTS[name])), "--lr", "2e-3", "--decay", "constant"])
    train.fill_defaults(args)
    proc, dataset, schedule = Processes("off"), data.load("digits"), make_schedule("linear")
    torch.manual_seed(seed)
    net = models.build(models.make_arch("DiT-Ti/2", 8, 1, 10))
    torch.nn.init.normal_(net.y_embedder.embedding_table.weight, std=args.label_std)
    ema, opt, guard, B = EMA(net, args.ema), runtime.adamw(net, args.lr), Guard(proc), args.batch_size
    averaged = models.build(net.arch)
    info = dict(schedule="linear", prediction="v", arch=net.arch, classes=10, grid="uniform", nfe=None, cfg=1.0, solver="ddim", threshold="off")
    loss_of, out = train.diffusion_loss if name == "plain" else partial(dsd.training_loss, N=int(name[2:])), {}
    stream = data.batches(dataset, proc, seed, B, 0)
    for step in range(args.steps):
        x0, y = next(stream)
        rng = StepRandom(proc, seed, step, B)
        t, y, noise = rng.integers(0, 1000), torch.where(rng.uniform() < 0.1, 10, y), rng.normal(x0.shape[1:])
        loss, terms = loss_of(net, schedule, x0, y, t, noise, "v")
        loss.backward()
        for group in opt.param_groups:
            group["lr"] = args.lr * train.learning_rate(step, args)
        guard.update(opt, loss, step, args.clip)
        ema.update(net, step)
        if step + 1 in POINTS[name]:
            guard.check(ROOT)
            averaged.load_state_dict(ema.weights)
            out[step + 1] = float(terms["own"] / terms["plain"]) if terms else 0.0
            for nfe in NFES:
                x, y = data.sample_images(averaged.eval(), info, proc, 2000, 100 + seed, nfe)
                out[step + 1, nfe] = {n: fid.evaluate(x, y, proc, n) for n in NETWORKS}
    return job, out


def main(args):
    import numpy as np
    os.environ["OMP_NUM_THREADS"] = "1"
    ROOT.mkdir(parents=True, exist_ok=True)
    with get_context("spawn").Pool(2) as pool:
        done = dict(pool.imap_unordered(arm, [(seed, name) for name in POINTS for seed in SEEDS]))
    v = lambda name, n, nfe, network, what: np.array([done[seed, name][n, nfe][network][what] for seed in SEEDS])
    COLUMNS = [("digits-cnn", "fd", 2), ("digits-mlp", "fd", 2), ("digits-cnn", "pixel_fd", 3), ("digits-cnn", "accuracy", 3)]
    for nfe in NFES:
        print(f"\n{nfe} steps\n| | updates | evaluations | units | FD digits-cnn | FD digits-mlp | pixel distance | accuracy |\n|" + "---|" * 8)
        for name, cost, units in (("plain", 1, 3), ("N 128", 2, 4), ("N 16", 2, 4)):
            for n in POINTS[name]:
                cells = [v(name, n, nfe, network, what) for network, what, _ in COLUMNS]
                print(f"| {name} | {n} | {cost * n} | {units * n} | " + " | ".join(f"{c.mean():.{d}f} +- {c.std(ddof=1):.{d}f}" for c, (_, _, d) in zip(cells, COLUMNS)) + " |")
        for arms, (what, factor) in itertools.product(("N 128", "N 16"), (("updates", 1), ("units", 4 / 3), ("evaluations", 2))):
            gains = [[v("plain", round(n * factor), nfe, net, "fd") - v(arms, n, nfe, net, "fd") for net in NETWORKS] for n in AT]
            print(f"gain of {arms} at equal {what} (cnn, mlp; se over seeds): " + "; ".join(f"{n}: " + ", ".join(f"{g.mean():.2f} (se {g.std(ddof=1) / 3 ** 0.5:.2f})" for g in pair) for n, pair in zip(AT, gains)))
        draw(f"dsd_scratch-{nfe}", "units of computation", "Frechet distance (digits-cnn)",
             {name: ([units * n for n in POINTS[name]], np.array([v(name, n, nfe, "digits-cnn", "fd") for n in POINTS[name]])) for name, units in (("plain", 3), ("N 128", 4), ("N 16", 4))})
    print("\nthe second term over the first, last batch: " + "; ".join(f"{name}, {n} updates: {np.mean([done[seed, name][n] for seed in SEEDS]):.1e}" for name in ("N 128", "N 16") for n in AT))


if __name__ == "__main__":
    main(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args())
