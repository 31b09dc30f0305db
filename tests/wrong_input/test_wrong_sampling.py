"""What sample.py and the samples of a checkpoint in fid.py refuse, in one line."""
import pytest
import torch
from conftest import checkpoint, inside
from tiny_networks import digits_net, unet_arch

import models
from kit.checkpoints import EDM_SPEC
from kit.cli import UserError


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny):
    """Checkpoints of several kinds, in one folder."""
    folder = tmp_path_factory.mktemp("files")

    def save(file, net, **changes):
        torch.save(checkpoint(net, **changes), folder / file)

    edm = {**EDM_SPEC, "name": "DDPM++-8x1", "knows_null": False}
    save("edm.pt", digits_net(), **edm)
    save("free.pt", digits_net(num_classes=0), classes=0, **edm)
    scaled = models.fill_random(models.with_guidance(tiny))
    save("scaled.pt", scaled, w=[1.0, 4.0], cfg=2.0)
    save("ours.pt", tiny)
    save("issd.pt", tiny, reading="teacher", method="issd")
    text = models.fill_random(models.build(unet_arch("text")))
    save("text.pt", text, name="SD-v1.5", schedule="sd", scale=0.5, classes=0)
    return folder


def refused(script, files, text):
    """The complaint about a command, in which the names of files are those in the folder."""
    words = [files / word if word.endswith(".pt") else word for word in text.split()]
    with pytest.raises(UserError) as e:
        inside(script, *words)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("words, message", [
    ("edm.pt --cfg 2", "has not learned the null label"),
    ("edm.pt --cfg 0.5", "--uncond"),
    ("free.pt --cfg 2", "neither classes nor prompts"),
    ("free.pt --cfg -1", "neither classes nor prompts"),
    ("scaled.pt --cfg 8", "learned 1 to 4"),
    ("scaled.pt --cfg -3", "learned 1 to 4"),
    ("scaled.pt --cfg 2 --uncond free.pt", "must be like"),
    ("edm.pt --uncond free.pt", "--uncond has no effect without guidance"),
    ("edm.pt --uncond free.pt --cfg 1", "--uncond has no effect without guidance"),
    ("edm.pt --uncond edm.pt --cfg 2", "without classes"),
    ("ours.pt --uncond free.pt --cfg 2", "must be like"),
    ("free.pt --uncond free.pt --cfg 2", "for a model without classes"),
    ("edm.pt --uncond nowhere.pt --cfg 2", "no such file"),
    ("free.pt --labels random", "without classes"),
])
def test_guidance_and_labels_in_both_scripts(words, message, files, tmp_path):
    few = " --nfe 3 --num-samples 2"
    said = refused("sample.py", files, f"--ckpt {words}{few} --out {tmp_path}/x.npz")
    assert message in said
    assert list(tmp_path.iterdir()) == []
    if words.endswith(("2", "random")):
        said = refused("fid.py", files, f"{words}{few} digits --features digits-cnn")
        assert message in said


@pytest.mark.parametrize("words, message", [
    ("ours.pt --base ours.pt", "--base has no effect for a model that makes all steps itself"),
    ("ours.pt --base missing.pt", "--base has no effect"),
    ("issd.pt --base ours.pt", "--base has no effect"),
    ("ours.pt --solver fused --lam 0.1 --nfe 3 --base ours.pt", "--base has no effect"),
    ("issd.pt --solver fused --lam 0.1 --nfe 3", "name that with --base"),
    ("ours.pt --model DiT-Ti/2", "--model has no effect for a file that tells them"),
    ("ours.pt --model DiT-XL/2", "--model has no effect"),
    ("ours.pt --image-size 256", "--image-size has no effect"),
    ("ours.pt --decode vae", "--decode has no effect for a model that makes images itself"),
    ("ours.pt --lam 0.1", "--lam has no effect without --solver fused"),
    ("ours.pt --label 1 --labels balanced", "--labels has no effect beside --label"),
    ("free.pt --label 0", "--label has no effect for a model without classes"),
    ("free.pt --labels balanced", "--labels has no effect for a model without classes"),
    ("text.pt --label 0 --out x.npz", "--label has no effect"),
    ("ours.pt --batch-size 0", "--batch-size 0: must be positive"),
])
def test_flags_without_effect(words, message, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused("sample.py", files, f"--ckpt {words}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["x.jpg", "x.npy", "run.5", "x.tar.gz", "x.zip"])
def test_other_endings(out, files, tmp_path):
    said = refused("sample.py", files, f"--ckpt ours.pt --out {tmp_path}/{out}")
    assert "must end in .png (a grid) or .npz (arrays), or be a folder" in said


def test_places_that_are_taken(files, tmp_path):
    def call(out, *words):
        return refused("sample.py", files, " ".join(["--ckpt ours.pt --nfe 2 --num-samples 2 --out",
                                                     str(tmp_path / out), *words]))

    (tmp_path / "plain").touch()
    (tmp_path / "x.npz").mkdir()
    for out in ("plain", "x.npz", "plain/x.npz", "plain/folder"):
        assert "cannot write there" in call(out)
    for name in ("notes.txt", "000000-0.png", "a.tmp"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / name).touch()
        assert f"holds something else ({name})" in call("folder")
        assert (tmp_path / "folder" / name).exists()
        (tmp_path / "folder" / name).unlink()
    (tmp_path / "y.npz.parts").mkdir()
    (tmp_path / "y.npz.parts" / "000000.npy").write_bytes(b"x")
    assert "holds something else (000000.npy)" in call("y.npz")
    (tmp_path / "y.npz.parts" / "settings.json").write_text("[1")
    assert "settings.json is damaged" in call("y.npz")


def test_a_grid_has_room_for_some(files):
    for num in (2001, 50_000):
        said = refused("sample.py", files, f"--ckpt ours.pt --num-samples {num}")
        assert "give --out a folder, or a name ending in .npz" in said


# ---- What is possible --------------------------------------------------------------------------


def test_flags_with_effect_are_taken(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = "--num-samples 2 --out x.npz".split()
    for text in ("edm.pt --cfg 2 --nfe 3 --uncond free.pt",
                 "scaled.pt --cfg 4 --nfe 2",
                 "issd.pt --solver fused --lam 0.1 --nfe 3 --base ours.pt",
                 "free.pt --nfe 3 --cfg 1"):
        words = [files / word if word.endswith(".pt") else word for word in text.split()]
        inside("sample.py", "--ckpt", *words, *few)
    said = inside("sample.py", "--ckpt", files / "ours.pt", "--labels", "random", "--nfe", 2, *few)
    assert "labels random" in said
    said = inside("fid.py", files / "edm.pt", "digits", "--features", "digits-cnn", "--nfe", 3,
                  "--cfg", 2, "--uncond", files / "free.pt", "--num-samples", 20, "--labels",
                  "random", "--sample-batch-size", 7)
    assert f"NFE 3, guidance 2 with {files}/free.pt, seed 0, labels random" in said
