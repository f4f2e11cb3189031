"""JPEG and WebP of the same pictures, to compare an autoencoder with."""

import io
from collections.abc import Sequence
from operator import itemgetter

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from ldm.images import to_float
from ldm.metrics.reconstruction import psnr

QUALITIES = (1, 5, 10, 20, 35, 50, 65, 80, 90, 95)
CODECS = ("JPEG", "WEBP")


def encoded(image: np.ndarray, codec: str, quality: int) -> tuple[int, np.ndarray]:
    """A uint8 (H, W, 3) picture through "JPEG" or "WEBP" at a quality in 1..100: bytes, headers and tables included,
    and the decoded picture."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, codec, quality=quality)
    with Image.open(file) as decoded:
        return len(file.getvalue()), np.array(decoded.convert("RGB"))


def curve(pixels: Tensor, codec: str, qualities: Sequence[int] = QUALITIES) -> list[tuple[float, float]]:
    """uint8 (N, 3, H, W) -> (mean bytes, mean PSNR in dB) at each quality."""
    images, points = rearrange(pixels, "n c h w -> n h w c"), []
    for quality in qualities:
        sizes, decoded = zip(*(encoded(image, codec, quality) for image in images.numpy()), strict=True)
        level = psnr(to_float(images), to_float(torch.from_numpy(np.stack(decoded)))).mean()
        points.append((float(np.mean(sizes)), float(level)))
    return points


def nearest_to(pixels: Tensor, codec: str, size: int) -> tuple[int, Tensor]:
    """A uint8 (3, H, W) picture at the most bytes up to `size`, or else at the fewest: bytes, and the decoded picture,
    uint8 (3, H, W)."""
    image = rearrange(pixels, "c h w -> h w c").numpy()
    results = [encoded(image, codec, quality) for quality in range(1, 101)]
    fitting = [result for result in results if result[0] <= size]
    used, decoded = max(fitting, key=itemgetter(0)) if fitting else min(results, key=itemgetter(0))
    return used, rearrange(torch.from_numpy(decoded), "h w c -> c h w")
