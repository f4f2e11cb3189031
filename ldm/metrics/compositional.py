"""Compositional score on shapes: whether a picture shows exactly what its caption says, in six tasks.

After GenEval (Ghosh et al. 2023, arXiv:2310.11513), with an exact reader of pictures in place of a detector.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ldm.config import UserError
from ldm.data.shapes import Scene, Thing, is_held_out, relation_of, sample_scene, unsized, wordings
from ldm.metrics.compositional_parse import parse

TASKS = ("single object", "two objects", "counting", "colours", "position", "attribute binding")
NEAR = 2 / 32  # a centre may be this far off on each axis, in picture sides, where a scene fixes it
ASPECTS = ("colour", "shape", "size", "place")
HALVES = {"seen": False, "held_out": True}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One question to a model: the prompt, and the requirement that its picture must meet."""

    task: str
    caption: str
    required: Scene
    held_out: bool


def prompts(task: str, n: int, seed: int = 0, held_out: bool = False) -> list[tuple[str, Scene]]:
    """`n` captions of a task, each with the requirement that says just what the caption says.

    "single object":     "a red circle", "one small red circle" (half of them name a size)
    "two objects":       "a red circle and a blue square": colours and shapes both differ
    "counting":          "three green triangles"
    "colours":           "a red circle and a blue circle": one shape in two colours
    "position":          "a red circle to the left of a blue square"
    "attribute binding": "a small red circle and a large blue square": sizes, colours and shapes all differ
    With `held_out` the requirement itself is a composition that training never shows; without, it is not.
    Raises UserError for an unknown task.
    """
    if task not in TASKS:
        raise UserError(f"compositional task {task!r} is unknown; use one of {', '.join(TASKS)}")
    rngs = [random.Random(f"{seed}/{task}/{held_out}/{i}") for i in range(n)]
    required = [_require(rng, task, held_out) for rng in rngs]
    return [(rng.choice(wordings(scene)), scene) for rng, scene in zip(rngs, required, strict=True)]


def cases(n: int, seed: int = 0) -> list[Case]:
    """`n` seen and `n` held-out cases of each task, in the order of TASKS."""
    return [
        Case(task=task, caption=caption, required=required, held_out=held_out)
        for task in TASKS
        for held_out in (False, True)
        for caption, required in prompts(task, n, seed, held_out)
    ]


def _differ(a: Thing, b: Thing, *aspects: str) -> bool:
    return all(getattr(a, aspect) != getattr(b, aspect) for aspect in aspects)


_PAIRS: dict[str, Callable[[Thing, Thing], bool]] = {  # which pairs suit a task
    "two objects": lambda a, b: _differ(a, b, "colour", "shape"),
    "colours": lambda a, b: a.shape == b.shape,
    "position": lambda a, b: True,
    "attribute binding": lambda a, b: _differ(a, b, "colour", "shape", "size"),
}


def _require(rng: random.Random, task: str, held_out: bool) -> Scene:
    kind = {"single object": "single", "counting": "count"}.get(task, "pair")
    sized = task == "attribute binding" or (task == "single object" and rng.random() < 0.5)
    while True:
        scene = sample_scene(rng, held_out, kind)
        things = tuple(replace(thing, x=None, y=None) for thing in scene.things)
        required = Scene(things=things, relation=scene.relation if task == "position" else None)
        suits = kind != "pair" or _PAIRS[task](*things)
        if suits and is_held_out(required) == held_out:
            return required if sized else unsized(required)


def check(image: np.ndarray, required: Scene) -> bool:
    """Whether the uint8 (H, H, 3) picture shows the required things, all of them and nothing else.

    What the requirement leaves open (None) is free; a centre that it gives must be met within NEAR."""
    return _matches(parse(image), required, ASPECTS)


def passes(images: Sequence[np.ndarray], scenes: Sequence[Scene]) -> float:
    """The fraction of pictures that show exactly their scene, places included."""
    return breakdown(images, scenes)["all"]


def breakdown(images: Sequence[np.ndarray], scenes: Sequence[Scene]) -> dict[str, float]:
    """The fractions of pictures right in each aspect alone: "count", "colour", "shape", "size", "place",
    and in "all" of them together. An aspect is wrong wherever the count is."""
    return {name: float(np.mean(right)) for name, right in by_aspect(images, scenes).items()}


def by_aspect(images: Sequence[np.ndarray], scenes: Sequence[Scene]) -> dict[str, list[bool]]:
    """What `breakdown` takes the means of: whether each picture is right."""
    seen = [(parse(image), scene) for image, scene in zip(images, scenes, strict=True)]
    aspects = {"count": (), **{aspect: (aspect,) for aspect in ASPECTS}, "all": ASPECTS}
    return {name: [_matches(found, scene, chosen) for found, scene in seen] for name, chosen in aspects.items()}


def _matches(found: list[Thing], required: Scene, aspects: tuple[str, ...]) -> bool:
    """Whether some assignment of found to required things is right in all the given aspects."""
    if len(found) != len(required.things):
        return False
    return any(_agrees(order, required, aspects) for order in itertools.permutations(found))


def _agrees(order: tuple[Thing, ...], required: Scene, aspects: tuple[str, ...]) -> bool:
    pairs = list(zip(order, required.things, strict=True))
    for aspect in aspects:
        if aspect == "place":
            right = all(_near(thing, wanted) for thing, wanted in pairs)
            right = right and required.relation in (None, required.relation and relation_of(*order[:2]))
        else:
            wants = [getattr(wanted, aspect) for _, wanted in pairs]
            right = all(want in (None, getattr(t, aspect)) for (t, _), want in zip(pairs, wants, strict=True))
        if not right:
            return False
    return True


def _near(thing: Thing, wanted: Thing) -> bool:
    return wanted.x is None or max(abs(thing.x - wanted.x), abs(thing.y - wanted.y)) <= NEAR


def score(images: Sequence[np.ndarray], cases: Sequence[Case]) -> dict[str, dict[str, float]]:
    """How many pictures meet their cases: {task: {"seen", "held_out", "all", "n"}, ..., "mean": {...}}.

    All but "n", the number of pictures, are fractions. "mean" weighs each task the same. A task, or a half
    of it, that has no case is left out of the dictionaries and of the mean.
    """
    return tally([check(image, case.required) for image, case in zip(images, cases, strict=True)], cases)


def tally(right: Sequence[bool], cases: Sequence[Case]) -> dict[str, dict[str, float]]:
    """`score` of what is known of each case."""
    found = halves(right, cases)
    means = {task: {name: float(np.mean(oks)) for name, oks in row.items()} for task, row in found.items()}
    rows = [row for task, row in means.items() if task != "mean"]
    means["mean"] = {key: float(np.mean([row[key] for row in rows if key in row])) for key in found["mean"]}
    return {task: row | {"n": len(found[task]["all"])} for task, row in means.items()}


def halves(right: Sequence[bool], cases: Sequence[Case]) -> dict[str, dict[str, list[bool]]]:
    """Which cases are right, by task and in "mean" of all tasks: "seen", "held_out", "all"; none that is empty."""
    pairs = list(zip(cases, right, strict=True))
    result = {}
    for task in [*(task for task in TASKS if any(case.task == task for case in cases)), "mean"]:
        mine = [(case.held_out, bool(ok)) for case, ok in pairs if task in (case.task, "mean")]
        row = {name: [ok for held_out, ok in mine if held_out == half] for name, half in HALVES.items()}
        result[task] = {name: oks for name, oks in row.items() if oks} | {"all": [ok for _, ok in mine]}
    return result
