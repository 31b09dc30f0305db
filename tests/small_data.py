"""Small data sets and files for tests."""
import json
import struct

import numpy as np
from PIL import Image

from kit import data
from kit.processes import Processes


class Rank:
    """Processes as rank r of a world of w sees itself."""

    def __new__(cls, r, w):
        proc = Processes("off")
        proc.rank = r
        proc.world = w
        return proc


def first(dataset, n, batch=12, start=0, proc=None, seed=0):
    """The first n batches from step `start` on."""
    stream = data.batches(dataset, proc or Processes("off"), seed, batch, start)
    return [next(stream) for _ in range(n)]


def random_image(seed, height, width):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def folder(path, classes=2, each=7):
    """A folder of images of 20 x 30 pixels as a data set of 8 x 8."""
    for k in range(classes):
        (path / f"c{k}").mkdir(parents=True)
        for i in range(each):
            random_image([k, i], 20, 30).save(path / f"c{k}" / f"{i}.png")
    return data.load(str(path), image_size=8)


def latents(folder, x, y, classes=10, scale=None):
    """A cache of these latents, as data.Latents reads it; returns its path."""
    folder.mkdir()
    np.save(folder / "latents.npy", x)
    np.save(folder / "labels.npy", y)
    (folder / "meta.json").write_text(json.dumps({"classes": classes, "scale": scale}))
    return str(folder)


def write_safetensors(path, sd, names=None):
    """A state dict in the format of safetensors. names: what it calls types other than float32."""
    header = {"__metadata__": {"format": "pt"}}
    content = b""
    for key, value in sd.items():
        raw = value.contiguous().numpy().tobytes()
        header[key] = {"dtype": (names or {}).get(value.dtype, "F32"), "shape": list(value.shape),
                       "data_offsets": [len(content), len(content) + len(raw)]}
        content += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)
