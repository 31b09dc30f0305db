"""Samples of a network that its spec describes, chunk by chunk, and the picture of them."""
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

import torch
from PIL import Image

from kit.cli import UserError, user_errors
from kit.data import to_uint8
from kit.processes import generator, progress_bar
from solvers import PROJECTIONS, fused, guide, make_schedule, predictor, sample, solver_grid

# Samples are drawn in chunks of this many. Each chunk has its own seed, so that the samples are the
# same on any number of processes.
CHUNK = 250

# The last entry of a random generator's key, for the two kinds of noise of a chunk.
FIRST_STATE = 4
FRESH_NOISE = 6

# These solvers evaluate a network at other times than the nodes, or fuse what several nodes know.
NOT_FOR_ONE_STEP = ("plms", "dpm2", "fused", "heun")


@dataclass
class SampleOptions:
    """How to sample. For nfe, cfg and solver None means: as the checkpoint was trained.

    seed           sample i depends on (seed, i) alone
    nfe            evaluations of the network, as the solver counts them; without one in the spec 50
    cfg            scale of guidance, 1 is none
    solver         one of solvers.SOLVERS
    label          all samples are of this class, or of this prompt; None takes all in turn
    prompts        tensor or array (M, T, D) for a network conditioned on text: sample i takes
                   row i % M
    base           for a student of one step: the network of all other steps
    features_from  for the solver "fused": the network whose features are fused, default: net
    lam            for the solver "fused": the weight of these features, in [0, 1]
    """

    seed: int = 0
    nfe: Optional[int] = None
    cfg: Optional[float] = None
    solver: Optional[str] = None
    label: Optional[int] = None
    prompts: Optional[Any] = None
    base: Optional[Any] = None
    features_from: Optional[Any] = None
    lam: Optional[float] = None


# ---- Sampling ----------------------------------------------------------------------------------


def sample_chunks(net, spec, proc, num, options, todo=None, desc="sampling"):
    """Yields (first index, x (n, C, H, W) float32, y (n,) long) of this rank's chunks.

    net, spec   net(x, t, y) and its description, as checkpoints.load_model gives them
    num         the number of samples on all ranks together
    options     SampleOptions
    todo        todo(chunk) -> bool; chunks for which it is false are skipped

    Labels are taken in turn: y = i % K for sample i. Raises UserError.
    """
    options = with_trained_values(options, spec)
    _check_condition(spec, options.prompts)
    schedule = make_schedule(spec["schedule"]).to(proc.device)
    with user_errors():
        grid = solver_grid(schedule, options.solver, options.nfe, spec["grid"])
    _check_steps(spec, options, grid)

    nets = _networks_along(grid, net, spec, proc, options)
    project = PROJECTIONS[spec["threshold"]]
    solver = options.solver
    evaluations = options.nfe
    if solver == "fused":  # its networks make both evaluations of a node themselves
        solver = "ddim"
        evaluations = len(nets)

    chunks = _chunks_of_rank(num, proc, todo)
    total = len(chunks) * evaluations
    with progress_bar(proc, total, f"{desc} ({options.nfe} evaluations)") as progress:
        nets = [_count_calls(node_net, progress) for node_net in nets]
        for c in chunks:
            y = _labels_of_chunk(c, num, spec, proc, options)
            condition = _condition(y, proc, options.prompts)
            predict = [predictor(node_net, condition, schedule, spec["prediction"], project)
                       for node_net in nets]
            noise = _first_state(c, len(y), spec, proc, options.seed)
            fresh = _noise_source(generator(proc.device, options.seed, c, FRESH_NOISE))
            x = sample(predict, noise, schedule, grid, solver, fresh)
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


def with_trained_values(options, spec):
    """The options with nfe, cfg and solver filled from the spec where they are None."""
    trained = {"nfe": spec["nfe"] or 50, "cfg": spec["cfg"], "solver": spec["solver"]}
    missing = {key: value for key, value in trained.items() if getattr(options, key) is None}
    return replace(options, **missing)


def network_at_node(net, spec, t, cfg, base=None):
    """The network that is evaluated at node t.

    It is guided where guidance acts (spec["cfg_interval"]). It is the base model where a student
    of one step was not trained (spec["only_node"]); UserError where `base` is missing then.
    """
    only_node = spec.get("only_node")
    if only_node is not None and only_node != t:
        if base is None:
            raise UserError(f"this network was trained for t = {only_node:g} only, its base makes "
                            "all other steps: python sample.py --base BASE")
        net = base
    low, high = spec.get("cfg_interval") or (-1, math.inf)
    scale = cfg if low <= t <= high else 1.0
    return guide(net, scale, null=spec.get("null"))


def _check_condition(spec, prompts):
    """Do the prompts, or None, go with the network?"""
    arch = spec["arch"]
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


def _networks_along(grid, net, spec, proc, options):
    """One network per node of the grid."""
    if spec.get("null") is not None:
        spec = {**spec, "null": spec["null"].to(proc.device)}
    nets = [network_at_node(net, spec, t, options.cfg, options.base) for t in grid[:-1]]
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


def _labels_of_chunk(c, num, spec, proc, options):
    """(n,) long: labels, or for a network conditioned on text the rows of the prompts."""
    first = c * CHUNK
    n = min(CHUNK, num - first)
    if options.label is not None:
        return torch.full((n,), options.label, device=proc.device)
    count = spec["classes"] if options.prompts is None else len(options.prompts)
    return torch.arange(first, first + n, device=proc.device) % max(count, 1)


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


def _noise_source(source):
    """noise(x) ~ N(0, I) in the shape of x, float32, from a torch.Generator."""
    def noise(x):
        return torch.randn(x.shape, generator=source, device=x.device)

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
