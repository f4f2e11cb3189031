"""The blocks that the VAE and the U-Net are made of, under diffusers' parameter names."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# What a cross-attention made of a context: keys and values as `padded` says, or what `Attention.fold` says.
Prepared = tuple[Tensor, Tensor]
NARROW = 16  # channels of a head; also what the number of keys should be a multiple of


class GroupNorm(nn.GroupNorm):
    """Group norm of (B, C, H, W), whatever the layout. torch's CPU kernel for channels-last is several times slower
    than the other one where there are few positions, copies included."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        few = x.device.type == "cpu" and x.shape[2] * x.shape[3] <= 256
        return super().forward(x.contiguous() if few else x)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions with group norm and a skip; `temb_channels` adds a shift per channel from the time
    embedding. (B, in, H, W), (B, temb) -> (B, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, *, groups: int, eps: float, temb_channels: int = 0):
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if temb_channels:
            self.time_emb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """x (B, in, H, W), temb (B, temb_channels) -> (B, out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        if temb is not None:
            h = h + rearrange(self.time_emb_proj(F.silu(temb)), "b c -> b c 1 1")
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else pointwise(self.conv_shortcut, x))


def pointwise(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1x1 convolution as a matrix product, which is faster channels-last. (B, in, H, W) -> (B, out, H, W)."""
    return F.linear(x.permute(0, 2, 3, 1), layer.weight.flatten(1), layer.bias).permute(0, 3, 1, 2)


def widen(x: Tensor, batch: int) -> Tensor:
    """x (B, ...) again and again, (batch, ...), where the batch is a multiple of B."""
    return x if len(x) == batch else x.repeat(batch // len(x), *[1] * (x.ndim - 1))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of q (B, heads, N, d), k and v (B, heads, L, d) or as `padded` -> (B, heads, N, d).
    torch's CPU kernel is a third slower for narrow heads than for those with zeros added."""
    d = q.shape[-1]
    if q.device.type == "cpu" and d < NARROW and q.shape[2] >= 256:
        k, v = (F.pad(x, (0, NARROW - x.shape[-1])) for x in (k, v))
    q = F.pad(q, (0, k.shape[-1] - d), value=1.0)
    return F.scaled_dot_product_attention(q, k, v, scale=d**-0.5)[..., :d]


def padded(k: Tensor, v: Tensor) -> Prepared:
    """Keys and values (B, heads, L, d) with zeros added up to d = NARROW, and keys that get no weight up to an L by
    which torch's CPU kernel is up to twice as fast. The queries' ones at the channel after d find these at -10,000."""
    length, d = k.shape[2:]
    if k.device.type != "cpu" or d >= NARROW:
        return k, v
    k, v = (F.pad(x, (0, NARROW - d, 0, -length % NARROW)) for x in (k, v))
    k[:, :, length:, d] = -1e4
    return k, v


class Attention(nn.Module):
    """Multi-head attention of x (B, N, channels) over itself, over `context` (B, L, context_channels), or over
    what `prepare` made of a context before. `groups` adds the VAE's group norm, for `spatial`."""

    def __init__(self, channels: int, heads: int, *, context_channels: int = 0, bias: bool = False, groups: int = 0):
        super().__init__()
        self.heads = heads
        if groups:
            self.group_norm = GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels, bias=bias)
        self.to_k = nn.Linear(context_channels or channels, channels, bias=bias)
        self.to_v = nn.Linear(context_channels or channels, channels, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def split(self, x: Tensor) -> Tensor:
        """(B, N, heads * d) -> (B, heads, N, d)."""
        return rearrange(x, "b n (h d) -> b h n d", h=self.heads)

    def prepare(self, context: Tensor) -> Prepared:
        """What is the same for all x of a context (B, L, context_channels), to be computed once a picture."""
        k, v = self.split(self.to_k(context)), self.split(self.to_v(context))
        return self.fold(k, v) if self.heads * context.shape[1] <= self.to_q.in_features else padded(k, v)

    def fold(self, k: Tensor, v: Tensor) -> Prepared:
        """Keys and values (B, heads, L, d) multiplied into the other projections: (B, channels, heads * L), which makes
        x into scores, and (B, heads * L, channels), which makes their softmax into the output. x q k^T = x (q k^T)
        takes less work where heads * L is below the channels; for queries without a bias."""
        q = rearrange(self.to_q.weight, "(h d) c -> h c d", h=self.heads) * k.shape[-1] ** -0.5
        out = rearrange(self.to_out[0].weight, "c (h d) -> h d c", h=self.heads)
        return rearrange(q @ k.mT, "b h c l -> b c (h l)"), rearrange(v @ out, "b h l c -> b (h l) c")

    def weights(self, x: Tensor, scores: Tensor) -> Tensor:
        """How much x (B, N, channels) attends to each token, by the first of what was prepared: (B, N, heads, L),
        with the keys that were added."""
        if scores.ndim == 3:
            return (x @ scores).unflatten(2, (self.heads, -1)).softmax(-1)
        q = self.split(self.to_q(x))
        scores = F.pad(q, (0, scores.shape[-1] - q.shape[-1]), value=1.0) @ scores.mT / q.shape[-1] ** 0.5
        return rearrange(scores.softmax(-1), "b h n l -> b n h l")

    def forward(self, x: Tensor, context: Tensor | Prepared | None = None) -> Tensor:
        """x (B, N, channels) -> (B, N, channels); without `context`, over x itself."""
        if isinstance(context, tuple) and context[0].ndim == 3:
            return torch.baddbmm(self.to_out[0].bias, self.weights(x, context[0]).flatten(2), context[1])
        if not isinstance(context, tuple):
            context = x if context is None else context
            context = self.split(self.to_k(context)), self.split(self.to_v(context))
        h = attend(self.split(self.to_q(x)), *context)
        return self.to_out[0](rearrange(h, "b h n d -> b n (h d)"))

    def spatial(self, x: Tensor) -> Tensor:
        """Self-attention over all positions of (B, C, H, W), after a group norm and with a skip."""
        h = self(rearrange(self.group_norm(x), "b c h w -> b (h w) c"))
        return x + rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])


class GEGLU(nn.Module):
    """Gated GELU (Shazeer 2020, "GLU Variants Improve Transformer", eq. 6). (B, N, in) -> (B, N, out)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.proj = nn.Linear(in_channels, 2 * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, in) -> (B, N, out)."""
        h, gate = self.proj(x).chunk(2, dim=-1)
        return h * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back. (B, N, C) -> (B, N, C)."""

    def __init__(self, channels: int):
        super().__init__()
        # The middle entry has no weights; it keeps diffusers' numbering of `net`.
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the context, feed-forward; each after a layer norm, each with a skip."""

    def __init__(self, channels: int, heads: int, context_channels: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads, context_channels=context_channels)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor | Prepared) -> Tensor:
        """x (B, N, C), context (R, L, context_channels) or what attn2 prepared of it -> (R, N, C), R = B or a multiple:
        what comes before the context is done once for several contexts of one x."""
        x = x + self.attn1(self.norm1(x))
        x = widen(x, len(context[0]) if isinstance(context, tuple) else len(context))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map, conditioned on the context (Rombach et al. 2022,
    section 3.3). (B, C, H, W) -> (R, C, H, W); takes the next `depth` entries of `contexts`, whose batch R is B or a
    multiple."""

    def __init__(self, channels: int, heads: int, context_channels: int, *, depth: int, groups: int, linear: bool):
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        blocks = [TransformerBlock(channels, heads, context_channels) for _ in range(depth)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, contexts: Iterator[Tensor | Prepared]) -> Tensor:
        """x (B, C, H, W) -> (R, C, H, W); takes one of `contexts` for each of its blocks."""
        h = rearrange(self.norm(x), "b c h w -> b (h w) c")
        h = F.linear(h, self.proj_in.weight.flatten(1), self.proj_in.bias)  # the same for a linear and a 1x1 kernel
        for block in self.transformer_blocks:
            h = block(h, next(contexts))
        h = F.linear(h, self.proj_out.weight.flatten(1), self.proj_out.bias)
        return widen(x, len(h)) + rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])


class Downsample(nn.Module):
    """Halves height and width by a strided convolution. The VAE pads on the right and below only."""

    def __init__(self, channels: int, *, asymmetric: bool = False):
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H/2, W/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)."""
        if x.device.type == "cpu" and x.shape[0] * x.shape[2] * x.shape[3] >= 1024:
            return F.conv_transpose2d(x, doubled(self.conv.weight), self.conv.bias, stride=2, padding=1)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def doubled(kernel: Tensor) -> Tensor:
    """The kernel (in, out, 4, 4) whose transposed convolution of stride 2 is a doubling to nearest neighbours and a
    convolution with `kernel` (out, in, 3, 3): 16 products for each position and pair of channels in place of 36."""
    kernel = F.pad(kernel, (1, 1, 1, 1))
    kernel = kernel[..., 1:, :] + kernel[..., :-1, :]
    kernel = kernel[..., 1:] + kernel[..., :-1]
    return kernel.flip(2, 3).transpose(0, 1)
