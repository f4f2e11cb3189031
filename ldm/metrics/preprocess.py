"""Pictures as metrics and their networks take them: checked, scaled with antialias, normalized. One place for all."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

RESIZE = "bicubic, antialiased"


def checked(x: Tensor) -> Tensor:
    """`x` itself. Raises ValueError unless it holds floats in [-1, 1]: with uint8 or [0, 255] metrics mislead."""
    if not x.is_floating_point():
        raise ValueError(f"pictures must be floats in [-1, 1], not {x.dtype}; ldm.images.to_float converts uint8")
    if (largest := float(x.detach().abs().amax())) > 1.001:
        raise ValueError(f"pictures must be floats in [-1, 1], not up to {largest:.3g}")
    return x


def checked_batch(x: Tensor) -> Tensor:
    """`checked` as float32. Raises ValueError unless it is also (B, 3, H, W)."""
    if x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(f"pictures must be (B, 3, H, W), not {tuple(x.shape)}")
    return checked(x).float()


def resized(size: int, mean: Tensor, std: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that scales pictures (B, 3, H, W) in [-1, 1] to (size, size) and returns (x - mean) / std; `mean` and
    `std` (3,) are of pixels in [-1, 1]."""
    mean, std = (rearrange(c, "c -> c 1 1") for c in (mean, std))

    def prepare(x: Tensor) -> Tensor:
        if x.shape[-2:] != (size, size):
            x = F.interpolate(x, size=(size, size), mode="bicubic", antialias=True)
        return (x.clamp(-1, 1) - mean.to(x.device)) / std.to(x.device)  # bicubic overshoots at edges

    return prepare


def from_unit_range(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of pixels in [0, 1] -> those of pixels in [-1, 1]."""
    return 2 * torch.tensor(mean) - 1, 2 * torch.tensor(std)
