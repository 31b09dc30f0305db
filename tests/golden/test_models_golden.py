"""DiT, SiT and the U-Net of latent diffusion against numbers of the upstream code."""
import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN, checkpoint
from tiny_networks import (
    DIT_ARCH,
    SIT_ARCH,
    golden_network,
    golden_weights,
    small_dit,
    tensors,
    unet_arch,
)

import models
from kit import checkpoints
from solvers import guide


def recorder():
    """A dictionary, and a tap that records into it."""
    seen = {}

    def record(l, h):
        seen[l] = h
        return h

    return seen, record


def shapes(net):
    return {key: list(value.shape) for key, value in net.state_dict().items()}


def count_parameters(net):
    return sum(p.numel() for p in net.parameters())


# ---- DiT ---------------------------------------------------------------------------------------


@pytest.fixture
def upstream(golden):
    file = golden("dit_tiny_p2.npz")
    return file, golden_network(DIT_ARCH, file)


def test_forward_equals_upstream(upstream):
    file, net = upstream
    x, t, y, t_frac = tensors(file, "x", "t", "y", "t_frac")
    assert y[-1] == 10  # the null label is among them
    seen, record = recorder()
    with torch.no_grad():
        out = net(x, t, y, tap=record)
        np.testing.assert_allclose(out, file["out"], atol=1e-5)
        np.testing.assert_allclose(net(x, t_frac, y), file["out_t_frac"], atol=1e-5)
    np.testing.assert_allclose(seen[0], file["tokens1"], atol=1e-4)
    assert sorted(seen) == [0, 1, 2, 3]
    assert seen[3] is out


def test_gradients_equal_upstream(upstream):
    file, net = upstream
    x, t, y, w = tensors(file, "x", "t", "y", "w")
    x.requires_grad_()
    (net(x, t, y) * w).sum().backward()
    np.testing.assert_allclose(x.grad, file["grad_x"], atol=1e-4)
    parameters = dict(net.named_parameters())
    checked = [key for key in file.files if key.startswith("grad/")]
    assert checked
    for key in checked:
        # Behind the float32 sinusoid of t = 999 the last digits depend on the machine. That
        # gradient is near 19.
        atol = 5e-4 if key == "grad/t_embedder.mlp.0.weight" else 1e-4
        gradient = parameters[key.removeprefix("grad/")].grad
        np.testing.assert_allclose(gradient, file[key], atol=atol)


def test_guidance_equals_upstream(upstream):
    file, net = upstream
    half = len(file["cfg_x"]) // 2
    x, t, y = (whole[:half] for whole in tensors(file, "cfg_x", "cfg_t", "cfg_y"))
    for scale in ("1", "1.5", "4"):
        with torch.no_grad():
            out = guide(net, float(scale), channels=3)(x, t, y)
        np.testing.assert_allclose(out, file[f"cfg_out_{scale}"][:half], atol=2e-5)

    # With all channels the fourth is guided too. The variance never is.
    with torch.no_grad():
        cond = net(x, t, y)
        null = net(x, t, torch.full_like(y, 10))
        every = guide(net, 4.0, channels=4)(x, t, y)
    want = null + 4 * (cond - null)
    torch.testing.assert_close(every[:, :4], want[:, :4], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(every[:, 4:], cond[:, 4:], atol=1e-6, rtol=1e-5)


NAMES = [("DiT-S/2", 32), ("DiT-B/2", 32), ("DiT-L/2", 32), ("DiT-XL/2", 32), ("DiT-XL/2-512", 64)]


@pytest.mark.parametrize("name, side", NAMES)
def test_keys_shapes_and_parameters_equal_upstream(name, side):
    want = json.loads((GOLDEN / "dit_keys.json").read_text())[name]
    with torch.device("meta"):
        net = models.build(models.make_arch(name.removesuffix("-512"), side, 4, 1000, True))
    assert list(shapes(net).items()) == [(key[0], key[1]) for key in want["keys"]]  # in order
    assert count_parameters(net) == want["params"]
    trainable = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert trainable == want["trainable"]


def test_position_embedding(golden):
    file = golden("dit_posembed.npz")
    np.testing.assert_allclose(models.sincos_2d(48, 4), file["g4_d48"], atol=1e-12)
    np.testing.assert_allclose(models.sincos_2d(384, 16)[::17], file["g16_d384"], atol=1e-6)


def test_flops_of_xl():
    params, flops = models.count(models.make_arch("DiT-XL/2", 32, 4, 1000, True))
    assert params == 675_129_632
    assert abs(flops / 237.3e9 - 1) < 0.01  # DiT's paper: 118.6 Gflops, counted in multiply-adds


def test_student_opens_as_upstream_does(tmp_path):
    """Upstream's loader: torch.load, then ["ema"] if it is there, then a strict load."""
    net = small_dit()
    torch.save(checkpoint(net), tmp_path / "x.pt")
    held = torch.load(tmp_path / "x.pt", weights_only=True)
    upstream_keys = []
    for key, *_ in json.loads((GOLDEN / "dit_keys.json").read_text())["DiT-S/2"]["keys"]:
        if not key.startswith("blocks.") or int(key.split(".")[1]) < 3:
            upstream_keys.append(key)
    assert sorted(held["ema"]) == sorted(upstream_keys)
    stored_once = 1.2 * 4 * count_parameters(net)  # bytes, though it is "model" and "ema"
    assert (tmp_path / "x.pt").stat().st_size < stored_once


# ---- SiT ---------------------------------------------------------------------------------------


@pytest.fixture
def upstream_sit(golden):
    file = golden("sit_tiny_p2.npz")
    return file, golden_network(SIT_ARCH, file)


def test_sit_equals_upstream(upstream_sit):
    file, net = upstream_sit
    x, t, y, w = tensors(file, "x", "t", "y", "w")
    x.requires_grad_()
    seen, record = recorder()
    out = net(x, t, y, tap=record)
    (out * w).sum().backward()
    np.testing.assert_allclose(out.detach(), file["out"], atol=1e-5)
    np.testing.assert_allclose(x.grad, file["grad_x"], atol=1e-4)
    assert sorted(seen) == [0, 1, 2, 3]
    assert seen[3] is out
    np.testing.assert_allclose(seen[0].detach(), file["tokens1"], atol=1e-4)

    x, t, y = (whole[:2] for whole in tensors(file, "cfg_x", "cfg_t", "cfg_y"))
    for scale in ("1", "1.5", "4"):
        with torch.no_grad():
            out = guide(net, float(scale), channels=3)(x, t, y)
        np.testing.assert_allclose(out, file[f"cfg_out_{scale}"][:2], atol=2e-5)


def test_sit_of_upstream_counts_time_from_noise(upstream_sit):
    """Upstream: x_t = t data + (1 - t) noise, and the network gives data - noise. Ours is the
    other way round in both."""
    file, net = upstream_sit
    turned = models.build({**SIT_ARCH, "reverse": True})
    checkpoints.load_weights(turned, golden_weights(file), "golden")
    x, t, y = tensors(file, "x", "t", "y")
    with torch.no_grad():
        torch.testing.assert_close(turned(x, 1 - t, y), -net(x, t, y), atol=1e-4, rtol=1e-4)
    assert turned.cfg_channels == 3
    assert net.cfg_channels is None
    assert turned.arch["reverse"]
    assert models.build(turned.arch).arch == turned.arch


SITS = ["SiT-S/2", "SiT-B/2", "SiT-L/2", "SiT-XL/2", "REPA-SiT-B/2", "REPA-SiT-XL/2"]


@pytest.mark.parametrize("name", SITS)
def test_sit_keys_shapes_and_parameters_equal_upstream(name):
    want = json.loads((GOLDEN / "dit_keys.json").read_text())[name]
    repa = name.startswith("REPA")
    with torch.device("meta"):
        net = models.build(models.make_arch(name.removeprefix("REPA-"), 32, 4, 1000, not repa))
    keys = {key[0]: key[1] for key in want["keys"] if not key[0].startswith("projectors.")}
    assert list(shapes(net).items()) == list(keys.items())  # in order
    if not repa:
        assert count_parameters(net) == want["params"]


# ---- The U-Net of latent diffusion -------------------------------------------------------------


def test_unet_equals_upstream(golden):
    file = golden("ldm_tiny_xattn_sd.npz")
    net = golden_network(unet_arch(), file)
    x, t, context, w = tensors(file, "x", "t", "context", "w")
    x.requires_grad_()
    seen, record = recorder()
    out = net(x, t, context, tap=record)
    (out * w).sum().backward()
    np.testing.assert_allclose(out.detach(), file["out"], atol=1e-5)
    np.testing.assert_allclose(x.grad, file["grad_x"], atol=1e-4)
    one_token = net(x, t, context[:, :1]).detach()
    np.testing.assert_allclose(one_token, file["out_ctx1"], atol=1e-5)
    assert len(net.blocks) == 4 + 1 + 4
    assert sorted(seen) == list(range(10))
    assert seen[9] is out

    # What a tap returns also goes through the skip connections.
    def replay(l, h):
        return seen[l] if l == 0 else h

    def erase(l, h):
        return h * 0 if l == 0 else h

    torch.testing.assert_close(net(x, t, context, tap=replay), out)
    assert not torch.allclose(net(x, t, context, tap=erase), out)


CONFIGS = [
    ("SD-v1.5", "sd_v1"),
    ("LDM-ImageNet", "ldm_cin256_v2"),
    ("LDM-CelebAHQ", "ldm_celebahq256"),
    ("LDM-FFHQ", "ldm_celebahq256"),
    ("LDM-Bedroom", "ldm_celebahq256"),
    ("LDM-Churches", "ldm_lsun_churches256"),
]


@pytest.mark.parametrize("name, config", CONFIGS)
def test_unet_keys_shapes_and_parameters_equal_upstream(name, config):
    want = json.loads((GOLDEN / "ldm_keys.json").read_text())[config]
    spec = checkpoints.describe(None, name)
    with torch.device("meta"):
        net = models.build(spec["arch"])
    own = shapes(net)
    table = own.pop(models.CLASS_TABLE, None)  # beside the U-Net upstream
    assert table == ([1001, 512] if name == "LDM-ImageNet" else None)
    assert list(own.items()) == list(dict(want["keys"]).items())  # in order
    assert count_parameters(net) == want["params"] + (1001 * 512 if table else 0)
