"""Tar shards in the WebDataset convention, read in place: nothing is unpacked and no picture stays in memory.

A sample is the members of one tar that share a name up to the first dot of its last part: `000012.png` with
`000012.json` (`captions` or `text`, and any other fields) and/or `000012.txt` (one caption per line).
"""

import json
import re
import tarfile
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from ldm.config import UserError
from ldm.data.config import DataConfig
from ldm.data.faults import Faults, SampleError, read_picture
from ldm.data.remote import File, Stream, find_tars, is_url, keep, share
from ldm.data.splits import named_split, select
from ldm.data.text import clean_captions, decode
from ldm.images import SUFFIXES
from ldm.model_io import parse_object

KINDS = ("image", "txt", "json")  # of the members of a sample
# Of each usable sample the key, the (offset, size) of KINDS, (0, 0) where there is none, and fields; reasons by name
Scan = tuple[list[tuple[str, list[tuple[int, int]], dict[str, Any]]], dict[str, str]]


class Shards:
    """Samples of one split of tar shards, map-style: of a folder of `*.tar`, or of what else `find_tars` takes.

    Shards named after a split, as in `train-0000.tar`, are of that split; samples of other shards have that of their
    JSON's field `split`, or else are split by a hash of their captions, which are read for it. Else opening reads the
    tar headers only. The processes of a run, which must all open it, share that work. `lengths` are the samples of each
    of the shards `names`, in order, for `EpochBatches(blocks=...)`. Every read opens the shard by itself, so that
    worker processes and threads share nothing.

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
        shards = [number for number, name in enumerate(named) if name in ("", split)]
        self.names = [names[number] for number in shards]
        self.files = share(lambda number: File.find(urls[number], int(config.cache_gb * 1e9)), shards, "opening")
        scanned = share(lambda i: scan(self.files[i], self.names[i], named[shards[i]]), range(len(shards)), "indexing")
        for fault in (fault for _, faults in scanned for fault in faults.items()):
            self.faults.add(*fault)
        rows = [(i, *row) for i, (found, _) in enumerate(scanned) for row in found]
        self.faults.settle(len(rows) + len(self.faults.reasons))
        fields = {f"{key} in {self.names[i]}": row for i, key, _, row in rows if row}
        chosen = {*select(fields, split, config.seed, self.faults)}
        rows = [row[:3] for row in rows if not row[3] or f"{row[1]} in {self.names[row[0]]}" in chosen]
        # An array, whose memory worker processes share: a million samples take 100 MB.
        longest = max((len(key) for _, key, _ in rows), default=1)
        self.table = np.array(rows, [("shard", int), ("key", f"U{longest}"), ("spans", int, (len(KINDS), 2))])
        used, self.table["shard"], counts = np.unique(self.table["shard"], return_inverse=True, return_counts=True)
        self.files, self.names = [self.files[i] for i in used], [self.names[i] for i in used]
        self.lengths = counts.tolist()

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, captions = self.table[index], self.captions(index)
        image = read_picture(self.files[row["shard"]].read(*row["spans"][0].tolist()), self.config, self._name(row))
        return {"image": image, "captions": captions, "key": str(row["key"])}

    def captions(self, index: int) -> list[str]:
        """The captions of sample `index`; its picture is not read. Raises SampleError."""
        row = self.table[index]
        texts = (self.files[row["shard"]].read(*span) for span in row["spans"][1:].tolist())
        return parse_fields(self._name(row), *texts)["captions"]

    def identity(self, index: int) -> tuple[str, str]:
        """The key of sample `index`; and its shard with size and time or tag, and where in it the picture lies."""
        shard, key, spans = self.table[index]
        file, span = self.files[shard], tuple(spans[0].tolist())
        return str(key), f"{self.names[shard]} {(file.size, file.version)} {span} {self.config.max_pixels}"

    def _name(self, row: np.void) -> str:
        return f"{row['key']} in {self.names[row['shard']]}"


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


def scan(file: File, shard: str, split: str) -> Scan:
    """The usable samples of a shard, with their fields if it is of no `split`, and {name: reason} of the others, from
    its headers and texts. Behind a URL these are read once, then kept on the local disk.

    Raises UserError for a shard that is cut short or no plain tar.
    """
    if not is_url(file.url):
        return read_members(file, shard, split)
    key = f"1 {file.url} {file.size} {file.version} {shard} {split}"
    return json.loads(bytes(keep("shards", key, lambda: json.dumps(read_members(file, shard, split)).encode())))


def read_members(file: File, shard: str, split: str) -> Scan:
    samples: dict[str, list[tuple[str, tuple[int, int], bytes]]] = {}
    try:
        with tarfile.open(fileobj=Stream(file), mode="r:") as archive:
            for member in archive:
                archive.members = []  # tarfile would keep every header
                name = PurePosixPath(member.name)
                stem, _, suffix = name.name.partition(".")
                kind = "image" if f".{suffix.lower()}" in SUFFIXES else suffix.lower()
                if stem and kind in KINDS and member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    text = b"" if split or kind == "image" else archive.extractfile(member).read()
                    part = kind, (member.offset_data, member.size), text
                    samples.setdefault(str(name.with_name(stem)), []).append(part)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"shard {file.url!r} cannot be read, is cut short or no plain tar: {error}") from None
    # tarfile ends at a broken header without an error
    if file.read(archive.offset, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise UserError(f"shard {file.url!r} is damaged after {archive.offset} bytes; write it again")
    rows, faults = [], Faults(share=1)
    for key, members in samples.items():
        spans, texts = ({kind: row[i] for kind, *row in members} for i in range(2))
        name = f"{key} in {shard}"
        if key.startswith("/") or ".." in key.split("/"):
            reason = "has an unsafe name; rename it"
        elif len(spans) < len(members):
            reason = "has two members of a kind; keep one"
        elif "image" not in spans or len(spans) == 1:
            reason = f"has no {'caption (.txt or .json)' if 'image' in spans else 'picture'}"
        else:
            try:
                fields = {} if split else parse_fields(name, texts.get("txt", b""), texts.get("json", b""))
                fields = {field: fields[field] for field in fields.keys() & {"captions", "split"}}
                rows.append((key, [spans.get(kind, (0, 0)) for kind in KINDS], fields))
            except SampleError as error:
                faults.add(*error.args)
            continue
        faults.add(name, f"sample {key!r} of shard {shard!r} {reason}")
    return rows, faults.reasons
