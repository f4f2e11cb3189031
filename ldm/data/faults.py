"""Samples that cannot be used: passed over and listed, until they are too many to be an accident."""

from typing import Any

from ldm.config import UserError

SHARE = 0.01  # of all samples that may be left out


class SampleError(UserError):
    """One sample that cannot be used: its `name`, and in the message why and the way out, in one line."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(why)
        self.name = name

    def __reduce__(self) -> tuple:
        return type(self), (self.name, str(self))


class Faults:
    """What is wrong with the samples of a data set, each counted once: `reasons[name]` says why.

    UserError as soon as they are more than `share` of the `total` of samples (None: not known yet, all are noted).
    """

    def __init__(self, share: float = SHARE, total: int | None = None) -> None:
        self.share, self.total = share, total
        self.reasons: dict[str, str] = {}

    def add(self, name: str, why: str) -> None:
        """Notes a sample that is left out."""
        self.reasons.setdefault(name, why)
        self.check()

    def settle(self, total: int) -> None:
        """Says how many samples there are, those left out among them."""
        self.total = total
        self.check()

    def check(self) -> None:
        """UserError, with the first of them, where too many are left out."""
        if self.total is None or len(self.reasons) <= self.share * self.total:
            return
        first = next(iter(self.reasons.values()))
        raise UserError(
            f"{first} ({len(self.reasons)} of {self.total} samples cannot be used; data.max_broken = {self.share:g} is"
            " the share that may be left out)"
        )


class Tolerant:
    """A map-style data set in whose place of a sample that cannot be read the next one stands that can.

    So it stays a function of the index, whoever reads it: `data[i]` of such a sample has, beside what the other one
    has, "faults": {name: why}; `captions(i)` is still its own where only its picture is broken. They are also noted in
    `faults` of this process. A subclass gives `__len__`, and `read(index)` and `read_captions(index)`, which raise
    SampleError.
    """

    faults: Faults

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample, found = self._next(index, self.read)
        return sample | ({"faults": found} if found else {})

    def captions(self, index: int) -> list[str]:
        """The captions of sample `index`; its picture is not read."""
        return self._next(index, self.read_captions)[0]

    def readable(self, index: int) -> bool:
        """Whether sample `index` itself can be read."""
        return "faults" not in self[index]

    def _next(self, index: int, read: Any) -> tuple[Any, dict[str, str]]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        found: dict[str, str] = {}
        for step in range(len(self)):
            try:
                return read((index + step) % len(self)), found
            except SampleError as error:
                found[error.name] = str(error)
                self.faults.add(error.name, str(error))
        raise UserError(f"no sample can be read; the first: {next(iter(found.values()))}")


def readable(dataset: Any, indices: list[int]) -> list[int]:
    """Those indices whose own sample can be read; all of a data set that has no such thing."""
    return [i for i in indices if dataset.readable(i)] if isinstance(dataset, Tolerant) else indices
