"""Covariate shift of a distilled model (supplement, section E): teacher and student take turns.

    python ddil.py && python -m experiments.ddil.shift          on what that made, a minute
    python -m experiments.ddil.shift --teacher T.pt --student S.pt

By default a teacher of 32 steps and the student of 4 steps. One step of the student is worth
several steps of the teacher, and both stand on the same nodes, so that a DDIM rollout can change
hands there.

1. Table 2: the teacher takes every interval between two nodes with probability p_T.
2. Tables 3 and 4: first the teacher, from a node on the student, and the reverse. Class accuracy
   stands for CLIP.
3. The shift itself, node by node. The Frechet distance (pixels) of the states that a student visits
   to forward-diffused data, on which it was trained, and beside it that of the teacher's states.
   The student's error of x0 (root mean square, against the teacher's target) on the forward states
   and on those that it visits.

A finite number of samples has a Frechet distance, too: it is the value at the first node, where all
states are noise.
"""
import argparse
from dataclasses import dataclass

import torch

import fid
from ddil import ddim_path, mixed_rollout
from experiments import figures
from kit import data
from kit.checkpoints import load_model
from kit.evaluate import measure_digits
from kit.processes import Processes, generator
from solvers import PROJECTIONS, add_noise, ddim_invert, make_grid, make_schedule, to_x0_eps


@dataclass
class Shift:
    """What one node shows."""

    t: int
    student_fd: float     # of the student's states to forward-diffused data, pixels
    teacher_fd: float     # of the teacher's
    forward_error: float  # of the student's x0 on forward-diffused data
    visited_error: float  # on the states that it visits


def pixel_distance(a, b):
    """Frechet distance of two sets of states (n, C, H, W)."""
    first = fid.Statistics(a[0].numel()).update(a.flatten(1)).result()
    second = fid.Statistics(b[0].numel()).update(b.flatten(1)).result()
    return fid.frechet_distance(*first, *second)


class Pair:
    """A teacher of `steps` DDIM steps and a student with its own grid, on the digits."""

    def __init__(self, teacher_file, student_file, steps, num, seed):
        teacher, spec = load_model(teacher_file)
        student, student_spec = load_model(student_file)
        self.proc = Processes("off")
        self.teacher = self.proc.autocast(self.proc.frozen(teacher))
        self.student = self.proc.autocast(self.proc.frozen(student))

        self.schedule = make_schedule(spec["schedule"])
        self.prediction = student_spec["prediction"]
        self.project = PROJECTIONS[student_spec["threshold"]]
        self.nodes = student_spec["grid"]
        self.grid = make_grid("uniform", steps)
        self.y = torch.arange(num) % spec["classes"]
        self.noise = torch.randn(num, *teacher.sample_shape, generator=generator("cpu", seed, 0))

    def path(self, net, grid, y):
        return ddim_path(net, self.schedule, grid, (y,), self.prediction, self.project)

    def rollout(self, pick):
        """All states at the student's nodes.

        pick(i) -> bool (num,): who takes interval i, the student where true.
        """
        student = self.path(self.student, self.nodes, self.y)
        teacher = self.path(self.teacher, self.grid, self.y)
        return mixed_rollout(student, teacher, self.noise, self.nodes, pick)

    def quality(self, pick):
        images = data.to_uint8(self.rollout(pick)[-1]).numpy()
        return measure_digits(images, self.y.numpy(), self.proc)

    def student_error(self, z, y, t, u):
        """Of x0 at states z, root mean square, against the teacher's target."""
        by_teacher = self.path(self.teacher, self.grid, y)(z, slice(None), t, u)
        out = self.student(z, torch.full((len(z),), t), y)
        x0, _ = to_x0_eps(self.schedule, z, out, t, self.prediction, self.project)
        target = ddim_invert(self.schedule, z, by_teacher, t, u)
        return float((x0 - target).square().mean().sqrt())

    @torch.no_grad()
    def shift(self, x0, y, g):
        """A Shift for every node but the end. x0 (n, C, H, W), y (n,): the data; g: a Generator."""
        everyone = torch.ones(len(self.y), dtype=torch.bool)
        by_student = self.rollout(lambda i: everyone)
        by_teacher = self.rollout(lambda i: ~everyone)
        rows = []
        for i, (t, u) in enumerate(zip(self.nodes[:-1], self.nodes[1:])):
            noise = torch.randn(x0.shape, generator=g)
            forward = add_noise(self.schedule, x0, noise, t)
            rows.append(Shift(
                t,
                pixel_distance(by_student[i], forward),
                pixel_distance(by_teacher[i], forward),
                self.student_error(forward, y, t, u),
                self.student_error(by_student[i], self.y, t, u),
            ))
        return rows


def take_turns(pair, num, g):
    """{who takes which interval: metrics}. g: a Generator."""
    last = len(pair.nodes) - 1
    rows = {}
    for p in (1.0, 0.8, 0.6, 0.4, 0.2, 0.0):
        def coin(i, p=p):
            return torch.rand(num, generator=g) >= p
        rows[f"teacher with p = {p}"] = pair.quality(coin)
    for node in range(1, last):
        def student_below(i, node=node):
            return torch.full((num,), i >= node)
        rows[f"teacher above {pair.nodes[node]}"] = pair.quality(student_below)
    for node in range(1, last):
        def student_above(i, node=node):
            return torch.full((num,), i < node)
        rows[f"student above {pair.nodes[node]}"] = pair.quality(student_above)
    return rows


def print_shift(shift):
    print(f"\n{'node':>6}{'FD of student states':>24}{'of teacher states':>20}"
          f"{'error on forward':>20}{'on visited states':>20}")
    for row in shift:
        print(f"{row.t:6}{row.student_fd:24.4f}{row.teacher_fd:20.4f}"
              f"{row.forward_error:20.4f}{row.visited_error:20.4f}")


def draw(stem, rows, shift):
    """Three pictures, their names begin with `stem`."""
    nodes = [str(row.t) for row in shift]
    try:
        with figures.figure(f"{stem}_turns.png", "Frechet distance (digits-cnn)", "") as axes:
            axes.barh(list(rows)[::-1], [row["fd"] for row in rows.values()][::-1])
        with figures.figure(f"{stem}_states.png", "timestep",
                            "Frechet distance to forward states (pixels)") as axes:
            axes.plot(nodes, [row.student_fd for row in shift], "o-", label="student's states")
            axes.plot(nodes, [row.teacher_fd for row in shift], "o-", label="teacher's states")
        with figures.figure(f"{stem}_error.png", "timestep",
                            "student's error of x0 (pixels in [-1, 1])") as axes:
            axes.plot(nodes, [row.forward_error for row in shift], "o-", label="forward states")
            axes.plot(nodes, [row.visited_error for row in shift], "o-", label="visited states")
    except ImportError as error:
        print(f"no picture: {error}")
        return
    print(f"drawn: {stem}_turns.png, {stem}_states.png, {stem}_error.png")


def main(args):
    pair = Pair(args.teacher, args.student, args.steps, args.num_samples, args.seed)
    g = generator("cpu", args.seed, 1)
    rows = take_turns(pair, args.num_samples, g)
    print(f"{args.num_samples} samples; teacher {args.steps} DDIM steps, student "
          f"{len(pair.nodes) - 1}; features digits-cnn, reference all 1,797 digits")
    print(fid.table(rows, "digits-cnn"))

    real = data.digits()
    shift = pair.shift(data.to_float(real.x), real.y, g)
    print_shift(shift)
    draw(args.out, rows, shift)


def parser():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--teacher", metavar="CKPT", default="runs/teacher-digits-v/last.pt")
    p.add_argument("--student", metavar="CKPT", default="runs/ddil/nfe4.pt")
    p.add_argument("--steps", type=int, default=32,
                   help="of the teacher, a multiple of the student's (default: 32)")
    p.add_argument("--num-samples", type=int, default=2000)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", metavar="STEM", default="ddil_shift",
                   help="how the names of the three pictures begin (default: ddil_shift)")
    return p


if __name__ == "__main__":
    main(parser().parse_args())
