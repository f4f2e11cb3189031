"""Procedural pictures of coloured shapes, their captions and exact scenes, as a map-style data set."""

import random
from collections.abc import Callable

import numpy as np
import torch
from einops import rearrange, reduce

from ldm.config import UserError
from ldm.data.shapes_captions import captions
from ldm.data.shapes_scene import (
    BACKGROUND,
    COLOURS,
    HELD_OUT_COUNTS,
    HELD_OUT_RELATIONS,
    HELD_OUT_THINGS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    is_held_out,
    relation_of,
    sample_scene,
)

__all__ = [
    "BACKGROUND",
    "COLOURS",
    "HELD_OUT_COUNTS",
    "HELD_OUT_RELATIONS",
    "HELD_OUT_THINGS",
    "LENGTHS",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "Scene",
    "Shapes",
    "Thing",
    "captions",
    "coverage",
    "is_held_out",
    "relation_of",
    "render",
    "sample_scene",
]

LENGTHS = {"train": 200_000, "val": 2_000, "test": 2_000}
SAMPLES = 4  # sub-pixel samples a side for antialiasing
MIN_SIZE = 24  # below this a ring's hole and a star's points are gone


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Five points, one up; tips at radius 1 and notches at 0.45, in polar form folded to half a point."""
    fold = np.pi / 5
    angle = np.abs((np.arctan2(u, -v) + fold) % (2 * fold) - fold)
    r = np.hypot(u, v)
    notch_x, notch_y = 0.45 * np.cos(fold), 0.45 * np.sin(fold)
    return (notch_x - 1) * r * np.sin(angle) >= notch_y * (r * np.cos(angle) - 1)


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = np.abs(u), np.abs(v)
    return (np.minimum(u, v) <= 0.32) & (np.maximum(u, v) <= 1)


INSIDE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {  # u right, v down, both in [-1, 1]
    "circle": lambda u, v: u * u + v * v <= 1,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) <= 0.9,
    "triangle": lambda u, v: (np.abs(u) <= (v + 0.9) * 0.55) & (v <= 0.9),
    "cross": _cross,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.75) <= 0.25,
    "star": _star,
}


def coverage(shape: str, diameter: float, x: float, y: float, side: int) -> np.ndarray:
    """How much of each pixel of a (side, side) square the shape covers, float in [0, 1].

    `diameter` and the centre `x`, `y` are in pixels; (0, 0) is the upper left corner of the square.
    """
    points = (np.arange(side * SAMPLES, dtype=np.float32) + 0.5) / SAMPLES
    u = np.broadcast_to((points[None] - x) * (2 / diameter), (len(points), len(points)))
    v = np.broadcast_to((points[:, None] - y) * (2 / diameter), (len(points), len(points)))
    inside = INSIDE[shape](u, v)
    return reduce(inside.astype(np.float32), "(h a) (w b) -> h w", "mean", a=SAMPLES, b=SAMPLES)


def render(scene: Scene, size: int) -> np.ndarray:
    """The scene as a uint8 (size, size, 3) picture on the plain background, edges antialiased."""
    picture = np.empty((size, size, 3), np.float32)
    picture[:] = BACKGROUND
    for thing in scene.things:
        diameter = SIZES[thing.size] * size
        x, y = thing.x * size, thing.y * size
        left, top = int(x - diameter / 2), int(y - diameter / 2)
        side = min(int(diameter) + 2, size - max(left, top))
        cover = coverage(thing.shape, diameter, x - left, y - top, side)[..., None]
        patch = picture[top : top + side, left : left + side]
        patch += cover * (np.asarray(COLOURS[thing.colour], np.float32) - patch)
    return (picture + 0.5).astype(np.uint8)


class Shapes:
    """Map-style data set of 1 to 3 coloured shapes; the same (seed, split, index) is the same item anywhere.

    `train` and `val` show no held-out composition; of `test` every second item (odd index) shows one.
    """

    def __init__(self, size: int = 32, split: str = "train", length: int | None = None, seed: int = 0) -> None:
        """`size` is the side in pixels, `length` the number of items (None: LENGTHS[split]).

        Raises UserError for an unknown split, a size below MIN_SIZE or a length below 1.
        """
        if split not in LENGTHS:
            raise UserError(f"shapes split {split!r} is unknown; use one of {', '.join(LENGTHS)}")
        if size < MIN_SIZE:
            raise UserError(f"shapes at {size} px cannot be told apart; use a size of {MIN_SIZE} or more")
        if length is not None and length < 1:
            raise UserError(f"shapes length {length} is empty; use 1 or more, or leave it out")
        self.size, self.split, self.seed = size, split, seed
        self.length = length or LENGTHS[split]

    def __len__(self) -> int:
        return self.length

    def scene(self, index: int) -> Scene:
        """The exact scene of an item, without drawing it; IndexError outside 0..len-1."""
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} is outside 0..{self.length - 1}")
        rng = random.Random(f"{self.seed}/{self.split}/{index}")
        return sample_scene(rng, held_out=self.split == "test" and index % 2 == 1)

    def captions(self, index: int) -> list[str]:
        """All captions of an item, without drawing it."""
        return captions(self.scene(index))

    def __getitem__(self, index: int) -> dict:
        """{"image": uint8 (3, size, size), "captions": list of str, "key": str, "scene": Scene}."""
        scene = self.scene(index)
        image = torch.from_numpy(rearrange(render(scene, self.size), "h w c -> c h w").copy())
        key = f"shapes-{self.seed}-{self.split}-{index:07d}"
        return {"image": image, "captions": captions(scene), "key": key, "scene": scene}
