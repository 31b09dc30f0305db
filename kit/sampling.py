"""Samples of a network that its spec describes, chunk by chunk, and the picture of them."""
import math
import os
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

import torch
from PIL import Image

import models
from kit import checkpoints
from kit.cli import UserError, cache_folder, user_errors
from kit.data import to_uint8
from kit.processes import generator, progress_bar
from solvers import (
    PROJECTIONS,
    fused,
    guide,
    guide_with,
    make_schedule,
    predictor,
    sample,
    solver_grid,
)

# Samples are drawn in chunks of this many. Each chunk has its own seed, so that the samples are the
# same on any number of processes.
CHUNK = 250

# A chunk goes through the network in slices, whose forward costs at most so many operations.
SLICE_FLOPS = 16e12

# The last entry of a random generator's key: what is drawn for a chunk.
FIRST_STATE = 4
FRESH_NOISE = 6
RANDOM_LABELS = 7

# These solvers evaluate a network at other times than the nodes, or fuse what several nodes know.
NOT_FOR_ONE_STEP = ("plms", "dpm2", "fused", "heun")


@dataclass
class SampleOptions:
    """How to sample. For nfe, cfg and solver None means: as the checkpoint was trained.

    seed           sample i depends on (seed, i) alone
    nfe            evaluations of the network, as the solver counts them; without one in the spec 50
    cfg            scale of guidance, 1 is none
    solver         one of solvers.SOLVERS
    label          all samples are of this class, or of this prompt; None takes all
    labels         "balanced" (or None): classes or prompts in turn; "random": drawn for each sample
    prompts        tensor or array (M, T, D) for a network conditioned on text
    base           for a student of one step: the network of all other steps; for the solver "fused"
                   and a student that learned with its teacher's features: the teacher
    features_from  for the solver "fused": the network whose features are fused. The default is what
                   the student learned with: base, or the network itself
    lam            for the solver "fused": the weight of these features, in [0, 1]
    uncond         a network without classes, which guides this one (solvers.guide_with)
    batch          how many samples go through the network at once; None: see default_batch()
    batch_flag     the flag that sets batch, for messages
    """

    seed: int = 0
    nfe: Optional[int] = None
    cfg: Optional[float] = None
    solver: Optional[str] = None
    label: Optional[int] = None
    labels: Optional[str] = None
    prompts: Optional[Any] = None
    base: Optional[Any] = None
    features_from: Optional[Any] = None
    lam: Optional[float] = None
    uncond: Optional[Any] = None
    batch: Optional[int] = None
    batch_flag: str = "--sample-batch-size"


# ---- Sampling ----------------------------------------------------------------------------------


def sample_chunks(net, spec, proc, num, options, todo=None, desc="sampling"):
    """Yields (first index, x (n, C, H, W) float32, y (n,) long) of this rank's chunks.

    net, spec   net(x, t, y) and its description, as checkpoints.load_model gives them
    num         the number of samples on all ranks together
    options     SampleOptions
    todo        todo(chunk) -> bool; chunks for which it is false are skipped

    A chunk has the same noise and labels on any number of processes and for every options.batch.
    Raises UserError.
    """
    options, grid = _settle(options, spec, net)
    schedule = make_schedule(spec["schedule"]).to(proc.device)
    nets = _networks_along(grid, net, spec, proc, options)
    project = PROJECTIONS[spec["threshold"]]
    solver = options.solver
    evaluations = options.nfe
    if solver == "fused":  # its networks make both evaluations of a node themselves
        solver = "ddim"
        evaluations = len(nets)

    chunks = _chunks_of_rank(num, proc, todo)
    total = evaluations * sum(len(_slices(c, num, options.batch)) for c in chunks)
    with progress_bar(proc, total, f"{desc} ({options.nfe} evaluations)") as progress:
        nets = [_count_calls(node_net, progress) for node_net in nets]
        for c in chunks:
            y = labels_of_chunk(c, num, spec, options).to(proc.device)
            noise = _first_state(c, len(y), spec, proc, options.seed)
            done = []
            for rows in _slices(c, num, options.batch):
                condition = _condition(y[rows], proc, options.prompts)
                predict = [predictor(node_net, condition, schedule, spec["prediction"], project)
                           for node_net in nets]
                source = generator(proc.device, options.seed, c, FRESH_NOISE)
                fresh = _noise_source(source, len(y), rows)
                with memory_errors(options):
                    done.append(sample(predict, noise[rows], schedule, grid, solver, fresh))
            x = torch.cat(done)
            if not x.isfinite().all():
                last = c * CHUNK + len(x) - 1
                raise UserError(f"samples {c * CHUNK} to {last} are not finite; look at the "
                                "weights in the checkpoint")
            yield c * CHUNK, x, y


def sample_images(net, spec, proc, num, options, desc="sampling"):
    """Samples of a pixel model: (num, C, H, W) uint8 and their labels (num,), both numpy arrays and
    the same on every rank. Raises UserError."""
    images = []
    labels = []
    for first, x, y in sample_chunks(net, spec, proc, num, options, desc=desc):
        images.append((first, to_uint8(x).cpu().numpy()))
        labels.append((first, y.cpu().numpy()))
    return proc.gather(images), proc.gather(labels)


def default_batch(arch):
    """How many samples go through a network at once: a power of two, or a whole chunk.

    That follows from the network alone, so that samples are the same on every machine.
    """
    fit = SLICE_FLOPS / models.count(arch)[1]
    return min(CHUNK, 2 ** max(0, math.floor(math.log2(fit))))


@contextmanager
def memory_errors(options):
    """Turn running out of memory into a UserError that names the flag which helps."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        text = str(e)
        if not isinstance(e, (MemoryError, torch.cuda.OutOfMemoryError)) \
                and "can't allocate memory" not in text and "out of memory" not in text:
            raise
        if options.batch == 1:
            raise UserError("out of memory: not even one sample at once fits; this network needs a "
                            "larger machine")
        raise UserError(f"out of memory: {options.batch} samples at once do not fit; give a "
                        f"smaller {options.batch_flag} than {options.batch}")


# ---- What goes together ------------------------------------------------------------------------


def settle_options(options, spec, net=None):
    """The options, complete: what is None and has a default is filled in, mostly from the spec.

    net: the network itself, where it is there already. Raises UserError where the network cannot be
    sampled so.
    """
    options, _ = _settle(options, spec, net)
    return options


def _settle(options, spec, net):
    """-> (settle_options(), the grid)."""
    nfe = options.nfe if options.nfe is not None else spec["nfe"] or 50
    cfg = options.cfg if options.cfg is not None else spec["cfg"]
    if options.cfg is None and not _has_condition(spec):  # a default that has no effect there
        cfg = 1.0
    solver = options.solver or spec["solver"]
    batch = options.batch if options.batch is not None else default_batch(spec["arch"])
    if batch < 1:
        raise UserError(f"{options.batch_flag} {batch}: must be positive")
    options = replace(options, nfe=nfe, cfg=cfg, solver=solver, batch=batch)

    _check_condition(spec, options)
    check_guidance(spec, cfg, net, options.uncond)
    schedule = make_schedule(spec["schedule"])
    with user_errors():
        grid = solver_grid(schedule, solver, nfe, spec["grid"])
    _check_steps(spec, options, grid)
    if solver == "fused" and options.features_from is None and spec.get("reading") == "teacher":
        if options.base is None:
            raise UserError("--solver fused: this student learned with the features of its base "
                            "model; name that with --base")
        options = replace(options, features_from=options.base)
    return options, grid


def check_guidance(spec, cfg, net=None, uncond=None):
    """Raise UserError where a network cannot be guided with the scale cfg, 1 being none.

    net: the network itself, where it is there already. uncond: the one that guides it, or None.
    """
    inner = getattr(net, "net", net)
    if spec["arch"].get("guidance") or getattr(inner, "guidance", False):
        if uncond is not None:
            raise UserError("--uncond has no effect for a network that takes the scale of guidance "
                            "as an input; leave it out")
        low, high = spec.get("w") or (-math.inf, math.inf)
        if not low <= cfg <= high:
            raise UserError(f"--cfg {cfg:g}: this network takes the scale of guidance as an input "
                            f"and has learned {low:g} to {high:g}; choose one between them")
    elif cfg == 1:
        if uncond is not None:
            raise UserError("--uncond has no effect without guidance (--cfg 1); leave it out, or "
                            "give another --cfg")
    elif not _has_condition(spec):
        raise UserError(f"--cfg {cfg:g}: this network has neither classes nor prompts, without "
                        "which there is no guidance; leave it out")
    elif uncond is None and not spec.get("knows_null", True):
        raise UserError(f"--cfg {cfg:g}: this network has not learned the null label and cannot "
                        "guide itself; give --cfg 1, or to sample.py and fid.py also the network "
                        "that guides it, with --uncond")


def load_uncond(path, spec):
    """The network of --uncond -> on the CPU. It is like the one of `spec` that it guides, but
    without classes. Raises UserError.

    path: a checkpoint's path or URL, or the name of a released DDPM++.
    """
    if not spec["classes"]:
        raise UserError("--uncond has no effect for a model without classes; leave it out")
    file = path
    if path.startswith("DDPM++"):
        file = checkpoints.upstream_checkpoint(path, None, cache_folder())
    net, other = checkpoints.load_model(file)
    check_uncond(path, other, spec)
    return net


def check_uncond(path, other, spec):
    """Raise UserError where --uncond, which is `other`, cannot guide the network of `spec`."""
    is_alike = all(other[key] == spec[key] for key in ("prediction", "schedule", "scale"))
    for key in ("in_channels", "input_size"):
        is_alike &= other["arch"][key] == spec["arch"][key]
    if not is_alike or _has_condition(other):
        raise UserError(f"--uncond {path}: must be like the network that it guides (prediction, "
                        "schedule, scale and shape), but without classes")


def _has_condition(spec):
    """Does the network take classes or prompts?"""
    return bool(spec["classes"]) or spec["arch"].get("context") == "text"


def network_at_node(net, spec, t, cfg, base=None, uncond=None):
    """The network that is evaluated at node t.

    It is guided where guidance acts (spec["cfg_interval"]), by `uncond` where that is given. It is
    the base model where a student of one step was not trained (spec["only_node"]); UserError where
    `base` is missing then.
    """
    only_node = spec.get("only_node")
    if only_node is not None and only_node != t:
        if base is None:
            raise UserError(f"this network was trained for t = {only_node:g} only, its base makes "
                            "all other steps: python sample.py --base BASE")
        net = base
    low, high = spec.get("cfg_interval") or (-1, math.inf)
    scale = cfg if low <= t <= high else 1.0
    if uncond is not None and scale != 1:
        net = guide_with(net, uncond)
    return guide(net, scale, null=spec.get("null"))


def _check_condition(spec, options):
    """Do labels and prompts, or None, go with the network?"""
    arch = spec["arch"]
    prompts = options.prompts
    if options.labels and not _has_condition(spec):
        raise UserError("--labels has no effect for a model without classes; leave it out")
    if options.labels and options.label is not None:
        raise UserError("--labels has no effect beside --label; leave it out")
    on_text = arch.get("context") == "text"
    if on_text and prompts is None:
        raise UserError("this model is conditioned on text: it needs prompts "
                        "(sample.py --prompts)")
    if not on_text and prompts is not None:
        raise UserError("this model takes labels: leave --prompts out")
    if prompts is None:
        return
    if prompts.shape[-1] != arch["context_dim"]:
        raise UserError(f"the prompts have dimension {prompts.shape[-1]}, "
                        f"the network wants {arch['context_dim']}")
    null = spec.get("null")
    if null is not None and prompts.shape[1:] != null.shape[1:]:
        raise UserError(f"the prompts have shape {tuple(prompts.shape[1:])}, "
                        f"the empty prompt of this model {tuple(null.shape[1:])}")


def _check_steps(spec, options, grid):
    """Can the network take the steps of the grid with this solver?"""
    only_node = spec.get("only_node")
    is_possible = only_node in grid[:-1] and options.solver not in NOT_FOR_ONE_STEP
    if only_node is not None and not is_possible:
        raise UserError(f"this network was trained for one step, at t = {only_node:g}; "
                        "sample it with its own --nfe and solver")
    if spec.get("cfg_interval") and options.cfg != 1 and options.solver == "fused":
        raise UserError("--solver fused: this model is guided at some of its steps only, whose "
                        "features do not fit together; give --cfg 1")
    if options.solver == "fused" and options.uncond is not None:
        raise UserError("--uncond has no features for --solver fused; leave one of them out")


def _networks_along(grid, net, spec, proc, options):
    """One network per node of the grid."""
    if spec.get("null") is not None:
        spec = {**spec, "null": spec["null"].to(proc.device)}
    nets = [network_at_node(net, spec, t, options.cfg, options.base, options.uncond)
            for t in grid[:-1]]
    if options.solver != "fused":
        return nets
    source = net if options.features_from is None else options.features_from
    sources = [network_at_node(source, spec, t, options.cfg, options.base) for t in grid[:-1]]
    return fused(nets, sources, options.lam)


def _chunks_of_rank(num, proc, todo):
    """The numbers of the chunks that this rank draws."""
    chunks = range(proc.rank, math.ceil(num / CHUNK), proc.world)
    return [c for c in chunks if todo is None or todo(c)]


def _count_calls(net, progress):
    """net, which moves the progress bar at every call."""
    def counted(x, t, y):
        out = net(x, t, y)
        progress.update()
        return out

    return counted


def _slices(c, num, batch):
    """The rows of chunk c that go through the network at once, slice after slice."""
    n = min(CHUNK, num - c * CHUNK)
    return [slice(i, min(i + batch, n)) for i in range(0, n, batch)]


def labels_of_chunk(c, num, spec, options):
    """(n,) long, on the CPU: labels, or for a network conditioned on text the rows of the prompts.

    Balanced labels are y = i % K for sample i. Random ones depend on (seed, chunk) alone.
    """
    first = c * CHUNK
    n = min(CHUNK, num - first)
    if options.label is not None:
        return torch.full((n,), options.label)
    count = spec["classes"] if options.prompts is None else len(options.prompts)
    if options.labels == "random":
        rng = generator("cpu", options.seed, c, RANDOM_LABELS)
        return torch.randint(count, (CHUNK,), generator=rng)[:n]
    return torch.arange(first, first + n) % max(count, 1)


def describe_labels(spec, options):
    """How the labels were chosen, for a line of output; "" for a model without them."""
    if not _has_condition(spec):
        return ""
    what = "label" if options.prompts is None else "prompt"
    if options.label is not None:
        return f", {what} {options.label}"
    return f", {what}s {options.labels or 'balanced'}"


def _condition(y, proc, prompts):
    """What the network takes as its third argument: labels (n,) or prompts (n, T, D) float32."""
    if prompts is None:
        return y
    # A list: numpy would take a tensor with one entry for a single index, and drop an axis.
    return torch.as_tensor(prompts[y.tolist()]).to(proc.device, torch.float32)


def _first_state(c, n, spec, proc, seed):
    """(n, C, H, W) ~ N(0, I)."""
    arch = spec["arch"]
    size = arch["input_size"]
    return torch.randn(n, arch["in_channels"], size, size, device=proc.device,
                       generator=generator(proc.device, seed, c, FIRST_STATE))


def _noise_source(source, n, rows):
    """noise(x) ~ N(0, I) in the shape of x, float32, from a torch.Generator: the rows x of what is
    drawn for a chunk of n samples."""
    def noise(x):
        return torch.randn(n, *x.shape[1:], generator=source, device=x.device)[rows]

    return noise


# ---- Pictures ----------------------------------------------------------------------------------


def save_grid(blocks, path, columns=20):
    """Write blocks of images, each (n, C, H, W) uint8, one below the other into one PNG.

    Images of less than 32 pixels are enlarged. A white line separates the blocks.
    """
    from torchvision.utils import make_grid as tile

    zoom = max(1, 32 // blocks[0].shape[2])
    bands = []
    for images in blocks:
        enlarged = torch.as_tensor(images).repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
        band = tile(enlarged, nrow=columns, padding=4, pad_value=90)  # (3, height, width)
        if bands:
            bands.append(torch.full((3, 3, bands[0].shape[2]), 255, dtype=torch.uint8))
        bands.append(band)
    image = Image.fromarray(torch.cat(bands, 1).permute(1, 2, 0).numpy())

    temporary = Path(path).with_suffix(".tmp")
    image.save(temporary, "PNG")
    os.replace(temporary, path)
