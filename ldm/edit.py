"""Beginning with a picture in place of noise: image-to-image (Meng et al. 2022, "SDEdit") and inpainting. No model.

And what lies between two prompts, or two noises.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from ldm.config import UserError
from ldm.diffusion import Denoise
from ldm.samplers import Grid, Noise

Pictures = Image.Image | Sequence[Image.Image]  # one for all, or one for each


@dataclass(frozen=True, kw_only=True)
class Edit:
    """Pictures x (N, 3, H, W) in [-1, 1] to begin with, and where on the latent to draw: mask (N, 1, h, w) of 0 and
    1, None for everywhere. `strength` in (0, 1] is the share of the steps that is taken, each of them `resample` times
    where there is a mask."""

    x: Tensor
    mask: Tensor | None
    strength: float
    resample: int = 1

    def shorten(self, grid: Grid) -> Grid:
        """The last `strength` of a grid's steps, rounded down; UserError where that is none."""
        steps = int(len(grid.steps) * self.strength)
        if not steps:
            raise UserError(f"strength {self.strength} leaves none of {len(grid.steps)} steps; raise one of them")
        return replace(grid, steps=grid.steps[-steps:])

    def size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width of the pictures; UserError where others are asked for."""
        own = self.x.shape[2], self.x.shape[3]
        asked = own[0] if height is None else height, own[1] if width is None else width
        if asked != own:
            raise UserError(f"the image is {own[1]}x{own[0]}, not {asked[1]}x{asked[0]}; resize it")
        return own

    def begin(self, grid: Grid, z0: Tensor, eps: Tensor, part: slice) -> Tensor:
        """z0 (B, C, h, w) of the pictures `part` with noise eps at the first step of a shortened grid; at strength 1,
        nothing but noise where the mask is 1."""
        z = grid.steps[0].alpha * z0 + grid.steps[0].sigma * eps
        return z if self.mask is None or self.strength < 1 else self.restore(grid.initial_scale * eps, z, part)

    def keep(self, denoise: Denoise, grid: Grid, z0: Tensor, noise: Noise, eps: Tensor, part: slice) -> Denoise:
        """`denoise` that sees z0 with the noise eps where the mask is 0, whatever the sampler made of it, and says z0
        there: what diffusers does between steps. (At strength 1 its first step sees noise alone.)

        Resampling asks again with what was found under new noise of the same strength, so that what is drawn can go by
        what is kept: after RePaint (Lugmayr et al. 2022, section 4.2), which goes back by steps of the sampler.
        """
        if self.mask is None:
            return denoise

        def known(z_t: Tensor, t: Tensor) -> Tensor:
            z_t = self.restore(z_t, grid.schedule.add_noise(z0, eps, t), part)
            found = self.restore(denoise(z_t, t), z0, part)
            for _ in range(self.resample - 1):
                found = self.restore(denoise(grid.schedule.add_noise(found, noise(), t), t), z0, part)
            return found

        return known

    def restore(self, z: Tensor, kept: Tensor, part: slice) -> Tensor:
        """z (B, C, h, w) where the mask is 1, or without one; `kept` where it is 0."""
        return z if self.mask is None else torch.lerp(kept, z, self.mask[part].to(z))


def read_edit(
    image: Pictures | None, mask: Pictures | None, strength: float, resample: int, count: int, factor: int
) -> Edit | None:
    """What to begin `count` pictures with, on latents smaller by `factor`; None without an image (UserError)."""
    if not count:
        return None
    if resample < 1 or (resample > 1 and mask is None):
        raise UserError(f"resample {resample} is not allowed: 1 or more, and more than 1 only with a mask")
    if image is None:
        if mask is not None:
            raise UserError("a mask needs an image: it says which part of that to draw anew")
        return None
    if not 0 < strength <= 1:
        raise UserError(f"strength {strength} is not allowed: above 0 (the image stays) and up to 1 (all is redrawn)")
    x = _read_pictures(image, count)
    masks = None if mask is None else _read_masks(mask, count, x, factor)
    return Edit(x=x, mask=masks, strength=strength, resample=resample)


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """From a (share 0) to b (share 1) over the arc between them (Shoemake 1985), each (C, h, w) as one vector: the path
    that keeps the length of noise, where a straight one would be too quiet in the middle."""
    cosine = F.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1, 1)
    angle = torch.acos(cosine)
    if float(angle.sin()) < 1e-4:  # one direction, or opposite ones: no arc, or none of its own
        return torch.lerp(a, b, share)
    return (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()


def between(a: Tensor, b: Tensor, shares: Sequence[float]) -> Tensor:
    """Contexts on the line from a (share 0) to b (share 1); a, b (1, L, D) -> (N, L, D)."""
    return torch.lerp(a, b, rearrange(torch.tensor(shares, device=a.device), "n -> n 1 1"))


def _read_pictures(images: Pictures, count: int) -> Tensor:
    pixels = np.stack([np.asarray(_on_white(image)) for image in _one_each("image", images, count)])
    return rearrange(torch.from_numpy(pixels), "b h w c -> b c h w").float() / 127.5 - 1


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _read_masks(masks: Pictures, count: int, x: Tensor, factor: int) -> Tensor:
    """White where to draw; a latent's is that of its pixel in the upper left corner, as in diffusers."""
    pixels = np.stack([np.asarray(mask.convert("L")) for mask in _one_each("mask", masks, count)])
    if pixels.shape[1:] != x.shape[2:]:
        found, wanted = (f"{shape[-1]}x{shape[-2]}" for shape in (pixels.shape, x.shape))
        raise UserError(f"the mask is {found}, the image {wanted}; both must have one size")
    white = rearrange(torch.from_numpy(pixels >= 128).float(), "b h w -> b 1 h w")
    return F.interpolate(white, scale_factor=1 / factor)


def _one_each(what: str, images: Pictures, count: int) -> list[Image.Image]:
    """A list of `count` pictures of one size (UserError)."""
    listed = [images] * count if isinstance(images, Image.Image) else list(images)
    if len(listed) != count:
        raise UserError(f"{len(listed)} {what}s for {count} prompts; give one for all, or one for each")
    sizes = {f"{image.width}x{image.height}" for image in listed}
    if len(sizes) > 1:
        raise UserError(f"the {what}s of one call must have one size; these have {', '.join(sorted(sizes))}")
    return listed
