"""Cached latents: what a frozen VAE makes of a data set, computed once, sampled anew every epoch.

One safetensors file holds, for every sample, the raw moments of the VAE's Gaussian: `mean` and `std` (N, C,
h, w) in float16, and its key and captions (`records`, JSON in UTF-8, cut at `offsets`). Half precision
halves the file; its rounding, at most a 2048th of the mean, is below the std that a usual VAE adds. Shift and scale
are not in it: the VAE applies those (`vae.normalize`). Mirror images are not in it either, as the latent of
a mirror image is not the mirror image of the latent: train with `flip` from pictures, not from a cache.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from ldm.config import UserError
from ldm.data.faults import Faults
from ldm.distributed import gather_objects, rank_and_world
from ldm.model_io import module_hash, read_json, write_json

FORMAT = "ldm-latents-1"
HEADER = 4096  # bytes kept for the header, written last and filled up with spaces as the format allows


def data_hash(dataset: Any, probes: int = 16) -> str:
    """SHA-256 over a data set's length and `probes` of its samples, evenly spaced: key, captions and pixels.

    Cheap, and different for another set, split, order or picture size; not for one changed picture in
    between.
    """
    count = len(dataset)
    digest = hashlib.sha256(f"{count}\n".encode())
    for index in sorted({i * (count - 1) // max(probes - 1, 1) for i in range(probes)}):
        sample = dataset[index]
        about = [sample["key"], sample["captions"], list(sample["image"].shape)]
        digest.update(json.dumps(about).encode())
        digest.update(sample["image"].contiguous().numpy())
    return digest.hexdigest()


def cache_latents(
    vae: nn.Module,
    dataset: Any,
    path: str | Path,
    batch_size: int = 16,
    device: str | torch.device = "cpu",
    progress: bool = False,
    workers: int = 0,
) -> None:
    """Encodes every sample of a map-style data set once and writes `path` (whole, or not at all).

    Processes of one launch, which must all call this, encode a part of the batches each into the one file, the same as
    one process would write.

    `vae.encode(x)`, x (B, 3, H, W) in [-1, 1], gives `.mean` and `.std` (B, C, h, w); `vae` must be on
    `device`. `progress` shows a bar. UserError for an empty data set, a full disk, or latents that are not
    finite.
    """
    if not len(dataset):
        raise UserError("the data set has no samples to encode")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    about = {"format": FORMAT, "vae": module_hash(vae), "data": data_hash(dataset)}
    rank, world = rank_and_world()
    faults = getattr(dataset, "faults", None)
    was_training = vae.training
    vae.eval()
    try:
        if rank == 0:
            part.write_bytes(b"")
        gather_objects(None)  # so the file is there for all
        own = _share(len(dataset), batch_size, rank, world)
        with part.open("r+b") as file:
            batches = DataLoader(
                Subset(dataset, own),
                batch_size,
                num_workers=workers,
                collate_fn=list,
                generator=torch.Generator(),  # leaves the global one alone
            )
            bar = tqdm(batches, desc="encoding", unit="batch", disable=not progress or rank > 0)
            written = _write(file, vae, bar, len(dataset), own.start, device, faults)
            os.fsync(file.fileno())
            if parts := gather_objects(written):
                _finish(file, parts, len(dataset), about)
        if rank == 0:
            _publish(part, path, faults, parts)
        gather_objects(None)  # so the cache is there for all
    except OSError as error:
        raise UserError(f"cannot write the latent cache {str(path)!r}: {error.strerror or error}") from None
    finally:
        vae.train(was_training)
        if rank == 0:
            part.unlink(missing_ok=True)


class CachedLatents:
    """A latent cache, map-style and read piece by piece from the file.

    `cached[i]` -> {"mean": float32 (C, h, w), "std": float32 (C, h, w), "captions": list[str], "key": str},
    in the order of the data set it was made from. `expect_hash` is the `module_hash` of the VAE in use and
    `expect_data` the `data_hash` of the data set (None: not compared), `faults` what was left out of that.
    UserError for a missing or damaged file, another VAE's cache, or one of another data set or picture size.
    """

    def __init__(
        self, path: str | Path, expect_hash: str, expect_data: str | None = None, faults: Faults | None = None
    ) -> None:
        self.path = Path(path)
        self._file, self._process = None, -1
        self.faults = faults
        if faults is not None and _left_out(self.path).is_file():
            for name, why in read_json(_left_out(self.path)).items():
                faults.add(name, why)
        if not self.path.is_file():
            raise UserError(f"latent cache {str(path)!r} does not exist; write it first")
        about = self._open().metadata() or {}
        if about.get("format") != FORMAT:
            raise UserError(f"{str(path)!r} is no latent cache of this version ({FORMAT}); write it again")
        for key, want, what in (
            ("vae", expect_hash, "by another VAE"),
            ("data", expect_data, "from another data set, split or picture size"),
        ):
            have = about.get(key, "")
            if want is not None and have != want:
                hashes = f"{have[:12]}, not {want[:12]}"
                raise UserError(f"latent cache {str(path)!r} was made {what} ({hashes}); delete it to write it again")
        self.shape: tuple[int, ...] = tuple(self._open().get_slice("mean").get_shape())  # (N, C, h, w)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        i = index % len(self)
        file = self._open()
        first, last = file.get_slice("offsets")[i : i + 2].tolist()
        key, captions = json.loads(file.get_slice("records")[first:last].numpy().tobytes())
        mean, std = (file.get_slice(name)[i : i + 1][0].float() for name in ("mean", "std"))
        return {"mean": mean, "std": std, "captions": captions, "key": key}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_process": -1}  # an open file does not go to another process

    def _open(self) -> Any:
        if self._process != os.getpid():
            try:
                self._file = safe_open(self.path, "pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"latent cache {str(self.path)!r} is damaged ({error}); write it again") from None
            self._process = os.getpid()
        return self._file


def open_latents(path: Path, vae: nn.Module, dataset: Any, batch_size: int, device: torch.device) -> CachedLatents:
    """The latents of all samples of a data set, encoded now where the cache at `path` is not there yet."""
    missing = not path.exists()
    gather_objects(None)  # all have looked before one writes
    if missing:
        cache_latents(vae.to(device), dataset, path, batch_size, device, progress=True)
    return CachedLatents(path, module_hash(vae), data_hash(dataset), getattr(dataset, "faults", None))


def _left_out(path: Path) -> Path:
    """Where a cache lists what was left out when it was written."""
    return path.with_name(f"{path.name}.left_out.json")


class _Part(NamedTuple):
    """What one process has written of the moments, and what is still to be."""

    records: list[bytes]
    shape: tuple[int, ...]  # of a sample's mean; empty where the process had none
    found: dict[str, str]  # samples that were left out


def _share(count: int, batch_size: int, rank: int, world: int) -> range:
    """The samples that one process encodes: whole batches, in order."""
    batches = -(-count // batch_size)
    first, last = (min(batches * r // world * batch_size, count) for r in (rank, rank + 1))
    return range(first, last)


@torch.inference_mode()
def _write(
    file: BinaryIO, vae: nn.Module, batches: Any, count: int, first: int, device: Any, faults: Faults | None
) -> _Part:
    """Writes the moments of all `batches`, from sample `first` of `count` on, to their places."""
    records: list[bytes] = []
    shape: tuple[int, ...] = ()
    found: dict[str, str] = {}
    begin = HEADER + 8 * (count + 1)  # header, offsets, then mean, std and records
    for samples in batches:
        for name, why in ((n, w) for sample in samples for n, w in sample.get("faults", {}).items()):
            found[name] = why
            faults.add(name, why)
        x = torch.stack([sample["image"] for sample in samples]).to(device)
        moments = vae.encode(x / 127.5 - 1)
        shape = tuple(moments.mean.shape[1:])
        for number, values in enumerate((moments.mean, moments.std)):
            file.seek(begin + (number * count + first + len(records)) * 2 * int(np.prod(shape)))
            file.write(_half(values).tobytes())
        records += [json.dumps([sample["key"], sample["captions"]]).encode() for sample in samples]
    file.flush()
    return _Part(records, shape, found)


def _finish(file: BinaryIO, parts: list[_Part], count: int, about: dict[str, str]) -> None:
    """Writes what stands around the moments, which are all there."""
    records = [record for part in parts for record in part.records]
    shape = next(part.shape for part in parts if part.shape)
    file.seek(0, os.SEEK_END)
    file.write(b"".join(records))
    offsets = np.cumsum([0] + [len(record) for record in records], dtype="<i8")
    file.seek(0)
    file.write(_header(about, (count, *shape), int(offsets[-1])))
    file.write(offsets.tobytes())
    file.flush()
    os.fsync(file.fileno())


def _publish(part: Path, path: Path, faults: Faults | None, parts: list[_Part]) -> None:
    """Gives the finished file its name, and lists what was left out, by any process, beside it."""
    os.replace(part, path)
    _left_out(path).unlink(missing_ok=True)
    found = dict(faults.reasons) if faults else {}
    for each in parts:
        found |= each.found
    if found:
        write_json(_left_out(path), found)


def cache_bytes(count: int, shape: tuple[int, ...], text_bytes: int) -> int:
    """The size of a cache of `count` samples with latents of `shape` (C, h, w); `text_bytes` of all keys and captions
    as JSON."""
    return HEADER + 8 * (count + 1) + 2 * 2 * count * int(np.prod(shape)) + text_bytes


def _half(values: Tensor) -> np.ndarray:
    half = values.half()
    if not torch.isfinite(half).all():
        raise UserError("the VAE gives latents that are not finite in float16; train it again with more KL")
    return half.cpu().numpy()


def _header(about: dict[str, str], shape: tuple[int, ...], text_bytes: int) -> bytes:
    table: dict[str, Any] = {"__metadata__": about}
    place = 0
    for name, dtype, size, dims in (
        ("offsets", "I64", 8, (shape[0] + 1,)),
        ("mean", "F16", 2, shape),
        ("std", "F16", 2, shape),
        ("records", "U8", 1, (text_bytes,)),
    ):
        end = place + size * int(np.prod(dims))
        table[name] = {"dtype": dtype, "shape": list(dims), "data_offsets": [place, end]}
        place = end
    text = json.dumps(table).encode()
    return (HEADER - 8).to_bytes(8, "little") + text.ljust(HEADER - 8)
