"""What may change between two launches of a run, and what is noticed."""
import shutil

import pytest
import torch
from conftest import are_equal, inside, log_lines, weights
from method_runs import load, stop_after
from PIL import Image

from kit.cli import UserError

TRAIN = "train.py --model DiT-Na/4 --batch-size 4 --log-every 1 --lr 1e-3 --out out".split()


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def stopped(steps=8):
    """A run of so many steps, stopped after the fourth."""
    stop_after(4, *TRAIN, "--steps", steps)


def test_a_lower_learning_rate(tmp_path):
    """The advice to a run that diverged; with a constant rate it reaches Adam, too."""
    words = [*TRAIN, "--decay", "constant", "--warmup", 0]
    stop_after(4, *words, "--steps", 8)
    said = inside(*words, "--steps", 8, "--lr", 1e-5)
    assert "out: continuing from step 4" in said
    assert "out: from here on with --lr 1e-05, it was 0.001" in said
    assert [line["lr"] for line in log_lines("out")] == [1e-3] * 4 + [1e-5] * 4
    assert load("out")["args"]["lr"] == 1e-5


def test_more_steps():
    inside(*TRAIN, "--steps", 4)
    said = inside(*TRAIN, "--steps", 6)
    assert "from here on with --steps 6, it was 4" in said
    assert load("out")["step"] == 6 and len(log_lines("out")) == 6


def test_what_changes_no_result():
    stopped()
    said = inside(*TRAIN, "--steps", 8, "--accumulate", 2, "--save-every", 3, "--amp",
                  "off", "--grad-checkpointing")
    assert "--accumulate 2, it was 1" in said and "--amp off, it was auto" in said
    assert "--grad-checkpointing True, it was False" in said and "save-every" not in said
    assert load("out")["step"] == 8


@pytest.mark.parametrize("words, message", [
    (["--batch-size", 8], "--batch-size 4, now it is 8"), (["--seed", 1], "--seed 0, now it is 1"),
    (["--steps", 6], "--steps 8, now it is 6"), (["--clip", 2], "--clip 1.0, now it is 2.0"),
    (["--flip"], "--flip None, now it is True")])
def test_another_experiment(words, message):
    stopped()
    before = load("out")
    with pytest.raises(UserError, match=f"out holds a run with {message}"):
        inside(*TRAIN, "--steps", 8, *words)
    assert are_equal(before["model"], weights("out"))


def test_a_finished_run_has_no_steps_to_come():
    inside(*TRAIN, "--steps", 2)
    with pytest.raises(UserError, match="--lr 0.001, now it is 0.01"):
        inside(*TRAIN, "--steps", 2, "--lr", 1e-2)
    assert "out is finished" in inside(*TRAIN, "--steps", 2, "--accumulate", 2)


# ---- Paths and data ----------------------------------------------------------------------------


def pictures(root, **grey):
    for name, value in grey.items():
        (root / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (8, 8), (value, i, 0)).save(root / name / f"{i}.png")


def on_images(data, steps=8):
    return [*TRAIN, "--data", data, "--image-size", 8, "--workers", 0, "--prediction", "x0",
            "--steps", steps]


def test_two_spellings_of_one_path(tmp_path):
    pictures(tmp_path / "images", cat=10, dog=200)
    (tmp_path / "link").symlink_to("images")
    shutil.copytree("images", "copy")
    stop_after(2, *on_images("images"))
    for n, name in enumerate((tmp_path / "images", "images/", "./images", "link"), 3):
        stop_after(n, *on_images(name))
    with pytest.raises(UserError, match="holds a run with --data images, now it is copy|copy"):
        inside(*on_images("copy"))


@pytest.mark.parametrize("change, message", [
    ("more", "it has the new class bird"), ("fewer", "it lacks the class dog"),
    ("renamed", "it lacks the class cat and it has the new class zcat"),
    ("files", "it had 8 entries and has 9"), ("other", "it holds other files"),
    ("labels", "it holds other files, images or labels")])
def test_data_that_changed(tmp_path, change, message):
    images = tmp_path / "images"
    pictures(images, cat=10, dog=200)
    stop_after(2, *on_images("images"))
    if change == "more":
        pictures(images, bird=90)
    elif change == "fewer":
        shutil.rmtree(images / "dog")
    elif change == "renamed":
        (images / "cat").rename(images / "zcat")
    elif change == "files":
        shutil.copy(images / "cat/0.png", images / "cat/9.png")
    elif change == "other":
        (images / "cat/0.png").rename(images / "cat/7.png")
    else:
        (images / "cat/0.png").rename(images / "dog/0a.png")
        (images / "dog/1.png").rename(images / "cat/1a.png")
    before = (tmp_path / "out" / "last.pt").read_bytes()
    with pytest.raises(UserError, match=f"is not what out was trained on: {message}"):
        inside(*on_images("images"))
    assert (tmp_path / "out" / "last.pt").read_bytes() == before


def test_checkpoints_name_their_classes(tmp_path):
    """A later run on some of the classes finds their labels by these names."""
    pictures(tmp_path / "images", cat=10, dog=90, eel=200)
    inside(*on_images("images", 2))
    held = load("out")
    assert held["class_names"] == ["cat", "dog", "eel"]
    pictures(tmp_path / "some", eel=200)
    words = ["train.py", "--ckpt", "out/last.pt", "--data", "some", "--steps", 1, "--workers", 0,
             "--batch-size", 2, "--ema", 0]
    inside(*words, "--out", "a")
    assert load("a")["class_names"] == ["cat", "dog", "eel"]
    changed = load("a")["model"]["y_embedder.embedding_table.weight"]
    rows = (changed != held["ema"]["y_embedder.embedding_table.weight"]).any(1)
    assert rows.tolist()[:2] == [False, False] and rows[2] | rows[3]
    torch.save({**held, "class_names": None}, "nameless.pt")
    words[2] = "nameless.pt"
    with pytest.raises(UserError, match="shows 1 of the network's 3 classes"):
        inside(*words, "--out", "b")
