"""SSD: explicit self step-distillation.

Ma et al., "Diffusion Model is Effectively Its Own Teacher", CVPR 2025,
https://openaccess.thecvf.com/content/CVPR2025/html/Ma_Diffusion_Model_is_Effectively_Its_Own_Teacher_CVPR_2025_paper.html

Algorithm 1, for a solver Psi of N steps (the paper's T) with nodes eta_1 > ... > eta_N. theta- is a
frozen copy of the base model, theta the student; both start as the base model.

    repeat
        x0 ~ q_data,  n ~ U{1..N-1},  s = eta_n,  t = eta_(n+1)        s > t: s is noisier
        x_s = alpha_s x0 + sigma_s eps                                 Eq. 1
        eps_s = eps_theta-(x_s, s)                                     line 7
        x_t = Psi(eps_s, s -> t)                                       line 9, one DDIM step
        eps_t = eps_theta-(x_t, t)                                     line 10
        L = | lam eps_t + (1 - lam) eps_s - eps_theta(x_s, s) |^2      Eq. 5, 7, w_t = 1
    until converged
    sample as before: N steps

lam weighs the cleaner step here; in iSSD it weighs the noisier one. lam = 1 is Eq. 10, which hurts
a model that predicts eps. For a model that predicts the velocity of the linear interpolant (SiT,
REPA) lam = 1 is Eq. 17, and the default: v_theta(x_s, s) against v_theta-(x_t, t), with t = s - 0.1
for 10 steps from a fixed teacher, and t = s - 0.005 for 250 steps (the paper samples them with
--solver sde) from "the ema one". With prompts (Stable Diffusion) both predictions that guidance
combines are matched, each by itself, and x_t is made with guidance drawn from 5 to 15.

Differences from the paper:
- Algorithm 1 draws n up to N, where t would be the end of sampling. This last pair, whose student
  runs at s, is trained only where the teacher can be evaluated at the end (t = 0 in the grids of
  velocity models and latent diffusion); the clean end of DiT's grid, -1, is no time.
- The loss is a mean, not a sum, and on the prediction's channels only: a learned variance is not
  distilled.
- The output of a network that predicts v or x0 is converted to eps, since Eq. 5 is about eps.
- x_t is made without guidance: the paper does not say (--guided).
- The label is dropped for 1 sample in 10, as in the paper, here alike in all forwards of a step. A
  prompt is never dropped.
- AdamW, where the paper names no optimizer (DiT) or Adam (Stable Diffusion).
- Without --data, a released model trains on its own samples (the paper's Table 8 is about iSSD).
- We take "the ema one" for a moving average of the student that starts as the base model, with
  REPA's decay of 0.9999.

    python ssd.py                                                   the digits, on a CPU
    python ssd.py --model SiT-XL/2 --ckpt REPA.pt --accumulate 8    one GPU
    torchrun --nproc_per_node 8 ssd.py --model DiT-XL/2 --nfe 10    eight GPUs; as in Tables 2 and 3
                                                                    with --data LATENTS

Writes runs/ssd/{last.pt, log.jsonl, metrics.json, samples.png}.
"""
import copy
import math
import time

import torch

import train
from kit import data, selfstep
from kit.base import describe_base, is_digits, load_base, resolve_checkpoint, training_data
from kit.cli import (
    UserError,
    add_run_arguments,
    make_parser,
    refuse_without_effect,
    run_script,
    say,
)
from kit.evaluate import finish, is_measured, print_finished
from kit.plan import step_flops
from kit.processes import Processes
from kit.run import Run, adamw, update_average
from solvers import PROJECTIONS, add_noise, column, ddim_step, make_schedule, to_x0_eps

# ---- Method ------------------------------------------------------------------------------------


def as_eps(schedule, x, out, t, prediction):
    """Convert a network's output at x to eps, which Eq. 5 is about. Velocities pass unchanged
    (Eq. 17)."""
    if prediction in ("eps", "velocity"):
        return out
    return to_x0_eps(schedule, x, out, t, prediction)[1]


def ssd_loss(student, teacher, schedule, x0, y, s, t, noise, lam,  # noqa: PLR0913
             prediction="eps", solver_net=None, project=None):
    """Eq. 7 with the target of Eq. 5 -> (loss, aux). Three forwards and a backward.

    student, teacher   net(x, t, y)
    x0, noise          (B, C, H, W), clean data and N(0, I)
    y                  (B,) labels; some are already replaced by the null label
    s, t               (B,) neighbouring nodes of the solver's grid, s > t
    lam                weight of the cleaner step, 0 <= lam <= 1
    prediction         what the networks predict, as in solvers.to_x0_eps
    solver_net         net(x, t, y) that makes the solver's step in the teacher's place, or None
    project            project(x0) -> x0 in the solver's step, or None: see solvers.PROJECTIONS
    aux                the states x_s and x_t and the prediction "step" between them
    """
    C = x0.shape[1]                                                    # beyond: a learned variance
    x_s = add_noise(schedule, x0, noise, s)                            # (B, C, H, W)   Eq. 1

    with torch.no_grad():
        out_s = teacher(x_s, s, y)[:, :C]                              # (B, C, H, W)   line 7
        step = out_s
        if solver_net:
            step = solver_net(x_s, s, y)[:, :C]
        x_t = ddim_step(schedule, x_s, step, s, t, prediction, project)               # line 9
        out_t = teacher(x_t, t, y)[:, :C]                              # (B, C, H, W)   line 10
        eps_s = as_eps(schedule, x_s, out_s, s, prediction)
        eps_t = as_eps(schedule, x_t, out_t, t, prediction)
        target = torch.lerp(eps_s, eps_t, lam)                         #                Eq. 5

    out = student(x_s, s, y)[:, :C]                                    # (B, C, H, W)   line 11
    eps_student = as_eps(schedule, x_s, out, s, prediction)
    loss = (target - eps_student).square().mean()                      #                Eq. 7
    return loss, {"x_s": x_s, "x_t": x_t, "step": step}


def ssd_text_loss(student, teacher, schedule, x0, y, s, t, noise, lam, cfg, null,  # noqa: PLR0913
                  prediction="eps", project=None):
    """Section A.2: both predictions of guidance are matched, each by itself -> (loss, aux).

    y      (B, T, D) embedded prompts
    cfg    (B,) scales of the guidance that makes x_t
    null   (1, T, D) the empty prompt
    The rest as in ssd_loss. aux: the states x_s and x_t.
    """
    C = x0.shape[1]
    y2 = torch.cat([y, null.expand_as(y)])                             # (2B, T, D): with, without
    s2 = torch.cat([s, s])
    t2 = torch.cat([t, t])
    x_s = add_noise(schedule, x0, noise, s)                            # (B, C, H, W)   Eq. 1
    x_s2 = torch.cat([x_s, x_s])

    with torch.no_grad():
        out_s = teacher(x_s2, s2, y2)[:, :C]                           # (2B, C, H, W)
        cond, uncond = out_s.chunk(2)
        guided = uncond + column(cfg, x_s) * (cond - uncond)           # (B, C, H, W)
        x_t = ddim_step(schedule, x_s, guided, s, t, prediction, project)
        x_t2 = torch.cat([x_t, x_t])
        out_t = teacher(x_t2, t2, y2)[:, :C]                           # (2B, C, H, W)
        eps_s = as_eps(schedule, x_s2, out_s, s2, prediction)
        eps_t = as_eps(schedule, x_t2, out_t, t2, prediction)
        target = torch.lerp(eps_s, eps_t, lam)                         #                Eq. 5, twice

    out = student(x_s2, s2, y2)[:, :C]                                 # (2B, C, H, W)
    eps_student = as_eps(schedule, x_s2, out, s2, prediction)
    loss = 2 * (target - eps_student).square().mean()                  #                Eq. 7, a sum
    return loss, {"x_s": x_s, "x_t": x_t}


# ---- Training ----------------------------------------------------------------------------------


def main(args):
    proc = Processes(args.amp)
    began = time.perf_counter()
    args.ckpt = resolve_checkpoint(args)
    spec = describe_base(args)
    apply_ssd_defaults(args, spec)
    proc.check_batch(args.batch_size, args.accumulate)
    schedule = make_schedule(spec["schedule"]).to(proc.device)
    project = PROJECTIONS[spec["threshold"]]
    grid = selfstep.training_grid(args, spec, schedule)
    pairs = args.nfe - 1 if grid[-1] == -1 else args.nfe  # the clean end of discrete steps, no time
    selfstep.check_model(args, spec, pairs)
    forwards = forwards_per_step(args, spec)
    if args.dry_run:
        return say(proc, plan(args, spec, proc, grid, forwards))

    # Setup networks: the base model is the teacher; the student starts as its copy, and so does
    # the student's average where that is the teacher.
    base, base_spec, args.ckpt = load_base(args, proc, train.make_teacher)
    args.model = base_spec["name"]
    net = copy.deepcopy(base)
    wrapped = proc.student(net, args)
    average = None
    if args.teacher == "ema":
        average = proc.place(copy.deepcopy(base), args).eval().requires_grad_(False)
    base_net = proc.autocast(proc.frozen(base, args))
    teacher = proc.autocast(average) if average else base_net
    student, teacher, solver_net = selfstep.apply_guidance(args, proc.autocast(wrapped), teacher)
    opt = adamw(net, args.lr)
    learned_node = grid[args.only_step - 1] if args.only_step else None  # the student runs at s
    spec = {**base_spec, "method": "ssd", "grid": grid, "nfe": args.nfe, "cfg": args.cfg,
            "only_node": learned_node, "reading": None}

    # Resume:
    flops = step_flops(args, spec, forwards)
    state = {"model": net, "opt": opt, "average": average}
    run = Run(args, proc, "ssd", wrapped, state, spec, flops)
    run.base = base_net
    if run.is_finished and is_measured(args):
        return print_finished(args, proc)

    # Setup data; where there is none, the base model's own samples (the paper's Table 8):
    dataset, source = training_data(args, base_net, base_spec, proc, run)
    batches = data.batches(dataset, proc, args.seed, args.batch_size, run.step)
    if dataset.text:
        spec["null"] = dataset.null
        null = dataset.null.to(proc.device)   # the empty prompt
    nodes = torch.tensor(grid, device=proc.device)
    first, end = selfstep.pairs_to_train(args, pairs)      # n counts from 0: the paper's n - 1

    for step, rng in run.steps():
        x0, y = next(batches)
        dropped = rng.uniform() < args.drop       # important! once per sample: all forwards agree
        s, t = draw_times(args, rng, nodes, first, end)
        noise = rng.normal(x0.shape[1:])
        scales = None
        if dataset.text:
            scales = draw_scales(args.text_cfg, rng)
        else:
            y = train.drop_labels(y, spec["classes"], dropped)
        for *part, w in run.parts(x0, y, s, t, noise, scales):
            if dataset.text:
                loss, _ = ssd_text_loss(student, teacher, schedule, *part, args.lam, w, null,
                                        spec["prediction"], project)
            else:
                loss, _ = ssd_loss(student, teacher, schedule, *part, args.lam,
                                   spec["prediction"], solver_net, project)
            run.backward(loss)
        run.optimizer_step(opt)
        if average:
            update_average(average, net, TEACHER_EMA)

    # Measure before, after and the controls on the same noise and labels:
    entries = {}
    if args.eval_samples:
        say(proc, f"the control: the ordinary loss for {args.steps} more steps")
        control = proc.autocast(proc.frozen(train.train_control(args, source)))
        after = proc.autocast(net.eval())
        entries = selfstep.table_entries(args, base_net, after, control, spec)
    finish(args, proc, "ssd", began, entries, lam=args.lam)


def draw_times(args, rng, nodes, first, end):
    """-> (s, t), both (B,): neighbouring nodes, or with --interval (Eq. 17) times off the grid."""
    if args.interval:
        s = args.interval + (1 - args.interval) * rng.uniform()
        return s, s - args.interval
    n = rng.integers(first, end)
    return nodes[n], nodes[n + 1]


def draw_scales(limits, rng):
    """(B,) scales of guidance, uniform between two limits."""
    low, high = limits
    return low + (high - low) * rng.uniform()


def forwards_per_step(args, spec):
    """Forwards of a step; a backward counts as two."""
    if spec["arch"].get("context") == "text" or args.guided == "all":
        return 10
    return 7 if args.guided == "step" else 5


def plan(args, spec, proc, grid, forwards):
    """What --dry-run prints."""
    method = f"lam {args.lam}"
    if spec["prediction"] == "velocity":
        method += f", t = s - {args.interval or 1 / args.nfe:g}, {args.teacher} teacher"
    if spec["arch"].get("context") == "text":
        method += ", x_t made with guidance {:g} to {:g}".format(*args.text_cfg)
    copies = 2 if args.teacher == "ema" else 1
    return selfstep.plan("SSD", args, spec, proc, grid, forwards, method, weight_copies=copies)


# ---- Settings ----------------------------------------------------------------------------------

IMAGENET = 1_281_167  # images of an epoch

# By (size, resolution). Learning rate, batch and epochs: section A.1 of the supplement, Tables 2
# and 3. For REPA, section A.3 gives the learning rate and no batch or length: those of DiT-XL/2.
PAPER = {
    ("XL", 256): dict(lr=5e-6, batch=128, epochs=0.8),
    ("XL", 512): dict(lr=5e-6, batch=64, epochs=0.4),
    ("L", 256): dict(lr=5e-6, batch=256, epochs=0.2),
    ("B", 256): dict(lr=5e-6, batch=256, epochs=0.2),
    ("S", 256): dict(lr=1e-5, batch=512, epochs=0.2),
}
LAM = 0.30           # Table 10, all models
LAM_VELOCITY = 1.0   # Eq. 17
# Section A.2: 384,000 images with captions, one epoch.
TEXT = dict(lr=1e-6, batch_size=96, steps=4000)
TEACHER_EMA = 0.9999

# The digits: guided, as the paper samples everywhere. SSD gains with guidance, and without
# guidance it does not (experiments/ssd/README.md); chosen by experiments/ssd/guidance.py.
DIGITS = dict(lr=1e-4, batch_size=64, steps=100, lam=0.10, cfg=1.5, data="digits",
              eval_samples=2000, log_every=20, save_every=50)


def paper_settings(spec, nfe):
    """The paper's numbers for (model, resolution)."""
    row = PAPER[selfstep.paper_size(spec, PAPER)]
    settings = dict(lr=row["lr"], batch_size=row["batch"], lam=LAM,
                    steps=round(row["epochs"] * IMAGENET / row["batch"]),
                    data=f"synthetic:{nfe}", eval_samples=0, log_every=100, save_every=1000)
    if spec["arch"].get("context") == "text":
        settings.update(TEXT)
    return settings


def apply_ssd_defaults(args, spec):
    """Fill missing arguments from the settings above. Raises UserError."""
    if args.nfe is None:
        args.nfe = spec["nfe"] or 10
    if args.nfe < 2:
        raise UserError(f"--nfe {args.nfe}: SSD pairs neighbouring steps and needs at least 2")
    is_flow = spec["prediction"] == "velocity"
    settings = dict(DIGITS if is_digits(spec) else paper_settings(spec, args.nfe))
    if is_flow:
        settings["lam"] = LAM_VELOCITY
    has_prompts = spec["arch"].get("context") == "text"
    if not has_prompts:
        refuse_without_effect(args, "text_cfg", "without prompts")
    if not is_flow:
        refuse_without_effect(args, "interval teacher", "with a model that predicts no velocity")
    selfstep.apply_defaults(args, spec, settings)
    if has_prompts and args.data.startswith("synthetic"):
        raise UserError("a model with prompts needs --data FOLDER, made by `python -m kit.encode`")
    if is_flow and args.interval is None and args.only_step is None and 1 / args.nfe < 0.005:
        args.interval = 0.005
    if args.teacher is None:
        is_close = is_flow and (args.interval or 1 / args.nfe) < 0.01
        args.teacher = "ema" if is_close else "fixed"
    is_fine = args.interval is None or (args.only_step is None and 0 < args.interval < 1)
    if not is_fine:
        raise UserError(f"--interval {args.interval}: between 0 and 1, and not with --only-step")
    low, high = args.text_cfg
    if not 0 <= low <= high < math.inf:
        raise UserError(f"--text-cfg {low:g} {high:g}: two scales of guidance in their order")


def parser():
    p = make_parser("ssd.py", __doc__)
    group = p.add_argument_group("the method")
    group.add_argument("--lam", type=float,
                       help="weight of the cleaner step in Eq. 5 (default: Table 10; velocity 1, "
                            "Eq. 17)")
    group.add_argument("--interval", type=float, metavar="S-T",
                       help="velocity: distance of s and t, off the grid (default: the grid's, at "
                            "least 0.005)")
    group.add_argument("--teacher", choices=["fixed", "ema"],
                       help="ema: a moving average of the student (default: ema for s - t below "
                            "0.01, else fixed)")
    group.add_argument("--text-cfg", type=float, nargs=2, default=[5.0, 15.0], metavar="SCALE",
                       help="with prompts: range of the guidance that makes x_t")
    selfstep.add_arguments(p)
    add_run_arguments(p, "runs/ssd")
    return p


if __name__ == "__main__":
    run_script(main, parser().parse_args())
