"""Bad input ends with one line that says what and how to mend it, exit code 2, and nothing lost."""
import copy
import multiprocessing
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import (
    SCRIPTS,
    checkpoint,
    inside,
    load_script,
    make_latents,
    quick,
)
from PIL import Image
from processes import Command, workers

import fid
import issd
import models
from kit import data
from kit.cli import UserError
from kit.processes import Processes
from kit.run import Guard, adamw

# ---- The methods -------------------------------------------------------------------------------


@pytest.fixture
def with_w(tiny, tmp_path):
    """A checkpoint whose network takes the scale of guidance as an input."""
    path = tmp_path / "w.pt"
    arch = {**tiny.arch, "guidance": True}
    torch.save(checkpoint(models.with_guidance(tiny), arch=arch), path)
    return path


@pytest.fixture
def one_step(tiny, tmp_path):
    """A checkpoint of a student of one step."""
    path = tmp_path / "node.pt"
    torch.save(checkpoint(tiny, only_node=500), path)
    return path


def test_stages(fails, ckpt):
    def call(*words):
        return fails("ddil", "--ckpt", ckpt, "--eval-samples", 0, *words)
    assert "cannot follow one that ends at 8" in call("--stages", "16:5", "4:5")
    assert "write N:STEPS" in call("--stages", "16")
    assert "15 steps cannot be halved" in call("--stages", "15:5")
    assert "at least one of the form" in call("--stages", "w:5")
    assert "may stand w:STEPS" in call("--stages", "8:2", "w:2")
    assert "widen --w" in call("--stages", "w:2", "8:2", "--cfg", 7)
    assert "probabilities" in call("--dagger", 0.5, 1.5)
    assert "50 nodes" in call("--objective", "lcm", "--nfe", 60)
    assert "between 1 and" in call("--objective", "dmd2", "--nfe", 0)
    assert "must be positive" in call("--lr", 0)
    assert "--reuse is positive" in call("--reuse", "nan", "nan")
    assert "--reuse is positive" in call("--reuse", 2, "inf")
    assert "--reuse is positive" in call("--objective", "lcm", "--w", 1, "inf")


def test_what_ddil_refuses(fails, tiny, tmp_path, with_w, one_step):
    assert "student of one step" in fails("ddil", "--ckpt", one_step, "--stages", "4:2")
    for objective in ("pd", "lcm"):
        words = ("--dry-run", "--model", "SD-v1.5", "--objective", objective)
        assert "takes prompts" in fails("ddil", *words)
    for more in (("--objective", "lcm"), ("--stages", "w:10", "4:10"), ("--objective", "dmd2")):
        said = fails("ddil", "--dry-run", "--model", "LDM-ImageNet", *more)
        assert "this network is a U-Net" in said
    torch.save(checkpoint(tiny, solver="lcm"), tmp_path / "dmd2.pt")
    for script in ("ssd", "issd"):
        assert "LCM, DMD2" in fails(script, *quick(tmp_path / "dmd2.pt"))
    assert "which this loss does not train" in fails("train", "--ckpt", with_w, "--steps", 1)
    made = inside(*f"ddil.py --ckpt {with_w} --stages 4:2 --batch-size 4 --eval-samples 10 "
                   f"--out {tmp_path}/o".split())
    assert "after" in made
    assert "continued training" not in made  # no control: that loss cannot make it


def test_what_dsd_refuses(fails, ckpt, tiny, tmp_path, with_w, one_step):
    def call(*words, ckpt=ckpt):
        return fails("dsd", "--ckpt", ckpt, "--eval-samples", 0, *words)
    assert "a power of 2" in call("--variant", "dsdi", "--depth", 12)
    assert "an even number" in call("--variant", "dsdgl", "--depth", 7)
    assert "--depth 2000" in call("--depth", 2000)
    for variant in ("dsdgl", "dsdn"):
        said = call("--variant", variant, "--depth", 64, "--steps", 12)
        assert "too few for one trajectory" in said
    assert "scales of guidance in their order" in call("--w", 3, 1)
    assert "between 1 and" in call("--nfe", 0)
    assert "must be positive" in call("--lr", "inf")
    assert "must lie between 0 and 1" in call("--ema", 1.5)
    assert "give --ckpt a whole one" in call(ckpt=with_w)
    assert "give --ckpt a whole one" in call(ckpt=one_step)
    repa = checkpoint(tiny, prediction="velocity", schedule="interpolant", cfg_interval=[0.0, 0.7])
    torch.save(repa, tmp_path / "repa.pt")
    assert "add --w 1 1" in call("--w", 1, 3, ckpt=tmp_path / "repa.pt")
    assert "prompts" in fails("dsd", "--model", "SD-v1.5", "--dry-run")

    def scratch(*words):
        return fails("dsd", "--from-scratch", *words)
    assert "at least 2, and only for the digits" in scratch("--eval-samples", 1)
    assert "only for the digits" in scratch("--data", "cifar10", "--eval-samples", 50)
    assert "--nfe 2000" in scratch("--nfe", 2000)
    assert "--loss-weights takes two weights" in scratch("--loss-weights", "nan", 1)
    assert not list(tmp_path.glob("runs/*/last.pt"))


def test_what_kd_refuses(fails, ckpt, with_w):
    def call(*words, ckpt=ckpt):
        common = ["--ckpt", ckpt, "--eval-samples", 0, "--student", "DiT-Na/2"]
        return fails("kd", *common, *words)
    assert "unknown" in call("--student", "DiT-Q/2")
    assert "between 0 and 1" in call("--alpha", 1.5)
    assert "between 0 and 1" in call("--dropout", 1)
    assert "of at least 1 in their order" in call("--w", 4, 1)
    assert "of at least 1" in call("--w", 0, 3)
    assert "say how far with --w" in call("--uncond", ckpt)
    assert "must be like the network that it guides" in call("--w", 1, 4, "--uncond", ckpt)
    assert "must be positive" in call("--half-life", 0)
    assert "give --ckpt a whole one" in call(ckpt=with_w)


# ---- Flags -------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_pass_torchrun(script):
    """torchrun completes abbreviations of its own flags also behind the script's name: --num would
    be its --numa-binding."""
    from torch.distributed.run import get_args_parser
    theirs = []
    for action in get_args_parser()._actions:
        theirs += action.option_strings
    for action in load_script(script).parser()._actions:
        for flag in action.option_strings:
            is_taken = any(t.startswith(flag) for t in theirs)
            assert flag in ("-h", "--help") or not is_taken, (script, flag)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_first_what_the_script_does(script, capsys):
    """Then come the flags by group, with their defaults; the algorithm is last."""
    parser = load_script(script).parser()
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    said = capsys.readouterr().out
    first = load_script(script).__doc__.split("\n\n")[0].splitlines()[0]
    last = [line for line in load_script(script).__doc__.splitlines() if line.strip()][-1]
    assert said.index(first) < said.index("--out") < said.index(last)


def test_arguments(fails, ckpt):
    for model in ("DiT-XXL/2", "DiT-S/3"):
        assert "unknown; choose DiT-" in fails("issd", "--model", model, "--dry-run")

    def call(*words):
        return fails("issd", *quick(ckpt), *words)
    for nfe in (1, 0, -3):
        assert "at least 2" in call("--nfe", nfe)
    assert "between 1 and the schedule's 1000 steps" in call("--nfe", 1001)
    assert "no integer stride gives 64" in call("--nfe", 64, "--grid", "ddim")
    assert "between 0 and 1" in call("--lam", 1.5)
    assert "--lr" in call("--lr", 0)
    assert "as in synthetic:10" in call("--data", "synthetics")
    assert "does not go with this model's schedule" in call("--grid", "sit")
    assert "--steps" in fails("train", "--steps", -1)
    assert "invalid int value" in fails("issd", "--nfe", "many")
    assert "unrecognized arguments" in fails("issd", "--lambda", 1)
    small = ("--model", "DiT-S/2", "--eval-samples", 10, "--dry-run")
    assert "only for the digits" in fails("issd", *small)
    assert "at least 2" in fails("issd", "--eval-samples", 1, "--dry-run")
    assert "between 1 and" in fails("sample", "--ckpt", ckpt, "--nfe", 0)
    assert "goes with --schedule interpolant" in fails("train", "--prediction", "velocity")
    assert "no released weights for DiT-S/2" in fails("issd", "--model", "DiT-S/2")
    assert "must lie between" in fails("sample", "--ckpt", ckpt, "--seed", -1)
    assert not os.path.exists("out")


def test_guidance_of_zero_is_explained(fails, ckpt):
    for words in (("issd", *quick(ckpt)), ("ddil", "--ckpt", ckpt), ("dsd", "--ckpt", ckpt),
                  ("kd", "--ckpt", ckpt, "--student", "DiT-Na/2"), ("sample", "--ckpt", ckpt)):
        assert "1 means no guidance" in fails(*words, "--cfg", 0)
        assert "must be a number" in fails(*words, "--cfg", "nan")


def test_numbers_out_of_range(fails, ckpt, tmp_path):
    for flag, value in (("--ema", 2), ("--ema", "nan"), ("--ema", -1), ("--clip", -1),
                        ("--clip", "nan"), ("--warmup", -3), ("--label-std", -1)):
        assert "--ema must lie between 0 and 1" in fails("train", flag, value)
    assert "must lie between 0 and 2^63 - 1" in fails("train", "--seed", 10 ** 22)
    for name in ("synthetic:²", "synthetic:0", "synthetic:2000"):
        said = fails("issd", *quick(ckpt), "--data", name)
        assert "1 to 1000, as in synthetic:10" in said
    assert "neither a known set" in fails("issd", *quick(ckpt), "--data", "")
    assert "--sample-every -1" in fails("issd", *quick(ckpt), "--sample-every", -1)
    assert not list(tmp_path.glob("*/last.pt"))


# ---- Checkpoints -------------------------------------------------------------------------------


def test_checkpoints(fails, tmp_path, tiny, ckpt):
    assert "no such file" in fails("issd", *quick("missing.pt"))
    (tmp_path / "text.pt").write_text("not weights")
    assert "cannot be read" in fails("issd", *quick("text.pt"))
    with open(ckpt, "rb") as f:
        raw = f.read()
    (tmp_path / "cut.pt").write_bytes(raw[:len(raw) // 2])
    assert "damaged" in fails("issd", *quick("cut.pt"))
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 20)
    assert "damaged" in fails("issd", *quick("cut.safetensors"))
    torch.save(tiny.state_dict(), tmp_path / "raw.pt")
    assert "name it with --model" in fails("issd", *quick("raw.pt"))
    said = fails("issd", *quick("raw.pt"), "--model", "DiT-S/8")
    assert "does not fit the network (missing" in said
    said = fails("issd", *quick(ckpt), "--model", "DiT-S/2")
    assert "holds DiT-Ti/2, not --model DiT-S/2" in said
    wrong = checkpoint(tiny)
    wrong["ema"] = {k: v for k, v in wrong["ema"].items() if k != "x_embedder.proj.bias"}
    torch.save(wrong, tmp_path / "wrong.pt")
    assert "missing 1: x_embedder.proj.bias" in fails("sample", "--ckpt", "wrong.pt")
    torch.save(dict(checkpoint(tiny), format=9), tmp_path / "future.pt")
    assert "format 9" in fails("sample", "--ckpt", "future.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    assert "holds no weights" in fails("sample", "--ckpt", "tensor.pt")
    torch.save({"ema": {}}, tmp_path / "empty.pt")
    assert "holds no weights" in fails("sample", "--ckpt", "empty.pt", "--model", "DiT-S/8")


def test_another_digits_teacher(fails, tmp_path, ckpt):
    inside(*f"train.py --ckpt {ckpt} --steps 1 --batch-size 4 "
            f"--out {tmp_path}/runs/teacher-digits".split())
    said = fails("issd", "--steps", 1)
    assert "made anew when runs/teacher-digits is deleted" in said


# ---- Data --------------------------------------------------------------------------------------


def save_image(path, size=(20, 30), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    x = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(x).save(path)


def test_data(fails, tmp_path, ckpt):
    assert "neither a known set" in fails("issd", *quick(ckpt), "--data", "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no images there" in fails("issd", *quick(ckpt), "--data", "empty")
    np.savez(tmp_path / "six.npz", np.zeros((2, 8, 8, 1), np.uint8), [0, 5])
    said = fails("issd", *quick(ckpt), "--data", "six.npz", "--classes", 5)
    assert "label 5 is out of range for 5 classes" in said
    net = models.fill_random(models.build(models.make_arch("DiT-Ti/2", 8, 3, 2, False)))
    torch.save(checkpoint(net, classes=2), tmp_path / "rgb.pt")
    said = fails("issd", *quick("rgb.pt"), "--data", "digits")
    assert "has shape (1, 8, 8), the network wants (3, 8, 8)" in said
    for k in range(3):
        for i in range(3):
            save_image(tmp_path / "images" / f"class{k}" / f"{i}.png", seed=i)
    said = fails("issd", *quick("rgb.pt"), "--data", "images")
    assert "has 3 classes, the network knows 2" in said
    shutil.rmtree(tmp_path / "images" / "class2")
    (tmp_path / "images" / "class1" / "bad.png").write_bytes(b"\x89PNG\r\n broken")
    words = "--ckpt rgb.pt --data images --steps 5 --batch-size 4 --out o2"
    assert "bad.png: cannot be read" in fails("train", *words.split())


def test_image_folders(fails, tmp_path):
    """Hidden folders are no classes; what would be left out without a word is refused."""
    root = tmp_path / "set"
    for k in "ab":
        for name in ("0.png", "._0.png", ".thumbnails/1.png"):
            save_image(root / k / name, (9, 9))
    for name in (".ipynb_checkpoints", "__MACOSX"):
        (root / name).mkdir()
    found = data.load(str(root), 8)
    assert found.classes == 2
    files = [(f.as_posix()[-7:], k) for f, k in found.files]
    assert files == [("a/0.png", 0), ("b/0.png", 1)]
    assert len(fid.image_files(root)) == 2

    def call(*words):
        return fails("train", "--data", "set", "--steps", 2, "--batch-size", 4, *words)
    assert "--image-size 0: must be positive" in call("--image-size", 0)
    assert "--image-size -8" in call("--image-size", -8)
    assert "--classes 0: must be positive" in call("--classes", 0)
    (root / "c").mkdir()
    assert "set/c: no images there" in call()
    (root / "c").rmdir()
    save_image(root / "loose.png", (9, 9))
    assert "loose.png lies beside folders, which are classes" in call()


def test_latents(fails, tmp_path, ckpt):
    x = np.random.default_rng(0).normal(size=(8, 1, 1, 1, 8, 8)).astype(np.float32)
    zeros = np.zeros(8, int)

    def call(name, x=x, y=zeros, **meta):
        folder = make_latents(tmp_path / name, x, y, **meta)
        return fails("issd", *quick(ckpt), "--data", folder)
    assert "label 10 is out of range" in call("a", y=np.full(8, 10))
    assert "label -1 is out of range" in call("d", y=np.full(8, -1))
    assert "want floats (N, 1 or 2, 1 or 2, C, H, W)" in call("b", x[:, 0])
    assert "labels.npy <U1" in call("e", y=np.array(list("abcdefgh")))
    assert "labels.npy int64 (8, 1)" in call("f", y=np.zeros((8, 1), int))
    assert "complex64" in call("g", x.astype(np.complex64))
    assert "float64 (8,)" in call("h", y=zeros + 0.7)
    assert "(8, 1, 3, 1, 8, 8)" in call("i", x.repeat(3, 2))
    assert "cannot be read" in call("j", classes=None)
    assert "cannot be read" in call("k", scale="big")
    np.savez(tmp_path / "tall.npz", np.zeros((3, 8, 6, 1), np.uint8))
    assert "want uint8 (N, H, H, C)" in fails("train", "--data", "tall.npz")
    x[:, 0, 0, 0, 0, 0] = np.nan
    running = set(multiprocessing.active_children())
    assert "is not finite" in call("c", x)
    assert set(multiprocessing.active_children()) <= running  # the loader's processes have ended
    (tmp_path / "c" / "labels.npy").write_bytes(b"x")
    assert "make it again" in fails("issd", *quick(ckpt), "--data", tmp_path / "c")


# ---- While it runs -----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [
    MemoryError(),
    torch.cuda.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
])
def test_out_of_memory_is_one_line(fails, ckpt, monkeypatch, error):
    def loss(*_):
        raise error
    monkeypatch.setattr(issd, "issd_loss", loss)
    assert "out of memory; lower --batch-size" in fails("issd", *quick(ckpt))


def test_a_diverging_run_stops_and_keeps_the_last_good_state(fails, tmp_path, ckpt, monkeypatch):
    """A network that gives NaN from step 6 on: step 5's checkpoint stands, and step 6 is named."""
    words = quick(ckpt, "out", "--save-every", 5, "--log-every", 100)
    words[words.index("--steps") + 1] = 20
    original = issd.issd_loss
    calls = []

    def poisoned(*args):
        loss, aux = original(*args)
        calls.append(1)
        return (loss * float("nan") if len(calls) >= 6 else loss), aux
    monkeypatch.setattr(issd, "issd_loss", poisoned)
    message = fails("issd", *words)
    assert "step 6: the loss is not finite" in message
    assert "last.pt holds the last good state" in message
    held = torch.load(tmp_path / "out" / "last.pt", weights_only=True)
    assert held["step"] == 5
    assert all(v.isfinite().all() for v in held["model"].values())


def test_skipped_updates_leave_no_trace(tiny):
    """A non-finite gradient changes neither weights nor moments, on the device, without a look
    from the host."""
    net = copy.deepcopy(tiny).train()
    opt = adamw(net, 1e-3)
    guard = Guard(Processes("off"))
    x = torch.randn(2, 1, 8, 8)
    t = torch.tensor([3, 4])
    y = torch.tensor([0, 1])
    for step, factor in enumerate((1.0, float("inf"), 1.0)):
        weights = copy.deepcopy(net.state_dict())
        moments = copy.deepcopy(opt.state_dict()["state"])
        loss = net(x, t, y).square().mean() * factor
        loss.backward()
        guard.step(opt, loss.detach(), step)
        is_same = all(torch.equal(v, weights[k]) for k, v in net.state_dict().items())
        assert is_same == (factor != 1)
        if factor != 1:
            for i, state in opt.state_dict()["state"].items():
                assert all(torch.equal(state[k], moments[i][k]) for k in state)
    with pytest.raises(UserError, match="step 2: the loss"):
        guard.check("nowhere")


def test_of_two_processes_one_speaks(tmp_path, ckpt):
    done = workers(2, "issd.py", "--ckpt", ckpt, "--batch-size", 9, "--out", tmp_path / "x",
                    check=False)
    lines = [line for line in done.stderr.splitlines() if "issd.py: error:" in line]
    assert done.returncode != 0 and len(lines) == 1
    assert "must be divisible by their number, 2" in lines[0]
    assert "Traceback" not in done.stderr.split("issd.py: error:")[0]


# ---- Where it writes ---------------------------------------------------------------------------


def test_output_folder(fails, tmp_path, ckpt):
    (tmp_path / "file").write_text("")
    assert "cannot write there" in fails("issd", *quick(ckpt, "file"))
    assert "cannot write there" in fails("issd", *quick(ckpt, "/proc/nothing"))
    assert "--out is empty" in fails("issd", *quick(ckpt, ""))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "last.pt").write_bytes(b"damaged")
    assert "damaged" in fails("issd", *quick(ckpt, "full"))

    def call(*words):
        return fails("sample", "--ckpt", ckpt, *words)
    assert "cannot write" in call("--out", "/proc/x.png")
    assert "must end in .png" in call("--out", "x.jpg")
    (tmp_path / "x.npz").mkdir()
    assert "cannot write there" in call("--out", "x.npz")
    assert "cannot write there" in call("--out", "file/x.npz")
    assert "not allowed with" in call("--compare", ckpt, ckpt)
    assert "--label 10" in call("--label", 10)
    assert "--num-samples" in call("--num-samples", 0)
    assert "is required" in fails("sample")
    small = models.fill_random(models.build(models.make_arch("DiT-Ti/2", 4, 1, 10, False)))
    torch.save(checkpoint(small), tmp_path / "small.pt")
    said = fails("sample", "--compare", ckpt, tmp_path / "small.pt", "--nfe", 2)
    assert "only samples of one shape can be compared" in said


def test_what_is_left_in_the_output_folder(fails, tmp_path, ckpt, capsys):
    out = tmp_path / "a"
    words = f"issd.py --ckpt {ckpt} --steps 2 --batch-size 4 --out {out} --eval-samples 10".split()
    assert "after issd" in inside(*words)
    for text in ("", "{}"):                               # a damaged metrics.json is made again
        (out / "metrics.json").write_text(text)
        assert "after issd" in inside(*words)
    said = fails("issd", *quick(ckpt, out), "--data", "digits", "--batch-size", 8)
    assert "with --batch-size 4, now it is 8" in said
    (out / "last.pt").unlink()
    capsys.readouterr()
    said = fails("issd", *quick(ckpt, out), "--lr", 1e-4)
    assert "continued is left of a run that is no more" in said


HOLD_A_LOCK = """
import sys
import time
from pathlib import Path
from kit.processes import lock
folder = Path(sys.argv[1])
file = lock(folder)
(folder / "held").touch()
time.sleep(300)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_two_commands_in_one_folder(fails, tmp_path, ckpt):
    holder = Command(["-c", HOLD_A_LOCK, tmp_path])
    while not (tmp_path / "held").exists():
        assert holder.poll() is None, holder.communicate()
    assert "another process is writing into" in fails("issd", *quick(ckpt, tmp_path))
    holder.kill()
    holder.communicate()
    assert not (tmp_path / "last.pt").exists()
    inside("issd.py", *quick(ckpt, tmp_path))
    assert (tmp_path / "last.pt").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_when_saving(fails, tmp_path, ckpt):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "last.tmp").symlink_to("/dev/full")
    message = fails("issd", *quick(ckpt))
    assert "cannot save" in message and "none was saved before" in message
    assert not (tmp_path / "out" / "last.pt").exists()
