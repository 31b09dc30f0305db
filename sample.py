"""Samples from any checkpoint, as it was trained to be sampled.

    python sample.py --ckpt runs/issd/last.pt                              40 samples -> samples.png
    python sample.py --compare A.pt B.pt                                   two models on the same noise, one below the other
    python sample.py --ckpt X.pt --solver plms --nfe 20                    another solver; --nfe are evaluations of the network
    python sample.py --ckpt X.pt --num-samples 2000 --out samples.npz      arr_0 uint8 NHWC, arr_1 labels, as ADM's evaluator reads them
    torchrun --nproc_per_node 8 sample.py --ckpt X.pt --num-samples 50000 --out samples.npz

    python sample.py --ckpt X.pt --decode stabilityai/sd-vae-ft-ema        a latent model's images (pip install diffusers transformers)
    python sample.py --ckpt X.pt --prompts PROMPTS --decode VAE            a text model's; PROMPTS is made by python data.py encode

Steps, grid and guidance come from the checkpoint; upstream DiT weights need --model. Without --decode a latent model gives latents
(float32 NCHW, divided by their scale).
"""
import os
from contextlib import suppress
from pathlib import Path

import numpy as np

import checkpoints
import data
import encode
import runtime
from runtime import Processes, UserError, say
from solvers import SOLVERS


def main(args):
    proc, out = Processes(args.amp), Path(args.out)
    runtime.check_positive(args, "num_samples")
    if out.suffix not in (".png", ".npz"):
        raise UserError(f"--out {out}: must end in .png (a grid) or .npz (arrays)")
    if args.compare and out.suffix != ".png":
        raise UserError("--compare draws a grid: give --out a name ending in .png")
    place = next(p for p in (out, *out.absolute().parents) if p.exists())
    if out.is_dir() or not os.access(place, os.W_OK) or not (out.exists() or place.is_dir()):  # before hours of work
        raise UserError(f"--out {out}: cannot write there; choose another place")
    blocks, shape, vae, prompts = [], None, None, None
    if args.prompts:
        try:
            prompts, null = data.load_prompts(args.prompts)
        except (OSError, ValueError, EOFError) as e:
            raise UserError(f"--prompts {args.prompts}: cannot be read ({e}); make it with python data.py encode --prompts")
    ckpts = args.compare or [args.ckpt]
    for ckpt in ckpts:
        net, info = checkpoints.load_model(ckpt, args.model, args.image_size)
        shape = shape or net.sample_shape
        if net.sample_shape != shape:
            raise UserError(f"--compare {' '.join(ckpts)}: the first makes {shape}, the second {net.sample_shape}; only samples of one shape can be compared")
        labels, latent = info["classes"] if prompts is None else len(prompts), info["scale"] is not None
        if args.label is not None and not 0 <= args.label < labels:
            raise UserError(f"--label {args.label}: must lie between 0 and {labels - 1}")
        if latent and out.suffix == ".png" and not args.decode:
            raise UserError("this model makes latents, not images: name its autoencoder with --decode (stabilityai/sd-vae-ft-ema for DiT), "
                            "or give --out a name ending in .npz")
        if args.solver == "fused" and not 0 <= (args.lam if args.lam is not None else -1) <= 1:
            raise UserError("--solver fused fuses the features of neighbouring steps: give their weight with --lam, between 0 and 1")
        if args.cfg is not None and not np.isfinite(args.cfg):
            raise UserError(f"--cfg {args.cfg}: must be a number")
        if args.decode and not latent:
            raise UserError("--decode: this model makes images itself; leave it out")
        vae = vae or (encode.load_vae(proc, args.decode, "--decode") if args.decode else None)
        if prompts is not None and info["null"] is None:
            info["null"] = null
        if info["only_node"] is not None and args.elsewhere:
            other, other_info = checkpoints.load_model(args.elsewhere, args.model, args.image_size)
            if any(other_info[k] != info[k] for k in ("arch", "prediction", "schedule")) or other_info["only_node"] is not None:
                raise UserError(f"--elsewhere {args.elsewhere}: is not the base model of {ckpt}")
            info["elsewhere"] = proc.mixed(proc.frozen(other))
        info["lam"] = args.lam
        denoise = proc.mixed(proc.frozen(net))
        finish = lambda x: data.to_uint8(x) if not latent else encode.decode_images(vae, x / info["scale"]) if vae else x / info["scale"]
        chunks = data.sample_chunks(denoise, info, proc, args.num_samples, args.seed, args.nfe, args.cfg, args.solver, args.label,
                                    prompts=prompts, desc=Path(ckpt).name)
        parts = [(i, finish(x).cpu().numpy(), y.cpu().numpy()) for i, x, y in chunks]
        blocks.append((proc.gather([(i, x) for i, x, _ in parts]), proc.gather([(i, y) for i, _, y in parts])))
    if proc.main:
        (x, y), raw = blocks[0], latent and not vae
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            if out.suffix == ".png":
                data.save_grid([x for x, _ in blocks], out)
            else:
                with open(out.with_suffix(".tmp"), "wb") as f:
                    np.savez(f, x if raw else x.transpose(0, 2, 3, 1), y)
                os.replace(out.with_suffix(".tmp"), out)
        except OSError as e:
            with suppress(OSError):
                out.with_suffix(".tmp").unlink()
            raise UserError(f"--out {out}: cannot write ({e.strerror or e}); choose another place")
        if raw:
            say(proc, f"arr_0 are latents divided by {info['scale']}; --decode stabilityai/sd-vae-ft-ema (for DiT) makes images of them")
        say(proc, f"{out}: {args.num_samples} samples of {' and '.join(ckpts)}")


def parser():
    p = runtime.Parser(prog="sample.py", description=__doc__, formatter_class=runtime.Raw)
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--ckpt", help="a checkpoint's path or URL, ours or upstream's")
    which.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two checkpoints, on the same noise: B is drawn below A")
    p.add_argument("--model", help="DiT-XL/2, ...: for files that do not say what they are")
    p.add_argument("--image-size", type=int, choices=[256, 512])
    p.add_argument("--num-samples", type=int, default=40)
    p.add_argument("--nfe", type=int, help="evaluations of the network, as the solver counts them; default: as trained, else 50")
    p.add_argument("--cfg", type=float, help="guidance (1: none); default: as trained")
    p.add_argument("--solver", choices=SOLVERS, help="default: as trained")
    p.add_argument("--lam", type=float, help="of --solver fused: Eq. 6 of the SSD paper while sampling (Fig. 4c)")
    p.add_argument("--elsewhere", help="for a student of one step (--only-step): the base model, which makes all other steps")
    p.add_argument("--label", type=int, help="one class, or one of the prompts; default: all in turn")
    p.add_argument("--prompts", help="for a model conditioned on text: a folder made by python data.py encode --prompts")
    p.add_argument("--decode", help="the autoencoder that makes images of latents: a folder, or a name on huggingface.co")
    p.add_argument("--seed", type=runtime.seed, default=0)
    p.add_argument("--amp", choices=["auto", "bf16", "off"], default="auto")
    p.add_argument("--out", default="samples.png")
    return p


if __name__ == "__main__":
    runtime.run(main, parser().parse_args())
