"""Samples from any checkpoint, as it was trained to be sampled: a picture, or arrays in an .npz.

examples:
  python sample.py --ckpt runs/issd/last.pt
      40 samples -> samples.png
  python sample.py --compare A.pt B.pt
      two models on the same noise, one below the other
  python sample.py --ckpt X.pt --solver plms --nfe 20
      another solver; --nfe are evaluations of the network
  python sample.py --ckpt X.pt --num-samples 2000 --out samples.npz
      arr_0 uint8 NHWC, arr_1 labels, as ADM's evaluator reads them
  torchrun --nproc_per_node 8 sample.py --ckpt X.pt --num-samples 50000 --out samples.npz
      the same samples, made by eight processes
  python sample.py --ckpt X.pt --decode stabilityai/sd-vae-ft-ema
      images of a latent model (pip install diffusers transformers)
  python sample.py --ckpt X.pt --prompts PROMPTS --decode VAE
      images of a text model; python -m kit.encode makes PROMPTS

Steps, grid and guidance come from the checkpoint. Upstream's DiT weights need --model.
Without --decode a latent model gives latents: float32 NCHW, divided by their scale.
"""
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np

from kit import checkpoints, cli
from kit.cli import UserError, say
from kit.data import load_prompts, to_uint8
from kit.encode import decode_images, load_vae
from kit.processes import Processes
from kit.sampling import SampleOptions, sample_chunks, save_grid
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
    group.add_argument("--base", metavar="PATH",
                       help="for a student of one step (--only-step): the base model, which makes "
                            "all other steps")

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
                       help="one class, or one of the prompts (default: all in turn)")
    group.add_argument("--prompts", metavar="FOLDER",
                       help="for a model conditioned on text: a folder made by "
                            "python -m kit.encode --prompts")
    group.add_argument("--seed", type=cli.seed, default=0,
                       help="sample i depends on (seed, i) alone (default: 0)")

    group = p.add_argument_group("what is written")
    group.add_argument("--out", default="samples.png", help="a grid (.png) or arrays (.npz)")
    group.add_argument("--decode", metavar="VAE",
                       help="the autoencoder that makes images of latents: a folder, or a name on "
                            "huggingface.co")
    group.add_argument("--amp", choices=["auto", "bf16", "off"], default="auto",
                       help="autocast of network calls; auto: bf16 on a GPU")
    return p


def check_flags(args):
    """What can be said before a file is read. Raises UserError."""
    cli.check_positive(args, "num_samples")
    cli.check_cfg(args.cfg)
    if args.solver == "fused" and (args.lam is None or not 0 <= args.lam <= 1):
        raise UserError("--solver fused fuses the features of neighbouring steps: give their "
                        "weight with --lam, between 0 and 1")
    if args.solver != "fused" and args.lam is not None:
        raise UserError("--lam is the weight of --solver fused; leave it out")
    check_out(Path(args.out), args.compare)


def check_out(out, compare):
    """Can this file be written? It is better to know before hours of work."""
    if out.suffix not in (".png", ".npz"):
        raise UserError(f"--out {out}: must end in .png (a grid) or .npz (arrays)")
    if compare and out.suffix != ".png":
        raise UserError("--compare draws a grid: give --out a name ending in .png")
    existing = next(p for p in (out, *out.absolute().parents) if p.exists())
    is_file = out.exists() and not out.is_dir()
    is_new = not out.exists() and existing.is_dir()
    if not (is_file or is_new) or not os.access(existing, os.W_OK):
        raise UserError(f"--out {out}: cannot write there; choose another place")


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

    net: Any             # net(x, t, y)
    spec: dict
    shape: tuple         # of a sample: (C, H, W)
    base: Optional[Any]  # the network of all other steps, for a student of one step

    @property
    def is_latent(self):
        return self.spec["scale"] is not None


def open_model(ckpt, args, proc, prompts, null):
    """Load the checkpoint; raises UserError where the flags do not go with it."""
    net, spec = checkpoints.load_model(ckpt, args.model, args.image_size)
    labels = spec["classes"] if prompts is None else len(prompts)
    if args.label is not None and not labels:
        raise UserError(f"--label {args.label}: this model has no classes; leave it out")
    if args.label is not None and not 0 <= args.label < labels:
        raise UserError(f"--label {args.label}: must lie between 0 and {labels - 1}")
    is_latent = spec["scale"] is not None
    if is_latent and Path(args.out).suffix == ".png" and not args.decode:
        raise UserError("this model makes latents, not images: name its autoencoder with --decode "
                        "(stabilityai/sd-vae-ft-ema for DiT), or give --out a name ending in .npz")
    if args.decode and not is_latent:
        raise UserError("--decode: this model makes images itself; leave it out")
    if prompts is not None and spec["null"] is None:
        spec["null"] = null
    base = None
    if args.base and spec["only_node"] is not None:
        base = open_base(ckpt, spec, args, proc)
    elif args.base and not args.compare:
        raise UserError(f"--base {args.base}: {ckpt} makes all steps itself; leave it out")
    return Model(proc.autocast(proc.frozen(net)), spec, net.sample_shape, base)


def open_base(ckpt, spec, args, proc):
    """The network of --base, for a student of one step. Raises UserError."""
    net, base_spec = checkpoints.load_model(args.base, args.model, args.image_size)
    differs = any(base_spec[key] != spec[key] for key in ("arch", "prediction", "schedule"))
    if differs or base_spec["only_node"] is not None:
        raise UserError(f"--base {args.base}: is not the base model of {ckpt}")
    return proc.autocast(proc.frozen(net))


# ---- Samples -----------------------------------------------------------------------------------


@dataclass
class Drawn:
    """What is written: all samples of a model, numpy arrays."""

    samples: Any  # images (N, C, H, W) uint8, or latents (N, C, H, W) float32
    labels: Any   # (N,)


def draw(model, args, proc, prompts, vae, name):
    """Sample a model on all ranks; every rank gets all of it."""
    options = SampleOptions(seed=args.seed, nfe=args.nfe, cfg=args.cfg, solver=args.solver,
                            label=args.label, prompts=prompts, base=model.base, lam=args.lam)
    samples = []
    labels = []
    for first, x, y in sample_chunks(model.net, model.spec, proc, args.num_samples, options,
                                     desc=name):
        if not model.is_latent:
            x = to_uint8(x)
        else:
            x = x / model.spec["scale"]
            if vae is not None:
                x = decode_images(vae, x)
        samples.append((first, x.cpu().numpy()))
        labels.append((first, y.cpu().numpy()))
    return Drawn(proc.gather(samples), proc.gather(labels))


def write(out, drawn, is_raw):
    """Write a grid of every model's samples, or the arrays of one. Raises UserError.

    is_raw: the samples are latents, which keep their order of axes, not images.
    """
    temporary = out.with_suffix(".tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".png":
            save_grid([one.samples for one in drawn], out)
            return
        samples = drawn[0].samples
        if not is_raw:
            samples = samples.transpose(0, 2, 3, 1)
        with open(temporary, "wb") as f:
            np.savez(f, samples, drawn[0].labels)
        os.replace(temporary, out)
    except OSError as e:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"--out {out}: cannot write ({e.strerror or e}); choose another place")


def main(args):
    proc = Processes(args.amp)
    check_flags(args)
    prompts, null = read_prompts(args.prompts)
    ckpts = args.compare or [args.ckpt]

    drawn = []
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
        drawn.append(draw(model, args, proc, prompts, vae, Path(ckpt).name))

    is_raw = model.is_latent and vae is None
    if proc.is_main:
        write(Path(args.out), drawn, is_raw)
    if is_raw:
        say(proc, f"arr_0 are latents divided by {model.spec['scale']}; "
                  "--decode stabilityai/sd-vae-ft-ema (for DiT) makes images of them")
    say(proc, f"{args.out}: {args.num_samples} samples of {' and '.join(ckpts)}")


if __name__ == "__main__":
    cli.run_script(main, parser().parse_args())
