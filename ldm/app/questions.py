"""Which pictures people are asked about, and in which order: random, balanced and the same for the same seed."""

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ldm.config import UserError


@dataclass(frozen=True, kw_only=True)
class Question:
    """`pictures`: one, or the left and the right one. `truth`: "real" or "generated"; in pairs the side of the real
    one; None where taste is asked for, between `model` on the left and `other_model` on the right."""

    kind: str
    model: str
    pictures: tuple[Any, ...]
    truth: str | None = None
    other_model: str = ""


def questions(
    seed: int, kind: str, n: int, models: Mapping[str, Sequence[Any]], reals: Sequence[Any] = ()
) -> list[Question]:
    """n questions of a kind, "single", "pair" or "preference", in an order that `seed` gives.

    Models, or pairs of them, take turns in random order; each has as many real as generated pictures, or its pictures
    as often on the left as on the right (plus or minus 1). Real pictures come again when all real ones were shown, a
    model's when all of its own were; in preferences a caption when all captions were. In pairs and preferences picture
    i is of caption i on both sides. UserError without pictures, and there where their numbers differ.
    """
    rng = random.Random(f"{kind} {seed}")
    groups = list(itertools.combinations(models, 2) if kind == "preference" else ((name,) for name in models))
    pools = [*models.values(), *([] if kind == "preference" else [reals])]
    if kind not in ("single", "pair", "preference") or not groups or not all(map(len, pools)):
        raise UserError(f"no questions of kind {kind!r}: they need real pictures and a model's, or those of two models")
    if kind != "single" and len(set(map(len, pools))) > 1:
        raise UserError(f"{kind}s need as many pictures on all sides, not {', '.join(str(len(p)) for p in pools)}")
    dealt = list(itertools.islice(_deal(rng, len(pools[0]), len(groups)), n))
    coins = {group: _coins(rng, count) for group, count in Counter(group for _, group in dealt).items()}
    decks = {name: _deck(rng, pool) for name, pool in (*models.items(), (None, reals))}
    found = []
    for i, group in dealt:
        names, heads = groups[group], next(coins[group])
        if kind == "single":
            picture, truth = next(decks[None if heads else names[0]]), "real" if heads else "generated"
            found.append(Question(kind=kind, model=names[0], pictures=(picture,), truth=truth))
        elif kind == "pair":
            both, truth = (reals[i], models[names[0]][i]), "left" if heads else "right"
            found.append(Question(kind=kind, model=names[0], pictures=both if heads else both[::-1], truth=truth))
        else:
            left, right = names if heads else names[::-1]
            both = (models[left][i], models[right][i])
            found.append(Question(kind=kind, model=left, other_model=right, pictures=both))
    return found


def _deal(rng: random.Random, size: int, groups: int) -> Iterator[tuple[int, int]]:
    """Endless (caption, group): all captions in each round, each with a group that it has not had yet while there is
    one; the groups in turn, in random order."""
    first = [i % groups for i in range(size)]
    rng.shuffle(first)
    for turn in itertools.count():
        places: Counter[int] = Counter()
        ranked = []
        for i in rng.sample(range(size), size):
            group = (first[i] + turn) % groups
            ranked.append((places[group], rng.random(), i, group))
            places[group] += 1
        yield from ((i, group) for _, _, i, group in sorted(ranked))


def _coins(rng: random.Random, count: int) -> Iterator[bool]:
    """`count` in random order, heads as often as tails."""
    odd = rng.random() < 0.5
    return iter(rng.sample([(i % 2 == 0) == odd for i in range(count)], count))


def _deck(rng: random.Random, cards: Sequence[Any]) -> Iterator[Any]:
    """All in random order, again and again."""
    while True:
        yield from rng.sample(cards, len(cards))
