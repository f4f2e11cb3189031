"""Features of images by one network, kept under the hash of the pixels: nothing is computed twice, in any run."""

import hashlib
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ldm.config import UserError
from ldm.distributed import map_over_processes, processes
from ldm.evaluate.pictures import Pictures
from ldm.images import to_float
from ldm.metrics.features import feature_extractor, judged_by
from ldm.metrics.judges import JUDGES, image_text_model
from ldm.model_io import load_tensors, save_tensors

SAVED = 20  # batches between two writes of the file
HASH = 16  # bytes of SHA-256
TAUGHT = {"trained_the_vae": True}  # field of distances by the very network that the VAE was trained to please


class Features:
    """Features of a network that has `name` and `sha256`, kept in `out/features/<network>.safetensors`."""

    def __init__(self, network: nn.Module, out: Path, device: torch.device, batch_size: int):
        self.network, self.device, self.batch_size = network.to(device), device, batch_size
        self.metadata: dict[str, Any] = network.metadata  # the fields that every record of these features carries
        name = re.sub(r"[^\w-]", "-", network.name)
        self.path = out / "features" / f"{name}-{network.sha256[:8]}.safetensors"
        self.rows: dict[bytes, Tensor] = {}
        with suppress(UserError, KeyError):  # a missing or damaged file is computed again
            tensors = load_tensors(self.path)
            self.rows = dict(zip(map(bytes, tensors["names"].tolist()), tensors["features"], strict=True))
        self.hashes: dict[Pictures, list[bytes]] = {}
        self.known_texts: dict[str, Tensor] = {}

    def __call__(self, pictures: Pictures) -> Tensor:
        """Features (N, D) of the images, float32 on the CPU. Several processes compute a batch each."""
        if pictures not in self.hashes:
            self.hashes[pictures], size, main = [], self.batch_size, processes().is_main_process
            starts, text = range(0, pictures.count, size), f"{self.network.name}: {pictures.of}"
            for first in tqdm(range(0, len(starts), SAVED), desc=text, leave=False, disable=not main):
                batches = map_over_processes(lambda n: self._batch(pictures.batch(n, size)), starts[first:][:SAVED])
                new = {name: row for _, rows in batches for name, row in rows.items()}
                self.hashes[pictures] += [name for names, _ in batches for name in names]
                self.rows |= new
                if main and new:
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    names = torch.frombuffer(bytearray(b"".join(self.rows)), dtype=torch.uint8).view(-1, HASH)
                    save_tensors(self.path, {"names": names, "features": torch.stack([*self.rows.values()])})
        return torch.stack([self.rows[name] for name in self.hashes[pictures]])

    def _batch(self, pixels: Tensor) -> tuple[list[bytes], dict[bytes, Tensor]]:
        """The hashes of uint8 images (B, 3, H, W), and the features of those that are not known yet."""
        texts = [str(tuple(picture.shape)).encode() + picture.numpy().tobytes() for picture in pixels]
        names = [hashlib.sha256(text).digest()[:HASH] for text in texts]
        new = [i for i, name in enumerate(names) if name not in self.rows]
        rows = self.network(to_float(pixels[new]).to(self.device)).float().cpu() if new else ()
        return names, {names[i]: row.clone() for i, row in zip(new, rows, strict=True)}

    def texts(self, captions: list[str]) -> Tensor:
        """An image-text model's embeddings (N, D) of captions, on the CPU."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self.known_texts]
        for start in range(0, len(new), 64):
            part = new[start : start + 64]
            self.known_texts |= zip(part, self.network.texts(part).cpu(), strict=True)
        return torch.stack([self.known_texts[caption] for caption in captions])


def judge_name(judge: str, data: str) -> str:
    """The judge asked for, else the one that ships for the data, else "none"."""
    return judge or (data if (JUDGES / data).is_dir() else "none")


def open_networks(features: str, judge: str, teacher: str, *options: Any) -> tuple[Features | None, Features | None]:
    """The feature network, where "judge" is the image tower of `judge`, and the image-text model; None for "none".
    Records of the network that trained the measured VAE (`teacher`) are marked."""
    features = judged_by(features, judge)
    network = None if features == "none" else Features(feature_extractor(features), *options)
    if network and network.network.name == teacher:
        network.metadata |= TAUGHT
    return network, None if judge == "none" else Features(image_text_model(judge), *options)
