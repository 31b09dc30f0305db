"""kit.sampling: slices, labels, guidance, whose features are fused."""
import math

import numpy as np
import pytest
import torch
from conftest import checkpoint
from tiny_networks import digits_net
from toys import SmoothInLogTime

import models
from kit import checkpoints, sampling
from kit.cache import synthetic_pool
from kit.cli import UserError
from kit.processes import Processes
from kit.sampling import (
    SampleOptions,
    check_guidance,
    default_batch,
    labels_of_chunk,
    load_uncond,
    sample_chunks,
    settle_options,
)
from solvers import SOLVERS, guide, guide_with

PROC = Processes("off")


@pytest.fixture(scope="module")
def strong():
    """A network whose weights are so large that its output matters."""
    return models.fill_random(models.build(models.make_arch("DiT-Ti/2", 8, 1, 10, False)), std=0.1)


def spec_of(net, **changes):
    spec = {**checkpoints.DIT_DEFAULTS, "arch": net.arch, "classes": 10, "scale": None, "cfg": 1.0}
    return {**spec, **changes}


def flow(solver):
    """Where the solver wants it, the spec of a velocity model."""
    if solver not in ("euler", "sde"):
        return {}
    return {"schedule": "interpolant", "prediction": "velocity"}


def draw(net, spec, num, **options):
    """All samples and labels."""
    chunks = list(sample_chunks(PROC.autocast(net), spec, PROC, num, SampleOptions(**options)))
    return torch.cat([x for _, x, _ in chunks]), torch.cat([y for _, _, y in chunks])


# ---- Slices ------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [*SOLVERS, "edm"])
def test_slices_make_the_same_samples(solver, strong, monkeypatch):
    """Also the stochastic solvers, those that remember, and EDM's with states in float64."""
    monkeypatch.setattr(sampling, "CHUNK", 8)
    net = digits_net() if solver == "edm" else strong
    edm = {**checkpoints.EDM_SPEC, "knows_null": True}
    spec = spec_of(net, **(edm if solver == "edm" else flow(solver)))
    options = dict(seed=1, nfe=3, cfg=2, lam=0.3)
    options["solver"] = "heun" if solver == "edm" else solver
    whole, y = draw(net, spec, 9, batch=250, **options)
    assert torch.equal(whole, draw(net, spec, 9, **options)[0])
    for batch in (1, 7):
        sliced, labels = draw(net, spec, 9, batch=batch, **options)
        assert (sliced - whole).abs().max() < 1e-5 * whole.abs().max()
        assert torch.equal(labels, y)


@pytest.mark.parametrize("batch, rows", [(1, [1] * 7), (3, [3, 1, 3]), (5, [4, 3])])
def test_a_slice_is_never_larger_than_asked_for(batch, rows, strong, monkeypatch):
    monkeypatch.setattr(sampling, "CHUNK", 4)
    seen = []

    def net(x, t, y):
        seen.append(len(x))
        return x

    spec = spec_of(strong)
    list(sample_chunks(net, spec, PROC, 7, SampleOptions(nfe=1, batch=batch)))
    assert seen == rows


@pytest.mark.parametrize("name, shape, batch", [
    ("DiT-Ti/2", (8, 1, 10), 250), ("DiT-XL/2", (32, 4, 1000), 64), ("DiT-XL/2", (64, 4, 1000), 8),
    ("DDPM++-t", (32, 3, 10), 250)])
def test_the_default_slice_is_a_power_of_two_of_limited_cost(name, shape, batch):
    arch = models.make_arch(name, *shape)
    got = default_batch(arch)
    assert got == batch
    flops = models.count(arch)[1]
    assert got * flops <= 16e12
    assert got == 250 or (math.log2(got).is_integer() and 2 * got * flops > 16e12)


@pytest.mark.parametrize("error", [
    torch.cuda.OutOfMemoryError(), MemoryError(),
    RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")])
def test_out_of_memory_names_the_flag(error, strong):
    def net(x, t, y):
        raise error

    def complaint(**options):
        with pytest.raises(UserError) as e:
            list(sample_chunks(net, spec_of(strong), PROC, 2, SampleOptions(nfe=1, **options)))
        return str(e.value)

    assert "a smaller --sample-batch-size than 250" in complaint()
    assert "a smaller --batch-size than 32" in complaint(batch=32, batch_flag="--batch-size")
    assert "not even one sample" in complaint(batch=1)


def test_other_errors_stay_what_they_are(strong):
    def net(x, t, y):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        list(sample_chunks(net, spec_of(strong), PROC, 2, SampleOptions(nfe=1)))
    with pytest.raises(UserError, match="--batch-size 0: must be positive"):
        settle_options(SampleOptions(batch=0, batch_flag="--batch-size"), spec_of(strong))


# ---- Labels ------------------------------------------------------------------------------------


def test_random_labels_depend_on_seed_and_chunk_alone(strong, monkeypatch):
    spec = spec_of(strong)

    def labels(num, chunk=0, seed=0):
        return labels_of_chunk(chunk, num, spec, SampleOptions(labels="random", seed=seed))

    first = labels(250)
    assert first.dtype == torch.long and 0 <= int(first.min()) and int(first.max()) <= 9
    assert torch.equal(labels(3), first[:3])
    assert torch.equal(labels(1000), first)
    assert not torch.equal(labels(500, chunk=1), first)
    assert not torch.equal(labels(250, seed=1), first)
    counts = torch.bincount(torch.cat([labels(10_000, c) for c in range(40)]), minlength=10)
    assert 800 < counts.min() < counts.max() < 1200 and len(set(counts.tolist())) > 1

    monkeypatch.setattr(sampling, "CHUNK", 4)
    _, y = draw(strong, spec, 6, nfe=1, labels="random")
    want = [labels(6, c) for c in (0, 1)]
    assert y.tolist() == torch.cat(want).tolist()
    _, balanced = draw(strong, spec, 6, nfe=1, labels="balanced")
    assert balanced.tolist() == [0, 1, 2, 3, 4, 5]


# ---- Guidance ----------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, cfgs, message", [
    (dict(classes=0), (2, 0.5, -1), "neither classes nor prompts"),
    (dict(knows_null=False), (1.5, 4), "has not learned the null label"),
    (dict(w=[1, 4], guidance=True), (8, -3, 0.99), "has learned 1 to 4"),
    (dict(w=[2, 3], guidance=True), (1, 4), "has learned 2 to 3"),
])
def test_guidance_that_a_network_has_not_learned_is_refused(changes, cfgs, message, strong):
    changes = dict(changes)
    arch = {**strong.arch, "guidance": changes.pop("guidance", False)}
    spec = spec_of(strong, arch=arch, **changes)
    for cfg in cfgs:
        with pytest.raises(UserError, match=message):
            list(sample_chunks(strong, spec, PROC, 2, SampleOptions(nfe=1, cfg=cfg)))
    low, high = spec["w"] or (1, 1)
    for cfg in {low, high}:
        assert settle_options(SampleOptions(cfg=cfg), spec).cfg == cfg


def test_a_default_without_effect_is_no_guidance(strong):
    assert settle_options(SampleOptions(), spec_of(strong, classes=0, cfg=1.5)).cfg == 1


def test_a_pair_takes_any_scale(strong):
    """kd.py's teacher of two networks, beside a spec that knows no null label."""
    pair = guide_with(strong, strong)
    check_guidance(spec_of(strong, knows_null=False), 3, pair)
    check_guidance(spec_of(strong, knows_null=False), 3, strong, uncond=strong)
    with pytest.raises(UserError, match="--uncond has no effect without guidance"):
        check_guidance(spec_of(strong), 1, strong, uncond=strong)
    with pytest.raises(UserError, match="as an input"):
        check_guidance(spec_of(strong), 2, pair, uncond=strong)


def test_two_networks_guide_by_equation_4():
    """w cond - (w - 1) uncond; the unconditional network sees its own null label."""
    cond = SmoothInLogTime()
    uncond = SmoothInLogTime(0.2, 0.4, -0.1)
    uncond.num_classes = 0
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 1, 4, 4, generator=g, dtype=torch.float64)
    t = torch.tensor([0.1, 1.0, 9.0], dtype=torch.float64)
    y = torch.tensor([1, 5, 9])
    nothing = uncond(x, t, torch.zeros(3, dtype=torch.long))
    for w in (0.5, 1, 2.5):
        want = w * cond(x, t, y) - (w - 1) * nothing
        torch.testing.assert_close(guide(guide_with(cond, uncond), w)(x, t, y), want)

    def with_head(x, t, y):
        return torch.cat([cond(x, t, y), x + 7], 1)

    with_head.num_classes = 10
    out = guide(guide_with(with_head, uncond), 2.0)(x, t, y)
    torch.testing.assert_close(out[:, 1:], x + 7)


def test_the_second_network_must_be_like_the_first(tmp_path):
    spec = {**checkpoints.DIT_DEFAULTS, **checkpoints.EDM_SPEC, "classes": 10}
    cond = digits_net()
    spec["arch"] = cond.arch

    def load(name, net, **changes):
        edm = {**checkpoints.EDM_SPEC, "name": "DDPM++-8x1", **changes}
        torch.save(checkpoint(net, **edm), tmp_path / name)
        return load_uncond(str(tmp_path / name), spec)

    free = digits_net(num_classes=0)
    assert load("good.pt", free, classes=0).num_classes == 0
    larger = models.build(models.make_arch("DDPM++-8x1", 16, 1, 0))
    coloured = models.build(models.make_arch("DDPM++-8x1", 8, 3, 0))
    for net, changes in ((cond, {}), (larger, {"classes": 0}), (coloured, {"classes": 0}),
                         (free, dict(classes=0, scale=0.5)),
                         (free, dict(classes=0, schedule="linear")),
                         (free, dict(classes=0, prediction="v"))):
        with pytest.raises(UserError, match="must be like the network that it guides"):
            load("bad.pt", net, **changes)
    with pytest.raises(UserError, match="for a model without classes"):
        load_uncond(str(tmp_path / "good.pt"), {**spec, "classes": 0})


# ---- Whose features are fused ------------------------------------------------------------------


@pytest.mark.parametrize("reading, source", [
    ("teacher", "base"), ("student", "own"), ("literal", "own"), (None, "own")])
def test_the_checkpoint_says_whose_features_are_fused(reading, source, strong):
    other = models.fill_random(models.build(strong.arch), std=0.1, seed=9)
    base = PROC.autocast(other)
    fused = dict(nfe=5, solver="fused", lam=0.4)
    spec = spec_of(strong, reading=reading)
    sources = {"base": base, "own": PROC.autocast(strong)}
    want, _ = draw(strong, spec, 3, features_from=sources.pop(source), **fused)
    wrong, _ = draw(strong, spec, 3, features_from=sources.popitem()[1], **fused)
    got, _ = draw(strong, spec, 3, base=base, **fused)
    assert torch.equal(got, want) and not torch.allclose(got, wrong, atol=1e-3)
    if source == "base":
        with pytest.raises(UserError, match="name that with --base"):
            draw(strong, spec, 3, **fused)
    else:
        assert torch.equal(draw(strong, spec, 3, **fused)[0], want)


# ---- The pool of a guided pair -----------------------------------------------------------------


def test_a_pool_is_made_by_both_networks(tmp_path):
    cond, uncond = digits_net(), digits_net(num_classes=0)
    spec = {**checkpoints.DIT_DEFAULTS, **checkpoints.EDM_SPEC, "classes": 10, "arch": cond.arch,
            "knows_null": False}
    options = SampleOptions(nfe=3, cfg=2.0, uncond=PROC.autocast(uncond))
    net = PROC.autocast(cond)
    folder = synthetic_pool(net, spec, PROC, tmp_path, 4, options)
    want = torch.cat([x for _, x, _ in sample_chunks(net, spec, PROC, 4, options)])
    np.testing.assert_array_equal(np.load(folder / "latents.npy")[:, 0, 0], want.half().numpy())
    assert synthetic_pool(net, spec, PROC, tmp_path, 4, SampleOptions(nfe=3, cfg=1.0)) != folder
