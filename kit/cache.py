"""Arrays that are made on disk piece by piece, and the pool of samples of a model itself."""
import json
import os
import time
import zlib
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from kit import sampling
from kit.cli import UserError, say
from kit.processes import lock, save_array, write_text

# ---- Arrays piece by piece ---------------------------------------------------------------------


@dataclass
class Pieces:
    """The files from which folder/name.npy is made. Piece c holds the rows of chunk c."""

    folder: Path
    name: str
    keys: Sequence  # one for each row; the files' names tell their hash

    @property
    def chunks(self):
        return range((len(self.keys) + sampling.CHUNK - 1) // sampling.CHUNK)

    def piece(self, c):
        """The file of chunk c: an .npy of its rows."""
        first = c * sampling.CHUNK
        keys = self.keys[first:first + sampling.CHUNK]
        return self.folder / f"{self.name}-{c:06d}-{crc(keys)}.npy"

    @cached_property  # the hash of a million names takes a while
    def whole(self):
        """The file in which the pieces are joined: an .npy of all rows."""
        return self.folder / f"{self.name}-{crc(self.keys)}.part"


def crc(keys):
    """Eight hexadecimal digits that depend on the keys."""
    return f"{zlib.crc32(repr(keys).encode()):08x}"


def write_pieces(proc, folder, name, keys, produce):
    """Make an array of float16 rows on all ranks; returns its file, which the caller then moves to
    folder/name.npy.

    keys     a list or range with one entry for each row, which says what the row is made from
    produce  produce(todo) yields (first row, rows as a tensor) for this rank's chunks c for which
             todo(c) is true; each has sampling.CHUNK rows, the last one perhaps fewer

    The chunks are written as they are done, and in the end moved one by one into one file. A run
    that breaks off is continued, also with other keys: chunks with the same keys are kept.
    Raises UserError.
    """
    pieces = Pieces(folder, name, keys)
    # Where the whole file exists, all chunks were done, and some may be moved already.
    if proc.any(not pieces.whole.exists())[0]:
        for first, rows in produce(lambda c: not pieces.piece(c).exists()):
            rows = rows.half()
            if not rows.isfinite().all():
                last = first + len(rows) - 1
                raise UserError(f"{name} {first} to {last} are not finite, or too large for "
                                "float16; look at the model, and at --scale")
            save_array(pieces.piece(first // sampling.CHUNK), rows.cpu().numpy())
        proc.barrier()
    if proc.is_main:
        _join(pieces)
    return pieces.whole


def _join(pieces):
    """Move all pieces into one file, and delete what is left of other keys."""
    for old in list(pieces.folder.glob(f"{pieces.name}-{'?' * 8}.part")):
        if old != pieces.whole:
            old.unlink()
    if not pieces.whole.exists() and not all(pieces.piece(c).exists() for c in pieces.chunks):
        raise UserError(f"{pieces.folder} lacks what other processes wrote: all machines must "
                        "share this folder")
    pieces.whole.touch()
    with open(pieces.whole, "r+b") as f:
        for c in pieces.chunks:
            if pieces.piece(c).exists():
                _move(pieces, c, f)
    for old in list(pieces.folder.glob(f"{pieces.name}-{'?' * 6}-{'?' * 8}.npy")):
        old.unlink()


def _move(pieces, c, f):
    """Move piece c to its place in the open file f, and delete the piece when f is on the disk."""
    rows = np.load(pieces.piece(c))
    shape = (len(pieces.keys), *rows.shape[1:])
    header = {"descr": "<f2", "fortran_order": False, "shape": shape}
    f.seek(0)
    np.lib.format.write_array_header_1_0(f, header)
    f.seek(f.tell() + c * sampling.CHUNK * rows[0].nbytes)
    f.write(rows.tobytes())
    f.flush()
    os.fsync(f.fileno())
    pieces.piece(c).unlink()


# ---- One job at a time -------------------------------------------------------------------------


@contextmanager
def one_job(proc, folder):
    """While no other job does what follows with this folder, which is made here. A job that does it
    already is waited for. Called on all ranks of this job."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    has_said = False
    while True:
        held = try_lock(folder) if proc.is_main else None
        if proc.any(held is not None)[0]:
            break
        if not has_said:
            say(proc, f"another job is making {folder}; waiting for it")
            has_said = True
        time.sleep(2)  # all ranks meet here again and again: no collective runs into its time limit
    try:
        yield
    finally:
        if held:
            held.close()


def make_once(proc, folder, is_made, make):
    """Call make() on all ranks of this job unless is_made(), while no other job does.

    Where another job ends without having made it, this one goes on.
    """
    if proc.any(not is_made())[0]:
        with one_job(proc, folder):
            if proc.any(not is_made())[0]:  # not made since, before the lock was free
                make()


def try_lock(folder):
    """processes.lock(), or None where another process has it."""
    try:
        return lock(folder)
    except UserError:
        return None


# ---- Synthetic data ----------------------------------------------------------------------------


def synthetic_pool(net, spec, proc, folder, num, options):
    """`num` samples of the model itself (Table 8 of the SSD paper), as cached latents; returns
    their folder.

    net, spec  the network and its spec, as for sampling.sample_chunks
    folder     in which the pool's own folder is made
    options    a sampling.SampleOptions with seed, nfe and cfg given, perhaps uncond and batch, and
               nothing else

    The pool is made once, also when several jobs want it at the same time. All ranks write chunks
    into one (shared) folder as they are done, and a run that breaks off is continued. The folder's
    name tells the weights (by their fingerprint) and the options. Raises UserError.
    """
    seed, nfe, cfg = options.seed, options.nfe, options.cfg
    weights = fingerprint(net)
    if options.uncond is not None:
        weights += f"-{fingerprint(options.uncond)}"
    folder = Path(folder) / f"synthetic-{weights}-{nfe}steps-cfg{cfg:g}-seed{seed}-{num}"

    def produce(todo):
        for first, x, _ in sampling.sample_chunks(net, spec, proc, num, options, todo,
                                                  "synthetic data"):
            yield first, x[:, None, None]  # neither mirror image nor standard deviation

    def is_made():
        return (folder / "meta.json").exists()

    def make():
        latents = write_pieces(proc, folder, "latents", range(num), produce)
        if proc.is_main:
            os.replace(latents, folder / "latents.npy")
            save_array(folder / "labels.npy", np.arange(num) % max(spec["classes"], 1))
            meta = {"classes": spec["classes"], "scale": spec["scale"],
                    "nfe": nfe, "cfg": cfg, "seed": seed}
            write_text(folder / "meta.json", json.dumps(meta))
        proc.barrier()

    try:
        make_once(proc, folder, is_made, make)
    except OSError as e:
        raise UserError(f"cannot write the synthetic data into {folder} ({e}); free some space, "
                        "see that all machines share this folder, and repeat the command")
    return folder


def fingerprint(net):
    """Eight hexadecimal digits that depend on every weight."""
    parameters = getattr(net, "net", net).parameters()
    total = sum(float(p.detach().double().abs().sum()) * (1 + i % 7)
                for i, p in enumerate(parameters))
    return np.float64(total).tobytes()[::-1].hex()[4:12]
