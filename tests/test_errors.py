"""Bad input ends with one line that says what and how to mend it, exit code 2, and nothing lost."""
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, checkpoint, inside, torchrun
from PIL import Image

import data
import ddil
import dsd
import encode
import fid
import issd
import kd
import models
import runtime
import sample
import ssd
import train

MODULES = {"issd": issd, "ssd": ssd, "train": train, "sample": sample, "fid": fid, "ddil": ddil, "dsd": dsd, "kd": kd, "encode": encode}


@pytest.fixture
def fails(capsys, monkeypatch, tmp_path):
    """fails("issd", words...) runs it in this process and returns its one line of complaint."""
    monkeypatch.chdir(tmp_path)

    def call(module, *words):
        monkeypatch.setattr(sys, "argv", [module + ".py"])
        with pytest.raises(SystemExit) as e:
            args = MODULES[module].parser().parse_args([str(w) for w in words])
            runtime.run(MODULES[module].main, args)
        complaints = [line.replace("\x1b[A", "").strip() for line in capsys.readouterr().err.replace("\r", "\n").split("\n") if "error" in line]
        assert e.value.code == 2 and len(complaints) == 1, complaints
        assert complaints[0].startswith(f"{module}.py: error: ")
        return complaints[0]
    return call


def test_stages(fails, ckpt):
    call = lambda *words: fails("ddil", "--ckpt", ckpt, "--eval-samples", 0, *words)
    assert "cannot follow one that ends at 8" in call("--stages", "16:5", "4:5")
    assert "write N:STEPS" in call("--stages", "16")
    assert "15 steps cannot be halved" in call("--stages", "15:5")
    assert "at least one of the form" in call("--stages", "w:5")
    assert "may stand w:STEPS" in call("--stages", "8:2", "w:2")
    assert "widen --w" in call("--stages", "w:2", "8:2", "--cfg", 7)
    assert "probabilities" in call("--dagger", 0.5, 1.5)
    assert "leave them out" in call("--nfe", 4)
    assert "50 nodes" in call("--objective", "lcm", "--nfe", 60)
    assert "between 1 and" in call("--objective", "dmd2", "--nfe", 0)
    assert "must be positive" in call("--lr", 0)
    for words in (("--reuse", "nan", "nan"), ("--reuse", 2, "inf"), ("--w", 1, "inf")):
        assert "--reuse is positive" in call(*words)


def test_what_ddil_refuses(fails, ckpt, tiny, tmp_path):
    torch.save(checkpoint(tiny, only_node=500), tmp_path / "node.pt")
    assert "student of one step" in fails("ddil", "--ckpt", tmp_path / "node.pt", "--stages", "4:2")
    for objective in ("pd", "lcm"):
        assert "takes prompts" in fails("ddil", "--dry-run", "--model", "SD-v1.5", "--objective", objective)
    for words in (("--objective", "lcm"), ("--stages", "w:10", "4:10"), ("--objective", "dmd2")):
        assert "this network is a U-Net" in fails("ddil", "--dry-run", "--model", "LDM-ImageNet", *words)
    torch.save(checkpoint(tiny, solver="lcm"), tmp_path / "dmd2.pt")
    for script in ("ssd", "issd"):
        assert "LCM, DMD2" in fails(script, *quick(tmp_path / "dmd2.pt"))
    torch.save(checkpoint(models.with_guidance(tiny), arch={**tiny.arch, "guidance": True}), tmp_path / "w.pt")
    assert "which this loss does not train" in fails("train", "--ckpt", tmp_path / "w.pt", "--steps", 1)
    made = inside("ddil.py", "--ckpt", tmp_path / "w.pt", "--stages", "4:2", "--batch-size", 4, "--eval-samples", 10, "--out", tmp_path / "o")
    assert "after" in made and "continued training" not in made  # no control: that loss cannot make it


def test_what_dsd_refuses(fails, ckpt, tiny, tmp_path):
    call = lambda *words, ckpt=ckpt: fails("dsd", "--ckpt", ckpt, "--eval-samples", 0, *words)
    assert "a power of 2" in call("--variant", "dsdi", "--depth", 12)
    assert "an even number" in call("--variant", "dsdgl", "--depth", 7)
    assert "--depth 2000" in call("--depth", 2000)
    for variant in ("dsdgl", "dsdn"):
        assert "too few for one trajectory" in call("--variant", variant, "--depth", 64, "--steps", 12)
    assert "scales of guidance in their order" in call("--w", 3, 1)
    assert "between 1 and" in call("--nfe", 0)
    assert "are for --from-scratch" in call("--data", "digits")
    assert "leave --ckpt" in call("--from-scratch")
    assert "must be positive" in call("--lr", "inf")
    assert "must lie between 0 and 1" in call("--ema", 1.5)
    for name, more in (("w", dict(arch={**tiny.arch, "guidance": True})), ("node", dict(only_node=500))):
        torch.save(checkpoint(models.with_guidance(tiny) if name == "w" else tiny, **more), tmp_path / f"{name}.pt")
        assert "give --ckpt a whole one" in call(ckpt=tmp_path / f"{name}.pt")
    torch.save(checkpoint(tiny, prediction="velocity", schedule="interpolant", cfg_interval=[0.0, 0.7]), tmp_path / "repa.pt")
    assert "add --w 1 1" in call("--w", 1, 3, ckpt=tmp_path / "repa.pt")
    assert "prompts" in fails("dsd", "--model", "SD-v1.5", "--dry-run")
    scratch = lambda *words: fails("dsd", "--from-scratch", *words)
    assert "leave --ckpt, --variant" in scratch("--variant", "tsd")
    assert "at least 2, and only for the digits" in scratch("--eval-samples", 1) and "only for the digits" in scratch("--data", "cifar10", "--eval-samples", 50)
    assert "--nfe 2000" in scratch("--nfe", 2000)
    assert "--mix takes two weights" in scratch("--mix", "nan", 1)
    assert not list(tmp_path.glob("runs/*/last.pt"))


def test_what_kd_refuses(fails, ckpt, tiny, tmp_path):
    call = lambda *words, ckpt=ckpt: fails("kd", "--ckpt", ckpt, "--eval-samples", 0, "--student", "DiT-Na/2", *words)
    assert "unknown" in call("--student", "DiT-Q/2")
    assert "between 0 and 1" in call("--alpha", 1.5) and "between 0 and 1" in call("--dropout", 1)
    assert "of at least 1 in their order" in call("--w", 4, 1) and "of at least 1" in call("--w", 0, 3)
    assert "say how far with --w" in call("--uncond", ckpt)
    assert "must be like the teacher" in call("--w", 1, 4, "--uncond", ckpt)
    assert "must be positive" in call("--half-life", 0)
    torch.save(checkpoint(models.with_guidance(tiny), arch={**tiny.arch, "guidance": True}), tmp_path / "w.pt")
    assert "give --ckpt a whole one" in call(ckpt=tmp_path / "w.pt")


def test_flags_pass_torchrun():
    """torchrun completes abbreviations of its own flags also behind the script's name: --num would be its --numa-binding."""
    from torch.distributed.run import get_args_parser
    theirs = [s for action in get_args_parser()._actions for s in action.option_strings]
    for name, module in MODULES.items():
        for action in module.parser()._actions:
            for flag in action.option_strings:
                assert flag in ("-h", "--help") or not any(t.startswith(flag) for t in theirs), (name, flag)


def quick(ckpt, out="out", *more):
    return ["--ckpt", ckpt, "--steps", 2, "--batch-size", 4, "--eval-samples", 0, "--out", out, *more]


def test_arguments(fails, ckpt):
    assert "unknown; choose DiT-" in fails("issd", "--model", "DiT-XXL/2", "--dry-run")
    assert "unknown; choose DiT-" in fails("issd", "--model", "DiT-S/3", "--dry-run")
    for nfe in (1, 0, -3):
        assert "at least 2" in fails("issd", *quick(ckpt), "--nfe", nfe)
    assert "between 1 and the schedule's 1000 steps" in fails("issd", *quick(ckpt), "--nfe", 1001)
    assert "no integer stride gives 64" in fails("issd", *quick(ckpt), "--nfe", 64, "--grid", "ddim")
    assert "between 0 and 1" in fails("issd", *quick(ckpt), "--lam", 1.5)
    assert "--lr" in fails("issd", *quick(ckpt), "--lr", 0)
    assert "--steps" in fails("train", "--steps", -1)
    assert "invalid int value" in fails("issd", "--nfe", "many")
    assert "unrecognized arguments" in fails("issd", "--lambda", 1)
    assert "synthetic:10" in fails("issd", *quick(ckpt), "--data", "synthetic")
    assert "only for the digits" in fails("issd", "--model", "DiT-S/2", "--eval-samples", 10, "--dry-run")
    assert "at least 2" in fails("issd", "--eval-samples", 1, "--dry-run")
    assert "does not go with this model's schedule" in fails("issd", *quick(ckpt), "--grid", "sit")
    assert "between 1 and" in fails("sample", "--ckpt", ckpt, "--nfe", 0)
    assert "goes with --schedule interpolant" in fails("train", "--prediction", "velocity")
    assert "no released weights for DiT-S/2" in fails("issd", "--model", "DiT-S/2")
    assert "must lie between" in fails("sample", "--ckpt", ckpt, "--seed", -1)
    assert not os.path.exists("out")


def test_checkpoints(fails, tmp_path, tiny, ckpt):
    assert "no such file" in fails("issd", *quick("missing.pt"))
    (tmp_path / "text.pt").write_text("not weights")
    assert "cannot be read" in fails("issd", *quick("text.pt"))
    raw = open(ckpt, "rb").read()
    (tmp_path / "cut.pt").write_bytes(raw[:len(raw) // 2])
    assert "damaged" in fails("issd", *quick("cut.pt"))
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 20)
    assert "damaged" in fails("issd", *quick("cut.safetensors"))
    torch.save(tiny.state_dict(), tmp_path / "raw.pt")
    assert "name it with --model" in fails("issd", *quick("raw.pt"))
    assert "does not fit the network (missing" in fails("issd", *quick("raw.pt"), "--model", "DiT-S/8")
    assert "holds DiT-Ti/2, not --model DiT-S/2" in fails("issd", *quick(ckpt), "--model", "DiT-S/2")
    wrong = checkpoint(tiny)
    wrong["ema"] = {k: v for k, v in wrong["ema"].items() if k != "pos_embed"}
    torch.save(wrong, tmp_path / "wrong.pt")
    assert "missing 1: pos_embed" in fails("sample", "--ckpt", "wrong.pt")
    torch.save(dict(checkpoint(tiny), format=9), tmp_path / "future.pt")
    assert "format 9" in fails("sample", "--ckpt", "future.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    assert "holds no weights" in fails("sample", "--ckpt", "tensor.pt")
    torch.save({"ema": {}}, tmp_path / "empty.pt")
    assert "missing" in fails("sample", "--ckpt", "empty.pt", "--model", "DiT-S/8")


def test_data(fails, tmp_path, ckpt, tiny):
    assert "neither a known set" in fails("issd", *quick(ckpt), "--data", "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no images there" in fails("issd", *quick(ckpt), "--data", "empty")
    assert "label 9 is out of range for 5 classes" in fails("issd", *quick(ckpt), "--data", "digits", "--classes", 5)
    net = models.fill_random(models.build(models.make_arch("DiT-Ti/2", 8, 3, 2, False)))
    torch.save(checkpoint(net, classes=2), tmp_path / "rgb.pt")
    assert "has shape (1, 8, 8), the network wants (3, 8, 8)" in fails("issd", *quick("rgb.pt"), "--data", "digits")
    for k in range(3):
        (tmp_path / "images" / f"class{k}").mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 30, 3), np.uint8)).save(tmp_path / "images" / f"class{k}" / f"{i}.png")
    assert "has 3 classes, the network knows 2" in fails("issd", *quick("rgb.pt"), "--data", "images")
    shutil.rmtree(tmp_path / "images" / "class2")
    (tmp_path / "images" / "class1" / "bad.png").write_bytes(b"\x89PNG\r\n broken")
    message = fails("train", "--ckpt", "rgb.pt", "--data", "images", "--image-size", 8, "--steps", 5, "--batch-size", 4, "--out", "o2")
    assert "bad.png: cannot be read" in message


def test_image_folders(fails, tmp_path, ckpt, tiny):
    """Hidden folders are no classes; what would be left out without a word is refused."""
    for k in "ab":
        (tmp_path / "set" / k / ".thumbnails").mkdir(parents=True)
        for name in ("0.png", "._0.png", ".thumbnails/1.png"):
            Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "set" / k / name)
    for name in (".ipynb_checkpoints", "__MACOSX"):
        (tmp_path / "set" / name).mkdir()
    found = data.load(str(tmp_path / "set"), 8)
    assert found.classes == 2 and [(f.as_posix()[-7:], k) for f, k in found.files] == [("a/0.png", 0), ("b/0.png", 1)]
    assert len(data.image_files(tmp_path / "set")) == 2
    call = lambda *words: fails("train", "--data", "set", "--steps", 2, "--batch-size", 4, *words)
    assert "--image-size 0: must be positive" in call("--image-size", 0) and "--image-size -8" in call("--image-size", -8)
    assert "--classes 0: must be positive" in call("--classes", 0)
    (tmp_path / "set" / "c").mkdir()
    assert "set/c: no images there" in call()
    (tmp_path / "set" / "c").rmdir()
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "set" / "loose.png")
    assert "loose.png lies beside folders, which are classes" in call()


def test_numbers_out_of_range(fails, ckpt, tmp_path):
    for words in (("--ema", 2), ("--ema", "nan"), ("--ema", -1), ("--clip", -1), ("--clip", "nan"), ("--warmup", -3), ("--label-std", -1)):
        assert "--ema must lie between 0 and 1" in fails("train", *words)
    assert "must lie between 0 and 2^63 - 1" in fails("train", "--seed", 10 ** 22)
    for name in ("synthetic:²", "synthetic:0", "synthetic:2000"):
        assert "1 to 1000, as in synthetic:10" in fails("issd", *quick(ckpt), "--data", name)
    assert "neither a known set" in fails("issd", *quick(ckpt), "--data", "")
    assert not list(tmp_path.glob("*/last.pt"))


def test_out_of_memory_is_one_line(fails, ckpt, monkeypatch):
    for error in (MemoryError(), torch.cuda.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")):
        def loss(*_, error=error):
            raise error
        monkeypatch.setattr(issd, "issd_loss", loss)
        assert "out of memory; lower --batch-size" in fails("issd", *quick(ckpt, f"out{type(error).__name__}"))


def test_what_is_left_in_the_output_folder(fails, tmp_path, ckpt, capsys):
    call = lambda *more: inside("issd.py", "--ckpt", ckpt, "--steps", 2, "--batch-size", 4, "--out", tmp_path / "a", *more)
    assert "after issd" in call("--eval-samples", 10)
    for text in ("", "{}"):                               # a damaged metrics.json is made again
        (tmp_path / "a" / "metrics.json").write_text(text)
        assert "after issd" in call("--eval-samples", 10)
    assert "with --steps 2, now it is 4" in fails("issd", *quick(ckpt, tmp_path / "a"), "--data", "digits", "--steps", 4)
    (tmp_path / "a" / "last.pt").unlink()
    capsys.readouterr()
    assert "continued is left of a run that is no more" in fails("issd", *quick(ckpt, tmp_path / "a"), "--lr", 1e-4)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_two_commands_in_one_folder(fails, tmp_path, ckpt):
    held = subprocess.Popen([sys.executable, "-c", "import pathlib, runtime; f = runtime.lock(pathlib.Path('.')); print(1, flush=True); input()"], cwd=tmp_path,
                            env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    held.stdout.readline()
    assert "another process is writing into" in fails("issd", *quick(ckpt, tmp_path))
    held.communicate(b"\n")
    assert not (tmp_path / "last.pt").exists()
    inside("issd.py", *quick(ckpt, tmp_path))
    assert (tmp_path / "last.pt").exists()


def latents(folder, x, y, classes=10, scale=None):
    import json
    folder.mkdir()
    np.save(folder / "latents.npy", x)
    np.save(folder / "labels.npy", y)
    (folder / "meta.json").write_text(json.dumps({"classes": classes, "scale": scale}))
    return str(folder)


def test_latents(fails, tmp_path, ckpt):
    x = np.random.default_rng(0).normal(size=(8, 1, 1, 1, 8, 8)).astype(np.float32)
    assert "label 10 is out of range" in fails("issd", *quick(ckpt), "--data", latents(tmp_path / "a", x, np.full(8, 10)))
    assert "label -1 is out of range" in fails("issd", *quick(ckpt), "--data", latents(tmp_path / "d", x, np.full(8, -1)))
    assert "want floats (N, 1 or 2, 1 or 2, C, H, W)" in fails("issd", *quick(ckpt), "--data", latents(tmp_path / "b", x[:, 0], np.zeros(8, int)))
    bad = lambda name, x=x, y=np.zeros(8, int), **meta: fails("issd", *quick(ckpt), "--data", latents(tmp_path / name, x, y, **meta))
    assert "labels.npy <U1" in bad("e", y=np.array(list("abcdefgh"))) and "labels.npy int64 (8, 1)" in bad("f", y=np.zeros((8, 1), int))
    assert "complex64" in bad("g", x=x.astype(np.complex64)) and "float64 (8,)" in bad("h", y=np.zeros(8) + 0.7)
    assert "(8, 1, 3, 1, 8, 8)" in bad("i", x=x.repeat(3, 2)) and "cannot be read" in bad("j", classes=None) and "cannot be read" in bad("k", scale="big")
    np.savez(tmp_path / "tall.npz", np.zeros((3, 8, 6, 1), np.uint8))
    assert "want uint8 (N, H, H, C)" in fails("train", "--data", "tall.npz")
    x[:, 0, 0, 0, 0, 0] = np.nan
    assert "is not finite" in fails("issd", *quick(ckpt), "--data", latents(tmp_path / "c", x, np.zeros(8, int)))
    (tmp_path / "c" / "labels.npy").write_bytes(b"x")
    assert "make it again" in fails("issd", *quick(ckpt), "--data", tmp_path / "c")


def test_a_diverging_run_stops_and_keeps_the_last_good_state(fails, tmp_path, ckpt):
    """A network that gives NaN from step 6 on: step 5's checkpoint stands, and step 6 is named."""
    words = [*quick(ckpt), "--save-every", 5, "--log-every", 100]
    words[words.index("--steps") + 1] = 20
    original = issd.issd_loss
    calls = []

    def poisoned(*args, **kwargs):
        loss, info = original(*args, **kwargs)
        calls.append(1)
        return (loss * float("nan") if len(calls) >= 6 else loss), info
    issd.issd_loss = poisoned
    try:
        message = fails("issd", *words)
    finally:
        issd.issd_loss = original
    assert "step 6: the loss is not finite" in message and "last.pt holds the last good state" in message
    held = torch.load(tmp_path / "out" / "last.pt", weights_only=True)
    assert held["step"] == 5 and all(v.isfinite().all() for v in held["model"].values())


def test_skipped_updates_leave_no_trace(tiny):
    """A non-finite gradient changes neither weights nor moments, on the device, without a look from the host."""
    import copy
    proc, net = runtime.Processes("off"), copy.deepcopy(tiny).train()
    opt, guard = runtime.adamw(net, 1e-3), runtime.Guard(proc)
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 4]), torch.tensor([0, 1])
    for step, factor in enumerate((1.0, float("inf"), 1.0)):
        before = copy.deepcopy((net.state_dict(), opt.state_dict()["state"]))
        loss = net(x, t, y).square().mean() * factor
        loss.backward()
        guard.update(opt, loss, step)
        same = all(torch.equal(v, before[0][k]) for k, v in net.state_dict().items())
        assert same == (factor != 1)
        if factor != 1:
            assert all(torch.equal(v[k], before[1][i][k]) for i, v in opt.state_dict()["state"].items() for k in v)
    with pytest.raises(runtime.UserError, match="step 2: the loss"):
        guard.check("nowhere")


def test_output_folder(fails, tmp_path, ckpt):
    (tmp_path / "file").write_text("")
    assert "cannot write there" in fails("issd", *quick(ckpt, "file"))
    assert "cannot write there" in fails("issd", *quick(ckpt, "/proc/nothing"))
    assert "cannot write" in fails("sample", "--ckpt", ckpt, "--out", "/proc/x.png")
    assert "must end in .png" in fails("sample", "--ckpt", ckpt, "--out", "x.jpg")
    torch.save(checkpoint(models.fill_random(models.build(models.make_arch("DiT-Ti/2", 4, 1, 10, False)))), tmp_path / "small.pt")
    assert "only samples of one shape can be compared" in fails("sample", "--compare", ckpt, tmp_path / "small.pt", "--nfe", 2)
    (tmp_path / "x.npz").mkdir()
    assert "cannot write there" in fails("sample", "--ckpt", ckpt, "--out", "x.npz") and "cannot write there" in fails("sample", "--ckpt", ckpt, "--out", "file/x.npz")
    assert "it is a folder" in fails("fid", "ref", "digits", "--features", "digits-cnn", "--out", "x.npz")
    assert "--out is empty" in fails("issd", *quick(ckpt, ""))
    assert "must be a number" in fails("fid", ckpt, "digits", "--features", "digits-cnn", "--num-samples", 4, "--cfg", "nan")
    assert "not allowed with" in fails("sample", "--ckpt", ckpt, "--compare", ckpt, ckpt) and "is required" in fails("sample")
    assert "--label 10" in fails("sample", "--ckpt", ckpt, "--label", 10)
    assert "--num-samples" in fails("sample", "--ckpt", ckpt, "--num", 0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "last.pt").write_bytes(b"damaged")
    assert "damaged" in fails("issd", *quick(ckpt, "full"))


def test_statistics_that_are_none(fails, tmp_path):
    rng = np.random.default_rng(0)
    good = dict(mu=np.zeros(3), sigma=np.eye(3), features="x", count=9, kept=rng.normal(size=(5, 3)))
    for more, message in ((dict(count="many"), "want an integer"), (dict(count=[1, 2]), "want an integer"), (dict(kept=np.zeros((5, 2))), "want the features (n, 3)"),
                          (dict(kept=np.full((5, 3), np.nan)), "not finite"), (dict(mu=np.zeros(0), sigma=np.zeros((0, 0))), "want floats (d,)")):
        np.savez(tmp_path / "good.npz", **good)
        np.savez(tmp_path / "bad.npz", **{**good, **more})
        assert message in fails("fid", "bad.npz", "good.npz")


def test_another_digits_teacher(fails, tmp_path, ckpt):
    inside("train.py", "--ckpt", ckpt, "--steps", 1, "--batch-size", 4, "--out", tmp_path / "runs" / "teacher-digits")
    assert "made anew when runs/teacher-digits is deleted" in fails("issd", "--steps", 1)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_when_saving(fails, tmp_path, ckpt):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "last.tmp").symlink_to("/dev/full")
    message = fails("issd", *quick(ckpt))
    assert "cannot save" in message and "none was saved before" in message and not (tmp_path / "out" / "last.pt").exists()


def test_under_torchrun_one_rank_speaks(tmp_path, ckpt):
    done = torchrun(2, "issd.py", "--ckpt", ckpt, "--batch-size", 9, "--out", tmp_path / "x", check=False)
    lines = [line for line in done.stderr.splitlines() if "issd.py: error:" in line]
    assert done.returncode != 0 and len(lines) == 1 and "must be divisible by their number, 2" in lines[0]
    assert "Traceback" not in done.stderr.split("issd.py: error:")[0]
