"""ddil.py with tiny sizes: resume in every stage and objective, processes, what it leaves."""
import signal

import pytest
import torch
from conftest import are_equal, checkpoint, inside, largest_difference, losses, weights
from method_runs import load
from processes import start_and_signal, workers

from kit import checkpoints
from kit.cli import UserError
from kit.processes import Processes
from kit.sampling import SampleOptions, sample_images
from solvers import halve_grid, make_grid

# The parts of D in a checkpoint's "buffer":
STATE, NODE, LABEL = "0", "1", "2"


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny):
    path = tmp_path_factory.mktemp("base") / "v.pt"
    torch.save(checkpoint(tiny, prediction="v"), path)
    return path


def words(base, out, *more):
    """Two stages of 12 steps, from 8 to 4 and from 4 to 2."""
    command = ("ddil.py --stages 8:12 4:12 --batch-size 8 --lr 1e-3 --reuse 0.3 0.3 "
               "--eval-samples 0 --log-every 1 --save-every 3")
    return [*command.split(), "--ckpt", base, "--out", out, *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base):
    out = tmp_path_factory.mktemp("whole")
    inside(*words(base, out))
    return out


@pytest.mark.parametrize("step, nfe", [(8, 4), (17, 2)])
def test_resume_in_the_middle_of_a_stage(tmp_path, base, whole, step, nfe):
    """Killed in either stage: weights, losses and D end bit for bit the same."""
    start_and_signal(words(base, tmp_path), tmp_path, step, signal.SIGKILL)
    state = load(tmp_path)
    assert len(state["buffer"][STATE]) > 0
    assert state["nfe"] == nfe
    inside(*words(base, tmp_path))
    a = load(tmp_path)
    b = load(whole)
    assert are_equal(a["model"], b["model"])
    assert are_equal(a["buffer"], b["buffer"])
    assert losses(tmp_path) == losses(whole)
    assert min(losses(whole)) > 0


def test_two_processes_agree_with_one_and_hold_the_same_states(tmp_path, base, whole):
    workers(2, *words(base, tmp_path))
    assert len(losses(whole)) == 24
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-3)
    a = load(whole)
    b = load(tmp_path)
    assert torch.equal(a["buffer"][NODE], b["buffer"][NODE])
    assert torch.equal(a["buffer"][LABEL], b["buffer"][LABEL])
    assert (a["buffer"][STATE] - b["buffer"][STATE]).abs().max() < 1e-3
    start = torch.load(base, weights_only=True)["model"]
    assert largest_difference(a["model"], start) > 1e-3


def test_checkpoints_say_what_they_are(tmp_path, base, whole):
    """Every stage leaves its student, with the grid it was made for. sample.py and issd.py take it
    as it is."""
    _, four = checkpoints.load_model(whole / "nfe4.pt")
    _, two = checkpoints.load_model(whole / "nfe2.pt")
    assert four["grid"] == halve_grid(make_grid("uniform", 8))
    assert two["grid"] == halve_grid(four["grid"]) == [999, 499, -1]
    assert (two["nfe"], two["prediction"], two["method"]) == (2, "v", "ddil")
    assert (two["threshold"], two["solver"]) == ("clamp", "ddim")
    kept = torch.load(whole / "nfe4.pt", weights_only=True)["model"]
    assert not are_equal(weights(whole), kept)

    inside("sample.py", "--ckpt", whole / "nfe4.pt", "--num-samples", 3,
           "--out", tmp_path / "x.npz")
    done = inside("issd.py", "--ckpt", whole / "nfe4.pt", "--out", tmp_path / "issd",
                  *"--steps 2 --batch-size 4 --eval-samples 0 --data digits".split())
    assert "is ready" in done
    made = checkpoints.describe(tmp_path / "issd" / "last.pt")
    assert made["grid"] == four["grid"]


@pytest.mark.parametrize("objective, more", [
    ("lcm", "--steps 12 --nfe 2"), ("dmd2", "--steps 12 --nfe 2"), ("pd", "--stages w:6 4:6")])
def test_the_other_objectives_resume_and_sample(tmp_path, base, objective, more):
    def command(out):
        own = (f"ddil.py --objective {objective} {more} --batch-size 8 --lr 1e-3 --reuse 0.5 0.5 "
               "--eval-samples 0 --log-every 1 --save-every 4")
        return [*own.split(), "--ckpt", base, "--out", out]

    inside(*command(tmp_path / "a"))
    start_and_signal(command(tmp_path / "b"), tmp_path / "b", 9, signal.SIGKILL)
    inside(*command(tmp_path / "b"))
    a = load(tmp_path / "a")
    b = load(tmp_path / "b")
    assert are_equal(a["model"], b["model"])
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert min(losses(tmp_path / "a")) > 0
    start = torch.load(base, weights_only=True)["model"]
    assert largest_difference(a["model"], start) > 1e-4

    net, spec = checkpoints.load_model(tmp_path / "a" / "last.pt")
    proc = Processes("off")
    x, _ = sample_images(proc.autocast(net), spec, proc, 3, SampleOptions())
    assert x.shape == (3, 1, 8, 8)
    assert x.std() > 0
    assert spec["solver"] == ("ddim" if objective == "pd" else "lcm")
    takes_w = objective != "dmd2"
    assert spec["w"] == ([1, 2] if takes_w else None)
    assert not spec["knows_null"]  # where scales are drawn, no label is dropped
    for file in (tmp_path / "a").glob("nfe*.pt"):
        assert checkpoints.describe(file)["w"] == spec["w"]
    if objective == "pd":  # a network that takes w is halved further, but not taught w again
        with pytest.raises(UserError, match="takes the scale of guidance as an input already"):
            inside("ddil.py", "--ckpt", tmp_path / "a" / "last.pt",
                   *"--objective lcm --eval-samples 0 --dry-run".split())
        inside("ddil.py", "--ckpt", tmp_path / "a" / "last.pt", "--out", tmp_path / "c",
               *"--stages 2:1 --w 1 1.5 --batch-size 4 --eval-samples 0".split())
        assert checkpoints.describe(tmp_path / "c" / "nfe1.pt")["w"] == [1, 1.5]


def test_without_dagger_it_is_progressive_distillation(tmp_path, base, whole):
    """No rollout, no state from D; the file's method says pd."""
    command = words(base, tmp_path, "--dagger", 0, 0)
    at = command.index("--reuse")  # without effect here
    inside(*command[:at], *command[at + 3:])
    state = load(tmp_path)
    assert state["method"] == "pd"
    assert not state["buffer"]
    assert losses(tmp_path) != losses(whole)
