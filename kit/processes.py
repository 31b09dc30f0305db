"""Processes, precision, randomness, small files.

The same script runs as `python x.py` (one process, CPU or GPU) and under `torchrun` (gloo on the
CPU, nccl on GPUs).
"""
import ctypes
import os
import platform
import shutil
import sys
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import fid
from kit.cli import UserError, say, user_errors

# ---- Processes ---------------------------------------------------------------------------------


class Processes:
    """Who this process is. One boolean decides everything: `world > 1`, set by torchrun.

    rank, world, local_rank   as torchrun counts
    device                    of this process
    bf16                      whether network calls run under bf16 autocast
    is_main                   rank 0: this process writes files and prints
    part                      (i, n): the process works on part i of n of its share (--accumulate)
    """

    def __init__(self, amp="auto"):
        refuse_lonely_tasks()
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.is_main = self.rank == 0
        self.part = (0, 1)
        self.compiles = None  # not tried yet
        cuda = torch.cuda.is_available()
        if self.world > 1 and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            dist.init_process_group(backend, timeout=timedelta(hours=2))
        self.device = torch.device("cpu")
        if cuda:
            with user_errors():
                self.device = torch.device("cuda", fid.choose_gpu())
            torch.cuda.set_device(self.device)
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True
        elif sys.platform == "linux":
            keep_freed_memory()
        has_bf16 = cuda and has_bf16_in_hardware(self.device)
        self.bf16 = amp == "bf16" or (amp == "auto" and has_bf16)
        if not hasattr(Processes, "has_said"):
            Processes.has_said = True
            self.say_what_is_not_used(amp, cuda, has_bf16)

    def say_what_is_not_used(self, amp, cuda, has_bf16):
        """Once: say what the user may expect of this machine and does not get."""
        if cuda and amp == "auto" and not has_bf16:
            say(self, "this GPU has no bf16 in hardware: networks run in float32 (--amp bf16 "
                      "emulates it and is slower)")
        if not cuda and torch.backends.mps.is_available():
            say(self, "the Apple GPU (MPS) is not used: it knows no float64, which schedules and "
                      "metrics need; everything runs on the CPU")

    # Networks:

    def autocast(self, net):
        """net's forward under bf16 autocast if so chosen, with float32 results: half precision
        never leaves the call."""
        def call(*args, **kwargs):
            with torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext():
                out = net(*args, **kwargs)
            return tuple(o.float() for o in out) if isinstance(out, tuple) else out.float()
        call.net = getattr(net, "module", net)
        call.num_classes = call.net.num_classes
        return call

    def place(self, net, args):
        """net on this device: a U-Net on a GPU with its channels last, compiled where that pays."""
        net.to(self.device)
        cuda = self.device.type == "cuda"
        if cuda and getattr(net, "arch", {}).get("net") in ("UNet", "DDPM++"):
            net.to(memory_format=torch.channels_last)
        wanted = args and will_compile(args) and (args.compile or cuda)
        if wanted and self.can_compile(args.compile):
            # A U-Net's blocks differ in shape and share a forward. DDP's buckets would cut them.
            config = torch._dynamo.config
            config.cache_size_limit = 512
            config.accumulated_cache_size_limit = 4096
            config.optimize_ddp = False
            # Only DDIL's rollouts have batches of any size.
            dynamic = None if any(getattr(args, "dagger", ())) else False
            # Compiling per block is fast, keeps the state dict's keys, and leaves taps uncompiled.
            for block in net.blocks:
                block.compile(dynamic=dynamic)
        return net

    def can_compile(self, is_asked_for):
        """Compile one line, once, and say where that fails. Raises UserError where --compile was
        given."""
        if self.compiles is None:
            problem = None
            try:
                x = torch.ones(8, device=self.device)
                torch.compile(torch.sin)(x)
            except Exception as e:  # no compiler, no Triton, an old card: each fails in its own way
                lines = [line for line in str(e).splitlines() if line.strip()]
                problem = (lines[0] if lines else type(e).__name__)[:120]
            failed, = self.any(problem is not None)
            self.compiles = not failed
            if failed and is_asked_for:
                raise UserError(f"--compile: torch.compile does not work here ({problem}); leave "
                                "it out")
            if failed:
                say(self, f"torch.compile does not work here ({problem}): networks run uncompiled")
        return self.compiles

    def student(self, net, args=None):
        """net on this device, ready to train: wrapped for DDP when there are several processes."""
        if args and args.grad_checkpointing:
            for module in net.modules():
                module.recompute = True
        self.place(net, args).train()
        if self.world == 1:
            return net
        return DistributedDataParallel(net, gradient_as_bucket_view=True)

    def frozen(self, net, args=None):
        """net on this device, never to train.

        Under bf16 its matmul weights are stored as what autocast casts them to: half the memory,
        no casts, the same bits.
        """
        net.to(self.device).eval().requires_grad_(False)
        if self.bf16:
            for module in net.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    module.to(torch.bfloat16)
        return self.place(net, args)

    # The batch:

    def check_batch(self, batch, parts=1):
        """Raise UserError unless `world` processes can share the batch, each in `parts` parts."""
        if batch % self.world:
            raise UserError(f"--batch-size {batch} is the batch of all processes together and must "
                            f"be divisible by their number, {self.world}")
        share = batch // self.world
        if parts < 1 or share % parts:
            raise UserError(f"--accumulate {parts}: must divide a process's share of the batch, "
                            f"{share}")

    def take_share(self, whole):
        """This process's rows of something that has one row per sample of the global batch."""
        i, parts = self.part
        n = len(whole) // self.world // parts
        first = (self.rank * parts + i) * n
        return whole[first:first + n]

    def gather_share(self, rows, dim=0):
        """The inverse of take_share: every rank's share of a tensor, put together on all ranks."""
        if self.world == 1:
            return rows
        shares = [torch.empty_like(rows) for _ in range(self.world)]
        dist.all_gather(shares, rows.contiguous())
        return torch.cat(shares, dim)

    # Agreement between ranks:

    def any(self, *flags):
        """Each of the flags: true on all ranks if it is true on one."""
        if self.world == 1:
            return flags
        t = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
        return [bool(v) for v in t]

    def sum(self, t):
        """t, summed over ranks in place."""
        if self.world > 1:
            dist.all_reduce(t)
        return t

    def barrier(self):
        if self.world > 1:
            dist.all_reduce(torch.zeros(1))  # over gloo: needs no GPU and no guess of the device

    def gather(self, pairs):
        """Lists of (position, array) of all ranks -> one array in order of position, on all."""
        if self.world > 1:
            lists = [None] * self.world
            dist.all_gather_object(lists, pairs)
            pairs = [pair for one in lists for pair in one]
        return np.concatenate([array for _, array in sorted(pairs, key=lambda pair: pair[0])])

    def matmul_tflops(self, n=8192):
        """TFLOP/s of a product of two random bf16 matrices, n x n, on a GPU; None on a CPU."""
        if self.device.type != "cuda":
            return None
        from torch.utils.benchmark import Timer  # takes long, and warns where there is no GPU
        a, b = torch.randn(2, n, n, device=self.device, dtype=torch.bfloat16)
        timer = Timer("a @ b", globals=dict(a=a, b=b))
        return 2 * n ** 3 / timer.blocked_autorange(min_run_time=0.5).median / 1e12


def has_bf16_in_hardware(device):
    """Whether a GPU has bf16. Older ones, such as T4, V100 and RTX 20, only emulate it, and torch
    calls that supported, too."""
    if torch.version.hip:
        return torch.cuda.is_bf16_supported()
    return torch.cuda.get_device_properties(device).major >= 8


def refuse_lonely_tasks():
    """Raise UserError when srun or mpirun started several tasks that do not know of one another:
    each would train the whole, and all would write into one folder."""
    if "RANK" in os.environ:
        return
    # A script of sbatch itself is one process, whatever SLURM_NTASKS says. Only srun makes steps.
    is_step = "SLURM_STEP_ID" in os.environ or os.environ.get("SLURM_PROCID", "0") != "0"
    slurm = os.environ.get("SLURM_NTASKS", "1") if is_step else "1"
    found = (("srun", os.environ.get("SLURM_STEP_NUM_TASKS", slurm)),
             ("mpirun", os.environ.get("OMPI_COMM_WORLD_SIZE", "1")),
             ("mpirun", os.environ.get("PMI_SIZE", "1")))
    for launcher, tasks in found:
        if tasks.isdecimal() and int(tasks) > 1:
            raise UserError(f"{launcher} started {tasks} tasks that do not know of one another; "
                            "start one task per machine, and in it torchrun, as in "
                            "`srun --ntasks-per-node 1 torchrun --nproc_per_node 8 ...`")


def keep_freed_memory():
    """Let malloc keep what a step frees for the next one: to fetch it from the system anew costs
    up to a tenth of a step's time."""
    M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD = -4, -1, -2
    with suppress(OSError, AttributeError):  # no glibc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)
        mallopt(M_TOP_PAD, 2 ** 26)


def will_compile(args):
    """Are the networks compiled on a GPU? Torch 2.4 cannot compile what is computed again."""
    if args.compile is not None:
        return args.compile
    return args.steps >= 1000 and not args.grad_checkpointing


# ---- Randomness: a function of (seed, step), the same on any number of processes ---------------


def generator(device, *key):
    """A torch.Generator whose stream depends on the integers `key` >= 0 alone: (seed, step)."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state) >> 1)


class StepRandom:
    """Random numbers of one training step.

    They are drawn for the whole global batch, of which a process keeps its rows.
    """

    def __init__(self, proc, seed, step, batch, *more):
        self.proc = proc
        self.batch = batch
        self.key = (seed, step)
        self.generator = generator(proc.device, seed, step, *more)
        self.where = dict(generator=self.generator, device=proc.device)

    def fork(self, n):
        """Other numbers of the same step, a stream for every n."""
        return StepRandom(self.proc, *self.key, self.batch, 4, n)  # 2 and 3: data.batches

    def normal(self, shape):
        """N(0, 1), (B, *shape)."""
        return self.proc.take_share(torch.randn(self.batch, *shape, **self.where))

    def uniform(self, shape=()):
        """U[0, 1), (B, *shape)."""
        return self.proc.take_share(torch.rand(self.batch, *shape, **self.where))

    def integers(self, low, high):
        """low <= n < high, (B,)."""
        return self.proc.take_share(torch.randint(low, high, (self.batch,), **self.where))


# ---- Progress and small files ------------------------------------------------------------------


def progress_bar(proc, total, desc, initial=0, quiet=False):
    """A progress bar on rank 0's stderr. Where stderr is a file, the bar is drawn now and then."""
    interval = 0.3 if sys.stderr.isatty() else 10
    return tqdm(total=total, desc=desc, initial=initial, disable=quiet or not proc.is_main,
                leave=False, mininterval=interval)


def write_text(path, text):
    """Write a small file atomically."""
    temporary = Path(path).with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def why_not_written(error, folder):
    """The reason for an error while writing a file into the folder, in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # torch's writer tells an internal address, numpy's a number, and neither that the disk is full.
    if shutil.disk_usage(folder).free < 2 ** 20:
        return "the disk is full"
    return str(error).splitlines()[0][:80]


def save_array(path, x):
    """Write an .npy file atomically."""
    part = path.with_suffix(".tmp")
    try:
        with open(part, "wb") as f:
            np.save(f, x)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        reason = why_not_written(e, part.parent)
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({reason}); what is there already is kept: "
                        "free some space and repeat the command")


def lock(folder):
    """An open file: until it is closed, or this process ends, no other process may write into the
    folder. Raises UserError when another does."""
    file = open(folder / ".lock", "a+")
    with suppress(ImportError, OSError):  # not on Windows, nor on every file system
        import fcntl
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            who = f" ({file.read()})" if file.tell() else ""
            raise UserError(f"another process{who} is writing into {folder}; wait for it, or "
                            "choose another --out")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
    return file
