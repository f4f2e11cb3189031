"""Prompt -> tokens -> context -> denoised latent -> picture."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ldm.checkpoint import Parts, load_parts, save_parts
from ldm.config import UserError
from ldm.diffusion import Denoiser, guided
from ldm.images import to_pil
from ldm.layers import KeyValue
from ldm.samplers import SAMPLERS, ImageNoise, OnStep, get_sampler, make_grid

# What every sampler takes, the pipeline gives; what else is in one's signature are its options.
COMMON = frozenset(inspect.signature(SAMPLERS["euler"]).parameters)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a callback sees at each step of each batch."""

    first: int  # index, in the call's prompts, of the batch's first picture
    step: int  # from 0
    steps: int
    t: float
    z_t: Tensor  # (B, C, h, w)
    z0: Tensor  # (B, C, h, w), the current estimate
    decode: Callable[[], list[Image.Image]]  # pictures of z0, made only when called


class Pipeline:
    """The parts of a text-to-image model, and sampling from them."""

    def __init__(self, parts: Parts, device: str | torch.device = "cpu"):
        self.vae, self.text_encoder, self.tokenizer, self.unet, self.schedule = parts
        self.to(device)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> "Pipeline":
        """A shipped model's name, a run folder, or a Stable Diffusion folder in diffusers' layout (UserError)."""
        return cls(load_parts(folder), device)

    def save_pretrained(self, folder: str | Path, half: bool = False) -> None:
        """Writes a folder that diffusers' StableDiffusionPipeline opens; `half` stores float16, for half the size."""
        save_parts(folder, self.parts, half)

    @property
    def parts(self) -> Parts:
        """The five parts, as `save_parts` takes them."""
        return Parts(self.vae, self.text_encoder, self.tokenizer, self.unet, self.schedule)

    def to(self, device: str | torch.device) -> "Pipeline":
        """Moves the models; convolutions run channels-last, which is faster on CPU and GPU alike."""
        self.device = torch.device(device)
        for model in (self.vae, self.text_encoder, self.unet):
            model.eval().to(self.device)
        for model in (self.vae, self.unet):
            model.to(memory_format=torch.channels_last)
        return self

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str]) -> Tensor:
        """B prompts -> context (B, L, D). What is longer than the context is cut off, with a warning."""
        return self.text_encoder(self.tokenizer(prompts).to(self.device))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        *,
        negative_prompt: str | None = None,
        steps: int = 30,
        guidance: float = 5.0,
        sampler: str | None = None,
        seed: int = 0,
        height: int | None = None,
        width: int | None = None,
        callback: Callable[[Progress], None] | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0, math.inf),
        spacing: str | None = None,
        batch_size: int = 16,
        **sampler_options: float,
    ) -> list[Image.Image]:
        """One picture a prompt; image i has the seed `seed + i` and does not depend on the batch it is made in.

        `sampler`, `spacing`, `height` and `width` (pixels) default to the model's own. `guidance` 1 is none and asks
        the model once a step; `guidance_rescale` in [0, 1]; `guidance_interval` are the t, ends included, where
        guidance acts. `sampler_options` go to the sampler, e.g. `eta` of ddim. At most `batch_size` pictures are
        made at once. UserError for what the model or the sampler cannot do.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        shape = self.latent_shape(height, width)
        name = sampler or self.schedule.config.sampler
        sample, grid = get_sampler(name), make_grid(self.schedule, name, steps, spacing)
        _check(guidance, guidance_rescale, seed, batch_size, sample, sampler_options)
        denoiser = Denoiser(self.unet, grid.schedule)
        images: list[Image.Image] = []
        for start in range(0, len(prompts), batch_size):
            chunk = prompts[start : start + batch_size]
            noise = ImageNoise(range(seed + start, seed + start + len(chunk)), shape, self.device)
            positive = self._context(chunk)
            negative = self._context([negative_prompt or ""] * len(chunk)) if guidance != 1 else None
            denoise = guided(denoiser, positive, negative, guidance, guidance_rescale, guidance_interval)
            z = (grid.initial_scale * noise()).contiguous(memory_format=torch.channels_last)
            z = sample(denoise, z, grid, noise, self._on_step(callback, start, steps), **sampler_options)
            images += self.decode(z)
        return images

    def decode(self, z: Tensor) -> list[Image.Image]:
        """Normalized latents (B, C, h, w) -> pictures, in float32: half precision overflows in VAE decoders."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return to_pil(self.vae.decode(z.float()))

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(C, h, w) of the latents of one picture; UserError for a size that the model cannot make."""
        factor, config = self.vae.factor, self.unet.config
        multiple = factor * 2 ** (len(config.block_out_channels) - 1)
        sides = [side if side is not None else config.sample_size * factor for side in (height, width)]
        for side in sides:
            if side <= 0 or side % multiple:
                raise UserError(f"size {side} px cannot be made: height and width must be multiples of {multiple} px")
        return config.in_channels, sides[0] // factor, sides[1] // factor

    def _context(self, prompts: list[str]) -> tuple[KeyValue, ...]:
        """What cross-attention needs of the prompts, made once for all steps."""
        return self.unet.prepare(self.encode_prompt(prompts))

    def _on_step(self, callback: Callable[[Progress], None] | None, first: int, steps: int) -> OnStep | None:
        if callback is None:
            return None

        def on_step(i: int, t: float, z_t: Tensor, z0: Tensor) -> None:
            decode = partial(self.decode, z0)
            callback(Progress(first=first, step=i, steps=steps, t=t, z_t=z_t, z0=z0, decode=decode))

        return on_step


def _check(guidance: float, rescale: float, seed: int, batch_size: int, sample: Callable, options: dict) -> None:
    if not 0 <= guidance < math.inf:
        raise UserError(f"guidance {guidance} is not allowed: 0 or more, where 1 is none")
    if not 0 <= rescale <= 1:
        raise UserError(f"guidance rescale {rescale} is not allowed: in [0, 1], where 0 is none")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed {seed} is not allowed: 0 to 2^63 - 1")
    if batch_size < 1:
        raise UserError(f"batch size {batch_size} is not allowed: 1 or more")
    known = [name for name in inspect.signature(sample).parameters if name not in COMMON]
    for option in options:
        if option not in known:
            raise UserError(
                f"{option!r} is neither an argument of the pipeline nor an option of the sampler {sample.__name__} "
                f"(its options: {', '.join(known) or 'none'})"
            )
