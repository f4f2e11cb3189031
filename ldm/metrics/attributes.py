"""What captions name that a picture must get right: skin tone, gender, style. For paired tests, and group by group.

A further attribute is an entry in ATTRIBUTES.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """Values that exclude each other, and how a caption names one: `pattern` with {} for the value."""

    name: str
    values: tuple[str, ...]
    pattern: str
    without: str = ""  # regular expression of what to leave out, so that the caption names none

    def named(self, caption: str) -> str | None:
        """The one value that a caption names; None for none and for several."""
        values = "|".join(re.escape(v) for v in sorted(self.values, key=len, reverse=True))
        found = set(re.findall(rf"(?<![\w-])({values}){re.escape(self.pattern[2:])}(?![\w-])", caption))
        return found.pop() if len(found) == 1 else None

    def exchanged(self, caption: str, value: str) -> str:
        """The caption with another value in place of its own, wherever that is named."""
        own = re.escape(self.named(caption) or "") + re.escape(self.pattern[2:])
        return re.sub(rf"(?<![\w-]){own}(?![\w-])", self.pattern.format(value), caption)

    def open(self, caption: str) -> str | None:
        """The caption without the attribute; None where that cannot be said."""
        return re.sub(self.without, "", caption) if self.without and self.named(caption) else None


ATTRIBUTES = (
    Attribute(
        name="skin tone",
        values=TONES,
        pattern="{} skin tone",
        without=r"( with|,| and) (light|medium-light|medium|medium-dark|dark) skin tone",
    ),
    Attribute(name="gender", values=("man", "woman"), pattern="{}"),
    Attribute(
        name="style", values=("3D", "flat"), pattern="{}", without=r", (3D|flat)$|^(a )?(3D|flat) (emoji|icon) of "
    ),
)


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


def typos(caption: str, seed: int) -> str:
    """Two neighbouring letters exchanged in a word of four letters or more; the caption itself where there is none."""
    rng = random.Random(f"{seed}/{caption}")
    words = caption.split(" ")
    long = [i for i, word in enumerate(words) if len(word) >= 4 and word.isalpha() and len(set(word)) > 1]
    if not long:
        return caption
    place = rng.choice(long)
    word = words[place]
    swaps = [i for i in range(len(word) - 1) if word[i] != word[i + 1]]
    i = rng.choice(swaps)
    words[place] = word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    return " ".join(words)
