"""The shapes data: pure, true captions, separable shapes, compositions that training never shows."""

import hashlib
import itertools
import re

import numpy as np
import pytest
import torch

from ldm.config import UserError
from ldm.data.shapes import COLOURS, SHAPES, SIZES, Scene, Shapes, Thing, captions, coverage, is_held_out

WORD = re.compile(rf"(a|one|two|three) (?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})(?:e?s)?$")
RELATION = re.compile(r" (?:to the )?(left of|right of|above|below) (?:the )?")


def read_caption(caption: str) -> tuple[list[tuple], str | None]:
    """A reader of the grammar that shares nothing with the writer: [(size, colour, shape)], relation."""
    caption = caption.removeprefix("a picture of ")
    relation = RELATION.search(caption)
    parts = RELATION.split(caption)[::2] if relation else re.split(r", | and ", caption)
    things = []
    for part in parts:
        number, size, colour, shape = WORD.match(part).groups()
        things += [(size, colour, shape)] * {"a": 1, "one": 1, "two": 2, "three": 3}[number]
    return things, relation and relation.group(1)


def lies(relation: str, a: Thing, b: Thing) -> bool:
    dx, dy = b.x - a.x, b.y - a.y
    way = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return way[0] > abs(way[1])


def is_true(caption: str, scene: Scene) -> bool:
    said, relation = read_caption(caption)
    if len(said) != len(scene.things):
        return False
    for order in itertools.permutations(scene.things):
        pairs = zip(said, order, strict=True)
        same = all(
            size in (None, t.size) and (colour, shape) == (t.colour, t.shape) for (size, colour, shape), t in pairs
        )
        if same and (relation is None or lies(relation, *order)):
            return True
    return False


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [data.scene(i) for data in (Shapes(), Shapes(split="val"), Shapes(split="test")) for i in range(1500)]


def test_items_follow_the_contract_and_depend_on_seed_split_and_index_alone():
    for size in (32, 48):
        item = Shapes(size=size, length=6)[5]
        assert item["image"].dtype == torch.uint8 and item["image"].shape == (3, size, size)
        assert item["image"].is_contiguous() and item["captions"] == Shapes().captions(5)
        assert item["key"] == "shapes-0-train-0000005"
        assert torch.equal(item["image"], Shapes(size=size, length=99)[5]["image"])
    others = [Shapes(seed=1).scene(5), Shapes(split="val").scene(5), Shapes().scene(6)]
    assert Shapes(size=48).scene(5) == Shapes().scene(5) not in others


def test_the_data_do_not_drift():
    """Trained models rely on these scenes and captions: a change here makes another data set."""
    datasets = [Shapes(split=split) for split in ("train", "val", "test")]
    items = [(data.captions(i), data.scene(i)) for data in datasets for i in range(40)]
    digest = hashlib.sha256(repr(items).encode()).hexdigest()
    assert digest == "b66decf8f841d5f871202c1f3603686733073747366172cee0d9a35daf60a6e9"


def test_every_caption_is_true_complete_and_short(scenes):
    for scene in scenes[::3]:
        texts = captions(scene)
        assert len(set(texts)) == len(texts)
        assert all(is_true(text, scene) for text in texts), (scene, texts)
        assert max(len(re.findall(r"\w+", text)) for text in texts) <= 20
    words = {word for scene in scenes for text in captions(scene) for word in re.findall(r"\w+", text)}
    assert len(words) <= 45


def test_a_relation_is_held_out_in_either_wording():
    a, b = Thing(colour="blue", shape="circle"), Thing(colour="blue", shape="star")
    assert is_held_out(Scene(things=(a, b), relation="left of"))
    assert is_held_out(Scene(things=(b, a), relation="right of"))
    assert not is_held_out(Scene(things=(a, b), relation="right of"))
    assert not is_held_out(Scene(things=(a, b)))


AREAS = {  # of a shape of diameter 2, in closed form
    "circle": np.pi,
    "square": 1.8**2,
    "triangle": 1.98 * 1.8 / 2,
    "cross": 2 * 2 * 0.64 - 0.64**2,
    "ring": np.pi * (1 - 0.5**2),
    "star": 5 * 0.45 * np.sin(np.pi / 5),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_has_the_exact_area(shape):
    mask = coverage(shape, 40.0, 22.3, 21.6, 44)
    assert mask.min() == 0 and mask.max() == 1 and 0 < ((mask > 0) & (mask < 1)).mean() < 0.2
    assert mask.sum() == pytest.approx(AREAS[shape] * 20**2, rel=0.02)


def test_mistakes_are_named():
    for options, message in (({"size": 16}, "24 or more"), ({"length": 0}, "1")):
        with pytest.raises(UserError, match=message):
            Shapes(**options)
    with pytest.raises(IndexError):
        Shapes(length=3)[3]
