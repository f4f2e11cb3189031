"""Procedural pictures of coloured shapes with their exact scenes: which there are, how they are drawn and described.

Shipped models depend on every scene, caption and pixel of it.
"""

import itertools
import random
from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import reduce

from ldm.config import require

LENGTHS = {"train": 200_000, "val": 2_000, "test": 2_000}
MIN_SIZE = 24  # pixels; below this a ring's hole and a star's points are gone
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
COLOURS = {  # near the corners of the RGB cube: as far from each other, and from the grey middle, as can be
    "red": (240, 20, 25),
    "green": (20, 215, 40),
    "blue": (25, 40, 240),
    "yellow": (248, 230, 20),
    "cyan": (20, 225, 235),
    "pink": (242, 40, 220),
    "black": (10, 10, 10),
    "white": (248, 248, 248),
}
BACKGROUND = (128, 128, 128)
SIZES = {"small": 0.30, "large": 0.42}  # diameter over picture side: 9.6 and 13.4 pixels of 32
RELATIONS = {"left of": "right of", "above": "below", "right of": "left of", "below": "above"}  # and converse
KINDS = {"single": 0.2, "pair": 0.45, "count": 0.2, "trio": 0.15}  # share of each kind of scene

# Compositions that the train split never shows: things, numbers of equal things by colour or by shape, ordered pairs of
# shapes in a relation.
HELD_OUT = {"red star", "green ring", "yellow triangle", "pink cross", "2 cyan", "3 white", "3 star"}
HELD_OUT |= {"circle left of star", "ring left of cross", "triangle left of square"}
HELD_OUT |= {"square above triangle", "star above circle", "cross above ring"}

MARGIN, GAP = 1 / 32, 2 / 32  # least room to the picture's edge and between two things, in picture sides
CLEAR = 1.4  # two things are "left of" or "above" only when one axis leads the other by this factor
Box = list[tuple[float, float]]  # (low, high) on the x axis and on the y axis
SAMPLES = 4  # sub-pixel samples per side for antialiasing


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object. `x` (to the right) and `y` (down) are its centre in picture sides, in (0, 1);
    `size`, `x` and `y` are None where a requirement leaves them open."""

    colour: str
    shape: str
    size: str | None = None
    x: float | None = None
    y: float | None = None


@dataclass(frozen=True, kw_only=True)
class Scene:
    """All objects of a picture, or all that a caption requires: these things and no others.

    `relation` is that of things[0] to things[1] ("left of", "right of", "above", "below"), or None.
    """

    things: tuple[Thing, ...]
    relation: str | None = None


class Shapes:
    """Map-style data set of 1 to 3 coloured shapes; the same (seed, split, index) is the same item anywhere.

    `train` and `val` show no held-out composition; of `test` every second item (odd index) shows one. `size` is the
    side in pixels, `length` the number of items (None: LENGTHS[split]). Raises UserError for a size below MIN_SIZE or a
    length below 1.
    """

    def __init__(self, size: int = 32, split: str = "train", length: int | None = None, seed: int = 0) -> None:
        require(size >= MIN_SIZE, "data.size", size, f"{MIN_SIZE} or more, for shapes to be told apart")
        require(length is None or length >= 1, "data.length", length, "1 or more")
        self.size, self.split, self.seed = size, split, seed
        self.length = length or LENGTHS[split]

    def __len__(self) -> int:
        return self.length

    def scene(self, index: int) -> Scene:
        """The exact scene of an item, without drawing it. Raises IndexError outside the data set."""
        index = range(self.length)[index]
        rng = random.Random(f"{self.seed}/{self.split}/{index}")
        return sample_scene(rng, held_out=self.split == "test" and index % 2 == 1)

    def captions(self, index: int) -> list[str]:
        """All captions of an item, without drawing it."""
        return captions(self.scene(index))

    def identity(self, index: int) -> tuple[str, str]:
        """The key of an item, of which it is a pure function."""
        return f"shapes-{self.seed}-{self.split}-{index:07d}", ""

    def __getitem__(self, index: int) -> dict:
        """{"image": uint8 (3, size, size), "captions": list of str, "key": str}."""
        scene = self.scene(index)
        image = torch.from_numpy(render(scene, self.size)).permute(2, 0, 1).contiguous()
        return {"image": image, "captions": captions(scene), "key": self.identity(index)[0]}


# --- scenes


def relation_of(a: Thing, b: Thing) -> str:
    """Where `a` lies as seen from `b`, by the axis on which their centres are further apart."""
    dx, dy = b.x - a.x, b.y - a.y
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def is_held_out(scene: Scene) -> bool:
    """Whether the scene, or a requirement, shows one of HELD_OUT; a relation in any wording."""
    things = scene.things
    phrases = {f"{thing.colour} {thing.shape}" for thing in things}
    if len(phrases) == 1 < len(things):
        phrases |= {f"{len(things)} {things[0].colour}", f"{len(things)} {things[0].shape}"}
    elif things[0].x is not None:
        phrases |= {f"{a.shape} {relation_of(a, b)} {b.shape}" for a, b in itertools.permutations(things, 2)}
    elif scene.relation:
        a, b = (thing.shape for thing in things)
        phrases |= {f"{a} {scene.relation} {b}", f"{b} {RELATIONS[scene.relation]} {a}"}
    return not HELD_OUT.isdisjoint(phrases)


def sample_scene(rng: random.Random, held_out: bool, kind: str | None = None) -> Scene:
    """A random scene of a kind in KINDS (None: drawn by their shares) that is, or is not, held out."""
    while True:
        chosen = kind or rng.choices(tuple(KINDS), tuple(KINDS.values()))[0]
        things = _draw_things(rng, chosen)
        a, b = things[0], things[-1]
        near, far = sorted((abs(a.x - b.x), abs(a.y - b.y)))
        scene = Scene(things=things, relation=relation_of(a, b) if chosen == "pair" else None)
        if is_held_out(scene) == held_out and (far > CLEAR * near or chosen != "pair"):
            return scene


def _draw_things(rng: random.Random, kind: str) -> tuple[Thing, ...]:
    """Random things, never overlapping or touching, each wholly inside."""

    def draw() -> Thing:
        # in this order: the scenes depend on it
        return Thing(size=rng.choice(tuple(SIZES)), colour=rng.choice(tuple(COLOURS)), shape=rng.choice(SHAPES))

    if kind == "count":
        things = [draw()] * rng.choice((2, 3))
    else:
        different: dict[tuple[str, str], Thing] = {}
        while len(different) < ("single", "pair", "trio").index(kind) + 1:
            thing = draw()
            different.setdefault((thing.colour, thing.shape), thing)
        things = list(different.values())
    order = rng.sample(range(len(things)), len(things))
    picture = [(MARGIN, 1 - MARGIN)] * 2
    for i, box in zip(order, _cut(rng, [SIZES[things[i].size] for i in order], picture), strict=True):
        half = SIZES[things[i].size] / 2
        x, y = (rng.uniform(low + half, high - half) for low, high in box)
        things[i] = replace(things[i], x=x, y=y)
    return tuple(things)


def _cut(rng: random.Random, sides: list[float], box: Box) -> list[Box]:
    """Cuts a box into one cell per side length by straight cuts: no trial and error, whatever the sizes.

    Of three, one stands alone and the two others share the rest, cut on the other axis, where they fit."""
    if len(sides) == 1:
        return [box]
    alone, *rest = sides
    lengths = [high - low for low, high in box]
    tight = len(sides) == 2 and min(lengths) < sum(sides) + GAP  # room for two on one axis only
    axis = int(lengths[0] <= lengths[1]) if tight else int(rng.random() >= 0.5)
    low, high = box[axis]
    end = low + alone + rng.uniform(0, high - low - alone - GAP - max(rest))
    cuts = [(low, end), (end + GAP, high)]
    if rng.random() < 0.5:  # the lone thing at the other end, by mirroring
        cuts = [(low + high - b, low + high - a) for a, b in cuts]
    first, second = ([cut, box[1]] if axis == 0 else [box[0], cut] for cut in cuts)
    return [first, *_cut(rng, rest, second)]


# --- captions: a small grammar in which every sentence is true and names every object

NUMBERS = {2: "two", 3: "three"}


def captions(scene: Scene) -> list[str]:
    """All captions of the scene: with and without sizes, in each wording, some as "a picture of ...".

    Each names every object; a caption without sizes, or without the relation, leaves them open.
    """
    plain, sized = (
        [*dict.fromkeys(wordings(required) + wordings(replace(required, relation=None)))]
        for required in (unsized(scene), scene)
    )
    return plain + sized + [f"a picture of {sentence}" for sentence in plain]


def unsized(scene: Scene) -> Scene:
    """The scene with the sizes of its things left open."""
    return replace(scene, things=tuple(replace(thing, size=None) for thing in scene.things))


def wordings(required: Scene) -> list[str]:
    """The sentences that require exactly this: sizes if they are given, the relation if there is one."""
    nouns = [" ".join(filter(None, (thing.size, thing.colour, thing.shape))) for thing in required.things]
    noun, count = nouns[0], len(nouns)
    if count == 1:
        return [f"a {noun}", f"one {noun}"]
    if len(set(nouns)) == 1:
        return [f"{NUMBERS[count]} {noun}{'es' if noun.endswith('s') else 's'}"]
    if required.relation is None:
        orders = [nouns[i:] + nouns[:i] for i in range(count)]
        return [", ".join(f"a {noun}" for noun in order[:-1]) + f" and a {order[-1]}" for order in orders]
    a, b = nouns
    sentences = []
    for first, relation, second in ((a, required.relation, b), (b, RELATIONS[required.relation], a)):
        sentences.append(f"a {first} {relation} a {second}")
        if relation.endswith("of"):
            sentences.append(f"a {first} to the {relation} a {second}")
    return sentences


# --- pictures


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Five points, one up; tips at radius 1 and notches at 0.45, in polar form folded to half a point."""
    fold = np.pi / 5
    angle = np.abs((np.arctan2(u, -v) + fold) % (2 * fold) - fold)
    r = np.hypot(u, v)
    notch_x, notch_y = 0.45 * np.cos(fold), 0.45 * np.sin(fold)
    return (notch_x - 1) * r * np.sin(angle) >= notch_y * (r * np.cos(angle) - 1)


INSIDE = {  # u right, v down, both in [-1, 1]
    "circle": lambda u, v: u * u + v * v <= 1,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) <= 0.9,
    "triangle": lambda u, v: (np.abs(u) <= (v + 0.9) * 0.55) & (v <= 0.9),
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) <= 0.32) & (np.maximum(abs(u), abs(v)) <= 1),
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.75) <= 0.25,
    "star": _star,
}


def coverage(shape: str, diameter: float, x: float, y: float, side: int) -> np.ndarray:
    """How much of each pixel of a (side, side) square the shape covers, float in [0, 1].

    `diameter` and the centre `x`, `y` are in pixels; (0, 0) is the upper left corner of the square.
    """
    points = (np.arange(side * SAMPLES, dtype=np.float32) + 0.5) / SAMPLES
    inside = INSIDE[shape]((points[None] - x) * (2 / diameter), (points[:, None] - y) * (2 / diameter))
    return reduce(inside.astype(np.float32), "(h a) (w b) -> h w", "mean", a=SAMPLES, b=SAMPLES)


def render(scene: Scene, size: int) -> np.ndarray:
    """The scene as a uint8 (size, size, 3) picture on the plain background, edges antialiased."""
    picture = np.full((size, size, 3), BACKGROUND, np.float32)
    for thing in scene.things:
        diameter = SIZES[thing.size] * size
        x, y = thing.x * size, thing.y * size
        left, top = int(x - diameter / 2), int(y - diameter / 2)
        side = min(int(diameter) + 2, size - max(left, top))
        cover = coverage(thing.shape, diameter, x - left, y - top, side)[..., None]
        patch = picture[top : top + side, left : left + side]
        patch += cover * (np.asarray(COLOURS[thing.colour], np.float32) - patch)
    return (picture + 0.5).astype(np.uint8)
