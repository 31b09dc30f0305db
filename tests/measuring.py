"""What the tests of fid.py share: pictures, Inception weights, a small network in its place."""
import hashlib
import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from PIL import Image

import fid

REFERENCE = json.loads((GOLDEN / "fid_reference.json").read_text())


def draw_weight(key, shape):
    """The random weight of this name, float32; its name alone is the seed."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    n = np.random.Generator(np.random.Philox(key=seed)).standard_normal(shape)
    if key.endswith("conv.weight"):
        n = n * np.sqrt(2 / np.prod(shape[1:]))
    elif key.endswith("bn.weight"):
        n = 1 + 0.1 * n
    elif key.endswith("running_var"):
        n = 0.75 + 0.3 * abs(n)
    elif key.endswith("fc.weight"):
        n = 0.05 * n
    else:
        n = 0.1 * n
    return torch.from_numpy(n.astype(np.float32))


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """A file of the random weights behind the golden numbers, named after its hash as the published
    file is."""
    keys = json.loads((GOLDEN / "inception_keys.json").read_text())
    weights = {}
    for key, shape, _ in keys["keys"]:
        if not key.endswith("num_batches_tracked"):
            weights[key] = draw_weight(key, shape)
    for key in weights.keys() & keys["sha256_of_weights"].keys():
        digest = hashlib.sha256(weights[key].numpy().tobytes()).hexdigest()
        assert digest[:16] == keys["sha256_of_weights"][key]
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(weights, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return path.rename(path.with_name(f"pt_inception-{digest[:8]}.pth"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """12 and 9 images of 40 x 48: folders a and b, a.npz and b.npz in another order, and
    a-packed.npz and b-packed.npz."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, n, base in (("a", 12, 90), ("b", 9, 130)):
        coarse = rng.integers(0, 120, (n, 5, 6, 3)) + base
        fine = coarse.repeat(8, 1).repeat(8, 2) + rng.integers(-20, 20, (n, 40, 48, 3))
        x = np.clip(fine, 0, 255).astype(np.uint8)
        (root / name).mkdir()
        for i, image in enumerate(x):
            Image.fromarray(image).save(root / name / f"{i:03d}.png")
        np.savez(root / f"{name}.npz", arr_0=x[rng.permutation(n)])
        np.savez_compressed(root / f"{name}-packed.npz", arr_0=x)
    return root


class Small(torch.nn.Module):
    """Stands for the Inception network where the test is of what surrounds it: a few means and
    deviations of the image, by the resizing chosen."""

    dim = 6
    spatial = 4

    def __init__(self, resize):
        super().__init__()
        self.name = f"{fid.PUBLISHED}/{resize}"
        self.resize = fid.RESIZE[resize]

    def forward(self, images):
        x = self.resize(images.float(), size=16)
        features = torch.cat([x.mean((2, 3)), x[:, :, ::3].std((2, 3))], 1)
        return features, x[:, 0, :2, :2].flatten(1)

    def logits(self, features):
        return features.double() * 3


@pytest.fixture
def measured(monkeypatch, capsys):
    """measured(words...) runs fid.py in this process with Small in Inception's place, or with the
    --features given. Returns what it printed: (stdout, stderr)."""
    real = fid.load_features

    def load_features(name, resize="adm", device="cpu"):
        return Small(resize) if name == "inception" else real(name, resize, device)

    monkeypatch.setattr(fid, "load_features", load_features)

    def call(*words):
        fid.main(fid.parser().parse_args([str(w) for w in words]))
        return capsys.readouterr()
    return call


def numbers(out):
    """The line of --json."""
    return json.loads(out.strip().splitlines()[-1])


def assert_same(a, b, rel=1e-5):
    """Two results of --json agree in all but the names of what was measured."""
    assert a.keys() == b.keys()
    for key, value in a.items():
        if key in ("samples", "reference"):
            continue
        want = pytest.approx(b[key], rel=rel) if isinstance(value, float) else b[key]
        assert value == want, key
