"""Fig. 5 of the SSD paper on the digits, its negative control: Eq. 17 added to the loss while a velocity model is trained from scratch.

    python experiments/ssd_scratch.py                ten minutes on two CPU cores

Eq. 16 holds for a model that is trained, so a model that is not yet may be led astray. Both arms take the digits' usual training, 1,000 steps of it; the second adds
| v(x_s, s) - v(x_t, t) |^2, t = s - 0.1, target from the model itself (no gradient). 2,000 samples of 10 and of 50 Euler steps, seeds 0, 1, 2.
"""
import os
import sys
from multiprocessing import get_context

from common import NETWORKS, ROOT


def arm(job):
    seed, weight = job
    import torch
    torch.set_num_threads(1)
    import data, fid, models, runtime, train
    from runtime import EMA, Guard, Processes, StepRandom
    from solvers import make_schedule
    from ssd import ssd_loss
    args = train.parser().parse_args(["--prediction", "velocity", "--schedule", "interpolant", "--seed", str(seed), "--steps", "1000"])
    train.fill_defaults(args)
    proc, dataset, schedule = Processes("off"), data.load("digits"), make_schedule("interpolant")
    torch.manual_seed(seed)
    net = models.build(models.make_arch("DiT-Ti/2", 8, 1, 10))
    torch.nn.init.normal_(net.y_embedder.embedding_table.weight, std=args.label_std)
    ema, opt, guard, B = EMA(net, args.ema), runtime.adamw(net, args.lr), Guard(proc), args.batch_size
    stream = data.batches(dataset, proc, seed, B, 0)
    for step in range(args.steps):
        x0, y = next(stream)
        rng = StepRandom(proc, seed, step, B)
        t, y, noise = rng.uniform(), torch.where(rng.uniform() < 0.1, 10, y), rng.normal(x0.shape[1:])
        loss, _ = train.diffusion_loss(net, schedule, x0, y, t, noise, "velocity")
        if weight:
            s = 0.1 + 0.9 * t
            loss = loss + weight * ssd_loss(net, net, schedule, x0, y, s, s - 0.1, noise, 1.0, "velocity")[0]
        loss.backward()
        for group in opt.param_groups:
            group["lr"] = args.lr * train.learning_rate(step, args)
        guard.update(opt, loss, step, args.clip)
        ema.update(net, step)
    net.load_state_dict(ema.weights)
    info = dict(schedule="interpolant", prediction="velocity", arch=net.arch, classes=10, grid=None, nfe=None, cfg=1.0, solver="euler", threshold="off")
    out = {}
    for nfe in (10, 50):
        x, y = data.sample_images(net.eval(), info, proc, 2000, 100 + seed, nfe)
        out[nfe] = {name: fid.evaluate(x, y, proc, name) for name in NETWORKS}
        data.save_grid([x[:100]], ROOT / f"ssd_scratch-{weight}-{seed}-{nfe}.png")
    return job, out


def main():
    import numpy as np
    os.environ["OMP_NUM_THREADS"] = "1"
    ROOT.mkdir(parents=True, exist_ok=True)
    jobs = [(seed, weight) for seed in (0, 1, 2) for weight in (0.0, 1.0)]
    with get_context("spawn").Pool(2) as pool:
        done = dict(pool.imap_unordered(arm, jobs))
    print("| | steps | FD digits-cnn | FD digits-mlp | pixel distance | accuracy |\n|" + "---|" * 6)
    for weight, name in ((0.0, "from scratch"), (1.0, "with Eq. 17")):
        for nfe in (10, 50):
            v = lambda network, what: np.array([done[seed, weight][nfe][network][what] for seed in (0, 1, 2)])
            cells = [v("digits-cnn", "fd"), v("digits-mlp", "fd"), v("digits-cnn", "pixel_fd"), v("digits-cnn", "accuracy")]
            print(f"| {name} | {nfe} | " + " | ".join(f"{c.mean():.3f} +- {c.std(ddof=1):.3f}" for c in cells) + " |")
    print(f"pictures: {ROOT}/ssd_scratch-*.png", file=sys.stderr)


if __name__ == "__main__":
    main()
