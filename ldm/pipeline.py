"""Prompt -> tokens -> context -> denoised latent -> picture."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.compilation import Precision, WhereItSaves, compiled
from ldm.config import UserError
from ldm.diffusion import Denoiser, guided
from ldm.distributed import fast_kernels, find_device, find_dtype, memory_errors
from ldm.edit import Pictures, read_edit
from ldm.images import to_pil
from ldm.lora import merge_lora
from ldm.pipeline_io import Parts, load_parts, save_parts
from ldm.samplers import ImageNoise, count_draws, get_sampler, make_grid

LARGEST = 2**14  # pixels of a side
PIXELS = 2**20  # decoded at once, or one picture: each needs about 2 kB in the sizes of Stable Diffusion


def check_options(sampler: str, guidance: float, rescale: float, batch_size: int, eta: float) -> None:
    """Raises UserError for a number that is out of range."""
    for option, value, fits, allowed in (
        ("guidance", guidance, 0 <= guidance < math.inf, "0 or more, where 1 is none"),
        ("guidance rescale", rescale, 0 <= rescale <= 1, "in [0, 1], where 0 is none"),
        ("batch size", batch_size, batch_size >= 1, "1 or more"),
        ("eta", eta, eta == 0 or (sampler == "ddim" and 0 < eta <= 1), "in [0, 1], and above 0 with ddim alone"),
    ):
        if not fits:
            raise UserError(f"{option} {value} is not allowed: {allowed}")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One step of one batch, as a callback sees it."""

    first: int  # index of the batch's first picture among the call's prompts
    step: int  # from 0
    steps: int
    t: float
    z_t: Tensor  # (B, C, h, w)
    z0: Tensor  # (B, C, h, w), the current estimate
    decode: Callable[[], list[Image.Image]]  # pictures of z0


class Pipeline:
    """The parts of a text-to-image model, and sampling from them. Parts are referred to, and changed by `load_lora`
    alone, so that live modules of a training run may be among them."""

    def __init__(self, parts: Parts):
        self.parts = parts
        self.vae, self.text_encoder, self.tokenizer, self.unet, self.schedule = parts
        self.predict = self.decode_latents = None  # the U-Net and the decoder as `compile` has made them

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        **options: Any,
    ) -> "Pipeline":
        """A shipped model's name, a run folder, a Stable Diffusion folder in diffusers' layout or single file (else
        UserError); `options` such as `vae` and `tokenizer` are those of `load_parts`.

        By default it is on this process's GPU, else the CPU, in the precision that is fast there: see `find_dtype`. To
        save it again, or to compare numbers, open it in float32."""
        device = find_device(device or "")
        pipe = cls(load_parts(folder, device, find_dtype(dtype or "auto", device), **options))
        for model in (pipe.vae, pipe.unet):
            model.to(memory_format=torch.channels_last)  # measured on CPUs alone
        return pipe

    def save_pretrained(self, folder: str | Path, half: bool = False) -> None:
        """Writes a folder that diffusers' StableDiffusionPipeline opens; `half` stores float16."""
        save_parts(folder, self.parts, half)

    @property
    def device(self) -> torch.device:
        """The device of the U-Net; all models must be on it."""
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the U-Net's weights, in which it is asked; latents are float32."""
        return next(self.unet.parameters()).dtype

    @property
    def compiled(self) -> bool:
        """Whether the U-Net runs as compiled; with `passes`, whether its last call did."""
        return bool(getattr(self.predict, "compiled", self.predict))

    @property
    def compiling(self) -> bool:
        """Whether the U-Net is being compiled, in another thread, with `passes`."""
        network = getattr(self.predict, "network", None)
        return bool(network and network.compiling)

    @property
    def defaults(self) -> dict[str, Any]:
        """Steps and guidance of a call that names none; of a distilled model those that it was made for."""
        steps = self.unet.distilled_steps
        return {"steps": steps or 30, "guidance": 1.0 if steps else 5.0}

    def to(self, device: str | torch.device) -> "Pipeline":
        """Moves the models."""
        for model in (self.vae, self.text_encoder, self.unet):
            model.to(device)
        return self

    def load_lora(self, file: str | Path, weight: float = 1.0) -> "Pipeline":
        """Adds `weight` times the low-rank adapters in a file to the weights, in place; several files add up. Raises
        UserError for a file that does not fit, and after `compile`."""
        if self.predict:
            raise UserError("load adapters before the models are compiled, which takes the weights as they are then")
        merge_lora({"unet": self.unet, "text_encoder": self.text_encoder}, file, weight)
        return self

    def compile(self, backend: str = "", precision: Precision = "float32", passes: int | None = None) -> "Pipeline":
        """Compiles the U-Net and the VAE's decoder as they are now, at the first call and again for other batches and
        sizes, by OpenVINO or torch; see `ldm.compilation`. `precision` is the U-Net's. With `passes`, the number of
        calls to come, the U-Net alone is compiled, by OpenVINO and where that saves time."""
        if passes is not None:
            self.predict = WhereItSaves(self.unet, self.unet.forward, passes)
            return self
        self.predict = compiled(self.unet, self.unet.forward, backend, precision)
        self.decode_latents = compiled(self.vae, self.vae.decode, backend)
        return self

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str]) -> Tensor:
        """B prompts -> context (B, L, D). A prompt longer than the context is cut, with a warning."""
        return self.text_encoder(self.tokenizer(prompts).to(self.device))

    @torch.no_grad()  # in inference mode a sharded U-Net could not be trained afterwards
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
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        seed: int = 0,
        height: int | None = None,
        width: int | None = None,
        callback: Callable[[Progress], None] | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0, math.inf),
        spacing: str | None = None,
        sigmas: str | None = None,
        batch_size: int = 16,
        eta: float = 0.0,
    ) -> list[Image.Image]:
        """One picture per prompt. Picture i has the seed `seed + i` and does not depend on the batch it is made in.

        Args:
            prompt, negative_prompt: texts; one negative for all or one each, "" by default.
            prompt_embeds, negative_prompt_embeds: contexts (B, L, D) of `encode_prompt` or of
                `ldm.prompts.encode_weighted` instead of texts.
            image, mask, strength, resample: see `ldm.edit`; an image for all or one each, drawn anew where the mask is
                white.
            latents: the first standard normal noise (B, C, h, w) instead of the seeds'.
            sampler, spacing, sigmas, height, width: the model's by default; see `ldm.samplers.make_grid`. An image has
                its own size, in pixels.
            steps, guidance: 30 and 5 by default, or those of a distilled model. Guidance is 0 or more; at 1 there is
                none, and one model call per step.
            guidance_rescale: in [0, 1]. guidance_interval: the t, ends included, where guidance acts.
            batch_size: most pictures made at once.
            eta: in [0, 1], the share of fresh noise in each step of ddim; 1 is ddpm.

        Raises UserError for arguments that the model or the sampler does not support.
        """
        if prompt == []:
            return []
        name, own = sampler or self.schedule.config.sampler, self.defaults
        steps, guidance = own["steps"] if steps is None else steps, own["guidance"] if guidance is None else guidance
        if self.unet.distilled_steps and guidance != 1:
            warnings.warn(f"guidance {guidance:g} is added to the one that is distilled into the model", stacklevel=3)
        grid = make_grid(self.schedule, name, steps, spacing, sigmas)
        check_options(name, guidance, guidance_rescale, batch_size, eta)
        context = self._context("prompt", prompt, prompt_embeds, batch_size)
        negative = context
        if guidance != 1:
            negative = self._negative(context, negative_prompt, negative_prompt_embeds, batch_size)
        count, edit = len(context), read_edit(image, mask, strength, resample, len(context))
        if edit is not None:
            grid, (height, width) = edit.shorten(grid), edit.size(height, width)
        shape = self.latent_shape(height, width)
        if latents is not None and latents.shape != (count, *shape):
            raise UserError(f"latents are {tuple(latents.shape)}; {count} prompts need {(count, *shape)}")
        images: list[Image.Image] = []
        batch_size = -(-count // -(-count // batch_size))  # batches of nearly one size, compiled once
        draws = count_draws(name, len(grid.steps), eta, resample) + (edit is not None)
        sample = partial(get_sampler(name), grid=grid, **({"eta": eta} if eta else {}))
        denoiser = Denoiser(self.predict or self.unet, grid.schedule, self.dtype)
        with fast_kernels(self.device, self.dtype != torch.float32), memory_errors(self._advice(batch_size, shape)):
            for start in range(0, count, batch_size):
                part = slice(start, min(start + batch_size, count))

                def on_step(step, t, z_t, z0, first=start):
                    steps, decode = len(grid.steps), partial(self.decode, z0)
                    callback(Progress(first=first, step=step, steps=steps, t=t, z_t=z_t, z0=z0, decode=decode))

                noise = ImageNoise(range(seed + start, seed + part.stop), shape, self.device, draws)
                denoise = guided(denoiser, context[part], negative[part], guidance, guidance_rescale, guidance_interval)
                run = partial(sample, noise=noise, on_step=callback and on_step)
                first = None if latents is None else latents[part]
                if edit is None:
                    eps = noise()  # drawn in any case, so that later noise does not depend on `latents`
                    z0 = run(denoise, grid.initial_scale * (eps if first is None else first.to(eps)))
                else:
                    z0 = edit.sample(run, denoise, self.vae, grid, noise, first, part)
                images += self.decode(z0)
        return images

    def _negative(self, context: Tensor, texts: Any, embeds: Tensor | None, batch_size: int) -> Tensor:
        """The context (B, L, D) of negative prompts, for those of `context`."""
        texts = texts or "" if embeds is None else texts
        negative, (count, length, _) = self._context("negative_prompt", texts, embeds, batch_size), context.shape
        if len(negative) not in (1, count) or negative.shape[1] != length:
            shapes = f"{len(negative)} of {negative.shape[1]} tokens for {count} prompts of {length}"
            raise UserError(f"the negative prompts are {shapes}; give one for all, or one each, of the same length")
        return negative.expand(count, -1, -1)

    def _advice(self, count: int, shape: tuple[int, ...]) -> str:
        """The way out where memory is too small for `count` latents of a shape."""
        height, width = (side * self.vae.factor for side in shape[1:])
        fewer = (
            f"make fewer at once, as with batch size {count // 2}, or smaller ones" if count > 1 else "make it smaller"
        )
        return f"with {count} of {width}x{height} px at once; {fewer}"

    def _context(self, name: str, texts: str | list[str] | None, embeds: Tensor | None, batch_size: int) -> Tensor:
        """The context (B, L, D) of texts, or of embeds, which must be one."""
        if (texts is None) == (embeds is None):
            raise UserError(f"give either {name} or {name}_embeds")
        if embeds is None:
            texts = [texts] if isinstance(texts, str) else texts
            batches = (texts[i : i + batch_size] for i in range(0, len(texts), batch_size))
            embeds = torch.cat([*map(self.encode_prompt, batches)])
        width = self.unet.config.cross_attention_dim
        if embeds.ndim != 3 or embeds.shape[2] != width:
            raise UserError(f"{name}_embeds are {tuple(embeds.shape)}; they must be (B, L, {width})")
        return embeds.to(self.device, self.dtype)

    def decode(self, z: Tensor) -> list[Image.Image]:
        """Normalized latents (B, C, h, w) -> pictures, PIXELS at a time, never under autocast: float16 overflows in VAE
        decoders. Raises UserError for pixels that are not finite."""
        images: list[Image.Image] = []
        most = max(1, PIXELS // (z[0, 0].numel() * self.vae.factor**2))
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            for part in z.chunk(-(-len(z) // most)):  # of nearly one size, compiled once
                x = (self.decode_latents or self.vae.decode)(part.float())
                if not x.isfinite().all():
                    fault = "the weights or options" + f", or {self.dtype}," * (self.dtype != torch.float32)
                    raise UserError(f"the picture has values that are NaN or infinite; {fault} are at fault")
                images += to_pil(x)
        return images

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(C, h, w) of the latents of one picture. Raises UserError for a size that the model cannot make."""
        factor, config = self.vae.factor, self.unet.config
        multiple = factor * 2 ** (len(config.block_out_channels) - 1)
        height = config.sample_size * factor if height is None else height
        width = config.sample_size * factor if width is None else width
        for side in (height, width):
            if not 0 < side <= LARGEST or side % multiple:
                allowed = f"height and width must be multiples of {multiple} px, at most {LARGEST}"
                raise UserError(f"size {side} px cannot be made: {allowed}")
        return config.in_channels, height // factor, width // factor
