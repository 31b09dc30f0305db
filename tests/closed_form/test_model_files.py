"""Files of weights in every form that others write: what is read is what was written."""
import sys
import types
from argparse import Namespace

import pytest
import torch
from conftest import checkpoint
from small_data import write_safetensors
from tiny_networks import assert_same_weights, lightning, small_dit, unet_arch, unet_config

import models
from kit import checkpoints
from kit.cli import UserError

# ---- Forms of a file ---------------------------------------------------------------------------


def wrap(form, sd):
    """A state dict as a file of this form holds it."""
    if form == "raw":
        return sd
    if form == "ema":
        untrained = {key: value * 0 for key, value in sd.items()}
        return {"model": untrained, "ema": sd, "opt": {}, "args": Namespace(lr=1)}
    if form in ("model", "state_dict"):
        return {form: sd}
    if form == "lightning":
        return lightning(sd, average=False)
    prefix = {"ddp": "module.", "compiled ddp": "module._orig_mod."}[form]
    return {prefix + key: value for key, value in sd.items()}


FORMS = ["raw", "ema", "model", "state_dict", "ddp", "compiled ddp", "lightning"]


@pytest.mark.parametrize("form", FORMS)
def test_tolerant_loading(tmp_path, form):
    net = small_dit()
    sd = net.state_dict()
    torch.save(wrap(form, sd), tmp_path / "x.pt")
    held = checkpoints.read_file(tmp_path / "x.pt")
    loaded = checkpoints.load_weights(models.build(net.arch), held, form)
    assert_same_weights(loaded, sd)


def test_lightning_average_and_safetensors(tmp_path):
    net = small_dit()
    sd = net.state_dict()
    averaged = checkpoints.load_weights(small_dit(), lightning(sd, average=True), "x")
    assert_same_weights(averaged, sd, plus=1)
    write_safetensors(tmp_path / "x.safetensors", sd)
    held = checkpoints.read_file(tmp_path / "x.safetensors")
    loaded = checkpoints.load_weights(models.build(net.arch), held, "x")
    assert_same_weights(loaded, sd)


# ---- DiT and SiT -------------------------------------------------------------------------------


def test_upstream_file_with_other_classes(tmp_path):
    """A raw DiT-S/8 for 7 classes: the name gives the shape, and --classes says what the rows of
    the label table are."""
    net = models.fill_random(models.build(models.make_arch("DiT-S/8", 32, 4, 7, True)))
    torch.save({"ema": net.state_dict()}, tmp_path / "x.pt")
    loaded, spec = checkpoints.load_model(tmp_path / "x.pt", "DiT-S/8", classes=7)
    assert spec["classes"] == loaded.num_classes == 7
    assert spec["cfg"] == 1.5
    assert spec["scale"] == 0.18215
    assert_same_weights(loaded, net.state_dict())


@pytest.mark.parametrize("repa", [False, True])
def test_sit_files(tmp_path, repa):
    """The heads tell whether a file is REPA's, the shapes how many channels it makes."""
    arch = models.make_arch("SiT-Na/8", 32, 4, 7, learn_sigma=not repa)
    sd = models.fill_random(models.build(arch)).state_dict()
    if repa:
        sd = sd | {"projectors.0.0.weight": torch.zeros(2, 2)}
    torch.save({"ema": sd}, tmp_path / "x.pt")
    loaded, spec = checkpoints.load_model(tmp_path / "x.pt", "SiT-Na/8", classes=7)
    assert spec["prediction"] == "velocity"
    assert spec["schedule"] == "interpolant"
    assert spec["classes"] == 7
    assert spec["scale"] == 0.18215
    assert spec["cfg"] == (1.8 if repa else 1.5)
    assert spec["cfg_interval"] == ([0.0, 0.7] if repa else None)
    assert loaded.arch["learn_sigma"] is not repa
    assert loaded.reverse is not repa
    assert_same_weights(loaded, sd)

    torch.save(sd | {"decoder.weight": torch.zeros(1)}, tmp_path / "y.pt")
    with pytest.raises(UserError, match=r"\(unexpected 1: decoder.weight\)"):
        checkpoints.load_model(tmp_path / "y.pt", "SiT-Na/8", classes=7)
    if repa:  # A DiT does not take the heads.
        with pytest.raises(UserError, match="unexpected 1: projectors.0.0.weight"):
            checkpoints.load_model(tmp_path / "x.pt", "DiT-Na/8", classes=7)


# ---- The U-Net of latent diffusion -------------------------------------------------------------


@pytest.mark.parametrize("context", ["none", "class", "text"])
@pytest.mark.parametrize("form", ["raw", "lightning", "lightning average", "safetensors"])
def test_unet_files(tmp_path, monkeypatch, context, form):
    """A small model of each kind of file. Lightning's keep the table of classes beside the U-Net
    and without an average."""
    name = {"none": "LDM-FFHQ", "class": "LDM-ImageNet", "text": "SD-v1.5"}[context]
    monkeypatch.setitem(models.UNETS, name, unet_config(context))
    net = models.fill_random(models.build(unet_arch(context)))
    sd = net.state_dict()
    inside = {key: value for key, value in sd.items() if key != models.CLASS_TABLE}
    beside = {key: value for key, value in sd.items() if key == models.CLASS_TABLE}
    average = form == "lightning average"
    held = lightning(inside, average)
    held["state_dict"] |= beside
    if form == "safetensors":
        path = tmp_path / "x.safetensors"
        write_safetensors(path, held["state_dict"])
    else:
        path = tmp_path / "x.ckpt"
        torch.save(sd if form == "raw" else held, path)

    loaded, spec = checkpoints.load_model(path, name, classes=10)
    assert spec["classes"] == loaded.num_classes == (10 if context == "class" else 0)
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, sd[key] + (average and key not in beside))

    # Our own format, without a name:
    torch.save(checkpoint(net, name=name, cfg_interval=[0.1, 0.5]), tmp_path / "ours.pt")
    again, spec = checkpoints.load_model(tmp_path / "ours.pt")
    assert again.arch == net.arch
    assert spec["cfg_interval"] == [0.1, 0.5]


def test_lightning_callbacks_and_measured_scale(tmp_path, monkeypatch):
    """Old Lightning files name the class of a callback. LDM-Churches carries the scale of its
    latents."""
    net = models.fill_random(models.build(unet_arch("none")))
    with monkeypatch.context() as m:  # Lightning is there while the files are written
        module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
        module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
        for part in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
            m.setitem(sys.modules, part, module)
        held = lightning(net.state_dict(), average=True)
        held["callbacks"] = {module.ModelCheckpoint: {"monitor": "val/loss"}}
        held["state_dict"]["scale_factor"] = torch.tensor(0.22765929)
        torch.save(held, tmp_path / "x.ckpt")
        torch.save(held | {"callbacks": [print]}, tmp_path / "bad.ckpt")

    monkeypatch.setitem(models.UNETS, "LDM-Churches", unet_config("none"))
    loaded, spec = checkpoints.load_model(tmp_path / "x.ckpt", "LDM-Churches")
    assert abs(spec["scale"] - 0.22765929) < 1e-8
    assert loaded.arch == net.arch
    with pytest.raises(UserError, match="cannot be read"):
        checkpoints.load_model(tmp_path / "bad.ckpt", "LDM-Churches")


# ---- Released networks, described without their file -------------------------------------------


def test_released_names_without_a_file():
    sit = checkpoints.describe(None, "SiT-XL/2")
    assert sit["arch"]["reverse"]
    assert sit["arch"]["learn_sigma"]
    assert sit["cfg"] == 1.5

    repa = checkpoints.describe(None, "SiT-XL/2-REPA")
    assert not repa["arch"].get("reverse")
    assert not repa["arch"]["learn_sigma"]
    assert repa["cfg_interval"] == [0.0, 0.7]

    sd = checkpoints.describe(None, "SD-v1.5")
    assert (sd["schedule"], sd["scale"], sd["cfg"]) == ("sd", 0.18215, 7.5)
    assert (sd["classes"], sd["arch"]["input_size"]) == (0, 64)

    imagenet = checkpoints.describe(None, "LDM-ImageNet")
    assert (imagenet["schedule"], imagenet["scale"], imagenet["cfg"]) == ("ldm", 1.0, 1.5)
    assert (imagenet["classes"], imagenet["arch"]["input_size"]) == (1000, 64)

    bedroom = checkpoints.describe(None, "LDM-Bedroom", 128)
    assert bedroom["arch"]["input_size"] == 32  # the size of progressive distillation's LSUN

    churches = checkpoints.describe(None, "LDM-Churches")
    assert (churches["schedule"], churches["arch"]["input_size"]) == ("ldm-churches", 32)

    archive = "ommer-lab.com/files/latent-diffusion/celeba.zip, and give --ckpt PATH"
    with pytest.raises(UserError, match=archive):
        checkpoints.upstream_checkpoint("LDM-CelebAHQ", 256, "nowhere")
    with pytest.raises(UserError, match="SD-v1.5 are not fetched"):
        checkpoints.upstream_checkpoint("SD-v1.5", None, "nowhere")
    with pytest.raises(UserError, match="no released weights for SiT-L/2 at 256"):
        checkpoints.upstream_checkpoint("SiT-L/2", None, "nowhere")


def test_released_names():
    cond = checkpoints.describe(None, "DDPM++-t")
    uncond = checkpoints.describe(None, "DDPM++-t-uncond")
    assert (cond["classes"], uncond["classes"]) == (10, 0)
    assert cond["arch"]["input_size"] == 32
    assert cond["scale"] is None
    assert cond["nfe"] == 35
    with pytest.raises(UserError, match=r"no released weights for DDPM\+\+-96 at 32"):
        checkpoints.upstream_checkpoint("DDPM++-96", None, "nowhere")
