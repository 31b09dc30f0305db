"""Why does progressive distillation gain so much more than DSD for as many updates?

    python -m experiments.dsd.why                    fifteen minutes on two CPU cores

PD, TSD and DSD differ in three things:

1. whether z_t is noised data or a state of the teacher's own sampling,
2. whether the teacher is frozen or the student itself,
3. whether a batch holds random timesteps or a single one, which then moves along the trajectory.

Here each of them changes alone. 256 updates 16 -> 8 -> 4 -> 2, with the weight max(1, SNR) or the
plain distance of outputs, three learning rates (DSD's warm-up and cosine), no averaging, no
guidance; two tuning teachers, one seed. Where a batch of own states has random timesteps, they are
drawn from the last trajectory.
"""
import argparse
import copy
import itertools
from dataclasses import dataclass

import numpy as np
import torch

import ddil
import dsd
from experiments.runner import (
    FEW_TUNING_TEACHERS,
    NETWORKS,
    in_processes,
    path,
    print_header,
    run,
    silence,
    teacher,
)
from kit import data
from kit.checkpoints import load_model
from kit.evaluate import measure_digits
from kit.processes import Processes, StepRandom
from kit.run import Guard, adamw, set_lr
from kit.sampling import SampleOptions, sample_images
from solvers import add_noise, make_grid, make_schedule, predictor, sample_states

UPDATES, BATCH = 256, 64
SHAPE = (1, 8, 8)
NFES = [2, 4, 8]
RATES = [1e-5, 1e-4, 1e-3]
DATA, TEACHERS, OWN = "data (PD)", "teacher's (TSD)", "own (DSD)"
RANDOM, SINGLE = "random timesteps", "one timestep"
WEIGHTS = ["snr", "output"]


@dataclass(frozen=True)
class Setting:
    """A row of the table."""

    states: str  # DATA: frozen teacher, noised data; TEACHERS: frozen, its own states; OWN: itself
    batch: str
    weight: str
    lr: float


@dataclass(frozen=True)
class Job:
    number: int  # the teacher's
    setting: Setting


class States:
    """The states z_t with their labels, and the timesteps of a batch, as a setting says."""

    def __init__(self, setting, schedule):
        self.setting = setting
        self.schedule = schedule
        self.labels = None
        self.trajectory = None  # (nodes, B, C, H, W), all states of one trajectory

    def draw(self, source, grid, k, x0, y, rng):
        """-> (z, labels, index), index (B,): the pair of steps 2 index -> 2 index + 2 of grid.

        source: the network whose trajectory it is; k: number of the update in it.
        """
        from_data = self.setting.states == DATA
        if not from_data and k == 0:
            self.labels = rng.integers(0, 10)
            noise = rng.normal(SHAPE)
            predict = predictor(source, self.labels, self.schedule)
            states = sample_states(predict, noise, self.schedule, grid.tolist())
            self.trajectory = torch.stack(states)

        if self.setting.batch == SINGLE:
            index = torch.full((BATCH,), k)
        else:
            index = rng.integers(0, (len(grid) - 1) // 2)
        if from_data:
            return add_noise(self.schedule, x0, rng.normal(SHAPE), grid[2 * index]), y, index
        return self.trajectory[2 * index, torch.arange(BATCH)], self.labels, index


def updates():
    """(N, k) of every update: steps of the trajectory, number of the update in it."""
    # The paper's last depth would end at one step: leave it out.
    found = dsd.allocate("tsd", 16, UPDATES * 4 // 3)
    return [(N, k) for N, k in found if N > 2][:UPDATES]


def train(net, setting, proc):
    """All updates of a setting, in place."""
    schedule = make_schedule("linear")
    opt = adamw(net.train(), setting.lr, (0.9, 0.98))
    guard = Guard(proc)
    states = States(setting, schedule)
    stream = data.batches(data.load("digits"), proc, 0, BATCH, 0)
    depth = None
    for step, (N, k) in enumerate(updates()):
        if N != depth:
            depth = N
            grid = torch.tensor(make_grid("uniform", N))
            frozen = copy.deepcopy(net).eval()
        x0, y = next(stream)
        rng = StepRandom(proc, 0, step, BATCH)
        source = net if setting.states == OWN else frozen

        z, labels, index = states.draw(source, grid, k, x0, y, rng)
        t, mid, u = grid[2 * index], grid[2 * index + 1], grid[2 * index + 2]
        goal = ddil.pd_target(source, schedule, z, (labels,), t, mid, u, "eps")
        loss, _ = ddil.pd_loss(net, schedule, z, (labels,), t, goal, "eps", setting.weight)
        loss.backward()
        set_lr(opt, setting.lr * dsd.learning_rate(step, UPDATES))
        guard.step(opt, loss, step, clip=1.0)
    guard.check(".")


def measure(job):
    """-> {steps: {feature network: metrics}}. Runs in a process of its own."""
    torch.set_num_threads(1)
    proc = Processes("off")
    net, spec = load_model(path(teacher(job.number)))
    train(net, job.setting, proc)

    net = proc.autocast(net.eval())
    found = {}
    for nfe in NFES:
        options = SampleOptions(seed=job.number + 100, nfe=nfe, cfg=1.0)
        with silence():
            x, y = sample_images(net, {**spec, "grid": "uniform"}, proc, 2000, options, "sampling")
        found[nfe] = {name: measure_digits(x, y, proc, name) for name in NETWORKS}
    return found


def main(args):
    run([teacher(number) for number in FEW_TUNING_TEACHERS])
    found = itertools.product((DATA, TEACHERS, OWN), (RANDOM, SINGLE), WEIGHTS, RATES)
    settings = [Setting(*values) for values in found]
    jobs = []
    for setting in settings:
        for number in FEW_TUNING_TEACHERS:
            jobs.append(Job(number, setting))
    done = dict(in_processes(measure, jobs))

    def mean(setting, nfe, network, metric):
        per_teacher = [done[Job(n, setting)][nfe][network][metric] for n in FEW_TUNING_TEACHERS]
        return np.mean(per_teacher)

    print("FD digits-cnn, digits-mlp, accuracy")
    print_header("batch", "weight", "learning rate", *(f"{nfe} steps" for nfe in NFES))
    for setting in settings:
        texts = []
        for nfe in NFES:
            texts.append(f"{mean(setting, nfe, 'digits-cnn', 'fd'):.2f}, "
                         f"{mean(setting, nfe, 'digits-mlp', 'fd'):.2f}, "
                         f"{mean(setting, nfe, 'digits-cnn', 'accuracy'):.3f}")
        print(f"| {setting.states} | {setting.batch} | {setting.weight} | {setting.lr:g} | "
              + " | ".join(texts) + " |")


def parser():
    return argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


if __name__ == "__main__":
    main(parser().parse_args())
