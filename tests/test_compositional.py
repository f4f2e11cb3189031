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
from ldm.metrics import compositional
from ldm.metrics.compositional import TASKS, breakdown, cases, check, parse, passes, prompts, score
from ldm.metrics.compositional_parse import UNKNOWN, _components

N = 400


@pytest.fixture(scope="module", params=[32, 64])
def pictures(request) -> tuple[list[np.ndarray], list[Scene]]:
    scenes = [Shapes(split="test").scene(i) for i in range(N)]
    return [render(scene, request.param) for scene in scenes], scenes


def free(scene: Scene) -> Scene:
    """The scene as a requirement: all that is said of it, but no places."""
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
    misses = [Scene(things=some) for some in things]
    if scene.relation:
        misses += [replace(free(scene), relation=r) for r in RELATIONS if r != scene.relation]
    return misses


def test_real_renders_pass(pictures):
    assert passes(*pictures) >= 0.995
    assert all(value >= 0.995 for value in breakdown(*pictures).values())
    assert np.mean([check(x, free(scene)) for x, scene in zip(*pictures, strict=True)]) >= 0.995


def test_pictures_with_wrong_scenes_fail(pictures):
    images, scenes = pictures
    assert passes(images, scenes[1:] + scenes[:1]) <= 0.01
    some = list(zip(images, scenes, strict=True))[::4]
    pairs = [(x, wrong) for x, scene in some for wrong in near_misses(scene)]
    assert np.mean([check(x, wrong) for x, wrong in pairs]) <= 0.01


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
        (found,) = parse(render(Scene(things=(thing,)), 64))
        assert (found.colour, found.shape, found.size) == (colour, shape, size)
        assert found.x == pytest.approx(0.43, abs=0.01) and found.y == pytest.approx(0.58, abs=0.01)


def test_what_is_no_thing_is_not_taken_for_one():
    assert parse(np.full((32, 32, 3), 128, np.uint8)) == []
    y, x = np.mgrid[:32, :32] + 0.5 - 16
    masks = {
        "diamond": abs(x) + abs(y) <= 6,
        "disc twice too large": x**2 + y**2 <= 12**2,
        "bar": (abs(x) <= 2) & (abs(y) <= 7),
        "everything": x < 99,
    }
    for name, mask in masks.items():
        picture = np.where(mask[..., None], COLOURS["red"], 128).astype(np.uint8)
        assert [thing.shape for thing in parse(picture)] == [UNKNOWN], name


def test_two_colours_in_one_outline_are_two_things():
    picture = render(Scene(things=(Thing(colour="red", shape="circle", size="large", x=0.5, y=0.5),)), 32)
    picture[:, 16:][picture[:, 16:, 0] > 150] = COLOURS["blue"]
    assert {thing.colour for thing in parse(picture)} == {"red", "blue"}
    assert not check(picture, Scene(things=(Thing(colour="red", shape="circle"),)))


def test_a_place_that_the_scene_fixes_must_be_met():
    scene = Scene(things=(Thing(colour="red", shape="star", size="small", x=0.3, y=0.3),))
    moved = Scene(things=(replace(scene.things[0], x=0.5),))
    picture = render(moved, 32)
    assert check(picture, free(scene)) and check(picture, moved) and not check(picture, scene)
    assert breakdown([picture], [scene]) == {
        "count": 1.0,
        "colour": 1.0,
        "shape": 1.0,
        "size": 1.0,
        "place": 0.0,
        "all": 0.0,
    }


def test_components_agree_with_scipy():
    rng = np.random.default_rng(3)
    labels = rng.choice([-1, 0, 1], (32, 32), p=[0.6, 0.2, 0.2])
    mine = sorted(sorted(pixels) for pixels in _components(labels))
    theirs = []
    for colour in (0, 1):
        marked, n = ndimage.label(np.pad(labels == colour, 1), np.ones((3, 3)))
        theirs += [np.flatnonzero(marked == k + 1).tolist() for k in range(n)]
    assert mine == sorted(theirs)


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_prompts_say_what_they_require(task, held_out):
    found = prompts(task, 40, seed=1, held_out=held_out)
    assert found == prompts(task, 60, seed=1, held_out=held_out)[:40] != prompts(task, 40, 2, held_out)
    for caption, required in found:
        assert caption in wordings(required) and is_held_out(required) == held_out
        sizes = {thing.size for thing in required.things}
        colours, shapes = ({getattr(t, name) for t in required.things} for name in ("colour", "shape"))
        n = len(required.things)
        assert {
            "single object": n == 1,
            "two objects": len(colours) == len(shapes) == 2 and sizes == {None},
            "counting": n in (2, 3) and len(colours) == len(shapes) == 1 and sizes == {None},
            "colours": len(colours) == 2 and len(shapes) == 1 and required.relation is None,
            "position": required.relation in RELATIONS and any(r in caption for r in RELATIONS),
            "attribute binding": len(colours) == len(shapes) == len(sizes) == 2 and None not in sizes,
        }[task]


def test_prompts_are_captions_that_training_could_show():
    for case in cases(20):
        size = {t.size for t in case.required.things} - {None}
        scene = Scene(
            things=tuple(replace(t, size=t.size or "small", x=0.5, y=0.5) for t in case.required.things),
            relation=case.required.relation,
        )
        assert case.caption in captions(scene), (case, size)


def test_score_is_one_on_right_pictures_and_counts_wrong_ones():
    rng = np.random.default_rng(0)
    some = cases(8)
    images = [render(_fill(case.required, rng), 32) for case in some]
    result = score(images, some)
    assert list(result) == [*TASKS, "mean"]
    assert all(row["seen"] == row["held_out"] == row["all"] == 1 for row in result.values())
    assert result["counting"]["n"] == 16 and result["mean"]["n"] == 96
    for i in range(4):  # the first four of "single object", seen
        images[i] = np.full((32, 32, 3), 128, np.uint8)
    result = score(images, some)
    assert result["single object"] == {"seen": 0.5, "held_out": 1.0, "all": 0.75, "n": 16}
    assert result["mean"]["all"] == pytest.approx((5 + 0.75) / 6)
    seen_only = [i for i, case in enumerate(some) if case.task == "position" and not case.held_out]
    part = score([images[i] for i in seen_only], [some[i] for i in seen_only])
    assert list(part) == ["position", "mean"] and "held_out" not in part["mean"]


def _fill(required: Scene, rng: np.random.Generator) -> Scene:
    """A scene that meets a requirement: open sizes small, things in a row or a triangle, the relation met."""
    spots = [(0.25, 0.3), (0.72, 0.35), (0.5, 0.75)]
    if required.relation in ("above", "below"):
        spots = [(0.3, 0.25), (0.35, 0.72)]
    if required.relation in ("right of", "below"):
        spots = spots[1::-1]
    things = [
        replace(t, size=t.size or str(rng.choice(["small", "large"])), x=x, y=y)
        for t, (x, y) in zip(required.things, spots, strict=False)
    ]
    return replace(required, things=tuple(things))


def test_mistakes_are_named():
    with pytest.raises(UserError, match="attribute binding"):
        prompts("colour", 1)
    with pytest.raises(UserError, match="uint8"):
        parse(np.zeros((32, 32, 3), np.float32))
    with pytest.raises(UserError, match=r"\(3, 32, 32\)"):
        parse(np.zeros((3, 32, 32), np.uint8))
    with pytest.raises(ValueError):
        compositional.passes([np.zeros((32, 32, 3), np.uint8)], [])
