"""What a method starts from: the base model and the training data."""
from pathlib import Path

import torch

import models
from kit import checkpoints, data
from kit.cache import synthetic_pool
from kit.cli import (
    UserError,
    apply_defaults,
    cache_folder,
    check_cfg,
    check_positive,
    refuse_without_effect,
    say,
)
from kit.plan import has_condition, pool_size
from kit.sampling import SampleOptions

# ---- The base model ----------------------------------------------------------------------------


def naming(args):
    """What the user says of a file that does not say what it is: name, side of images, classes."""
    return args.model, args.image_size, getattr(args, "classes", None)


def resolve_checkpoint(args):
    """--ckpt as a path, or None. A URL is fetched once; for --dry-run it stays a URL."""
    if args.ckpt is None or args.dry_run or "://" not in args.ckpt:
        return args.ckpt
    return str(checkpoints.local_path(args.ckpt, *naming(args)))


def describe_base(args, prediction="eps"):
    """The description (spec) of what load_base() will load, without touching weights.

    The base model is --ckpt; with --model alone the released weights; with neither a teacher of
    the digits, which makes this prediction.
    """
    if args.model is None and args.ckpt is None:
        return describe_digits_teacher(prediction)
    is_remote = args.ckpt is None or "://" in args.ckpt
    return checkpoints.describe(None if is_remote else args.ckpt, *naming(args))


def describe_digits_teacher(prediction):
    """The spec of what train.make_teacher() makes, as far as plans and defaults need it."""
    edm = prediction == "edm"
    name = "DDPM++-16x1" if edm else "DiT-Ti/2"
    spec = dict(checkpoints.DIT_DEFAULTS, name=name, classes=10, scale=None, cfg=1.0,
                prediction=prediction, method="train",
                arch=models.make_arch(name, 8, 1, 10, learn_sigma=False))
    return {**spec, **checkpoints.EDM_SPEC, "knows_null": True} if edm else spec


def describe_new(args, dataset, learn_sigma):
    """The spec of a network that train.py starts from random weights. One in ten of its labels is
    dropped, whatever the network, so that it learns the null label."""
    name = args.model
    is_latent = dataset.scale is not None
    is_flow = args.schedule == "interpolant" or name.startswith("SiT")
    arch = models.make_arch(name, dataset.shape[-1], dataset.shape[0], dataset.classes,
                            learn_sigma=is_latent and not is_flow and learn_sigma)
    spec = dict(checkpoints.DIT_DEFAULTS, name=name, arch=arch, classes=arch["num_classes"])
    if arch["net"] == "DDPM++":
        spec.update(checkpoints.EDM_SPEC)
    elif arch["net"] == "UNet":
        own = "SD-v1.5" if arch.get("context") == "text" else name
        spec.update(checkpoints.UNET_DEFAULTS.get(own, checkpoints.LDM_SPEC))
    if is_flow:
        spec.update(checkpoints.SIT_SPEC)
    is_guided = is_latent and has_condition(spec)
    spec.update(scale=dataset.scale, cfg=spec["cfg"] if is_guided else 1.0, knows_null=True,
                class_names=getattr(dataset, "class_names", None))
    return spec


def new_network(args, spec):
    """The network that train.py trains: --ckpt's weights, or random ones."""
    if args.ckpt:
        return checkpoints.load_model(args.ckpt, *naming(args))[0]
    torch.manual_seed(args.seed)
    net = models.build(spec["arch"])
    if isinstance(net, models.DiT):
        torch.nn.init.normal_(net.y_embedder.embedding_table.weight, std=args.label_std)
    return net


def load_base(args, proc, make_teacher, prediction="eps"):
    """The network that a method starts from -> (network on the CPU, spec, its file).

    It is fetched, or made by make_teacher(folder, prediction=...), if it is not there yet.
    """
    path = args.ckpt
    role = "base model"
    if path is None and args.model is None:
        role = "teacher"
        folder = "runs/teacher-digits"
        if prediction != "eps":
            folder += f"-{prediction}"
        path = make_teacher(folder, prediction=prediction)
    elif path is None:
        path = checkpoints.upstream_checkpoint(args.model, args.image_size, cache_folder())
    say(proc, f"{role}: {path}")
    net, spec = checkpoints.load_model(path, *naming(args))
    return net, spec, str(path)


def warn_if_too_narrow(proc, spec):
    """Say when a transformer has fewer features per token than a patch has numbers. Its output lies
    in a subspace, which images may share, and noise does not."""
    arch = spec["arch"]
    if "hidden_size" not in arch or spec["prediction"] == "x0":
        return
    numbers = arch["in_channels"] * arch["patch_size"] ** 2
    if arch["hidden_size"] < numbers:
        say(proc, f"warning: {spec['name']} has {arch['hidden_size']} features per token, a patch "
                  f"has {numbers} numbers: it cannot predict noise and will draw noise; take a "
                  "smaller patch, a wider network, or --prediction x0")


def is_digits(spec):
    """Is this a network for the embedded digits? Method scripts measure only those."""
    arch = spec["arch"]
    shape = (arch["in_channels"], arch["input_size"], spec["classes"], spec["scale"])
    return shape == (1, 8, 10, None)


# ---- Defaults and data -------------------------------------------------------------------------


def apply_method_defaults(args, spec, defaults, synthetic=None):
    """Fill missing arguments from `defaults`; check what all methods have in common.

    synthetic: how many steps the samples of a plain --data synthetic take. Raises UserError.
    """
    refuse_for_the_base(args, spec)
    if args.data == "synthetic":
        args.data = f"synthetic:{synthetic}"
    apply_defaults(args, {"cfg": spec["cfg"] if can_guide(spec) else 1.0, **defaults})
    check_positive(args)
    check_cfg(args.cfg)
    if args.eval_samples and (not is_digits(spec) or args.eval_samples < 2):
        raise UserError(f"--eval-samples {args.eval_samples}: at least 2, and only for the digits; "
                        "else 0, and fid.py measures what sample.py makes")
    check_training_data(args)


def refuse_for_the_base(args, spec):
    """Raise UserError for flags that have no effect with this base model."""
    tells_its_size = spec["method"] is not None or (args.ckpt and spec["prediction"] == "edm")
    if tells_its_size:
        refuse_without_effect(args, "image_size", "with a network that tells its own size")
        if not (args.data or "").endswith(".npz"):
            refuse_without_effect(args, "classes", "with a network that tells its own classes")
    if not has_condition(spec):
        refuse_without_effect(args, "cfg guided w drop", "with a model without classes")
    if not spec["classes"]:
        refuse_without_effect(args, "classes trust_labels", "with a model without classes")


def can_guide(spec):
    """Whether guidance acts on this network: it takes the scale as an input, or it knows labels or
    prompts and has learned what stands for none."""
    is_taken = bool(spec["arch"].get("guidance"))
    return is_taken or (has_condition(spec) and spec["knows_null"])


def can_drop(spec):
    """Whether labels can be dropped in training: is there a null label that the network knows?"""
    return spec["classes"] > 0 and spec["knows_null"]


def check_null(args, spec):
    """Raise UserError where --cfg or --drop want a null label that the network has not learned."""
    is_lacking = spec["classes"] > 0 and not spec["knows_null"]
    if is_lacking and (getattr(args, "drop", 0) or (args.cfg != 1 and not can_guide(spec))):
        raise UserError("this network has not learned the null label, on which guidance and "
                        "dropped labels rest: leave --drop out and give --cfg 1, or leave it out")


def check_training_data(args):
    """Raise UserError when --data cannot be what a method trains on."""
    name = args.data or ""
    if name.startswith("synthetic"):
        steps = name[10:]
        if not (steps.isdecimal() and 0 < int(steps) <= 1000):
            raise UserError(f"--data {name}: say how many steps the samples take, 1 to 1000, as in "
                            "synthetic:10")
        refuse_without_effect(args, "classes trust_labels flip", "with the model's own samples")
    elif name and not args.dry_run:
        data.check_name(name)
    refuse_for_the_data(args)


def refuse_for_the_data(args):
    """Raise UserError for flags that have no effect with this --data."""
    name = args.data or ""
    is_npz = name.endswith(".npz")
    if name and not is_npz and not args.ckpt:  # whose table of labels may leave its classes open
        refuse_without_effect(args, "classes", f"with --data {name}, which tells its classes")
    if is_npz or name in ("digits", *data.TORCHVISION):
        refuse_without_effect(args, "workers", f"with --data {name}, which is held in memory")


def refuse_in_training(args, spec):
    """Raise UserError for flags of train.py that have no effect."""
    refuse_for_the_base(args, spec)
    refuse_for_the_data(args)
    if args.ckpt:
        refuse_without_effect(args, "label_std", "with --ckpt, whose class embeddings are trained")
        return
    refuse_without_effect(args, "trust_labels", "without --ckpt: a new network takes the labels as "
                                                "they are")
    if spec["arch"]["net"] not in ("DiT", "SiT"):
        refuse_without_effect(args, "label_std", "with a network that is no DiT")
    if not is_image_folder(args.data):
        refuse_without_effect(args, "image_size", f"with --data {args.data}, which is no folder of "
                                                  "images")


def check_combination(args, spec, is_ordinary):
    """Raise UserError where train.py's network, --prediction and --schedule do not go together.

    is_ordinary: whether the loss is the ordinary one.
    """
    if spec["arch"].get("guidance"):
        raise UserError("this model takes the scale of guidance as an input, which this loss does "
                        "not train; give --ckpt another")
    if (spec["schedule"] == "interpolant") != (spec["prediction"] == "velocity"):
        raise UserError("--prediction velocity goes with --schedule interpolant, and only with it")
    is_changed = args.prediction or args.schedule or not is_ordinary
    if spec["arch"]["net"] == "DDPM++" and is_changed:
        raise UserError(f"--model {spec['name']}: EDM's networks have their own prediction, "
                        "schedule and loss; leave --prediction and --schedule out")


def is_image_folder(name):
    """Whether --data NAME is a folder of images, to which --image-size applies."""
    return Path(name).is_dir() and not Path(name, "latents.npy").exists()


def training_data(args, denoise, spec, proc, run):
    """-> (data set, its name): --data, or for synthetic:STEPS samples that the base model makes
    first (Table 8 of the SSD paper).

    run: the Run, see keep_pool().
    """
    source = args.data
    if source.startswith("synthetic:"):
        nfe = int(source[10:])
        size = keep_pool(args, run)
        guidance = f"guidance {args.cfg:g}" if can_guide(spec) else "no guidance"
        say(proc, f"training data: {size:,} samples of the base model itself, {nfe} steps, "
                  f"{guidance}")
        options = SampleOptions(seed=args.seed, nfe=nfe, cfg=args.cfg,
                                batch=args.sample_batch_size)
        source = synthetic_pool(denoise, spec, proc, cache_folder(), size, options)
    dataset = data.load(source, spec["arch"]["input_size"], args.classes, args.flip, args.workers)
    data.check_fits(dataset, spec, args.trust_labels)
    check_labels(args, dataset, spec)
    run.use_data(dataset)
    say(proc, data.summary(dataset))
    return dataset, source


def keep_pool(args, run):
    """How many samples the run began with: it goes on with the same ones also when --steps grows.
    The control, whose arguments are a copy of these, takes as many."""
    args.pool = run.extra.setdefault("pool_size", pool_size(args))
    return args.pool


def check_labels(args, dataset, spec):
    """Raise UserError where data without labels wants the null label, or makes flags useless."""
    if dataset.classes or dataset.text:
        return
    refuse_without_effect(args, "classes trust_labels drop guided w", "with data without labels")
    if spec["classes"] and not spec["knows_null"]:
        raise UserError(f"--data {args.data} has no labels, for which the null label stands, and "
                        "this network has not learned it; give data with labels")
