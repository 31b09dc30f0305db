"""EDM's networks: DDPM++ against upstream's numbers, its preconditioning, Heun's sampler, the loss, pickled networks, the commands."""
import io
import json
import os
import pickle
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
from conftest import GOLDEN, inside, losses, weights

import checkpoints
import models
import runtime
import train
from runtime import UserError
from solvers import SIGMA_DATA, from_x0_eps, guide, make_grid, make_schedule, sample, solver_grid, to_x0_eps

ARCH = dict(net="DDPM++", input_size=16, in_channels=3, model_channels=16, num_blocks=1, channel_mult=[1, 2], attn_resolutions=[8], num_classes=10, augment_dim=9)
S = make_schedule("edm")


@pytest.fixture(scope="module")
def upstream():
    f = np.load(GOLDEN / "edm_tiny_edmprecond_l10_a9.npz")
    sd = {k[3:]: torch.from_numpy(f[k].astype(np.float32)) for k in f.files if k.startswith("sd/")}
    return f, sd, checkpoints.load_weights(models.build(ARCH), sd, "golden").eval()


@pytest.fixture
def augmented(upstream):
    """Upstream's network in the state in which most of the numbers were made: told of an augmentation, which here is never done."""
    f, _, net = upstream
    told = torch.from_numpy(f["augment"])
    hook = net.model["map_label"].register_forward_hook(lambda m, i, out: out + net.model["map_augment"](told))
    yield net
    hook.remove()


def denoised(net, x, t, y):
    return to_x0_eps(S, x, net(x, t, y), t, "edm")[0]


# ---- The network ----


def test_network_equals_upstream(upstream, augmented):
    f, _, net = upstream
    x, t, y = torch.from_numpy(f["x"]), torch.from_numpy(f["sigma"]), torch.tensor([0, 3, 9, 10])  # the last is the null label
    x.requires_grad_()
    seen = {}
    D = to_x0_eps(S, x, net(x, t, y, tap=lambda l, h: seen.setdefault(l, h)), t, "edm")[0]
    (D * torch.from_numpy(f["w"])).sum().backward()
    np.testing.assert_allclose(D.detach(), f["D"], atol=1e-4)
    np.testing.assert_allclose(x.grad, f["grad_x"], atol=1e-4)
    for k, p in net.named_parameters():
        if p.requires_grad:
            assert float(p.grad.norm()) == pytest.approx(float(f["gradnorm/" + k]), rel=1e-4), k
    net.zero_grad()
    assert len(net.blocks) == 4 + 7 and sorted(seen) == list(range(12)) and seen[11].shape == x.shape
    with torch.no_grad():
        np.testing.assert_allclose(net.raw(x, torch.from_numpy(f["F_noise_labels"]), y), f["F"], atol=1e-4)
        np.testing.assert_allclose(denoised(net, x, t, torch.full_like(y, 10)), f["D_labels_none"], atol=1e-4)


def test_network_without_augmentation(upstream):
    f, _, net = upstream
    with torch.no_grad():
        np.testing.assert_allclose(denoised(net, *(torch.from_numpy(f[k]) for k in ("x", "sigma")), torch.tensor([0, 3, 9, 10])), f["D_noaug"], atol=1e-4)


def test_preconditioning_equals_upstream(golden):
    f = golden("edm_scalars.npz")
    t = torch.from_numpy(f["edm/sigma"])
    x = torch.full((len(t), 1, 2, 2), 2.0)
    np.testing.assert_allclose(to_x0_eps(S, x, torch.ones_like(x), t, "edm")[0][:, 0, 0, 0], f["edm/D_x2_F1"], rtol=1e-6)
    net, given = models.build(models.make_arch("DDPM++-8x1", 8, 1, 0)), []
    net.raw = lambda x, c_noise, *_: given.append((x, c_noise))
    net(x, t, None)
    np.testing.assert_allclose(given[0][0][:, 0, 0, 0], f["edm/c_in_x2"], rtol=1e-6)
    np.testing.assert_allclose(given[0][1], f["edm/c_noise"], rtol=1e-6)


def test_prediction_and_its_inverse():
    g = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(6, 2, 4, 4, generator=g, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([0.002, 0.1, 0.5, 1, 10, 80], dtype=torch.float64)
    x = x0 + t.view(-1, 1, 1, 1) * eps
    out = from_x0_eps(S, x0, eps, t, "edm")
    back = to_x0_eps(S, x, out, t, "edm")
    torch.testing.assert_close(back[0], x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(back[1], eps, rtol=1e-9, atol=1e-9)
    s = t.view(-1, 1, 1, 1)
    torch.testing.assert_close(out, (x0 - 0.25 / (s ** 2 + 0.25) * x) * (s ** 2 + 0.25).sqrt() / (0.5 * s), rtol=1e-6, atol=1e-6)  # (D - c_skip x) / c_out


def test_keys_and_sizes_of_the_paper():
    """The keys of two of upstream's networks; Table 1 of the KD paper, whose operations are counted within 0.6 %."""
    want = json.loads((GOLDEN / "edm_keys.json").read_text())
    for key, name in (("keys_teacher_uncond_aug9", "DDPM++-t"), ("keys_c32_b2_uncond_aug9", "DDPM++-32")):
        with torch.device("meta"):
            net = models.build({**models.make_arch(name, 32, 3, 0), "augment_dim": 9})
        assert {k: list(v.shape) for k, v in net.state_dict().items()} == {k: shape for k, shape, _ in want[key]}
    table = {"t": (4, 128, 42.42), "128": (2, 128, 25.44), "96": (2, 96, 14.36), "64": (2, 64, 6.42), "32": (2, 32, 1.64)}
    for name, (blocks, channels, gflops) in table.items():
        for labels, suffix in ((0, "-uncond"), (10, "")):
            params, flops = models.count(models.make_arch(f"DDPM++-{name}{suffix}", 32, 3, 10))
            assert params == want[f"ddpmpp_cifar10_c{channels}_b{blocks}_label{labels}_aug0"]["params"]
        assert abs(flops / gflops / 1e9 - 1) < 0.006


def test_names_and_other_sizes():
    arch = models.make_arch("DDPM++-32", 8, 1, 10)  # two levels
    assert arch["attn_resolutions"] == [8] and models.make_arch("DDPM++-32", 64, 3, 0)["attn_resolutions"] == [16]
    assert models.make_arch("DDPM++-t-uncond", 32, 3, 10)["num_classes"] == 0 and models.build(arch).sample_shape == (1, 8, 8)
    with pytest.raises(UserError, match="do not tile a 30x30 input"):
        models.make_arch("DDPM++-32", 30, 3, 0)
    with pytest.raises(UserError, match=r"unknown; choose .*DDPM\+\+-t"):
        models.make_arch("DDPM++-33", 32, 3, 0)
    small = models.make_arch("DDPM++-24x1-uncond", 32, 3, 10)
    assert (small["model_channels"], small["num_blocks"], small["channel_mult"], small["num_classes"]) == (24, 1, [2, 2, 2], 0)
    assert models.make_arch("DDPM++-4x1", 8, 1, 10)["channel_mult"] == [2, 2]
    for name in ("DDPM++-0x1", "DDPM++-6x1", "DDPM++-8x0"):
        with pytest.raises(UserError, match="unknown"):
            models.make_arch(name, 32, 3, 0)


def digits_net(**more):
    return models.fill_random(models.build({**models.make_arch("DDPM++-8x1", 8, 1, 10), **more}), std=0.1)


def test_guidance_as_an_input_is_ignored_at_first():
    net = digits_net()
    x, t, y, w = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1.0, 50.0]), torch.tensor([1, 2, 10]), torch.tensor([1.0, 2.0, 3.0])
    new = models.with_guidance(net)
    assert torch.equal(new(x, t, y, w), net(x, t, y)) and new.arch == {**net.arch, "guidance": True} and models.build(new.arch).arch == new.arch
    new.w_embedder.weight.data.normal_()
    assert (new(x, t, y, w) - new(x, t, y, w + 1)).abs().max() > 1e-4
    assert torch.equal(guide(new, w)(x, t, y), new(x, t, y, w))
    null, cond = (to_x0_eps(S, x, net(x, t, labels), t, "edm")[0] for labels in (torch.full_like(y, 10), y))  # guidance of F is guidance of D
    torch.testing.assert_close(to_x0_eps(S, x, guide(net, 2.5)(x, t, y), t, "edm")[0], null + 2.5 * (cond - null))


def test_dropout_can_be_set_and_is_the_same_for_any_number_of_processes():
    net, x, t, y = digits_net(), torch.randn(4, 1, 8, 8), torch.rand(4) + 0.1, torch.arange(4)
    plain = net.eval()(x, t, y)
    assert torch.equal(net.train()(x, t, y), plain)  # none unless it is set
    net.dropout = 0.5
    draw = lambda proc: runtime.StepRandom(proc, 0, 5, 4)
    net.rng = draw(runtime.Processes("off"))
    whole = net(x, t, y)
    assert (whole - plain).abs().max() > 1e-3 and torch.equal(net.eval()(x, t, y), plain)
    rank = runtime.Processes("off")
    rank.world, rank.rank = 2, 1
    net.train().rng = draw(rank)
    torch.testing.assert_close(net(x[2:], t[2:], y[2:]), whole[2:])
    h = torch.ones(4, 100, 10, 10)
    net.rng = None
    assert abs(float(net.drop(1, h).mean()) - 1) < 0.02 and set(net.drop(1, h).unique().tolist()) == {0.0, 2.0}


def test_half_precision_and_copies():
    """Under bf16 a frozen copy, whose weights are stored in bf16, gives the same bits; a copy's blocks are its own."""
    import copy
    net, x, t, y = digits_net(), torch.randn(4, 1, 8, 8), torch.tensor([0.002, 0.1, 1.0, 80.0]), torch.tensor([0, 3, 9, 10])
    proc, other = runtime.Processes("bf16"), copy.deepcopy(net)
    assert other.blocks[1] is other.model["enc"]["8x8_block0"] and other.out[1] is other.model["dec"]["8x8_aux_conv"]
    half = proc.mixed(proc.frozen(other))(x, t, y)
    assert other.blocks[1].conv0.weight.dtype == torch.bfloat16 and torch.equal(half, proc.mixed(net.eval())(x, t, y))
    whole = net(x, t, y)
    assert half.dtype == torch.float32 and 0 < (half - whole).abs().max() < 0.05 * whole.abs().max()
    torch.testing.assert_close(copy.deepcopy(net).double()(x.double(), t.double(), y).float(), whole, rtol=1e-4, atol=1e-5)


def test_fresh_weights_are_upstreams():
    net = models.build(models.make_arch("DDPM++-32", 8, 1, 10) | {"guidance": True})
    block = net.model["enc"]["8x8_block0"]
    bound = lambda m: float(m.weight.detach().abs().max()) / (6 / (m.weight[0].numel() + m.weight[:, 0].numel())) ** 0.5
    for m, gain in ((block.conv0, 1), (block.conv1, 1e-5), (block.qkv, 0.2 ** 0.5), (block.proj, 1e-5), (net.out[1], 1e-5), (net.model["map_layer0"], 1)):
        assert bound(m) == pytest.approx(gain, rel=0.03)
        assert m.bias.abs().max() == 0
    assert net.w_embedder.weight.abs().max() == 0


# ---- Sampling ----


@pytest.mark.parametrize("steps", [10, 18])
def test_heun_equals_upstream(upstream, steps):
    f, _, net = upstream
    grid, calls = solver_grid(S, "heun", 2 * steps - 1), []

    def watched(x, t, y):
        assert x.dtype == torch.float32
        calls.append((float(t[0]), x.clone()))
        return net(x, t, y)

    out = sample(watched, torch.from_numpy(f["latents"]), torch.tensor([0, 3]), S, grid, "edm", solver="heun")
    assert out.dtype == torch.float32 and len(calls) == 2 * steps - 1
    np.testing.assert_allclose(out, f[f"heun{steps}_out"], atol=2e-4)
    np.testing.assert_allclose([t for t, _ in calls], f[f"heun{steps}_sigma_calls"], rtol=1e-6)
    if steps == 10:
        np.testing.assert_allclose(torch.stack([x for _, x in calls]), f["heun10_x_calls"], rtol=1e-5, atol=2e-4)


def test_noise_levels_equal_upstream(golden):
    f = golden("edm_scalars.npz")
    for n in (2, 5, 10, 18, 35, 40):
        grid = solver_grid(S, "heun", 2 * n - 1)
        np.testing.assert_allclose([t for pair in zip(grid[:-1], grid[1:]) for t in pair][:-1], f[f"t_calls_{n}"], rtol=1e-12)
    assert make_grid("edm", 3) == solver_grid(S, "ddim", 3) == solver_grid(S, "heun", 5) and len(make_grid("edm", 1)) == 2
    for solver, nfe in (("heun", 10), ("heun", 1), ("plms", 9), ("sde", 9)):
        with pytest.raises(UserError, match="--nfe|--solver"):
            solver_grid(S, solver, nfe)
    with pytest.raises(UserError, match="does not go with"):
        solver_grid(make_schedule("interpolant"), "heun", 9)
    with pytest.raises(UserError, match="--grid dit"):
        solver_grid(S, "ddim", 9, "dit")


@pytest.mark.parametrize("schedule", ["edm", "linear"])
def test_heun_is_of_second_order(schedule):
    """Gaussian data N(mu, c^2), whose ODE is known; the discrete schedule is followed in sigma / alpha."""
    s, mu, c = make_schedule(schedule), 0.3, 0.5

    def eps(x, t, y):
        alpha, sigma = s.at(t, x)
        eps = sigma * (x - alpha * mu) / (alpha ** 2 * c ** 2 + sigma ** 2)
        return from_x0_eps(s, (x - sigma * eps) / alpha, eps, t, "edm") if schedule == "edm" else eps

    def end(grid, solver):
        noise = torch.linspace(-2, 2, 8, dtype=torch.float64).view(8, 1, 1, 1)
        states = sample(eps, noise, None, s, grid, "edm" if schedule == "edm" else "eps", keep=True, solver=solver)
        (a, b), (a0, b0) = (s.at(t, noise) for t in (grid[-2], grid[0]))
        exact = a * mu + ((a ** 2 * c ** 2 + b ** 2) / (a0 ** 2 * c ** 2 + b0 ** 2)).sqrt() * (states[0] - a0 * mu)
        return float((states[-2] - exact).abs().max())  # before the last step, which is Euler's

    sizes = (20, 40, 80) if schedule == "edm" else (10, 20, 40)
    grids = [make_grid("edm", n) if schedule == "edm" else [900 - 800 * i // n for i in range(n + 1)] + [0] for n in sizes]
    heun, euler = ([end(grid, solver) for grid in grids] for solver in ("heun", "ddim"))
    ratios = [a / b for a, b in zip(heun, heun[1:])]
    assert heun[-1] < euler[-1] / 5 and all(3 < r < 5.5 for r in ratios), (ratios, heun, euler)


# ---- The loss ----


def test_loss_equals_upstream(golden):
    """Of a network whose D is 0.3 x, sample by sample."""
    f = golden("edm_scalars.npz")
    y, n, t = torch.from_numpy(f["loss/y"]), torch.from_numpy(f["loss/n"]), torch.from_numpy(f["loss/EDMLoss_sigma"])

    def net(x, t, labels):
        c = (t ** 2 + SIGMA_DATA ** 2).view(-1, 1, 1, 1)
        return (0.3 - SIGMA_DATA ** 2 / c) * x * c.sqrt() / (t.view(-1, 1, 1, 1) * SIGMA_DATA)

    class Pinned:
        normal = staticmethod(lambda shape: torch.from_numpy(f["loss/rnd_normal"]).flatten())
    torch.testing.assert_close(train.training_times(S, Pinned), t)
    for i in range(len(y)):
        one = slice(i, i + 1)
        loss, info = train.diffusion_loss(net, S, y[one], None, t[one], n[one], "edm")
        assert float(loss) == pytest.approx(float(f["loss/EDMLoss"][i].mean()), rel=1e-5) and info == {}
    np.testing.assert_allclose((t ** 2 + 0.25) / (t * 0.5) ** 2, f["loss/EDMLoss_weight"].flatten(), rtol=1e-6)


def test_times_of_training():
    rng = lambda: runtime.StepRandom(runtime.Processes("off"), 0, 0, 20000)
    log = train.training_times(S, rng()).log()
    assert abs(float(log.mean()) + 1.2) < 0.03 and abs(float(log.std()) - 1.2) < 0.03
    assert torch.equal(train.training_times(make_schedule("linear"), rng()), rng().integers(0, 1000))
    assert torch.equal(train.training_times(make_schedule("interpolant"), rng()), rng().uniform())


# ---- Files ----


@pytest.fixture
def persistence(monkeypatch):
    """Stand-ins under the names of upstream's modules, to pickle as upstream does."""
    for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    rebuild = lambda meta: pytest.fail("the file's object was rebuilt")
    rebuild.__module__, rebuild.__qualname__, rebuild.__name__ = "torch_utils.persistence", "_reconstruct_persistent_obj", "_reconstruct_persistent_obj"
    sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj = rebuild
    easy = type("EasyDict", (dict,), {"__module__": "dnnlib.util"})
    sys.modules["dnnlib.util"].EasyDict = easy

    class Persistent:
        def __init__(self, kind, source, **state):
            self.meta = dict(type="class", version=6, module_src=source, class_name=kind, state=state)

        def __reduce__(self):
            return rebuild, (self.meta,), None

    def network(sd, kind="EDMPrecond", source="", sigma_data=0.5):
        """A state dict as nested persistent objects, of which enc and dec are plain ModuleDicts."""
        def node(keys, name, path):
            children = OrderedDict()
            for k in keys:
                head, _, rest = k.partition(".")
                children.setdefault(head, []).extend([rest] if rest else [])
            own = lambda buffer: OrderedDict((k, sd[path + k] if buffer else torch.nn.Parameter(sd[path + k])) for k, rest in children.items()
                                             if not rest and (k == "resample_filter") == buffer)
            state = dict(training=False, _parameters=own(False) | {"unused": None}, _buffers=own(True), _non_persistent_buffers_set=set(),
                         _backward_hooks=OrderedDict(), _modules=OrderedDict((k, node(rest, k, f"{path}{k}.")) for k, rest in children.items() if rest))
            if name in ("enc", "dec"):
                held = torch.nn.ModuleDict()
                held.__dict__.update(state)
                return held
            state["_modules"]["none"] = None
            more = dict(sigma_data=sigma_data, _init_kwargs=easy(label_dim=10)) if not path else dict(skip_scale=np.sqrt(0.5))
            return Persistent(kind if not path else "UNetBlock", source, **state, **more)
        return {"ema": node(list(sd), "", ""), "loss_fn": Persistent("EDMLoss", source, sigma_data=0.5), "augment_pipe": None, "dataset_kwargs": easy(path="x")}
    return network


def test_pickled_network_loads_and_samples(tmp_path, upstream, persistence):
    f, sd, _ = upstream
    (tmp_path / "net.pkl").write_bytes(pickle.dumps(persistence(sd, source=f"open({str(tmp_path / 'executed')!r}, 'w')")))
    net, info = checkpoints.load_model(tmp_path / "net.pkl")
    assert net.arch == ARCH and all(torch.equal(v, sd[k]) for k, v in net.state_dict().items()) and net.state_dict().keys() == sd.keys()
    assert (info["prediction"], info["schedule"], info["scale"], info["classes"], info["solver"], info["nfe"], info["name"]) == ("edm", "edm", None, 10, "heun", 35, "DDPM++")
    assert not (tmp_path / "executed").exists()  # the source of the classes is text
    assert not any(p.requires_grad for k, p in net.named_parameters() if "map_augment" in k)
    out = sample(net, torch.from_numpy(f["latents"]), torch.tensor([0, 3]), S, solver_grid(S, "heun", 19), "edm", solver="heun")
    np.testing.assert_allclose(out, f["heun10_out"], atol=2e-4)
    torch.save({"ema": sd}, tmp_path / "net.pt")  # the same as a state dict
    again, described = checkpoints.load_model(tmp_path / "net.pt")
    assert described == info and all(torch.equal(v, sd[k]) for k, v in again.state_dict().items())


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("where, reason", [("top", "it names posix.system"), ("beside", "it names posix.system"), ("storage", "posix.system"), ("state", "it names posix.system"),
                                           ("storage zip", "posix.system"), ("getattr", "it names builtins.getattr"), ("builtins", "it names builtins.eval")])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_hostile_pickles_are_refused(tmp_path, upstream, persistence, where, reason):
    """Nothing is called that the file names, also not by the bytes of a tensor, which are a file of their own."""
    harm, held = Hostile(tmp_path / "executed"), persistence(upstream[1])
    sub = lambda raw: type("Storage", (), {"__reduce__": lambda self: (torch.storage._load_from_bytes, (raw,))})()
    if where == "top":
        held = harm
    elif where == "beside":
        held["loss_fn"] = harm
    elif where == "storage":
        held["ema"].meta["state"]["_buffers"]["x"] = sub(pickle.dumps(harm, protocol=2))
    elif where == "storage zip":
        torch.save(harm, raw := io.BytesIO())
        held["ema"].meta["state"]["_buffers"]["x"] = sub(raw.getvalue())
    elif where == "state":
        held["ema"].meta["state"]["harm"] = [harm]
    elif where == "getattr":
        held["ema"] = type("Get", (), {"__reduce__": lambda self: (getattr, (os, "system"))})()
    else:
        held["ema"] = type("Eval", (), {"__reduce__": lambda self: (eval, (f"open({str(tmp_path / 'executed')!r}, 'w')",))})()
    raw = pickle.dumps(held, protocol=4) if where != "getattr" else b"\x80\x04cbuiltins\ngetattr\n(cos\npath\nVexists\ntR."
    (tmp_path / "net.pkl").write_bytes(raw)
    with pytest.raises(UserError, match="cannot be read") as refusal:
        checkpoints.load_model(tmp_path / "net.pkl")
    assert not (tmp_path / "executed").exists() and (reason in str(refusal.value) or "weights_only" in str(refusal.value) and where.startswith("storage")), refusal.value


def test_a_pickle_changes_nothing_outside(tmp_path):
    """Setting attributes of what it may name does not last: the names are made anew for every file."""
    for name in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n", b"ccollections\nOrderedDict\n"):
        (tmp_path / "net.pkl").write_bytes(b"\x80\x02" + name + b"N}U\x07changedI01\ns\x86b.")  # BUILD with (None, {"changed": True})
        with pytest.raises(UserError, match="cannot be read"):
            checkpoints.read_file(tmp_path / "net.pkl")
        assert not any(hasattr(x, "changed") for x in (torch._utils._rebuild_tensor_v2, OrderedDict))
    for raw in (b"", b"not a pickle", pickle.dumps({"model": 1}), pickle.dumps({"ema": OrderedDict()})):
        (tmp_path / "net.pkl").write_bytes(raw)
        with pytest.raises(UserError, match="cannot be read"):
            checkpoints.read_file(tmp_path / "net.pkl")


def test_other_networks_of_edm_are_refused(tmp_path, upstream, persistence):
    sd = upstream[1]
    for more, message in ((dict(kind="VPPrecond"), "a VPPrecond with sigma_data 0.5"), (dict(sigma_data=1.0), "sigma_data 1.0")):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(persistence(sd, **more)))
        with pytest.raises(UserError, match=message):
            checkpoints.describe(tmp_path / "x.pkl")
    for bad in ({k: v for k, v in sd.items() if "aux_conv" not in k}, {"model.enc.x": torch.zeros(1)}, sd | {"model.enc.16x16_conv.weight": torch.zeros(())}):
        torch.save(bad, tmp_path / "x.pt")
        with pytest.raises(UserError, match=r"only that one is known"):
            checkpoints.describe(tmp_path / "x.pt")
    torch.save(sd | {"model.map_noise.freqs": torch.zeros(8)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="unexpected 1: model.map_noise.freqs"):
        checkpoints.load_model(tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"holds DDPM\+\+, not --model DDPM\+\+-t"):
        checkpoints.describe(tmp_path / "x.pt", "DDPM++-t")


def test_released_names():
    cond, uncond = (checkpoints.describe(None, name) for name in ("DDPM++-t", "DDPM++-t-uncond"))
    assert (cond["classes"], uncond["classes"], cond["arch"]["input_size"], cond["scale"], cond["nfe"]) == (10, 0, 32, None, 35)
    with pytest.raises(UserError, match=r"no released weights for DDPM\+\+-96 at 32"):
        checkpoints.upstream_checkpoint("DDPM++-96", None, "nowhere")


# ---- The commands ----

QUICK = ["--batch-size", 8, "--log-every", 1, "--warmup", 2]


def test_training_resuming_and_sampling(tmp_path):
    words = ["--model", "DDPM++-8x1", "--data", "digits", *QUICK]
    inside("train.py", *words, "--steps", 6, "--decay", "constant", "--out", tmp_path / "whole")
    inside("train.py", *words, "--steps", 3, "--decay", "constant", "--out", tmp_path / "half")
    held = torch.load(tmp_path / "half" / "last.pt", weights_only=True)
    assert (held["name"], held["prediction"], held["schedule"], held["nfe"], held["solver"], held["scale"]) == ("DDPM++-8x1", "edm", "edm", 35, "heun", None)
    held["args"]["steps"] = 6
    torch.save(held, tmp_path / "half" / "last.pt")
    inside("train.py", *words, "--steps", 6, "--decay", "constant", "--out", tmp_path / "half")  # with dropout, and yet the same bits
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "half")
    assert all(torch.equal(v, b[k]) for k, v in a.items()) and len(losses(tmp_path / "half")) == 6
    net, info = checkpoints.load_model(tmp_path / "whole" / "last.pt")
    assert net.arch == models.make_arch("DDPM++-8x1", 8, 1, 10)
    inside("sample.py", "--ckpt", tmp_path / "whole" / "last.pt", "--num-samples", 12, "--nfe", 5, "--cfg", 2, "--out", tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as f:
        assert f["arr_0"].shape == (12, 8, 8, 1) and f["arr_0"].std() > 0
    for solver in ("ddim", "euler"):
        inside("sample.py", "--ckpt", tmp_path / "whole" / "last.pt", "--num-samples", 3, "--nfe", 4, "--solver", solver, "--out", tmp_path / "x.png")
    with pytest.raises(UserError, match="--nfe 4: heun needs an odd number"):
        inside("sample.py", "--ckpt", tmp_path / "whole" / "last.pt", "--nfe", 4, "--out", tmp_path / "x.png")


def test_training_without_classes(tmp_path):
    out = inside("train.py", "--model", "DDPM++-8x1-uncond", "--data", "digits", *QUICK, "--steps", 2, "--out", tmp_path)
    assert "is ready" in out and checkpoints.describe(tmp_path / "last.pt")["classes"] == 0
    inside("sample.py", "--ckpt", tmp_path / "last.pt", "--num-samples", 3, "--nfe", 3, "--out", tmp_path / "x.png")


def test_what_does_not_go_with_edms_networks(tmp_path, monkeypatch):
    import dsd
    import issd
    monkeypatch.chdir(tmp_path)
    for words in (["--prediction", "v"], ["--schedule", "cosine"]):
        with pytest.raises(UserError, match="have their own prediction"):
            inside("train.py", "--model", "DDPM++-8x1", *words)
    torch.save({"ema": digits_net().state_dict()}, tmp_path / "x.pt")
    for module in (issd, dsd):
        with pytest.raises(UserError, match="has EDM's schedule"):
            module.main(module.parser().parse_args(["--ckpt", "x.pt", "--eval-samples", "0", "--data", "digits"] if module is issd else ["--ckpt", "x.pt", "--eval-samples", "0"]))
    assert "edm training of DDPM++-t" in (plan := inside("train.py", "--model", "DDPM++-t", "--dry-run")) and "37.5M parameters" in plan  # two levels
