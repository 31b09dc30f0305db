"""EDM's networks, loss and sampler where the answer follows from the definitions."""
import copy

import pytest
import torch
from tiny_networks import digits_net

import models
import train
from kit.processes import Processes, StepRandom
from solvers import (
    from_x0_eps,
    guide,
    make_grid,
    make_schedule,
    predictor,
    sample_states,
    to_x0_eps,
)

EDM = make_schedule("edm")


# ---- Names and fresh networks ------------------------------------------------------------------


def test_names_and_other_sizes():
    arch = models.make_arch("DDPM++-32", 8, 1, 10)  # two levels
    assert arch["attn_resolutions"] == [8]
    assert models.build(arch).sample_shape == (1, 8, 8)
    assert models.make_arch("DDPM++-32", 64, 3, 0)["attn_resolutions"] == [16]
    assert models.make_arch("DDPM++-t-uncond", 32, 3, 10)["num_classes"] == 0
    small = models.make_arch("DDPM++-24x1-uncond", 32, 3, 10)
    assert small["model_channels"] == 24
    assert small["num_blocks"] == 1
    assert small["channel_mult"] == [2, 2, 2]
    assert small["num_classes"] == 0
    assert models.make_arch("DDPM++-4x1", 8, 1, 10)["channel_mult"] == [2, 2]


def relative_bound(layer):
    """The largest weight in units of Xavier's bound."""
    fan_in = layer.weight[0].numel()
    fan_out = layer.weight[:, 0].numel()
    return float(layer.weight.detach().abs().max()) / (6 / (fan_in + fan_out)) ** 0.5


def test_fresh_weights_are_upstreams():
    arch = models.make_arch("DDPM++-32", 8, 1, 10)
    net = models.build({**arch, "guidance": True})
    block = net.model["enc"]["8x8_block0"]
    gains = [
        (block.conv0, 1),
        (block.conv1, 1e-5),
        (block.qkv, 0.2 ** 0.5),
        (block.proj, 1e-5),
        (net.out[1], 1e-5),
        (net.model["map_layer0"], 1),
    ]
    for layer, gain in gains:
        assert relative_bound(layer) == pytest.approx(gain, rel=0.03)
        assert layer.bias.abs().max() == 0
    assert net.w_embedder.weight.abs().max() == 0


# ---- Inputs and modes of the network -----------------------------------------------------------


def test_guidance_as_an_input_is_ignored_at_first():
    net = digits_net()
    x = torch.randn(3, 1, 8, 8)
    t = torch.tensor([0.1, 1.0, 50.0])
    y = torch.tensor([1, 2, 10])
    w = torch.tensor([1.0, 2.0, 3.0])
    new = models.with_guidance(net)
    assert torch.equal(new(x, t, y, w), net(x, t, y))
    assert new.arch == {**net.arch, "guidance": True}
    assert models.build(new.arch).arch == new.arch

    new.w_embedder.weight.data.normal_()
    assert (new(x, t, y, w) - new(x, t, y, w + 1)).abs().max() > 1e-4
    assert torch.equal(guide(new, w)(x, t, y), new(x, t, y, w))

    # Guidance of F is guidance of D:
    null, _ = to_x0_eps(EDM, x, net(x, t, torch.full_like(y, 10)), t, "edm")
    cond, _ = to_x0_eps(EDM, x, net(x, t, y), t, "edm")
    guided, _ = to_x0_eps(EDM, x, guide(net, 2.5)(x, t, y), t, "edm")
    torch.testing.assert_close(guided, null + 2.5 * (cond - null))


def test_dropout_can_be_set_and_is_the_same_for_any_number_of_processes():
    net = digits_net()
    x = torch.randn(4, 1, 8, 8)
    t = torch.rand(4) + 0.1
    y = torch.arange(4)
    plain = net.eval()(x, t, y)
    assert torch.equal(net.train()(x, t, y), plain)  # none unless it is set

    net.dropout = 0.5
    net.rng = StepRandom(Processes("off"), 0, 5, 4)
    whole = net(x, t, y)
    assert (whole - plain).abs().max() > 1e-3
    assert torch.equal(net.eval()(x, t, y), plain)

    rank = Processes("off")
    rank.world = 2
    rank.rank = 1
    net.rng = StepRandom(rank, 0, 5, 4)
    torch.testing.assert_close(net.train()(x[2:], t[2:], y[2:]), whole[2:])

    h = torch.ones(4, 100, 10, 10)
    net.rng = None
    assert abs(float(net.drop(1, h).mean()) - 1) < 0.02
    assert set(net.drop(1, h).unique().tolist()) == {0.0, 2.0}


def test_half_precision_and_copies():
    """Under bf16 a frozen copy, whose weights are stored in bf16, gives the same bits. A copy's
    blocks are its own."""
    net = digits_net()
    x = torch.randn(4, 1, 8, 8)
    t = torch.tensor([0.002, 0.1, 1.0, 80.0])
    y = torch.tensor([0, 3, 9, 10])
    proc = Processes("bf16")
    other = copy.deepcopy(net)
    assert other.blocks[1] is other.model["enc"]["8x8_block0"]
    assert other.out[1] is other.model["dec"]["8x8_aux_conv"]

    half = proc.autocast(proc.frozen(other))(x, t, y)
    assert other.blocks[1].conv0.weight.dtype == torch.bfloat16
    assert torch.equal(half, proc.autocast(net.eval())(x, t, y))
    whole = net(x, t, y)
    assert half.dtype == torch.float32
    assert 0 < (half - whole).abs().max() < 0.05 * whole.abs().max()

    double = copy.deepcopy(net).double()(x.double(), t.double(), y)
    torch.testing.assert_close(double.float(), whole, rtol=1e-4, atol=1e-5)


# ---- The prediction, the sampler, the loss -----------------------------------------------------


def test_prediction_and_its_inverse():
    g = torch.Generator().manual_seed(0)
    x0 = torch.randn(6, 2, 4, 4, generator=g, dtype=torch.float64)
    eps = torch.randn(6, 2, 4, 4, generator=g, dtype=torch.float64)
    t = torch.tensor([0.002, 0.1, 0.5, 1, 10, 80], dtype=torch.float64)
    s = t.view(-1, 1, 1, 1)
    x = x0 + s * eps
    out = from_x0_eps(EDM, x0, eps, t, "edm")
    x0_back, eps_back = to_x0_eps(EDM, x, out, t, "edm")
    torch.testing.assert_close(x0_back, x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(eps_back, eps, rtol=1e-9, atol=1e-9)
    c_skip = 0.25 / (s ** 2 + 0.25)
    c_out = 0.5 * s / (s ** 2 + 0.25).sqrt()
    torch.testing.assert_close(out, (x0 - c_skip * x) / c_out, rtol=1e-6, atol=1e-6)


MU, STD = 0.3, 0.5  # Gaussian data N(MU, STD^2), whose ODE is known


def exact_end(schedule, x, t, u):
    """The state at u on the ODE's path through x at t, for the Gaussian data."""
    alpha_t, sigma_t = schedule.alpha_sigma(t, x)
    alpha_u, sigma_u = schedule.alpha_sigma(u, x)
    variance_t = alpha_t ** 2 * STD ** 2 + sigma_t ** 2
    variance_u = alpha_u ** 2 * STD ** 2 + sigma_u ** 2
    return alpha_u * MU + (variance_u / variance_t).sqrt() * (x - alpha_t * MU)


@pytest.mark.parametrize("name", ["edm", "linear"])
def test_heun_is_of_second_order(name):
    """On Gaussian data. The discrete schedule is followed in sigma / alpha."""
    schedule = make_schedule(name)
    prediction = "edm" if name == "edm" else "eps"

    def net(x, t, y):
        alpha, sigma = schedule.alpha_sigma(t, x)
        eps = sigma * (x - alpha * MU) / (alpha ** 2 * STD ** 2 + sigma ** 2)
        x0 = (x - sigma * eps) / alpha
        return from_x0_eps(schedule, x0, eps, t, prediction)

    def error(grid, solver):
        noise = torch.linspace(-2, 2, 8, dtype=torch.float64).view(8, 1, 1, 1)
        predict = predictor(net, None, schedule, prediction)
        states = sample_states(predict, noise, schedule, grid, solver)
        before_last = exact_end(schedule, states[0], grid[0], grid[-2])
        return float((states[-2] - before_last).abs().max())  # the last step is Euler's

    if name == "edm":
        grids = [make_grid("edm", n) for n in (20, 40, 80)]
    else:
        grids = []
        for n in (10, 20, 40):
            grids.append([900 - 800 * i // n for i in range(n + 1)] + [0])
    heun = [error(grid, "heun") for grid in grids]
    euler = [error(grid, "ddim") for grid in grids]
    ratios = [coarse / fine for coarse, fine in zip(heun, heun[1:])]
    assert heun[-1] < euler[-1] / 5
    assert all(3 < ratio < 5.5 for ratio in ratios), (ratios, heun, euler)


def test_times_of_training():
    def rng():
        return StepRandom(Processes("off"), 0, 0, 20000)

    log = train.training_times(EDM, rng()).log()
    assert abs(float(log.mean()) + 1.2) < 0.03
    assert abs(float(log.std()) - 1.2) < 0.03
    linear = train.training_times(make_schedule("linear"), rng())
    assert torch.equal(linear, rng().integers(0, 1000))
    interpolant = train.training_times(make_schedule("interpolant"), rng())
    assert torch.equal(interpolant, rng().uniform())
