"""The command line: errors of one line, parsers, the flags that every training script shares."""
import argparse
import math
import os
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import fid

# These files can be copied alone, so they raise ValueError where their caller can mend something.
COPYABLE = ("models", "solvers", "fid")


# ---- Errors ------------------------------------------------------------------------------------


class UserError(ValueError):
    """Something the user can mend. It ends the program with this one line and exit code 2."""


def is_for_the_user(error):
    """True for a UserError, and for a ValueError that models, solvers or fid raise themselves."""
    if isinstance(error, UserError):
        return True
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    return trace.tb_frame.f_globals.get("__name__") in COPYABLE


@contextmanager
def user_errors():
    """Turn a ValueError that models, solvers or fid raise into a UserError."""
    try:
        yield
    except ValueError as e:
        if isinstance(e, UserError) or not is_for_the_user(e):
            raise
        raise UserError(str(e))


@user_errors()
def cache_folder():
    """Where downloads and pools of synthetic samples lie. Raises UserError."""
    return fid.cache_folder()


def run_script(main, args):
    """Call main(args). What the user can mend becomes one line from one rank and exit code 2."""
    code = 0
    fid.keep_streams()
    warnings.formatwarning = fid.short_warning
    if os.environ.get("RANK", "0") != "0":
        warnings.simplefilter("ignore")
    try:
        main(args)
    except SystemExit as e:
        code = e.code or 0
    except KeyboardInterrupt:
        exit_with("interrupted; what was saved is whole, and the same command continues from it",
                  130)
    except (ValueError, OSError, RuntimeError, MemoryError) as e:
        line, code = explain(e)
        if line is None:
            raise
        exit_with(line, code)
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        # important! Taking the group down may wait for ever for a rank that has ended, and a thread
        # of gloo that drops its last tensor while the interpreter is ending aborts the process.
        os._exit(code)
    if code:
        sys.exit(code)


def explain(error):
    """The line and the exit code for an error, (None, 0) where only a traceback explains it."""
    if isinstance(error, ValueError):
        return (f"error: {error}", 2) if is_for_the_user(error) else (None, 0)
    if isinstance(error, OSError):
        file = f": {error.filename}" if error.filename else ""
        return (f"error: {error.strerror or error}{file}; nothing that was saved is lost, "
                "mend it and repeat the command", 2)
    no_memory = (MemoryError, torch.cuda.OutOfMemoryError)
    if isinstance(error, no_memory) or "can't allocate memory" in str(error):
        return ("error: out of memory; lower --batch-size, or in training keep it and add "
                "--accumulate 2 (4, 8, ...) or --grad-checkpointing", 2)
    if dist.is_initialized() and "onnection" in str(error):
        reason = str(error).splitlines()[0][:100]
        return (f"error: another process of this job was lost ({reason}); "
                "the last checkpoint stands, the same command continues from it", 1)
    return None, 0


def exit_with(line, code):
    """Print one line, from the first process of the job that has something to say, and exit."""
    if not dist.is_initialized() or is_first_to_speak():
        tqdm.write(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    if dist.is_initialized():
        time.sleep(1)  # rank 0 may keep the store in which the others ask whether they are first
        os._exit(code)  # a broken process group would hang an orderly exit
    sys.exit(code)


def is_first_to_speak():
    """True for the first process of the job that asks."""
    try:
        return dist.distributed_c10d._get_default_store().add("spoken", 1) == 1
    except Exception:  # the process that kept the store is the one that was lost
        return True


def say(proc, text):
    """Print a line on stdout, from rank 0 alone, without breaking a progress bar."""
    if proc.is_main:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


# ---- Parsers -----------------------------------------------------------------------------------

# What other programs call our flags.
ALIASES = {
    "lambda": "--lam",
    "epochs": "--steps", "iterations": "--steps", "max-steps": "--steps",
    "bs": "--batch-size", "bsz": "--batch-size",
    "learning-rate": "--lr",
    "guidance": "--cfg", "guidance-scale": "--cfg", "cfg-scale": "--cfg",
    "num-steps": "--nfe", "sampling-steps": "--nfe", "num-sampling-steps": "--nfe",
    "checkpoint": "--ckpt", "resume-from": "--ckpt",
    "output": "--out", "output-dir": "--out", "results-dir": "--out",
    "data-path": "--data", "data-dir": "--data", "dataset": "--data",
    "gradient-accumulation-steps": "--accumulate",
    "fp16": "--amp", "bf16": "--amp", "mixed-precision": "--amp",
    "num-workers": "--workers",
}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Texts stand as they are written. A default that the help does not name is added to it."""

    def _get_help_string(self, action):
        text = action.help or ""
        is_plain = action.default is None or action.default is False
        if is_plain or action.default == argparse.SUPPRESS or "default" in text:
            return text
        return f"{text} (default: %(default)s)".strip()


class Parser(fid.Parser):
    aliases = ALIASES


def make_parser(prog, doc):
    """A parser whose help begins with the first paragraph of doc and ends with the rest of it."""
    what, _, details = doc.partition("\n\n")
    return Parser(prog=prog, usage="%(prog)s [flags]", description=what, epilog=details,
                  formatter_class=HelpFormatter)


def flag(key):
    """The flag of an argument: batch_size -> --batch-size."""
    return "--" + key.replace("_", "-")


def add_base_arguments(parser, model, ckpt, image_size=None):
    """The flags that name the network a method starts from. All three: their help."""
    group = parser.add_argument_group("the base model")
    group.add_argument("--model", help=model)
    group.add_argument("--ckpt", metavar="PATH", help=ckpt)
    if image_size:
        group.add_argument("--image-size", type=int, help=image_size)
    else:
        group.add_argument("--image-size", type=int, choices=[256, 512],
                           help="of the released weights (default: what they were made for)")


def add_data_arguments(parser, data, default=None):
    """The flags that name the training data. data: the help of --data."""
    group = parser.add_argument_group("data")
    group.add_argument("--data", default=default, help=data)
    group.add_argument("--classes", type=int,
                       help="number of classes, where an .npz or --ckpt does not tell it")
    group.add_argument("--trust-labels", action="store_true",
                       help="label i of the data is the network's class i; else labels are "
                            "matched by the classes' names, and fewer classes than the network "
                            "knows are refused where names are not known")
    group.add_argument("--flip", action=argparse.BooleanOptionalAction,
                       help="mirror half of the images (default: only CIFAR-10's and ImageNet's)")
    group.add_argument("--workers", type=int, metavar="N",
                       help="processes that read images or latents (default: 4 and 2; 0: none)")


def add_run_arguments(parser, out):
    """The flags that mean the same in every training script."""
    group = parser.add_argument_group("the run")
    group.add_argument("--out", default=out,
                       help="folder of last.pt, log.jsonl, metrics.json and pictures")
    group.add_argument("--resume", choices=["auto", "never"], default="auto",
                       help="auto continues what is in --out")
    group.add_argument("--seed", type=fid.seed, default=0,
                       help="every random number of step n is drawn from (seed, n)")
    group.add_argument("--log-every", type=int, metavar="STEPS")
    group.add_argument("--save-every", type=int, metavar="STEPS")
    group.add_argument("--save-minutes", type=float, default=10, metavar="MINUTES",
                       help="save at least so often, whatever --save-every says (default: 10)")
    group.add_argument("--sample-every", type=int, default=0, metavar="STEPS",
                       help="write a grid of samples, always from the same noise, while it trains "
                            "(default: 0, never)")
    group.add_argument("--dry-run", action="store_true", help="print the plan and exit")
    group = parser.add_argument_group("memory and speed")
    group.add_argument("--accumulate", type=int, default=1, metavar="PARTS",
                       help="work through a process's share of the batch in so many parts: "
                            "the same step, less memory")
    group.add_argument("--grad-checkpointing", action="store_true",
                       help="compute the blocks' activations again in the backward pass: "
                            "one more forward of the student, much less memory")
    group.add_argument("--sample-batch-size", type=int, metavar="N",
                       help="samples at once where the script samples: pools, tables, pictures "
                            "(default: by the network's size)")
    group.add_argument("--amp", choices=["auto", "bf16", "off"], default="auto",
                       help="autocast of network calls; auto: bf16 on a GPU that has it")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction,
                       help="torch.compile each block (default: on GPUs, in runs of at least "
                            "1,000 steps without --grad-checkpointing)")


# ---- Values of flags ---------------------------------------------------------------------------


def arguments(parser, **values):
    """What the parser would return for these values: all other arguments have their defaults.

    None and False count as not given.
    """
    args = parser.parse_args([])
    for key, value in values.items():
        if not hasattr(args, key):
            raise TypeError(f"{parser.prog} has no argument {key}")
        setattr(args, key, value)
    args.given = frozenset(key for key, value in values.items() if value not in (None, False))
    return args


def refuse_without_effect(args, names, reason):
    """Raise UserError if one of the arguments `names` (a string of names) was given.

    reason: why it has no effect here, as "without --w" or "for a model without classes".
    """
    for name in names.split():
        if name in args.given:
            raise UserError(f"{flag(name)} has no effect {reason}; leave it out")


def apply_defaults(args, defaults):
    """Give every argument that is None its value in the dict `defaults`."""
    for key, value in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, value)


POSITIVE = ("steps", "batch_size", "lr", "log_every", "save_every", "save_minutes", "image_size",
            "classes", "sample_batch_size")


def check_positive(args, *names):
    """Raise UserError unless these arguments are positive and finite, or None."""
    for name in names or POSITIVE:
        value = getattr(args, name, None)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{flag(name)} {value}: must be positive")
    if getattr(args, "sample_every", 0) < 0:
        raise UserError(f"--sample-every {args.sample_every}: must not be negative")
    if getattr(args, "workers", None) is not None:
        check_workers(args)


def check_workers(args):
    """Raise UserError unless --workers is 0, positive or not given."""
    if args.workers is not None and args.workers < 0:
        raise UserError(f"--workers {args.workers}: must not be negative")


def check_cfg(cfg):
    """Raise UserError unless the scale of guidance is None or a number other than 0."""
    if cfg is None:
        return
    if not math.isfinite(cfg):
        raise UserError(f"--cfg {cfg}: must be a number")
    if cfg == 0:
        raise UserError("--cfg 0: guidance gives out_null + cfg (out_y - out_null), so that 1 "
                        "means no guidance and 0 would ignore the labels; give --cfg 1")
