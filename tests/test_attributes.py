"""Attributes in captions: reading, exchanging and leaving them out, and the paired tests."""

import pytest
import torch

from ldm.metrics.attributes import ATTRIBUTES, paired, typos

TONE, GENDER, STYLE = ATTRIBUTES
TONES = list(TONE.values)


@pytest.mark.parametrize(
    "attribute, caption, value",
    [
        (TONE, "a woman with medium-dark skin tone, 3D", "medium-dark"),
        (TONE, "a dark horse", None),
        (TONE, "men holding hands with dark skin tone and light skin tone", None),
        (GENDER, "a man and a woman", None),
        (GENDER, "a snowman, a merman and a postman", None),
        (GENDER, "female mechanic", "woman"),
        (STYLE, "a 3D emoji of a dog", "3D"),
        (STYLE, "a flat tyre, flat", "flat"),
        (STYLE, "a house with a flat roof", None),
    ],
)
def test_the_value_that_a_caption_names(attribute, caption, value):
    assert attribute.named(caption) == value


def test_exchanging_and_leaving_open():
    assert TONE.exchanged("a man with light skin tone, 3D", "medium") == "a man with medium skin tone, 3D"
    assert GENDER.exchanged("woman mechanic, female mechanic", "man") == "man mechanic, male mechanic"
    assert STYLE.exchanged("a 3D emoji of a dog", "flat") == "a flat emoji of a dog"
    assert GENDER.exchanged("a dog", "man") == "a dog"
    assert TONE.open("a man with light skin tone, 3D") == "a man, 3D"
    assert GENDER.open("a woman with light skin tone") == "a person with light skin tone"
    assert TONE.open("a man") is TONE.open("dark skin tone hands") is STYLE.open("dog, flat") is None
    assert GENDER.open("woman mechanic, female mechanic") is None


def test_paired_counts_the_wrong_combinations_that_lose():
    captions = ["man with light skin tone", "hands", "woman with dark skin tone", "hands with dark skin tone"]
    pairs = [(tone, gender) for tone in TONES for gender in ("man", "woman")]
    axes = torch.eye(len(pairs))
    place = lambda c: pairs.index((TONE.named(c) or "light", GENDER.named(c) or "man"))  # noqa: E731
    texts = lambda asked: torch.stack([axes[place(caption)] for caption in asked])  # noqa: E731
    between = torch.linspace(0, 0.9, 10)  # the last, of a dark woman, beats them all
    between[[0, 3, 5]] = 1.0  # all but three of the nine
    images = torch.stack([axes[0], axes[1], between, between])
    shares, asked = paired(images, captions, texts, TONE, GENDER)
    expected = torch.tensor([1.0, 6 / 9, 3 / 4], dtype=torch.float64)  # of hands, all lighter ones but that at 0
    assert asked == [0, 2, 3] and torch.allclose(shares, expected)
    shares, asked = paired(images[[0, 1, 3]], [captions[i] for i in (0, 1, 3)], texts, TONE)
    assert asked == [0, 2] and shares.tolist() == [1.0, 0.75]


def test_typos_exchange_two_letters_of_a_longer_word():
    caption = "a red circle above a blue square"
    made = {typos(caption, seed) for seed in range(20)}
    assert len(made) > 5 and caption not in made
    for other in made:
        different = [i for i, (a, b) in enumerate(zip(caption, other, strict=True)) if a != b]
        assert len(different) == 2 and different[1] == different[0] + 1 and sorted(other) == sorted(caption)
    assert typos("a red fox", 0) == "a red fox" and typos(caption, 3) == typos(caption, 3)
