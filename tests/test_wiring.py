"""What the scripts hand on: the arguments of the losses, of the controls, of the samplers. Equations are tested elsewhere."""
import json
import os
import types

import numpy as np
import pytest
import torch
from conftest import checkpoint, inside, losses
from PIL import Image

import checkpoints
import data
import issd
import models
import runtime
import train
from runtime import EMA, Processes, StepRandom
from solvers import PROJECTIONS, ddim_step, guide, make_grid, make_schedule, to_x0_eps

PROC = Processes("off")


@pytest.fixture
def calls(monkeypatch):
    """Every call of issd_loss: its arguments by name, and its result."""
    kept, original = [], issd.issd_loss
    names = original.__code__.co_varnames[:original.__code__.co_argcount]

    def spy(*args):
        result = original(*args)
        kept.append({**dict(zip(names, args)), "result": result})
        return result
    monkeypatch.setattr(issd, "issd_loss", spy)
    return kept


def run(ckpt, out, *words):
    return inside("issd.py", "--ckpt", ckpt, "--out", out, "--data", "digits", "--batch-size", 64, "--eval-samples", 0, *words)


def test_issd_trains_on_every_pair_of_neighbours(tmp_path, ckpt, calls):
    run(ckpt, tmp_path / "a", "--steps", 20, "--nfe", 5, "--lam", 0.3, "--reading", "literal")
    s, t, y = (torch.cat([c[k] for c in calls]) for k in ("s", "t", "y"))
    grid = make_grid("dit", 5)
    assert {*zip(s.tolist(), t.tolist())} == {*zip(grid[:4], grid[1:5])} and -1 not in grid[:5]
    assert 0.06 < (y == 10).float().mean() < 0.14
    assert {(c["lam"], c["reading"], c["prediction"], c["guided"], c["project"]) for c in calls} == {(0.3, "literal", "eps", None, None)}
    assert not torch.equal(calls[0]["noise"], calls[1]["noise"]) and not torch.equal(calls[0]["x0"], calls[1]["x0"])
    assert abs(torch.cat([c["noise"] for c in calls]).std() - 1) < 0.02


def test_issd_takes_prediction_and_threshold_from_the_checkpoint(tmp_path, tiny, calls):
    torch.save(checkpoint(tiny, prediction="v", threshold="clamp"), tmp_path / "v.pt")
    run(tmp_path / "v.pt", tmp_path / "a", "--steps", 1, "--drop", 1)
    assert calls[0]["prediction"] == "v" and calls[0]["project"] is PROJECTIONS["clamp"] and (calls[0]["y"] == 10).all()


def test_issd_of_one_pair(tmp_path, ckpt, calls):
    run(ckpt, tmp_path / "a", "--steps", 3, "--only-step", 2, "--drop", 0)
    grid = make_grid("dit", 10)
    assert all((c["s"] == grid[1]).all() and (c["t"] == grid[2]).all() and (c["y"] < 10).all() for c in calls)
    assert torch.load(tmp_path / "a" / "last.pt", weights_only=True)["only_node"] == grid[2]


def test_issd_with_guidance(tmp_path, ckpt, tiny, calls):
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([400, 500]), torch.tensor([3, 4])
    plain, guided = tiny(x, t, y), guide(tiny, 3.0)(x, t, y)
    for how, source, step in (("no", plain, None), ("step", plain, guided), ("all", guided, None)):
        calls.clear()
        run(ckpt, tmp_path / how, "--steps", 1, "--lam", 0, "--cfg", 3, "--guided", how)
        c = calls[0]
        torch.testing.assert_close(c["teacher"](x, t, y), source)
        torch.testing.assert_close(c["student"](x, t, y), source)
        assert c["result"][0] == 0 and (step is None) == (c["guided"] is None)
        if step is not None:
            torch.testing.assert_close(c["guided"](x, t, y), step)
            still = issd.issd_loss(*[{**c, "guided": lambda x, t, y: 0 * x}[k] for k in list(c)[:-1]])[1]  # a step along eps = 0
            torch.testing.assert_close(still["x_t"], ddim_step(c["schedule"], still["x_s"], 0 * still["x_s"], c["s"], c["t"]))
    assert guided.sub(plain).abs().max() > 1e-3


def test_cost_and_presets_of_issd():
    cost = {(g, r): issd.units(types.SimpleNamespace(guided=g, reading=r)) for g in ("no", "step", "all") for r in ("teacher", "student", "literal")}
    assert list(cost.values()) == [5, 5, 6, 7, 7, 7, 10, 10, 12]
    # Table 9 and Table 3 of the supplement, whole:
    assert issd.LAM == {("XL", 256): {50: .3, 20: .25, 10: .25}, ("XL", 512): {50: .3, 20: .25, 10: .25}, ("L", 256): {50: .25, 20: .25, 10: .25},
                        ("B", 256): {50: .35, 20: .25, 10: .25}, ("S", 256): {50: .05, 20: .1, 10: .05}}
    assert issd.LAM_DISTILLED == {32: .2, 10: .25, 5: .05, 4: .05}
    assert {k: (lr, batch, round(epochs * 1_281_167 / batch)) for k, (lr, batch, epochs) in train.PAPER_SELF.items()} == {
        ("XL", 256): (5e-6, 128, 8007), ("XL", 512): (5e-6, 64, 8007), ("L", 256): (5e-6, 256, 1001), ("B", 256): (5e-6, 256, 1001), ("S", 256): (1e-5, 512, 500)}


def test_plan_in_numbers(capsys):
    words = ["--model", "DiT-XL/2", "--nfe", 10, "--dry-run"]
    plan = inside("issd.py", *words)
    forward = 118.66e9 * 2  # FLOPs: twice the multiply-adds that upstream's paper gives
    total = 8007 * 128 * 5 * forward + 50_000 * 10 * 2 * forward  # the pool is guided
    said = float(plan.split("pool ")[1].split("made first, ")[1].split(" FLOP")[0])
    assert said == pytest.approx(50_000 * 10 * 2 * forward, rel=0.01)
    assert f"A6000 {total / 0.4 / 155e12 / 3600:.1f} h" in plan and "lr 5e-06, batch 128 (1 x 128), 8,007 steps" in plan


def test_controls_and_rows_of_the_table(tmp_path, ckpt, monkeypatch):
    """Continued training differs from the method in its loss alone, and every row says how it is sampled."""
    seen, original = [], train.main
    monkeypatch.setattr(train, "main", lambda own: seen.append(own) or original(own))
    entries = {}
    monkeypatch.setattr(train, "measure", lambda args, proc, method, seconds, rows, **more: entries.update(rows))
    inside("issd.py", "--ckpt", ckpt, "--out", tmp_path / "a", "--steps", 3, "--batch-size", 8, "--lr", 3e-4, "--seed", 5, "--nfe", 7, "--cfg", 2, "--eval-samples", 4)
    own, = seen
    assert (own.lr, own.seed, own.batch_size, own.steps, own.data, own.ckpt) == (3e-4, 5, 8, 3, "digits", ckpt)
    assert (own.ema, own.warmup, own.clip, own.decay, own.out) == (0, 0, 0, "constant", f"{tmp_path}/a/continued")
    assert {k: e[2:] for k, e in entries.items()} == {"before": (7, 2.0), "before, 50 steps": (50, 2.0), "continued training": (7, 2.0), "after": (7, 2.0)}


def test_what_train_hands_its_loss(tmp_path, monkeypatch):
    seen, clips, original = [], [], train.diffusion_loss

    def spy(net, schedule, x0, y, t, noise, prediction):
        seen.append((y, t, noise))
        return original(net, schedule, x0, y, t, noise, prediction)
    update = runtime.Guard.update
    monkeypatch.setattr(train.Guard, "update", lambda self, opt, loss, step, clip=None: clips.append(clip) or update(self, opt, loss, step, clip))
    args = train.parser().parse_args(f"--out {tmp_path} --steps 20 --batch-size 256 --lr 1e-9 --warmup 100 --clip 0.7 --log-every 20".split())
    train.main(args, spy)
    y, t, noise = (torch.cat(parts) for parts in zip(*seen))
    assert 0.08 < (y == 10).float().mean() < 0.12 and set(y.tolist()) == set(range(11))
    assert t.min() < 5 and t.max() > 994 and abs(t.double().mean() - 499.5) < 15
    assert len(noise.double().flatten(1).sum(1).unique()) == len(noise) and set(clips) == {0.7}
    held = torch.load(tmp_path / "last.pt", weights_only=True)
    assert held["opt"]["param_groups"][0]["lr"] == pytest.approx(1e-9 * 20 / 100) and held["opt"]["param_groups"][0]["betas"] == (0.9, 0.999)
    assert held["model"]["y_embedder.embedding_table.weight"].std() == pytest.approx(1, abs=0.1)


def test_training_times_reach_both_ends():
    t = train.training_times(make_schedule("linear"), StepRandom(PROC, 0, 0, 20_000))
    assert t.min() == 0 and t.max() == 999


def test_the_mean_of_a_short_last_interval(tmp_path, ckpt, calls):
    run(ckpt, tmp_path / "a", "--steps", 5, "--log-every", 3)
    each = [float(c["result"][0].detach()) for c in calls]
    assert losses(tmp_path / "a") == pytest.approx([np.mean(each[:3]), np.mean(each[3:])])


def test_average_of_the_weights():
    net = torch.nn.Linear(1, 1, bias=False)
    ema = EMA(net, 0.9)
    old = net.weight.detach().clone()
    net.weight.data += 1
    ema.update(net, 0)                                    # warm-up: (1 + 0) / (10 + 0) of the old
    torch.testing.assert_close(ema.weights["weight"], 0.1 * old + 0.9 * (old + 1))
    ema.weights["weight"].copy_(old)
    ema.update(net, 10_000)
    torch.testing.assert_close(ema.weights["weight"], 0.9 * old + 0.1 * (old + 1))


def test_rows_of_all_ranks_and_parts_are_the_batch():
    got = []
    for rank in (0, 1):
        for part in (0, 1):
            proc = Processes("off")
            proc.rank, proc.world, proc.part = rank, 2, (part, 2)
            got += proc.rows(list(range(8)))
    assert got == list(range(8))


def test_an_infinite_loss_is_skipped_though_its_gradient_is_finite(tiny):
    """The square overflows, its derivative does not."""
    opt, guard = runtime.adamw(tiny_copy := models.fill_random(models.build(tiny.arch)), 1e-3), runtime.Guard(PROC)
    before = {k: v.clone() for k, v in tiny_copy.state_dict().items()}
    loss = (tiny_copy(torch.randn(1, 1, 8, 8), torch.tensor([3]), torch.tensor([1])) * 1e-5 + 1e20).square().mean()
    loss.backward()
    assert loss.isinf() and all(p.grad.isfinite().all() for p in tiny_copy.parameters() if p.grad is not None)
    guard.update(opt, loss, 0)
    assert all(torch.equal(v, before[k]) for k, v in tiny_copy.state_dict().items())


def test_checkpoints_reach_the_disk_before_they_get_their_name(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, lambda *a, name=name, call=getattr(os, name): (order.append(name), call(*a))[1])
    checkpoints.save(types.SimpleNamespace(out=tmp_path), PROC, {"model": {}})
    assert order == ["fsync", "replace"]


def test_arguments_that_may_change_on_resume(tmp_path, ckpt):
    assert checkpoints.NOT_COMPARED == {"out", "resume", "log_every", "save_every", "eval_samples", "dry_run", "compile", "accumulate", "grad_checkpointing", "save_minutes", "pool", "betas"}
    run(ckpt, tmp_path / "a", "--steps", 1)
    held = torch.load(tmp_path / "a" / "last.pt", weights_only=True)
    held["args"]["of_another_version"] = 3
    torch.save(held, tmp_path / "a" / "last.pt")
    with pytest.raises(runtime.UserError, match="--of-another-version 3, now it is None"):
        run(ckpt, tmp_path / "a", "--steps", 1)


def test_sampling_flags(tmp_path, ckpt):
    call = lambda name, *words: inside("sample.py", "--ckpt", ckpt, "--num-samples", 6, "--nfe", 3, "--out", tmp_path / name, *words)
    call("a.npz"), call("b.npz", "--cfg", 5), call("c.npz", "--label", 7), call("d.npz", "--seed", 1)
    a, b, c, d = (np.load(tmp_path / f"{n}.npz") for n in "abcd")
    assert a["arr_1"].tolist() == [0, 1, 2, 3, 4, 5] and c["arr_1"].tolist() == [7] * 6
    assert all((a["arr_0"] != other["arr_0"]).any() for other in (b, c, d))


def test_dit_guides_three_channels_by_itself():
    net = models.fill_random(models.build(models.make_arch("DiT-Ti/2", 8, 4, 10, False)))
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([9, 99]), torch.tensor([1, 2])
    out, cond = guide(net, 4.0)(x, t, y), net(x, t, y)
    torch.testing.assert_close(out[:, 3], cond[:, 3])
    assert (out[:, :3] - cond[:, :3]).abs().amax((0, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_a_projected_prediction_still_explains_the_state(prediction):
    schedule, t = make_schedule("linear"), torch.tensor([100, 700])
    x = 3 * torch.randn(2, 1, 4, 4, dtype=torch.float64)
    x0, eps = to_x0_eps(schedule, x, torch.randn_like(x), t, prediction, PROJECTIONS["clamp"])
    alpha, sigma = schedule.at(t, x)
    assert x0.abs().max() == 1
    torch.testing.assert_close(alpha * x0 + sigma * eps, x)


def test_fresh_gates_are_zero():
    assert all((b.adaLN_modulation[1].weight == 0).all() for b in models.build(models.make_arch("DiT-Ti/2", 8, 1, 10, False)).blocks)


def test_pixels_and_flips():
    assert not data.digits().flip and data.to_uint8(torch.zeros(1)) == 128
    grey = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(data.to_uint8(data.to_float(grey)), grey)
    d = data.Pixels(torch.arange(4).view(1, 1, 1, 4).expand(1, 1, 4, 4).to(torch.uint8), [0], 1, True, "one")
    stream = data.batches(d, PROC, 0, 16, 0)
    assert not torch.equal(next(stream)[0], next(stream)[0])


def test_chunks_have_their_own_noise_and_the_pool_its_guidance(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "CHUNK", 3)
    info = dict(checkpoints.DIT_DEFAULTS, arch=tiny.arch, classes=10, scale=None, nfe=3, cfg=1.0)
    first, second = (x for _, x, _ in data.sample_chunks(tiny, info, PROC, 6, 0, label=2))
    assert not torch.allclose(first, second, atol=1e-2)
    pool = np.load(data.synthetic(tiny, info, PROC, tmp_path, 3, 0, nfe=3, cfg=2.0) / "latents.npy")
    (_, want, _), = data.sample_chunks(tiny, info, PROC, 3, 0, 3, 2.0)
    np.testing.assert_array_equal(pool[:, 0, 0], want.half().numpy())


def test_guidance_in_its_interval_only(tiny):
    info = dict(checkpoints.DIT_DEFAULTS, arch=tiny.arch, classes=10, cfg_interval=[0.0, 0.7])
    x, y, rows = torch.randn(2, 1, 8, 8), torch.tensor([1, 2]), []

    def net(x, t, y):
        rows.append(len(x))
        return tiny(x, t, y)
    net.num_classes = 10
    for t in (0.8, 0.6):
        data.node_net(net, info, t, 2.0)(x, torch.full((2,), t), y)
    assert rows == [2, 4]


def test_labels_and_scales_of_foreign_data(tmp_path):
    info = dict(checkpoints.DIT_DEFAULTS, arch=models.make_arch("DiT-Ti/2", 8, 3, 10, False), classes=10, scale=None)
    for i in range(3):
        Image.fromarray(np.full((9, 12, 3), 80 * i, np.uint8)).save(tmp_path / f"{i}.png")
    folder = data.load(str(tmp_path), 8)
    data.check_fits(folder, info)
    assert [k for _, k in folder.files] == [10] * 3       # a folder without classes: the null label
    x = np.zeros((4, 1, 1, 3, 8, 8), np.float16)
    for name, meta in (("none", {"classes": 0, "scale": 0.18215}), ("other", {"classes": 10, "scale": 0.13})):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "latents.npy", x), np.save(tmp_path / name / "labels.npy", np.zeros(4, int))
        (tmp_path / name / "meta.json").write_text(json.dumps(meta))
    cache = data.load(str(tmp_path / "none"))
    data.check_fits(cache, {**info, "scale": 0.18215})
    assert cache.y.tolist() == [10] * 4
    with pytest.raises(runtime.UserError, match="latents times 0.13, the network wants latents times 0.18215"):
        data.check_fits(data.load(str(tmp_path / "other")), {**info, "scale": 0.18215})
