"""Labelled, enlarged samples of several checkpoints from the same noise: one row per checkpoint.

    python -m experiments.pictures --out assets/issd_digits.png \\
        --row "base model, 10 steps" runs/teacher-digits/last.pt 10 \\
        --row "after iSSD, 10 steps" runs/issd/last.pt 10 \\
        --row "base model, 50 steps" runs/teacher-digits/last.pt 50

    python -m experiments.pictures --out assets/pd_digits.png \\
        --row "base model, 2 steps" runs/teacher-digits-v/last.pt 2 \\
        --row "after distillation, 2 steps" runs/ddil/last.pt 2 \\
        --row "base model, 16 steps" runs/teacher-digits-v/last.pt 16

    python -m experiments.pictures --out assets/kd_digits.png \\
        --row "teacher, 19 evaluations" runs/teacher-digits-edm/last.pt 19 \\
        --row "student by KD, 19 evaluations" runs/kd/last.pt 19

After python issd.py, python ddil.py and python kd.py. Labels are taken in turn: a row shows the
classes 0, 1, 2, ... Where a student keeps its own nodes, the base model is sampled on the same
nodes with the same thresholding, if it takes as many steps. ddil.py compares them in the same way.
"""
import argparse
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import fid
from kit import checkpoints, cli, sampling
from kit.processes import Processes

TEXT = 17    # height of the labels' letters, in pixels
GAP = 3      # between images
BAND = 10    # between rows
INK = 0      # grey levels
PAPER = 255
FRAME = 110


@dataclass
class Row:
    """A row of the picture: `nfe` evaluations of the checkpoint `ckpt`."""

    label: str
    ckpt: str
    nfe: int


def sample_rows(rows, num, seed, proc, cfg=None):
    """-> per Row the images (num, C, H, W) uint8, from the same noise and labels.

    cfg: the scale of guidance, None: as each checkpoint was trained. Raises UserError.
    """
    loaded = [checkpoints.load_model(row.ckpt) for row in rows]
    own = {}  # nodes and thresholding of the students that keep their nodes, by number of steps
    for _, spec in loaded:
        if isinstance(spec["grid"], list):
            own[spec["nfe"]] = {"grid": spec["grid"], "threshold": spec["threshold"]}

    pictures = []
    for row, (net, spec) in zip(rows, loaded):
        if not isinstance(spec["grid"], list):
            spec = {**spec, **own.get(row.nfe, {})}
        net = proc.autocast(proc.frozen(net))
        options = sampling.SampleOptions(seed=seed, nfe=row.nfe, cfg=cfg)
        images, _ = sampling.sample_images(net, spec, proc, num, options, row.label)
        pictures.append(images)
    return pictures


def draw(labels, pictures, path, zoom, columns=10):
    """Write a PNG: per label one row of images, which takes as many lines as it needs.

    pictures: per label (n, C, H, W) uint8 with 1 or 3 channels. zoom: by how much height and width
    grow (bicubic). The part of a label after its comma stands on a line of its own.
    """
    font = ImageFont.load_default(TEXT)  # with a size: Pillow 10.1 or newer
    texts = [label.replace(", ", "\n") for label in labels]
    boxes = [ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font)
             for text in texts]
    left = 2 * BAND + max(int(box[2]) for box in boxes)

    bands = [tile(images, zoom, columns) for images in pictures]
    width = left + max(band.width for band in bands)
    height = sum(band.height for band in bands) + BAND * (len(bands) - 1)
    image = Image.new("RGB", (width, height), (PAPER,) * 3)
    pen, top = ImageDraw.Draw(image), 0
    for text, box, band in zip(texts, boxes, bands):
        pen.multiline_text((BAND, top + (band.height - box[3]) // 2), text, (INK,) * 3, font)
        image.paste(band, (left, top))
        top += band.height + BAND

    if all(images.shape[1] == 1 for images in pictures):
        image = image.convert("L")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.save(path, optimize=True)


def tile(images, zoom, columns):
    """(n, C, H, W) uint8 -> an RGB image: the images, enlarged, in lines, with gaps between."""
    size = zoom * images.shape[-1]
    lines = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (size + GAP) + GAP, lines * (size + GAP) + GAP),
                      (FRAME,) * 3)
    for i, pixels in enumerate(images.transpose(0, 2, 3, 1)):
        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        image = image.resize((size, size), Image.Resampling.BICUBIC)
        line, column = divmod(i, columns)
        sheet.paste(image, (GAP + column * (size + GAP), GAP + line * (size + GAP)))
    return sheet


def default_zoom(images):
    """Images of 8 or 28 pixels become 72 or 84 wide."""
    return max(1, round(72 / images.shape[-1]))


def main(args):
    rows = []
    for label, ckpt, nfe in args.row:
        if not nfe.isdigit() or int(nfe) < 1:
            raise cli.UserError(f"--row {label!r} {ckpt} {nfe}: the last must be a number of "
                                "evaluations")
        rows.append(Row(label, ckpt, int(nfe)))
    pictures = sample_rows(rows, args.num_samples, args.seed, Processes("off"), args.cfg)
    zoom = args.zoom or default_zoom(pictures[0])
    draw([row.label for row in rows], pictures, args.out, zoom, args.columns)
    print(f"drawn: {args.out}")


def parser():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--row", nargs=3, action="append", required=True,
                   metavar=("LABEL", "CKPT", "NFE"), help="once per row, in the order from the top")
    p.add_argument("--num-samples", type=int, default=10, help="per row")
    p.add_argument("--columns", type=int, default=10)
    p.add_argument("--zoom", type=int, help="default: 9 for images of 8x8 pixels, 3 for 28x28")
    p.add_argument("--cfg", type=float, help="guidance (1: none); default: as trained")
    p.add_argument("--seed", type=fid.seed, default=0)
    p.add_argument("--out", required=True, help="the PNG")
    return p


if __name__ == "__main__":
    cli.run_script(main, parser().parse_args())
