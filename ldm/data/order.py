"""The order in which samples are read: a pure function of (seed, step), split over processes."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

WINDOW = 8  # blocks that are mixed with each other; more mixes better and reads less sequentially


@dataclass(frozen=True)
class EpochBatches:
    """Batch sampler for a DataLoader: for step = start, start + 1, ... `steps` - 1, this rank's list of
    `batch_size` indices.

    Every epoch is a permutation of range(`length`); the epochs follow each other without a gap. The global
    batch of a step is the next `batch_size * world` entries, and rank r has its r-th run of `batch_size`. So
    per epoch every sample comes exactly once, over all ranks together. Nothing is remembered between steps:
    starting at k gives the batches that a run from 0 has from step k on, and 2 ranks with batch 8 see the
    global batches of 1 rank with 16.

    `blocks` (lengths of consecutive runs of indices, `Shards.lengths`) keeps reading local: blocks are
    shuffled, then samples within each WINDOW of blocks.

    With `weights` (length,), an epoch is `length` entries drawn anew: a sample comes as often as its share of
    all weights says, rounded down or up at random (systematic sampling).
    """

    length: int
    batch_size: int
    seed: int
    rank: int = 0
    world: int = 1
    start: int = 0
    steps: int = 0
    blocks: list[int] | None = None
    weights: np.ndarray | None = None

    def __iter__(self) -> Iterator[list[int]]:
        permutation = lru_cache(1)(self.permutation)
        for step in range(self.start, self.steps):
            first = (step * self.world + self.rank) * self.batch_size
            places = (divmod(i, self.length) for i in range(first, first + self.batch_size))
            yield [int(permutation(epoch)[place]) for epoch, place in places]

    def permutation(self, epoch: int) -> np.ndarray:
        """The order of all indices in one epoch, int64 (length,)."""
        # Sorting raw bits, not Generator.permutation: NumPy keeps only the bits the same between versions.
        bits = np.random.PCG64(np.random.SeedSequence([self.seed % 2**64, epoch]))
        if self.blocks is None or self.weights is not None:
            order = np.argsort(bits.random_raw(self.length), kind="stable")
            return order if self.weights is None else self.drawn(bits.random_raw() / 2**64)[order]
        members = np.split(np.arange(self.length), np.cumsum(self.blocks)[:-1])
        order = np.argsort(bits.random_raw(len(members)), kind="stable")
        windows = []
        for first in range(0, len(order), WINDOW):
            window = np.concatenate([members[i] for i in order[first : first + WINDOW]])
            windows.append(window[np.argsort(bits.random_raw(len(window)), kind="stable")])
        return np.concatenate(windows)

    def drawn(self, offset: float) -> np.ndarray:
        """The samples of one epoch in ascending order, by their weights: int64 (length,)."""
        ends = np.cumsum(self.weights) / np.sum(self.weights) * self.length
        return np.searchsorted(ends, np.arange(self.length) + offset, side="right").clip(max=self.length - 1)


def balancing_weights(groups: Sequence[str], power: float) -> np.ndarray:
    """Weights (N,) of samples so that a group of n samples is drawn in proportion to n^(1 - power): float64."""
    counts = Counter(groups)
    return np.array([counts[group] ** -power for group in groups])
