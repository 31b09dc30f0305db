import json
import struct
import sys
import types
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import GOLDEN, checkpoint

import checkpoints
import models
from runtime import UserError

ARCH = dict(net="DiT", input_size=8, patch_size=2, in_channels=4, hidden_size=48, depth=3, num_heads=4, num_classes=10, learn_sigma=True)


@pytest.fixture
def upstream(golden):
    f = golden("dit_tiny_p2.npz")
    sd = {k[3:]: torch.from_numpy(f[k].astype(np.float32)) for k in f.files if k.startswith("sd/")}
    return f, checkpoints.load_weights(models.build(ARCH), sd, "golden").eval()


def test_forward_equals_upstream(upstream):
    f, net = upstream
    x, t, y = (torch.from_numpy(f[k]) for k in ("x", "t", "y"))
    assert f["y"][-1] == 10  # the null label is among them
    seen = {}
    with torch.no_grad():
        out = net(x, t, y, tap=lambda l, h: seen.setdefault(l, h))
        np.testing.assert_allclose(out, f["out"], atol=1e-5)
        np.testing.assert_allclose(net(x, torch.from_numpy(f["t_frac"]), y), f["out_t_frac"], atol=1e-5)
    np.testing.assert_allclose(seen[0], f["tokens1"], atol=1e-4)
    assert sorted(seen) == [0, 1, 2, 3] and seen[3] is out


def test_gradients_equal_upstream(upstream):
    f, net = upstream
    x = torch.from_numpy(f["x"]).requires_grad_()
    (net(x, torch.from_numpy(f["t"]), torch.from_numpy(f["y"])) * torch.from_numpy(f["w"])).sum().backward()
    np.testing.assert_allclose(x.grad, f["grad_x"], atol=1e-4)
    named = dict(net.named_parameters())
    checked = [k for k in f.files if k.startswith("grad/")]
    assert checked
    for k in checked:
        # Behind the float32 sinusoid of t = 999 the last digits depend on the machine; that gradient is near 19.
        np.testing.assert_allclose(named[k[5:]].grad, f[k], atol=5e-4 if k == "grad/t_embedder.mlp.0.weight" else 1e-4)


def test_guidance_equals_upstream(upstream):
    from solvers import guide
    f, net = upstream
    half = len(f["cfg_x"]) // 2
    x, t, y = (torch.from_numpy(f[k][:half]) for k in ("cfg_x", "cfg_t", "cfg_y"))
    for scale in ("1", "1.5", "4"):
        with torch.no_grad():
            out = guide(net, float(scale), channels=3)(x, t, y)
        np.testing.assert_allclose(out, f[f"cfg_out_{scale}"][:half], atol=2e-5)
    with torch.no_grad():  # all channels: the fourth is guided too, the variance never is
        cond, null, every = net(x, t, y), net(x, t, torch.full_like(y, 10)), guide(net, 4.0, channels=4)(x, t, y)
    torch.testing.assert_close(every[:, :4], (null + 4 * (cond - null))[:, :4], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(every[:, 4:], cond[:, 4:], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name,side", [("DiT-S/2", 32), ("DiT-B/2", 32), ("DiT-L/2", 32), ("DiT-XL/2", 32), ("DiT-XL/2-512", 64)])
def test_keys_shapes_and_parameters_equal_upstream(name, side):
    want = json.loads((GOLDEN / "dit_keys.json").read_text())[name]
    with torch.device("meta"):
        net = models.build(models.make_arch(name.removesuffix("-512"), side, 4, 1000, True))
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == {k[0]: k[1] for k in want["keys"]}
    assert sum(p.numel() for p in net.parameters()) == want["params"]
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == want["trainable"]


@pytest.mark.parametrize("size", ["S", "B", "L", "XL"])
@pytest.mark.parametrize("patch", [4, 8])
def test_larger_patches(size, patch):
    arch = models.make_arch(f"DiT-{size}/{patch}", 32, 4, 1000, False)
    with torch.device("meta"):
        net = models.build(arch)
    D, p = arch["hidden_size"], patch
    assert net.pos_embed.shape == (1, (32 // p) ** 2, D) and net.x_embedder.proj.weight.shape == (D, 4, p, p)
    assert net.final_layer.linear.weight.shape == (p * p * 4, D)


def test_position_embedding(golden):
    f = golden("dit_posembed.npz")
    np.testing.assert_allclose(models.sincos_2d(48, 4), f["g4_d48"], atol=1e-12)
    np.testing.assert_allclose(models.sincos_2d(384, 16)[::17], f["g16_d384"], atol=1e-6)


def test_fresh_network_is_zero_and_filled_one_is_not():
    net = models.build(ARCH)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([5, 900]), torch.tensor([1, 10])
    assert net(x, t, y).abs().max() == 0
    assert models.fill_random(net)(x, t, y).abs().max() > 0


def test_flops_of_xl():
    params, flops = models.count(models.make_arch("DiT-XL/2", 32, 4, 1000, True))
    assert params == 675_129_632
    assert abs(flops / 237.3e9 - 1) < 0.01  # upstream's paper: 118.6 Gflops, counted in multiply-adds


# ---- SiT ----

SIT_ARCH = dict(ARCH, net="SiT")


@pytest.fixture
def upstream_sit(golden):
    f = golden("sit_tiny_p2.npz")
    sd = {k[3:]: torch.from_numpy(f[k].astype(np.float32)) for k in f.files if k.startswith("sd/")}
    return f, sd, checkpoints.load_weights(models.build(SIT_ARCH), sd, "golden").eval()


def test_sit_equals_upstream(upstream_sit):
    from solvers import guide
    f, sd, net = upstream_sit
    x, t, y = (torch.from_numpy(f[k]) for k in ("x", "t", "y"))
    x.requires_grad_()
    seen = {}
    out = net(x, t, y, tap=lambda l, h: seen.setdefault(l, h))
    (out * torch.from_numpy(f["w"])).sum().backward()
    np.testing.assert_allclose(out.detach(), f["out"], atol=1e-5)
    np.testing.assert_allclose(x.grad, f["grad_x"], atol=1e-4)
    assert sorted(seen) == [0, 1, 2, 3] and seen[3] is out
    np.testing.assert_allclose(seen[0].detach(), f["tokens1"], atol=1e-4)
    for scale in ("1", "1.5", "4"):
        cfg = [torch.from_numpy(f[k][:2]) for k in ("cfg_x", "cfg_t", "cfg_y")]
        with torch.no_grad():
            np.testing.assert_allclose(guide(net, float(scale), channels=3)(*cfg), f[f"cfg_out_{scale}"][:2], atol=2e-5)


def test_sit_of_upstream_counts_time_from_noise(upstream_sit):
    """Upstream: x_t = t data + (1 - t) noise, the network gives data - noise. Ours is the other way round in both."""
    f, sd, net = upstream_sit
    turned = checkpoints.load_weights(models.build({**SIT_ARCH, "reverse": True}), sd, "golden")
    x, t, y = (torch.from_numpy(f[k]) for k in ("x", "t", "y"))
    with torch.no_grad():
        torch.testing.assert_close(turned(x, 1 - t, y), -net(x, t, y), atol=1e-4, rtol=1e-4)
    assert turned.cfg_channels == 3 and net.cfg_channels is None and turned.arch["reverse"] and models.build(turned.arch).arch == turned.arch


@pytest.mark.parametrize("name", ["SiT-S/2", "SiT-B/2", "SiT-L/2", "SiT-XL/2", "REPA-SiT-B/2", "REPA-SiT-XL/2"])
def test_sit_keys_shapes_and_parameters_equal_upstream(name):
    want = json.loads((GOLDEN / "dit_keys.json").read_text())[name]
    repa = name.startswith("REPA")
    with torch.device("meta"):
        net = models.build(models.make_arch(name.removeprefix("REPA-"), 32, 4, 1000, not repa))
    keys = {k[0]: k[1] for k in want["keys"] if not k[0].startswith("projectors.")}
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == keys
    assert repa or sum(p.numel() for p in net.parameters()) == want["params"]


@pytest.mark.parametrize("repa", [False, True])
def test_sit_files(tmp_path, repa):
    """The heads tell whether a file is REPA's, the shapes how many channels it makes."""
    net = models.fill_random(models.build(models.make_arch("SiT-Na/8", 32, 4, 7, learn_sigma=not repa)))
    sd = net.state_dict() | ({"projectors.0.0.weight": torch.zeros(2, 2)} if repa else {})
    torch.save({"ema": sd}, tmp_path / "x.pt")
    loaded, info = checkpoints.load_model(tmp_path / "x.pt", "SiT-Na/8")
    assert (info["prediction"], info["schedule"], info["classes"], info["scale"]) == ("velocity", "interpolant", 7, 0.18215)
    assert (info["cfg"], info["cfg_interval"]) == ((1.8, [0.0, 0.7]) if repa else (1.5, None))
    assert loaded.arch["learn_sigma"] is not repa and loaded.reverse is not repa
    assert all(torch.equal(v, sd[k]) for k, v in loaded.state_dict().items())
    torch.save(sd | {"decoder.weight": torch.zeros(1)}, tmp_path / "y.pt")
    with pytest.raises(UserError, match=r"\(unexpected 1: decoder.weight\)"):
        checkpoints.load_model(tmp_path / "y.pt", "SiT-Na/8")
    if repa:  # nor are the heads taken by a DiT
        with pytest.raises(UserError, match="unexpected 1: projectors.0.0.weight"):
            checkpoints.load_model(tmp_path / "x.pt", "DiT-Na/8")


def test_released_names_without_a_file():
    sit, repa, sd, cin, churches = (checkpoints.describe(None, n) for n in ("SiT-XL/2", "SiT-XL/2-REPA", "SD-v1.5", "LDM-ImageNet", "LDM-Churches"))
    assert sit["arch"]["reverse"] and sit["arch"]["learn_sigma"] and sit["cfg"] == 1.5
    assert not repa["arch"].get("reverse") and not repa["arch"]["learn_sigma"] and repa["cfg_interval"] == [0.0, 0.7]
    assert (sd["schedule"], sd["scale"], sd["cfg"], sd["classes"], sd["arch"]["input_size"]) == ("sd", 0.18215, 7.5, 0, 64)
    assert (cin["schedule"], cin["scale"], cin["cfg"], cin["classes"], cin["arch"]["input_size"]) == ("ldm", 1.0, 1.5, 1000, 64)
    assert checkpoints.describe(None, "LDM-Bedroom", 128)["arch"]["input_size"] == 32  # the size of progressive distillation's LSUN
    assert (churches["schedule"], churches["arch"]["input_size"]) == ("ldm-churches", 32)
    with pytest.raises(UserError, match="ommer-lab.com/files/latent-diffusion/celeba.zip, and give --ckpt PATH"):
        checkpoints.upstream_checkpoint("LDM-CelebAHQ", 256, "nowhere")
    with pytest.raises(UserError, match="SD-v1.5 are not fetched"):
        checkpoints.upstream_checkpoint("SD-v1.5", None, "nowhere")
    with pytest.raises(UserError, match="no released weights for SiT-L/2 at 256"):
        checkpoints.upstream_checkpoint("SiT-L/2", None, "nowhere")


def test_arguments_of_make_arch():
    for name in ("SiT-XL/2-REPA", "DiT-Na/1", "LDM-FFHQ"):
        models.make_arch(name, 64, 4, 10)
    for name in ("SiT-H/2", "DiT-XL/2-REPA", "LDM-Cats", "DiT-S/3"):
        with pytest.raises(UserError, match="unknown; choose DiT- or SiT-"):
            models.make_arch(name, 64, 4, 10)
    for name in ("SiT-S/8", "LDM-FFHQ"):
        with pytest.raises(UserError, match="do not tile a 36x36 input|do not tile a 12x12 input"):
            models.make_arch(name, 36 if name[0] == "S" else 12, 4, 10)


# ---- the U-Net of latent diffusion ----


def unet_arch(context="text", **more):
    """A tiny one; with context="text" it takes y (B, T, 12)."""
    return dict(net="UNet", input_size=8, in_channels=4, model_channels=32, num_res_blocks=1, channel_mult=[1, 2],
                attention_resolutions=[2, 1], num_heads=4, context=context, context_dim=None if context == "none" else 12, num_classes=10 if context == "class" else 0) | more


def unet_inputs(context):
    y = torch.randn(3, 5, 12) if context == "text" else torch.tensor([1, 2, 10 if context == "class" else 0])
    return torch.randn(3, 4, 8, 8), torch.tensor([0, 480, 999]), y


def test_unet_equals_upstream(golden):
    f = golden("ldm_tiny_xattn_sd.npz")
    sd = {k[3:]: torch.from_numpy(f[k].astype(np.float32)) for k in f.files if k.startswith("sd/")}
    net = checkpoints.load_weights(models.build(unet_arch()), sd, "golden").eval()
    x, t, context = (torch.from_numpy(f[k]) for k in ("x", "t", "context"))
    x.requires_grad_()
    seen = {}
    out = net(x, t, context, tap=lambda l, h: seen.setdefault(l, h))
    (out * torch.from_numpy(f["w"])).sum().backward()
    np.testing.assert_allclose(out.detach(), f["out"], atol=1e-5)
    np.testing.assert_allclose(x.grad, f["grad_x"], atol=1e-4)
    np.testing.assert_allclose(net(x, t, context[:, :1]).detach(), f["out_ctx1"], atol=1e-5)
    assert len(net.blocks) == 4 + 1 + 4 and sorted(seen) == list(range(10)) and seen[9] is out
    stored = net(x, t, context, tap=lambda l, h: seen[l] if l == 0 else h)  # what a tap returns also goes through the skip connections
    torch.testing.assert_close(stored, out)
    assert not torch.allclose(net(x, t, context, tap=lambda l, h: h * 0 if l == 0 else h), out)


@pytest.mark.parametrize("name,config", [("SD-v1.5", "sd_v1"), ("LDM-ImageNet", "ldm_cin256_v2"), ("LDM-CelebAHQ", "ldm_celebahq256"),
                                         ("LDM-FFHQ", "ldm_celebahq256"), ("LDM-Bedroom", "ldm_celebahq256"), ("LDM-Churches", "ldm_lsun_churches256")])
def test_unet_keys_shapes_and_parameters_equal_upstream(name, config):
    want = json.loads((GOLDEN / "ldm_keys.json").read_text())[config]
    info = checkpoints.describe(None, name)
    with torch.device("meta"):
        net = models.build(info["arch"])
    own = {k: list(v.shape) for k, v in net.state_dict().items()}
    table = own.pop(models.CLASS_TABLE, None)
    assert table == ([1001, 512] if name == "LDM-ImageNet" else None)
    assert own == dict(want["keys"])
    assert sum(p.numel() for p in net.parameters()) == want["params"] + (1001 * 512 if table else 0)


@pytest.mark.parametrize("context", ["none", "class", "text"])
@pytest.mark.parametrize("updown", [False, True])
def test_fresh_unet_is_zero_and_filled_one_learns(context, updown):
    arch = unet_arch(context, resblock_updown=updown, use_scale_shift_norm=updown)
    net, (x, t, y) = models.build(arch), unet_inputs(context)
    assert models.build(net.arch).arch == net.arch and net.cfg_channels is None and not net.guidance
    assert net(x, t, y).abs().max() == 0
    out = models.fill_random(net)(x, t, y)
    assert out.shape == x.shape == (3, *net.sample_shape) and out.abs().max() > 0.01
    assert (net(x, t.flip(0), y) - out).abs().max() > 1e-4
    if context != "none":
        assert (net(x, t, y.flip(0)) - out).abs().max() > 1e-5
    out.square().sum().backward()
    for k, p in net.named_parameters():  # attention to a single token, the class, does not depend on what asks and how it is found
        idle = context == "class" and (".attn2.to_q" in k or ".attn2.to_k" in k or ".norm2." in k)
        assert p.grad is not None and (idle or p.grad.abs().max() > 0), k
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        half = net(x, t, y)
    assert half.dtype == torch.bfloat16 and (half - out).abs().max() < 0.05 * out.abs().max()


def test_legacy_attention_splits_heads_first():
    """Channels of qkv: head 0's q, k, v, then head 1's. In float64, against the plain formula."""
    block = models.fill_random(models.AttentionBlock(32, 2), std=0.3).double()
    x = torch.randn(2, 32, 4, 4, dtype=torch.float64)
    qkv = block.qkv(block.norm(x).flatten(2)).detach()                  # (B, 96, 16)
    heads = []
    for h in range(2):
        q, k, v = qkv[:, 48 * h:48 * (h + 1)].split(16, dim=1)
        heads.append(v @ (q.transpose(1, 2) @ k / 4).softmax(-1).transpose(1, 2))
    torch.testing.assert_close(block(x), x + block.proj_out(torch.cat(heads, 1)).view_as(x))


def test_flops_of_unets():
    params, flops = models.count(checkpoints.describe(None, "LDM-Churches")["arch"])
    assert params == 294_966_916 and flops > 4e10
    text, none = models.count(unet_arch()), models.count(unet_arch("none"))
    assert text[0] > none[0] and text[1] > none[1] > 0 and models.count(unet_arch("class"))[1] > none[1]


def test_no_guidance_input_for_unets():
    with pytest.raises(UserError, match="a UNet cannot"):
        models.with_guidance(models.build(unet_arch()))
    sit = models.fill_random(models.build({**SIT_ARCH, "reverse": True}))
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([0.1, 0.9]), torch.tensor([1, 10])
    torch.testing.assert_close(models.with_guidance(sit)(x, t, y, torch.ones(2)), sit(x, t, y))


@pytest.mark.parametrize("context", ["none", "class", "text"])
@pytest.mark.parametrize("form", ["raw", "lightning", "lightning average", "safetensors"])
def test_unet_files(tmp_path, monkeypatch, context, form):
    """A small model of each kind of file; Lightning's keep the table of classes beside the U-Net and without an average."""
    name = {"none": "LDM-FFHQ", "class": "LDM-ImageNet", "text": "SD-v1.5"}[context]
    monkeypatch.setitem(models.UNETS, name, {k: v for k, v in unet_arch(context).items() if k not in ("net", "num_classes")})
    net = models.fill_random(models.build(unet_arch(context)))
    sd, path = net.state_dict(), tmp_path / "x.ckpt"
    beside = {k: v for k, v in sd.items() if k == models.CLASS_TABLE}
    held = lightning({k: v for k, v in sd.items() if k not in beside}, form == "lightning average")
    held["state_dict"] |= beside
    if form == "safetensors":
        write_safetensors(path := tmp_path / "x.safetensors", held["state_dict"])
    else:
        torch.save(sd if form == "raw" else held, path)
    loaded, info = checkpoints.load_model(path, name)
    assert info["classes"] == loaded.num_classes == (10 if context == "class" else 0)
    assert all(torch.equal(v, sd[k] + (form == "lightning average" and k not in beside)) for k, v in loaded.state_dict().items())
    torch.save(checkpoint(net, name=name, cfg_interval=[0.1, 0.5]), tmp_path / "ours.pt")  # our own format, without a name
    again, info = checkpoints.load_model(tmp_path / "ours.pt")
    assert again.arch == net.arch and info["cfg_interval"] == [0.1, 0.5]


def test_lightning_callbacks_and_measured_scale(tmp_path, monkeypatch):
    """Old Lightning files name the class of a callback; LDM-Churches carries the scale of its latents."""
    monkeypatch.setitem(models.UNETS, "LDM-Churches", {k: v for k, v in unet_arch("none").items() if k not in ("net", "num_classes")})
    net = models.fill_random(models.build(unet_arch("none")))
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.setitem(sys.modules, part, module)
    held = lightning(net.state_dict(), True) | {"callbacks": {module.ModelCheckpoint: {"monitor": "val/loss"}}}
    held["state_dict"]["scale_factor"] = torch.tensor(0.22765929)
    torch.save(held, tmp_path / "x.ckpt")
    torch.save(held | {"callbacks": [print]}, tmp_path / "bad.ckpt")
    monkeypatch.undo()
    monkeypatch.setitem(models.UNETS, "LDM-Churches", {k: v for k, v in unet_arch("none").items() if k not in ("net", "num_classes")})
    loaded, info = checkpoints.load_model(tmp_path / "x.ckpt", "LDM-Churches")
    assert abs(info["scale"] - 0.22765929) < 1e-8 and loaded.arch == net.arch
    with pytest.raises(UserError, match="cannot be read"):
        checkpoints.load_model(tmp_path / "bad.ckpt", "LDM-Churches")


# ---- loading ----


def small():
    return models.fill_random(models.build(models.make_arch("DiT-Ti/2", 8, 1, 10, False)), seed=1)


def write_safetensors(path, sd):
    header, at, blobs = {"__metadata__": {"format": "pt"}}, 0, []
    for k, v in sd.items():
        raw = v.contiguous().numpy().tobytes()
        header[k] = {"dtype": "F32", "shape": list(v.shape), "data_offsets": [at, at + len(raw)]}
        at += len(raw)
        blobs.append(raw)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def lightning(sd, ema):
    out = {"model.diffusion_model." + k: v for k, v in sd.items()}
    out |= {"first_stage_model.x": torch.zeros(2)}
    return {"state_dict": out | ({"model_ema.diffusion_model" + k.replace(".", ""): v + 1 for k, v in sd.items()} if ema else {})}


WRAPPERS = {
    "raw": lambda sd: sd,
    "ema": lambda sd: {"model": {k: v * 0 for k, v in sd.items()}, "ema": sd, "opt": {}, "args": Namespace(lr=1)},
    "model": lambda sd: {"model": sd},
    "state_dict": lambda sd: {"state_dict": sd},
    "ddp": lambda sd: {"module." + k: v for k, v in sd.items()},
    "compiled ddp": lambda sd: {"module._orig_mod." + k: v for k, v in sd.items()},
    "lightning": lambda sd: lightning(sd, False),
}


@pytest.mark.parametrize("form", WRAPPERS)
def test_tolerant_loading(tmp_path, form):
    sd = small().state_dict()
    torch.save(WRAPPERS[form](sd), tmp_path / "x.pt")
    net = checkpoints.load_weights(models.build(small().arch), checkpoints.read_file(tmp_path / "x.pt"), form)
    assert all(torch.equal(v, sd[k]) for k, v in net.state_dict().items())


def test_lightning_average_and_safetensors(tmp_path):
    sd = small().state_dict()
    net = checkpoints.load_weights(small(), lightning(sd, True), "x")
    assert all(torch.equal(v, sd[k] + 1) for k, v in net.state_dict().items())
    write_safetensors(tmp_path / "x.safetensors", sd)
    net = checkpoints.load_weights(models.build(small().arch), checkpoints.read_file(tmp_path / "x.safetensors"), "x")
    assert all(torch.equal(v, sd[k]) for k, v in net.state_dict().items())


def test_upstream_file_with_other_classes(tmp_path):
    """A raw DiT-S/8 for 7 classes: the name gives the shape, the label table the classes."""
    net = models.fill_random(models.build(models.make_arch("DiT-S/8", 32, 4, 7, True)))
    torch.save({"ema": net.state_dict()}, tmp_path / "x.pt")
    loaded, info = checkpoints.load_model(tmp_path / "x.pt", "DiT-S/8")
    assert info["classes"] == loaded.num_classes == 7 and info["cfg"] == 1.5 and info["scale"] == 0.18215
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in loaded.state_dict().items())


def test_wrong_keys_and_shapes_are_named():
    sd = small().state_dict()
    sd["blocks.0.mlp.fc1.weight"] = torch.zeros(3, 3)
    sd["extra.weight"] = torch.zeros(1)
    del sd["pos_embed"]
    with pytest.raises(UserError, match=r"missing 1: pos_embed; unexpected 1: extra.weight; misshaped 1: blocks.0.mlp.fc1.weight \(3, 3\) instead of"):
        checkpoints.load_weights(small(), sd, "x")
    with pytest.raises(UserError, match="diffusers"):
        checkpoints.load_weights(small(), {"transformer_blocks.0.attn1.to_q.weight": torch.zeros(1)}, "x")


def test_student_opens_as_upstream_does(tmp_path, golden):
    """Upstream's loader: torch.load, then ["ema"] if there is one, then a strict load_state_dict."""
    net = small()
    torch.save(checkpoint(net), tmp_path / "x.pt")
    held = torch.load(tmp_path / "x.pt", weights_only=True)
    upstream_keys = [k[0] for k in json.loads((GOLDEN / "dit_keys.json").read_text())["DiT-S/2"]["keys"] if not k[0].startswith("blocks.") or int(k[0].split(".")[1]) < 3]
    assert sorted(held["ema"]) == sorted(upstream_keys)
    assert (tmp_path / "x.pt").stat().st_size < 1.2 * 4 * sum(p.numel() for p in net.parameters())  # stored once
