"""Networks, with the module layout and the state-dict keys of their upstream repositories, so that released
weights load strictly and a student saved here opens there.

DiT   Peebles & Xie, "Scalable Diffusion Models with Transformers" (facebookresearch/DiT, models.py)
SiT   Ma et al., "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant Transformers" (willisma/SiT);
      Yu et al., "Representation Alignment for Generation" (sihyun-yu/REPA)
UNet  Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (CompVis/latent-diffusion; Stable Diffusion 1)
DDPM++  Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", with the preconditioning of
      Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (NVlabs/edm, training/networks.py)

Two differences from upstream. Labels are dropped by the training script and not inside the network, so
that every forward of one iteration sees the same label. And the network can be watched or edited:
`forward(x, t, y, w, tap)` passes every block's output, and the network's output, through `tap(l, h) -> h`.

Every network has: arch (what build() makes it from), sample_shape (C, H, W), num_classes (K; label K is the null one, K = 0 without
labels), guidance (whether it takes the scale w), blocks (in order of execution), cfg_channels (how many channels guidance acts on; None: all),
recompute (may be set: see run()).
"""
import json
import re
from collections import OrderedDict
from functools import lru_cache, partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from runtime import UserError
from solvers import SIGMA_DATA

def run(net, block, *inputs):
    """block(*inputs); where net.recompute is set, its activations are not kept but computed again in the backward pass."""
    if net.recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


# ---- DiT --------------------------------------------------------------------------------------------


def modulate(h, shift, scale):
    """adaLN: h (B, T, D), shift and scale (B, D)."""
    return h * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def sinusoid(t, dim, max_period=10000.0, endpoint=False):
    """t (B,), integer or fractional -> (B, dim): cosines first, then sines, in float32. endpoint: the last period is 2 pi max_period."""
    freqs = torch.exp(-np.log(max_period) * torch.arange(dim // 2, device=t.device, dtype=torch.float32) / (dim // 2 - endpoint))
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

    cfg_channels = 3  # upstream's; its authors call it unintended, but its published numbers have it
    recompute = False

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 num_classes=1000, learn_sigma=True, guidance=False):
        super().__init__()
        self.arch = dict(net=type(self).__name__, input_size=input_size, patch_size=patch_size, in_channels=in_channels,
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
            h = tap(l, run(self, block, h, c))                          # (B, T, D)
        return tap(len(self.blocks), self.unpatchify(self.final_layer(h, c)))


class SiT(DiT):
    """DiT's trunk for flows: t (B,) in [0, 1], where 1 is noise, not scaled; the output (B, C, H, W) is the velocity eps - x0.

    learn_sigma  the last layer makes 2C channels as in DiT, the second half of which nobody reads (upstream's released weights are so)
    reverse      the weights count time from noise, 0, to data, 1, and give x0 - eps: upstream SiT's do, REPA's do not
    """

    ignored = ("projectors.",)  # of REPA's files: they served its alignment loss

    def __init__(self, *args, reverse=False, **kw):
        super().__init__(*args, **kw)
        self.reverse = reverse
        if reverse:
            self.arch["reverse"] = True
        else:
            self.cfg_channels = None  # REPA guides them all

    def unpatchify(self, h):
        out = super().unpatchify(h)[:, :self.sample_shape[0]]
        return -out if self.reverse else out

    def forward(self, x, t, y, w=None, tap=None):
        return super().forward(x, 1 - t if self.reverse else t, y, w, tap)


# ---- The U-Net of latent diffusion ------------------------------------------------------------------


def norm(channels, eps=1e-5):
    return nn.GroupNorm(32, channels, eps=eps)


class ResBlock(nn.Module):
    """Two convolutions; the embedding of t is added between them, or scales and shifts. resample: halves or doubles the sides first."""

    def __init__(self, channels, emb_channels, out_channels, scale_shift, resample=None):
        super().__init__()
        self.in_layers = nn.Sequential(norm(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, (1 + scale_shift) * out_channels))
        self.out_layers = nn.Sequential(norm(out_channels), nn.SiLU(), nn.Identity(), nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        self.resample, self.scale_shift = resample or nn.Identity(), scale_shift

    def forward(self, x, emb):
        norm1, act, conv1 = self.in_layers
        norm2, _, _, conv2 = self.out_layers                            # [2] is upstream's dropout, which no released model uses
        h = conv1(self.resample(act(norm1(x))))                         # (B, C', H', W')
        emb = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = norm2(h) * (1 + scale) + shift
        else:
            h = norm2(h + emb)
        return self.skip_connection(self.resample(x)) + conv2(act(h))


class AttentionBlock(nn.Module):
    """Self-attention between positions. The channels of qkv are split into heads first, then into q, k and v (upstream's "legacy" order)."""

    def __init__(self, channels, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.norm = norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x).flatten(2)).transpose(1, 2).contiguous()
        q, k, v = qkv.view(B, H * W, self.num_heads, 3, C // self.num_heads).permute(3, 0, 2, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v)                     # (B, heads, HW, C / heads)
        return x + self.proj_out(h.transpose(2, 3).reshape(B, C, H * W)).view(B, C, H, W)


class CrossAttention(nn.Module):
    """Of h (B, T, D) to context (B, S, context_dim), or to itself."""

    def __init__(self, dim, context_dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, h, context=None):
        context = h if context is None else context
        q, k, v = (z.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for z in (self.to_q(h), self.to_k(context), self.to_v(context)))
        h = F.scaled_dot_product_attention(q, k, v)                     # (B, heads, T, D / heads)
        return self.to_out(h.transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden)

    def forward(self, h):
        h, gate = self.proj(h).chunk(2, dim=-1)
        return h * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context, MLP."""

    def __init__(self, dim, context_dim, num_heads):
        super().__init__()
        self.attn1 = CrossAttention(dim, dim, num_heads)
        self.ff = nn.ModuleDict({"net": nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))})
        self.attn2 = CrossAttention(dim, context_dim, num_heads)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, h, context):
        h = h + self.attn1(self.norm1(h))
        h = h + self.attn2(self.norm2(h), context)
        return h + self.ff["net"](self.norm3(h))


class SpatialTransformer(nn.Module):
    """A transformer block over the positions of x (B, C, H, W), added to x."""

    def __init__(self, channels, context_dim, num_heads):
        super().__init__()
        self.norm = norm(channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context_dim, num_heads)])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x, context):
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)       # (B, HW, C)
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Stage(nn.Sequential):
    """One block of the U-Net: its layers in turn, each with what it takes."""

    def forward(self, h, emb, context):
        for layer in self:
            h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h, context) if isinstance(layer, SpatialTransformer) else layer(h)
        return h


class UNet(nn.Module):
    """The U-Net of latent diffusion and Stable Diffusion 1 (upstream: UNetModel; the arguments have its names).

    attention_resolutions  at which downsampling rates there is attention
    num_heads              of every attention, or num_head_channels, the width of a head
    use_scale_shift_norm   t scales and shifts instead of being added
    resblock_updown        residual blocks change the resolution instead of convolutions
    context                what the attention looks at besides the image: "none" (y is ignored), "class" (y (B,) long, 0..K-1, K is the null
                           label; a table of K + 1 rows of context_dim), "text" (y (B, T, context_dim), the prompts' embeddings)

    Upstream keeps the table outside the U-Net; here it is the one key, of upstream's name, that UNetModel does not have: CLASS_TABLE.
    """

    cfg_channels, guidance, recompute = None, False, False

    def __init__(self, input_size=64, in_channels=4, model_channels=320, num_res_blocks=2, channel_mult=(1, 2, 4, 4),
                 attention_resolutions=(4, 2, 1), num_heads=None, num_head_channels=None, use_scale_shift_norm=False,
                 resblock_updown=False, context="none", context_dim=None, num_classes=0):
        super().__init__()
        self.arch = dict(net="UNet", input_size=input_size, in_channels=in_channels, model_channels=model_channels,
                         num_res_blocks=num_res_blocks, channel_mult=list(channel_mult), attention_resolutions=list(attention_resolutions),
                         num_heads=num_heads, num_head_channels=num_head_channels, use_scale_shift_norm=use_scale_shift_norm,
                         resblock_updown=resblock_updown, context=context, context_dim=context_dim, num_classes=num_classes)
        self.context, self.num_classes, self.sample_shape = context, num_classes, (in_channels, input_size, input_size)

        def residual(channels, out_channels, resample=None):
            return ResBlock(channels, 4 * model_channels, out_channels, use_scale_shift_norm, resample)

        def attention(channels, level=None):                            # a list of one or none; None: the middle, which always has it
            if level is not None and 2 ** level not in attention_resolutions:
                return []
            heads = num_heads or channels // num_head_channels
            return [AttentionBlock(channels, heads) if context == "none" else SpatialTransformer(channels, context_dim, heads)]

        def down(channels):
            if resblock_updown:
                return residual(channels, channels, nn.AvgPool2d(2))
            return nn.Sequential(OrderedDict(op=nn.Conv2d(channels, channels, 3, stride=2, padding=1)))

        def up(channels):
            if resblock_updown:
                return residual(channels, channels, nn.Upsample(scale_factor=2))
            return nn.Sequential(OrderedDict(up=nn.Upsample(scale_factor=2), conv=nn.Conv2d(channels, channels, 3, padding=1)))

        self.time_embed = nn.Sequential(nn.Linear(model_channels, 4 * model_channels), nn.SiLU(), nn.Linear(4 * model_channels, 4 * model_channels))
        if context == "class":
            self.cond_stage_model = nn.ModuleDict({"embedding": nn.Embedding(num_classes + 1, context_dim)})
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(in_channels, model_channels, 3, padding=1))])
        skips = [ch := model_channels]                                  # channels of every input block, for the output blocks
        for level, mult in enumerate(channel_mult):
            if level:
                self.input_blocks.append(Stage(down(ch)))
                skips.append(ch)
            for _ in range(num_res_blocks):
                block, ch = residual(ch, mult * model_channels), mult * model_channels
                self.input_blocks.append(Stage(block, *attention(ch, level)))
                skips.append(ch)
        self.middle_block = Stage(residual(ch, ch), *attention(ch), residual(ch, ch))
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                block, ch = residual(ch + skips.pop(), mult * model_channels), mult * model_channels
                self.output_blocks.append(Stage(block, *attention(ch, level), *([up(ch)] if level and i == num_res_blocks else [])))
        self.out = nn.Sequential(norm(ch), nn.SiLU(), nn.Conv2d(ch, in_channels, 3, padding=1))
        if self.out[2].weight.device.type != "meta":
            self.initialize_weights()

    def initialize_weights(self):
        """Upstream's: torch's own, and zero for the last layer of every residual branch and of the network."""
        last = [m.out_layers[3] for m in self.modules() if isinstance(m, ResBlock)]
        last += [m.proj_out for m in self.modules() if isinstance(m, (AttentionBlock, SpatialTransformer))]
        for layer in last + [self.out[2]]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def blocks(self):
        return [*self.input_blocks, self.middle_block, *self.output_blocks]

    def forward(self, x, t, y, w=None, tap=None):
        """Noisy x (B, C, H, W), timesteps t (B,), integer or fractional, y as `context` says; w is ignored -> (B, C, H, W).

        tap(l, h) -> h sees the output of block l, (B, C', H', W'), and at l = len(blocks) the network's output; what it returns takes the
        place of what it was given, also in the skip connection.
        """
        tap = tap or (lambda l, h: h)
        emb = self.time_embed(sinusoid(t, self.arch["model_channels"]).to(self.time_embed[0].weight.dtype))
        context = {"none": lambda: None, "class": lambda: self.cond_stage_model["embedding"](y)[:, None], "text": lambda: y}[self.context]()
        h, skips, depth = x, [], len(self.input_blocks)
        for l, block in enumerate(self.blocks):
            h = tap(l, run(self, block, h if l <= depth else torch.cat([h, skips.pop()], dim=1), emb, context))
            if l < depth:
                skips.append(h)
        return tap(len(self.blocks), self.out(h))


# ---- The DDPM++ U-Net of EDM ------------------------------------------------------------------------


def edm_norm(channels):
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class ResampledConv(nn.Conv2d):
    """A convolution that first doubles ("up") or halves ("down") the sides, by copies or means of 2 x 2 pixels. The filter is a key upstream."""

    def __init__(self, channels, out_channels, kernel, resample=None):
        super().__init__(channels, out_channels, kernel, padding=kernel // 2)
        self.resample = resample
        if resample:
            self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))

    def forward(self, x):
        if self.resample:
            x = F.interpolate(x, scale_factor=2) if self.resample == "up" else F.avg_pool2d(x, 2)
        return super().forward(x)


class EDMBlock(nn.Module):
    """Two convolutions, the embedding of the noise level added between them, then attention with one head where asked; every sum times sqrt(1/2)."""

    def __init__(self, channels, out_channels, emb_channels, resample=None, attention=False):
        super().__init__()
        self.norm0, self.norm1 = edm_norm(channels), edm_norm(out_channels)
        self.conv0 = ResampledConv(channels, out_channels, 3, resample)
        self.affine = nn.Linear(emb_channels, out_channels)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = ResampledConv(channels, out_channels, 1, resample) if resample or channels != out_channels else nn.Identity()
        self.attention = attention
        if attention:
            self.norm2 = edm_norm(out_channels)
            self.qkv = nn.Conv2d(out_channels, 3 * out_channels, 1)
            self.proj = nn.Conv2d(out_channels, out_channels, 1)

    def forward(self, x, emb, drop=None):
        h = self.conv0(F.silu(self.norm0(x)))                           # (B, C', H', W')
        h = F.silu(self.norm1(h + self.affine(emb)[:, :, None, None]))
        x = (self.skip(x) + self.conv1(drop(h) if drop else h)) * 0.5 ** 0.5
        if not self.attention:
            return x
        qkv = self.qkv(self.norm2(x)).flatten(2).unflatten(1, (1, -1, 3)).permute(3, 0, 1, 4, 2)  # (3, B, 1, HW, C); channels go q, k, v, q, ...
        q, k, v = qkv.contiguous()                                      # as fused kernels want them
        h = F.scaled_dot_product_attention(q, k, v)
        return (x + self.proj(h.transpose(2, 3).reshape(x.shape))) * 0.5 ** 0.5


class DDPMpp(nn.Module):
    """DDPM++ with EDM's preconditioning (upstream: SongUNet within EDMPrecond); its time is the noise level, its prediction solvers.py's "edm".

    num_blocks        residual blocks at every resolution; the decoder has one more
    attn_resolutions  sides at which there is attention, besides the middle
    num_classes       K; the null label's embedding is zero. Upstream's networks have not learned it: they are either with classes or without
    augment_dim       width of upstream's input that tells how an image was augmented: weights that are kept and, as when sampling, not used
    guidance          takes the scale w of guidance as an input; its embedding starts at zero, as DiT's

    dropout may be set at any time and acts in training; its masks come from rng (runtime.StepRandom) where that is set, else from torch.
    """

    cfg_channels, dropout, rng, recompute = None, 0.0, None, False

    def __init__(self, input_size=32, in_channels=3, model_channels=128, num_blocks=4, channel_mult=(2, 2, 2), attn_resolutions=(16,),
                 num_classes=0, augment_dim=0, guidance=False):
        super().__init__()
        self.arch = dict(net="DDPM++", input_size=input_size, in_channels=in_channels, model_channels=model_channels, num_blocks=num_blocks,
                         channel_mult=list(channel_mult), attn_resolutions=list(attn_resolutions), num_classes=num_classes, augment_dim=augment_dim,
                         **({"guidance": True} if guidance else {}))
        self.num_classes, self.guidance, self.sample_shape = num_classes, guidance, (in_channels, input_size, input_size)
        emb_channels, enc, dec = 4 * model_channels, nn.ModuleDict(), nn.ModuleDict()  # ch: channels so far
        block = lambda channels, out_channels, **kw: EDMBlock(channels, out_channels, emb_channels, **kw)
        levels = [(input_size >> level, mult * model_channels) for level, mult in enumerate(channel_mult)]
        enc[f"{input_size}x{input_size}_conv"] = nn.Conv2d(in_channels, ch := model_channels, 3, padding=1)
        skips = [ch]                                                    # channels of every block of the encoder, for the decoder
        for side, out in levels:
            if side < input_size:
                enc[f"{side}x{side}_down"] = block(ch, ch, resample="down")
                skips.append(ch)
            for i in range(num_blocks):
                enc[f"{side}x{side}_block{i}"], ch = block(ch, out, attention=side in attn_resolutions), out
                skips.append(ch)
        dec[f"{side}x{side}_in0"], dec[f"{side}x{side}_in1"] = block(ch, ch, attention=True), block(ch, ch)
        for level, (side, out) in enumerate(reversed(levels)):
            if level:
                dec[f"{side}x{side}_up"] = block(ch, ch, resample="up")
            for i in range(num_blocks + 1):
                dec[f"{side}x{side}_block{i}"], ch = block(ch + skips.pop(), out, attention=i == num_blocks and side in attn_resolutions), out
        self.blocks = [*enc.values(), *dec.values()]                    # in a list: they belong to self.model
        self.takes_skip = [False] * len(enc) + ["_block" in name for name in dec]
        self.out = [edm_norm(ch), nn.Conv2d(ch, in_channels, 3, padding=1)]
        dec[f"{side}x{side}_aux_norm"], dec[f"{side}x{side}_aux_conv"] = self.out
        layers = dict(map_layer0=nn.Linear(model_channels, emb_channels), map_layer1=nn.Linear(emb_channels, emb_channels))
        self.model = nn.ModuleDict(dict(enc=enc, dec=dec, **layers))
        if num_classes:
            self.model["map_label"] = nn.Linear(num_classes, model_channels)
        if augment_dim:
            self.model["map_augment"] = nn.Linear(augment_dim, model_channels, bias=False).requires_grad_(False)
        self.w_embedder = nn.Linear(model_channels, model_channels) if guidance else None
        if self.out[1].weight.device.type != "meta":
            self.initialize_weights()

    def initialize_weights(self):
        """Upstream's: Xavier, almost zero for the last layer of every residual branch and of the network. The embedding of w starts at zero."""
        gains = {"qkv": 0.2 ** 0.5, "w_embedder": 0.0, "conv1": 1e-5, "proj": 1e-5}
        for name, m in self.named_modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(m.weight, 1e-5 if m is self.out[1] else gains.get(name.split(".")[-1], 1.0))
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    @torch.compiler.disable
    def drop(self, l, h):
        """Dropout of h (B, ...) in block l: the same mask when the block is computed again for its gradient."""
        u = self.rng.fork(l).uniform(h.shape[1:]) if self.rng else torch.rand(h.shape, device=h.device)
        return h * (u >= self.dropout) / (1 - self.dropout)

    def raw(self, x, c_noise, y, w=None, tap=None):
        """The network without its preconditioning: scaled x (B, C, H, W), noise labels c_noise (B,), the rest as forward -> F (B, C, H, W)."""
        tap, drop = tap or (lambda l, h: h), lambda l: partial(self.drop, l) if self.training and self.dropout else None
        C = self.arch["model_channels"]
        embed = lambda v: sinusoid(v, C, endpoint=True).roll(C // 2, 1).to(x.dtype)  # sines first
        emb = embed(c_noise)                                            # (B, C)
        if self.num_classes:
            one_hot = y[:, None] == torch.arange(self.num_classes, device=y.device)
            emb = emb + self.model["map_label"](one_hot.to(x.dtype) * self.num_classes ** 0.5)
        if self.guidance:
            emb = emb + self.w_embedder(embed(w))
        emb = F.silu(self.model["map_layer1"](F.silu(self.model["map_layer0"](emb))))  # (B, 4C)
        h, skips, depth = x, [], len(self.model["enc"])
        for l, (block, takes_skip) in enumerate(zip(self.blocks, self.takes_skip)):
            h = torch.cat([h, skips.pop()], dim=1) if takes_skip else h
            h = tap(l, run(self, block, h, emb, drop(l)) if l else block(h))
            if l < depth:
                skips.append(h)
        norm, conv = self.out
        return tap(len(self.blocks), conv(F.silu(norm(h))))

    def forward(self, x, t, y, w=None, tap=None):
        """Noisy x = x0 + t eps (B, C, H, W), noise levels t > 0 (B,), labels y (B,) long, guidance scales w (B,) if it takes them -> F (B, C, H, W).

        The denoised image is D = c_skip x + c_out F (solvers.to_x0_eps). tap(l, h) -> h as in UNet.
        """
        return self.raw(x / (t ** 2 + SIGMA_DATA ** 2).sqrt().view(-1, 1, 1, 1).to(x.dtype), t.log() / 4, y, w, tap)


# ---- Names and sizes --------------------------------------------------------------------------------

SIZES = {  # upstream's table; Na and Ti are ours, for the embedded 8x8 digits, and XS, for minutes on CIFAR-10
    "Na": dict(hidden_size=48, depth=2, num_heads=2),
    "Ti": dict(hidden_size=64, depth=3, num_heads=2),
    "XS": dict(hidden_size=96, depth=5, num_heads=3),
    "S": dict(hidden_size=384, depth=12, num_heads=6),
    "B": dict(hidden_size=768, depth=12, num_heads=12),
    "L": dict(hidden_size=1024, depth=24, num_heads=16),
    "XL": dict(hidden_size=1152, depth=28, num_heads=16),
}

CLASS_TABLE = "cond_stage_model.embedding.weight"
LDM = dict(input_size=64, in_channels=3, model_channels=224, channel_mult=[1, 2, 3, 4], attention_resolutions=[8, 4, 2], num_head_channels=32)
UNETS = {  # upstream's configurations
    "SD-v1.5": dict(input_size=64, in_channels=4, model_channels=320, channel_mult=[1, 2, 4, 4], attention_resolutions=[4, 2, 1], num_heads=8,
                    context="text", context_dim=768),
    "LDM-ImageNet": dict(input_size=64, in_channels=3, model_channels=192, channel_mult=[1, 2, 3, 5], attention_resolutions=[8, 4, 2],
                         num_heads=1, context="class", context_dim=512),
    "LDM-CelebAHQ": LDM,
    "LDM-FFHQ": LDM,
    "LDM-Bedroom": LDM,
    "LDM-Churches": dict(input_size=32, in_channels=4, model_channels=192, channel_mult=[1, 2, 2, 4, 4], attention_resolutions=[1, 2, 4, 8],
                         num_heads=8, use_scale_shift_norm=True, resblock_updown=True),
}
UNETS["SD-KD"] = dict(UNETS["SD-v1.5"], model_channels=192, attention_resolutions=[4, 2])  # the KD paper's student, A.2: it counts 200M, this has 309M


DDPMPP = {"t": "128x4", "128": "128x2", "96": "96x2", "64": "64x2", "32": "32x2"}  # Table 1 of the KD paper: channels x residual blocks


def make_arch(name, input_size, in_channels, num_classes, learn_sigma=False):
    """'DiT-XL/2', 'LDM-ImageNet', 'DDPM++-32' or 'DDPM++-16x1' (16 channels, 1 block; with -uncond: without classes) and the data's shape
    -> keyword arguments of the network, with its class under "net"."""
    shape = dict(input_size=input_size, in_channels=in_channels)
    edm = re.fullmatch(r"DDPM\+\+-(\w+?)(-uncond)?", name)
    size = edm and re.fullmatch(r"(\d+)x(\d+)", DDPMPP.get(edm[1], edm[1]))
    if size and int(size[2]) and (int(size[1]) in range(4, 41, 4) or int(size[1]) in range(64, 1025, 32)):  # groups of norms must divide 1 to 4 times the channels
        levels, what = 3 if input_size >= 16 else 2, "its levels"
        tile, attention = 2 ** (levels - 1), min((input_size >> level for level in range(levels)), key=lambda side: abs(side - 16))
        arch = dict(net="DDPM++", model_channels=int(size[1]), num_blocks=int(size[2]), channel_mult=[2] * levels, **shape,
                    attn_resolutions=[attention], num_classes=0 if edm[2] else num_classes, augment_dim=0)
    elif name in UNETS:
        tile, what = 2 ** (len(UNETS[name]["channel_mult"]) - 1), "its levels"
        labels = num_classes if UNETS[name].get("context") == "class" else 0
        arch = dict(UNETS[name], net="UNet", **shape, num_classes=labels)
    else:
        match = re.fullmatch(r"(DiT|SiT)-(Na|Ti|XS|S|B|L|XL)/([1248])", name.removesuffix("-REPA") if name.startswith("SiT") else name)
        if not match:
            known = f"DiT- or SiT-{{{','.join(SIZES)}}}/{{1,2,4,8}}, for example DiT-XL/2, or {', '.join([*UNETS, *('DDPM++-' + n for n in DDPMPP)])}, DDPM++-CxB (C = 4, 8, ..., 40, 64, 96, ... channels, B blocks)"
            raise UserError(f"--model {name}: unknown; choose {known}")
        tile, what = int(match[3]), f"patches of {match[3]}"
        arch = dict(net=match[1], **shape, patch_size=tile, num_classes=num_classes, learn_sigma=learn_sigma, **SIZES[match[2]])
    if input_size % tile:
        raise UserError(f"--model {name}: {what} do not tile a {input_size}x{input_size} input")
    return arch


def build(arch):
    """A network from the "arch" entry of a checkpoint."""
    arch = dict(arch)
    return {"DiT": DiT, "SiT": SiT, "UNet": UNet, "DDPM++": DDPMpp}[arch.pop("net")](**arch)


def with_guidance(net):
    """A DiT, SiT or DDPM++ -> the same function as a network that takes the scale of guidance as an input, which it ignores at first."""
    if not isinstance(net, (DiT, DDPMpp)):
        raise UserError(f"a {net.arch['net']} cannot be made to take the scale of guidance; use a DiT, SiT or DDPM++")
    new = build({**net.arch, "guidance": True})
    missing, extra = new.load_state_dict(net.state_dict(), strict=False)
    if extra or any(not k.startswith("w_embedder.") for k in missing):
        raise UserError("this network cannot be made to take the scale of guidance")
    return new


def fill_random(net, std=0.02, seed=0):
    """Fill all parameters with N(0, std^2), the scales of norms with N(1, std^2). A fresh DiT or U-Net outputs exactly zero,
    which makes tests and benchmarks of a distillation loss vacuous; this one does not."""
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data.copy_(torch.randn(p.shape, generator=g) * std)
    for m in net.modules():
        if isinstance(m, (nn.GroupNorm, nn.LayerNorm)) and m.weight is not None:
            m.weight.data.add_(1)
    return net


def count(arch):
    """(parameters, floating-point operations of one forward of one sample), counted on the meta device; 2 per multiply-add.
    A prompt has 77 tokens, as CLIP's."""
    return count_once(json.dumps(arch))


@lru_cache
def count_once(arch):
    arch = json.loads(arch)
    with torch.device("meta"):
        net, x = build(arch), torch.empty(1, arch["in_channels"], arch["input_size"], arch["input_size"])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            y = torch.zeros(1, 77, arch["context_dim"]) if arch.get("context") == "text" else torch.zeros(1, dtype=torch.long)
            net(x, torch.zeros(1), y, torch.ones(1))
    return sum(p.numel() for p in net.parameters()), counter.get_total_flops()
