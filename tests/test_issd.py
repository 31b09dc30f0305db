import copy
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT, inside, weights

import checkpoints
import issd
import models
from runtime import Processes, adamw
from solvers import add_noise, ddim_step, make_grid, make_schedule

READINGS = ["teacher", "student", "literal"]


def batch(B=4, g=torch.Generator().manual_seed(0)):
    n = torch.tensor([0, 3, 7, 8])[:B]
    nodes = torch.tensor(make_grid("dit", 10))
    return dict(schedule=make_schedule("linear"), x0=torch.rand(B, 1, 8, 8, generator=g) * 2 - 1, y=torch.tensor([1, 5, 9, 10])[:B],
                s=nodes[n], t=nodes[n + 1], noise=torch.randn(B, 1, 8, 8, generator=g))


class Toy(torch.nn.Module):
    """Two layers h -> w h + c t and an output layer, so that Eq. 6 can be written out by hand."""
    num_classes = 10

    def __init__(self, w, c):
        super().__init__()
        self.w, self.c, self.calls = torch.nn.Parameter(torch.tensor(w)), c, []

    def layer(self, l, h, t):
        return self.w[l] * h + self.c * (l + 1) * t.view(-1, 1, 1, 1) / 1000

    def forward(self, x, t, y, tap=None):
        self.calls.append((t.tolist(), torch.is_grad_enabled()))
        h = x
        for l in range(3):
            h = self.layer(l, h, t)
            h = tap(l, h) if tap else h
        return h


@pytest.mark.parametrize("reading", READINGS)
def test_equation_6_by_hand(reading):
    b, lam = batch(), 0.3
    teacher, student = Toy([0.5, -0.7, 0.9], 0.2), Toy([0.6, -0.5, 0.8], 0.2)
    features_of = teacher if reading == "teacher" else student
    eps_of = student if reading == "student" else teacher
    x_s = add_noise(b["schedule"], b["x0"], b["noise"], b["s"])
    with torch.no_grad():
        x_t = ddim_step(b["schedule"], x_s, eps_of(x_s, b["s"], None), b["s"], b["t"])
    f, h = x_s, x_t                                       # x_s^(1), and x~_t^(1) = x_t: the input is not fused
    for l in range(3):                                    # x~_t^(l+1) = lam f_l(x_s^(l), s) + (1 - lam) f_l(x~_t^(l), t)
        f = features_of.layer(l, f, b["s"])
        h = lam * f.detach() + (1 - lam) * student.layer(l, h, b["t"])
    want = (teacher(x_t, b["t"], None) - h).square().mean()
    want_grad, = torch.autograd.grad(want, student.w)
    teacher.calls.clear(), student.calls.clear()
    loss, _ = issd.issd_loss(student, teacher, lam=lam, reading=reading, **b)
    grad, = torch.autograd.grad(loss, student.w)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(grad, want_grad)
    # who is evaluated where, and with a gradient only in the student's fused pass:
    s, t = b["s"].tolist(), b["t"].tolist()
    assert student.calls == {"teacher": [], "student": [(s, False)], "literal": [(s, False)]}[reading] + [(t, True)]
    assert teacher.calls == {"teacher": [(s, False)], "student": [], "literal": [(s, False)]}[reading] + [(t, False)]


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_lam_zero_is_an_exact_no_op_and_more_is_not(tiny, reading, amp):
    proc = Processes(amp)
    for lam in (0.0, 0.25):
        student, teacher = copy.deepcopy(tiny).train(), proc.frozen(copy.deepcopy(tiny))
        if amp == "bf16":
            assert teacher.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16 and teacher.y_embedder.embedding_table.weight.dtype == torch.float32
        opt = adamw(student, 1e-3)
        for _ in range(3):
            loss, _ = issd.issd_loss(proc.mixed(student), proc.mixed(teacher), lam=lam, reading=reading, **batch())
            loss.backward()
            opt.step()
            opt.zero_grad()
        changed = [k for k, v in student.state_dict().items() if not torch.equal(v, tiny.state_dict()[k])]
        if lam == 0:
            assert loss.item() == 0 and not changed
        else:
            assert loss.item() > 0 and len(changed) > 20 and "pos_embed" not in changed


def test_lam_one_repeats_the_stored_output_without_gradient(tiny):
    student, teacher = copy.deepcopy(tiny).train(), copy.deepcopy(tiny).eval()
    b = batch()
    loss, info = issd.issd_loss(student, teacher, lam=1.0, **b)
    loss.backward()
    with torch.no_grad():
        want = (teacher(info["x_t"], b["t"], b["y"]) - info["eps_s"]).square().mean()
    assert loss.item() == pytest.approx(want.item()) and loss > 0
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in student.parameters())


@pytest.mark.parametrize("reading", READINGS)
def test_stored_features_carry_no_gradient(tiny, reading):
    """Numerically: the gradient is that of the fused pass with the features held fixed; and none is on a graph."""
    student, teacher = copy.deepcopy(tiny).train(), copy.deepcopy(tiny).eval()
    seen = []
    watch = lambda net: lambda x, t, y, tap=None: net(x, t, y, tap=tap and (lambda l, h: (seen.append(h) if not torch.is_grad_enabled() else None, tap(l, h))[1]))
    issd.issd_loss(watch(student), watch(teacher), lam=0.3, reading=reading, **batch())[0].backward()
    assert len(seen) == 4 and not any(h.requires_grad for h in seen)
    assert all(p.grad is None for p in teacher.parameters())


def test_learned_variance_is_not_matched():
    """Only the first C of 2C channels enter the loss; x_t is made from them alone."""
    b = batch()
    def net(shift):
        def f(x, t, y, tap=None):
            out = torch.cat([x * 0.5, torch.full_like(x, shift)], 1)
            return tap(0, out) if tap else out
        return f
    assert issd.issd_loss(net(3.0), net(7.0), lam=0.0, **b)[0] == 0


def test_student_of_a_v_model_starts_at_zero_for_lam_zero(tiny):
    assert issd.issd_loss(tiny, tiny, lam=0.0, prediction="v", **batch())[0] == 0
    assert issd.issd_loss(tiny, tiny, lam=0.3, prediction="v", **batch())[0] > 0


@pytest.mark.parametrize("file,names", [("issd.py", "issd_loss"), ("ssd.py", "ssd_loss"), ("train.py", "diffusion_loss")])
def test_method_block_can_be_pasted(file, names):
    """The Method section runs with nothing but torch, math and what it imports from solvers."""
    text = (ROOT / file).read_text()
    block = text.split("# ---- Method ")[1].split("# ---- Training ")[0].partition("\n")[2]
    imports = "\n".join(re.findall(r"^from solvers import .*$", text, re.M))
    space = {}
    exec(f"import torch\n{imports}\n{block}", space)
    b = batch()
    if names == "issd_loss":
        loss, _ = space["issd_loss"](Toy([0.6, -0.5, 0.8], 0.2), Toy([0.5, -0.7, 0.9], 0.2), lam=0.25, **b)
    elif names == "ssd_loss":
        loss, _ = space["ssd_loss"](Toy([0.6, -0.5, 0.8], 0.2), Toy([0.5, -0.7, 0.9], 0.2), lam=0.25, **b)
    else:
        loss, _ = space["diffusion_loss"](Toy([0.6, -0.5, 0.8], 0.2), b["schedule"], b["x0"], b["y"], b["t"], b["noise"])
    assert loss > 0


def test_presets_are_table_9():
    def chosen(*words, info=None):
        import train
        args = issd.parser().parse_args(words)
        issd.fill_defaults(args, info or train.describe_base(args))
        return args
    a = chosen("--model", "DiT-XL/2", "--nfe", "10")
    assert (a.lam, a.lr, a.batch_size, a.steps, a.cfg, a.data, a.eval_samples) == (0.25, 5e-6, 128, 8007, 1.5, "synthetic:10", 0)
    a = chosen("--model", "DiT-XL/2", "--nfe", "50", "--image-size", "512")
    assert (a.lam, a.lr, a.batch_size, a.steps) == (0.30, 5e-6, 64, 8007)
    a = chosen("--model", "DiT-S/2", "--nfe", "20")
    assert (a.lam, a.lr, a.batch_size, a.steps) == (0.10, 1e-5, 512, 500)
    a = chosen("--model", "DiT-B/2", "--nfe", "50")
    assert (a.lam, a.lr, a.batch_size, a.steps) == (0.35, 5e-6, 256, 1001)
    info = dict(checkpoints.DIT_DEFAULTS, name="DiT-XL/2", classes=1000, arch=models.make_arch("DiT-XL/2", 32, 4, 1000, True), method="pd", nfe=4)
    assert chosen("--model", "DiT-XL/2", info=info).lam == 0.05 and chosen("--model", "DiT-XL/2", info=info).nfe == 4
    assert chosen("--model", "DiT-XL/2", "--lam", "0.4", "--lr", "1e-3").lam == 0.4


def test_a_student_samples_without_fusion_and_as_it_was_trained(tmp_path, ckpt):
    """sample.py needs no flags: grid, nfe and guidance are in the file; its samples are plain DDIM of the plain network."""
    inside("issd.py", "--ckpt", ckpt, "--nfe", 7, "--steps", 3, "--batch-size", 8, "--eval-samples", 0, "--lr", 1e-2, "--cfg", 2, "--out", tmp_path / "run")
    inside("sample.py", "--ckpt", tmp_path / "run" / "last.pt", "--num-samples", 5, "--out", tmp_path / "x.npz")
    import numpy as np
    import data
    from runtime import generator
    from solvers import guide, sample
    net, info = checkpoints.load_model(tmp_path / "run" / "last.pt")
    assert info["nfe"] == 7 and info["grid"] == make_grid("dit", 7) and info["cfg"] == 2 and info["method"] == "issd"
    noise = torch.randn(5, 1, 8, 8, generator=generator("cpu", 0, 0, 4))
    x = sample(guide(net, 2.0), noise, torch.arange(5), make_schedule("linear"), make_grid("dit", 7))
    with np.load(tmp_path / "x.npz") as f:
        assert f["arr_0"].shape == (5, 8, 8, 1) and f["arr_0"].dtype == np.uint8 and f["arr_1"].tolist() == [0, 1, 2, 3, 4]
        np.testing.assert_array_equal(f["arr_0"], data.to_uint8(x).numpy().transpose(0, 2, 3, 1))
    assert any(not torch.equal(v, torch.load(ckpt, weights_only=True)["model"][k]) for k, v in weights(tmp_path / "run").items())
    assert Path(tmp_path / "run" / "metrics.json").exists()
