"""Tar shards in the WebDataset convention, read in place: nothing is unpacked and no picture stays in memory.

A sample is the members of one tar that share a name up to the first dot of its last part: `000012.png` with
`000012.json` (`captions` or `text`, and any other fields) and/or `000012.txt` (one caption per line).
"""

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from ldm.config import UserError
from ldm.data.faults import SHARE, Faults, SampleError
from ldm.data.splits import caption_group, check_split, named_split, split_all
from ldm.data.text import clean_captions, decode, parse_object, read_text
from ldm.images import LIMIT, SUFFIXES, ImageError, read_image

IMAGES = tuple(suffix[1:] for suffix in SUFFIXES)
KINDS = {**dict.fromkeys(IMAGES, "image"), "txt": "txt", "json": "json"}
LARGEST = {"image": 2**28, "txt": 2**24, "json": 2**24}  # bytes of one member; checked before it is read
BLOCK = tarfile.BLOCKSIZE
INDEX = "index.json"
SHARD_BYTES = 64 * 2**20


class ShardError(UserError):
    """A shard that has become shorter, is gone or cannot be read now: no fault of one sample."""


class Span(NamedTuple):
    """Where the bytes of a member lie in its shard; size -1 where the sample has no such member."""

    offset: int = 0
    size: int = -1


class Row(NamedTuple):
    """Where a sample lies."""

    file: Path
    key: str
    spans: dict[str, Span]  # image, txt, json

    @property
    def name(self) -> str:
        """How faults call it."""
        return f"{self.key} in {self.file.name}"

    def read(self, kind: str) -> bytes:
        """The bytes of a member. Raises ShardError."""
        return read_span(self.file, self.spans[kind])

    def fields(self) -> dict[str, Any]:
        """The sample's JSON, with `captions` cleaned. Raises SampleError."""
        json_name, text_name = (f"{self.key}.{kind} in shard {self.file.name}" for kind in ("json", "txt"))
        try:
            fields = parse_object(decode(self.read("json"), json_name), json_name) if "json" in self.spans else {}
            captions = fields.get("captions", fields.get("text"))
            if captions is not None:
                return fields | {"captions": clean_captions(captions, json_name)}
            if "txt" not in self.spans:
                raise UserError(f"{json_name} has no 'captions' or 'text', and there is no {text_name}")
            return fields | {"captions": clean_captions(decode(self.read("txt"), text_name).split("\n"), text_name)}
        except ShardError:
            raise
        except UserError as error:
            raise SampleError(self.name, str(error)) from None


class Shards:
    """Samples of one split of a folder of `*.tar` (or of one `.tar`), map-style.

    Shards named after a split, as in `train-0000.tar`, are of that split; samples of other shards have that of their
    JSON's field `split`, or else are split by a hash of their captions, which are read for it. Else opening reads the
    tar headers only, and checks each shard against `index.json` where there is one. `lengths` are the samples of each
    shard, in order, for `EpochBatches(blocks=...)`. Every read opens the shard by itself, so that worker processes and
    threads share nothing.

    Left out and listed in `faults`, up to a share `max_broken`: samples without caption or picture, with unsafe, double
    or oversized members or with a key that was there before, and those missing from a shard that is shorter than the
    index says. Raises UserError beyond that share, for a missing or empty folder or split, and for a shard that differs
    from the index otherwise, or is cut short where no index tells how much is missing.
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
        self.files = find_shards(path)
        self.stamps = [(stat.st_size, stat.st_mtime_ns) for stat in map(Path.stat, self.files)]
        rows = self._find(split, seed)
        if not rows:
            raise UserError(
                f"split {split!r} of {str(path)!r} is empty; name shards {split}-000000.tar and so on,"
                " or give unnamed shards more samples"
            )
        # Arrays, not Python objects: worker processes share their memory, and a million samples take 100 MB.
        self._keys = np.array([row.key for row in rows])
        numbers = {file: number for number, file in enumerate(self.files)}
        self._shard = np.array([numbers[row.file] for row in rows])
        self._spans = {kind: np.array([row.spans.get(kind, Span()) for row in rows], np.int64) for kind in LARGEST}
        self.lengths = [int(n) for n in np.bincount(self._shard) if n]

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._row(index)
        captions = row.fields()["captions"]
        try:
            image = read_image(row.read("image"), self.size, self.limit, f"{row.key} in shard {row.file.name}")
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
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        spans = {kind: Span(*map(int, table[index])) for kind, table in self._spans.items() if table[index][1] >= 0}
        return Row(self.files[self._shard[index]], str(self._keys[index]), spans)

    def _find(self, split: str, seed: int) -> list[Row]:
        index = read_index(self.files[0].parent)
        rows, unnamed, total = [], [], 0
        first: dict[str, Path] = {}  # the shard that had each key first
        for file in self.files:
            named = split_of_shard(file.name)
            if named not in ("", split):
                continue
            samples, count = find_samples(file, index, self.faults)
            total += count
            for row in samples:
                if first.setdefault(row.key, file) == file:
                    (rows if named else unnamed).append(row)
                else:
                    shards = f"in shard {first[row.key].name!r} and again in {file.name!r}"
                    self.faults.add(row.name, f"sample {row.key!r} is {shards}; keys must differ")
        self.faults.settle(total)
        return sorted(rows + self._of_split(unnamed, split, seed), key=lambda row: row.file)

    def _of_split(self, rows: list[Row], split: str, seed: int) -> list[Row]:
        """The rows of a split, of shards that are not named after one."""
        usable, named, groups = [], [], []
        for row in rows:
            try:
                fields = row.fields()
            except SampleError as error:
                self.faults.add(error.name, str(error))
                continue
            usable.append(row)
            named.append(fields.get("split"))
            groups.append(caption_group(fields["captions"]))
        splits = split_all(named, groups, [row.name for row in usable], seed, self.faults)
        return [row for row, name in zip(usable, splits, strict=True) if name == split]


def find_shards(path: str | Path) -> list[Path]:
    """The `*.tar` of a folder in order of name, or one `.tar` itself. Raises UserError when there is none."""
    path = Path(path)
    files = [path] if path.is_file() and path.suffix == ".tar" else sorted(path.glob("*.tar"))
    if not path.exists():
        raise UserError(f"shard folder {str(path)!r} does not exist")
    if not files:
        raise UserError(f"no *.tar shards in {str(path)!r}; scripts/prepare_data.py writes them")
    return files


def split_of_shard(name: str) -> str:
    """The split that a word of a shard's name says ("" for none): `cc-train-0000.tar` is of "train"."""
    splits = {named_split(word, f"{word!r} in the name of shard {name!r}") for word in re.split(r"[-_.]", name)} - {""}
    if len(splits) > 1:
        raise UserError(f"shard {name!r} is named after two splits, {' and '.join(sorted(splits))}; rename it")
    return "".join(splits)


def read_index(folder: Path) -> dict[str, dict[str, Any]]:
    """`index.json` of a folder of shards: {name: {"samples", "bytes", "sha256"}}; {} where there is none.

    Raises UserError when it is broken, or lists a shard that is not in the folder.
    """
    file = folder / INDEX
    if not file.is_file():
        return {}
    table = parse_object(read_text(file), repr(str(file))).get("shards")
    try:  # of a sample, each of two members is a header and a block or more
        sound = all(0 <= e["samples"] <= e["bytes"] // (2 * BLOCK) and e["sha256"] for e in table.values())
    except (AttributeError, KeyError, TypeError):
        sound = False
    if not sound:
        raise UserError(f"{str(file)!r} is no index of shards; delete it, or write the shards again")
    for name in table:
        if PurePosixPath(name).name != name or not (folder / name).is_file():
            raise UserError(f"shard {name!r}, listed in {str(file)!r}, is missing; write the shards again")
    return table


def find_samples(file: Path, index: dict[str, dict[str, Any]], faults: Faults) -> tuple[list[Row], int]:
    """The usable samples of a shard, and how many it should have.

    The others, and those missing from a shard shorter than the index says, go into `faults`. Raises UserError for a
    shard that is not in the index, has changed otherwise, or is cut short with no index to tell.
    """
    if index and file.name not in index:
        raise UserError(f"shard {file.name!r} is not in {INDEX} beside it; remove one of the two")
    samples, damage = scan(file, faults)
    count = expected = len(samples)
    if index:
        expected, size, have = index[file.name]["samples"], index[file.name]["bytes"], file.stat().st_size
        if have != size:
            damage = f"shard {file.name!r} has {have} bytes but {INDEX} says {size}; write it again"
    text = damage or f"shard {file.name!r} has {count} samples but {INDEX} says {expected}; write it again"
    if count > expected or count == expected and damage:
        raise UserError(text)
    for number in range(count, expected):
        faults.add(f"{file.name} sample {number + 1}", text)
    return [row for row in samples if row.name not in faults.reasons], expected


def scan(file: Path, faults: Faults) -> tuple[list[Row], str]:
    """The samples of a shard, from its headers, and why it ends before its end ("" for a whole one).

    Unsafe names, double or oversized members, and a picture without a caption or the other way round go into `faults`.
    """
    rows: dict[str, Row] = {}
    end, size = 0, file.stat().st_size
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                archive.members = []  # tarfile would keep every header
                if end <= size and member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    _add(rows, member, file, faults)
    except (tarfile.TarError, OSError, ValueError) as error:
        damage = f"shard {str(file)!r} is cut short or no plain tar: {error}"
    else:  # tarfile stops at a broken header without a word
        cut = end + BLOCK > size or read_span(file, Span(end, BLOCK)) != bytes(BLOCK)
        damage = f"shard {str(file)!r} is cut short or damaged after {end} bytes; write it again" if cut else ""
    for key, row in list(rows.items()):
        if "image" not in row.spans or len(row.spans) < 2:
            if damage and key == next(reversed(rows)):
                del rows[key]  # the cut went through it
            else:
                missing = "no caption (.txt or .json)" if "image" in row.spans else "no picture"
                faults.add(row.name, f"shard {file.name!r}: sample {key!r} has {missing}")
    return list(rows.values()), damage


def _add(rows: dict[str, Row], member: tarfile.TarInfo, file: Path, faults: Faults) -> None:
    name = PurePosixPath(member.name)
    stem, _, suffix = name.name.partition(".")
    kind = KINDS.get(suffix.lower())
    if kind is None or not stem:
        return
    key = str(name.with_name(stem))
    row = rows.setdefault(key, Row(file, key, {}))
    if name.is_absolute() or ".." in name.parts or len(member.name) > 255:
        faults.add(row.name, f"shard {file.name!r} has a member with the unsafe name {member.name[:80]!r}; rename it")
    elif member.size > LARGEST[kind]:
        text = f"member {member.name!r} of shard {file.name!r} has {member.size} bytes; at most {LARGEST[kind]}"
        faults.add(row.name, text)
    elif kind in row.spans:
        faults.add(row.name, f"shard {file.name!r} has two members for the {kind} of {member.name!r}; keep one")
    row.spans[kind] = Span(member.offset_data, member.size)


def read_span(file: Path, span: Span) -> bytes:
    """The bytes of a member. Raises ShardError."""
    try:
        with file.open("rb") as stream:
            stream.seek(span.offset)
            data = stream.read(span.size)
    except OSError as error:
        raise ShardError(f"shard {str(file)!r} cannot be read: {error.strerror}") from None
    if len(data) != span.size:
        raise ShardError(f"shard {str(file)!r} is cut short at {span.offset + len(data)} bytes; write it again")
    return data


def write_shards(samples: Iterable[dict[str, Any]], out: str | Path, split: str, shard_bytes: int = SHARD_BYTES) -> int:
    """Writes `<split>-000000.tar` and so on into the folder `out`, with counts and hashes in `index.json`.

    A sample is {"key": str, "image": bytes of an image file, "suffix": one of IMAGES, "captions": list[str], ...};
    every other field must be JSON and goes into the sample's `.json`. The same samples give the same bytes. A shard
    ends before it would exceed `shard_bytes` (one sample always fits). Shards of the split that were there are
    replaced when all new ones are whole; other splits stay. Returns the number of samples. Raises UserError for an
    unusable key, suffix or caption, or no samples at all.
    """
    out = Path(out)
    work = out / f".{split}.part"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        counts = _write_tars(samples, work, split, shard_bytes)
        _publish(counts, work, out, split)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return sum(counts.values())


def _write_tars(samples: Iterable[dict[str, Any]], work: Path, split: str, bound: int) -> dict[str, int]:
    counts: dict[str, int] = {}
    keys: set[str] = set()
    archive, name = None, ""
    for sample in samples:
        members = _members(sample, keys)
        size = sum(BLOCK - (-len(data) // BLOCK) * BLOCK for _, data in members) + 2 * BLOCK
        if archive is None or archive.offset + size + -(archive.offset + size) % tarfile.RECORDSIZE > bound:
            if archive is not None:
                archive.close()
            name = f"{split}-{len(counts):06d}.tar"
            archive = tarfile.open(work / name, "w")  # noqa: SIM115 - closed above and below
            counts[name] = 0
        for member, data in members:
            info = tarfile.TarInfo(member)  # time, owner and group are 0: bytes depend on the samples alone
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        counts[name] += 1
    if archive is None:
        raise UserError(f"no samples to write for split {split!r}")
    archive.close()
    return counts


def _members(sample: dict[str, Any], keys: set[str]) -> list[tuple[str, bytes]]:
    key, suffix = sample["key"], sample["suffix"]
    if not re.fullmatch(r"[A-Za-z0-9_+-]{1,90}", key):
        raise UserError(f"sample key {key!r} must be 1 to 90 of A-Z a-z 0-9 _ + -")
    if suffix not in IMAGES:
        raise UserError(f"sample {key!r} has the suffix {suffix!r}; allowed: {', '.join(IMAGES)}")
    if key in keys:
        raise UserError(f"two samples have the key {key!r}; keys must differ")
    keys.add(key)
    fields = {name: value for name, value in sample.items() if name not in ("key", "image", "suffix")}
    fields["captions"] = clean_captions(sample["captions"], f"sample {key!r}")
    text = json.dumps(fields, sort_keys=True, ensure_ascii=False)
    return [(f"{key}.{suffix}", sample["image"]), (f"{key}.json", text.encode("utf-8", "replace"))]


def _publish(counts: dict[str, int], work: Path, out: Path, split: str) -> None:
    # The index goes last: when this is interrupted, it does not agree with the shards, and opening them says so.
    table = {}
    if (out / INDEX).is_file():
        listed = parse_object(read_text(out / INDEX), INDEX).get("shards", {})
        table = {name: entry for name, entry in listed.items() if not name.startswith(f"{split}-")}
    for name, count in counts.items():
        with (work / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        table[name] = {"samples": count, "bytes": (work / name).stat().st_size, "sha256": digest}
    for old in out.glob(f"{split}-*.tar"):
        if old.name not in counts:
            old.unlink()
    for name in counts:
        os.replace(work / name, out / name)
    part = work / INDEX
    part.write_text(json.dumps({"shards": table}, indent=1, sort_keys=True) + "\n")
    os.replace(part, out / INDEX)
