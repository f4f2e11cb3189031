"""Two sets of features, as every distance takes them."""

import numpy as np
import torch
from torch import Tensor

Rows = Tensor | np.ndarray
PART = 1024  # rows whose distances or kernels to all others are held at once


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
