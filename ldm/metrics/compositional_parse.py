"""Reads shapes pictures: segments colours, finds components, names their shapes. No learned part."""

from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from einops import rearrange

from ldm.config import UserError
from ldm.data.shapes import BACKGROUND, COLOURS, SHAPES, SIZES, Thing, coverage

UNKNOWN = "unknown"  # the shape of a component that is like none of SHAPES
SIDE = 32  # pixels a side at which pictures are read; larger ones are averaged down to it
CANVAS = 20  # pixels a side of a template
PHASES = 4  # template positions a pixel, along each axis
STRETCH = (0.85, 0.92, 1.0, 1.08, 1.16)  # template diameters, times the two true ones
COVERED = 0.5  # a pixel at least this far from the background to a colour belongs to a thing
SPECK = 6  # components of fewer pixels are ignored; the smallest thing, a small star, has about 28
# least intersection over union with a template: under what a true shape has after a blur of 0.7 pixels or
# noise, and for the two plump shapes over what a diamond or a heart has
LIKE = {"circle": 0.86, "square": 0.83, "triangle": 0.77, "cross": 0.77, "ring": 0.77, "star": 0.74}

NAMES = tuple(COLOURS)
RAYS = np.array([COLOURS[name] for name in NAMES], np.float32) - np.array(BACKGROUND, np.float32)


def parse(image: np.ndarray) -> list[Thing]:
    """The things seen in a picture: colour, shape (UNKNOWN if like none), size and centre of each.

    `image` is uint8 (H, H, 3), of any side from 24 on. Fainter marks than half a colour, and specks under
    0.6% of the picture, are not seen. Raises UserError when the array is no square RGB picture.
    """
    covers, labels = _segment(_shrink(image))
    return [_name(covers, labels, pixels) for pixels in _components(labels) if len(pixels) >= SPECK]


def _shrink(image: np.ndarray) -> np.ndarray:
    """(SIDE, SIDE, 3) float32 in 0..255 by averaging areas."""
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.shape[0] != image.shape[1]:
        raise UserError(f"a picture to read is uint8 (H, H, 3), not {image.dtype} {image.shape}")
    if image.shape[0] == SIDE:
        return image.astype(np.float32)
    x = rearrange(torch.from_numpy(image.astype(np.float32)), "h w c -> c h w")
    return rearrange(torch.nn.functional.adaptive_avg_pool2d(x, SIDE), "c h w -> h w c").numpy()


def _segment(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far each pixel is from the background towards each colour, (H, W, 8) in [0, 1], and the index of
    the colour it belongs to, (H, W), -1 for background.

    An antialiased pixel lies on the straight line from the background to its colour, so the nearest of
    these eight lines is its colour and the place along the line is its coverage."""
    offset = picture - np.array(BACKGROUND, np.float32)
    covers = np.clip(offset @ (RAYS / (RAYS**2).sum(1, keepdims=True)).T, 0, 1)
    # squared distance to the point on the ray, less the pixel's own square, which all rays share
    distance = covers**2 * (RAYS**2).sum(1) - 2 * covers * (offset @ RAYS.T)
    labels = distance.argmin(-1)
    best = np.take_along_axis(covers, labels[..., None], -1)[..., 0]
    return covers, np.where(best >= COVERED, labels, -1)


def _components(labels: np.ndarray) -> Iterator[list[int]]:
    """Groups of 8-connected pixels of one colour, as indices into the flattened, once padded label map."""
    width = labels.shape[1] + 2
    flat = np.pad(labels, 1, constant_values=-1).ravel().tolist()
    steps = (1, -1, width, -width, width + 1, width - 1, -width + 1, -width - 1)
    for start in range(len(flat)):
        colour = flat[start]
        if colour < 0:
            continue
        pixels, flat[start] = [start], -1
        for pixel in pixels:  # grows while it is walked
            for step in steps:
                if flat[pixel + step] == colour:
                    flat[pixel + step] = -1
                    pixels.append(pixel + step)
        yield pixels


def _name(covers: np.ndarray, labels: np.ndarray, pixels: list[int]) -> Thing:
    height, width = labels.shape
    rows, columns = np.divmod(np.array(pixels), width + 2)
    rows, columns = rows - 1, columns - 1
    colour = labels[rows[0], columns[0]]
    own = np.zeros((height + 2, width + 2), bool)
    own[rows + 1, columns + 1] = True
    near = np.any([own[a : a + height, b : b + width] for a in range(3) for b in range(3)], 0)
    free = own[1:-1, 1:-1] | (labels < 0)
    soft = covers[..., colour] * (near & free)
    # a paler colour is still the colour: full coverage is the level of the component's fullest quarter
    soft = np.minimum(soft / np.quantile(soft[rows, columns], 0.75), 1)
    y = (soft.sum(1) @ (np.arange(height) + 0.5)) / soft.sum()
    x = (soft.sum(0) @ (np.arange(width) + 0.5)) / soft.sum()
    shape, size, shift_x, shift_y = _classify(soft, x, y)
    centre = {"x": float(x + shift_x) / width, "y": float(y + shift_y) / height}
    return Thing(colour=NAMES[colour], shape=shape, size=size, **centre)


def _classify(soft: np.ndarray, x: float, y: float) -> tuple[str, str | None, float, float]:
    """The likest template's shape and size, and the way from the centroid (x, y) to its centre, in pixels."""
    left, top = int(x) - CANVAS // 2, int(y) - CANVAS // 2
    padded = np.pad(_harden(soft), CANVAS)
    crop = padded[top + CANVAS : top + 2 * CANVAS, left + CANVAS : left + 2 * CANVAS].ravel()
    phase_x, phase_y = int((x - int(x)) * PHASES), int((y - int(y)) * PHASES)
    templates, diameters, centres = _templates(phase_x, phase_y)
    common = np.minimum(templates, crop).sum(1)
    likeness = common / (templates.sum(1) + padded.sum() - common)
    best = int(likeness.argmax())
    shape = SHAPES[best // (len(diameters) // len(SHAPES))]
    if likeness[best] < LIKE[shape]:
        return UNKNOWN, None, 0.0, 0.0
    size = min(SIZES, key=lambda name: abs(np.log(SIZES[name] * SIDE / diameters[best])))
    return shape, size, *centres[best]


def _harden(soft: np.ndarray) -> np.ndarray:
    """Doubles the slope of edges around half coverage, so that likeness is about outlines, not softness."""
    return np.clip(2 * soft - 0.5, 0, 1)


@cache
def _templates(phase_x: int, phase_y: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coverage (K, CANVAS**2), diameter (K) and centre less centroid (K, 2) of all templates whose centroid
    lies in this part of the middle pixel."""
    x, y = (CANVAS // 2 + (phase + 0.5) / PHASES for phase in (phase_x, phase_y))
    masks, diameters, centres = [], [], []
    for shape in SHAPES:
        shift_x, shift_y = _centre_of(shape)
        for diameter in [side * SIDE * stretch for side in SIZES.values() for stretch in STRETCH]:
            mask = coverage(shape, diameter, x + shift_x * diameter, y + shift_y * diameter, CANVAS)
            masks.append(_harden(mask).ravel())
            diameters.append(diameter)
            centres.append((shift_x * diameter, shift_y * diameter))
    return np.array(masks), np.array(diameters), np.array(centres)


@cache
def _centre_of(shape: str) -> tuple[float, float]:
    """The way from a shape's centroid to its centre, in diameters."""
    mask = coverage(shape, 100.0, 51.0, 51.0, 102)
    place = np.arange(102) + 0.5
    x, y = (mask.sum(0) @ place) / mask.sum(), (mask.sum(1) @ place) / mask.sum()
    return (51.0 - x) / 100, (51.0 - y) / 100
