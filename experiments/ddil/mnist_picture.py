"""28x28 digits in two steps and in one: before and after progressive distillation.

    python train.py --data mnist --model DiT-XS/4 --prediction x0 --schedule cosine --steps 5000 \\
        --batch-size 32 --lr 3e-3 --warmup 100 --decay cosine --ema 0.995 --clip 1 --label-std 1 \\
        --out runs/mnist
    python ddil.py --ckpt runs/mnist/last.pt --data mnist --dagger 0 0 --lr 1e-3 --batch-size 32 \\
        --cfg 1.5 --stages w:200 16:100 8:100 4:100 2:100 --out runs/mnist-pd
    python -m experiments.ddil.mnist_picture

draws assets/mnist_pd.png. On one CPU core train.py takes 10 to 20 minutes and ddil.py four. No
quality is measured. --dagger 0 0: plain progressive distillation. The stage w:200 makes the scale
of guidance an input of the student: it then needs one evaluation per step, where the guided base
model needs two.

--data mnist is fetched by torchvision (60,000 images). The picture in assets/ was made with 5,000
of them, 500 per class. --data FILE.npz takes images of your own: arr_0 uint8 (N, 28, 28, 1),
arr_1 labels.
"""
import argparse
from pathlib import Path

import fid
from experiments.pictures import Row, default_zoom, draw, sample_rows
from kit import cli
from kit.processes import Processes


def main(args):
    teacher = str(Path(args.teacher) / "last.pt")
    two, one = str(Path(args.students) / "nfe2.pt"), str(Path(args.students) / "last.pt")
    rows = [Row("base model, 2 steps", teacher, 2), Row("after distillation, 2 steps", two, 2),
            Row("base model, 1 step", teacher, 1), Row("after distillation, 1 step", one, 1),
            Row("base model, 50 steps", teacher, 50)]
    pictures = sample_rows(rows, args.num_samples, args.seed, Processes("off"), args.cfg)
    labels = [row.label for row in rows]
    draw(labels, pictures, args.out, default_zoom(pictures[0]), args.columns)
    print(f"drawn: {args.out}")


def parser():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--teacher", default="runs/mnist", help="the folder of train.py")
    p.add_argument("--students", default="runs/mnist-pd", help="the folder of ddil.py")
    p.add_argument("--num-samples", type=int, default=10, help="per row")
    p.add_argument("--columns", type=int, default=10)
    p.add_argument("--cfg", type=float, default=1.5, help="guidance of all rows (1: none)")
    p.add_argument("--seed", type=fid.seed, default=0)
    p.add_argument("--out", default="assets/mnist_pd.png")
    return p


if __name__ == "__main__":
    cli.run_script(main, parser().parse_args())
