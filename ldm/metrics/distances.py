"""Distances between two sets of features: of Gaussians fitted to them, and by kernels, which assume none."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.metrics.inputs import PART, Rows, two_sets

SIZES = 15  # of the samples that a distance is extrapolated from
SIGMA = 10.0  # of CMMD's kernel, in unit embeddings


def frechet_distance(x: Rows, y: Rows) -> float:
    """|mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1^.5 S2 S1^.5)^.5 of features (N, D) and (M, D), with covariances of
    ddof 1 -> at least 0.

    Dowson & Landau 1982, eq. 4; called FID only where the features are Inception's (Heusel et al. 2017). Biased up by
    about (d + d(d+1)/4) / N per side for unit covariances: always print N. Raises ValueError for fewer than two rows,
    unequal dimensions or values that are not finite.
    """
    x, y = two_sets(x, y, least=2)
    shift = x.mean(0) - y.mean(0)
    # With S1 = A^T A and S2 = B^T B, the last trace is the sum of the singular values of A B^T.
    a, b = (torch.linalg.qr(rows - rows.mean(0), mode="r").R / (len(rows) - 1) ** 0.5 for rows in (x, y))
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return max(float(shift.square().sum() + a.square().sum() + b.square().sum() - 2 * cross), 0.0)


def frechet_distance_infinite(x: Rows, y: Rows, seed: int = 0) -> float:
    """The distance extrapolated to infinitely many rows, where its bias is gone (Chong & Forsyth 2020).

    The distances of 15 sizes, each of a random subset of both sets, lie on a line in 1/N; returns its intercept,
    which may be below 0. Features (N, D) and (M, D). Raises ValueError for fewer rows than twice the dimensions (4 at
    least), where there is no line.
    """
    x, y = two_sets(x, y)
    count, fewest = min(len(x), len(y)), max(x.shape[1], 2)
    if count < 2 * fewest:
        raise ValueError(f"{count} rows of {x.shape[1]} features are too few to extrapolate; use {2 * fewest} or more")
    sizes = np.linspace(max(count // 10, fewest), count, SIZES).astype(int)
    distances = [frechet_distance(a, b) for a, b in _subsets(x, y, sizes.tolist(), seed)]
    return float(np.polynomial.polynomial.polyfit(1 / sizes, distances, 1)[0])


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
    values = []
    for a, b in _subsets(x, y, [subset_size] * subsets, seed):
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


def _subsets(x: Tensor, y: Tensor, sizes: list[int], seed: int) -> Iterator[list[Tensor]]:
    """A random subset of each set per size."""
    generator = torch.Generator().manual_seed(seed)
    for size in sizes:
        yield [rows[torch.randperm(len(rows), generator=generator)[:size]] for rows in (x, y)]
