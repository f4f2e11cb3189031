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

from ldm.config import UserError
from ldm.diffusion import Denoiser, guided
from ldm.edit import Pictures, read_edit
from ldm.images import to_pil
from ldm.layers import Prepared
from ldm.pipeline_io import Parts, load_parts, save_parts
from ldm.samplers import SAMPLERS, ImageNoise, OnStep, get_sampler, make_grid

# What every sampler takes, the pipeline gives; what else is in one's signature are its options.
COMMON = frozenset(inspect.signature(SAMPLERS["euler"]).parameters)
LARGEST = 2**14  # pixels of a side


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

    def compile(self, backend: str = "inductor") -> "Pipeline":
        """Compiles the U-Net and the VAE's decoder by torch.compile, in place, at the first call and again for other
        batches and sizes. On a CPU that takes about a minute each; there changes of the weights are not noticed after
        it, as these are laid out once as the kernels want them."""
        options = {"freezing": True} if backend == "inductor" and self.device.type == "cpu" else None
        for model in (self.unet, self.vae.decoder):
            model.compile(fullgraph=True, backend=backend, options=options)
        return self

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str]) -> Tensor:
        """B prompts -> context (B, L, D). What is longer than the context is cut off, with a warning."""
        return self.text_encoder(self.tokenizer(prompts).to(self.device))

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        image: Pictures | None = None,
        mask: Pictures | None = None,
        strength: float = 0.8,
        resample: int = 1,
        latents: Tensor | None = None,
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

        `prompt_embeds` (B, L, D), what `encode_prompt` gives, may take the place of `prompt`; negatives are one for
        all or one each. `image` (one for all or one each) is what to begin with: `strength` in (0, 1] of the steps are
        taken, and where `mask` is black it stays; `resample` 2 asks the model twice in each step, so that what is drawn
        fits what stays. `latents` (B, C, h, w) are the first standard normal noise, in place of the seeds'. `sampler`,
        `spacing`, `height` and `width` (pixels; an image has its own) default to the model's. `guidance` 1 is none and
        asks the model once a step; `guidance_rescale` in [0, 1]; `guidance_interval` are the t, ends included, where
        guidance acts. `sampler_options` go to the sampler, e.g. `eta` of ddim. At most
        `batch_size` pictures are made at once. UserError for what the model or the sampler cannot do.
        """
        positives = self._wanted("prompt", prompt, prompt_embeds)
        count = len(positives)
        negatives = self._wanted("negative_prompt", negative_prompt, negative_prompt_embeds, count)
        self._check_lengths(positives, negatives)
        name = sampler or self.schedule.config.sampler
        sample, grid = get_sampler(name), make_grid(self.schedule, name, steps, spacing)
        _check(guidance, guidance_rescale, batch_size, sample, sampler_options)
        edit = read_edit(image, mask, strength, resample, count, self.vae.factor)
        if edit is not None:
            grid, (height, width) = edit.shorten(grid), edit.size(height, width)
        shape = self.latent_shape(height, width)
        _check_latents(latents, (count, *shape))
        denoiser = Denoiser(self.unet, grid.schedule)
        images: list[Image.Image] = []
        for start in range(0, count, batch_size):
            part = slice(start, min(start + batch_size, count))
            noise = ImageNoise(range(seed + start, seed + part.stop), shape, self.device)
            negative = self._context(negatives[part]) if guidance != 1 else None
            positive = self._context(positives[part])
            denoise = guided(denoiser, positive, negative, guidance, guidance_rescale, guidance_interval)
            z0 = None if edit is None else self._encode(edit.x[part], noise)
            eps = noise()  # drawn in any case, so that what is drawn later is the same
            eps = eps if latents is None else latents[part].to(eps)
            z = grid.initial_scale * eps
            if edit is not None:
                z, denoise = edit.begin(grid, z0, eps, part), edit.keep(denoise, grid, z0, noise, eps, part)
            z = z.contiguous(memory_format=torch.channels_last)
            z = sample(denoise, z, grid, noise, self._on_step(callback, start, len(grid.steps)), **sampler_options)
            images += self.decode(z if edit is None else edit.restore(z, z0, part))
        return images

    def _wanted(
        self, what: str, prompt: str | list[str] | None, embeds: Tensor | None, count: int | None = None
    ) -> list[str] | Tensor:
        """Prompts or their embeddings, one for each of `count` pictures; no negative is "" (UserError)."""
        if prompt is not None and embeds is not None:
            raise UserError(f"{what} and {what}_embeds are given; give one of the two")
        if embeds is not None:
            width, many = self.unet.config.cross_attention_dim, len(embeds) if count is None else count
            if embeds.ndim != 3 or embeds.shape[2] != width or len(embeds) not in (1, many):
                raise UserError(f"{what}_embeds are {tuple(embeds.shape)}; they must be ({many}, L, {width})")
            return embeds.expand(many, -1, -1)
        if prompt is None and count is None:
            raise UserError(f"give {what}, or {what}_embeds")
        if prompt is None or isinstance(prompt, str):
            return [prompt or ""] * (1 if count is None else count)
        if count is not None and len(prompt) != count:
            raise UserError(f"{len(prompt)} {what}s for {count} prompts; give one for all, or one for each")
        return list(prompt)

    def _check_lengths(self, *contexts: list[str] | Tensor) -> None:
        """UserError unless prompts and negatives have one number of tokens."""
        a, b = (c.shape[1] if isinstance(c, Tensor) else self.tokenizer.context_length for c in contexts)
        if a != b:
            raise UserError(f"prompt and negative have {a} and {b} tokens; give prompt_embeds for both, of one length")

    def _context(self, prompts: list[str] | Tensor) -> tuple[Prepared, ...]:
        """What cross-attention needs of prompts or embeddings, made once for all steps."""
        embeds = prompts.to(self.device) if isinstance(prompts, Tensor) else self.encode_prompt(prompts)
        return embeds

    def _encode(self, x: Tensor, noise: ImageNoise) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> normalized latents, drawn from the posterior with each image's seed."""
        posterior = self.vae.encode(x.to(self.device, memory_format=torch.channels_last))
        return self.vae.normalize(posterior.mean + posterior.std * noise())

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
            if not 0 < side <= LARGEST or side % multiple:
                raise UserError(
                    f"size {side} px cannot be made: height and width must be multiples of {multiple} px, at most"
                    f" {LARGEST}"
                )
        return config.in_channels, sides[0] // factor, sides[1] // factor

    def _on_step(self, callback: Callable[[Progress], None] | None, first: int, steps: int) -> OnStep | None:
        if callback is None:
            return None

        def on_step(i: int, t: float, z_t: Tensor, z0: Tensor) -> None:
            decode = partial(self.decode, z0)
            callback(Progress(first=first, step=i, steps=steps, t=t, z_t=z_t, z0=z0, decode=decode))

        return on_step


def _check_latents(latents: Tensor | None, shape: tuple[int, ...]) -> None:
    if latents is not None and tuple(latents.shape) != shape:
        raise UserError(f"latents are {tuple(latents.shape)}; {shape[0]} prompts need {shape}")


def _check(guidance: float, rescale: float, batch_size: int, sample: Callable, options: dict) -> None:
    if not 0 <= guidance < math.inf:
        raise UserError(f"guidance {guidance} is not allowed: 0 or more, where 1 is none")
    if not 0 <= rescale <= 1:
        raise UserError(f"guidance rescale {rescale} is not allowed: in [0, 1], where 0 is none")
    if batch_size < 1:
        raise UserError(f"batch size {batch_size} is not allowed: 1 or more")
    known = [name for name in inspect.signature(sample).parameters if name not in COMMON]
    for option in options:
        if option not in known:
            raise UserError(
                f"{option!r} is neither an argument of the pipeline nor an option of the sampler {sample.__name__} "
                f"(its options: {', '.join(known) or 'none'})"
            )
