"""A flag that has no effect is refused in one line, also by --dry-run and whatever its value."""
import numpy as np
import pytest
import torch
from conftest import checkpoint, inside
from method_runs import write_edm_teacher, write_uncond
from tiny_networks import unet_arch

import models
from kit.cli import UserError


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tiny):
    """Base models of every kind: NAME.pt in the folder."""
    folder = tmp_path_factory.mktemp("bases")
    plain = models.fill_random(models.build({**tiny.arch, "num_classes": 0}))
    text = models.fill_random(models.build(unet_arch("text")))
    kinds = {
        "labels": checkpoint(tiny),
        "none": checkpoint(plain, classes=0),
        "distilled": checkpoint(tiny, grid=[999, 733, 466, 200, -1], nfe=4, method="pd"),
        "w": checkpoint(models.with_guidance(tiny), w=[1.0, 3.0]),
        "text": checkpoint(text, name="SD-v1.5", schedule="sd", scale=0.18215, classes=0, cfg=7.5),
        "no-null": checkpoint(tiny, knows_null=False),
    }
    for kind, held in kinds.items():
        torch.save(held, folder / f"{kind}.pt")
    write_edm_teacher(folder)
    write_uncond(folder / "edm.pt", folder)
    np.savez(folder / "x.npz", np.zeros((2, 8, 8, 1), np.uint8), [0, 1])
    return folder


REFUSED = [  # script, words, the flag that is refused
    ("ddil --ckpt labels.pt --objective lcm --stages 8:2", "--stages"),
    ("ddil --ckpt labels.pt --objective dmd2 --grid dit", "--grid"),
    ("ddil --ckpt labels.pt --objective lcm --weight snr", "--weight"),
    ("ddil --ckpt labels.pt --objective dmd2 --w 1 2", "--w"),
    ("ddil --ckpt labels.pt --w 1 2", "--w"),
    ("ddil --ckpt labels.pt --stages 8:2 --w 1 2", "--w"),
    ("ddil --ckpt labels.pt --steps 5", "--steps"),
    ("ddil --ckpt labels.pt --nfe 4", "--nfe"),
    ("ddil --ckpt labels.pt --dagger 0 0 --beta 0.5 0.5", "--beta"),
    ("ddil --ckpt labels.pt --dagger 0 0 --reuse 2 3", "--reuse"),
    ("ddil --ckpt labels.pt --stages 2:5 --beta 0.5 0.5", "--beta"),
    ("ddil --ckpt labels.pt --objective lcm --nfe 1 --beta 0.5 0.5", "--beta"),
    ("ddil --ckpt distilled.pt --stages 4:2 --grid uniform", "--grid"),
    ("ddil --ckpt none.pt --objective lcm --w 1 2", "--w"),
    ("ddil --ckpt none.pt --cfg 1", "--cfg"),
    ("ddil --ckpt labels.pt --image-size 256", "--image-size"),
    ("ssd --ckpt labels.pt --text-cfg 5 15", "--text-cfg"),
    ("ssd --ckpt text.pt --data x.npz --drop 0.1", "--drop"),
    ("ssd --ckpt text.pt --data x.npz --guided all", "--guided"),
    ("ssd --ckpt text.pt --data x.npz --classes 5", "--classes"),
    ("ssd --ckpt none.pt --drop 0.1", "--drop"),
    ("ssd --ckpt labels.pt --teacher fixed", "--teacher"),
    ("ssd --ckpt labels.pt --interval 0.1", "--interval"),
    ("ssd --ckpt none.pt --cfg 2", "--cfg"),
    ("issd --ckpt none.pt --guided no", "--guided"),
    ("issd --ckpt none.pt --drop 0", "--drop"),
    ("issd --ckpt none.pt --cfg 1", "--cfg"),
    ("issd --ckpt labels.pt --image-size 256", "--image-size"),
    ("issd --image-size 256", "--image-size"),
    ("issd --ckpt labels.pt --data digits --classes 10", "--classes"),
    ("issd --ckpt labels.pt --data synthetic:4 --classes 10", "--classes"),
    ("issd --ckpt none.pt --data x.npz --classes 10", "--classes"),
    ("kd --ckpt labels.pt --student DiT-Na/2 --dropout 0.1", "--dropout"),
    ("kd --ckpt none.pt --student DiT-Na/2 --drop 0.1", "--drop"),
    ("kd --ckpt none.pt --student DiT-Na/2 --cfg 2", "--cfg"),
    ("kd --ckpt edm.pt --image-size 8", "--image-size"),
    ("kd --image-size 8", "--image-size"),
    ("dsd --ckpt labels.pt --data digits", "--data"),
    ("dsd --ckpt labels.pt --loss-weights 1 0", "--loss-weights"),
    ("dsd --ckpt labels.pt --depth 2 --variant dsdn --target next", "--target"),
    ("dsd --ckpt none.pt --w 1 1", "--w"),
    ("dsd --ckpt none.pt --cfg 2", "--cfg"),
    ("dsd --ckpt labels.pt --image-size 64", "--image-size"),
    ("dsd --from-scratch --ckpt labels.pt", "--ckpt"),
    ("dsd --from-scratch --variant tsd", "--variant"),
    ("dsd --from-scratch --w 1 3", "--w"),
    ("dsd --from-scratch --image-size 8", "--image-size"),
    ("dsd --from-scratch --loss-weights 1 0 --depth 8", "--depth"),
    ("dsd --from-scratch --loss-weights 1 0 --target next", "--target"),
    ("dsd --from-scratch --eval-samples 0 --nfe 4", "--nfe"),
    ("dsd --from-scratch --data x.npz --cfg 2", "--cfg"),
    ("train --model DDPM++-8x1 --label-std 1", "--label-std"),
    ("train --model LDM-Bedroom --label-std 1", "--label-std"),
    ("train --ckpt labels.pt --label-std 1", "--label-std"),
    ("train --ckpt labels.pt --image-size 8", "--image-size"),
    ("train --image-size 8", "--image-size"),
    ("train --data x.npz --image-size 8", "--image-size"),
    ("train --classes 10", "--classes"),
    ("train --model LDM-Bedroom --data x.npz --classes 10", "--classes"),
]


def run(bases, monkeypatch, words):
    monkeypatch.chdir(bases)
    script, *words = words.split()
    return inside(f"{script}.py", *words, "--dry-run")


@pytest.mark.parametrize("words, flag", REFUSED)
def test_it_is_refused(bases, monkeypatch, words, flag):
    with pytest.raises(UserError, match=f"^{flag} has no effect with.*; leave it out"):
        run(bases, monkeypatch, words)


@pytest.mark.parametrize("words", [
    "ddil --ckpt labels.pt --objective lcm --w 1 3 --nfe 2 --steps 5",
    "ddil --ckpt labels.pt --stages w:2 8:2 --w 1 3 --grid dit",
    "ddil --ckpt w.pt --stages 8:2 --w 1 2",
    "ddil --ckpt distilled.pt --stages 8:2 --grid dit",
    "issd --ckpt labels.pt --model DiT-Ti/2 --drop 0 --cfg 2 --guided all",
    "issd --model DiT-XL/2 --image-size 512",
    "issd --ckpt labels.pt --data x.npz --classes 10",
    "ssd --ckpt text.pt --data x.npz --text-cfg 5 15 --cfg 2",
    "kd --ckpt edm.pt --dropout 0.1 --drop 0.2 --cfg 2",
    "kd --ckpt edm.pt --uncond uncond.pt --w 1 4",
    "dsd --ckpt labels.pt --w 1 2 --depth 4 --target next",
    "dsd --from-scratch --nfe 4 --cfg 2 --depth 8",
    "train --data x.npz --classes 10 --label-std 1",
])
def test_what_has_an_effect_is_taken(bases, monkeypatch, words):
    assert "FLOP" in run(bases, monkeypatch, words)


NO_NULL = [
    ("issd --ckpt no-null.pt --drop 0.1", "null label"),
    ("issd --ckpt no-null.pt --cfg 2", "null label"),
    ("ssd --ckpt no-null.pt --guided all --cfg 2", "null label"),
    ("ddil --ckpt no-null.pt --cfg 2", "null label"),
    ("ddil --ckpt no-null.pt --objective lcm", "null label"),
    ("ddil --ckpt no-null.pt --stages w:2 8:2", "null label"),
    ("ddil --ckpt no-null.pt --objective dmd2", "null label"),
    ("ddil --ckpt none.pt --stages w:2 8:2", "it knows no classes"),
    ("ddil --ckpt w.pt --stages 8:2 --w 1 4", "scales of guidance from 1 to 3"),
    ("ddil --ckpt w.pt --stages 8:2 --cfg 5", "learns guidance from 1 to 3"),
    ("dsd --ckpt no-null.pt --w 1 3", "null label"),
    ("dsd --ckpt no-null.pt --cfg 2", "null label"),
    ("kd --ckpt no-null.pt --student DiT-Na/2 --drop 0.1", "no null label"),
    ("kd --ckpt no-null.pt --student DiT-Na/2 --w 1 4", "no null label"),
]


@pytest.mark.parametrize("words, says", NO_NULL)
def test_a_null_label_that_was_not_learned(bases, monkeypatch, words, says):
    with pytest.raises(UserError, match=says):
        run(bases, monkeypatch, words)


@pytest.mark.parametrize("words", [
    "issd --ckpt no-null.pt", "ddil --ckpt no-null.pt", "train --ckpt no-null.pt",
    "kd --ckpt no-null.pt --student DiT-Na/2"])
def test_then_no_label_is_dropped_and_the_plan_says_so(bases, monkeypatch, words):
    assert "labels never dropped (the base model has not" in run(bases, monkeypatch, words)


def test_data_without_labels_wants_the_null_label(bases, monkeypatch, tmp_path):
    np.savez(bases / "bare.npz", np.zeros((9, 8, 8, 1), np.uint8))
    for words in ("issd --eval-samples 0 --steps 1 --ckpt no-null.pt", "train --ckpt no-null.pt"):
        script, *words = words.split()
        monkeypatch.chdir(bases)
        with pytest.raises(UserError, match="has no labels, for which the null label stands"):
            inside(f"{script}.py", *words, "--data", "bare.npz", "--out", tmp_path / script)
