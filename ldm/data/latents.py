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
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from ldm.config import UserError
from ldm.data.faults import all_captions, attempt
from ldm.distributed import gather_objects, rank_and_world
from ldm.images import to_float
from ldm.model_io import atomic_write, module_hash

FORMAT = "ldm-latents-2"
KEY = 16  # bytes of a picture's hash


def identities(dataset: Any) -> np.ndarray:
    """A hash of each picture, uint8 (N, KEY): another where its file, or the size that it is read at, changes."""
    rows = (repr((dataset.size, *dataset.identity(i))).encode() for i in range(len(dataset)))
    return np.frombuffer(b"".join(hashlib.sha256(row).digest()[:KEY] for row in rows), np.uint8).reshape(-1, KEY)


def data_hash(dataset: Any) -> str:
    """SHA-256 of a data set, another where any picture, caption or key, or their order, changes."""
    digest = hashlib.sha256(identities(dataset).tobytes())
    for captions in all_captions(dataset):
        digest.update(repr(captions).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


class CachedLatents:
    """The latents of a data set, map-style and read piece by piece from a file that `open_latents` has written.

    `cached[i]` -> {"mean": float32 (C, h, w), "std": float32 (C, h, w), "captions": list[str], "key": str}. Raises
    SampleError for a picture that could not be read, and UserError when another run has replaced the file.
    """

    def __init__(self, path: Path, dataset: Any, metadata: dict[str, str]) -> None:
        self.path, self.dataset, self.metadata = path, dataset, metadata
        self.faults = getattr(dataset, "faults", None)
        self.lengths = getattr(dataset, "lengths", None)

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
            mean, std = file.get_slice("moments")[i].float()
        if not mean.isfinite().all():
            self.dataset[i]  # raises the SampleError again
        return {"mean": mean, "std": std, "captions": self.captions(i), "key": self.dataset.identity(i)[0]}


def open_latents(path: Path, vae: nn.Module, dataset: Any, batch_size: int, device: torch.device) -> CachedLatents:
    """The latents of a data set, of which those that the cache at `path` does not have are encoded now.

    Pictures that have changed are encoded again, those that are gone are dropped. Processes of one launch, which must
    all call this, share the work. `vae.encode(x)`, x (B, 3, H, W) in [-1, 1], has `.mean` and `.std` (B, C, h, w); the
    VAE is left in eval mode. Raises UserError for a cache of another VAE, of other pictures altogether or of an older
    version, for a damaged one, a full disk, and latents that are not finite.
    """
    path, keys = Path(path), identities(dataset)
    if not len(keys):
        raise UserError("the data set has no samples to encode")
    metadata = {"format": FORMAT, "vae": module_hash(vae), "data": hashlib.sha256(keys.tobytes()).hexdigest()}
    rows = read_rows(path, metadata, keys) if path.exists() else [None] * len(keys)
    gather_objects(None)  # all have looked before one writes
    if rows is not None:
        try:
            write_cache(path, vae.to(device).eval(), dataset, batch_size, metadata, keys, rows)
        except OSError as error:
            raise UserError(f"cannot write the latent cache {str(path)!r}: {error.strerror or error}") from None
    return CachedLatents(path, dataset, metadata)


def open_cache(path: Path) -> Any:
    """The file of a cache. Raises UserError for one that is damaged."""
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"latent cache {str(path)!r} is damaged ({error}); delete it to write it again") from None


def read_rows(path: Path, metadata: dict[str, str], keys: np.ndarray) -> list[int | None] | None:
    """Which row of a cache each picture has, None where it has none; None where the cache is up to date."""
    with open_cache(path) as file:
        old = file.metadata() or {}
        if old == metadata:
            return None
        if old.get("format") != FORMAT:
            reason = f"is of another version ({old.get('format', 'unknown')}, not {FORMAT})"
        elif old["vae"] != metadata["vae"]:
            reason = f"was made by another VAE ({old['vae'][:12]}, not {metadata['vae'][:12]})"
        else:
            known = {key.tobytes(): row for row, key in enumerate(file.get_tensor("identities").numpy())}
            rows = [known.get(key.tobytes()) for key in keys]
            if any(row is not None for row in rows):
                return rows
            reason = "was made from another data set, split or picture size"
    raise UserError(f"latent cache {str(path)!r} {reason}; delete it to write it again")


@torch.inference_mode()
def write_cache(
    path: Path,
    vae: nn.Module,
    dataset: Any,
    batch_size: int,
    metadata: dict[str, str],
    keys: np.ndarray,
    rows: list[int | None],
) -> None:
    """Writes a cache, as a whole or not at all: its `rows` of an old cache are copied, the others encoded.

    Each process writes its samples into one file, which then takes the place of the old one.
    """
    rank, world = rank_and_world()
    shape = encode(vae, torch.zeros(1, 3, dataset.size, dataset.size, dtype=torch.uint8)).shape[1:]
    header = _header(metadata, len(keys), shape) + keys.tobytes()
    missing = [i for i, row in enumerate(rows) if row is None]
    batches = [missing[i : i + batch_size] for i in range(0, len(missing), batch_size)]
    batches = batches[len(batches) * rank // world : len(batches) * (rank + 1) // world]
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if rank == 0:
            stack.enter_context(atomic_write(path)).write_bytes(header)
        gather_objects(None)  # so the file is there for all
        with path.with_name(path.name + ".tmp").open("r+b") as file:
            kept = _copy(path, rows) if rank == 0 else ()
            for i, moments in itertools.chain(kept, _encode(vae, dataset, batches, shape)):
                file.seek(len(header) + i * moments.nbytes)
                file.write(moments.numpy().tobytes())
            file.flush()
            os.fsync(file.fileno())
        gather_objects(None)  # so all have written
    gather_objects(None)  # so the cache is there for all


def _header(metadata: dict[str, str], count: int, shape: tuple[int, ...]) -> bytes:
    """Of a safetensors file: the length of what follows, then JSON."""
    start, end = count * KEY, count * (KEY + 2 * math.prod(shape))
    identities = {"dtype": "U8", "shape": [count, KEY], "data_offsets": [0, start]}
    moments = {"dtype": "F16", "shape": [count, *shape], "data_offsets": [start, end]}
    table = json.dumps({"__metadata__": metadata, "identities": identities, "moments": moments})
    table = table.encode().ljust(-(-len(table) // 8) * 8)
    return len(table).to_bytes(8, "little") + table


def _copy(path: Path, rows: list[int | None]) -> Iterator[tuple[int, Tensor]]:
    if any(row is not None for row in rows):
        with open_cache(path) as file:
            moments = file.get_slice("moments")
            yield from ((i, moments[row]) for i, row in enumerate(rows) if row is not None)


def _encode(
    vae: nn.Module, dataset: Any, batches: list[list[int]], shape: tuple[int, ...]
) -> Iterator[tuple[int, Tensor]]:
    for batch in tqdm(batches, desc="encoding", unit="batch", disable=rank_and_world()[0] > 0):
        images = {i: sample["image"] for i in batch if (sample := attempt(dataset, dataset.__getitem__, i))}
        yield from ((i, torch.full(shape, torch.nan, dtype=torch.half)) for i in batch if i not in images)
        if images:
            yield from zip(images, encode(vae, torch.stack(list(images.values()))), strict=True)


def encode(vae: nn.Module, images: Tensor) -> Tensor:
    """uint8 images (B, 3, H, W) -> their means and stds (B, 2, C, h, w), in float16 on the CPU."""
    posterior = vae.encode(to_float(images.to(next(vae.parameters()).device)))
    moments = torch.stack([posterior.mean, posterior.std], dim=1).half().cpu()
    if not moments.isfinite().all():
        raise UserError("the VAE gives latents that are not finite in float16; train it again with more KL")
    return moments
