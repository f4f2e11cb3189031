"""Features of images by one network, kept under the hash of their pixels: no set is computed twice, in any run."""

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ldm.compilation import WhereItSaves, compiled
from ldm.config import UserError
from ldm.distributed import map_over_processes, processes
from ldm.evaluate.pictures import Pictures
from ldm.images import to_float
from ldm.metrics.features import feature_extractor, judged_by
from ldm.metrics.judges import JUDGES, image_text_model
from ldm.model_io import load_tensors, save_tensors

TAUGHT = {"trained_the_vae": True}  # field of distances by the very network that the VAE was trained to please


class Features:
    """Features of a network that has `name` and `sha256`, a file per set of images in `out/features/`."""

    def __init__(self, network: nn.Module, out: Path, device: torch.device, batch_size: int, compile: str = "never"):
        self.network, self.device, self.batch_size = network.to(device), device, batch_size
        self.embed = compiled(network, network.forward) if compile == "always" else network.forward
        if compile == "auto":
            self.embed = WhereItSaves(network, network.forward, 0)
        self.metadata: dict[str, Any] = network.metadata  # the fields that every record of these features carries
        name = re.sub(r"[^\w-]", "-", network.name)
        self.folder = out / "features" / f"{name}-{network.sha256[:8]}"
        self.rows: dict[Pictures, Tensor] = {}
        self.known_texts: dict[str, Tensor] = {}

    def __call__(self, pictures: Pictures) -> Tensor:
        """Features (N, D) of the images, float32 on the CPU. Several processes compute a batch each."""
        if pictures not in self.rows:
            digest = hashlib.sha256()
            for x in map(pictures.read, range(pictures.count)):
                digest.update(f"{tuple(x.shape)}".encode() + x.numpy().tobytes())
            path = self.folder / f"{digest.hexdigest()[:32]}.safetensors"
            try:
                self.rows[pictures] = load_tensors(path)["features"]
            except (UserError, KeyError):  # a missing or damaged file is computed again
                self.rows[pictures] = self._compute(pictures)
                if processes().is_main_process:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    save_tensors(path, {"features": self.rows[pictures]})
        return self.rows[pictures]

    def _compute(self, pictures: Pictures) -> Tensor:
        def batch(start: int) -> Tensor:
            progress.update()
            x = to_float(pictures.batch(start, self.batch_size)).to(self.device)
            return self.embed(x).float().cpu()

        if isinstance(self.embed, WhereItSaves):
            self.embed.left = -(-pictures.count // self.batch_size)
        starts, quiet = range(0, pictures.count, self.batch_size), not processes().is_main_process
        text = f"{self.network.name}: {pictures.of}"
        with tqdm(desc=text, total=len(starts), leave=False, disable=quiet) as progress:
            return torch.cat(map_over_processes(batch, starts))

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


def open_networks(
    config: Any, judge: str, teacher: str, device: torch.device
) -> tuple[Features | None, Features | None]:
    """The feature network, where "judge" is the image tower of `judge`, and the image-text model; None for "none".
    Records of the network that trained the measured VAE (`teacher`) are marked."""
    options = (config.out, device, config.batch_size, config.compile)
    name = judged_by(config.features, judge)
    features = None if name == "none" else Features(feature_extractor(name), *options)
    if features and features.network.name in teacher.split(", "):
        features.metadata |= TAUGHT
    return features, None if judge == "none" else Features(image_text_model(judge), *options)
