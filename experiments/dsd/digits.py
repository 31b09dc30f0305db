"""Tables 1, 2 and 4 of the DSD paper in miniature, on the digits.

    python -m experiments.dsd.digits                 an hour on two CPU cores
    python -m experiments.dsd.digits --prediction v --variants tsd dsdgl
                                                     ten minutes: teachers of v, unguided only

Every variant, its teacher-student counterpart (TSD) and progressive distillation (PD): teachers of
16 steps, 256 updates of batch 64, samples of 2, 4, 8 and 16 steps, all on uniform nodes. All of it
twice: trained without guidance, and as in the paper with a scale from 1 to 3, which is measured
with 1.5. At 4 steps each is also measured the other way.

The learning rate of each method is chosen in the same way on two tuning teachers, with one seed, on
samples of 2, 4 and 8 steps, by digits-cnn among the rates that cost at most 0.02 of accuracy and
nothing of pixel distance. The results are of three held-out teachers with three seeds each.

PD is ddil.py without its mixture, on data, unguided. It is measured with as many updates, and with
as many evaluations.
"""
import argparse
from dataclasses import dataclass

from experiments.runner import (
    COLUMNS,
    FEW_HELD_OUT_TEACHERS,
    FEW_TUNING_TEACHERS,
    HEADER,
    SEEDS,
    Cell,
    Row,
    cells,
    choose,
    continued,
    gains_text,
    path,
    plus_minus,
    print_header,
    run,
    teacher,
    values,
)

NFES, TUNING_NFES = [2, 4, 8, 16], [2, 4, 8]
UPDATES = 256
VARIANTS = ["tsd", "dsdn", "dsdi", "dsdgl", "dsdgexp"]
RATES, PD_RATES = [3e-6, 1e-5, 3e-5, 1e-4], [1e-4, 3e-4, 1e-3]
WEIGHTS = ["snr", "output"]  # of PD's loss
# Guidance in training: the range of scales for --w, then the scale of the samples it is chosen by.
UNGUIDED, GUIDED = "1 1", "1 3"
SAMPLE_SCALES = {UNGUIDED: 1.0, GUIDED: 1.5}


def row(number, nfe, cfg):
    """How the checkpoints of a teacher's number are sampled."""
    return Row(nfe, cfg, noise=number + 100, changes={"grid": "uniform"})


@dataclass
class Design:
    """What the flags choose, and the commands that follow from it. number: the teacher's."""

    prediction: str
    variants: list

    @property
    def scales(self):
        """Teachers that predict v are unguided only."""
        return SAMPLE_SCALES if self.prediction == "eps" else {UNGUIDED: 1.0}

    def base(self, number):
        return teacher(number, prediction=self.prediction)

    def student(self, number, seed, variant, w, lr):
        return (f"dsd --ckpt {path(self.base(number))} --variant {variant} --w {w} --lr {lr:g} "
                f"--steps {UPDATES} --seed {seed}")

    def pd(self, number, seed, lr, updates, weight):
        """Three halvings that share the updates."""
        stages = [f"{N}:{(updates + 2 - i) // 3}" for i, N in enumerate((16, 8, 4))]
        return (f"ddil --ckpt {path(self.base(number))} --stages {' '.join(stages)} --dagger 0 0 "
                f"--threshold off --weight {weight} --lr {lr:g} --seed {seed}")


def file_of(method, nfe):
    """PD keeps a student, a file, for every number of steps. The others have one network."""
    return f"nfe{nfe}.pt" if method == "pd" else "last.pt"


# ---- The learning rates -------------------------------------------------------------------------


def tuning_cells(method, command, cfg):
    """Per tuning teacher one cell for every number of steps; command(number)."""
    lists = []
    for number in FEW_TUNING_TEACHERS:
        found = []
        for nfe in TUNING_NFES:
            found.append(Cell(command(number), row(number, nfe, cfg), file_of(method, nfe)))
        lists.append(found)
    return lists


def tuning_settings(design):
    """{(method, range of guidance or weight of the loss): {learning rate: cells}}."""
    settings = {}
    for variant in design.variants:
        for w, cfg in design.scales.items():
            settings[variant, w] = {}
            for lr in RATES:
                def command(number, variant=variant, w=w, lr=lr):
                    return design.student(number, 0, variant, w, lr)
                settings[variant, w][lr] = tuning_cells(variant, command, cfg)
    for weight in WEIGHTS:
        settings["pd", weight] = {}
        for lr in PD_RATES:
            def command(number, weight=weight, lr=lr):
                return design.pd(number, 0, lr, UPDATES, weight)
            settings["pd", weight][lr] = tuning_cells("pd", command, 1.0)
    return settings


def choose_rates(design):
    """-> the learning rates by (method, range of guidance or weight), PD's weight of the loss."""
    settings = tuning_settings(design)
    bases = {cfg: tuning_cells("base", design.base, cfg) for cfg in design.scales.values()}
    get = run([bases, settings])

    chosen = {}
    for (method, mode), options in settings.items():
        name = f"weight {mode}" if method == "pd" else mode
        print(f"{method}, {name}: change of FD / pixel distance / accuracy by learning rate")
        base = bases[design.scales.get(mode, 1.0)]
        chosen[method, mode] = choose(get, base, options, accuracy=0.02)

    fd = {}
    for weight in WEIGHTS:
        fd[weight] = values(get, settings["pd", weight][chosen["pd", weight]], "fd").mean()
    weight = "snr" if fd["snr"] < fd["output"] else "output"
    print(f"PD takes weight {weight}")
    return chosen, weight


# ---- The report ---------------------------------------------------------------------------------


@dataclass
class Arm:
    """A row of the tables."""

    method: str          # base, control, a variant or pd
    command: object      # (number, seed) -> the command
    w: str = UNGUIDED    # guidance in training
    own_nfe: int = None  # of PD's student that makes all numbers of steps, None: each has its own

    def places(self, design):
        """(nfe, cfg) where it is measured: as it was chosen, and at 4 steps the other way."""
        found = []
        for cfg in design.scales.values():
            both_ways = self.method == "base"
            for nfe in NFES:
                if self.method == "pd" and nfe == 16:  # the teacher's own number of steps
                    continue
                if cfg == SAMPLE_SCALES[self.w] or nfe == 4 or both_ways:
                    found.append((nfe, cfg))
        return found

    def cells(self, nfe, cfg):
        return cells(self.command, lambda number: row(number, nfe, cfg), FEW_HELD_OUT_TEACHERS,
                     SEEDS[:1] if self.method == "base" else SEEDS,
                     file_of(self.method, self.own_nfe or nfe))


def report_arms(design, chosen, weight):
    """{name: Arm}, in the order of the tables."""
    def control(number, seed):
        lr = chosen["dsdgl", UNGUIDED]
        return continued(path(design.base(number)), seed, lr, UPDATES)

    arms = {"base": Arm("base", lambda number, seed: design.base(number)),
            "continued training": Arm("control", control)}
    for w in design.scales:
        for variant in design.variants:
            def student(number, seed, variant=variant, w=w):
                return design.student(number, seed, variant, w, chosen[variant, w])
            arms[f"{variant}, w {w}"] = Arm(variant, student, w)

    def pd_of(updates):
        return lambda number, seed: design.pd(number, seed, chosen["pd", weight], updates, weight)

    arms["PD, equal updates"] = Arm("pd", pd_of(UPDATES))
    arms["PD, equal evaluations"] = Arm("pd", pd_of(round(UPDATES * 2 / 3)))
    arms["PD, its 2-step student"] = Arm("pd", pd_of(UPDATES), own_nfe=2)
    return arms


def print_report(design, arms):
    measured = {}  # {(nfe, cfg): {name: cells}}
    for name, arm in arms.items():
        for nfe, cfg in arm.places(design):
            measured.setdefault((nfe, cfg), {})[name] = arm.cells(nfe, cfg)
    get = run(measured)
    for cfg in design.scales.values():
        for nfe in NFES:
            print(f"\n{nfe} steps, guidance {cfg:g}")
            print_header(HEADER, "contrast", "beyond the range", "gain on base (cnn, mlp)",
                         "gain on TSD")
            rows = measured[nfe, cfg]
            for name, found in rows.items():
                tsd = None
                if arms[name].method in design.variants:
                    tsd = rows.get(f"tsd, w {arms[name].w}")
                print_row(get, name, found, [rows["base"], tsd])


def print_row(get, name, found, against):
    texts = []
    for network, metric, digits in COLUMNS:
        texts.append(plus_minus(values(get, found, metric, network).mean(1), digits))
    texts.append(f"{values(get, found, 'contrast').mean():.3f}")
    texts.append(f"{values(get, found, 'beyond').mean():.2f}")
    for other in against:
        compared = other is not None and other is not found
        texts.append(gains_text(get, other, found) if compared else "")
    print(f"| {name} | " + " | ".join(texts) + " |")


def main(args):
    design = Design(args.prediction, args.variants)
    run([design.base(number) for number in FEW_TUNING_TEACHERS + FEW_HELD_OUT_TEACHERS])
    chosen, weight = choose_rates(design)
    print_report(design, report_arms(design, chosen, weight))


def parser():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--prediction", choices=["eps", "v"], default="eps", help="of the teachers")
    p.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS,
                   help="dsdgl must be among them (default: all)")
    return p


if __name__ == "__main__":
    main(parser().parse_args())
