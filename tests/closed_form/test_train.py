"""The ordinary diffusion loss where the answer follows from the definitions."""
from argparse import Namespace

import pytest
import torch

import train
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
