"""CIFAR-10 on one GPU, in stages of at most 8 minutes: KD as in its paper, all methods on one DiT.

    python -m experiments.kd.cifar pack --data FOLDER
        upstream's batches -> cifar10-packed.npz, 40 MiB
    python -m experiments.kd.cifar kd --data cifar10-packed.npz --features resnet50.pth
        teacher, KD and score matching over training, guided KD
    python -m experiments.kd.cifar ladder --data cifar10-packed.npz --features resnet50.pth
        a DiT as teacher, then iSSD, SSD, PD and DSD at 10 steps
    python -m experiments.kd.cifar kd --data cifar10-packed.npz --tiny
        the same jobs shrunk: minutes on a CPU. It proves that the commands work, and nothing else

The same command continues where the last stage ended. When the time is up, the running script is
asked to stop, and saves. A measurement that has begun is finished.

--data is cifar10 (torchvision fetches it), a folder of upstream's batches, or a packed copy. A
packed copy is small enough to be sent along with the code; it is lossy, because lossless WebP
needs 79 MiB. It has all 50,000 images as AVIF of quality 97, in which a value is off by 1.2 (of
255) on average and by 15 at most. In the features below that moves an image by a mean square of
11, which bounds the Frechet distance to the true images (160 of them were measured; their variance
is 845). Training data and reference are the same images. Rows of different data are never in one
table.

The metric is FD-ResNet50: the Frechet distance of the 2,048 features of an ImageNet ResNet-50,
with images enlarged to 224x224, 5,000 samples against all 50,000 training images. The KD paper's
FID-5K has as many samples, but FD-ResNet50 is not FID and compares with no published number.
--features is a file with Keras's weights, torchvision-resnet50 (fetched), or none: train now,
measure later.

The networks are so small that a checkpoint, with the average and Adam's moments, stays under 16
MiB: DDPM++-20x2 (0.87M parameters, 13.6 MiB) teaches DDPM++-12x2 (0.31M), and DiT-XS/2 (0.92M,
13.9 MiB) teaches itself. There is one seed. Learning rates are the papers' or the digits', not
tuned here. kd is meant to take four stages and ladder two, if a step takes 0.1 s (kd) and 0.05 s
(ladder). That is a guess: this has not run on a GPU yet.

Writes OUT/kd/{results.jsonl, samples.npz, samples.png, JOB/last.pt}, and the same in OUT/ladder.
The same command continues from these files on another machine, too. OUT/cache can be made again.
"""
import importlib
import io
import json
import os
import signal
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import PIL.features
from PIL import Image

import fid
import models
from kit import checkpoints, data
from kit.cli import UserError, check_positive, make_parser, run_script
from kit.features import load_features
from kit.processes import Processes
from kit.run import write_checkpoint
from kit.sampling import SampleOptions, sample_images, save_grid

# ---- Jobs ---------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A measurement: network evaluations, scale of guidance, file in the job's folder."""

    nfe: int
    cfg: float = 1.0
    file: str = "last.pt"


@dataclass(frozen=True)
class Job:
    """A command of one of our scripts, and what to measure of it.

    command   with OUT for the stage's folder; --steps, --data and --out are added
    steps     None where the command says how many
    after     the job of fewer steps from whose end this one continues
    """

    name: str
    command: str
    steps: Optional[int]
    rows: list
    after: Optional[str] = None


POINTS = [400, 800, 1600, 3200]  # steps at which KD and score matching are measured


def kd(few):
    """The KD paper: students with its loss and without, over training; and its guided student.

    The guided student needs one evaluation per step, where guidance needs two. few(n): the size of
    something that --tiny makes smaller.
    """
    all_rows = [Row(35), Row(19), Row(9), Row(19, 1.5)]
    common = f"--batch-size {few(512)} --warmup {few(200)} --save-every 500"
    student = f"kd --ckpt OUT/teacher/last.pt --student DDPM++-12x2 --eval-samples 0 {common}"
    teacher = f"train --model DDPM++-20x2 --ema 0.999 --decay cosine {common}"
    jobs = [Job("teacher", teacher, few(5000), all_rows)]
    for name, command in (("kd", student), ("dsm", f"{student} --alpha 1")):
        before = None
        for steps in POINTS:
            rows = all_rows if steps == POINTS[-1] else [Row(19)]
            jobs.append(Job(f"{name}-{steps}", command, few(steps), rows, before))
            before = f"{name}-{steps}"
    guided = [Row(19), Row(19, 1.5), Row(19, 3.0)]
    jobs.append(Job("kd-guided", f"{student} --w 1 4", few(POINTS[-1]), guided))
    return jobs


def ladder(few):
    """A class-conditional DiT, and what the other methods make of it."""
    def rows(*nfes, file="last.pt"):
        both = []
        for nfe in nfes:
            both += [Row(nfe, 1.0, file), Row(nfe, 1.5, file)]
        return both

    common = f"--batch-size {few(256)} --save-every 500"
    base = f"--ckpt OUT/teacher/last.pt {common}"
    method = f"{base} --eval-samples 0"
    halving = few(300)
    teacher = (f"train --model DiT-XS/2 --lr 1e-3 --warmup {few(500)} --decay cosine --ema 0.999 "
               f"--clip 1 --label-std 1 {common}")
    continued = f"train {base} --lr 5e-5 --warmup 0 --decay constant --ema 0 --clip 0"
    pd = (f"ddil {method} --stages 40:{halving} 20:{halving} 10:{halving} --dagger 0 0 --grid dit "
          "--lr 1e-4")
    dsd = f"dsd {method} --variant dsdgl --depth 16 --w 1 1 --ema 0.9 --lr 1e-5"
    return [
        Job("teacher", teacher, few(10_000), rows(5, 10, 50)),
        Job("continued", continued, few(300), rows(10)),
        Job("issd", f"issd {method} --nfe 10 --lam 0.1 --lr 5e-5", few(300), rows(10)),
        Job("ssd", f"ssd {method} --nfe 10 --lam 0.1 --lr 1e-4", few(300), rows(10)),
        Job("pd", pd, None, rows(10, file="nfe10.pt") + rows(5, file="nfe5.pt")),
        Job("dsd", dsd, max(few(512), 64), rows(5, 10)),  # 64 steps: every depth has some
    ]


# ---- Data ---------------------------------------------------------------------------------------

SHEET = 500  # images in a column of one AVIF


def read(source):
    """-> images (N, 32, 32, 3) uint8, labels (N,).

    source: cifar10, a folder of upstream's batches (binary or Python's), or a packed copy. Raises
    UserError.
    """
    folder = Path(source)
    batches = sorted(folder.glob("data_batch_*.bin"))
    if batches:
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
        return read_packed(source)
    except Exception as e:  # a file of another kind fails in many ways
        raise UserError(f"--data {source}: neither cifar10, nor a folder with data_batch_*.bin or "
                        f"cifar-10-batches-py, nor a packed copy ({str(e)[:100]})")


def read_packed(file):
    """A packed copy -> images, labels, as read()."""
    with np.load(file) as f:
        sheets = []
        for i in range(len(f.files) - 1):
            sheets.append(np.array(Image.open(io.BytesIO(f[f"sheet{i}"]))))
        return np.concatenate(sheets).reshape(-1, 32, 32, 3), f["labels"]


def pack(args):
    """Write a packed copy of --data."""
    if not PIL.features.check("avif"):
        raise UserError("pack makes AVIF, which this Pillow cannot: pip install --upgrade pillow")
    x, y = read(args.data)
    sheets = {}
    for i in range(0, len(x), SHEET):
        column = Image.fromarray(x[i:i + SHEET].reshape(-1, 32, 3))
        written = io.BytesIO()
        column.save(written, "AVIF", quality=97, subsampling="4:4:4")
        sheets[f"sheet{len(sheets)}"] = np.frombuffer(written.getvalue(), np.uint8)
    np.savez(args.packed, labels=y.astype(np.uint8), **sheets)

    difference = np.abs(read(args.packed)[0].astype(np.int16) - x)
    size = Path(args.packed).stat().st_size / 2 ** 20
    print(f"{args.packed}: {len(x):,} images, {size:.1f} MiB; values are off by "
          f"{difference.mean():.2f} on average, {difference.max()} at most")


def save_npz(path, **arrays):
    """Write an .npz file atomically."""
    part = path.with_name("part.npz")
    np.savez(part, **arrays)
    os.replace(part, path)


# ---- Stages -------------------------------------------------------------------------------------


class Stage:
    """One stage: the jobs of kd or ladder, until they are done or the time is up.

    What is done stands in results.jsonl, as [[job], its command] and
    [[job, evaluations, guidance, file, network, samples, reference], numbers].
    """

    def __init__(self, args):
        self.end = time.monotonic() + 60 * args.minutes
        self.args = args
        self.proc = Processes()
        self.folder = Path(args.out) / args.what
        self.cache = Path(args.out) / "cache"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.cache.mkdir(exist_ok=True)
        make_jobs = kd if args.what == "kd" else ladder
        self.jobs = make_jobs(self.few)
        self.lines = self.folder / "results.jsonl"
        self.known = {}
        if self.lines.exists():
            for line in self.lines.read_text().splitlines():
                key, value = json.loads(line)
                self.known[json.dumps(key)] = value
        self.data = self.prepare_data()
        self.net = None
        if args.features != "none":
            self.net = load_features(args.features, device=self.proc.device)
            self.reference = self.prepare_reference()
            self.conditions = [self.net.name, args.samples, self.reference.count]

    def few(self, n):
        """n, or with --tiny a hundredth of it, rounded up."""
        return -(-n // 100) if self.args.tiny else n

    def prepare_data(self):
        """The training data as the .npz file that our scripts read."""
        tiny = "-tiny" if self.args.tiny else ""
        file = self.cache / f"{Path(self.args.data).stem}{tiny}.npz"
        if not file.exists():
            x, y = read(self.args.data)
            if self.args.tiny:
                x, y = x[:64], y[:64]
            save_npz(file, arr_0=x, arr_1=y.astype(np.int64))
        return file

    def prepare_reference(self):
        """The statistics of the training data, made once."""
        file = self.cache / f"{self.data.stem}-{self.net.name}.npz"
        if not file.exists():
            with np.load(self.data) as f:
                images = fid.images_from_array(str(self.data), f["arr_0"])
            save_npz(file, **self.statistics_of(images, fid.REFERENCE).arrays())
        return fid.read_statistics(str(file), np.load(file))

    def statistics_of(self, images, keep=None):
        """Statistics of images, of at most `keep` the features themselves."""
        device = self.proc.device
        batch = 64 if device.type == "cuda" else 8
        return fid.feature_statistics(images, self.net, device, batch, keep)

    def get(self, *key):
        return self.known.get(json.dumps(key))

    def keep(self, value, *key):
        with open(self.lines, "a") as f:
            f.write(json.dumps([key, value]) + "\n")
        self.known[json.dumps(key)] = value

    def command_of(self, job):
        """A job's command with its folder, steps and data."""
        command = job.command.replace("OUT", str(self.folder))
        if job.steps:
            command += f" --steps {job.steps}"
        if not command.startswith("dsd"):  # DSD needs no data
            command += f" --data {self.data}"
        return command

    def is_over(self):
        return time.monotonic() > self.end

    def work(self):
        """Do what is not done yet, in order, until the time is up. -> is it all done?"""
        for job in self.jobs:
            command = self.command_of(job)
            known = self.get(job.name)
            if known not in (None, command):
                raise UserError(f"{self.folder}: {job.name} was made by another command ({known}); "
                                "choose another --out")
            if not known:
                if self.is_over() or not self.train(job, command):
                    return False
                self.keep(command, job.name)
            if not self.net:
                continue
            for row in job.rows:
                if not self.get(job.name, *row, *self.conditions):
                    if self.is_over():
                        return False
                    self.measure(job, row)
        return True

    def train(self, job, command):
        """Run one of our scripts, in this process. -> is it done?

        When the time is up, the script is asked to stop as SIGTERM asks it to.
        """
        out = self.folder / job.name
        if job.after and not (out / "last.pt").exists():
            self.continue_from(job, out)
        name, *words = command.split()
        print(f"{job.name}: python {name}.py {' '.join(words)} --out {out}", flush=True)

        def end(*_):  # while the script does not listen itself
            sys.exit(143)

        def ask(*_):
            os.kill(os.getpid(), signal.SIGTERM)

        before = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, end)
        signal.signal(signal.SIGALRM, ask)
        signal.setitimer(signal.ITIMER_REAL, max(self.end - time.monotonic(), 0.01))
        try:
            script = importlib.import_module(name)
            script.main(script.parser().parse_args([*words, "--out", str(out)]))
            return True
        except SystemExit as e:
            if e.code != 143:
                raise
            return False
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)

    def continue_from(self, job, out):
        """Give a job the checkpoint of the job of fewer steps, as if it were its own.

        That is the same as one run, because the learning rate is constant.
        """
        held = checkpoints.read_file(self.folder / job.after / "last.pt")
        held["args"].update(steps=job.steps, out=str(out))
        out.mkdir(exist_ok=True)
        write_checkpoint(out / "last.pt", held)

    def measure(self, job, row):
        """Keep the numbers of a row, its GFLOP per sample, and 20 of its images."""
        model, spec = checkpoints.load_model(self.folder / job.name / row.file)
        halves = 1 if row.cfg == 1 or spec["arch"].get("guidance") else 2
        cost = row.nfe * halves * models.count(spec["arch"])[1]
        options = SampleOptions(seed=1, nfe=row.nfe, cfg=row.cfg)
        net = self.proc.autocast(self.proc.frozen(model))
        x, y = sample_images(net, spec, self.proc, self.args.samples, options, desc=job.name)

        images = fid.images_from_array(job.name, x.transpose(0, 2, 3, 1), y)
        numbers = fid.compare_statistics(self.statistics_of(images), self.reference, self.net,
                                         self.proc.device)

        pictures = self.pictures()
        pictures[json.dumps([job.name, *row])] = x[:20]
        save_npz(self.folder / "samples.npz", **pictures)
        self.keep({**numbers, "gflop": cost / 1e9}, job.name, *row, *self.conditions)

    def pictures(self):
        """{row as text: images} of what was measured."""
        file = self.folder / "samples.npz"
        return dict(np.load(file)) if file.exists() else {}

    def report(self, is_done):
        """Print the table of what is known, and draw the pictures in its order."""
        if self.net:
            self.print_table()
        held = self.pictures()
        shown = []
        for job in self.jobs:
            keys = [json.dumps([job.name, *row]) for row in job.rows]
            shown += [held[key] for key in keys if key in held]
        if shown:
            save_grid(shown, self.folder / "samples.png")
            print(f"{self.folder}/samples.png: 20 images of every row, in this order")

        if not is_done:
            then = "the same command continues"
        elif self.net:
            then = "all is measured"
        else:
            then = "give --features to measure them"
        done = [job for job in self.jobs if self.get(job.name)]
        print(f"{len(done)} of {len(self.jobs)} jobs are done; {then}")

    def print_table(self):
        name, samples, count = self.conditions
        print(f"\n{samples:,} samples per row, features {name}, "
              f"reference {count:,} training images of {self.data.stem}")
        metric = "FD-ResNet50" if "resnet50" in name else "FD"
        print("| | steps of training | evaluations | guidance | GFLOP per sample "
              f"| {metric} | precision | recall |\n|" + "---|" * 8)
        for job in self.jobs:
            for row in job.rows:
                numbers = self.get(job.name, *row, *self.conditions)
                file = "" if row.file == "last.pt" else f", {row.file}"
                print(f"| {job.name}{file} | {job.steps or ''} | {row.nfe} | {row.cfg:g} "
                      f"| {numbers_text(numbers)} |")


def numbers_text(numbers):
    """The last four columns of a row."""
    if not numbers:
        return " | not yet | | "
    return (f"{numbers['gflop']:.3g} | {numbers['fd']:.2f} | {numbers['precision']:.3f} "
            f"| {numbers['recall']:.3f}")


def main(args):
    if args.out is None:
        args.out = "runs/cifar-tiny" if args.tiny else "runs/cifar"
    if args.samples is None:
        args.samples = 16 if args.tiny else 5000
    check_positive(args, "minutes", "samples")
    if args.samples < 5:
        raise UserError(f"--samples {args.samples}: precision and recall need at least 5")
    if args.what == "pack":
        pack(args)
        return
    if args.tiny:
        warnings.simplefilter("ignore")  # so few samples
    stage = Stage(args)
    stage.report(stage.work())


def parser():
    p = make_parser("experiments.kd.cifar", __doc__)
    p.add_argument("what", choices=["pack", "kd", "ladder"])
    p.add_argument("--data", default="cifar10",
                   help="cifar10, a folder of upstream's batches, or a packed copy")
    p.add_argument("--packed", default="cifar10-packed.npz", help="what pack writes")
    p.add_argument("--features", default="torchvision-resnet50",
                   help="a file with the weights of Keras's ResNet-50, torchvision-resnet50, "
                        "or none")
    p.add_argument("--out", help="default: runs/cifar, or with --tiny runs/cifar-tiny")
    p.add_argument("--minutes", type=float, default=8, help="after which a stage ends")
    p.add_argument("--samples", type=int, help="per row (default: 5000, or with --tiny 16)")
    p.add_argument("--tiny", action="store_true",
                   help="64 images, a hundredth of the steps and of the batches")
    return p


if __name__ == "__main__":
    run_script(main, parser().parse_args())
