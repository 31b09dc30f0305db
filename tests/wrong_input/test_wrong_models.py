"""Names, networks and weights that do not fit: one line that says what is wrong."""
import json
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from conftest import checkpoint
from PIL import Image
from small_data import write_safetensors
from tiny_networks import lightning, small_dit, unet_arch, unet_config

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


# ---- What is no file of weights ----------------------------------------------------------------


def complaint(path, name="DiT-Ti/2"):
    """The one line about a checkpoint, which torch's advice is no part of."""
    with pytest.raises(UserError) as error:
        checkpoints.load_model(path, name)
    line = str(error.value)
    assert line.startswith(f"checkpoint {path}: ")
    assert line.isprintable() and "weights_only" not in line
    return line


TEXTS = {
    "README.md": ("# A model\n\nDownload it from [here](x).", "is a text file; --ckpt takes"),
    "config.json": (json.dumps({"model": "DiT"}), "is a text file"),
    "umlaut.yaml": ("lr: 1e-4  # f\u00fcr " + "\u00fc" * 2000, "is a text file"),
    "model.pt": ("<!DOCTYPE html>\n<html>Sign in</html>", "is a web page, saved in place of"),
    "error.ckpt": ("\n<?xml version='1.0'?><Error>AccessDenied</Error>", "is a web page"),
    "lfs.safetensors": ("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n",
                        "with: git lfs pull"),
    "empty.pt": ("", "is empty; copy or download it again"),
}


@pytest.mark.parametrize("file", TEXTS)
def test_text_files_are_named(tmp_path, file):
    text, reason = TEXTS[file]
    (tmp_path / file).write_text(text, encoding="utf-8")
    assert reason in complaint(tmp_path / file)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_other_files_are_named(tmp_path):
    x = np.zeros((2, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "x.npz", arr_0=x)
    np.save(tmp_path / "x.npy", x)
    Image.fromarray(x[0]).save(tmp_path / "x.png")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as f:
        f.writestr("model.ckpt", "x")
    for name in ("x.tar", "x.tar.gz"):
        with tarfile.open(tmp_path / name, "w:gz" if name.endswith("gz") else "w") as f:
            f.add(tmp_path / "x.png", "model.ckpt")
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "program.pt")
    whole = (tmp_path / "program.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:300])
    for name, reason in {
        "x.npz": "an .npz of arrays, such as samples or latents; --ckpt takes",
        "x.npy": "an array, such as samples",
        "x.png": "an image",
        "x.zip": "a zip archive of other files (model.ckpt); unpack it",
        "x.tar": "a packed archive; unpack it",
        "x.tar.gz": "a packed archive; unpack it",
        "program.pt": "a TorchScript archive, which holds a program; torch.save its",
        "cut.pt": "damaged, it ends too early",
    }.items():
        assert f"cannot be read, it is {reason}" in complaint(tmp_path / name)
    (tmp_path / "noise.pt").write_bytes(bytes(range(1, 256)))
    assert "(ValueError: no known format); it is damaged" in complaint(tmp_path / "noise.pt")
    header = {"a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"a")
    assert "a has the type F8_E4M3" in complaint(tmp_path / "x.safetensors")


def test_folders_and_other_names_are_explained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("ours/last.pt", "many/a.ckpt", "many/b.ckpt", "images/cat/0.PNG", "flat/0.jpg",
                 "pipe/model_index.json", "unet/diffusion_pytorch_model.safetensors",
                 "parts/__0_0.distcp", "text/README.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    for name, reason in {
        "ours": "is a folder; give --ckpt ours/last.pt",
        "many": "is a folder; give --ckpt one of its files, for example many/a.ckpt",
        "images": "is a folder of images, which are given with --data",
        "flat": "is a folder of images",
        "pipe": "is a folder in diffusers' layout; convert it",
        "unet": "is a folder in diffusers' layout; convert it",
        "parts": "dcp_to_torch parts whole.pt",
        "text": "is a folder without a file of weights",
        "facebook/DiT-XL-2-256": "no such file; names of the Hugging Face hub are not fetched",
        "DiT-XL/2": "is a network's name, which is given with --model",
        "ours/first.pt": "no such file; give --ckpt an existing one",
        "missing.pt": "no such file; give --ckpt an existing one",
    }.items():
        assert reason in complaint(name)


def test_other_weights_are_named(tmp_path):
    sd = small_dit().state_dict()
    other = small_dit().state_dict()
    optimiser = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])
    optimiser.param_groups[0]["params"][0].sum().backward()
    optimiser.step()
    one = torch.ones(2, 2)
    for held, reason in (
        ({"blocks.0.attn.qkv.lora_A.weight": one}, "has a LoRA"),
        ({"lora_unet_down_blocks_0.lora_down.weight": one}, "has a LoRA"),
        ({"unet.down_blocks.0.to_q.lora.up.weight": one}, "has a LoRA"),
        (sd | {"blocks.0.attn.qkv.lora_B.default.weight": one}, "has a LoRA"),
        ({"down_blocks.0.attentions.0.norm.weight": one}, "diffusers' key names; convert it"),
        ({"model": {"_flat_param": one}}, "holds FSDP's flattened parameters"),
        (optimiser.state_dict(), "holds the state of an optimiser and no weights"),
        ({"optimizer": optimiser.state_dict(), "epoch": 1}, "holds the state of an optimiser"),
        ({"epoch": 1, "args": {"lr": 1}}, "holds no weights"),
        ({"student": sd, "teacher": other}, "several networks (student, teacher); torch.save the"),
        ({"ema": sd, "swa": other}, "several networks (ema, swa)"),
    ):
        torch.save(held, tmp_path / "x.pt")
        assert reason in complaint(tmp_path / "x.pt")
    held = dict(lightning(sd, average=False), hyper_parameters={"num_classes": 10})
    torch.save(held, tmp_path / "x.pt")  # a transformer of 8 x 8 inputs in such a file
    assert "does not fit" in str(pytest.raises(UserError, checkpoints.load_model,
                                               tmp_path / "x.pt", "DiT-Ti/2").value)


# ---- Files without their numbers ---------------------------------------------------------------


def test_describe_checks_that_the_file_is_that_model(tmp_path, monkeypatch, ckpt):
    """As --dry-run does: the same words as loading, without an allocation."""
    monkeypatch.setattr(torch.nn.Module, "to_empty", None)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", None)
    checkpoints.describe(ckpt)
    dit = models.build(models.make_arch("DiT-Na/8", 32, 4, 10, learn_sigma=True))
    ours = checkpoint(dit, name="DiT-Na/8")
    unet = models.build(unet_arch("class")).state_dict()
    monkeypatch.setitem(models.UNETS, "LDM-ImageNet", unet_config("class"))
    for held, name, own in ((dit.state_dict(), "DiT-Na/8", "final_layer.linear.bias"),
                            (ours, None, "final_layer.linear.bias"),
                            (unet, "LDM-ImageNet", "out.2.bias")):
        weights = held.get("ema", held)
        torch.save(held, tmp_path / "x.pt")
        checkpoints.describe(tmp_path / "x.pt", name, classes=10)
        weights[own] = torch.zeros(7)
        weights["more.weight"] = weights.pop(own.replace("bias", "weight"))
        torch.save(held, tmp_path / "x.pt")
        with pytest.raises(UserError, match=f"more.weight; misshaped 1: {own}") as error:
            checkpoints.describe(tmp_path / "x.pt", name, classes=10)
        assert "check --model and --image-size" in str(error.value)
    write_safetensors(tmp_path / "x.safetensors", dit.state_dict())
    with pytest.raises(UserError, match="misshaped 1: pos_embed"):
        checkpoints.describe(tmp_path / "x.safetensors", "DiT-Na/8", 512, 10)
