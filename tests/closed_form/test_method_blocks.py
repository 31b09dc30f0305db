"""The Method section of every script runs alone, on networks that are not ours.

A reader may paste it: it needs torch, torch.nn as nn, torch.nn.functional as F, math, and what the
script imports from solvers.
"""
import builtins
import dis
import math
import re

import pytest
import torch
from conftest import ROOT
from toys import Layers, Scale, Smooth, SmoothInLogTime, noised_batch, pair_batch, states_and_labels

import ddil
import dsd
import issd
import kd
import solvers
import ssd
import train

SCHEDULE = solvers.make_schedule("linear")
SCRIPTS = ["issd", "ssd", "dsd", "ddil", "kd", "train"]


def method_block(script):
    """The names that the Method section of a script defines, executed alone."""
    text = (ROOT / f"{script}.py").read_text()
    block = text[text.index("# ---- Method"):text.index("# ---- Training")]
    imported = re.search(r"^from solvers import (\([^)]*\)|.*)$", text, re.M)[1]
    space = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional, "math": math}
    for name in re.findall(r"\w+", imported):
        space[name] = getattr(solvers, name)
    exec(compile(block, f"{script}.py, Method", "exec"), space)
    return space


class Foreign(torch.nn.Module):
    """A network as another project has it: convolutions, and a hook called `tap` after each."""

    def __init__(self, out_channels=1, num_classes=10):
        super().__init__()
        self.num_classes = num_classes
        self.embed = torch.nn.Embedding(num_classes + 1, 6)
        self.layers = torch.nn.ModuleList([
            torch.nn.Conv2d(1, 6, 3, padding=1),
            torch.nn.Conv2d(6, 6, 3, padding=1),
            torch.nn.Conv2d(6, out_channels, 3, padding=1),
        ])

    def forward(self, x, t, y, tap=None):
        h = x
        for l, layer in enumerate(self.layers):
            h = layer(h)
            if l == 0:
                h = h + self.embed(y)[:, :, None, None] + t.view(-1, 1, 1, 1) / 1000
            if l < 2:
                h = h.relu()
            h = tap(l, h) if tap else h
        return h


def pair(out_channels=1):
    """A student and a teacher with other weights."""
    torch.manual_seed(0)
    return Foreign(out_channels), Foreign(out_channels)


@pytest.mark.parametrize("script", SCRIPTS)
def test_method_block_names_nothing_from_outside(script):
    """No function of the section looks up a name that neither the section nor Python has."""
    space = method_block(script)
    codes = own_codes(space, f"{script}.py, Method")
    assert codes
    for code in codes:
        for name in names_looked_up(code):
            assert name in space or hasattr(builtins, name), f"{code.co_name} looks up {name}"


def own_codes(space, filename):
    """The code of all functions and methods that were compiled from this file."""
    codes = []
    for value in space.values():
        members = vars(value).values() if isinstance(value, type) else [value]
        for member in members:
            function = member.fget if isinstance(member, property) else member
            function = getattr(function, "__wrapped__", function)  # of torch.no_grad()
            code = getattr(function, "__code__", None)
            if code is not None and code.co_filename == filename:
                codes.append(code)
    return codes


def names_looked_up(code):
    """The global names that a function and the functions within it use."""
    names = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    for constant in code.co_consts:
        if hasattr(constant, "co_code"):
            names |= names_looked_up(constant)
    return names


@pytest.mark.parametrize("script", SCRIPTS)
def test_method_block_can_be_pasted(script):
    """The losses have a gradient on a foreign network."""
    torch.manual_seed(0)
    student, teacher = pair()
    for loss, _ in losses_of(method_block(script), script, student, teacher):
        assert loss > 0
        student.zero_grad()
        loss.backward()
        assert max(float(p.grad.abs().max()) for p in student.parameters()) > 0
        assert all(p.grad is None for p in teacher.parameters())


def losses_of(space, script, student, teacher):
    """The (loss, aux) of every loss in a Method section."""
    b = pair_batch()
    x0, y, s, t, noise = (b[k] for k in ("x0", "y", "s", "t", "noise"))
    u = (t - 100).clamp(min=-1)
    w = torch.full((4,), 2.0)
    x_s = solvers.add_noise(SCHEDULE, x0, noise, s)
    if script == "issd":
        for reading in ("teacher", "student", "literal"):
            yield space["issd_loss"](student, teacher, lam=0.25, reading=reading, **b)
    elif script == "ssd":
        yield space["ssd_loss"](student, teacher, lam=0.25, **b)
        yield space["ssd_loss"](student, teacher, lam=0.25, prediction="v", **b)
        yield space["ssd_text_loss"](student, teacher, lam=0.25, cfg=w, null=torch.tensor([10]),
                                     **b)
    elif script == "dsd":
        yield space["dsd_loss"](student, SCHEDULE, x_s, s, t, u, y)
        yield space["dsd_loss"](student, SCHEDULE, x_s, s, t, u, y, w, teacher=teacher)
        yield space["training_loss"](student, SCHEDULE, x0, y, t, noise)
    elif script == "ddil":
        target = space["pd_target"](teacher, SCHEDULE, x_s, (y,), s, t, u)
        yield space["pd_loss"](student, SCHEDULE, x_s, (y,), s, target)
        taking = taking_a_scale(student)
        yield space["guidance_loss"](taking, teacher, x_s, s, y, w)
        other = taking_a_scale(teacher)
        yield space["lcm_loss"](taking, other, teacher, SCHEDULE, x_s, s, t, y, w)
    elif script == "kd":
        yield space["kd_loss"](student, teacher, SCHEDULE, x0, y, t, noise, prediction="eps",
                               alpha=0.5)
        both = space["guide_with"](teacher, teacher)
        yield space["kd_loss"](student, both, SCHEDULE, x0, y, t, noise, w, prediction="eps")
    else:
        yield space["diffusion_loss"](student, SCHEDULE, x0, y, t, noise)


def taking_a_scale(net):
    return lambda x, t, y, w: net(x, t, y) + 0.1 * w.view(-1, 1, 1, 1)


def test_method_block_of_train_with_a_learned_variance():
    space = method_block("train")
    net, _ = pair(out_channels=2)
    b = pair_batch()
    loss, aux = space["diffusion_loss"](net, SCHEDULE, b["x0"], b["y"], b["t"], b["noise"])
    assert float(loss.detach()) == pytest.approx(float(aux["mse"] + aux["vb"]), rel=1e-6)

    class Draws:
        def integers(self, low, high):
            return torch.arange(low, high)

        def normal(self, shape):
            return torch.zeros(3, *shape)

        def uniform(self):
            return torch.full((3,), 0.5)

    assert torch.equal(space["training_times"](SCHEDULE, Draws()), torch.arange(1000))
    edm = solvers.make_schedule("edm")
    assert space["training_times"](edm, Draws()) == pytest.approx([math.exp(-1.2)] * 3)
    flow = solvers.make_schedule("interpolant")
    assert space["training_times"](flow, Draws()).tolist() == [0.5] * 3
    dropped = torch.tensor([True, False])
    assert space["drop_labels"](torch.tensor([1, 2]), 10, dropped).tolist() == [10, 2]


def test_method_block_of_ddil_rolls_out_aggregates_and_matches():
    """Algorithm 1, Algorithm 2 and DMD2's two losses, which the block has beside its other
    losses."""
    space = method_block("ddil")
    student, teacher = pair()
    y = torch.arange(4)
    w = torch.full((4,), 2.0)
    grid = solvers.make_grid("uniform", 8)
    nodes = solvers.halve_grid(grid)
    paths = (space["ddim_path"](student, SCHEDULE, nodes, (y,)),
             space["ddim_path"](teacher, SCHEDULE, grid, (y,)))
    noise = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        states = space["mixed_rollout"](*paths, noise, nodes, lambda n: torch.arange(4) % 2 == 0)
    assert [len(z) for z in states] == [4] * 5

    D = space["Aggregated"](torch.device("cpu"))
    for state in states[:2]:
        D.add(state, torch.zeros(4, dtype=torch.long), (y,), 4)

    class Certain:
        """Everything comes from D, the last rollout in reverse."""
        def uniform(self):
            return torch.zeros(4)

        def integers(self, low, high):
            return torch.tensor([7, 6, 5, 4])

    z, _, cond = D.mix(Certain(), 0.5, noise, torch.ones(4, dtype=torch.long), (0 * y,))
    assert torch.equal(z, states[1].flip(0))
    assert torch.equal(cond[0], y.flip(0))

    class Blocks(torch.nn.Module):
        """What Critic wants of a network: arch, blocks, and features (B, T, D)."""
        arch = {"hidden_size": 6}
        num_classes = 10

        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(1, 6)])

        def forward(self, x, t, y, tap=None):
            h = self.blocks[0](x.flatten(2).transpose(1, 2))
            h = tap(0, h)
            return h[:, :, :1].transpose(1, 2).view_as(x)

    t = torch.tensor([100, 300, 500, 700])
    critic = space["Critic"](Blocks())
    loss, aux = space["critic_loss"](critic, SCHEDULE, noise, y, 0 * noise, y, t, noise, "eps")
    assert set(aux) == {"denoising", "verdict"}
    loss.backward()
    assert critic.head[1].weight.grad.abs().max() > 0
    x = noise.clone().requires_grad_()
    pull, _ = space["dmd_loss"](x, critic, teacher, SCHEDULE, t, y, w, noise, "eps")
    assert torch.autograd.grad(pull, x)[0].abs().max() > 0


# ---- The same numbers as the scripts' own functions --------------------------------------------


def test_method_block_gives_the_scripts_numbers():
    b = pair_batch()
    layers = Layers([0.6, -0.5, 0.8]), Layers([0.5, -0.7, 0.9])
    own = method_block("issd")["issd_loss"](*layers, lam=0.25, **b)[0]
    assert torch.equal(own, issd.issd_loss(*layers, lam=0.25, **b)[0])
    scales = Scale(0.6), Scale(0.5)
    own = method_block("ssd")["ssd_loss"](*scales, lam=0.25, **b)[0]
    assert torch.equal(own, ssd.ssd_loss(*scales, lam=0.25, **b)[0])
    batch = (Scale(0.6), SCHEDULE, b["x0"], b["y"], b["t"], b["noise"])
    own = method_block("train")["diffusion_loss"](*batch)[0]
    assert torch.equal(own, train.diffusion_loss(*batch)[0])

    z, y = states_and_labels()
    t, mid, u = (torch.full((6,), n) for n in (900, 800, 700))
    own = method_block("dsd")["dsd_loss"](Smooth(), SCHEDULE, z, t, mid, u, y)[0]
    assert torch.equal(own, dsd.dsd_loss(Smooth(), SCHEDULE, z, t, mid, u, y)[0])
    space = method_block("ddil")
    target = space["pd_target"](Smooth(), SCHEDULE, z, (y,), t, mid, u)
    assert torch.equal(target, ddil.pd_target(Smooth(), SCHEDULE, z, (y,), t, mid, u))
    student = Smooth(0.5, -0.5, 0.3)
    own = space["pd_loss"](student, SCHEDULE, z, (y,), t, target)[0]
    assert torch.equal(own, ddil.pd_loss(student, SCHEDULE, z, (y,), t, target)[0])
    assert own > 0

    edm = solvers.make_schedule("edm")
    nets = SmoothInLogTime(0.5, 0.2, 0.1), SmoothInLogTime()
    own = method_block("kd")["kd_loss"](*nets, edm, *noised_batch())[0]
    assert torch.equal(own, kd.kd_loss(*nets, edm, *noised_batch())[0])
