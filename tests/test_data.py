import numpy as np
import pytest
import torch
from PIL import Image
from test_errors import latents

import checkpoints
import data
import models
from runtime import Processes, UserError


class Rank:
    """Processes as rank r of a world of w sees itself."""

    def __new__(cls, r, w):
        proc = Processes("off")
        proc.rank, proc.world = r, w
        return proc


def first(dataset, n, batch=12, start=0, proc=None, seed=0):
    stream = data.batches(dataset, proc or Processes("off"), seed, batch, start)
    return [next(stream) for _ in range(n)]


def folder(tmp_path, classes=2, each=7):
    for k in range(classes):
        (tmp_path / f"c{k}").mkdir(parents=True)
        for i in range(each):
            Image.fromarray(np.random.default_rng([k, i]).integers(0, 256, (20, 30, 3), np.uint8)).save(tmp_path / f"c{k}" / f"{i}.png")
    return data.load(str(tmp_path), image_size=8)


def sets(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 2, 2, 4, 8, 8)).astype(np.float16)
    return [data.digits(), folder(tmp_path / "images"), data.load(latents(tmp_path / "latents", x, rng.integers(0, 5, 30), 5, 0.18215))]


def test_digits_are_the_real_ones():
    d = data.digits()
    assert len(d) == 1797 and d.shape == (1, 8, 8) and d.classes == 10 and torch.bincount(d.y).min() > 170
    x, y = first(d, 1)[0]
    assert x.dtype == torch.float32 and x.min() >= -1 and x.max() <= 1 and x.shape == (12, 1, 8, 8)
    levels = data.to_uint8(x).float() / 255 * 16
    assert (levels - levels.round()).abs().max() < 0.05  # 17 grey levels


@pytest.mark.parametrize("which", [0, 1, 2])
def test_batches_depend_on_seed_and_step_alone(tmp_path, which):
    """Resumed equals uninterrupted; two ranks make up one; an epoch is a permutation; another seed is another order."""
    d = sets(tmp_path)[which]
    whole = first(d, 4)
    for (x, y), (x2, y2) in zip(whole[2:], first(d, 2, start=2)):
        assert torch.equal(x, x2) and torch.equal(y, y2)
    halves = [first(d, 4, proc=Rank(r, 2)) for r in (0, 1)]
    for i, (x, y) in enumerate(whole):
        assert torch.equal(torch.cat([halves[0][i][0], halves[1][i][0]]), x) and torch.equal(torch.cat([halves[0][i][1], halves[1][i][1]]), y)
    assert not torch.equal(first(d, 1, seed=1)[0][1], whole[0][1]) or not torch.equal(first(d, 1, seed=1)[0][0], whole[0][0])


def test_an_epoch_is_a_permutation():
    d = data.Pixels(np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1).repeat(2, 2).repeat(2, 3), np.zeros(10), 1, flip=False, name="x")
    seen = torch.cat([data.to_uint8(x)[:, 0, 0, 0] for x, _ in first(d, 5, batch=4)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10)) and seen[:10].tolist() != seen[10:].tolist()


def test_pixels_are_mirrored_for_half_of_the_batch():
    x = np.zeros((50, 1, 2, 2), np.uint8)
    x[..., 0] = 255
    z, _ = first(data.Pixels(x, np.zeros(50), 1, flip=True, name="x"), 1, batch=50)[0]
    assert set(z[:, 0, 0, 0].tolist()) == {-1.0, 1.0} and 10 < (z[:, 0, 0, 0] > 0).sum() < 40


def test_flips_and_labels_of_an_image_folder(tmp_path):
    d = folder(tmp_path)
    assert d.classes == 2 and d.shape == (3, 8, 8) and [k for _, k in d.files] == [0] * 7 + [1] * 7
    straight, _ = d[(0, 0)]
    mirrored, _ = d[(0, 1)]
    assert torch.equal(straight.flip(-1), mirrored)
    with Image.open(d.files[0][0]) as image:
        np.testing.assert_array_equal(data.center_crop(image, 8), straight.permute(1, 2, 0).numpy())
    flat = tmp_path / "c0"
    assert data.load(str(flat), image_size=8).classes == 0 and data.load(str(flat), image_size=8)[(0, 0)][1] == 0  # K = 0: label 0 is null


def test_center_crop_is_adms():
    """20 x 30, crop 8: one halving to 10 x 15 (10 < 16), bicubic to 8 x 12, the middle 8 columns."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    want = np.array(image.resize((15, 10), Image.BOX).resize((12, 8), Image.BICUBIC))[:, 2:10]
    np.testing.assert_array_equal(data.center_crop(image, 8), want)


def test_latents_are_sampled_from_their_posterior(tmp_path):
    x = np.zeros((4, 2, 2, 1, 8, 8), np.float32)
    x[:, 0, 0], x[:, 1, 0], x[:, :, 1] = 5, -5, 0.5
    d = data.load(latents(tmp_path / "a", x, np.zeros(4, int), 10))
    z = torch.cat([v for v, _ in first(d, 30, batch=4)])
    assert abs(z.abs().mean() - 5) < 0.05 and abs((z.abs() - 5).std() - 0.5) < 0.02
    assert 0.3 < (z.mean((1, 2, 3)) > 0).double().mean() < 0.7  # mirrored copies are read as often
    d = data.load(latents(tmp_path / "b", x[:, :1, :1], np.zeros(4, int), 10))  # no mirror image, no posterior
    assert torch.equal(first(d, 1, batch=4)[0][0], torch.full((4, 1, 8, 8), 5.0))


def test_synthetic_data_is_made_once_and_continues(tmp_path, tiny, monkeypatch):
    proc = Processes("off")
    info = dict(checkpoints.DIT_DEFAULTS, arch=tiny.arch, classes=10, schedule="linear", prediction="eps", scale=None, grid=None, nfe=None, cfg=1.0)
    monkeypatch.setattr(data, "CHUNK", 10)
    calls = []

    def net(x, t, y):
        calls.append(len(x))
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        return tiny(x, t, y)
    net.net, net.num_classes, fail_at = tiny, 10, 8
    make = lambda: data.synthetic(net, info, proc, tmp_path, 35, seed=3, nfe=3, cfg=1.0)
    with pytest.raises(KeyboardInterrupt):
        make()
    fail_at = -1
    folder = make()
    assert len(calls) == 7 + 1 + 2 * 3  # four chunks of three steps, two of them done before the interruption
    pool = data.load(str(folder))
    assert len(pool) == 35 and pool.classes == 10 and pool.y[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    direct = torch.cat([x for _, x, _ in data.sample_chunks(net, info, proc, 35, 3, 3, 1.0)])
    np.testing.assert_array_equal(pool.x[:, 0, 0], direct.half().numpy())
    n = len(calls)
    assert make() == folder and len(calls) == n
    other = models.fill_random(models.build(tiny.arch), seed=5)
    assert data.fingerprint(other) != data.fingerprint(tiny)


def test_samples_do_not_depend_on_the_number_of_processes(tiny, monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 5)
    info = dict(checkpoints.DIT_DEFAULTS, arch=tiny.arch, classes=10, schedule="linear", prediction="eps", scale=None, grid=None, nfe=4, cfg=1.0)
    one = {i: x for i, x, _ in data.sample_chunks(tiny, info, Processes("off"), 13, 0)}
    two = {i: x for r in (0, 1) for i, x, _ in data.sample_chunks(tiny, info, Rank(r, 2), 13, 0)}
    assert one.keys() == two.keys() == {0, 5, 10} and all(torch.equal(one[i], two[i]) for i in one)


@pytest.mark.parametrize("name,folder", [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_torchvision_sets_are_read_by_their_own_loaders(tmp_path, monkeypatch, name, folder):
    """Four images in upstream's own file format, where its loader would have put them: nothing is fetched."""
    import struct
    raw = tmp_path / "data" / folder / "raw"
    raw.mkdir(parents=True)
    x, y = np.random.default_rng(0).integers(0, 256, (4, 28, 28), np.uint8), np.array([3, 1, 4, 9], np.uint8)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, 4, 28, 28) + x.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, 4) + y.tobytes())
    monkeypatch.setattr(data, "CACHE", tmp_path)
    d = data.load(name)
    assert d.shape == (1, 28, 28) and d.classes == 10 and not d.flip and d.y.tolist() == [3, 1, 4, 9]
    np.testing.assert_array_equal(d.x[:, 0], x)


def test_unknown_sets(tmp_path):
    with pytest.raises(UserError):
        data.load(str(tmp_path / "nothing"))


def test_an_npz_of_images(tmp_path):
    x, y = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8), np.array([0, 1, 2, 0, 1, 2])
    np.savez(tmp_path / "own.npz", x, y)  # as sample.py writes it
    own = data.load(str(tmp_path / "own.npz"))
    assert own.shape == (3, 8, 8) and own.classes == 3 and own.flip and torch.equal(own.x, torch.from_numpy(x).permute(0, 3, 1, 2)) and own.y.tolist() == y.tolist()
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
