"""Odd data and files: what cannot be is refused in one line, what is left out is told."""
import json
import os
import sys

import numpy as np
import pytest
import torch
from conftest import checkpoint, inside
from PIL import Image

import fid
from kit import checkpoints, data
from kit.cli import UserError
from kit.processes import lock

SMALL = "--model DiT-Na/4 --image-size 8 --steps 2 --batch-size 4 --workers 0".split()


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def pictures(root, *names):
    for k, name in enumerate(names):
        os.makedirs(f"{root}/{name}")
        for i in range(4):
            Image.new("RGB", (8, 8), (50 * k + 2, i, 200)).save(f"{root}/{name}/{i}.png")


# ---- Latents and arrays made by hand -----------------------------------------------------------


@pytest.mark.parametrize("meta, message", [
    ({"scale": 0}, "scale"), ({"scale": float("nan")}, "scale"), ({"scale": -1}, "scale"),
    ({"scale": float("inf")}, "scale"), ({"classes": float("inf")}, "classes"),
    ({"classes": 2.5}, "classes"), ({"classes": -1}, "classes"), ({"classes": "3"}, "classes"),
    ({"class_names": ["a", "b"]}, "class_names"), ({"class_names": "abc"}, "class_names"),
    ({"class_names": {"a": 0}}, "class_names"), ({"class_names": ["a", "a", "b"]}, "class_names"),
    ({"class_names": [["a"], ["b"], ["c"]]}, "class_names")])
def test_what_meta_json_cannot_say(meta, message):
    os.mkdir("cache")
    np.save("cache/latents.npy", np.zeros((4, 1, 1, 3, 8, 8), np.float16))
    np.save("cache/labels.npy", np.arange(4) % 3)
    text = json.dumps({"classes": 3, "scale": 1.0, **meta})
    with open("cache/meta.json", "w") as f:
        f.write(text)
    with pytest.raises(UserError, match=f"cache: cannot be read .meta.json has .*{message}"):
        data.load("cache")


@pytest.mark.parametrize("x, y, message", [
    (np.zeros((4, 8, 8, 0), np.uint8), np.arange(4), "want uint8"),
    (np.full((4, 8, 8, 3), 9, np.uint8), np.array([0, 1, 2, 2 ** 63 - 1]), "which is no class"),
    (np.ones((4, 8, 8, 3), np.float32), np.arange(4), "want uint8")])
def test_arrays_that_are_no_images(x, y, message):
    np.savez("x.npz", x, y)
    with pytest.raises(UserError, match=f"x.npz: cannot be read .*{message}"):
        data.load("x.npz")


def test_images_of_0_and_1_are_black(recwarn):
    np.savez("x.npz", np.ones((4, 8, 8, 3), np.uint8))
    data.load("x.npz")
    assert "nothing but 0 and 1, which is black" in str(recwarn[0].message)


@pytest.mark.parametrize("kind", [">i8", "<u8", "i1"])
def test_labels_of_every_kind_of_integer(kind):
    np.savez("x.npz", np.full((4, 8, 8, 1), 9, np.uint8), np.arange(4).astype(kind))
    assert data.load("x.npz").y.tolist() == [0, 1, 2, 3]
    _, _, labels, _ = fid.read_npz("x.npz")
    assert labels.tolist() == [0, 1, 2, 3] and labels.dtype == np.int64


def test_labels_that_fid_cannot_use_are_told(recwarn):
    np.savez("x.npz", np.full((4, 8, 8, 1), 9, np.uint8), np.eye(4))
    assert fid.read_npz("x.npz")[2] is None
    assert "not one class for each image" in str(recwarn[0].message)


def test_a_damaged_array_is_not_measured():
    """It is mapped from the disk, past numpy's own check."""
    np.savez("x.npz", np.full((40, 8, 8, 1), 9, np.uint8))
    content = bytearray(open("x.npz", "rb").read())
    content[1000:1100] = bytes(100)
    open("x.npz", "wb").write(content)
    with pytest.raises(ValueError, match="Bad CRC-32"):
        fid.open_npz("x.npz")


# ---- Folders -----------------------------------------------------------------------------------


def test_colours_of_16_bits_are_refused_as_grey_ones_are():
    os.mkdir("f")
    import struct
    import zlib

    def part(kind, content):
        sum_of = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + sum_of
    rows = b"".join(b"\0" + bytes(range(48)) for _ in range(8))     # 8 x 8, RGB, 16 bits each
    head = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    png = part(b"IHDR", head) + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")
    open("f/x.png", "wb").write(b"\x89PNG\r\n\x1a\n" + png)
    with pytest.raises(ValueError, match="more than 8 bits per channel"):
        fid.read_image("f/x.png")


def test_pipes_are_not_waited_for():
    os.mkdir("f")
    os.mkfifo("f/x.png")
    with pytest.raises(ValueError, match="f/x.png: cannot be read .it is no file"):
        fid.read_image("f/x.png")


def test_classes_that_are_left_out_are_told(recwarn):
    pictures("abc", "a", "b")
    pictures("flat", "")
    inside("train.py", "--data", "flat", *SMALL, "--out", "free")
    inside("train.py", "--data", "abc", *SMALL, "--out", "named")
    short = "--steps 1 --batch-size 4 --workers 0 --eval-samples 0".split()
    for ckpt, source, message in (("free", "abc", "its 2 classes are left out"),
                                  ("named", "flat", "all its samples get the null label")):
        recwarn.clear()
        said = inside("issd.py", "--ckpt", f"{ckpt}/last.pt", "--data", source, *short, "--nfe", 3,
                      "--out", f"i{ckpt}")
        assert "classes, not" not in said
        assert any(message in str(w.message) for w in recwarn)
    words = "--stages 4:2 --dagger 0.5 0.5 --batch-size 4 --workers 0 --eval-samples 0".split()
    inside("ddil.py", "--ckpt", "free/last.pt", "--data", "abc", *words, "--out", "d")


def test_folders_below_a_class_are_told(recwarn):
    pictures("nest/images", "a", "b")
    assert data.load("nest").class_names == ["images"]
    assert any("folders below a class count to it" in str(w.message) for w in recwarn)


@pytest.mark.parametrize("out", ["abc", "abc/run", "./abc/a/x"])
def test_a_run_does_not_lie_in_its_data(out):
    pictures("abc", "a", "b")
    with pytest.raises(UserError, match=f"--out {out} lies in --data abc"):
        inside("train.py", "--data", "abc", *SMALL, "--out", out)
    assert sorted(os.listdir("abc")) == ["a", "b"]


# ---- Files of ours -----------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["name", "arch", "classes", "ema"])
def test_checkpoints_that_lack_something(tiny, key):
    held = checkpoint(tiny)
    del held[key]
    torch.save(held, "x.pt")
    with pytest.raises(UserError, match=f"x.pt: lacks {key}"):
        checkpoints.load_model("x.pt")


def test_weights_that_are_no_numbers_are_not_sampled(tiny):
    held = checkpoint(tiny)
    held["ema"] = {k: v * float("nan") for k, v in held["ema"].items()}
    torch.save(held, "x.pt")
    with pytest.raises(UserError, match="samples 0 to 1 are not finite"):
        inside(*"sample.py --ckpt x.pt --nfe 1 --num-samples 2 --out x.npz".split())
    assert not os.path.exists("x.npz")


def test_fid_does_not_overwrite_what_it_measures():
    np.savez("x.npz", np.random.default_rng(0).integers(0, 256, (9, 8, 8, 1), np.uint8))
    before = open("x.npz", "rb").read()
    args = fid.parser().parse_args("ref x.npz --features digits-cnn --out ./x.npz".split())
    with pytest.raises(ValueError, match="would be lost; give another name"):
        fid.main(args)
    assert open("x.npz", "rb").read() == before


# ---- Streams and locks -------------------------------------------------------------------------


class Gone:
    """A stream whose reader is gone."""

    def write(self, text):
        raise BrokenPipeError

    def flush(self):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("stream", [None, Gone()])
def test_a_lost_stdout_ends_nothing(monkeypatch, stream):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        fid.keep_streams()
        print("first", flush=True)
        print("second", file=sys.stderr, flush=True)


def test_who_holds_a_lock_is_named(tmp_path):
    held = lock(tmp_path)
    assert f"process {os.getpid()} on " in (tmp_path / ".lock").read_text()
    held.close()
