"""The Frechet distance between two sets of features, each seen as a Gaussian."""

import numpy as np
import torch
from torch import Tensor, distributed

Rows = Tensor | np.ndarray
PART = 4096  # rows in float64 at once
SIZES = 15  # of the samples that a distance is extrapolated from


class GaussianMoments:
    """Count, mean and covariance of rows seen batch by batch, in float64; any batching gives the same.

    Keeps the sum of squares around the current mean (Chan et al. 1983, eq. 2.1), since the difference of raw
    second moments loses its digits where the mean is large. Several processes: one each, then `gather`.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.scatter = 0, torch.zeros(0), torch.zeros(0, 0)

    def update(self, features: Rows) -> "GaussianMoments":
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

    def gather(self) -> "GaussianMoments":
        """What all processes have seen, the same in each; of a single process, itself."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return self
        found: list[GaussianMoments] = [GaussianMoments()] * distributed.get_world_size()
        distributed.all_gather_object(found, self)
        total = GaussianMoments()
        for other in found:
            total.merge(other)
        return total

    @property
    def covariance(self) -> Tensor:
        """(D, D), with ddof 1; ValueError for fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, not {self.count}")
        return self.scatter / (self.count - 1)


def frechet_distance(x: Rows | GaussianMoments, y: Rows | GaussianMoments) -> float:
    """|mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1^.5 S2 S1^.5)^.5 with covariances of ddof 1 -> at least 0.

    `x`, `y`: features (N, D), or the moments of such. Dowson & Landau 1982, eq. 4; called FID only where the
    features are Inception's (Heusel et al. 2017). Biased up by about (d + d(d+1)/4) / N a side for unit
    covariances: always print N. ValueError for fewer than two rows, unequal dimensions or values that are not finite.
    """
    if not isinstance(x, GaussianMoments) and not isinstance(y, GaussianMoments):
        x, y = torch.as_tensor(x).detach(), torch.as_tensor(y).detach()
        if x.ndim == y.ndim == 2 and x.shape[1] == y.shape[1] > min(len(x), len(y)):
            return _of_few(*_centred(x), *_centred(y))
    first, second = (m if isinstance(m, GaussianMoments) else _moments(m) for m in (x, y))
    for moments in (first, second):
        _finite(moments.mean, moments.covariance)
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"features of {len(first.mean)} and of {len(second.mean)} dimensions cannot be compared")
    mean, covariance = second.mean.to(first.mean.device), second.covariance.to(first.mean.device)
    root = _symmetric_root(first.covariance)
    # The product is symmetric, unlike S1 S2, so its eigenvalues are real; round-off leaves some below zero.
    cross = torch.linalg.eigvalsh(root @ covariance @ root).clamp_min(0).sqrt().sum()
    distance = (first.mean - mean).square().sum() + first.covariance.trace() + covariance.trace() - 2 * cross
    return max(float(distance), 0.0)


def frechet_distance_infinite(x: Rows, y: Rows, seed: int = 0) -> float:
    """The distance extrapolated to infinitely many rows, of which the bias is gone (Chong & Forsyth 2020).

    Its distances for 15 sizes, each of a random subset of both sets, lie on a line in 1/N; gives where that meets
    1/N = 0, which may be below 0. Both sets are cut, as neither is taken to be whole. Features (N, D) and (M, D);
    ValueError for fewer rows than twice the dimensions (4 at least), where the line is none.
    """
    x, y = torch.as_tensor(x).detach().double(), torch.as_tensor(y).detach().double()
    if x.ndim != 2 or x.shape[1:] != y.shape[1:]:
        raise ValueError(f"features {tuple(x.shape)} and {tuple(y.shape)} cannot be compared")
    count, fewest = min(len(x), len(y)), max(x.shape[1], 2)
    if count < 2 * fewest:
        raise ValueError(f"{count} rows of {x.shape[1]} features are too few to extrapolate; {2 * fewest} are not")
    generator = torch.Generator().manual_seed(seed)
    sizes = np.linspace(max(count // 10, fewest), count, SIZES).astype(int)
    distances = []
    for size in sizes.tolist():
        parts = (rows[torch.randperm(len(rows), generator=generator)[:size]] for rows in (x, y))
        distances.append(frechet_distance(*parts))
    return float(np.polynomial.polynomial.polyfit(1 / sizes, distances, 1)[0])


def _moments(features: Tensor) -> GaussianMoments:
    """Those of all rows, of which a part at a time is held in float64."""
    moments = GaussianMoments()
    for part in torch.as_tensor(features).split(PART):
        moments.update(part)
    return moments


def _centred(features: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (N, D) less their mean, over the root of N - 1, so that the covariance is X^T X; and the mean (D,)."""
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least 2 rows, not {len(features)}")
    rows = features.double()
    mean = rows.mean(0)
    _finite(rows)
    return (rows - mean) / (len(rows) - 1) ** 0.5, mean


def _of_few(a: Tensor, mean_a: Tensor, b: Tensor, mean_b: Tensor) -> float:
    """The same distance where rows are fewer than dimensions: with S1 = A^T A and S2 = B^T B, the trace of the root
    is the sum of the singular values of A B^T, which is small."""
    cross = torch.linalg.svdvals(a @ b.T).sum()
    distance = (mean_a - mean_b).square().sum() + a.square().sum() + b.square().sum() - 2 * cross
    return max(float(distance), 0.0)


def _finite(*tensors: Tensor) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise ValueError("features have values that are not finite (nan or infinity)")


def _symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
