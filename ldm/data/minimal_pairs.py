"""Captions that are wrong by one word, to measure how much CLIP's end token knows (after Yuksekgonul et al. 2023, "When
and why vision-language models behave like bags-of-words")."""

from collections import defaultdict
from typing import Any

import torch


def alter(captions: list[str], true: list[list[str]]) -> list[str]:
    """Each caption with one word exchanged for another that stands between the same two words elsewhere in the list.

    So "a cat left of a dog" becomes "... right of ...", where some caption has "cat right of". `true` are all
    captions of each picture, which are avoided. "" where no word can be exchanged: as wrong, but easy.
    """
    between: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)  # the inner keys: words, in order
    for caption in captions:
        for before, word, after in _windows(caption):
            between[before, after][word] = None
    pairs = zip(captions, true, strict=True)
    return [_alter(caption, {*known, caption}, between) for caption, known in pairs]


def _alter(caption: str, known: set[str], between: dict) -> str:
    words, choices = caption.split(), []
    for i, (before, word, after) in enumerate(_windows(caption)):
        altered = [" ".join([*words[:i], other, *words[i + 1 :]]) for other in between[before, after] if other != word]
        choices.append([text for text in altered if text not in known])
    choices = [texts for texts in choices if texts]  # by position, not by alternative
    return _pick(_pick(choices)) if choices else ""


def _windows(caption: str) -> list[tuple[str, str, str]]:
    """Every word with its neighbours, "" beyond the ends."""
    words = ["", *caption.split(), ""]
    return list(zip(words, words[1:], words[2:], strict=False))


def _pick(options: list) -> Any:
    return options[int(torch.randint(len(options), ()))]
