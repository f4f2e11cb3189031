"""Features of pictures, kept by the pictures' own hash: what was seen once is not computed again, in any run. Several
processes see a batch each, the same batches as one process would."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ldm import model_io as weights
from ldm.config import UserError
from ldm.distributed import map_over_processes, processes
from ldm.images import to_float

SAVED = 20  # batches between writes; what a stop loses at most
HASH = 16  # bytes of SHA-256


class FeatureCache:
    """Features of one network in the file `folder/<network>.safetensors`, of pictures named by their pixels."""

    def __init__(self, folder: Path, name: str, sha256: str, network: Callable[[Tensor], Tensor], device: torch.device):
        safe = "".join(c if c.isalnum() or c in "-_" else "-" for c in name)
        self.path = folder / f"{safe}-{sha256[:8]}.safetensors"
        self.network, self.device = network, device
        self.known: dict[bytes, Tensor] = _read(self.path)

    def __call__(self, batch: Callable[[int], Tensor], count: int, text: str) -> Tensor:
        """The uint8 pictures (B, 3, H, W) of batches 0 to `count` - 1 -> features (N, D), with a bar."""
        names: list[bytes] = []
        with tqdm(total=count, desc=text, unit="batch", leave=False, disable=not processes().is_main_process) as bar:
            for first in range(0, count, SAVED):
                numbers = range(first, min(first + SAVED, count))
                found = map_over_processes(lambda n: self._see(batch(n), bar), numbers)
                new = {name: row for _, rows in found for name, row in rows.items()}
                self.known |= new
                if new and processes().is_main_process:
                    self._write()
                names += [name for hashes, _ in found for name in hashes]
                bar.update(len(numbers) - bar.n + first)
        return torch.stack([self.known[name] for name in names])

    def _see(self, pixels: Tensor, bar: tqdm) -> tuple[list[bytes], dict[bytes, Tensor]]:
        """The names of a batch of pictures, and the features of those that are not known yet."""
        hashes = [_hash(picture) for picture in pixels]
        missing = [i for i, name in enumerate(hashes) if name not in self.known]
        features = self.network(to_float(pixels[missing]).to(self.device)).float().cpu() if missing else ()
        bar.update()
        return hashes, {hashes[i]: row.clone() for i, row in zip(missing, features, strict=True)}

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        names = torch.frombuffer(bytearray(b"".join(self.known)), dtype=torch.uint8).view(-1, HASH)
        weights.save_tensors(self.path, {"names": names, "features": torch.stack(list(self.known.values()))})


def _read(path: Path) -> dict[bytes, Tensor]:
    """What is known; nothing where the file is missing or damaged, as it can be computed again."""
    try:
        tensors = weights.load_tensors(path) if path.is_file() else {}
        names, features = tensors["names"], tensors["features"]
    except (UserError, KeyError):
        return {}
    return {bytes(name.tolist()): row for name, row in zip(names, features, strict=True)}


def _hash(picture: Tensor) -> bytes:
    """Of the pixels and the shape."""
    digest = hashlib.sha256(str(tuple(picture.shape)).encode())
    digest.update(picture.contiguous().numpy())
    return digest.digest()[:HASH]
