"""fid.py and kit/features.py against closed forms, scipy, and networks written out."""
# ruff: noqa: F401, F811  (inception_weights is a fixture)
import functools
import re
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
import torchvision
from measuring import inception_weights
from PIL import Image

import fid
from kit import data, features
from kit.evaluate import measure_digits
from kit.processes import Processes


def stats(x):
    return fid.Statistics(x.shape[1]).update(torch.as_tensor(x)).result()


# ---- Metrics -----------------------------------------------------------------------------------


def test_closed_forms():
    """Equal covariances: the squared distance of the means. Commuting covariances: the sum of
    (sqrt a - sqrt b)^2 over their eigenvalues."""
    d = 5
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(d, d)))[0]
    a, b = rng.uniform(0.1, 3, d), rng.uniform(0.1, 3, d)
    A, B = q @ np.diag(a) @ q.T, q @ np.diag(b) @ q.T
    m = rng.normal(size=d)
    squares = (m ** 2).sum()
    assert fid.frechet_distance(m, A, 0 * m, A) == pytest.approx(squares, rel=1e-12)
    roots = ((a ** 0.5 - b ** 0.5) ** 2).sum()
    assert fid.frechet_distance(m, A, m, B) == pytest.approx(roots, rel=1e-10)
    assert abs(fid.frechet_distance(m, A, m, A)) < 1e-9
    # All images of one set are the same:
    want = pytest.approx(squares + b.sum(), rel=1e-12)
    assert fid.frechet_distance(m, 0 * A, 0 * m, B) == want
    with pytest.raises(ValueError, match="5 and 4 features"):
        fid.frechet_distance(m, A, m[:4], A[:4, :4])


@pytest.mark.filterwarnings("ignore:a covariance of")
def test_fewer_images_than_features():
    """The features of n and m images, centered, are X (n, d) and Y (m, d). The trace of the root is
    the sum of the singular values of X Y^T / sqrt((n - 1) (m - 1))."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(12, 40)) * np.linspace(0.01, 3, 40)
    y = rng.normal(size=(9, 40)) + 0.3
    m1, s1, m2, s2 = x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T)
    root = np.linalg.norm((x - m1) @ (y - m2).T / (11 * 8) ** 0.5, "nuc")
    want = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2) - 2 * root
    assert fid.frechet_distance(m1, s1, m2, s2) == pytest.approx(want, rel=1e-9)
    assert fid.square_root(torch.from_numpy(s1)).shape == (40, 11)


def test_equals_scipy_and_takes_constant_features():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(300, 8))
    y = 0.5 + rng.normal(size=(300, 8)) @ rng.normal(size=(8, 8))
    m1, s1, m2, s2 = x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T)
    root = scipy.linalg.sqrtm(s1 @ s2)
    want = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2) - 2 * np.trace(root).real
    assert fid.frechet_distance(m1, s1, m2, s2) == pytest.approx(want, rel=1e-9)

    x[:, 3] = y[:, 3] = 2.0  # a constant feature: no warning
    m1, s1, m2, s2 = x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T)
    keep = [0, 1, 2, 4, 5, 6, 7]
    square = np.ix_(keep, keep)
    without = fid.frechet_distance(m1[keep], s1[square], m2[keep], s2[square])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fid.frechet_distance(m1, s1, m2, s2) == pytest.approx(without, rel=1e-9)


def test_streaming_statistics():
    x = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    streamed = fid.Statistics(6)
    for part in x.split(17):
        streamed.update(part)
    mean, covariance = streamed.result()
    np.testing.assert_allclose(mean, x.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(x.double().numpy().T), rtol=1e-10)
    with pytest.raises(ValueError, match="at least 2 images"):
        stats(x[:1])


def test_precision_recall_of_repeated_points():
    """A set whose images are all the same lies on itself, in whatever block, and far from others.
    """
    v = torch.rand(1, 2048, generator=torch.Generator().manual_seed(0))
    for n in (7, 10, 33):
        assert fid.precision_recall(v.expand(n, -1), v.expand(n, -1).clone()) == (1, 1)
        assert fid.precision_recall(v.expand(n, -1), v.expand(n, -1) + 0.01) == (0, 0)
    many = torch.rand(40, 2048, generator=torch.Generator().manual_seed(1))
    real, fake = many.repeat(5, 1), many.repeat(7, 1) * (1 + 1e-7)
    for block in (4096, 37, 50):
        assert fid.precision_recall(real, fake, block=block) == (1, 1)


def test_large_references_keep_the_same_images_in_any_order():
    dataset = data.digits()
    net = features.load_features("digits-cnn")
    x = dataset.x.permute(0, 2, 3, 1).numpy()

    def keep_50(order, batch):
        images = fid.images_from_array("x", x[order])
        return fid.feature_statistics(images, net, batch=batch, keep=50, quiet=True)

    one = keep_50(np.arange(1797), 64)
    two = keep_50(np.random.default_rng(0).permutation(1797), 100)
    np.testing.assert_allclose(one.kept, two.kept, atol=1e-5)
    assert one.kept.shape == (50, 64) and one.count == 1797 and not one.complete
    np.testing.assert_allclose(one.sigma, two.sigma, atol=1e-8)


@pytest.mark.parametrize("kind", ["array", "on the disk", "files"])
def test_a_random_choice(kind, tmp_path):
    """The same images in the same order on any number of processes, in batches of any size. All
    images are in their own order."""
    x = np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1).repeat(3, 3)
    y = np.arange(40)
    if kind == "files":
        for i in range(40):
            Image.fromarray(x[i]).save(tmp_path / f"{i:02d}.png")
        files = fid.image_files(tmp_path)
        open_images = functools.partial(fid.images_from_files, "x", files, workers=0)
    elif kind == "on the disk":
        np.savez(tmp_path / "x.npz", arr_0=x + 2, arr_1=y)
        x = x + 2
        open_images = functools.partial(opened_npz, tmp_path / "x.npz")
    else:
        open_images = functools.partial(fid.images_from_array, "x", x, y)

    def values(world, size, **words):
        parts = []
        for rank in range(world):
            for first, images, labels in open_images(**words).batches(rank, world, size):
                assert images.shape[1:] == (3, 1, 1) and len(images) <= size
                pixels = images[:, 0, 0, 0].tolist()
                assert labels is None or x[labels.numpy(), 0, 0, 0].tolist() == pixels
                parts.append((first, pixels))
        return sum((part for _, part in sorted(parts)), [])

    some = values(1, 64, num=12)
    assert len(set(some)) == 12 and max(some) > 20 and some != sorted(some)
    for world, size in ((1, 1), (2, 5), (3, 64)):
        assert values(world, size, num=12) == some
        assert values(world, size, num=40, seed=3) == values(1, 64) == x[:, 0, 0, 0].tolist()
    assert values(1, 64, num=12, seed=1) != some
    assert "12 of 40 images, a random choice (seed 1)" in open_images(num=12, seed=1).choice


def opened_npz(path, **words):
    return fid.open_npz(path, **words)[0]


# ---- Feature networks --------------------------------------------------------------------------


def test_folded_equals_plain(inception_weights):
    """Folding batch norm and putting channels last change the order of sums, not the function.
    Images of one channel count three times."""
    weights = torch.load(inception_weights, weights_only=True)
    plain = fid.Inception(weights, "x", "adm")
    folded = fid.Inception(weights, "x", "adm").fold()
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (4, 1, 299, 299), dtype=torch.uint8, generator=generator)
    with torch.inference_mode():
        for a, b in zip(plain(x), folded(x.expand(-1, 3, -1, -1))):
            assert (a - b).abs().max() < 1e-4 and a.std() > 0.1


def keras_resnet50():
    """Random weights under the names that features.KerasResNet50 reads."""
    generator = torch.Generator().manual_seed(0)
    weights = {}

    def layer(name, channels, before, side):
        deviation = (2 / (before * side ** 2)) ** 0.5
        kernel = torch.randn(channels, before, side, side, generator=generator)
        weights[f"{name}.conv.weight"] = kernel * deviation
        weights[f"{name}.conv.bias"] = torch.randn(channels, generator=generator)
        for what, low in (("weight", 0.5), ("bias", 0), ("running_mean", 0), ("running_var", 0.5)):
            values = low + 0.5 * torch.rand(channels, generator=generator)
            weights[f"{name}.bn.{what}"] = values
        weights[f"{name}.bn.num_batches_tracked"] = torch.tensor(0)

    layer("stem", 64, 3, 7)
    width = 64
    for stage, (blocks, inner) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)], 2):
        for block in range(blocks):
            layer(f"layer{stage}.{block}.a", inner, width, 1)
            layer(f"layer{stage}.{block}.b", inner, inner, 3)
            layer(f"layer{stage}.{block}.c", 4 * inner, inner, 1)
            if block == 0:
                layer(f"layer{stage}.{block}.proj", 4 * inner, width, 1)
            width = 4 * inner
    return weights


def keras_features(weights, images):
    """Keras's ResNet-50 written out, with biases -> (n, 2048)."""
    def layer(x, name, stride=1, padding=0):
        x = F.conv2d(x, weights[f"{name}.conv.weight"], weights[f"{name}.conv.bias"],
                     stride, padding)
        names = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(weights[f"{name}.bn.{k}"] for k in names), eps=1e-3)

    mean = torch.tensor([103.939, 116.779, 123.68]).view(3, 1, 1)
    x = F.interpolate(images.float(), (224, 224), mode="bilinear")[:, [2, 1, 0]] - mean
    x = layer(x, "stem", 2, 3).relu()
    x = F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2)
    for stage, blocks in ((2, 3), (3, 4), (4, 6), (5, 3)):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 2 and block == 0 else 1
            inner = layer(x, f"{name}.a", stride).relu()
            inner = layer(inner, f"{name}.b", 1, 1).relu()
            inner = layer(inner, f"{name}.c")
            if block == 0:
                x = layer(x, f"{name}.proj", stride)
            x = (inner + x).relu()
    return x.mean((2, 3))


def test_keras_resnet50(tmp_path):
    """Strides, poolings, biases and the input set it apart from torchvision's network."""
    weights = keras_resnet50()
    torch.save({**weights, "fc.weight": torch.zeros(10, 2048)}, tmp_path / "resnet.pth")
    ours = features.load_features(str(tmp_path / "resnet.pth"))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    want = keras_features(weights, images)
    assert re.fullmatch("keras-resnet50-[0-9a-f]{8}", ours.name)
    assert torch.allclose(ours(images)[0], want, rtol=1e-4, atol=1e-3 * float(want.std()))
    del weights["layer3.1.b.bn.bias"]
    torch.save(weights, tmp_path / "less.pth")
    with pytest.raises(ValueError, match="missing 1: layer2.1.bn2.bias.*not Keras's ResNet-50"):
        features.load_features(str(tmp_path / "less.pth"))


def test_torchvision_network(tmp_path, monkeypatch):
    """Its own name, its own preprocessing; the features are the input of its last layer."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    net = torchvision.models.resnet18()
    published = torchvision.models.ResNet18_Weights.DEFAULT
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(net.state_dict(), folder / published.url.rsplit("/", 1)[1])
    ours = features.load_features("torchvision-resnet18")
    x = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    f, spatial = ours(x)
    assert ours.name == "torchvision-resnet18" and f.shape == (2, ours.dim) == (2, 512)
    assert spatial is None
    prepared = published.transforms()(x)
    torch.testing.assert_close(net.eval().fc(f), net(prepared), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["digits-cnn", "digits-mlp"])
def test_digits_features(name):
    """Real halves are near one another, noise is far, wrong labels are seen; the network knows the
    held-out digits."""
    real = data.digits()
    proc = Processes("off")
    x, y = real.x.numpy(), real.y.numpy()
    half = measure_digits(x[:900], y[:900], proc, name)
    random_pixels = torch.randint(0, 256, (900, 1, 8, 8), dtype=torch.uint8).numpy()
    noise = measure_digits(random_pixels, y[:900], proc, name)
    assert half["fd"] < 6 and noise["fd"] > 10 * half["fd"]
    assert noise["pixel_fd"] > 10 * half["pixel_fd"]
    assert half["precision"] == 1 and half["recall"] > 0.8 and noise["precision"] < 0.05
    x, y = x[1437:], y[1437:]
    assert measure_digits(x, y, proc, name)["accuracy"] > 0.9
    assert measure_digits(x, (y + 1) % 10, proc, name)["accuracy"] < 0.1
