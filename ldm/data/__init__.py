"""Captioned images by name. A data set is a pure function of the index:

dataset[i] -> {"image": uint8 (3, size, size), "captions": list[str], "key": str}, or raises SampleError
dataset.captions(i) -> the same captions, without decoding the image
dataset.identity(i) -> the key, and a string that changes when the image's file does
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.config import UserError
from ldm.data.config import DataConfig
from ldm.data.emoji import Emoji
from ldm.data.faults import readable
from ldm.data.folder import Folder
from ldm.data.loader import stack
from ldm.data.order import balancing_weights
from ldm.data.shapes import Shapes
from ldm.data.shards import Shards
from ldm.data.splits import SPLITS


def open_dataset(config: DataConfig, split: str, need_captions: bool = True) -> Any:
    """The data set `config.name`, split train, val or test. Raises UserError for an unknown name or split, or an empty
    split.

    Without `need_captions` the pictures of a folder may have none, which is enough for an autoencoder.
    """
    for kind, name, known in (("data set", config.name, DATASETS), ("split", split, SPLITS)):
        if name not in known:
            raise UserError(f"unknown {kind} {name!r}; known: {', '.join(known)}")
    if config.name in ("folder", "shards") and not config.path:
        raise UserError(f"data set {config.name!r} needs a path: --data-path PATH to evaluate, data.path=PATH to train")
    dataset = DATASETS[config.name](config, split, need_captions)
    if not len(dataset):
        remedy = f"add pictures to it, or shards named {split}-000000.tar and so on"
        raise UserError(f"split {split!r} of {config.path!r} is empty; {remedy}")
    return dataset


DATASETS = {
    "shapes": lambda c, split, _: Shapes(c.size, split, c.length if split == "train" else None, c.seed),
    "emoji": lambda c, split, _: Emoji(c.size, split, c.path),
    "folder": Folder,
    "shards": lambda c, split, _: Shards(c, split),
}


def sampling_weights(dataset: Any, balance: str) -> np.ndarray | None:
    """Weights (N,) by which training draws the samples; none where it draws all alike. A concept is what
    `dataset.concept(i)` names, else the first caption."""
    if balance == "picture":
        return None
    concept = getattr(dataset, "concept", lambda i: next(iter(dataset.captions(i)), ""))
    return balancing_weights([concept(i) for i in range(len(dataset))], {"root": 0.5, "concept": 1.0}[balance])


def spread(dataset: Any, count: int) -> list[int]:
    """At most `count` indices, evenly spread over the data set, which may be sorted; without unreadable samples."""
    count = min(count, len(dataset))
    return readable(dataset, [i * (len(dataset) - 1) // max(count - 1, 1) for i in range(count)])


def batches(dataset: Any, indices: Sequence[int], batch_size: int) -> Iterator[dict]:
    """The samples of `indices` in order, stacked."""
    for start in range(0, len(indices), batch_size):
        yield stack([dataset[i] for i in indices[start : start + batch_size]])


def choose_captions(captions: list[list[str]], places: Tensor) -> list[str]:
    """One caption of each list, the one at its place (B,) in [0, 1)."""
    return [c[int(place * len(c))] for c, place in zip(captions, places.tolist(), strict=True)]


def flip_half(image: Tensor, chances: Tensor) -> Tensor:
    """Mirrors each image (B, 3, H, W) whose chance (B,), uniform in [0, 1) and on its device, is below one half."""
    return torch.where((chances < 0.5)[:, None, None, None], image.flip(-1), image)
