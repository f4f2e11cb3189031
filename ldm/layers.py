"""The blocks that the VAE and the U-Net are made of, under diffusers' parameter names."""

from collections import OrderedDict
from functools import partial

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions with group norm and a skip connection; with `temb_channels` the projected time embedding is
    added between them."""

    def __init__(self, in_channels: int, out_channels: int, *, groups: int, eps: float, temb_channels: int = 0):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if temb_channels:
            self.time_emb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """x (B, in, H, W), temb (B, temb_channels) -> (B, out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        if temb is not None:
            h = h + rearrange(self.time_emb_proj(F.silu(temb)), "b c -> b c 1 1")
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Multi-head attention without its projections (Vaswani et al. 2017, section 3.2): q (B, N, C), k, v (B, L, C) ->
    (B, N, C); with `causal` each position sees only itself and those before it."""
    q, k, v = (rearrange(tensor, "b n (h d) -> b h n d", h=heads) for tensor in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v, is_causal=causal), "b h n d -> b n (h d)")


class Attention(nn.Module):
    """Attention with its projections. `groups` adds the group norm that the VAE applies before it."""

    def __init__(self, channels: int, heads: int, *, context_channels: int = 0, bias: bool = False, groups: int = 0):
        super().__init__()
        self.heads = heads
        if groups:
            self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels, bias=bias)
        self.to_k = nn.Linear(context_channels or channels, channels, bias=bias)
        self.to_v = nn.Linear(context_channels or channels, channels, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (B, N, channels) over context (B, L, context_channels), or over itself without -> (B, N, channels)."""
        context = x if context is None else context
        return self.to_out[0](attend(self.to_q(x), self.to_k(context), self.to_v(context), self.heads))


class GEGLU(nn.Module):
    """Gated GELU (Shazeer 2020, "GLU Variants Improve Transformer", eq. 6)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.proj = nn.Linear(in_channels, 2 * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, in) -> (B, N, out)."""
        h, gate = self.proj(x).chunk(2, dim=-1)
        return h * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the context, GEGLU to four times the width and back; each with a layer norm
    and a skip connection."""

    def __init__(self, channels: int, heads: int, context_channels: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads, context_channels=context_channels)
        self.norm3 = nn.LayerNorm(channels)
        # The identity stands for a dropout, so that the layers have diffusers' numbers.
        net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))
        self.ff = nn.ModuleDict({"net": net})

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, N, C), context (B, L, context_channels) -> (B, N, C)."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff["net"](self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map (Rombach et al. 2022, section 3.3), between projections
    that are `linear` layers or 1x1 convolutions."""

    def __init__(self, channels: int, heads: int, context_channels: int, *, depth: int, groups: int, linear: bool):
        super().__init__()
        self.linear = linear
        project = nn.Linear if linear else partial(nn.Conv2d, kernel_size=1)
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = project(channels, channels)
        blocks = (TransformerBlock(channels, heads, context_channels) for _ in range(depth))
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = project(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, C, H, W), context (B, L, context_channels) -> (B, C, H, W)."""
        h = self.norm(x)
        h = h if self.linear else self.proj_in(h)
        h = rearrange(h, "b c h w -> b (h w) c")
        h = self.proj_in(h) if self.linear else h
        for block in self.transformer_blocks:
            h = block(h, context)
        h = self.proj_out(h) if self.linear else h
        h = rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])
        return x + (h if self.linear else self.proj_out(h))


def downsample(channels: int, *, asymmetric: bool = False) -> nn.Sequential:
    """Halves height and width, (B, C, H, W) -> (B, C, H/2, W/2), by a strided convolution; `asymmetric` pads on the
    right and below only, as the VAE."""
    pad = nn.ZeroPad2d((0, 1, 0, 1)) if asymmetric else nn.Identity()
    conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)
    return nn.Sequential(OrderedDict(pad=pad, conv=conv))


def upsample(channels: int) -> nn.Sequential:
    """Doubles height and width, (B, C, H, W) -> (B, C, 2H, 2W): nearest neighbour, then a convolution."""
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    return nn.Sequential(OrderedDict(up=nn.Upsample(scale_factor=2.0, mode="nearest"), conv=conv))
