"""The noise predictor: diffusers' UNet2DConditionModel with the block types of Stable Diffusion 1.x and 2.x, under its
parameter names (Rombach et al. 2022; Ho et al. 2020)."""

import math
from dataclasses import asdict, dataclass
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm import model_io
from ldm.config import UserError, require_positive
from ldm.layers import Downsample, ResnetBlock, SpatialTransformer, Upsample

# Keys of diffusers' config that are no fields of UNetConfig, and the values that are supported.
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
    "addition_embed_type_num_heads": (64,),  # of an embedding that is switched off
    "upcast_attention": (True, False, None),  # attention runs in the weights' precision, float32 by default
}
DownBlock, UpBlock = Literal["DownBlock2D", "CrossAttnDownBlock2D"], Literal["UpBlock2D", "CrossAttnUpBlock2D"]


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Sizes of the U-Net, with diffusers' field names; the defaults are Stable Diffusion 1.5's."""

    sample_size: int = 64  # latent positions per side in training
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)  # widths of the levels
    down_block_types: tuple[DownBlock, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[UpBlock, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    layers_per_block: int = 2  # residual blocks per level
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8  # the number of heads: diffusers' name is a known misnomer
    cross_attention_dim: int = 768
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    use_linear_projection: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0

    def __post_init__(self) -> None:
        sizes = "sample_size", "in_channels", "out_channels", "layers_per_block", "cross_attention_dim"
        per_level = "attention_head_dim", "transformer_layers_per_block"
        require_positive(self, "block_out_channels", "norm_num_groups", *sizes, *per_level)
        levels = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types", *per_level):
            entries = len(self.per_level(name))
            if entries != levels:
                raise UserError(f"U-Net {name} has {entries} entries for the {levels} levels of block_out_channels")
        for width, heads in zip(self.block_out_channels, self.per_level("attention_head_dim"), strict=True):
            if width % heads or width % self.norm_num_groups:
                divisors = f"its {heads} heads (attention_head_dim) and of norm_num_groups {self.norm_num_groups}"
                raise UserError(f"U-Net width {width} must be a multiple of {divisors}")
        if self.block_out_channels[0] % 2:
            raise UserError(f"U-Net width {self.block_out_channels[0]} must be even: the timestep's sines and cosines")

    def per_level(self, name: str) -> tuple:
        """The field `name`, one value per level, where it may be one value for all."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)


def timestep_embedding(t: Tensor, channels: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0) -> Tensor:
    """Sinusoids of the timesteps t (B,) -> (B, channels) (Vaswani et al. 2017, section 3.5; Ho et al. 2020)."""
    half = channels // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / (half - freq_shift)
    angles = t.float()[:, None] * torch.exp(-math.log(10000.0) * exponent)[None]
    pair = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return torch.cat(pair, dim=-1)


class TimestepMLP(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, out_channels)
        self.linear_2 = nn.Linear(out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Timestep sinusoids (B, in) -> time embedding (B, out)."""
        return self.linear_2(F.silu(self.linear_1(x)))


def _resnet(config: UNetConfig, in_channels: int, out_channels: int) -> ResnetBlock:
    groups, eps, temb_channels = config.norm_num_groups, config.norm_eps, 4 * config.block_out_channels[0]
    return ResnetBlock(in_channels, out_channels, groups=groups, eps=eps, temb_channels=temb_channels)


def _transformer(config: UNetConfig, level: int) -> SpatialTransformer:
    return SpatialTransformer(
        config.block_out_channels[level],
        config.per_level("attention_head_dim")[level],
        config.cross_attention_dim,
        depth=config.per_level("transformer_layers_per_block")[level],
        groups=config.norm_num_groups,
        linear=config.use_linear_projection,
    )


class DownLevel(nn.Module):
    """Residual blocks, each followed by a transformer where the level has cross-attention, then a step down except at
    the last level."""

    def __init__(self, config: UNetConfig, level: int):
        super().__init__()
        width, last = config.block_out_channels[level], level == len(config.block_out_channels) - 1
        widths = [config.block_out_channels[max(level - 1, 0)]] + [width] * config.layers_per_block
        count = config.layers_per_block if config.down_block_types[level].startswith("CrossAttn") else 0
        self.resnets = nn.ModuleList(_resnet(config, a, b) for a, b in pairwise(widths))
        self.attentions = nn.ModuleList(_transformer(config, level) for _ in range(count))
        self.downsamplers = nn.ModuleList([] if last else [Downsample(width)])

    def forward(self, h: Tensor, temb: Tensor, context: Tensor) -> tuple[Tensor, list[Tensor]]:
        """h (B, above, H, W), temb (B, T), context (B, L, D) -> (B, width, H/2, W/2), at the last level (B, width, H,
        W); and the output of each block and step, for the skip connections."""
        outputs = []
        for resnet, attention in zip_longest(self.resnets, self.attentions):
            h = resnet(h, temb)
            h = h if attention is None else attention(h, context)
            outputs.append(h)
        for downsample in self.downsamplers:
            h = downsample(h)
            outputs.append(h)
        return h, outputs


class MidBlock(nn.Module):
    """Residual block, transformer, residual block at the lowest resolution."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        width = config.block_out_channels[-1]
        self.resnets = nn.ModuleList(_resnet(config, width, width) for _ in range(2))
        self.attentions = nn.ModuleList([_transformer(config, len(config.block_out_channels) - 1)])

    def forward(self, h: Tensor, temb: Tensor, context: Tensor) -> Tensor:
        """h (B, width, H, W), temb (B, T), context (B, L, D) -> (B, width, H, W)."""
        h = self.attentions[0](self.resnets[0](h, temb), context)
        return self.resnets[1](h, temb)


class UpLevel(nn.Module):
    """Mirror of DownLevel with one residual block more; each takes a skip connection beside its input."""

    def __init__(self, config: UNetConfig, index: int):
        super().__init__()
        widths, level = config.block_out_channels, len(config.block_out_channels) - 1 - index
        width, below, above = widths[level], widths[min(level + 1, len(widths) - 1)], widths[max(level - 1, 0)]
        inputs = [below] + [width] * config.layers_per_block
        skips = [width] * config.layers_per_block + [above]
        count = len(inputs) if config.up_block_types[index].startswith("CrossAttn") else 0
        self.resnets = nn.ModuleList(_resnet(config, a + b, width) for a, b in zip(inputs, skips, strict=True))
        self.attentions = nn.ModuleList(_transformer(config, level) for _ in range(count))
        self.upsamplers = nn.ModuleList([] if level == 0 else [Upsample(width)])

    def forward(self, h: Tensor, temb: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        """h (B, below, H, W), temb (B, T), context (B, L, D), skips in the order of DownLevel's outputs, the last taken
        first -> (B, width, 2H, 2W), at the first level (B, width, H, W)."""
        for resnet, attention, skip in zip_longest(self.resnets, self.attentions, reversed(skips)):
            h = resnet(torch.cat([h, skip], dim=1), temb)
            h = h if attention is None else attention(h, context)
        for upsample in self.upsamplers:
            h = upsample(h)
        return h


class UNet(nn.Module):
    """z_t (B, C, h, w), t (B,) or a scalar, context (B, L, D) -> prediction (B, C, h, w)."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepMLP(widths[0], 4 * widths[0])
        self.down_blocks = nn.ModuleList(DownLevel(config, i) for i in range(len(widths)))
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(UpLevel(config, i) for i in range(len(widths)))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, z_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """z_t (B, C, h, w), t (B,) or a scalar, context (B, L, D) -> prediction (B, C, h, w).

        Raises UserError unless h and w are multiples of 2^(levels - 1).
        """
        config, smallest = self.config, 2 ** (len(self.down_blocks) - 1)
        if z_t.shape[-2] % smallest or z_t.shape[-1] % smallest:
            raise UserError(f"latent size {tuple(z_t.shape[-2:])} must be a multiple of {smallest} both ways")
        sinusoids = timestep_embedding(
            t.reshape(-1),
            config.block_out_channels[0],
            flip_sin_to_cos=config.flip_sin_to_cos,
            freq_shift=config.freq_shift,
        )
        temb = self.time_embedding(sinusoids.to(z_t.dtype))  # (B, T), or (1, T) for a scalar t
        h = self.conv_in(z_t)
        skips = [h]
        for level in self.down_blocks:
            h, outputs = level(h, temb, context)
            skips += outputs
        h = self.mid_block(h, temb, context)
        for level in self.up_blocks:
            count = len(level.resnets)
            h, skips = level(h, temb, context, skips[-count:]), skips[:-count]
        return self.conv_out(F.silu(self.conv_norm_out(h)))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and safetensors that diffusers' UNet2DConditionModel opens."""
        config = {"_class_name": "UNet2DConditionModel"} | asdict(self.config)
        model_io.save_model(folder, self, config, model_io.DIFFUSERS_FILE)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "UNet":
        """The U-Net in a folder, in `unet/` within it, or of a shipped model. Raises UserError where there is none."""
        folder = model_io.find_part(folder, "unet")
        config = model_io.read_config(folder, UNetConfig, "UNet2DConditionModel", SUPPORTED)
        return model_io.load_model(lambda: cls(config), folder, model_io.read_tensors(folder), config)
