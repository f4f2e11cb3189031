"""The autoencoder: diffusers' AutoencoderKL architecture under its parameter names (Rombach et al. 2022).

It alone knows the latent shift and scale: `encode` gives raw moments, `normalize` and `decode` convert.
"""

import copy
import re
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm import model_io as weights
from ldm.config import UserError
from ldm.layers import Attention, Downsample, GroupNorm, ResnetBlock, Upsample

# Keys of diffusers' config that change nothing here, and the values that this code supports.
SUPPORTED: dict[str, tuple] = {
    "act_fn": ("silu",),
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
    "force_upcast": (True, False),  # decoding is always done in float32
}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Sizes of the autoencoder, with diffusers' field names."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)  # a level each; each but the last halves the size
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 512  # pixels a side that it was trained at
    scaling_factor: float = 0.18215  # normalized latent = (raw latent - shift_factor) * scaling_factor
    shift_factor: float | None = None
    mid_block_add_attention: bool = True


class DiagonalGaussian:
    """q(z|x) of raw latents with mean and standard deviation (B, C, h, w), from moments (B, 2C, h, w)."""

    def __init__(self, moments: Tensor):
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    @property
    def std(self) -> Tensor:
        """Standard deviation (B, C, h, w)."""
        return torch.exp(0.5 * self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + std * eps (B, C, h, w), eps drawn where the generator is, without one where the mean is."""
        device = generator.device if generator is not None else self.mean.device
        eps = torch.randn(self.mean.shape, generator=generator, device=device)
        return self.mean + self.std * eps.to(self.mean)


class MidBlock(nn.Module):
    """Two residual blocks with self-attention between them, at the lowest resolution."""

    def __init__(self, channels: int, config: VAEConfig):
        super().__init__()
        groups, eps = config.norm_num_groups, 1e-6
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups=groups, eps=eps) for _ in range(2))
        attentions = [Attention(channels, heads=1, bias=True, groups=groups)] if config.mid_block_add_attention else []
        self.attentions = nn.ModuleList(attentions)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention.spatial(x)
        return self.resnets[1](x)


class Level(nn.Module):
    """Residual blocks at one resolution, then a step down (`downsamplers`) or up (`upsamplers`), or neither."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, groups: int, step: str = ""):
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.resnets = nn.ModuleList(ResnetBlock(a, b, groups=groups, eps=1e-6) for a, b in pairwise(widths))
        self.step = step
        if step == "down":
            self.downsamplers = nn.ModuleList([Downsample(out_channels, asymmetric=True)])
        elif step == "up":
            self.upsamplers = nn.ModuleList([Upsample(out_channels)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H', W'), a side H' half of H, twice H, or H by `step`."""
        for resnet in self.resnets:
            x = resnet(x)
        if self.step:
            x = (self.downsamplers if self.step == "down" else self.upsamplers)[0](x)
        return x


class Encoder(nn.Module):
    """x (B, 3, H, W) -> hidden moments (B, 2C, H/f, W/f)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        steps = ["down"] * (len(widths) - 1) + [""]
        self.down_blocks = nn.ModuleList(
            Level(a, b, config.layers_per_block, groups, step)
            for a, b, step in zip((widths[0], *widths), widths, steps, strict=False)
        )
        self.mid_block = MidBlock(widths[-1], config)
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) -> (B, 2C, H/f, W/f)."""
        h = self.conv_in(x)
        for level in self.down_blocks:
            h = level(h)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(h))))


class Decoder(nn.Module):
    """z (B, C, h, w) -> x (B, 3, h*f, w*f)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], config)
        steps = ["up"] * (len(widths) - 1) + [""]
        self.up_blocks = nn.ModuleList(
            Level(a, b, config.layers_per_block + 1, groups, step)
            for a, b, step in zip((widths[0], *widths), widths, steps, strict=False)
        )
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """z (B, C, h, w) -> (B, 3, h*f, w*f)."""
        h = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            h = level(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class VAE(nn.Module):
    """Images x (B, 3, H, W) in [-1, 1] <-> latents z (B, C, H/f, W/f)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        for width in config.block_out_channels:
            if width % config.norm_num_groups:
                raise UserError(
                    f"VAE width {width} is no multiple of norm_num_groups {config.norm_num_groups}; change either"
                )
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    @property
    def factor(self) -> int:
        """Pixels a latent position stands for, a side."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """x (B, 3, H, W) in [-1, 1] -> the Gaussian of raw latents (B, C, H/f, W/f). UserError for a size that is
        no multiple of f, of which pixels would be lost."""
        if x.shape[-2] % self.factor or x.shape[-1] % self.factor:
            raise UserError(f"image size {tuple(x.shape[-2:])} must be a multiple of {self.factor} px both ways")
        return DiagonalGaussian(self.quant_conv(self.encoder(x)))

    def normalize(self, z: Tensor) -> Tensor:
        """Raw latents -> the latents that diffusion works on, near zero mean and unit variance."""
        return (z - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def decode(self, z: Tensor) -> Tensor:
        """Normalized latents (B, C, h, w) -> x (B, 3, h*f, w*f), about [-1, 1] and not clamped."""
        return self.decode_raw(z / self.config.scaling_factor + (self.config.shift_factor or 0.0))

    def decode_raw(self, z: Tensor) -> Tensor:
        """Raw latents (B, C, h, w) -> x (B, 3, h*f, w*f)."""
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x: Tensor, eps: Tensor) -> tuple[Tensor, DiagonalGaussian]:
        """The reconstruction from the latent sample mean + std * eps, eps (B, C, h, w), and the posterior."""
        posterior = self.encode(x)
        return self.decode_raw(posterior.mean + posterior.std * eps), posterior

    @torch.no_grad()
    def with_statistics(self, mean: Tensor, std: Tensor) -> "VAE":
        """A copy whose raw latents are already normalized: z' = (z - mean) / std per channel (C,).

        diffusers' config has room for one scale only, so shift and scale are folded exactly into the 1x1
        convolutions at both sides of the latent; the copy's scaling factor is 1 and it has no shift. (Exactly:
        but for the clamp of the log variance at -30 and 20, far from any value in use.)
        """
        vae = copy.deepcopy(self)
        vae.config = replace(self.config, scaling_factor=1.0, shift_factor=None)
        quant, post, channels = vae.quant_conv, vae.post_quant_conv, self.config.latent_channels
        # decode: W (z' std + mean) + b; the bias needs the weight from before it is scaled
        post.bias += torch.einsum("oi,i->o", post.weight[:, :, 0, 0], mean)
        post.weight *= std[None, :, None, None]
        # encode: the first C outputs are the mean, the others log variance
        quant.bias[:channels] = (quant.bias[:channels] - mean) / std
        quant.weight[:channels] /= std[:, None, None, None]
        quant.bias[channels:] -= 2.0 * std.log()
        return vae

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and safetensors that diffusers' AutoencoderKL opens."""
        config = weights.to_json(self.config, "AutoencoderKL") | {
            "down_block_types": ["DownEncoderBlock2D"] * len(self.config.block_out_channels),
            "up_block_types": ["UpDecoderBlock2D"] * len(self.config.block_out_channels),
        }
        weights.save_model(folder, self, config, weights.DIFFUSERS_FILE)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "VAE":
        """The VAE in a folder: its own, a `vae` folder inside a run or a Stable Diffusion folder (UserError)."""
        folder = weights.find_part(folder, "vae")
        config = weights.read_config(folder, VAEConfig, "AutoencoderKL", SUPPORTED)
        tensors = {_renamed(name): tensor for name, tensor in weights.read_tensors(folder).items()}
        return weights.load_model(lambda: cls(config), folder, tensors, config)


def _renamed(name: str) -> str:
    """A parameter's name as it is today: attention had others before diffusers 0.17."""
    return re.sub(r"(?<=attentions\.0\.)(\w+)(?=\.)", lambda layer: OLD_ATTENTION.get(layer[0], layer[0]), name)
