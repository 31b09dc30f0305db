"""Ratios of whole training steps and of sampling: ours against the same mathematics in plain form (float32, eager, attention as two matrix products,
optimiser and guidance in separate calls).

    python benchmarks/throughput.py                                      one GPU: DiT-XL/2 at 256 pixels, batch 16, eight minutes at most; two CPU cores: DiT-S/2, batch 2
    python benchmarks/throughput.py --methods issd --profile             and where the time goes
    python benchmarks/throughput.py --methods issd --losses 200          the loss under bf16 against float32, step by step

Rates: images/s; TFLOP/s of the forwards executed (a backward counts as two, recomputation is not counted), on a GPU also as a share of an 8192^3 bf16
matrix product measured first. Latents are noise; weights are N(0, 0.02^2), since a fresh DiT outputs zero. A time is the lesser of two medians.
"""
import argparse
import copy
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import ddil
import dsd
import issd
import kd
import models
import runtime
import ssd
import train
from runtime import Guard, Processes, StepRandom
from solvers import ddim_step, guide, make_schedule, schedule_grid

UNITS = {"train": 3, "issd": 5, "ssd": 5, "pd": 5, "dsd": 4, "kd": None}  # forwards of a step


def separate_attention(q, k, v):
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


class Form:
    """One way to run: "ours" (bf16 on a GPU, fused attention and optimiser, compiled where asked) or "plain"."""

    def __init__(self, kind, args):
        self.args, self.plain, self.attention = args, kind == "plain", models.F.scaled_dot_product_attention
        self.proc = Processes("off" if self.plain else args.amp)
        self.place = argparse.Namespace(compile=args.compile and not self.plain, grad_checkpointing=args.grad_checkpointing, steps=0)

    def __enter__(self):
        if self.plain:
            models.F.scaled_dot_product_attention = separate_attention
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not self.plain

    def __exit__(self, *_):
        models.F.scaled_dot_product_attention = self.attention

    def optimiser(self, net):
        return torch.optim.AdamW(net.parameters(), lr=5e-6, weight_decay=0, foreach=False) if self.plain else runtime.adamw(net, 5e-6)


def make_step(name, form, base, args):
    """A method's step as its script makes it -> step(n), which returns the loss; and its floating-point operations."""
    proc, B, schedule = form.proc, args.batch_size, make_schedule("linear").to(form.proc.device)
    small = models.fill_random(models.build(models.make_arch(args.student, 32, 4, 1000, True))) if name == "kd" else base
    net = copy.deepcopy(small)
    student, teacher = proc.student(net, form.place), proc.frozen(copy.deepcopy(base), form.place)
    s_out, t_out, opt, guard = proc.mixed(student), proc.mixed(teacher), form.optimiser(net), Guard(proc)
    nodes = torch.tensor(schedule_grid(schedule, "dit" if name in ("issd", "ssd") else "uniform", 16 if name in ("pd", "dsd") else 10), device=proc.device)

    def loss_of(x0, y, n, noise):
        a, b, c = (nodes[(n + i).clamp(max=len(nodes) - 1)] for i in range(3))
        if name == "issd":
            return issd.issd_loss(s_out, t_out, schedule, x0, y, a, b, noise, 0.25)[0]
        if name == "ssd":
            return ssd.ssd_loss(s_out, t_out, schedule, x0, y, a, b, noise, 0.25)[0]
        if name == "pd":
            z = schedule.at(a, x0)[0] * x0 + schedule.at(a, x0)[1] * noise
            return ddil.pd_loss(s_out, schedule, z, (y,), a, ddil.pd_target(t_out, schedule, z, (y,), a, b, c, "eps"), "eps", "output")
        if name == "dsd":
            return dsd.dsd_loss(s_out, schedule, noise, a, b, c, y)[0]
        if name == "kd":
            return kd.kd_loss(s_out, t_out, schedule, x0, y, a, noise, prediction="eps")
        return train.diffusion_loss(s_out, schedule, x0, y, a, noise)[0]

    def step(n):
        rng = StepRandom(proc, 0, n, B)
        y, i = rng.integers(0, 1000), rng.integers(0, len(nodes) - 3)
        i = i[:1].expand(B) if name == "dsd" else i
        loss = proc.backward(student, loss_of, args.accumulate, rng.normal((4, 32, 32)), y, i, rng.normal((4, 32, 32)))
        if form.plain:
            opt.step(), opt.zero_grad()
        else:
            guard.update(opt, loss, n)
        return loss

    flops = B * (UNITS[name] * models.count(base.arch)[1] if name != "kd" else models.count(base.arch)[1] + 3 * models.count(small.arch)[1])
    return step, flops


def make_sampling(form, base, args):
    """Ten guided DDIM steps of a batch -> step(n); plain: two forwards for the two halves of guidance."""
    proc, B, schedule = form.proc, args.batch_size, make_schedule("linear").to(form.proc.device)
    out, nodes = proc.mixed(proc.frozen(copy.deepcopy(base), form.place)), schedule_grid(schedule, "dit", 10)
    guided = guide(out, 1.5)

    def twice(z, t, y):
        uncond, cond = (out(z, t, label)[:, :4] for label in (torch.full_like(y, 1000), y))
        return torch.cat([uncond[:, :3] + 1.5 * (cond[:, :3] - uncond[:, :3]), cond[:, 3:]], 1)

    @torch.no_grad()
    def step(n):
        rng = StepRandom(proc, 0, n, B)
        z, y = rng.normal((4, 32, 32)), rng.integers(0, 1000)
        for t, u in zip(nodes, nodes[1:] + [-1]):
            t, u = (torch.full((B,), v, device=proc.device) for v in (t, u))
            z = ddim_step(schedule, z, (twice if form.plain else guided)(z, t, y)[:, :4], t, u)
        return z

    return step, 20 * B * models.count(base.arch)[1]


def seconds(step, form, repeats, first):
    """Median seconds of a step."""
    times = []
    for n in range(repeats):
        began = time.perf_counter()
        step(first + n)
        if form.proc.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def compare(name, base, args, peak):
    cuda, found = args.device == "cuda", {}
    for kind in ("ours", "plain"):
        form = Form(kind, args)
        if cuda:
            torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()
        with form:
            step, flops = make_sampling(form, base, args) if name == "sampling" else make_step(name, form, base, args)
            seconds(step, form, 2, 0)  # compiles, warms up
            found[kind] = min(seconds(step, form, args.repeats, 2), seconds(step, form, args.repeats, 2 + args.repeats))
            memory = f", {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB" if cuda else ""
            if args.profile and kind == "ours":
                profile(step)
        tflops = flops / found[kind] / 1e12
        print(f"  {name:9} {kind:6} {args.batch_size / found[kind]:9.4g} images/s  {tflops:8.3g} TFLOP/s{f' = {tflops / peak:.0%} of a matrix product' if peak else ''}{memory}", flush=True)
        del step
    print(f"{name}: ours is {found['plain'] / found['ours']:.2f} times as fast as the plain form", flush=True)


def profile(step):
    """The three largest costs."""
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * torch.cuda.is_available()
    with torch.profiler.profile(activities=activities) as p:
        step(0)
    own = lambda e: e.self_device_time_total if torch.cuda.is_available() else e.self_cpu_time_total
    events = sorted(p.key_averages(), key=own, reverse=True)
    total = sum(map(own, events))
    print("  largest: " + "; ".join(f"{e.key[:60]} {own(e) / total:.0%} ({e.count} calls)" for e in events[:3]))


def losses(name, base, args):
    """Under bf16 against float32: the same steps from the same weights."""
    runs = {}
    for amp in ("off", "bf16"):
        form = Form("ours", argparse.Namespace(**{**vars(args), "amp": amp}))
        with form:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
            step = make_step(name, form, base, args)[0]
            runs[amp] = torch.stack([step(n) for n in range(args.losses)]).double().cpu()
    apart = (runs["bf16"] / runs["off"] - 1).abs()
    print(f"{name}: loss over {args.losses} steps, float32 {runs['off'][0]:.4g} -> {runs['off'][-1]:.4g}, bf16 {runs['bf16'][0]:.4g} -> {runs['bf16'][-1]:.4g}; "
          f"relative difference {apart.median():.2e} in the median, {apart.max():.2e} at most")


def main(args):
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.model, args.batch_size = args.model or ("DiT-XL/2" if args.device == "cuda" else "DiT-S/2"), args.batch_size or (16 if args.device == "cuda" else 2)
    args.student, args.repeats = args.student or ("DiT-B/2" if args.device == "cuda" else "DiT-Ti/2"), args.repeats or (10 if args.device == "cuda" else 2)
    began, peak = time.perf_counter(), Processes("off").peak()
    print(f"{args.model} at 256 pixels, batch {args.batch_size} in {args.accumulate} part{'s' * (args.accumulate > 1)}, torch {torch.__version__}, "
          + (f"{torch.cuda.get_device_name()}, a bf16 product of 8192^3 makes {peak:.0f} TFLOP/s" if peak else f"CPU, {torch.get_num_threads()} threads"), flush=True)
    base = models.fill_random(models.build(models.make_arch(args.model, 32, 4, 1000, True)))
    if args.losses:
        return losses(args.methods[0], base, args)
    for i, name in enumerate(args.methods):
        if i and (time.perf_counter() - began) / i * (i + 1) > 60 * args.minutes:  # the next one would hardly fit
            return print(f"{args.minutes:g} minutes are nearly over; left out: {', '.join(args.methods[i:])}")
        compare(name, base, args, peak)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--methods", nargs="+", choices=[*UNITS, "sampling"], default=["issd", "sampling", "train", "ssd", "pd", "dsd", "kd"])
    p.add_argument("--model")
    p.add_argument("--student", help="of kd")
    p.add_argument("--batch-size", type=int)
    p.add_argument("--accumulate", type=int, default=1)
    p.add_argument("--grad-checkpointing", action="store_true")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    p.add_argument("--amp", choices=["auto", "bf16", "off"], default="auto")
    p.add_argument("--repeats", type=int)
    p.add_argument("--minutes", type=float, default=8)
    p.add_argument("--profile", action="store_true")
    p.add_argument("--losses", type=int, metavar="STEPS")
    runtime.run(main, p.parse_args())
