"""What the experiments on the digits share: jobs that are kept when they are done, and tables.

A command is the name of a script and its flags as one string ("issd --ckpt X --nfe 10"). It makes
a checkpoint. A cell is one measurement: a command, and the Row that says how its checkpoint is
sampled. Every cell has 2,000 samples, measured with two feature networks. All cells of one teacher
share their noise.

`run` trains what is not there yet, in processes of one thread each, and measures what is asked.
Everything lies in the folder runs/experiments, or where the environment variable
MINDISTILL_EXPERIMENTS points: checkpoints in models/, numbers in results.jsonl. A script that is
started again repeats nothing that is done.

    base = teacher(10)                                            # a command
    student = f"issd --ckpt {path(base)} --nfe 10 --lam 0.1"      # another one
    rows = {
        "base": cells(lambda number, seed: base, lambda number: Row(10, noise=110), [10]),
        "iSSD": cells(lambda number, seed: student, lambda number: Row(10, noise=110), [10]),
    }
    run([base])                                                   # students read its checkpoint
    table(run(rows), rows, against=("base",))
"""
import contextlib
import hashlib
import importlib
import json
import os
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
import torch
from scipy.special import stdtrit

from experiments import figures
from kit.checkpoints import load_model
from kit.data import to_uint8
from kit.evaluate import measure_digits
from kit.processes import Processes
from kit.sampling import SampleOptions, sample_chunks

ROOT = Path(os.environ.get("MINDISTILL_EXPERIMENTS", "runs/experiments")).resolve()
NETWORKS = ["digits-cnn", "digits-mlp"]  # the second is never used to choose
SAMPLES = 2000                           # of every row

# Teachers are told apart by their seed. Settings are chosen on some and reported on others.
TUNING_TEACHERS = list(range(7))
HELD_OUT_TEACHERS = list(range(7, 22))
FEW_TUNING_TEACHERS = [0, 1]             # of the experiments with many arms
FEW_HELD_OUT_TEACHERS = [10, 11, 12]
V_HELD_OUT_TEACHERS = [3, 4, 5]          # DDIL's, which predict v
SEEDS = [0, 1, 2]                        # of a student

# The columns of every table: feature network, metric, digits after the point.
COLUMNS = [
    ("digits-cnn", "fd", 2),
    ("digits-mlp", "fd", 2),
    ("digits-cnn", "pixel_fd", 3),
    ("digits-cnn", "accuracy", 3),
]
HEADER = "FD digits-cnn | FD digits-mlp | pixel distance | accuracy"


@dataclass(frozen=True)
class Row:
    """How a checkpoint is sampled. None: as the checkpoint was trained."""

    nfe: int                                      # network evaluations
    cfg: float = 1.0                              # scale of guidance, 1: none
    noise: int = 0                                # seed of the noise
    solver: str = None
    changes: dict = field(default_factory=dict)   # of the checkpoint's spec: grid, threshold, ...
    # Three keys of `changes` are options of sampling instead: base and features_from (paths of
    # checkpoints), and lam. See kit.sampling.SampleOptions.


@dataclass(frozen=True)
class Cell:
    """One measurement: the checkpoint `file` in the folder of `command`, sampled by `row`."""

    command: str
    row: Row
    file: str = "last.pt"


# ---- Commands -----------------------------------------------------------------------------------


def path(command, file="last.pt"):
    """Where the checkpoint of a command lies: "ssd --ckpt X --nfe 10" -> .../last.pt."""
    name = hashlib.sha1(command.encode()).hexdigest()[:16]
    return str(ROOT / "models" / name / file)


def teacher(seed, model="DiT-Ti/2", prediction="eps", steps=2000):
    """The command that makes a teacher."""
    command = f"train --model {model} --seed {seed} --steps {steps}"
    if prediction != "eps":
        command += f" --prediction {prediction}"
    if prediction == "velocity":
        command += " --schedule interpolant"
    return command


def continued(ckpt, seed, lr, steps):
    """The command of the control: the ordinary loss for as many steps."""
    return (f"train --ckpt {ckpt} --steps {steps} --lr {lr:g} --batch-size 64 --warmup 0 "
            f"--decay constant --ema 0 --clip 0 --seed {seed}")


def noise_seed(number):
    """Seed of a teacher's noise: what is reported has other noise than what chose the settings."""
    return number + 100 if number in HELD_OUT_TEACHERS else number


def cells(command, row, teachers, seeds=SEEDS, file="last.pt"):
    """The cells of one row of a table: per teacher a list with one cell per seed.

    command(number, seed) -> the command; row(number) -> the Row; number: the teacher's.
    """
    lists = []
    for number in teachers:
        lists.append([Cell(command(number, seed), row(number), file) for seed in seeds])
    return lists


# ---- Jobs ---------------------------------------------------------------------------------------


@dataclass
class Job:
    """Train a command, and measure cells of it."""

    command: str
    cells: list = field(default_factory=list)

    def evaluations(self):
        return sum(cell.row.nfe for cell in self.cells)


@contextlib.contextmanager
def silence():
    """Nothing of the scripts' own output: processes write at the same time."""
    with open(os.devnull, "w") as null:
        with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            yield


def train(command):
    """Make the checkpoint of a command, unless it is there. The file "done" tells that it is."""
    done = Path(path(command, "done"))
    if done.exists():
        return

    name, *words = command.split()
    words += ["--out", str(done.parent), "--save-every", "1000000"]
    if name != "train":
        words += ["--eval-samples", "0"]
    script = importlib.import_module(name)

    began = time.process_time()
    with silence():
        script.main(script.parser().parse_args(words))
    done.write_text(json.dumps({"command": command, "seconds": time.process_time() - began}))


def training_seconds(command):
    """CPU seconds that the training of a command took."""
    return json.loads(Path(path(command, "done")).read_text())["seconds"]


def measure(net, spec, row, proc):
    """-> {feature network: metrics} of SAMPLES samples of a network.

    Beside the metrics of kit.evaluate.measure_digits: "beyond", how far pixels leave [-1, 1], on
    average, in hundredths; "contrast", the standard deviation of an image's pixels, whose range is
    [-1, 1], on average.
    """
    changes = dict(row.changes)
    options = sample_options(row, changes, proc)
    images, labels = [], []
    with silence():
        chunks = sample_chunks(net, {**spec, **changes}, proc, SAMPLES, options)
        for _, x, y in chunks:
            images.append(x)
            labels.append(y)

    x = torch.cat(images)
    beyond = 100 * float((x.abs() - 1).clamp(min=0).mean())
    images, labels = to_uint8(x).numpy(), torch.cat(labels).numpy()
    contrast = float(images.std((1, 2, 3)).mean() / 127.5)
    metrics = {}
    for name in NETWORKS:
        metrics[name] = measure_digits(images, labels, proc, name)
        metrics[name].update(beyond=beyond, contrast=contrast)
    return metrics


def sample_options(row, changes, proc):
    """The SampleOptions of a row. Takes base, features_from and lam out of `changes`."""
    options = {"lam": changes.pop("lam", None)}
    for key in ("base", "features_from"):
        if key in changes:
            net, _ = load_model(changes.pop(key))
            options[key] = proc.autocast(proc.frozen(net))
    return SampleOptions(seed=row.noise, nfe=row.nfe, cfg=row.cfg, solver=row.solver, **options)


def train_and_measure(job):
    """-> metrics of every cell of a Job. Runs in a process of its own."""
    torch.set_num_threads(1)
    train(job.command)
    proc = Processes("off")
    metrics = []
    for cell in job.cells:
        net, spec = load_model(path(cell.command, cell.file))
        net = proc.autocast(proc.frozen(net))
        metrics.append(measure(net, spec, cell.row, proc))
    return metrics


def end_with_the_parent():
    """In a new process: end it when its parent ends, which else leaves it waiting for ever."""
    def wait():
        parent_process().join()
        os._exit(1)
    threading.Thread(target=wait, daemon=True).start()


def in_processes(function, jobs, processes=2):
    """Yields (job, function(job)) as they are done, by processes of one thread each.

    function: of a module, not a closure. The first error ends all.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the new processes
    # Not a multiprocessing.Pool: its processes may have no children, which data loaders are.
    with ProcessPoolExecutor(processes, get_context("spawn"), end_with_the_parent) as pool:
        waiting = {pool.submit(function, job): job for job in jobs}
        try:
            for count, future in enumerate(as_completed(waiting), 1):
                yield waiting[future], future.result()
                print(f"\r{count}/{len(jobs)} jobs", end="", file=sys.stderr, flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    print(file=sys.stderr)


def key_of(cell):
    """A cell as the text under which results.jsonl keeps its metrics."""
    row = cell.row
    return json.dumps([cell.command, cell.file,
                       [row.nfe, row.cfg, row.solver, row.noise, row.changes]])


def leaves(tree):
    """All cells and commands in nested dicts, lists and other iterables."""
    if isinstance(tree, (str, Cell)):
        return [tree]
    found = []
    for branch in tree.values() if isinstance(tree, dict) else tree:
        found += leaves(branch)
    return found


def missing_jobs(tree, known):
    """The jobs for what `known` does not hold, most evaluations first."""
    jobs, seen = {}, set(known)
    for leaf in leaves(tree):
        if isinstance(leaf, str):
            jobs.setdefault(leaf, Job(leaf))
        elif key_of(leaf) not in seen:
            seen.add(key_of(leaf))
            job = jobs.setdefault(leaf.command, Job(leaf.command))
            job.cells.append(leaf)
    return sorted(jobs.values(), key=Job.evaluations, reverse=True)


def run(tree, processes=2):
    """Train and measure what is not known yet -> get(cell) -> {feature network: metrics}.

    tree: nested dicts and lists of cells, and of commands that are trained only. Commands run in
    any order: call run with the teachers first when other commands read their checkpoints.
    """
    kept = ROOT / "results.jsonl"
    kept.parent.mkdir(parents=True, exist_ok=True)
    known = {}
    if kept.exists():
        for line in kept.read_text().splitlines():
            key, metrics = json.loads(line)
            known[json.dumps(key)] = metrics

    for job, results in in_processes(train_and_measure, missing_jobs(tree, known), processes):
        with open(kept, "a") as file:
            for cell, metrics in zip(job.cells, results):
                key = key_of(cell)
                known[key] = metrics
                file.write(json.dumps([json.loads(key), metrics]) + "\n")

    def get(cell):
        return known[key_of(cell)]
    return get


# ---- Tables -------------------------------------------------------------------------------------


def values(get, cells, metric, network="digits-cnn"):
    """cells: per teacher a list of its seeds' cells -> array (teachers, seeds)."""
    lists = []
    for of_teacher in cells:
        lists.append([get(cell)[network][metric] for cell in of_teacher])
    return np.array(lists)


def plus_minus(v, digits):
    """Values of several teachers as text: mean +- standard deviation."""
    spread = f" +- {v.std(ddof=1):.{digits}f}" if len(v) > 1 else ""
    return f"{v.mean():.{digits}f}{spread}"


def standard_error(v):
    """Of the mean over independent teachers; v (teachers,)."""
    return v.std(ddof=1) / len(v) ** 0.5


def half_width_95(v):
    """Half the width of the 95 % interval of the mean over teachers, from Student's t.

    v (teachers,). For three teachers it is 4.3 standard errors, for fifteen 2.1, for one NaN.
    """
    if len(v) < 2:
        return float("nan")
    return float(stdtrit(len(v) - 1, 0.975) * standard_error(v))


def gain(get, reference, cells, network="digits-cnn"):
    """How far the Frechet distance of cells lies below the reference's: array (teachers,).

    Paired within a teacher, averaged over its seeds.
    """
    return (values(get, reference, "fd", network).mean(1)
            - values(get, cells, "fd", network).mean(1))


def gains_text(get, reference, cells):
    """Gains with both feature networks, as "mean (se standard error over teachers)"."""
    texts = []
    for network in NETWORKS:
        g = gain(get, reference, cells, network)
        texts.append(f"{g.mean():.2f} (se {standard_error(g):.2f})")
    return ", ".join(texts)


def columns(get, cells):
    """The texts of COLUMNS: mean +- standard deviation over teachers, of means over seeds."""
    texts = []
    for network, metric, digits in COLUMNS:
        texts.append(plus_minus(values(get, cells, metric, network).mean(1), digits))
    return texts


def print_header(*titles):
    """The first two lines of a table; titles without the first column's, which is empty."""
    print("| | " + " | ".join(titles) + " |")
    count = 1 + sum(title.count("|") + 1 for title in titles)
    print("|" + "---|" * count)


def table(get, rows, against=()):
    """Print rows {name: cells as in values()}, with their gains on the rows named in `against`.

    Gains are paired within a teacher, with their standard error over teachers.
    """
    print_header(HEADER, *(f"gain on {name} (cnn, mlp)" for name in against))
    for name, cells in rows.items():
        texts = columns(get, cells)
        for other in against:
            compared = name != other and len(cells) > 1
            texts.append(gains_text(get, rows[other], cells) if compared else "")
        print(f"| {name} | " + " | ".join(texts) + " |")


def changes(get, base, cells):
    """Mean changes of fd, pixel_fd and accuracy (digits-cnn) against the base's cells."""
    change = {}
    for metric in ("fd", "pixel_fd", "accuracy"):
        difference = values(get, cells, metric) - values(get, base, metric)
        change[metric] = difference.mean()
    return change


def changes_text(change, digits=(2, 3, 3)):
    fd, pixel, accuracy = digits
    return (f"{change['fd']:+.{fd}f} / {change['pixel_fd']:+.{pixel}f} / "
            f"{change['accuracy']:+.{accuracy}f}")


def pick(change, accuracy=0.003):
    """The rule of choice; change: {setting: changes()} -> (the setting, all that are allowed).

    A setting is allowed that loses at most `accuracy` of class accuracy and does not increase the
    pixel distance. The rule takes the allowed setting with the least Frechet distance; if none is
    allowed, the setting with the least Frechet distance of all.
    """
    allowed = []
    for setting, c in change.items():
        if c["accuracy"] >= -accuracy and c["pixel_fd"] <= 0:
            allowed.append(setting)
    return min(allowed or change, key=lambda setting: change[setting]["fd"]), allowed


def choose(get, base, settings, accuracy=0.003):
    """The setting that pick() takes; settings {setting: cells}. Prints all settings' changes."""
    change = {setting: changes(get, base, cells) for setting, cells in settings.items()}
    best, allowed = pick(change, accuracy)
    print("; ".join(f"{setting}: {changes_text(c)}" for setting, c in change.items()))
    print(f"chosen: {best}" + ("" if allowed else " (none keeps accuracy and pixel distance)"))
    return best


def draw(name, xlabel, ylabel, curves):
    """ROOT/name.png with means and 95 % intervals, where matplotlib is installed.

    curves: {label: (x of the points, array (points, teachers))}.
    """
    file = ROOT / f"{name}.png"
    try:
        with figures.figure(file, xlabel, ylabel) as axes:
            for label, (x, v) in curves.items():
                error = [half_width_95(point) for point in v]
                figures.curve(axes, x, v.mean(1), error, label)
    except ImportError as error:
        print(f"no picture: {error}")
        return
    print(f"drawn: {file}")
