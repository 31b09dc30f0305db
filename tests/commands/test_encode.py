"""python -m kit.encode, and what reads its caches.

diffusers and transformers are optional: stand-ins take their place. The last tests use the real
ones where they are installed.
"""
# ruff: noqa: F401, F811  (extra is a fixture)
import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, checkpoint, inside
from PIL import Image
from processes import python, script, workers
from small_data import first, latents
from stand_ins import extra, images, make, refused

import fid
import models
from kit import checkpoints, data, encode, sampling
from kit.cli import UserError
from kit.processes import Processes
from kit.sampling import SampleOptions, sample_chunks, sample_images
from solvers import guide


def same(a, b):
    """Are these two folders of finished caches equal? Returns the names of their files."""
    files = sorted(f.name for f in a.iterdir())
    assert files == sorted(f.name for f in b.iterdir())
    assert "meta.json" in files
    for name in files:
        assert (a / name).read_bytes() == (b / name).read_bytes()
    return files


# ---- Caches ------------------------------------------------------------------------------------


def test_images_become_latents(extra, capsys):
    """In closed form: mean and standard deviation, times the scale, of the cropped image and of
    its mirror image."""
    root = images(extra / "images")
    words = ["--data", root, "--vae", "vae", "--image-size", 8, "--out"]
    make(*words, "a", "--batch-size", 3)
    x = np.load("a/latents.npy")
    assert x.shape == (11, 2, 2, 4, 4, 4)
    assert x.dtype == np.float16
    assert np.load("a/labels.npy").tolist() == [0] * 6 + [1] * 5
    meta = json.loads((extra / "a/meta.json").read_text())
    assert meta["classes"] == 2
    assert meta["scale"] == 0.5
    assert "11 images, latents times 0.5\n" in capsys.readouterr().out
    files = sorted(f.name for f in (extra / "a").iterdir())
    assert files == ["labels.npy", "latents.npy", "meta.json"]

    for i in (0, 3, 4, 10):
        with Image.open(root / f"c{i // 6}" / f"{i:02d}.png") as image:
            crop = fid.center_crop(image, 8) / 127.5 - 1
        for flip, view in enumerate((crop, crop[:, ::-1])):
            mean = view.reshape(4, 2, 4, 2, 3).mean((1, 3)).transpose(2, 0, 1)
            np.testing.assert_allclose(x[i, flip, 0, :3], 0.5 * mean, atol=1e-3)
            np.testing.assert_allclose(x[i, flip, 1, :3], 0.05 * abs(mean), atol=1e-4)
    constant = np.broadcast_to(np.array([1, 0.1])[:, None, None], (11, 2, 2, 4, 4))
    np.testing.assert_allclose(x[:, :, :, 3], constant, rtol=1e-3)

    # Read back: sampled from N(1, 0.1).
    z = torch.cat([z for z, _ in first(data.load("a"), 20, batch=11)])[:, 3]
    assert abs(z.mean() - 1) < 0.01
    assert abs(z.std() - 0.1) < 0.01
    make(*words, "a")  # again: nothing is done
    assert "finished already" in capsys.readouterr().out
    make(*words, "b", "--scale", 2)
    np.testing.assert_allclose(np.load("b/latents.npy"), x * 4.0, rtol=1e-3, atol=1e-6)
    # S = 1, and latent diffusion's scale of 1:
    make("--data", root, "--vae", "vq", "--image-size", 8, "--out", "c")
    vq = np.load("c/latents.npy")
    np.testing.assert_allclose(0.5 * vq[:, :, 0], x[:, :, 0, :3], atol=1e-3)


@pytest.mark.parametrize("at", [1, 3, 5])
def test_interrupted_anywhere_and_repeated(extra, monkeypatch, at):
    """In the second batch, while the pieces are joined, and while prompts are embedded."""
    images(extra / "images")
    lines = [{"file": f"c{i // 6}/{i:02d}.png", "text": "ab"[i % 2] * i} for i in range(11)]
    (extra / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--data", "images", "--vae", "sd", "--text-encoder", "sd", "--prompts", "c.jsonl",
             "--image-size", 8, "--batch-size", 4, "--out"]
    make(*words, "whole")
    where, name = {1: (encode, "encode_images"), 3: (np, "load"), 5: (encode, "encode_prompts")}[at]
    original = getattr(where, name)
    fails_at = 4 if at == 1 else 2
    calls = []

    def fragile(*args, **kw):
        calls.append(1)
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        return original(*args, **kw)

    monkeypatch.setattr(where, name, fragile)
    with pytest.raises(KeyboardInterrupt):
        make(*words, "a")
    monkeypatch.setattr(where, name, original)
    with pytest.raises(UserError, match="cannot be read"):  # not taken for a whole one
        data.load("a") if (extra / "a/latents.npy").exists() else data.Latents("a")

    count = []
    encode_images = encode.encode_images

    def counted(vae, x):
        count.append(1)
        return encode_images(vae, x)

    monkeypatch.setattr(encode, "encode_images", counted)
    make(*words, "a")
    # Two of three pieces, mirror images too. Later no image is encoded again.
    assert len(count) == (4 if at == 1 else 0)
    files = same(extra / "whole", extra / "a")
    assert "latents.npy" in files
    assert "embeddings.npy" in files


def test_two_processes_make_the_same_cache(extra, monkeypatch):
    """All 1,797 digits, eight pieces of 250; through the command itself."""
    monkeypatch.setattr(sampling, "CHUNK", 250)
    words = ["--data", "digits", "--vae", extra / "vae", "--out"]
    make(*words, "one")
    done = workers(2, "-m", "kit.encode", *words, extra / "two", env={"PYTHONPATH": str(extra)})
    assert done.stdout.count("1797 images") == 1
    same(extra / "one", extra / "two")
    x = np.load("one/latents.npy")
    pixels = data.to_float(data.digits().x).reshape(-1, 4, 2, 4, 2)
    want = pixels.mean((2, 4)).numpy() / 2
    for channel in range(3):
        np.testing.assert_allclose(x[:, 0, 0, channel], want, atol=1e-3)
        np.testing.assert_allclose(x[:, 1, 0, channel], want[:, :, ::-1], atol=1e-3)


def test_both_ways_of_starting_the_command(extra):
    """As a module in the root, and as a file from another folder: the same help, the same cache."""
    images(extra / "images", 2)
    file = ROOT / "kit" / "encode.py"
    said = script(file, "--help", cwd=extra).stdout
    assert said.startswith("usage: kit.encode")
    assert "python -m kit.encode --data IMAGES --out LATENTS" in said

    env = {"PYTHONPATH": str(extra)}
    words = ["--data", extra / "images", "--vae", extra / "vae", "--image-size", 8, "--out"]
    done = script("-m", "kit.encode", *words, extra / "a", env=env)
    assert "2 images, latents times 0.5" in done.stdout
    done = python(file, *words, extra / "b", env=env, cwd=extra)
    assert "2 images, latents times 0.5" in done.stdout
    same(extra / "a", extra / "b")
    refusal = script(file, *words, extra / "c", "--scale", 0, cwd=extra, check=False)
    assert refusal.returncode == 2
    assert refusal.stderr == "encode.py: error: --scale 0.0: must be positive\n"


# ---- Captions and prompts ----------------------------------------------------------------------


def captions(extra, n=7):
    images(extra / "images", n)
    lines = [{"file": f"c{i // 6}/{i:02d}.png", "text": ["ab", "c", ""][i % 3]} for i in range(n)]
    lines.append({"file": "elsewhere.png", "text": "x"})
    (extra / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    make("--data", "images", "--vae", "sd", "--text-encoder", "sd", "--prompts", "c.jsonl",
         "--image-size", 16, "--out", "cache")
    return data.load("cache")


def test_captions_become_embeddings(extra):
    d = captions(extra)
    e = np.load("cache/embeddings.npy")
    assert e.dtype == np.float16
    assert e.shape == (3, 5, 3)
    assert json.loads((extra / "cache/prompts.json").read_text()) == ["ab", "c", ""]
    assert e[0].tolist() == [[1, 2, 3], [2, 4, 6], [0] * 3, [0] * 3, [0] * 3]
    assert np.load("cache/labels.npy").tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert d.classes == 0
    assert d.text == (5, 3)
    assert torch.equal(d.null, torch.zeros(1, 5, 3))
    assert d.null.dtype == torch.float32
    assert d.shape == (4, 8, 8)
    _, y = first(d, 1, batch=7)[0]
    assert y.shape == (7, 5, 3)
    assert y.dtype == torch.float32
    assert sorted(y[:, 0, 0].tolist()) == [0, 0, 1, 1, 1, 3, 3]

    arch = dict(in_channels=4, input_size=8, context="text", context_dim=3)
    spec = {"arch": arch, "classes": 0, "scale": 0.5}
    data.check_fits(d, spec)
    assert d.y.tolist() == [0, 1, 2, 0, 1, 2, 0]  # not made null labels
    wider = {**spec, "arch": dict(arch, context_dim=4)}
    with pytest.raises(UserError, match="dimension 3, the network wants 4"):
        data.check_fits(d, wider)
    with pytest.raises(UserError, match="takes labels"):
        data.check_fits(d, {**spec, "arch": dict(in_channels=4, input_size=8)})
    x = np.zeros((4, 1, 1, 4, 8, 8))
    plain = data.load(latents(extra / "plain", x, np.zeros(4, int), 0))
    with pytest.raises(UserError, match="has no captions.*python -m kit.encode --prompts"):
        data.check_fits(plain, {**spec, "scale": None})
    np.save("cache/labels.npy", np.full(7, 3))
    with pytest.raises(UserError, match="names rows"):
        data.load("cache")


def test_prompts_alone(extra, capsys):
    (extra / "p.txt").write_text("b\na\n\nb\n")
    make("--prompts", "p.txt", "--text-encoder", "sd", "--out", "p")
    rows, null = data.load_prompts("p")
    assert rows[:, 0, 0].tolist() == [2, 1, 2]  # one for each line, in order
    assert null.shape == (1, 5, 3)
    assert "3 prompts" in capsys.readouterr().out
    (extra / "p.jsonl").write_text('{"text": "b"}\n{"text": "a"}\n{"text": "b"}')
    make("--prompts", "p.jsonl", "--text-encoder", "sd", "--out", "q")
    p, q = ((extra / name / "embeddings.npy").read_bytes() for name in "pq")
    assert p == q


class TextNet(torch.nn.Module):
    """Its output tells the prompt: the mean of the embedding everywhere."""

    arch = dict(in_channels=4, input_size=8, context="text", context_dim=3)
    num_classes = 0

    def forward(self, x, t, y):
        assert y.shape[1:] == (5, 3)
        assert y.dtype == torch.float32
        return torch.zeros_like(x) + y.mean((1, 2)).view(-1, 1, 1, 1)


def test_samples_take_prompts_in_turn(extra):
    proc = Processes("off")
    net = TextNet()
    spec = dict(checkpoints.DIT_DEFAULTS, arch=net.arch, classes=0, grid=None, nfe=2, cfg=3.0,
                null=torch.full((1, 5, 3), 0.5))
    prompts = torch.arange(3.).view(3, 1, 1).expand(3, 5, 3)

    def samples(prompts, spec=spec):
        options = SampleOptions(seed=0, prompts=prompts, batch=3)
        return list(sample_chunks(net, spec, proc, 7, options))

    chunks = samples(prompts)
    assert torch.cat([y for _, _, y in chunks]).tolist() == [0, 1, 2, 0, 1, 2, 0]
    out = guide(net, 3.0, null=spec["null"])(torch.zeros(3, 4, 8, 8), torch.zeros(3), prompts)
    assert out[:, 0, 0, 0].tolist() == [-1, 2, 5]  # 0.5 + 3 (m - 0.5)
    for (i, x, _), (j, z, _) in zip(chunks, samples(prompts.half().numpy())):
        assert i == j
        assert torch.equal(x, z)
    x, y = sample_images(net, spec, proc, 3, SampleOptions(seed=0, prompts=prompts, batch=3))
    assert x.shape == (3, 4, 8, 8)
    assert y.tolist() == [0, 1, 2]
    with pytest.raises(UserError, match="it needs prompts"):
        samples(None)
    with pytest.raises(UserError, match="takes labels"):
        samples(prompts, dict(spec, arch=dict(net.arch, context=None)))
    with pytest.raises(UserError, match="dimension 2, the network wants 3"):
        samples(prompts[..., :2])


# ---- Decoding ----------------------------------------------------------------------------------


def test_latents_are_decoded(extra, monkeypatch):
    def call(*words):
        return inside("sample.py", "--ckpt", "x.pt", "--num-samples", 6, *words)

    net = models.fill_random(models.build(models.make_arch("DiT-Ti/2", 8, 4, 10, False)))
    torch.save(checkpoint(net, scale=0.5, nfe=2), "x.pt")
    assert "--decode" in call("--out", "z.npz")
    call("--decode", "vae", "--out", "x.npz")
    with np.load("z.npz") as f, np.load("x.npz") as g:
        z, z_labels = f["arr_0"], f["arr_1"]
        x, x_labels = g["arr_0"], g["arr_1"]
    assert z.shape == (6, 4, 8, 8)
    assert x.shape == (6, 16, 16, 3)
    assert x.dtype == np.uint8
    assert x_labels.tolist() == z_labels.tolist()
    want = data.to_uint8(torch.from_numpy(z[:, :3])).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(x, want.repeat(2, 1).repeat(2, 2))
    inside("sample.py", "--compare", "x.pt", "x.pt", "--num-samples", 6, "--decode", "sd",
           "--out", "x.png")
    assert Image.open("x.png").size[0] == 6 * 36 + 4

    (extra / "p.txt").write_text("a")
    make("--prompts", "p.txt", "--text-encoder", "sd", "--out", "p")
    for words, message in (
            (("--out", "x.png"), "name its autoencoder with --decode"),
            (("--decode", "vq", "--out", "x.png"), "have 3 channels, the model's 4"),
            (("--prompts", "p"), "--decode"),
            (("--prompts", "p", "--out", "y.npz"), "takes labels"),
            (("--prompts", "vae"), "cannot be read")):
        with pytest.raises(UserError, match=message):
            call(*words)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match="pip install diffusers transformers"):
        call("--decode", "vae", "--out", "x.png")


# ---- The real packages -------------------------------------------------------------------------


def test_the_real_diffusers(tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    shape = dict(block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
                 up_block_types=("UpDecoderBlock2D",) * 2)
    vae = diffusers.AutoencoderKL(**shape, latent_channels=4, scaling_factor=0.3)
    vq = diffusers.VQModel(**shape, latent_channels=3)
    vae.save_pretrained("sd/vae")
    vq.half().save_pretrained("vq")
    images(tmp_path / "images", 6)
    words = ["--data", "images", "--image-size", 16, "--vae"]
    make(*words, "sd", "--out", "a")
    make(*words, "vq", "--out", "b")
    d = data.ImageFolder("images", 16)
    close = dict(rtol=2e-3, atol=1e-3)
    with torch.no_grad():
        for flip in (0, 1):
            x = data.to_float(d[(5, flip)][0])[None]
            dist = vae.eval().encode(x).latent_dist
            want = 0.3 * torch.stack([dist.mean, dist.std], 1)[0].numpy()
            np.testing.assert_allclose(np.load("a/latents.npy")[5, flip], want, **close)
        z = vq.float().eval().encode(data.to_float(d[(5, 1)][0])[None]).latents
        np.testing.assert_allclose(np.load("b/latents.npy")[5, 1, 0], z[0].numpy(), **close)
        proc = Processes("off")
        z = torch.randn(3, 4, 8, 8)
        want = data.to_uint8(vae.decode(z).sample)
        assert torch.equal(encode.decode_images(encode.load_vae(proc, "sd"), z, 16), want)
    x = encode.decode_images(encode.load_vae(proc, "vq"), torch.randn(2, 3, 8, 8))
    assert x.shape == (2, 3, 16, 16)
    weights = next((tmp_path / "vq").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be loaded" in refused(*words, "vq", "--out", "c")


def test_the_real_transformers(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    words = ["<|startoftext|>", "<|endoftext|>", "a", "b", "a</w>", "b</w>", "ab</w>"]
    (tmp_path / "t").mkdir()
    (tmp_path / "t/vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (tmp_path / "t/merges.txt").write_text("#version: 0.2\na b</w>\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained("t")
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=7, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    net = transformers.CLIPTextModel(config).eval()
    for where in ("clip", "sd"):
        tokenizer.save_pretrained("sd/tokenizer" if where == "sd" else where)
        net.half().save_pretrained("sd/text_encoder" if where == "sd" else where)
    (tmp_path / "p.txt").write_text("ab a\nb\n" + "a " * 100)
    make("--prompts", "p.txt", "--text-encoder", "sd", "--out", "x")
    make("--prompts", "p.txt", "--text-encoder", "clip", "--out", "y")
    rows, null = data.load_prompts("x")
    assert rows.shape == (3, 77, 16)
    x, y = ((tmp_path / name / "embeddings.npy").read_bytes() for name in "xy")
    assert x == y
    # Start, words, end, and ends to pad:
    ids = [[0, 6, 4] + [1] * 74, [0, 5] + [1] * 75, [0] + [4] * 75 + [1], [0] + [1] * 76]
    close = dict(rtol=2e-3, atol=2e-3)
    with torch.no_grad():
        want = [net.float()(torch.tensor([row])).last_hidden_state.numpy() for row in ids]
    for i in range(3):
        np.testing.assert_allclose(rows[i], want[i][0], **close)
    np.testing.assert_allclose(null, want[3], **close)
