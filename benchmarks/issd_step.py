"""Ratios, not times: what an iSSD step costs beyond its network calls, and ours against upstream's.

    python benchmarks/issd_step.py                   DiT-S/2, batch 8; two minutes on two CPU cores
    python benchmarks/issd_step.py --upstream PATH   also our training step against that code

PATH is a clone of facebookresearch/DiT, which needs timm. Everything runs in one process, in turn.
Weights are N(0, 0.02^2), because a fresh DiT outputs zero.
"""
import argparse
import copy
import importlib.util
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import models
from issd import issd_loss
from kit.processes import Processes, StepRandom
from kit.run import Guard, adamw
from solvers import make_grid, make_schedule

CLASSES = 1000


def seconds(repeats, proc, **functions):
    """{name: seconds of each repeat}.

    The functions run in turn, so that a slow moment of the machine meets all of them. Two rounds
    before that warm up.
    """
    times = {name: [] for name in functions}
    for _ in range(repeats + 2):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if proc.device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - began)
    return {name: torch.tensor(t[2:]) for name, t in times.items()}


class Bench:
    """Networks and a batch of latents on the device."""

    def __init__(self, args):
        self.args = args
        self.proc = Processes(args.amp)
        device, B = self.proc.device, args.batch_size
        arch = models.make_arch(args.model, 32, 4, CLASSES, True)
        self.base = models.fill_random(models.build(arch))
        self.x = torch.randn(B, 4, 32, 32, device=device)
        self.y = torch.randint(0, CLASSES, (B,), device=device)
        self.t = torch.full((B,), 500, device=device)
        self.noise = torch.randn_like(self.x)

    def step_against_its_parts(self):
        """An iSSD step, measured with two forwards and one forward with backward."""
        args, proc, x = self.args, self.proc, self.x
        net = proc.student(copy.deepcopy(self.base))
        student = proc.autocast(net)
        teacher = proc.autocast(proc.frozen(copy.deepcopy(self.base)))
        opt = adamw(net, 5e-6)
        guard = Guard(proc)
        schedule = make_schedule("linear").to(proc.device)
        nodes = torch.tensor(make_grid("dit", 10), device=proc.device)

        def step():
            rng = StepRandom(proc, 0, 0, args.batch_size)
            n = rng.integers(0, 9)
            y = torch.where(rng.uniform() < 0.1, CLASSES, self.y)
            noise = rng.normal(x.shape[1:])
            loss, _ = issd_loss(student, teacher, schedule, x, y, nodes[n], nodes[n + 1], noise,
                                0.25)
            loss.backward()
            guard.step(opt, loss.detach(), 0)

        def forward():
            with torch.no_grad():
                teacher(x, self.t, self.y)

        def forward_backward():
            student(x, self.t, self.y).square().mean().backward()
            opt.zero_grad()

        s = seconds(args.repeats, proc, forward=forward, step=step,
                    forward_backward=forward_backward, forward2=forward)
        parts = s["forward"] + s["forward2"] + s["forward_backward"]
        ratio = (s["step"] / parts).sort().values
        print(f"{args.model}, batch {args.batch_size}, {proc.device}: an iSSD step costs "
              f"{ratio.median():.3f} times two forwards and one forward with backward, measured "
              f"alone (median of {args.repeats} rounds, {ratio[0]:.3f} to {ratio[-1]:.3f})")

    def training_step(self, net):
        """-> a function that makes one ordinary training step of net."""
        opt = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0)
        denoise = self.proc.autocast(net)

        def step():
            out = denoise(self.x, self.t, self.y)
            (out[:, :4] - self.noise).square().mean().backward()
            opt.step()
            opt.zero_grad()
        return step

    def ours_against_upstream(self):
        """The ordinary training step of our network and of upstream's, with the same weights."""
        args, proc = self.args, self.proc
        theirs = load_upstream(args.upstream).DiT_models[args.model](input_size=32,
                                                                     num_classes=CLASSES)
        theirs.to(proc.device).load_state_dict(self.base.state_dict())
        theirs.num_classes = CLASSES
        ours = proc.student(copy.deepcopy(self.base))
        print(f"upstream's fused attention: {theirs.blocks[0].attn.fused_attn}")
        s = seconds(args.repeats, proc, ours=self.training_step(ours),
                    upstream=self.training_step(theirs))
        ratio = s["ours"].median() / s["upstream"].median()
        print(f"training step: ours costs {ratio:.3f} times upstream's "
              f"(medians of {args.repeats})")


def load_upstream(folder):
    """Upstream's models.py under a name of its own."""
    spec = importlib.util.spec_from_file_location("upstream_models", Path(folder) / "models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(args):
    bench = Bench(args)
    bench.step_against_its_parts()
    if args.upstream:
        bench.ours_against_upstream()


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="DiT-S/2")
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--repeats", type=int, default=10)
    p.add_argument("--amp", choices=["auto", "bf16", "off"], default="auto")
    p.add_argument("--upstream", metavar="PATH")
    main(p.parse_args())
