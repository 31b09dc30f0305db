"""dsd.py with tiny sizes.

12 updates from 4 steps: dsdi makes 3 trajectories of 2 updates, then 6 of one; dsdn makes six of 4
steps.
"""
import json
import signal

import pytest
import torch
from conftest import are_equal, checkpoint, inside, largest_difference, losses, weights
from method_runs import load, report_of, stop_after, total_difference
from processes import start_and_signal, workers
from tiny_networks import unet_arch

import dsd
import models
from kit import checkpoints, sampling
from kit.processes import Processes, StepRandom
from solvers import guide, make_grid, make_schedule, predictor, sample_states, solver_grid

SCHEDULE = make_schedule("linear")
DSDN = "--variant dsdn --depth 8 --w 1 3".split()


def words(base, out, *more):
    command = ("dsd.py --depth 4 --steps 12 --batch-size 8 --lr 1e-3 --ema 0.5 --eval-samples 0 "
               "--log-every 1 --save-every 3")
    return [*command.split(), "--ckpt", base, "--out", out, *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, ckpt):
    out = tmp_path_factory.mktemp("whole")
    inside(*words(ckpt, out, *DSDN))
    return out


# ---- Resume and processes ----------------------------------------------------------------------


def test_resume_in_the_middle_of_a_trajectory(tmp_path, ckpt, whole):
    """Saved within a trajectory of four updates: the state goes on from where it was, under the
    same labels and guidance."""
    again = words(ckpt, tmp_path, *DSDN)
    stop_after(6, *again)
    start_and_signal(again, tmp_path, 8, signal.SIGKILL)
    inside(*again)
    a = load(tmp_path)
    b = load(whole)
    assert are_equal(a["model"], b["model"])
    assert are_equal(a["ema"], b["ema"])
    assert torch.equal(a["z"], b["z"])
    assert losses(tmp_path) == losses(whole)
    assert min(losses(whole)) > 0

    start = torch.load(ckpt, weights_only=True)["model"]
    assert largest_difference(b["model"], start) > 1e-3
    assert largest_difference(b["ema"], start) > 1e-3
    assert not are_equal(b["model"], b["ema"])
    assert len(b["opt"]["param_groups"]) == 1
    group = b["opt"]["param_groups"][0]
    assert group["lr"] == pytest.approx(1e-3 * dsd.learning_rate(11, 12))
    assert list(group["betas"]) == [0.9, 0.98]


def test_two_processes_agree_with_one(tmp_path, ckpt, whole):
    workers(2, *words(ckpt, tmp_path, *DSDN))
    # The smallest loss is 1e-8, of differences of 1e-4:
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-4, abs=1e-8)
    a = load(tmp_path)
    b = load(whole)
    assert largest_difference(a["model"], b["model"]) < 1e-4
    assert (a["z"] - b["z"]).abs().max() < 1e-5 * b["z"].abs().max()


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_tsd_resumes(tmp_path, ckpt, amp):
    """In the middle of the first depth; where the student is about to become the teacher; later."""
    whole = tmp_path / "whole"
    more = ("--variant", "tsd", "--amp", amp)
    inside(*words(ckpt, whole, *more))
    assert min(losses(whole)) > 0
    base = torch.load(ckpt, weights_only=True)["model"]
    states = {}
    for stop in (4, 6, 9):
        part = tmp_path / f"part-{stop}"
        stop_after(stop, *words(ckpt, part, *more))
        states[stop] = state = load(part)
        teacher = state["teacher"]
        assert state["step"] == stop
        assert are_equal(teacher, as_stored(base, teacher)) == (stop <= 6)
        has_bf16 = any(v.dtype == torch.bfloat16 for v in teacher.values())
        assert has_bf16 == (amp == "bf16")

        inside(*words(ckpt, part, *more))
        assert are_equal(weights(part), weights(whole))
        assert losses(part) == losses(whole)

    # The teacher of the second depth is the student as it was when the first ended, not its
    # average:
    teacher = load(whole)["teacher"]
    assert are_equal(teacher, as_stored(states[6]["model"], teacher))
    assert not are_equal(teacher, as_stored(states[6]["ema"], teacher))

    # Without a teacher the first loss has the same bits:
    inside(*words(ckpt, tmp_path / "dsdi", "--variant", "dsdi", "--amp", amp))
    assert losses(tmp_path / "dsdi")[0] == losses(whole)[0]
    assert losses(tmp_path / "dsdi")[1:] != losses(whole)[1:]


def as_stored(weights, teacher):
    """The weights, in the precision of the teacher's."""
    return {k: v.to(teacher[k].dtype) for k, v in weights.items()}


# ---- The loop ----------------------------------------------------------------------------------


@pytest.mark.parametrize("w, velocity", [((1, 1), False), ((1, 3), False), ((1, 3), True)])
def test_the_trajectory_is_that_of_the_sampler(tmp_path, tiny, w, velocity):
    """With next to no learning rate the states are those of the sampler from the same noise, labels
    and scales, on the grid of that depth."""
    kind = dict(prediction="eps", schedule="linear")
    grid = make_grid("uniform", 8)
    if velocity:
        kind = dict(prediction="velocity", schedule="interpolant")
        grid = make_grid("sit", 8)
    net = models.fill_random(models.build({**tiny.arch, "learn_sigma": not velocity}))
    torch.save(checkpoint(net, **kind), tmp_path / "base.pt")

    # The third update of the second trajectory: six of eight steps.
    out = tmp_path / "out"
    more = "--variant dsdn --depth 8 --steps 8 --lr 1e-12".split()
    stop_after(7, *words(tmp_path / "base.pt", out, *more, "--w", *w))
    z = load(out)["z"]

    rng = StepRandom(Processes("off"), 0, 4, 8)
    noise = rng.normal((1, 8, 8))
    y = rng.integers(0, 10)
    scale = w[0] + (w[1] - w[0]) * rng.uniform()
    net.eval()
    guided = guide(net, scale) if w[1] > 1 else net
    schedule = make_schedule(kind["schedule"])
    predict = predictor(guided, y, schedule, kind["prediction"])
    want = sample_states(predict, noise, schedule, grid)[6]
    assert len(y.unique()) > 3
    assert (z - want).abs().max() < 1e-5 * want.abs().max()


def test_flags_reach_the_loss(tmp_path, ckpt):
    """The first loss of --target next is that of --target pd over (1 - rho)^2, at the pair 999,
    749, 499 of four steps."""
    first = {}
    for target in ("pd", "next"):
        out = tmp_path / target
        inside(*words(ckpt, out, "--variant", "dsdn", "--steps", 2, "--target", target))
        first[target] = losses(out)[0]
    r = [float(SCHEDULE.alpha[t] / SCHEDULE.sigma[t]) for t in (999, 749, 499)]
    rho = (r[1] - r[0]) / (r[2] - r[0])
    assert first["pd"] / first["next"] == pytest.approx((1 - rho) ** 2, rel=1e-3)


# ---- What it leaves ----------------------------------------------------------------------------


def test_the_student_is_sampled_as_it_was_trained(tmp_path, ckpt, whole, monkeypatch):
    """On uniform nodes, however many; issd.py takes it as it is."""
    net, spec = checkpoints.load_model(whole / "last.pt")
    assert (spec["grid"], spec["nfe"], spec["method"]) == ("uniform", 4, "dsdn")
    assert are_equal(net.state_dict(), load(whole)["ema"])
    for nfe in ([], ["--nfe", 2]):
        inside("sample.py", "--ckpt", whole / "last.pt", "--num-samples", 3, *nfe,
               "--out", tmp_path / "x.png")

    grids = []

    def spy(*args):
        grids.append(solver_grid(*args))
        return grids[-1]

    proc = Processes("off")
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "solver_grid", spy)
        for nfe in (None, 2, 5):
            options = sampling.SampleOptions(nfe=nfe)
            sampling.sample_images(proc.autocast(net), spec, proc, 2, options)
    used = list(dict.fromkeys(map(tuple, grids)))  # a grid may be asked for more than once
    assert used == [tuple(make_grid("uniform", n)) for n in (4, 2, 5)]

    done = inside("issd.py", "--ckpt", whole / "last.pt", "--out", tmp_path / "issd",
                  *"--nfe 6 --steps 2 --batch-size 4 --eval-samples 0 --data digits".split())
    assert "is ready" in done
    made = checkpoints.describe(tmp_path / "issd" / "last.pt")
    assert made["grid"] == make_grid("uniform", 6)


@pytest.mark.parametrize("context, more", [
    ("class", "--variant tsd --w 1 3"), ("none", "")])
def test_latent_diffusion_unet_on_one_and_two_processes(tmp_path, context, more):
    """With classes, guided, on two processes, with TSD; and without classes."""
    arch = unet_arch(context, in_channels=3, attention_resolutions=[2], num_heads=1)
    net = models.fill_random(models.build(arch))
    ckpt = tmp_path / "base.pt"
    one = tmp_path / "one"
    two = tmp_path / "two"
    torch.save(checkpoint(net, name="LDM-ImageNet", schedule="ldm", scale=1.0,
                          classes=arch["num_classes"], cfg=1.5), ckpt)
    more = f"--batch-size 4 --steps 6 {more}".split()
    inside(*words(ckpt, one, *more))
    assert min(losses(one)) > 0
    moved = total_difference(weights(one), net.state_dict())
    assert moved > 0.1
    inside("sample.py", "--ckpt", one / "last.pt", "--num-samples", 2, "--out", tmp_path / "x.npz")
    if context == "class":
        workers(2, *words(ckpt, two, *more))
        assert total_difference(weights(one), weights(two)) < 1e-3 * moved
        assert losses(one) == pytest.approx(losses(two), rel=1e-4)


def test_a_velocity_model_distils_itself(tmp_path, tiny):
    torch.save(checkpoint(tiny, prediction="velocity", schedule="interpolant"),
               tmp_path / "flow.pt")
    out = tmp_path / "out"
    inside(*words(tmp_path / "flow.pt", out, "--variant", "tsd", "--w", 1, 2))
    assert min(losses(out)) > 0
    assert checkpoints.describe(out / "last.pt")["grid"] is None


def test_plans_of_released_models():
    def plan(words):
        return inside("dsd.py", *words.split(), "--dry-run")

    out = plan("--model LDM-ImageNet --variant dsdi")
    assert "401.4M" in out
    assert "64: 832, 32: 832, 16: 840, 8: 828, 4: 834, 2: 834" in out
    assert "lr 1e-07 -> 1e-08" in out
    assert "8 forward units" in out
    assert "4 forward units" in plan("--model LDM-Bedroom --image-size 128")
    assert "10 forward units" in plan("--model LDM-ImageNet --variant tsd")


def test_the_table_of_the_digits(tmp_path, ckpt, monkeypatch):
    """Every row is of its own network, at its own number of steps, on uniform nodes."""
    asked = {}
    finish = dsd.finish

    def spy(args, proc, method, began, entries):
        asked.update(entries)
        finish(args, proc, method, began, entries)

    monkeypatch.setattr(dsd, "finish", spy)
    command = "dsd.py --steps 12 --depth 4 --batch-size 8 --lr 1e-3 --eval-samples 12".split()
    command += ["--ckpt", ckpt, "--out", tmp_path]
    out = inside(*command)
    files = {"before": ckpt, "after": tmp_path / "last.pt",
             "continued training": tmp_path / "continued" / "last.pt"}
    want = []
    for name in files:
        want += [name, f"{name}, 2 steps", f"{name}, 8 steps"]
    assert set(asked) == set(want)
    for name, entry in asked.items():
        stem, _, steps = name.partition(", ")
        nfe = int(steps.split()[0]) if steps else 4
        file = torch.load(files[stem], weights_only=True)
        assert are_equal(entry.net.net.state_dict(), file["ema"])
        assert (entry.spec["grid"], entry.nfe, entry.cfg) == ("uniform", nfe, 1.0)

    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["nfe"] == 4
    assert metrics["before"]["fd"] > 0
    assert set(metrics["controls"]) == set(asked) - {"before", "after"}
    assert (tmp_path / "samples.png").exists()
    assert report_of(inside(*command)) == report_of(out)  # a finished run prints it again


# ---- From scratch ------------------------------------------------------------------------------

SCRATCH = "dsd.py --from-scratch --steps 8 --batch-size 8 --log-every 1 --save-every 3".split()
MEASURED = ("--eval-samples", 4, "--nfe", 4)
NOT_MEASURED = ("--eval-samples", 0)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    out = tmp_path_factory.mktemp("scratch")
    inside(*SCRATCH, *MEASURED, "--out", out)
    return out


def test_from_scratch(tmp_path, scratch):
    """Eq. 1 trains, resumes exactly, takes the same batches as its control, and says 4 units a
    step."""
    plan = inside(*SCRATCH, *MEASURED, "--out", tmp_path / "x", "--dry-run")
    assert "4 forward units" in plan
    command = [*SCRATCH, *MEASURED, "--out", tmp_path / "b"]
    stop_after(4, *command)
    out = inside(*command)
    assert are_equal(weights(scratch), weights(tmp_path / "b"))
    assert losses(scratch) == losses(tmp_path / "b")
    assert "plain training" in out
    spec = checkpoints.describe(scratch / "last.pt")
    assert (spec["prediction"], spec["method"]) == ("v", "dsd-scratch")
    assert losses(scratch) != losses(scratch / "plain")
    assert report_of(inside(*command)) == report_of(out)


@pytest.mark.parametrize("flag, value", [("--depth", 8), ("--target", "next")])
def test_flags_of_from_scratch_reach_the_loss(tmp_path, scratch, flag, value):
    inside(*SCRATCH, *NOT_MEASURED, flag, value, "--out", tmp_path)
    assert losses(tmp_path)[0] > losses(scratch)[0]


def test_from_scratch_without_beta_is_train_py(tmp_path, scratch):
    inside(*SCRATCH, *NOT_MEASURED, "--loss-weights", 1, 0, "--out", tmp_path)
    assert are_equal(weights(tmp_path), weights(scratch / "plain"))
    assert losses(tmp_path) == losses(scratch / "plain")
