"""Tar shards in the WebDataset convention, read in place: nothing is unpacked and no picture stays in memory.

A sample is the members of one tar that share a name up to the first dot of its last part: `000012.png` with
`000012.json` (`captions` or `text`, and any other fields) and/or `000012.txt` (one caption per line).
"""

import hashlib
import json
import re
import tarfile
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ldm.config import UserError
from ldm.data.config import DataConfig
from ldm.data.faults import Faults, SampleError, attempt, read_picture
from ldm.data.order import WINDOW
from ldm.data.remote import File, find_files, is_url, open_file, share
from ldm.data.splits import Samples, named_split, select
from ldm.data.text import clean_captions, decode
from ldm.images import SUFFIXES
from ldm.model_io import atomic_write, cache_folder, parse_object

KINDS = ("image", "txt", "json")  # of the members of a sample


class Shards:
    """Samples of one split of tar shards, map-style: of a folder of `*.tar`, or of what else `find_files` takes.

    Shards named after a split, as in `train-0000.tar`, are of that split; samples of other shards have that of their
    JSON's field `split`, or else are split by a hash of their captions, which are read for it. Else opening reads the
    tar headers only. The processes of a run, which must all open it, share that work. `lengths` are the samples of each
    shard, in order, for `EpochBatches(blocks=...)`, and `names` those shards. Every read opens the shard by itself, so
    that worker processes and threads share nothing.

    Left out and listed in `faults`, up to the share `max_broken`: samples without caption or picture, with double
    members or an unsafe name. Raises UserError beyond that share, for a missing or empty folder, and for a shard that
    is out of reach, cut short or no plain tar.
    """

    def __init__(self, config: DataConfig, split: str) -> None:
        self.config, self.size, self.faults = config, config.size, Faults(config.max_broken)
        if not (urls := find_files(config.path, "tar")):
            exists = is_url(config.path) or Path(config.path).exists()
            raise UserError(f"shard folder {config.path!r} {'has no *.tar' if exists else 'does not exist'}")
        names = [PurePosixPath(url.partition("?")[0]).name for url in urls]
        named = [split_of_shard(name) for name in names]
        names = names if len({*names}) == len(names) else urls  # of several folders
        items = [item for item in zip(urls, names, named, strict=True) if item[2] in ("", split)]
        indices = share(partial(index_shard, int(config.cache_gb * 1e9)), items, "indexing")
        for fault in (fault for each in indices for fault in each.faults.items()):
            self.faults.add(*fault)
        self.faults.settle(sum(len(each.samples) for each in indices) + len(self.faults.reasons))
        fields = {name: row for each in indices for name, row in each.fields.items()}
        chosen = {*select(fields, split, config.seed, self.faults)}
        tables = [
            each.samples[[*map(chosen.__contains__, each.fields)]] if each.fields else each.samples for each in indices
        ]
        kept = [(each, table) for each, table in zip(indices, tables, strict=True) if len(table)]
        self.files, self.names = [each.file for each, _ in kept], [each.name for each, _ in kept]
        self.lengths = [len(table) for _, table in kept]
        # Arrays, whose memory worker processes share: a million samples take 100 MB.
        self.shard = np.repeat(np.arange(len(kept)), self.lengths)
        self.samples = np.concatenate([as_table([], []), *(table for _, table in kept)])
        remote = sorted(file.size for file in self.files if is_url(file.url))
        needed = sum(remote[-WINDOW:]) / 1e9
        if 0 < config.cache_gb < needed:
            text = f"data.cache_gb is {config.cache_gb:g}; {WINDOW} shards, which are read at once, need {needed:.2g}"
            raise UserError(f"{text}; set more, or 0 to fetch each sample alone")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        (key, spans), name = self.samples[index], self._name(index)
        picture, *texts = self._file(index).read_spans(spans.tolist())
        captions = parse_fields(name, *texts)["captions"]
        return {"image": read_picture(picture, self.config, name), "captions": captions, "key": str(key)}

    def captions(self, index: int) -> list[str]:
        """The captions of sample `index`; its picture is not read. Raises SampleError."""
        spans = self.samples[index]["spans"][1:].tolist()
        return parse_fields(self._name(index), *self._file(index).read_spans(spans))["captions"]

    def identity(self, index: int) -> tuple[str, str]:
        """The key of sample `index`; and its shard with size and time or version, and where in it the picture lies."""
        shard, (key, spans) = self.shard[index], self.samples[index]
        file, span = self.files[shard], tuple(spans[0].tolist())
        return str(key), f"{self.names[shard]} {file.stamp} {span} {self.config.max_pixels}"

    def _file(self, index: int) -> File:
        return self.files[self.shard[index]]

    def _name(self, index: int) -> str:
        return f"{self.samples[index]['key']} in {self.names[self.shard[index]]}"


def parse_fields(name: str, text: bytes, table: bytes) -> dict[str, Any]:
    """The JSON of the sample `name`, with cleaned `captions`. Raises SampleError."""
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


@dataclass(frozen=True)
class Index:
    """The usable samples of a shard (`as_table`), {name: reason} of the others, and the fields {name: {"captions",
    "split"}} of each where the shard is named after no split."""

    file: File
    name: str
    samples: np.ndarray
    faults: dict[str, str]
    fields: Samples


def as_table(keys: list[str], spans: list) -> np.ndarray:
    """Rows of a key and the (offset, size) of KINDS, (0, 0) where there is none."""
    longest = max(map(len, keys), default=1)
    return np.array([*zip(keys, spans, strict=True)], [("key", f"U{longest}"), ("spans", int, (len(KINDS), 2))])


def index_shard(cache: int, item: tuple[str, str, str]) -> Index:
    """The samples of the shard (url, name, split or ""). Those behind URLs are remembered on the local disk."""
    url, name, split = item
    file = open_file(url, cache)
    key = hashlib.sha256(f"1 {url} {file.stamp} {name} {split}".encode()).hexdigest()
    remembered = cache_folder() / "shards" / f"{key}.json"
    try:
        keys, spans, faults, fields = json.loads(remembered.read_bytes())
    except (OSError, ValueError):
        keys, spans, faults, fields = scan(file, name, split)
        if is_url(url):
            with suppress(OSError):
                remembered.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(remembered) as temporary:
                    temporary.write_text(json.dumps([keys, spans, faults, fields]))
    return Index(file, name, as_table(keys, spans), faults, fields)


def scan(file: File, shard: str, split: str) -> tuple[list[str], list, dict[str, str], Samples]:
    """Keys, spans, faults and fields of a shard, as in Index, from its headers, and its captions without a `split`.

    Raises UserError for a shard that is cut short or no plain tar.
    """
    samples: dict[str, list[tuple[str, tuple[int, int]]]] = {}
    try:
        with file.open() as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                archive.members = []  # tarfile would keep every header
                name = PurePosixPath(member.name)
                stem, _, suffix = name.name.partition(".")
                kind = "image" if f".{suffix.lower()}" in SUFFIXES else suffix.lower()
                if stem and kind in KINDS and member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    span = member.offset_data, member.size
                    samples.setdefault(str(name.with_name(stem)), []).append((kind, span))
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"shard {file.url!r} cannot be read, is cut short or no plain tar: {error}") from None
    # tarfile ends at a broken header without an error
    if file.read(archive.offset, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise UserError(f"shard {file.url!r} is damaged after {archive.offset} bytes; write it again")
    keys, spans, faults, fields = [], [], Faults(share=1), {}
    for key, members in samples.items():
        parts, sample = dict(members), f"{key} in {shard}"
        if key.startswith("/") or ".." in key.split("/"):
            reason = "has an unsafe name; rename it"
        elif len(parts) < len(members):
            reason = "has two members of a kind; keep one"
        elif "image" not in parts or len(parts) == 1:
            reason = f"has no {'caption (.txt or .json)' if 'image' in parts else 'picture'}"
        else:
            found = [parts.get(kind, (0, 0)) for kind in KINDS]
            row = (
                None
                if split
                else attempt(faults, lambda a: parse_fields(a[0], *file.read_spans(a[1])), (sample, found[1:]))
            )
            if row:
                fields[sample] = {"captions": row["captions"], "split": row.get("split")}
            if split or row:
                keys.append(key)
                spans.append(found)
            continue
        faults.add(sample, f"sample {key!r} of shard {shard!r} {reason}")
    return keys, spans, faults.reasons, fields
