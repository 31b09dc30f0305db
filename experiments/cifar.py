"""CIFAR-10 on one GPU, in stages of at most 8 minutes that the same command continues: KD as in its paper, and all methods on one DiT.

    python experiments/cifar.py pack --data FOLDER                                    upstream's batches -> cifar10-packed.npz, 40 MiB
    python experiments/cifar.py kd --data cifar10-packed.npz --features resnet50.pth  teacher, KD and score matching on the way, guided KD
    python experiments/cifar.py ladder --data ...                                     DiT teacher, then iSSD, SSD, PD and DSD at 10 steps
    python experiments/cifar.py kd --data ... --tiny                                  the same jobs shrunk, minutes on a CPU: proves that it works, says nothing else

--data: cifar10 (torchvision fetches it), a folder of upstream's batches, or a packed copy. That is small enough to be sent along, and lossy, since without loss WebP needs
79 MiB: all 50,000 images are there, as AVIF of quality 97, in which a value is off by 1.2 (of 255) on average and by 15 at most. In the features below that moves an image
by a mean square of 11, which bounds the Frechet distance to the true images (160 of them; their variance is 845); training data and reference are alike, and rows of
different data are never in one table.

The metric is FD-ResNet50: the Frechet distance of the 2,048 features of an ImageNet ResNet-50, 5,000 samples against all 50,000 training images, enlarged to 224x224. As many
as in the KD paper's FID-5K, but it is not FID and compares with no published number. --features: a file with Keras's weights, torchvision-resnet50 (fetched), or none:
train now, measure later.

Networks are so small that a checkpoint, with the average and Adam's moments, stays under 16 MiB: DDPM++-20x2 (0.87M parameters, 13.6 MiB) teaches DDPM++-12x2 (0.31M), and
DiT-XS/2 (0.92M, 13.9 MiB) itself. One seed; learning rates are the papers' or the digits', not tuned here. kd is meant to take four stages, ladder two, if an
iteration takes 0.1 s (kd) and 0.05 s (ladder), which is a guess: it has not run on a GPU yet. When the time is up the running script is asked to stop, and saves;
a measurement that has begun is finished.

Writes OUT/kd/{results.jsonl, samples.npz, samples.png, JOB/last.pt} (also OUT/ladder), with which the same command goes on elsewhere, too; OUT/cache is made again.
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
import PIL.features
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import checkpoints, data, features, fid, models, runtime, train
from runtime import Processes, UserError

# rows: (evaluations of the network, guidance, file); after: the job of fewer steps that this one goes on from
Job = namedtuple("Job", "name command steps rows after", defaults=[None])


def kd(few):
    """The KD paper: students with and without its loss over training, and its guided student, which needs one evaluation where guidance needs two."""
    rows = lambda *rows: [(nfe, cfg, "last.pt") for nfe, cfg in rows]
    all_rows, points = rows((35, 1.0), (19, 1.0), (9, 1.0), (19, 1.5)), [400, 800, 1600, 3200]
    alike = f"--batch-size {few(512)} --warmup {few(200)} --save-every 500"
    student = f"kd --ckpt OUT/teacher/last.pt --student DDPM++-12x2 --eval-samples 0 {alike}"
    jobs = [Job("teacher", f"train --model DDPM++-20x2 --ema 0.999 --decay cosine {alike}", few(5000), all_rows)]
    for name, loss in (("kd", ""), ("dsm", " --alpha 1")):
        for before, n in zip([None, *points], points):
            jobs.append(Job(f"{name}-{n}", student + loss, few(n), all_rows if n == points[-1] else rows((19, 1.0)), before and f"{name}-{before}"))
    return jobs + [Job("kd-guided", student + " --w 1 4", few(points[-1]), rows((19, 1.0), (19, 1.5), (19, 3.0)))]


def ladder(few):
    """A class-conditional DiT, and what the other methods make of it."""
    rows = lambda *nfes, file="last.pt": [(nfe, cfg, file) for nfe in nfes for cfg in (1.0, 1.5)]
    alike = f"--batch-size {few(256)} --save-every 500"
    base, halving = f"--ckpt OUT/teacher/last.pt {alike}", few(300)
    return [Job("teacher", f"train --model DiT-XS/2 --lr 1e-3 --warmup {few(500)} --decay cosine --ema 0.999 --clip 1 --label-std 1 {alike}", few(10_000), rows(5, 10, 50)),
            Job("continued", f"train {base} --lr 5e-5 --warmup 0 --decay constant --ema 0 --clip 0", few(300), rows(10)),
            Job("issd", f"issd {base} --eval-samples 0 --nfe 10 --lam 0.1 --lr 5e-5", few(300), rows(10)),
            Job("ssd", f"ssd {base} --eval-samples 0 --nfe 10 --lam 0.1 --lr 1e-4", few(300), rows(10)),
            Job("pd", f"ddil {base} --eval-samples 0 --stages 40:{halving} 20:{halving} 10:{halving} --dagger 0 0 --grid dit --lr 1e-4", None,
                rows(10, file="nfe10.pt") + rows(5, file="nfe5.pt")),
            Job("dsd", f"dsd {base} --eval-samples 0 --variant dsdgl --depth 16 --w 1 1 --ema 0.9 --lr 1e-5", max(few(512), 64), rows(5, 10))]  # 64: every depth


# ---- Data ---------------------------------------------------------------------------------------------

SHEET = 500  # images in a column of one AVIF


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
            return np.concatenate(sheets).reshape(-1, 32, 32, 3), f["labels"]
    except Exception as e:
        raise UserError(f"--data {source}: neither cifar10, nor a folder with data_batch_*.bin or cifar-10-batches-py, nor a packed copy ({str(e)[:100]})")


def pack(args):
    if not PIL.features.check("avif"):
        raise UserError("pack makes AVIF, which this Pillow cannot: pip install --upgrade pillow")
    (x, y), sheets = read(args.data), {}
    for i in range(0, len(x), SHEET):
        Image.fromarray(x[i:i + SHEET].reshape(-1, 32, 3)).save(held := io.BytesIO(), "AVIF", quality=97, subsampling="4:4:4")
        sheets[f"sheet{len(sheets)}"] = np.frombuffer(held.getvalue(), np.uint8)
    np.savez(args.packed, labels=y.astype(np.uint8), **sheets)
    off = np.abs(read(args.packed)[0].astype(np.int16) - x)
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
            checkpoints.save(argparse.Namespace(**{**state["args"], "steps": job.steps, "pool": pool, "out": str(out)}), self.proc, state)
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
