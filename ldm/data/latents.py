"""Cached latents: a frozen VAE's moments of every picture of a data set, computed once, sampled anew every epoch.

One safetensors file, or in a folder or behind a URL one per shard, holds for its samples in the order of the data set
mean and std as raw `moments` (N, 2, C, h, w) in float16 and the `identities` (N, 16) of the pictures; captions come
from the data set. Half precision halves the file; its rounding, at most a 2048th of the mean, is below the std of a
usual VAE. Shift and scale are not in it: the VAE applies those (`vae.normalize`). Neither are mirror images, whose
latents are no mirrored latents.
"""

import hashlib
import itertools
import json
import math
import os
import re
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ldm.config import UserError
from ldm.data.faults import all_captions, attempt
from ldm.data.remote import THREADS, File, MissingFile, is_url, share, write_file
from ldm.distributed import beat, gather_objects, rank_and_world
from ldm.images import to_float
from ldm.model_io import atomic_write, module_hash

FORMAT = "ldm-latents-2"
KEY = 16  # bytes of a picture's hash
AGAIN = "delete it to write it again"


def identities(dataset: Any, indices: range | None = None) -> list[bytes]:
    """A hash of each picture, KEY bytes: another where its file, or the size that it is read at, changes."""
    rows = (repr((dataset.size, *dataset.identity(i))) for i in indices or range(len(dataset)))
    return [hashlib.sha256(row.encode()).digest()[:KEY] for row in rows]


def data_hash(dataset: Any) -> str:
    """SHA-256 of a data set, another where any picture, caption or key, or their order, changes."""
    digest = hashlib.sha256(b"".join(identities(dataset)))
    for captions in all_captions(dataset):
        digest.update(repr(captions).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


@dataclass(frozen=True)
class Part:
    """A file of the cache, with the latents of some consecutive pictures."""

    file: File
    header: bytes
    first: int  # offset of the first moments; before it are the identities
    shape: tuple[int, ...]  # of the moments of a picture: (2, C, h, w)

    @classmethod
    def open(cls, path: str, vae: str, cache: int) -> "Part":
        """Raises ValueError or others for a damaged file, and UserError for one of another version or VAE."""
        file = File.find(path, cache)
        start = file.read(0, min(file.size, 65536))
        header = start[: 8 + int.from_bytes(start[:8], "little")]
        table = json.loads(header[8:])
        known = table.get("__metadata__", {})
        if known.get("format") != FORMAT or known.get("vae") != vae:
            reason = "was made by another VAE" if known.get("format") == FORMAT else "is of another version"
            raise UserError(f"latent cache {path!r} {reason}; {AGAIN}")
        count, *shape = table["moments"]["shape"]
        if header != _header(known, count, shape) or file.size != len(header) + count * (KEY + 2 * math.prod(shape)):
            raise ValueError("it is cut short")
        return cls(file, header, len(header) + count * KEY, tuple(shape))

    def rows(self) -> dict[bytes, int]:
        """{identity: row} of the pictures in the file, in order."""
        keys = self.file.read(len(self.header), self.first - len(self.header))
        return {keys[start : start + KEY]: start // KEY for start in range(0, len(keys), KEY)}

    def moments(self, row: int) -> Tensor:
        """Mean and std of a picture, float16 (2, C, h, w)."""
        size = 2 * math.prod(self.shape)
        data = self.file.read(self.first + row * size, size)
        return torch.frombuffer(bytearray(data), dtype=torch.float16).view(self.shape)


class CachedLatents:
    """The latents of a data set, map-style and read piece by piece from files that `open_latents` keeps up to date.

    `cached[i]` -> {"mean": float32 (C, h, w), "std": float32 (C, h, w), "captions": list[str]}. Raises SampleError for
    a picture that could not be read, and UserError when another run has replaced a local file.
    """

    def __init__(self, path: str, dataset: Any, vae: str, cache: int) -> None:
        self.path, self.dataset, self.vae, self.cache = path, dataset, vae, cache
        self.faults = getattr(dataset, "faults", None)
        self.lengths = getattr(dataset, "lengths", None)
        self.captions = dataset.captions
        if hasattr(dataset, "concept"):
            self.concept = dataset.concept
        self.single = not (is_url(path) or path.endswith("/") or Path(path).is_dir())
        lengths, self.paths = [len(dataset)], [path]
        if not self.single:
            lengths = self.lengths or lengths
            names = [re.sub(r"[^\w.-]", "_", name) for name in getattr(dataset, "names", ["latents"])]
            self.paths = [f"{path.rstrip('/')}/{name.removesuffix('.tar')}.safetensors" for name in names]
        self.firsts = [0, *itertools.accumulate(lengths)]
        self.parts: list[Part | None] = []

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        i = range(len(self))[index]
        number = bisect_right(self.firsts, i) - 1
        path, part = self.paths[number], self.parts[number]
        if not is_url(path) and part.file.read(0, len(part.header)) != part.header:
            raise UserError(f"latent cache {path!r} was replaced by another run; give each its own")
        mean, std = part.moments(i - self.firsts[number]).float()
        if not mean.isfinite().all():
            self.dataset[i]  # raises the SampleError again
            raise UserError(f"latent cache {path!r} lacks a picture that is readable by now; {AGAIN}")
        return {"mean": mean, "std": std, "captions": self.captions(i)}

    def keys(self, number: int) -> list[bytes]:
        """The identities of the pictures that belong into a file."""
        return identities(self.dataset, range(*self.firsts[number : number + 2]))

    def open(self) -> list[int]:
        """Opens the files. Returns the numbers of those that are missing or damaged, or have other pictures. Raises
        UserError where another version, VAE or data set wrote them, and for a single damaged one."""
        seen = share(self._open, range(len(self.paths)), "opening latents")
        self.parts = [part for part, _, _ in seen]
        if any(self.parts) and not any(related for _, related, _ in seen):
            reason = "was made from another data set, split or picture size"
            raise UserError(f"latent cache {self.path!r} {reason}; {AGAIN}")
        return [number for number, (_, _, complete) in enumerate(seen) if not complete]

    def _open(self, number: int) -> tuple[Part | None, bool, bool]:
        """A file, whether it has any of its pictures, and whether it has all in order."""
        keys = self.keys(number)
        try:
            part = Part.open(self.paths[number], self.vae, self.cache)
            rows = part.rows()
            return part, not rows.keys().isdisjoint(keys), [*rows] == keys
        except MissingFile:
            pass
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            if self.single:
                raise UserError(f"latent cache {self.path!r} is damaged ({error}); {AGAIN}") from None
        return None, False, False

    @torch.inference_mode()
    def write(self, vae: nn.Module, numbers: list[int], batch_size: int) -> None:
        """Writes files, each as a whole or not at all: rows of the old ones are copied, the others encoded.

        Of several files each process writes its own; into a single one each writes its samples.
        """
        rank, world = rank_and_world()
        blank = torch.zeros(3, self.dataset.size, self.dataset.size, dtype=torch.uint8)
        shape = encode(vae, blank[None]).shape[1:]
        for number in numbers if self.single else numbers[rank::world]:
            keys, part, first = self.keys(number), self.parts[number], self.firsts[number]
            rows = part.rows() if part else {}
            missing = [i for i, key in enumerate(keys, first) if key not in rows]
            batches = [missing[i : i + batch_size] for i in range(0, len(missing), batch_size)]
            fresh = self._encode(vae, batches[rank::world] if self.single else batches, blank)
            copied = ((i, part.moments(rows[key])) for i, key in enumerate(keys, first) if key in rows)
            metadata = {"format": FORMAT, "vae": self.vae, "data": hashlib.sha256(b"".join(keys)).hexdigest()}
            start = _header(metadata, len(keys), shape) + b"".join(keys)
            if self.single:
                self._write_together(start, itertools.chain(copied if rank == 0 else (), fresh))
            else:
                moments = dict(itertools.chain(copied, fresh))
                write_file(self.paths[number], start + b"".join(moments[i].numpy().tobytes() for i in sorted(moments)))

    def _write_together(self, start: bytes, rows: Iterator[tuple[int, Tensor]]) -> None:
        """Writes the single file, each process its `rows`, which then replaces the old one."""
        main, path = rank_and_world()[0] == 0, Path(self.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) if main else nullcontext(path.with_name(path.name + ".tmp")) as new:
            if main:
                new.write_bytes(start)
            gather_objects(None)  # so the file is there for all
            with new.open("r+b") as file:
                for i, moments in rows:
                    file.seek(len(start) + i * moments.nbytes)
                    file.write(moments.numpy().tobytes())
                file.flush()
                os.fsync(file.fileno())
            gather_objects(None)  # so all have written

    def _encode(self, vae: nn.Module, batches: list[list[int]], blank: Tensor) -> Iterator[tuple[int, Tensor]]:
        read, quiet = partial(attempt, self.faults, self.dataset.__getitem__), rank_and_world()[0] > 0
        with ThreadPoolExecutor(THREADS) as pool:
            for batch in tqdm(batches, desc="encoding", unit="batch", leave=self.single, disable=quiet):
                beat()
                samples = [*pool.map(read, batch)]
                moments = encode(vae, torch.stack([sample["image"] if sample else blank for sample in samples]))
                moments[[sample is None for sample in samples]] = torch.nan
                yield from zip(batch, moments, strict=True)


def open_latents(
    path: str | Path, vae: nn.Module, dataset: Any, batch_size: int, device: torch.device, cache_gb: float = 0
) -> CachedLatents:
    """The latents of a data set, of which those that the cache at `path` does not have are encoded now. It is a file,
    or a file per shard in a folder, which exists or ends with "/", or behind a URL, each of which fits into memory.

    Pictures that have changed are encoded again, those that are gone are dropped; of several files one that is lost or
    cut is written again. Processes of one launch, which must all call this, share the work. `vae.encode(x)`, x (B, 3,
    H, W) in [-1, 1], has `.mean` and `.std` (B, C, h, w); the VAE is left in eval mode. Raises UserError if the cache
    is of another VAE, other pictures or an older version, or a single damaged file; if the disk is full; and if
    latents are not finite.
    """
    if not len(dataset):
        raise UserError("the data set has no samples to encode")
    cached = CachedLatents(str(path), dataset, module_hash(vae), int(cache_gb * 1e9))
    if numbers := cached.open():
        try:
            cached.write(vae.to(device).eval(), numbers, batch_size)
        except OSError as error:
            raise UserError(f"cannot write the latent cache {cached.path!r}: {error.strerror or error}") from None
        gather_objects(None)  # so the cache is there for all
        cached.open()
    return cached


def _header(metadata: dict[str, str], count: int, shape: tuple[int, ...]) -> bytes:
    """Of a safetensors file: the length of what follows, then JSON."""
    start, end = count * KEY, count * (KEY + 2 * math.prod(shape))
    identities = {"dtype": "U8", "shape": [count, KEY], "data_offsets": [0, start]}
    moments = {"dtype": "F16", "shape": [count, *shape], "data_offsets": [start, end]}
    table = json.dumps({"__metadata__": metadata, "identities": identities, "moments": moments})
    table = table.encode().ljust(-(-len(table) // 8) * 8)
    return len(table).to_bytes(8, "little") + table


def encode(vae: nn.Module, images: Tensor) -> Tensor:
    """uint8 images (B, 3, H, W) -> their means and stds (B, 2, C, h, w), in float16 on the CPU."""
    posterior = vae.encode(to_float(images.to(next(vae.parameters()).device)))
    moments = torch.stack([posterior.mean, posterior.std], dim=1).half().cpu()
    if not moments.isfinite().all():
        raise UserError("the VAE gives latents that are not finite in float16; train it again with more KL")
    return moments
