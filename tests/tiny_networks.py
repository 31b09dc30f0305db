"""Tiny networks of every kind, and files of weights as others write them."""
import numpy as np
import torch

import models
from kit import checkpoints

DIT_ARCH = dict(
    net="DiT",
    input_size=8,
    patch_size=2,
    in_channels=4,
    hidden_size=48,
    depth=3,
    num_heads=4,
    num_classes=10,
    learn_sigma=True,
)
SIT_ARCH = dict(DIT_ARCH, net="SiT")
EDM_ARCH = dict(
    net="DDPM++",
    input_size=16,
    in_channels=3,
    model_channels=16,
    num_blocks=1,
    channel_mult=[1, 2],
    attn_resolutions=[8],
    num_classes=10,
    augment_dim=9,
)


def unet_arch(context="text", **changes):
    """With context="text" the network takes y (B, S, 12)."""
    arch = dict(
        net="UNet",
        input_size=8,
        in_channels=4,
        model_channels=32,
        num_res_blocks=1,
        channel_mult=[1, 2],
        attention_resolutions=[2, 1],
        num_heads=4,
        context=context,
        context_dim=None if context == "none" else 12,
        num_classes=10 if context == "class" else 0,
    )
    return arch | changes


def unet_config(context):
    """unet_arch() as an entry of models.UNETS."""
    arch = unet_arch(context)
    del arch["net"], arch["num_classes"]
    return arch


def small_dit():
    arch = models.make_arch("DiT-Ti/2", 8, 1, 10, False)
    return models.fill_random(models.build(arch), seed=1)


def digits_net(**changes):
    """A DDPM++ for the digits."""
    arch = models.make_arch("DDPM++-8x1", 8, 1, 10)
    return models.fill_random(models.build({**arch, **changes}), std=0.1)


def golden_weights(file):
    """The state dict in one of tests/golden's files, which store it in half precision."""
    sd = {}
    for key in file.files:
        if key.startswith("sd/"):
            sd[key.removeprefix("sd/")] = torch.from_numpy(file[key].astype(np.float32))
    return sd


def golden_network(arch, file):
    """The network of one of tests/golden's files, in eval mode."""
    net = models.build(arch)
    return checkpoints.load_weights(net, golden_weights(file), "golden").eval()


def tensors(file, *keys):
    return [torch.from_numpy(file[key]) for key in keys]


def lightning(sd, average):
    """A state dict as Lightning files of latent diffusion hold it; the average is larger by 1."""
    held = {"first_stage_model.x": torch.zeros(2)}
    for key, value in sd.items():
        held["model.diffusion_model." + key] = value
        if average:
            held["model_ema.diffusion_model" + key.replace(".", "")] = value + 1
    return {"state_dict": held}


def assert_same_weights(net, sd, plus=0):
    """Are net's weights those of the state dict, plus a number?"""
    own = net.state_dict()
    for key, value in own.items():
        assert torch.equal(value, sd[key] + plus), key
