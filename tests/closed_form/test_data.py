"""Data sets, batches and pools against what can be said of them in closed form."""
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from small_data import Rank, first, folder, latents

import fid
import models
from kit import checkpoints, data, sampling
from kit.cache import fingerprint, synthetic_pool
from kit.cli import UserError
from kit.processes import Processes
from kit.sampling import SampleOptions, sample_chunks


def sets(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 2, 2, 4, 8, 8)).astype(np.float16)
    x[:, :, 1] = abs(x[:, :, 1])  # standard deviations
    cache = latents(tmp_path / "latents", x, rng.integers(0, 5, 30), 5, 0.18215)
    return [data.digits(), folder(tmp_path / "images"), data.load(cache)]


def tiny_spec(tiny, **changes):
    """The spec of a pixel model of the digits."""
    return dict(checkpoints.DIT_DEFAULTS, arch=tiny.arch, classes=10, scale=None, cfg=1.0,
                **changes)


# ---- Data sets ---------------------------------------------------------------------------------


def test_digits_are_the_real_ones():
    d = data.digits()
    assert len(d) == 1797
    assert d.shape == (1, 8, 8)
    assert d.classes == 10
    assert torch.bincount(d.y).min() > 170
    x, _ = first(d, 1)[0]
    assert x.dtype == torch.float32
    assert x.min() >= -1 and x.max() <= 1
    assert x.shape == (12, 1, 8, 8)
    levels = data.to_uint8(x).float() / 255 * 16
    assert (levels - levels.round()).abs().max() < 0.05  # 17 grey levels


def test_flips_and_labels_of_an_image_folder(tmp_path):
    d = folder(tmp_path)
    assert d.classes == 2
    assert d.shape == (3, 8, 8)
    assert [k for _, k in d.files] == [0] * 7 + [1] * 7
    straight, _ = d[(0, 0)]
    mirrored, _ = d[(0, 1)]
    assert torch.equal(straight.flip(-1), mirrored)
    with Image.open(d.files[0][0]) as image:
        want = fid.center_crop(image, 8)
    np.testing.assert_array_equal(want, straight.permute(1, 2, 0).numpy())
    flat = data.load(str(tmp_path / "c0"), image_size=8)
    assert flat.classes == 0
    assert flat[(0, 0)][1] == 0  # K = 0: label 0 is null


def test_center_crop_is_adms():
    """20 x 30, crop 8: halved once to 10 x 15 (10 < 16), bicubic to 8 x 12, middle 8 columns."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    image = Image.fromarray(pixels)
    want = np.array(image.resize((15, 10), Image.BOX).resize((12, 8), Image.BICUBIC))[:, 2:10]
    np.testing.assert_array_equal(fid.center_crop(image, 8), want)


def test_latents_are_sampled_from_their_posterior(tmp_path):
    x = np.zeros((4, 2, 2, 1, 8, 8), np.float32)
    x[:, 0, 0] = 5
    x[:, 1, 0] = -5
    x[:, :, 1] = 0.5
    d = data.load(latents(tmp_path / "a", x, np.zeros(4, int), 10), flip=True)
    z = torch.cat([v for v, _ in first(d, 30, batch=4)])
    assert abs(z.abs().mean() - 5) < 0.05
    assert abs((z.abs() - 5).std() - 0.5) < 0.02
    mirrored = (z.mean((1, 2, 3)) > 0).double().mean()
    assert 0.3 < mirrored < 0.7  # mirrored copies are read as often
    # Without mirror images and without posteriors:
    d = data.load(latents(tmp_path / "b", x[:, :1, :1], np.zeros(4, int), 10))
    assert torch.equal(first(d, 1, batch=4)[0][0], torch.full((4, 1, 8, 8), 5.0))


@pytest.mark.parametrize("name,folder", [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_torchvision_sets_are_read_by_their_own_loaders(tmp_path, monkeypatch, name, folder):
    """Four images in upstream's own format, where its loader keeps them: nothing is fetched."""
    raw = tmp_path / "data" / folder / "raw"
    raw.mkdir(parents=True)
    x = np.random.default_rng(0).integers(0, 256, (4, 28, 28), np.uint8)
    y = np.array([3, 1, 4, 9], np.uint8)
    images = struct.pack(">IIII", 2051, 4, 28, 28) + x.tobytes()
    labels = struct.pack(">II", 2049, 4) + y.tobytes()
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    monkeypatch.setenv("MINDISTILL_CACHE", str(tmp_path))
    d = data.load(name)
    assert d.shape == (1, 28, 28)
    assert d.classes == 10
    assert not d.flip
    assert d.y.tolist() == [3, 1, 4, 9]
    np.testing.assert_array_equal(d.x[:, 0], x)


def test_an_npz_of_images(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    y = np.array([0, 1, 2, 0, 1, 2])
    np.savez(tmp_path / "own.npz", x, y)  # as sample.py writes it
    own = data.load(str(tmp_path / "own.npz"))
    assert own.shape == (3, 8, 8)
    assert own.classes == 3
    assert not own.flip
    assert torch.equal(own.x, torch.from_numpy(x).permute(0, 3, 1, 2))
    assert own.y.tolist() == y.tolist()
    assert data.load(str(tmp_path / "own.npz"), classes=5).classes == 5
    np.savez(tmp_path / "plain.npz", x)
    assert data.load(str(tmp_path / "plain.npz")).classes == 0
    for wrong in ([x / 255, y], [x, y[:5]], [x, y / 2], [x[0], y], [x[:0], y[:0]]):
        np.savez(tmp_path / "wrong.npz", *wrong)
        with pytest.raises(UserError, match="cannot be read"):
            data.load(str(tmp_path / "wrong.npz"))
    (tmp_path / "damaged.npz").write_bytes((tmp_path / "own.npz").read_bytes()[:200])
    for name in ("damaged.npz", "nowhere.npz"):
        with pytest.raises(UserError, match="cannot be read"):
            data.load(str(tmp_path / name))


def test_labels_and_scales_of_foreign_data(tmp_path):
    spec = dict(checkpoints.DIT_DEFAULTS, classes=10, scale=None,
                arch=models.make_arch("DiT-Ti/2", 8, 3, 10, False))
    latent = {**spec, "scale": 0.18215}
    for i in range(3):
        Image.fromarray(np.full((9, 12, 3), 80 * i, np.uint8)).save(tmp_path / f"{i}.png")
    images = data.load(str(tmp_path), 8)
    data.check_fits(images, spec)
    assert [k for _, k in images.files] == [10] * 3  # a folder without classes: the null label
    x = np.zeros((4, 1, 1, 3, 8, 8), np.float16)
    cache = data.load(latents(tmp_path / "none", x, np.zeros(4, int), 0, 0.18215))
    data.check_fits(cache, latent)
    assert cache.y.tolist() == [10] * 4
    other = data.load(latents(tmp_path / "other", x, np.zeros(4, int), 10, 0.13))
    message = "latents times 0.13, the network wants latents times 0.18215"
    with pytest.raises(UserError, match=message):
        data.check_fits(other, latent)


# ---- Batches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1, 2])
def test_batches_depend_on_seed_and_step_alone(tmp_path, which):
    """Resumed equals uninterrupted; two ranks make up one; another seed is another order."""
    d = sets(tmp_path)[which]
    whole = first(d, 4)
    for (x, y), (x2, y2) in zip(whole[2:], first(d, 2, start=2)):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)
    halves = [first(d, 4, proc=Rank(r, 2)) for r in (0, 1)]
    for i, (x, y) in enumerate(whole):
        assert torch.equal(torch.cat([halves[0][i][0], halves[1][i][0]]), x)
        assert torch.equal(torch.cat([halves[0][i][1], halves[1][i][1]]), y)
    x, y = first(d, 1, seed=1)[0]
    assert not torch.equal(y, whole[0][1]) or not torch.equal(x, whole[0][0])


def test_an_epoch_is_a_permutation():
    x = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1).repeat(2, 2).repeat(2, 3)
    d = data.Pixels(x, np.zeros(10), 1, "x")
    seen = torch.cat([data.to_uint8(x)[:, 0, 0, 0] for x, _ in first(d, 5, batch=4)]).tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_pixels_are_mirrored_for_half_of_the_batch():
    x = np.zeros((50, 1, 2, 2), np.uint8)
    x[..., 0] = 255
    d = data.Pixels(x, np.zeros(50), 1, "x")
    d.flip = True
    z, _ = first(d, 1, batch=50)[0]
    assert set(z[:, 0, 0, 0].tolist()) == {-1.0, 1.0}
    assert 10 < (z[:, 0, 0, 0] > 0).sum() < 40


def test_pixels_and_flips():
    assert not data.digits().flip
    assert data.to_uint8(torch.zeros(1)) == 128
    grey = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(data.to_uint8(data.to_float(grey)), grey)
    x = torch.arange(4).view(1, 1, 1, 4).expand(1, 1, 4, 4).to(torch.uint8)
    d = data.Pixels(x, [0], 1, "one")
    d.flip = True
    (one, _), (two, _) = first(d, 2, batch=16)
    assert not torch.equal(one, two)


# ---- Samples -----------------------------------------------------------------------------------


def test_synthetic_data_is_made_once_and_continues(tmp_path, tiny, monkeypatch):
    proc = Processes("off")
    spec = tiny_spec(tiny)
    options = SampleOptions(seed=3, nfe=3, cfg=1.0)
    monkeypatch.setattr(sampling, "CHUNK", 10)
    calls = []
    fail_at = 8

    def net(x, t, y):
        calls.append(len(x))
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        return tiny(x, t, y)

    def make():
        return synthetic_pool(net, spec, proc, tmp_path, 35, options)

    net.net = tiny
    net.num_classes = 10
    with pytest.raises(KeyboardInterrupt):
        make()
    fail_at = -1
    path = make()
    # Four chunks of three steps. Two of them were done before the interruption.
    assert len(calls) == 7 + 1 + 2 * 3
    pool = data.load(str(path))
    assert len(pool) == 35
    assert pool.classes == 10
    assert pool.y[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    direct = torch.cat([x for _, x, _ in sample_chunks(net, spec, proc, 35, options)])
    np.testing.assert_array_equal(pool.x[:, 0, 0], direct.half().numpy())
    n = len(calls)
    assert make() == path
    assert len(calls) == n
    other = models.fill_random(models.build(tiny.arch), seed=5)
    assert fingerprint(other) != fingerprint(tiny)


def test_samples_do_not_depend_on_the_number_of_processes(tiny, monkeypatch):
    monkeypatch.setattr(sampling, "CHUNK", 5)
    spec = tiny_spec(tiny, nfe=4)
    one = {}
    for i, x, _ in sample_chunks(tiny, spec, Processes("off"), 13, SampleOptions(seed=0)):
        one[i] = x
    two = {}
    for r in (0, 1):
        for i, x, _ in sample_chunks(tiny, spec, Rank(r, 2), 13, SampleOptions(seed=0)):
            two[i] = x
    assert one.keys() == two.keys() == {0, 5, 10}
    assert all(torch.equal(one[i], two[i]) for i in one)
