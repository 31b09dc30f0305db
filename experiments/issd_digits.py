"""Does iSSD work on the digits? 10 steps, no guidance, 2,000 samples a row, all rows of a teacher from the same noise.

    python experiments/issd_digits.py                                          about an hour on two CPU cores
    python experiments/issd_digits.py --lam-max 1    lam 0.15: more gain, less class accuracy

1. Make the teachers: python train.py --seed 0, 1, ...
2. Choose lam and steps for every reading of Algorithm 2 on teachers 0-6, one seed: of the settings that lose at most 0.003 of
   accuracy and nothing of pixel distance against their base model, the one with the largest mean gain in Frechet distance (digits-cnn).
3. Report them on held-out teachers 7-21 with three seeds each, on other noise, also with a feature network that was not used to
   choose (digits-mlp). Gains are paired within a teacher, averaged over its seeds; the standard error is over teachers.
4. Where accuracy or pixel distance are then worse than after continued training by more than its spread, take a smaller lam
   (--lam-max).

Finished jobs are kept in results.jsonl and not repeated.
"""
import argparse
import contextlib
import itertools
import json
import os
import sys
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

READINGS = ["teacher", "student", "literal"]
LAMS, RATES, STEPS = [0.05, 0.1, 0.15, 0.25], [5e-5], [50, 100]
TUNE, SEEDS = [0, 1, 2, 3, 4, 5, 6], [0, 1, 2]
NETWORKS = ["digits-cnn", "digits-mlp"]


def job(key):
    """One row of numbers: ("make", T) | ("base", T, noise, nfe) | ("continued" or a reading, T, noise, seed, lam, lr, steps)."""
    import torch
    torch.set_num_threads(1)
    import checkpoints, data, fid, issd, train
    from runtime import Processes
    proc, out = Processes("off"), Path(key[-1]) / "-".join(str(k) for k in key[:-1])
    kind, T, *rest = key[:-1]
    teacher = Path(key[-1]) / f"teacher-{T}"
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        if kind == "make":
            train.teacher(teacher, seed=T)
            return key, None
        if kind == "base":
            (noise, nfe), ckpt = rest, teacher / "last.pt"
        else:
            noise, seed, lam, lr, steps = rest
            nfe, ckpt = 10, out / "last.pt"
            common = f"--ckpt {teacher}/last.pt --steps {steps} --lr {lr} --batch-size 64 --seed {seed} --out {out} --save-every 100000"
            if kind == "continued":
                train.main(train.parser().parse_args(f"{common} --warmup 0 --decay constant --ema 0 --clip 0".split()))
            else:
                issd.main(issd.parser().parse_args(f"{common} --nfe 10 --lam {lam} --reading {kind} --eval-samples 0".split()))
        net, info = checkpoints.load_model(ckpt)
        x, y = data.sample_images(proc.mixed(proc.frozen(net)), info, proc, 2000, noise, nfe, 1.0)
    return key, {name: fid.evaluate(x, y, proc, name) for name in NETWORKS}


def run_all(keys, done, file, jobs, job=job):
    """Do what is not in `done` yet, in processes of their own; results go into `done` and as lines into the file."""
    todo = [k for k in keys if k not in done]
    with get_context("spawn").Pool(jobs, maxtasksperchild=20) as pool:
        for i, (key, result) in enumerate(pool.imap_unordered(job, [(*k, str(file.parent)) for k in todo], chunksize=1)):
            done[key[:-1]] = result
            with open(file, "a") as f:
                f.write(json.dumps([key[:-1], result]) + "\n")
            print(f"\r{i + 1}/{len(todo)} jobs", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def main(args):
    import numpy as np
    os.environ["OMP_NUM_THREADS"] = "1"
    file = Path(args.out).resolve() / "results.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    done = {tuple(k): v for k, v in map(json.loads, file.read_text().splitlines())} if file.exists() else {}

    # 1, 2: teachers, then the choice
    run_all([("make", T) for T in TUNE + args.held_out], done, file, args.jobs)
    settings = list(itertools.product(LAMS, RATES, STEPS))
    run_all([("base", T, 0, 10) for T in TUNE] + [(r, T, 0, 0, *s) for s in sorted(settings, key=lambda s: -s[2]) for r in READINGS for T in TUNE],
            done, file, args.jobs)
    best = {}
    for r in READINGS:
        def change(s, what):
            return np.mean([done[r, T, 0, 0, *s]["digits-cnn"][what] - done["base", T, 0, 10]["digits-cnn"][what] for T in TUNE])
        allowed = [s for s in settings if s[0] <= args.lam_max and change(s, "accuracy") >= -0.003 and change(s, "pixel_fd") <= 0]
        best[r] = min(allowed or [s for s in settings if s[0] <= args.lam_max], key=lambda s: change(s, "fd"))
        print(f"\n{r}: {len(allowed)} of {len(settings)} settings allowed{'' if allowed else ', so the best of all'}; chosen lam {best[r][0]}, lr {best[r][1]}, {best[r][2]} steps")
        print("| lam \\ lr, steps | " + " | ".join(f"{lr:g}, {n}" for lr, n in itertools.product(RATES, STEPS)) + " |\n|" + "---|" * (1 + len(RATES) * len(STEPS)))
        for lam in LAMS:
            print(f"| {lam} | " + " | ".join(f"{change((lam, *s), 'fd'):+.1f} / {change((lam, *s), 'pixel_fd'):+.2f} / {change((lam, *s), 'accuracy'):+.3f}"
                                             for s in itertools.product(RATES, STEPS)) + " |")

    # 3: the report
    noise = lambda T: 100 + T
    default = best[args.reading]
    rows = {"base": lambda T, s: ("base", T, noise(T), 10), "base, 50 steps": lambda T, s: ("base", T, noise(T), 50),
            "continued training": lambda T, s: ("continued", T, noise(T), s, 0, *default[1:])}
    rows |= {f"iSSD, reading {r}": lambda T, s, r=r: (r, T, noise(T), s, *best[r]) for r in READINGS}
    run_all(sorted({row(T, s) for row in rows.values() for T in args.held_out for s in SEEDS}, key=str), done, file, args.jobs)
    print(f"\nheld-out teachers {args.held_out}, three seeds each: mean +- standard deviation over teachers (of means over seeds)")
    print("| | FD digits-cnn | FD digits-mlp | pixel distance | accuracy | gain on base | gain on continued | spread over seeds |\n|" + "---|" * 8)
    values = lambda row, net, what: np.array([[done[rows[row](T, s)][net][what] for s in SEEDS] for T in args.held_out])
    pm = lambda v, digits: f"{v.mean():.{digits}f} +- {v.std(ddof=1):.{digits}f}"
    for row in rows:
        cells = [pm(values(row, net, what).mean(1), digits) for net, what, digits in
                 (("digits-cnn", "fd", 2), ("digits-mlp", "fd", 2), ("digits-cnn", "pixel_fd", 3), ("digits-cnn", "accuracy", 3))]
        for control in ("base", "continued training"):
            gains = [(values(control, net, "fd") - values(row, net, "fd")).mean(1) for net in NETWORKS]
            cells.append(" , ".join(f"{g.mean():.2f} (se {g.std(ddof=1) / len(g) ** 0.5:.2f})" for g in gains) if row != control else "")
        cells.append(f"{values(row, 'digits-cnn', 'fd').std(1, ddof=1).mean():.2f}")
        print(f"| {row} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    p.add_argument("--reading", choices=READINGS, default="teacher", help="whose learning rate and steps the continued training takes")
    p.add_argument("--lam-max", type=float, default=0.1, help="largest lam to choose")
    p.add_argument("--held-out", type=int, nargs="+", default=list(range(7, 22)), help="teachers of the report")
    p.add_argument("--out", default="runs/experiments/issd_digits")
    main(p.parse_args())
