"""Features of images by one network, kept under the hash of the pixels: nothing is computed twice, in any run."""

import hashlib
import math
import re
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ldm import model_io
from ldm.config import UserError
from ldm.distributed import map_over_processes, processes
from ldm.evaluate.pictures import Pictures
from ldm.images import to_float

SAVED = 20  # batches between two writes of the file
HASH = 16  # bytes of SHA-256


class Features:
    """Features of a network that has `name` and `sha256`, kept in `folder/<network>.safetensors`."""

    def __init__(self, folder: Path, network: nn.Module, device: torch.device, batch_size: int):
        self.network, self.device, self.batch_size = network.to(device), device, batch_size
        name = re.sub(r"[^\w-]", "-", network.name)
        self.path = folder / f"{name}-{network.sha256[:8]}.safetensors"
        self.known = self._read()
        self.names: dict[Pictures, list[bytes]] = {}

    def __call__(self, pictures: Pictures) -> Tensor:
        """Features (N, D) of the images, float32 on the CPU. Several processes compute a batch each."""
        if pictures not in self.names:
            self.names[pictures] = self._compute(pictures)
        return torch.stack([self.known[name] for name in self.names[pictures]])

    def _compute(self, pictures: Pictures) -> list[bytes]:
        names: list[bytes] = []
        numbers, main = range(math.ceil(pictures.count / self.batch_size)), processes().is_main_process
        text = f"{self.network.name}: {pictures.of}"
        with tqdm(total=len(numbers), desc=text, unit="batch", leave=False, disable=not main) as bar:
            for start in range(0, len(numbers), SAVED):
                part, before = numbers[start : start + SAVED], len(self.known)
                for hashes, rows in map_over_processes(lambda n: self._batch(pictures.batch(n, self.batch_size)), part):
                    names += hashes
                    self.known |= rows
                if main and len(self.known) > before:
                    self._write()
                bar.update(len(part))
        return names

    def _batch(self, pixels: Tensor) -> tuple[list[bytes], dict[bytes, Tensor]]:
        """The hashes of uint8 images (B, 3, H, W), and the features of those that are not known yet."""
        hashes = [_hash(picture) for picture in pixels]
        new = [i for i, name in enumerate(hashes) if name not in self.known]
        rows = self.network(to_float(pixels[new]).to(self.device)).float().cpu() if new else ()
        return hashes, {hashes[i]: row.clone() for i, row in zip(new, rows, strict=True)}

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        names = torch.frombuffer(bytearray(b"".join(self.known)), dtype=torch.uint8).view(-1, HASH)
        model_io.save_tensors(self.path, {"names": names, "features": torch.stack(list(self.known.values()))})

    def _read(self) -> dict[bytes, Tensor]:
        """Nothing where the file is missing or damaged, as it can be computed again."""
        try:
            tensors = model_io.load_tensors(self.path) if self.path.is_file() else {}
            return dict(zip((bytes(row.tolist()) for row in tensors["names"]), tensors["features"], strict=True))
        except (UserError, KeyError):
            return {}


def _hash(picture: Tensor) -> bytes:
    digest = hashlib.sha256(str(tuple(picture.shape)).encode())
    digest.update(picture.contiguous().numpy())
    return digest.digest()[:HASH]
