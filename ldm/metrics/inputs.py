"""Features and pictures as metrics and their networks take them: checked, scaled with antialias, normalized. One place
for all."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

Rows = Tensor | np.ndarray
PART = 1024  # rows whose distances or kernels to all others are held at once
RESIZE = "bicubic, antialiased"
ROUND_OFF = 1e-3


def two_sets(x: Rows, y: Rows, least: int = 1, pairs: bool = False) -> tuple[Tensor, Tensor]:
    """Features (N, D) and (M, D) as float64 without a graph. Raises ValueError for other shapes, for fewer than `least`
    rows, for N unlike M where they are `pairs`, and for values that are not finite."""
    x, y = (torch.as_tensor(rows).detach().double() for rows in (x, y))
    shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
    if not x.ndim == y.ndim == 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < least:
        raise ValueError(f"features must be (N, D) and (M, D) of at least {least} rows, not {shapes}")
    if pairs and len(x) != len(y):
        raise ValueError(f"features {shapes} are not pairs")
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("features have values that are not finite (nan or infinity)")
    return x, y


def checked(x: Tensor, side: int = 0) -> Tensor:
    """`x` itself. Raises ValueError unless it holds floats in [-1, 1] (nan passes): with uint8 or [0, 255] metrics
    mislead; and, where `side` is given, unless it is (B, C, H, W) of at least `side` pixels per side."""
    if not x.is_floating_point():
        raise ValueError(f"pictures must be floats in [-1, 1], not {x.dtype}; ldm.images.to_float converts uint8")
    size = x.detach().abs()
    if (beyond := size[size > 1 + ROUND_OFF]).numel():
        raise ValueError(f"pictures must be floats in [-1, 1], not up to {beyond.max():.3g}")
    if side and (x.ndim != 4 or min(x.shape[-2:]) < side):
        raise ValueError(f"pictures must be (B, C, H, W) of at least {side}x{side} pixels, not {tuple(x.shape)}")
    return x


def resized(size: int, mean: Tensor, std: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that scales pictures (B, 3, H, W) in [-1, 1] to (size, size) and returns (x - mean) / std; `mean` and
    `std` (3,) are of pixels in [-1, 1]."""
    mean, std = (rearrange(c, "c -> c 1 1") for c in (mean, std))

    def prepare(x: Tensor) -> Tensor:
        if x.shape[-2:] != (size, size):
            x = F.interpolate(x, size=(size, size), mode="bicubic", antialias=True)
        return (x.clamp(-1, 1) - mean.to(x)) / std.to(x)  # bicubic overshoots at edges

    return prepare
