"""Image files as people have them: of every kind, beside other files, in linked folders."""
import warnings

import numpy as np
import pytest
from PIL import Image

import fid

SIDE = 16
GREY = np.tile(np.arange(SIDE, dtype=np.uint8) * 16, (SIDE, 1))


@pytest.fixture(autouse=True)
def no_other_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def save(path, image, **words):
    """Save an image, in the mode that its format takes. Returns whether Pillow can write it."""
    for mode in ("RGB", "P", "1"):
        try:
            image.convert(mode).save(path, **words)
            return True
        except (OSError, ValueError, KeyError):
            path.unlink(missing_ok=True)
    return False


def names_below(folder):
    return [str(path.relative_to(folder)) for path in fid.image_files(folder)]


# ---- Kinds -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:IM image format is deprecated")
def test_all_that_pillow_decodes_is_read(tmp_path):
    image = Image.fromarray(np.stack([GREY, GREY.T, 255 - GREY], 2))
    written = []
    for ending in sorted(fid.image_endings()):
        name = f"x{ending}" if len(written) % 2 else f"X{ending.upper()}"
        kind = Image.registered_extensions()[ending]
        if kind in Image.SAVE and save(tmp_path / name, image, format=kind):
            written.append(name)
    assert names_below(tmp_path) == sorted(written)
    for ending in (".tif", ".tiff", ".ppm", ".pgm", ".gif", ".jfif", ".webp", ".bmp", ".tga"):
        assert f"x{ending}" in [name.lower() for name in written]
    for name in written:
        x = fid.read_image(tmp_path / name)
        assert x.ndim == 3 and x.shape[2] == 3 and x.dtype == np.uint8 and x.std() > 20, name
        assert fid.size_of(tmp_path / name) == x.shape[1::-1]


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "apng", "tif"])
def test_the_first_picture_of_many(tmp_path, ending):
    colours = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
    first, *more = [Image.new("RGB", (SIDE, SIDE), colour) for colour in colours]
    kind = Image.registered_extensions()["." + ending]
    first.save(tmp_path / f"x.{ending}", kind, save_all=True, append_images=more)
    with Image.open(tmp_path / f"x.{ending}") as image:
        assert image.n_frames == 3
    x = fid.read_image(tmp_path / f"x.{ending}")
    assert x[3, 3].tolist() == pytest.approx([255, 0, 0], abs=2)


def test_rotation_and_transparency_are_not_carried_out(tmp_path):
    """As in the evaluators: a pixel's colour counts, at the place where it lies."""
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    x = np.full((20, 30, 3), 200, np.uint8)
    x[:, 15:] = 10
    Image.fromarray(x).save(tmp_path / "phone.jpg", exif=exif)
    assert fid.read_image(tmp_path / "phone.jpg").shape == x.shape
    clear = np.dstack([x, np.zeros((20, 30), np.uint8)])
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert (fid.read_image(tmp_path / "clear.png") == x).all()


# ---- What is left out --------------------------------------------------------------------------


def test_what_is_left_out_is_told_once(tmp_path):
    for name in ("a/0.png", "a/1.JPG", "b/0.Tif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(GREY).save(tmp_path / name)
    for name in ("a/0.heic", "b/1.HEIC", "b/2.heic", "labels.txt", "a/README", "b/scan.pdf"):
        (tmp_path / name).write_text("x")
    message = (r": 3 \.heic \(a/0\.heic\), 1 \.txt \(labels\.txt\), "
               r"1 without ending \(a/README\), 1 \.pdf \(b/scan\.pdf\)$")
    with pytest.warns(UserWarning, match=message) as told:
        assert names_below(tmp_path) == ["a/0.png", "a/1.JPG", "b/0.Tif"]
    assert len(told) == 1 and str(tmp_path) in str(told[0].message)
    for i in range(9):
        (tmp_path / f"x.{i:03d}").write_text("x")
    with pytest.warns(UserWarning, match=r"3 \.heic.*8 of 8 more endings$"):
        fid.list_folder(tmp_path)


def test_what_systems_put_there_is_not_told(tmp_path):
    for name in ("0.png", "__MACOSX/1.png", "@eaDir/2.png", ".hidden/3.png", ".4.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(GREY).save(tmp_path / name)
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", ".labels.txt"):
        (tmp_path / name).write_text("x")
    assert fid.list_folder(tmp_path) == [(str(tmp_path), [], ["0.png"])]


# ---- Links -------------------------------------------------------------------------------------


@pytest.fixture
def linked(tmp_path):
    """Folders set/a, set/b and other/c, each with an image."""
    for name in ("set/a", "set/b", "other/c"):
        (tmp_path / name).mkdir(parents=True)
        Image.fromarray(GREY).save(tmp_path / name / "0.png")
    return tmp_path


@pytest.mark.parametrize("link, target", [
    ("set/a/self", "."), ("set/a/up", ".."), ("set/a/top", "../../set"), ("set/above", "../.."),
    ("set/a/deep/link", "../..")])
def test_links_that_lead_back(linked, link, target):
    (linked / link).parent.mkdir(exist_ok=True)
    (linked / link).symlink_to(target)
    with pytest.warns(UserWarning, match=f"lead back to a folder above them: {link[4:]}$"):
        found = fid.list_folder(linked / "set")
    assert not any(link.split("/")[-1] in [*path.split("/"), *names] for path, names, _ in found)
    with pytest.warns(UserWarning):
        assert names_below(linked / "set") == ["a/0.png", "b/0.png"]


def test_links_that_lead_back_through_another_folder(linked):
    (linked / "set/out").symlink_to(linked / "other")
    (linked / "other/back").symlink_to(linked / "set")
    with pytest.warns(UserWarning, match="above them: out/back$"):
        assert names_below(linked / "set") == ["a/0.png", "b/0.png", "out/c/0.png"]


def test_links_to_other_folders_are_followed(linked):
    (linked / "set/c").symlink_to(linked / "other/c")
    (linked / "set/d").symlink_to(linked / "other/c")
    (linked / "link").symlink_to(linked / "set")
    assert names_below(linked / "link") == ["a/0.png", "b/0.png", "c/0.png", "d/0.png"]
