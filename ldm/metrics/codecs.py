"""JPEG and WebP of the same pictures, to compare an autoencoder with."""

import io
from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from ldm.images import to_float
from ldm.metrics.reconstruction import psnr

QUALITIES = (1, 5, 10, 20, 35, 50, 65, 80, 90, 95)
CODECS = ("JPEG", "WEBP")


def encoded(pixels: Tensor, codec: str, quality: int) -> tuple[int, Tensor]:
    """A uint8 (3, H, W) picture through "JPEG" or "WEBP" at a quality in 1..100: bytes, headers and tables included,
    and the decoded picture."""
    file = io.BytesIO()
    Image.fromarray(rearrange(pixels.numpy(), "c h w -> h w c")).save(file, codec, quality=quality)
    with Image.open(file) as image:
        decoded = torch.from_numpy(np.array(image.convert("RGB")))
    return len(file.getvalue()), rearrange(decoded, "h w c -> c h w")


def curve(pixels: Tensor, codec: str, qualities: Sequence[int] = QUALITIES) -> list[tuple[float, float]]:
    """uint8 (N, 3, H, W) -> (mean bytes, mean PSNR in dB) at each quality."""
    points = []
    for quality in qualities:
        sizes, decoded = zip(*(encoded(image, codec, quality) for image in pixels), strict=True)
        points.append((float(np.mean(sizes)), float(psnr(to_float(pixels), to_float(torch.stack(decoded))).mean())))
    return points
