"""What fid.py refuses: one line that says what is wrong and how to mend it."""
# ruff: noqa: F401, F811  (inception_weights, measured and pictures are fixtures)
import contextlib
import errno
import os
import pickle
import re
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import checkpoint
from measuring import inception_weights, measured, numbers, pictures
from PIL import Image
from processes import script, workers

import fid
from kit import features


@pytest.fixture
def complains(measured, pictures):
    """complains(pattern, a, b, flags...): fid.py raises one line that has the pattern."""
    def call(pattern, a, b=pictures / "b", *more):
        with pytest.raises(ValueError, match=pattern) as e:
            measured(a, b, *more)
        assert len(str(e.value).splitlines()) == 1
    return call


@pytest.fixture
def npz(tmp_path):
    """npz("x.npz", arr_0=...): the path of such a file."""
    def save(name, **arrays):
        np.savez(tmp_path / name, **arrays)
        return tmp_path / name
    return save


@pytest.fixture
def x(pictures):
    """The images of a.npz, (12, 40, 48, 3)."""
    with np.load(pictures / "a.npz") as f:
        return f["arr_0"]


# ---- Feature networks --------------------------------------------------------------------------


def test_wrong_weights(inception_weights, tmp_path):
    weights = torch.load(inception_weights, weights_only=True)
    del weights["fc.bias"]
    other = tmp_path / "other.pth"
    torch.save(weights, other)
    with pytest.raises(ValueError, match="missing 1: fc.bias.*not the Inception network of FID"):
        features.load_features(str(other))
    named = tmp_path / "pt_inception-01234567.pth"
    named.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match="not as its name says"):
        features.load_features(str(named))
    named.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="cannot be read"):
        fid.load_inception(named)
    with pytest.raises(ValueError, match="--features .*absent.pth: no such file"):
        features.load_features(str(tmp_path / "absent.pth"))
    for name in ("inceptoin", "torchvision-resnet5", "digits"):
        with pytest.raises(ValueError, match="features.*nknown"):
            features.load_features(name)


@pytest.mark.parametrize("what", ["text", "unicode", "empty", "picture", "pickle", "object", "cut"])
def test_files_that_are_no_weights(what, tmp_path, pictures):
    """One line, without torch's advice to load what is not safe."""
    path = tmp_path / "README.md"
    if what in ("object", "cut"):
        torch.save(torch.nn.Linear(2, 2) if what == "object" else torch.zeros(9000), path)
    whole = path.read_bytes()[:2000 if what == "cut" else None] if path.exists() else b""
    path.write_bytes({
        "text": b"# A project\n", "unicode": "x\u00e4".encode() * 999, "empty": b"",
        "picture": (pictures / "a" / "000.png").read_bytes(),
        "pickle": pickle.dumps({"a": np.zeros(2)})}.get(what, whole))
    says = {"text": "it is a text file, not weights", "unicode": "it is a text file, not weights",
            "empty": "it is empty", "picture": "not a file that torch has saved",
            "object": "not only weights but torch.nn.modules.linear.Linear"}
    for load in (features.load_features, fid.load_inception):
        with pytest.raises(ValueError, match=f"README.md: cannot be .*{says.get(what, '')}") as e:
            load(str(path))
        assert len(str(e.value).splitlines()) == 1
        assert not re.search("weights_only|trusted|\\x1b", str(e.value))


# ---- Checkpoints -------------------------------------------------------------------------------


def test_checkpoint_that_makes_nan(tmp_path, tiny, complains):
    bad = dict(tiny.state_dict())
    bad["final_layer.linear.bias"] = bad["final_layer.linear.bias"] * torch.nan
    torch.save(checkpoint(tiny, model=bad, ema=bad), tmp_path / "bad.pt")
    words = ("--num-samples", 10, "--nfe", 2, "--features", "digits-cnn")
    complains("samples 0 to 9 are not finite", tmp_path / "bad.pt", "digits", *words)
    torch.save(tiny.state_dict(), tmp_path / "raw.pt")
    complains("does not say how to sample it", tmp_path / "raw.pt", "digits")


def test_guidance(ckpt, complains):
    """The scale of guidance: 1 means none, 0 would ignore the labels."""
    for cfg, words in ((0, "--cfg 0: .*1 means no guidance"), ("nan", "--cfg nan: must be a num")):
        complains(words, ckpt, "digits", "--features", "digits-cnn", "--cfg", cfg)


# ---- Images ------------------------------------------------------------------------------------


def test_bad_input(pictures, complains, npz, x, tmp_path):
    a, b = pictures / "a", pictures / "b"
    complains("no such file", tmp_path / "absent")
    complains("no images there", tmp_path)
    complains("12 images, --num-samples asks for 50", a, b, "--num-samples", 50)
    complains("8x8 pixels with one channel", a, "digits", "--features", "digits-cnn")
    complains("must be positive", a, b, "--image-size", 0)
    complains("must be positive", a, b, "--batch-size", -1)


def test_arrays_that_are_no_images(complains, npz, x):
    complains("arr_0 is float64, want uint8", npz("float.npz", arr_0=x / 255))
    complains("nothing but 0 and 1", npz("ones.npz", arr_0=(x > 128).astype(np.uint8)))
    complains("want .N, H, W, 3.", npz("nchw.npz", arr_0=x.transpose(0, 3, 1, 2)))
    complains("want .N, H, W, 3.", npz("flat.npz", arr_0=x[0]))
    complains("1 images, at least 2", npz("one.npz", arr_0=x[:1]))
    complains("holds neither images", npz("other.npz", x=x))


def test_damaged_npz(pictures, complains, npz, x, tmp_path):
    whole = (pictures / "a.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:len(whole) // 2])
    complains(r"cut.npz: cannot be read as .npz", tmp_path / "cut.npz")
    (tmp_path / "text.npz").write_text("hello")
    complains("cannot be read as .npz", tmp_path / "text.npz")
    np.save(tmp_path / "x.npy", x)
    complains("cannot be read as .npz", tmp_path / "x.npy")
    packed = bytearray((pictures / "a-packed.npz").read_bytes())
    packed[2000:2100] = bytes(100)
    (tmp_path / "packed.npz").write_bytes(packed)
    complains("cannot be read as .npz", tmp_path / "packed.npz")
    complains("holds Python objects", npz("object.npz", arr_0=x, arr_1=np.array(None)))


@pytest.mark.filterwarnings("ignore:a covariance")
def test_labels_that_are_none(pictures, measured, npz, x):
    for odd in (np.array(["a"] * 12), np.eye(12), np.arange(5)):
        path = npz("odd.npz", arr_0=x, arr_1=odd)
        assert "accuracy" not in numbers(measured(path, pictures / "b", "--json").out)


@pytest.mark.filterwarnings("ignore:a covariance", "ignore:precision and recall")
def test_folders_of_bad_images(pictures, complains, measured, x, tmp_path):
    b = pictures / "b"
    Image.fromarray(x[0]).save(tmp_path / "0.png")
    Image.fromarray(x[1][:30]).save(tmp_path / "1.png")
    complains("1.png is 48x30, .*0.png is 48x40; --image-size", tmp_path)
    # Cropped they go together, though two are few:
    two = numbers(measured(tmp_path, b, "--image-size", 32, "--json").out)
    assert two["samples_count"] == 2 and "fd" in two and "precision" not in two
    Image.fromarray(x[0, ..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    complains("more than 8 bits", tmp_path, b, "--image-size", 32)
    (tmp_path / "deep.png").unlink()
    (tmp_path / "2.png").write_bytes((tmp_path / "0.png").read_bytes()[:200])
    complains("2.png: cannot be read", tmp_path, b, "--image-size", 32)


@pytest.mark.parametrize("odd", [0, 2, 8])
def test_sizes_are_looked_at_before_measuring(complains, x, tmp_path, odd):
    """The same complaint in batches of any size, from any number of processes."""
    for i in range(9):
        Image.fromarray(x[i][:30] if i == odd else x[i]).save(tmp_path / f"{i}.tif")
    odd_one, first = (1, 0) if odd == 0 else (odd, 0)
    pattern = f"/{odd_one}.tif is 48x.*/{first}.tif is 48x.*; --image-size N crops and scales all"
    for size in (1, 4, 100):
        complains(pattern, tmp_path, tmp_path, "--batch-size", size)
    Image.fromarray(x[0]).save(tmp_path / f"{odd}.tif")
    (tmp_path / "7.tif").write_bytes(b"no picture")
    complains("7.tif: cannot be read", tmp_path)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_agree_about_sizes(x, tmp_path, monkeypatch, world):
    for i in range(9):
        Image.fromarray(x[i][:30] if i in (5, 7) else x[i]).save(tmp_path / f"{i}.png")
    files = fid.image_files(tmp_path)
    said = []
    monkeypatch.setattr(fid, "gather_objects", lambda value: said.append(value) or [])
    ranks = iter(range(world))
    monkeypatch.setattr(fid, "rank_and_world", lambda: (next(ranks), world))
    monkeypatch.setattr(fid, "progress_bar", lambda *_: contextlib.nullcontext(Mock(n=0)))
    for _ in range(world):
        fid.check_sizes(files)
    monkeypatch.setattr(fid, "gather_objects", lambda value: said)
    monkeypatch.setattr(fid, "rank_and_world", lambda: (0, 1))
    with pytest.raises(ValueError, match="5.png is 48x30, .*0.png is 48x40"):
        fid.check_sizes(files)


@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "tif", "bmp", "webp", "tga", "jp2"])
def test_cut_images(ending, x, tmp_path):
    """Also from processes that read, one line that names the file."""
    for i in range(6):
        Image.fromarray(x[i]).save(tmp_path / f"{i}.{ending}")
    bad = tmp_path / f"4.{ending}"
    bad.write_bytes(bad.read_bytes()[:-len(bad.read_bytes()) // 2])
    with pytest.raises(ValueError, match=f"/4.{ending}: cannot be read") as e:
        images = fid.images_from_files("x", fid.image_files(tmp_path), workers=2)
        list(images.batches(0, 1, 2))
    assert len(str(e.value).splitlines()) == 1 and "Traceback" not in str(e.value)


def test_folders_that_cannot_be_read(complains, pictures, tmp_path, monkeypatch):
    def scandir(path, real=os.scandir):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    (tmp_path / "locked").mkdir()
    (tmp_path / "0.png").write_bytes((pictures / "a" / "000.png").read_bytes())
    monkeypatch.setattr(os, "scandir", scandir)
    complains("locked: the folder cannot be read .Permission denied", tmp_path)


# ---- Statistics --------------------------------------------------------------------------------


def test_foreign_statistics_that_are_none(pictures, complains, npz):
    a, more = pictures / "a", ("--reference-resize", "adm")
    mu, sigma = np.zeros(6), np.eye(6)
    nan = sigma.copy()
    nan[3, 3] = np.nan
    complains("not finite", a, npz("nan.npz", mu=mu, sigma=nan), *more)
    skew = sigma + np.triu(np.ones((6, 6)), 1)
    complains("not symmetric", a, npz("skew.npz", mu=mu, sigma=skew), *more)
    shape = npz("shape.npz", mu=mu, sigma=np.eye(3))
    complains(r"want floats \(d,\) and \(d, d\)", a, shape, *more)
    small = npz("small.npz", mu=np.zeros(64), sigma=np.eye(64))
    complains("64 features, .* has 6", a, small, *more)


def test_statistics_that_are_none(fails, tmp_path):
    rng = np.random.default_rng(0)
    good = dict(mu=np.zeros(3), sigma=np.eye(3), features="x", count=9,
                kept=rng.normal(size=(5, 3)))
    np.savez(tmp_path / "good.npz", **good)
    for changes, message in (
            (dict(count="many"), "want an integer"),
            (dict(count=[1, 2]), "want an integer"),
            (dict(kept=np.zeros((5, 2))), "want the features (n, 3)"),
            (dict(kept=np.full((5, 3), np.nan)), "not finite"),
            (dict(mu=np.zeros(0), sigma=np.zeros((0, 0))), "want floats (d,)")):
        np.savez(tmp_path / "bad.npz", **{**good, **changes})
        assert message in fails("fid", "bad.npz", "good.npz")


def test_references_that_cannot_be_written(pictures, complains, fails, tmp_path):
    complains("--out", "ref", pictures / "b")
    complains("--out", "ref", pictures / "b", "--out", tmp_path / "stats.txt")
    complains("cannot write", "ref", pictures / "b", "--out", "/proc/stats.npz")
    (tmp_path / "x.npz").mkdir()
    message = fails("fid", "ref", "digits", "--features", "digits-cnn", "--out", "x.npz")
    assert "it is a folder" in message


def test_a_full_disk(pictures, complains, tmp_path, monkeypatch):
    """Nothing is left of what was half written."""
    def savez(f, **arrays):
        f.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "savez", savez)
    out = tmp_path / "ref.npz"
    complains("ref.npz: cannot write .No space left.*free some space", "ref", pictures / "b",
              "--out", out)
    assert not list(tmp_path.iterdir())


# ---- Flags -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:a covariance")
def test_flags_without_effect(pictures, complains, measured, ckpt, tmp_path):
    a, b, x, ref = (pictures / "a", pictures / "b", pictures / "a.npz", tmp_path / "ref.npz")
    measured("ref", b, "--out", ref)
    cnn = ("--features", "digits-cnn")
    for flag, words in {
            "nfe": (a, b, "--nfe", 4),
            "cfg": ("digits", "digits", "--cfg", 1, *cnn),
            "seed": (a, b, "--num-samples", 12, "--seed", 0),  # all of them
            "image-size": (x, ref, "--image-size", 32),
            "features": (ref, ref, *cnn),
            "resize": ("digits", "digits", "--resize", "adm", *cnn),
            "reference-resize": (a, ref, "--reference-resize", "adm"),
            "out": (a, b, "--out", "x.npz"),
            "json": ("ref", a, "--json", "--out", tmp_path / "x.npz")}.items():
        complains(f"--{flag} has no effect .*; leave it out", *words)
    for words in (("ref", a, "--nfe", 4), ("ref", x, "--image-size", 8), ("ref", a, "--seed", 1)):
        complains(f"{words[2]} has no effect", *words, "--out", tmp_path / "x.npz")
    complains("--resize has no effect", ref, ref, "--resize", "adm")
    # Where they have one:
    measured(a, ref, "--resize", "adm", "--image-size", 32, "--num-samples", 9, "--seed", 1)
    measured(ckpt, "digits", "--num-samples", 9, "--nfe", 1, "--seed", 1, "--cfg", 1, *cnn)


def test_unknown_flags(capsys):
    for word, close in (("--num_samples=3", "--num-samples"), ("--feature-net", "--features"),
                        ("--batchsize", "--batch-size"), ("--jason", "--json")):
        with pytest.raises(SystemExit):
            fid.parser().parse_args(["a", "b", word])
        assert f"arguments: {word}; did you mean {close}?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        fid.parser().parse_args(["a", "b", "c"])
    assert "did you mean" not in capsys.readouterr().err


def test_no_home_folder(monkeypatch, tmp_path):
    """Asked for only where something is fetched and MINDISTILL_CACHE names no place."""
    monkeypatch.setattr(Path, "home", raise_runtime_error)
    monkeypatch.setenv("MINDISTILL_CACHE", str(tmp_path))
    assert fid.cache_folder() == tmp_path
    monkeypatch.delenv("MINDISTILL_CACHE")
    fid.load_features("digits-cnn")
    with pytest.raises(ValueError, match="name one in MINDISTILL_CACHE"):
        fid.load_features("inception")


def raise_runtime_error(*_):
    raise RuntimeError("Could not determine home directory.")


# ---- The command -------------------------------------------------------------------------------


def test_errors_of_the_command(pictures, tmp_path):
    """One line, exit code 2, also from two processes. Without a connection nothing takes the place
    of the published weights."""
    env = {"MINDISTILL_CACHE": str(tmp_path), "https_proxy": "http://127.0.0.1:9"}
    done = script("fid.py", pictures / "a", pictures / "b", check=False, env=env)
    assert done.returncode == 2 and "--features PATH" in done.stderr
    assert "cannot fetch https://github.com/mseitzer/pytorch-fid" in done.stderr
    (tmp_path / "bad").mkdir()
    for i in range(4):
        (tmp_path / "bad" / f"{i}.png").write_text("no picture")
    words = ("--features", "digits-cnn")
    done = workers(2, "fid.py", tmp_path / "bad", pictures / "b", *words, check=False)
    complaints = [line for line in done.stderr.splitlines() if "fid.py: error" in line]
    assert done.returncode != 0 and len(complaints) == 1 and "cannot be read" in complaints[0]
