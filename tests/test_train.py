import numpy as np
import pytest
import torch
from test_models import ARCH

import checkpoints
import models
import train
from solvers import add_noise, make_schedule


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_learned_variance_loss_equals_upstream(golden, dtype):
    """mse and vb (bits per dimension) of upstream's training_losses for fixed t and noise, among them t = 0."""
    f, weights = golden("dit_losses.npz"), golden("dit_tiny_p2.npz")
    sd = {k[3:]: torch.from_numpy(weights[k].astype(np.float32)) for k in weights.files if k.startswith("sd/")}
    net = checkpoints.load_weights(models.build(ARCH), sd, "golden").to(dtype)
    s = make_schedule("linear")
    x0, noise = (torch.from_numpy(f[f"p2/{k}"]).to(dtype) for k in ("x0", "noise"))
    t, y, end = torch.from_numpy(f["p2/t"]), torch.from_numpy(f["p2/y"]), "_f64" if dtype == torch.float64 else ""
    assert (t == 0).any()
    np.testing.assert_allclose(add_noise(s, x0, noise, t), f["p2/x_t"], atol=1e-6)
    for i in range(len(t)):
        one = slice(i, i + 1)
        with torch.no_grad():
            loss, info = train.diffusion_loss(net, s, x0[one], y[one], t[one], noise[one])
        assert float(info["mse"]) == pytest.approx(f[f"p2/mse{end}"][i], rel=1e-4)
        assert float(info["vb"]) == pytest.approx(f[f"p2/vb{end}"][i], rel=1e-3)
        assert float(loss) == pytest.approx(f[f"p2/loss{end}"][i], rel=1e-3)


def test_variance_term_trains_only_the_variance():
    s, C = make_schedule("linear"), 2
    out = torch.randn(3, 2 * C, 4, 4, requires_grad=True)
    x0, noise, t = torch.randn(3, C, 4, 4), torch.randn(3, C, 4, 4), torch.tensor([0, 10, 900])
    loss, info = train.diffusion_loss(lambda x, t, y: out, s, x0, None, t, noise)
    (loss - (out[:, :C] - noise).square().mean()).backward()
    assert out.grad[:, :C].abs().max() < 1e-6 < out.grad[:, C:].abs().max()


@pytest.mark.parametrize("prediction,schedule", [("eps", "linear"), ("x0", "cosine"), ("v", "linear"), ("velocity", "interpolant")])
def test_the_right_answer_has_zero_loss(prediction, schedule):
    s = make_schedule(schedule)
    x0, noise = torch.randn(4, 1, 4, 4), torch.randn(4, 1, 4, 4)
    t = torch.rand(4) if s.continuous else torch.randint(1, 1000, (4,))
    alpha, sigma = s.at(t, x0)
    right = {"eps": noise, "x0": x0, "v": alpha * noise - sigma * x0, "velocity": noise - x0}[prediction]
    assert train.diffusion_loss(lambda *a: right, s, x0, None, t, noise, prediction)[0] == 0
    assert train.diffusion_loss(lambda *a: right + 1, s, x0, None, t, noise, prediction)[0] == pytest.approx(1, rel=1e-5)


def test_learning_rate():
    from argparse import Namespace
    args = Namespace(warmup=10, decay="cosine", steps=110)
    factors = [train.learning_rate(n, args) for n in range(110)]
    assert factors[0] == 0.1 and factors[9] == factors[10] == 1 and factors[60] == pytest.approx(0.5) and factors[-1] < 1e-3
    assert train.learning_rate(50, Namespace(warmup=0, decay="constant", steps=100)) == 1
