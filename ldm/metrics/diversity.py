"""Fidelity and variety apart: which rows lie within whose neighbourhood, and the Inception Score."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ldm.metrics.inputs import PART, Rows, two_sets


def inception_score(probabilities: Rows, splits: int = 10) -> tuple[float, float]:
    """exp of the mean KL(p(y|x) || p(y)) over pictures: mean and deviation over `splits` parts in the order given.

    Class probabilities (N, classes), N >= splits, cut as the original code cuts them. Salimans et al. 2016, section 4;
    between 1 and the number of classes. The name is for Inception's classes: with another classifier's, print whose.
    Raises ValueError for fewer rows, and for rows that are no probabilities.
    """
    p = torch.as_tensor(probabilities).detach().double()
    if p.ndim != 2 or len(p) < splits:
        raise ValueError(f"probabilities must be (N, classes) with N at least {splits}, not {tuple(p.shape)}")
    if p.min() < 0 or (p.sum(1) - 1).abs().max() > 1e-3:
        raise ValueError("rows of probabilities must be at least 0 and sum to 1; take the softmax of logits")
    scores = []
    for i in range(splits):
        part = p[i * len(p) // splits : (i + 1) * len(p) // splits]
        divergence = torch.xlogy(part, part) - torch.xlogy(part, part.mean(0))
        scores.append(float(divergence.sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real: Rows, fake: Rows, k: int = 5) -> dict[str, float]:
    """ "precision", "recall" (Kynkaanniemi et al. 2019), "density" and "coverage" (Naeem et al. 2020), by balls that
    reach to each row's k-th neighbour in its own set; features (N, D) and (M, D).

    precision: share of fakes within a real's ball; recall: share of reals within a fake's; density: how many reals'
    balls hold a fake, over k; coverage: share of reals whose ball holds a fake. Raises ValueError for k or fewer rows.
    """
    return {name: float(values.mean()) for name, values in neighbourhoods(real, fake, k).items()}


def neighbourhoods(real: Rows, fake: Rows, k: int = 5) -> dict[str, Tensor]:
    """The values that `precision_recall` averages: "precision" and "density" of each fake (M,), "recall" and
    "coverage" of each real (N,), float64."""
    real, fake = two_sets(real, fake, least=k + 1)
    real_radius, fake_radius = (
        torch.cat([distances.kthvalue(k + 1, dim=1).values for distances in _distances(rows, rows)])
        for rows in (real, fake)
    )
    balls = torch.zeros(len(fake), dtype=torch.float64)  # how many reals' balls hold each fake
    recall, coverage = [], []
    for distances, reach in zip(_distances(real, fake), real_radius.split(PART), strict=True):
        inside = distances < reach[:, None]
        balls += inside.sum(0)
        coverage.append(inside.any(1))
        recall.append((distances < fake_radius).any(1))
    rows = {"recall": torch.cat(recall).double(), "coverage": torch.cat(coverage).double()}
    return {"precision": (balls > 0).double(), "density": balls / k} | rows


def nearest(x: Rows, bank: Rows) -> tuple[Tensor, Tensor]:
    """The distance from each row of x (N, D) to the nearest of `bank` (M, D), and its index; (N,) and (N,)."""
    minima = [distances.min(1) for distances in _distances(*two_sets(x, bank))]
    return torch.cat([m.values for m in minima]), torch.cat([m.indices for m in minima])


def _distances(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Euclidean distances of PART rows of x at a time to all of y; by differences, exact where two are the same."""
    for part in x.split(PART):
        yield torch.cdist(part, y, compute_mode="donot_use_mm_for_euclid_dist")
