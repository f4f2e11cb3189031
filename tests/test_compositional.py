"""Compositional checker: right on real pictures, strict on near misses, robust to soft edges and tints."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from ldm.data import shapes
from ldm.data.shapes import COLOURS, RELATIONS, SHAPES, SIZES, Scene, Shapes, Thing, render
from ldm.metrics.compositional import TASKS, by_aspect, cases, check, tally
from ldm.metrics.compositional_parse import UNKNOWN, parse

N = 120


def pictures(size: int) -> tuple[list[np.ndarray], list[Scene]]:
    scenes = [Shapes(split="test").scene(i) for i in range(N)]
    return [render(scene, size) for scene in scenes], scenes


def shares(images: list[np.ndarray], scenes: list[Scene]) -> dict[str, float]:
    return {aspect: float(np.mean(right)) for aspect, right in by_aspect(images, scenes).items()}


def free(scene: Scene) -> Scene:
    """The scene as a requirement without positions."""
    return replace(scene, things=tuple(replace(thing, x=None, y=None) for thing in scene.things))


def next_of(names, name: str) -> str:
    names = list(names)
    return names[(names.index(name) + 1) % len(names)]


def near_misses(scene: Scene) -> list[Scene]:
    """Requirements that differ from the scene in one thing only."""
    first, *rest = free(scene).things
    names = (("colour", COLOURS), ("shape", SHAPES), ("size", SIZES))
    changed = [replace(first, **{key: next_of(values, getattr(first, key))}) for key, values in names]
    things = [(*rest, one) for one in changed] + [(first, first, *rest), tuple(rest)]
    relations = [r for r in RELATIONS if r != scene.relation] if scene.relation else []
    return [Scene(things=some) for some in things] + [replace(free(scene), relation=r) for r in relations]


def soften(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return ndimage.gaussian_filter(x, (0.6 * len(x) / 32, 0.6 * len(x) / 32, 0)) + rng.normal(0, 12, x.shape)


CHANGES = {
    "none": lambda x, rng: x,
    "blur and noise": soften,
    "noise": lambda x, rng: x + rng.normal(0, 20, x.shape),
    "pale": lambda x, rng: 128 + 0.75 * (x - 128),
    "tinted": lambda x, rng: x + np.array([25, -20, 15]),
}


@pytest.mark.parametrize(("size", "change"), [*((32, name) for name in CHANGES), (64, "blur and noise")])
def test_clean_soft_noisy_pale_and_tinted_pictures_are_read(size, change):
    images, scenes = pictures(size)
    rng = np.random.default_rng(0)
    changed = [np.clip(CHANGES[change](x.astype(float), rng) + 0.5, 0, 255).astype(np.uint8) for x in images]
    assert all(share >= 0.99 for share in shares(changed, scenes).values())
    assert shares(changed, scenes[1:] + scenes[:1])["all"] <= 0.01


@pytest.mark.parametrize("size", [32, 64])
def test_requirements_that_a_picture_nearly_meets_are_not_met(size):
    some = list(zip(*pictures(size), strict=True))[::3]
    assert all(check(x, free(scene)) for x, scene in some)
    assert np.mean([check(x, wrong) for x, scene in some for wrong in near_misses(scene)]) <= 0.01


Y_AXIS, X_AXIS = np.mgrid[:32, :32] + 0.5 - 16


OTHERS = {
    "diamond": abs(X_AXIS) + abs(Y_AXIS) <= 6,
    "disc twice too large": X_AXIS**2 + Y_AXIS**2 <= 12**2,
    "bar": (abs(X_AXIS) <= 2) & (abs(Y_AXIS) <= 7),
    "everything": X_AXIS < 99,
}


@pytest.mark.parametrize("mask", OTHERS.values(), ids=OTHERS)
def test_other_outlines_are_unknown(mask):
    picture = np.where(mask[..., None], COLOURS["red"], 128).astype(np.uint8)
    assert [thing.shape for thing in parse(picture)] == [UNKNOWN]
    assert parse(np.full((32, 32, 3), 128, np.uint8)) == []


def test_a_position_that_the_scene_fixes_must_be_met():
    scene = Scene(things=(Thing(colour="red", shape="star", size="small", x=0.3, y=0.3),))
    moved = Scene(things=(replace(scene.things[0], x=0.5),))
    picture = render(moved, 32)
    assert check(picture, free(scene)) and check(picture, moved) and not check(picture, scene)
    wrong = {"place": 0.0, "all": 0.0}
    assert shares([picture], [scene]) == {"count": 1.0, "colour": 1.0, "shape": 1.0, "size": 1.0} | wrong


def test_cases_require_what_their_captions_say():
    posed = cases(40, seed=1)
    longer = cases(60, seed=1)
    assert posed == [case for i, case in enumerate(longer) if i % 60 < 40] and posed != cases(40, 2)
    for case in posed:
        required = case.required
        assert case.caption in shapes.wordings(required) and shapes.is_held_out(required) == case.held_out
        scene = tuple(replace(t, size=t.size or "small", x=0.5, y=0.5) for t in required.things)
        shown = Scene(things=scene, relation=required.relation)
        assert case.caption in shapes.captions(shown)  # training could show it
        colours, outlines, sizes = ({getattr(t, name) for t in required.things} for name in ("colour", "shape", "size"))
        n = len(required.things)
        assert {
            "single object": n == 1,
            "two objects": len(colours) == len(outlines) == 2 and sizes == {None},
            "counting": n in (2, 3) and len(colours) == len(outlines) == 1 and sizes == {None},
            "colours": len(colours) == 2 and len(outlines) == 1 and required.relation is None,
            "position": required.relation in RELATIONS and any(r in case.caption for r in RELATIONS),
            "attribute binding": len(colours) == len(outlines) == len(sizes) == 2 and None not in sizes,
        }[case.task]


def test_the_tally_weighs_tasks_alike_and_leaves_out_what_is_empty():
    posed = cases(8)
    right = [True] * len(posed)
    result = tally(right, posed)
    assert list(result) == [*TASKS, "mean"]
    assert all(row["seen"] == row["held_out"] == row["all"] == 1 for row in result.values())
    assert result["counting"]["n"] == 16 and result["mean"]["n"] == 96
    right[:4] = [False] * 4  # of "single object", seen
    result = tally(right, posed)
    assert result["single object"] == {"seen": 0.5, "held_out": 1.0, "all": 0.75, "n": 16}
    assert result["mean"]["all"] == pytest.approx((5 + 0.75) / 6)
    result = tally([True], [case for case in posed if case.task == "position" and not case.held_out][:1])
    assert list(result) == ["position", "mean"] and "held_out" not in result["mean"]
