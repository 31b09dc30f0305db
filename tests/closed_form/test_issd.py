"""iSSD's loss against Eq. 6 and 7 by hand, and the paper's numbers."""
import copy

import pytest
import torch
from conftest import inside
from toys import Layers, pair_batch

import issd
import models
from kit import checkpoints, selfstep
from kit.base import describe_base
from kit.cli import UserError
from kit.processes import Processes
from kit.run import adamw
from solvers import add_noise, ddim_step

READINGS = ["teacher", "student", "literal"]


@pytest.mark.parametrize("reading", READINGS)
def test_equation_6_by_hand(reading):
    b = pair_batch()
    lam = 0.3
    teacher = Layers([0.5, -0.7, 0.9])
    student = Layers([0.6, -0.5, 0.8])
    features_of = teacher if reading == "teacher" else student
    eps_of = student if reading == "student" else teacher
    x_s = add_noise(b["schedule"], b["x0"], b["noise"], b["s"])
    with torch.no_grad():
        x_t = ddim_step(b["schedule"], x_s, eps_of(x_s, b["s"], None), b["s"], b["t"])
    f = x_s  # x_s^(1)
    h = x_t  # x~_t^(1) = x_t: the input is not fused
    for l in range(3):  # x~_t^(l+1) = lam f_l(x_s^(l), s) + (1 - lam) f_l(x~_t^(l), t)
        f = features_of.layer(l, f, b["s"])
        h = lam * f.detach() + (1 - lam) * student.layer(l, h, b["t"])
    want = (teacher(x_t, b["t"], None) - h).square().mean()
    want_grad = torch.autograd.grad(want, student.w)[0]

    teacher.calls.clear()
    student.calls.clear()
    loss, _ = issd.issd_loss(student, teacher, lam=lam, reading=reading, **b)
    grad = torch.autograd.grad(loss, student.w)[0]
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(grad, want_grad)

    # Who is evaluated where, with a gradient in the student's fused pass alone:
    at_s = (b["s"].tolist(), False)
    t = b["t"].tolist()
    of_student = {"teacher": [], "student": [at_s], "literal": [at_s]}
    of_teacher = {"teacher": [at_s], "student": [], "literal": [at_s]}
    assert student.calls == of_student[reading] + [(t, True)]
    assert teacher.calls == of_teacher[reading] + [(t, False)]


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_lam_zero_is_an_exact_no_op_and_more_is_not(tiny, reading, amp):
    proc = Processes(amp)
    for lam in (0.0, 0.25):
        student = copy.deepcopy(tiny).train()
        teacher = proc.frozen(copy.deepcopy(tiny))
        if amp == "bf16":
            assert teacher.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
            assert teacher.y_embedder.embedding_table.weight.dtype == torch.float32
        opt = adamw(student, 1e-3)
        for step in range(3):
            loss, _ = issd.issd_loss(proc.autocast(student), proc.autocast(teacher), lam=lam,
                                     reading=reading, **pair_batch(step))
            loss.backward()
            opt.step()
            opt.zero_grad()
        before = tiny.state_dict()
        changed = [k for k, v in student.state_dict().items() if not torch.equal(v, before[k])]
        if lam == 0:
            assert loss.item() == 0
            assert not changed
        else:
            assert loss.item() > 0
            assert len(changed) > 20
            assert "pos_embed" not in changed


def test_lam_one_repeats_the_stored_output_without_gradient(tiny):
    student = copy.deepcopy(tiny).train()
    teacher = copy.deepcopy(tiny).eval()
    b = pair_batch()
    loss, aux = issd.issd_loss(student, teacher, lam=1.0, **b)
    loss.backward()
    with torch.no_grad():
        want = (teacher(aux["x_t"], b["t"], b["y"]) - aux["eps_s"]).square().mean()
    assert loss.item() == pytest.approx(want.item())
    assert loss > 0
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in student.parameters())


@pytest.mark.parametrize("reading", READINGS)
def test_stored_features_carry_no_gradient(tiny, reading):
    """Every output that is stored is a constant, and the teacher has no gradient."""
    student = copy.deepcopy(tiny).train()
    teacher = copy.deepcopy(tiny).eval()
    stored = []

    def watch(net):
        def watched(x, t, y, tap=None):
            def see(l, h):
                if not torch.is_grad_enabled():
                    stored.append(h)
                return tap(l, h)
            return net(x, t, y, tap=tap and see)
        return watched

    loss, _ = issd.issd_loss(watch(student), watch(teacher), lam=0.3, reading=reading,
                             **pair_batch())
    loss.backward()
    assert len(stored) == 4
    assert not any(h.requires_grad for h in stored)
    assert all(p.grad is None for p in teacher.parameters())


def test_learned_variance_is_not_matched():
    """Only the first C of 2C channels enter the loss; x_t is made from them alone."""
    def net(shift):
        def two_halves(x, t, y, tap=None):
            out = torch.cat([x * 0.5, torch.full_like(x, shift)], 1)
            return tap(0, out) if tap else out
        return two_halves

    assert issd.issd_loss(net(3.0), net(7.0), lam=0.0, **pair_batch())[0] == 0


def test_student_of_a_v_model_starts_at_zero_for_lam_zero(tiny):
    b = pair_batch()
    assert issd.issd_loss(tiny, tiny, lam=0.0, prediction="v", **b)[0] == 0
    assert issd.issd_loss(tiny, tiny, lam=0.3, prediction="v", **b)[0] > 0


def chosen(*words, spec=None):
    """The arguments with all defaults filled in."""
    args = issd.parser().parse_args(words)
    issd.apply_issd_defaults(args, spec or describe_base(args))
    return args


def test_presets_are_table_9():
    a = chosen("--model", "DiT-XL/2", "--nfe", "10")
    assert (a.lam, a.lr, a.batch_size, a.steps) == (0.25, 5e-6, 128, 8007)
    assert (a.cfg, a.data, a.eval_samples) == (1.5, "synthetic:10", 0)
    a = chosen("--model", "DiT-XL/2", "--nfe", "50", "--image-size", "512")
    assert (a.lam, a.lr, a.batch_size, a.steps) == (0.30, 5e-6, 64, 8007)
    assert a.data == "synthetic:50"
    a = chosen("--model", "DiT-XL/2", "--nfe", "20", "--data", "synthetic")
    assert a.data == "synthetic:20"
    a = chosen("--model", "DiT-S/2", "--nfe", "20")
    assert (a.lam, a.lr, a.batch_size, a.steps) == (0.10, 1e-5, 512, 500)
    a = chosen("--model", "DiT-B/2", "--nfe", "50")
    assert (a.lam, a.lr, a.batch_size, a.steps) == (0.35, 5e-6, 256, 1001)
    a = chosen("--model", "DiT-XL/2", "--lam", "0.4", "--lr", "1e-3")
    assert (a.lam, a.lr) == (0.4, 1e-3)


@pytest.mark.parametrize("name, size", [
    ("LDM-ImageNet", 256), ("LDM-CelebAHQ", 256), ("LDM-Bedroom", 256), ("LDM-Churches", 256),
    ("SD-v1.5", 512), ("DiT-XL/2", 256)])
def test_the_resolution_that_a_network_is_made_for(name, size):
    spec = checkpoints.describe(None, name)
    known = [("XL", 256), ("XL", 512)]
    assert selfstep.paper_size(spec, known) == ("XL", size)


@pytest.mark.parametrize("name", ["SiT-XL/2", "LDM-ImageNet"])
def test_pairs_end_where_sampling_evaluates_the_student(name):
    """Their grids end at t = 0, a time, at which no step begins: issd.py has no pair there; ssd.py,
    whose student runs at the other end of the pair, has one."""
    words = f"--model {name} --nfe 5 --only-step 5 --eval-samples 0 --dry-run".split()
    with pytest.raises(UserError, match="must lie between 1 and 4"):
        inside("issd.py", *words)
    assert "pair 5 only" in inside("ssd.py", *words)


def test_presets_of_a_progressively_distilled_model():
    arch = models.make_arch("DiT-XL/2", 32, 4, 1000, True)
    spec = dict(checkpoints.DIT_DEFAULTS, name="DiT-XL/2", classes=1000, arch=arch, method="pd",
                nfe=4)
    a = chosen("--model", "DiT-XL/2", spec=spec)
    assert (a.lam, a.nfe) == (0.05, 4)
