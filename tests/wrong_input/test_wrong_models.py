"""Names, networks and weights that do not fit: one line that says what is wrong."""
import pytest
import torch
from tiny_networks import small_dit, unet_arch

import models
from kit import checkpoints
from kit.cli import UserError


def test_arguments_of_make_arch():
    for name in ("SiT-XL/2-REPA", "DiT-Na/1", "LDM-FFHQ"):
        models.make_arch(name, 64, 4, 10)
    for name in ("SiT-H/2", "DiT-XL/2-REPA", "LDM-Cats", "DiT-S/3"):
        with pytest.raises(ValueError, match="unknown; choose DiT- or SiT-"):
            models.make_arch(name, 64, 4, 10)
    with pytest.raises(ValueError, match="patches of 8 do not tile a 36x36 input"):
        models.make_arch("SiT-S/8", 36, 4, 10)
    with pytest.raises(ValueError, match="its levels do not tile a 12x12 input"):
        models.make_arch("LDM-FFHQ", 12, 4, 10)


def test_names_of_ddpmpp_that_are_refused():
    with pytest.raises(ValueError, match="do not tile a 30x30 input"):
        models.make_arch("DDPM++-32", 30, 3, 0)
    with pytest.raises(ValueError, match=r"unknown; choose .*DDPM\+\+-t"):
        models.make_arch("DDPM++-33", 32, 3, 0)
    for name in ("DDPM++-0x1", "DDPM++-6x1", "DDPM++-8x0"):
        with pytest.raises(ValueError, match="unknown"):
            models.make_arch(name, 32, 3, 0)


def test_no_guidance_input_for_unets():
    with pytest.raises(ValueError, match="a UNet cannot"):
        models.with_guidance(models.build(unet_arch()))


def test_wrong_keys_and_shapes_are_named():
    sd = small_dit().state_dict()
    sd["blocks.0.mlp.fc1.weight"] = torch.zeros(3, 3)
    sd["extra.weight"] = torch.zeros(1)
    del sd["x_embedder.proj.bias"]
    line = (
        "missing 1: x_embedder.proj.bias; unexpected 1: extra.weight; "
        r"misshaped 1: blocks.0.mlp.fc1.weight \(3, 3\) instead of"
    )
    with pytest.raises(UserError, match=line):
        checkpoints.load_weights(small_dit(), sd, "x")
    diffusers = {"transformer_blocks.0.attn1.to_q.weight": torch.zeros(1)}
    with pytest.raises(UserError, match="diffusers"):
        checkpoints.load_weights(small_dit(), diffusers, "x")
