"""What captions name that a picture must get right: skin tone, gender, style. For paired tests, and group by group.

A further attribute is an entry in ATTRIBUTES.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """Values that exclude each other: `values` are the words for each, as many for one as for another. `where` is a
    regular expression of how a caption names one, with {} for the word. `left_out` matches what names any value, in
    captions that still say something without it, and `neutral` takes its place; None: it cannot be left out."""

    name: str
    values: dict[str, tuple[str, ...]]
    where: str
    left_out: str | None = None
    neutral: str = ""

    def named(self, caption: str) -> str | None:
        """The one value that a caption names; None for none and for several."""
        found = [v for v, words in self.values.items() if any(self._regex(w).search(caption) for w in words)]
        return found[0] if len(found) == 1 else None

    def exchanged(self, caption: str, value: str) -> str:
        """The caption with another value in place of its own, wherever that is named; the caption itself where it names
        none, or several."""
        own = self.named(caption)
        if own is None:
            return caption
        for word, other in zip(self.values[own], self.values[value], strict=True):
            caption = self._regex(word).sub(lambda m, w=word, o=other: m.group().replace(w, o), caption)
        return caption

    def open(self, caption: str) -> str | None:
        """The caption without the attribute; None where it names none, or cannot be said so."""
        if self.left_out is None or self.named(caption) is None:
            return None
        result = re.sub(self.left_out, self.neutral, caption)
        names = any(self._regex(word).search(result) for words in self.values.values() for word in words)
        return None if names or result == caption else result

    def _regex(self, word: str) -> re.Pattern:
        return re.compile(self.where.replace("{}", re.escape(word)))


_TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
ATTRIBUTES = (
    Attribute(
        name="skin tone",
        values={tone: (tone,) for tone in _TONES},
        where=r"(?<![\w-]){} skin tone(?![\w-])",
        left_out=rf"(?: with|,| and) (?:{'|'.join(_TONES)}) skin tone(?![\w-])",
    ),
    Attribute(
        name="gender",
        values={"man": ("man", "male"), "woman": ("woman", "female")},
        where=r"(?<![\w-]){}(?![\w-])",
        left_out=r"(?<![\w-])(?:man|woman)(?![\w-])",
        neutral="person",
    ),
    # as captions of icons say it; a flat roof has no style
    Attribute(
        name="style", values={"3D": ("3D",), "flat": ("flat",)}, where=r", {}$|(?<![\w-]){} (?=(?:emoji|icon) of )"
    ),
)
PERSON = ATTRIBUTES[:2]  # what a combination held out of emoji's training is made of, beside the role


def paired(
    images: Tensor, captions: list[str], texts: Callable[[list[str]], Tensor], attribute: Attribute
) -> tuple[Tensor, list[int]]:
    """For each picture whose caption names the attribute: the share of wrong values that its own is preferred to.

    Unit embeddings of pictures (N, D); `texts` embeds captions. Gives shares (K,) in [0, 1], chance 0.5, and the
    indices of the K pictures.
    """
    asked = [i for i, caption in enumerate(captions) if attribute.named(caption)]
    shares = []
    for i in asked:
        own = attribute.named(captions[i])
        wrong = [attribute.exchanged(captions[i], value) for value in attribute.values if value != own]
        cosines = texts([captions[i], *wrong]).double() @ images[i].double()
        shares.append(float((cosines[0] > cosines[1:]).double().mean()))
    return torch.tensor(shares, dtype=torch.float64), asked


def combined(
    images: Tensor, captions: list[str], texts: Callable[[list[str]], Tensor], attributes: Sequence[Attribute]
) -> tuple[Tensor, list[int]]:
    """`paired` for several attributes at once: wrong is every other combination of values of those that a picture's
    caption names, one or more."""
    asked = [i for i, caption in enumerate(captions) if any(a.named(caption) for a in attributes)]
    shares = []
    for i in asked:
        every = [captions[i]]
        for attribute in attributes:
            every = [attribute.exchanged(caption, value) for caption in every for value in attribute.values]
        wrong = sorted(set(every) - {captions[i]})
        cosines = texts([captions[i], *wrong]).double() @ images[i].double()
        shares.append(float((cosines[0] > cosines[1:]).double().mean()))
    return torch.tensor(shares, dtype=torch.float64), asked


def typos(caption: str, seed: int) -> str:
    """Two neighbouring letters exchanged in a word of four letters or more; the caption itself where there is none."""
    rng = random.Random(f"{seed}/{caption}")
    words = caption.split(" ")
    long = [i for i, word in enumerate(words) if len(word) >= 4 and word.isalpha() and len(set(word)) > 1]
    if not long:
        return caption
    place = rng.choice(long)
    word = words[place]
    i = rng.choice([i for i in range(len(word) - 1) if word[i] != word[i + 1]])
    words[place] = word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    return " ".join(words)
