"""The noise predictor: diffusers' UNet2DConditionModel (the Stable Diffusion 1.x and 2.x block types) under its
parameter names (Rombach et al. 2022; Ho et al. 2020)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, repeat
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm import model_io as weights
from ldm.config import UserError
from ldm.layers import (
    Attention,
    Downsample,
    GroupNorm,
    Prepared,
    ResnetBlock,
    SpatialTransformer,
    Upsample,
    widen,
)

# Keys of diffusers' config that change nothing here, and the values that this code supports.
SUPPORTED: dict[str, tuple] = {
    "act_fn": ("silu",),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "dropout": (0.0,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "resnet_out_scale_factor": (1.0,),
    "addition_embed_type_num_heads": (64,),  # of an embedding that must be switched off
    "upcast_attention": (True, False, None),  # attention runs in the weights' precision, float32 by default
}
BLOCK_TYPES = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Sizes of the U-Net, with diffusers' field names; the defaults are Stable Diffusion 1.5's."""

    sample_size: int = 64  # latent positions a side that it was trained at
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    layers_per_block: int = 2
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8  # the number of heads: diffusers' name is a known misnomer
    cross_attention_dim: int = 768
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    use_linear_projection: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0

    def per_level(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
        """A setting that may be one value for all levels, as one value a level."""
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)


def timestep_embedding(t: Tensor, channels: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0) -> Tensor:
    """Sinusoids of the timesteps t (B,) -> (B, channels) (Vaswani et al. 2017, section 3.5; Ho et al. 2020)."""
    half = channels // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / (half - freq_shift)
    angles = t.float()[:, None] * torch.exp(-math.log(10000.0) * exponent)[None]
    pair = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return torch.cat(pair, dim=-1)


class TimestepMLP(nn.Module):
    """Timestep sinusoids (B, in) -> time embedding (B, out)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, out_channels)
        self.linear_2 = nn.Linear(out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in) -> (B, out)."""
        return self.linear_2(F.silu(self.linear_1(x)))


def _resnet(config: UNetConfig, in_channels: int, out_channels: int) -> ResnetBlock:
    temb_channels = 4 * config.block_out_channels[0]
    groups, eps = config.norm_num_groups, config.norm_eps
    return ResnetBlock(in_channels, out_channels, groups=groups, eps=eps, temb_channels=temb_channels)


def _transformer(config: UNetConfig, level: int) -> SpatialTransformer:
    channels = config.block_out_channels[level]
    return SpatialTransformer(
        channels,
        config.per_level(config.attention_head_dim)[level],
        config.cross_attention_dim,
        depth=config.per_level(config.transformer_layers_per_block)[level],
        groups=config.norm_num_groups,
        linear=config.use_linear_projection,
    )


class DownLevel(nn.Module):
    """Residual blocks, each followed by a transformer where the level attends, then a step down but at the last
    level. Appends every output to `skips`."""

    def __init__(self, config: UNetConfig, level: int):
        super().__init__()
        width, last = config.block_out_channels[level], level == len(config.block_out_channels) - 1
        widths = [config.block_out_channels[max(level - 1, 0)]] + [width] * config.layers_per_block
        self.resnets = nn.ModuleList(_resnet(config, a, b) for a, b in pairwise(widths))
        if config.down_block_types[level] == "CrossAttnDownBlock2D":
            self.attentions = nn.ModuleList(_transformer(config, level) for _ in self.resnets)
        self.downsamplers = None if last else nn.ModuleList([Downsample(width)])

    def forward(self, h: Tensor, temb: Tensor, contexts: Iterator, skips: list[Tensor]) -> Tensor:
        """h (B, below, H, W), temb (B, T) -> (B, width, H/2, W/2), at the last level (B, width, H, W)."""
        for i, resnet in enumerate(self.resnets):
            h = resnet(h, temb)
            if hasattr(self, "attentions"):
                h = self.attentions[i](h, contexts)
            skips.append(h)
        if self.downsamplers is not None:
            h = self.downsamplers[0](h)
            skips.append(h)
        return h


class MidBlock(nn.Module):
    """Residual block, transformer, residual block at the lowest resolution."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        width = config.block_out_channels[-1]
        self.resnets = nn.ModuleList(_resnet(config, width, width) for _ in range(2))
        self.attentions = nn.ModuleList([_transformer(config, len(config.block_out_channels) - 1)])

    def forward(self, h: Tensor, temb: Tensor, contexts: Iterator) -> Tensor:
        """h (B, width, H, W), temb (B, T) -> (B, width, H, W)."""
        h = self.attentions[0](self.resnets[0](h, temb), contexts)
        return self.resnets[1](h, temb)


class UpLevel(nn.Module):
    """Mirror of DownLevel with one residual block more: each takes one of `skips` beside its input."""

    def __init__(self, config: UNetConfig, index: int):
        super().__init__()
        level = len(config.block_out_channels) - 1 - index
        width, below = config.block_out_channels[level], config.block_out_channels[max(level - 1, 0)]
        above = config.block_out_channels[min(level + 1, len(config.block_out_channels) - 1)]
        skips = [width] * config.layers_per_block + [below]
        inputs = [above] + [width] * config.layers_per_block
        self.resnets = nn.ModuleList(_resnet(config, a + b, width) for a, b in zip(inputs, skips, strict=True))
        if config.up_block_types[index] == "CrossAttnUpBlock2D":
            self.attentions = nn.ModuleList(_transformer(config, level) for _ in self.resnets)
        self.upsamplers = None if level == 0 else nn.ModuleList([Upsample(width)])

    def forward(self, h: Tensor, temb: Tensor, contexts: Iterator, skips: list[Tensor]) -> Tensor:
        """h (B, above, H, W), temb (B, T) -> (B, width, 2H, 2W), at the first level (B, width, H, W)."""
        for i, resnet in enumerate(self.resnets):
            h = resnet(torch.cat([h, widen(skips.pop(), len(h))], dim=1), temb)
            if hasattr(self, "attentions"):
                h = self.attentions[i](h, contexts)
        return h if self.upsamplers is None else self.upsamplers[0](h)


class UNet(nn.Module):
    """z_t (B, C, h, w), t (B,) or a scalar, context (B, L, D) -> prediction (B, C, h, w)."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        _check(config)
        self.config = config
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepMLP(widths[0], 4 * widths[0])
        self.down_blocks = nn.ModuleList(DownLevel(config, i) for i in range(len(widths)))
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(UpLevel(config, i) for i in range(len(widths)))
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def prepare(self, context: Tensor) -> tuple[Prepared, ...]:
        """What every cross-attention needs of a context (B, L, D), in the order of `forward`: computed once a picture
        and given to `forward` in place of the context."""
        crosses = [m for name, m in self.named_modules() if name.endswith("attn2") and isinstance(m, Attention)]
        return tuple(attention.prepare(context) for attention in crosses)

    def forward(self, z_t: Tensor, t: Tensor, context: Tensor | tuple[Prepared, ...]) -> Tensor:
        """z_t (B, C, h, w), t (B,) or a scalar, a context (R, L, D) or what `prepare` made of it -> (R, C, h, w).

        R is B; with a scalar t it may be a multiple, for several contexts of the same latents [z_t, z_t, ...], and
        what does not depend on the context is done once. UserError where h or w is no multiple of 2^(levels - 1).
        """
        smallest = 2 ** (len(self.config.block_out_channels) - 1)
        if z_t.shape[-2] % smallest or z_t.shape[-1] % smallest:
            raise UserError(f"latent size {tuple(z_t.shape[-2:])} must be a multiple of {smallest} both ways")
        contexts, skips = repeat(context) if isinstance(context, Tensor) else iter(context), []
        temb = timestep_embedding(
            t.reshape(-1),
            self.config.block_out_channels[0],
            flip_sin_to_cos=self.config.flip_sin_to_cos,
            freq_shift=self.config.freq_shift,
        )
        temb = self.time_embedding(temb.to(z_t.dtype))
        h = self.conv_in(z_t)
        skips.append(h)
        for level in self.down_blocks:
            h = level(h, temb, contexts, skips)  # (B, width, h / 2^level, w / 2^level)
        h = self.mid_block(h, temb, contexts)
        for level in self.up_blocks:
            h = level(h, temb, contexts, skips)
        return self.conv_out(F.silu(self.conv_norm_out(h)))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and safetensors that diffusers' UNet2DConditionModel opens."""
        weights.save_model(folder, self, weights.to_json(self.config, "UNet2DConditionModel"), weights.DIFFUSERS_FILE)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "UNet":
        """The U-Net in a folder: its own, a `unet` folder inside a run or a Stable Diffusion folder (UserError)."""
        folder = weights.find_part(folder, "unet")
        config = weights.read_config(folder, UNetConfig, "UNet2DConditionModel", SUPPORTED)
        return weights.load_model(lambda: cls(config), folder, weights.read_tensors(folder), config)


def _check(config: UNetConfig) -> None:
    levels = len(config.block_out_channels)
    for name in (*BLOCK_TYPES, "attention_head_dim", "transformer_layers_per_block"):
        entries = len(config.per_level(getattr(config, name)))
        if entries != levels:
            raise UserError(f"U-Net {name} has {entries} entries for the {levels} levels of block_out_channels")
    for name, kinds in BLOCK_TYPES.items():
        for kind in getattr(config, name):
            if kind not in kinds:
                raise UserError(f"U-Net {name}: {kind!r} is not supported; known: {', '.join(kinds)}")
    if config.block_out_channels[0] % 2:
        raise UserError(f"U-Net width {config.block_out_channels[0]} must be even: the timestep's sines and cosines")
    for width, heads in zip(config.block_out_channels, config.per_level(config.attention_head_dim), strict=True):
        if width % heads or width % config.norm_num_groups:
            raise UserError(
                f"U-Net width {width} must be a multiple of its {heads} heads (attention_head_dim) and of "
                f"norm_num_groups {config.norm_num_groups}"
            )
