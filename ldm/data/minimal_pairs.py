"""Captions that are wrong by one word, to measure what CLIP's end token knows (after Yuksekgonul et al. 2023, "When
and why vision-language models behave like bags-of-words")."""

from collections import defaultdict

import torch


def alter(captions: list[str], true: list[list[str]]) -> list[str]:
    """Each caption with one word exchanged for another that stands between the same two words elsewhere in the list.

    So "a cat left of a dog" becomes "... right of ...", where some caption has "cat right of". `true` are all
    captions of each picture, which are avoided. "" where no word can be exchanged: as wrong, but easy. By torch's
    global generator.
    """
    between: dict[tuple[str, str], list[str]] = defaultdict(list)
    for caption in captions:
        for before, word, after in _windows(caption):
            if word not in between[before, after]:
                between[before, after].append(word)
    return [_alter(caption, set(known) | {caption}, between) for caption, known in zip(captions, true, strict=True)]


def _alter(caption: str, known: set[str], between: dict[tuple[str, str], list[str]]) -> str:
    words = caption.split()
    found = {  # by place, so that a word with many alternatives is not exchanged more often
        place: wrong
        for place, (before, word, after) in enumerate(_windows(caption))
        if (wrong := [w for w in between[before, after] if _with(words, place, w) not in known and w != word])
    }
    if not found:
        return ""
    place = _pick(list(found))
    return _with(words, place, _pick(found[place]))


def _windows(caption: str) -> list[tuple[str, str, str]]:
    """Every word with its neighbours, "" beyond the ends."""
    words = ["", *caption.split(), ""]
    return list(zip(words, words[1:], words[2:], strict=False))


def _with(words: list[str], place: int, word: str) -> str:
    return " ".join([*words[:place], word, *words[place + 1 :]])


def _pick(options: list) -> object:
    return options[int(torch.randint(len(options), ()))]
