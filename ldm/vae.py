"""The autoencoder: diffusers' AutoencoderKL architecture under its parameter names (Rombach et al. 2022, appendix G).

It alone knows the latent shift and scale: `encode` returns raw moments, `normalize` and `decode` convert.
"""

import copy
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm import model_io
from ldm.config import UserError, require_positive
from ldm.layers import Attention, ResnetBlock, downsample, upsample
from ldm.single_file import open_part

# Keys of diffusers' config that are no fields of VAEConfig, and the values that are supported.
SUPPORTED: dict[str, tuple] = {
    "act_fn": ("silu",),
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
    "force_upcast": (True, False),  # never in float16
}
# Names of the attention's layers before diffusers 0.17, which Stable Diffusion's files have.
RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
EPS = 1e-6  # of the group norms


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Sizes of the autoencoder, with diffusers' field names."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)  # widths; each level but the last halves the size
    layers_per_block: int = 2  # residual blocks per level
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 512  # pixels per side in training
    scaling_factor: float = 0.18215  # normalized latent = (raw latent - shift_factor) * scaling_factor
    shift_factor: float | None = None
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        require_positive(self)
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise UserError(f"VAE width {width} must be a multiple of norm_num_groups {self.norm_num_groups}")


class DiagonalGaussian:
    """q(z|x) of raw latents: mean, logvar and std (B, C, h, w), from moments (B, 2C, h, w)."""

    def __init__(self, moments: Tensor):
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + std * eps (B, C, h, w), eps drawn on the generator's device, without one on the mean's."""
        device = self.mean.device if generator is None else generator.device
        eps = torch.randn(self.mean.shape, generator=generator, device=device)
        return self.mean + self.std * eps.to(self.mean)


class MidBlock(nn.Module):
    """Two residual blocks with self-attention between them, at the lowest resolution."""

    def __init__(self, channels: int, config: VAEConfig):
        super().__init__()
        groups, count = config.norm_num_groups, int(config.mid_block_add_attention)
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups=groups, eps=EPS) for _ in range(2))
        self.attentions = nn.ModuleList(Attention(channels, 1, bias=True, groups=groups) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = self.resnets[0](x)
        for attention in self.attentions:
            h = attention(rearrange(attention.group_norm(x), "b c h w -> b (h w) c"))
            x = x + rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])
        return self.resnets[1](x)


def _levels(
    widths: tuple[int, ...], blocks: int, groups: int, name: str, step: Callable[[int], nn.Module]
) -> nn.Sequential:
    """Residual blocks at each width's resolution; after all but the last, under `name`, a `step` to the next one."""
    levels = []
    for i, width in enumerate(widths):
        inputs = [widths[max(i - 1, 0)]] + [width] * (blocks - 1)
        resnets = [ResnetBlock(channels, width, groups=groups, eps=EPS) for channels in inputs]
        level = OrderedDict(resnets=nn.Sequential(*resnets))
        if i + 1 < len(widths):
            level[name] = nn.Sequential(step(width))
        levels.append(nn.Sequential(level))
    return nn.Sequential(*levels)


def _encoder(config: VAEConfig) -> nn.Sequential:
    """x (B, 3, H, W) -> hidden moments (B, 2C, H/f, W/f)."""
    widths, groups = config.block_out_channels, config.norm_num_groups
    down = partial(downsample, asymmetric=True)
    layers = OrderedDict(
        conv_in=nn.Conv2d(config.in_channels, widths[0], 3, padding=1),
        down_blocks=_levels(widths, config.layers_per_block, groups, "downsamplers", down),
        mid_block=MidBlock(widths[-1], config),
        conv_norm_out=nn.GroupNorm(groups, widths[-1], EPS),
        conv_act=nn.SiLU(),
        conv_out=nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1),
    )
    return nn.Sequential(layers)


def _decoder(config: VAEConfig) -> nn.Sequential:
    """z (B, C, h, w) -> x (B, 3, h*f, w*f)."""
    widths, groups = config.block_out_channels[::-1], config.norm_num_groups
    layers = OrderedDict(
        conv_in=nn.Conv2d(config.latent_channels, widths[0], 3, padding=1),
        mid_block=MidBlock(widths[0], config),
        up_blocks=_levels(widths, config.layers_per_block + 1, groups, "upsamplers", upsample),
        conv_norm_out=nn.GroupNorm(groups, widths[-1], EPS),
        conv_act=nn.SiLU(),
        conv_out=nn.Conv2d(widths[-1], config.out_channels, 3, padding=1),
    )
    return nn.Sequential(layers)


class VAE(nn.Module):
    """Images x (B, 3, H, W) in [-1, 1] <-> latents z (B, C, H/f, W/f)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config, self.perceptual_net = config, ""  # names of the networks whose distance trained it
        self.encoder, self.decoder = _encoder(config), _decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    @property
    def factor(self) -> int:
        """f, the pixels per latent position and side."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """x (B, 3, H, W) in [-1, 1] -> the Gaussian of raw latents (B, C, H/f, W/f).

        Raises UserError unless H and W are multiples of f.
        """
        if x.shape[-2] % self.factor or x.shape[-1] % self.factor:
            raise UserError(f"image size {tuple(x.shape[-2:])} must be a multiple of {self.factor} px both ways")
        return DiagonalGaussian(self.quant_conv(self.encoder(x.to(self.quant_conv.weight.dtype))))

    def normalize(self, z: Tensor) -> Tensor:
        """Raw latents -> the latents that diffusion works on, near zero mean and unit variance."""
        return (z - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def decode(self, z: Tensor) -> Tensor:
        """Normalized latents (B, C, h, w) -> x (B, 3, h*f, w*f), near [-1, 1] and not clamped."""
        return self.decode_raw(z / self.config.scaling_factor + (self.config.shift_factor or 0.0))

    def decode_raw(self, z: Tensor) -> Tensor:
        """Raw latents (B, C, h, w) -> x (B, 3, h*f, w*f)."""
        return self.decoder(self.post_quant_conv(z.to(self.post_quant_conv.weight.dtype)))

    def forward(self, x: Tensor, eps: Tensor) -> tuple[Tensor, DiagonalGaussian]:
        """x (B, 3, H, W), noise eps (B, C, H/f, W/f) -> the reconstruction through mean + std * eps, the posterior."""
        posterior = self.encode(x)
        return self.decode_raw(posterior.mean + posterior.std * eps), posterior

    @torch.no_grad()
    def with_statistics(self, mean: Tensor, std: Tensor) -> "VAE":
        """A copy whose raw latents are normalized: z' = (z - mean) / std, per channel (C,).

        diffusers' config has one scale for all channels, so shift and scale are folded into the 1x1 convolutions on
        both sides of the latent (exact but for the clamp of the log variance); the copy's scaling factor is 1.
        """
        vae = copy.deepcopy(self)
        vae.config = replace(self.config, scaling_factor=1.0, shift_factor=None)
        quant, post, channels = vae.quant_conv, vae.post_quant_conv, self.config.latent_channels
        # decode: W (z' std + mean) + b; the bias needs the weight from before it is scaled
        post.bias += torch.einsum("oi,i->o", post.weight[:, :, 0, 0], mean)
        post.weight *= std[None, :, None, None]
        # encode: the first C outputs are the mean, the others the log variance
        quant.bias[:channels] = (quant.bias[:channels] - mean) / std
        quant.weight[:channels] /= std[:, None, None, None]
        quant.bias[channels:] -= 2.0 * std.log()
        return vae

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and safetensors that diffusers' AutoencoderKL opens."""
        levels = len(self.config.block_out_channels)
        config = {"_class_name": "AutoencoderKL"} | asdict(self.config)
        config |= {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
        if self.perceptual_net:
            config["_perceptual_net"] = self.perceptual_net  # diffusers ignores names with an underscore
        model_io.save_model(folder, self, config, model_io.DIFFUSERS_FILE)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **placement: Any) -> "VAE":
        """The VAE in a folder, in `vae/` within it, of a shipped model, or in a single file, on a `device` in a
        `dtype`. Raises UserError where there is none."""
        folder, table, tensors = open_part(folder, "vae")
        config = model_io.read_config(folder, table, VAEConfig, "AutoencoderKL", SUPPORTED)
        old = "|".join(RENAMED)
        tensors = {re.sub(old, lambda match: RENAMED[match[0]], name): tensor for name, tensor in tensors.items()}
        vae = model_io.load_model(lambda: cls(config), folder, tensors, config, **placement)
        vae.perceptual_net = str(table.get("_perceptual_net", ""))
        return vae
