"""The ordinary diffusion loss: makes a teacher, or trains one further.

    1. x0 ~ data, t ~ U{0..T-1} (the interpolant: U[0, 1]), eps ~ N(0, I); the label is dropped for 1 sample in 10
    2. x_t = alpha_t x0 + sigma_t eps
    3. L = |net(x_t, t, y) - target|^2, target = eps, x0, v = alpha eps - sigma x0, or velocity = eps - x0;
       EDM's networks: ln t ~ N(-1.2, 1.2^2), the target is F, whose mean square is EDM's weighted loss of the denoised image;
       with a learned variance also the variational bound of sigma, through which the prediction gets no gradient
       (Nichol & Dhariwal, "Improved DDPM", L_hybrid as upstream DiT trains it)

The other scripts have this one's shape: `diff train.py issd.py` is the method.

    python train.py                                             the digits' teacher, about a minute on two CPU cores
    python train.py --data cifar10 --model DiT-S/2              one GPU; or --model DDPM++-96, EDM's network
    torchrun --nproc_per_node 8 train.py --data LATENTS --model DiT-XL/2

Writes runs/train/{last.pt, log.jsonl}; last.pt is what --ckpt of the other scripts takes.
"""
import json
import math
import re
from pathlib import Path

import torch

import checkpoints
import data
import fid
import models
import runtime
from runtime import EMA, Guard, Log, Processes, StepRandom, Stop, UserError, say
from solvers import EDM, add_noise, column, from_x0_eps, make_schedule, schedule_grid, solver_grid, to_x0_eps

# ---- Method -------------------------------------------------------------------------------------------


def diffusion_loss(net, schedule, x0, y, t, noise, prediction="eps"):
    """Clean x0 (B, C, H, W), labels y (B,), timesteps t (B,) as training_times draws them, noise like x0 -> (loss, {"mse", "vb"} where a variance is learned).

    net(x_t, t, y) gives (B, C, H, W), or (B, 2C, H, W) when it learns its variance. vb is in bits per dimension.
    EDM's loss is (t^2 + 0.5^2) / (0.5 t)^2 |D - x0|^2 (Karras et al., Eq. 8): that weight times c_out^2 is 1, so it is |F - target|^2.
    """
    x_t = add_noise(schedule, x0, noise, t)                                   # (B, C, H, W)
    out = net(x_t, t, y)                                                      # (B, C or 2C, H, W)
    out, sigma_head = out.split([x0.shape[1], out.shape[1] - x0.shape[1]], 1)
    mse = (out - from_x0_eps(schedule, x0, noise, t, prediction)).square().mean()
    if sigma_head.shape[1] == 0:
        return mse, {}
    vb = variational_bound(schedule, x0, x_t, t, out.detach(), sigma_head, prediction).mean()
    return mse + vb, {"mse": mse.detach(), "vb": vb.detach()}


def variational_bound(schedule, x0, x_t, t, out, sigma_head, prediction):
    """KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)), at t = 0 -log p(x0 | x_1) of 8-bit data; bits per dimension, (B,)."""
    def posterior_mean(clean):                                                # of q(x_{t-1} | x_t, clean), DDPM's Eq. 7
        beta, sigma = column(schedule.beta[t], clean), schedule.at(t, clean)[1]
        alpha_u, sigma_u = schedule.at(t - 1, clean)
        return alpha_u * beta / sigma ** 2 * clean + (1 - beta).sqrt() * (sigma_u / sigma) ** 2 * x_t

    log_beta, logvar_q = (column(v[t], x0) for v in (schedule.beta.log(), schedule.post_logvar))
    share = (sigma_head + 1) / 2                                              # the head interpolates the log variance
    logvar_p = share * log_beta + (1 - share) * logvar_q
    mean_q, mean_p = posterior_mean(x0), posterior_mean(to_x0_eps(schedule, x_t, out, t, prediction)[0])
    kl = 0.5 * (logvar_p - logvar_q - 1 + (logvar_q - logvar_p).exp() + (mean_q - mean_p).square() * (-logvar_p).exp())
    cdf = lambda v: 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (v + 0.044715 * v ** 3)))  # upstream's normal distribution function
    inv_std = (-0.5 * logvar_p).exp()
    above, below = cdf(inv_std * (x0 - mean_p + 1 / 255)), cdf(inv_std * (x0 - mean_p - 1 / 255))
    mass = torch.where(x0 < -0.999, above, torch.where(x0 > 0.999, 1 - below, above - below))
    nll = -mass.clamp(min=1e-12).log()
    return torch.where(t.view(-1, 1, 1, 1) == 0, nll, kl).mean((1, 2, 3)) / 0.6931471805599453  # nats -> bits


def training_times(schedule, rng):
    """(B,) of the distribution that goes with the schedule; EDM's is over noise levels. rng: runtime.StepRandom."""
    if isinstance(schedule, EDM):
        return (1.2 * rng.normal(()) - 1.2).exp()                             # Karras et al., Table 1
    return rng.uniform() if schedule.continuous else rng.integers(0, schedule.T)


# ---- Training -----------------------------------------------------------------------------------------


def main(args, objective=diffusion_loss, method="train"):
    """Returns the path of the finished checkpoint. objective: another loss with the arguments of diffusion_loss (dsd.py --from-scratch)."""
    proc = Processes(args.amp)
    fill_defaults(args)
    proc.check_batch(args.batch_size, args.accumulate)

    # Setup data and network:
    info = describe_base(args) if args.ckpt else None
    dataset = data.load(args.data, info["arch"]["input_size"] if info else args.image_size or 256, args.classes)
    if not info:
        latent, flow = dataset.scale is not None, args.schedule == "interpolant" or args.model.startswith("SiT")
        arch = models.make_arch(args.model, dataset.shape[-1], dataset.shape[0], dataset.classes, learn_sigma=latent and not flow and objective is diffusion_loss)
        edm = arch["net"] == "DDPM++"
        info = dict(checkpoints.DIT_DEFAULTS, **(checkpoints.EDM if edm else checkpoints.SIT if flow else {}), **checkpoints.UNET_DEFAULTS.get(args.model, {}))
        info.update(name=args.model, arch=arch, classes=arch["num_classes"], scale=dataset.scale, cfg=1.5 if latent else 1.0)
    if info["arch"].get("guidance"):
        raise UserError("this model takes the scale of guidance as an input, which this loss does not train; give --ckpt another")
    info.update(method=method, prediction=args.prediction or info["prediction"], schedule=args.schedule or info["schedule"])
    data.check_fits(dataset, info)
    schedule = make_schedule(info["schedule"]).to(proc.device)
    if (info["schedule"] == "interpolant") != (info["prediction"] == "velocity"):
        raise UserError("--prediction velocity goes with --schedule interpolant, and only with it")
    if info["arch"]["net"] == "DDPM++" and (args.prediction or args.schedule or objective is not diffusion_loss):
        raise UserError(f"--model {info['name']}: EDM's networks have their own prediction, schedule and loss; leave --prediction and --schedule out")
    units = 3 if objective is diffusion_loss else 4  # forwards of a step, a backward counting as two
    if args.dry_run:
        return say(proc, "\n".join([
            f"{info['prediction']} training of {info['name']}, {models.count(info['arch'])[0] / 1e6:.1f}M parameters, on {args.data}: {args.steps:,} steps of batch "
            f"{args.batch_size}, lr {args.lr:g}, EMA {args.ema}; {units} forward units a step, a backward counts as two", *resources(args, proc, info["arch"], info["arch"], cost(args, info, units), 2, 0)]))
    if args.ckpt:
        net, _ = checkpoints.load_model(args.ckpt, args.model, args.image_size)
    else:
        torch.manual_seed(args.seed)
        net = models.build(info["arch"])
        if isinstance(net, models.DiT):
            torch.nn.init.normal_(net.y_embedder.embedding_table.weight, std=args.label_std)
    student, ema, opt = proc.student(net, args), EMA(net, args.ema), runtime.adamw(net, args.lr)

    # Resume:
    state, start = checkpoints.prepare(args, proc), 0
    if state:
        start = state["step"]
        if start >= args.steps:
            return Path(args.out) / "last.pt"
        net.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])
        ema.load(state["ema"])
        del state

    info["null"] = dataset.null if dataset.text else None  # what guidance starts from, with captions
    null = info["classes"] if info["null"] is None else info["null"].to(proc.device)
    denoise, guard, stop = proc.mixed(student), Guard(proc), Stop(proc, args)
    log = Log(args, proc, start, args.steps, method, cost(args, info, units))
    stream = data.batches(dataset, proc, args.seed, args.batch_size, start)
    for step in range(start, args.steps):
        x0, y = next(stream)
        rng = StepRandom(proc, args.seed, step, args.batch_size)
        net.dropout, net.rng = DROPOUT, rng  # where a network has dropout, its masks depend on (seed, step) alone, too
        t = training_times(schedule, rng)
        y = torch.where((rng.uniform() < 0.1).view(-1, *[1] * (y.ndim - 1)), null, y)
        loss_of = lambda x0, y, t, noise: objective(denoise, schedule, x0, y, t, noise, info["prediction"])[0]
        loss = proc.backward(student, loss_of, args.accumulate, x0, y, t, rng.normal(x0.shape[1:]))
        for group in opt.param_groups:
            group["lr"] = args.lr * learning_rate(step, args)
        guard.update(opt, loss, step, args.clip)
        ema.update(net, step)

        save, ended = stop.after(done := step + 1)
        if log.step(done, loss):
            guard.check(args.out)
        if save:
            guard.check(args.out)
            checkpoints.save(args, proc, {"model": net.state_dict(), "ema": ema.state_dict(net), "opt": opt.state_dict(), "step": done, **info})
        if ended and done < args.steps:
            runtime.stopped(args, proc, done)
    log.close()
    stop.restore()
    proc.barrier()  # the others read what rank 0 has written
    say(proc, f"{args.out}/last.pt is ready")
    return Path(args.out) / "last.pt"


def cost(args, info, units):
    """Floating-point operations of a step of so many forwards, on all processes."""
    return units * args.batch_size * models.count(info["arch"])[1]


def resources(args, proc, base, arch, step, trained=1, frozen=1, wide=1):
    """Lines of every plan: operations, expected time by kind of card, memory of a process, disk. base, arch: the base model's and the student's; step: cost();
    trained: copies of the student's weights, averages with it; frozen: networks of the base's size beside it; wide: rows of a forward by sample."""
    GiB, rows, (params, forward), (base_params, base_forward) = 2 ** 30, args.batch_size // proc.world // args.accumulate * wide, models.count(arch), models.count(base)
    half = proc.bf16 or args.amp != "off" and base_params > 1e7  # the plan of a large model speaks of a GPU, also when it is made without one
    fixed = params * (12 + 4 * trained + 2 * half) + frozen * base_params * (2 if half else 4)
    synthetic = (args.data or "").startswith("synthetic:")
    pool = args.pool * int(args.data[10:]) * (2 if args.cfg != 1 and base["num_classes"] else 1) * base_forward if synthetic else 0
    total = args.steps * (step + args.grad_checkpointing * forward * args.batch_size * wide)
    memory = f"about {fixed / GiB:.3g} GiB a process for weights, gradients, Adam, teacher; activations not counted"
    if "patch_size" in arch:  # bytes a token, channel and block: 48 under bf16, 80 in float32, counted with saved_tensors_hooks; 4 for stored features, or for what blocks are computed from again
        tokens, each = (arch["input_size"] // arch["patch_size"]) ** 2 * arch["hidden_size"] * rows, 48 if half else 80
        moving = tokens * (each + 8 * arch["depth"] if args.grad_checkpointing else (each + 4) * arch["depth"])
        memory = f"about {(fixed + moving) / GiB:.3g} GiB a process: weights, gradients, Adam, teacher {fixed / GiB:.3g}; activations, stored features {moving / GiB:.3g}"
    minutes = {card: (total + pool) / proc.world / SHARE / tflops / 6e13 for card, tflops in CARDS.items()}
    times = ", ".join(f"{card} {m / 60:.1f} h" if m > 90 else f"{card} {m:.0f} min" for card, m in minutes.items())
    return [*([f"pool         {args.pool:,} samples of the base model, made first, {pool:.3g} FLOP, {args.pool * 2 * base['in_channels'] * base['input_size'] ** 2 / GiB:.2g} GiB on disk"] if synthetic else []),
            f"cost         {step:.3g} FLOP a step, {total:.3g} FLOP in all" + " with what is computed again" * args.grad_checkpointing,
            f"time         on {proc.world} x {times}, at {SHARE:.0%} of the peak; networks {'' if runtime.compiles(args) else 'not '}compiled on a GPU",
            f"memory       {memory}",
            f"checkpoint   {args.out}/last.pt, {params * (8 + 4 * trained) / GiB:.2g} GiB (twice that while it is written), every {args.save_every} steps and {args.save_minutes:g} minutes"]


def learning_rate(step, args):
    """Factor of --lr: linear warm-up, then constant or half a cosine down to zero."""
    if step < args.warmup:
        return (step + 1) / args.warmup
    return 1.0 if args.decay == "constant" else 0.5 + 0.5 * math.cos(math.pi * (step - args.warmup) / max(args.steps - args.warmup, 1))


def teacher(out, seed=0, prediction="eps"):
    """The checkpoint that `python train.py --out OUT --seed SEED --prediction PREDICTION` makes, made now unless it is there."""
    kind = {"eps": [], "edm": ["--model", "DDPM++-16x1", "--steps", "1000"]}.get(prediction, ["--prediction", prediction])
    try:
        return main(parser().parse_args(["--out", str(out), "--seed", str(seed), *kind]))
    except UserError as e:
        raise UserError(f"{e} (this concerns the digits' teacher, which is made anew when {out} is deleted)")


def continued(args, source):
    """The control of every method: this loss from the same base model, with the method's data, steps, batch and learning rate."""
    own = parser().parse_args([])
    vars(own).update({k: getattr(args, k) for k in ("ckpt", "model", "image_size", "classes", "steps", "batch_size", "lr", "seed", "amp", "resume")},
                     data=str(source), out=f"{args.out}/continued", warmup=0, decay="constant", ema=0.0, clip=0.0, log_every=args.steps, save_every=args.steps)
    return checkpoints.load_model(main(own))[0]


def describe_base(args, prediction="eps"):
    """What base_model(args) will load: checkpoints.describe's dict, without touching weights. The base model is --ckpt PATH or URL; with
    --model alone the released weights; with neither the digits' teacher, which makes this prediction."""
    if args.model is None and args.ckpt is None:
        name, more = ("DDPM++-16x1", checkpoints.EDM) if prediction == "edm" else ("DiT-Ti/2", {})
        made = dict(name=name, arch=models.make_arch(name, 8, 1, 10, learn_sigma=False), classes=10, scale=None, prediction=prediction, cfg=1.0, method="train")
        return {**checkpoints.DIT_DEFAULTS, **made, **more}
    remote = args.ckpt is None or "://" in args.ckpt
    if remote and args.ckpt and not args.dry_run:
        args.ckpt, remote = str(checkpoints.local(args.ckpt, args.model, args.image_size)), False
    return checkpoints.describe(None if remote else args.ckpt, args.model, args.image_size)


def base_model(args, prediction="eps"):
    """The network a method starts from -> (network, info): fetched, or trained here, if it is not there yet. Puts its path into args.ckpt."""
    if args.ckpt is None and args.model is None:
        args.ckpt = str(teacher("runs/teacher-digits" + f"-{prediction}" * (prediction != "eps"), prediction=prediction))
    elif args.ckpt is None:
        args.ckpt = str(checkpoints.upstream_checkpoint(args.model, args.image_size, runtime.CACHE))
    net, info = checkpoints.load_model(args.ckpt, args.model, args.image_size)
    args.model = info["name"]
    return net, info


def is_digits(info):
    """Is this a network for the embedded digits? Only those are measured by the method scripts."""
    return (info["arch"]["in_channels"], info["arch"]["input_size"], info["classes"], info["scale"]) == (1, 8, 10, None)


def fill(args, info, preset):
    """What a method script was not told takes the preset's value; checks what all of them have in common. Raises UserError."""
    for key, value in {"cfg": info["cfg"], **preset}.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    runtime.check_positive(args)
    if not math.isfinite(args.cfg):
        raise UserError(f"--cfg {args.cfg}: must be a number")
    if args.eval_samples and (not is_digits(info) or args.eval_samples < 2):
        raise UserError(f"--eval-samples {args.eval_samples}: at least 2, and only for the digits; else 0, and fid.py measures what sample.py makes")
    check_data(args)


def check_data(args):
    """Is --data something? And how many samples will synthetic:STEPS make -> args.pool. Raises UserError."""
    synthetic = (args.data or "").startswith("synthetic")
    if synthetic and not (args.data[10:].isdecimal() and 0 < int(args.data[10:]) <= 1000):
        raise UserError(f"--data {args.data}: say how many steps the samples take, 1 to 1000, as in synthetic:10")
    if args.data and not synthetic and not args.dry_run:
        data.check_name(args.data)
    args.pool = min(POOL, args.steps * args.batch_size)


def training_data(args, denoise, info, proc):
    """The data set of a method and its name: --data, or with synthetic:STEPS samples of the base model itself, made first (Table 8 of the SSD paper)."""
    source = args.data
    if source.startswith("synthetic:"):
        say(proc, f"training data: {args.pool:,} samples of the base model itself, {source[10:]} steps, guidance {args.cfg:g}")
        source = data.synthetic(denoise, info, proc, runtime.CACHE, args.pool, args.seed, int(source[10:]), args.cfg)
    dataset = data.load(source, info["arch"]["input_size"], args.classes)
    data.check_fits(dataset, info)
    return dataset, source


def measure(args, proc, method, seconds, entries, **more):
    """The end of every method: entries {"before": ..., "after": ..., controls} as fid.compare takes them, or {} when nothing is to be measured;
    writes metrics.json and samples.png and prints the table. more: further keys of metrics.json."""
    rows, images = fid.compare(entries, proc, args.eval_samples, args.seed)
    known = dict(features="digits-cnn", reference="all 1,797 digits") if entries else dict(features=None, reference=None)
    if proc.main:
        if entries:
            data.save_grid([images[k] for k in ("before", "plain training", "after") if k in images], Path(args.out) / "samples.png")
        metrics = {"method": method, "model": args.model, "nfe": args.nfe, "seed": args.seed, "steps": args.steps, "samples": args.eval_samples, **known, "cfg": args.cfg,
                   "before": rows.pop("before", None), "after": rows.pop("after", None), "controls": rows, **more, "seconds": round(seconds, 1)}
        runtime.write_text(Path(args.out) / "metrics.json", json.dumps(metrics, indent=2))
    proc.barrier()
    report(args, proc)


def measured(args):
    """Has this finished run its metrics.json, with as many samples as asked for now?"""
    try:
        return json.loads((Path(args.out) / "metrics.json").read_text())["samples"] == args.eval_samples
    except (OSError, ValueError, LookupError, TypeError):  # none yet, or a damaged one
        return False


def report(args, proc):
    """Print the table of a finished run."""
    metrics = json.loads((Path(args.out) / "metrics.json").read_text())
    say(proc, fid.summary(metrics) if metrics["samples"] else "quality is not measured here (--eval-samples 0)")
    elsewhere = f" --elsewhere {args.ckpt}" if getattr(args, "only_step", None) else ""
    say(proc, f"{args.out}/last.pt is ready: python sample.py --ckpt {args.out}/last.pt{elsewhere} --num-samples 100 --out samples.npz")


# ---- What ssd.py and issd.py share ---------------------------------------------------------------------

# Learning rate, batch and epochs of ImageNet by (size, resolution): section A.1 of the supplement, Tables 2 and 3.
PAPER_SELF = {("XL", 256): (5e-6, 128, 0.8), ("XL", 512): (5e-6, 64, 0.4), ("L", 256): (5e-6, 256, 0.2), ("B", 256): (5e-6, 256, 0.2), ("S", 256): (1e-5, 512, 0.2)}
IMAGENET = 1_281_167


def size_of(info):
    """('XL', 512): size and resolution in the paper's tables; what they do not know counts as ('XL', 256), our smaller ones as ('S', 256)."""
    match = re.match(r"[DS]iT-(\w+)/", info["name"])
    size = {"XS": "S", "Ti": "S", "Na": "S"}.get(match[1], match[1]) if match else "XL"
    side = info["arch"]["input_size"] * (8 if info["scale"] else 1)
    return (size, side) if (size, side) in PAPER_SELF else (size, 256)


def self_preset(info):
    lr, batch, epochs = PAPER_SELF[size_of(info)]
    return dict(lr=lr, batch_size=batch, steps=round(epochs * IMAGENET / batch), data=f"synthetic:{info['nfe'] or 10}", eval_samples=0, log_every=100, save_every=1000)


def self_grid(args, info, schedule):
    """The nodes of --nfe steps, and how many pairs of neighbours they have: a progressively distilled model keeps its own; the clean end (-1) is no time."""
    fits = isinstance(info["grid"], str) or info["grid"] and info["nfe"] == args.nfe
    grid = solver_grid(schedule, "ddim", args.nfe, info["grid"]) if fits and args.grid is None else schedule_grid(schedule, args.grid, args.nfe)
    return grid, args.nfe - 1 if grid[-1] == -1 else args.nfe


def self_checks(args, info, pairs):
    """What neither script can do. Raises UserError."""
    if info["arch"].get("guidance"):
        raise UserError("this model takes the scale of guidance as an input, which SSD and iSSD do not know; give --ckpt one that does not")
    if info["only_node"] is not None:
        raise UserError("this is a student of one step (--only-step), of use only beside its base model; give --ckpt a whole one")
    if info["schedule"] == "edm" or info["solver"] == "lcm":
        raise UserError("this model has EDM's schedule or is sampled with noise between its steps (LCM, DMD2), along which SSD and iSSD know no steps")
    if not 0 <= args.lam <= 1 or not 0 <= args.drop <= 1:
        raise UserError(f"--lam {args.lam}, --drop {args.drop}: must lie between 0 and 1")
    if args.only_step is not None and not 1 <= args.only_step <= pairs:
        raise UserError(f"--only-step {args.only_step}: must lie between 1 and {pairs}")
    if args.guided != "no" and (args.cfg == 1 or not info["classes"] or info["cfg_interval"]):
        raise UserError(f"--guided {args.guided} wants a model with classes, guided at every step, and --cfg other than 1")


def self_entries(args, proc, before, after, info, source):
    """Before, after and the controls, as measure() takes them; a student of one node shares the way with the base model."""
    say(proc, f"the control: the ordinary loss for {args.steps} more steps")
    control = proc.mixed(proc.frozen(continued(args, source)))
    whole = {**info, "only_node": None}
    return {"before": (before, whole, args.nfe, args.cfg), "before, 50 steps": (before, whole, 50, args.cfg),
            "continued training": (control, whole, args.nfe, args.cfg), "after": (after, {**info, "elsewhere": before}, args.nfe, args.cfg)}


def self_plan(name, args, info, proc, grid, units, what, copies=1):
    """What --dry-run prints: the run in numbers, from the presets and the shape of the network. units: forwards of an iteration, a backward
    counting as two; copies: of the weights in a checkpoint."""
    arch, (params, flops) = info["arch"], models.count(info["arch"])
    lines = [f"{name} of {info['name']}, {params / 1e6:.1f}M parameters, {flops / 1e9:.4g} GFLOP a forward and sample",
             f"sampling     {args.nfe} steps at t = {', '.join(f'{t:.4g}' for t in grid[:3])}, ..., {grid[-2]:.4g}; guidance {args.cfg:g}",
             f"training     {what}, lr {args.lr:g}, batch {args.batch_size} ({proc.world} x {args.batch_size // proc.world}), {args.steps:,} steps" + (f", node {args.only_step} only" if args.only_step else ""),
             f"data         {args.data}"]
    lines += [f"units        {units} forward units a step, a backward counts as two",
              *resources(args, proc, arch, arch, cost(args, info, units), copies, 1, 2 if args.guided == "all" or arch.get("context") == "text" else 1),
              f"quality      {f'{args.eval_samples:,} samples a row, before, after and two controls' if args.eval_samples else 'not measured'}"]
    return "\n".join(lines)


def self_arguments(p):
    p.add_argument("--model", help="DiT-{S,B,L,XL}/{2,4,8}, SiT-XL/2, SD-v1.5, LDM-ImageNet, ...; the released weights are fetched where there are any")
    p.add_argument("--image-size", type=int, choices=[256, 512], help="of the released weights (default: what they were made for)")
    p.add_argument("--ckpt", help="the base model: a checkpoint's path or URL, ours or upstream's")
    p.add_argument("--data", help="digits, mnist, cifar10, ..., a folder of images or cached latents, or synthetic:STEPS")
    p.add_argument("--classes", type=int, help="number of classes, where the data does not tell")
    p.add_argument("--nfe", type=int, help="sampling steps, in training and afterwards (default 10)")
    p.add_argument("--grid", choices=["dit", "ddim", "ldm", "uniform", "sit"], help="where those steps lie (default: the base model's own; else sit for velocity, ldm for latent diffusion's schedules, dit)")
    p.add_argument("--only-step", type=int, metavar="N", help="train the step from node N to node N + 1 only (Fig. 4b); elsewhere the base model samples")
    p.add_argument("--guided", choices=["no", "step", "all"], default="no", help="guidance in training, of scale --cfg: in no forward, in the solver's step, in all (twice the cost)")
    p.add_argument("--drop", type=float, default=0.1, metavar="P", help="probability of the null label in place of a sample's own")
    p.add_argument("--steps", type=int, help="default: the paper's epochs of ImageNet at its own batch size")
    p.add_argument("--batch-size", type=int, help="of all processes together")
    p.add_argument("--lr", type=float)
    p.add_argument("--cfg", type=float, help="guidance when sampling (1: none)")
    p.add_argument("--eval-samples", type=int, help="samples per row of the table (digits: 2000, else 0)")


# ---- Arguments ----------------------------------------------------------------------------------------

# Dense bf16 TFLOP/s of a card by its datasheet, and the share of it that plans count on: with 40 % the SSD paper's iSSD run (8,007 steps, 1.2e18 FLOP,
# 8 A6000, its data at hand) takes the 40 minutes that it reports.
CARDS, SHARE = {"A6000": 155, "A100": 312, "H100 or H200": 989}, 0.4
DROPOUT = 0.1  # of DDPM++ networks, to prevent over-fitting (the KD paper, A.1); no other has any
POOL = 50_000  # synthetic samples; the paper does not say how many it made

# Upstream DiT trains at a constant 1e-4 with batch 256 and EMA 0.9999 (400,000 steps in its ablations, 7 million for the released XL/2).
PAPER = dict(steps=400_000, batch_size=256, lr=1e-4, warmup=0, decay="constant", ema=0.9999, clip=0.0, label_std=0.02, log_every=100, save_every=5000)
# EDM's networks: Karras et al. for CIFAR-10, but 100,000 steps as in the KD paper: a warm-up over 10 million images, an average with a half-life of
# 0.5 million images, at first of a twentieth of the images seen, which is nearly the warm-up that runtime.EMA has.
PAPER_EDM = dict(PAPER, steps=100_000, batch_size=512, lr=1e-3, warmup=19_531, ema=0.99929)
# The small digits model. Upstream's label embedding of 0.02 is hardly heard in so short a run; 1 is.
DIGITS = dict(steps=2000, batch_size=96, lr=3e-3, warmup=100, decay="cosine", ema=0.995, clip=1.0, label_std=1.0, log_every=100, save_every=500)


def fill_defaults(args):
    args.model = args.model or (describe_base(args)["name"] if args.ckpt else "DiT-Ti/2")
    for key, value in (DIGITS if args.data == "digits" else PAPER_EDM if args.model.startswith("DDPM++") else PAPER).items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    runtime.check_positive(args)
    if not 0 <= args.ema < 1 or not all(0 <= v < math.inf for v in (args.clip, args.warmup, args.label_std)):
        raise UserError("--ema must lie between 0 and 1; --clip, --warmup and --label-std must not be negative")


def parser():
    p = runtime.Parser(prog="train.py", description=__doc__, formatter_class=runtime.Raw)
    p.add_argument("--model", help="DiT- or SiT-{Na,Ti,XS,S,B,L,XL}/{1,2,4,8}, LDM-..., DDPM++-{32,64,96,128,t,16x1,...}; default DiT-Ti/2")
    p.add_argument("--ckpt", help="start from these weights, a path or URL, instead of random ones")
    p.add_argument("--data", default="digits", help="digits, mnist, fashion-mnist, cifar10, a folder of images or of cached latents")
    p.add_argument("--classes", type=int, help="number of classes, where the data does not tell")
    p.add_argument("--image-size", type=int, help="of image folders (default 256, or --ckpt's) and upstream checkpoints")
    p.add_argument("--prediction", choices=["eps", "x0", "v", "velocity"], help="default eps, or what --ckpt predicts")
    p.add_argument("--schedule", choices=["linear", "cosine", "ldm", "sd", "interpolant"], help="default linear, or that of --ckpt")
    p.add_argument("--steps", type=int)
    p.add_argument("--batch-size", type=int, help="of all processes together")
    p.add_argument("--lr", type=float)
    p.add_argument("--warmup", type=int, help="steps")
    p.add_argument("--decay", choices=["constant", "cosine"], help="of the learning rate after the warm-up")
    p.add_argument("--ema", type=float, help="decay of the averaged weights; 0 keeps none")
    p.add_argument("--clip", type=float, help="gradient norm; 0 does not clip")
    p.add_argument("--label-std", type=float, help="of a DiT's class embeddings at first (upstream and default 0.02; digits 1, which short runs hear)")
    runtime.common_arguments(p, "runs/train")
    return p


if __name__ == "__main__":
    runtime.run(main, parser().parse_args())
