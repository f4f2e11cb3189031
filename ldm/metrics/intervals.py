"""How far a number would move on other captions of the same kind: 95% intervals by percentile bootstrap (Efron 1979),
over rows or, where rows of one group (a concept) are alike, over whole groups."""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ldm.metrics.distances import cubic, gaussian

REPLICATES = 1000
FEW, FEWEST = 100, 20  # where one costs a decomposition, of up to SMALL rows or columns and of more
SMALL = 700
MOST = 3000  # rows whose kernels are held at once
Interval = tuple[float, float]
Groups = Sequence[Hashable]  # the group of each row; empty: each row is its own


def mean_interval(values: Tensor | np.ndarray | Sequence[float], seed: int = 0, groups: Groups = ()) -> Interval:
    """95% interval of the mean of values (N,)."""
    return mean_of_means_interval([(values, groups)], seed)


def mean_of_means_interval(parts: Sequence[tuple[Tensor, Groups]], seed: int = 0) -> Interval:
    """95% interval of the unweighted mean of the means of several sets of values, each with its groups."""
    replicates = []
    for i, (values, groups) in enumerate(parts):
        x = torch.as_tensor(values).double().numpy()
        replicates.append([x[rows].mean() for (rows,) in _draws([len(x)], [groups], REPLICATES, seed + i)])
    return _bounds(np.mean(replicates, axis=0))


def resampled_interval(
    statistic: Callable[..., float],
    sets: Sequence[Tensor],
    value: float,
    seed: int = 0,
    few: bool = False,
    groups: Sequence[Groups] = (),
    least: float = -math.inf,
    most: float = math.inf,
) -> Interval:
    """95% interval of a statistic, in [least, most], of one or more sets of rows, (N, D) or (N,), each drawn with
    replacement, by `groups` where each set has some, around the `value` of all rows.

    Repeated rows bias a distance up as fewer rows do, so only the spread of the replicates is used, laid around
    `value`: the interval is of the statistic at this N, bias included. 100 replicates; for large sets, and with `few`
    for statistics that take long, 20 and the normal distribution of their deviation.
    """
    few = few or min(min(len(rows), rows[0].numel()) for rows in sets) > SMALL
    count, sizes = FEWEST if few else FEW, [len(rows) for rows in sets]
    draws = tqdm(_draws(sizes, groups or [()] * len(sets), count, seed), "interval", count, False, disable=not few)
    values = np.array([statistic(*(rows[d] for rows, d in zip(sets, draw, strict=True))) for draw in draws])
    if few:
        half = 1.96 * float(values.std(ddof=1))
        low, high = value - half, value + half
    else:
        low, high = _bounds(values - values.mean() + value)
    return max(low, least), min(max(high, least), most)


def kernel_interval(x: Tensor, y: Tensor, kind: str, value: float, seed: int = 0, groups: Groups = ()) -> Interval:
    """95% interval of the squared MMD of rows x (N, D) and y (N, D), drawn in pairs; `kind` "kid" (unbiased, cubic
    kernel) or "cmmd" (of unit rows, times 1,000). As above the spread of the replicates, around `value`; of more than
    MOST rows the spread of the first MOST, scaled down by the square root of the rows left out."""
    unbiased = kind == "kid"  # Gretton et al. 2012, eq. 4: pairs of pairs, none with itself
    shrink = min(MOST / len(x), 1.0) ** 0.5
    x, y = (rows[:MOST].double() for rows in (x, y))
    kernel, scale = cubic, 1.0
    if not unbiased:
        kernel, scale, x, y = gaussian, 1000.0, F.normalize(x, dim=1), F.normalize(y, dim=1)
    count, across = len(x), kernel(x, y)
    both = (kernel(x, x) + kernel(y, y) - across - across.T).numpy()
    if unbiased:
        np.fill_diagonal(both, 0)
    draws = _draws([count], [groups[:count]], REPLICATES, seed)
    weights = np.stack([np.bincount(rows, minlength=count) for (rows,) in draws]).astype(float)
    values = scale * ((weights @ both) * weights).sum(1) / (count * (count - unbiased))
    return _bounds(shrink * (values - values.mean()) + value)


def _draws(sizes: Sequence[int], groups: Sequence[Groups], count: int, seed: int) -> Iterator[list[np.ndarray]]:
    """Row numbers of `count` bootstrap samples, one array per set of rows and as long as the set: distances depend on
    N. Groups, which differ in size, are drawn until they fill it, and the last one is cut."""
    rng, sets = np.random.default_rng(seed), []
    for size, names in zip(sizes, groups, strict=True):
        members: dict[Hashable, list[int]] = {}
        for row, name in enumerate(names):
            members.setdefault(name, []).append(row)
        sets.append((size, list(members.values())))
    for _ in range(count):
        yield [_draw(rng, size, members) if members else rng.integers(size, size=size) for size, members in sets]


def _draw(rng: np.random.Generator, size: int, members: list[list[int]]) -> np.ndarray:
    drawn = np.empty(0, np.int64)
    while len(drawn) < size:
        picks = rng.integers(len(members), size=len(members))
        drawn = np.concatenate([drawn, *(members[i] for i in picks)])
    return drawn[:size]


def _bounds(values: np.ndarray) -> Interval:
    low, high = np.quantile(values, (0.025, 0.975)).tolist()
    return low, high
