"""Does DDIL help on the digits? Each objective with and without its mixture, at equal updates.

    python experiments/ddil_digits.py            about an hour on two CPU cores; finished jobs are kept in results.jsonl

Teachers predict v (python train.py --prediction v --seed T). The learning rate of each objective is chosen WITHOUT the mixture on
teachers 0 and 1, one seed, by the mean Frechet distance (digits-cnn) over all step counts; then both variants run on teachers 3, 4, 5
with three seeds each (one without thresholding), 2,000 samples a row on the same noise. Gains are paired within (teacher, seed); the standard error is over
the teachers' means.

Rows: pd (halvings 16 -> 8 -> 4 -> 2 -> 1), weak (the same with a fifth of the updates), jump (a single stage from the teacher's own 4 steps to 2,
then 1: longer steps), lcm and dmd2 (4 steps), each also without thresholding.
"""
import argparse
import contextlib
import itertools
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from issd_digits import NETWORKS, run_all

SETTINGS = {  # name: words of the command
    "pd": "--stages 16:100 8:100 4:100 2:100",
    "weak": "--stages 16:20 8:20 4:20 2:20",
    "jump": "--stages 4:100 2:100",
    "lcm": "--objective lcm --steps 400 --nfe 4",
    "dmd2": "--objective dmd2 --steps 400 --nfe 4",
}
RATES = {"pd": [3e-4, 1e-3, 3e-3], "weak": [3e-4, 1e-3, 3e-3], "jump": [3e-4, 1e-3, 3e-3], "lcm": [3e-5, 1e-4, 3e-4, 1e-3], "dmd2": [3e-5, 1e-4, 3e-4, 1e-3]}
MIX = {"ddil": "", "plain": "--dagger 0 0", "backward": "--dagger 1 1 --beta 1 1"}  # backward: DMD2's own simulation
TUNE, HELD_OUT, SEEDS = [0, 1], [3, 4, 5], [0, 1, 2]


def job(key):
    """("make", T) | ("base", T, nfe) | (setting, mix, threshold, T, seed, lr) -> {nfe: {network: distances}}, seconds."""
    import torch
    torch.set_num_threads(1)
    import checkpoints, data, ddil, fid, train
    from runtime import Processes
    from solvers import make_grid
    proc, root = Processes("off"), Path(key[-1])
    out, began = root / "-".join(map(str, key[:-1])), time.process_time()

    def rows(net, info, nfe):
        x, y = data.sample_images(proc.mixed(proc.frozen(net)), info, proc, 2000, 1000, nfe, 1.0)
        return {name: fid.evaluate(x, y, proc, name) for name in NETWORKS}

    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        if key[0] == "make":
            train.teacher(root / f"teacher-{key[1]}", key[1], "v")
            return key, None
        if key[0] == "base":
            net, info = checkpoints.load_model(root / f"teacher-{key[1]}" / "last.pt")
            return key, {str(key[2]): rows(net, {**info, "threshold": "clamp", "grid": make_grid("uniform", key[2]), "nfe": key[2]}, key[2])}
        setting, mix, threshold, T, seed, lr = key[:-1]
        ddil.main(ddil.parser().parse_args(f"--ckpt {root}/teacher-{T}/last.pt {SETTINGS[setting]} {MIX[mix]} --threshold {threshold} --seed {seed} --lr {lr} "
                                           f"--eval-samples 0 --save-every 100000 --out {out}".split()))
        seconds, result = time.process_time() - began, {}
        for file in out.glob("nfe*.pt"):
            net, info = checkpoints.load_model(file)
            result[str(info["nfe"])] = rows(net, info, info["nfe"])
    return key, {**result, "seconds": seconds}


def main(args):
    import numpy as np
    os.environ["OMP_NUM_THREADS"] = "1"
    file = Path(args.out).resolve() / "results.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    done = {tuple(k): v for k, v in map(json.loads, file.read_text().splitlines())} if file.exists() else {}
    run_all([("make", T) for T in TUNE + HELD_OUT], done, file, args.jobs, job)
    names = [s for s in args.settings if s in SETTINGS]
    run_all([("base", T, nfe) for T in HELD_OUT for nfe in (16, 8, 4, 2, 1)], done, file, args.jobs, job)

    # The learning rate, without the mixture:
    fd = lambda key, nfe: done[key][nfe]["digits-cnn"]["fd"]
    plain = lambda s: "backward" if s == "dmd2" else "plain"
    run_all([(s, plain(s), "clamp", T, 0, lr) for s in names for T in TUNE for lr in RATES[s]], done, file, args.jobs, job)
    chosen = {}
    for s in names:
        score = {lr: np.mean([fd((s, plain(s), "clamp", T, 0, lr), n) for T in TUNE for n in done[s, plain(s), "clamp", T, 0, lr] if n != "seconds"]) for lr in RATES[s]}
        chosen[s] = min(score, key=score.get)
        print(f"{s}: lr {chosen[s]:g} of " + ", ".join(f"{lr:g} ({v:.1f})" for lr, v in score.items()))

    # With and without:
    variants = [(m, t) for t in ("clamp", "off") for m in ("plain", "ddil")]
    seeds = {"clamp": SEEDS, "off": SEEDS[:1]}
    keys = [(s, plain(s) if m == "plain" else m, t, T, seed, chosen[s]) for m, t in variants for s in names for T, seed in itertools.product(HELD_OUT, seeds[t])]
    run_all(keys, done, file, args.jobs, job)

    # The table:
    print(f"\n{'':18}{'steps':>6}{'FD cnn':>16}{'FD mlp':>15}{'pixel':>15}{'accuracy':>15}{'recall':>8}   gain of the mixture in FD cnn, mlp (se over teachers)")
    for nfe in ("16", "8", "4", "2", "1"):
        at = lambda net, what: np.array([done["base", T, int(nfe)][nfe][net][what] for T in HELD_OUT])
        print(f"{'base':18}{nfe:>6}" + "".join(f"{at(n, w).mean():9.3f} +-{at(n, w).std(ddof=1):5.2f}" for n, w in (("digits-cnn", "fd"), ("digits-mlp", "fd"), ("digits-cnn", "pixel_fd"), ("digits-cnn", "accuracy")))
              + f"{at('digits-cnn', 'recall').mean():8.2f}")
    for s in names:
        for m, t in variants:
            mix, pick = plain(s) if m == "plain" else m, lambda get, t=t: np.array([[get(T, seed) for seed in seeds[t]] for T in HELD_OUT])
            key = lambda T, seed, mix=mix: (s, mix, t, T, seed, chosen[s])
            for nfe in sorted((n for n in done[key(3, 0)] if n != "seconds"), key=int, reverse=True):
                at = lambda net, what, k=key: pick(lambda T, seed: done[k(T, seed)][nfe][net][what])
                line = f"{s + ' ' + mix + ('' if t == 'clamp' else ' off'):18}{nfe:>6}"
                line += "".join(f"{v.mean():9.3f} +-{v.mean(1).std(ddof=1):5.2f}" for v in (at("digits-cnn", "fd"), at("digits-mlp", "fd"), at("digits-cnn", "pixel_fd"), at("digits-cnn", "accuracy")))
                line += f"{at('digits-cnn', 'recall').mean():8.2f}"
                if m == "ddil":
                    gains = [(pick(lambda T, seed: done[key(T, seed, plain(s))][nfe][n]["fd"]) - at(n, "fd")).mean(1) for n in NETWORKS]
                    line += "   " + ", ".join(f"{g.mean():.2f} (se {g.std(ddof=1) / 3 ** 0.5:.2f})" for g in gains)
                print(line)
        seconds = {m: np.mean([done[s, plain(s) if m == "plain" else m, "clamp", T, k, chosen[s]]["seconds"] for T in HELD_OUT for k in SEEDS]) for m in ("plain", "ddil")}
        print(f"{'':18}CPU time with the mixture: {seconds['ddil'] / seconds['plain']:.2f} times that without")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--settings", nargs="+", default=list(SETTINGS))
    p.add_argument("--jobs", type=int, default=2)
    p.add_argument("--out", default="runs/ddil-digits")
    main(p.parse_args())
