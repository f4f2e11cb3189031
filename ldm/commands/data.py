"""Builds a data set: about 7,000 captioned emoji (Fluent 3D and Noto flat), split by content, as tar shards.

ldm data emoji --size 64 --out data/emoji64
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ldm.commands.cli import positional, read_options


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `ldm data`."""

    command: Literal["emoji"] = positional()  # data set to build: emoji
    out: Path  # folder for the shards
    size: int = 64  # picture side in pixels: 64 or 128
    packages: Path | None = None  # folder with the two .tgz files of `npm pack`; npm downloads them otherwise
    compact: bool = False  # round colours and gzip the shards, as in the shipped copy


def main() -> None:
    """Builds the shards and prints the sizes of the splits."""
    options = read_options(Options, __doc__)
    from ldm.data.emoji_build import build

    count = build(options.out, options.size, options.packages, options.compact)
    print((options.out / "split.txt").read_text(), end="")
    print(f"{count} pictures of {options.size} px are in {options.out}")
