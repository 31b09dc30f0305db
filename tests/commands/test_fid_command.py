"""fid.py as a command: the same numbers however they are made, and which of them may be mixed."""
# ruff: noqa: F401, F811  (inception_weights, measured, pictures and server are fixtures)
import hashlib
import re

import numpy as np
import pytest
from fake_server import Server, server
from measuring import assert_same, inception_weights, measured, numbers, pictures
from processes import workers

import fid
from kit import checkpoints, data, features
from kit.evaluate import measure_digits
from kit.processes import Processes
from kit.sampling import SampleOptions, sample_images


def test_same_numbers_of_a_small_network(pictures, measured):
    """As test_same_numbers_however_they_are_made, where fid.py is not alone."""
    first = numbers(measured(pictures / "a", pictures / "b", "--json").out)
    assert first["fd"] > 0.01 and first["is"] > 1
    words = (pictures / "a.npz", pictures / "b-packed.npz", "--json", "--batch-size", 1)
    assert_same(first, numbers(measured(*words).out))


def test_three_processes(ckpt, measured):
    """Also of what a checkpoint makes. A rank without images takes part: 400 samples are two
    chunks of 250."""
    words = [ckpt, "digits", "--num-samples", 400, "--nfe", 2, "--features", "digits-cnn", "--json"]
    one = numbers(measured(*words).out)
    assert_same(one, numbers(workers(3, "fid.py", *words).stdout))


@pytest.mark.filterwarnings("ignore:a covariance of 4 features")
def test_table_names_everything(pictures, measured):
    with pytest.warns(UserWarning, match="of 6 features has rank 3: too few images"):
        out = measured(pictures / "a", pictures / "b", "--num-samples", 4).out
    lines = (r"a: 4 of 12 images, a random choice \(seed 0\)\n.*b: 9 images\n"
             r".*inception-2015-12-05/adm\n")
    head = r" +FID +sFID +Inception Score +precision +recall\n"
    row = r" +[\d.]+" * 5
    assert re.search(lines + head + row, out)
    other = fid.table({"": {"fd": -1e-13}}, "torchvision-resnet50")
    assert "FD" in other and "FID" not in other and "-" not in other.replace("torchvision-", "")


def test_some_of_a_set_that_is_sorted_by_class(measured, tmp_path):
    """Chosen at random, they are like the set; the output says so, also that of ref."""
    digits = data.digits()
    order = np.argsort(digits.y.numpy(), kind="stable")
    x = digits.x.permute(0, 2, 3, 1).numpy()[order]
    np.savez(tmp_path / "sorted.npz", arr_0=x, arr_1=digits.y.numpy()[order])
    np.savez(tmp_path / "first.npz", arr_0=x[:500])
    words = ("digits", "--features", "digits-cnn", "--json")
    first = numbers(measured(tmp_path / "first.npz", *words).out)
    words = (tmp_path / "sorted.npz", *words, "--num-samples", 500)
    some = numbers(measured(*words).out)
    assert some["fd"] < 15 < 300 < first["fd"] and some["accuracy"] > 0.9
    assert some["samples_choice"] == "500 of 1,797 images, a random choice (seed 0)"
    assert some["samples_count"] == 500 and some["reference_choice"] is None
    assert numbers(measured(*words, "--seed", 1).out)["fd"] != some["fd"]

    words = ("--features", "digits-cnn", "--num-samples", 500, "--seed", 7)
    out = measured("ref", "digits", "--out", tmp_path / "ref.npz", *words).out
    assert "digits: 500 of 1,797 images, a random choice (seed 7), 500 kept" in out
    out = measured("digits", tmp_path / "ref.npz", "--features", "digits-cnn").out
    assert "ref.npz: 500 of 1,797 images, a random choice (seed 7)\n" in out


def test_references(pictures, measured, tmp_path, monkeypatch):
    """A reference gives the numbers of its images, and says which network and resizing it is of."""
    a, b, ref = pictures / "a", pictures / "b", tmp_path / "ref.npz"
    direct = numbers(measured(a, b, "--json").out)
    out = measured("ref", b, "--out", ref).out
    assert "9 images" in out and "inception-2015-12-05/adm" in out
    assert_same(direct, numbers(measured(a, ref, "--json").out), rel=1e-9)
    message = ("was made with inception-2015-12-05/adm, now it is "
               "inception-2015-12-05/pytorch-fid.*add --resize adm")
    with pytest.raises(ValueError, match=message):
        measured(a, ref, "--resize", "pytorch-fid")
    with pytest.raises(ValueError, match="was made with .*/adm, now it is digits-cnn"):
        measured("digits", ref, "--features", "digits-cnn")
    other = numbers(measured(a, b, "--json", "--resize", "pytorch-fid").out)
    assert other["features"] == "inception-2015-12-05/pytorch-fid"
    assert abs(other["fd"] / direct["fd"] - 1) > 1e-4
    measured("ref", b, "--out", tmp_path / "other.npz", "--resize", "pytorch-fid")
    with pytest.raises(ValueError, match="make one of them again"):
        measured(ref, tmp_path / "other.npz")
    # Two files of statistics need no network:
    monkeypatch.setattr(fid, "load_features", None)
    again = numbers(measured(ref, ref, "--json").out)
    assert abs(again["fd"]) < 1e-9 and (again["precision"], again["recall"]) == (1, 1)


def test_foreign_statistics(pictures, measured, tmp_path):
    """ADM's reference batches carry statistics of all images and some of the images. mu and sigma
    alone do not say how they were made."""
    a, adm, bare = pictures / "a", tmp_path / "adm.npz", tmp_path / "bare.npz"
    measured("ref", pictures / "b", "--out", tmp_path / "ref.npz")
    with np.load(tmp_path / "ref.npz") as f, np.load(pictures / "b.npz") as images:
        held = {k: f[k] for k in ("mu", "sigma", "mu_s", "sigma_s")}
        np.savez(adm, arr_0=images["arr_0"][:5], **held)
        np.savez(bare, mu=held["mu"], sigma=held["sigma"])
    direct = numbers(measured(a, pictures / "b", "--json").out)
    got = numbers(measured(a, adm, "--json").out)
    assert got["fd"] == pytest.approx(direct["fd"]) and got["sfd"] == pytest.approx(direct["sfd"])
    assert got["is"] == direct["is"] and got["reference_kept"] == 5
    assert numbers(measured(adm, a, "--json").out)["is"] > 1
    count = "of how many images it does not say, 5 of them for precision and recall"
    assert count in measured(a, adm).out

    with pytest.raises(ValueError, match="statistics already"):
        measured("ref", adm, "--out", tmp_path / "again.npz")
    with pytest.raises(ValueError, match="leave it out"):
        measured(adm, a, "--num-samples", 3)
    message = "inception-2015-12-05/adm, now it is inception-2015-12-05/pytorch-fid.*--resize adm"
    with pytest.raises(ValueError, match=message):
        measured(a, adm, "--resize", "pytorch-fid")
    with pytest.raises(ValueError, match="which resizing made it: add --reference-resize adm"):
        measured(a, bare)
    got = numbers(measured(a, bare, "--reference-resize", "adm", "--json").out)
    assert got["fd"] == pytest.approx(direct["fd"]) and not {"sfd", "precision"} & got.keys()
    with pytest.raises(ValueError, match="now it is inception-2015-12-05/adm"):
        measured(a, bare, "--reference-resize", "pytorch-fid")


def test_checkpoint_is_sampled(ckpt, measured):
    """The numbers of the method scripts, from the same samples."""
    proc = Processes("off")
    net, spec = checkpoints.load_model(ckpt)
    options = SampleOptions(seed=5, nfe=4, cfg=1.0)
    want = measure_digits(*sample_images(proc.autocast(net), spec, proc, 300, options), proc)
    words = ["--nfe", 4, "--seed", 5, "--features", "digits-cnn"]
    got = numbers(measured(ckpt, "digits", "--num-samples", 300, *words, "--json").out)
    assert "NFE 4, guidance 1, seed 5" in got["samples"] and got["samples_count"] == 300
    for key in ("fd", "precision", "recall", "accuracy"):
        assert got[key] == pytest.approx(want[key], rel=1e-4)
    with pytest.raises(ValueError, match="at least 2"):
        measured(ckpt, "digits", "--num-samples", 1, "--features", "digits-cnn")


# ---- The download ------------------------------------------------------------------------------


def test_inception_is_fetched_once_and_checked(inception_weights, server, tmp_path, monkeypatch):
    """The published name is for the published bytes only."""
    monkeypatch.setenv("MINDISTILL_CACHE", str(tmp_path))
    url = server.replace("x.pt", inception_weights.name)
    monkeypatch.setattr(fid, "INCEPTION_URL", url)
    Server.body = inception_weights.read_bytes()
    assert features.load_features().name == "inception-2015-12-05/adm"
    asked = len(Server.seen)
    other = fid.load_inception(resize="pytorch-fid")
    assert other.name == "inception-2015-12-05/pytorch-fid" and len(Server.seen) == asked
    digest = inception_weights.stem[-8:]
    monkeypatch.setattr(fid, "INCEPTION_URL", url.replace(digest, "01234567"))
    with pytest.raises(ValueError, match="sha256 is .*published is 01234567"):
        fid.load_inception()


def test_a_broken_download_continues(server, tmp_path, monkeypatch):
    """What has come is kept under another name, also over servers that cannot continue."""
    monkeypatch.setattr(fid.time, "sleep", lambda _: None)
    Server.body = bytes(range(256)) * 40
    digest = hashlib.sha256(Server.body).hexdigest()
    for ranges, folder in ((True, tmp_path / "a"), (False, tmp_path / "b")):
        Server.ranges, Server.cut = ranges, 6000
        with pytest.raises(ValueError, match="6,000 bytes are kept in .*same command continues"):
            fid.fetch(server, folder, digest[:8])
        assert not list(folder.rglob("x.pt"))
        Server.cut = None
        Server.seen = []
        path = fid.fetch(server, folder, digest[:8])
        assert path.read_bytes() == Server.body and (6000 in Server.seen) == ranges
        assert digest in path.with_name("x.pt.sha256").read_text()
