"""Captioned images by name. A data set is a pure function of the index:

dataset[i] -> {"image": uint8 (3, size, size), "captions": list[str], "key": str}
dataset.captions(i) -> the same captions, without touching the image
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.config import UserError, require

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which captioned images, at which size."""

    name: str = "shapes"  # shapes | emoji | folder | shards
    path: str = ""  # where a folder or shards are
    size: int = 32  # pixels a side, after resize and centre crop
    length: int | None = None  # scenes of the training split of shapes
    seed: int = 0  # of the shapes, and of the split of a folder or shards that have none
    flip: bool = False  # mirror half of the training images; wrong where captions say left or right
    max_pixels: int = 16_000_000  # of a picture of a folder or shards; a larger one is not decoded
    max_broken: float = 0.01  # share of the samples of a folder or shards that may be left out as unusable

    def __post_init__(self) -> None:
        # up to what Pillow itself opens
        require(1 <= self.max_pixels <= 178_000_000, "data.max_pixels", self.max_pixels, "from 1 to 178000000")
        require(0 <= self.max_broken <= 1, "data.max_broken", self.max_broken, "in [0, 1]")


def open_dataset(config: DataConfig, split: str, need_captions: bool = True) -> Any:
    """The data set `config.name`, split train, val or test. UserError for an unknown name or split.

    Without `need_captions` the pictures of a folder may have none, which is enough for an autoencoder.
    """
    if config.name not in DATASETS:
        raise UserError(f"unknown data set {config.name!r}; known: {', '.join(DATASETS)}")
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    return DATASETS[config.name](config, split, need_captions)


def _shapes(config: DataConfig, split: str, need_captions: bool) -> Any:
    from ldm.data.shapes import Shapes

    return Shapes(config.size, split, config.length if split == "train" else None, config.seed)


def _emoji(config: DataConfig, split: str, need_captions: bool) -> Any:
    from ldm.data.emoji import Emoji

    return Emoji(config.size, split, config.path or None)


def _folder(config: DataConfig, split: str, need_captions: bool) -> Any:
    from ldm.data.folder import Folder

    return Folder(need_captions=need_captions, **_own(config, split))


def _shards(config: DataConfig, split: str, need_captions: bool) -> Any:
    from ldm.data.shards import Shards

    return Shards(**_own(config, split))


def _own(config: DataConfig, split: str) -> dict[str, Any]:
    """What a user's own folder and shards are opened with (UserError)."""
    c = config
    if not c.path:
        raise UserError(
            f"data set {c.name!r} needs a path: --data-path PATH in an evaluation, data.path=PATH in a training"
        )
    about = {"path": c.path, "size": c.size, "split": split, "seed": c.seed}
    return about | {"limit": c.max_pixels, "max_broken": c.max_broken}


DATASETS: dict[str, Callable[[DataConfig, str, bool], Any]] = {
    "shapes": _shapes,
    "emoji": _emoji,
    "folder": _folder,
    "shards": _shards,
}


def stack_images(samples: list[dict]) -> dict:
    """Samples -> {"image": uint8 (B, 3, H, W), "captions": B lists of strings}."""
    return {"image": torch.stack([s["image"] for s in samples]), "captions": [s["captions"] for s in samples]}


def spread(dataset: Any, count: int) -> list[int]:
    """At most `count` indices, evenly spread over the data set: it may be sorted."""
    count = min(count, len(dataset))
    return [i * (len(dataset) - 1) // max(count - 1, 1) for i in range(count)]


def batches(dataset: Any, indices: Sequence[int], batch_size: int) -> Iterator[dict]:
    """The samples of `indices` in order, stacked."""
    for start in range(0, len(indices), batch_size):
        yield stack_images([dataset[i] for i in indices[start : start + batch_size]])


def choose_captions(captions: list[list[str]], places: Tensor) -> list[str]:
    """One caption of each list, at `places` (B,) in [0, 1) of its length."""
    return [c[int(place * len(c))] for c, place in zip(captions, places.tolist(), strict=True)]


def flip_half(image: Tensor, chances: Tensor) -> Tensor:
    """Mirrors the images (B, 3, H, W) whose chance (B,) in [0, 1) is below one half."""
    mirrored = (chances < 0.5).to(image.device)
    return torch.where(mirrored[:, None, None, None], image.flip(-1), image)
