"""Cached latents: a frozen VAE's moments of every picture of a data set, computed once, sampled anew every epoch.

One safetensors file holds, for every sample in the order of the data set, the raw moments `mean` and `std` (N, C, h, w)
in float16 and the `identities` (N, 16) of the pictures; captions come from the data set. Half precision halves the
file; its rounding, at most a 2048th of the mean, is below the std of a usual VAE. Shift and scale are not in it: the
VAE applies those (`vae.normalize`). Neither are mirror images, whose latents are no mirrored latents.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from ldm.config import UserError
from ldm.data.faults import SampleError, readable
from ldm.data.identity import KEY, fingerprint, identities, identity
from ldm.distributed import gather_objects, rank_and_world
from ldm.images import to_float
from ldm.model_io import module_hash

FORMAT = "ldm-latents-2"
HEADER = 1024  # bytes, filled up with spaces as the format allows
data_hash = fingerprint  # the name that evaluations import
Row = tuple[int, Tensor, Tensor]  # index, mean, std


class CachedLatents:
    """The latents of a data set, map-style and read piece by piece from a file that `open_latents` has written.

    `cached[i]` -> {"mean": float32 (C, h, w), "std": float32 (C, h, w), "captions": list[str], "key": str}. Raises
    SampleError for a picture that could not be read, and UserError when another run has replaced the file.
    """

    def __init__(self, path: Path, dataset: Any, metadata: dict[str, str]) -> None:
        self.path, self.dataset, self.metadata = path, dataset, metadata
        self.faults = getattr(dataset, "faults", None)
        if hasattr(dataset, "lengths"):
            self.lengths = dataset.lengths

    def __len__(self) -> int:
        return len(self.dataset)

    def captions(self, index: int) -> list[str]:
        """The captions of sample `index`."""
        return self.dataset.captions(index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        i = range(len(self))[index]
        with open_cache(self.path) as file:
            if file.metadata() != self.metadata:
                raise UserError(f"latent cache {str(self.path)!r} was replaced by another run; give each its own")
            mean, std = (file.get_slice(name)[i].float() for name in ("mean", "std"))
        if not mean.isfinite().all():
            self.dataset[i]  # raises the SampleError again
        key, _ = identity(self.dataset, i)
        return {"mean": mean, "std": std, "captions": self.captions(i), "key": key}


def open_latents(path: Path, vae: nn.Module, dataset: Any, batch_size: int, device: torch.device) -> CachedLatents:
    """The latents of a data set, of which those that the cache at `path` does not have are encoded now.

    Pictures that have changed are encoded again, those that are gone are dropped. Processes of one launch, which must
    all call this, share the work. `vae.encode(x)`, x (B, 3, H, W) in [-1, 1], has `.mean` and `.std` (B, C, h, w).
    Raises UserError for a cache of another VAE, of other pictures altogether or of an older version, for a damaged
    one, a full disk, and latents that are not finite.
    """
    path, keys = Path(path), identities(dataset)
    metadata = {"format": FORMAT, "vae": module_hash(vae), "data": hashlib.sha256(keys.tobytes()).hexdigest()}
    old = read_rows(path, metadata, keys) if path.exists() else {}
    gather_objects(None)  # all have looked before one writes
    if old is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_cache(path, vae.to(device), dataset, batch_size, metadata, keys, old)
        except OSError as error:
            raise UserError(f"cannot write the latent cache {str(path)!r}: {error.strerror or error}") from None
    return CachedLatents(path, dataset, metadata)


def open_cache(path: Path) -> Any:
    """The file of a cache. Raises UserError for one that is damaged."""
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"latent cache {str(path)!r} is damaged ({error}); delete it to write it again") from None


def read_rows(path: Path, metadata: dict[str, str], keys: np.ndarray) -> dict[bytes, int] | None:
    """Which row of a cache each picture has, by its identity; None where the cache is up to date."""
    with open_cache(path) as file:
        old = file.metadata() or {}
        if old == metadata:
            return None
        reason = ""
        if old.get("format") != FORMAT:
            reason = f"is of another version ({old.get('format', 'unknown')}, not {FORMAT})"
        elif old["vae"] != metadata["vae"]:
            reason = f"was made by another VAE ({old['vae'][:12]}, not {metadata['vae'][:12]})"
        else:
            rows = {key.tobytes(): row for row, key in enumerate(file.get_tensor("identities").numpy())}
            if not any(key.tobytes() in rows for key in keys):
                reason = "was made from another data set, split or picture size"
    if reason:
        raise UserError(f"latent cache {str(path)!r} {reason}; delete it to write it again")
    return rows


@torch.inference_mode()
def write_cache(
    path: Path,
    vae: nn.Module,
    dataset: Any,
    batch_size: int,
    metadata: dict[str, str],
    keys: np.ndarray,
    old: dict[bytes, int],
) -> None:
    """Writes a cache, whole or not at all: rows that the `old` one has are copied, the others encoded."""
    rank, world = rank_and_world()
    part = path.with_name(f".{path.name}.part")
    kept = {i: old[key.tobytes()] for i, key in enumerate(keys) if key.tobytes() in old}
    missing = [i for i in range(len(keys)) if i not in kept]
    batches = [missing[i : i + batch_size] for i in range(0, len(missing), batch_size)]
    batches = batches[len(batches) * rank // world : len(batches) * (rank + 1) // world]
    was_training = vae.training
    vae.eval()
    try:
        shape = _shape(vae, dataset)
        if rank == 0:
            part.write_bytes(_header(metadata, len(keys), shape) + keys.tobytes())
        gather_objects(None)  # so the file is there for all
        with part.open("r+b") as file:
            if rank == 0:
                _write(file, len(keys), _copy(path, kept))
            _write(file, len(keys), _encode(vae, dataset, batches, shape))
            os.fsync(file.fileno())
        gather_objects(None)  # so all have written
        if rank == 0:
            os.replace(part, path)
        gather_objects(None)  # so the cache is there for all
    finally:
        vae.train(was_training)
        if rank == 0:
            part.unlink(missing_ok=True)


def _shape(vae: nn.Module, dataset: Any) -> tuple[int, ...]:
    """The shape (C, h, w) of a latent, by the first picture that can be read."""
    for i in range(len(dataset)):
        if readable(dataset, [i]):
            return tuple(_moments(vae, [dataset[i]["image"]])[0][0].shape)
    raise UserError("the data set has no samples to encode")


def _moments(vae: nn.Module, images: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Mean and std (C, h, w) of each image, in float16 on the CPU."""
    posterior = vae.encode(to_float(torch.stack(images).to(next(vae.parameters()).device)))
    mean, std = (moment.half().cpu() for moment in (posterior.mean, posterior.std))
    if not (mean.isfinite().all() and std.isfinite().all()):
        raise UserError("the VAE gives latents that are not finite in float16; train it again with more KL")
    return list(zip(mean, std, strict=True))


def _copy(path: Path, rows: dict[int, int]) -> Iterator[Row]:
    if rows:
        with open_cache(path) as file:
            mean, std = file.get_slice("mean"), file.get_slice("std")
            for i, row in rows.items():
                yield i, mean[row], std[row]


def _encode(vae: nn.Module, dataset: Any, batches: list[list[int]], shape: tuple[int, ...]) -> Iterator[Row]:
    nothing = torch.full(shape, torch.nan, dtype=torch.half)  # of a picture that cannot be read
    for batch in tqdm(batches, desc="encoding", unit="batch", disable=rank_and_world()[0] > 0):
        images = {}
        for i in batch:
            try:
                images[i] = dataset[i]["image"]
            except SampleError as error:
                dataset.faults.add(error.name, str(error))
                yield i, nothing, nothing
        if images:
            for i, (mean, std) in zip(images, _moments(vae, list(images.values())), strict=True):
                yield i, mean, std


def _write(file: BinaryIO, count: int, rows: Iterator[Row]) -> None:
    for i, mean, std in rows:
        data = mean.numpy().tobytes()
        file.seek(HEADER + count * KEY + i * len(data))
        file.write(data)
        file.seek(HEADER + count * KEY + (count + i) * len(data))
        file.write(std.numpy().tobytes())
    file.flush()


def cache_bytes(count: int, shape: tuple[int, ...]) -> int:
    """The size of a cache of `count` samples with latents of `shape` (C, h, w)."""
    return HEADER + count * (KEY + 2 * 2 * math.prod(shape))


def _header(metadata: dict[str, str], count: int, shape: tuple[int, ...]) -> bytes:
    table: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, dtype, size, dims in (
        ("identities", "U8", 1, (count, KEY)),
        ("mean", "F16", 2, (count, *shape)),
        ("std", "F16", 2, (count, *shape)),
    ):
        begin, end = end, end + size * math.prod(dims)
        table[name] = {"dtype": dtype, "shape": dims, "data_offsets": [begin, end]}
    return (HEADER - 8).to_bytes(8, "little") + json.dumps(table).encode().ljust(HEADER - 8)
