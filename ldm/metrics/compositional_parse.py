"""Reads shapes pictures: segments colours, finds components, names their shapes. No learned part."""

import itertools
from functools import cache

import numpy as np
import torch
from einops import rearrange

from ldm.config import UserError
from ldm.data.shapes import BACKGROUND, COLOURS, SHAPES, SIZES, Thing, coverage

UNKNOWN = "unknown"  # the shape of a component that is like none of SHAPES
SIDE = 32  # pixels a side at which pictures are read; larger ones are averaged down to it
CANVAS = 20  # pixels a side of a template
PHASES = 4  # template positions per pixel, along each axis
STRETCH = (0.85, 0.92, 1.0, 1.08, 1.16)  # template diameters, times the two true ones
COVERED = 0.5  # a pixel at least this far from the background to a colour belongs to a thing
SPECK = 6  # components of fewer pixels are ignored; the smallest thing, a small star, has about 28
# least intersection over union with a template: under that of a true shape after a blur of 0.7 pixels or
# noise, and for the two plump shapes over that of a diamond or a heart
LIKE = {"circle": 0.86, "square": 0.83, "triangle": 0.77, "cross": 0.77, "ring": 0.77, "star": 0.74}

RAYS = np.array(list(COLOURS.values()), np.float32) - np.array(BACKGROUND, np.float32)
AROUND = np.ones((3, 3))  # the neighbourhood that connects pixels


def parse(image: np.ndarray) -> list[Thing]:
    """The things seen in a picture: colour, shape (UNKNOWN if like none), size and centre of each.

    `image` is uint8 (H, H, 3), of any side from 24 on. Fainter marks than half a colour, and specks under
    0.6% of the picture, are not seen. Raises UserError when the array is no square RGB picture.
    """
    from scipy import ndimage

    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.shape[0] != image.shape[1]:
        raise UserError(f"a picture to read is uint8 (H, H, 3), not {image.dtype} {image.shape}")
    x = rearrange(torch.from_numpy(image.astype(np.float32)), "h w c -> c h w")
    covers, labels = _segment(rearrange(torch.nn.functional.adaptive_avg_pool2d(x, SIDE), "c h w -> h w c").numpy())
    things = []
    for i, colour in enumerate(COLOURS):
        components, count = ndimage.label(labels == i, AROUND)
        masks = [components == component for component in range(1, count + 1)]
        things += [_name(colour, mask, covers[..., i], labels < 0) for mask in masks if mask.sum() >= SPECK]
    return things


def _segment(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far each pixel is from the background towards each colour, (H, W, 8) in [0, 1], and the index of
    its colour, (H, W), -1 for background.

    An antialiased pixel lies on the straight line from the background to its colour, so the nearest of
    these eight lines is its colour and the position along the line is its coverage."""
    offset = picture - np.array(BACKGROUND, np.float32)
    along, squares = offset @ RAYS.T, (RAYS**2).sum(1)
    covers = np.clip(along / squares, 0, 1)
    # squared distance to the point on the ray, less the pixel's own square, which all rays share
    labels = (covers**2 * squares - 2 * covers * along).argmin(-1)
    best = np.take_along_axis(covers, labels[..., None], -1)[..., 0]
    return covers, np.where(best >= COVERED, labels, -1)


def _name(colour: str, mask: np.ndarray, cover: np.ndarray, background: np.ndarray) -> Thing:
    """The thing whose pixels are `mask`, by the likest template around its centroid."""
    from scipy import ndimage

    soft = cover * (ndimage.binary_dilation(mask, AROUND) & (mask | background))
    # a paler colour is still the colour: full coverage is the level of the component's fullest quarter
    soft = np.minimum(soft / np.quantile(soft[mask], 0.75), 1)
    x, y = _centroid(soft)
    left, top = int(x) + CANVAS // 2, int(y) + CANVAS // 2  # in the padded picture
    padded = np.pad(_harden(soft), CANVAS)
    crop = padded[top : top + CANVAS, left : left + CANVAS].ravel()
    templates, names = _templates(int(x % 1 * PHASES), int(y % 1 * PHASES))
    common = np.minimum(templates, crop).sum(1)
    likeness = common / (templates.sum(1) + padded.sum() - common)
    best = int(likeness.argmax())
    shape, size, shift_x, shift_y = names[best]
    if likeness[best] < LIKE[shape]:
        shape, size, shift_x, shift_y = UNKNOWN, None, 0.0, 0.0
    return Thing(colour=colour, shape=shape, size=size, x=float(x + shift_x) / SIDE, y=float(y + shift_y) / SIDE)


def _harden(soft: np.ndarray) -> np.ndarray:
    """Doubles the slope of edges around half coverage, so that likeness is about outlines, not softness."""
    return np.clip(2 * soft - 0.5, 0, 1)


@cache
def _templates(phase_x: int, phase_y: int) -> tuple[np.ndarray, list[tuple[str, str, float, float]]]:
    """Coverage (K, CANVAS**2) of all templates whose centroid lies in this part of the middle pixel; and of each its
    shape, size and the way from centroid to centre, in pixels."""
    x, y = (CANVAS // 2 + (phase + 0.5) / PHASES for phase in (phase_x, phase_y))
    masks, names = [], []
    for shape in SHAPES:
        centroid = _centroid(coverage(shape, 100.0, 51.0, 51.0, 102))
        for size, stretch in itertools.product(SIZES, STRETCH):
            diameter = SIZES[size] * SIDE * stretch
            shift_x, shift_y = ((51.0 - c) / 100 * diameter for c in centroid)
            masks.append(_harden(coverage(shape, diameter, x + shift_x, y + shift_y, CANVAS)).ravel())
            names.append((shape, size, shift_x, shift_y))
    return np.array(masks), names


def _centroid(cover: np.ndarray) -> tuple[float, float]:
    """x and y of a square (H, H), in pixels from its upper left corner."""
    position = np.arange(len(cover)) + 0.5
    return (cover.sum(0) @ position) / cover.sum(), (cover.sum(1) @ position) / cover.sum()
