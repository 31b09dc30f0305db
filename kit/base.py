"""What a method starts from: the base model and the training data."""
import models
from kit import checkpoints, data
from kit.cache import synthetic_pool
from kit.cli import UserError, apply_defaults, cache_folder, check_cfg, check_positive, say
from kit.plan import pool_size
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
    return {**spec, **checkpoints.EDM_SPEC} if edm else spec


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


def apply_method_defaults(args, spec, defaults):
    """Fill missing arguments from `defaults`; check what all methods have in common.

    Raises UserError.
    """
    apply_defaults(args, {"cfg": spec["cfg"], **defaults})
    check_positive(args)
    check_cfg(args.cfg)
    if args.eval_samples and (not is_digits(spec) or args.eval_samples < 2):
        raise UserError(f"--eval-samples {args.eval_samples}: at least 2, and only for the digits; "
                        "else 0, and fid.py measures what sample.py makes")
    check_training_data(args)


def check_training_data(args):
    """Raise UserError when --data cannot be what a method trains on."""
    name = args.data or ""
    if name.startswith("synthetic"):
        steps = name[10:]
        if not (steps.isdecimal() and 0 < int(steps) <= 1000):
            raise UserError(f"--data {name}: say how many steps the samples take, 1 to 1000, as in "
                            "synthetic:10")
    elif name and not args.dry_run:
        data.check_name(name)


def training_data(args, denoise, spec, proc):
    """-> (data set, its name): --data, or for synthetic:STEPS samples that the base model makes
    first (Table 8 of the SSD paper)."""
    source = args.data
    if source.startswith("synthetic:"):
        nfe = int(source[10:])
        say(proc, f"training data: {pool_size(args):,} samples of the base model itself, "
                  f"{nfe} steps, guidance {args.cfg:g}")
        options = SampleOptions(seed=args.seed, nfe=nfe, cfg=args.cfg)
        source = synthetic_pool(denoise, spec, proc, cache_folder(), pool_size(args), options)
    dataset = data.load(source, spec["arch"]["input_size"], args.classes)
    data.check_fits(dataset, spec)
    return dataset, source
