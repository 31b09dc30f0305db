"""The same step with less memory, saves by the clock, more processes."""
import copy
import os
import signal
import time

import pytest
import torch
from conftest import inside, largest_difference, losses, weights
from processes import (
    TORCHRUN,
    children,
    script,
    start_and_signal,
    start_python,
    wait_for_step,
    workers,
)

import models
from kit.cli import UserError
from kit.run import adamw

COMMON = "--batch-size 8 --eval-samples 0 --log-every 1 --lr 1e-3"
COMMANDS = {  # six steps of every method
    "issd": "issd.py --steps 6 --reading student",
    "ssd": "ssd.py --steps 6",
    "dsd": "dsd.py --steps 6 --depth 4 --w 1 3 --variant tsd",
    "pd": "ddil.py --stages 8:3 4:3 --dagger 0.5 0.5",
    "lcm": "ddil.py --objective lcm --steps 6",
    "dmd2": "ddil.py --objective dmd2 --steps 6",
    "kd": "kd.py --student DiT-Na/2 --nfe 10 --steps 6 --alpha 0.3",
}


def command(name, ckpt, out, *more):
    return [*f"{COMMANDS[name]} --ckpt {ckpt} {COMMON} --out {out}".split(), *more]


@pytest.mark.parametrize("name", COMMANDS)
def test_parts_and_recomputed_activations_make_the_same_step(tmp_path, ckpt, name):
    inside(*command(name, ckpt, tmp_path / "a"))
    inside(*command(name, ckpt, tmp_path / "b", "--accumulate", 4, "--grad-checkpointing"))
    a = losses(tmp_path / "a")
    assert losses(tmp_path / "b") == pytest.approx(a, rel=1e-4)
    assert min(a) > 0 and len(a) == 6
    trained = weights(tmp_path / "a")
    assert largest_difference(trained, weights(tmp_path / "b")) < 2e-4
    if name != "kd":  # whose student starts from random weights
        start = torch.load(ckpt, weights_only=True)["model"]
        assert largest_difference(trained, start) > 1e-3


def test_training_from_scratch_in_parts_with_dropout(tmp_path):
    """A DDPM++ draws the same masks for a part of the batch, and again in the backward pass."""
    def run(out, *more):
        text = ("train.py --model DDPM++-8x1 --data digits --steps 5 --batch-size 8 --lr 1e-3 "
                f"--log-every 1 --out {tmp_path / out}")
        inside(*text.split(), *more)
    run("a")
    run("b", "--accumulate", 2, "--grad-checkpointing")
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=1e-5)
    assert largest_difference(weights(tmp_path / "a"), weights(tmp_path / "b")) < 1e-4
    net = models.fill_random(models.build(models.make_arch("DDPM++-8x1", 8, 1, 0)), std=0.1)
    net.train().dropout = 0.5
    x = torch.randn(4, 1, 8, 8)
    t = torch.full((4,), 0.5)
    y = torch.zeros(4, dtype=torch.long)
    assert not torch.equal(net(x, t, y), net(x, t, y))


@pytest.mark.parametrize("more,says", [
    ("--accumulate 3", "--accumulate 3: must divide a process's share of the batch, 8"),
    ("--accumulate 0", "--accumulate 0"),
    ("--save-minutes nan", "must be positive"),
])
def test_what_does_not_go(tmp_path, ckpt, more, says):
    with pytest.raises(UserError, match=says):
        inside(*command("issd", ckpt, tmp_path, *more.split(), "--dry-run"))


@pytest.mark.parametrize("words", [
    "issd.py --grad-checkpointing",
    "train.py --model DDPM++-8x1 --data digits",
    "train.py --model DDPM++-8x1 --data digits --grad-checkpointing",
])
def test_compiled_networks_make_the_same_step(tmp_path, ckpt, words, monkeypatch):
    """As on a GPU by default, but without its code generator: the blocks are traced, whatever
    stands around them."""
    if "checkpointing" in words and torch.__version__ < "2.6":
        pytest.skip("compiling what is computed again: seen to fail on torch 2.4, to work on 2.15")
    graphs = []
    original = torch.nn.Module.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def traced(self, **kw):
        return original(self, backend=backend, **kw)
    monkeypatch.setattr(torch.nn.Module, "compile", traced)

    def run(out, *more):
        base = f"--ckpt {ckpt} --eval-samples 0" if words.startswith("issd") else ""
        text = f"{words} {base} --steps 4 --batch-size 8 --log-every 1 --out {tmp_path / out}"
        inside(*text.split(), *more)
    run("a")
    run("b", "--compile")
    assert graphs
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=1e-5)
    assert largest_difference(weights(tmp_path / "a"), weights(tmp_path / "b")) < 1e-5


def test_moments_lie_as_the_weights_do():
    """A run with channels last (a GPU's U-Net) continues where they are not, and the other way."""
    nets = [torch.nn.Conv2d(3, 4, 3) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    nets[1].to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8)
    opts = [adamw(net, 0.1) for net in nets]

    def step(i):
        nets[i](x).square().sum().backward()
        opts[i].step()
        opts[i].zero_grad()

    for i in (0, 1, 0):
        step(i)
    other = adamw(nets[0], 0.1)
    nets[0].load_state_dict(nets[1].state_dict())
    other.load_state_dict(copy.deepcopy(opts[1].state_dict()))
    opts[0] = other
    step(0)
    step(1)
    torch.testing.assert_close(nets[0].weight, nets[1].weight)


def test_saves_by_the_clock(tmp_path, ckpt):
    words = (f"issd.py --steps 500 --ckpt {ckpt} {COMMON} --reading student --out {tmp_path} "
             "--save-every 1000 --save-minutes 0.0001")
    start_and_signal(words.split(), tmp_path, 5, signal.SIGKILL)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] >= 4


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="finds the workers in /proc")
def test_three_processes_one_of_which_is_lost_and_two_that_resume_them(tmp_path, ckpt):
    """They agree with one process. The loss of one ends all within a minute and with one line. The
    next launch continues from the last checkpoint."""
    def run(out, *more):
        text = (f"issd.py --ckpt {ckpt} --steps 14 --batch-size 12 --lr 1e-4 --eval-samples 0 "
                f"--log-every 1 --save-every 4 --out {tmp_path / out}")
        return [*text.split(), *more]
    part = tmp_path / "part"
    inside(*run("one"))
    p = start_python(*TORCHRUN, 3, *run("part"))
    wait_for_step(p, part, 6)
    os.kill(children(p.pid)[2], signal.SIGKILL)
    began = time.time()
    output = p.communicate(timeout=60)[1]
    assert p.returncode != 0 and time.time() - began < 60
    assert output.count("another process of this job was lost") == 1, output
    assert "SIGKILL" in output, output
    assert 4 <= torch.load(part / "last.pt", weights_only=True)["step"] < 14
    one = losses(tmp_path / "one")
    assert losses(part)[:6] == pytest.approx(one[:6], rel=1e-4)
    assert min(one) > 0
    workers(2, *run("part", "--accumulate", 2))
    assert losses(part) == pytest.approx(one, rel=1e-4)
    assert largest_difference(weights(part), weights(tmp_path / "one")) < 1e-5


def test_the_benchmark_shrunk():
    methods = ("issd", "pd", "dsd", "kd", "sampling")
    common = "benchmarks/throughput.py --model DiT-Na/2 --batch-size 1"
    out = script(*f"{common} --student DiT-Na/2 --repeats 1 --methods".split(), *methods).stdout
    assert all(f"{name}: ours is " in out for name in methods)
    assert "TFLOP/s" in out
    out = script(*f"{common} --methods issd --losses 2".split()).stdout
    assert "relative difference" in out
