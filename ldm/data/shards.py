"""Tar shards in the WebDataset convention, read in place: nothing is unpacked and no picture stays in memory.

A sample is the members of one tar that share a name up to the first dot of its last part: `000012.png` with
`000012.json` (`captions` or `text`, and any other fields) and/or `000012.txt` (a caption a line).
"""

import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ldm.config import UserError
from ldm.data.captions import captions_of, decode, lines_of, parse_object
from ldm.data.faults import SHARE, Faults, SampleError, Tolerant
from ldm.data.splits import SPLITS, assign, caption_group
from ldm.data.tar import (
    BLOCK,
    IMAGES,
    INDEX,
    LARGEST,
    ShardError,
    Span,
    find_samples,
    find_shards,
    read_index,
    read_span,
    sha256,
)
from ldm.images import LIMIT, ImageError, read_image

SHARD_BYTES = 64 * 2**20
Row = tuple[int, str, dict[str, Span]]  # number of the shard, key, where the members lie


class Shards(Tolerant):
    """Samples of one split of a folder of `*.tar` (or of one `.tar`), map-style.

    `shards[i]` -> {"image": uint8 (3, size, size), "captions": list[str], "key": str}; `record(i)` has what
    else the sample's JSON holds. Shards named `train-*`, `val-*` or `test-*` are of that split; samples of
    other shards are split by a hash of their captions (`splits.assign`), which are read for it. Else opening
    reads the tar headers only, and checks each shard against `index.json` where there is one. `lengths` are
    the samples of each shard, in order, for `EpochBatches(blocks=...)`. Every read opens the shard by
    itself, so that worker processes and threads share nothing. Left out and noted in `faults`, up to a share
    `max_broken`: samples without caption or picture, with unsafe, double or oversized members or with a key that was
    there before, what is missing of a shard that is shorter than the index says, and (on reading) a picture or
    captions that cannot be read. UserError beyond that share, and for a missing or empty folder, an empty split, a
    shard that differs from the index otherwise, or is cut short where there is no index to tell how much is missing.
    """

    def __init__(
        self,
        path: str | Path,
        size: int,
        split: str = "train",
        seed: int = 0,
        val: float = 0.02,
        test: float = 0.08,
        limit: int = LIMIT,
        max_broken: float = SHARE,
    ) -> None:
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}; allowed: {', '.join(SPLITS)}")
        self.size, self.limit = size, limit
        self.faults = Faults(max_broken)
        self.files = find_shards(path)
        rows = self._find(split, seed, val, test)
        if not rows:
            raise UserError(
                f"split {split!r} of {str(path)!r} is empty; name shards {split}-000000.tar and so on,"
                " or give unnamed shards more samples or a larger share"
            )
        # Arrays, not Python objects: worker processes share their memory, and a million samples take 100 MB.
        self._keys = np.array([key for _, key, _ in rows])
        self._shard = np.array([number for number, _, _ in rows])
        self._spans = {
            kind: np.array([spans.get(kind, Span()) for _, _, spans in rows], dtype=np.int64) for kind in LARGEST
        }
        self.lengths = [int(n) for n in np.bincount(self._shard, minlength=len(self.files)) if n]

    def __len__(self) -> int:
        return len(self._keys)

    def read(self, index: int) -> dict[str, Any]:
        """Sample `index` itself (SampleError)."""
        number, key, spans = self._row(index)
        file = self.files[number]
        captions = self.read_captions(index)
        try:
            image = read_image(
                read_span(file, spans["image"]), self.size, self.limit, name=f"{key} in shard {file.name}"
            )
        except ImageError as error:
            raise SampleError(f"{key} in {file.name}", f"{error}; remove the sample or write the shard again") from None
        return {"image": image, "captions": captions, "key": key}

    def read_captions(self, index: int) -> list[str]:
        """The captions of sample `index` itself (SampleError)."""
        number, key, spans = self._row(index)
        try:
            return self._captions(number, key, spans)
        except ShardError:
            raise
        except UserError as error:
            raise SampleError(f"{key} in {self.files[number].name}", str(error)) from None

    def record(self, index: int) -> dict[str, Any]:
        """All fields of the sample's JSON, its "key" and its cleaned "captions"; the picture is not read."""
        number, key, spans = self._row(index)
        return {**self._json(number, key, spans), "captions": self.read_captions(index), "key": key}

    def _find(self, split: str, seed: int, val: float, test: float) -> list[Row]:
        index = read_index(self.files[0].parent)
        rows: list[Row] = []
        unnamed: list[Row] = []
        keys: dict[str, int] = {}  # and the shard that had each first
        total = 0
        for number, file in enumerate(self.files):
            named = re.match(r"(train|val|test)(?=[-_.])", file.name)
            if named and named[1] != split:
                continue
            samples, count = find_samples(file, index, self.faults)
            total += count
            for key, spans in samples.items():
                if keys.setdefault(key, number) == number:
                    (rows if named else unnamed).append((number, key, spans))
                else:
                    first, second = self.files[keys[key]].name, file.name
                    text = f"sample {key!r} is in shard {first!r} and again in {second!r}; keys must differ"
                    self.faults.add(f"{key} in {second}", text)
        self.faults.settle(total)
        unnamed, groups = self._grouped(unnamed)
        splits = assign(groups, seed, val, test)
        rows += [row for row, name in zip(unnamed, splits, strict=True) if name == split]
        return sorted(rows, key=lambda row: row[0])

    def _grouped(self, rows: list[Row]) -> tuple[list[Row], list[str]]:
        """The rows whose captions can be read, and the group of each for the split."""
        kept, groups = [], []
        for row in rows:
            try:
                groups.append(caption_group(self._captions(*row)))
                kept.append(row)
            except ShardError:
                raise
            except UserError as error:
                self.faults.add(f"{row[1]} in {self.files[row[0]].name}", str(error))
        return kept, groups

    def _row(self, index: int) -> Row:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        spans = {kind: Span(*map(int, table[index])) for kind, table in self._spans.items()}
        return int(self._shard[index]), str(self._keys[index]), spans

    def _json(self, number: int, key: str, spans: dict[str, Span]) -> dict[str, Any]:
        if spans.get("json", Span()).size < 0:
            return {}
        file = self.files[number]
        where = f"{key}.json in shard {file.name}"
        return parse_object(decode(read_span(file, spans["json"]), where), where)

    def _captions(self, number: int, key: str, spans: dict[str, Span]) -> list[str]:
        fields, file = self._json(number, key, spans), self.files[number]
        for name in ("captions", "text"):
            if name in fields:
                return captions_of(fields[name], f"{key}.json in shard {file.name}")
        where = f"{key}.txt in shard {file.name}"
        if spans.get("txt", Span()).size < 0:
            raise UserError(f"{key}.json in shard {file.name} has no 'captions' or 'text', and there is no {where}")
        return lines_of(decode(read_span(file, spans["txt"]), where), where)


def write_shards(samples: Iterable[dict[str, Any]], out: str | Path, split: str, shard_bytes: int = SHARD_BYTES) -> int:
    """Writes `<split>-000000.tar` and so on into the folder `out`, with counts and hashes in `index.json`.

    A sample is {"key": str, "image": bytes of an image file, "suffix": "png" | "jpg" | "jpeg" | "webp",
    "captions": list[str], ...}; every other field must be JSON and comes back from `Shards.record`. The same
    samples give the same bytes. A shard ends before it would exceed `shard_bytes` (one sample always fits).
    Shards of the split that were there are replaced when all new ones are whole; other splits stay. Gives the
    number of samples; UserError for an unusable key, suffix or caption, or no samples at all.
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
    seen: set[str] = set()
    archive, name = None, ""
    for sample in samples:
        members = _members(sample, seen)
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


def _members(sample: dict[str, Any], seen: set[str]) -> list[tuple[str, bytes]]:
    key, suffix = sample["key"], sample["suffix"]
    if not re.fullmatch(r"[A-Za-z0-9_+-]{1,90}", key):
        raise UserError(f"sample key {key!r} must be 1 to 90 of A-Z a-z 0-9 _ + -")
    if suffix not in IMAGES:
        raise UserError(f"sample {key!r} has the suffix {suffix!r}; allowed: {', '.join(IMAGES)}")
    if key in seen:
        raise UserError(f"two samples have the key {key!r}; keys must differ")
    seen.add(key)
    fields = {name: value for name, value in sample.items() if name not in ("key", "image", "suffix")}
    fields["captions"] = captions_of(sample["captions"], f"sample {key!r}")
    text = json.dumps(fields, sort_keys=True, ensure_ascii=False)
    return [(f"{key}.{suffix}", sample["image"]), (f"{key}.json", text.encode("utf-8", "replace"))]


def _publish(counts: dict[str, int], work: Path, out: Path, split: str) -> None:
    # The index goes last: what is broken off in between does not agree with it, and opening it says so.
    table = {}
    if (out / INDEX).is_file():
        listed = parse_object(decode((out / INDEX).read_bytes(), INDEX), INDEX).get("shards", {})
        table = {name: entry for name, entry in listed.items() if not name.startswith(f"{split}-")}
    for name, count in counts.items():
        file = work / name
        table[name] = {"samples": count, "bytes": file.stat().st_size, "sha256": sha256(file)}
    for old in out.glob(f"{split}-*.tar"):
        if old.name not in counts:
            old.unlink()
    for name in counts:
        os.replace(work / name, out / name)
    part = work / INDEX
    part.write_text(json.dumps({"shards": table}, indent=1, sort_keys=True) + "\n")
    os.replace(part, out / INDEX)
