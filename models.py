"""Networks.

DiT (Peebles & Xie, "Scalable Diffusion Models with Transformers") with the module layout and the
state-dict keys of its upstream repository (facebookresearch/DiT, models.py), so that released weights
load strictly and a student saved here opens there.

Two differences from upstream. Labels are dropped by the training script and not inside the network, so
that every forward of one iteration sees the same label. And the network can be watched or edited:
`forward(x, t, y, tap)` passes every block's output, and the network's output, through `tap(l, h) -> h`.
"""
import re

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from runtime import UserError

# ---------------------------------------------------------------------------------------------------
# DiT
# ---------------------------------------------------------------------------------------------------


def modulate(h, shift, scale):
    """adaLN: h (B, T, D), shift and scale (B, D)."""
    return h * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def sinusoid(t, dim, max_period=10000.0):
    """t (B,), integer or fractional -> (B, dim): cosines first, then sines, in float32."""
    freqs = torch.exp(-np.log(max_period) * torch.arange(dim // 2, device=t.device, dtype=torch.float32) / (dim // 2))
    angle = t[:, None].float() * freqs
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def sincos_2d(dim, side):
    """Fixed position embedding (side * side, dim), float64. The first half encodes the column, as upstream."""
    omega = 10000.0 ** (-np.arange(dim // 4) / (dim / 4.0))
    rows, cols = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    angles = [np.outer(p.reshape(-1), omega) for p in (cols, rows)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, in_channels, dim):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)                  # (B, T, D)


class TimestepEmbedder(nn.Module):
    def __init__(self, dim, frequencies=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.frequencies = frequencies

    def forward(self, t):
        return self.mlp(sinusoid(t, self.frequencies).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Row `num_classes` is the null label of classifier-free guidance."""

    def __init__(self, num_classes, dim):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, y):
        return self.embedding_table(y)


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, h):
        B, T, D = h.shape
        q, k, v = self.qkv(h).view(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v)                     # (B, heads, T, D / heads)
        return self.proj(h.transpose(1, 2).reshape(B, T, D))


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, h):
        return self.fc2(F.gelu(self.fc1(h), approximate="tanh"))


class DiTBlock(nn.Module):
    """Attention and MLP, each gated and modulated by the condition (adaLN-Zero)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, h, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        h = h + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(h), shift1, scale1))
        h = h + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(h), shift2, scale2))
        return h


class FinalLayer(nn.Module):
    def __init__(self, dim, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, h, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(h), shift, scale))


class DiT(nn.Module):
    """Diffusion transformer on a square image or latent.

    input_size   side of the input, pixels (of the latent: an image's side / 8)
    num_classes  K; labels are 0..K-1 and K is the null label, so K = 0 is an unconditional network
    learn_sigma  twice as many output channels: the prediction, then the interpolation coefficients of
                 the reverse variance (only the DDPM sampler reads them)
    guidance     takes the scale w of guidance as an input: its embedding starts at zero, so that a network
                 without one opens here unchanged (ours, after Meng et al., "On Distillation of Guided Diffusion Models")
    """

    cfg_channels = 3  # guidance acts on these: solvers.guide

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 num_classes=1000, learn_sigma=True, guidance=False):
        super().__init__()
        self.arch = dict(net="DiT", input_size=input_size, patch_size=patch_size, in_channels=in_channels,
                         hidden_size=hidden_size, depth=depth, num_heads=num_heads, num_classes=num_classes,
                         learn_sigma=learn_sigma, **({"guidance": True} if guidance else {}))
        self.patch_size, self.num_classes, self.guidance = patch_size, num_classes, guidance
        self.sample_shape = (in_channels, input_size, input_size)
        side, out_channels = input_size // patch_size, in_channels * (2 if learn_sigma else 1)
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.w_embedder = TimestepEmbedder(hidden_size) if guidance else None
        self.pos_embed = nn.Parameter(torch.zeros(1, side * side, hidden_size), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, out_channels)
        if self.pos_embed.device.type != "meta":
            self.initialize_weights()

    def initialize_weights(self):
        """Upstream's: Xavier for linear layers, small embeddings, and zero gates, so the output starts at zero."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        dim, side = self.arch["hidden_size"], self.arch["input_size"] // self.patch_size
        self.pos_embed.data.copy_(torch.from_numpy(sincos_2d(dim, side)))
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        zero = [b.adaLN_modulation[1] for b in self.blocks] + [self.final_layer.adaLN_modulation[1], self.final_layer.linear]
        for layer in zero + ([self.w_embedder.mlp[2]] if self.guidance else []):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def unpatchify(self, h):
        B, T, _ = h.shape
        side, p = int(T ** 0.5), self.patch_size
        h = h.view(B, side, side, p, p, -1)                             # (B, rows, cols, p, p, C)
        return torch.einsum("nhwpqc->nchpwq", h).reshape(B, -1, side * p, side * p)

    def forward(self, x, t, y, w=None, tap=None):
        """Noisy x (B, C, H, W), timesteps t (B,), labels y (B,) long, guidance scales w (B,) if it takes them -> (B, C or 2C, H, W).

        tap(l, h) -> h sees the output of block l = 0..depth-1, (B, T, D), and at l = depth the network's
        output, (B, C or 2C, H, W); what it returns takes the place of what it was given.
        """
        tap = tap or (lambda l, h: h)
        h = self.x_embedder(x) + self.pos_embed                         # (B, T, D), T = (H / patch) * (W / patch)
        c = self.t_embedder(t) + self.y_embedder(y)                     # (B, D)
        if self.guidance:
            c = c + self.w_embedder(1000 * w)
        for l, block in enumerate(self.blocks):
            h = tap(l, block(h, c))                                     # (B, T, D)
        return tap(len(self.blocks), self.unpatchify(self.final_layer(h, c)))


SIZES = {  # upstream's table; Ti is ours, for the embedded 8x8 digits
    "Ti": dict(hidden_size=64, depth=3, num_heads=2),
    "S": dict(hidden_size=384, depth=12, num_heads=6),
    "B": dict(hidden_size=768, depth=12, num_heads=12),
    "L": dict(hidden_size=1024, depth=24, num_heads=16),
    "XL": dict(hidden_size=1152, depth=28, num_heads=16),
}


def make_arch(name, input_size, in_channels, num_classes, learn_sigma):
    """'DiT-XL/2' and the data's shape -> keyword arguments of the network, with its class under "net"."""
    match = re.fullmatch(r"DiT-(Ti|S|B|L|XL)/(\d+)", name)
    if not match or int(match[2]) not in (1, 2, 4, 8):
        raise UserError(f"--model {name}: unknown; choose DiT-{{{','.join(SIZES)}}}/{{1,2,4,8}}, for example DiT-XL/2")
    patch = int(match[2])
    if input_size % patch:
        raise UserError(f"--model {name}: patches of {patch} do not tile a {input_size}x{input_size} input")
    return dict(net="DiT", input_size=input_size, patch_size=patch, in_channels=in_channels, num_classes=num_classes,
                learn_sigma=learn_sigma, **SIZES[match[1]])


def build(arch):
    """A network from the "arch" entry of a checkpoint."""
    arch = dict(arch)
    return {"DiT": DiT}[arch.pop("net")](**arch)


def with_guidance(net):
    """A DiT -> the same function as a network that takes the scale of guidance as an input, which it ignores at first."""
    new = build({**net.arch, "guidance": True})
    missing, extra = new.load_state_dict(net.state_dict(), strict=False)
    if extra or any(not k.startswith("w_embedder.") for k in missing):
        raise UserError("this network cannot be made to take the scale of guidance")
    return new


def fill_random(net, std=0.02, seed=0):
    """Fill all parameters with N(0, std^2). A fresh DiT outputs exactly zero, which makes tests and
    benchmarks of a distillation loss vacuous; this one does not."""
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data.copy_(torch.randn(p.shape, generator=g) * std)
    return net


def count(arch):
    """(parameters, floating-point operations of one forward of one sample), counted on the meta device; 2 per multiply-add."""
    with torch.device("meta"):
        net, x = build(arch), torch.empty(1, arch["in_channels"], arch["input_size"], arch["input_size"])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(x, torch.zeros(1), torch.zeros(1, dtype=torch.long), torch.ones(1))
    return sum(p.numel() for p in net.parameters()), counter.get_total_flops()
