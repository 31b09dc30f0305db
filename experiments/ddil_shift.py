"""Covariate shift of a distilled model (supplement, section E): what happens where teacher and student take turns.

    python ddil.py && python experiments/ddil_shift.py         on what that made: a 32-step teacher and the student of 4 steps, a minute
    python experiments/ddil_shift.py --teacher T.pt --student S.pt

One student step is worth several teacher steps, and both stand on the same nodes, so that a DDIM rollout can change hands there.
1. Table 2: every stretch is gone by the teacher with probability p_T. 2. Tables 3 and 4: teacher first and student from a node on, and the
reverse. Class accuracy stands for CLIP. 3. The shift itself, node by node: the Frechet distance (pixels) of the states a student visits to
forward-diffused data, on which it was trained, the teacher's beside it; and the student's error of x0 (root mean square, against the
teacher's target) on the one and on the other. Finite samples have a distance too: the value at the first node, where all is noise.
"""
import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import checkpoints
import data
import fid
from runtime import Processes, generator
from solvers import PROJECTIONS, add_noise, ddim_invert, make_grid, make_schedule, mixed_rollout, to_x0_eps, walk


class Pair:
    """A teacher of `steps` DDIM steps and a student with its own grid, on the digits."""

    def __init__(self, teacher, student, steps, num, seed):
        (teacher, info), (student, made) = checkpoints.load_model(teacher), checkpoints.load_model(student)
        proc = Processes("off")
        self.student, self.teacher = proc.mixed(proc.frozen(student)), proc.mixed(proc.frozen(teacher))
        self.schedule, self.nodes, self.prediction = make_schedule(info["schedule"]), made["grid"], made["prediction"]
        self.grid, self.project, self.proc = make_grid("uniform", steps), PROJECTIONS[made["threshold"]], proc
        self.y = torch.arange(num) % info["classes"]
        self.noise = torch.randn(num, *teacher.sample_shape, generator=generator("cpu", seed, 0))
        own = self.schedule, self.grid, (self.y,), self.prediction, self.project
        self.ways = walk(self.student, self.schedule, self.nodes, *own[2:]), walk(self.teacher, *own)

    def rollout(self, pick):
        """pick(i) -> bool (num,): who goes stretch i, the student where true. All states at the student's nodes."""
        return mixed_rollout(*self.ways, self.noise, self.nodes, pick)

    def quality(self, pick):
        return fid.evaluate(data.to_uint8(self.rollout(pick)[-1]).numpy(), self.y.numpy(), self.proc)

    @torch.no_grad()
    def shift(self, x0, y, g):
        """Per inner node: (t, FD of the student's states, FD of the teacher's, error on forward states, error on visited ones)."""
        everyone = torch.ones(len(self.y), dtype=torch.bool)
        visited, taught = self.rollout(lambda i: everyone), self.rollout(lambda i: ~everyone)
        rows = []
        for i, (t, u) in enumerate(zip(self.nodes[:-1], self.nodes[1:])):
            forward = add_noise(self.schedule, x0, torch.randn(x0.shape, generator=g), t)
            pixels = lambda z: fid.Statistics(z[0].numel()).update(z.flatten(1)).result()
            fd = lambda z: fid.frechet_distance(*pixels(z), *pixels(forward))

            def error(z, y):
                teacher = walk(self.teacher, self.schedule, self.grid, (y,), self.prediction, self.project)(z, slice(None), t, u)
                out = self.student(z, torch.full((len(z),), t), y)
                x, _ = to_x0_eps(self.schedule, z, out, t, self.prediction, self.project)
                return float((x - ddim_invert(self.schedule, z, teacher, t, u)).square().mean().sqrt())
            rows.append((t, fd(visited[i]), fd(taught[i]), error(forward, y), error(visited[i], self.y)))
        return rows


def main(args):
    pair, g = Pair(args.teacher, args.student, args.steps, args.num_samples, args.seed), generator("cpu", args.seed, 1)
    n, rows = len(pair.nodes) - 1, {}
    coin = lambda p: lambda i: torch.rand(args.num_samples, generator=g) >= p
    for p in (1.0, 0.8, 0.6, 0.4, 0.2, 0.0):
        rows[f"teacher with p = {p}"] = pair.quality(coin(p))
    for i in range(1, n):
        rows[f"teacher above {pair.nodes[i]}"] = pair.quality(lambda j: torch.full((args.num_samples,), j >= i))
    for i in range(1, n):
        rows[f"student above {pair.nodes[i]}"] = pair.quality(lambda j: torch.full((args.num_samples,), j < i))
    print(f"{args.num_samples} samples; teacher {args.steps} DDIM steps, student {n}; features digits-cnn, reference all 1,797 digits\n{fid.table(rows, 'digits-cnn')}")

    real = data.digits()
    shift = pair.shift(data.to_float(real.x), real.y, g)
    print(f"\n{'node':>6}{'FD of student states':>24}{'of teacher states':>20}{'error on forward':>20}{'on visited states':>20}")
    for t, *values in shift:
        print(f"{t:6}" + "".join(f"{v:{w}.4f}" for v, w in zip(values, (24, 20, 20, 20))))
    draw(Path(args.out), rows, shift)


def draw(path, rows, shift):
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return print("no picture: pip install matplotlib")
    fig, axes = plt.subplots(1, 3, figsize=(14, 4))
    axes[0].barh(list(rows)[::-1], [r["fd"] for r in rows.values()][::-1])
    axes[0].set_xlabel("Frechet distance (digits-cnn)")
    for axis, pair, names in ((axes[1], (1, 2), ("student's states", "teacher's states")), (axes[2], (3, 4), ("forward states", "visited states"))):
        for k, name in zip(pair, names):
            axis.plot([str(r[0]) for r in shift], [r[k] for r in shift], "o-", label=name)
        axis.set_xlabel("t")
        axis.legend()
    axes[1].set_ylabel("distance to forward-diffused data (pixels)")
    axes[2].set_ylabel("student's error of x0")
    fig.tight_layout()
    fig.savefig(path)
    print(f"drawn: {path}")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--teacher", default="runs/teacher-digits-v/last.pt")
    p.add_argument("--student", default="runs/ddil/nfe4.pt")
    p.add_argument("--steps", type=int, default=32, help="of the teacher, a multiple of the student's")
    p.add_argument("--num-samples", type=int, default=2000)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", default="ddil_shift.png")
    main(p.parse_args())
