"""The autoencoder: diffusers' AutoencoderKL architecture under its parameter names (Rombach et al. 2022, appendix G).

It alone knows the latent shift and scale: `encode` returns raw moments, `normalize` and `decode` convert.
"""

import copy
import re
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm import model_io
from ldm.config import UserError, require_positive
from ldm.layers import Attention, Downsample, ResnetBlock, Upsample

# Keys of diffusers' config that are no fields of VAEConfig, and the values that are supported.
SUPPORTED: dict[str, tuple] = {
    "act_fn": ("silu",),
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
    "force_upcast": (True, False),  # decoding is always in float32
}
# Names of the attention's layers before diffusers 0.17.
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
        sizes = "in_channels", "out_channels", "layers_per_block", "latent_channels", "norm_num_groups"
        require_positive(self, "block_out_channels", "sample_size", *sizes)
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


class Level(nn.Module):
    """Residual blocks at one resolution, then a step "down" or "up", or none."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, groups: int, step: str):
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.resnets = nn.ModuleList(ResnetBlock(a, b, groups=groups, eps=EPS) for a, b in pairwise(widths))
        self.downsamplers = nn.ModuleList([Downsample(out_channels, asymmetric=True)] if step == "down" else [])
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if step == "up" else [])

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H', W'), where H' is H / 2, 2 H or H."""
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


def _levels(widths: tuple[int, ...], blocks: int, groups: int, step: str) -> nn.ModuleList:
    """A level per width; all but the last end with `step`."""
    inputs, steps = (widths[0], *widths[:-1]), [step] * (len(widths) - 1) + [""]
    levels = zip(inputs, widths, steps, strict=True)
    return nn.ModuleList(Level(a, b, blocks, groups, step) for a, b, step in levels)


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = _levels(widths, config.layers_per_block, groups, "down")
        self.mid_block = MidBlock(widths[-1], config)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) -> hidden moments (B, 2C, H/f, W/f)."""
        h = self.conv_in(x)
        for level in self.down_blocks:
            h = level(h)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(h))))


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], config)
        self.up_blocks = _levels(widths, config.layers_per_block + 1, groups, "up")
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """z (B, C, h, w) -> x (B, 3, h*f, w*f)."""
        h = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            h = level(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class VAE(nn.Module):
    """Images x (B, 3, H, W) in [-1, 1] <-> latents z (B, C, H/f, W/f)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
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
        return DiagonalGaussian(self.quant_conv(self.encoder(x)))

    def normalize(self, z: Tensor) -> Tensor:
        """Raw latents -> the latents that diffusion works on, near zero mean and unit variance."""
        return (z - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def decode(self, z: Tensor) -> Tensor:
        """Normalized latents (B, C, h, w) -> x (B, 3, h*f, w*f), near [-1, 1] and not clamped."""
        return self.decode_raw(z / self.config.scaling_factor + (self.config.shift_factor or 0.0))

    def decode_raw(self, z: Tensor) -> Tensor:
        """Raw latents (B, C, h, w) -> x (B, 3, h*f, w*f)."""
        return self.decoder(self.post_quant_conv(z))

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
        model_io.save_model(folder, self, config, model_io.DIFFUSERS_FILE)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "VAE":
        """The VAE in a folder, in `vae/` within it, or of a shipped model. Raises UserError where there is none."""
        folder = model_io.find_part(folder, "vae")
        config = model_io.read_config(folder, VAEConfig, "AutoencoderKL", SUPPORTED)
        tensors = {_renamed(name): tensor for name, tensor in model_io.read_tensors(folder).items()}
        return model_io.load_model(lambda: cls(config), folder, tensors, config)


def _renamed(name: str) -> str:
    return re.sub(r"(?<=attentions\.0\.)(\w+)(?=\.)", lambda match: RENAMED.get(match[0], match[0]), name)
