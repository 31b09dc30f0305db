"""Ratios, not times: what an iSSD step costs beyond its network calls, and our training step against upstream's.

    python benchmarks/issd_step.py                                       DiT-S/2, batch 8; a minute or two on two CPU cores
    python benchmarks/issd_step.py --upstream PATH/TO/facebookresearch/DiT    also against that code (it needs timm)

Everything in one process, interleaved. Weights are N(0, 0.02^2): a fresh DiT outputs zero.
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
from runtime import Guard, Processes, StepRandom, adamw
from solvers import make_grid, make_schedule


def seconds(repeats, proc, **work):
    """{name: seconds of each repeat} of callables run in turn, so that a slow moment of the machine meets all of them; two rounds warm up."""
    times = {name: [] for name in work}
    for _ in range(repeats + 2):
        for name, f in work.items():
            began = time.perf_counter()
            f()
            if proc.device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - began)
    return {name: torch.tensor(t[2:]) for name, t in times.items()}


def main(args):
    proc, B = Processes(args.amp), args.batch_size
    base = models.fill_random(models.build(models.make_arch(args.model, 32, 4, 1000, True)))
    student, teacher = proc.student(copy.deepcopy(base)), proc.frozen(copy.deepcopy(base))
    student_eps, teacher_eps = proc.mixed(student), proc.mixed(teacher)
    opt, guard = adamw(student, 5e-6), Guard(proc)
    schedule, nodes = make_schedule("linear").to(proc.device), torch.tensor(make_grid("dit", 10), device=proc.device)
    x, y = torch.randn(B, 4, 32, 32, device=proc.device), torch.randint(0, 1000, (B,), device=proc.device)
    t, noise = torch.full((B,), 500, device=proc.device), torch.randn_like(x)

    def step():
        rng = StepRandom(proc, 0, 0, B)
        n = rng.integers(0, 9)
        loss, _ = issd_loss(student_eps, teacher_eps, schedule, x, torch.where(rng.uniform() < 0.1, 1000, y), nodes[n], nodes[n + 1], rng.normal(x.shape[1:]), 0.25)
        loss.backward()
        guard.update(opt, loss, 0)

    def forward():
        with torch.no_grad():
            teacher_eps(x, t, y)

    def forward_backward():
        student_eps(x, t, y).square().mean().backward()
        opt.zero_grad()

    s = seconds(args.repeats, proc, forward=forward, step=step, forward_backward=forward_backward, forward2=forward)
    ratio = (s["step"] / (s["forward"] + s["forward2"] + s["forward_backward"])).sort().values
    print(f"{args.model}, batch {B}, {proc.device}: an iSSD step costs {ratio.median():.3f} times two forwards and one forward with backward, "
          f"measured alone (median of {args.repeats} rounds, {ratio[0]:.3f} to {ratio[-1]:.3f})")
    if args.upstream:
        spec = importlib.util.spec_from_file_location("upstream_models", Path(args.upstream) / "models.py")
        upstream = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(upstream)
        theirs = upstream.DiT_models[args.model](input_size=32, num_classes=1000).to(proc.device)
        theirs.load_state_dict(base.state_dict())
        ours = proc.student(copy.deepcopy(base))
        print(f"upstream's fused attention: {theirs.blocks[0].attn.fused_attn}")

        def training_step(net):
            own = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0)
            net = proc.mixed(net)

            def run():
                (net(x, t, y)[:, :4] - noise).square().mean().backward()
                own.step()
                own.zero_grad()
            return run
        theirs.num_classes = 1000
        s = seconds(args.repeats, proc, ours=training_step(ours), upstream=training_step(theirs))
        print(f"training step: ours costs {s['ours'].median() / s['upstream'].median():.3f} times upstream's (medians of {args.repeats})")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="DiT-S/2")
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--repeats", type=int, default=10)
    p.add_argument("--amp", choices=["auto", "bf16", "off"], default="auto")
    p.add_argument("--upstream", metavar="PATH")
    main(p.parse_args())
