"""The Frechet distance between two sets of features, each seen as a Gaussian."""

import numpy as np
import torch
from torch import Tensor

from ldm.metrics.rows import Rows, two_sets

SIZES = 15  # of the samples that a distance is extrapolated from


class GaussianMoments:
    """Count, mean and covariance of rows added batch by batch, in float64; any batching gives the same.

    Keeps the sum of squares around the current mean (Chan et al. 1983, eq. 2.1), since the difference of raw
    second moments loses its digits where the mean is large. Several processes: one each, then `merge`.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.scatter = 0, torch.zeros(()), torch.zeros(())

    def update(self, features: Rows) -> "GaussianMoments":
        """Adds the rows of `features` (N, D), N >= 1; returns itself."""
        x, batch = torch.as_tensor(features).detach().double(), GaussianMoments()
        batch.count, batch.mean = len(x), x.mean(0)
        batch.scatter = (x - batch.mean).T @ (x - batch.mean)
        return self.merge(batch)

    def merge(self, other: "GaussianMoments") -> "GaussianMoments":
        """Adds the rows of another; returns itself."""
        total, shift = self.count + other.count, other.mean - self.mean
        if other.count:
            between = torch.outer(shift, shift) * (self.count * other.count / total)
            self.scatter = self.scatter + other.scatter + between
            self.mean = self.mean + shift * (other.count / total)
            self.count = total
        return self

    @property
    def covariance(self) -> Tensor:
        """(D, D), with ddof 1. Raises ValueError for fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, not {self.count}")
        return self.scatter / (self.count - 1)


def frechet_distance(x: Rows | GaussianMoments, y: Rows | GaussianMoments) -> float:
    """|mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1^.5 S2 S1^.5)^.5 with covariances of ddof 1 -> at least 0.

    `x`, `y`: features (N, D), or their moments. Dowson & Landau 1982, eq. 4; called FID only where the features are
    Inception's (Heusel et al. 2017). Biased up by about (d + d(d+1)/4) / N per side for unit covariances: always
    print N. Raises ValueError for fewer than two rows, unequal dimensions or values that are not finite.
    """
    if not isinstance(x, GaussianMoments) and not isinstance(y, GaussianMoments):
        x, y = two_sets(x, y, least=2)
        if x.shape[1] > min(len(x), len(y)):
            return _distance_of_few(x, y)
    first, second = (side if isinstance(side, GaussianMoments) else GaussianMoments().update(side) for side in (x, y))
    s1, s2 = first.covariance, second.covariance
    values, vectors = torch.linalg.eigh(s1)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    # The product is symmetric, unlike S1 S2, so its eigenvalues are real; round-off leaves some below zero.
    cross = torch.linalg.eigvalsh(root @ s2 @ root).clamp_min(0).sqrt().sum()
    return max(float((first.mean - second.mean).square().sum() + s1.trace() + s2.trace() - 2 * cross), 0.0)


def _distance_of_few(x: Tensor, y: Tensor) -> float:
    """The same distance for fewer rows than dimensions: with S1 = A^T A and S2 = B^T B, the trace of the root is the
    sum of the singular values of A B^T, which is small."""
    a, b = ((rows - rows.mean(0)) / (len(rows) - 1) ** 0.5 for rows in (x, y))
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return max(float((x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * cross), 0.0)


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
