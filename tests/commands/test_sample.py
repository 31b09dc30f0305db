"""sample.py, and kit.sampling, which draws the samples of all scripts."""
import numpy as np
import pytest
import torch
from conftest import checkpoint, inside

from kit import checkpoints, sampling
from kit.cache import synthetic_pool
from kit.cli import UserError
from kit.processes import Processes
from kit.sampling import SampleOptions, network_at_node, sample_chunks, sample_images
from solvers import SOLVERS

PROC = Processes("off")


def spec_of(net, **changes):
    """The spec of a network for pixels with ten classes."""
    return {**checkpoints.DIT_DEFAULTS, "arch": net.arch, "classes": 10, "scale": None, "cfg": 1.0,
            **changes}


# ---- The command ---------------------------------------------------------------------------------


def test_sampling_flags(tmp_path, ckpt):
    def draw(*words):
        out = tmp_path / "x.npz"
        inside("sample.py", "--ckpt", ckpt, "--num-samples", 6, "--nfe", 3, "--out", out, *words)
        return np.load(out)

    plain = draw()
    assert plain["arr_1"].tolist() == [0, 1, 2, 3, 4, 5]
    one_class = draw("--label", 7)
    assert one_class["arr_1"].tolist() == [7] * 6
    for other in (one_class, draw("--cfg", 5), draw("--seed", 1)):
        assert (plain["arr_0"] != other["arr_0"]).any()


@pytest.mark.parametrize("words, message", [
    (["--cfg", 0], "1 means no guidance"),
    (["--cfg", "nan"], "--cfg nan: must be a number"),
    (["--solver", "fused", "--nfe", 3], "give their weight with --lam"),
    (["--solver", "fused", "--nfe", 3, "--lam", 2], "between 0 and 1"),
    (["--lam", 0.2], "--lam has no effect without --solver fused"),
    (["--base", "other.pt"], "makes all steps itself"),
    (["--label", 10], "must lie between 0 and 9"),
    (["--decode", "vae"], "makes images itself"),
    (["--prompts", "nowhere"], "python -m kit.encode --prompts"),
    (["--solver", "sde"], "--solver sde does not go with this model's schedule"),
    (["--nfe", 0], "between 1 and the schedule's 1000 steps"),
])
def test_flags_that_do_not_go_together(tmp_path, ckpt, words, message):
    with pytest.raises(UserError, match=message):
        inside("sample.py", "--ckpt", ckpt, "--out", tmp_path / "x.npz", *words)
    assert not (tmp_path / "x.npz").exists()


def test_a_student_of_one_step_and_its_base(tmp_path, ckpt, tiny):
    torch.save(checkpoint(tiny, only_node=666, nfe=4), tmp_path / "one.pt")

    def draw(name, file, *words):
        out = tmp_path / name
        inside("sample.py", "--ckpt", file, "--num-samples", 3, "--nfe", 4, "--out", out, *words)
        return np.load(out)["arr_0"]

    with pytest.raises(UserError, match="sample.py --base BASE"):
        draw("x.npz", tmp_path / "one.pt")
    with pytest.raises(UserError, match="is not the base model of"):
        draw("x.npz", tmp_path / "one.pt", "--base", tmp_path / "one.pt")
    # The student has the base's weights here, so that both make the same.
    got = draw("a.npz", tmp_path / "one.pt", "--base", ckpt)
    np.testing.assert_array_equal(got, draw("b.npz", ckpt))


# ---- What the scripts draw samples with ----------------------------------------------------------


def test_chunks_have_their_own_noise_and_the_pool_its_guidance(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(sampling, "CHUNK", 3)
    spec = spec_of(tiny, nfe=3)
    one_label = SampleOptions(seed=0, label=2)
    first, second = (x for _, x, _ in sample_chunks(tiny, spec, PROC, 6, one_label))
    assert not torch.allclose(first, second, atol=1e-2)

    options = SampleOptions(seed=0, nfe=3, cfg=2.0)
    pool = np.load(synthetic_pool(tiny, spec, PROC, tmp_path, 3, options) / "latents.npy")
    (_, want, _), = sample_chunks(tiny, spec, PROC, 3, options)
    np.testing.assert_array_equal(pool[:, 0, 0], want.half().numpy())


def test_guidance_in_its_interval_only(tiny):
    spec = spec_of(tiny, cfg_interval=[0.0, 0.7])
    x = torch.randn(2, 1, 8, 8)
    y = torch.tensor([1, 2])
    rows = []

    def net(x, t, y):
        rows.append(len(x))
        return tiny(x, t, y)

    net.num_classes = 10
    for t in (0.8, 0.6):
        network_at_node(net, spec, t, 2.0)(x, torch.full((2,), t), y)
    assert rows == [2, 4]


@pytest.mark.parametrize("num", [1, 5])
def test_prompts_are_taken_in_turn(num):
    """As a tensor or as an array in half precision; also when the last chunk is a single sample."""
    arch = {"context": "text", "context_dim": 3, "in_channels": 1, "input_size": 2}
    spec = {**checkpoints.DIT_DEFAULTS, "arch": arch, "classes": 0, "nfe": 2, "cfg": 1.0}
    prompts = torch.arange(12.0).view(2, 2, 3)
    seen = []

    def net(x, t, y):
        seen.append(y)
        return torch.zeros_like(x)

    for kind in (prompts, prompts.half().numpy()):
        seen.clear()
        (_, x, y), = sample_chunks(net, spec, PROC, num, SampleOptions(prompts=kind, batch=4))
        assert x.shape == (num, 1, 2, 2)
        assert y.tolist() == [0, 1, 0, 1, 0][:num]
        assert torch.equal(seen[0], prompts[y[:4]])


@pytest.mark.parametrize("solver", SOLVERS)
def test_evaluations_are_counted_truly(solver, tiny, monkeypatch):
    """--nfe is how often the network is called, however the solver spends the calls.

    The progress bar reaches its end.
    """
    flow = solver in ("euler", "sde")
    spec = spec_of(tiny, schedule="interpolant" if flow else "linear",
                   prediction="velocity" if flow else "eps", solver=solver)
    bars = []
    make_bar = sampling.progress_bar

    def spy(proc, total, desc):
        bar = make_bar(proc, total, desc)
        bars.append(bar)
        return bar

    monkeypatch.setattr(sampling, "progress_bar", spy)
    calls = []
    hook = tiny.register_forward_hook(lambda *_: calls.append(1))
    try:
        for nfe in (9, 11) if solver in ("fused", "heun") else (9, 10):
            calls.clear()
            options = SampleOptions(seed=0, nfe=nfe, lam=0.1)
            x, _ = sample_images(PROC.autocast(tiny), spec, PROC, 3, options)
            assert len(calls) == nfe
            assert x.shape == (3, 1, 8, 8)
            assert bars[-1].n == bars[-1].total
    finally:
        hook.remove()
