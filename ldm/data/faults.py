"""Samples that cannot be used: listed with the reason, tolerated up to a share of the data set."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ldm.config import UserError

SHARE = 0.01  # of all samples, at most


class SampleError(UserError):
    """One sample that cannot be used: its `name`, and as the message the reason in one line."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name

    def __str__(self) -> str:
        return self.args[1]


class Faults:
    """The unusable samples of a data set, and files that are no samples: `reasons[name]`.

    Raises UserError as soon as the samples are more than `share` of the `total`, which `settle` sets; 0 before.
    """

    def __init__(self, share: float = SHARE) -> None:
        self.share, self.total = share, 0
        self.reasons: dict[str, str] = {}
        self.samples: list[str] = []  # the reasons of those that count

    def add(self, name: str, reason: str, counts: bool = True) -> None:
        """Lists a sample, once, or a file that does not count as one."""
        if name not in self.reasons:
            self.reasons[name] = reason = reason.encode("utf-8", "backslashreplace").decode()  # names may be any bytes
            self.samples += [reason] * counts
            self.settle(self.total)

    def settle(self, total: int) -> None:
        """Sets the number of samples, the unusable ones included."""
        self.total, count = total, len(self.samples)
        if total and count > self.share * total:
            limit = f"data.max_broken = {self.share:g} is the share that may be left out"
            raise UserError(f"{self.samples[0]} ({count} of {total} samples cannot be used; {limit})")


def attempt(dataset: Any, read: Callable[[Any], Any], item: Any) -> Any:
    """`read(item)`, or None for a sample that cannot be read, which goes into the data set's `faults`."""
    try:
        return read(item)
    except SampleError as error:
        dataset.faults.add(error.name, str(error))


def readable(dataset: Any, indices: Sequence[int]) -> list[int]:
    """The indices whose samples can be read."""
    never_fails = getattr(dataset, "faults", None) is None
    return [i for i in indices if never_fails or attempt(dataset, dataset.__getitem__, i)]


def all_captions(dataset: Any) -> Iterator[list[str]]:
    """The captions of every sample in order, none of one whose captions cannot be read."""
    return (attempt(dataset, dataset.captions, i) or [] for i in range(len(dataset)))
