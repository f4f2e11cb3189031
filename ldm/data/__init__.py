"""Captioned images by name. A data set is a pure function of the index:

dataset[i] -> {"image": uint8 (3, size, size), "captions": list[str], "key": str}, or raises SampleError
dataset.captions(i) -> the same captions, without decoding the image
dataset.identity(i) -> the key, and a string that changes when the image's file does
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ldm.config import UserError, require
from ldm.data.emoji import Emoji
from ldm.data.faults import readable
from ldm.data.folder import Folder
from ldm.data.order import balancing_weights
from ldm.data.shapes import Shapes
from ldm.data.shards import Shards


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which captioned images, at which size."""

    name: str = "shapes"  # shapes | emoji | folder | shards
    path: str = ""  # of the folder or shards
    size: int = 32  # pixels per side, after resizing and centre crop
    length: int | None = None  # scenes in the training split of shapes
    seed: int = 0  # of the shapes, and of the split of a folder or shards that names none
    balance: Literal["picture", "root", "concept"] = "picture"  # what training draws alike often; root: in between
    flip: bool = False  # mirror half of the training images; wrong where captions say left or right
    max_pixels: int = 16_000_000  # of a picture in a folder or shards; a larger one is left out, not decoded
    max_broken: float = 0.01  # share of the samples of a folder or shards that may be left out as unusable

    def __post_init__(self) -> None:
        # up to what Pillow itself opens
        require(1 <= self.max_pixels <= 178_000_000, "data.max_pixels", self.max_pixels, "from 1 to 178000000")
        require(0 <= self.max_broken <= 1, "data.max_broken", self.max_broken, "in [0, 1]")
        require(self.size >= 1, "data.size", self.size, "1 or more")


def open_dataset(config: DataConfig, split: str, need_captions: bool = True) -> Any:
    """The data set `config.name`, split train, val or test. Raises UserError for an unknown name or split.

    Without `need_captions` the pictures of a folder may have none, which is enough for an autoencoder.
    """
    if config.name not in DATASETS:
        raise UserError(f"unknown data set {config.name!r}; known: {', '.join(DATASETS)}")
    if config.name in ("folder", "shards") and not config.path:
        raise UserError(f"data set {config.name!r} needs a path: --data-path PATH to evaluate, data.path=PATH to train")
    return DATASETS[config.name](config, split, need_captions)


DATASETS = {
    "shapes": lambda c, split, _: Shapes(c.size, split, c.length if split == "train" else None, c.seed),
    "emoji": lambda c, split, _: Emoji(c.size, split, c.path),
    "folder": lambda c, split, need: Folder(c.path, c.size, split, c.seed, c.max_pixels, need, c.max_broken),
    "shards": lambda c, split, _: Shards(c.path, c.size, split, c.seed, c.max_pixels, c.max_broken),
}


def sampling_weights(dataset: Any, balance: str) -> np.ndarray | None:
    """Weights (N,) by which training draws the samples; none where it draws all alike. A concept is what
    `dataset.concept(i)` names, else the first caption."""
    if balance == "picture":
        return None
    concept = getattr(dataset, "concept", lambda i: next(iter(dataset.captions(i)), ""))
    return balancing_weights([concept(i) for i in range(len(dataset))], {"root": 0.5, "concept": 1.0}[balance])


def stack_images(samples: list[dict]) -> dict:
    """Samples -> {"image": uint8 (B, 3, H, W), "captions": B lists of strings}."""
    return {"image": torch.stack([s["image"] for s in samples]), "captions": [s["captions"] for s in samples]}


def spread(dataset: Any, count: int) -> list[int]:
    """At most `count` indices, evenly spread over the data set, which may be sorted; without unreadable samples."""
    count = min(count, len(dataset))
    return readable(dataset, [i * (len(dataset) - 1) // max(count - 1, 1) for i in range(count)])


def batches(dataset: Any, indices: Sequence[int], batch_size: int) -> Iterator[dict]:
    """The samples of `indices` in order, stacked."""
    for start in range(0, len(indices), batch_size):
        yield stack_images([dataset[i] for i in indices[start : start + batch_size]])


def choose_captions(captions: list[list[str]], places: Tensor) -> list[str]:
    """One caption of each list, the one at its place (B,) in [0, 1)."""
    return [c[int(place * len(c))] for c, place in zip(captions, places.tolist(), strict=True)]


def flip_half(image: Tensor, chances: Tensor) -> Tensor:
    """Mirrors each image (B, 3, H, W) whose chance (B,), uniform in [0, 1), is below one half."""
    return torch.where((chances < 0.5).to(image.device)[:, None, None, None], image.flip(-1), image)
