"""Tar shards in the WebDataset convention, read in place: nothing is unpacked and no picture stays in memory.

A sample is the members of one tar that share a name up to the first dot of its last part: `000012.png` with
`000012.json` (`captions` or `text`, and any other fields) and/or `000012.txt` (one caption per line).
"""

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ldm.config import UserError
from ldm.data.config import DataConfig
from ldm.data.faults import Faults, SampleError, attempt, read_picture
from ldm.data.splits import named_split, select
from ldm.data.text import clean_captions, decode
from ldm.images import SUFFIXES
from ldm.model_io import parse_object

KINDS = ("image", "txt", "json")  # of the members of a sample
Span = tuple[int, int]  # offset and size of a member in its shard


class Shards:
    """Samples of one split of a folder of `*.tar` (or of one `.tar`), map-style.

    Shards named after a split, as in `train-0000.tar`, are of that split; samples of other shards have that of their
    JSON's field `split`, or else are split by a hash of their captions, which are read for it. Else opening reads the
    tar headers only. `lengths` are the samples of each shard, in order, for `EpochBatches(blocks=...)`. Every read
    opens the shard by itself, so that worker processes and threads share nothing.

    Left out and listed in `faults`, up to the share `max_broken`: samples without caption or picture, with double
    members or an unsafe name. Raises UserError beyond that share, for a missing or empty folder, and for a shard that
    is cut short or no plain tar.
    """

    def __init__(self, config: DataConfig, split: str) -> None:
        path = Path(config.path)
        self.config, self.size, self.faults = config, config.size, Faults(config.max_broken)
        self.files = [path] if path.is_file() else sorted(path.glob("*.tar"))
        if not self.files:
            raise UserError(f"shard folder {config.path!r} {'has no *.tar' if path.exists() else 'does not exist'}")
        named = [split_of_shard(file.name) for file in self.files]
        shards = [number for number, name in enumerate(named) if name in ("", split)]
        rows = [(shard, *row) for shard in shards for row in scan(self.files[shard], self.faults)]
        self.faults.settle(len(rows) + len(self.faults.reasons))
        # An array, whose memory worker processes share: a million samples take 100 MB.
        longest = max((len(key) for _, key, _ in rows), default=1)
        table = np.array(rows, [("shard", int), ("key", f"U{longest}"), ("spans", int, (len(KINDS), 2))])
        keep = np.array([name == split for name in named])[table["shard"]]
        rest = table[~keep]
        samples = {self._name(row): fields for row in rest if (fields := attempt(self.faults, self._fields, row))}
        chosen = {*select(samples, split, config.seed, self.faults)}
        keep[~keep] = [self._name(row) in chosen for row in rest]
        self.table = table[keep]
        self.lengths = [int(n) for n in np.bincount(self.table["shard"]) if n]

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, captions = self.table[index], self.captions(index)
        image = read_picture(read_span(self.files[row["shard"]], *row["spans"][0]), self.config, self._name(row))
        return {"image": image, "captions": captions, "key": str(row["key"])}

    def captions(self, index: int) -> list[str]:
        """The captions of sample `index`; its picture is not read. Raises SampleError."""
        return self._fields(self.table[index])["captions"]

    def identity(self, index: int) -> tuple[str, str]:
        """The key of sample `index`; and its shard with size and time, and where in it the picture lies."""
        shard, key, spans = self.table[index]
        file, stat = self.files[shard], self.files[shard].stat()
        stamp, span = (stat.st_size, stat.st_mtime_ns), tuple(spans[0].tolist())
        return str(key), f"{file.name} {stamp} {span} {self.config.max_pixels}"

    def _name(self, row: np.void) -> str:
        return f"{row['key']} in {self.files[row['shard']].name}"

    def _fields(self, row: np.void) -> dict[str, Any]:
        """The sample's JSON, with cleaned `captions`. Raises SampleError."""
        name = self._name(row)
        text, table = (read_span(self.files[row["shard"]], *span) for span in row["spans"][1:])
        try:
            fields = parse_object(decode(table, name), name) if table else {}
            captions = fields.get("captions", fields.get("text"))
            if captions is None:
                captions = decode(text, name).split("\n")
            return fields | {"captions": clean_captions(captions, name)}
        except UserError as error:
            raise SampleError(name, str(error)) from None


def split_of_shard(name: str) -> str:
    """The split that a word of a shard's name says ("" for none): `cc-train-0000.tar` is of "train"."""
    splits = {named_split(word, f"{word!r} in the name of shard {name!r}") for word in re.split(r"[-_.]", name)} - {""}
    if len(splits) > 1:
        raise UserError(f"shard {name!r} is named after two splits, {' and '.join(sorted(splits))}; rename it")
    return "".join(splits)


def scan(file: Path, faults: Faults) -> Iterator[tuple[str, list[Span]]]:
    """The key and the spans of KINDS, (0, 0) where there is none, of every usable sample of a shard, from its headers;
    the others go into `faults`.

    Raises UserError for a shard that is cut short or no plain tar.
    """
    samples: dict[str, list[tuple[str, Span]]] = {}
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                archive.members = []  # tarfile would keep every header
                name = PurePosixPath(member.name)
                stem, _, suffix = name.name.partition(".")
                kind = "image" if f".{suffix.lower()}" in SUFFIXES else suffix.lower()
                if stem and kind in KINDS and member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    span = member.offset_data, member.size
                    samples.setdefault(str(name.with_name(stem)), []).append((kind, span))
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"shard {str(file)!r} cannot be read, is cut short or no plain tar: {error}") from None
    # tarfile ends at a broken header without an error
    if read_span(file, archive.offset, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise UserError(f"shard {str(file)!r} is damaged after {archive.offset} bytes; write it again")
    for key, members in samples.items():
        spans = dict(members)
        if key.startswith("/") or ".." in key.split("/"):
            reason = "has an unsafe name; rename it"
        elif len(spans) < len(members):
            reason = "has two members of a kind; keep one"
        elif "image" not in spans or len(spans) == 1:
            reason = f"has no {'caption (.txt or .json)' if 'image' in spans else 'picture'}"
        else:
            yield key, [spans.get(kind, (0, 0)) for kind in KINDS]
            continue
        faults.add(f"{key} in {file.name}", f"sample {key!r} of shard {file.name!r} {reason}")


def read_span(file: Path, offset: int, size: int) -> bytes:
    """A part of a file. Raises UserError where the file is gone or too short."""
    try:
        data = np.fromfile(file, np.uint8, size, offset=offset).tobytes()
    except OSError as error:
        raise UserError(f"shard {str(file)!r} cannot be read: {error.strerror}") from None
    if len(data) < size:
        raise UserError(f"shard {str(file)!r} is cut short; write it again")
    return data
