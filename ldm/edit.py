"""Editing pictures: image-to-image (Meng et al. 2022, "SDEdit"), inpainting, and interpolation of prompts and noise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from ldm.config import UserError
from ldm.diffusion import Denoise, Step
from ldm.images import to_float, upright_rgb
from ldm.samplers import Grid, Noise
from ldm.vae import VAE

Pictures = Image.Image | Sequence[Image.Image]  # one for all, or one each


@dataclass(frozen=True, kw_only=True)
class Edit:
    """Pictures x (N, 3, H, W) in [-1, 1] to start from, and a mask (N, 1, H, W): 1 is drawn, 0 is kept; None draws
    everywhere. `strength` in (0, 1] is the share of steps taken, each of them `resample` times."""

    x: Tensor
    mask: Tensor | None
    strength: float
    resample: int

    def size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width of the pictures. Raises UserError for others that were asked for."""
        h, w = self.x.shape[2:]
        if height not in (None, h) or width not in (None, w):
            raise UserError(f"the image is {w}x{h}; resize it instead of giving height {height}, width {width}")
        return h, w

    def shorten(self, grid: Grid) -> Grid:
        """The last `strength` of a grid's steps, rounded down. Raises UserError where none is left."""
        steps = int(len(grid.steps) * self.strength)
        if not steps:
            raise UserError(f"strength {self.strength} leaves none of {len(grid.steps)} steps; raise one of them")
        return replace(grid, steps=grid.steps[-steps:])

    def sample(
        self,
        run: Callable[[Denoise, Tensor], Tensor],
        denoise: Denoise,
        vae: VAE,
        grid: Grid,
        noise: Noise,
        latents: Tensor | None,
        part: slice,
    ) -> Tensor:
        """z0 (B, C, h, w) for the pictures `part`: `run(denoise, z_t)` samples on a shortened grid, from the pictures
        with the noise of its first step."""
        posterior = vae.encode(self.x[part].to(next(vae.parameters())))
        z0 = vae.normalize(posterior.mean + posterior.std * noise())  # drawn before the first noise, as in diffusers
        eps = noise()
        eps = eps if latents is None else latents.to(eps)
        z_t = grid.steps[0].alpha * z0 + grid.steps[0].sigma * eps
        if self.mask is None:
            return run(denoise, z_t)
        # A latent's mask is that of its upper left pixel, as in diffusers.
        mask = self.mask[part, :, :: vae.factor, :: vae.factor].to(z0)
        if self.strength == 1:
            z_t = torch.lerp(z_t, grid.initial_scale * eps, mask)
        return torch.lerp(z0, run(keep(denoise, z0, eps, mask, noise, self.resample), z_t), mask)


def keep(denoise: Denoise, z0: Tensor, eps: Tensor, mask: Tensor, noise: Noise, resample: int = 1) -> Denoise:
    """`denoise` that sees z0 with the noise eps where the mask is 0, and returns z0 there, as diffusers does between
    steps.

    `resample` asks again with the estimate under new noise of the same strength, so that the part that is drawn can fit
    the part that is kept: after RePaint (Lugmayr et al. 2022, section 4.2), which goes back by steps of the sampler.
    """

    def keeping(z_t: Tensor, s: Step) -> Tensor:
        z_t = torch.lerp(s.alpha * z0 + s.sigma * eps, z_t, mask)
        estimate = torch.lerp(z0, denoise(z_t, s), mask)
        for _ in range(resample - 1):
            estimate = torch.lerp(z0, denoise(s.alpha * estimate + s.sigma * noise(), s), mask)
        return estimate

    return keeping


def read_edit(image: Pictures | None, mask: Pictures | None, strength: float, resample: int, count: int) -> Edit | None:
    """The edit of `count` pictures; None without an image. Raises UserError for options out of range or pictures that
    do not fit each other."""
    if resample < 1 or (resample > 1 and mask is None):
        raise UserError(f"resample {resample} is not allowed: 1 or more, and more than 1 only with a mask")
    if image is None:
        if mask is not None:
            raise UserError("a mask needs an image: white is the part of it to draw anew")
        return None
    if not 0 < strength <= 1:
        raise UserError(f"strength {strength} is not allowed: above 0 (the image stays) and up to 1 (all is redrawn)")
    x = to_float(rearrange(_read("image", image, count, "RGB"), "b h w c -> b c h w"))
    white = None if mask is None else rearrange(_read("mask", mask, count, "L") >= 128, "b h w -> b 1 h w")
    if white is not None and white.shape[2:] != x.shape[2:]:
        sizes = "the mask is {3}x{2}, the image {1}x{0}".format(*x.shape[2:], *white.shape[2:])
        raise UserError(f"{sizes}; both must have one size")
    return Edit(x=x, mask=white, strength=strength, resample=resample)


def _read(name: str, images: Pictures, count: int, mode: str) -> Tensor:
    """The uint8 pixels of `count` pictures of one size."""
    images = [images] * count if isinstance(images, Image.Image) else list(images)
    if others := [type(image).__name__ for image in images if not isinstance(image, Image.Image)]:
        raise UserError(f"{name} must be a PIL image or a list of them, not {others[0]}")
    if len(images) != count:
        raise UserError(f"{len(images)} {name}s for {count} prompts; give one for all, or one for each")
    images = [upright_rgb(image).convert(mode) for image in images]
    sizes = {f"{image.width}x{image.height}" for image in images}
    if len(sizes) > 1:
        raise UserError(f"the {name}s of one call must have one size; these have {', '.join(sorted(sizes))}")
    return torch.from_numpy(np.stack(images))


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """From a (share 0) to b (share 1) on the arc between them (Shoemake 1985), each (C, h, w) as one vector. It keeps
    the norm of noise, which a straight line would lower in the middle."""
    cosine = F.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1, 1)
    angle = torch.acos(cosine)
    if float(angle.sin()) < 1e-4:  # parallel or opposite: no arc is defined
        return torch.lerp(a, b, share)
    return (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()


def between(a: Tensor, b: Tensor, shares: Sequence[float]) -> Tensor:
    """Contexts on the line from a (share 0) to b (share 1); a, b (1, L, D) -> (N, L, D)."""
    return torch.lerp(a, b, rearrange(torch.tensor(shares, device=a.device), "n -> n 1 1"))
