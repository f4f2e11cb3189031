"""Captions wrong by one word."""

from ldm.data.minimal_pairs import alter
from ldm.data.shapes import Shapes


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
