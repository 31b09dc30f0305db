"""fid.py works where it is the only file of ours in a folder: as a library and as a command."""
# ruff: noqa: F401, F811  (inception_weights and pictures are fixtures)
import shutil

import pytest
from conftest import ROOT
from measuring import assert_same, inception_weights, numbers, pictures
from processes import script, torchrun, workers

import fid

LIBRARY = """
import sys
import numpy as np
import fid

class Means:
    name = "means"
    dim = 3
    spatial = None
    def __call__(self, images):
        return images.float().mean((2, 3)), None

net = Means()
x = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8)
a = fid.feature_statistics(fid.images_from_array("a", x), net)
files = fid.images_from_files("b", fid.image_files(sys.argv[1]), size=8)
b = fid.feature_statistics(files, net, keep=5)
row = fid.compare_statistics(a, b, net)
assert row["fd"] > 0 and 0 <= row["recall"] <= 1 and b.kept.shape == (5, 3)
print(fid.table({"a": row}, net.name))
assert not [name for name in sys.modules if name.split(".")[0] in ("kit", "models", "solvers")]
"""


@pytest.fixture
def alone(tmp_path):
    """Keywords for script() and the like: a folder that holds fid.py, no way to the project."""
    shutil.copy(ROOT / "fid.py", tmp_path)
    return {"cwd": tmp_path, "env": {"PYTHONPATH": ""}}


def test_library(alone, pictures):
    assert "precision" in script("-c", LIBRARY, pictures / "b", **alone).stdout


def test_same_numbers_however_they_are_made(alone, pictures, inception_weights):
    """Order, batch size, processes, .npz or folder, stored or packed: FID, sFID, IS, precision and
    recall agree."""
    words = ("--features", inception_weights, "--json")
    first = numbers(script("fid.py", pictures / "a", pictures / "b", *words, **alone).stdout)
    assert first["fd"] > 1 and first["sfd"] > 1 and first["is"] > 1 and "recall" in first
    assert first["samples_count"] == 12 and first["reference_count"] == 9
    assert first["features"] == f"inception-{inception_weights.stem[-8:]}/adm"
    words = (pictures / "a.npz", pictures / "b-packed.npz", *words, "--batch-size", 5)
    assert_same(first, numbers(torchrun(2, "fid.py", *words, **alone).stdout))


@pytest.mark.parametrize("words", [("digits", "b"), ("a", "b", "--features", "digits-cnn"),
                                   ("a", "b", "--features", "inceptoin")])
def test_what_needs_kit(pictures, words, monkeypatch):
    """One line that says what fid.py alone knows."""
    monkeypatch.setattr(fid, "EXTENSION", "nowhere.features")  # as where the file is alone
    words = [str(pictures / word) if word in ("a", "b") else word for word in words]
    with pytest.raises(ValueError, match="fid.py alone measures folders"):
        fid.main(fid.parser().parse_args(words))


def test_two_processes_complain_once(alone, pictures):
    done = workers(2, "fid.py", pictures / "a", "nowhere", check=False, **alone)
    complaints = [line for line in done.stderr.splitlines() if "fid.py: error" in line]
    assert done.returncode != 0 and len(complaints) == 1
    assert "nowhere: no such file or folder" in complaints[0]
