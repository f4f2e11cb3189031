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
from ldm.data.remote import File, find_tars, is_url, keep, share
from ldm.data.splits import named_split, select
from ldm.data.text import clean_captions, decode
from ldm.images import SUFFIXES
from ldm.model_io import parse_object

KINDS = ("image", "txt", "json")  # of the members of a sample
Span = tuple[int, int]  # offset and size of a member in its shard
Row = tuple[str, list[Span]]  # key and spans of KINDS, (0, 0) where there is none


class Shards:
    """Samples of one split of tar shards, map-style: of a folder of `*.tar`, or of what else `find_tars` takes.

    Shards named after a split, as in `train-0000.tar`, are of that split; samples of other shards have that of their
    JSON's field `split`, or else are split by a hash of their captions, which are read for it. Else opening reads the
    tar headers only. The processes of a run, which must all open it, share that work. `lengths` are the samples of each
    shard, in order, for `EpochBatches(blocks=...)`, and `names` those shards. Every read opens the shard
    by itself, so that worker processes and threads share nothing.

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
        scanned = share(lambda i: scan(self.files[i], self.names[i]), range(len(shards)), "indexing")
        for fault in (fault for _, reasons in scanned for fault in reasons.items()):
            self.faults.add(*fault)
        rows = [(i, *row) for i, (samples, _) in enumerate(scanned) for row in samples]
        self.faults.settle(len(rows) + len(self.faults.reasons))
        # An array, whose memory worker processes share: a million samples take 100 MB.
        longest = max((len(key) for _, key, _ in rows), default=1)
        table = np.array(rows, [("shard", int), ("key", f"U{longest}"), ("spans", int, (len(KINDS), 2))])
        keep = np.array([named[number] == split for number in shards], bool)[table["shard"]]
        rest = table[~keep]
        samples = {}
        for row, fields in zip(rest, share(self._try_fields, rest, "reading captions"), strict=True):
            if isinstance(fields, SampleError):
                self.faults.add(*fields.args)
            else:
                samples[self._name(row)] = fields
        chosen = {*select(samples, split, config.seed, self.faults)}
        keep[~keep] = [self._name(row) in chosen for row in rest]
        self.table = table[keep]
        used, self.table["shard"], counts = np.unique(self.table["shard"], return_inverse=True, return_counts=True)
        self.files, self.names, self.lengths = (
            [self.files[i] for i in used],
            [self.names[i] for i in used],
            counts.tolist(),
        )

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, captions = self.table[index], self.captions(index)
        image = read_picture(self.files[row["shard"]].read(*row["spans"][0].tolist()), self.config, self._name(row))
        return {"image": image, "captions": captions, "key": str(row["key"])}

    def captions(self, index: int) -> list[str]:
        """The captions of sample `index`; its picture is not read. Raises SampleError."""
        return self._fields(self.table[index])["captions"]

    def identity(self, index: int) -> tuple[str, str]:
        """The key of sample `index`; and its shard with size and time or tag, and where in it the picture lies."""
        shard, key, spans = self.table[index]
        file, span = self.files[shard], tuple(spans[0].tolist())
        return str(key), f"{self.names[shard]} {(file.size, file.version)} {span} {self.config.max_pixels}"

    def _name(self, row: np.void) -> str:
        return f"{row['key']} in {self.names[row['shard']]}"

    def _fields(self, row: np.void) -> dict[str, Any]:
        """The sample's JSON, with cleaned `captions`. Raises SampleError."""
        name = self._name(row)
        text, table = (self.files[row["shard"]].read(*span) for span in row["spans"][1:].tolist())
        try:
            fields = parse_object(decode(table, name), name) if table else {}
            captions = fields.get("captions", fields.get("text"))
            if captions is None:
                captions = decode(text, name).split("\n")
            return fields | {"captions": clean_captions(captions, name)}
        except UserError as error:
            raise SampleError(name, str(error)) from None

    def _try_fields(self, row: np.void) -> dict[str, Any] | SampleError:
        try:
            return self._fields(row)
        except SampleError as error:
            return error


def split_of_shard(name: str) -> str:
    """The split that a word of a shard's name says ("" for none): `cc-train-0000.tar` is of "train"."""
    splits = {named_split(word, f"{word!r} in the name of shard {name!r}") for word in re.split(r"[-_.]", name)} - {""}
    if len(splits) > 1:
        raise UserError(f"shard {name!r} is named after two splits, {' and '.join(sorted(splits))}; rename it")
    return "".join(splits)


def scan(file: File, shard: str) -> tuple[list[Row], dict[str, str]]:
    """The usable samples of a shard, and {name: reason} of the others, from its headers; behind a URL these are read
    once, then kept on the local disk.

    Raises UserError for a shard that is cut short or no plain tar.
    """
    if not is_url(file.url):
        return scan_headers(file, shard)
    key = f"1 {file.url} {file.size} {file.version} {shard}"
    return json.loads(keep("shards", key, lambda: json.dumps(scan_headers(file, shard)).encode()).tobytes())


def scan_headers(file: File, shard: str) -> tuple[list[Row], dict[str, str]]:
    samples: dict[str, list[tuple[str, Span]]] = {}
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
    rows, faults = [], {}
    for key, members in samples.items():
        spans = dict(members)
        if key.startswith("/") or ".." in key.split("/"):
            reason = "has an unsafe name; rename it"
        elif len(spans) < len(members):
            reason = "has two members of a kind; keep one"
        elif "image" not in spans or len(spans) == 1:
            reason = f"has no {'caption (.txt or .json)' if 'image' in spans else 'picture'}"
        else:
            rows.append((key, [spans.get(kind, (0, 0)) for kind in KINDS]))
            continue
        faults[f"{key} in {shard}"] = f"sample {key!r} of shard {shard!r} {reason}"
    return rows, faults
