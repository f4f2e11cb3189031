"""Samples that cannot be used: listed with the reason, tolerated up to a share of the data set."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.config import UserError
from ldm.data.config import DataConfig
from ldm.distributed import map_over_processes
from ldm.images import ImageError, read_image


class SampleError(UserError):
    """One sample that cannot be used: `SampleError(name, reason)`, the reason in one line, which is the message."""

    def __str__(self) -> str:
        return self.args[1]


class Faults:
    """The unusable samples of a data set, and files that are no samples: `reasons[name]`.

    Raises UserError as soon as the samples are more than `share` of the `total`, which `settle` sets; 0 before.
    """

    def __init__(self, share: float) -> None:
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


def attempt(faults: Faults | None, read: Callable[[Any], Any], item: Any) -> Any:
    """`read(item)`, or None for a sample that cannot be read, which goes into `faults`."""
    try:
        return read(item)
    except SampleError as error:
        faults.add(*error.args)


def readable(dataset: Any, indices: Sequence[int]) -> list[int]:
    """The indices whose samples can be read; a collective."""
    faults = getattr(dataset, "faults", None)

    def fault(index: int) -> tuple[str, str] | None:
        try:
            dataset[index]
        except SampleError as error:
            return error.args

    reasons = [None] * len(indices) if faults is None else map_over_processes(fault, indices)
    for reason in filter(None, reasons):
        faults.add(*reason)
    return [i for i, reason in zip(indices, reasons, strict=True) if not reason]


def all_captions(dataset: Any) -> Iterator[list[str]]:
    """The captions of every sample in order, none of one whose captions cannot be read."""
    faults = getattr(dataset, "faults", None)
    return (attempt(faults, dataset.captions, i) or [] for i in range(len(dataset)))


def read_picture(source: Path | bytes, config: DataConfig, name: str) -> Tensor:
    """The picture of the sample `name`, uint8 (3, size, size). Raises SampleError."""
    try:
        return read_image(source, config.size, config.max_pixels, name)
    except ImageError as error:
        raise SampleError(name, f"{error}; repair or remove it") from None
