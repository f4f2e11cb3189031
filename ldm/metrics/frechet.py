"""The Frechet distance between two sets of features, each seen as a Gaussian."""

import numpy as np
import torch
from torch import Tensor


class GaussianMoments:
    """Count, mean and covariance of rows seen batch by batch, in float64; any batching gives the same.

    Keeps the sum of squares around the current mean (Chan et al. 1983, eq. 2.1), since the difference of raw
    second moments loses its digits where the mean is large. Several processes: one each, then `merge`.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.scatter = 0, torch.zeros(0), torch.zeros(0, 0)

    def update(self, features: Tensor | np.ndarray) -> "GaussianMoments":
        """Adds the rows of `features` (N, D), N >= 0; returns itself."""
        x = torch.as_tensor(features).detach().double()
        if x.ndim != 2:
            raise ValueError(f"features must be (N, D), not {tuple(x.shape)}")
        other = GaussianMoments()
        if len(x):
            other.count, other.mean = len(x), x.mean(0)
            centred = x - other.mean
            other.scatter = centred.T @ centred
        return self.merge(other)

    def merge(self, other: "GaussianMoments") -> "GaussianMoments":
        """Adds what another has seen; returns itself."""
        if not self.count or not other.count:
            source = self if self.count else other
            self.count, self.mean, self.scatter = source.count, source.mean, source.scatter
            return self
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"features of {len(self.mean)} and of {len(other.mean)} dimensions do not mix")
        total = self.count + other.count
        shift = other.mean.to(self.mean.device) - self.mean
        scatter = self.scatter + other.scatter.to(self.mean.device)
        self.scatter = scatter + torch.outer(shift, shift) * (self.count * other.count / total)
        self.mean = self.mean + shift * (other.count / total)
        self.count = total
        return self

    @property
    def covariance(self) -> Tensor:
        """(D, D), with ddof 1; ValueError for fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, not {self.count}")
        return self.scatter / (self.count - 1)


def frechet_distance(x: Tensor | np.ndarray | GaussianMoments, y: Tensor | np.ndarray | GaussianMoments) -> float:
    """|mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1^.5 S2 S1^.5)^.5 with covariances of ddof 1 -> at least 0.

    `x`, `y`: features (N, D), or the moments of such. Dowson & Landau 1982, eq. 4; called FID only where the
    features are Inception's (Heusel et al. 2017). Biased up by about (d + d(d+1)/4) / N a side for unit
    covariances: always print N. ValueError for fewer than two rows or unequal dimensions.
    """
    a, b = (m if isinstance(m, GaussianMoments) else GaussianMoments().update(m) for m in (x, y))
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {len(a.mean)} and of {len(b.mean)} dimensions cannot be compared")
    mean, covariance = b.mean.to(a.mean.device), b.covariance.to(a.mean.device)
    root = _symmetric_root(a.covariance)
    # The product is symmetric, unlike S1 S2, so its eigenvalues are real; round-off leaves some below zero.
    cross = torch.linalg.eigvalsh(root @ covariance @ root).clamp_min(0).sqrt().sum()
    distance = (a.mean - mean).square().sum() + a.covariance.trace() + covariance.trace() - 2 * cross
    return max(float(distance), 0.0)


def _symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
