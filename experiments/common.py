"""What the experiments on the digits share: jobs of one thread each, kept when done, and tables of means over teachers.

A job trains a checkpoint (a command of one of the scripts, without --out) unless it is there, and measures it: 2,000 samples a row, two feature
networks. Rows of one teacher share their noise. Finished rows are kept in results.jsonl and not repeated.
"""
import contextlib
import hashlib
import importlib
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
ROOT = Path(os.environ.get("MINDISTILL_EXPERIMENTS", "runs/experiments")).resolve()
NETWORKS = ["digits-cnn", "digits-mlp"]  # the second is never used to choose


def path(command, file="last.pt"):
    """Where the checkpoint of a command lies: "ssd --ckpt X --nfe 10" -> .../last.pt."""
    return str(ROOT / "models" / hashlib.sha1(command.encode()).hexdigest()[:16] / file)


def teacher(seed, model="DiT-Ti/2", prediction="eps", steps=2000):
    """The command that makes a teacher."""
    return f"train --model {model} --seed {seed} --steps {steps}" + ("" if prediction == "eps" else f" --prediction {prediction}") + \
        (" --schedule interpolant" if prediction == "velocity" else "")


def continued(ckpt, seed, lr, steps):
    """The command of the control: the ordinary loss for as many steps."""
    return f"train --ckpt {ckpt} --steps {steps} --lr {lr:g} --batch-size 64 --warmup 0 --decay constant --ema 0 --clip 0 --seed {seed}"


def one(job):
    """(command, file in its folder, rows of (nfe, cfg, solver, noise, info entries)) -> metrics of every row; run in a process of its own."""
    command, file, rows = job
    import torch
    torch.set_num_threads(1)
    import checkpoints, data, fid
    from runtime import Processes
    proc, last = Processes("off"), Path(path(command))
    if not (last.parent / "done").exists():
        script, *words = command.split()
        script = importlib.import_module(script)
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            quiet = [] if script.__name__ == "train" else ["--eval-samples", "0"]
            script.main(script.parser().parse_args(words + quiet + ["--out", str(last.parent), "--save-every", "1000000"]))
        (last.parent / "done").write_text(command)
    if not rows:
        return []
    net, info = checkpoints.load_model(last.parent / file)
    load = lambda name: proc.mixed(proc.frozen(checkpoints.load_model(name)[0]))
    out = []
    for nfe, cfg, solver, noise, more in rows:
        more = {k: load(v) if k in ("elsewhere", "source") else v for k, v in more.items()}
        with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
            chunks = data.sample_chunks(proc.mixed(proc.frozen(net)), {**info, **more}, proc, 2000, noise, nfe, cfg, solver)
            x, y = (torch.cat(v) for v in list(zip(*chunks))[1:])
        beyond = 100 * float((x.abs() - 1).clamp(min=0).mean())  # how far pixels leave [-1, 1], on average, in hundredths
        images, labels = data.to_uint8(x).numpy(), y.numpy()
        contrast = float(images.std((1, 2, 3)).mean() / 127.5)
        out.append({name: {**fid.evaluate(images, labels, proc, name), "beyond": beyond, "contrast": contrast} for name in NETWORKS})
    return out


def run(jobs, processes=2):
    """jobs: (command, rows) or (command, rows, file), a row being (nfe, cfg, noise) or (nfe, cfg, noise, solver, info entries).
    -> {(command, file, row): metrics}, from results.jsonl where they are known. Longest rows first."""
    os.environ["OMP_NUM_THREADS"] = "1"
    kept = ROOT / "results.jsonl"
    kept.parent.mkdir(parents=True, exist_ok=True)
    done = {json.dumps(k): v for k, v in map(json.loads, kept.read_text().splitlines())} if kept.exists() else {}
    key = lambda command, file, row: json.dumps([command, file, row])
    full = lambda nfe, cfg, noise, solver=None, more=None: [nfe, cfg, solver, noise, more or {}]
    asked = {}
    for command, rows, *file in jobs:
        file = file[0] if file else "last.pt"
        asked.setdefault((command, file), []).extend(full(*r) for r in rows)
    todo = []
    for (command, file), rows in asked.items():
        missing = [r for i, r in enumerate(rows) if key(command, file, r) not in done and r not in rows[:i]]
        if missing or not rows:
            todo.append((command, file, missing))
    todo.sort(key=lambda j: -sum(r[0] for r in j[2]))
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:  # not a Pool, whose processes may have no children, as data loaders are
        for i, (job, results) in enumerate(zip(todo, pool.map(one, todo))):
            with open(kept, "a") as f:
                for row, metrics in zip(job[2], results):
                    done[key(job[0], job[1], row)] = metrics
                    f.write(json.dumps([[job[0], job[1], row], metrics]) + "\n")
            print(f"\r{i + 1}/{len(todo)} jobs", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return lambda command, row, file="last.pt": done[key(command, file, full(*row))]


def values(get, cells, what, network="digits-cnn"):
    """cells: per teacher a list (seeds) of (command, row) -> array (teachers, seeds)."""
    import numpy as np
    return np.array([[get(*c)[network][what] for c in teacher] for teacher in cells])


def table(get, rows, against=()):
    """Print rows {name: cells as in values()}: mean +- standard deviation over teachers (of means over seeds); gains on the rows named
    in `against` are paired within a teacher, with their standard error over teachers."""
    print("| | FD digits-cnn | FD digits-mlp | pixel distance | accuracy |" + "".join(f" gain on {a} (cnn, mlp) |" for a in against) + "\n|" + "---|" * (5 + len(against)))
    pm = lambda v, digits: f"{v.mean():.{digits}f}" + (f" +- {v.std(ddof=1):.{digits}f}" if len(v) > 1 else "")
    for name, cells in rows.items():
        row = [pm(values(get, cells, what, net).mean(1), digits) for net, what, digits in
               (("digits-cnn", "fd", 2), ("digits-mlp", "fd", 2), ("digits-cnn", "pixel_fd", 3), ("digits-cnn", "accuracy", 3))]
        for a in against:
            gains = [values(get, rows[a], "fd", n).mean(1) - values(get, cells, "fd", n).mean(1) for n in NETWORKS]
            row.append(", ".join(f"{g.mean():.2f} (se {g.std(ddof=1) / len(g) ** 0.5:.2f})" for g in gains) if name != a and len(gains[0]) > 1 else "")
        print(f"| {name} | " + " | ".join(row) + " |")


def choose(get, base, settings, accuracy=0.003):
    """settings {setting: cells}: of those that lose at most `accuracy` of it and nothing of pixel distance against the base's cells, the one of
    least mean FD; of all where none is so good. Only digits-cnn is looked at. Prints every setting's changes."""
    change = {s: {w: (values(get, cells, w) - values(get, base, w)).mean() for w in ("fd", "pixel_fd", "accuracy")} for s, cells in settings.items()}
    allowed = [s for s, c in change.items() if c["accuracy"] >= -accuracy and c["pixel_fd"] <= 0]
    best = min(allowed or change, key=lambda s: change[s]["fd"])
    print("; ".join(f"{s}: {c['fd']:+.2f} / {c['pixel_fd']:+.3f} / {c['accuracy']:+.3f}" for s, c in change.items()))
    print(f"chosen: {best}" + ("" if allowed else " (none keeps accuracy and pixel distance)"))
    return best


def draw(name, xlabel, ylabel, curves):
    """curves {label: (x, array (points, teachers))} -> ROOT/name.png with mean and standard deviation, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return print("no picture: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.figure(figsize=(5, 3.5))
    for label, (x, v) in curves.items():
        plt.errorbar(x, v.mean(1), v.std(1, ddof=1), label=label, capsize=2)
    plt.xlabel(xlabel), plt.ylabel(ylabel), plt.legend(), plt.tight_layout()
    plt.savefig(ROOT / f"{name}.png", dpi=120)
    print(f"drawn: {ROOT / name}.png")
