"""Samples from any checkpoint, as it was trained to be sampled.

    python sample.py --ckpt runs/issd/last.pt                              40 samples -> samples.png
    python sample.py --ckpt A.pt --compare B.pt                            two models on the same noise, one below the other
    python sample.py --ckpt X.pt --num-samples 2000 --out samples.npz              arr_0 uint8 NHWC, arr_1 labels, as ADM's evaluator reads them
    torchrun --nproc_per_node 8 sample.py --ckpt X.pt --num-samples 50000 --out samples.npz

Steps, grid and guidance come from the checkpoint; upstream DiT weights need --model. A latent model gives latents
(float32 NCHW, divided by their scale), for a decoder to turn into images.
"""
import os
from pathlib import Path

import numpy as np
import torch

import checkpoints
import data
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
    blocks = []
    for ckpt in [args.ckpt] + ([args.compare] if args.compare else []):
        net, info = checkpoints.load_model(ckpt, args.model, args.image_size)
        if args.label is not None and not 0 <= args.label < info["classes"]:
            raise UserError(f"--label {args.label}: must lie between 0 and {info['classes'] - 1}")
        if info["scale"] is not None and out.suffix == ".png":
            raise UserError("this model makes latents, not images: give --out a name ending in .npz, and decode them with the model's autoencoder")
        denoise = proc.mixed(proc.frozen(net))
        parts = list(data.sample_chunks(denoise, info, proc, args.num_samples, args.seed, args.nfe, args.cfg, args.solver, args.label, desc=Path(ckpt).name))
        blocks.append((proc.gather([(i, x.cpu().numpy()) for i, x, _ in parts]), proc.gather([(i, y.cpu().numpy()) for i, _, y in parts])))
    if proc.main:
        x, y = blocks[0]
        arrays = (data.to_uint8(torch.from_numpy(x)).numpy().transpose(0, 2, 3, 1), y) if info["scale"] is None else (x / info["scale"], y)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            if out.suffix == ".png":
                data.save_grid([data.to_uint8(torch.from_numpy(x)) for x, _ in blocks], out)
            else:
                with open(out.with_suffix(".tmp"), "wb") as f:
                    np.savez(f, *arrays)
                os.replace(out.with_suffix(".tmp"), out)
        except OSError as e:
            raise UserError(f"--out {out}: cannot write ({e.strerror or e}); choose another place")
        if info["scale"] is not None:
            say(proc, f"arr_0 are latents divided by {info['scale']}, as the autoencoder's decoder takes them (stabilityai/sd-vae-ft-ema for DiT)")
        say(proc, f"{out}: {args.num_samples} samples of {' and '.join([args.ckpt] + ([args.compare] if args.compare else []))}")


def parser():
    p = runtime.Parser(prog="sample.py", description=__doc__, formatter_class=runtime.Raw)
    p.add_argument("--ckpt", required=True)
    p.add_argument("--compare", help="a second checkpoint, drawn below the first")
    p.add_argument("--model", help="DiT-XL/2, ...: for files that do not say what they are")
    p.add_argument("--image-size", type=int, choices=[256, 512])
    p.add_argument("--num-samples", type=int, default=40)
    p.add_argument("--nfe", type=int, help="steps; default: as trained, else 50")
    p.add_argument("--cfg", type=float, help="guidance (1: none); default: as trained")
    p.add_argument("--solver", choices=SOLVERS, help="default: as trained")
    p.add_argument("--label", type=int, help="one class; default: all in turn")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--amp", choices=["auto", "bf16", "off"], default="auto")
    p.add_argument("--out", default="samples.png")
    return p


if __name__ == "__main__":
    runtime.run(main, parser().parse_args())
