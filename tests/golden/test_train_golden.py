"""The ordinary diffusion loss against numbers of upstream DiT."""
import numpy as np
import pytest
import torch
from tiny_networks import DIT_ARCH, golden_network, tensors

import train
from solvers import add_noise, make_schedule


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_learned_variance_loss_equals_upstream(golden, dtype):
    """mse and vb (bits per dimension) of upstream's training_losses for fixed t and noise, among
    them t = 0."""
    f = golden("dit_losses.npz")
    net = golden_network(DIT_ARCH, golden("dit_tiny_p2.npz")).to(dtype)
    s = make_schedule("linear")
    x0, noise, t, y = tensors(f, "p2/x0", "p2/noise", "p2/t", "p2/y")
    x0 = x0.to(dtype)
    noise = noise.to(dtype)
    end = "_f64" if dtype == torch.float64 else ""
    assert (t == 0).any()
    np.testing.assert_allclose(add_noise(s, x0, noise, t), f["p2/x_t"], atol=1e-6)
    for i in range(len(t)):
        one = slice(i, i + 1)
        with torch.no_grad():
            loss, aux = train.diffusion_loss(net, s, x0[one], y[one], t[one], noise[one])
        assert float(aux["mse"]) == pytest.approx(f[f"p2/mse{end}"][i], rel=1e-4)
        assert float(aux["vb"]) == pytest.approx(f[f"p2/vb{end}"][i], rel=1e-3)
        assert float(loss) == pytest.approx(f[f"p2/loss{end}"][i], rel=1e-3)
