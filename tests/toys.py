"""Small networks whose losses can be written out by hand, and batches for them."""
import torch

from solvers import make_grid, make_schedule

# ---- Self step-distillation (iSSD, SSD) --------------------------------------------------------


def pair_batch(seed=0):
    """The arguments of issd_loss and ssd_loss that come from data: 4 samples, s > t."""
    g = torch.Generator().manual_seed(seed)
    n = torch.tensor([0, 3, 7, 8])
    nodes = torch.tensor(make_grid("dit", 10))
    return {
        "schedule": make_schedule("linear"),
        "x0": torch.rand(4, 1, 8, 8, generator=g) * 2 - 1,
        "y": torch.tensor([1, 5, 9, 10]),
        "s": nodes[n],
        "t": nodes[n + 1],
        "noise": torch.randn(4, 1, 8, 8, generator=g),
    }


class Layers(torch.nn.Module):
    """Two layers h -> w h + c t and an output layer, so that Eq. 6 can be written out by hand.

    calls: (timesteps, with gradient?) of every evaluation.
    """

    num_classes = 10

    def __init__(self, w, c=0.2):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(w))
        self.c = c
        self.calls = []

    def layer(self, l, h, t):
        return self.w[l] * h + self.c * (l + 1) * t.view(-1, 1, 1, 1) / 1000

    def forward(self, x, t, y, tap=None):
        self.calls.append((t.tolist(), torch.is_grad_enabled()))
        h = x
        for l in range(3):
            h = self.layer(l, h, t)
            h = tap(l, h) if tap else h
        return h


class Scale(torch.nn.Module):
    """out = w x + c t / 1000 + d y, two channels of which the second is not the prediction's."""

    num_classes = 10

    def __init__(self, w, c=0.2, d=0.0):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(w))
        self.c = c
        self.d = d
        self.calls = []

    def forward(self, x, t, y):
        self.calls.append((t.tolist(), torch.is_grad_enabled()))
        time = t.view(-1, 1, 1, 1) / 1000
        label = y.float().reshape(len(y), -1).mean(1).view(-1, 1, 1, 1)
        out = self.w * x + self.c * time + self.d * label
        return torch.cat([out, 1e3 * out], 1)

    def prediction(self, x, t, y):
        return self(x, t, y)[:, :1]


# ---- DDIL, DSD, KD -----------------------------------------------------------------------------


class Smooth(torch.nn.Module):
    """A small net(z, t, y) or, with guidance, net(z, t, y, w) in float64, smooth in all its inputs.

    Its null label is 10. calls: (rows, with gradient?) of every evaluation.
    """

    num_classes = 10

    def __init__(self, *p, guidance=False):
        super().__init__()
        self.p = torch.nn.Parameter(torch.tensor(p or (0.6, -0.5, 0.3), dtype=torch.float64))
        self.guidance = guidance
        self.calls = []

    def time(self, t):
        return t / 1000

    def forward(self, z, t, y, w=None):
        self.calls.append((len(z), torch.is_grad_enabled()))
        a, b, c = self.p
        out = torch.tanh(a * z + b * z.flip(-1))
        out = out + c * as_column(self.time(t), z) + 0.1 * as_column(y, z)
        return out if w is None else out + 0.05 * as_column(w, z)


class SmoothInLogTime(Smooth):
    """The same for EDM's noise levels."""

    def time(self, t):
        return t.log()


def as_column(v, z):
    return v.view(-1, 1, 1, 1).to(z.dtype)


def states_and_labels():
    """z (6, 1, 4, 4) in float64 and y (6,)."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(6, 1, 4, 4, generator=g, dtype=torch.float64)
    return z, torch.randint(0, 10, (6,), generator=g)


def noised_batch():
    """x0, y, t, noise for EDM's schedule, in float64."""
    g = torch.Generator().manual_seed(0)
    x0 = torch.randn(6, 1, 4, 4, generator=g, dtype=torch.float64)
    y = torch.randint(0, 10, (6,), generator=g)
    t = torch.tensor([0.05, 0.2, 0.5, 1.0, 3.0, 20.0], dtype=torch.float64)
    return x0, y, t, torch.randn(6, 1, 4, 4, generator=g, dtype=torch.float64)
