"""Networks of diffusion models, with the module names and state-dict keys of their upstream code.

Released weights therefore load strictly, and a student saved here opens in the upstream code.
The file needs torch and numpy and nothing else of this project: copy it, and it works.

DiT     Peebles & Xie, "Scalable Diffusion Models with Transformers", arXiv:2212.09748
        (facebookresearch/DiT, models.py)
SiT     Ma et al., "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable
        Interpolant Transformers", arXiv:2401.08740 (willisma/SiT, models.py), and Yu et al.,
        "Representation Alignment for Generation", arXiv:2410.06940 (sihyun-yu/REPA)
UNet    Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models",
        arXiv:2112.10752 (CompVis/latent-diffusion, openaimodel.py; also Stable Diffusion 1)
DDPMpp  the DDPM++ of Song et al., "Score-Based Generative Modeling through Stochastic Differential
        Equations", arXiv:2011.13456, with the preconditioning of Karras et al., "Elucidating the
        Design Space of Diffusion-Based Generative Models", arXiv:2206.00364
        (NVlabs/edm, training/networks.py: SongUNet within EDMPrecond)

Every network is called in the same way:

    out = net(x, t, y, w=None, tap=None)

    x  (B, C, H, W)  noisy images or latents
    t  (B,)          times: 0 to 999 (DiT, UNet), 0 to 1 (SiT) or noise levels above 0 (DDPMpp)
    y  (B,)          labels 0 to K-1, or K for "no label" where the network was made with a null
                     label; UNet may take embedded prompts instead
    w  (B,)          scales of guidance, for a network made with guidance=True

and has the same attributes:

    arch          dictionary from which build() makes the network again
    sample_shape  (C, H, W)
    num_classes   K; 0 for a network without labels. Label K is the null label of guidance
    guidance      True if the network takes w as an input
    blocks        its blocks, in order of execution
    cfg_channels  number of channels on which classifier-free guidance acts; None: on all
    recompute     True: save memory in training, see run_block(). May be set at any time

`tap`: record or change what flows through the network
------------------------------------------------------
The network passes the output h of its block l = 0, 1, ..., L-1 through tap(l, h), and then its own
output through tap(L, out). What tap returns takes the place of h everywhere: in the next block, in
skip connections and, for l = L, as the result. The network calls tap once per block and forward, in
this order, and gradients flow through tap. The blocks of DiT and SiT give tokens (B, T, D), those
of the U-Nets feature maps (B, C', H', W').

    def record(l, h):                                  # record: keep h and return it unchanged
        features.append(h)
        return h

    def fuse(l, h):                                    # edit: mix every layer with a recorded one
        return torch.lerp(h, features[l], 0.1)         # 0.9 h + 0.1 features[l]

    features = []
    out = net(x_s, s, y, tap=record)                   # features = [h_0, ..., h_(L-1), out]
    fused = net(x_t, t, y, tap=fuse)

Differences from upstream:
- The training script drops labels, not the network, so that all forwards of one training step see
  the same labels.
- `tap` and, for DiT, SiT and DDPMpp, the input w do not exist upstream.
- Attention uses torch's scaled_dot_product_attention: upstream's formula, faster, up to round-off.
- UNet holds the table of class embeddings, which upstream keeps beside it. See UNet.
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


def unchanged(l, h):
    """The tap that does nothing."""
    return h


def run_block(net, block, *inputs):
    """block(*inputs) -> its output.

    With net.recompute the activations inside the block are not stored for the backward pass, which
    computes them a second time: less memory, one more forward.
    """
    if net.recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


def set_zero(layers):
    """Weight and bias of every layer to zero."""
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


# ---- DiT -----------------------------------------------------------------------------------------


def modulate(h, shift, scale):
    """Adaptive layer norm (adaLN): h (B, T, D), shift and scale (B, D) -> (B, T, D)."""
    return h * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def sinusoid(t, dim, max_period=10000.0, endpoint=False):
    """Sinusoidal embedding: t (B,), integer or fractional -> (B, dim), float32, cosines first.

    The dim / 2 angular frequencies fall geometrically from 1 towards 1 / max_period. They reach
    1 / max_period only with endpoint=True (DDPM++), not without (DiT, UNet).
    """
    half = dim // 2
    steps = torch.arange(half, device=t.device, dtype=torch.float32)
    freqs = torch.exp(-np.log(max_period) * steps / (half - endpoint))  # (dim / 2,)
    angle = t[:, None].float() * freqs                                  # (B, dim / 2)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def sincos_2d(dim, side):
    """Fixed position embedding of side x side patches -> numpy (side * side, dim), float64.

    The first half of the channels encodes the column, the second half the row, as upstream.
    """
    omega = 10000.0 ** (-np.arange(dim // 4) / (dim / 4.0))             # (dim / 4,)
    rows, columns = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    parts = []
    for position in (columns, rows):
        angle = np.outer(position.reshape(-1), omega)                   # (side * side, dim / 4)
        parts += [np.sin(angle), np.cos(angle)]
    return np.concatenate(parts, axis=1)


class PatchEmbed(nn.Module):
    """Images (B, C, H, W) -> one token per patch, row by row, (B, T, D)."""

    def __init__(self, patch_size, in_channels, dim):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)                  # (B, T, D)


class TimestepEmbedder(nn.Module):
    """Numbers t (B,) -> (B, D): a sinusoid of `frequencies` channels, then two linear layers."""

    def __init__(self, dim, frequencies=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.frequencies = frequencies

    def forward(self, t):
        embedding = sinusoid(t, self.frequencies)                       # (B, frequencies)
        return self.mlp(embedding.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Labels y (B,) long, 0 to num_classes -> (B, D).

    null_label  the last row is the null label's. False: there is no such row
    """

    def __init__(self, num_classes, dim, null_label=True):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + null_label, dim)

    def forward(self, y):
        return self.embedding_table(y)


class Attention(nn.Module):
    """Self-attention of tokens h (B, T, D) -> (B, T, D)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, h):
        B, T, D = h.shape
        qkv = self.qkv(h).view(B, T, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                            # 3 x (B, heads, T, D/h)
        h = F.scaled_dot_product_attention(q, k, v)                     # (B, heads, T, D / heads)
        return self.proj(h.transpose(1, 2).reshape(B, T, D))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, on each token: (B, T, D) -> (B, T, D)."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, h):
        return self.fc2(F.gelu(self.fc1(h), approximate="tanh"))


class DiTBlock(nn.Module):
    """Attention and MLP of tokens h (B, T, D), both modulated and gated by the condition c (B, D).

    This is adaLN-Zero (Sec. 3.2 of DiT): the gates start at zero, so the block starts as identity.
    """

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, h, c):
        modulation = self.adaLN_modulation(c).chunk(6, dim=1)           # 6 x (B, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        h = h + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(h), shift1, scale1))
        h = h + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(h), shift2, scale2))
        return h


class FinalLayer(nn.Module):
    """Tokens h (B, T, D) and condition c (B, D) -> patches (B, T, patch_size^2 * out_channels)."""

    def __init__(self, dim, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, h, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)         # 2 x (B, D)
        return self.linear(modulate(self.norm_final(h), shift, scale))


class DiT(nn.Module):
    """Diffusion transformer on square images or latents.

    input_size   side of the input, in pixels of the image or of the latent (the image's side / 8)
    patch_size   side of a patch, which becomes one token
    in_channels  C
    hidden_size  width D of a token
    depth        number of blocks, L
    num_heads    attention heads, each of width D / num_heads
    num_classes  K. Labels are 0 to K-1 and K is the null label. K = 0: an unconditional network
    learn_sigma  the output has 2C channels: the prediction, then the interpolation coefficients of
                 the reverse variance, which only the DDPM sampler reads
    guidance     the network takes the scale w of guidance as an input. Our addition, after Meng et
                 al., "On Distillation of Guided Diffusion Models", arXiv:2210.03142. The embedding
                 of w starts at zero: the weights of a network without w work here unchanged
    null_label   False: a network that was trained without dropping labels. Its table has K rows,
                 as upstream's with class_dropout_prob = 0, and it cannot be called with y = K
    """

    cfg_channels = 3  # Upstream guides 3 of 4 channels. Unintended, say its authors, but published.
    recompute = False

    def __init__(  # noqa: PLR0913
        self,
        input_size=32,
        patch_size=2,
        in_channels=4,
        hidden_size=1152,
        depth=28,
        num_heads=16,
        num_classes=1000,
        learn_sigma=True,
        guidance=False,
        null_label=True,
    ):
        super().__init__()
        self.arch = dict(
            net=type(self).__name__,
            input_size=input_size,
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            num_classes=num_classes,
            learn_sigma=learn_sigma,
        )
        if guidance:
            self.arch["guidance"] = True
        if not null_label:
            self.arch["null_label"] = False
        self.patch_size = patch_size
        self.num_classes = num_classes
        self.guidance = guidance
        self.sample_shape = (in_channels, input_size, input_size)

        tokens = (input_size // patch_size) ** 2
        out_channels = 2 * in_channels if learn_sigma else in_channels
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, null_label)
        self.w_embedder = TimestepEmbedder(hidden_size) if guidance else None
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, hidden_size), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, out_channels)
        if self.pos_embed.device.type != "meta":
            self.initialize_weights()

    def initialize_weights(self):
        """As upstream: Xavier for linear layers, small embeddings, zero gates and last layer.

        The output of the whole network therefore starts at zero.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

        side = self.arch["input_size"] // self.patch_size
        self.pos_embed.data.copy_(torch.from_numpy(sincos_2d(self.arch["hidden_size"], side)))

        # The patches' convolution as the linear layer that it is:
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)

        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)

        set_zero(block.adaLN_modulation[1] for block in self.blocks)
        set_zero([self.final_layer.adaLN_modulation[1], self.final_layer.linear])
        if self.guidance:
            set_zero([self.w_embedder.mlp[2]])

    def unpatchify(self, h):
        """Patches h (B, T, patch_size^2 * C) -> image (B, C, H, W)."""
        B, T, _ = h.shape
        side = int(T ** 0.5)
        p = self.patch_size
        h = h.view(B, side, side, p, p, -1)                             # (B, rows, cols, p, p, C)
        return torch.einsum("nhwpqc->nchpwq", h).reshape(B, -1, side * p, side * p)

    def forward(self, x, t, y, w=None, tap=None):
        """Noisy x (B, C, H, W), timesteps t (B,), labels y (B,) long -> (B, C or 2C, H, W).

        w    scales of guidance (B,), if the network takes them
        tap  see the top of this file: tokens (B, T, D) at l = 0 to depth-1, the output at l = depth
        """
        tap = tap or unchanged
        h = self.x_embedder(x) + self.pos_embed                         # (B, T, D), T = H * W / p^2
        c = self.t_embedder(t) + self.y_embedder(y)                     # (B, D)
        if self.guidance:
            c = c + self.w_embedder(1000 * w)                           # in the range of timesteps
        for l, block in enumerate(self.blocks):
            h = tap(l, run_block(self, block, h, c))                    # (B, T, D)
        out = self.unpatchify(self.final_layer(h, c))                   # (B, C or 2C, H, W)
        return tap(len(self.blocks), out)


class SiT(DiT):
    """DiT's network for flows. The output (B, C, H, W) is the velocity eps - x0.

    Times t (B,) lie in [0, 1], where 1 is noise, and enter the network as they are.

    learn_sigma  the last layer has 2C channels as DiT's, and nobody reads the second half. The
                 weights that SiT's authors released are so; REPA's are not
    reverse      the weights count time from noise, 0, to data, 1, and predict x0 - eps. SiT's
                 released weights do, REPA's do not. Inputs and output of this class stay the same
    """

    ignored = ("projectors.",)  # keys in REPA's files that its alignment loss needed in training

    def __init__(self, *args, reverse=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.reverse = reverse
        if reverse:
            self.arch["reverse"] = True
        else:
            self.cfg_channels = None  # REPA guides all channels

    def unpatchify(self, h):
        """Patches -> the velocity (B, C, H, W) in our direction of time."""
        out = super().unpatchify(h)[:, :self.sample_shape[0]]
        return -out if self.reverse else out

    def forward(self, x, t, y, w=None, tap=None):
        """As DiT's, with t in [0, 1] -> velocity eps - x0, (B, C, H, W)."""
        t = 1 - t if self.reverse else t
        return super().forward(x, t, y, w, tap)


# ---- The U-Net of latent diffusion ---------------------------------------------------------------


def group_norm(channels, eps=1e-5):
    return nn.GroupNorm(32, channels, eps=eps)


class ResBlock(nn.Module):
    """Two convolutions of x (B, C, H, W), with the embedding of t (B, emb_channels) between them.

    scale_shift  the embedding scales and shifts the normalised features, instead of being added
    resample     a module that halves or doubles the sides before the first convolution, or None
    """

    def __init__(self, channels, emb_channels, out_channels, scale_shift, resample=None):
        super().__init__()
        self.in_layers = nn.Sequential(
            group_norm(channels),
            nn.SiLU(),
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(),
            nn.Linear(emb_channels, (1 + scale_shift) * out_channels),
        )
        self.out_layers = nn.Sequential(
            group_norm(out_channels),
            nn.SiLU(),
            nn.Identity(),  # Upstream has dropout here. No released model uses it.
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        if channels == out_channels:
            self.skip_connection = nn.Identity()
        else:
            self.skip_connection = nn.Conv2d(channels, out_channels, 1)
        self.resample = resample or nn.Identity()
        self.scale_shift = scale_shift

    def forward(self, x, emb):
        norm1, act, conv1 = self.in_layers
        norm2, _, _, conv2 = self.out_layers
        h = conv1(self.resample(act(norm1(x))))                         # (B, C', H', W')
        emb = self.emb_layers(emb)[:, :, None, None]                    # (B, C' or 2C', 1, 1)
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = norm2(h) * (1 + scale) + shift
        else:
            h = norm2(h + emb)
        return self.skip_connection(self.resample(x)) + conv2(act(h))   # (B, C', H', W')


class AttentionBlock(nn.Module):
    """Self-attention between the positions of x (B, C, H, W), added to x.

    The channels of qkv are split into heads first and then into q, k and v (upstream's "legacy"
    order): q of head 0, k of head 0, v of head 0, q of head 1, ...
    """

    def __init__(self, channels, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.norm = group_norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x).flatten(2)).transpose(1, 2)         # (B, HW, 3C)
        qkv = qkv.contiguous().view(B, H * W, self.num_heads, 3, C // self.num_heads)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)                            # 3 x (B, heads, HW, C/h)
        h = F.scaled_dot_product_attention(q, k, v)                     # (B, heads, HW, C / heads)
        h = self.proj_out(h.transpose(2, 3).reshape(B, C, H * W))       # (B, C, HW)
        return x + h.view(B, C, H, W)


class CrossAttention(nn.Module):
    """Attention of tokens h (B, T, D) to a context (B, S, context_dim), or to h -> (B, T, D)."""

    def __init__(self, dim, context_dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def split_heads(self, z):
        """(B, T, D) -> (B, heads, T, D / heads)."""
        return z.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, h, context=None):
        context = h if context is None else context
        q = self.split_heads(self.to_q(h))                              # (B, heads, T, D / heads)
        k = self.split_heads(self.to_k(context))                        # (B, heads, S, D / heads)
        v = self.split_heads(self.to_v(context))
        h = F.scaled_dot_product_attention(q, k, v)                     # (B, heads, T, D / heads)
        return self.to_out(h.transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """Two linear layers, one gated by the GELU of the other: (B, T, dim) -> (B, T, hidden)."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden)

    def forward(self, h):
        h, gate = self.proj(h).chunk(2, dim=-1)
        return h * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context and MLP, each added to the tokens h (B, T, D)."""

    def __init__(self, dim, context_dim, num_heads):
        super().__init__()
        self.attn1 = CrossAttention(dim, dim, num_heads)
        mlp = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))
        self.ff = nn.ModuleDict({"net": mlp})
        self.attn2 = CrossAttention(dim, context_dim, num_heads)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, h, context):
        h = h + self.attn1(self.norm1(h))
        h = h + self.attn2(self.norm2(h), context)
        return h + self.ff["net"](self.norm3(h))


class SpatialTransformer(nn.Module):
    """A transformer block over the positions of x (B, C, H, W), added to x."""

    def __init__(self, channels, context_dim, num_heads):
        super().__init__()
        self.norm = group_norm(channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        block = TransformerBlock(channels, context_dim, num_heads)
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x, context):
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)       # (B, HW, C)
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class BlockSequence(nn.Sequential):
    """One block of the U-Net: some layers in turn, each called with the inputs that it takes."""

    def forward(self, h, emb, context):
        for layer in self:
            if isinstance(layer, ResBlock):
                h = layer(h, emb)
            elif isinstance(layer, SpatialTransformer):
                h = layer(h, context)
            else:
                h = layer(h)
        return h


class UNet(nn.Module):
    """The U-Net of latent diffusion and Stable Diffusion 1 (upstream: UNetModel).

    The arguments have upstream's names; input_size, context and num_classes are our own.

    input_size             side of the latents
    in_channels            C, of the latents and of the output
    model_channels         unit of width
    num_res_blocks         residual blocks per resolution; the decoder has one more
    channel_mult           width of every resolution, in units of model_channels
    attention_resolutions  factors of downsampling (not sides) at which there is attention
    num_heads              heads of every attention, or instead
    num_head_channels      width of every head
    use_scale_shift_norm   the time's embedding scales and shifts features, instead of being added
    resblock_updown        residual blocks change the resolution, instead of plain convolutions
    context                what the image attends to, besides itself:
                           "none"   nothing. y is ignored
                           "class"  y (B,) long, 0 to K-1, or K for the null label. The context is
                                    row y of a table of K + 1 embeddings
                           "text"   y (B, S, context_dim), embedded prompts: they are the context
    context_dim            width of the context
    num_classes            K
    null_label             False: the table of embeddings has K rows, and there is no null label

    The table of "class" is a model of its own upstream, beside the U-Net. Here the U-Net holds it,
    under upstream's key CLASS_TABLE. This is the only key that UNetModel does not have.
    """

    cfg_channels = None
    guidance = False
    recompute = False

    def __init__(  # noqa: PLR0913
        self,
        input_size=64,
        in_channels=4,
        model_channels=320,
        num_res_blocks=2,
        channel_mult=(1, 2, 4, 4),
        attention_resolutions=(4, 2, 1),
        num_heads=None,
        num_head_channels=None,
        use_scale_shift_norm=False,
        resblock_updown=False,
        context="none",
        context_dim=None,
        num_classes=0,
        null_label=True,
    ):
        super().__init__()
        self.arch = dict(
            net="UNet",
            input_size=input_size,
            in_channels=in_channels,
            model_channels=model_channels,
            num_res_blocks=num_res_blocks,
            channel_mult=list(channel_mult),
            attention_resolutions=list(attention_resolutions),
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown,
            context=context,
            context_dim=context_dim,
            num_classes=num_classes,
        )
        if not null_label:
            self.arch["null_label"] = False
        self.context = context
        self.num_classes = num_classes
        self.sample_shape = (in_channels, input_size, input_size)

        width = 4 * model_channels
        layers = nn.Linear(model_channels, width), nn.SiLU(), nn.Linear(width, width)
        self.time_embed = nn.Sequential(*layers)
        if context == "class":
            table = nn.Embedding(num_classes + null_label, context_dim)
            self.cond_stage_model = nn.ModuleDict({"embedding": table})

        self.input_blocks, skips = self.make_input_blocks()
        deepest = skips[-1]
        self.middle_block = BlockSequence(
            self.make_residual(deepest, deepest),
            self.make_attention(deepest),
            self.make_residual(deepest, deepest),
        )
        self.output_blocks = self.make_output_blocks(skips)
        widest = channel_mult[0] * model_channels
        last = nn.Conv2d(widest, in_channels, 3, padding=1)
        self.out = nn.Sequential(group_norm(widest), nn.SiLU(), last)
        if self.out[2].weight.device.type != "meta":
            self.initialize_weights()

    def make_residual(self, channels, out_channels, resample=None):
        emb_channels = 4 * self.arch["model_channels"]
        scale_shift = self.arch["use_scale_shift_norm"]
        return ResBlock(channels, emb_channels, out_channels, scale_shift, resample)

    def make_attention(self, channels):
        num_heads = self.arch["num_heads"] or channels // self.arch["num_head_channels"]
        if self.context == "none":
            return AttentionBlock(channels, num_heads)
        return SpatialTransformer(channels, self.arch["context_dim"], num_heads)

    def make_downsampling(self, channels):
        """A layer that halves the sides."""
        if self.arch["resblock_updown"]:
            return self.make_residual(channels, channels, nn.AvgPool2d(2))
        conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        return nn.Sequential(OrderedDict(op=conv))

    def make_upsampling(self, channels):
        """A layer that doubles the sides."""
        if self.arch["resblock_updown"]:
            return self.make_residual(channels, channels, nn.Upsample(scale_factor=2))
        conv = nn.Conv2d(channels, channels, 3, padding=1)
        return nn.Sequential(OrderedDict(up=nn.Upsample(scale_factor=2), conv=conv))

    def make_input_blocks(self):
        """-> (the encoder's blocks, the channels that each one gives)."""
        arch = self.arch
        channels = arch["model_channels"]
        blocks = nn.ModuleList()
        blocks.append(BlockSequence(nn.Conv2d(arch["in_channels"], channels, 3, padding=1)))
        skips = [channels]
        for level, mult in enumerate(arch["channel_mult"]):
            if level > 0:
                blocks.append(BlockSequence(self.make_downsampling(channels)))
                skips.append(channels)
            out_channels = mult * arch["model_channels"]
            for _ in range(arch["num_res_blocks"]):
                layers = [self.make_residual(channels, out_channels)]
                channels = out_channels
                if 2 ** level in arch["attention_resolutions"]:
                    layers.append(self.make_attention(channels))
                blocks.append(BlockSequence(*layers))
                skips.append(channels)
        return blocks, skips

    def make_output_blocks(self, skips):
        """The decoder's blocks. skips: channels of the encoder's, of which each block takes one."""
        arch = self.arch
        skips = list(skips)
        channels = skips[-1]
        blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(arch["channel_mult"]))):
            out_channels = mult * arch["model_channels"]
            for i in range(arch["num_res_blocks"] + 1):
                layers = [self.make_residual(channels + skips.pop(), out_channels)]
                channels = out_channels
                if 2 ** level in arch["attention_resolutions"]:
                    layers.append(self.make_attention(channels))
                if level > 0 and i == arch["num_res_blocks"]:
                    layers.append(self.make_upsampling(channels))
                blocks.append(BlockSequence(*layers))
        return blocks

    def initialize_weights(self):
        """As upstream: torch's own, but zero for the last layer of every residual branch and of
        the network."""
        for module in self.modules():
            if isinstance(module, ResBlock):
                set_zero([module.out_layers[3]])
            elif isinstance(module, (AttentionBlock, SpatialTransformer)):
                set_zero([module.proj_out])
        set_zero([self.out[2]])

    @property
    def blocks(self):
        return [*self.input_blocks, self.middle_block, *self.output_blocks]

    def embed_condition(self, y):
        """y, as `context` says -> what the image attends to, (B, S, context_dim), or None."""
        if self.context == "none":
            return None
        if self.context == "class":
            return self.cond_stage_model["embedding"](y)[:, None]       # (B, 1, context_dim)
        return y                                                        # (B, S, context_dim)

    def forward(self, x, t, y, w=None, tap=None):
        """Noisy x (B, C, H, W), timesteps t (B,), y as `context` says -> (B, C, H, W).

        t    integer or fractional
        w    is ignored
        tap  see the top of this file: (B, C', H', W') at l = 0 to L-1, the output at l = L. What
             tap returns for an input block also goes into the skip connection
        """
        tap = tap or unchanged
        emb = sinusoid(t, self.arch["model_channels"])                  # (B, model_channels)
        emb = self.time_embed(emb.to(self.time_embed[0].weight.dtype))  # (B, 4 model_channels)
        context = self.embed_condition(y)                               # (B, S, context_dim), None

        h = x
        skips = []
        middle = len(self.input_blocks)                                 # index of the middle block
        for l, block in enumerate(self.blocks):
            if l > middle:
                h = torch.cat([h, skips.pop()], dim=1)
            h = tap(l, run_block(self, block, h, emb, context))         # (B, C', H', W')
            if l < middle:
                skips.append(h)
        return tap(len(self.blocks), self.out(h))                       # (B, C, H, W)


# ---- The DDPM++ U-Net of EDM ---------------------------------------------------------------------

SIGMA_DATA = 0.5  # EDM's sigma_data, the standard deviation that it assumes of the data


def edm_group_norm(channels):
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class ResampledConv(nn.Conv2d):
    """A convolution of x (B, C, H, W) that first doubles or halves the sides, or does neither.

    resample  "up": copies of pixels; "down": means of 2 x 2 pixels; None

    Upstream's resample_filter [1, 1] gives just these two. It is a key of the state dict, no more.
    """

    def __init__(self, channels, out_channels, kernel, resample=None):
        super().__init__(channels, out_channels, kernel, padding=kernel // 2)
        self.resample = resample
        if resample:
            self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))

    def forward(self, x):
        if self.resample == "up":
            x = F.interpolate(x, scale_factor=2)
        elif self.resample == "down":
            x = F.avg_pool2d(x, 2)
        return super().forward(x)


class EDMBlock(nn.Module):
    """Two convolutions of x (B, C, H, W) with the embedding (B, emb_channels) added between them,
    then attention of one head if asked for. Every sum is multiplied by sqrt(1/2).

    resample   "up", "down" or None, see ResampledConv
    attention  True: with attention
    """

    def __init__(self, channels, out_channels, emb_channels, resample=None, attention=False):
        super().__init__()
        self.norm0 = edm_group_norm(channels)
        self.norm1 = edm_group_norm(out_channels)
        self.conv0 = ResampledConv(channels, out_channels, 3, resample)
        self.affine = nn.Linear(emb_channels, out_channels)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if resample or channels != out_channels:
            self.skip = ResampledConv(channels, out_channels, 1, resample)
        else:
            self.skip = nn.Identity()
        self.attention = attention
        if attention:
            self.norm2 = edm_group_norm(out_channels)
            self.qkv = nn.Conv2d(out_channels, 3 * out_channels, 1)
            self.proj = nn.Conv2d(out_channels, out_channels, 1)

    def forward(self, x, emb, drop=None):
        """drop(h) -> h: dropout before the second convolution."""
        h = self.conv0(F.silu(self.norm0(x)))                           # (B, C', H', W')
        h = F.silu(self.norm1(h + self.affine(emb)[:, :, None, None]))
        if drop:
            h = drop(h)
        x = (self.skip(x) + self.conv1(h)) * 0.5 ** 0.5                 # (B, C', H', W')
        if self.attention:
            x = (x + self.attend(x)) * 0.5 ** 0.5
        return x

    def attend(self, x):
        """Self-attention between positions, one head; the channels of qkv go q, k, v, q, k, ..."""
        qkv = self.qkv(self.norm2(x)).flatten(2)                        # (B, 3C', HW)
        qkv = qkv.unflatten(1, (1, -1, 3)).permute(3, 0, 1, 4, 2)       # (3, B, 1, HW, C')
        q, k, v = qkv.contiguous()                                      # as fused kernels want them
        h = F.scaled_dot_product_attention(q, k, v)                     # (B, 1, HW, C')
        return self.proj(h.transpose(2, 3).reshape(x.shape))


class DDPMpp(nn.Module):
    """DDPM++ with EDM's preconditioning. Its time is the noise level, and its output is the F of
    D = c_skip x + c_out F (EDM's Eq. 7): the prediction "edm" of solvers.py.

    input_size        side of the images
    in_channels       C
    model_channels    unit of width
    num_blocks        residual blocks per resolution; the decoder has one more
    channel_mult      width of every resolution, in units of model_channels
    attn_resolutions  sides at which there is attention, besides the middle
    num_classes       K. A label enters as a one-hot vector, the null label K as zeros. Upstream's
                      networks have not learned K: they are trained with classes or without
    augment_dim       width of upstream's input that says how an image was augmented. We keep its
                      weights and never use them, as upstream when it samples
    guidance          the network takes the scale w of guidance as an input; its embedding starts at
                      zero, as DiT's

    dropout  rate; may be set at any time, acts in training only
    rng      source of the dropout masks: rng.fork(l).uniform(shape) -> (B, *shape) in [0, 1), the
             same numbers at every call (kit.processes.StepRandom is one). None: torch's own
    """

    cfg_channels = None
    recompute = False
    dropout = 0.0
    rng = None

    def __init__(  # noqa: PLR0913
        self,
        input_size=32,
        in_channels=3,
        model_channels=128,
        num_blocks=4,
        channel_mult=(2, 2, 2),
        attn_resolutions=(16,),
        num_classes=0,
        augment_dim=0,
        guidance=False,
    ):
        super().__init__()
        self.arch = dict(
            net="DDPM++",
            input_size=input_size,
            in_channels=in_channels,
            model_channels=model_channels,
            num_blocks=num_blocks,
            channel_mult=list(channel_mult),
            attn_resolutions=list(attn_resolutions),
            num_classes=num_classes,
            augment_dim=augment_dim,
        )
        if guidance:
            self.arch["guidance"] = True
        self.num_classes = num_classes
        self.guidance = guidance
        self.sample_shape = (in_channels, input_size, input_size)

        enc, skips = self.make_encoder()
        dec = self.make_decoder(skips)
        # Plain lists, since the modules are registered below, under upstream's names.
        self.blocks = [*enc.values(), *dec.values()]
        self.takes_skip = [False] * len(enc) + ["_block" in name for name in dec]
        widest = channel_mult[0] * model_channels
        self.out = [edm_group_norm(widest), nn.Conv2d(widest, in_channels, 3, padding=1)]
        dec[f"{input_size}x{input_size}_aux_norm"] = self.out[0]
        dec[f"{input_size}x{input_size}_aux_conv"] = self.out[1]

        emb_channels = 4 * model_channels
        self.model = nn.ModuleDict({"enc": enc, "dec": dec})
        self.model["map_layer0"] = nn.Linear(model_channels, emb_channels)
        self.model["map_layer1"] = nn.Linear(emb_channels, emb_channels)
        if num_classes:
            self.model["map_label"] = nn.Linear(num_classes, model_channels)
        if augment_dim:
            map_augment = nn.Linear(augment_dim, model_channels, bias=False)
            self.model["map_augment"] = map_augment.requires_grad_(False)
        self.w_embedder = nn.Linear(model_channels, model_channels) if guidance else None
        if self.out[1].weight.device.type != "meta":
            self.initialize_weights()

    def make_block(self, channels, out_channels, resample=None, attention=False):
        emb_channels = 4 * self.arch["model_channels"]
        return EDMBlock(channels, out_channels, emb_channels, resample, attention)

    def make_encoder(self):
        """-> (the encoder's blocks under upstream's names, the channels that each one gives)."""
        arch = self.arch
        side = arch["input_size"]
        channels = arch["model_channels"]
        enc = nn.ModuleDict()
        enc[f"{side}x{side}_conv"] = nn.Conv2d(arch["in_channels"], channels, 3, padding=1)
        skips = [channels]
        for level, mult in enumerate(arch["channel_mult"]):
            side = arch["input_size"] >> level
            if level > 0:
                enc[f"{side}x{side}_down"] = self.make_block(channels, channels, resample="down")
                skips.append(channels)
            out_channels = mult * arch["model_channels"]
            attention = side in arch["attn_resolutions"]
            for i in range(arch["num_blocks"]):
                block = self.make_block(channels, out_channels, attention=attention)
                enc[f"{side}x{side}_block{i}"] = block
                channels = out_channels
                skips.append(channels)
        return enc, skips

    def make_decoder(self, skips):
        """The decoder's blocks under upstream's names. skips: channels of the encoder's blocks, of
        which each residual block here takes one."""
        arch = self.arch
        skips = list(skips)
        channels = skips[-1]
        dec = nn.ModuleDict()
        deepest = len(arch["channel_mult"]) - 1
        for level, mult in reversed(list(enumerate(arch["channel_mult"]))):
            side = arch["input_size"] >> level
            if level == deepest:
                dec[f"{side}x{side}_in0"] = self.make_block(channels, channels, attention=True)
                dec[f"{side}x{side}_in1"] = self.make_block(channels, channels)
            else:
                dec[f"{side}x{side}_up"] = self.make_block(channels, channels, resample="up")
            out_channels = mult * arch["model_channels"]
            for i in range(arch["num_blocks"] + 1):
                attention = i == arch["num_blocks"] and side in arch["attn_resolutions"]
                in_channels = channels + skips.pop()
                block = self.make_block(in_channels, out_channels, attention=attention)
                dec[f"{side}x{side}_block{i}"] = block
                channels = out_channels
        return dec

    def initialize_weights(self):
        """As upstream: Xavier, almost zero for the last layer of every residual branch and of the
        network. The embedding of w, which is ours, starts at zero."""
        gains = {"qkv": 0.2 ** 0.5, "conv1": 1e-5, "proj": 1e-5, "w_embedder": 0.0}
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                gain = gains.get(name.split(".")[-1], 1.0)
                if module is self.out[1]:
                    gain = 1e-5
                nn.init.xavier_uniform_(module.weight, gain)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.compiler.disable
    def drop(self, l, h):
        """Dropout of h (B, ...) in block l. With rng set, the mask is the same when run_block()
        computes the block a second time for its gradient."""
        if self.rng:
            u = self.rng.fork(l).uniform(h.shape[1:])
        else:
            u = torch.rand(h.shape, device=h.device)
        return h * (u >= self.dropout) / (1 - self.dropout)

    def embed_number(self, v, dtype):
        """Noise labels or scales v (B,) -> (B, model_channels): a sinusoid with the sines first."""
        C = self.arch["model_channels"]
        return sinusoid(v, C, endpoint=True).roll(C // 2, 1).to(dtype)

    def embed_condition(self, c_noise, y, w, dtype):
        """Noise labels c_noise (B,), labels y (B,), scales w (B,) -> (B, 4 model_channels)."""
        emb = self.embed_number(c_noise, dtype)                         # (B, model_channels)
        if self.num_classes:
            one_hot = y[:, None] == torch.arange(self.num_classes, device=y.device)
            emb = emb + self.model["map_label"](one_hot.to(dtype) * self.num_classes ** 0.5)
        if self.guidance:
            emb = emb + self.w_embedder(self.embed_number(w, dtype))
        emb = F.silu(self.model["map_layer0"](emb))                     # (B, 4 model_channels)
        return F.silu(self.model["map_layer1"](emb))

    def raw(self, x, c_noise, y, w=None, tap=None):
        """The network without preconditioning: upstream's SongUNet.

        Scaled x (B, C, H, W), noise labels c_noise (B,), the rest as forward() -> F (B, C, H, W).
        """
        tap = tap or unchanged
        emb = self.embed_condition(c_noise, y, w, x.dtype)              # (B, 4 model_channels)
        h = self.blocks[0](x)                                           # the first convolution
        h = tap(0, h)
        skips = [h]
        for l in range(1, len(self.blocks)):
            if self.takes_skip[l]:
                h = torch.cat([h, skips.pop()], dim=1)
            drop = partial(self.drop, l) if self.training and self.dropout else None
            h = tap(l, run_block(self, self.blocks[l], h, emb, drop))   # (B, C', H', W')
            if l < len(self.model["enc"]):
                skips.append(h)
        norm, conv = self.out
        return tap(len(self.blocks), conv(F.silu(norm(h))))             # (B, C, H, W)

    def forward(self, x, t, y, w=None, tap=None):
        """Noisy x = x0 + t eps (B, C, H, W), noise levels t > 0 (B,), labels y (B,) long
        -> F (B, C, H, W), from which the denoised image is D = c_skip x + c_out F.

            F = raw(c_in x, c_noise),  c_in = 1 / sqrt(t^2 + sigma_data^2),  c_noise = ln(t) / 4
            c_skip = sigma_data^2 / (t^2 + sigma_data^2),  c_out = t sigma_data c_in
                                                                        EDM's Eq. 7 and Table 1

        w    scales of guidance (B,), if the network takes them
        tap  see the top of this file: (B, C', H', W') at l = 0 to L-1, F at l = L. What tap returns
             for a block of the encoder also goes into the skip connection
        """
        norm = (t ** 2 + SIGMA_DATA ** 2).sqrt().view(-1, 1, 1, 1)      # 1 / c_in
        return self.raw(x / norm.to(x.dtype), t.log() / 4, y, w, tap)


# ---- Names and sizes -----------------------------------------------------------------------------

# DiT's and SiT's: upstream's table from S on. XS (for minutes on CIFAR-10), Ti and Na (for the
# embedded 8x8 digits) are ours.
SIZES = {
    "Na": dict(hidden_size=48, depth=2, num_heads=2),
    "Ti": dict(hidden_size=64, depth=3, num_heads=2),
    "XS": dict(hidden_size=96, depth=5, num_heads=3),
    "S": dict(hidden_size=384, depth=12, num_heads=6),
    "B": dict(hidden_size=768, depth=12, num_heads=12),
    "L": dict(hidden_size=1024, depth=24, num_heads=16),
    "XL": dict(hidden_size=1152, depth=28, num_heads=16),
}

# UNet's key that upstream's UNetModel does not have.
CLASS_TABLE = "cond_stage_model.embedding.weight"

# UNet's: upstream's configurations. LDM_UNCONDITIONAL serves three data sets.
LDM_UNCONDITIONAL = dict(
    input_size=64,
    in_channels=3,
    model_channels=224,
    channel_mult=[1, 2, 3, 4],
    attention_resolutions=[8, 4, 2],
    num_head_channels=32,
)
UNETS = {
    "SD-v1.5": dict(
        input_size=64,
        in_channels=4,
        model_channels=320,
        channel_mult=[1, 2, 4, 4],
        attention_resolutions=[4, 2, 1],
        num_heads=8,
        context="text",
        context_dim=768,
    ),
    "LDM-ImageNet": dict(
        input_size=64,
        in_channels=3,
        model_channels=192,
        channel_mult=[1, 2, 3, 5],
        attention_resolutions=[8, 4, 2],
        num_heads=1,
        context="class",
        context_dim=512,
    ),
    "LDM-CelebAHQ": LDM_UNCONDITIONAL,
    "LDM-FFHQ": LDM_UNCONDITIONAL,
    "LDM-Bedroom": LDM_UNCONDITIONAL,
    "LDM-Churches": dict(
        input_size=32,
        in_channels=4,
        model_channels=192,
        channel_mult=[1, 2, 2, 4, 4],
        attention_resolutions=[1, 2, 4, 8],
        num_heads=8,
        use_scale_shift_norm=True,
        resblock_updown=True,
    ),
}
# The student of the KD paper, A.2. The paper counts 200M parameters; this network has 309M.
UNETS["SD-KD"] = dict(UNETS["SD-v1.5"], model_channels=192, attention_resolutions=[4, 2])

# DDPMpp's: Table 1 of the KD paper, channels x residual blocks; t is the teacher.
DDPMPP = {"t": "128x4", "128": "128x2", "96": "96x2", "64": "64x2", "32": "32x2"}


def make_arch(name, input_size, in_channels, num_classes, learn_sigma=False):
    """A network's name and the shape of the data -> its `arch`, from which build() makes it.

    name  "DiT-XL/2", "SiT-XL/2", "SiT-XL/2-REPA": a size of SIZES and the side of a patch
          "LDM-ImageNet", "SD-v1.5", ...: a network of UNETS
          "DDPM++-32", "DDPM++-32-uncond": a size of DDPMPP, with classes or without
          "DDPM++-16x1": any other size, here 16 channels and 1 residual block per resolution

    learn_sigma is DiT's and SiT's. num_classes is ignored where the network takes no classes.
    Raises ValueError if the name is unknown, or if the network cannot divide the input's side.
    """
    shape = dict(input_size=input_size, in_channels=in_channels)
    if name in UNETS:
        arch = make_unet_arch(name, shape, num_classes)
    elif name.startswith("DDPM++"):
        arch = make_ddpmpp_arch(name, shape, num_classes)
    else:
        arch = make_dit_arch(name, shape, num_classes, learn_sigma)

    if "patch_size" in arch:
        divisor = arch["patch_size"]
        reason = f"patches of {divisor}"
    else:
        divisor = 2 ** (len(arch["channel_mult"]) - 1)
        reason = "its levels"
    if input_size % divisor:
        raise ValueError(
            f"--model {name}: {reason} do not tile a {input_size}x{input_size} input"
        )
    return arch


def make_dit_arch(name, shape, num_classes, learn_sigma):
    """make_arch() for "DiT-XL/2", "SiT-XL/2" and "SiT-XL/2-REPA"."""
    plain = name.removesuffix("-REPA") if name.startswith("SiT") else name
    match = re.fullmatch(r"(DiT|SiT)-(Na|Ti|XS|S|B|L|XL)/([1248])", plain)
    if not match:
        raise unknown_name(name)
    net, size, patch = match.groups()
    return dict(
        net=net,
        **shape,
        patch_size=int(patch),
        num_classes=num_classes,
        learn_sigma=learn_sigma,
        **SIZES[size],
    )


def make_unet_arch(name, shape, num_classes):
    """make_arch() for the names in UNETS."""
    takes_class = UNETS[name].get("context") == "class"
    labels = num_classes if takes_class else 0
    return dict(UNETS[name], net="UNet", **shape, num_classes=labels)


def make_ddpmpp_arch(name, shape, num_classes):
    """make_arch() for "DDPM++-32", "DDPM++-16x1" and the same with "-uncond".

    The sizes outside CIFAR-10 are ours: three levels from 16 pixels on, else two, with attention at
    the level whose side is nearest to 16.
    """
    match = re.fullmatch(r"DDPM\+\+-(\w+?)(-uncond)?", name)
    if not match:
        raise unknown_name(name)
    size, uncond = match.groups()
    match = re.fullmatch(r"(\d+)x(\d+)", DDPMPP.get(size, size))
    if not match:
        raise unknown_name(name)
    channels = int(match[1])
    blocks = int(match[2])
    # The groups of the norms must divide 1 to 4 times the channels.
    divisible = channels in range(4, 41, 4) or channels in range(64, 1025, 32)
    if not divisible or blocks == 0:
        raise unknown_name(name)

    levels = 3 if shape["input_size"] >= 16 else 2
    sides = [shape["input_size"] >> level for level in range(levels)]
    attention = min(sides, key=lambda side: abs(side - 16))
    return dict(
        net="DDPM++",
        model_channels=channels,
        num_blocks=blocks,
        channel_mult=[2] * levels,
        **shape,
        attn_resolutions=[attention],
        num_classes=0 if uncond else num_classes,
        augment_dim=0,
    )


def unknown_name(name):
    """The error for a name that make_arch() does not know."""
    sizes = ",".join(SIZES)
    names = ", ".join([*UNETS, *(f"DDPM++-{size}" for size in DDPMPP)])
    return ValueError(
        f"--model {name}: unknown; choose DiT- or SiT-{{{sizes}}}/{{1,2,4,8}}, for example "
        f"DiT-XL/2, or {names}, DDPM++-CxB (C = 4, 8, ..., 40, 64, 96, ... channels, B blocks)"
    )


def build(arch):
    """A fresh network from an `arch`: of make_arch(), of another network, or of a checkpoint."""
    classes = {"DiT": DiT, "SiT": SiT, "UNet": UNet, "DDPM++": DDPMpp}
    arguments = dict(arch)
    net = classes[arguments.pop("net")]
    return net(**arguments)


def with_guidance(net):
    """A DiT, SiT or DDPM++ -> a new network that takes the scale w of guidance as an input.

    The new network has the same weights and computes the same function: the embedding of w starts
    at zero, so that w has no effect before training. Raises ValueError for other networks.
    """
    if not isinstance(net, (DiT, DDPMpp)):
        raise ValueError(
            f"a {net.arch['net']} cannot be made to take the scale of guidance; "
            "use a DiT, SiT or DDPM++"
        )
    new = build({**net.arch, "guidance": True})
    missing, unexpected = new.load_state_dict(net.state_dict(), strict=False)
    if unexpected or any(not key.startswith("w_embedder.") for key in missing):
        raise ValueError("this network cannot be made to take the scale of guidance")
    return new


def fill_random(net, std=0.02, seed=0):
    """Fill all parameters with N(0, std^2), and the scales of norms with N(1, std^2); returns net.

    For tests and benchmarks. A fresh DiT or U-Net outputs exactly zero, so every distillation loss
    on it is zero and shows nothing. A filled network does not.
    """
    g = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=g) * std)
    for module in net.modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)) and module.weight is not None:
            module.weight.data.add_(1)
    return net


def count(arch):
    """An `arch` -> (number of parameters, floating-point operations of one forward of one sample).

    A multiply-add counts as 2 operations. A prompt has 77 tokens, as CLIP's. The network is built
    on torch's meta device, so that it needs no memory.
    """
    return count_once(json.dumps(arch))


@lru_cache
def count_once(text):
    """count() of an arch in JSON, which can be a key of the cache."""
    arch = json.loads(text)
    with torch.device("meta"):
        net = build(arch)
        x = torch.empty(1, *net.sample_shape)
        if arch.get("context") == "text":
            y = torch.zeros(1, 77, arch["context_dim"])
        else:
            y = torch.zeros(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(x, torch.zeros(1), y, torch.ones(1))
    params = sum(p.numel() for p in net.parameters())
    return params, counter.get_total_flops()
