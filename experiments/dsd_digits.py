"""Tables 1, 2 and 4 of the DSD paper in miniature: every variant, its teacher-student counterpart and progressive distillation on the digits.

    python experiments/dsd_digits.py                 an hour on two CPU cores
    python experiments/dsd_digits.py --prediction v --variants tsd dsdgl      ten minutes: teachers that predict v, unguided only

Teachers of 16 steps, 256 updates of batch 64, samples of 2, 4, 8 and 16 steps, all on uniform nodes. Twice: trained without guidance, and as in the
paper with a scale from 1 to 3, measured with 1.5 then (at 4 steps each also the other way). The learning rate of each method is chosen in the same way on teachers 0
and 1 (one seed, samples of 2, 4 and 8 steps, guidance 1 and 1.5, by digits-cnn among those that cost at most 0.02 of accuracy and nothing of pixel distance);
results are of teachers 10, 11, 12, three seeds each. PD (ddil.py without its mixture, on data, unguided) has as many updates, and as many evaluations.
"""
import argparse

from common import NETWORKS, choose, continued, path, run, teacher, values

TUNE, HELD_OUT, SEEDS, NFES, P = [0, 1], [10, 11, 12], [0, 1, 2], [2, 4, 8, 16], 256
VARIANTS = ["tsd", "dsdn", "dsdi", "dsdgl", "dsdgexp"]
MODES = {"1 1": 1.0, "1 3": 1.5}  # guidance in training -> of the samples it is chosen by
RATES, PD_RATES = [3e-6, 1e-5, 3e-5, 1e-4], [1e-4, 3e-4, 1e-3]
UNIFORM, PREDICTION = {"grid": "uniform"}, "eps"

def base(T):
    return teacher(T, prediction=PREDICTION)


def student(T, seed, variant, w, lr, steps=P):
    return f"dsd --ckpt {path(base(T))} --variant {variant} --w {w} --lr {lr:g} --steps {steps} --seed {seed}"


def pd(T, seed, lr, steps, weight):
    stages = " ".join(f"{N}:{(steps + 2 - i) // 3}" for i, N in enumerate((16, 8, 4)))
    return f"ddil --ckpt {path(base(T))} --stages {stages} --dagger 0 0 --threshold off --weight {weight} --lr {lr:g} --seed {seed}"


def row(T, nfe, cfg):
    return nfe, cfg, T + 100, None, UNIFORM


def cell(command, T, nfe, cfg, file=None):
    """(command, row, file): PD keeps a file for every number of steps."""
    return (command, row(T, nfe, cfg)) + ((file or f"nfe{nfe}.pt",) if command.startswith("ddil") else ())


def main(args):
    global PREDICTION, MODES, VARIANTS
    VARIANTS = args.variants
    PREDICTION, MODES = args.prediction, MODES if args.prediction == "eps" else {"1 1": 1.0}
    run([(base(T), []) for T in TUNE + HELD_OUT])

    # The learning rates:
    at = lambda command, T, cfg: [cell(command, T, nfe, cfg) for nfe in (2, 4, 8)]
    each = lambda make, cfg: [at(make(T), T, cfg) for T in TUNE]
    settings = {(v, w): {lr: each(lambda T: student(T, 0, v, w, lr), cfg) for lr in RATES} for v in VARIANTS for w, cfg in MODES.items()}
    settings |= {("pd", weight): {lr: each(lambda T: pd(T, 0, lr, P, weight), 1.0) for lr in PD_RATES} for weight in ("snr", "output")}
    bases = {cfg: each(base, cfg) for cfg in MODES.values()}
    get = run(jobs([bases, settings]))
    chosen = {}
    for (v, w), options in settings.items():
        print(f"{v}, {w if v != 'pd' else 'weight ' + w}: change of FD / pixel distance / accuracy by learning rate")
        chosen[v, w] = choose(get, bases[MODES.get(w, 1.0)], options, accuracy=0.02)

    # Held out:
    rows = {"base": lambda T, s: base(T), "continued training": lambda T, s: continued(path(base(T)), s, chosen["dsdgl", "1 1"], P)}
    for w in MODES:
        rows |= {f"{v}, w {w}": lambda T, s, v=v, w=w: student(T, s, v, w, chosen[v, w]) for v in VARIANTS}
    weight = "snr" if better(get, settings, chosen) else "output"
    print(f"PD takes weight {weight}")
    rows |= {"PD, equal updates": lambda T, s: pd(T, s, chosen["pd", weight], P, weight),
             "PD, equal evaluations": lambda T, s: pd(T, s, chosen["pd", weight], round(P * 2 / 3), weight),
             "PD, its 2-step student": lambda T, s: pd(T, s, chosen["pd", weight], P, weight)}
    own = lambda name: 1.5 if name.endswith("1 3") else 1.0  # measured as chosen at every number of steps, the other way at 4; base both ways
    places = lambda name: [(nfe, cfg) for cfg in (1.0, 1.5) for nfe in NFES if (cfg == own(name) or cfg in MODES.values() and (nfe == 4 or name == "base")) and not (name.startswith("PD") and nfe == 16)]
    cells = {(name, nfe, cfg): [[cell(make(T, s), T, nfe, cfg, "nfe2.pt" if "2-step" in name else None) for s in SEEDS[:1 if name == "base" else 3]] for T in HELD_OUT]
             for name, make in rows.items() for nfe, cfg in places(name)}
    get = run(jobs([cells]))
    for cfg in (1.0, 1.5):
        for nfe in NFES:
            if ("base", nfe, cfg) not in cells:
                continue
            print(f"\n{nfe} steps, guidance {cfg:g}\n| | FD digits-cnn | FD digits-mlp | pixel distance | accuracy | contrast | beyond the range | gain on base (cnn, mlp) | gain on TSD |\n|" + "---|" * 9)
            for name in rows:
                if (name, nfe, cfg) in cells:
                    show(get, name, cells[name, nfe, cfg], [cells.get((other, nfe, cfg)) for other in ("base", f"tsd, w {name[-3:]}")])


def better(get, settings, chosen):
    fd = {w: values(get, settings["pd", w][chosen["pd", w]], "fd").mean() for w in ("snr", "output")}
    return fd["snr"] < fd["output"]


def jobs(tree):
    """All cells in nested dicts and lists -> jobs for run()."""
    out = []
    for part in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(part, tuple):
            out.append((part[0], [part[1]], *part[2:]))
        else:
            out += jobs(part)
    return out


def show(get, name, cells, against):
    pm = lambda v, digits: f"{v.mean():.{digits}f} +- {v.std(ddof=1):.{digits}f}"
    v = lambda what, net="digits-cnn": values(get, cells, what, net).mean(1)
    gain = lambda other: ", ".join(f"{g.mean():.2f} (se {g.std(ddof=1) / len(g) ** 0.5:.2f})" for g in (values(get, other, "fd", n).mean(1) - v("fd", n) for n in NETWORKS))
    print(f"| {name} | {pm(v('fd'), 2)} | {pm(v('fd', 'digits-mlp'), 2)} | {pm(v('pixel_fd'), 3)} | {pm(v('accuracy'), 3)} | {v('contrast').mean():.3f} | {v('beyond').mean():.2f} | "
          + " | ".join(gain(other) if other and other is not cells else "" for other in against) + " |")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--prediction", choices=["eps", "v"], default="eps")
    p.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="dsdgl must be among them")
    main(p.parse_args())
