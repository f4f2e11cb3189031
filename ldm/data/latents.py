"""Cached latents: a frozen VAE's moments of every picture of a data set, computed once, sampled anew every epoch.

One safetensors file holds, for every sample in the order of the data set, mean and std as raw `moments` (N, 2, C, h, w)
in float16 and the `identities` (N, 16) of the pictures; captions come from the data set. Half precision halves the
file; its rounding, at most a 2048th of the mean, is below the std of a usual VAE. Shift and scale are not in it: the
VAE applies those (`vae.normalize`). Neither are mirror images, whose latents are no mirrored latents.
"""

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from ldm.config import UserError
from ldm.data.faults import all_captions, attempt
from ldm.distributed import beat, gather_objects, rank_and_world
from ldm.images import to_float
from ldm.model_io import atomic_write, module_hash

FORMAT = "ldm-latents-2"
KEY = 16  # bytes of a picture's hash
AGAIN = "delete it to write it again"


def identities(dataset: Any) -> list[bytes]:
    """A hash of each picture, KEY bytes: another where its file, or the size that it is read at, changes."""
    rows = (repr((dataset.size, *dataset.identity(i))) for i in range(len(dataset)))
    return [hashlib.sha256(row.encode()).digest()[:KEY] for row in rows]


def data_hash(dataset: Any) -> str:
    """SHA-256 of a data set, another where any picture, caption or key, or their order, changes."""
    digest = hashlib.sha256(b"".join(identities(dataset)))
    for captions in all_captions(dataset):
        digest.update(repr(captions).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


class CachedLatents:
    """The latents of a data set, map-style and read piece by piece from a file that `open_latents` keeps up to date.

    `cached[i]` -> {"mean": float32 (C, h, w), "std": float32 (C, h, w), "captions": list[str]}. Raises SampleError for
    a picture that could not be read, and UserError when another run has replaced the file.
    """

    def __init__(self, path: Path, dataset: Any, metadata: dict[str, str]) -> None:
        self.path, self.dataset, self.metadata = path, dataset, metadata
        self.faults = getattr(dataset, "faults", None)
        self.lengths = getattr(dataset, "lengths", None)
        self.captions = dataset.captions
        if hasattr(dataset, "concept"):
            self.concept = dataset.concept

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        i = range(len(self))[index]
        with self.open() as file:
            if file.metadata() != self.metadata:
                raise UserError(f"latent cache {str(self.path)!r} was replaced by another run; give each its own")
            mean, std = file.get_slice("moments")[i].float()
        if not mean.isfinite().all():
            self.dataset[i]  # raises the SampleError again
            raise UserError(f"latent cache {str(self.path)!r} lacks a picture that is readable by now; {AGAIN}")
        return {"mean": mean, "std": std, "captions": self.captions(i)}

    def open(self) -> Any:
        """The safetensors file. Raises UserError for one that is damaged."""
        try:
            return safe_open(self.path, "pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"latent cache {str(self.path)!r} is damaged ({error}); {AGAIN}") from None

    def rows(self, keys: list[bytes]) -> dict[bytes, int]:
        """{identity: row} of the pictures in the file, in order. Raises UserError if another version or VAE wrote
        it, or it holds none of the pictures `keys`."""
        with self.open() as file:
            known = file.metadata() or {}
            if known.get("format") != FORMAT:
                reason = "is of another version"
            elif known.get("vae") != self.metadata["vae"]:
                reason = "was made by another VAE"
            else:
                rows = {bytes(key): row for row, key in enumerate(file.get_tensor("identities").numpy())}
                if not rows.keys().isdisjoint(keys):
                    return rows
                reason = "was made from another data set, split or picture size"
        raise UserError(f"latent cache {str(self.path)!r} {reason}; {AGAIN}")

    @torch.inference_mode()
    def write(self, vae: nn.Module, batch_size: int, keys: list[bytes], rows: dict[bytes, int]) -> None:
        """Writes the file, as a whole or not at all: `rows` of the old one are copied, the others encoded.

        Each process writes its samples into one file, which then replaces the old one.
        """
        rank, world = rank_and_world()
        blank = torch.zeros(3, self.dataset.size, self.dataset.size, dtype=torch.uint8)
        header = _header(self.metadata, len(keys), encode(vae, blank[None]).shape[1:]) + b"".join(keys)
        missing = [i for i, key in enumerate(keys) if key not in rows]
        batches = [missing[i : i + batch_size] for i in range(0, len(missing), batch_size)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path) if rank == 0 else nullcontext(self.path.with_name(self.path.name + ".tmp")) as new:
            if rank == 0:
                new.write_bytes(header)
            gather_objects(None)  # so the file is there for all
            old = self.open().get_slice("moments") if rows else None
            copied = ((i, old[rows[key]]) for i, key in enumerate(keys) if rank == 0 and key in rows)
            with new.open("r+b") as file:
                for i, moments in itertools.chain(copied, self._encode(vae, batches[rank::world], blank)):
                    file.seek(len(header) + i * moments.nbytes)
                    file.write(moments.numpy().tobytes())
                file.flush()
                os.fsync(file.fileno())
            gather_objects(None)  # so all have written
        gather_objects(None)  # so the cache is there for all

    def _encode(self, vae: nn.Module, batches: list[list[int]], blank: Tensor) -> Iterator[tuple[int, Tensor]]:
        for batch in tqdm(batches, desc="encoding", unit="batch", disable=rank_and_world()[0] > 0):
            beat()
            samples = [attempt(self.faults, self.dataset.__getitem__, i) for i in batch]
            moments = encode(vae, torch.stack([sample["image"] if sample else blank for sample in samples]))
            moments[[sample is None for sample in samples]] = torch.nan
            yield from zip(batch, moments, strict=True)


def open_latents(path: Path, vae: nn.Module, dataset: Any, batch_size: int, device: torch.device) -> CachedLatents:
    """The latents of a data set, of which those that the cache at `path` does not have are encoded now.

    Pictures that have changed are encoded again, those that are gone are dropped. Processes of one launch, which must
    all call this, share the work. `vae.encode(x)`, x (B, 3, H, W) in [-1, 1], has `.mean` and `.std` (B, C, h, w); the
    VAE is left in eval mode. Raises UserError if the cache is of another VAE, other pictures or an older version, or
    damaged; if the disk is full; and if latents are not finite.
    """
    path, keys = Path(path), identities(dataset)
    if not keys:
        raise UserError("the data set has no samples to encode")
    metadata = {"format": FORMAT, "vae": module_hash(vae), "data": hashlib.sha256(b"".join(keys)).hexdigest()}
    cached = CachedLatents(path, dataset, metadata)
    rows = cached.rows(keys) if path.exists() else {}
    gather_objects(None)  # all have looked before one writes
    if [*rows] != keys:
        try:
            cached.write(vae.to(device).eval(), batch_size, keys, rows)
        except OSError as error:
            raise UserError(f"cannot write the latent cache {str(path)!r}: {error.strerror or error}") from None
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
