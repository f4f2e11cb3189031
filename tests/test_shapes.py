"""The shapes data: pure, true captions, separable shapes, compositions that training never shows."""

import hashlib

import numpy as np
import pytest
import torch

from ldm.config import UserError
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
