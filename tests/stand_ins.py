"""Stand-ins for the optional packages diffusers and transformers, of a few lines each, whose
arithmetic is known; and the command that encodes with them."""
import json
import sys
import types

import pytest
from small_data import random_image

from kit import encode, sampling
from kit.cli import UserError

DIFFUSERS = '''
import json
from pathlib import Path
from types import SimpleNamespace as Record
import torch
import torch.nn.functional as F

class Autoencoder(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = Record(**config)
        self.w = torch.nn.Parameter(torch.ones(1, dtype=torch.float16))

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
        rows = [[ord(c) - 96 for c in text] + [0] * max_length for text in texts]
        return Record(input_ids=torch.tensor([row[:max_length] for row in rows]))

class CLIPTextModel(torch.nn.Module):
    """Token n in dimension d gives n (d + 1)."""
    config = Record(max_position_embeddings=5)
    device = torch.device("cpu")

    @classmethod
    def from_pretrained(cls, name, subfolder, output_loading_info):
        (Path(name) / subfolder / "config.json").read_text()
        return cls(), {"missing_keys": []}

    def forward(self, ids):
        return Record(last_hidden_state=ids[..., None] * torch.arange(1., 4))
'''


@pytest.fixture
def extra(tmp_path, monkeypatch):
    """The folder of the stand-ins, and the current one. In it lie the autoencoders `vae` and `vq`
    and the pipeline `sd`. Chunks have four rows."""
    for name, code in (("diffusers", DIFFUSERS), ("transformers", TRANSFORMERS)):
        (tmp_path / f"{name}.py").write_text(code)  # for other processes
        module = types.ModuleType(name)
        exec(code, module.__dict__)
        monkeypatch.setitem(sys.modules, name, module)
    kl = {"_class_name": "AutoencoderKL", "scaling_factor": 0.5, "latent_channels": 4}
    vq = {"_class_name": "VQModel", "scaling_factor": 0.5, "latent_channels": 3}
    for place, config in (("vae", kl), ("vq", vq), ("sd/vae", kl), ("sd/text_encoder", {})):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "config.json").write_text(json.dumps(config))
    (tmp_path / "sd" / "tokenizer").mkdir()
    (tmp_path / "sd" / "tokenizer" / "vocab.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sampling, "CHUNK", 4)
    monkeypatch.setattr(encode.os, "cpu_count", lambda: 0)  # no workers
    return tmp_path


def images(folder, n=11, each=6):
    """n images of 12 x 16 pixels in two sub-folders."""
    for i in range(n):
        path = folder / f"c{i // each}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        random_image(i, 12, 16).save(path)
    return folder


def make(*words):
    """python -m kit.encode WORDS, in this process."""
    encode.main(encode.parser().parse_args([str(word) for word in words]))


def refused(*words):
    """The one line with which the command ends."""
    with pytest.raises(UserError) as e:
        make(*words)
    assert "\n" not in str(e.value)
    return str(e.value)
