import pytest
import torch
from conftest import checkpoint, inside, losses, torchrun, weights
from test_issd import batch

import checkpoints
import models
import ssd
import train
from runtime import Processes
from solvers import add_noise, ddim_step, make_grid, make_schedule, sample, to_x0_eps


class Scale(torch.nn.Module):
    """out = w x + c t / 1000 + d y, two channels of which the second is not the prediction's."""
    num_classes = 10

    def __init__(self, w, c=0.2, d=0.0):
        super().__init__()
        self.w, self.c, self.d, self.calls = torch.nn.Parameter(torch.tensor(w)), c, d, []

    def forward(self, x, t, y):
        self.calls.append((t.tolist(), torch.is_grad_enabled()))
        out = self.w * x + self.c * t.view(-1, 1, 1, 1) / 1000 + self.d * y.float().reshape(len(y), -1).mean(1).view(-1, 1, 1, 1)
        return torch.cat([out, 1e3 * out], 1)

    def prediction(self, x, t, y):
        return self(x, t, y)[:, :1]


def test_equation_5_by_hand():
    b, lam, teacher, student = batch(), 0.3, Scale(0.5), Scale(0.6)
    x_s = add_noise(b["schedule"], b["x0"], b["noise"], b["s"])
    eps_s = teacher.prediction(x_s, b["s"], b["y"])
    x_t = ddim_step(b["schedule"], x_s, eps_s, b["s"], b["t"])
    target = lam * teacher.prediction(x_t, b["t"], b["y"]) + (1 - lam) * eps_s        # lam weighs the cleaner step
    want = (target.detach() - student.prediction(x_s, b["s"], b["y"])).square().mean()
    want_grad, = torch.autograd.grad(want, student.w)
    teacher.calls.clear(), student.calls.clear()
    loss, info = ssd.ssd_loss(student, teacher, lam=lam, **b)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, student.w)[0], want_grad)
    assert teacher.calls == [(b["s"].tolist(), False), (b["t"].tolist(), False)] and student.calls == [(b["s"].tolist(), True)]
    torch.testing.assert_close(info["x_t"], x_t)


def test_lam_zero_is_an_exact_no_op(tiny):
    for amp in ("off", "bf16"):
        net = Processes(amp).mixed(tiny)
        assert ssd.ssd_loss(net, net, lam=0.0, **batch())[0] == 0
        assert ssd.ssd_loss(net, net, lam=0.3, **batch())[0] > 0


def test_a_guided_step_changes_only_the_way(tiny):
    b, net = batch(), tiny
    loss, info = ssd.ssd_loss(net, net, lam=1.0, guided=lambda x, t, y: 0 * x, **b)
    torch.testing.assert_close(info["x_t"], ddim_step(b["schedule"], info["x_s"], torch.zeros_like(b["x0"]), b["s"], b["t"]))
    want = (net(info["x_t"], b["t"], b["y"]) - net(info["x_s"], b["s"], b["y"])).square().mean()
    torch.testing.assert_close(loss, want)


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_equation_5_is_about_eps_whatever_the_network_predicts(prediction):
    """A network that predicts v, and the eps network that says the same, have the same loss."""
    b, net, other = batch(), Scale(0.5), Scale(0.6)
    as_eps = lambda n: lambda x, t, y: to_x0_eps(b["schedule"], x, n.prediction(x, t, y), t, prediction)[1]
    torch.testing.assert_close(ssd.ssd_loss(other, net, lam=0.3, prediction=prediction, **b)[0], ssd.ssd_loss(as_eps(other), as_eps(net), lam=0.3, **b)[0])
    net.d, other.d, cfg, null = 0.1, 0.2, torch.full((4,), 7.5), torch.tensor([10])
    torch.testing.assert_close(ssd.ssd_text_loss(other, net, lam=0.3, null=null, cfg=cfg, prediction=prediction, **b)[0],
                               ssd.ssd_text_loss(as_eps(other), as_eps(net), lam=0.3, null=null, cfg=cfg, **b)[0], rtol=1e-4, atol=1e-5)


def test_equation_17_on_one_point():
    """All data at mu: v(x, t) = (x - mu) / t is constant along its trajectories, so Eq. 16 is exact and the loss of Eq. 17 zero; another field's is not."""
    flow, mu, g = make_schedule("interpolant"), 0.4, torch.Generator().manual_seed(0)
    exact = lambda x, t, y: (x - mu) / t.view(-1, 1, 1, 1)
    noise, s = torch.randn(6, 1, 4, 4, dtype=torch.float64, generator=g), torch.linspace(0.2, 1, 6, dtype=torch.float64)
    b = dict(schedule=flow, x0=torch.full_like(noise, mu), y=None, s=s, t=s - 0.1, noise=noise, lam=1.0, prediction="velocity")
    loss, info = ssd.ssd_loss(exact, exact, **b)
    assert loss < 1e-25 and ssd.ssd_loss(exact, lambda x, t, y: exact(x, t, y) + x, **b)[0] > 0.1
    torch.testing.assert_close(info["x_t"], mu + (s - 0.1).view(-1, 1, 1, 1) * (noise - mu))  # Euler's step lands on the line


def test_student_learns_what_dpm_solver_2_knows():
    """Gaussian data: the target of Eq. 5, taken as the prediction at x_s, carries ten steps nearer to the exact solution than DDIM; lam = 1 (Eq. 10) farther."""
    from test_solvers import Gaussian
    s, x = make_schedule("linear"), torch.randn(8, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    net, grid = Gaussian(s), make_grid("dit", 10)
    def fused_step(lam):
        z = x
        for t, u in zip(grid[:-2], grid[1:-1]):
            e = net(z, t, None)
            e = torch.lerp(e, net(ddim_step(s, z, e, t, u), u, None), lam)
            z = ddim_step(s, z, e, t, u)
        return float((z - net.exact(x, 999, 0)).abs().max())
    assert fused_step(0.3) < 0.5 * fused_step(0.0) < 0.5 * fused_step(1.0)


@pytest.mark.parametrize("kind", ["labels", "prompts"])
def test_both_predictions_of_guidance_are_matched(kind):
    b, lam, teacher, student = batch(), 0.3, Scale(0.5, d=0.1), Scale(0.6, d=0.2)
    y, null = (b.pop("y"), torch.tensor([10])) if kind == "labels" else (torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(1)), torch.zeros(1, 3, 5))
    b.pop("y", None)
    nothing, cfg = null.expand_as(y), torch.tensor([5.0, 7.5, 10.0, 15.0])
    x_s = add_noise(b["schedule"], b["x0"], b["noise"], b["s"])
    cond, uncond = teacher.prediction(x_s, b["s"], y), teacher.prediction(x_s, b["s"], nothing)
    x_t = ddim_step(b["schedule"], x_s, uncond + cfg.view(-1, 1, 1, 1) * (cond - uncond), b["s"], b["t"])
    want = 0
    for c, e_s in ((y, cond), (nothing, uncond)):
        target = lam * teacher.prediction(x_t, b["t"], c) + (1 - lam) * e_s
        want = want + (target - student.prediction(x_s, b["s"], c)).square().mean()
    loss, info = ssd.ssd_text_loss(student, teacher, y=y, null=null, lam=lam, cfg=cfg, **b)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(info["x_t"], x_t)
    assert ssd.ssd_text_loss(teacher, teacher, y=y, null=null, lam=0.0, cfg=cfg, **b)[0] == 0


def chosen(*words, info=None):
    args = ssd.parser().parse_args(words)
    ssd.fill_defaults(args, info or train.describe_base(args))
    return args


def test_presets_are_the_papers():
    a = chosen("--model", "DiT-XL/2", "--nfe", "50", "--image-size", "512")
    assert (a.lam, a.lr, a.batch_size, a.steps, a.cfg, a.data, a.interval) == (0.30, 5e-6, 64, 8007, 1.5, "synthetic:10", None)
    a = chosen("--model", "SiT-XL/2-REPA", "--nfe", "10")
    assert (a.lam, a.lr, a.cfg, a.interval, a.teacher) == (1.0, 5e-6, 1.8, None, "fixed")
    a = chosen("--model", "SiT-XL/2-REPA", "--nfe", "250")
    assert (a.lam, a.interval, a.teacher) == (1.0, 0.005, "ema")
    assert chosen("--model", "SiT-XL/2-REPA", "--nfe", "10", "--interval", "0.1").teacher == "fixed" and chosen("--model", "SiT-XL/2-REPA", "--nfe", "200").teacher == "ema"
    a = chosen("--model", "SD-v1.5", "--data", "somewhere.npz")
    assert (a.lam, a.lr, a.batch_size, a.steps, a.cfg, a.text_cfg) == (0.30, 1e-6, 96, 4000, 7.5, [5.0, 15.0])


def run(*words):
    inside("ssd.py", *words)


COMMON = ("--batch-size", 8, "--lr", 1e-3, "--eval-samples", 0, "--save-every", 3, "--log-every", 1)


@pytest.fixture(scope="module")
def flow(tmp_path_factory, tiny):
    path = tmp_path_factory.mktemp("flow") / "base.pt"
    torch.save(checkpoint(tiny, prediction="velocity", schedule="interpolant"), path)
    return path


def test_a_teacher_that_moves_resumes_exactly(tmp_path, flow):
    """Stopped after 3 of 6 steps and continued, to the bit; and its average is one: it moved, less than the student."""
    words = ("--ckpt", flow, "--nfe", 10, "--interval", 0.005, *COMMON)
    run(*words, "--steps", 6, "--out", tmp_path / "whole")
    import signal, os
    from runtime import Log
    step, Log_step = 3, Log.step
    def stopping(self, done, loss):
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return Log_step(self, done, loss)
    with pytest.MonkeyPatch.context() as m, pytest.raises(SystemExit):
        m.setattr(Log, "step", stopping)
        run(*words, "--steps", 6, "--out", tmp_path / "parts")
    run(*words, "--steps", 6, "--out", tmp_path / "parts")
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts"))
    base = torch.load(flow, weights_only=True)["model"]
    for part in ("model", "average"):
        assert all(torch.equal(v, b[part][k]) for k, v in a[part].items())
    moved = lambda part: sum(float((v - base[k]).abs().sum()) for k, v in a[part].items())
    assert 0 < moved("average") < 0.01 * moved("model") and losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_one_node_and_the_base_model_elsewhere(tmp_path, ckpt, tiny):
    run("--ckpt", ckpt, "--cfg", 1, "--nfe", 5, "--only-step", 2, "--steps", 3, "--lam", 0.5, *COMMON, "--out", tmp_path)
    net, info = checkpoints.load_model(tmp_path / "last.pt")
    grid = make_grid("dit", 5)
    assert info["only_node"] == grid[1]
    import data
    from runtime import UserError
    proc = Processes("off")
    with pytest.raises(UserError, match="--elsewhere"):
        data.sample_images(proc.mixed(net), info, proc, 4, 0)
    got, _ = data.sample_images(proc.mixed(net), {**info, "elsewhere": proc.mixed(tiny)}, proc, 4, 0)
    from runtime import generator
    noise = torch.randn(4, 1, 8, 8, generator=generator("cpu", 0, 0, 4))
    want = sample([tiny, net, tiny, tiny, tiny], noise, torch.arange(4), make_schedule("linear"), grid)
    assert (got == data.to_uint8(want).numpy()).all()


def test_a_distilled_model_keeps_its_grid_and_two_processes_agree(tmp_path, tiny):
    base = tmp_path / "pd.pt"
    torch.save(checkpoint(tiny, grid=[999, 733, 466, 200, -1], nfe=4, method="pd"), base)
    words = ("--ckpt", base, "--steps", 3, *COMMON)
    run(*words, "--out", tmp_path / "one")
    torchrun(2, "ssd.py", *words, "--out", tmp_path / "two")
    assert checkpoints.describe(tmp_path / "one" / "last.pt")["grid"] == [999, 733, 466, 200, -1]
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max(float((a[k] - b[k]).abs().max()) for k in a) < 1e-5 and losses(tmp_path / "one") != []
    assert any(not torch.equal(v, tiny.state_dict()[k]) for k, v in a.items())


def test_what_it_refuses(tmp_path, ckpt, flow, tiny):
    from runtime import UserError
    torch.save(checkpoint(tiny, only_node=999), tmp_path / "one-node.pt")
    torch.save(checkpoint(models.with_guidance(tiny)), tmp_path / "w.pt")
    out = ("--eval-samples", 0, "--dry-run", "--out", tmp_path / "x")
    for words, message in ((("--ckpt", ckpt, "--only-step", 0), "--only-step 0"), (("--ckpt", ckpt, "--only-step", 10), "between 1 and 9"), (("--ckpt", ckpt, "--interval", 0.1), "--interval"),
                           (("--ckpt", ckpt, "--guided", "all", "--cfg", 1), "--cfg other than 1"), (("--ckpt", ckpt, "--drop", 1.5), "--drop 1.5"), (("--ckpt", ckpt, "--teacher", "ema"), "velocity"),
                           (("--ckpt", flow, "--only-step", 2, "--interval", 0.1), "--interval"), (("--ckpt", tmp_path / "one-node.pt"), "student of one step"),
                           (("--ckpt", tmp_path / "w.pt"), "scale of guidance as an input"), (("--ckpt", ckpt, "--text-cfg", 15, 5), "--text-cfg"), (("--ckpt", ckpt, "--cfg", "nan"), "--cfg nan")):
        with pytest.raises(UserError, match=message):
            run(*words, *out)
    run("--ckpt", flow, "--nfe", 250, "--only-step", 250, *out)  # t = 0 is a time of this model


def test_it_trains_on_its_own_samples_and_tells_the_plan(tmp_path, ckpt, tiny, monkeypatch):
    import runtime
    monkeypatch.setattr(runtime, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(train.runtime, "CACHE", tmp_path / "cache")
    out = inside("ssd.py", "--ckpt", ckpt, "--nfe", 4, "--data", "synthetic:3", "--steps", 2, *COMMON, "--out", tmp_path / "x")
    assert len(losses(tmp_path / "x")) == 2 and "16 samples of the base model itself, 3 steps" in out
    import data
    asked, chunks = [], data.sample_chunks
    monkeypatch.setattr(data, "sample_chunks", lambda net, info, *a, **kw: asked.append(info["grid"]) or chunks(net, info, *a, **kw))
    torch.save(checkpoint(tiny, grid=[999, 733, 466, 200, -1], nfe=4, method="pd"), tmp_path / "pd.pt")
    run("--ckpt", tmp_path / "pd.pt", "--data", "synthetic:4", "--only-step", 2, "--steps", 1, *COMMON, "--out", tmp_path / "z")  # of its own steps, by the base alone
    assert asked == [[999, 733, 466, 200, -1]]
    out = inside("ssd.py", "--model", "SiT-XL/2-REPA", "--nfe", 250, "--dry-run", "--out", tmp_path / "y")
    assert "t = s - 0.005, ema teacher" in out and "675" in out and not (tmp_path / "y").exists()


# ---- The text-to-image form, from cached latents and embeddings to samples


def tiny_unet():
    arch = dict(net="UNet", input_size=8, in_channels=4, model_channels=32, num_res_blocks=1, channel_mult=[1, 2], attention_resolutions=[2, 1], num_heads=4,
                context="text", context_dim=12)
    return models.fill_random(models.build(arch))


def test_a_text_model_trains_on_one_and_two_processes_and_is_sampled(tmp_path):
    import json
    import numpy as np
    g, cache = np.random.default_rng(0), tmp_path / "cache"
    cache.mkdir()
    np.save(cache / "latents.npy", g.standard_normal((12, 2, 2, 4, 8, 8)).astype(np.float16))
    np.save(cache / "labels.npy", np.arange(12) % 5)
    np.save(cache / "embeddings.npy", g.standard_normal((5, 7, 12)).astype(np.float16))
    np.save(cache / "null.npy", g.standard_normal((1, 7, 12)).astype(np.float16))
    (cache / "meta.json").write_text(json.dumps({"classes": 0, "scale": 0.18215}))
    net = tiny_unet()
    torch.save(checkpoint(net, name="SD-v1.5", schedule="sd", scale=0.18215, classes=0, cfg=7.5), tmp_path / "base.pt")
    words = ("--ckpt", tmp_path / "base.pt", "--data", cache, "--steps", 3, "--nfe", 4, "--batch-size", 4, "--lr", 1e-3, "--log-every", 1, "--save-every", 3)
    run(*words, "--out", tmp_path / "one")
    torchrun(2, "ssd.py", *words, "--out", tmp_path / "two")
    a, b, base = weights(tmp_path / "one"), weights(tmp_path / "two"), net.state_dict()
    total = lambda u, v: sum(float((u[k] - v[k]).abs().sum()) for k in u)
    assert total(a, b) < 1e-3 * total(a, base) and all(l > 0 for l in losses(tmp_path / "one"))  # a bias before a norm has no gradient, and Adam divides by it
    torch.testing.assert_close(torch.tensor(losses(tmp_path / "one")), torch.tensor(losses(tmp_path / "two")), rtol=1e-4, atol=1e-7)
    assert total(a, base) > 0.1
    info = checkpoints.describe(tmp_path / "one" / "last.pt")
    assert info["grid"] == [751, 501, 251, 1, 0]  # latent diffusion's own, whose end is a time that the network knows
    torch.testing.assert_close(info["null"], torch.from_numpy(np.load(cache / "null.npy")).float())
    inside("sample.py", "--ckpt", tmp_path / "one" / "last.pt", "--prompts", cache, "--num-samples", 3, "--out", tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as f:
        assert f["arr_0"].shape == (3, 4, 8, 8) and np.isfinite(f["arr_0"]).all() and f["arr_1"].tolist() == [0, 1, 2]
