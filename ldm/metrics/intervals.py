"""How far a number would move on other captions of the same kind: bootstrap intervals (Efron 1979)."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ldm.metrics.kernel import cubic, gaussian

REPLICATES = 1000
FEW, FEWEST = 100, 20  # where one costs a decomposition, of up to SMALL rows or columns and of more
SMALL = 700
MOST = 3000  # rows whose kernels are held at once
BOUNDS = (0.025, 0.975)
Interval = tuple[float, float]


def mean_interval(values: Tensor | np.ndarray, seed: int = 0) -> Interval:
    """95% interval of the mean of independent values (N,)."""
    x = torch.as_tensor(values).double()
    weights = _weights(len(x), REPLICATES, seed)
    return _bounds(weights @ x / len(x))


def resampled_interval(
    statistic: Callable[..., float], sets: Sequence[Tensor], value: float, seed: int = 0, few: bool = False
) -> Interval:
    """95% interval of a statistic of one or more sets of rows, (N, D) or (N,), each drawn with replacement, around the
    `value` of all rows.

    Repeated rows bias a distance up as fewer rows do, so only the spread of the replicates is used, laid around
    `value`: the interval is of the statistic at this N, bias included. 100 replicates; 20 of large sets, and where
    `few` are asked for as each takes long, and then as a normal distribution of their deviation.
    """
    generator = torch.Generator().manual_seed(seed)
    few = few or min(min(len(rows), rows[0].numel()) for rows in sets) > SMALL
    found = []
    for _ in tqdm(range(FEWEST if few else FEW), desc="interval", leave=False, disable=not few):
        drawn = (rows[torch.randint(len(rows), (len(rows),), generator=generator)] for rows in sets)
        found.append(statistic(*drawn))
    values = torch.tensor(found, dtype=torch.float64)
    if few:
        half = 1.96 * float(values.std())
        return value - half, value + half
    return _bounds(values - values.mean() + value)


def kernel_interval(x: Tensor, y: Tensor, kind: str, value: float, seed: int = 0) -> Interval:
    """95% interval of the squared MMD of rows x (N, D) and y (N, D), drawn in pairs; `kind` "kid" (unbiased, cubic
    kernel) or "cmmd" (of unit rows, times 1,000). Again the replicates' spread around `value`; of more than
    MOST rows that of the first, made as much smaller as more rows make it."""
    if kind == "cmmd":
        x, y = (F.normalize(rows.double(), dim=1) for rows in (x, y))
    else:
        x, y = x.double(), y.double()
    kernel, scale = (cubic, 1.0) if kind == "kid" else (gaussian, 1000.0)
    x, y, shrink = x[:MOST], y[:MOST], min(MOST / len(x), 1.0) ** 0.5
    count = len(x)
    both = kernel(x, x) + kernel(y, y) - kernel(x, y) - kernel(x, y).T
    if kind == "kid":  # Gretton et al. 2012, eq. 4: pairs of pairs, none with itself
        both.fill_diagonal_(0)
    pairs = count * (count - 1) if kind == "kid" else count**2
    weights = _weights(count, REPLICATES, seed)
    found = scale * ((weights @ both) * weights).sum(1) / pairs
    return _bounds(shrink * (found - found.mean()) + value)


def _weights(count: int, replicates: int, seed: int) -> Tensor:
    """How often each of `count` rows is drawn, in each replicate: (replicates, count) float64."""
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=replicates)
    return torch.from_numpy(drawn).double()


def _bounds(values: Tensor) -> Interval:
    low, high = torch.quantile(values, torch.tensor(BOUNDS, dtype=torch.float64)).tolist()
    return low, high
