"""The ordinary diffusion loss: makes a teacher, or trains one further.

    1. x0 ~ data, t ~ U{0..T-1} (the interpolant: U[0, 1]), eps ~ N(0, I); the label is dropped
       for 1 sample in 10, unless --ckpt has not learned the null label
    2. x_t = alpha_t x0 + sigma_t eps
    3. L = |net(x_t, t, y) - target|^2,
       target = eps, x0, v = alpha eps - sigma x0, or velocity = eps - x0

EDM's networks: ln t ~ N(-1.2, 1.2^2). The target is F, whose mean square is EDM's weighted loss of
the denoised image. With a learned variance the loss has a second term, the variational bound of
sigma, through which the prediction gets no gradient (Nichol & Dhariwal, "Improved DDPM",
https://arxiv.org/abs/2102.09672, L_hybrid, as upstream DiT trains it).

The method scripts have the same sections and the same steps in the same order, so that a diff of
two loops shows the method.

    python train.py                                        the digits' teacher, on a CPU
    python train.py --data cifar10 --model DiT-S/2         one GPU; or --model DDPM++-96
    torchrun --nproc_per_node 8 train.py --data LATENTS --model DiT-XL/2

Writes runs/train/{last.pt, log.jsonl}. --ckpt of the other scripts takes last.pt.
"""
import math
from pathlib import Path

import torch

from kit import base, checkpoints, data
from kit.cache import one_job
from kit.cli import (
    UserError,
    add_data_arguments,
    add_run_arguments,
    apply_defaults,
    arguments,
    check_positive,
    make_parser,
    run_script,
    say,
    user_errors,
)
from kit.plan import in_millions, labels_line, resources, step_flops
from kit.processes import Processes
from kit.run import EMA, Run, adamw, set_lr
from solvers import EDM, add_noise, column, from_x0_eps, make_schedule, to_x0_eps

# ---- Method ------------------------------------------------------------------------------------


def diffusion_loss(net, schedule, x0, y, t, noise, prediction="eps"):
    """The ordinary loss -> (loss, aux).

    net         net(x_t, t, y) -> (B, C, H, W), or (B, 2C, H, W) when the network learns a variance
    x0, noise   (B, C, H, W), clean data and N(0, I)
    y           (B,) labels, already dropped, or (B, T, D) embedded captions
    t           (B,) timesteps as training_times() draws them
    aux         {"mse", "vb"} where a variance is learned, vb in bits per dimension; else {}

    EDM's loss is (t^2 + 0.5^2) / (0.5 t)^2 |D - x0|^2 (Karras et al., Eq. 8). That weight times
    c_out^2 is 1, so the loss is |F - target|^2.
    """
    C = x0.shape[1]
    x_t = add_noise(schedule, x0, noise, t)                            # (B, C, H, W)
    out = net(x_t, t, y)                                               # (B, C or 2C, H, W)
    out, sigma_head = out.split([C, out.shape[1] - C], dim=1)
    target = from_x0_eps(schedule, x0, noise, t, prediction)           # (B, C, H, W)
    mse = (out - target).square().mean()
    if sigma_head.shape[1] == 0:
        return mse, {}
    bound = variational_bound(schedule, x0, x_t, t, out.detach(), sigma_head, prediction)
    vb = bound.mean()
    return mse + vb, {"mse": mse.detach(), "vb": vb.detach()}


def variational_bound(schedule, x0, x_t, t, out, sigma_head, prediction):
    """KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)); at t = 0 -log p(x0 | x_1) of 8-bit data.

    sigma_head (B, C, H, W) interpolates the log variance. Returns bits per dimension, (B,).
    Upstream: DiT's diffusion/gaussian_diffusion.py, _vb_terms_bpd.
    """
    def posterior_mean(clean):                                         # of q(x_{t-1} | x_t, clean)
        beta = column(schedule.beta[t], clean)
        sigma = schedule.alpha_sigma(t, clean)[1]
        alpha_u, sigma_u = schedule.alpha_sigma(t - 1, clean)
        toward_clean = alpha_u * beta / sigma ** 2 * clean
        return toward_clean + (1 - beta).sqrt() * (sigma_u / sigma) ** 2 * x_t   # DDPM, Eq. 7

    log_beta = column(schedule.beta.log()[t], x0)
    logvar_q = column(schedule.post_logvar[t], x0)
    share = (sigma_head + 1) / 2
    logvar_p = share * log_beta + (1 - share) * logvar_q
    mean_q = posterior_mean(x0)
    mean_p = posterior_mean(to_x0_eps(schedule, x_t, out, t, prediction)[0])

    difference = (mean_q - mean_p).square() * (-logvar_p).exp()
    kl = 0.5 * (logvar_p - logvar_q - 1 + (logvar_q - logvar_p).exp() + difference)
    nll = -log_probability_of_8_bits(x0, mean_p, logvar_p)
    at_zero = t.view(-1, 1, 1, 1) == 0
    return torch.where(at_zero, nll, kl).mean((1, 2, 3)) / math.log(2)           # nats -> bits


def log_probability_of_8_bits(x0, mean, logvar):
    """log of a normal distribution's mass in the bin of width 2 / 255 around x0 in [-1, 1]."""
    def distribution(v):                                               # upstream's approximation
        return 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (v + 0.044715 * v ** 3)))

    inv_std = (-0.5 * logvar).exp()
    above = distribution(inv_std * (x0 - mean + 1 / 255))
    below = distribution(inv_std * (x0 - mean - 1 / 255))
    mass = torch.where(x0 < -0.999, above, torch.where(x0 > 0.999, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()


def training_times(schedule, rng):
    """(B,) timesteps of the distribution that goes with the schedule; EDM's are noise levels.

    rng: kit.processes.StepRandom, or anything with its normal(), uniform() and integers().
    """
    if isinstance(schedule, EDM):
        return (1.2 * rng.normal(()) - 1.2).exp()                      # Karras et al., Table 1
    if schedule.continuous:
        return rng.uniform()
    return rng.integers(0, schedule.T)


def drop_labels(y, null, dropped):
    """y (B, ...) with `null` in place of the samples where dropped (B,) is true."""
    return torch.where(dropped.view(-1, *[1] * (y.ndim - 1)), null, y)


# ---- Training ----------------------------------------------------------------------------------


def main(args, objective=diffusion_loss, method="train", quiet=False):
    """Train; returns the path of the finished checkpoint.

    objective: another loss with the arguments of diffusion_loss (dsd.py --from-scratch).
    quiet: say nothing where the run is finished already.
    """
    proc = Processes(args.amp)
    args.ckpt = base.resolve_checkpoint(args)
    apply_train_defaults(args)
    proc.check_batch(args.batch_size, args.accumulate)
    last = Path(args.out) / "last.pt"

    # Setup data and network:
    base_spec = base.describe_base(args) if args.ckpt else None
    size = base_spec["arch"]["input_size"] if base_spec else args.image_size  # None: the images'
    dataset = data.load(args.data, size, args.classes, args.flip, args.workers)
    spec = base_spec or base.describe_new(args, dataset, learn_sigma=objective is diffusion_loss)
    base.refuse_in_training(args, spec)
    spec.update(method=method, reading=None)
    spec["prediction"] = args.prediction or spec["prediction"]
    spec["schedule"] = args.schedule or spec["schedule"]
    base.check_combination(args, spec, is_ordinary=objective is diffusion_loss)
    base.warn_if_too_narrow(proc, spec)
    data.check_fits(dataset, spec, args.trust_labels)
    base.check_labels(args, dataset, spec)
    schedule = make_schedule(spec["schedule"]).to(proc.device)
    forwards = 3 if objective is diffusion_loss else 4  # per step; a backward counts as two
    flops = step_flops(args, spec, forwards)
    if args.dry_run:
        return say(proc, plan(args, spec, proc, forwards))
    is_edm = spec["arch"]["net"] == "DDPM++"
    drop = DROP if spec["knows_null"] else 0
    net = base.new_network(args, spec)
    student = proc.student(net, args)
    ema = EMA(net, args.ema)
    opt = adamw(net, args.lr)
    denoise = proc.autocast(student)
    spec["null"] = dataset.null if dataset.text else None  # what guidance starts from: no caption
    null = dataset.null.to(proc.device) if dataset.text else spec["classes"]

    state = {"model": net, "opt": opt, "ema": ema}
    run = Run(args, proc, method, student, state, spec, flops, dataset=dataset)
    if run.is_finished:
        if not quiet:
            say(proc, f"{args.out} is finished: {last} is ready; to train again, give another "
                      f"--out or delete {args.out}")
        return last
    say(proc, data.summary(dataset))
    batches = data.batches(dataset, proc, args.seed, args.batch_size, run.step)
    for step, rng in run.steps():
        x0, y = next(batches)
        # Where a network has dropout, its masks depend on (seed, step) alone, too:
        net.dropout = DROPOUT
        net.rng = rng
        t = training_times(schedule, rng)
        y = drop_labels(y, null, rng.uniform() < drop)
        noise = rng.normal(x0.shape[1:])
        for part in run.parts(x0, y, t, noise):
            loss, _ = objective(denoise, schedule, *part, spec["prediction"])
            run.backward(loss)
        set_lr(opt, args.lr * learning_rate(step, args, first=0 if is_edm else 1))
        run.optimizer_step(opt, args.clip)
        ema.update(step, edm_decay(step, args.ema) if is_edm else None)
    say(proc, f"{last} is ready; log: {args.out}/log.jsonl")
    return last


def learning_rate(step, args, first=1):
    """Factor of --lr: linear warm-up, then constant or half a cosine down to zero.

    first: the first step has first / warmup. EDM counts the images seen before, which are none: 0.
    """
    if step < args.warmup:
        return (step + first) / args.warmup
    if args.decay == "constant":
        return 1.0
    done = (step - args.warmup) / max(args.steps - args.warmup, 1)
    return 0.5 + 0.5 * math.cos(math.pi * done)


def edm_decay(step, decay):
    """Decay of EDM's average: its half-life is at first a twentieth of the steps done before."""
    return min(decay, 0.5 ** (20 / max(step, 1e-8)))


def plan(args, spec, proc, forwards):
    """What --dry-run prints."""
    head = (f"{spec['prediction']} training of {spec['name']}, {in_millions(spec['arch'])} "
            f"parameters, on {args.data}: {args.steps:,} steps of batch {args.batch_size}, "
            f"lr {args.lr:g}, EMA {args.ema}, {labels_line(spec, DROP)}; {forwards} forward units "
            "per step, a backward counts as two")
    flops = step_flops(args, spec, forwards)
    lines = resources(args, proc, spec["arch"], flops, weight_copies=2, frozen=0)
    return "\n".join([head, *lines])


# ---- What the methods make with this script ----------------------------------------------------


def make_teacher(out, seed=0, prediction="eps"):
    """The checkpoint of `python train.py --out OUT --seed SEED --prediction PREDICTION`.

    It is made now unless it is there. prediction "edm" is EDM's network, trained with its own.
    """
    own = {"out": str(out), "seed": seed}
    if prediction == "edm":
        own.update(model="DDPM++-16x1", steps=1000)
    elif prediction != "eps":
        own.update(prediction=prediction)
    try:
        with user_errors(), one_job(Processes("off"), out):
            return main(arguments(parser(), **own), quiet=True)
    except UserError as e:
        raise UserError(f"{e} (this concerns the digits' teacher, which is made anew when {out} is "
                        "deleted)")


def train_control(args, source):
    """Continued training, the control of every method: this loss from the same base model, with
    the method's data, steps, batch and learning rate. Returns the network, on the CPU."""
    own = arguments(
        parser(), ckpt=args.ckpt, model=args.model, image_size=args.image_size, flip=args.flip,
        classes=args.classes, trust_labels=args.trust_labels, workers=args.workers,
        sample_batch_size=args.sample_batch_size, data=str(source), steps=args.steps,
        batch_size=args.batch_size, lr=args.lr, warmup=0, decay="constant", ema=0.0, clip=0.0,
        seed=args.seed, amp=args.amp, resume=args.resume, out=f"{args.out}/continued",
        log_every=args.steps, save_every=args.steps)
    own.given = frozenset()  # nobody gave these flags, so none is without effect
    return checkpoints.load_model(main(own, quiet=True))[0]


# ---- Settings ----------------------------------------------------------------------------------

DROPOUT = 0.1  # of DDPM++, to prevent over-fitting (the KD paper, A.1); no other network has any
DROP = 0.1     # of labels

# Upstream DiT trains at a constant 1e-4 with batch 256 and EMA 0.9999 (400,000 steps in its
# ablations, 7 million for the released XL/2).
PAPER = dict(steps=400_000, batch_size=256, lr=1e-4, warmup=0, decay="constant", ema=0.9999,
             clip=0.0, label_std=0.02, log_every=100, save_every=5000)

# EDM's networks: Karras et al. for CIFAR-10, but 100,000 steps as in the KD paper: a warm-up over
# 10 million images, an average with a half-life of 0.5 million images.
PAPER_EDM = dict(PAPER, steps=100_000, batch_size=512, lr=1e-3, warmup=19_531, ema=0.99929)

# The small digits model. Upstream's standard deviation of 0.02 for label embeddings is too weak
# for so short a run; we use 1.
DIGITS = dict(steps=2000, batch_size=96, lr=3e-3, warmup=100, decay="cosine", ema=0.995, clip=1.0,
              label_std=1.0, log_every=100, save_every=500)


def apply_train_defaults(args):
    """Fill missing arguments from the settings above. Raises UserError."""
    if not args.model:
        args.model = base.describe_base(args)["name"] if args.ckpt else "DiT-Ti/2"
    if args.data == "digits":
        defaults = DIGITS
    elif args.model.startswith("DDPM++"):
        defaults = PAPER_EDM
    else:
        defaults = PAPER
    apply_defaults(args, defaults)
    check_positive(args)
    not_negative = (args.clip, args.warmup, args.label_std)
    if not 0 <= args.ema < 1 or not all(0 <= v < math.inf for v in not_negative):
        raise UserError("--ema must lie between 0 and 1; --clip, --warmup and --label-std must not "
                        "be negative")


def parser():
    p = make_parser("train.py", __doc__)
    group = p.add_argument_group("the network")
    group.add_argument("--model", help="DiT- or SiT-{Na,Ti,XS,S,B,L,XL}/{1,2,4,8}, LDM-..., "
                                       "DDPM++-{32,64,96,128,t,16x1,...} (default: DiT-Ti/2)")
    group.add_argument("--ckpt", metavar="PATH",
                       help="start from these weights, a path or URL, instead of random ones")
    group.add_argument("--image-size", type=int,
                       help="of image folders (default: the images' own, or --ckpt's) and "
                            "upstream checkpoints")
    group.add_argument("--prediction", choices=["eps", "x0", "v", "velocity"],
                       help="default: eps, or what --ckpt predicts")
    group.add_argument("--schedule", help="default: the model's, or that of --ckpt",
                       choices=["linear", "cosine", "ldm", "ldm-churches", "sd", "interpolant"])
    group.add_argument("--label-std", type=float,
                       help="of a DiT's class embeddings at first (default: upstream's 0.02; "
                            "digits 1, which is strong enough for short runs)")
    add_data_arguments(p, "digits, mnist, fashion-mnist, cifar10, a folder of images or of cached "
                          "latents", default="digits")
    group = p.add_argument_group("training (defaults: upstream DiT's and EDM's; see Settings)")
    group.add_argument("--steps", type=int)
    group.add_argument("--batch-size", type=int, help="of all processes together")
    group.add_argument("--lr", type=float)
    group.add_argument("--warmup", type=int, help="steps")
    group.add_argument("--decay", choices=["constant", "cosine"],
                       help="of the learning rate after the warm-up")
    group.add_argument("--ema", type=float, help="decay of the averaged weights; 0 keeps none")
    group.add_argument("--clip", type=float, help="gradient norm; 0 does not clip")
    add_run_arguments(p, "runs/train")
    return p


if __name__ == "__main__":
    run_script(main, parser().parse_args())
