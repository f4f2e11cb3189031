"""Tar shards in the WebDataset convention, read in place: nothing is unpacked and no picture stays in memory.

A sample is the members of one tar that share a name up to the first dot of its last part: `000012.png` with
`000012.json` (`captions` or `text`, and any other fields) and/or `000012.txt` (one caption per line).
"""

import gzip
import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from ldm.config import UserError
from ldm.data.faults import SHARE, Faults, SampleError, attempt
from ldm.data.splits import check_split, named_split, select
from ldm.data.text import clean_captions, decode, parse_object
from ldm.images import LIMIT, SUFFIXES, ImageError, read_image
from ldm.model_io import read_json, write_json

IMAGES = tuple(suffix[1:] for suffix in SUFFIXES)
KINDS = ("image", "txt", "json")
BLOCK = tarfile.BLOCKSIZE
INDEX = "index.json"
SHARD_BYTES = 64 * 2**20


class Row(NamedTuple):
    """Where a sample lies: `spans[kind]` is the offset and size of the member of that kind, if there is one."""

    file: Path
    key: str
    spans: dict[str, Sequence[int]]

    @property
    def name(self) -> str:
        """The sample's name in error messages and lists."""
        return f"{self.key} in {self.file.name}"

    def fields(self) -> dict[str, Any]:
        """The sample's JSON, with cleaned `captions`. Raises SampleError."""
        data = {kind: read_span(self.file, *self.spans[kind]) for kind in ("json", "txt") if kind in self.spans}
        try:
            fields = parse_object(decode(data["json"], self.name), self.name) if "json" in data else {}
            captions = fields.get("captions", fields.get("text"))
            if captions is None:
                captions = decode(data.get("txt", b""), self.name).split("\n")
            return fields | {"captions": clean_captions(captions, self.name)}
        except UserError as error:
            raise SampleError(self.name, str(error)) from None


class Shards:
    """Samples of one split of a folder of `*.tar` (or of one `.tar`), map-style.

    Shards named after a split, as in `train-0000.tar`, are of that split; samples of other shards have that of their
    JSON's field `split`, or else are split by a hash of their captions, which are read for it. Else opening reads the
    tar headers only, and compares sizes with `index.json` where there is one. `lengths` are the samples of each
    shard, in order, for `EpochBatches(blocks=...)`. Every read opens the shard by itself, so that worker processes and
    threads share nothing.

    Left out and listed in `faults`, up to a share `max_broken`: samples without caption or picture, with double members
    or an unsafe name. Raises UserError beyond that share, for a missing or empty folder or split, and for a shard that
    is cut short, no plain tar, or not the one in the index.
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
        self.stamps = [(stat.st_size, stat.st_mtime_ns) for stat in map(Path.stat, self.files)]
        rows = self._find_rows(split, seed)
        if not rows:
            raise UserError(f"split {split!r} of {str(path)!r} is empty; name shards {split}-000000.tar and so on")
        # Arrays, not Python objects: worker processes share their memory, and a million samples take 100 MB.
        numbers = {file: number for number, file in enumerate(self.files)}
        self._keys = np.array([row.key for row in rows])
        self._shard = np.array([numbers[row.file] for row in rows])
        self._spans = np.array([[row.spans.get(kind, (0, -1)) for kind in KINDS] for row in rows])
        self.lengths = [int(n) for n in np.bincount(self._shard) if n]

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._row(index)
        captions = row.fields()["captions"]
        try:
            image = read_image(read_span(row.file, *row.spans["image"]), self.size, self.limit, row.name)
        except ImageError as error:
            raise SampleError(row.name, f"{error}; remove the sample or write the shard again") from None
        return {"image": image, "captions": captions, "key": row.key}

    def captions(self, index: int) -> list[str]:
        """The captions of sample `index`; its picture is not read. Raises SampleError."""
        return self._row(index).fields()["captions"]

    def identity(self, index: int) -> tuple[str, str]:
        """The key of sample `index`; and its shard with size and time, and where in it the picture lies."""
        row = self._row(index)
        return row.key, f"{row.file.name} {self.stamps[self._shard[index]]} {row.spans['image']} {self.limit}"

    def _row(self, index: int) -> Row:
        spans = {
            kind: tuple(span) for kind, span in zip(KINDS, self._spans[index].tolist(), strict=True) if span[1] >= 0
        }
        return Row(self.files[self._shard[index]], str(self._keys[index]), spans)

    def _find_rows(self, split: str, seed: int) -> list[Row]:
        check_index(self.files)
        rows, unnamed = [], []
        for file in self.files:
            named = split_of_shard(file.name)
            if named in ("", split):
                (rows if named else unnamed).extend(scan(file, self.faults))
        self.faults.settle(len(rows) + len(unnamed) + len(self.faults.reasons))
        read = [(row, fields) for row in unnamed if (fields := attempt(self, Row.fields, row))]
        samples = [(row.name, fields["captions"], fields.get("split")) for row, fields in read]
        rows += [read[i][0] for i in select(samples, split, seed, self.faults)]
        return sorted(rows, key=lambda row: row.file)


def split_of_shard(name: str) -> str:
    """The split that a word of a shard's name says ("" for none): `cc-train-0000.tar` is of "train"."""
    splits = {named_split(word, f"{word!r} in the name of shard {name!r}") for word in re.split(r"[-_.]", name)} - {""}
    if len(splits) > 1:
        raise UserError(f"shard {name!r} is named after two splits, {' and '.join(sorted(splits))}; rename it")
    return "".join(splits)


def check_index(files: list[Path]) -> None:
    """Raises UserError where `index.json` beside the shards is broken, or lists missing shards or other sizes."""
    index = files[0].with_name(INDEX)
    if not index.is_file():
        return
    try:
        sizes = {name: entry["bytes"] for name, entry in read_json(index)["shards"].items()}
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{str(index)!r} is no index of shards; delete it, or write the shards again") from None
    for name in [*sizes, *(file.name for file in files)]:
        file, listed = index.parent / name, sizes.get(name, "nothing")
        size = file.stat().st_size if file.is_file() else "no"
        if size != listed:
            raise UserError(f"shard {name!r} has {size} bytes but {INDEX} says {listed}; write the shards again")


def scan(file: Path, faults: Faults) -> list[Row]:
    """The usable samples of a shard, from its headers; the others go into `faults`.

    Raises UserError for a shard that is cut short or no plain tar.
    """
    rows: dict[str, Row] = {}
    end = 0
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                archive.members = []  # tarfile would keep every header
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    _add(rows, member, file, faults)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"shard {str(file)!r} is cut short or no plain tar: {error}") from None
    if read_span(file, end, BLOCK) != bytes(BLOCK):  # tarfile ends at a broken header without an error
        raise UserError(f"shard {str(file)!r} is damaged after {end} bytes; write it again")
    for row in rows.values():
        if "image" not in row.spans or len(row.spans) == 1:
            missing = "caption (.txt or .json)" if "image" in row.spans else "picture"
            faults.add(row.name, f"sample {row.key!r} of shard {file.name!r} has no {missing}")
    return [row for row in rows.values() if row.name not in faults.reasons]


def _add(rows: dict[str, Row], member: tarfile.TarInfo, file: Path, faults: Faults) -> None:
    name = PurePosixPath(member.name)
    stem, _, suffix = name.name.partition(".")
    kind = "image" if suffix.lower() in IMAGES else suffix.lower()
    if kind not in KINDS or not stem:
        return
    key = str(name.with_name(stem))
    row = rows.setdefault(key, Row(file, key, {}))
    if name.is_absolute() or ".." in name.parts:
        faults.add(row.name, f"shard {file.name!r} has a member with the unsafe name {member.name!r}; rename it")
    elif kind in row.spans:
        faults.add(row.name, f"shard {file.name!r} has two members for the {kind} of {member.name!r}; keep one")
    row.spans[kind] = [member.offset_data, member.size]


def read_span(file: Path, offset: int, size: int) -> bytes:
    """The bytes of a member. Raises UserError, not SampleError, for a shard that is gone or cut short now."""
    try:
        with file.open("rb") as stream:
            stream.seek(offset)
            data = stream.read(size)
    except OSError as error:
        raise UserError(f"shard {str(file)!r} cannot be read: {error.strerror}") from None
    if len(data) != size:
        raise UserError(f"shard {str(file)!r} is cut short; write it again")
    return data


def write_shards(
    samples: Iterable[dict[str, Any]],
    out: str | Path,
    split: str,
    shard_bytes: int = SHARD_BYTES,
    compress: bool = False,
) -> int:
    """Writes `<split>-000000.tar` (.tar.gz with `compress`) and so on into the folder `out`, listed in `index.json`.

    A sample is {"key": str, "image": bytes of an image file, "suffix": one of IMAGES, "captions": list[str], ...};
    every other field must be JSON and goes into the sample's `.json`. The same samples give the same bytes. A shard
    ends before it would exceed `shard_bytes` (one sample always fits). Shards of the split that were there are
    replaced when all new ones are written; other splits stay. Returns the number of samples. Raises UserError for an
    unusable key, suffix or caption, or no samples at all.
    """
    out, index = Path(out), {}
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".part-") as work:
        for number, members in enumerate(_group(samples, shard_bytes)):
            name, data = f"{split}-{number:06d}.tar", _tar(members)
            if compress:
                name, data = f"{name}.gz", gzip.compress(data, 9, mtime=0)
            (Path(work) / name).write_bytes(data)
            digest = hashlib.sha256(data).hexdigest()
            index[name] = {"bytes": len(data), "samples": len(members) // 2, "sha256": digest}
        if not index:
            raise UserError(f"no samples to write for split {split!r}")
        for old in out.glob(f"{split}-*.tar*"):
            old.unlink()
        for name in index:
            os.replace(Path(work) / name, out / name)
    # Last: when this is interrupted, the index does not agree with the shards, and opening them raises an error.
    old = read_json(out / INDEX).get("shards", {}) if (out / INDEX).is_file() else {}
    others = {name: entry for name, entry in old.items() if not name.startswith(f"{split}-")}
    write_json(out / INDEX, {"shards": dict(sorted((others | index).items()))})
    return sum(entry["samples"] for entry in index.values())


def _group(samples: Iterable[dict[str, Any]], shard_bytes: int) -> Iterator[list[tuple[str, bytes]]]:
    """The members of each shard: two per sample, its picture and its JSON."""
    keys: set[str] = set()
    shard, size = [], 0
    # Records of 20 blocks fill a tar up, and two empty blocks end it.
    capacity = shard_bytes // tarfile.RECORDSIZE * tarfile.RECORDSIZE - 2 * BLOCK
    for sample in samples:
        key, suffix = sample["key"], sample["suffix"]
        if not re.fullmatch(r"[A-Za-z0-9_+-]{1,90}", key) or key in keys:
            raise UserError(f"sample key {key!r} must be 1 to 90 of A-Z a-z 0-9 _ + -, and of one sample only")
        if suffix not in IMAGES:
            raise UserError(f"sample {key!r} has the suffix {suffix!r}; allowed: {', '.join(IMAGES)}")
        keys.add(key)
        fields = {name: value for name, value in sample.items() if name not in ("key", "image", "suffix")}
        fields["captions"] = clean_captions(sample["captions"], f"sample {key!r}")
        text = json.dumps(fields, sort_keys=True, ensure_ascii=False)
        members = [(f"{key}.{suffix}", sample["image"]), (f"{key}.json", text.encode("utf-8", "replace"))]
        length = sum(BLOCK - (-len(data) // BLOCK) * BLOCK for _, data in members)
        if shard and size + length > capacity:
            yield shard
            shard, size = [], 0
        shard += members
        size += length
    if shard:
        yield shard


def _tar(members: list[tuple[str, bytes]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)  # time, owner and group are 0: bytes depend on the samples alone
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()
