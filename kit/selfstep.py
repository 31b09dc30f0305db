"""What ssd.py and issd.py share besides their paper: flags, the grid, checks, the plan."""
import re

from kit.base import apply_method_defaults, can_drop, check_null
from kit.cli import UserError, add_base_arguments, add_data_arguments, refuse_without_effect
from kit.evaluate import Entry
from kit.plan import (
    batch_line,
    guidance_line,
    in_millions,
    labels_line,
    nodes_line,
    resources,
    step_flops,
)
from models import count
from solvers import guide, schedule_grid, solver_grid


def paper_size(spec, known):
    """('XL', 512): size and resolution in the paper's tables, whose keys are `known`.

    What they do not know counts as ('XL', 256), our smaller networks as ('S', 256). The
    autoencoders whose latents have 3 channels make images 4 times as wide, the others 8 times.
    """
    match = re.match(r"[DS]iT-(\w+)/", spec["name"])
    size = match[1] if match else "XL"
    if size in ("XS", "Ti", "Na"):
        size = "S"
    factor = 4 if spec["arch"]["in_channels"] == 3 else 8
    pixels = spec["arch"]["input_size"] * (factor if spec["scale"] else 1)
    return (size, pixels) if (size, pixels) in known else (size, 256)


def training_grid(args, spec, schedule):
    """The nodes of --nfe steps, and the end. A progressively distilled model keeps its own."""
    own = spec["grid"]
    keeps_own_grid = isinstance(own, str) or (own and spec["nfe"] == args.nfe)
    if keeps_own_grid and args.grid is None:
        return solver_grid(schedule, "ddim", args.nfe, own)
    return schedule_grid(schedule, args.grid, args.nfe)


def apply_defaults(args, spec, settings):
    """Fill what both scripts have in common. Raises UserError."""
    if spec["arch"].get("context") == "text":
        refuse_without_effect(args, "drop guided", "with prompts, which are never dropped")
    settings = {"drop": 0.1 if can_drop(spec) else 0.0, **settings}
    apply_method_defaults(args, spec, settings, synthetic=args.nfe)


def pairs_to_train(args, pairs):
    """The range [first, end) of indices n of the pairs (eta_n, eta_(n+1)) that are trained.

    Nodes count from 0 here, and from 1 in the paper and in --only-step.
    """
    if args.only_step:
        return args.only_step - 1, args.only_step
    return 0, pairs


def check_model(args, spec, pairs):
    """Raise UserError for what neither script can do."""
    if spec["arch"].get("guidance"):
        raise UserError("this model takes the scale of guidance as an input, which SSD and iSSD do "
                        "not know; give --ckpt one that does not")
    if spec["only_node"] is not None:
        raise UserError("this is a student of one step (--only-step), of use only beside its base "
                        "model; give --ckpt a whole one")
    if spec["schedule"] == "edm" or spec["solver"] == "lcm":
        raise UserError("this model has EDM's schedule or is sampled with noise between its steps "
                        "(LCM, DMD2), along which SSD and iSSD know no steps")
    check_null(args, spec)
    if not 0 <= args.lam <= 1 or not 0 <= args.drop <= 1:
        raise UserError(f"--lam {args.lam}, --drop {args.drop}: must lie between 0 and 1")
    if args.only_step is not None and not 1 <= args.only_step <= pairs:
        raise UserError(f"--only-step {args.only_step}: must lie between 1 and {pairs}")
    is_guidable = args.cfg != 1 and spec["classes"] and not spec["cfg_interval"]
    if args.guided != "no" and not is_guidable:
        raise UserError(f"--guided {args.guided} wants a model with classes, guided at every step, "
                        "and --cfg other than 1")


def apply_guidance(args, student, teacher):
    """-> (student, teacher, solver_net) as --guided asks for them.

    solver_net makes the solver's step in the teacher's place; None: the teacher makes it.
    """
    if args.guided == "all":
        return guide(student, args.cfg), guide(teacher, args.cfg), None
    if args.guided == "step":
        return student, teacher, guide(teacher, args.cfg)
    return student, teacher, None


def table_entries(args, before, after, control, spec):
    """Before, after and the controls, as evaluate.finish() takes them.

    A student of one step (--only-step) leaves all other steps to the base model, `before`.
    """
    whole = {**spec, "only_node": None}
    return {
        "before": Entry(before, whole, args.nfe, args.cfg),
        "before, 50 steps": Entry(before, whole, 50, args.cfg),
        "continued training": Entry(control, whole, args.nfe, args.cfg),
        "after": Entry(after, spec, args.nfe, args.cfg, base=before),
    }


def plan(name, args, spec, proc, grid, forwards, method, weight_copies=1):
    """What --dry-run prints: the run in numbers, from the settings and the network's shape.

    forwards: of a step, a backward counts as two. method: its own settings, in words.
    """
    arch = spec["arch"]
    guided = "" if args.guided == "no" else f", guided {args.guided}"
    only = f", pair {args.only_step} only" if args.only_step else ""
    rows = 2 if args.guided == "all" or arch.get("context") == "text" else 1
    quality = "not measured"
    if args.eval_samples:
        quality = f"{args.eval_samples:,} samples per row, before, after and two controls"
    return "\n".join([
        f"{name} of {spec['name']}, {in_millions(arch)} parameters, "
        f"{count(arch)[1] / 1e9:.4g} GFLOP per forward and sample",
        f"sampling     {args.nfe} steps at t = {nodes_line(grid)}; {guidance_line(spec, args.cfg)}",
        f"training     {method}, {labels_line(spec, args.drop)}{guided}, lr {args.lr:g}, "
        f"batch {batch_line(args, proc)}, {args.steps:,} steps{only}",
        f"data         {args.data}",
        f"units        {forwards} forward units per step, a backward counts as two",
        *resources(args, proc, arch, step_flops(args, spec, forwards),
                   weight_copies=weight_copies, rows=rows),
        f"quality      {quality}",
    ])


def add_arguments(parser):
    """The flags of both scripts."""
    add_base_arguments(
        parser,
        model="DiT-{S,B,L,XL}/{2,4,8}, SiT-XL/2, SD-v1.5, LDM-ImageNet, ...; the released weights "
              "are fetched where there are any",
        ckpt="a checkpoint's path or URL, ours or upstream's (default: an eps teacher of the "
             "digits, made here)")
    add_data_arguments(parser, "digits, mnist, cifar10, ..., a folder of images or cached latents, "
                               "or synthetic:STEPS (default: digits; else synthetic, which is "
                               "synthetic:NFE)")
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=int,
                       help="default: the paper's epochs of ImageNet at its own batch size")
    group.add_argument("--batch-size", type=int, help="of all processes together "
                                                      "(default: the paper's; digits 64)")
    group.add_argument("--lr", type=float, help="default: the paper's")
    group.add_argument("--drop", type=float, metavar="P",
                       help="probability of the null label in place of a sample's own (default: "
                            "0.1 where the model knows that label)")
    group.add_argument("--guided", choices=["no", "step", "all"], default="no",
                       help="guidance in training, of scale --cfg: in no forward, in the solver's "
                            "step, in all (twice the cost)")
    group.add_argument("--only-step", type=int, metavar="N",
                       help="train one pair only, s = eta_N and t = eta_(N+1) (Fig. 4b): SSD's "
                            "student makes the step from eta_N, iSSD's that from eta_(N+1), the "
                            "base model all others")
    group = parser.add_argument_group("sampling and measuring")
    group.add_argument("--nfe", type=int,
                       help="sampling steps, in training and afterwards (default: 10)")
    group.add_argument("--grid", choices=["dit", "ddim", "ldm", "uniform", "sit"],
                       help="where those steps lie (default: the base model's own; else sit for "
                            "velocity, ldm for latent diffusion's schedules, dit)")
    group.add_argument("--cfg", type=float,
                       help="guidance when sampling, 1 is none (default: the base model's)")
    group.add_argument("--eval-samples", type=int,
                       help="samples per row of the table (default: digits 2000, else 0)")
