"""Skin tone, gender and style, as captions name them and pictures must get right: for paired tests, and by group.

A further attribute is an entry in ATTRIBUTES.
"""

import itertools
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """Values that exclude each other."""

    name: str
    values: dict[str, tuple[str, ...]]  # the words for each value, as many for one as for another
    where: str  # regular expression of how a caption names a value, with {} for the word
    left_out: str | None = None  # matches the mention of any value, in captions that are whole without; None: cannot be
    neutral: str = ""  # replaces the mention

    def named(self, caption: str) -> str | None:
        """The one value that a caption names; None for none and for several."""
        values = self._mentions(caption)
        return values[0] if len(values) == 1 else None

    def exchanged(self, caption: str, value: str) -> str:
        """The caption with its value replaced by another, wherever it is named; the caption itself where it names none
        or several."""
        for word, other in zip(self.values.get(self.named(caption), ()), self.values[value], strict=False):
            caption = self._pattern(word).sub(lambda match, w=word, o=other: match.group().replace(w, o), caption)
        return caption

    def open(self, caption: str) -> str | None:
        """The caption without the attribute; None where it names none, or cannot do without."""
        if self.left_out is None or self.named(caption) is None:
            return None
        result = re.sub(self.left_out, self.neutral, caption)
        return None if self._mentions(result) else result

    def _mentions(self, caption: str) -> list[str]:
        """All values that a caption names."""
        return [v for v, words in self.values.items() if any(self._pattern(word).search(caption) for word in words)]

    def _pattern(self, word: str) -> re.Pattern:
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
PERSON = ATTRIBUTES[:2]  # beside the role, the parts of a combination held out of emoji's training


def paired(
    images: Tensor, captions: list[str], texts: Callable[[list[str]], Tensor], *attributes: Attribute
) -> tuple[Tensor, list[int]]:
    """For each picture whose caption names an attribute: the share of wrong values that the right one is preferred to;
    of several attributes, of every other combination of values of those that the caption names.

    Unit embeddings of pictures (N, D); `texts` embeds captions. Returns shares (K,) in [0, 1], chance 0.5, and the
    indices of the K pictures.
    """
    indices = [i for i, caption in enumerate(captions) if any(a.named(caption) for a in attributes)]
    shares = []
    for i in indices:
        variants = {captions[i]}
        for attribute in attributes:
            variants = {attribute.exchanged(*pair) for pair in itertools.product(variants, attribute.values)}
        cosines = texts([captions[i], *sorted(variants - {captions[i]})]).double() @ images[i].double()
        shares.append((cosines[0] > cosines[1:]).double().mean())
    return torch.tensor(shares, dtype=torch.float64), indices


def typos(caption: str, seed: int) -> str:
    """Exchanges two neighbouring letters in a word of four letters or more; the caption itself where there is none."""
    rng = random.Random(f"{seed}/{caption}")
    words = [match for match in re.finditer(r"(?<![^ ])[^\W\d_]{4,}(?![^ ])", caption) if len(set(match.group())) > 1]
    if not words:
        return caption
    word = rng.choice(words)
    i = rng.choice([i for i in range(word.start(), word.end() - 1) if caption[i] != caption[i + 1]])
    return caption[:i] + caption[i + 1] + caption[i] + caption[i + 2 :]
