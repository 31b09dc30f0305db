"""Samples from any checkpoint, as it was trained to be sampled: a picture, a folder of pictures, or
arrays in an .npz.

examples:
  python sample.py --ckpt runs/issd/last.pt
      40 samples -> samples.png
  python sample.py --compare A.pt B.pt
      two models on the same noise, one below the other
  python sample.py --ckpt X.pt --solver plms --nfe 20
      another solver; --nfe are evaluations of the network
  python sample.py --ckpt X.pt --num-samples 2000 --out samples
      a folder: samples/000123-7.png is sample 123, of class 7
  python sample.py --ckpt X.pt --num-samples 2000 --out samples.npz
      arr_0 uint8 NHWC, arr_1 labels, as ADM's evaluator reads them
  torchrun --nproc_per_node 8 sample.py --ckpt X.pt --num-samples 50000 --out samples.npz
      the same samples, made by eight processes; a command that was killed continues
  python sample.py --ckpt X.pt --decode stabilityai/sd-vae-ft-ema
      images of a latent model (pip install diffusers transformers)
  python sample.py --ckpt X.pt --prompts PROMPTS --decode VAE
      images of a text model; python -m kit.encode makes PROMPTS
  python sample.py --ckpt X.pt --cfg 2 --uncond DDPM++-t-uncond
      EDM's networks have not learned a null label: a second network guides them

Steps, grid and guidance come from the checkpoint. Upstream's DiT weights need --model.
Without --decode a latent model gives latents: float32 NCHW, divided by their scale.
"""
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fid
from kit import checkpoints, cli, sampling
from kit.cache import crc, fingerprint
from kit.cli import UserError, say
from kit.data import load_prompts, to_uint8
from kit.encode import decode_images, load_vae
from kit.processes import Processes
from kit.sampling import SampleOptions, sample_chunks, save_grid
from kit.store import Parts, Pictures, cannot_write, write_npz
from solvers import SOLVERS

# ---- Settings ----------------------------------------------------------------------------------


def parser():
    p = cli.make_parser("sample.py", __doc__)
    group = p.add_argument_group("the model")
    which = group.add_mutually_exclusive_group(required=True)
    which.add_argument("--ckpt", metavar="PATH",
                       help="a checkpoint's path or URL, ours or upstream's")
    which.add_argument("--compare", nargs=2, metavar=("A", "B"),
                       help="two checkpoints, on the same noise: B is drawn below A")
    group.add_argument("--model",
                       help="DiT-XL/2, ...: for files that do not say what they are")
    group.add_argument("--image-size", type=int, choices=[256, 512],
                       help="with --model: of the images that the network was made for")
    group.add_argument("--classes", type=int,
                       help="their number, where the checkpoint does not tell it")
    group.add_argument("--base", metavar="PATH",
                       help="the base model of a student: for one of one step (--only-step), whose "
                            "other steps it makes, and for --solver fused, whose features are its")
    group.add_argument("--uncond", metavar="PATH",
                       help="a network without classes that guides one which has not learned the "
                            "null label, as EDM's (Eq. 4 of the KD paper); DDPM++-t-uncond is "
                            "fetched")

    group = p.add_argument_group("the solver")
    group.add_argument("--nfe", type=int,
                       help="evaluations of the network, as the solver counts them "
                            "(default: as trained, else 50)")
    group.add_argument("--cfg", type=float,
                       help="scale of guidance, 1 is none (default: as trained)")
    group.add_argument("--solver", choices=SOLVERS, help="(default: as trained)")
    group.add_argument("--lam", type=float,
                       help="for --solver fused: the weight of the earlier features, 0 to 1 "
                            "(Eq. 6 of the SSD paper while sampling, Fig. 4c)")

    group = p.add_argument_group("what is sampled")
    group.add_argument("--num-samples", type=int, default=40, metavar="N",
                       help="how many, by all processes together (default: 40)")
    group.add_argument("--label", type=int,
                       help="one class, or one of the prompts (default: all, see --labels)")
    group.add_argument("--labels", choices=["balanced", "random"],
                       help="balanced: all classes or prompts in turn; random: drawn for each "
                            "sample, as upstream's DiT does, with which FID is a little higher "
                            "(default: balanced)")
    group.add_argument("--prompts", metavar="FOLDER",
                       help="for a model conditioned on text: a folder made by "
                            "python -m kit.encode --prompts")
    group.add_argument("--seed", type=fid.seed, default=0,
                       help="sample i depends on (seed, i) alone (default: 0)")

    group = p.add_argument_group("what is written")
    group.add_argument("--out", default="samples.png",
                       help="a grid (.png), a folder of .png files, or arrays (.npz)")
    group.add_argument("--decode", metavar="VAE",
                       help="the autoencoder that makes images of latents: a folder, or a name on "
                            "huggingface.co")
    group.add_argument("--amp", choices=["auto", "bf16", "off"], default="auto",
                       help="autocast of network calls; auto: bf16 on a GPU")
    group.add_argument("--batch-size", type=int, metavar="N",
                       help="samples at once, of each process; guidance doubles the rows (default: "
                            "what costs at most 16 TFLOP, and at most 250)")
    return p


LARGEST_GRID = 2000


def check_flags(args):
    """What can be said before a file is read. Raises UserError."""
    cli.check_positive(args, "num_samples", "batch_size", "classes")
    cli.check_cfg(args.cfg)
    if args.solver != "fused":
        cli.refuse_without_effect(args, "lam", "without --solver fused")
    elif args.lam is None or not 0 <= args.lam <= 1:
        raise UserError("--solver fused fuses the features of neighbouring steps: give their "
                        "weight with --lam, between 0 and 1")
    check_out(args)


def check_out(args):
    """Can this file or folder be written? It is better to know before hours of work."""
    out = Path(args.out)
    if not is_folder(args.out) and out.suffix not in (".png", ".npz"):
        raise UserError(f"--out {out}: must end in .png (a grid) or .npz (arrays), or be a folder "
                        "(that ends in / when it is new and has a dot in its name)")
    if args.compare and out.suffix != ".png":
        raise UserError("--compare draws a grid: give --out a name ending in .png")
    if out.suffix == ".png" and args.num_samples > LARGEST_GRID:
        raise UserError(f"--num-samples {args.num_samples}: a grid has room for {LARGEST_GRID:,}; "
                        "give --out a folder, or a name ending in .npz")
    existing = next(p for p in (out, *out.absolute().parents) if p.exists())
    fits = existing.is_dir() if existing != out else out.is_dir() == is_folder(args.out)
    if not fits or not os.access(existing, os.W_OK):
        raise UserError(f"--out {out}: cannot write there; choose another place")


def is_folder(out):
    """Is this --out a folder of pictures? A name without an ending is, and one with a slash."""
    path = Path(out)
    if path.suffix in (".png", ".npz"):
        return False
    return path.is_dir() or not path.suffix or out.endswith(("/", os.sep))


def read_prompts(folder):
    """--prompts -> (embeddings, null), or (None, None) without prompts. Raises UserError."""
    if not folder:
        return None, None
    try:
        return load_prompts(folder)
    except (OSError, ValueError, EOFError) as e:
        raise UserError(f"--prompts {folder}: cannot be read ({e}); make it with "
                        "python -m kit.encode --prompts")


# ---- Models ------------------------------------------------------------------------------------


@dataclass
class Model:
    """A network that is ready to sample."""

    net: Any                # net(x, t, y)
    spec: dict
    shape: tuple            # of a sample: (C, H, W)
    options: SampleOptions

    @property
    def is_latent(self):
        return self.spec["scale"] is not None


def check_effects(args, ckpts):
    """Raise UserError for flags that have no effect for any of the models."""
    specs = []
    for ckpt in ckpts:
        file = checkpoints.local_path(ckpt, args.model, args.image_size, args.classes)
        specs.append(checkpoints.describe(file, *name_for(file, args)))
    if not any(needs_base(spec, args) for spec in specs):
        cli.refuse_without_effect(args, "base", "for a model that makes all steps itself")
    files = [*ckpts, args.base] if args.base else ckpts
    if not any(name_for(file, args) for file in files):
        cli.refuse_without_effect(args, "model image_size classes", "for a file that tells them")
    if not any(spec["scale"] for spec in specs):
        cli.refuse_without_effect(args, "decode", "for a model that makes images itself")
    if not args.prompts and not any(spec["classes"] for spec in specs):
        cli.refuse_without_effect(args, "label labels", "for a model without classes")


def name_for(file, args):
    """--model, --image-size, --classes for a file that does not tell them; () for one that does."""
    file = checkpoints.local_path(file, args.model, args.image_size, args.classes)
    is_told = "format" in checkpoints.read_file(file)
    return () if is_told else (args.model, args.image_size, args.classes)


def needs_base(spec, args):
    """Does a student need its base model? It makes all steps but one, or has the features."""
    is_fused = args.solver == "fused" and spec["reading"] == "teacher"
    return is_fused or spec["only_node"] is not None


def open_model(ckpt, args, proc, prompts, null):
    """Load the checkpoint; raises UserError where the flags do not go with it."""
    net, spec = checkpoints.load_model(ckpt, *name_for(ckpt, args))
    labels = spec["classes"] if prompts is None else len(prompts)
    if args.label is not None and not labels:
        raise UserError(f"--label {args.label}: {ckpt} has no classes; leave it out")
    if args.label is not None and not 0 <= args.label < labels:
        raise UserError(f"--label {args.label}: must lie between 0 and {labels - 1}")
    is_latent = spec["scale"] is not None
    if is_latent and Path(args.out).suffix != ".npz" and not args.decode:
        raise UserError("this model makes latents, not images: name its autoencoder with --decode "
                        "(stabilityai/sd-vae-ft-ema for DiT), or give --out a name ending in .npz")
    if prompts is not None and spec["null"] is None:
        spec["null"] = null
    options = SampleOptions(seed=args.seed, nfe=args.nfe, cfg=args.cfg, solver=args.solver,
                            label=args.label, labels=args.labels, prompts=prompts, lam=args.lam,
                            batch=args.batch_size, batch_flag="--batch-size")
    if args.base and needs_base(spec, args):
        options.base = open_base(ckpt, spec, args, proc)
    if args.uncond:
        options.uncond = proc.autocast(proc.frozen(sampling.load_uncond(args.uncond, spec)))
    options = sampling.settle_options(options, spec, net)
    return Model(proc.autocast(proc.frozen(net)), spec, net.sample_shape, options)


def open_base(ckpt, spec, args, proc):
    """The network of --base. Raises UserError."""
    net, base_spec = checkpoints.load_model(args.base, *name_for(args.base, args))
    differs = any(base_spec[key] != spec[key] for key in ("arch", "prediction", "schedule"))
    if differs or base_spec["only_node"] is not None:
        raise UserError(f"--base {args.base}: is not the base model of {ckpt}")
    return proc.autocast(proc.frozen(net))


# ---- Samples -----------------------------------------------------------------------------------


def draw(model, store, args, proc, vae, name):
    """Sample a model on all ranks into the store, as far as it is not done yet.

    Returns True where all was there already. Raises UserError.
    """
    num = args.num_samples
    chunks = range(math.ceil(num / sampling.CHUNK))
    store.claim(proc, settings_of(model, args, proc) if proc.is_main else None)
    done = store.done(num)
    if 0 < len(done) < len(chunks):
        say(proc, f"{len(done)} of {len(chunks)} chunks of {sampling.CHUNK} samples are in "
                  f"{store.folder}; continuing")
    for first, x, y in sample_chunks(model.net, model.spec, proc, num, model.options,
                                     lambda c: c not in done, name):
        has_labels = model.spec["classes"] or args.prompts
        store.add(first, finished(model, x, vae), y.tolist() if has_labels else None)
    proc.barrier()
    if proc.is_main and len(store.done(num)) < len(chunks):
        raise UserError(f"{store.folder} lacks what other processes wrote: all machines must share "
                        "this folder")
    return len(done) == len(chunks)


def finished(model, x, vae):
    """The end of sampling, (n, C, H, W) -> images (n, H, W, C) uint8, or without an autoencoder
    latents (n, C, H, W) float32; numpy arrays."""
    if not model.is_latent:
        images = to_uint8(x)
    elif vae is None:
        return (x / model.spec["scale"]).cpu().numpy()
    else:
        with sampling.memory_errors(model.options):
            images = decode_images(vae, x / model.spec["scale"], min(16, model.options.batch))
    return images.permute(0, 2, 3, 1).cpu().numpy()


def settings_of(model, args, proc):
    """What decides the samples of a model: {name of an argument: value}."""
    spec = model.spec
    options = model.options
    sampled_by = [spec[key] for key in ("prediction", "schedule", "scale", "grid", "threshold",
                                        "cfg_interval", "only_node")]

    def weights(net):
        return None if net is None else fingerprint(net)

    prompts = options.prompts
    if prompts is not None:
        prompts = f"{zlib.crc32(np.ascontiguousarray(prompts)):08x}"
    return {
        "ckpt": f"{fingerprint(model.net)}-{crc(sampled_by)}",
        "base": weights(options.base), "uncond": weights(options.uncond), "prompts": prompts,
        "num_samples": args.num_samples, "seed": options.seed, "nfe": options.nfe,
        "cfg": options.cfg, "solver": options.solver, "lam": options.lam, "label": options.label,
        "labels": options.labels or "balanced", "decode": args.decode,
        "amp": "bf16" if proc.bf16 else "off",  # not the batch: rounding apart it decides nothing
    }


def write(out, stores, model, num):
    """Make --out of the stores of all models, and delete what was needed for that. On rank 0.

    model: the last one. Raises UserError.
    """
    if isinstance(stores[0], Pictures):
        stores[0].release()
        return
    chunks = range(math.ceil(num / sampling.CHUNK))
    if out.suffix == ".npz":
        labels = [sampling.labels_of_chunk(c, num, model.spec, model.options) for c in chunks]
        write_npz(out, stores[0], torch.cat(labels).numpy())
    else:
        blocks = []
        for store in stores:
            images = np.concatenate([store.load(c) for c in chunks])
            blocks.append(images.transpose(0, 3, 1, 2))
        try:
            save_grid(blocks, out)
        except OSError as e:
            raise cannot_write(out, e)
    for store in stores:
        store.delete()


def main(args):
    proc = Processes(args.amp)
    check_flags(args)
    out = Path(args.out)
    prompts, null = read_prompts(args.prompts)
    ckpts = args.compare or [args.ckpt]
    check_effects(args, ckpts)

    stores = []
    vae = None
    shape = None
    for ckpt in ckpts:
        model = open_model(ckpt, args, proc, prompts, null)
        if shape is not None and model.shape != shape:
            raise UserError(f"--compare {' '.join(ckpts)}: the first makes {shape}, the second "
                            f"{model.shape}; only samples of one shape can be compared")
        shape = model.shape
        if args.decode and vae is None:
            vae = load_vae(proc, args.decode, "--decode")
        parts = f"{out.name}.parts{len(stores) or ''}"
        store = Pictures(out) if is_folder(args.out) else Parts(out.with_name(parts))
        stores.append(store)
        was_finished = draw(model, store, args, proc, vae, Path(ckpt).name)

    if out.is_file():
        say(proc, f"{out} existed and is replaced")
    if proc.is_main:
        write(out, stores, model, args.num_samples)
    if model.is_latent and vae is None:
        say(proc, f"arr_0 are latents divided by {model.spec['scale']}; "
                  "--decode stabilityai/sd-vae-ft-ema (for DiT) makes images of them")
    chosen = sampling.describe_labels(model.spec, model.options)
    say(proc, f"{out}: {args.num_samples} samples of {' and '.join(ckpts)}{chosen}")
    if was_finished and is_folder(args.out):
        say(proc, "it was finished already; to sample again, delete it or give another --out")


if __name__ == "__main__":
    cli.run_script(main, parser().parse_args())
