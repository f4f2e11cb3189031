"""Captions that are wrong by one word, to measure how much CLIP's end token knows (after Yuksekgonul et al. 2023, "When
and why vision-language models behave like bags-of-words")."""

from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

READ = 100  # words from the start of a caption, more than a text encoder reads


def alter(captions: list[str], true: list[list[str]]) -> list[str]:
    """Each caption with one word exchanged for another that stands between the same two words elsewhere in the list.

    So "a cat left of a dog" becomes "... right of ...", where some caption has "cat right of". `true` are all
    captions of each picture, which are avoided. "" where no word can be exchanged: as wrong, but easy.
    """
    between: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)  # the inner keys: words, in order
    for caption in captions:
        for before, word, after in _windows(caption.split()):
            between[before, after][word] = None
    altered = []
    for caption, known in zip(captions, true, strict=True):
        words, choices = caption.split(), []  # by position, not by alternative
        for i, (before, _, after) in enumerate(islice(_windows(words), READ)):
            texts = [" ".join([*words[:i], word, *words[i + 1 :]]) for word in between[before, after]]
            if texts := [text for text in texts if text not in (*known, " ".join(words))]:
                choices.append(texts)
        altered.append(_pick(_pick(choices)) if choices else "")
    return altered


def _windows(words: list[str]) -> Iterator[tuple[str, str, str]]:
    """Every word with its neighbours, "" beyond the ends."""
    return zip(["", *words], words, [*words[1:], ""], strict=False)


def _pick(options: list) -> Any:
    return options[int(torch.randint(len(options), ()))]
