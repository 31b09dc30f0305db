"""The same step with less memory, saves by the clock, more processes."""
import copy
import os
import signal
import time

import pytest
import torch
from conftest import inside, losses, script, torchrun, weights
from test_runs import children, start, start_and_signal

import models
import runtime
from runtime import UserError

COMMON = ["--batch-size", 8, "--eval-samples", 0, "--log-every", 1, "--lr", 1e-3]
COMMANDS = {  # six steps of every method
    "issd": ["issd.py", "--steps", 6, "--reading", "student"], "ssd": ["ssd.py", "--steps", 6], "dsd": ["dsd.py", "--steps", 6, "--depth", 4, "--w", 1, 3, "--variant", "tsd"],
    "pd": ["ddil.py", "--stages", "8:3", "4:3", "--dagger", 0.5, 0.5], "lcm": ["ddil.py", "--objective", "lcm", "--steps", 6], "dmd2": ["ddil.py", "--objective", "dmd2", "--steps", 6],
    "kd": ["kd.py", "--student", "DiT-Na/2", "--nfe", 10, "--steps", 6, "--alpha", 0.3],
}


def command(name, ckpt, out, *more):
    return [*COMMANDS[name], "--ckpt", ckpt, *COMMON, "--out", out, *more]


def close(a, b):
    return max(float((a[k] - v).abs().max()) for k, v in b.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_parts_and_recomputed_activations_make_the_same_step(tmp_path, ckpt, name):
    inside(*command(name, ckpt, tmp_path / "a"))
    inside(*command(name, ckpt, tmp_path / "b", "--accumulate", 4, "--grad-checkpointing"))
    a, b = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert b == pytest.approx(a, rel=1e-4) and min(a) > 0 and len(a) == 6
    start = torch.load(ckpt, weights_only=True)["model"]
    assert close(weights(tmp_path / "a"), weights(tmp_path / "b")) < 2e-4
    if name != "kd":
        assert close({k: v for k, v in weights(tmp_path / "a").items() if k in start}, {k: v for k, v in start.items() if "w_embedder" not in k}) > 1e-3


def test_training_from_scratch_in_parts_with_dropout(tmp_path):
    """A DDPM++ draws the same masks for a part of the batch, and again in the backward pass."""
    run = lambda out, *more: inside("train.py", "--model", "DDPM++-8x1", "--data", "digits", "--steps", 5, "--batch-size", 8, "--lr", 1e-3, "--log-every", 1, "--out", tmp_path / out, *more)
    run("a"), run("b", "--accumulate", 2, "--grad-checkpointing")
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=1e-5) and close(weights(tmp_path / "a"), weights(tmp_path / "b")) < 1e-4
    net = models.fill_random(models.build(models.make_arch("DDPM++-8x1", 8, 1, 0)), std=0.1)
    net.train().dropout = 0.5
    x, t, y = torch.randn(4, 1, 8, 8), torch.full((4,), 0.5), torch.zeros(4, dtype=torch.long)
    assert not torch.equal(net(x, t, y), net(x, t, y))


def test_what_does_not_go(tmp_path, ckpt):
    for more, says in (("--accumulate 3", "--accumulate 3: must divide a process's share of the batch, 8"), ("--accumulate 0", "--accumulate 0"), ("--save-minutes nan", "must be positive")):
        with pytest.raises(UserError, match=says):
            inside(*command("issd", ckpt, tmp_path, *more.split(), "--dry-run"))


@pytest.mark.parametrize("words", ["issd.py --grad-checkpointing", "train.py --model DDPM++-8x1 --data digits", "train.py --model DDPM++-8x1 --data digits --grad-checkpointing"])
def test_compiled_networks_make_the_same_step(tmp_path, ckpt, words, monkeypatch):
    """As on a GPU by default, but without its code generator: the blocks are traced, whatever stands around them."""
    if "checkpointing" in words and torch.__version__ < "2.6":
        pytest.skip("compiling what is computed again: seen to fail on torch 2.4, to work on 2.15")
    script, *more = words.split()
    run = lambda out, *w: inside(script, *more, *(["--ckpt", ckpt, "--eval-samples", 0] if script == "issd.py" else []), "--steps", 4, "--batch-size", 8, "--log-every", 1, "--out", out, *w)
    graphs = []
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: compile(self, backend=lambda g, inputs: graphs.append(g) or g.forward, **kw))
    run(tmp_path / "a"), run(tmp_path / "b", "--compile")
    assert graphs and losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=1e-5) and close(weights(tmp_path / "a"), weights(tmp_path / "b")) < 1e-5


def test_moments_lie_as_the_weights_do():
    """A run with channels last (a GPU's U-Net) that continues where they are not, and the other way."""
    nets = [torch.nn.Conv2d(3, 4, 3) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    nets[1].to(memory_format=torch.channels_last)
    x, opts = torch.randn(2, 3, 8, 8), [runtime.adamw(net, 0.1) for net in nets]

    def step(i):
        nets[i](x).square().sum().backward()
        opts[i].step(), opts[i].zero_grad()
    for i in (0, 1, 0):
        step(i)
    other = runtime.adamw(nets[0], 0.1)
    nets[0].load_state_dict(nets[1].state_dict())
    other.load_state_dict(copy.deepcopy(opts[1].state_dict()))
    opts[0] = other
    step(0), step(1)
    torch.testing.assert_close(nets[0].weight, nets[1].weight)


def test_saves_by_the_clock(tmp_path, ckpt):
    words = command("issd", ckpt, tmp_path, "--save-every", 1000, "--save-minutes", 0.0001)[2:]
    start_and_signal(["issd.py", "--steps", 500, *words[1:]], tmp_path, 5, signal.SIGKILL)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] >= 4


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="finds the workers in /proc")
def test_four_processes_one_of_which_is_lost_and_two_that_resume_them(tmp_path, ckpt):
    """They agree with one process; the loss of one ends all within a minute and with one line; the next launch continues from the last checkpoint."""
    run = lambda out, *more: ["issd.py", "--ckpt", ckpt, "--steps", 14, "--batch-size", 8, "--lr", 1e-4, "--eval-samples", 0, "--log-every", 1, "--save-every", 4, "--out", out, *more]
    inside(*run(tmp_path / "one"))
    p = start(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 4, *run(tmp_path / "part")], tmp_path / "part", 6)
    os.kill(children(p.pid)[2], signal.SIGKILL)
    began = time.time()
    output = p.communicate(timeout=60)[1]
    assert p.returncode != 0 and time.time() - began < 60
    assert output.count("another process of this job was lost") == 1 and "SIGKILL" in output, output
    state = torch.load(tmp_path / "part" / "last.pt", weights_only=True)
    assert 4 <= state["step"] < 14
    assert losses(tmp_path / "part")[:6] == pytest.approx(losses(tmp_path / "one")[:6], rel=1e-4) and min(losses(tmp_path / "one")) > 0
    torchrun(2, *run(tmp_path / "part", "--accumulate", 2))
    assert losses(tmp_path / "part") == pytest.approx(losses(tmp_path / "one"), rel=1e-4) and close(weights(tmp_path / "part"), weights(tmp_path / "one")) < 1e-5


def test_the_benchmark_shrunk():
    out = script("benchmarks/throughput.py", "--model", "DiT-Na/2", "--student", "DiT-Na/2", "--batch-size", 1, "--repeats", 1, "--methods", "issd", "pd", "dsd", "kd", "sampling").stdout
    assert all(f"{name}: ours is " in out for name in ("issd", "pd", "dsd", "kd", "sampling")) and "TFLOP/s" in out
    assert "relative difference" in script("benchmarks/throughput.py", "--model", "DiT-Na/2", "--batch-size", 1, "--methods", "issd", "--losses", 2).stdout
