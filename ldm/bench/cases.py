"""What a row of the benchmark is. Imports nothing heavy."""

from dataclasses import dataclass, field
from typing import Any

NETWORK, PICTURE, GRADIENT = 1e-4, 1.0, 1e-3  # largest differences; see Case.tolerance


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is aimed at: a figure of the row, "at least" or "at most" `limit`."""

    figure: str  # ratio: theirs / ours; slower: ours / theirs; memory: our peak / theirs; share: see Job.parts
    limit: float
    at_least: bool = True

    @property
    def text(self) -> str:
        """In words."""
        names = {
            "ratio": "{}x",
            "slower": "{}x the time",
            "memory": "{}x the memory",
            "share": "{:.0%} beside the model",
        }
        return ("at least " if self.at_least else "at most ") + names[self.figure].format(self.limit)

    def met(self, value: float) -> bool:
        """Whether a value is on the right side."""
        return value >= self.limit if self.at_least else value <= self.limit


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row. `kind` names the builders of both sides in `ours.BUILDERS` and `theirs.BUILDERS`, which get `params`;
    a case of `commands` ({side: a command line}) is timed as a fresh process instead."""

    name: str  # "workload/what"
    kind: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    commands: dict[str, tuple[str, ...]] = field(default_factory=dict)
    sides: tuple[str, ...] = ("ldm", "diffusers")
    tolerance: float | None = NETWORK  # of the largest difference, relative to the largest value but for pictures
    targets: tuple[Target, ...] = ()
    share: float = 1.0  # of the rounds, for what takes long
    memory: bool = True
    items: int = 0  # pictures a run, where their number in a second is of interest
    note: str = ""
    point: tuple[str, float] | None = None  # of a curve of growth: its axis and where on it
    quick: bool = False  # among the few of --quick

    @property
    def workload(self) -> str:
        """What `--only` chooses by."""
        return self.name.split("/")[0]

    def rounds(self, wanted: int) -> int:
        """How many this case gets, at least 3 or all that are wanted."""
        return max(min(3, wanted), round(wanted * self.share))
