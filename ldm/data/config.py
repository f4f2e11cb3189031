"""The options of a data set."""

from dataclasses import dataclass
from typing import Literal

from ldm.config import require


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which captioned images, at which size."""

    name: str = "shapes"  # shapes | emoji | folder | shards
    path: str = ""  # of the folder or shards; shards may be URLs, several, and have {0000..0099} and *
    cache_gb: float = 0  # local disk for shards behind URLs, room for 8; 0: every sample is fetched when it is read
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
        require(self.cache_gb >= 0, "data.cache_gb", self.cache_gb, "0 or more")
        require(self.size >= 1, "data.size", self.size, "1 or more")
