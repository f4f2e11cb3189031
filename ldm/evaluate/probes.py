"""Beyond quality and alignment: is every kind of picture right, has the model learned its training set or does it copy
it, does wording matter, are groups alike?

A probe adds its records and images to an evaluation, at the reported guidance.
"""

import random
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from ldm.data.faults import readable
from ldm.evaluate.evaluation import ModelEvaluation, Questions, pose
from ldm.evaluate.pictures import Pictures, of_dataset, sample_indices
from ldm.evaluate.records import Record, mean_record, record, resampled_record
from ldm.metrics.alignment import chance, cosine, retrieval_hits
from ldm.metrics.attributes import ATTRIBUTES, PERSON, Attribute, paired, typos
from ldm.metrics.diversity import nearest
from ldm.metrics.intervals import mean_of_means_interval

SHOWN = 12  # rows of a gallery; twice as many where a row is one image
WORDED = 96  # captions that are asked for in other wording
OPENED = 48  # captions that leave an attribute open
AVERAGED = 30  # images of a kind that counts in the mean over kinds
NEAR = 0.05  # share of real held-out images that lie nearest to the training set
QUANTILES = 50
SAME = 1e-4  # of the length of two rows of features: nearer, they are of one image and differ by rounding
NONE = "none named"
PLACES = r"\b(?:above|below|left|right|over|under|on top of)\b"


def shuffled(e: ModelEvaluation) -> None:
    """Alignment with the captions of other images: what a judge says where nothing is right."""
    captions, same = e.test.captions[-1:] + e.test.captions[:-1], e.test.same.roll((1, 1), (0, 1))
    for source in e.sources:
        e.add(*e.judge.alignment(source, captions, same, of=f"{source.of}, shuffled captions"))


def kinds(e: ModelEvaluation) -> None:
    """Retrieval within each kind of picture, of real images and of samples: of held-out captions where the data set
    names kinds, and of training captions, of which a model that cannot draw them has learned too little."""
    asked = [e.test] if hasattr(e.test.dataset, "kind") else []
    if e.bank and e.config.train_captions:
        asked.append(pose("training", e.train, training_indices(e), e.config.seed))
    for questions in asked:
        for source in (questions.real, e.sample(questions, e.guidance)):
            e.add(*kind_records(e, questions, source))


def training_indices(e: ModelEvaluation) -> list[int]:
    """`train_captions` random training images per kind, in turn: fewer are the beginning of more."""
    indices = sample_indices(len(e.train), len(e.train), e.config.seed)
    members = _by_kind(e.train, indices).values()
    turns = zip_longest(*([indices[row] for row in rows[: e.config.train_captions]] for rows in members))
    return readable(e.train, [i for turn in turns for i in turn if i is not None])


def _by_kind(dataset: Any, indices: Sequence[int]) -> dict[str, list[int]]:
    """The rows of each kind of image; of one kind, "all", where the data set names none."""
    rows = defaultdict(list)
    for row, index in enumerate(indices):
        rows[dataset.kind(index) if hasattr(dataset, "kind") else "all"].append(row)
    return rows


def kind_records(e: ModelEvaluation, asked: Questions, source: Pictures) -> Iterator[Record]:
    """Of each kind how many images lead to their caption first among the kind's captions, and captions to their image;
    then the unweighted means over the kinds of AVERAGED images or more."""
    images, texts, averaged = e.judge(source), e.judge.texts(asked.captions), defaultdict(dict)
    for kind, rows in _by_kind(asked.dataset, asked.indices).items():
        same, part = asked.same[rows][:, rows], source.rows(rows)
        fields = {"kind": kind, "chance": chance(same, 1)}
        for metric, hits in retrieval_hits(images[rows], texts[rows], (1,), same).items():
            yield e.judge.mean(f"kind_{metric}", hits, part, **fields)
            if len(rows) >= AVERAGED and kind != "all":
                averaged[metric][kind] = (hits, part.concepts)
    for metric, parts in averaged.items():
        value = sum(float(hits.mean()) for hits, _ in parts.values()) / len(parts)
        fields = {"kinds": list(parts), "n": sum(len(hits) for hits, _ in parts.values()), **e.judge.metadata}
        yield record(f"mean_kind_{metric}", value, source, mean_of_means_interval([*parts.values()]), **fields)


def wording(e: ModelEvaluation) -> None:
    """The change of each image's cosine with the caption as first worded, where the model was asked in other words, in
    upper case or with a typo, from the same noise. Captions that cannot be changed so do not count."""
    first, (_, plain) = e.test.captions[:WORDED], e.sources
    texts, rows = e.judge.texts(first), [[("as asked", plain.read(i))] for i in range(min(SHOWN, len(first)))]
    before, notes = cosine(e.judge(plain)[: len(first)], texts), defaultdict(list)
    for kind, captions in {
        "other wording": [_other_wording(e, i) for i in range(len(first))],
        "upper case": [caption.upper() for caption in first],
        "typos": [typos(caption, e.config.seed) for caption in first],
    }.items():
        other = [i for i, (a, b) in enumerate(zip(captions, first, strict=True)) if a != b]
        if other:
            source = e.sample(
                Questions(of=kind, folder=f"wording/{kind.replace(' ', '-')}", captions=captions), e.guidance
            )
            change = (cosine(e.judge(source), texts) - before)[other]
            part = source.rows(other, concepts=plain.rows(other).concepts)
            e.add(e.judge.mean("clip_cosine_change", change, part))
            for i, row in enumerate(rows):
                row.append((kind, source.read(i)))
                notes[i].append(captions[i])
    for i, note in notes.items():
        e.show("wording", rows[i], first[i], "; ".join(note))


def _other_wording(e: ModelEvaluation, i: int) -> str:
    """Another caption of held-out image i that says as much; the same one where there is none."""
    caption, captions = e.test.captions[i], e.test.dataset.captions(e.test.indices[i])
    others = [c for c in captions if c != caption and _content(c) == _content(caption)]
    return random.Random(f"{e.config.seed}/{i}/other").choice(others) if others else caption


def _content(caption: str) -> tuple:
    """What one caption of an image may say and another leave open: attributes, sizes, places."""
    sizes = sorted(re.findall(r"\b(?:small|large)\b", caption))
    return *(attribute.named(caption) for attribute in ATTRIBUTES), *sizes, bool(re.search(PLACES, caption))


def groups(e: ModelEvaluation) -> None:
    """For each group that captions name: alignment, the right value preferred to wrong ones, and variety, of samples
    and of real images; and the values in images whose captions leave the group open."""
    network = e.features or e.judge
    for attribute in ATTRIBUTES:
        left_open(e, attribute)
        for value in attribute.values:
            rows = [i for i, caption in enumerate(e.test.captions) if attribute.named(caption) == value]
            captions, group = [e.test.captions[i] for i in rows], {"attribute": attribute.name, "group": value}
            for source in e.sources if len(rows) > 1 else ():
                images, part = e.judge(source)[rows], source.rows(rows)
                shares, _ = paired(images, captions, e.judge.texts, attribute)
                cosines, features = cosine(images, e.judge.texts(captions)), network(source)[rows]
                spread = {"seed": e.config.seed, "groups": (part.concepts,)}
                e.add(
                    e.judge.mean("group_clip_cosine", cosines, part, **group),
                    e.judge.mean("group_paired", shares, part, chance=0.5, **group),
                    resampled_record("group_diversity", _spread, [features], part, spread, **group, **network.metadata),
                )


def _spread(features: Tensor) -> float:
    """The mean distance between two different rows of (N, D)."""
    distances = torch.cdist(features.double(), features.double())
    return float(distances.sum() / (len(features) * (len(features) - 1)))


def left_open(e: ModelEvaluation, attribute: Attribute) -> None:
    """Which value the judge sees in images whose captions leave the attribute open: the caption that it prefers."""
    named = {attribute.open(caption): caption for caption in e.test.captions}
    captions = [caption for caption in named if caption][:OPENED]
    if not captions:
        return
    name, values, seen = attribute.name, [*attribute.values, NONE], []
    source = e.sample(Questions(of="samples", folder=f"open/{name.replace(' ', '-')}", captions=captions), e.guidance)
    for i, (image, caption) in enumerate(zip(e.judge(source), captions, strict=True)):
        options = [*(attribute.exchanged(named[caption], value) for value in attribute.values), caption]
        seen.append(values[int((e.judge.texts(options) @ image).argmax())])
        if i < 2 * SHOWN:
            e.show(name, [("", source.read(i))], caption, f"judged: {seen[i]}")
    shares = {value: [each == value for each in seen] for value in values}
    e.add(e.judge.mean("left_open", shares, source, attribute=name))


def combinations(e: ModelEvaluation) -> None:
    """On captions whose combination of skin tone and gender training never has: the share of wrong combinations to
    which the right one is preferred, and in `every` how often to all."""
    is_new = getattr(e.test.dataset, "new_combination", lambda index: False)
    rows = [i for i, index in enumerate(e.test.indices) if is_new(index)]
    for source in e.sources:
        captions = [e.test.captions[i] for i in rows]
        shares, used = paired(e.judge(source)[rows], captions, e.judge.texts, *PERSON)
        if len(shares) > 1:
            part = source.rows([rows[i] for i in used])
            every = mean_record("", shares == 1, part)
            fields = {"every": every["value"], "every_interval": every["interval"], "chance": 0.5}
            e.add(e.judge.mean("new_combinations", shares, part, **fields))


def memorization(e: ModelEvaluation) -> None:
    """How near each sample lies to its nearest training image, against how near real held-out images lie.

    "memorized" is the share of samples nearer than the nearest 5% of held-out images, `nearer_than_any` than all of
    them. Real held-out images have 5% and 0% by definition. Warns where some of these are training images.
    """
    (real, samples), bank = e.sources, e.features(of_dataset("training set", e.train, e.bank))
    held_out, _ = nearest(e.features(real), bank)
    distances, which = nearest(e.features(samples), bank)
    if shared := int((held_out <= SAME * e.features(real).norm(dim=1)).sum()):
        warnings.warn(
            f"{shared} of the {real.count} held-out pictures are in the training set too and flatter the model; keep"
            " one copy of each picture, or sort them into sub-folders train, val and test",
            stacklevel=2,
        )
    indices, shares = [e.bank[i] for i in which.tolist()], torch.linspace(0, 1, QUANTILES + 1).double()
    fields = {"bank": len(e.bank), "bank_is_whole": len(e.bank) == len(e.train), "near": NEAR}
    each = {"nearest": indices, "distances": distances.tolist()}
    for source, values, extra in ((real, held_out, {}), (samples, distances, each)):
        nearer = mean_record("", values < held_out.min(), source)
        extra |= {"nearer_than_any": nearer["value"], "nearer_interval": nearer["interval"]}
        extra |= {"quantiles": torch.quantile(values, shares).tolist(), "held_out_in_train": shared}
        e.add(e.features.mean("memorized", values < torch.quantile(held_out, NEAR), source, **fields, **extra))
    for i in distances.argsort()[:SHOWN].tolist():
        pictures = [("sample", samples.read(i)), ("training", e.train[indices[i]]["image"])]
        note = f"distance {distances[i]:.3g}; the training picture: {e.train.captions(indices[i])[0]}"
        e.show("copies", pictures, e.test.captions[i], note)


def probe(e: ModelEvaluation) -> None:
    """All probes for which there are networks and training images."""
    for each in (shuffled, kinds, wording, groups, combinations) if e.judge else ():
        each(e)
    if e.features and e.bank:
        memorization(e)
