"""Compositional checker: right on real pictures, strict on near misses, robust to soft edges and tints."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from ldm.config import UserError
from ldm.data.shapes import (
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Shapes,
    Thing,
    captions,
    is_held_out,
    render,
    wordings,
)
from ldm.metrics.compositional import TASKS, breakdown, cases, check, parse, score
from ldm.metrics.compositional_parse import UNKNOWN

N = 400
BLANK = np.full((32, 32, 3), 128, np.uint8)


@pytest.fixture(scope="module", params=[32, 64])
def pictures(request) -> tuple[list[np.ndarray], list[Scene]]:
    scenes = [Shapes(split="test").scene(i) for i in range(N)]
    return [render(scene, request.param) for scene in scenes], scenes


def passes(images: list[np.ndarray], scenes: list[Scene]) -> float:
    """The share of pictures that show exactly their scene, positions included."""
    return breakdown(images, scenes)["all"]


def free(scene: Scene) -> Scene:
    """The scene as a requirement without positions."""
    return replace(scene, things=tuple(replace(thing, x=None, y=None) for thing in scene.things))


def next_of(names, name: str) -> str:
    names = list(names)
    return names[(names.index(name) + 1) % len(names)]


def near_misses(scene: Scene) -> list[Scene]:
    """Requirements that differ from the scene in one thing only."""
    first, *rest = free(scene).things
    changed = [replace(first, colour=next_of(COLOURS, first.colour))]
    changed += [replace(first, shape=next_of(SHAPES, first.shape))]
    changed += [replace(first, size=next_of(SIZES, first.size))]
    things = [(*rest, one) for one in changed] + [(first, first, *rest), tuple(rest)]
    relations = [r for r in RELATIONS if r != scene.relation] if scene.relation else []
    return [Scene(things=some) for some in things] + [replace(free(scene), relation=r) for r in relations]


def test_real_renders_pass(pictures):
    assert all(value >= 0.995 for value in breakdown(*pictures).values())
    assert np.mean([check(x, free(scene)) for x, scene in zip(*pictures, strict=True)]) >= 0.995


def test_pictures_with_wrong_scenes_fail(pictures):
    images, scenes = pictures
    assert passes(images, scenes[1:] + scenes[:1]) <= 0.01
    some = list(zip(images, scenes, strict=True))[::4]
    assert np.mean([check(x, wrong) for x, scene in some for wrong in near_misses(scene)]) <= 0.01


def soften(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return ndimage.gaussian_filter(x, (0.6 * len(x) / 32, 0.6 * len(x) / 32, 0)) + rng.normal(0, 12, x.shape)


@pytest.mark.parametrize(
    "change",
    [
        soften,
        lambda x, rng: x + rng.normal(0, 20, x.shape),
        lambda x, rng: 128 + 0.75 * (x - 128),
        lambda x, rng: x + np.array([25, -20, 15]),
    ],
    ids=["blur and noise", "noise", "pale", "tinted"],
)
def test_soft_noisy_pale_and_tinted_pictures_are_still_read(pictures, change):
    images, scenes = pictures
    rng = np.random.default_rng(0)
    changed = [np.clip(change(x.astype(float), rng) + 0.5, 0, 255).astype(np.uint8) for x in images]
    assert passes(changed, scenes) >= 0.99
    assert passes(changed, scenes[1:] + scenes[:1]) <= 0.01


def test_each_shape_colour_and_size_is_read_back_exactly():
    for colour, shape, size in itertools.product(COLOURS, SHAPES, SIZES):
        thing = Thing(colour=colour, shape=shape, size=size, x=0.43, y=0.58)
        (seen,) = parse(render(Scene(things=(thing,)), 64))
        assert (seen.colour, seen.shape, seen.size) == (colour, shape, size)
        assert (seen.x, seen.y) == pytest.approx((0.43, 0.58), abs=0.01)


Y_AXIS, X_AXIS = np.mgrid[:32, :32] + 0.5 - 16


@pytest.mark.parametrize(
    "mask",
    [
        abs(X_AXIS) + abs(Y_AXIS) <= 6,
        X_AXIS**2 + Y_AXIS**2 <= 12**2,
        (abs(X_AXIS) <= 2) & (abs(Y_AXIS) <= 7),
        X_AXIS < 99,
    ],
    ids=["diamond", "disc twice too large", "bar", "everything"],
)
def test_other_outlines_are_unknown(mask):
    picture = np.where(mask[..., None], COLOURS["red"], 128).astype(np.uint8)
    assert [thing.shape for thing in parse(picture)] == [UNKNOWN]
    assert parse(BLANK) == []


def test_two_colours_in_one_outline_are_two_things():
    picture = render(Scene(things=(Thing(colour="red", shape="circle", size="large", x=0.5, y=0.5),)), 32)
    picture[:, 16:][picture[:, 16:, 0] > 150] = COLOURS["blue"]
    assert {thing.colour for thing in parse(picture)} == {"red", "blue"}
    assert not check(picture, Scene(things=(Thing(colour="red", shape="circle"),)))


def test_a_position_that_the_scene_fixes_must_be_met():
    scene = Scene(things=(Thing(colour="red", shape="star", size="small", x=0.3, y=0.3),))
    moved = Scene(things=(replace(scene.things[0], x=0.5),))
    picture = render(moved, 32)
    assert check(picture, free(scene)) and check(picture, moved) and not check(picture, scene)
    wrong = {"place": 0.0, "all": 0.0}
    assert breakdown([picture], [scene]) == {"count": 1.0, "colour": 1.0, "shape": 1.0, "size": 1.0} | wrong


def test_cases_require_what_their_captions_say():
    posed = cases(40, seed=1)
    longer = cases(60, seed=1)
    assert posed == [case for i, case in enumerate(longer) if i % 60 < 40] and posed != cases(40, 2)
    for case in posed:
        required = case.required
        assert case.caption in wordings(required) and is_held_out(required) == case.held_out
        scene = tuple(replace(t, size=t.size or "small", x=0.5, y=0.5) for t in required.things)
        assert case.caption in captions(Scene(things=scene, relation=required.relation))  # training could show it
        colours, shapes, sizes = ({getattr(t, name) for t in required.things} for name in ("colour", "shape", "size"))
        n = len(required.things)
        assert {
            "single object": n == 1,
            "two objects": len(colours) == len(shapes) == 2 and sizes == {None},
            "counting": n in (2, 3) and len(colours) == len(shapes) == 1 and sizes == {None},
            "colours": len(colours) == 2 and len(shapes) == 1 and required.relation is None,
            "position": required.relation in RELATIONS and any(r in case.caption for r in RELATIONS),
            "attribute binding": len(colours) == len(shapes) == len(sizes) == 2 and None not in sizes,
        }[case.task]


def drawn(required: Scene, size: str) -> np.ndarray:
    """A picture that meets a requirement: things in a row or a triangle, open sizes as given, the relation met."""
    spots = [(0.25, 0.3), (0.72, 0.35), (0.5, 0.75)]
    if required.relation in ("above", "below"):
        spots = [(0.3, 0.25), (0.35, 0.72)]
    if required.relation in ("right of", "below"):
        spots = spots[1::-1]
    pairs = zip(required.things, spots, strict=False)
    things = tuple(replace(thing, size=thing.size or size, x=x, y=y) for thing, (x, y) in pairs)
    return render(replace(required, things=things), 32)


def test_score_is_one_on_right_pictures_and_counts_wrong_ones():
    posed = cases(8)
    images = [drawn(case.required, ("small", "large")[i % 2]) for i, case in enumerate(posed)]
    result = score(images, posed)
    assert list(result) == [*TASKS, "mean"]
    assert all(row["seen"] == row["held_out"] == row["all"] == 1 for row in result.values())
    assert result["counting"]["n"] == 16 and result["mean"]["n"] == 96
    images[:4] = [BLANK] * 4  # of "single object", seen
    result = score(images, posed)
    assert result["single object"] == {"seen": 0.5, "held_out": 1.0, "all": 0.75, "n": 16}
    assert result["mean"]["all"] == pytest.approx((5 + 0.75) / 6)
    part = [(x, case) for x, case in zip(images, posed, strict=True) if case.task == "position" and not case.held_out]
    result = score(*zip(*part, strict=True))
    assert list(result) == ["position", "mean"] and "held_out" not in result["mean"]


def test_mistakes_are_named():
    with pytest.raises(UserError, match="uint8"):
        parse(np.zeros((32, 32, 3), np.float32))
    with pytest.raises(UserError, match=r"\(3, 32, 32\)"):
        parse(np.zeros((3, 32, 32), np.uint8))
    with pytest.raises(ValueError):
        breakdown([BLANK], [])
