"""What the scripts hand on: the arguments of the losses, of the controls, of the samplers.

Equations are tested elsewhere."""
import os
import shutil
import types

import numpy as np
import pytest
import torch
from conftest import checkpoint, inside, losses

import issd
import models
import ssd
import train
from kit import evaluate
from kit import run as kit_run
from kit.cli import UserError
from kit.processes import Processes, StepRandom
from kit.run import EMA, Guard, adamw
from solvers import PROJECTIONS, ddim_step, guide, make_grid, make_schedule

PROC = Processes("off")


@pytest.fixture
def calls(monkeypatch):
    """Every call of issd_loss: its arguments by name, and its result."""
    kept = []
    original = issd.issd_loss
    names = original.__code__.co_varnames[:original.__code__.co_argcount]

    def spy(*args, **kw):
        result = original(*args, **kw)
        kept.append({**dict(zip(names, args)), **kw, "result": result})
        return result
    monkeypatch.setattr(issd, "issd_loss", spy)
    return kept


def run(ckpt, out, *words):
    common = f"issd.py --ckpt {ckpt} --out {out} --data digits --batch-size 64 --eval-samples 0"
    return inside(*common.split(), *words)


def of_all(calls, key):
    return torch.cat([c[key] for c in calls])


# ---- iSSD --------------------------------------------------------------------------------------


def test_issd_trains_on_every_pair_of_neighbours(tmp_path, ckpt, calls):
    run(ckpt, tmp_path / "a", "--steps", 20, "--nfe", 5, "--lam", 0.3, "--reading", "literal")
    grid = make_grid("dit", 5)
    pairs = zip(of_all(calls, "s").tolist(), of_all(calls, "t").tolist())
    assert {*pairs} == {*zip(grid[:4], grid[1:5])}
    assert -1 not in grid[:5]
    assert 0.06 < (of_all(calls, "y") == 10).float().mean() < 0.14
    handed_on = {(c["lam"], c["reading"], c["prediction"], c["solver_net"], c["project"])
                 for c in calls}
    assert handed_on == {(0.3, "literal", "eps", None, None)}
    assert not torch.equal(calls[0]["noise"], calls[1]["noise"])
    assert not torch.equal(calls[0]["x0"], calls[1]["x0"])
    assert abs(of_all(calls, "noise").std() - 1) < 0.02


def test_issd_takes_prediction_and_threshold_from_the_checkpoint(tmp_path, tiny, calls):
    torch.save(checkpoint(tiny, prediction="v", threshold="clamp"), tmp_path / "v.pt")
    run(tmp_path / "v.pt", tmp_path / "a", "--steps", 1, "--drop", 1)
    assert calls[0]["prediction"] == "v"
    assert calls[0]["project"] is PROJECTIONS["clamp"]
    assert (calls[0]["y"] == 10).all()


def test_issd_of_one_pair(tmp_path, ckpt, calls):
    run(ckpt, tmp_path / "a", "--steps", 3, "--only-step", 2, "--drop", 0)
    grid = make_grid("dit", 10)
    assert (of_all(calls, "s") == grid[1]).all()
    assert (of_all(calls, "t") == grid[2]).all()
    assert (of_all(calls, "y") < 10).all()
    held = torch.load(tmp_path / "a" / "last.pt", weights_only=True)
    assert held["only_node"] == grid[2]


def test_issd_with_guidance(tmp_path, ckpt, tiny, calls):
    x = torch.randn(2, 1, 8, 8)
    t = torch.tensor([400, 500])
    y = torch.tensor([3, 4])
    plain = tiny(x, t, y)
    guided = guide(tiny, 3.0)(x, t, y)
    assert guided.sub(plain).abs().max() > 1e-3
    for how, source, step in (("no", plain, None), ("step", plain, guided), ("all", guided, None)):
        calls.clear()
        run(ckpt, tmp_path / how, "--steps", 1, "--lam", 0, "--cfg", 3, "--guided", how)
        c = calls[0]
        torch.testing.assert_close(c["teacher"](x, t, y), source)
        torch.testing.assert_close(c["student"](x, t, y), source)
        assert c["result"][0] == 0
        assert (step is None) == (c["solver_net"] is None)
        if step is not None:
            torch.testing.assert_close(c["solver_net"](x, t, y), step)
            check_that_solver_net_makes_the_step(c)


def check_that_solver_net_makes_the_step(call):
    """With a solver_net that gives zero the step goes along eps = 0."""
    def zero(x, t, y):
        return 0 * x
    args = {k: v for k, v in call.items() if k != "result"}
    aux = issd.issd_loss(**{**args, "solver_net": zero})[1]
    x_s = aux["x_s"]
    want = ddim_step(call["schedule"], x_s, 0 * x_s, call["s"], call["t"])
    torch.testing.assert_close(aux["x_t"], want)


def test_cost_and_presets_of_issd():
    cost = []
    for guided in ("no", "step", "all"):
        for reading in ("teacher", "student", "literal"):
            args = types.SimpleNamespace(guided=guided, reading=reading)
            cost.append(issd.forwards_per_step(args))
    assert cost == [5, 5, 6, 7, 7, 7, 10, 10, 12]

    # Table 9 of the supplement, whole:
    assert {size: row["lam"] for size, row in issd.PAPER.items()} == {
        ("XL", 256): {50: 0.30, 20: 0.25, 10: 0.25},
        ("XL", 512): {50: 0.30, 20: 0.25, 10: 0.25},
        ("L", 256): {50: 0.25, 20: 0.25, 10: 0.25},
        ("B", 256): {50: 0.35, 20: 0.25, 10: 0.25},
        ("S", 256): {50: 0.05, 20: 0.10, 10: 0.05},
    }
    assert issd.LAM_DISTILLED == {32: 0.20, 10: 0.25, 5: 0.05, 4: 0.05}

    # Table 3 of the supplement, which ssd.py and issd.py both have:
    for method in (issd, ssd):
        training = {}
        for size, row in method.PAPER.items():
            steps = round(row["epochs"] * 1_281_167 / row["batch"])
            training[size] = (row["lr"], row["batch"], steps)
        assert training == {
            ("XL", 256): (5e-6, 128, 8007),
            ("XL", 512): (5e-6, 64, 8007),
            ("L", 256): (5e-6, 256, 1001),
            ("B", 256): (5e-6, 256, 1001),
            ("S", 256): (1e-5, 512, 500),
        }


def test_plan_in_numbers(capsys):
    plan = inside(*"issd.py --model DiT-XL/2 --nfe 10 --dry-run".split())
    forward = 118.66e9 * 2  # FLOPs: twice the multiply-adds that upstream's paper gives
    pool = 50_000 * 10 * 2 * forward  # the pool is guided
    total = 8007 * 128 * 5 * forward + pool
    said = float(plan.split("pool ")[1].split("made first, ")[1].split(" FLOP")[0])
    assert said == pytest.approx(pool, rel=0.01)
    assert f"A6000 {total / 0.4 / 155e12 / 3600:.1f} h" in plan
    assert "lr 5e-06, batch 128 (1 x 128), 8,007 steps" in plan


def test_controls_and_rows_of_the_table(tmp_path, ckpt, monkeypatch):
    """Continued training differs from the method in its loss alone, and every row says how it is
    sampled."""
    seen = []
    entries = {}
    original = train.main

    def spy(own, **kw):
        seen.append(own)
        return original(own, **kw)

    def keep(args, proc, method, began, rows, **more):
        entries.update(rows)
    monkeypatch.setattr(train, "main", spy)
    monkeypatch.setattr(issd, "finish", keep)
    inside(*f"issd.py --ckpt {ckpt} --out {tmp_path}/a --steps 3 --batch-size 8 --lr 3e-4 --seed 5 "
            "--nfe 7 --cfg 2 --eval-samples 4".split())
    own, = seen
    assert (own.lr, own.seed, own.batch_size, own.steps) == (3e-4, 5, 8, 3)
    assert (own.data, own.ckpt, own.out) == ("digits", ckpt, f"{tmp_path}/a/continued")
    assert (own.ema, own.warmup, own.clip, own.decay) == (0, 0, 0, "constant")
    assert {name: (e.nfe, e.cfg) for name, e in entries.items()} == {
        "before": (7, 2.0), "before, 50 steps": (50, 2.0), "continued training": (7, 2.0),
        "after": (7, 2.0)}


# ---- train.py ----------------------------------------------------------------------------------


def test_what_train_hands_its_loss(tmp_path, monkeypatch):
    seen = []
    clips = []
    original = train.diffusion_loss

    def spy(net, schedule, x0, y, t, noise, prediction):
        seen.append({"y": y, "t": t, "noise": noise})
        return original(net, schedule, x0, y, t, noise, prediction)
    step = Guard.step

    def spy_on_step(self, opt, loss, number, clip=None):
        clips.append(clip)
        return step(self, opt, loss, number, clip)
    monkeypatch.setattr(kit_run.Guard, "step", spy_on_step)
    words = (f"--out {tmp_path} --steps 20 --batch-size 256 --lr 1e-9 --warmup 100 --clip 0.7 "
             "--log-every 20")
    train.main(train.parser().parse_args(words.split()), spy)

    y = of_all(seen, "y")
    assert 0.08 < (y == 10).float().mean() < 0.12
    assert set(y.tolist()) == set(range(11))
    t = of_all(seen, "t")
    assert t.min() < 5 and t.max() > 994 and abs(t.double().mean() - 499.5) < 15
    noise = of_all(seen, "noise")
    assert len(noise.double().flatten(1).sum(1).unique()) == len(noise)
    assert set(clips) == {0.7}
    held = torch.load(tmp_path / "last.pt", weights_only=True)
    group = held["opt"]["param_groups"][0]
    assert group["lr"] == pytest.approx(1e-9 * 20 / 100)
    assert group["betas"] == (0.9, 0.999)
    table = held["model"]["y_embedder.embedding_table.weight"]
    assert table.std() == pytest.approx(1, abs=0.1)


def test_training_times_reach_both_ends():
    t = train.training_times(make_schedule("linear"), StepRandom(PROC, 0, 0, 20_000))
    assert t.min() == 0 and t.max() == 999


def test_the_mean_of_a_short_last_interval(tmp_path, ckpt, calls):
    run(ckpt, tmp_path / "a", "--steps", 5, "--log-every", 3)
    each = [float(c["result"][0].detach()) for c in calls]
    assert losses(tmp_path / "a") == pytest.approx([np.mean(each[:3]), np.mean(each[3:])])


# ---- What lies between the steps ---------------------------------------------------------------


def test_average_of_the_weights():
    net = torch.nn.Linear(1, 1, bias=False)
    ema = EMA(net, 0.9)
    old = net.weight.detach().clone()
    net.weight.data += 1
    ema.update(0)                                         # warm-up: (1 + 0) / (10 + 0) of the old
    torch.testing.assert_close(ema.weights["weight"], 0.1 * old + 0.9 * (old + 1))
    ema.weights["weight"].copy_(old)
    ema.update(10_000)
    torch.testing.assert_close(ema.weights["weight"], 0.9 * old + 0.1 * (old + 1))


def test_rows_of_all_ranks_and_parts_are_the_batch():
    got = []
    for rank in (0, 1):
        for part in (0, 1):
            proc = Processes("off")
            proc.rank = rank
            proc.world = 2
            proc.part = (part, 2)
            got += proc.take_share(list(range(8)))
    assert got == list(range(8))


def test_an_infinite_loss_is_skipped_though_its_gradient_is_finite(tiny):
    """The square overflows, its derivative does not."""
    net = models.fill_random(models.build(tiny.arch))
    opt = adamw(net, 1e-3)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    out = net(torch.randn(1, 1, 8, 8), torch.tensor([3]), torch.tensor([1]))
    loss = (out * 1e-5 + 1e20).square().mean()
    loss.backward()
    assert loss.isinf()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
    Guard(PROC).step(opt, loss.detach(), 0)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_checkpoints_reach_the_disk_before_they_get_their_name(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)

        def spy(*args, name=name, original=original):
            order.append(name)
            return original(*args)
        monkeypatch.setattr(os, name, spy)
    kit_run.write_checkpoint(tmp_path / "last.pt", {"model": {}})
    assert order == ["fsync", "replace"]


@pytest.mark.parametrize("free, error, message", [
    (0, RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed"),
     "cannot save .*last.pt .the disk is full.; none was saved before"),
    (10 ** 9, OSError(28, "No space left on device"), "No space left on device"),
    (10 ** 9, RuntimeError("something else\nand more"), "something else.;")])
def test_a_full_disk(tmp_path, monkeypatch, free, error, message):
    """torch's own writer tells an internal address only."""
    def save(*_):
        raise error
    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=free))
    with pytest.raises(UserError, match=message):
        kit_run.write_checkpoint(tmp_path / "last.pt", {"model": {}})
    assert not list(tmp_path.iterdir())


def test_arguments_that_may_change_on_resume(tmp_path, ckpt):
    assert kit_run.FREE == {
        "out", "resume", "log_every", "save_every", "eval_samples", "dry_run", "save_minutes",
        "sample_every", "workers", "sample_batch_size", "pool"}
    assert kit_run.FUTURE == {"lr", "steps", "amp", "compile", "accumulate", "grad_checkpointing"}
    run(ckpt, tmp_path / "a", "--steps", 1)
    last = tmp_path / "a" / "last.pt"
    held = torch.load(last, weights_only=True)
    held["args"]["of_another_version"] = 3
    torch.save(held, last)
    with pytest.raises(UserError, match="--of-another-version 3, now it is None"):
        run(ckpt, tmp_path / "a", "--steps", 1)


def test_fresh_gates_are_zero():
    net = models.build(models.make_arch("DiT-Ti/2", 8, 1, 10, False))
    assert all((block.adaLN_modulation[1].weight == 0).all() for block in net.blocks)


def test_pictures_and_table_come_from_the_same_entries(tmp_path, ckpt):
    """What finish() hands to compare(): one Entry per row, measured on the same noise."""
    said = inside(*f"issd.py --ckpt {ckpt} --out {tmp_path}/a --steps 1 --batch-size 4 "
                   "--eval-samples 4 --nfe 3".split())
    assert "after issd" in said and (tmp_path / "a" / "samples.png").exists()
    assert evaluate.is_measured(types.SimpleNamespace(out=str(tmp_path / "a"), eval_samples=4))
    assert not evaluate.is_measured(types.SimpleNamespace(out=str(tmp_path / "a"), eval_samples=5))


@pytest.mark.parametrize("words, warns", [
    ("--model DiT-Na/8", True), ("--model DiT-Na/8 --prediction x0", False),
    ("--model DiT-Na/4", False), ("--model DDPM++-8x1", False)])
def test_a_network_too_narrow_for_noise(words, warns):
    """DiT-Na has 48 features per token; a patch of 8x8 grey pixels has 64 numbers."""
    said = inside("train.py", "--data", "digits", *words.split(), "--dry-run")
    assert ("48 features per token, a patch has 64 numbers: it cannot predict" in said) == warns
