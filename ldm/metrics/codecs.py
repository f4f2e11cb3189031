"""What other codecs make of pictures, to hold an autoencoder against."""

import io
from collections.abc import Sequence

import numpy as np
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
