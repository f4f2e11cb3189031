"""Figures of repeated times, and the least time that the arithmetic and the memory allow."""

import random
from collections.abc import Sequence
from statistics import median

REPLICATES = 2000


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third quartile, by linear interpolation between order statistics."""
    return quantile(values, 0.25), quantile(values, 0.75)


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the sorted values lie, interpolated linearly."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def ratio(theirs: Sequence[float], ours: Sequence[float], seed: int = 0) -> dict:
    """Median of `theirs` over median of `ours`, and its 95% bootstrap interval over the rounds, those of both sides
    drawn together as they were taken together (Efron 1979); no interval below three rounds."""
    value = median(theirs) / median(ours)
    if len(ours) < 3:
        return {"value": value, "interval": None}
    draw, count, found = random.Random(seed), len(ours), []
    for _ in range(REPLICATES):
        rows = [draw.randrange(count) for _ in range(count)]
        found.append(median(theirs[i] for i in rows) / median(ours[i] for i in rows))
    return {"value": value, "interval": [quantile(found, 0.025), quantile(found, 0.975)]}


def floor(flops: float, bytes_moved: float, rates: dict[str, float]) -> dict:
    """The least seconds for so many FLOPs and bytes at the measured rates (FLOP/s, byte/s), and which of them it is."""
    arithmetic, memory = flops / rates["flops"], bytes_moved / rates["bytes"]
    return {"seconds": max(arithmetic, memory), "by": "arithmetic" if arithmetic >= memory else "memory"}


def difference(ours: dict, theirs: dict, tolerance: float, relative: bool) -> dict:
    """The largest difference between outputs of the same names (tensors), relative to the largest value of theirs if
    told to, and whether it is within the tolerance; what is missing, of another shape or not finite is never."""
    found = 0.0
    if ours.keys() != theirs.keys() or not ours:
        return {"value": None, "tolerance": tolerance, "agrees": False}
    for name, expected in theirs.items():
        a, b = ours[name].double(), expected.double()
        if a.shape != b.shape or not bool(a.isfinite().all() and b.isfinite().all()):
            return {"value": None, "tolerance": tolerance, "agrees": False}
        scale = float(b.abs().max()) if relative else 1.0
        gap = float((a - b).abs().max())
        found = max(found, gap / scale if scale else gap)
    return {"value": found, "tolerance": tolerance, "agrees": found <= tolerance}
