"""Compositional score on shapes: whether a picture shows exactly what its caption says, in six tasks.

After GenEval (Ghosh et al. 2023, arXiv:2310.11513), with an exact reader of pictures instead of a detector.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ldm.data.shapes import Scene, Thing, is_held_out, relation_of, sample_scene, unsized, wordings
from ldm.metrics.compositional_parse import parse

TASKS = ("single object", "two objects", "counting", "colours", "position", "attribute binding")
NEAR = 2 / 32  # a centre may be this far off on each axis, in picture sides, where a scene fixes it
HALVES = ("seen", "held_out")
ASPECTS = ("colour", "shape", "size", "place")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One question to a model: the prompt, and the requirement that its picture must meet."""

    task: str
    caption: str
    required: Scene
    held_out: bool


def cases(n: int, seed: int = 0) -> list[Case]:
    """`n` seen and `n` held-out cases of each task, in the order of TASKS; a caption says just what it requires.

    "single object":     "a red circle", "one small red circle" (half of them name a size)
    "two objects":       "a red circle and a blue square": colours and shapes both differ
    "counting":          "three green triangles"
    "colours":           "a red circle and a blue circle": one shape in two colours
    "position":          "a red circle to the left of a blue square"
    "attribute binding": "a small red circle and a large blue square": sizes, colours and shapes all differ
    The requirement of a held-out case is itself a composition that training never shows.
    """
    return [_case(*key, seed) for key in itertools.product(TASKS, (False, True), range(n))]


def _case(task: str, held_out: bool, i: int, seed: int) -> Case:
    rng = random.Random(f"{seed}/{task}/{held_out}/{i}")
    kind = {"single object": "single", "counting": "count"}.get(task, "pair")
    sized = task == "attribute binding" or (task == "single object" and rng.random() < 0.5)
    while True:
        scene = sample_scene(rng, held_out, kind)
        things = tuple(replace(thing, x=None, y=None) for thing in scene.things)
        required = Scene(things=things, relation=scene.relation if task == "position" else None)
        if _suits(task, things) and is_held_out(required) == held_out:
            required = required if sized else unsized(required)
            return Case(task=task, caption=rng.choice(wordings(required)), required=required, held_out=held_out)


def _suits(task: str, things: Sequence[Thing]) -> bool:
    differ = {aspect for aspect in ASPECTS[:3] if getattr(things[0], aspect) != getattr(things[-1], aspect)}
    if task == "colours":
        return "shape" not in differ
    return {"two objects": {"colour", "shape"}, "attribute binding": set(ASPECTS[:3])}.get(task, set()) <= differ


def check(image: np.ndarray, required: Scene) -> bool:
    """Whether the uint8 (H, H, 3) picture shows the required things, all of them and nothing else.

    Values that the requirement leaves open (None) are free; a centre that it fixes must be met within NEAR."""
    return _matches(parse(image), required, ASPECTS)


def by_aspect(images: Sequence[np.ndarray], scenes: Sequence[Scene]) -> dict[str, list[bool]]:
    """Whether each picture is right in each aspect alone: "count", "colour", "shape", "size", "place", and in "all" of
    them together. An aspect is wrong wherever the count is."""
    pairs = [(parse(image), scene) for image, scene in zip(images, scenes, strict=True)]
    aspects = {"count": (), **{aspect: (aspect,) for aspect in ASPECTS}, "all": ASPECTS}
    return {name: [_matches(things, scene, chosen) for things, scene in pairs] for name, chosen in aspects.items()}


def _matches(things: Sequence[Thing], required: Scene, aspects: Sequence[str]) -> bool:
    """Whether some assignment of the things to the required ones is right in all the given aspects."""
    orders = itertools.permutations(things) if len(things) == len(required.things) else ()
    relation = required.relation if "place" in aspects else None
    for order in orders:
        pairs = zip(order, required.things, strict=True)
        fits = all(_fits(thing, want, aspect) for thing, want in pairs for aspect in aspects)
        if fits and (relation is None or relation == relation_of(*order[:2])):
            return True
    return False


def _fits(thing: Thing, want: Thing, aspect: str) -> bool:
    if aspect == "place":
        return want.x is None or max(abs(thing.x - want.x), abs(thing.y - want.y)) <= NEAR
    return getattr(want, aspect) in (None, getattr(thing, aspect))


def tally(right: Sequence[bool], cases: Sequence[Case]) -> dict[str, dict[str, float]]:
    """How many cases are right: {task: {"seen", "held_out", "all", "n"}, ..., "mean": {...}}.

    All but "n", the number of cases, are fractions. "mean" weighs each task the same. A task, or a half
    of it, without cases is left out of the dictionaries and of the mean.
    """
    groups = halves(right, cases)
    shares = {task: {half: float(np.mean(oks)) for half, oks in row.items()} for task, row in groups.items()}
    tasks = [row for task, row in shares.items() if task != "mean"]
    shares["mean"] = {half: float(np.mean([row[half] for row in tasks if half in row])) for half in shares["mean"]}
    return {task: row | {"n": len(groups[task]["all"])} for task, row in shares.items()}


def halves(right: Sequence[bool], cases: Sequence[Case]) -> dict[str, dict[str, list[bool]]]:
    """Which cases are right, by task and in "mean" of all tasks: "seen", "held_out", "all"; none that is empty."""
    groups: dict[str, dict[str, list[bool]]] = {}
    for task, half in itertools.product((*TASKS, "mean"), ("seen", "held_out", "all")):
        asked = zip(right, cases, strict=True)
        oks = [bool(ok) for ok, c in asked if task in (c.task, "mean") and half in (HALVES[c.held_out], "all")]
        if oks:
            groups.setdefault(task, {})[half] = oks
    return groups
