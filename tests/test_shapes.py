"""The shapes data: pure, the same for ever, compositions that training never shows."""

import hashlib

import numpy as np
import pytest
import torch

from ldm.config import UserError
from ldm.data.minimal_pairs import alter
from ldm.data.shapes import SHAPES, Scene, Shapes, Thing, coverage, is_held_out


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
    items = [(data.captions(i), data.scene(i)) for data in datasets for i in range(400)]
    digest = hashlib.sha256(repr(items).encode()).hexdigest()
    assert digest == "e9245804f9b3f491fe19181da968ddd4608d4bfaf6d2a30527b5556398cc49d2"


def test_a_relation_is_held_out_in_either_wording():
    pair = Thing(colour="blue", shape="circle"), Thing(colour="blue", shape="star")
    asked = [(pair, "left of"), (pair[::-1], "right of"), (pair, "right of"), (pair, None)]
    assert [is_held_out(Scene(things=things, relation=r)) for things, r in asked] == [True, True, False, False]


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


# Captions wrong by one word


def windows(caption: str) -> list[tuple[str, str, str]]:
    words = caption.split()
    return list(zip(["", *words], words, [*words[1:], ""], strict=False))


def differing(a: str, b: str) -> list[tuple[str, str]]:
    return [(x, y) for x, y in zip(a.split(), b.split(), strict=True) if x != y]


def test_one_word_is_exchanged_for_one_seen_in_the_same_place_and_never_for_a_true_one():
    data = Shapes(32, "train", 1000)
    true = [data.captions(i) for i in range(len(data))]
    said = [captions[i % len(captions)] for i, captions in enumerate(true)]
    seen = {window for caption in said for window in windows(caption)}
    altered = alter(said, true)
    for caption, wrong, captions in zip(said, altered, true, strict=True):
        assert wrong and wrong not in captions
        assert len(differing(caption, wrong)) == 1
        assert any(window in seen for window in set(windows(wrong)) - set(windows(caption)))
    exchanged = {word for caption, wrong in zip(said, altered, strict=True) for word, _ in differing(caption, wrong)}
    assert {"red", "star", "left", "above", "two", "large"} <= exchanged


def test_a_true_alternative_is_avoided_and_none_gives_the_empty_caption():
    said = ["a cat left of a dog", "a cat right of a dog"]
    assert alter(said, [[s] for s in said]) == said[::-1]
    assert alter(said, [said, said]) == ["", ""]
    assert alter(["alone"], [["alone"]]) == [""]
