"""Networks: shapes, fresh weights, attention and counts that follow from the definitions."""
import pytest
import torch
from tiny_networks import DIT_ARCH, SIT_ARCH, unet_arch

import models

# ---- DiT and SiT -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["S", "B", "L", "XL"])
@pytest.mark.parametrize("patch", [4, 8])
def test_larger_patches(size, patch):
    arch = models.make_arch(f"DiT-{size}/{patch}", 32, 4, 1000, False)
    with torch.device("meta"):
        net = models.build(arch)
    D = arch["hidden_size"]
    assert net.pos_embed.shape == (1, (32 // patch) ** 2, D)
    assert net.x_embedder.proj.weight.shape == (D, 4, patch, patch)
    assert net.final_layer.linear.weight.shape == (patch * patch * 4, D)


def test_fresh_network_is_zero_and_filled_one_is_not():
    net = models.build(DIT_ARCH)
    x = torch.randn(2, 4, 8, 8)
    t = torch.tensor([5, 900])
    y = torch.tensor([1, 10])
    assert net(x, t, y).abs().max() == 0
    assert models.fill_random(net)(x, t, y).abs().max() > 0


def test_guidance_as_an_input_of_a_sit():
    sit = models.fill_random(models.build({**SIT_ARCH, "reverse": True}))
    x = torch.randn(2, 4, 8, 8)
    t = torch.tensor([0.1, 0.9])
    y = torch.tensor([1, 10])
    new = models.with_guidance(sit)
    torch.testing.assert_close(new(x, t, y, torch.ones(2)), sit(x, t, y))


def networks_with_inputs():
    """One network of every kind with its x, t, y."""
    labels = torch.tensor([1, 10])
    x = torch.randn(2, 4, 8, 8)
    times = torch.tensor([0.3, 0.9])
    edm = models.make_arch("DDPM++-8x1", 8, 4, 10)
    return [
        (DIT_ARCH, x, 1000 * times, labels),
        ({**SIT_ARCH, "reverse": True}, x, times, labels),
        (unet_arch("class"), x, 1000 * times, labels),
        (edm, x, times, labels),
    ]


@pytest.mark.parametrize("kind", range(4))
def test_tap_records_and_edits(kind):
    """The example at the top of models.py."""
    arch, x, t, y = networks_with_inputs()[kind]
    net = models.fill_random(models.build(arch)).eval()
    features = []

    def record(l, h):
        assert l == len(features)
        features.append(h)
        return h

    def fuse(l, h):
        return torch.lerp(h, features[l], 0.1)

    def replace(l, h):
        return features[l]

    out = net(x, t, y, tap=record)
    assert len(features) == len(net.blocks) + 1
    assert features[-1] is out
    assert torch.equal(net(x, t, y), out)
    torch.testing.assert_close(net(x, t, y, tap=fuse), out)  # nothing is mixed with itself
    assert (net(-x, t, y, tap=fuse) - net(-x, t, y)).abs().max() > 1e-4
    assert net(-x, t, y, tap=replace) is out


# ---- The U-Net of latent diffusion -------------------------------------------------------------


def unet_inputs(context):
    if context == "text":
        y = torch.randn(3, 5, 12)
    else:
        y = torch.tensor([1, 2, 10 if context == "class" else 0])
    return torch.randn(3, 4, 8, 8), torch.tensor([0, 480, 999]), y


@pytest.mark.parametrize("context", ["none", "class", "text"])
@pytest.mark.parametrize("updown", [False, True])
def test_fresh_unet_is_zero_and_filled_one_learns(context, updown):
    arch = unet_arch(context, resblock_updown=updown, use_scale_shift_norm=updown)
    net = models.build(arch)
    x, t, y = unet_inputs(context)
    assert models.build(net.arch).arch == net.arch
    assert net.cfg_channels is None
    assert not net.guidance
    assert net(x, t, y).abs().max() == 0

    out = models.fill_random(net)(x, t, y)
    assert out.shape == x.shape == (3, *net.sample_shape)
    assert out.abs().max() > 0.01
    assert (net(x, t.flip(0), y) - out).abs().max() > 1e-4
    if context != "none":
        assert (net(x, t, y.flip(0)) - out).abs().max() > 1e-5

    out.square().sum().backward()
    for name, p in net.named_parameters():
        # Attention to a single token, the class, gives that token whatever the query and key are.
        query = ".attn2.to_q" in name or ".attn2.to_k" in name or ".norm2." in name
        idle = context == "class" and query
        assert p.grad is not None, name
        assert idle or p.grad.abs().max() > 0, name

    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        half = net(x, t, y)
    assert half.dtype == torch.bfloat16
    assert (half - out).abs().max() < 0.05 * out.abs().max()


def test_legacy_attention_splits_heads_first():
    """Channels of qkv: head 0's q, k, v, then head 1's. In float64, against the plain formula."""
    block = models.fill_random(models.AttentionBlock(32, 2), std=0.3).double()
    x = torch.randn(2, 32, 4, 4, dtype=torch.float64)
    qkv = block.qkv(block.norm(x).flatten(2)).detach()                  # (B, 96, 16)
    heads = []
    for h in range(2):
        q, k, v = qkv[:, 48 * h:48 * (h + 1)].split(16, dim=1)          # (B, 16, 16)
        weights = (q.transpose(1, 2) @ k / 4).softmax(-1)
        heads.append(v @ weights.transpose(1, 2))
    want = x + block.proj_out(torch.cat(heads, 1)).view_as(x)
    torch.testing.assert_close(block(x), want)


def test_flops_of_unets():
    params, flops = models.count(models.make_arch("LDM-Churches", 32, 4, 0))
    assert params == 294_966_916
    assert flops > 4e10
    text_params, text_flops = models.count(unet_arch("text"))
    none_params, none_flops = models.count(unet_arch("none"))
    _, class_flops = models.count(unet_arch("class"))
    assert text_params > none_params
    assert text_flops > none_flops > 0
    assert class_flops > none_flops
