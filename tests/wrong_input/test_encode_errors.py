"""What python -m kit.encode refuses, and what is kept when it fails."""
# ruff: noqa: F401, F811  (extra is a fixture)
import json
import sys

import numpy as np
import torch
from stand_ins import extra, images, make, refused

from kit import data, encode


def test_complaints(extra, monkeypatch):
    images(extra / "images", 6)
    words = ["--data", "images", "--vae", "vae", "--image-size", 8, "--out", "a"]
    assert "encode what?" in refused("--out", "a")
    assert "--scale 0.0: must be positive" in refused(*words, "--scale", 0)
    digits = ["--data", "digits", "--out", "a", "--vae"]
    assert "cannot be loaded" in refused(*digits, "images")
    (extra / "odd").mkdir()
    for config, message in (({"_class_name": "UNet"}, "it is a UNet"),
                            ({"_class_name": "VQModel", "lacks": ["a.b"]}, "lacks weights: a.b")):
        (extra / "odd/config.json").write_text(json.dumps(config))
        assert message in refused(*digits, "odd")
    assert not (extra / "a").exists()
    monkeypatch.setattr(encode, "encode_images", lambda vae, x: torch.full((len(x), 2, 4), 1e6))
    assert "too large for float16" in refused(*words[:-1], "b")
    monkeypatch.setitem(sys.modules, "transformers", None)
    (extra / "p.txt").write_text("a")
    message = refused("--prompts", "p.txt", "--out", "p")
    assert "pip install diffusers transformers" in message


def test_a_broken_image_and_changed_arguments(extra, monkeypatch):
    """What was done before an error is kept, and continued with the same arguments only."""
    root = images(extra / "images", 6)
    words = ["--data", "images", "--vae", "vae", "--image-size", 8, "--out", "a"]
    last = root / "c0/05.png"
    good = last.read_bytes()
    last.write_bytes(b"broken")
    assert "05.png: cannot be read" in refused(*words)  # the first piece was done
    assert len(list((extra / "a").glob("latents-000000-*.npy"))) == 1
    other = [w if w != "vae" else "vq" for w in words]
    assert "made with --vae vae, now it is vq" in refused(*other)
    assert "made with --scale None, now it is 2.0" in refused(*words, "--scale", 2)
    last.unlink()
    made = []
    encode_images = encode.encode_images

    def counted(vae, x):
        made.append(len(x))
        return encode_images(vae, x)

    monkeypatch.setattr(encode, "encode_images", counted)
    make(*words)
    assert made == [1, 1]  # what was done before the image was removed is kept
    assert len(data.load("a")) == 5
    last.write_bytes(good)
    assert "finished cache of other images" in refused(*words)
    assert "holds latents already" in refused("--data", "a", "--out", "b")


def test_files_of_captions(extra):
    images(extra / "images", 6)
    words = ["--data", "images", "--vae", "vae", "--image-size", 8, "--out", "c"]
    for text, message in (("", "holds no prompts"),
                          ('{"file": "c0/00.png"}', "cannot be read"),
                          ("[1]", "cannot be read"),
                          ('{"file": "x", "text": "a"}', "no line for the image c0/00.png"),
                          ('{"file": "x", "text": "a"}\n' * 2, "names a file twice")):
        (extra / "c.jsonl").write_text(text)
        assert message in refused(*words, "--prompts", "c.jsonl")
    line = refused("--data", "digits", "--prompts", "vae/config.json", "--out", "c")
    assert "captions go with a folder of images" in line


def test_a_full_disk(extra, monkeypatch):
    """The line is run_script's or ours, and what was there is kept."""
    images(extra / "images", 6)
    original = np.save

    def full(f, x):
        if "000001" in str(f.name):
            raise OSError("2048 requested and 12 written")
        original(f, x)

    monkeypatch.setattr(np, "save", full)
    words = ["--data", "images", "--vae", "vae", "--image-size", 8, "--out", "a"]
    assert "free some space and repeat the command" in refused(*words)
    monkeypatch.setattr(np, "save", original)
    # The first piece, and with which arguments:
    assert len(list((extra / "a").iterdir())) == 2
    make(*words)
    assert len(data.load("a")) == 6
