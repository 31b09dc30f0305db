"""The ordinary diffusion loss where the answer follows from the definitions."""
from argparse import Namespace

import pytest
import torch

import kd
import train
from kit.base import describe_digits_teacher, describe_new
from solvers import make_schedule


def test_variance_term_trains_only_the_variance():
    s = make_schedule("linear")
    C = 2
    out = torch.randn(3, 2 * C, 4, 4, requires_grad=True)
    x0 = torch.randn(3, C, 4, 4)
    noise = torch.randn(3, C, 4, 4)
    t = torch.tensor([0, 10, 900])
    loss, _ = train.diffusion_loss(lambda x, t, y: out, s, x0, None, t, noise)
    (loss - (out[:, :C] - noise).square().mean()).backward()
    assert out.grad[:, :C].abs().max() < 1e-6 < out.grad[:, C:].abs().max()


@pytest.mark.parametrize("prediction, schedule", [
    ("eps", "linear"), ("x0", "cosine"), ("v", "linear"), ("velocity", "interpolant")])
def test_the_right_answer_has_zero_loss(prediction, schedule):
    s = make_schedule(schedule)
    x0 = torch.randn(4, 1, 4, 4)
    noise = torch.randn(4, 1, 4, 4)
    t = torch.rand(4) if s.continuous else torch.randint(1, 1000, (4,))
    alpha, sigma = s.alpha_sigma(t, x0)
    answers = {"eps": noise, "x0": x0, "v": alpha * noise - sigma * x0, "velocity": noise - x0}
    right = answers[prediction]

    def loss(out):
        return train.diffusion_loss(lambda *_: out, s, x0, None, t, noise, prediction)[0]

    assert loss(right) == 0
    assert loss(right + 1) == pytest.approx(1, rel=1e-5)


def test_learning_rate():
    args = Namespace(warmup=10, decay="cosine", steps=110)
    factors = [train.learning_rate(n, args) for n in range(110)]
    assert factors[0] == 0.1
    assert factors[9] == factors[10] == 1
    assert factors[60] == pytest.approx(0.5)
    assert factors[-1] < 1e-3
    assert train.learning_rate(50, Namespace(warmup=0, decay="constant", steps=100)) == 1


def test_edms_ramps_count_what_was_seen_before_a_step():
    """training_loop.py: lr min(seen / rampup, 1); beta 0.5 ** (batch / min(half-life, seen / 20)).
    """
    args = Namespace(warmup=10, decay="constant", steps=110)
    batch = 512
    half_life = 500_000
    decay = 0.5 ** (batch / half_life)
    for step in (0, 1, 5, 9, 10, 1000, 50_000):
        seen = step * batch
        rate = min(seen / (10 * batch), 1)
        assert train.learning_rate(step, args, first=0) == pytest.approx(rate)
        beta = 0.5 ** (batch / max(min(half_life, 0.05 * seen), 1e-8))
        assert train.edm_decay(step, decay) == pytest.approx(beta)
        assert kd.ema_decay(seen, batch, half_life) == pytest.approx(beta)
    assert train.edm_decay(0, decay) == 0


# ---- The description of a new network ----------------------------------------------------------

SCHEDULES = {"LDM-ImageNet": "ldm", "LDM-CelebAHQ": "ldm", "LDM-FFHQ": "ldm", "LDM-Bedroom": "ldm",
             "LDM-Churches": "ldm-churches", "SD-v1.5": "sd", "SD-KD": "sd", "DiT-S/2": "linear",
             "SiT-S/2": "interpolant"}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_new_network_has_the_schedule_of_its_own_configuration(name):
    args = Namespace(model=name, schedule=None)
    latents = Namespace(scale=1.0, shape=(4, 32, 32), classes=10)
    spec = describe_new(args, latents, learn_sigma=True)
    assert spec["schedule"] == SCHEDULES[name]
    assert spec["knows_null"] and spec["classes"] == spec["arch"]["num_classes"]
    is_unconditional = not spec["classes"] and not name.startswith("SD")
    assert (spec["cfg"] == 1) == is_unconditional


def test_new_edm_networks_learn_the_null_label():
    args = Namespace(model="DDPM++-8x1", schedule=None)
    pixels = Namespace(scale=None, shape=(1, 8, 8), classes=10)
    spec = describe_new(args, pixels, learn_sigma=True)
    assert (spec["schedule"], spec["knows_null"], spec["cfg"]) == ("edm", True, 1.0)
    assert describe_digits_teacher("edm")["knows_null"]
