"""The Frechet distance between two sets of features, each seen as a Gaussian."""

import numpy as np
import torch

from ldm.metrics.rows import Rows, two_sets

SIZES = 15  # of the samples that a distance is extrapolated from


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
    generator = torch.Generator().manual_seed(seed)
    sizes = np.linspace(max(count // 10, fewest), count, SIZES).astype(int)
    distances = []
    for size in sizes.tolist():
        subsets = (rows[torch.randperm(len(rows), generator=generator)[:size]] for rows in (x, y))
        distances.append(frechet_distance(*subsets))
    return float(np.polynomial.polynomial.polyfit(1 / sizes, distances, 1)[0])
