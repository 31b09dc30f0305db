import hashlib
import json
import re
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import GOLDEN, checkpoint, script, torchrun
from PIL import Image
from test_fetch import Server, server  # noqa: F401  a fixture

import data
import features
import fid
import runtime
from runtime import Processes, UserError

REFERENCE = json.loads((GOLDEN / "fid_reference.json").read_text())


def stats(x):
    return fid.Statistics(x.shape[1]).update(torch.as_tensor(x)).result()


# ---- Metrics


def test_closed_forms():
    """Equal covariance: the squared distance of the means. Commuting covariances: sum of (sqrt a - sqrt b)^2."""
    d, rng = 5, np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(d, d)))[0]
    a, b = rng.uniform(0.1, 3, d), rng.uniform(0.1, 3, d)
    A, B, m = q @ np.diag(a) @ q.T, q @ np.diag(b) @ q.T, rng.normal(size=d)
    assert fid.frechet_distance(m, A, 0 * m, A) == pytest.approx((m ** 2).sum(), rel=1e-12)
    assert fid.frechet_distance(m, A, m, B) == pytest.approx(((a ** 0.5 - b ** 0.5) ** 2).sum(), rel=1e-10)
    assert abs(fid.frechet_distance(m, A, m, A)) < 1e-9
    assert fid.frechet_distance(m, 0 * A, 0 * m, B) == pytest.approx((m ** 2).sum() + b.sum(), rel=1e-12)  # all images of one set are the same
    with pytest.raises(UserError, match="5 and 4 features"):
        fid.frechet_distance(m, A, m[:4], A[:4, :4])


@pytest.mark.parametrize("case", [k for k, v in REFERENCE.items() if isinstance(v, dict) and k in ("d16_full", "d64_Nlt_d", "d64_one_singular", "d32_identical", "d48_decaying")])
def test_golden_distances(golden, case):
    """Against the exact distance (nuclear norm of the centred data), and against two tools as far as they are right."""
    want, f = REFERENCE[case], golden("fid_frechet.npz")
    rel = 1e-6 if min(want["n1"], want["n2"]) > want["d"] else 1e-4
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = fid.frechet_distance(*(f[f"{case}/{k}"] for k in ("mu1", "sigma1", "mu2", "sigma2")))
    assert got == pytest.approx(want["exact"], rel=rel, abs=1e-9)
    assert got == pytest.approx(want["pytorch_fid"], rel=1e-4, abs=1e-9) and got == pytest.approx(want["torch_fidelity"], rel=1e-4, abs=1e-9)
    assert [str(w.message)[:12] for w in caught] == ["a covariance"] * ((want["n1"] <= want["d"]) + (want["n2"] <= want["d"]))
    if f"{case}/X1" in f:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert fid.frechet_distance(*stats(f[f"{case}/X1"]), *stats(f[f"{case}/X2"])) == pytest.approx(want["exact"], rel=rel)


def test_equals_scipy_and_takes_constant_features():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(300, 8)), 0.5 + rng.normal(size=(300, 8)) @ rng.normal(size=(8, 8))
    (m1, s1), (m2, s2) = ((v.mean(0), np.cov(v.T)) for v in (x, y))
    want = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2) - 2 * np.trace(scipy.linalg.sqrtm(s1 @ s2)).real
    assert fid.frechet_distance(m1, s1, m2, s2) == pytest.approx(want, rel=1e-9)
    x[:, 3], y[:, 3] = 2.0, 2.0  # a constant feature: no warning
    s1, s2 = np.cov(x.T), np.cov(y.T)
    keep = [0, 1, 2, 4, 5, 6, 7]
    without = fid.frechet_distance(x[:, keep].mean(0), s1[np.ix_(keep, keep)], y[:, keep].mean(0), s2[np.ix_(keep, keep)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fid.frechet_distance(x.mean(0), s1, y.mean(0), s2) == pytest.approx(without, rel=1e-9)


def test_streaming_statistics():
    x = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    s = fid.Statistics(6)
    for part in x.split(17):
        s.update(part)
    mean, cov = s.result()
    np.testing.assert_allclose(mean, x.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(x.double().numpy().T), rtol=1e-10)
    with pytest.raises(UserError):
        stats(x[:1])


def test_inception_score(golden):
    logits = golden("fid_is_pr.npz")["is/logits"]
    assert fid.inception_score(logits) == pytest.approx(REFERENCE["is"]["openai_one_split"], rel=1e-6)
    assert fid.inception_score(logits, split=50) == pytest.approx(REFERENCE["is"]["openai_split50"], rel=1e-6)
    assert fid.inception_score(torch.eye(10) * 1e4) == pytest.approx(10)  # sure and evenly spread: the number of classes
    assert fid.inception_score(torch.zeros(7, 10)) == pytest.approx(1)    # knows nothing


@pytest.mark.parametrize("case", ["gauss8", "gauss64", "subset_duplicates", "integer_ties"])
def test_precision_recall(golden, case):
    """Exact, in any order and any block; the two sets are not interchangeable."""
    f, want = golden("fid_is_pr.npz"), REFERENCE[f"pr/{case}"]
    real, fake = torch.from_numpy(f[f"pr/{case}/real"]), torch.from_numpy(f[f"pr/{case}/fake"])
    assert fid.precision_recall(real, fake) == tuple(want["openai_fp32dist"])
    assert fid.precision_recall(fake, real) == tuple(want["openai_fp32dist"])[::-1]
    for seed, block in ((0, 7), (1, 32), (2, 64)):
        g = torch.Generator().manual_seed(seed)
        mixed = [x[torch.randperm(len(x), generator=g)] for x in (real, fake)]
        assert fid.precision_recall(*mixed, block=block) == tuple(want["openai_fp32dist"])
    with pytest.raises(UserError, match="more than 3 images"):
        fid.precision_recall(real[:3], fake)


def test_precision_recall_of_repeated_points():
    """A set whose images are all the same lies on itself, in whatever block; and far from others."""
    v = torch.rand(1, 2048, generator=torch.Generator().manual_seed(0))
    for n in (7, 10, 33):
        assert fid.precision_recall(v.expand(n, -1), v.expand(n, -1).clone()) == (1, 1)
        assert fid.precision_recall(v.expand(n, -1), v.expand(n, -1) + 0.01) == (0, 0)
    many = torch.rand(40, 2048, generator=torch.Generator().manual_seed(1))
    for block in (4096, 37, 50):
        assert fid.precision_recall(many.repeat(5, 1), many.repeat(7, 1) * (1 + 1e-7), block=block) == (1, 1)


# ---- Feature networks


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """The weights of the golden numbers, each array drawn from its own name, in a file named after its hash, as the published one."""
    keys, sd = json.loads((GOLDEN / "inception_keys.json").read_text()), {}
    for key, shape, _ in keys["keys"]:
        n = np.random.Generator(np.random.Philox(key=int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little"))).standard_normal(shape)
        rules = {"conv.weight": lambda: n * np.sqrt(2 / np.prod(shape[1:])), "bn.weight": lambda: 1 + 0.1 * n, "bn.bias": lambda: 0.1 * n, "running_mean": lambda: 0.1 * n,
                 "running_var": lambda: 0.75 + 0.3 * abs(n), "fc.weight": lambda: 0.05 * n, "fc.bias": lambda: 0.1 * n}
        if not key.endswith("num_batches_tracked"):
            sd[key] = torch.from_numpy(next(rule for end, rule in rules.items() if key.endswith(end))().astype(np.float32))
            if key in keys["sha256_of_weights"]:
                assert hashlib.sha256(sd[key].numpy().tobytes()).hexdigest()[:16] == keys["sha256_of_weights"][key]
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(sd, path)
    return path.rename(path.with_name(f"pt_inception-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth"))


@pytest.mark.parametrize("resize, prefix", [("pytorch-fid", "s64"), ("adm", "tf/s64")])
def test_inception_parity(golden, weights, resize, prefix):
    f, net, seen = golden("fid_features.npz"), features.load_features(str(weights), resize), {}
    for name, key in (("maxpool1", "pool64"), ("maxpool2", "pool192"), ("Mixed_6e", "pool768")):
        getattr(net.net, name).register_forward_hook(lambda m, i, o, key=key: seen.update({key: o.mean((2, 3))}))
    images = torch.from_numpy(f["s64/images"])
    with torch.inference_mode():
        seen["pool2048"], seen["spatial2023"] = net(images)
        seen["logits_unbiased"] = net.logits(seen["pool2048"])
        seen["logits"] = seen["logits_unbiased"] + net.net.fc.bias
        first_rows = net.resize(images[:1].float())[0, :, :3]
    compared = 0
    for key, got in seen.items():
        if f"{prefix}/{key}" in f:
            np.testing.assert_allclose(got, f[f"{prefix}/{key}"], rtol=0, atol=1e-3 if "logits" in key else 1e-4, err_msg=key)
            compared += 1
    assert compared == (7 if resize == "pytorch-fid" else 3) and seen["pool2048"].std() > 0.1
    np.testing.assert_allclose((first_rows + 1) / 2 if resize == "pytorch-fid" else first_rows * 128 + 128, f[f"{prefix}/resized_img0_row0"], atol=1e-3)
    assert net.name == f"inception-{weights.stem[-8:]}/{resize}"
    assert net.to("meta").conv.device.type == "meta"  # all of it moves to the GPU


def test_folded_equals_plain(weights):
    """Folding batch norm and channels last change the order of sums, not the function; and images of one channel count three times."""
    held = torch.load(weights, weights_only=True)
    plain, folded = features.Inception(dict(held), "x", "adm"), features.Inception(dict(held), "x", "adm").fold()
    x = torch.randint(0, 256, (4, 1, 299, 299), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for a, b in zip(plain(x), folded(x.expand(-1, 3, -1, -1))):
            assert (a - b).abs().max() < 1e-4 and a.std() > 0.1


def test_inception_keys_and_wrong_weights(weights, tmp_path):
    want = {k: tuple(s) for k, s, _ in json.loads((GOLDEN / "inception_keys.json").read_text())["keys"]}
    held = torch.load(weights, weights_only=True)
    net = features.Inception(dict(held), "x", "adm").net
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == want
    del held["fc.bias"]
    torch.save(held, tmp_path / "other.pth")
    with pytest.raises(UserError, match="missing 1: fc.bias.*not the Inception network of FID"):
        features.load_features(str(tmp_path / "other.pth"))
    (tmp_path / "pt_inception-01234567.pth").write_bytes((tmp_path / "other.pth").read_bytes())
    with pytest.raises(UserError, match="not as its name says"):
        features.load_features(str(tmp_path / "pt_inception-01234567.pth"))
    for name in ("inceptoin", "torchvision-resnet5", "digits"):
        with pytest.raises(UserError, match="features.*nknown"):
            features.load_features(name)


def test_inception_is_fetched_once_and_checked(weights, server, tmp_path, monkeypatch):  # noqa: F811
    """The published name is for the published bytes only."""
    monkeypatch.setattr(runtime, "CACHE", tmp_path)
    url = server.replace("x.pt", weights.name)
    monkeypatch.setattr(features, "INCEPTION", url)
    Server.body = weights.read_bytes()
    assert features.load_features().name == "inception-2015-12-05/adm"
    asked = len(Server.seen)
    assert features.load_features(resize="pytorch-fid").name == "inception-2015-12-05/pytorch-fid" and len(Server.seen) == asked
    monkeypatch.setattr(features, "INCEPTION", url.replace(weights.stem[-8:], "01234567"))
    with pytest.raises(UserError, match="sha256 is .*published is 01234567"):
        features.load_features()


def keras_resnet50():
    """Random weights under the names that features.KerasResNet50 reads."""
    g = torch.Generator().manual_seed(0)
    out, width = {}, 64

    def layer(name, channels, before, side):
        out[f"{name}.conv.weight"] = torch.randn(channels, before, side, side, generator=g) * (2 / (before * side ** 2)) ** 0.5
        out[f"{name}.conv.bias"] = torch.randn(channels, generator=g)
        for what, low in (("weight", 0.5), ("bias", 0), ("running_mean", 0), ("running_var", 0.5)):
            out[f"{name}.bn.{what}"] = low + 0.5 * torch.rand(channels, generator=g)
        out[f"{name}.bn.num_batches_tracked"] = torch.tensor(0)
    layer("stem", 64, 3, 7)
    for stage, (blocks, inner) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)], 2):
        for block in range(blocks):
            for part, shape in {"a": (inner, width, 1), "b": (inner, inner, 3), "c": (4 * inner, inner, 1), **({} if block else {"proj": (4 * inner, width, 1)})}.items():
                layer(f"layer{stage}.{block}.{part}", *shape)
            width = 4 * inner
    return out


def test_keras_resnet50(tmp_path):
    """Against the network written out, with biases: strides, poolings and the input are what sets it apart from torchvision's."""
    w, F = keras_resnet50(), torch.nn.functional
    torch.save({**w, "fc.weight": torch.zeros(10, 2048)}, tmp_path / "resnet.pth")
    ours, images = features.load_features(str(tmp_path / "resnet.pth")), torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)

    def layer(x, name, stride=1, padding=0):
        x = F.conv2d(x, w[f"{name}.conv.weight"], w[f"{name}.conv.bias"], stride, padding)
        return F.batch_norm(x, *(w[f"{name}.bn.{k}"] for k in ("running_mean", "running_var", "weight", "bias")), eps=1e-3)

    x = F.interpolate(images.float(), (224, 224), mode="bilinear")[:, [2, 1, 0]] - torch.tensor([103.939, 116.779, 123.68]).view(3, 1, 1)
    x = F.max_pool2d(F.pad(layer(x, "stem", 2, 3).relu(), (1, 1, 1, 1)), 3, 2)
    for stage, blocks in ((2, 3), (3, 4), (4, 6), (5, 3)):
        for b in range(blocks):
            name, stride = f"layer{stage}.{b}", 2 if stage > 2 and b == 0 else 1
            inner = layer(layer(layer(x, f"{name}.a", stride).relu(), f"{name}.b", 1, 1).relu(), f"{name}.c")
            x = (inner + (layer(x, f"{name}.proj", stride) if b == 0 else x)).relu()
    assert re.fullmatch("keras-resnet50-[0-9a-f]{8}", ours.name) and torch.allclose(ours(images)[0], x.mean((2, 3)), rtol=1e-4, atol=1e-3 * float(x.std()))
    del w["layer3.1.b.bn.bias"]
    torch.save(w, tmp_path / "less.pth")
    with pytest.raises(UserError, match="missing 1: layer2.1.bn2.bias.*not Keras's ResNet-50"):
        features.load_features(str(tmp_path / "less.pth"))


def test_torchvision_network(tmp_path, monkeypatch):
    """Its own name, its own preprocessing; the features are the input of its last layer."""
    import torchvision
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    net = torchvision.models.resnet18()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(net.state_dict(), tmp_path / "hub" / "checkpoints" / torchvision.models.ResNet18_Weights.DEFAULT.url.rsplit("/", 1)[1])
    ours, x = features.load_features("torchvision-resnet18"), torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    f, spatial = ours(x)
    assert ours.name == "torchvision-resnet18" and f.shape == (2, ours.dim) == (2, 512) and spatial is None
    prepared = torchvision.models.ResNet18_Weights.DEFAULT.transforms()(x)
    torch.testing.assert_close(net.eval().fc(f), net(prepared), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["digits-cnn", "digits-mlp"])
def test_digits_features(name):
    """Real halves are near one another, noise is far, wrong labels are seen; the network knows the held-out digits."""
    real, proc = data.digits(), Processes("off")
    half = fid.evaluate(real.x[:900], real.y[:900], proc, name)
    noise = fid.evaluate(torch.randint(0, 256, (900, 1, 8, 8), dtype=torch.uint8), real.y[:900], proc, name)
    assert half["fd"] < 6 and noise["fd"] > 10 * half["fd"] and noise["pixel_fd"] > 10 * half["pixel_fd"]
    assert half["precision"] == 1 and half["recall"] > 0.8 and noise["precision"] < 0.05
    assert fid.evaluate(real.x[1437:], real.y[1437:], proc, name)["accuracy"] > 0.9
    assert fid.evaluate(real.x[1437:], (real.y[1437:] + 1) % 10, proc, name)["accuracy"] < 0.1


# ---- Command line


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """12 and 9 images of 40 x 48 as .npz (in another order) and as a folder."""
    root, rng, out = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), {}
    for name, n, base in (("a", 12, 90), ("b", 9, 130)):
        coarse = rng.integers(0, 120, (n, 5, 6, 3)) + base
        x = np.clip(coarse.repeat(8, 1).repeat(8, 2) + rng.integers(-20, 20, (n, 40, 48, 3)), 0, 255).astype(np.uint8)
        (root / name).mkdir()
        for i, image in enumerate(x):
            Image.fromarray(image).save(root / name / f"{i:03d}.png")
        order = rng.permutation(n)
        np.savez(root / f"{name}.npz", arr_0=x[order])
        np.savez_compressed(root / f"{name}-packed.npz", arr_0=x)
        out[name] = x
    return root


def numbers(out):
    return json.loads(out.strip().splitlines()[-1])


def same(a, b, rel=1e-5):
    assert a.keys() == b.keys()
    for k, v in a.items():
        if k not in ("samples", "reference"):
            assert v == b[k] or isinstance(v, float) and v == pytest.approx(b[k], rel=rel), (k, v, b[k])


class Small(torch.nn.Module):
    """Stands for the Inception network where the test is of what surrounds it: a few means of the image, by the resizing chosen."""

    dim, spatial = 6, 4

    def __init__(self, resize):
        super().__init__()
        self.name, self.resize = f"inception-2015-12-05/{resize}", features.RESIZE[resize]

    def forward(self, images):
        x = self.resize(images.float(), size=16)
        return torch.cat([x.mean((2, 3)), x[:, :, ::3].std((2, 3))], 1), x[:, 0, :2, :2].flatten(1)

    def logits(self, f):
        return f.double() * 3


@pytest.fixture
def measured(monkeypatch, capsys):
    """measured(words...) runs fid.py in this process on the small network (or --features given) -> (stdout, stderr)."""
    real = features.load_features
    monkeypatch.setattr(fid, "load_features", lambda name, resize="adm", device="cpu": Small(resize) if name == "inception" else real(name, resize, device))

    def call(*words):
        fid.main(fid.parser().parse_args([str(w) for w in words]))
        return capsys.readouterr()
    return call


@pytest.mark.filterwarnings("ignore:a covariance")
def test_same_numbers_however_they_are_made(pictures, weights, measured):
    """Order, batch size, processes, .npz against folder, stored against packed: FID, sFID, IS, precision and recall agree."""
    first = numbers(measured(pictures / "a", pictures / "b", "--features", weights, "--json").out)
    assert first["fd"] > 1 and first["sfd"] > 1 and first["is"] > 1 and first["samples_count"] == 12 and first["reference_count"] == 9
    same(first, numbers(torchrun(2, "fid.py", pictures / "a.npz", pictures / "b-packed.npz", "--features", weights, "--json", "--batch-size", 5).stdout))
    first = numbers(measured(pictures / "a", pictures / "b", "--json").out)
    assert first["fd"] > 0.01 and first["is"] > 1
    same(first, numbers(measured(pictures / "a.npz", pictures / "b-packed.npz", "--json", "--batch-size", 1).out))


def test_three_processes(ckpt, measured):
    """Also of what a checkpoint makes; a rank without images (chunks of 250 on three ranks) takes part."""
    words = [ckpt, "digits", "--num-samples", 400, "--nfe", 2, "--features", "digits-cnn", "--json"]
    same(numbers(measured(*words).out), numbers(torchrun(3, "fid.py", *words).stdout))


def test_table_names_everything(pictures, measured):
    with pytest.warns(UserWarning, match="of 6 features has rank 3: too few images"):
        out = measured(pictures / "a", pictures / "b", "--num-samples", 4).out
    assert re.search(r"a: 4 images\n.*b: 9 images\n.*inception-2015-12-05/adm\n +FID +sFID +Inception Score +precision +recall\n +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+", out)
    assert "FD" in fid.table({"": {"fd": 1.0}}, "torchvision-resnet50") and "FID" not in fid.table({"": {"fd": 1.0}}, "torchvision-resnet50")


def test_references(pictures, measured, tmp_path, monkeypatch):
    """A reference gives the numbers of its images, and says which network and resizing it is of."""
    ref = tmp_path / "ref.npz"
    direct = numbers(measured(pictures / "a", pictures / "b", "--json").out)
    out = measured("ref", pictures / "b", "--out", ref).out
    assert "9 images" in out and "inception-2015-12-05/adm" in out
    same(direct, numbers(measured(pictures / "a", ref, "--json").out), rel=1e-9)
    with pytest.raises(UserError, match="was made with inception-2015-12-05/adm, now it is inception-2015-12-05/pytorch-fid.*add --resize adm"):
        measured(pictures / "a", ref, "--resize", "pytorch-fid")
    with pytest.raises(UserError, match="was made with .*/adm, now it is digits-cnn"):
        measured("digits", ref, "--features", "digits-cnn")
    other = numbers(measured(pictures / "a", pictures / "b", "--json", "--resize", "pytorch-fid").out)
    assert other["features"] == "inception-2015-12-05/pytorch-fid" and abs(other["fd"] / direct["fd"] - 1) > 1e-4
    measured("ref", pictures / "b", "--out", tmp_path / "other.npz", "--resize", "pytorch-fid")
    with pytest.raises(UserError, match="make one of them again"):
        measured(ref, tmp_path / "other.npz")
    # Two files of statistics need no network:
    monkeypatch.setattr(fid, "load_features", None)
    again = numbers(measured(ref, ref, "--json").out)
    assert abs(again["fd"]) < 1e-9 and (again["precision"], again["recall"]) == (1, 1)


def test_foreign_statistics(pictures, measured, tmp_path):
    """ADM's reference batches carry statistics of all and images of some; mu and sigma alone do not say how they were made."""
    measured("ref", pictures / "b", "--out", tmp_path / "ref.npz")
    with np.load(tmp_path / "ref.npz") as f, np.load(pictures / "b.npz") as images:
        held = {k: f[k] for k in ("mu", "sigma", "mu_s", "sigma_s")}
        np.savez(tmp_path / "adm.npz", arr_0=images["arr_0"][:5], **held)
        np.savez(tmp_path / "bare.npz", mu=held["mu"], sigma=held["sigma"])
    direct = numbers(measured(pictures / "a", pictures / "b", "--json").out)
    adm = numbers(measured(pictures / "a", tmp_path / "adm.npz", "--json").out)
    with pytest.raises(UserError, match="statistics already"):
        measured("ref", tmp_path / "adm.npz", "--out", tmp_path / "again.npz")
    with pytest.raises(UserError, match="leave it out"):
        measured(tmp_path / "adm.npz", pictures / "a", "--num-samples", 3)
    assert numbers(measured(tmp_path / "adm.npz", pictures / "a", "--json").out)["is"] > 1
    assert adm["fd"] == pytest.approx(direct["fd"]) and adm["sfd"] == pytest.approx(direct["sfd"]) and adm["is"] == direct["is"] and adm["reference_kept"] == 5
    assert "of how many images it does not say, 5 of them for precision and recall" in measured(pictures / "a", tmp_path / "adm.npz").out
    with pytest.raises(UserError, match="inception-2015-12-05/adm, now it is inception-2015-12-05/pytorch-fid.*add --resize adm"):
        measured(pictures / "a", tmp_path / "adm.npz", "--resize", "pytorch-fid")
    with pytest.raises(UserError, match="does not say which resizing"):
        measured(pictures / "a", tmp_path / "bare.npz")
    bare = numbers(measured(pictures / "a", tmp_path / "bare.npz", "--unnamed", "adm", "--json").out)
    assert bare["fd"] == pytest.approx(direct["fd"]) and not {"sfd", "precision"} & bare.keys()
    with pytest.raises(UserError, match="now it is inception-2015-12-05/adm"):
        measured(pictures / "a", tmp_path / "bare.npz", "--unnamed", "pytorch-fid")


def test_large_references_keep_the_same_images_in_any_order(monkeypatch):
    real, net, proc = data.digits(), features.load_features("digits-cnn"), Processes("off")
    x = real.x.permute(0, 2, 3, 1).numpy()
    keep = lambda order, batch: fid.measure(features.in_slices("x", x[order]), net, proc, batch, keep=50, quiet=True)
    one, two = keep(np.arange(1797), 64), keep(np.random.default_rng(0).permutation(1797), 100)
    np.testing.assert_allclose(one["kept"], two["kept"], atol=1e-5)
    assert one["kept"].shape == (50, 64) and one["count"] == 1797
    np.testing.assert_allclose(one["sigma"], two["sigma"], atol=1e-8)


def test_checkpoint_is_sampled(ckpt, measured):
    """The numbers of the method scripts, from the same samples."""
    import checkpoints
    proc, (net, info) = Processes("off"), checkpoints.load_model(ckpt)
    want = fid.evaluate(*data.sample_images(proc.mixed(net), info, proc, 300, 5, 4, 1.0), proc)
    got = numbers(measured(ckpt, "digits", "--num-samples", 300, "--nfe", 4, "--seed", 5, "--features", "digits-cnn", "--json").out)
    assert "NFE 4, guidance 1, seed 5" in got["samples"] and got["samples_count"] == 300
    for k in ("fd", "precision", "recall", "accuracy"):
        assert got[k] == pytest.approx(want[k], rel=1e-4)
    with pytest.raises(UserError, match="at least 2"):
        measured(ckpt, "digits", "--num-samples", 1, "--features", "digits-cnn")


def test_checkpoint_that_makes_nan(tmp_path, tiny, measured):
    bad = {k: v * torch.nan if k == "final_layer.linear.bias" else v for k, v in tiny.state_dict().items()}
    torch.save(checkpoint(tiny, model=bad, ema=bad), tmp_path / "bad.pt")
    with pytest.raises(UserError, match="samples 0 to 9 are not finite"):
        measured(tmp_path / "bad.pt", "digits", "--num-samples", 10, "--nfe", 2, "--features", "digits-cnn")
    torch.save(tiny.state_dict(), tmp_path / "raw.pt")
    with pytest.raises(UserError, match="does not say how to sample it"):
        measured(tmp_path / "raw.pt", "digits")


@pytest.mark.filterwarnings("ignore:a covariance", "ignore:precision and recall")
def test_bad_input(pictures, measured, tmp_path):
    def complains(pattern, a, b=pictures / "b", *more):
        with pytest.raises(UserError, match=pattern):
            measured(a, b, *more)

    def npz(name, **arrays):
        np.savez(tmp_path / name, **arrays)
        return tmp_path / name
    with np.load(pictures / "a.npz") as f:
        x = f["arr_0"]
    complains("no such file", tmp_path / "absent")
    complains("no images there", tmp_path)
    whole = (pictures / "a.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:len(whole) // 2])
    complains(r"cut.npz: cannot be read as .npz", tmp_path / "cut.npz")
    (tmp_path / "text.npz").write_text("hello")
    complains("cannot be read as .npz", tmp_path / "text.npz")
    complains("arr_0 is float64, want uint8", npz("float.npz", arr_0=x / 255))
    complains("nothing but 0 and 1", npz("ones.npz", arr_0=(x > 128).astype(np.uint8)))
    complains("want .N, H, W, 3.", npz("nchw.npz", arr_0=x.transpose(0, 3, 1, 2)))
    complains("want .N, H, W, 3.", npz("flat.npz", arr_0=x[0]))
    complains("1 images, at least 2", npz("one.npz", arr_0=x[:1]))
    complains("holds neither images", npz("other.npz", x=x))
    complains("12 images, --num-samples asks for 50", pictures / "a", pictures / "b", "--num-samples", 50)
    complains("8x8 pixels with one channel", pictures / "a", "digits", "--features", "digits-cnn")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    Image.fromarray(x[0]).save(mixed / "0.png")
    Image.fromarray(x[1][:30]).save(mixed / "1.png")
    complains("1.png is 48x30, .*0.png is 48x40; --image-size", mixed)
    two = numbers(measured(mixed, pictures / "b", "--image-size", 32, "--json").out)  # cropped they go together, though two are few
    assert two["samples_count"] == 2 and "fd" in two and "precision" not in two
    Image.fromarray(x[0, ..., 0].astype(np.uint16) * 257).save(mixed / "deep.png")
    complains("more than 8 bits", mixed, pictures / "b", "--image-size", 32)
    (mixed / "deep.png").unlink()
    np.save(tmp_path / "x.npy", x)
    complains("cannot be read as .npz", tmp_path / "x.npy")
    packed = bytearray((pictures / "a-packed.npz").read_bytes())
    packed[2000:2100] = bytes(100)
    (tmp_path / "packed.npz").write_bytes(packed)
    complains("cannot be read as .npz", tmp_path / "packed.npz")
    for odd in (np.array(["a"] * 12), np.eye(12), np.arange(5)):
        assert "accuracy" not in numbers(measured(npz("odd.npz", arr_0=x, arr_1=odd), pictures / "b", "--json").out)
    complains("holds Python objects", npz("object.npz", arr_0=x, arr_1=np.array(None)))
    complains("must be positive", pictures / "a", pictures / "b", "--image-size", 0)
    (mixed / "2.png").write_bytes((mixed / "0.png").read_bytes()[:200])
    complains("2.png: cannot be read", mixed, pictures / "b", "--image-size", 32)
    good = dict(mu=np.zeros(6), sigma=np.eye(6))
    nan = good["sigma"].copy()
    nan[3, 3] = np.nan
    complains("not finite", pictures / "a", npz("nan.npz", mu=good["mu"], sigma=nan), "--unnamed", "adm")
    complains("not symmetric", pictures / "a", npz("skew.npz", mu=good["mu"], sigma=good["sigma"] + np.triu(np.ones((6, 6)), 1)), "--unnamed", "adm")
    complains(r"want floats \(d,\) and \(d, d\)", pictures / "a", npz("shape.npz", mu=good["mu"], sigma=np.eye(3)), "--unnamed", "adm")
    complains("64 features, .* has 6", pictures / "a", npz("small.npz", mu=np.zeros(64), sigma=np.eye(64)), "--unnamed", "adm")
    complains("--out", "ref", pictures / "b")
    complains("--out", "ref", pictures / "b", "--out", tmp_path / "stats.txt")
    complains("cannot write", "ref", pictures / "b", "--out", "/proc/stats.npz")


def test_errors_of_the_command(pictures, tmp_path):
    """One line, exit code 2, also from two processes; and without a network the published weights are not replaced by anything."""
    done = script("fid.py", pictures / "a", pictures / "b", check=False, env={"MINDISTILL_CACHE": str(tmp_path), "https_proxy": "http://127.0.0.1:9"})
    assert done.returncode == 2 and "cannot fetch https://github.com/mseitzer/pytorch-fid" in done.stderr and "--features PATH" in done.stderr
    (tmp_path / "bad").mkdir()
    for i in range(4):
        (tmp_path / "bad" / f"{i}.png").write_text("no picture")
    done = torchrun(2, "fid.py", tmp_path / "bad", pictures / "b", "--features", "digits-cnn", check=False)
    assert done.returncode != 0 and sum("fid.py: error" in line for line in done.stderr.splitlines()) == 1 and "cannot be read" in done.stderr
