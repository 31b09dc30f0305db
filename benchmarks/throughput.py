"""Ratios of whole training steps and of sampling: ours against the same mathematics in plain form.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --methods issd --profile      also where the time goes
    python benchmarks/throughput.py --methods issd --losses 200   the loss under bf16 and in float32

Without flags: on a GPU DiT-XL/2 at 256 pixels, batch 16, at most eight minutes; on a CPU DiT-S/2,
batch 2. The plain form is float32 and eager, with attention as two matrix products, and with
optimiser and guidance in separate calls.

The rates are images/s and TFLOP/s of the forwards executed. A backward counts as two forwards, and
what is computed again is not counted. On a GPU the rate is also given as a share of an 8192^3 bf16
matrix product, which is measured first. Latents are noise. Weights are N(0, 0.02^2), because a
fresh DiT outputs zero. A time is the lesser of two medians.
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
import ssd
import train
from kit.cli import run_script
from kit.processes import Processes, StepRandom
from kit.run import Guard, adamw
from solvers import add_noise, ddim_step, guide, make_schedule, schedule_grid

# Forwards per step; None: of two networks of different size.
FORWARDS = {"train": 3, "issd": 5, "ssd": 5, "pd": 5, "dsd": 4, "kd": None}
LATENT = (4, 32, 32)
CLASSES = 1000
LR = 5e-6
LAM = 0.25
CFG = 1.5


# ---- Two forms ----------------------------------------------------------------------------------


def separate_attention(q, k, v):
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


class Form:
    """One way to run: "ours" or "plain".

    "ours" has bf16 on a GPU, fused attention and optimiser, and compiled blocks where asked for.
    A context manager: within it attention and TF32 are as the form has them.
    """

    def __init__(self, kind, args, amp):
        self.plain = kind == "plain"
        self.attention = models.F.scaled_dot_product_attention
        self.proc = Processes("off" if self.plain else amp)
        self.place = argparse.Namespace(compile=args.compile and not self.plain,
                                        grad_checkpointing=args.grad_checkpointing, steps=0)

    def __enter__(self):
        if self.plain:
            models.F.scaled_dot_product_attention = separate_attention
        set_tf32(not self.plain)

    def __exit__(self, *_):
        models.F.scaled_dot_product_attention = self.attention

    def optimizer(self, net):
        if self.plain:
            return torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0, foreach=False)
        return adamw(net, LR)


def set_tf32(allowed):
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


# ---- What is measured ---------------------------------------------------------------------------


class Training:
    """A method's step, as its script makes it."""

    def __init__(self, name, form, base, args):
        proc = form.proc
        self.name = name
        self.form = form
        self.args = args
        self.schedule = make_schedule("linear").to(proc.device)
        net = copy.deepcopy(base)
        if name == "kd":
            arch = models.make_arch(args.student, LATENT[1], LATENT[0], CLASSES, True)
            net = models.fill_random(models.build(arch))
        self.flops = args.batch_size * self.flops_per_sample(net.arch, base.arch)
        self.student = proc.autocast(proc.student(net, form.place))
        self.teacher = proc.autocast(proc.frozen(copy.deepcopy(base), form.place))
        self.opt = form.optimizer(net)
        self.guard = Guard(proc)
        grid = "dit" if name in ("issd", "ssd") else "uniform"
        steps = 16 if name in ("pd", "dsd") else 10
        nodes = schedule_grid(self.schedule, grid, steps)
        self.nodes = torch.tensor(nodes, device=proc.device)

    def flops_per_sample(self, arch, base_arch):
        forward = models.count(base_arch)[1]
        if self.name == "kd":  # one forward of the teacher; forward and backward of the student
            return forward + 3 * models.count(arch)[1]
        return FORWARDS[self.name] * forward

    def loss(self, x0, y, n, noise):
        """The loss of a batch at the nodes n, n + 1, n + 2 (B,)."""
        student, teacher, schedule = self.student, self.teacher, self.schedule
        last = len(self.nodes) - 1
        a, b, c = (self.nodes[(n + i).clamp(max=last)] for i in range(3))
        if self.name == "issd":
            return issd.issd_loss(student, teacher, schedule, x0, y, a, b, noise, LAM)[0]
        if self.name == "ssd":
            return ssd.ssd_loss(student, teacher, schedule, x0, y, a, b, noise, LAM)[0]
        if self.name == "pd":
            z = add_noise(schedule, x0, noise, a)
            target = ddil.pd_target(teacher, schedule, z, (y,), a, b, c, "eps")
            return ddil.pd_loss(student, schedule, z, (y,), a, target, "eps", "output")[0]
        if self.name == "dsd":
            return dsd.dsd_loss(student, schedule, noise, a, b, c, y)[0]
        if self.name == "kd":
            return kd.kd_loss(student, teacher, schedule, x0, y, a, noise, prediction="eps")[0]
        return train.diffusion_loss(student, schedule, x0, y, a, noise)[0]

    def step(self, number):
        """One update; returns the loss. number: of the step, whose random numbers it gives."""
        proc = self.form.proc
        rng = StepRandom(proc, 0, number, self.args.batch_size)
        y = rng.integers(0, CLASSES)
        n = rng.integers(0, len(self.nodes) - 3)
        if self.name == "dsd":  # one timestep per batch
            n = n[:1].expand(len(y))
        rows = (rng.normal(LATENT), y, n, rng.normal(LATENT))
        parts = self.args.accumulate
        total = 0
        for i, part in enumerate(zip(*(row.chunk(parts) for row in rows))):
            proc.part = (i, parts)
            loss = self.loss(*part) / parts
            loss.backward()
            total = total + loss.detach()
        proc.part = (0, 1)
        if self.form.plain:
            self.opt.step()
            self.opt.zero_grad()
        else:
            self.guard.step(self.opt, total, number)
        return total


class Sampling:
    """Ten guided DDIM steps of a batch. Plain: a forward for each half of guidance."""

    def __init__(self, form, base, args):
        self.form = form
        self.args = args
        self.schedule = make_schedule("linear").to(form.proc.device)
        self.net = form.proc.autocast(form.proc.frozen(copy.deepcopy(base), form.place))
        self.nodes = schedule_grid(self.schedule, "dit", 10)
        self.guided = self.two_forwards if form.plain else guide(self.net, CFG)
        self.flops = 20 * args.batch_size * models.count(base.arch)[1]

    def two_forwards(self, z, t, y):
        uncond = self.net(z, t, torch.full_like(y, CLASSES))[:, :4]
        cond = self.net(z, t, y)[:, :4]
        mixed = uncond[:, :3] + CFG * (cond[:, :3] - uncond[:, :3])
        return torch.cat([mixed, cond[:, 3:]], 1)

    @torch.no_grad()
    def step(self, number):
        device = self.form.proc.device
        rng = StepRandom(self.form.proc, 0, number, self.args.batch_size)
        z = rng.normal(LATENT)
        y = rng.integers(0, CLASSES)
        for node, next_node in zip(self.nodes, self.nodes[1:] + [-1]):
            t = torch.full((len(y),), node, device=device)
            u = torch.full((len(y),), next_node, device=device)
            z = ddim_step(self.schedule, z, self.guided(z, t, y)[:, :4], t, u)
        return z


# ---- Measuring ----------------------------------------------------------------------------------


def median_seconds(step, form, repeats, first):
    times = []
    for number in range(first, first + repeats):
        began = time.perf_counter()
        step(number)
        if form.proc.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def compare(name, base, args, peak):
    """Print the rates of both forms, and their ratio; peak: of a matrix product, or None."""
    cuda = args.device == "cuda"
    found = {}
    for kind in ("ours", "plain"):
        form = Form(kind, args, args.amp)
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with form:
            if name == "sampling":
                work = Sampling(form, base, args)
            else:
                work = Training(name, form, base, args)
            median_seconds(work.step, form, 2, 0)  # compiles, warms up
            found[kind] = min(
                median_seconds(work.step, form, args.repeats, 2),
                median_seconds(work.step, form, args.repeats, 2 + args.repeats))
            memory = ""
            if cuda:
                memory = f", {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB"
            if args.profile and kind == "ours":
                profile(work.step)
        tflops = work.flops / found[kind] / 1e12
        share = f" = {tflops / peak:.0%} of a matrix product" if peak else ""
        print(f"  {name:9} {kind:6} {args.batch_size / found[kind]:9.4g} images/s  "
              f"{tflops:8.3g} TFLOP/s{share}{memory}", flush=True)
        del work
    print(f"{name}: ours is {found['plain'] / found['ours']:.2f} times as fast as the plain form",
          flush=True)


def profile(step):
    """Print the three largest costs."""
    cuda = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as p:
        step(0)

    def own_time(event):
        return event.self_device_time_total if cuda else event.self_cpu_time_total

    events = sorted(p.key_averages(), key=own_time, reverse=True)
    total = sum(own_time(event) for event in events)
    texts = []
    for event in events[:3]:
        texts.append(f"{event.key[:60]} {own_time(event) / total:.0%} ({event.count} calls)")
    print("  largest: " + "; ".join(texts))


def losses(name, base, args):
    """Print the loss under bf16 against float32: the same steps from the same weights."""
    curves = {}
    for amp in ("off", "bf16"):
        form = Form("ours", args, amp)
        with form:
            set_tf32(False)
            work = Training(name, form, base, args)
            steps = [work.step(number) for number in range(args.losses)]
        curves[amp] = torch.stack(steps).double().cpu()
    off, bf16 = curves["off"], curves["bf16"]
    difference = (bf16 / off - 1).abs()
    print(f"{name}: loss over {args.losses} steps, float32 {off[0]:.4g} -> {off[-1]:.4g}, "
          f"bf16 {bf16[0]:.4g} -> {bf16[-1]:.4g}; relative difference "
          f"{difference.median():.2e} in the median, {difference.max():.2e} at most")


def print_head(args, peak):
    plural = "s" if args.accumulate > 1 else ""
    where = f"CPU, {torch.get_num_threads()} threads"
    if peak:
        where = (f"{torch.cuda.get_device_name()}, a bf16 product of 8192^3 makes "
                 f"{peak:.0f} TFLOP/s")
    print(f"{args.model} at 256 pixels, batch {args.batch_size} in {args.accumulate} part{plural}, "
          f"torch {torch.__version__}, {where}", flush=True)


def apply_defaults(args):
    """Fill missing arguments with what fits the device."""
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    defaults = dict(model="DiT-S/2", student="DiT-Ti/2", batch_size=2, repeats=2)
    if args.device == "cuda":
        defaults = dict(model="DiT-XL/2", student="DiT-B/2", batch_size=16, repeats=10)
    for key, value in defaults.items():
        setattr(args, key, getattr(args, key) or value)


def main(args):
    apply_defaults(args)
    began = time.perf_counter()
    peak = Processes("off").matmul_tflops()
    print_head(args, peak)
    arch = models.make_arch(args.model, LATENT[1], LATENT[0], CLASSES, True)
    base = models.fill_random(models.build(arch))
    if args.losses:
        losses(args.methods[0], base, args)
        return
    for i, name in enumerate(args.methods):
        expected = (time.perf_counter() - began) / max(i, 1) * (i + 1)
        if i and expected > 60 * args.minutes:  # the next one would hardly fit
            print(f"{args.minutes:g} minutes are nearly over; left out: "
                  f"{', '.join(args.methods[i:])}")
            return
        compare(name, base, args, peak)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--methods", nargs="+", choices=[*FORWARDS, "sampling"],
                   default=["issd", "sampling", "train", "ssd", "pd", "dsd", "kd"])
    p.add_argument("--model")
    p.add_argument("--student", help="of kd")
    p.add_argument("--batch-size", type=int)
    p.add_argument("--accumulate", type=int, default=1)
    p.add_argument("--grad-checkpointing", action="store_true")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction,
                   default=torch.cuda.is_available())
    p.add_argument("--amp", choices=["auto", "bf16", "off"], default="auto")
    p.add_argument("--repeats", type=int)
    p.add_argument("--minutes", type=float, default=8)
    p.add_argument("--profile", action="store_true")
    p.add_argument("--losses", type=int, metavar="STEPS")
    run_script(main, p.parse_args())
