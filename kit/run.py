"""What happens between the steps of a training run: resume, logs, checks, saves, signals, pictures.

    run = Run(args, proc, "name", wrapped, {"model": net, "opt": opt}, spec, flops)
    for step, rng in run.steps():                       # resumes; logs, saves, stops between steps
        for part in run.parts(x0, y, noise):            # --accumulate
            loss, _ = some_loss(denoise, *part)
            run.backward(loss)
        run.optimizer_step(opt)

The script's loop shows the mathematics of a step. A Run never calls a loss, and it calls a network
for the pictures of --sample-every alone.
"""
import json
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn as nn
from tqdm import tqdm

import models
from kit.cli import UserError, flag, say
from kit.data import what_changed
from kit.processes import StepRandom, lock, progress_bar, why_not_written, write_text
from kit.sampling import SampleOptions, sample_images, save_grid

# ---- Optimisation ------------------------------------------------------------------------------


class EMA:
    """Average of the weights with warm-up: decay_n = min(decay, (1 + n) / (10 + n)) at step n, or
    what update() is told. decay = 0 keeps none."""

    def __init__(self, net, decay):
        self.net = net
        self.decay = decay
        self.weights = None
        if decay:
            self.weights = {k: v.detach().clone() for k, v in net.state_dict().items()}

    @torch.no_grad()
    def update(self, step, decay=None):
        if not self.decay:
            return
        if decay is None:
            decay = min(self.decay, (1 + step) / (10 + step))
        now = self.net.state_dict()
        averages = list(self.weights.values())
        torch._foreach_lerp_(averages, [now[k] for k in self.weights], 1 - decay)

    def load_state_dict(self, weights):
        if self.decay:
            for k, v in weights.items():
                self.weights[k].copy_(v)

    def state_dict(self):
        """The weights to sample with: the average, or where none is kept the network's own."""
        return self.weights if self.decay else self.net.state_dict()


def update_average(average, net, decay):
    """average <- decay average + (1 - decay) net, for all parameters of two networks alike."""
    now = [p.detach() for p in net.parameters()]
    torch._foreach_lerp_(list(average.parameters()), now, 1 - decay)


def adamw(net, lr, betas=(0.9, 0.999)):
    """Fused AdamW without weight decay, over what is trainable."""
    trainable = [p for p in net.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(trainable, lr=lr, betas=betas, weight_decay=0, fused=True)

    def lay_as_the_weights(opt):
        # important! Fused AdamW takes no notice of strides, which differ where a U-Net's channels
        # are last.
        for p, state in opt.state.items():
            for k, v in state.items():
                if v.shape == p.shape:
                    state[k] = torch.empty_like(p).copy_(v)
    opt.register_load_state_dict_post_hook(lay_as_the_weights)
    return opt


def set_lr(opt, lr):
    for group in opt.param_groups:
        group["lr"] = lr


class Guard:
    """Skips updates with a non-finite loss (on any rank) or gradient, and remembers the first one.

    `step` works on the device and needs no synchronisation: the fused optimiser itself looks at
    the flag. `check` synchronises; it is called at every log line and before every save, so that a
    bad state is never saved.
    """

    NEVER = 2 ** 40

    def __init__(self, proc):
        self.proc = proc
        # The first bad step of the loss, and of the gradient:
        self.first = torch.full((2,), self.NEVER, device=proc.device)

    def step(self, opt, loss, step, clip=None):
        """opt.step() unless the loss or a gradient is not finite; clip: the largest norm."""
        params = []
        for group in opt.param_groups:
            params += group["params"]
        if clip:
            norm = nn.utils.clip_grad_norm_(params, clip)
        else:  # spares a pass over the gradients
            norms = torch._foreach_norm([p.grad for p in params if p.grad is not None])
            norm = torch.linalg.vector_norm(torch.stack(norms))
        bad = torch.stack([~loss.isfinite(), ~norm.isfinite()]).float()
        bad = self.proc.sum(bad) > 0
        self.first = torch.where(bad, self.first.clamp(max=step), self.first)
        opt.grad_scale = None
        opt.found_inf = bad.any().float()  # fused AdamW changes nothing where found_inf is 1
        opt.step()
        opt.zero_grad(set_to_none=True)

    def check(self, out):
        """Raise UserError if an update was skipped."""
        step, where = self.first.min(0)
        if step < self.NEVER:
            what = ("loss", "gradient")[int(where)]
            last = Path(out) / "last.pt"
            kept = f"{last} holds the last good state" if last.exists() else "nothing was saved yet"
            raise UserError(f"step {int(step) + 1}: the {what} is not finite; {kept}. Look at the "
                            "data, or repeat the command with a lower --lr; where that state has "
                            "diverged already, start anew in another --out")


# ---- The run -----------------------------------------------------------------------------------


class Run:
    """Resumes a training run and does what lies between its steps.

    args      the script's arguments: out, resume, seed, steps, batch_size, accumulate, ...
    name      of the method, for the log
    student   what Processes.student() returned, so that DDP averages gradients once a step
    state     what a checkpoint keeps: {"model": net, "opt": optimiser, ...}, objects with
              state_dict() and load_state_dict(), or None. "ema" (an EMA) are the weights to sample
              with; where a method keeps none, they are the model's own, and are stored once
    spec      the checkpoint's description; it may change while the run goes on
    flops     floating-point operations of a step on all processes

    step      steps done so far; right after __init__, where the run continues
    extra     further tensors and numbers for the checkpoint, or functions that give them, called on
              all ranks when it is written; after __init__, what the checkpoint held
    base      the network of the steps that a one-step student does not make (for pictures)
    fixed     names in FUTURE that may not change when the run continues: the steps that are done
              would mean something else
    dataset   where it is open already; else use_data() follows
    """

    def __init__(self, args, proc, name, student, state, spec,  # noqa: PLR0913
                 flops=0, fixed=(), dataset=None):
        self.args = args
        self.proc = proc
        self.name = name
        self.student = student
        self.state = state
        self.spec = spec
        self.flops = flops
        self.step = 0
        self.extra = {}
        self.base = None
        self.loss = 0
        self.guard = Guard(proc)
        self.log = None
        self.stop = None
        if args.sample_every and spec["scale"] is not None:
            raise UserError("--sample-every draws images, and this model makes latents; leave it "
                            "out, and draw a checkpoint with sample.py --decode")
        self.lock = make_out_folder(args, proc)  # before last.pt is read, and until the last save
        held, changed = open_last(args, fixed)
        if held and dataset:
            refuse_changed_data(args, held.get("data"), dataset)
        if held:
            self.restore(held)
        if dataset:
            self.use_data(dataset)
        if self.is_finished:
            self.release()
        for line in changed:
            say(proc, f"{args.out}: {line}")

    @property
    def is_finished(self):
        return self.step >= self.args.steps

    def restore(self, held):
        """Continue from what a checkpoint holds."""
        self.step = held["step"]
        for key, part in self.state.items():
            if part is not None and held.get(key) is not None:
                part.load_state_dict(held[key])
            if isinstance(part, torch.optim.Optimizer) and self.args.lr != held["args"]["lr"]:
                set_lr(part, self.args.lr)
        known = {"format", "ema", "step", "args", "paths", *self.state, *self.spec}
        self.extra = {k: v for k, v in held.items() if k not in known}
        if not self.is_finished:
            say(self.proc, f"{self.args.out}: continuing from step {self.step}")

    def release(self):
        """Let other processes write into the folder."""
        if self.lock:
            self.lock.close()

    def use_data(self, dataset):
        """Remember which data set this run trains on. Raises UserError when it was another one."""
        refuse_changed_data(self.args, self.extra.get("data"), dataset)
        self.extra["data"] = dataset.identity

    # The steps:

    def steps(self, until=None, copy=None):
        """Yield (step, StepRandom) for the steps that are left, up to `until` (default: all).

        copy: the name of a file that gets the weights when step `until` is done.
        """
        until = until or self.args.steps
        if self.stop is None and not self.is_finished:
            self.stop = Stop(self.proc, self.args)
            self.log = Log(self)
        for step in range(self.step, until):
            rng = StepRandom(self.proc, self.args.seed, step, self.args.batch_size)
            yield step, rng
            self.step = step + 1
            self.after_step(until, copy)
        if self.is_finished and self.stop is not None:
            self.log.close()
            self.release()
            self.stop.restore()
            self.stop = None
        self.proc.barrier()  # the others read what rank 0 has written

    def parts(self, *rows, net=None):
        """Yield the rows (tensors with one row per sample, or None) in --accumulate equal parts.

        The gradients are those of the whole batch, with less memory. net: what is trained, where
        that is not the student.
        """
        count = self.args.accumulate
        net = net or self.student
        columns = [[None] * count if r is None else r.chunk(count) for r in rows]
        for i, part in enumerate(zip(*columns)):
            self.proc.part = (i, count)
            is_last = i == count - 1  # then gradients are averaged over processes
            with nullcontext() if self.proc.world == 1 or is_last else net.no_sync():
                yield part
        self.proc.part = (0, 1)

    def backward(self, loss):
        """Add the gradients of one part, the share 1 / --accumulate of the loss."""
        loss = loss / self.args.accumulate
        loss.backward()
        self.loss = self.loss + loss.detach()

    def optimizer_step(self, opt, clip=None, logged=True):
        """Update the weights, unless the loss or a gradient is not finite, and clear gradients.

        clip: the largest norm of the gradient. logged: whether this loss is the one to log.
        """
        loss = self.loss
        self.loss = 0
        self.guard.step(opt, loss, self.step, clip)
        if logged:
            self.log.add(loss, opt)

    def after_step(self, until, copy):
        """Log, check, save, draw; stop after a signal."""
        args = self.args
        save, ended = self.stop.check(self.step)
        at_end = self.step == until
        if self.log.after_step(self.step):
            self.guard.check(args.out)
        if save or at_end:
            self.guard.check(args.out)
            if at_end and copy:
                self.save(copy, {"opt": {}})
            self.save("last.pt", self.everything())
        if args.sample_every and self.step % args.sample_every == 0:
            self.draw_samples()
        if ended:
            self.proc.barrier()  # important! or torchrun ends the rank that is still saving
            self.log.close()
            self.release()       # another process may continue the run
            if self.proc.is_main:
                print(f"stopped by a signal after step {self.step}, saved; the same command "
                      "continues", file=sys.stderr, flush=True)
            sys.exit(143)

    def weights(self):
        """{"model": ..., "ema": ...}; without an average both are the same tensors."""
        model = self.state["model"].state_dict()
        ema = self.state.get("ema")
        return {"model": model, "ema": ema.state_dict() if ema is not None else model}

    def everything(self):
        """All that a run needs to continue."""
        held = {k: part.state_dict() for k, part in self.state.items() if part is not None}
        for k, v in self.extra.items():
            held[k] = v() if callable(v) else v
        return held

    def save(self, file, more):
        """Write --out/file on rank 0: to a temporary file, to the disk, then into place."""
        if not self.proc.is_main:
            return
        held = {"format": 1, **more, **self.weights(), "step": self.step, **self.spec,
                "args": plain_arguments(self.args), "paths": real_paths(self.args)}
        write_checkpoint(Path(self.args.out) / file, held)

    def draw_samples(self):
        """Write --out/samples-STEP.png: 40 samples, from the same noise at every step."""
        with torch.device("meta"):
            net = models.build(self.spec["arch"])
        net = net.to_empty(device="cpu")
        net.load_state_dict(self.weights()["ema"])
        denoise = self.proc.autocast(self.proc.frozen(net))
        options = SampleOptions(seed=self.args.seed, base=self.base,
                                batch=self.args.sample_batch_size)
        images, _ = sample_images(denoise, self.spec, self.proc, 40, options,
                                  desc=f"samples after step {self.step}")
        if self.proc.is_main:
            save_grid([images], Path(self.args.out) / f"samples-{self.step:06d}.png")


# ---- Signals -----------------------------------------------------------------------------------


class Stop:
    """When to save, and SIGTERM and Ctrl-C: agreed over ranks at the end of a step."""

    def __init__(self, proc, args):
        self.proc = proc
        self.args = args
        self.asked = False
        self.saved = time.perf_counter()
        self.before = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            self.before[number] = signal.signal(number, self.ask)

    def ask(self, *_):
        self.asked = True
        # A second Ctrl-C ends the program at once:
        signal.signal(signal.SIGINT, self.before[signal.SIGINT])

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def check(self, done):
        """After step `done` (counted from 1) -> (save now?, has a signal ended the run?)."""
        waited = time.perf_counter() - self.saved
        ended, due = self.proc.any(self.asked, waited >= 60 * self.args.save_minutes)
        save = due or ended or done % self.args.save_every == 0 or done == self.args.steps
        if save:
            self.saved = time.perf_counter()
        return save, ended


# ---- The log -----------------------------------------------------------------------------------


class Log:
    """Progress bar on stderr; one line per interval on stdout and in log.jsonl, from rank 0.

    log.jsonl begins with {"args": ...}. Every further line has step, loss (the mean since the line
    before), lr, seconds (of training so far), samples_per_second and memory_gib (at most, of this
    process); on GPUs also tflops of one process and their share of what a matrix product reaches.
    Losses are summed on the device and read (a synchronisation) only when a line is due.
    """

    def __init__(self, run):
        self.run = run
        self.peak = run.proc.matmul_tflops() if run.flops else None
        self.sum = torch.zeros((), device=run.proc.device)
        self.count = 0
        self.lr = None
        self.before = 0.0  # seconds of training before this launch
        self.path = Path(run.args.out) / "log.jsonl"
        self.bar = progress_bar(run.proc, run.args.steps, run.name, run.step)
        if run.proc.is_main:
            self.forget_what_is_done_again()
        self.began = time.perf_counter()
        self.time = self.began

    def forget_what_is_done_again(self):
        """Drop the lines of steps after the last checkpoint: they are logged again."""
        kept = [json.dumps({"args": plain_arguments(self.run.args)})]
        for line in self.path.read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
                is_kept = record.get("step", self.run.step + 1) <= self.run.step
                seconds = float(record.get("seconds", 0))
            except (ValueError, TypeError, AttributeError):  # damaged, by a kill or a full disk
                continue
            if is_kept:
                kept.append(line)
                self.before = seconds
        write_text(self.path, "".join(line + "\n" for line in kept))

    def add(self, loss, opt):
        self.sum += loss
        self.count += 1
        self.lr = opt.param_groups[0]["lr"]

    def after_step(self, step):
        """After step `step` (counted from 1). Returns True when a line was due."""
        args = self.run.args
        self.bar.update()
        if step % args.log_every and step != args.steps:
            return False
        proc = self.run.proc
        mean = float(proc.sum(self.sum.clone())) / proc.world / self.count
        seconds = time.perf_counter() - self.time
        if proc.is_main:
            self.write(step, mean, seconds)
        self.sum = torch.zeros_like(self.sum)
        self.count = 0
        self.time = time.perf_counter()
        return True

    def write(self, step, loss, seconds):
        """One line about the last self.count steps, which took so many seconds."""
        args = self.run.args
        rate = self.count * args.batch_size / seconds
        memory = peak_memory_gib(self.run.proc.device)
        total = self.before + time.perf_counter() - self.began
        record = {"step": step, "loss": loss, "lr": self.lr, "seconds": round(total, 2),
                  "samples_per_second": round(rate, 1), "memory_gib": memory}
        speed = ""
        if self.peak:
            tflops = self.run.flops * self.count / seconds / self.run.proc.world / 1e12
            share = tflops / self.peak
            record.update(tflops=round(tflops, 1), share=round(share, 3))
            speed = f"  {tflops:.0f} TFLOP/s, {share:.0%} of a matrix product's  {memory:.1f} GiB"
        with open(self.path, "a") as f:
            f.write(json.dumps(record) + "\n")
        left = tqdm.format_interval((args.steps - step) * seconds / self.count)
        self.bar.set_postfix_str(f"loss {loss:.4g}, {rate:.0f} samples/s", refresh=False)
        say(self.run.proc, f"{self.run.name} step {step}/{args.steps}  loss {loss:.5g}  "
                           f"{rate:.0f} samples/s{speed}  {left} left")

    def close(self):
        self.bar.close()


def peak_memory_gib(device):
    """The most memory that this process took: of its GPU, or without one of the machine."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2 ** 30, 2)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30, 2)


# ---- A run's own file --------------------------------------------------------------------------

# Arguments that do not change the result, or only where they end in rounding:
FREE = {"out", "resume", "log_every", "save_every", "save_minutes", "sample_every", "eval_samples",
        "dry_run", "workers", "sample_batch_size", "pool"}
# Arguments that change nothing but the steps that are still to come:
FUTURE = {"lr", "steps", "amp", "compile", "accumulate", "grad_checkpointing"}

# Folders of control runs that a method makes within its own:
CONTROLS = ("continued", "plain", "dsm")


def make_out_folder(args, proc):
    """Make --out -> its lock on rank 0, else None. Raises UserError where it cannot be written, or
    another process writes there."""
    if not args.out:
        raise UserError("--out is empty; name a folder")
    out = Path(args.out)
    source = os.path.realpath(getattr(args, "data", None) or os.devnull)
    if os.path.isdir(source) and Path(os.path.realpath(out), "x").is_relative_to(source):
        raise UserError(f"--out {args.out} lies in --data {args.data}, where its files would "
                        "become data; choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not proc.is_main:
            return None
        (out / "log.jsonl").open("a").close()
        return lock(out)
    except OSError as e:
        raise UserError(f"--out {out}: cannot write there ({e.strerror}); choose another folder")


def open_last(args, fixed=()):
    """-> (the checkpoint to continue from, or None; lines about changed arguments).

    Raises UserError where --out holds a run with other arguments.
    """
    out = Path(args.out)
    last = out / "last.pt"
    if args.resume == "never" and last.exists():
        raise UserError(f"{last} exists and --resume never would overwrite it; choose another "
                        "--out or delete it")
    if not last.exists():
        for control in CONTROLS:
            if (out / control / "last.pt").exists():
                raise UserError(f"{out / control} is left of a run that is no more: delete it, or "
                                "choose another --out")
        return None, []
    try:
        held = torch.load(last, map_location="cpu", weights_only=True)
        saved, step = held["args"], held["step"]
    except Exception as e:  # a damaged file fails in many ways
        raise UserError(f"{last}: cannot be read ({type(e).__name__}); it is damaged: delete it or "
                        "choose another --out")
    return held, changed_arguments(args, saved, held.get("paths", {}), step, fixed)


def changed_arguments(args, saved, paths, step, fixed):
    """What differs from the arguments of the launch before, and may: lines to print.

    saved, paths   plain_arguments() and real_paths() of the launch before
    step           how far it came
    fixed          names in FUTURE that must not change in this script

    Raises UserError for what would make it another run.
    """
    now = plain_arguments(args)
    is_finished = step >= now["steps"]
    lines = []
    for key in sorted((saved.keys() | now.keys()) - FREE):
        before, value = saved.get(key), now.get(key)
        is_new = key not in saved and value in (None, False)  # a flag younger than the checkpoint
        if before == value or is_new or is_same_path(value, before, paths.get(key)):
            continue
        may = key in FUTURE and key not in fixed
        if key == "steps":
            may = may and value >= before
        elif is_finished and key in ("lr", "amp"):  # there are no steps to come
            may = False
        if not may:
            raise UserError(f"{args.out} holds a run with {flag(key)} {before}, now it is "
                            f"{value}; repeat the old command to continue it, or choose "
                            "another --out")
        if not is_finished:
            lines.append(f"from here on with {flag(key)} {value}, it was {before}")
    return lines


def refuse_changed_data(args, before, dataset):
    """Raise UserError when the data set is not the one with the identity `before` (None: not
    known)."""
    changed = before and what_changed(before, dataset.identity)
    if changed:
        raise UserError(f"--data {dataset.name} is not what {args.out} was trained on: {changed}; "
                        "restore it, or choose another --out")


def plain_arguments(args):
    """The arguments as numbers and strings, for checkpoints and logs."""
    plain = (int, float, str, bool, type(None))
    return {k: v if isinstance(v, plain) else str(v) for k, v in vars(args).items() if k != "given"}


def real_paths(args):
    """Where the arguments that name files or folders lead: {name: absolute path without links}."""
    return {k: os.path.realpath(v) for k, v in vars(args).items()
            if isinstance(v, str) and k != "out" and os.path.exists(v)}


def is_same_path(value, before, real):
    """Do two arguments name one file or folder? real: where `before` led when it was given."""
    if not isinstance(value, str) or not isinstance(before, str) or not os.path.exists(value):
        return False
    return os.path.realpath(value) in (real, os.path.realpath(before))


def write_checkpoint(path, held):
    """Write a dict to a temporary file, flush it to the disk, and move it into place."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save(held, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:
        reason = why_not_written(e, temporary.parent)
        temporary.unlink(missing_ok=True)
        kept = "the one before it stands" if path.exists() else "none was saved before"
        raise UserError(f"cannot save {path} ({reason}); {kept}. Free some space and repeat the "
                        "command")
