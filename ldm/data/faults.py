"""Samples that cannot be used: listed with the reason, tolerated up to a share of the data set."""

from collections.abc import Iterator, Sequence
from typing import Any

from ldm.config import UserError

SHARE = 0.01  # of all samples, at most


class SampleError(UserError):
    """One sample that cannot be used: its `name`, and as the message the reason in one line."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name = name

    def __reduce__(self) -> tuple:
        return type(self), (self.name, str(self))


class Faults:
    """The unusable samples of a data set, `reasons[name]`; among them, `uncounted`, files that are no samples.

    Raises UserError as soon as the samples are more than `share` of the `total` (None: not known yet).
    """

    def __init__(self, share: float = SHARE, total: int | None = None) -> None:
        self.share, self.total = share, total
        self.reasons: dict[str, str] = {}
        self.uncounted: set[str] = set()
        self.tried: dict[int, bool] = {}  # index of a sample -> whether it can be read

    def add(self, name: str, reason: str, counts: bool = True) -> None:
        """Lists a sample, once, or a file that does not count as one."""
        if not counts and name not in self.reasons:
            self.uncounted.add(name)
        self.reasons.setdefault(name, reason)
        self.check()

    def settle(self, total: int) -> None:
        """Sets the number of samples, the unusable ones included."""
        self.total = total
        self.check()

    def check(self) -> None:
        """Raises UserError, with the first reason, when more samples are unusable than tolerated."""
        names = [name for name in self.reasons if name not in self.uncounted]
        if self.total is not None and len(names) > self.share * self.total:
            raise UserError(
                f"{self.reasons[names[0]]} ({len(names)} of {self.total} samples cannot be used; data.max_broken ="
                f" {self.share:g} is the share that may be left out)"
            )


def readable(dataset: Any, indices: Sequence[int]) -> list[int]:
    """The indices whose samples can be read; the others go into the data set's `faults`."""
    faults = getattr(dataset, "faults", None)
    if faults is None:
        return list(indices)
    for index in indices:
        if index not in faults.tried:
            try:
                dataset[index]
                faults.tried[index] = True
            except SampleError as error:
                faults.tried[index] = False
                faults.add(error.name, str(error))
    return [index for index in indices if faults.tried[index]]


def all_captions(dataset: Any) -> Iterator[list[str]]:
    """The captions of every sample in order, none of one whose captions cannot be read."""
    for index in range(len(dataset)):
        try:
            yield dataset.captions(index)
        except SampleError as error:
            dataset.faults.add(error.name, str(error))
            yield []
