"""Fig. 5 of the SSD paper on the digits, its negative control: Eq. 17 in training from scratch.

    python -m experiments.ssd.scratch                ten minutes on two CPU cores

Eq. 16 holds for a trained model, so the loss may lead a model astray that is not trained yet. Both
arms are velocity models with the digits' usual training, 1,000 steps of it. The second arm adds
| v(x_s, s) - v(x_t, t) |^2 with t = s - 0.1; the target is the model's own, without gradient. Both
are measured on 2,000 samples of 10 and of 50 Euler steps, seeds 0, 1, 2.
"""
import itertools
import sys

import numpy as np
import torch

import train
from experiments.runner import (
    COLUMNS,
    HEADER,
    NETWORKS,
    ROOT,
    SAMPLES,
    SEEDS,
    in_processes,
    plus_minus,
    silence,
)
from kit.checkpoints import load_model
from kit.evaluate import measure_digits
from kit.processes import Processes
from kit.sampling import SampleOptions, sample_images, save_grid
from ssd import ssd_loss

STEPS = [10, 50]
INTERVAL = 0.1  # s - t
NAMES = {0.0: "from scratch", 1.0: "with Eq. 17"}  # by the weight of Eq. 17


def loss_with_eq_17(net, schedule, x0, y, t, noise, prediction):
    """The ordinary loss plus Eq. 17, whose s is spread over [INTERVAL, 1]."""
    loss, aux = train.diffusion_loss(net, schedule, x0, y, t, noise, prediction)
    s = INTERVAL + (1 - INTERVAL) * t
    more, _ = ssd_loss(net, net, schedule, x0, y, s, s - INTERVAL, noise, 1.0, prediction)
    return loss + more, aux


def arm(job):
    """(seed, weight of Eq. 17) -> {steps: {feature network: metrics}}."""
    torch.set_num_threads(1)
    seed, weight = job
    out = ROOT / "models" / f"ssd-scratch-{weight}-{seed}"
    words = (f"--prediction velocity --schedule interpolant --seed {seed} --steps 1000 --out {out} "
             "--save-every 1000")
    objective = loss_with_eq_17 if weight else train.diffusion_loss
    proc = Processes("off")
    with silence():
        net, spec = load_model(train.main(train.parser().parse_args(words.split()), objective))

    metrics = {}
    for nfe in STEPS:
        options = SampleOptions(seed=100 + seed, nfe=nfe, solver="euler")
        with silence():
            x, y = sample_images(proc.frozen(net), spec, proc, SAMPLES, options, "samples")
        metrics[nfe] = {name: measure_digits(x, y, proc, name) for name in NETWORKS}
        save_grid([x[:100]], ROOT / f"ssd_scratch-{weight}-{seed}-{nfe}.png")
    return metrics


def main():
    ROOT.mkdir(parents=True, exist_ok=True)
    done = dict(in_processes(arm, list(itertools.product(SEEDS, NAMES))))
    print(f"| | steps | {HEADER} |\n|" + "---|" * 6)
    for (weight, name), nfe in itertools.product(NAMES.items(), STEPS):
        texts = []
        for network, metric, _ in COLUMNS:
            v = [done[seed, weight][nfe][network][metric] for seed in SEEDS]
            texts.append(plus_minus(np.array(v), 3))
        print(f"| {name} | {nfe} | " + " | ".join(texts) + " |")
    print(f"pictures: {ROOT}/ssd_scratch-*.png", file=sys.stderr)


if __name__ == "__main__":
    main()
