"""python data.py encode, and what reads its caches. diffusers and transformers are optional: here stand-ins of a few lines, whose
arithmetic is known, take their place; the last tests use the real ones where they are installed."""
import json
import sys
import types

import numpy as np
import pytest
import torch
from conftest import checkpoint, torchrun
from PIL import Image
from test_data import first
from test_errors import latents

import checkpoints
import data
import encode
import models
import sample
from runtime import Processes, UserError
from solvers import guide

DIFFUSERS = '''
import json
from pathlib import Path
from types import SimpleNamespace as Record
import torch
import torch.nn.functional as F

class Autoencoder(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.w = Record(**config), torch.nn.Parameter(torch.ones(1, dtype=torch.float16))

    @staticmethod
    def load_config(name, subfolder):
        return json.loads((Path(name) / subfolder / "config.json").read_text())

    @classmethod
    def from_pretrained(cls, name, subfolder, output_loading_info):
        config = cls.load_config(name, subfolder)
        return cls(config), {"missing_keys": config.pop("lacks", [])}

    def decode(self, z):
        return Record(sample=F.interpolate(z[:, :3], scale_factor=2))

class AutoencoderKL(Autoencoder):
    """mean: means of 2x2 pixels and a constant; std: a tenth of its absolute value."""
    def encode(self, x):
        mean = F.avg_pool2d(torch.cat([x, torch.full_like(x[:, :1], 2)], 1), 2) * self.w
        return Record(latent_dist=Record(mean=mean, std=mean.abs() / 10))

class VQModel(Autoencoder):
    def encode(self, x):
        return Record(latents=F.avg_pool2d(x, 2))
'''
TRANSFORMERS = '''
from pathlib import Path
from types import SimpleNamespace as Record
import torch

class CLIPTokenizer:
    """A token is a letter's place in the alphabet; 0 pads."""
    @classmethod
    def from_pretrained(cls, name, subfolder):
        (Path(name) / subfolder / "vocab.json").read_text()
        return cls()

    def __call__(self, texts, padding, max_length, truncation, return_tensors):
        assert (padding, truncation, return_tensors) == ("max_length", True, "pt")
        return Record(input_ids=torch.tensor([([ord(c) - 96 for c in t] + [0] * max_length)[:max_length] for t in texts]))

class CLIPTextModel(torch.nn.Module):
    """Token n in dimension d gives n (d + 1)."""
    config, device = Record(max_position_embeddings=5), torch.device("cpu")

    @classmethod
    def from_pretrained(cls, name, subfolder, output_loading_info):
        (Path(name) / subfolder / "config.json").read_text()
        return cls(), {"missing_keys": []}

    def forward(self, ids):
        return Record(last_hidden_state=ids[..., None] * torch.arange(1., 4))
'''


@pytest.fixture
def extra(tmp_path, monkeypatch):
    """The stand-ins' folder, where also an autoencoder `vae` and a pipeline `sd` are."""
    for name, code in (("diffusers", DIFFUSERS), ("transformers", TRANSFORMERS)):
        (tmp_path / f"{name}.py").write_text(code)  # for other processes
        exec(code, (module := types.ModuleType(name)).__dict__)
        monkeypatch.setitem(sys.modules, name, module)
    config = {"_class_name": "AutoencoderKL", "scaling_factor": 0.5, "latent_channels": 4}
    for place, content in (("vae", config), ("vq", {**config, "_class_name": "VQModel", "latent_channels": 3}), ("sd/vae", config), ("sd/text_encoder", {})):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "config.json").write_text(json.dumps(content))
    (tmp_path / "sd" / "tokenizer").mkdir()
    (tmp_path / "sd" / "tokenizer" / "vocab.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "CHUNK", 4)
    monkeypatch.setattr(encode, "CHUNK", 4)
    monkeypatch.setattr(encode.os, "cpu_count", lambda: 0)  # no workers
    return tmp_path


def images(folder, n=11, each=6):
    """n images of 12 x 16 pixels in two sub-folders."""
    for i in range(n):
        path = folder / f"c{i // each}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (12, 16, 3), np.uint8)).save(path)
    return folder


def make(*words):
    encode.main(encode.parser().parse_args(["encode", *map(str, words)]))


def refused(*words):
    with pytest.raises(UserError) as e:
        make(*words)
    assert "\n" not in str(e.value)
    return str(e.value)


def same(a, b):
    files = sorted(f.name for f in a.iterdir())
    assert files == sorted(f.name for f in b.iterdir()) and "meta.json" in files
    assert all((a / f).read_bytes() == (b / f).read_bytes() for f in files)
    return files


def test_images_become_latents(extra, capsys):
    """In closed form: mean and standard deviation, times the scale, of the cropped image and of its mirror image."""
    root = images(extra / "images")
    words = ["--data", root, "--vae", "vae", "--image-size", 8, "--out"]
    make(*words, "a", "--batch-size", 3)
    x, meta = np.load("a/latents.npy"), json.loads((extra / "a/meta.json").read_text())
    assert x.shape == (11, 2, 2, 4, 4, 4) and x.dtype == np.float16 and np.load("a/labels.npy").tolist() == [0] * 6 + [1] * 5
    assert meta["classes"] == 2 and meta["scale"] == 0.5 and "11 images, latents times 0.5\n" in capsys.readouterr().out
    assert sorted(f.name for f in (extra / "a").iterdir()) == ["labels.npy", "latents.npy", "meta.json"]
    for i in (0, 3, 4, 10):
        with Image.open(root / f"c{i // 6}" / f"{i:02d}.png") as image:
            crop = data.center_crop(image, 8) / 127.5 - 1
        for flip, view in enumerate((crop, crop[:, ::-1])):
            mean = view.reshape(4, 2, 4, 2, 3).mean((1, 3)).transpose(2, 0, 1)
            np.testing.assert_allclose(x[i, flip, 0, :3], 0.5 * mean, atol=1e-3)
            np.testing.assert_allclose(x[i, flip, 1, :3], 0.05 * abs(mean), atol=1e-4)
    np.testing.assert_allclose(x[:, :, :, 3], np.broadcast_to(np.array([1, 0.1])[:, None, None], (11, 2, 2, 4, 4)), rtol=1e-3)
    z = torch.cat([z for z, _ in first(data.load("a"), 20, batch=11)])[:, 3]  # read back: sampled from N(1, 0.1)
    assert abs(z.mean() - 1) < 0.01 and abs(z.std() - 0.1) < 0.01
    make(*words, "a")  # again: nothing is done
    assert "finished already" in capsys.readouterr().out
    make(*words, "b", "--scale", 2)
    np.testing.assert_allclose(np.load("b/latents.npy"), x * 4.0, rtol=1e-3, atol=1e-6)
    make("--data", root, "--vae", "vq", "--image-size", 8, "--out", "c")
    np.testing.assert_allclose(0.5 * np.load("c/latents.npy")[:, :, 0], x[:, :, 0, :3], atol=1e-3)  # S = 1; latent diffusion's scale is 1


@pytest.mark.parametrize("at", [1, 3, 5])
def test_interrupted_anywhere_and_repeated(extra, monkeypatch, at):
    """In the second batch, while the pieces are joined, and while prompts are embedded."""
    images(extra / "images")
    (extra / "c.jsonl").write_text("".join(json.dumps({"file": f"c{i // 6}/{i:02d}.png", "text": "ab"[i % 2] * i}) + "\n" for i in range(11)))
    words = ["--data", "images", "--vae", "sd", "--text-encoder", "sd", "--prompts", "c.jsonl", "--image-size", 8, "--batch-size", 4, "--out"]
    make(*words, "whole")
    where, name = {1: (encode, "encode_images"), 3: (data.np, "load"), 5: (encode, "encode_prompts")}[at]
    original, calls = getattr(where, name), []

    def fragile(*args, **kw):
        calls.append(1)
        if len(calls) == (4 if at == 1 else 2):
            raise KeyboardInterrupt
        return original(*args, **kw)
    monkeypatch.setattr(where, name, fragile)
    with pytest.raises(KeyboardInterrupt):
        make(*words, "a")
    monkeypatch.setattr(where, name, original)
    with pytest.raises(UserError, match="cannot be read"):
        data.load("a") if (extra / "a/latents.npy").exists() else data.Latents("a")  # not taken for a whole one
    count = []
    monkeypatch.setattr(encode, "encode_images", lambda vae, x, f=encode.encode_images: count.append(1) or f(vae, x))
    make(*words, "a")
    assert len(count) == (4 if at == 1 else 0)  # two of three pieces, mirror images too; later none is encoded again
    assert "latents.npy" in same(extra / "whole", extra / "a") and "embeddings.npy" in same(extra / "whole", extra / "a")


def test_two_processes_make_the_same_cache(extra, monkeypatch):
    """All 1,797 digits, eight pieces of 250; through the command itself."""
    monkeypatch.setattr(data, "CHUNK", 250)
    monkeypatch.setattr(encode, "CHUNK", 250)
    words = ["encode", "--data", "digits", "--vae", extra / "vae", "--out"]
    make(*words[1:], "one")
    done = torchrun(2, "data.py", *words, extra / "two", env={"PYTHONPATH": str(extra)})
    assert done.stdout.count("1797 images") == 1
    same(extra / "one", extra / "two")
    x = np.load("one/latents.npy")
    want = data.to_float(data.digits().x).reshape(-1, 4, 2, 4, 2).mean((2, 4)).numpy() / 2
    for channel in range(3):
        np.testing.assert_allclose(x[:, 0, 0, channel], want, atol=1e-3)
        np.testing.assert_allclose(x[:, 1, 0, channel], want[:, :, ::-1], atol=1e-3)


def captions(extra, n=7):
    images(extra / "images", n)
    lines = [{"file": f"c{i // 6}/{i:02d}.png", "text": ["ab", "c", ""][i % 3]} for i in range(n)] + [{"file": "elsewhere.png", "text": "x"}]
    (extra / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    make("--data", "images", "--vae", "sd", "--text-encoder", "sd", "--prompts", "c.jsonl", "--image-size", 16, "--out", "cache")
    return data.load("cache")


def test_captions_become_embeddings(extra):
    d = captions(extra)
    e = np.load("cache/embeddings.npy")
    assert e.dtype == np.float16 and e.shape == (3, 5, 3) and json.loads((extra / "cache/prompts.json").read_text()) == ["ab", "c", ""]
    assert e[0].tolist() == [[1, 2, 3], [2, 4, 6], [0] * 3, [0] * 3, [0] * 3] and np.load("cache/labels.npy").tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert d.classes == 0 and d.text == (5, 3) and torch.equal(d.null, torch.zeros(1, 5, 3)) and d.null.dtype == torch.float32
    assert d.shape == (4, 8, 8)
    x, y = first(d, 1, batch=7)[0]
    assert y.shape == (7, 5, 3) and y.dtype == torch.float32 and sorted(y[:, 0, 0].tolist()) == [0, 0, 1, 1, 1, 3, 3]
    text = {"arch": dict(in_channels=4, input_size=8, context="text", context_dim=3), "classes": 0, "scale": 0.5}
    data.check_fits(d, text)
    assert d.y.tolist() == [0, 1, 2, 0, 1, 2, 0]  # not made null labels
    for arch, message in ((dict(text["arch"], context_dim=4), "dimension 3, the network wants 4"), (dict(in_channels=4, input_size=8), "takes labels")):
        with pytest.raises(UserError, match=message):
            data.check_fits(d, {"arch": arch, "classes": 0, "scale": 0.5})
    plain = data.load(latents(extra / "plain", np.zeros((4, 1, 1, 4, 8, 8)), np.zeros(4, int), 0))
    with pytest.raises(UserError, match="has no captions"):
        data.check_fits(plain, {**text, "scale": None})
    np.save("cache/labels.npy", np.full(7, 3))
    with pytest.raises(UserError, match="names rows"):
        data.load("cache")


def test_prompts_alone(extra, capsys):
    (extra / "p.txt").write_text("b\na\n\nb\n")
    make("--prompts", "p.txt", "--text-encoder", "sd", "--out", "p")
    rows, null = data.load_prompts("p")
    assert rows[:, 0, 0].tolist() == [2, 1, 2] and null.shape == (1, 5, 3) and "3 prompts" in capsys.readouterr().out  # a line each, in order
    (extra / "p.jsonl").write_text('{"text": "b"}\n{"text": "a"}\n{"text": "b"}')
    make("--prompts", "p.jsonl", "--text-encoder", "sd", "--out", "q")
    assert (extra / "p/embeddings.npy").read_bytes() == (extra / "q/embeddings.npy").read_bytes()


class TextNet(torch.nn.Module):
    """Its output tells the prompt: the mean of the embedding everywhere."""
    arch, num_classes = dict(in_channels=4, input_size=8, context="text", context_dim=3), 0

    def forward(self, x, t, y):
        assert y.shape[1:] == (5, 3) and y.dtype == torch.float32
        return torch.zeros_like(x) + y.mean((1, 2)).view(-1, 1, 1, 1)


def test_samples_take_prompts_in_turn(extra):
    proc, net = Processes("off"), TextNet()
    info = dict(checkpoints.DIT_DEFAULTS, arch=net.arch, classes=0, grid=None, nfe=2, cfg=3.0, null=torch.full((1, 5, 3), 0.5))
    prompts = torch.arange(3.).view(3, 1, 1).expand(3, 5, 3)
    chunks = {i: (x, y) for i, x, y in data.sample_chunks(net, info, proc, 7, 0, prompts=prompts)}
    assert torch.cat([y for _, y in chunks.values()]).tolist() == [0, 1, 2, 0, 1, 2, 0]
    x, t = torch.zeros(3, 4, 8, 8), torch.zeros(3)
    out = guide(net, 3.0, null=info["null"])(x, t, prompts)
    assert out[:, 0, 0, 0].tolist() == [-1, 2, 5]  # 0.5 + 3 (m - 0.5)
    array = {i: x for i, x, _ in data.sample_chunks(net, info, proc, 7, 0, prompts=prompts.half().numpy())}
    assert all(torch.equal(array[i], chunks[i][0]) for i in array)
    x, y = data.sample_images(net, info, proc, 3, 0, prompts=prompts)
    assert x.shape == (3, 4, 8, 8) and y.tolist() == [0, 1, 2]
    for broken, given, message in ((info, None, "it needs prompts"), (dict(info, arch=dict(net.arch, context=None)), prompts, "takes labels"),
                                   (info, prompts[..., :2], "dimension 2, the network wants 3")):
        with pytest.raises(UserError, match=message):
            next(data.sample_chunks(net, broken, proc, 7, 0, prompts=given))


def test_latents_are_decoded(extra, capsys, monkeypatch):
    net = models.fill_random(models.build(models.make_arch("DiT-Ti/2", 8, 4, 10, False)))
    torch.save(checkpoint(net, scale=0.5, nfe=2), "x.pt")
    call = lambda *words: sample.main(sample.parser().parse_args(["--ckpt", "x.pt", "--num-samples", "6", *words]))
    call("--out", "z.npz")
    assert "--decode" in capsys.readouterr().out
    call("--decode", "vae", "--out", "x.npz")
    with np.load("z.npz") as f, np.load("x.npz") as g:
        assert f["arr_0"].shape == (6, 4, 8, 8) and g["arr_0"].shape == (6, 16, 16, 3) and g["arr_0"].dtype == np.uint8 and g["arr_1"].tolist() == f["arr_1"].tolist()
        want = data.to_uint8(torch.from_numpy(f["arr_0"][:, :3])).numpy().transpose(0, 2, 3, 1).repeat(2, 1).repeat(2, 2)
        np.testing.assert_array_equal(g["arr_0"], want)
    sample.main(sample.parser().parse_args("--compare x.pt x.pt --num-samples 6 --decode sd --out x.png".split()))
    assert Image.open("x.png").size[0] == 6 * 36 + 4
    (extra / "p.txt").write_text("a")
    make("--prompts", "p.txt", "--text-encoder", "sd", "--out", "p")
    for words, message in ((("--out", "x.png"), "name its autoencoder with --decode"), (("--decode", "vq", "--out", "x.png"), "have 3 channels, the model's 4"),
                           (("--prompts", "p"), "--decode"), (("--prompts", "p", "--out", "y.npz"), "takes labels"), (("--prompts", "vae"), "cannot be read")):
        with pytest.raises(UserError, match=message):
            call(*words)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match="pip install diffusers transformers"):
        call("--decode", "vae", "--out", "x.png")


def test_complaints(extra, monkeypatch):
    root = images(extra / "images", 6)
    words = ["--data", "images", "--vae", "vae", "--image-size", 8, "--out", "a"]
    assert "encode what?" in refused("--out", "a")
    assert "--scale 0.0: must be positive" in refused(*words, "--scale", 0)
    assert "cannot be loaded" in refused("--data", "digits", "--vae", "images", "--out", "a")
    for change, message in (({"_class_name": "UNet"}, "it is a UNet"), ({"_class_name": "VQModel", "lacks": ["a.b"]}, "lacks weights: a.b")):
        (extra / "odd").mkdir(exist_ok=True)
        (extra / "odd/config.json").write_text(json.dumps(change))
        assert message in refused("--data", "digits", "--vae", "odd", "--out", "a")
    assert not (extra / "a").exists()
    good = (root / "c0/05.png").read_bytes()
    (root / "c0/05.png").write_bytes(b"broken")
    assert "05.png: cannot be read" in refused(*words)  # the first piece was done
    assert len(list((extra / "a").glob("latents-000000-*.npy"))) == 1
    assert "made with --vae vae, now it is vq" in refused(*[w if w != "vae" else "vq" for w in words])
    assert "made with --scale None, now it is 2.0" in refused(*words, "--scale", 2)
    (root / "c0/05.png").unlink()
    made = []
    monkeypatch.setattr(encode, "encode_images", lambda vae, x, f=encode.encode_images: made.append(len(x)) or f(vae, x))
    make(*words)
    assert made == [1, 1] and len(data.load("a")) == 5  # what was done before the image was removed is kept
    (root / "c0/05.png").write_bytes(good)
    assert "finished cache of other images" in refused(*words)
    assert "holds latents already" in refused("--data", "a", "--out", "b")
    monkeypatch.setattr(encode, "encode_images", lambda vae, x: torch.full((len(x), 2, 4, 4, 4), 1e6))
    assert "too large for float16" in refused(*words[:-1], "b")
    for text, message in (("", "holds no prompts"), ('{"file": "c0/00.png"}', "cannot be read"), ("[1]", "cannot be read"),
                          ('{"file": "x", "text": "a"}', "no line for the image c0/00.png"), ('{"file": "x", "text": "a"}\n' * 2, "names a file twice")):
        (extra / "c.jsonl").write_text(text)
        assert message in refused(*words[:-1], "c", "--prompts", "c.jsonl")
    assert "captions go with a folder of images" in refused("--data", "digits", "--prompts", "images/../vae/config.json", "--out", "c")
    monkeypatch.setitem(sys.modules, "transformers", None)
    (extra / "p.txt").write_text("a")
    assert "pip install diffusers transformers" in refused("--prompts", "p.txt", "--out", "p")


def test_a_full_disk(extra, monkeypatch):
    """The line is runtime.run's or ours, and what was there is kept."""
    images(extra / "images", 6)
    original = data.np.save

    def full(f, x):
        if "000001" in str(f.name):
            raise OSError("2048 requested and 12 written")
        original(f, x)
    monkeypatch.setattr(data.np, "save", full)
    words = ["--data", "images", "--vae", "vae", "--image-size", 8, "--out", "a"]
    assert "free some space and repeat the command" in refused(*words)
    monkeypatch.setattr(data.np, "save", original)
    assert len(list((extra / "a").iterdir())) == 2  # the first piece, and with which arguments
    make(*words)
    assert len(data.load("a")) == 6


def test_the_real_diffusers(tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    shape = dict(block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    vae, vq = diffusers.AutoencoderKL(**shape, latent_channels=4, scaling_factor=0.3), diffusers.VQModel(**shape, latent_channels=3)
    vae.save_pretrained("sd/vae")
    vq.half().save_pretrained("vq")
    images(tmp_path / "images", 6)
    make("--data", "images", "--vae", "sd", "--image-size", 16, "--out", "a")
    d = data.ImageFolder("images", 16)
    with torch.no_grad():
        for flip in (0, 1):
            dist = vae.eval().encode(data.to_float(d[(5, flip)][0])[None]).latent_dist
            np.testing.assert_allclose(np.load("a/latents.npy")[5, flip], 0.3 * torch.stack([dist.mean, dist.std], 1)[0].numpy(), rtol=2e-3, atol=1e-3)
        make("--data", "images", "--vae", "vq", "--image-size", 16, "--out", "b")
        z = vq.float().eval().encode(data.to_float(d[(5, 1)][0])[None]).latents
        np.testing.assert_allclose(np.load("b/latents.npy")[5, 1, 0], z[0].numpy(), rtol=2e-3, atol=1e-3)
        proc = Processes("off")
        z = torch.randn(3, 4, 8, 8)
        want = data.to_uint8(vae.decode(z).sample)
        assert torch.equal(encode.decode_images(encode.load_vae(proc, "sd"), z, 16), want)
    assert encode.decode_images(encode.load_vae(proc, "vq"), torch.randn(2, 3, 8, 8)).shape == (2, 3, 16, 16)
    weights = next((tmp_path / "vq").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be loaded" in refused("--data", "images", "--vae", "vq", "--image-size", 16, "--out", "c")


def test_the_real_transformers(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    words = ["<|startoftext|>", "<|endoftext|>", "a", "b", "a</w>", "b</w>", "ab</w>"]
    (tmp_path / "t").mkdir()
    (tmp_path / "t/vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (tmp_path / "t/merges.txt").write_text("#version: 0.2\na b</w>\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained("t")
    torch.manual_seed(0)
    net = transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=7, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                                                                 bos_token_id=0, eos_token_id=1, pad_token_id=1)).eval()
    for where in ("clip", "sd"):
        tokenizer.save_pretrained("sd/tokenizer" if where == "sd" else where)
        net.half().save_pretrained("sd/text_encoder" if where == "sd" else where)
    (tmp_path / "p.txt").write_text("ab a\nb\n" + "a " * 100)
    make("--prompts", "p.txt", "--text-encoder", "sd", "--out", "x")
    make("--prompts", "p.txt", "--text-encoder", "clip", "--out", "y")
    rows, null = data.load_prompts("x")
    assert rows.shape == (3, 77, 16) and (tmp_path / "x/embeddings.npy").read_bytes() == (tmp_path / "y/embeddings.npy").read_bytes()
    with torch.no_grad():
        for i, ids in enumerate(([0, 6, 4] + [1] * 74, [0, 5] + [1] * 75, [0] + [4] * 75 + [1])):  # start, words, end, and ends to pad
            np.testing.assert_allclose(rows[i], net.float()(torch.tensor([ids])).last_hidden_state[0].numpy(), rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(null, net(torch.tensor([[0] + [1] * 76])).last_hidden_state.numpy(), rtol=2e-3, atol=2e-3)
