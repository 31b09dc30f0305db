"""What ssd.py and kd.py refuse, in one line and before anything is trained."""
import pytest
import torch
from conftest import checkpoint, inside
from method_runs import write_edm_teacher

import models
from kit.cli import UserError

# ---- ssd.py ------------------------------------------------------------------------------------

SSD = [  # base model, further words, what the line says
    ("eps", "--only-step 0", "--only-step 0"),
    ("eps", "--only-step 10", "between 1 and 9"),
    ("eps", "--interval 0.1", "--interval"),
    ("eps", "--guided all --cfg 1", "--cfg other than 1"),
    ("eps", "--drop 1.5", "--drop 1.5"),
    ("eps", "--teacher ema", "velocity"),
    ("eps", "--cfg nan", "--cfg nan"),
    ("velocity", "--only-step 2 --interval 0.1", "--interval"),
    ("one node", "", "student of one step"),
    ("takes w", "", "scale of guidance as an input"),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tiny):
    """Base models of every kind that SSD has to look at."""
    folder = tmp_path_factory.mktemp("bases")
    kinds = {
        "eps": checkpoint(tiny),
        "velocity": checkpoint(tiny, prediction="velocity", schedule="interpolant"),
        "one node": checkpoint(tiny, only_node=999),
        "takes w": checkpoint(models.with_guidance(tiny)),
    }
    for kind, held in kinds.items():
        torch.save(held, folder / f"{kind}.pt")
    return folder


@pytest.mark.parametrize("kind, more, says", SSD)
def test_what_it_refuses(tmp_path, bases, kind, more, says):
    with pytest.raises(UserError, match=says):
        inside("ssd.py", "--ckpt", bases / f"{kind}.pt", *more.split(), "--eval-samples", 0,
               "--dry-run", "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()


# ---- kd.py -------------------------------------------------------------------------------------

KD = [
    ("--w 2 4 --cfg 1", "learns guidance from 2 to 4"),
    ("--w 1 4 --alpha 0.5", "neither with --alpha"),
    ("--w 1 4 --drop 0.1", "nor with --drop"),
    ("--w 4 1", "in their order"),
    ("--uncond x.pt", "say how far with --w"),
    ("--w 1 4 --uncond x.pt", "--uncond x.pt: no such file"),
    ("--w 1 4 --uncond TEACHER", "must be like the network that it guides"),
    ("--w 1 4 --uncond DDPM++-t-uncond", "must be like the network that it guides"),
    ("--nfe 10", "odd"),
    ("--nfe 1", "--nfe 1"),
    ("--student DiT-Na/2", r"EDM's teachers want a DDPM\+\+"),
    ("--student DDPM++-8x1-uncond", "the same classes"),
    ("--student DDPM++-48x1", "unknown"),
    ("--half-life 0", "must be positive"),
    ("--alpha 2", "between 0 and 1"),
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_edm_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.mark.parametrize("more, says", KD)
def test_refusals(tmp_path, teacher, more, says):
    with pytest.raises(UserError, match=says):
        inside("kd.py", "--ckpt", teacher, "--dry-run", "--out", tmp_path / "x",
               *more.replace("TEACHER", str(teacher)).split())
    assert not (tmp_path / "x").exists()


KD_OTHERS = [
    ("--ckpt DIT", "say which network the student is"),
    ("--ckpt DIT --student DDPM++-8x1", "others a DiT"),
    ("--model LDM-ImageNet --student LDM-ImageNet --w 1 4", "without --w"),
    ("--model LDM-ImageNet --student SD-KD", "those with prompts"),
    ("--model SD-v1.5", "give --data LATENTS"),
    ("--model DDPM++-t --drop 0.1", "no null label"),
    ("--model DDPM++-t --cfg 2", "no null label"),
    ("--ckpt DIT --student DiT-Na/2 --w 1 2 --cfg 3", "learns guidance from 1 to 2"),
]


@pytest.mark.parametrize("more, says", KD_OTHERS)
def test_refusals_of_other_teachers(tmp_path, ckpt, more, says):
    command = [ckpt if word == "DIT" else word for word in more.split()]
    with pytest.raises(UserError, match=says):
        inside("kd.py", "--dry-run", "--out", tmp_path / "x", *command)
