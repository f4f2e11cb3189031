"""Tar shards in the WebDataset convention, read in place: nothing is unpacked and no picture stays in memory.

A sample is the members of one tar that share a name up to the first dot of its last part: `000012.png` with
`000012.json` (`captions` or `text`, and any other fields) and/or `000012.txt` (one caption per line).
"""

import gzip
import io
import itertools
import json
import re
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ldm.config import UserError
from ldm.data.faults import SHARE, Faults, SampleError, attempt
from ldm.data.splits import check_split, named_split, select
from ldm.data.text import clean_captions, decode, parse_object
from ldm.images import LIMIT, SUFFIXES, ImageError, read_image

KINDS = ("image", "txt", "json")  # of the members of a sample
BLOCK = tarfile.BLOCKSIZE
Span = tuple[int, int]  # offset and size of a member in its shard


class Shards:
    """Samples of one split of a folder of `*.tar` (or of one `.tar`), map-style.

    Shards named after a split, as in `train-0000.tar`, are of that split; samples of other shards have that of their
    JSON's field `split`, or else are split by a hash of their captions, which are read for it. Else opening reads the
    tar headers only. `lengths` are the samples of each shard, in order, for `EpochBatches(blocks=...)`. Every read
    opens the shard by itself, so that worker processes and threads share nothing.

    Left out and listed in `faults`, up to a share `max_broken`: samples without caption or picture, with double members
    or an unsafe name. Raises UserError beyond that share, for a missing or empty folder or split, and for a shard that
    is cut short or no plain tar.
    """

    def __init__(
        self,
        path: str | Path,
        size: int,
        split: str = "train",
        seed: int = 0,
        limit: int = LIMIT,
        max_broken: float = SHARE,
    ) -> None:
        check_split(split)
        self.size, self.limit, self.faults = size, limit, Faults(max_broken)
        self.files = [Path(path)] if Path(path).is_file() else sorted(Path(path).glob("*.tar"))
        if not self.files:
            raise UserError(f"shard folder {str(path)!r} {'has no *.tar' if Path(path).exists() else 'does not exist'}")
        try:
            self.stamps = [(stat.st_size, stat.st_mtime_ns) for stat in map(Path.stat, self.files)]
        except OSError as error:  # of a link to nothing
            raise UserError(f"shard {str(error.filename)!r} cannot be read: {error.strerror}") from None
        self.table = self._find_rows(split, seed)
        if not len(self.table):
            raise UserError(f"split {split!r} of {str(path)!r} is empty; name shards {split}-000000.tar and so on")
        self.lengths = [int(n) for n in np.bincount(self.table["shard"]) if n]

    def _find_rows(self, split: str, seed: int) -> np.ndarray:
        """The samples of a split: `shard`, `key`, and the (offset, size) of the member of each of KINDS, size -1 where
        there is none. An array, whose memory worker processes share: a million samples take 100 MB."""
        rows, unnamed = [], []
        for number, file in enumerate(self.files):
            if (named := split_of_shard(file.name)) in ("", split):
                for key, spans in scan(file, self.faults):
                    (rows if named else unnamed).append((number, key, *spans))
        rows, first = rows + unnamed, len(rows)
        self.faults.settle(len(rows) + len(self.faults.reasons))
        longest = max((len(key) for _, key, *_ in rows), default=1)
        table = np.array(rows, [("shard", int), ("key", f"U{longest}"), *((kind, int, 2) for kind in KINDS)])
        read = [(i, fields) for i in range(first, len(rows)) if (fields := attempt(self, self._fields, table[i]))]
        samples = [(self._name(table[i]), fields["captions"], fields.get("split")) for i, fields in read]
        chosen = [read[i][0] for i in select(samples, split, seed, self.faults)]
        table = table[[*range(first), *chosen]]
        return table[table["shard"].argsort(kind="stable")]

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.table[index]
        captions, name = self._fields(row)["captions"], self._name(row)
        try:
            image = read_image(self._read(row, "image"), self.size, self.limit, name)
        except ImageError as error:
            raise SampleError(name, f"{error}; remove the sample or write the shard again") from None
        return {"image": image, "captions": captions, "key": str(row["key"])}

    def captions(self, index: int) -> list[str]:
        """The captions of sample `index`; its picture is not read. Raises SampleError."""
        return self._fields(self.table[index])["captions"]

    def identity(self, index: int) -> tuple[str, str]:
        """The key of sample `index`; and its shard with size and time, and where in it the picture lies."""
        shard, key, image, *_ = self.table[index]
        return str(key), f"{self.files[shard].name} {self.stamps[shard]} {tuple(image.tolist())} {self.limit}"

    def _name(self, row: np.void) -> str:
        return f"{row['key']} in {self.files[row['shard']].name}"

    def _read(self, row: np.void, kind: str) -> bytes:
        return read_span(self.files[row["shard"]], *row[kind].tolist())

    def _fields(self, row: np.void) -> dict[str, Any]:
        """The sample's JSON, with cleaned `captions`. Raises SampleError."""
        name, table, text = self._name(row), self._read(row, "json"), self._read(row, "txt")
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


def scan(file: Path, faults: Faults) -> list[tuple[str, list[Span]]]:
    """(key, spans of KINDS) of the usable samples of a shard, from its headers; the others go into `faults`.

    Raises UserError for a shard that is cut short or no plain tar.
    """
    samples: dict[str, list[tuple[str, Span]]] = {}
    end = 0
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                archive.members = []  # tarfile would keep every header
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                name = PurePosixPath(member.name)
                stem, _, suffix = name.name.partition(".")
                kind = "image" if f".{suffix.lower()}" in SUFFIXES else suffix.lower()
                if stem and kind in KINDS and member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    span = member.offset_data, member.size
                    samples.setdefault(str(name.with_name(stem)), []).append((kind, span))
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"shard {str(file)!r} is cut short or no plain tar: {error}") from None
    if read_span(file, end, BLOCK) != bytes(BLOCK):  # tarfile ends at a broken header without an error
        raise UserError(f"shard {str(file)!r} is damaged after {end} bytes; write it again")
    rows = []
    for key, members in samples.items():
        spans = dict(members)
        if key.startswith("/") or ".." in key.split("/"):
            reason = "has an unsafe name; rename it"
        elif len(spans) < len(members):
            reason = "has two members of a kind; keep one"
        elif "image" not in spans or len(spans) == 1:
            reason = f"has no {'caption (.txt or .json)' if 'image' in spans else 'picture'}"
        else:
            rows.append((key, [spans.get(kind, (0, -1)) for kind in KINDS]))
            continue
        faults.add(f"{key} in {file.name}", f"sample {key!r} of shard {file.name!r} {reason}")
    return rows


def read_span(file: Path, offset: int, size: int) -> bytes:
    """A part of a file, empty where `size` is -1. Raises UserError where the file is gone or too short."""
    try:
        with file.open("rb") as stream:
            stream.seek(offset)
            data = stream.read(max(size, 0))
    except OSError as error:
        raise UserError(f"shard {str(file)!r} cannot be read: {error.strerror}") from None
    if len(data) < size:
        raise UserError(f"shard {str(file)!r} is cut short; write it again")
    return data


def write_shards(
    samples: Iterable[dict[str, Any]], out: Path, split: str, per_shard: int = 10_000, compress: bool = False
) -> int:
    """Writes `<split>-000000.tar` (.tar.gz with `compress`) and so on into the folder `out`.

    A sample is {"key": str without dots, "image": bytes of an image file, "suffix": of its name, "captions": list[str],
    ...}; every other field must be JSON and goes into the sample's `.json`. The same samples give the same bytes.
    Shards of the split that were there are replaced when all new ones are written; other splits stay. Returns the
    number of samples.
    """
    out.mkdir(parents=True, exist_ok=True)
    samples, count = iter(samples), 0
    with tempfile.TemporaryDirectory(dir=out, prefix=".part-") as work:
        while members := list(itertools.islice(samples, per_shard)):
            name, data = f"{split}-{count // per_shard:06d}.tar", _tar(members)
            if compress:
                name, data = f"{name}.gz", gzip.compress(data, 9, mtime=0)
            Path(work, name).write_bytes(data)
            count += len(members)
        for old in out.glob(f"{split}-*.tar*"):
            old.unlink()
        for file in Path(work).iterdir():
            file.rename(out / file.name)
    return count


def _tar(samples: list[dict[str, Any]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for sample in samples:
            fields = {name: value for name, value in sample.items() if name not in ("key", "image", "suffix")}
            text = json.dumps(fields, sort_keys=True, ensure_ascii=False).encode()
            for suffix, data in ((sample["suffix"], sample["image"]), ("json", text)):
                info = tarfile.TarInfo(f"{sample['key']}.{suffix}")  # of no time or owner, so that bytes are the same
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()
