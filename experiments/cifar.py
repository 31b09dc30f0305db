"""CIFAR-10 on one GPU, in stages of at most 8 minutes that the same command continues: KD as in its paper, and all methods on one DiT.

    python experiments/cifar.py pack --data FOLDER                                    upstream's batches -> cifar10-packed.npz, 44 MiB
    python experiments/cifar.py kd --data cifar10-packed.npz --features resnet50.pth  teacher, KD and score matching on the way, guided KD
    python experiments/cifar.py ladder --data ...                                     DiT teacher, then iSSD, SSD, PD and DSD at 10 steps
    python experiments/cifar.py kd --data ... --tiny                                  the same jobs shrunk, minutes on a CPU: proves that it works, says nothing else

--data: cifar10 (torchvision fetches it), a folder of upstream's batches, or the packed copy. That one is lossy: all 50,000 images are there, but every value is rounded
to one of 44 levels, which is off by 1.5 on average and never by more than 3 (of 255); without rounding WebP would need 79 MiB. It shifts the training data and
the reference alike, and so all rows of a table; rows of different data are never in one table.

The metric is FD-ResNet50: the Frechet distance of the 2,048 features of an ImageNet ResNet-50, 5,000 samples against all 50,000 training images, as many as in the paper's FID-5K.
It is not FID and compares with no published number. --features: a file with Keras's weights, torchvision-resnet50 (fetched), or none, which measures nothing yet.
Features at 32x32 enlarged to 224x224; 5,000 samples bias the distance upwards, all rows alike.

Networks are so small that a checkpoint with averages and Adam's moments stays under 16 MiB: DDPM++-20 (0.87M parameters, 13.2 MiB) teaches DDPM++-12 (0.31M),
and a DiT-XS/2 (0.92M, 14.0 MiB) itself. One seed, bf16, learning rates as on the digits or in the papers, not tuned here. Steps are counted for 10 a second of the U-Nets and 20 of
the DiT, which is a guess: kd then takes four stages, ladder two. When the time is up the running job is stopped as by SIGTERM and saved; a measurement that has begun is finished.

Writes OUT/kd/{results.jsonl, samples.npz, samples.png, JOB/last.pt}; OUT/cache (data, reference) can be made again.
"""
import argparse
import importlib
import io
import json
import os
import signal
import sys
import time
import warnings
from collections import namedtuple
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import checkpoints, data, features, fid, models, runtime, train
from runtime import Processes, UserError

# rows: (evaluations of the network, guidance, file); after: the job of fewer steps that this one goes on from
Job = namedtuple("Job", "name command steps rows after", defaults=[None])
POINTS = [400, 800, 1600, 3200]


def kd(few):
    """The KD paper: students with and without its loss over training, and its guided student, which takes half the evaluations."""
    rows = lambda *rows: [(nfe, cfg, "last.pt") for nfe, cfg in rows]
    own, last = f"--batch-size {few(512)} --warmup {few(200)} --save-every 1000", POINTS[-1]
    student = f"kd --ckpt OUT/teacher/last.pt --student DDPM++-12 --eval-samples 0 {own}"
    at_end = rows((35, 1.0), (19, 1.0), (9, 1.0), (19, 1.5))
    jobs = [Job("teacher", f"train --model DDPM++-20 --ema 0.999 --decay cosine {own}", few(5000), at_end)]
    for name, loss in (("kd", ""), ("dsm", " --alpha 1")):
        for before, steps in zip([None] + POINTS, POINTS):
            jobs.append(Job(f"{name}-{steps}", student + loss, few(steps), at_end if steps == last else rows((19, 1.0)), before and f"{name}-{before}"))
    return jobs + [Job("kd-guided", student + " --w 1 4", few(last), rows((19, 1.0), (19, 1.5), (19, 3.0)))]


def ladder(few):
    """A class-conditional DiT and what the other methods make of it."""
    rows = lambda file, *nfes: [(nfe, cfg, file) for nfe in nfes for cfg in (1.0, 1.5)]
    B, more = few(256), "--eval-samples 0 --save-every 1000"
    base = f"--ckpt OUT/teacher/last.pt --batch-size {B} {more}"
    halvings = f"40:{few(300)} 20:{few(300)} 10:{few(300)}"
    return [Job("teacher", f"train --model DiT-XS/2 --batch-size {B} --lr 1e-3 --warmup {few(500)} --decay cosine --ema 0.999 --clip 1 --label-std 1 --save-every 1000", few(10_000),
                rows("last.pt", 5, 10, 50)),
            Job("continued", f"train --ckpt OUT/teacher/last.pt --batch-size {B} --lr 5e-5 --warmup 0 --decay constant --ema 0 --clip 0", few(300), rows("last.pt", 10)),
            Job("issd", f"issd {base} --nfe 10 --lam 0.1 --lr 5e-5", few(300), rows("last.pt", 10)),
            Job("ssd", f"ssd {base} --nfe 10 --lam 0.1 --lr 1e-4", few(300), rows("last.pt", 10)),
            Job("pd", f"ddil {base} --stages {halvings} --dagger 0 0 --grid dit --lr 1e-4", None, rows("nfe10.pt", 10) + rows("nfe5.pt", 5)),
            Job("dsd", f"dsd {base} --variant dsdgl --depth 16 --w 1 1 --ema 0.9 --lr 1e-5", max(few(512), 64), rows("last.pt", 5, 10))]  # 64: a trajectory of every depth


# ---- Data ---------------------------------------------------------------------------------------------

SHEET, LEVELS = 500, 44  # images in a column of one WebP; values of a pixel


def read(source):
    """cifar10, a folder of upstream's batches (binary or Python's), or a packed copy -> images (N, 32, 32, 3) uint8, labels (N,)."""
    folder = Path(source)
    if batches := sorted(folder.glob("data_batch_*.bin")):
        rows = np.concatenate([np.fromfile(f, np.uint8).reshape(-1, 3073) for f in batches])
        return rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0]
    if (folder / "cifar-10-batches-py").is_dir():
        import torchvision
        raw = torchvision.datasets.CIFAR10(folder, train=True)
        return raw.data, np.array(raw.targets)
    if source == "cifar10":
        raw = data.load(source)
        return raw.x.permute(0, 2, 3, 1).numpy(), raw.y.numpy()
    try:
        with np.load(source) as f:
            sheets = [np.array(Image.open(io.BytesIO(f[f"sheet{i}"]))) for i in range(len(f.files) - 1)]
            x = np.concatenate(sheets).reshape(-1, 32, 32, 3)
            return np.round(np.arange(LEVELS) * 255 / (LEVELS - 1)).astype(np.uint8)[x], f["labels"]
    except Exception as e:
        raise UserError(f"--data {source}: neither cifar10, nor a folder with data_batch_*.bin or cifar-10-batches-py, nor a packed copy ({str(e)[:100]})")


def pack(args):
    x, y = read(args.data)
    small = np.round(x * ((LEVELS - 1) / 255)).astype(np.uint8)
    sheets = {}
    for i in range(0, len(x), SHEET):
        Image.fromarray(small[i:i + SHEET].reshape(-1, 32, 3)).save(held := io.BytesIO(), "WEBP", lossless=True, quality=50, method=6)
        sheets[f"sheet{len(sheets)}"] = np.frombuffer(held.getvalue(), np.uint8)
    np.savez(args.packed, labels=y.astype(np.uint8), **sheets)
    off = np.abs(read(args.packed)[0].astype(int) - x)
    print(f"{args.packed}: {len(x):,} images, {Path(args.packed).stat().st_size / 2 ** 20:.1f} MiB; values are off by {off.mean():.2f} on average, {off.max()} at most")


# ---- Stages -------------------------------------------------------------------------------------------


class Stage:
    """What is done stands in results.jsonl: [[job], its command] and [[job, evaluations, guidance, file, network, samples, reference], numbers]."""

    def __init__(self, args):
        self.end, self.args, self.proc = time.monotonic() + 60 * args.minutes, args, Processes()
        self.folder, cache = Path(args.out) / args.what, Path(args.out) / "cache"
        self.folder.mkdir(parents=True, exist_ok=True), cache.mkdir(exist_ok=True)
        self.jobs = {"kd": kd, "ladder": ladder}[args.what]((lambda n: -(-n // 100)) if args.tiny else (lambda n: n))
        self.lines = self.folder / "results.jsonl"
        self.known = {json.dumps(key): value for key, value in map(json.loads, self.lines.read_text().splitlines())} if self.lines.exists() else {}
        self.data = cache / f"{Path(args.data).stem}{'-tiny' * args.tiny}.npz"
        if not self.data.exists():
            x, y = (v[:64] if args.tiny else v for v in read(args.data))
            np.savez(cache / "part.npz", arr_0=x, arr_1=y.astype(np.int64))
            os.replace(cache / "part.npz", self.data)
        self.net = None
        if args.features != "none":
            self.net = features.load_features(args.features, device=self.proc.device)
            kept = cache / f"{self.data.stem}-{self.net.name}.npz"
            if not kept.exists():
                fid.main(fid.parser().parse_args(["ref", str(self.data), "--features", args.features, "--out", str(kept)]))
            self.reference = fid.open_statistics(np.load(kept), str(kept), None)
            self.measure_of = [self.net.name, args.samples, self.reference["count"]]

    def get(self, *key):
        return self.known.get(json.dumps(key))

    def keep(self, value, *key):
        with open(self.lines, "a") as f:
            f.write(json.dumps([key, value]) + "\n")
        self.known[json.dumps(key)] = value

    def work(self):
        """Do what is not done yet, in order, until the time is up. -> is it all done?"""
        for job in self.jobs:
            command = job.command.replace("OUT", str(self.folder)) + f" --steps {job.steps}" * bool(job.steps) + f" --data {self.data}" * (not job.command.startswith("dsd"))
            if self.get(job.name) not in (None, command):
                raise UserError(f"{self.folder}: {job.name} was made by another command ({self.get(job.name)}); choose another --out")
            if not self.get(job.name):
                if time.monotonic() > self.end or not self.train(job, command):
                    return False
                self.keep(command, job.name)
            for row in job.rows if self.net else ():
                if not self.get(job.name, *row, *self.measure_of):
                    if time.monotonic() > self.end:
                        return False
                    self.measure(job, row)
        return True

    def train(self, job, command):
        """Run one of our scripts, in this process; when the time is up it is asked to stop, as SIGTERM asks it. -> is it done?"""
        out, end = self.folder / job.name, lambda *_: sys.exit(143)
        if job.after and not (out / "last.pt").exists():  # goes on where the job of fewer steps ended: the same as one run, since the learning rate is constant
            state = checkpoints.read_file(self.folder / job.after / "last.pt")
            pool = min(train.POOL, job.steps * state["args"]["batch_size"])
            out.mkdir(exist_ok=True)
            runtime.save(argparse.Namespace(**{**state["args"], "steps": job.steps, "pool": pool, "out": str(out)}), self.proc, state)
        script, *words = command.split()
        print(f"{job.name}: python {script}.py {' '.join(words)} --out {out}", flush=True)
        before = {s: signal.signal(s, end) for s in (signal.SIGTERM, signal.SIGINT)}  # for the time in which the script does not listen itself
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        signal.setitimer(signal.ITIMER_REAL, max(self.end - time.monotonic(), 0.01))
        try:
            script = importlib.import_module(script)
            script.main(script.parser().parse_args([*words, "--out", str(out)]))
            return True
        except SystemExit as e:
            if e.code != 143:
                raise
            return False
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            [signal.signal(s, handler) for s, handler in before.items()]

    def measure(self, job, row):
        """Keep FD-ResNet50, precision, recall and GFLOPs a sample of a row (evaluations, guidance, file), and 20 images."""
        nfe, cfg, file = row
        model, info = checkpoints.load_model(self.folder / job.name / file)
        cost = nfe * models.count(info["arch"])[1] * (1 if cfg == 1 or info["arch"].get("guidance") else 2)
        x, y = data.sample_images(self.proc.mixed(self.proc.frozen(model)), info, self.proc, self.args.samples, 1, nfe, cfg, desc=job.name)
        images = features.in_slices(job.name, x.transpose(0, 2, 3, 1), y)
        numbers = fid.distances(fid.measure(images, self.net, self.proc, 64 if self.proc.device.type == "cuda" else 8), self.reference, self.net, self.proc.device)
        np.savez(self.folder / "part.npz", **{**self.pictures(), json.dumps([job.name, *row]): x[:20]})
        os.replace(self.folder / "part.npz", self.folder / "samples.npz")
        self.keep({**numbers, "gflop": cost / 1e9}, job.name, *row, *self.measure_of)

    def pictures(self):
        return dict(np.load(self.folder / "samples.npz")) if (self.folder / "samples.npz").exists() else {}

    def report(self, done):
        """The table of what is known, and the pictures in its order."""
        if self.net:
            name, samples, count = self.measure_of
            print(f"\n{samples:,} samples a row, features {name}, reference {count:,} training images of {self.data.stem}\n| | steps of training | evaluations | guidance "
                  f"| GFLOP a sample | FD{'-ResNet50' * ('resnet50' in name)} | precision | recall |\n|" + "---|" * 8)
            for job in self.jobs:
                for nfe, cfg, file in job.rows:
                    r = self.get(job.name, nfe, cfg, file, *self.measure_of)
                    numbers = f"{r['gflop']:.3g} | {r['fd']:.2f} | {r['precision']:.3f} | {r['recall']:.3f}" if r else " | not yet | | "
                    print(f"| {job.name}{', ' * (file != 'last.pt')}{file.removesuffix('last.pt')} | {job.steps or ''} | {nfe} | {cfg:g} | {numbers} |")
        held = self.pictures()
        if rows := [held[key] for job in self.jobs for row in job.rows if (key := json.dumps([job.name, *row])) in held]:
            data.save_grid(rows, self.folder / "samples.png")
            print(f"{self.folder}/samples.png: 20 images of every row, in this order")
        print(f"{sum(bool(self.get(job.name)) for job in self.jobs)} of {len(self.jobs)} jobs are done; "
              + ("the same command continues" if not done else "all is measured" if self.net else "give --features to measure them"))


def main(args):
    args.out, args.samples = args.out or "runs/cifar" + "-tiny" * args.tiny, args.samples or (16 if args.tiny else 5000)
    runtime.check_positive(args, "minutes", "samples")
    if args.samples < 5:
        raise UserError(f"--samples {args.samples}: precision and recall need at least 5")
    if args.what == "pack":
        return pack(args)
    if args.tiny:
        warnings.simplefilter("ignore")  # so few samples
    stage = Stage(args)
    stage.report(stage.work())


def parser():
    p = runtime.Parser(prog="cifar.py", description=__doc__, formatter_class=runtime.Raw)
    p.add_argument("what", choices=["pack", "kd", "ladder"])
    p.add_argument("--data", default="cifar10", help="cifar10, a folder of upstream's batches, or a packed copy")
    p.add_argument("--packed", default="cifar10-packed.npz", help="what pack writes")
    p.add_argument("--features", default="torchvision-resnet50", help="a file with the weights of Keras's ResNet-50, torchvision-resnet50, or none")
    p.add_argument("--out", help="default runs/cifar, or with --tiny runs/cifar-tiny")
    p.add_argument("--minutes", type=float, default=8, help="after which a stage ends")
    p.add_argument("--samples", type=int, help="per row (default 5000, or with --tiny 16)")
    p.add_argument("--tiny", action="store_true", help="64 images, a hundredth of the steps and of the batches")
    return p


if __name__ == "__main__":
    runtime.run(main, parser().parse_args())
