"""fid.py against numbers of other tools: pytorch-fid, torch-fidelity, OpenAI's Inception Score and
precision and recall, TensorFlow's resizing."""
# ruff: noqa: F401, F811  (inception_weights is a fixture)
import json
import warnings

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from measuring import REFERENCE, inception_weights

import fid
from kit import features

# ---- Metrics -----------------------------------------------------------------------------------

DISTANCES = ("d16_full", "d64_Nlt_d", "d64_one_singular", "d32_identical", "d48_decaying")


@pytest.mark.parametrize("case", [case for case in REFERENCE if case in DISTANCES])
def test_golden_distances(golden, case):
    """Against the exact distance (nuclear norm of the centred data), and against two tools as far
    as they are right."""
    want = REFERENCE[case]
    arrays = golden("fid_frechet.npz")
    n1, n2, d = want["n1"], want["n2"], want["d"]
    rel = 1e-6 if min(n1, n2) > d else 1e-4
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        moments = [arrays[f"{case}/{k}"] for k in ("mu1", "sigma1", "mu2", "sigma2")]
        got = fid.frechet_distance(*moments)
    assert got == pytest.approx(want["exact"], rel=rel, abs=1e-9)
    assert got == pytest.approx(want["pytorch_fid"], rel=1e-4, abs=1e-9)
    assert got == pytest.approx(want["torch_fidelity"], rel=1e-4, abs=1e-9)
    singular = (n1 <= d) + (n2 <= d)
    assert [str(w.message)[:12] for w in caught] == ["a covariance"] * singular
    if f"{case}/X1" in arrays:
        moments = []
        for k in ("X1", "X2"):
            x = torch.as_tensor(arrays[f"{case}/{k}"])
            moments += fid.Statistics(x.shape[1]).update(x).result()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert fid.frechet_distance(*moments) == pytest.approx(want["exact"], rel=rel)


def test_inception_score(golden):
    logits = golden("fid_is_pr.npz")["is/logits"]
    want = REFERENCE["is"]
    assert fid.inception_score(logits) == pytest.approx(want["openai_one_split"], rel=1e-6)
    split = fid.inception_score(logits, split=50)
    assert split == pytest.approx(want["openai_split50"], rel=1e-6)
    # Sure and evenly spread: the number of classes. Knowing nothing: 1.
    assert fid.inception_score(torch.eye(10) * 1e4) == pytest.approx(10)
    assert fid.inception_score(torch.zeros(7, 10)) == pytest.approx(1)


@pytest.mark.parametrize("case", ["gauss8", "gauss64", "subset_duplicates", "integer_ties"])
def test_precision_recall(golden, case):
    """Exact, in any order and any block; the two sets are not interchangeable."""
    arrays = golden("fid_is_pr.npz")
    want = tuple(REFERENCE[f"pr/{case}"]["openai_fp32dist"])
    real = torch.from_numpy(arrays[f"pr/{case}/real"])
    fake = torch.from_numpy(arrays[f"pr/{case}/fake"])
    assert fid.precision_recall(real, fake) == want
    assert fid.precision_recall(fake, real) == want[::-1]
    for seed, block in ((0, 7), (1, 32), (2, 64)):
        g = torch.Generator().manual_seed(seed)
        mixed = [x[torch.randperm(len(x), generator=g)] for x in (real, fake)]
        assert fid.precision_recall(*mixed, block=block) == want
    with pytest.raises(ValueError, match="more than 3 images"):
        fid.precision_recall(real[:3], fake)


# ---- Inception ---------------------------------------------------------------------------------


@pytest.mark.parametrize("resize, prefix", [("pytorch-fid", "s64"), ("adm", "tf/s64")])
def test_inception_parity(golden, inception_weights, resize, prefix):
    want = golden("fid_features.npz")
    net = features.load_features(str(inception_weights), resize)
    seen = {}

    def record(key):
        def hook(module, inputs, output):
            seen[key] = output.mean((2, 3))
        return hook

    for name, key in (("maxpool1", "pool64"), ("maxpool2", "pool192"), ("Mixed_6e", "pool768")):
        getattr(net.net, name).register_forward_hook(record(key))
    images = torch.from_numpy(want["s64/images"])
    with torch.inference_mode():
        seen["pool2048"], seen["spatial2023"] = net(images)
        seen["logits_unbiased"] = net.logits(seen["pool2048"])
        seen["logits"] = seen["logits_unbiased"] + net.net.fc.bias
        first_rows = net.resize(images[:1].float())[0, :, :3]
    compared = 0
    for key, got in seen.items():
        if f"{prefix}/{key}" in want:
            atol = 1e-3 if "logits" in key else 1e-4
            np.testing.assert_allclose(got, want[f"{prefix}/{key}"], rtol=0, atol=atol,
                                       err_msg=key)
            compared += 1
    assert compared == (7 if resize == "pytorch-fid" else 3) and seen["pool2048"].std() > 0.1
    if resize == "pytorch-fid":
        first_rows = (first_rows + 1) / 2
    else:
        first_rows = first_rows * 128 + 128
    np.testing.assert_allclose(first_rows, want[f"{prefix}/resized_img0_row0"], atol=1e-3)
    assert net.name == f"inception-{inception_weights.stem[-8:]}/{resize}"
    assert net.to("meta").conv.device.type == "meta"  # all of it moves to the GPU


def test_inception_keys(inception_weights):
    keys = json.loads((GOLDEN / "inception_keys.json").read_text())["keys"]
    want = {key: tuple(shape) for key, shape, _ in keys}
    weights = torch.load(inception_weights, weights_only=True)
    net = fid.Inception(weights, "x", "adm").net
    assert {key: tuple(value.shape) for key, value in net.state_dict().items()} == want
