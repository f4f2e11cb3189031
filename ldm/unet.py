"""The noise predictor: diffusers' UNet2DConditionModel with the block types of Stable Diffusion 1.x and 2.x, under its
parameter names (Rombach et al. 2022; Ho et al. 2020)."""

import math
from collections import OrderedDict
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm import model_io
from ldm.config import UserError, require_positive
from ldm.layers import ResnetBlock, SpatialTransformer, downsample, upsample
from ldm.single_file import open_part

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
PER_LEVEL = ("attention_head_dim", "transformer_layers_per_block")
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
        require_positive(self, "freq_shift")
        widths, levels = self.block_out_channels, len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types", *PER_LEVEL):
            entries = len(self.per_level(name))
            if entries != levels:
                raise UserError(f"U-Net {name} has {entries} entries for the {levels} levels of block_out_channels")
        for width, heads in zip(widths, self.per_level("attention_head_dim"), strict=True):
            if width % heads or width % self.norm_num_groups:
                divisors = f"its {heads} heads (attention_head_dim) and of norm_num_groups {self.norm_num_groups}"
                raise UserError(f"U-Net width {width} must be a multiple of {divisors}")
        if widths[0] % 2:
            raise UserError(f"U-Net width {widths[0]} must be even: the timestep's sines and cosines")

    def per_level(self, name: str) -> tuple:
        """The field `name`, one value per level, where it may be one value for all."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)


def timestep_embedding(t: Tensor, channels: int, *, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """Sinusoids of the timesteps t (B,) -> (B, channels) (Vaswani et al. 2017, section 3.5; Ho et al. 2020)."""
    half = channels // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / (half - freq_shift)
    angles = t.float()[:, None] * torch.exp(-math.log(10000.0) * exponent)[None]
    pair = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return torch.cat(pair, dim=-1)


class Level(nn.Module):
    """Residual blocks of the given input widths at one resolution, the first `attentions` of them followed by a
    transformer; then a step "down" or "up", or none."""

    def __init__(self, config: UNetConfig, level: int, inputs: list[int], attentions: int, step: str = ""):
        super().__init__()
        width, groups = config.block_out_channels[level], config.norm_num_groups
        resnet = {"groups": groups, "eps": config.norm_eps, "temb_channels": 4 * config.block_out_channels[0]}
        heads, depth = (config.per_level(name)[level] for name in PER_LEVEL)
        transformer = {"depth": depth, "groups": groups, "linear": config.use_linear_projection}
        self.resnets = nn.ModuleList(ResnetBlock(channels, width, **resnet) for channels in inputs)
        self.attentions = nn.ModuleList(
            SpatialTransformer(width, heads, config.cross_attention_dim, **transformer) for _ in range(attentions)
        )
        self.downsamplers = nn.ModuleList([downsample(width)] if step == "down" else [])
        self.upsamplers = nn.ModuleList([upsample(width)] if step == "up" else [])

    def forward(self, h: Tensor, temb: Tensor, context: Tensor, skips: list[Tensor] | tuple = ()) -> list[Tensor]:
        """h (B, C, H, W), temb (B, T), context (B, L, D) -> the output of each block and step, (B, width, H', W').

        Each block also takes a skip connection (B, C', H, W), the last of `skips` first, where there are any.
        """
        outputs = []
        for resnet, attention, skip in zip_longest(self.resnets, self.attentions, reversed(skips)):
            h = resnet(h if skip is None else torch.cat([h, skip], dim=1), temb)
            h = h if attention is None else attention(h, context)
            outputs.append(h)
        for step in (*self.downsamplers, *self.upsamplers):
            outputs.append(step(h))
        return outputs


class UNet(nn.Module):
    """z_t (B, C, h, w), t (B,) or a scalar, context (B, L, D) -> prediction (B, C, h, w)."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config, self.distilled_steps = config, 0  # in which it samples without guidance; 0: not distilled
        widths, layers, last = config.block_out_channels, config.layers_per_block, len(config.block_out_channels) - 1
        temb = 4 * widths[0]
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        time = OrderedDict(linear_1=nn.Linear(widths[0], temb), act=nn.SiLU(), linear_2=nn.Linear(temb, temb))
        self.time_embedding = nn.Sequential(time)
        self.down_blocks = nn.ModuleList()
        for i, kind in enumerate(config.down_block_types):
            inputs = [widths[max(i - 1, 0)]] + [widths[i]] * (layers - 1)
            attentions = layers if kind.startswith("CrossAttn") else 0
            self.down_blocks.append(Level(config, i, inputs, attentions, "down" if i < last else ""))
        self.mid_block = Level(config, last, [widths[-1]] * 2, 1)
        self.up_blocks = nn.ModuleList()
        for i, kind in zip(range(last, -1, -1), config.up_block_types, strict=True):
            below, above = widths[min(i + 1, last)], widths[max(i - 1, 0)]
            inputs = [below + widths[i]] + [2 * widths[i]] * (layers - 1) + [widths[i] + above]
            attentions = layers + 1 if kind.startswith("CrossAttn") else 0
            self.up_blocks.append(Level(config, i, inputs, attentions, "up" if i else ""))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, z_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """z_t (B, C, h, w), t (B,) or a scalar, context (B, L, D) -> prediction (B, C, h, w).

        Raises UserError unless h and w are multiples of 2^(levels - 1).
        """
        config, smallest = self.config, 2 ** (len(self.down_blocks) - 1)
        if z_t.shape[-2] % smallest or z_t.shape[-1] % smallest:
            raise UserError(f"latent size {tuple(z_t.shape[-2:])} must be a multiple of {smallest} both ways")
        options = {"flip_sin_to_cos": config.flip_sin_to_cos, "freq_shift": config.freq_shift}
        sinusoids = timestep_embedding(t.reshape(-1), config.block_out_channels[0], **options)
        temb = self.time_embedding(sinusoids.to(z_t.dtype))  # (B, T), or (1, T) for a scalar t
        skips = [self.conv_in(z_t)]
        for level in self.down_blocks:
            skips += level(skips[-1], temb, context)
        h = self.mid_block(skips[-1], temb, context)[-1]
        for level in self.up_blocks:
            count = len(level.resnets)
            h, skips = level(h, temb, context, skips[-count:])[-1], skips[:-count]
        return self.conv_out(F.silu(self.conv_norm_out(h)))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and safetensors that diffusers' UNet2DConditionModel opens."""
        config = {"_class_name": "UNet2DConditionModel"} | asdict(self.config)
        if self.distilled_steps:
            config["_distilled_steps"] = self.distilled_steps  # diffusers ignores names with an underscore
        model_io.save_model(folder, self, config, model_io.DIFFUSERS_FILE)

    @classmethod
    def from_pretrained(cls, folder: str | Path, ema: bool = False, **placement: Any) -> "UNet":
        """The U-Net in a folder, in `unet/` within it, of a shipped model or in a single file, of which `ema` takes the
        averaged one, on a `device` in a `dtype`. Raises UserError where there is none."""
        folder, table, tensors = open_part(folder, "unet", ema)
        config = model_io.read_config(folder, table, UNetConfig, "UNet2DConditionModel", SUPPORTED)
        unet = model_io.load_model(lambda: cls(config), folder, tensors, config, **placement)
        unet.distilled_steps = int(table.get("_distilled_steps", 0))
        return unet
