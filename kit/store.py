"""Samples on the disk, chunk by chunk: a folder of pictures, or parts from which a file is made."""
import json
import os
import re
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from kit import sampling
from kit.cli import UserError, flag
from kit.processes import lock, save_array, write_text

# ---- Folders -----------------------------------------------------------------------------------


class Store:
    """A folder into which all ranks write chunks of samples. A job that is killed is continued."""

    settings_file = None  # its name: what decided the samples in the folder
    pattern = None        # of the names of the samples' files, whose first group is a number
    beside = None         # of the names of other files that may be there

    def __init__(self, folder):
        self.folder = Path(folder)
        self.lock = None

    def claim(self, proc, settings):
        """Make this the folder of this job, or continue what an equal one began. Called on all
        ranks.

        settings: {name of a flag's argument: value}, what decides the samples. Raises UserError
        where another process writes there, or the folder holds something else.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if proc.is_main:
                self.lock = lock(self.folder)
                self.check(settings)
                write_text(self.folder / self.settings_file, json.dumps(settings))
        except OSError as e:
            raise cannot_write(self.folder, e)
        proc.barrier()

    def check(self, settings):
        """Raise UserError unless the folder is empty, or holds samples of the same settings."""
        file = self.folder / self.settings_file
        strange = []
        for name in os.listdir(self.folder):
            is_sample = file.exists() and re.fullmatch(self.pattern, name)
            if not is_sample and not re.fullmatch(self.beside, name):
                strange.append(name)
        if strange:
            raise UserError(f"{self.folder} holds something else ({min(strange)}), where only "
                            "samples may be; move that away, or give another --out")
        if not self.numbers():  # nothing would be lost
            return
        mend = f"delete {self.folder}, or give another --out"
        try:
            held = dict(json.loads(file.read_text()))
        except (ValueError, TypeError):
            raise UserError(f"{file} is damaged; {mend}")
        for key, value in settings.items():
            if held.get(key) != value:
                raise UserError(f"{self.folder} holds samples made "
                                f"{in_words(key, held.get(key), value)}; {mend}")

    def numbers(self):
        """The numbers in the names of the samples' files, less those that are empty."""
        found = []
        for entry in os.scandir(self.folder):
            match = re.fullmatch(self.pattern, entry.name)
            if match and entry.stat().st_size:
                found.append(int(match[1]))
        return found

    def release(self):
        """Delete what only a job that is not finished needs, and let others in. On rank 0."""
        for name in os.listdir(self.folder):
            if re.fullmatch(r"\.lock|\..*\.tmp", name):
                (self.folder / name).unlink()
        self.lock.close()


# These settings are kept as hashes, which tell the user nothing.
HASHED = ("ckpt", "base", "uncond", "prompts")


def in_words(key, before, now):
    """How two settings differ: "with --seed 0, now it is 1"."""
    if key in HASHED:
        return f"with another {flag(key)}"
    before = f"without {flag(key)}" if before is None else f"with {flag(key)} {before}"
    return f"{before}, now it is {'not given' if now is None else now}"


# ---- Pictures ----------------------------------------------------------------------------------


class Pictures(Store):
    """PNG files. 000123-207.png is sample 123, of class 207; without classes 000123.png."""

    settings_file = ".samples.json"
    pattern = r"(\d{6,})(?:-\d+)?\.png"
    beside = r"\..*"

    def done(self, num):
        """The chunks, of num samples together, whose files are all there."""
        size = sampling.CHUNK
        counts = Counter(i // size for i in self.numbers())
        return {c for c, n in counts.items() if n == min(size, num - c * size)}

    def add(self, first, images, labels):
        """Write a chunk. images: (n, H, W, 1 or 3) uint8; labels: (n,), or None without classes.

        Raises UserError."""
        if images.shape[-1] not in (1, 3):
            raise UserError(f"images of {images.shape[-1]} channels cannot be .png files; give "
                            "--out a name ending in .npz")
        if images.shape[-1] == 1:
            images = images[..., 0]
        for i, image in enumerate(images):
            name = f"{first + i:06d}" + ("" if labels is None else f"-{labels[i]}") + ".png"
            temporary = self.folder / f".{name}.tmp"
            try:
                Image.fromarray(image).save(temporary, "PNG")
                os.replace(temporary, self.folder / name)
            except OSError as e:
                temporary.unlink(missing_ok=True)
                raise cannot_write(self.folder, e)


# ---- Parts -------------------------------------------------------------------------------------


class Parts(Store):
    """Chunks that wait in a folder, as .npy, until a file is made of them."""

    settings_file = "settings.json"
    pattern = r"(\d{6,})\.npy"
    beside = r"\..*|settings\.json|.*\.tmp"

    def done(self, num):
        """The chunks that are there, whole."""
        return {c for c in self.numbers() if self.is_whole(c)}

    def is_whole(self, c):
        try:
            np.load(self.part(c), mmap_mode="r")  # looks at its header and its size
            return True
        except (ValueError, OSError, EOFError):
            return False

    def part(self, c):
        return self.folder / f"{c:06d}.npy"

    def add(self, first, samples, labels):
        """Write a chunk. samples: an array (n, ...); labels are not kept. Raises UserError."""
        save_array(self.part(first // sampling.CHUNK), samples)

    def load(self, c):
        return np.load(self.part(c))

    def delete(self):
        """Delete all. The settings go last: they tell what the parts are."""
        for c in self.numbers():
            self.part(c).unlink()
        self.release()
        shutil.rmtree(self.folder)


def write_npz(path, parts, labels):
    """Write what np.savez(path, samples, labels) would, with one chunk at once in memory.

    parts: all of them are there. labels: (N,), one for each sample.
    """
    temporary = parts.folder / "whole.tmp"
    first = parts.load(0)
    header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False,
              "shape": (len(labels), *first.shape[1:])}
    try:
        with open(temporary, "wb") as f:
            with zipfile.ZipFile(f, "w") as archive:
                with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_1_0(member, header)
                    for c in sorted(parts.numbers()):
                        member.write(parts.load(c).tobytes())
                with archive.open("arr_1.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, labels)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise cannot_write(path, e)


def cannot_write(path, error):
    """The UserError for an OSError."""
    return UserError(f"--out {path}: cannot write ({error.strerror or error}); what is there "
                     "already is kept: free some space and repeat the command")
