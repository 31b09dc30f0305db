"""iSSD: implicit self step-distillation.

Ma et al., "Diffusion Model is Effectively Its Own Teacher", CVPR 2025,
https://openaccess.thecvf.com/content/CVPR2025/html/Ma_Diffusion_Model_is_Effectively_Its_Own_Teacher_CVPR_2025_paper.html

Algorithm 2, for a solver Psi of N steps (the paper's T) with nodes eta_1 > ... > eta_N. theta- is a
frozen copy of the base model, theta the student; both start as the base model. l = 1..L are the
layers: the blocks, then the output layer (L = blocks + 1). lam is the paper's fusion weight; it
weighs the noisier step here (in ssd.py it weighs the cleaner one).

    repeat
        x0 ~ q_data,  n ~ U{1..N-1},  s = eta_n,  t = eta_(n+1)        s > t: s is noisier
        x_s = alpha_s x0 + sigma_s eps                                 Eq. 1
        eps_s = eps_theta-(x_s, s); store all outputs f-_l(x_s^(l), s) lines 7-8, no gradient
        x_t = Psi(eps_s, s -> t)                                       line 10, one DDIM step
        the student runs from x_t; every layer's output is fused before it goes on:
        x~_t^(l) = lam f-_(l-1)(x_s^(l-1), s)
                   + (1 - lam) f_theta,l-1(x~_t^(l-1), t)              Eq. 6, l = 2..L+1
        L = | eps_theta-(x_t, t) - x~_t^(L+1) |^2                      Eq. 7, w_t = 1
    until converged
    sample as before: N steps, nothing is stored, nothing is fused

Differences from the paper:
- Algorithm 2 draws n up to N, where t would be the end of sampling, at which no sampler evaluates
  the student. Pairs end at the last node.
- Without --data, a released model trains on its own samples (Table 8: FID 5.07 in place of 4.92).
- Line 8 stores the student's features, Eq. 6 the frozen teacher's; --reading chooses. Default: the
  teacher's.
- A layer is a whole block: Eq. 6 does not say whether attention and MLP count apart.
- The loss is a mean, not a sum, and on the prediction's channels only: a learned variance is not
  distilled. It is on what the network predicts, be it eps, v or the velocity.
- The label is dropped for 1 sample in 10, as in the paper, here alike in all forwards of a step. On
  the digits dropping makes no difference.
- AdamW: the paper does not name the optimizer of DiT.
- The paper samples with guidance 1.5 and does not say whether it trains with guidance. Its 40
  minutes on eight A6000 match 5 forwards per step at 40 % of the peak (49 minutes; a backward
  counts as two), so we assume unguided training. Where guidance helps the base model, a student
  trained unguided also improves when it is sampled with guidance; --guided all, at twice the cost,
  gains more (experiments/ssd/README.md).

    python issd.py                                                  the digits, on a CPU
    python issd.py --model DiT-XL/2 --nfe 10 --accumulate 8         one GPU
    torchrun --nproc_per_node 8 issd.py --model DiT-XL/2 --nfe 10   eight GPUs; with --data LATENTS
                                                                    as in Tables 2 and 3

Writes runs/issd/{last.pt, log.jsonl, metrics.json, samples.png}.
"""
import copy
import time

import torch

import train
from kit import data, selfstep
from kit.base import describe_base, is_digits, load_base, resolve_checkpoint, training_data
from kit.cli import UserError, add_run_arguments, make_parser, run_script, say
from kit.evaluate import finish, is_measured, print_finished
from kit.plan import step_flops
from kit.processes import Processes
from kit.run import Run, adamw
from solvers import PROJECTIONS, add_noise, ddim_step, make_schedule

# ---- Method ------------------------------------------------------------------------------------
# With solvers.add_noise, solvers.ddim_step and any network that calls tap:
#
#     nodes = torch.tensor(make_grid("dit", 10))
#     n = torch.randint(0, 9, (B,))
#     loss, aux = issd_loss(student, teacher, make_schedule("linear"), x0, y, nodes[n],
#                           nodes[n + 1], torch.randn_like(x0), lam=0.25)


def issd_loss(student, teacher, schedule, x0, y, s, t, noise, lam,  # noqa: PLR0913
              reading="teacher", prediction="eps", solver_net=None, project=None):
    """Eq. 7 -> (loss, aux).

    student, teacher   net(x, t, y, tap). The network passes the output of every layer l = 0, 1, ...
                       in order, and last its own output, through tap(l, h) -> h (see models.py)
    x0, noise          (B, C, H, W), clean data and N(0, I), float32 or float64
    y                  (B,) labels; some are already replaced by the null label
    s, t               (B,) neighbouring nodes of the solver's grid, s > t
    lam                weight of the noisier step, 0 <= lam <= 1
    reading            which network runs at (x_s, s); a backward counts as two forwards

        reading        eps_s for x_t     stored features    forwards
        "teacher"      teacher           teacher            5           line 7, Eq. 6
        "student"      student           student            5           line 8 and its heading
        "literal"      teacher           student            6           lines 7 and 8

    prediction         what the networks predict, as in solvers.to_x0_eps
    solver_net         net(x, t, y) that makes the solver's step in their place, or None
    project            project(x0) -> x0 in the solver's step, or None: see solvers.PROJECTIONS
    aux                x_s and x_t, and the prediction eps_s that carried x_s to x_t
    """
    C = x0.shape[1]                                                    # beyond: a learned variance
    x_s = add_noise(schedule, x0, noise, s)                            # (B, C, H, W)   Eq. 1

    with torch.no_grad():
        features = []                                                  # DiT: (B, tokens, D) each

        def store(l, h):
            features.append(h)
            return h

        source = teacher if reading == "teacher" else student
        eps_s = source(x_s, s, y, tap=store)[:, :C]                    # (B, C, H, W)   lines 7-8
        if solver_net:                                                 # --guided step
            eps_s = solver_net(x_s, s, y)[:, :C]
        elif reading == "literal":
            eps_s = teacher(x_s, s, y)[:, :C]                          #                line 7
        x_t = ddim_step(schedule, x_s, eps_s, s, t, prediction, project)              # line 10
        eps_teacher = teacher(x_t, t, y)[:, :C]                        # (B, C, H, W)   line 12

    def fuse(l, h):                                                    # l = 0 gives x~_t^(2)
        return torch.lerp(h, features[l], lam)                         # lam f + (1 - lam) h, Eq. 6

    eps_student = student(x_t, t, y, tap=fuse)[:, :C]                  # (B, C, H, W)   line 11
    loss = (eps_teacher - eps_student).square().mean()                 #                Eq. 7
    return loss, {"x_s": x_s, "x_t": x_t, "eps_s": eps_s}


# ---- Training ----------------------------------------------------------------------------------


def main(args):
    proc = Processes(args.amp)
    began = time.perf_counter()
    args.ckpt = resolve_checkpoint(args)
    spec = describe_base(args)
    apply_issd_defaults(args, spec)
    proc.check_batch(args.batch_size, args.accumulate)
    schedule = make_schedule(spec["schedule"]).to(proc.device)
    project = PROJECTIONS[spec["threshold"]]
    grid = selfstep.training_grid(args, spec, schedule)
    pairs = args.nfe - 1  # important! t is a node where sampling evaluates the student, not the end
    selfstep.check_model(args, spec, pairs)
    forwards = forwards_per_step(args)
    if args.dry_run:
        method = f"lam {args.lam}, reading {args.reading}"
        return say(proc, selfstep.plan("iSSD", args, spec, proc, grid, forwards, method))

    # Setup networks: the base model (base_net) is the teacher; the student starts as its copy.
    base, base_spec, args.ckpt = load_base(args, proc, train.make_teacher)
    args.model = base_spec["name"]
    net = copy.deepcopy(base)
    wrapped = proc.student(net, args)
    base_net = proc.autocast(proc.frozen(base, args))
    student, teacher, solver_net = selfstep.apply_guidance(args, proc.autocast(wrapped), base_net)
    opt = adamw(net, args.lr)
    learned_node = grid[args.only_step] if args.only_step else None  # iSSD's student runs at t
    spec = {**base_spec, "method": "issd", "grid": grid, "nfe": args.nfe, "cfg": args.cfg,
            "only_node": learned_node, "reading": args.reading}

    # Resume:
    flops = step_flops(args, spec, forwards)
    run = Run(args, proc, "issd", wrapped, {"model": net, "opt": opt}, spec, flops)
    run.base = base_net
    if run.is_finished and is_measured(args):
        return print_finished(args, proc)

    # Setup data; where there is none, the base model's own samples (the paper's Table 8):
    dataset, source = training_data(args, base_net, base_spec, proc, run)
    batches = data.batches(dataset, proc, args.seed, args.batch_size, run.step)
    nodes = torch.tensor(grid, device=proc.device)
    first, end = selfstep.pairs_to_train(args, pairs)      # n counts from 0: the paper's n - 1

    for step, rng in run.steps():
        x0, y = next(batches)
        dropped = rng.uniform() < args.drop       # important! once per sample: all forwards agree
        y = train.drop_labels(y, spec["classes"], dropped)
        n = rng.integers(first, end)
        noise = rng.normal(x0.shape[1:])
        for part in run.parts(x0, y, nodes[n], nodes[n + 1], noise):
            loss, _ = issd_loss(student, teacher, schedule, *part, args.lam, args.reading,
                                spec["prediction"], solver_net, project)
            run.backward(loss)
        run.optimizer_step(opt)

    # Measure before, after and the controls on the same noise and labels:
    entries = {}
    if args.eval_samples:
        say(proc, f"the control: the ordinary loss for {args.steps} more steps")
        control = proc.autocast(proc.frozen(train.train_control(args, source)))
        after = proc.autocast(net.eval())
        entries = selfstep.table_entries(args, base_net, after, control, spec)
    finish(args, proc, "issd", began, entries, lam=args.lam, reading=args.reading)


def forwards_per_step(args):
    """Forwards of a step; a backward counts as two."""
    if args.guided == "step":
        return 7
    forwards = 6 if args.reading == "literal" else 5
    return 2 * forwards if args.guided == "all" else forwards


# ---- Settings ----------------------------------------------------------------------------------

IMAGENET = 1_281_167  # images of an epoch

# By (size, resolution). Learning rate, batch and epochs: section A.1 of the supplement, Tables 2
# and 3. lam by NFE: Table 9, above its line.
PAPER = {
    ("XL", 256): dict(lr=5e-6, batch=128, epochs=0.8, lam={50: 0.30, 20: 0.25, 10: 0.25}),
    ("XL", 512): dict(lr=5e-6, batch=64, epochs=0.4, lam={50: 0.30, 20: 0.25, 10: 0.25}),
    ("L", 256): dict(lr=5e-6, batch=256, epochs=0.2, lam={50: 0.25, 20: 0.25, 10: 0.25}),
    ("B", 256): dict(lr=5e-6, batch=256, epochs=0.2, lam={50: 0.35, 20: 0.25, 10: 0.25}),
    ("S", 256): dict(lr=1e-5, batch=512, epochs=0.2, lam={50: 0.05, 20: 0.10, 10: 0.05}),
}
# lam by NFE for progressively distilled models: Table 9, below its line.
LAM_DISTILLED = {32: 0.20, 10: 0.25, 5: 0.05, 4: 0.05}

# The digits: chosen by experiments/ssd/digits.py (for so small a network as DiT-S, Table 9 has
# 0.05 to 0.10, too).
DIGITS = dict(lr=5e-5, batch_size=64, steps=50, lam=0.10, data="digits", eval_samples=2000,
              log_every=10, save_every=25)


def paper_settings(spec, nfe):
    """The paper's numbers for (model, resolution, nfe); for an NFE that it does not have, those of
    the nearest one."""
    row = PAPER[selfstep.paper_size(spec, PAPER)]
    lam = LAM_DISTILLED if spec["method"] in ("pd", "ddil") else row["lam"]
    nearest = min(lam, key=lambda known: abs(known - nfe))
    return dict(lr=row["lr"], batch_size=row["batch"], lam=lam[nearest],
                steps=round(row["epochs"] * IMAGENET / row["batch"]),
                data=f"synthetic:{nfe}", eval_samples=0, log_every=100, save_every=1000)


def apply_issd_defaults(args, spec):
    """Fill missing arguments from the settings above. Raises UserError."""
    if args.nfe is None:
        args.nfe = spec["nfe"] or 10
    if args.nfe < 2:
        raise UserError(f"--nfe {args.nfe}: iSSD pairs neighbouring steps and needs at least 2")
    if spec["arch"].get("context") == "text":
        raise UserError("issd.py does not know prompts, for which the paper has the explicit form: "
                        "take ssd.py")
    settings = DIGITS if is_digits(spec) else paper_settings(spec, args.nfe)
    selfstep.apply_defaults(args, spec, settings)


def parser():
    p = make_parser("issd.py", __doc__)
    group = p.add_argument_group("the method")
    group.add_argument("--lam", type=float,
                       help="fusion weight of Eq. 6, of the noisier step (default: Table 9; "
                            "digits 0.1)")
    group.add_argument("--reading", choices=["teacher", "student", "literal"], default="teacher",
                       help="whose features are fused: see issd_loss")
    selfstep.add_arguments(p)
    add_run_arguments(p, "runs/issd")
    return p


if __name__ == "__main__":
    run_script(main, parser().parse_args())
