"""DDPM++ and its preconditioning, Heun's sampler, the loss and files against EDM's own numbers."""
import json

import edm_pickles
import numpy as np
import pytest
import torch
from conftest import GOLDEN
from tiny_networks import EDM_ARCH, assert_same_weights, golden_network, golden_weights, tensors

import models
import train
from kit import checkpoints
from solvers import (
    SIGMA_DATA,
    make_grid,
    make_schedule,
    predictor,
    sample,
    solver_grid,
    to_x0_eps,
)

EDM = make_schedule("edm")
LABELS = torch.tensor([0, 3, 9, 10])  # of the golden file's batch; the last is the null label


@pytest.fixture(scope="module")
def upstream():
    file = np.load(GOLDEN / "edm_tiny_edmprecond_l10_a9.npz")
    return file, golden_network(EDM_ARCH, file)


@pytest.fixture
def augmented(upstream):
    """Upstream's network in the state in which most of the numbers were made: it is told of an
    augmentation, which never happens here."""
    file, net = upstream
    told = torch.from_numpy(file["augment"])

    def add_augmentation(layer, inputs, out):
        return out + net.model["map_augment"](told)

    hook = net.model["map_label"].register_forward_hook(add_augmentation)
    yield net
    hook.remove()


def denoised(net, x, t, y, tap=None):
    x0, _ = to_x0_eps(EDM, x, net(x, t, y, tap=tap), t, "edm")
    return x0


# ---- The network -------------------------------------------------------------------------------


def test_network_equals_upstream(upstream, augmented):
    file, net = upstream
    x, t, w = tensors(file, "x", "sigma", "w")
    x.requires_grad_()
    seen = {}

    def record(l, h):
        seen[l] = h
        return h

    D = denoised(net, x, t, LABELS, tap=record)
    (D * w).sum().backward()
    np.testing.assert_allclose(D.detach(), file["D"], atol=1e-4)
    np.testing.assert_allclose(x.grad, file["grad_x"], atol=1e-4)
    for name, p in net.named_parameters():
        if p.requires_grad:
            want = float(file["gradnorm/" + name])
            assert float(p.grad.norm()) == pytest.approx(want, rel=1e-4), name
    net.zero_grad()
    assert len(net.blocks) == 4 + 7
    assert sorted(seen) == list(range(12))
    assert seen[11].shape == x.shape

    c_noise = torch.from_numpy(file["F_noise_labels"])
    with torch.no_grad():
        np.testing.assert_allclose(net.raw(x, c_noise, LABELS), file["F"], atol=1e-4)
        unlabelled = denoised(net, x, t, torch.full_like(LABELS, 10))
        np.testing.assert_allclose(unlabelled, file["D_labels_none"], atol=1e-4)


def test_network_without_augmentation(upstream):
    file, net = upstream
    x, t = tensors(file, "x", "sigma")
    with torch.no_grad():
        np.testing.assert_allclose(denoised(net, x, t, LABELS), file["D_noaug"], atol=1e-4)


def test_preconditioning_equals_upstream(golden):
    file = golden("edm_scalars.npz")
    t = torch.from_numpy(file["edm/sigma"])
    x = torch.full((len(t), 1, 2, 2), 2.0)
    D, _ = to_x0_eps(EDM, x, torch.ones_like(x), t, "edm")
    np.testing.assert_allclose(D[:, 0, 0, 0], file["edm/D_x2_F1"], rtol=1e-6)

    net = models.build(models.make_arch("DDPM++-8x1", 8, 1, 0))
    given = []

    def raw(x, c_noise, *_):
        given.append((x, c_noise))

    net.raw = raw
    net(x, t, None)
    scaled, c_noise = given[0]
    np.testing.assert_allclose(scaled[:, 0, 0, 0], file["edm/c_in_x2"], rtol=1e-6)
    np.testing.assert_allclose(c_noise, file["edm/c_noise"], rtol=1e-6)


def test_keys_and_sizes_of_the_paper():
    """The keys of two of upstream's networks; the sizes of Table 1 of the KD paper, whose number
    of operations is met within 0.6 %."""
    want = json.loads((GOLDEN / "edm_keys.json").read_text())
    for key, name in (
        ("keys_teacher_uncond_aug9", "DDPM++-t"),
        ("keys_c32_b2_uncond_aug9", "DDPM++-32"),
    ):
        arch = models.make_arch(name, 32, 3, 0)
        with torch.device("meta"):
            net = models.build({**arch, "augment_dim": 9})
        shapes = {name: list(value.shape) for name, value in net.state_dict().items()}
        assert shapes == {name: shape for name, shape, _ in want[key]}

    table = [  # name, residual blocks, channels, Gflops
        ("t", 4, 128, 42.42),
        ("128", 2, 128, 25.44),
        ("96", 2, 96, 14.36),
        ("64", 2, 64, 6.42),
        ("32", 2, 32, 1.64),
    ]
    for name, blocks, channels, gflops in table:
        for labels, suffix in ((0, "-uncond"), (10, "")):
            params, flops = models.count(models.make_arch(f"DDPM++-{name}{suffix}", 32, 3, 10))
            key = f"ddpmpp_cifar10_c{channels}_b{blocks}_label{labels}_aug0"
            assert params == want[key]["params"]
        assert abs(flops / gflops / 1e9 - 1) < 0.006


# ---- Sampling and the loss ---------------------------------------------------------------------


@pytest.mark.parametrize("steps", [10, 18])
def test_heun_equals_upstream(upstream, steps):
    file, net = upstream
    grid = solver_grid(EDM, "heun", 2 * steps - 1)
    levels = []
    states = []

    def watched(x, t, y):
        assert x.dtype == torch.float32
        levels.append(float(t[0]))
        states.append(x.clone())
        return net(x, t, y)

    noise = torch.from_numpy(file["latents"])
    predict = predictor(watched, torch.tensor([0, 3]), EDM, "edm")
    out = sample(predict, noise, EDM, grid, "heun")
    assert out.dtype == torch.float32
    assert len(levels) == 2 * steps - 1
    np.testing.assert_allclose(out, file[f"heun{steps}_out"], atol=2e-4)
    np.testing.assert_allclose(levels, file[f"heun{steps}_sigma_calls"], rtol=1e-6)
    if steps == 10:
        want = file["heun10_x_calls"]
        np.testing.assert_allclose(torch.stack(states), want, rtol=1e-5, atol=2e-4)


def test_noise_levels_equal_upstream(golden):
    file = golden("edm_scalars.npz")
    for n in (2, 5, 10, 18, 35, 40):
        grid = solver_grid(EDM, "heun", 2 * n - 1)
        levels = []
        for t, u in zip(grid[:-1], grid[1:]):
            levels += [t, u]
        calls = levels[:-1]  # no network is evaluated at the end
        np.testing.assert_allclose(calls, file[f"t_calls_{n}"], rtol=1e-12)
    assert make_grid("edm", 3) == solver_grid(EDM, "ddim", 3) == solver_grid(EDM, "heun", 5)
    assert len(make_grid("edm", 1)) == 2


def test_loss_equals_upstream(golden):
    """Of a network whose D is 0.3 x, sample by sample."""
    file = golden("edm_scalars.npz")
    x0, noise, t = tensors(file, "loss/y", "loss/n", "loss/EDMLoss_sigma")

    def net(x, t, labels):
        s = t.view(-1, 1, 1, 1)
        variance = s ** 2 + SIGMA_DATA ** 2
        c_skip = SIGMA_DATA ** 2 / variance
        c_out = s * SIGMA_DATA / variance.sqrt()
        return (0.3 - c_skip) * x / c_out

    class Pinned:
        def normal(self, shape):
            return torch.from_numpy(file["loss/rnd_normal"]).flatten()

    torch.testing.assert_close(train.training_times(EDM, Pinned()), t)
    for i in range(len(x0)):
        one = slice(i, i + 1)
        loss, aux = train.diffusion_loss(net, EDM, x0[one], None, t[one], noise[one], "edm")
        want = float(file["loss/EDMLoss"][i].mean())
        assert float(loss) == pytest.approx(want, rel=1e-5)
        assert aux == {}
    weight = (t ** 2 + 0.25) / (t * 0.5) ** 2
    np.testing.assert_allclose(weight, file["loss/EDMLoss_weight"].flatten(), rtol=1e-6)


# ---- Files -------------------------------------------------------------------------------------


def test_pickled_network_loads_and_samples(tmp_path, upstream, monkeypatch):
    file, _ = upstream
    sd = golden_weights(file)
    edm_pickles.make_modules(monkeypatch)
    source = f"open({str(tmp_path / 'executed')!r}, 'w')"
    edm_pickles.write(tmp_path / "net.pkl", edm_pickles.network(sd, source=source))
    net, spec = checkpoints.load_model(tmp_path / "net.pkl")
    assert not (tmp_path / "executed").exists()  # the source of the classes is only text
    assert net.arch == EDM_ARCH
    assert net.state_dict().keys() == sd.keys()
    assert_same_weights(net, sd)
    assert (spec["name"], spec["classes"], spec["scale"]) == ("DDPM++", 10, None)
    assert (spec["prediction"], spec["schedule"]) == ("edm", "edm")
    assert (spec["solver"], spec["nfe"]) == ("heun", 35)
    for name, p in net.named_parameters():
        if "map_augment" in name:
            assert not p.requires_grad

    noise = torch.from_numpy(file["latents"])
    predict = predictor(net, torch.tensor([0, 3]), EDM, "edm")
    out = sample(predict, noise, EDM, solver_grid(EDM, "heun", 19), "heun")
    np.testing.assert_allclose(out, file["heun10_out"], atol=2e-4)

    torch.save({"ema": sd}, tmp_path / "net.pt")  # the same as a state dict
    again, described = checkpoints.load_model(tmp_path / "net.pt")
    assert described == spec
    assert_same_weights(again, sd)
