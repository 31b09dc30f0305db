"""What images and labels mean: classes by their names, mirror images, impossible latents."""
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from small_data import first, latents

import models
from kit import checkpoints, data
from kit.cli import UserError


def spec_of(classes, names=None, size=8, channels=3, scale=None):
    arch = models.make_arch("DiT-Ti/2", size, channels, classes, False)
    return dict(checkpoints.DIT_DEFAULTS, name="DiT-Ti/2", arch=arch, classes=classes, scale=scale,
                class_names=names)


def folders(root, names, each=2, size=8):
    """A folder of images for every name; the grey level tells the folder and the image."""
    for k, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(each):
            Image.new("RGB", (size, size), (10 * k, i, 0)).save(root / name / f"{i}.png")
    return data.load(str(root))


def labels(d):
    return data.labels_of(d).tolist()


# ---- Classes -----------------------------------------------------------------------------------


def test_classes_are_matched_by_name(tmp_path):
    """Two of the digits' ten classes; a subset of ImageNet; another order of the same names."""
    d = folders(tmp_path / "two", ["3", "7"])
    data.check_fits(d, spec_of(10, [str(k) for k in range(10)]))
    assert labels(d) == [3, 3, 7, 7]
    names = sorted(data.imagenet_names())
    d = folders(tmp_path / "part", [names[5], names[999]])
    data.check_fits(d, spec_of(1000, names))
    assert labels(d) == [5, 5, 999, 999]
    d = folders(tmp_path / "pets", ["cat", "dog"])
    data.check_fits(d, spec_of(2, ["dog", "cat"]))
    assert labels(d) == [1, 1, 0, 0]


@pytest.mark.parametrize("names, known, message", [
    (["cat", "unicorn"], ["cat", "dog", "eel"], "knows no class unicorn"),
    (["cat", "dog"], None, "shows 2 of the network's 3 classes"),
    (["a", "b", "c", "d"], None, "has 4 classes, the network knows 3")])
def test_classes_that_cannot_be_matched(tmp_path, names, known, message):
    d = folders(tmp_path / "d", names)
    with pytest.raises(UserError, match=message):
        data.check_fits(d, spec_of(3, known))


def test_labels_that_are_meant(tmp_path):
    """--trust-labels: label i is class i; folders named by numbers mean these numbers."""
    d = folders(tmp_path / "names", ["cat", "unicorn"])
    data.check_fits(d, spec_of(3, ["cat", "dog", "eel"]), trust_labels=True)
    assert labels(d) == [0, 0, 1, 1]
    d = folders(tmp_path / "numbers", ["3", "7"])
    data.check_fits(d, spec_of(1000), trust_labels=True)
    assert labels(d) == [3, 3, 7, 7]
    with pytest.raises(UserError, match="no numbers of the network's classes"):
        data.check_fits(folders(tmp_path / "far", ["3", "70"]), spec_of(10), trust_labels=True)


def test_an_npz_shows_some_classes(tmp_path):
    """An .npz has no names: fewer classes are refused unless their number is given."""
    x = np.full((4, 8, 8, 3), 9, np.uint8)
    np.savez(tmp_path / "x.npz", x, np.array([0, 1, 4, 2]))
    name = str(tmp_path / "x.npz")
    with pytest.raises(UserError, match="shows 5 of the network's 10 classes"):
        data.check_fits(data.load(name), spec_of(10))
    for d, trust in ((data.load(name, classes=10), False), (data.load(name), True)):
        data.check_fits(d, spec_of(10), trust)
        assert labels(d) == [0, 1, 4, 2]


def test_numbers_are_in_the_order_of_their_values(tmp_path):
    d = folders(tmp_path / "d", [str(k) for k in range(12)], each=1)
    assert d.class_names == [str(k) for k in range(12)]
    assert labels(d) == list(range(12))
    assert data.in_order(["b10", "b9", "a"]) == ["a", "b10", "b9"]


@pytest.mark.parametrize("made, wanted", [
    (["train/cat", "train/dog", "val/cat"], "train"), (["Train/a", "Test/a"], "Train"),
    (["train", "val"], "train"), (["train/n01440764"], "train")])
def test_parts_of_a_data_set_are_no_classes(tmp_path, made, wanted):
    for name in made:
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
    with pytest.raises(UserError, match=f"look like parts .* give --data {tmp_path}/{wanted}"):
        data.load(str(tmp_path))


def test_a_class_may_be_called_train(tmp_path):
    d = folders(tmp_path / "d", ["car", "train"])
    assert d.class_names == ["car", "train"]


# ---- Mirror images -----------------------------------------------------------------------------


def test_the_container_does_not_decide(tmp_path):
    """The same images as a folder and as an .npz give the same batches, mirrored or not."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (16, 8, 8, 3), np.uint8)
    (tmp_path / "f" / "a").mkdir(parents=True)
    for i, image in enumerate(x):
        Image.fromarray(image).save(tmp_path / f"f/a/{i:02}.png")
    np.savez(tmp_path / "x.npz", x, np.zeros(16, int))
    for flip in (None, False, True):
        one, two = (data.load(str(tmp_path / name), 8, flip=flip) for name in ("f", "x.npz"))
        assert one.flip == two.flip == bool(flip)
        for (a, _), (b, _) in zip(first(one, 3), first(two, 3)):
            assert torch.equal(a, b)


def test_only_photographs_that_the_papers_mirror_are_mirrored(tmp_path):
    assert not data.digits().flip
    assert not folders(tmp_path / "own", ["cat", "dog"]).flip
    assert folders(tmp_path / "imagenet", ["n01440764", "n01443537"]).flip
    x = np.zeros((4, 2, 1, 3, 8, 8), np.float16)
    assert data.load(latents(tmp_path / "many", x, np.zeros(4, int), 1000)).flip
    assert not data.load(latents(tmp_path / "few", x, np.zeros(4, int), 10)).flip


def test_latents_without_mirror_images(tmp_path):
    folder = latents(tmp_path / "one", np.zeros((4, 1, 1, 3, 8, 8), np.float16), np.zeros(4, int))
    assert not data.load(folder).flip
    with pytest.raises(UserError, match="no latents of mirror images; leave --flip out"):
        data.load(folder, flip=True)


# ---- Latents -----------------------------------------------------------------------------------


def posteriors(root, spread, second):
    """1,000 entries whose mean has this standard deviation; `second` fills the second plane."""
    x = np.zeros((1000, 1, 2, 1, 4, 4), np.float16)
    x[:, 0, 0] = np.random.default_rng(0).normal(0, spread, (1000, 1, 4, 4))
    x[:, 0, 1] = second
    return latents(root, x, np.zeros(1000, int), scale=0.18215)


def test_logarithms_of_variances_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"negative; .* store exp\(0.5 \* logvar\)"):
        data.load(posteriors(tmp_path / "a", 1, -7))


@pytest.mark.parametrize("spread, warns", [(5.5, True), (0.1, True), (1, False), (0.7, False)])
def test_a_forgotten_scale_is_warned_of(tmp_path, recwarn, spread, warns):
    data.load(posteriors(tmp_path / "a", spread, 0.01))
    told = [str(w.message) for w in recwarn if "standard deviation of" in str(w.message)]
    assert bool(told) == warns
    assert all("multiplied by their scale, 0.18215?" in text for text in told)


def test_a_process_that_reads_opens_latents_itself(tmp_path):
    """What it gets does not grow with the cache, and reads the same."""
    x = np.random.default_rng(0).normal(size=(500, 1, 1, 4, 8, 8)).astype(np.float16)
    d = data.load(latents(tmp_path / "a", x, np.zeros(500, int), scale=1.0))
    sent = pickle.dumps(d)
    assert len(sent) < x.nbytes / 20
    assert torch.equal(pickle.loads(sent)[(7, 0)][0], d[(7, 0)][0])


# ---- What changed ------------------------------------------------------------------------------


def test_what_changed(tmp_path):
    def change(names, before="ab", each=2):
        one = folders(tmp_path / f"{before}{each}{names}1", list(before))
        two = folders(tmp_path / f"{before}{each}{names}2", list(names), each)
        return data.what_changed(one.identity, two.identity)

    assert change("ab") is None
    assert change("abc") == "it has the new class c"
    assert change("b") == "it lacks the class a"
    assert change("bz") == "it lacks the class a and it has the new class z"
    assert change("ab", each=3) == "it had 4 entries and has 6"
    one = {"count": 1, "classes": 2, "class_names": ["a", "b"], "content": "0"}
    assert "another order" in data.what_changed(one, {**one, "class_names": ["b", "a"]})
    assert "other files" in data.what_changed(one, {**one, "content": "1"})


def test_images_keep_their_own_size(tmp_path):
    """Without --image-size small images are not enlarged."""
    assert folders(tmp_path / "small", ["a"], size=64).shape == (3, 64, 64)
    assert folders(tmp_path / "large", ["a"], each=1, size=300).shape == (3, 256, 256)
    mixed = folders(tmp_path / "mixed", ["a"], size=64)
    Image.new("RGB", (40, 40)).save(tmp_path / "mixed" / "a" / "x.png")
    assert mixed.shape == (3, 64, 64)
    assert data.load(str(tmp_path / "mixed")).shape == (3, 256, 256)
