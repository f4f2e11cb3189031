"""Tar shards in the WebDataset convention, read in place: nothing is unpacked and no picture stays in memory.

A sample is the members of one tar that share a name up to the first dot of its last part: `000012.png` with
`000012.json` (`captions` or `text`, and any other fields) and/or `000012.txt` (one caption per line).
"""

import hashlib
import json
import re
import tarfile
from contextlib import suppress
from functools import partial
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from ldm.config import UserError
from ldm.data.config import DataConfig
from ldm.data.faults import Faults, SampleError, read_picture
from ldm.data.order import WINDOW
from ldm.data.remote import File, find_tars, is_url, open_file, share
from ldm.data.splits import Samples, named_split, select
from ldm.data.text import clean_captions, decode
from ldm.images import SUFFIXES
from ldm.model_io import atomic_write, cache_folder, parse_object

KINDS = ("image", "txt", "json")  # of the members of a sample


class Index(NamedTuple):
    """Of a shard: its usable samples, keys and the (offset, size) of KINDS, (0, 0) where there is none; {name: reason}
    of the others; and where it is named after no split, the captions and split {name: fields} of each."""

    file: File
    shard: str
    samples: np.ndarray
    faults: dict[str, str]
    fields: Samples


class Shards:
    """Samples of one split of tar shards, map-style: of a folder of `*.tar`, or of what else `find_tars` takes.

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
        if not (urls := find_tars(config.path)):
            raise UserError(f"shard folder {config.path!r} has no *.tar")
        names = [PurePosixPath(url.partition("?")[0]).name for url in urls]
        named = [split_of_shard(name) for name in names]
        names = names if len({*names}) == len(names) else urls  # of several folders
        items = [item for item in zip(urls, names, named, strict=True) if item[2] in ("", split)]
        indices = share(partial(index_shard, int(config.cache_gb * 1e9)), items, "indexing")
        for fault in (fault for index in indices for fault in index.faults.items()):
            self.faults.add(*fault)
        self.faults.settle(sum(len(index.samples) for index in indices) + len(self.faults.reasons))
        fields = {name: row for index in indices for name, row in index.fields.items()}
        chosen = {*select(fields, split, config.seed, self.faults)}
        for i, index in enumerate(indices):
            if index.fields:
                indices[i] = index._replace(samples=index.samples[[name in chosen for name in index.fields]])
        indices = [index for index in indices if len(index.samples)]
        self.files, self.names = [index.file for index in indices], [index.shard for index in indices]
        self.lengths = [len(index.samples) for index in indices]
        # Arrays, whose memory worker processes share: a million samples take 100 MB.
        self.shards = np.repeat(np.arange(len(indices)), self.lengths)
        self.samples = np.concatenate([index.samples for index in indices]) if indices else np.array([])
        window = sum(sorted(file.size for file in self.files if is_url(file.url))[-WINDOW:]) / 1e9
        if 0 < config.cache_gb < window:
            text = f"data.cache_gb is {config.cache_gb:g}; {WINDOW} shards, which are read at once, need {window:.2g}"
            raise UserError(f"{text}; set more, or 0 to fetch each sample alone")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, (picture, *texts) = self._read(index, slice(None))
        captions = parse_fields(name, *texts)["captions"]
        image = read_picture(picture, self.config, name)
        return {"image": image, "captions": captions, "key": str(self.samples[index]["key"])}

    def captions(self, index: int) -> list[str]:
        """The captions of sample `index`; its picture is not read. Raises SampleError."""
        name, texts = self._read(index, slice(1, None))
        return parse_fields(name, *texts)["captions"]

    def identity(self, index: int) -> tuple[str, str]:
        """The key of sample `index`; and its shard with size and time or tag, and where in it the picture lies."""
        shard, (key, spans) = self.shards[index], self.samples[index]
        file, span = self.files[shard], tuple(spans[0].tolist())
        return str(key), f"{self.names[shard]} {(file.size, file.version)} {span} {self.config.max_pixels}"

    def _read(self, index: int, kinds: slice) -> tuple[str, list[bytes]]:
        (key, spans), shard = self.samples[index], self.shards[index]
        return f"{key} in {self.names[shard]}", self.files[shard].read_spans(spans[kinds].tolist())


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


def index_shard(cache: int, item: tuple[str, str, str]) -> Index:
    """The samples of a shard (url, name, split or ""). Of one behind a URL they are kept on the local disk."""
    url, shard, split = item
    file = open_file(url, cache)
    key = hashlib.sha256(f"1 {url} {file.size} {file.version} {shard} {split}".encode()).hexdigest()
    kept = cache_folder() / "shards" / f"{key}.json"
    try:
        samples, faults, fields = json.loads(kept.read_bytes())
    except (OSError, ValueError):
        samples, faults, fields = scan(file, shard, split)
        if is_url(url):
            with suppress(OSError):
                kept.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(kept) as temporary:
                    temporary.write_text(json.dumps([samples, faults, fields]))
    kinds = [("key", f"U{max(map(len, samples), default=1)}"), ("spans", int, (len(KINDS), 2))]
    return Index(file, shard, np.array([*samples.items()], kinds), faults, fields)


def scan(file: File, shard: str, split: str) -> tuple[dict[str, list], dict[str, str], Samples]:
    """{key: spans}, faults and fields of a shard, as in Index, from its headers, and its captions without a `split`.

    Raises UserError for a shard that is cut short or no plain tar.
    """
    members: dict[str, list[tuple[str, tuple[int, int]]]] = {}
    try:
        with file.open() as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                archive.members = []  # tarfile would keep every header
                name = PurePosixPath(member.name)
                stem, _, suffix = name.name.partition(".")
                kind = "image" if f".{suffix.lower()}" in SUFFIXES else suffix.lower()
                if stem and kind in KINDS and member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    span = member.offset_data, member.size
                    members.setdefault(str(name.with_name(stem)), []).append((kind, span))
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"shard {file.url!r} cannot be read, is cut short or no plain tar: {error}") from None
    # tarfile ends at a broken header without an error
    if file.read(archive.offset, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise UserError(f"shard {file.url!r} is damaged after {archive.offset} bytes; write it again")
    samples, faults, fields = {}, Faults(share=1), {}
    for key, parts in members.items():
        kinds, name = dict(parts), f"{key} in {shard}"
        spans = [kinds.get(kind, (0, 0)) for kind in KINDS]
        if key.startswith("/") or ".." in key.split("/"):
            reason = "has an unsafe name; rename it"
        elif len(kinds) < len(parts):
            reason = "has two members of a kind; keep one"
        elif "image" not in kinds or len(kinds) == 1:
            reason = f"has no {'caption (.txt or .json)' if 'image' in kinds else 'picture'}"
        else:
            try:
                row = {} if split else parse_fields(name, *file.read_spans(spans[1:]))
                samples[key] = spans
                if row:
                    fields[name] = {field: row.get(field) for field in ("captions", "split")}
            except SampleError as error:
                faults.add(*error.args)
            continue
        faults.add(name, f"sample {key!r} of shard {shard!r} {reason}")
    return samples, faults.reasons, fields
