"""What a shapes picture holds: its things, their places, and which compositions training never shows."""

import itertools
import random
from dataclasses import dataclass, replace

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

HELD_OUT_THINGS = frozenset({("red", "star"), ("green", "ring"), ("yellow", "triangle"), ("pink", "cross")})
HELD_OUT_RELATIONS = frozenset(
    {
        ("circle", "left of", "star"),
        ("ring", "left of", "cross"),
        ("triangle", "left of", "square"),
        ("square", "above", "triangle"),
        ("star", "above", "circle"),
        ("cross", "above", "ring"),
    }
)
HELD_OUT_COUNTS = frozenset({(2, "cyan"), (3, "white"), (3, "star")})

MARGIN, GAP = 1 / 32, 2 / 32  # least room to the picture's edge and between two things, in picture sides
CLEAR = 1.4  # two things are "left of" or "above" only when one axis leads the other by this factor


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


def relation_of(a: Thing, b: Thing) -> str:
    """Where `a` lies as seen from `b`, by the axis on which their centres are further apart."""
    dx, dy = b.x - a.x, b.y - a.y
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def is_held_out(scene: Scene) -> bool:
    """Whether the scene, or a requirement, shows a composition that the train split never shows.

    One of HELD_OUT_THINGS (colour and shape), of HELD_OUT_RELATIONS (an ordered pair of shapes in a relation,
    in whichever words), or of HELD_OUT_COUNTS (a number of equal things, by their colour or by their shape).
    """
    things = scene.things
    if any((thing.colour, thing.shape) in HELD_OUT_THINGS for thing in things):
        return True
    first = things[0]
    if len(things) > 1 and all((t.colour, t.shape) == (first.colour, first.shape) for t in things):
        return bool({(len(things), first.colour), (len(things), first.shape)} & HELD_OUT_COUNTS)
    return any((a.shape, relation, b.shape) in HELD_OUT_RELATIONS for a, relation, b in _related(scene))


def _related(scene: Scene) -> list[tuple[Thing, str, Thing]]:
    """All ordered pairs of things of which a relation is said or seen."""
    a = scene.things[0]
    if a.x is not None:
        return [(a, relation_of(a, b), b) for a, b in itertools.permutations(scene.things, 2)]
    if scene.relation is None:
        return []
    b = scene.things[1]
    return [(a, scene.relation, b), (b, RELATIONS[scene.relation], a)]


def sample_scene(rng: random.Random, held_out: bool, kind: str | None = None) -> Scene:
    """A random scene of a kind in KINDS (None: drawn by their shares) that is, or is not, held out."""
    while True:
        chosen = kind or rng.choices(tuple(KINDS), tuple(KINDS.values()))[0]
        things = _place(rng, _draw_things(rng, chosen))
        clear = chosen != "pair" or _is_clear(*things)
        scene = Scene(things=things, relation=relation_of(*things) if chosen == "pair" else None)
        if clear and is_held_out(scene) == held_out:
            return scene


def _draw_things(rng: random.Random, kind: str) -> list[Thing]:
    def draw() -> Thing:
        size = rng.choice(tuple(SIZES))
        return Thing(colour=rng.choice(tuple(COLOURS)), shape=rng.choice(SHAPES), size=size)

    if kind == "count":
        return [draw()] * rng.choice((2, 3))
    things: list[Thing] = []
    while len(things) < {"single": 1, "pair": 2, "trio": 3}[kind]:
        thing = draw()
        if all((thing.colour, thing.shape) != (t.colour, t.shape) for t in things):
            things.append(thing)
    return things


def _is_clear(a: Thing, b: Thing) -> bool:
    near, far = sorted((abs(a.x - b.x), abs(a.y - b.y)))
    return far > CLEAR * near


def _place(rng: random.Random, things: list[Thing]) -> tuple[Thing, ...]:
    """Gives the things centres: never overlapping or touching, each wholly inside."""
    order = rng.sample(range(len(things)), len(things))
    placed = [things[i] for i in order]
    boxes = _cut(rng, [SIZES[t.size] for t in placed], MARGIN, MARGIN, 1 - MARGIN, 1 - MARGIN)
    done = {}
    for i, thing, (x0, y0, x1, y1) in zip(order, placed, boxes, strict=True):
        half = SIZES[thing.size] / 2
        done[i] = replace(thing, x=rng.uniform(x0 + half, x1 - half), y=rng.uniform(y0 + half, y1 - half))
    return tuple(done[i] for i in range(len(things)))


def _cut(rng: random.Random, sides: list[float], x0: float, y0: float, x1: float, y1: float) -> list[tuple]:
    """Cuts a box into one cell for each side length by straight cuts: no trial and error, whatever the sizes.

    Of three, one stands alone and the two others share the rest, cut on the other axis, where they fit."""
    if len(sides) == 1:
        return [(x0, y0, x1, y1)]
    alone, rest = sides[0], sides[1:]
    tight = len(sides) == 2 and min(x1 - x0, y1 - y0) < sum(sides) + GAP  # room for two on one axis only
    across = x1 - x0 > y1 - y0 if tight else rng.random() < 0.5
    low, high = (x0, x1) if across else (y0, y1)
    first_ends = low + alone + rng.uniform(0, high - low - alone - GAP - max(rest))
    if across:
        first, second = (x0, y0, first_ends, y1), (first_ends + GAP, y0, x1, y1)
    else:
        first, second = (x0, y0, x1, first_ends), (x0, first_ends + GAP, x1, y1)
    if rng.random() < 0.5:  # the lone thing to the other end, by mirroring
        first, second = (_mirror(box, low + high, across) for box in (first, second))
    return [first, *_cut(rng, rest, *second)]


def _mirror(box: tuple, total: float, across: bool) -> tuple:
    x0, y0, x1, y1 = box
    return (total - x1, y0, total - x0, y1) if across else (x0, total - y1, x1, total - y0)
