"""What --dry-run prints: operations, expected time, memory and disk, without touching weights."""
import models
from kit.processes import will_compile

# Dense bf16 TFLOP/s of a card by its datasheet, and the share of it that plans count on: with 40 %
# the iSSD run of the SSD paper (8,007 steps, 1.2e18 FLOP, 8 A6000, its data at hand) takes the
# 40 minutes that it reports.
CARDS = {"A6000": 155, "A100": 312, "H100 or H200": 989}
SHARE = 0.4

POOL = 50_000  # synthetic samples; the SSD paper does not say how many it made
GIB = 2 ** 30


def pool_size(args):
    """How many samples --data synthetic:STEPS makes: no more than the run looks at, or as many as
    it began with (kit.base.keep_pool)."""
    return getattr(args, "pool", None) or min(POOL, args.steps * args.batch_size)


def has_condition(spec):
    """Whether the network takes labels or prompts, so that it can be guided."""
    return spec["classes"] > 0 or spec["arch"].get("context") == "text"


def halves(arch, cfg):
    """Forwards of the network in an evaluation: 2 where guidance takes two of them."""
    is_conditional = arch["num_classes"] > 0 or arch.get("context") == "text"
    return 2 if cfg != 1 and is_conditional and not arch.get("guidance") else 1


def guidance_line(spec, cfg):
    """In words: the guidance that samples get, and what it costs."""
    if not has_condition(spec):
        return "no guidance: the model has no classes"
    if spec["arch"].get("guidance"):
        return f"guidance {cfg:g} as an input, 1 forward per evaluation"
    if cfg == 1:
        return "no guidance, 1 forward per evaluation"
    where = ""
    if spec["cfg_interval"]:
        where = " where t is from {:g} to {:g}".format(*spec["cfg_interval"])
    return f"guidance {cfg:g}, 2 forwards per evaluation{where}"


def labels_line(spec, drop):
    """In words: how often the null label stands in place of a sample's own."""
    if not has_condition(spec):
        return "no labels"
    if not spec["knows_null"]:
        return "labels never dropped (the base model has not learned the null label)"
    what = "labels" if spec["classes"] else "prompts"
    return f"{what} dropped {drop:g}" if drop else f"{what} never dropped"


def nodes_line(grid):
    """The nodes of a grid in words, without its end: 999, 888, 777, ..., 0."""
    nodes = [f"{t:.4g}" for t in grid[:-1]]
    return ", ".join(nodes if len(nodes) < 6 else [*nodes[:3], "...", nodes[-1]])


def step_flops(args, spec, forwards):
    """Floating-point operations of a step of so many forwards, on all processes."""
    return forwards * args.batch_size * models.count(spec["arch"])[1]


def in_millions(arch):
    """The number of parameters, as in 675.1M."""
    return f"{models.count(arch)[0] / 1e6:.1f}M"


def batch_line(args, proc):
    """The batch, and how processes and parts share it."""
    parts = f" in {args.accumulate} parts" if args.accumulate > 1 else ""
    return f"{args.batch_size} ({proc.world} x {args.batch_size // proc.world}{parts})"


def resources(args, proc, arch, flops, base_arch=None, weight_copies=2, frozen=1, rows=1):
    """The lines of every plan: pool, cost, time, memory, checkpoint.

    arch, base_arch   the student's network and the base model's (None: the same)
    flops             of a step on all processes: step_flops()
    weight_copies     of the student that a checkpoint holds, averages included
    frozen            networks of the base model's size beside the student
    rows              of a forward, per sample: 2 where both halves of guidance go together
    """
    base_arch = base_arch or arch
    params, forward = models.count(arch)
    base_params, base_forward = models.count(base_arch)
    lines = []

    pool_flops = 0
    if (args.data or "").startswith("synthetic:"):
        is_pair = getattr(args, "uncond", None)  # kd.py's two teachers are one, and both evaluated
        forwards = 2 if is_pair else halves(base_arch, args.cfg)
        pool_flops = pool_size(args) * int(args.data[10:]) * forwards * base_forward
        disk = pool_size(args) * 2 * base_arch["in_channels"] * base_arch["input_size"] ** 2 / GIB
        lines.append(f"pool         {pool_size(args):,} samples of the base model, made first, "
                     f"{pool_flops:.3g} FLOP, {disk:.2g} GiB on disk")

    again = args.grad_checkpointing * forward * args.batch_size * rows
    total = args.steps * (flops + again)
    note = " with what is computed again" if args.grad_checkpointing else ""
    lines.append(f"cost         {flops:.3g} FLOP per step, {total:.3g} FLOP in all{note}")
    compiled = "" if will_compile(args) else "not "
    lines.append(f"time         on {proc.world} x {times(total + pool_flops, proc.world)}, "
                 f"at {SHARE:.0%} of the peak; networks {compiled}compiled on a GPU")

    # The plan of a large model speaks of a GPU, also when it is made without one:
    half = proc.bf16 or (args.amp != "off" and base_params > 1e7)
    fixed = params * (12 + 4 * weight_copies + 2 * half) + frozen * base_params * (2 if half else 4)
    rows_per_part = args.batch_size // proc.world // args.accumulate * rows
    lines.append(f"memory       {memory(args, arch, fixed, half, rows_per_part)}")

    saved = params * (8 + 4 * weight_copies) / GIB
    lines.append(f"checkpoint   {args.out}/last.pt, {saved:.2g} GiB (twice that while it is "
                 f"written), every {args.save_every} steps and {args.save_minutes:g} minutes")
    return lines


def times(flops, world):
    """The expected time on every kind of card."""
    parts = []
    for card, tflops in CARDS.items():
        minutes = flops / world / SHARE / tflops / 6e13
        text = f"{minutes / 60:.1f} h" if minutes > 90 else f"{minutes:.0f} min"
        parts.append(f"{card} {text}")
    return ", ".join(parts)


def memory(args, arch, fixed, half, rows):
    """The memory of a process. fixed: bytes that do not depend on the batch."""
    if "patch_size" not in arch:
        return (f"about {fixed / GIB:.3g} GiB per process for weights, gradients, Adam, teacher; "
                "activations not counted")
    # Bytes per token, channel and block: 48 under bf16, 80 in float32, counted with
    # saved_tensors_hooks; 4 for stored features, or for what blocks are computed from again.
    each = 48 if half else 80
    tokens = (arch["input_size"] // arch["patch_size"]) ** 2 * rows
    per_channel = (each + 4) * arch["depth"]
    if args.grad_checkpointing:
        per_channel = each + 8 * arch["depth"]
    moving = tokens * arch["hidden_size"] * per_channel
    return (f"about {(fixed + moving) / GIB:.3g} GiB per process: weights, gradients, Adam, "
            f"teacher {fixed / GIB:.3g}; activations, stored features {moving / GIB:.3g}")
