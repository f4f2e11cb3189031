"""What other codecs make of pictures, to hold an autoencoder against."""

import io
from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

QUALITIES = (1, 5, 10, 20, 35, 50, 65, 80, 90, 95)
CODECS = ("JPEG", "WEBP")


def encoded(image: np.ndarray, codec: str, quality: int) -> tuple[int, np.ndarray]:
    """A uint8 (H, W, 3) picture through "JPEG" or "WEBP" at a quality in 1..100: bytes, and what is decoded.

    Of a JPEG the tables and headers are counted too, as in a file.
    """
    data = io.BytesIO()
    Image.fromarray(image).save(data, codec, quality=quality)
    with Image.open(io.BytesIO(data.getvalue())) as decoded:
        return len(data.getvalue()), np.asarray(decoded.convert("RGB"))


def curve(pixels: Tensor, codec: str, qualities: Sequence[int] = QUALITIES) -> list[tuple[float, float]]:
    """uint8 (N, 3, H, W) -> (mean bytes, mean PSNR in dB) at each quality."""
    images = rearrange(pixels, "n c h w -> n h w c").numpy()
    points = []
    for quality in qualities:
        sizes, levels = [], []
        for image in images:
            size, decoded = encoded(image, codec, quality)
            error = np.square(image.astype(float) - decoded).mean()
            sizes.append(size)
            levels.append(min(10 * np.log10(255**2 / error), 100.0) if error else 100.0)
        points.append((float(np.mean(sizes)), float(np.mean(levels))))
    return points


def nearest_to(pixels: Tensor, codec: str, size: int) -> tuple[int, Tensor]:
    """A uint8 (3, H, W) picture at the best quality of at most `size` bytes, or else of the fewest: bytes, and what is
    decoded, uint8 (3, H, W)."""
    image = rearrange(pixels, "c h w -> h w c").numpy()
    tried = [encoded(image, codec, quality) for quality in range(1, 101)]
    used, decoded = max((x for x in tried if x[0] <= size), key=lambda x: x[0], default=min(tried, key=lambda x: x[0]))
    return used, torch.from_numpy(rearrange(decoded, "h w c -> c h w").copy())
