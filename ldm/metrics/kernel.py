"""Distances between two sets of features by kernels: no Gaussian is assumed, and KID has no bias in N."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.metrics.rows import PART, Rows, two_sets

SIGMA = 10.0  # of CMMD's kernel, in unit embeddings


def kernel_distance(
    x: Rows, y: Rows, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """KID (Binkowski et al. 2018): mean and deviation, over random subsets of both, of the unbiased squared MMD with
    the kernel (x.y / d + 1)^3.

    Features (N, D) and (M, D); 0 in expectation for two samples of one distribution, so values below 0 occur. Raises
    ValueError for fewer rows than `subset_size`, which must be at least 2.
    """
    x, y = two_sets(x, y)
    if not 2 <= subset_size <= min(len(x), len(y)):
        raise ValueError(f"subset_size {subset_size} is not in 2..{min(len(x), len(y))}, the rows there are")
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        a, b = (rows[torch.randperm(len(rows), generator=generator)[:subset_size]] for rows in (x, y))
        within = cubic(a, a).fill_diagonal_(0).sum() + cubic(b, b).fill_diagonal_(0).sum()
        values.append(float(within / (subset_size * (subset_size - 1)) - 2 * cubic(a, b).mean()))
    return float(np.mean(values)), float(np.std(values))


def cmmd(x: Rows, y: Rows) -> float:
    """CMMD (Jayasumana et al. 2024): 1,000 times the squared MMD of embeddings (N, D) and (M, D), scaled to unit length
    here, with a Gaussian kernel of sigma 10; rows are paired with themselves too (biased, as published). At least 0."""
    x, y = (F.normalize(rows, dim=1) for rows in two_sets(x, y))
    xx, yy, xy = (
        sum(float(gaussian(part, b).sum()) for part in a.split(PART)) / (len(a) * len(b))
        for a, b in ((x, x), (y, y), (x, y))
    )
    return max(1000 * (xx + yy - 2 * xy), 0.0)  # round-off


def cubic(x: Tensor, y: Tensor) -> Tensor:
    """KID's kernel of every row of x (N, D) with every row of y (M, D) -> (N, M)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(x: Tensor, y: Tensor) -> Tensor:
    """CMMD's kernel of unit rows x (N, D), y (M, D) -> (N, M)."""
    return torch.exp((x @ y.T - 1) / SIGMA**2)
