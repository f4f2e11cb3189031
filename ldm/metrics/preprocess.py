"""What networks are shown: pictures in [-1, 1], scaled with antialias, normalized. One function for all of them."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

RESIZE = "bicubic, antialiased"


def resized(size: int, mean: Tensor, std: Tensor) -> Callable[[Tensor], Tensor]:
    """What scales pictures (B, 3, H, W) in [-1, 1] to `size` pixels a side and gives (x - mean) / std, both (3,)."""
    mean, std = (rearrange(c, "c -> c 1 1") for c in (mean, std))

    def prepare(x: Tensor) -> Tensor:
        if x.shape[-2:] != (size, size):
            x = F.interpolate(x, size=(size, size), mode="bicubic", antialias=True)
        return (x.clamp(-1, 1) - mean.to(x.device)) / std.to(x.device)  # bicubic overshoots at edges

    return prepare


def to_unit_range(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """A mean and deviation of pixels in [0, 1] as those of pixels in [-1, 1]."""
    return 2 * torch.tensor(mean) - 1, 2 * torch.tensor(std)
