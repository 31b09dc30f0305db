"""Files of weights in every form that others write: what is read is what was written."""
import re
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
    if form in INSIDE:
        return {re.sub(r"^(blocks\.\d+\.)", r"\1" + INSIDE[form], key): value
                for key, value in sd.items()}
    if form == "lightning transformer":
        averaged = {"model_ema." + key.replace(".", ""): value for key, value in sd.items()
                    if key != "pos_embed"}  # it is not trained
        untrained = {"model." + key: value * (key == "pos_embed") for key, value in sd.items()}
        return {"state_dict": {**untrained, **averaged, "vae.conv.weight": torch.ones(1)}}
    if form == "average beside":
        untrained = {"net." + key: value * 0 for key, value in sd.items()}
        averaged = {"ema_model.module." + key: value for key, value in sd.items()}
        return {"state_dict": untrained | averaged, "n_averaged": torch.tensor(1)}
    if form == "average's network beside":
        untrained = {"online_model." + key: value * 0 for key, value in sd.items()}
        averaged = {"ema_model." + key: value for key, value in sd.items()}
        return {"model": {key: value * 0 for key, value in sd.items()}, "ema":
                {**untrained, **averaged, "step": torch.tensor(1)}}
    if form == "two names":
        return {"state_dict": {f"{name}.{key}": value for key, value in sd.items()
                               for name in ("net", "model.net")}}
    if form == "teacher beside":
        return {"state_dict": {f"{net}.{key}": value * factor for key, value in sd.items()
                               for net, factor in (("model", 1), ("teacher", 0))}}
    if form == "accelerate":
        return {"unet": {"module": sd}, "optimizer": {"state": {}, "param_groups": []}}
    prefix = {"ddp": "module.", "compiled ddp": "module._orig_mod.", "fsdp":
              "_fsdp_wrapped_module._checkpoint_wrapped_module.", "net": "net.",
              "wrapper": "student.denoiser."}[form]
    return {prefix + key: value for key, value in sd.items()}


INSIDE = {"compiled blocks": "_orig_mod.", "fsdp blocks": "_fsdp_wrapped_module.",
          "checkpointed blocks": "_fsdp_wrapped_module._checkpoint_wrapped_module."}
FORMS = ["raw", "ema", "model", "state_dict", "ddp", "compiled ddp", "lightning", "fsdp", "net",
         "wrapper", "lightning transformer", "average beside",
         "average's network beside", "two names", "teacher beside", "accelerate",
         *INSIDE]


@pytest.mark.parametrize("form", FORMS)
def test_tolerant_loading(tmp_path, form):
    net = small_dit()
    sd = net.state_dict()
    torch.save(wrap(form, sd), tmp_path / "x.pt")
    held = checkpoints.read_file(tmp_path / "x.pt")
    loaded = checkpoints.load_weights(models.build(net.arch), held, form)
    assert_same_weights(loaded, sd)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("place", ["top", "beside", "inside"])
def test_lists_of_averaged_parameters(tmp_path, place, frozen):
    """torch_ema and diffusers keep them without names, with or without what is not trained."""
    net = small_dit()
    shadow = [p.detach() + 1 for p in net.parameters() if frozen or p.requires_grad]
    average = {"decay": 0.999, "num_updates": 3, "shadow_params": shadow, "collected_params": []}
    untrained = {key: value * 0 for key, value in net.state_dict().items()}
    held = {"top": average, "beside": {"model": untrained, **average},
            "inside": {"model": untrained, "ema": average}}[place]
    torch.save(held, tmp_path / "x.pt")
    held = checkpoints.read_file(tmp_path / "x.pt")
    loaded = checkpoints.load_weights(models.build(net.arch), held, "x")
    for key, value in net.named_parameters():
        if key != "pos_embed" or frozen:
            assert torch.equal(loaded.state_dict()[key], value + 1)
    if place == "top":  # the name of the network gives names to the list
        torch.save(dict(average, shadow_params=shadow[:-2]), tmp_path / "x.pt")
        with pytest.raises(UserError, match=f"its list of {len(shadow) - 2} averaged"):
            checkpoints.load_model(tmp_path / "x.pt", "DiT-Ti/2", classes=10)


def test_a_list_alone_tells_the_classes(tmp_path):
    net = models.build(models.make_arch("SiT-Na/8", 32, 4, 7))
    shadow = [p.detach() for p in net.parameters() if p.requires_grad]
    args = Namespace(num_classes=7, resolution=256, prediction="v", path_type="linear")
    torch.save({"ema": {"shadow_params": shadow}, "args": args}, tmp_path / "x.pt")
    loaded, spec = checkpoints.load_model(tmp_path / "x.pt", "SiT-Na/8")
    assert (spec["classes"], spec["arch"]["learn_sigma"]) == (7, False)
    assert_same_weights(loaded, net.state_dict())


def test_position_embedding_is_computed(tmp_path):
    net = small_dit()
    sd = net.state_dict()
    del sd["pos_embed"]
    loaded = checkpoints.load_weights(small_dit(), sd, "x")
    fresh = models.build(net.arch).state_dict()["pos_embed"]
    assert torch.equal(loaded.state_dict()["pos_embed"], fresh)
    sd = models.build(models.make_arch("DiT-Na/8", 64, 4, 7)).state_dict()
    del sd["pos_embed"]
    torch.save(sd, tmp_path / "x.pt")
    with pytest.raises(UserError, match="give --image-size, for example 256"):
        checkpoints.describe(tmp_path / "x.pt", "DiT-Na/8", classes=7)
    spec = checkpoints.describe(tmp_path / "x.pt", "DiT-Na/8", 512, 7)
    torch.save({"model": sd, "args": Namespace(num_classes=7, image_size=512)}, tmp_path / "x.pt")
    assert checkpoints.describe(tmp_path / "x.pt", "DiT-Na/8") == spec
    assert spec["arch"]["input_size"] == 64


def test_lightning_average_and_safetensors(tmp_path):
    net = small_dit()
    sd = net.state_dict()
    averaged = checkpoints.load_weights(small_dit(), lightning(sd, average=True), "x")
    assert_same_weights(averaged, sd, plus=1)
    write_safetensors(tmp_path / "x.safetensors", sd)
    held = checkpoints.read_file(tmp_path / "x.safetensors")
    loaded = checkpoints.load_weights(models.build(net.arch), held, "x")
    assert_same_weights(loaded, sd)


def test_safetensors_stay_on_the_disk(tmp_path):
    """Numbers that begin at any byte are read; the others are not copied."""
    sd = {"byte": torch.ones(3, dtype=torch.uint8), "none": torch.zeros(0, 2),
          "one": torch.tensor(2.0), "long": torch.arange(1000.0)}
    write_safetensors(tmp_path / "x.part", sd, {torch.uint8: "U8", torch.float32: "F32"})
    held = checkpoints.read_file(tmp_path / "x.part")
    for key, value in sd.items():
        assert torch.equal(held[key], value)
    write_safetensors(tmp_path / "x.part", {"a": sd["long"], "b": sd["long"] + 1})
    held = checkpoints.read_file(tmp_path / "x.part")
    assert held["b"].data_ptr() - held["a"].data_ptr() == 4000  # as in the file


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


def label_file(path, rows, wrap=dict, **said):
    """A DiT-Na/8 whose table of labels has so many rows, with the arguments of its training."""
    arch = dict(models.make_arch("DiT-Na/8", 32, 4, rows), null_label=False)
    sd = models.fill_random(models.build(arch)).state_dict()
    torch.save({"ema": sd, "args": wrap(**said)} if said else {"ema": sd}, path)
    return sd


@pytest.mark.parametrize("wrap", [dict, Namespace, types.SimpleNamespace])
@pytest.mark.parametrize("rows, said, want", [
    (10, dict(num_classes=10, class_dropout_prob=0.0), (10, False)),
    (10, dict(num_classes=9, class_dropout_prob=0.1), (9, True)),
    (10, dict(num_classes=10), (10, False)),
    (10, dict(num_classes=9), (9, True)),
    (10, dict(cfg_prob=0.0), (10, False)),
    (10, dict(cfg_prob=0.1), (9, True)),
    (1001, dict(num_classes=1001), (1001, False)),
    (1000, dict(num_classes=1000), (1000, False)),
    (1001, dict(lr=1), (1000, True)),
    (1, dict(lr=1), (0, True)),
])
def test_rows_of_label_tables(tmp_path, wrap, rows, said, want):
    """The file's own arguments say whether the last row is a class or the null label."""
    sd = label_file(tmp_path / "x.pt", rows, wrap, **said)
    net, spec = checkpoints.load_model(tmp_path / "x.pt", "DiT-Na/8")
    assert (spec["classes"], net.arch.get("null_label", True)) == want
    assert spec["knows_null"] == (want[1] and want[0] > 0)
    assert spec["cfg"] == (1.5 if spec["knows_null"] else 1.0)
    assert (spec["class_names"] is not None) == (want[0] == 1000)
    assert_same_weights(net, sd)


@pytest.mark.parametrize("rows, said", [(10, {}), (1000, {}), (10, dict(num_classes=1000)),
                                        (10, dict(num_classes=10, class_dropout_prob=0.1))])
def test_rows_of_label_tables_are_asked_for(tmp_path, rows, said):
    label_file(tmp_path / "x.pt", rows, **said)
    for classes in (None, rows + 1, rows - 2):
        message = f"give --classes {rows} if it is a class, --classes {rows - 1} if it is the null"
        with pytest.raises(UserError, match=message):
            checkpoints.describe(tmp_path / "x.pt", "DiT-Na/8", classes=classes)
    for classes in (rows, rows - 1):
        net, spec = checkpoints.load_model(tmp_path / "x.pt", "DiT-Na/8", classes=classes)
        assert spec["classes"] == net.num_classes == classes
        assert spec["knows_null"] == (classes == rows - 1)


def test_no_null_label_in_files_of_ours(tmp_path, monkeypatch):
    """It goes the whole way: upstream's file, our network, our file."""
    label_file(tmp_path / "x.pt", 10, num_classes=10)
    net, spec = checkpoints.load_model(tmp_path / "x.pt", "DiT-Na/8")
    assert len(net.y_embedder.embedding_table.weight) == 10
    torch.save(checkpoint(net, **spec), tmp_path / "ours.pt")
    assert checkpoints.describe(tmp_path / "ours.pt") == spec
    assert models.with_guidance(net).arch["null_label"] is False
    old = checkpoint(net, arch=net.arch)  # a file without the new keys
    torch.save(old, tmp_path / "old.pt")
    assert not checkpoints.describe(tmp_path / "old.pt")["knows_null"]

    monkeypatch.setitem(models.UNETS, "LDM-ImageNet", unet_config("class"))
    arch = unet_arch("class", null_label=False)
    torch.save(models.build(arch).state_dict(), tmp_path / "unet.pt")
    spec = checkpoints.describe(tmp_path / "unet.pt", "LDM-ImageNet", classes=10)
    assert (spec["classes"], spec["knows_null"], spec["cfg"]) == (10, False, 1.0)
    with pytest.raises(UserError, match="has 10 rows"):
        checkpoints.describe(tmp_path / "unet.pt", "LDM-ImageNet")


def test_files_that_name_their_network(tmp_path):
    label_file(tmp_path / "x.pt", 8, Namespace, model="DiT-Na/8", num_classes=7)
    assert checkpoints.describe(tmp_path / "x.pt")["name"] == "DiT-Na/8"
    label_file(tmp_path / "x.pt", 8, Namespace, model="MyNet", num_classes=7)
    with pytest.raises(UserError, match="name it with --model"):
        checkpoints.describe(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["SiT-Na/8", "SiT-Na/8-REPA"])
def test_direction_of_time(tmp_path, name):
    """Learned sigma tells upstream's SiT from REPA's, whatever else was stripped off."""
    repa = models.build(models.make_arch("SiT-Na/8", 32, 4, 1000, learn_sigma=False)).state_dict()
    torch.save(repa, tmp_path / "x.pt")
    spec = checkpoints.describe(tmp_path / "x.pt", name)
    assert "reverse" not in spec["arch"]
    assert spec["cfg_interval"] == [0.0, 0.7]

    sit = models.build(models.make_arch("SiT-Na/8", 32, 4, 1000, learn_sigma=True)).state_dict()
    marks = [sit | {"projectors.0.0.weight": torch.zeros(2, 2)},
             {"model": sit, "args": Namespace(proj_coeff=0.5)}]
    for held in marks + [sit] * name.endswith("-REPA"):
        torch.save(held, tmp_path / "x.pt")
        with pytest.raises(UserError, match="count time in opposite directions"):
            checkpoints.describe(tmp_path / "x.pt", name)
    for said in (dict(path_type="GVP"), dict(prediction="noise")):
        key = next(iter(said))
        torch.save({"ema": repa, "args": Namespace(**said)}, tmp_path / "x.pt")
        with pytest.raises(UserError, match=f"trained with {key} {said[key]}; only"):
            checkpoints.describe(tmp_path / "x.pt", name)


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


@pytest.mark.parametrize("name", ["DiT-XL/2", "SiT-XL/2", "SiT-XL/2-REPA", "LDM-ImageNet"])
def test_names_of_imagenets_classes(name):
    names = checkpoints.describe(None, name)["class_names"]
    assert (len(names), names[0], names[-1]) == (1000, "n01440764", "n15075141")
    assert names == sorted(names) == checkpoints.imagenet_names()


def test_released_names():
    cond = checkpoints.describe(None, "DDPM++-t")
    uncond = checkpoints.describe(None, "DDPM++-t-uncond")
    assert (cond["classes"], uncond["classes"]) == (10, 0)
    assert cond["arch"]["input_size"] == 32
    assert cond["scale"] is None
    assert cond["nfe"] == 35
    assert cond["class_names"][3] == "cat"
    assert uncond["class_names"] is None
    assert not cond["knows_null"] and not uncond["knows_null"]
    assert not checkpoints.describe(None, "LDM-FFHQ")["knows_null"]
    assert checkpoints.describe(None, "SD-v1.5")["knows_null"]  # it has the empty prompt
    with pytest.raises(UserError, match=r"no released weights for DDPM\+\+-96 at 32"):
        checkpoints.upstream_checkpoint("DDPM++-96", None, "nowhere")
