"""What a training script needs around its mathematics: processes, precision, randomness, averages,
checkpoints and resume, progress and logs. Nothing here comes from a paper.

The same script runs as `python x.py` (one process, CPU or GPU) and under `torchrun` (gloo on CPU, nccl on GPU).
"""
import argparse
import ctypes
import json
import os
import signal
import sys
import time
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

CACHE = Path(os.environ.get("MINDISTILL_CACHE", Path.home() / ".cache" / "mindistill"))  # downloads live here


class UserError(Exception):
    """Something the user can mend: ends the program with this one line and exit code 2."""


Raw = argparse.RawDescriptionHelpFormatter  # --help shows a script's docstring as it stands


class Parser(argparse.ArgumentParser):
    def error(self, message):  # under torchrun only rank 0 complains about the command line
        if os.environ.get("RANK", "0") == "0":
            print(f"{self.prog}: error: {message} (see --help)", file=sys.stderr)
        sys.exit(2)


def common_arguments(p, out):
    """The flags that mean the same in every training script."""
    p.add_argument("--seed", type=seed, default=0, help="every random number of step n is drawn from (seed, n)")
    p.add_argument("--out", default=out, help="folder of last.pt, log.jsonl, metrics.json and pictures")
    p.add_argument("--resume", choices=["auto", "never"], default="auto", help="auto continues what is in --out")
    p.add_argument("--amp", choices=["auto", "bf16", "off"], default="auto", help="autocast of network calls; auto: bf16 on GPU")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile each block (default: on GPUs, in runs of at least 1,000 steps without --grad-checkpointing)")
    p.add_argument("--accumulate", type=int, default=1, metavar="PARTS", help="work through a process's share of the batch in so many parts: the same step, less memory")
    p.add_argument("--grad-checkpointing", action="store_true", help="compute the blocks' activations again in the backward pass: one more forward of the student, much less memory")
    p.add_argument("--log-every", type=int, metavar="STEPS")
    p.add_argument("--save-every", type=int, metavar="STEPS")
    p.add_argument("--save-minutes", type=float, default=10, metavar="MINUTES", help="save at least so often, whatever --save-every says (default 10)")
    p.add_argument("--dry-run", action="store_true", help="print the plan and exit")


def compiles(args):  # on a GPU. Torch 2.4 cannot compile what is computed again
    return args.compile if args.compile is not None else args.steps >= 1000 and not args.grad_checkpointing


def flag(key):
    return "--" + key.replace("_", "-")


def check_positive(args, *names):
    for name in names or ("steps", "batch_size", "lr", "log_every", "save_every", "save_minutes", "image_size", "classes"):
        value = getattr(args, name, None)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{flag(name)} {value}: must be positive")


def seed(text):  # the type of --seed
    if not 0 <= int(text) < 2 ** 63:
        raise argparse.ArgumentTypeError(f"{text}: must lie between 0 and 2^63 - 1")
    return int(text)


# ---- Processes --------------------------------------------------------------------------------------


class Processes:
    """Who this process is. One boolean decides everything: `world > 1`, set by torchrun's environment."""

    def __init__(self, amp="auto"):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", self.local_rank) if cuda else torch.device("cpu")
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=2))
        if cuda:
            if self.local_rank >= torch.cuda.device_count():
                raise UserError(f"--nproc_per_node is larger than this machine's {torch.cuda.device_count()} GPUs")
            torch.cuda.set_device(self.device)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        elif sys.platform == "linux":  # let malloc keep what a step frees for the next one: fetching it from the system anew costs up to a tenth
            with suppress(OSError, AttributeError):  # no glibc
                mallopt = ctypes.CDLL("libc.so.6").mallopt
                mallopt(-4, 0), mallopt(-1, 2 ** 31 - 1), mallopt(-2, 2 ** 26)  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        self.bf16 = amp == "bf16" or (amp == "auto" and cuda and torch.cuda.is_bf16_supported())
        self.main, self.part = self.rank == 0, (0, 1)  # part: which of its rows it works on, of how many: see backward()

    def mixed(self, net):
        """net's forward under bf16 autocast if so chosen, giving float32: half precision never leaves the call."""
        def call(*args, **kwargs):
            with torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext():
                out = net(*args, **kwargs)
            return tuple(o.float() for o in out) if isinstance(out, tuple) else out.float()
        call.net = getattr(net, "module", net)
        call.num_classes = call.net.num_classes
        return call

    def place(self, net, args):
        """net on this device: on a GPU a U-Net's channels last, and compiled where that repays itself."""
        net.to(self.device)
        if self.device.type == "cuda" and getattr(net, "arch", {}).get("net") in ("UNet", "DDPM++"):
            net.to(memory_format=torch.channels_last)
        if args and compiles(args) and (args.compile or self.device.type == "cuda"):
            c = torch._dynamo.config  # a U-Net's blocks differ in shape and share a forward; DDP's buckets would cut them
            c.cache_size_limit, c.accumulated_cache_size_limit, c.optimize_ddp = 512, 4096, False
            for block in net.blocks:  # soon done; the keys of the state dict stay, and taps stay plain Python. Only DDIL's rollouts have batches of any size
                block.compile(dynamic=None if any(getattr(args, "dagger", ())) else False)
        return net

    def student(self, net, args=None):
        """net on this device, ready to train: wrapped for DDP when there are several processes."""
        for m in net.modules() if args and args.grad_checkpointing else ():
            m.recompute = True
        self.place(net, args).train()
        return net if self.world == 1 else DistributedDataParallel(net, gradient_as_bucket_view=True, broadcast_buffers=False)

    def frozen(self, net, args=None):
        """net on this device, never to train. Under bf16 its matmul weights are stored as what autocast casts them to: half the memory, no casts, the same bits."""
        net.to(self.device).eval().requires_grad_(False)
        if self.bf16:
            for m in net.modules():
                if isinstance(m, (nn.Linear, nn.Conv2d)):
                    m.to(torch.bfloat16)
        return self.place(net, args)

    def backward(self, net, loss_of, parts, *rows):
        """loss_of(*rows).backward(), in so many equal parts of the rows (tensors of one row a sample, or None), one after another: the same gradients,
        less memory. net: what student() returned. -> the mean loss; with it, where loss_of returns a pair, the second of all rows."""
        results = []
        for i, piece in enumerate(zip(*([None] * parts if r is None else r.chunk(parts) for r in rows))):
            self.part = (i, parts)
            with net.no_sync() if self.world > 1 and i < parts - 1 else nullcontext():  # gradients are averaged once
                result = loss_of(*piece)
                loss, more = result if isinstance(result, tuple) else (result, None)
                (loss / parts).backward()
            results.append((loss.detach() / parts, more))
        self.part, (losses, more) = (0, 1), zip(*results)
        return sum(losses) if more[0] is None else (sum(losses), torch.cat(more))

    def check_batch(self, batch, parts=1):
        if batch % self.world:
            raise UserError(f"--batch-size {batch} is the batch of all processes together and must be divisible by their number, {self.world}")
        if parts < 1 or batch // self.world % parts:
            raise UserError(f"--accumulate {parts}: must divide a process's share of the batch, {batch // self.world}")

    def rows(self, whole):  # this rank's rows of something that has one row per sample of the global batch
        n, (i, parts) = len(whole) // self.world // self.part[1], self.part
        return whole[(self.rank * parts + i) * n:][:n]

    def whole(self, rows, dim=0):
        """The inverse of rows(): every rank's share of a tensor, put together on all ranks."""
        if self.world == 1:
            return rows
        dist.all_gather(parts := [torch.empty_like(rows) for _ in range(self.world)], rows.contiguous())
        return torch.cat(parts, dim)

    def any(self, *flags):  # each of them true on all ranks if it is true on one
        if self.world == 1:
            return flags
        t = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
        return [bool(v) for v in t]

    def peak(self, n=8192):
        """TFLOP/s of a product of two bf16 matrices of random numbers, n x n, on a GPU; None on a CPU."""
        if self.device.type != "cuda":
            return None
        from torch.utils.benchmark import Timer  # takes long, and warns where there is no GPU
        a, b = torch.randn(2, n, n, device=self.device, dtype=torch.bfloat16)
        return 2 * n ** 3 / Timer("a @ b", globals=dict(a=a, b=b)).blocked_autorange(min_run_time=0.5).median / 1e12

    def sum(self, t):  # in place, over ranks
        if self.world > 1:
            dist.all_reduce(t)
        return t

    def barrier(self):
        if self.world > 1:
            dist.all_reduce(torch.zeros(1))  # over gloo: needs no GPU and no device guess

    def gather(self, rows):
        """Lists of (position, array) pairs of all ranks -> one array in order of position, on every rank."""
        if self.world > 1:
            parts = [None] * self.world
            dist.all_gather_object(parts, rows)
            rows = [r for part in parts for r in part]
        return np.concatenate([a for _, a in sorted(rows, key=lambda r: r[0])])


def run(main, args):
    """main(args); what the user can mend becomes one line from one rank and exit code 2."""
    code = 0
    try:
        main(args)
    except SystemExit as e:
        code = e.code or 0
    except UserError as e:
        leave(f"error: {e}", 2)
    except OSError as e:
        leave(f"error: {e.strerror or e}{': ' + str(e.filename) if e.filename else ''}; nothing that was saved is lost, mend it and repeat the command", 2)
    except KeyboardInterrupt:
        leave("interrupted; what was saved is whole, and a training command continues from it", 130)
    except (RuntimeError, MemoryError) as e:
        if isinstance(e, (MemoryError, torch.cuda.OutOfMemoryError)) or "can't allocate memory" in str(e):
            leave("error: out of memory; lower --batch-size, or in training keep it and add --accumulate 2 (4, 8, ...) or --grad-checkpointing", 2)
        if not dist.is_initialized() or "onnection" not in str(e):
            raise
        leave(f"error: another process of this job was lost ({str(e).splitlines()[0][:100]}); the last checkpoint stands, the same command continues from it", 1)
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)  # important! a thread of gloo that drops its last tensor while the interpreter is ending aborts the process
    if code:
        sys.exit(code)


def leave(line, code):
    """Print one line, from the first process of the job that has something to say, and exit."""
    if not dist.is_initialized() or first_to_speak():
        tqdm.write(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    if dist.is_initialized():
        time.sleep(1)  # rank 0 may keep the store in which the others ask whether they are first
        os._exit(code)  # a broken process group would hang an orderly exit
    sys.exit(code)


def first_to_speak():
    """True for the first process of the job that asks."""
    try:
        return dist.distributed_c10d._get_default_store().add("spoken", 1) == 1
    except Exception:  # the store's own process is the one that was lost
        return True


# ---- Randomness: a function of (seed, step), the same on any number of processes --------------------


def generator(device, *key):
    """A torch.Generator whose stream depends on the integers `key` >= 0 alone, such as (seed, step)."""
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


class StepRandom:
    """Random numbers of one training step: drawn for the whole global batch, of which a rank keeps its rows."""

    def __init__(self, proc, seed, step, batch, *more):
        self.proc, self.batch, self.key, self.g = proc, batch, (seed, step), generator(proc.device, seed, step, *more)
        self.where = dict(generator=self.g, device=proc.device)

    def fork(self, n):  # other numbers of the same step, a stream for every n
        return StepRandom(self.proc, *self.key, self.batch, 4, n)  # 2 and 3: data.batches

    def normal(self, shape):
        return self.proc.rows(torch.randn(self.batch, *shape, **self.where))

    def uniform(self, shape=()):
        return self.proc.rows(torch.rand(self.batch, *shape, **self.where))

    def integers(self, low, high):  # low <= n < high
        return self.proc.rows(torch.randint(low, high, (self.batch,), **self.where))


# ---- Optimisation -----------------------------------------------------------------------------------


class EMA:
    """Average of the weights with warm-up: decay_n = min(decay, (1 + n) / (10 + n)), or what update() is told. decay = 0 keeps none."""

    def __init__(self, net, decay):
        self.decay = decay
        self.weights = {k: v.detach().clone() for k, v in net.state_dict().items()} if decay else None

    @torch.no_grad()
    def update(self, net, n, decay=None):
        if self.decay:
            sd = net.state_dict()
            torch._foreach_lerp_(list(self.weights.values()), [sd[k] for k in self.weights], 1 - (min(self.decay, (1 + n) / (10 + n)) if decay is None else decay))

    def load(self, weights):
        for k, v in weights.items() if self.decay else ():
            self.weights[k].copy_(v)

    def state_dict(self, net):
        """The weights to sample with: the average, or where none is kept the very tensors of net."""
        return self.weights if self.decay else net.state_dict()


def adamw(net, lr, betas=(0.9, 0.999)):
    """Fused AdamW without weight decay, over what is trainable."""
    opt = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=lr, betas=betas, weight_decay=0, fused=True)

    def as_the_weights_lie(opt):  # important! fused AdamW takes no notice of strides, which differ where a U-Net's channels are last
        for p, state in opt.state.items():
            state.update({k: torch.empty_like(p).copy_(v) for k, v in state.items() if v.shape == p.shape})
    opt.register_load_state_dict_post_hook(as_the_weights_lie)
    return opt


class Guard:
    """Skips updates with a non-finite loss (on any rank) or gradient, on the device, and remembers the first bad step. `update`
    needs no synchronisation: the fused optimiser itself looks at the flag. `check` synchronises; it is called at every log
    line and before every save, so that a bad state is never saved."""

    def __init__(self, proc):
        self.proc, self.first = proc, torch.full((2,), 2 ** 40, device=proc.device)  # first bad step: of the loss, of the gradient

    def update(self, opt, loss, step, clip=None):
        params = [p for group in opt.param_groups for p in group["params"]]
        if clip:
            norm = nn.utils.clip_grad_norm_(params, clip)
        else:  # spares a pass over the gradients
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([p.grad for p in params if p.grad is not None])))
        bad = self.proc.sum(torch.stack([~loss.detach().isfinite(), ~norm.isfinite()]).float()) > 0
        self.first = torch.where(bad, self.first.clamp(max=step), self.first)
        opt.grad_scale, opt.found_inf = None, bad.any().float()  # fused AdamW leaves everything as it is where found_inf is 1
        opt.step()
        opt.zero_grad(set_to_none=True)
        return norm

    def check(self, out):
        step, where = self.first.min(0)
        if step < 2 ** 40:
            last = Path(out) / "last.pt"
            kept = f"{last} holds the last good state" if last.exists() else "nothing was saved yet"
            raise UserError(f"step {int(step) + 1}: the {('loss', 'gradient')[int(where)]} is not finite; {kept}. Look at the data, or lower --lr")


# ---- Signals, progress ------------------------------------------------------------------------------


def write_text(path, text):
    """Write a small file atomically."""
    temporary = Path(path).with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def lock(folder):
    """An open file: until it is closed, or this process ends, no other process may write into the folder. Raises UserError when another does."""
    file = open(folder / ".lock", "w")
    with suppress(ImportError, OSError):  # not on Windows, nor on every file system
        import fcntl
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"another process is writing into {folder}; wait for it, or choose another --out")
    return file


class Stop:
    """When to save, and SIGTERM and Ctrl-C: agreed over ranks at the end of a step."""

    def __init__(self, proc, args):
        self.proc, self.args, self.asked, self.saved = proc, args, False, time.perf_counter()
        self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}

    def _ask(self, *_):
        self.asked = True
        signal.signal(signal.SIGINT, self.before[signal.SIGINT])  # a second Ctrl-C ends the program at once

    def restore(self):
        [signal.signal(*pair) for pair in self.before.items()]

    def after(self, done):
        """After step `done` (counted from 1) -> (whether to save now, whether a signal has ended the run)."""
        ended, due = self.proc.any(self.asked, time.perf_counter() - self.saved >= 60 * self.args.save_minutes)
        save = due or ended or done % self.args.save_every == 0 or done == self.args.steps
        if save:
            self.saved = time.perf_counter()
        return save, ended


def stopped(args, proc, step):
    proc.barrier()  # important! a rank that left earlier would have torchrun end the one that is still saving
    if proc.main:
        print(f"stopped by a signal after step {step}, saved; the same command continues", file=sys.stderr, flush=True)
    sys.exit(143)


class Log:
    """Progress bar on stderr, one line per interval on stdout and in log.jsonl, from rank 0.

    Losses are summed on the device and read (a synchronisation) only when a line is due. flops: floating-point operations of a step on all
    processes; on GPUs their rate is logged for one process, as a share of what a matrix product reaches there, too, and the memory taken at most.
    """

    def __init__(self, args, proc, start, steps, name, flops=0):
        self.args, self.proc, self.name, self.steps, self.flops = args, proc, name, steps, flops
        self.peak = proc.peak() if flops else None
        self.sum, self.count, self.time = torch.zeros((), device=proc.device), 0, time.perf_counter()
        self.path = Path(args.out) / "log.jsonl"
        self.bar = bar(proc, steps, name, start)
        if proc.main:  # what an interrupted run did after its last checkpoint is done again, and logged again
            self.lock = lock(self.path.parent)
            lines = [l for l in self.path.read_text().splitlines() if l.endswith("}")]
            write_text(self.path, "".join(l + "\n" for l in lines if json.loads(l)["step"] <= start))

    def step(self, step, loss):
        """After step `step` (counted from 1). Returns True when a line was due."""
        self.sum += loss.detach()
        self.count += 1
        self.bar.update()
        if step % self.args.log_every and step != self.steps:
            return False
        mean = float(self.proc.sum(self.sum.clone())) / self.proc.world / self.count
        seconds = time.perf_counter() - self.time
        rate = self.count * self.args.batch_size / seconds
        if self.proc.main:
            record, speed = {"step": step, "loss": mean, "samples_per_second": round(rate, 1)}, ""
            if self.peak:
                tflops, GiB = self.flops * self.count / seconds / self.proc.world / 1e12, torch.cuda.max_memory_allocated() / 2 ** 30
                record.update(tflops=round(tflops, 1), share=round(tflops / self.peak, 3), memory_gib=round(GiB, 2))
                speed = f"  {tflops:.0f} TFLOP/s, {tflops / self.peak:.0%} of a matrix product's  {GiB:.1f} GiB"
            with open(self.path, "a") as f:
                f.write(json.dumps(record) + "\n")
            left = tqdm.format_interval((self.steps - step) * seconds / self.count)
            self.bar.set_postfix_str(f"loss {mean:.4g}, {rate:.0f} samples/s", refresh=False)
            tqdm.write(f"{self.name} step {step}/{self.steps}  loss {mean:.5g}  {rate:.0f} samples/s{speed}  {left} left", file=sys.stdout)
            sys.stdout.flush()
        self.sum, self.count, self.time = torch.zeros_like(self.sum), 0, time.perf_counter()
        return True

    def close(self):
        self.bar.close()
        self.lock = None


def bar(proc, total, desc, initial=0, quiet=False):
    """A progress bar on rank 0's stderr; in a file it is drawn now and then."""
    return tqdm(total=total, desc=desc, initial=initial, disable=quiet or not proc.main, leave=False, mininterval=0.3 if sys.stderr.isatty() else 10)


def say(proc, text):
    if proc.main:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
