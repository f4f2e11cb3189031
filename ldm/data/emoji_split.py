"""The train/val/test split of the emoji by content, and the perceptual hash that keeps it clean.

Two kinds of hold-out, about half of the held-out pictures each (val: the same, a quarter the size):

- "concept": a (concept, style) pair, all its skin tones; the concept is trained on in the other style only.
- "combination": a (role, skin tone, gender), in both styles; its role, tone and gender are trained on apart.

A group is only held out when no picture outside it is near-identical to one of its own (`near_pairs`), so
twins such as the flags of Norway and Bouvet Island, or the ninja in two skin tones, stay in train together.
Captions are compared without case: those that train shares are dropped from val and test, those of val from
test, e.g. a held-out "dog face" in 3D keeps "a 3D emoji of a dog face" and loses "dog face".
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
from einops import rearrange, reduce

Record = dict[str, Any]
TEST, VAL = 0.08, 0.02
# Of 63 hash bits; of 255, the largest difference of two 8x8 block means. Set by looking at pairs: up to
# here two pictures pass for one (guard, man guard); above, even a small face has visibly another skin tone.
NEAR_BITS, NEAR_COLOUR = 10, 28
LARGEST_GROUP = 6  # pictures: a concept and its five skin tones
FEWEST_CAPTIONS = 2


def perceptual_hash(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (64, 64, 3) -> 63 signs (+1 or -1) of the 8x8 lowest DCT-II terms of grey at 32x32, and the means
    of 8x8x3 blocks of colour, (192,) in 0..255, which tell skin tones apart where the signs cannot."""
    x = image.astype(np.float32)
    grey = reduce(x, "(h a) (w b) c -> h w", "mean", h=32, w=32)
    k, n = np.arange(8)[:, None], np.arange(32)[None]
    basis = np.cos(np.pi * k * (2 * n + 1) / 64).astype(np.float32)
    terms = rearrange(basis @ grey @ basis.T, "i j -> (i j)")[1:]
    colour = reduce(x, "(h a) (w b) c -> (h w c)", "mean", h=8, w=8)
    return np.where(terms > np.median(terms), 1, -1).astype(np.int8), colour.astype(np.float32)


def near_pairs(images: Iterable[np.ndarray]) -> list[tuple[int, int]]:
    """Pairs i < j of near-identical pictures: hashes within NEAR_BITS and every block within NEAR_COLOUR."""
    hashes = [perceptual_hash(image) for image in images]
    signs = np.stack([bits for bits, _ in hashes]).astype(np.float32)
    colours = np.stack([colour for _, colour in hashes])
    pairs = []
    for i in range(len(signs) - 1):
        apart = (signs.shape[1] - signs[i + 1 :] @ signs[i]) / 2
        for j in np.flatnonzero(apart <= NEAR_BITS) + i + 1:
            if np.abs(colours[i] - colours[j]).max() <= NEAR_COLOUR:
                pairs.append((i, int(j)))
    return pairs


def assign(records: list[Record], pairs: list[tuple[int, int]], seed: int = 0) -> None:
    """Writes "split" and "held_out" ("", "concept" or "combination") into each record, then cleans captions.

    Deterministic in the records' content and `seed`, whatever their order: groups come in order of a hash.
    """
    twins = defaultdict(set)
    for i, j in pairs:
        twins[i].add(j)
        twins[j].add(i)
    for record in records:
        record.update(split="train", held_out="")
    used: Counter[str] = Counter()
    wanted = {"test": TEST * len(records) / 2, "val": VAL * len(records) / 2}
    for kind, groups in (("concept", _concepts(records)), ("combination", _combinations(records))):
        left = dict(wanted)
        for name in sorted(groups, key=lambda name, kind=kind: _order(seed, kind, name)):
            members = groups[name]
            split = next((split for split in left if left[split] > 0), None)
            concepts = {records[i]["concept"] for i in members}
            closed = all(twins[i] <= set(members) for i in members)
            # A concept gives one group at most: its other pictures are what train learns it from.
            if split is None or not closed or any(used[concept] for concept in concepts):
                continue
            for i in members:
                records[i].update(split=split, held_out=kind)
            used.update(concepts)
            left[split] -= len(members)
    clean_captions(records)


def clean_captions(records: list[Record]) -> None:
    """Drops from val and test the captions that train has, and from test those that val has (any case).

    Raises ValueError when a record keeps fewer than FEWEST_CAPTIONS: its hold-out would then mean nothing.
    """
    seen: set[str] = set()
    for split in ("train", "val", "test"):
        members = [record for record in records if record["split"] == split]
        for record in members:
            record["captions"] = [text for text in record["captions"] if text.lower() not in seen]
            if len(record["captions"]) < FEWEST_CAPTIONS:
                raise ValueError(f"{record['key']} of {split} has too few captions of its own")
        seen.update(text.lower() for record in members for text in record["captions"])


def table(records: list[Record]) -> str:
    """The split as text: pictures by kind of hold-out, style and group, a column a split."""
    rows: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        names = ("all", f"held out: {record['held_out'] or 'no'}", f"style: {record['style']}")
        for name in (*names, f"group: {record['group']}"):
            rows[name][record["split"]] += 1
    lines = [f"{'':32}{'train':>8}{'val':>8}{'test':>8}"]
    order = ["all", *sorted(name for name in rows if name != "all")]
    lines += [f"{n:32}" + "".join(f"{rows[n][s]:8}" for s in ("train", "val", "test")) for n in order]
    return "\n".join(lines)


def _concepts(records: list[Record]) -> dict[str, list[int]]:
    groups, styles = defaultdict(list), defaultdict(set)
    for i, record in enumerate(records):
        groups[f"{record['concept']}|{record['style']}"].append(i)
        styles[record["concept"]].add(record["style"])
    return {
        name: members
        for name, members in groups.items()
        if len(members) <= LARGEST_GROUP and len(styles[records[members[0]]["concept"]]) == 2
    }


def _combinations(records: list[Record]) -> dict[str, list[int]]:
    """(role, skin tone, gender) with a tone, in both styles, where train keeps other tones of the concept."""
    groups = defaultdict(list)
    for i, record in enumerate(records):
        if record["role"] and record["skin_tone"]:
            groups["|".join(record[name] for name in ("role", "skin_tone", "gender"))].append(i)
    return {n: members for n, members in groups.items() if {records[i]["style"] for i in members} == {"3D", "flat"}}


def _order(seed: int, kind: str, name: str) -> str:
    return hashlib.sha256(f"{seed}|{kind}|{name}".encode()).hexdigest()
