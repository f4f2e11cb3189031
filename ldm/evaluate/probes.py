"""Beyond quality and alignment: does a model copy its training set, does wording matter, are groups alike?

A probe adds its records and images to an evaluation, at one guidance.
"""

import random
import re
import warnings
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

from ldm.evaluate.evaluation import Evaluation
from ldm.evaluate.pictures import Pictures
from ldm.evaluate.records import Record, mean_record, record
from ldm.metrics.alignment import cosine
from ldm.metrics.attributes import ATTRIBUTES, PERSON, Attribute, paired, typos
from ldm.metrics.diversity import nearest
from ldm.metrics.intervals import mean_interval, resampled_interval

SHOWN = 12  # rows of a gallery; twice as many where a row is one image
WORDED = 96  # captions that are asked for in other wording
OPENED = 48  # captions that leave an attribute open
NEAR = 0.05  # share of real held-out images that lie nearest to the training set
QUANTILES = 50
SAME = 1e-4  # of the length of two rows of features: nearer, they are of one image and differ by rounding
NONE = "none named"
PLACES = r"\b(?:above|below|left|right|over|under|on top of)\b"


def memorization(e: Evaluation, g: float) -> None:
    """How near each sample lies to its nearest training image, against how near real held-out images lie.

    "memorized" is the share of samples nearer than the nearest 5% of held-out images, `nearer_than_any` than all of
    them. Real held-out images have 5% and 0% by definition. Warns where some of these are training images.
    """
    samples, real, bank = e.samples[g], e.features(e.real), e.features(e.searched)
    held_out, _ = nearest(real, bank)
    distances, which = nearest(e.features(samples), bank)
    if shared := int((held_out <= SAME * real.norm(dim=1)).sum()):
        warnings.warn(
            f"{shared} of the {len(real)} held-out pictures are in the training set too and flatter the model; keep one"
            " copy of each picture, or sort them into sub-folders train, val and test",
            stacklevel=2,
        )
    indices = [e.bank[i] for i in which.tolist()]
    fields = {"bank": len(e.bank), "bank_is_whole": len(e.bank) == len(e.train), "near": NEAR}
    fields |= {"held_out_in_train": shared, **e.features.metadata}
    each_sample = {"nearest": indices, "distances": distances.tolist()}
    for source, values, extra in ((e.real, held_out, {}), (samples, distances, each_sample)):
        nearer = (values < held_out.min()).double()
        extra |= {"nearer_than_any": float(nearer.mean()), "nearer_interval": mean_interval(nearer)}
        extra["quantiles"] = torch.quantile(values, torch.linspace(0, 1, QUANTILES + 1).double()).tolist()
        near = values < torch.quantile(held_out, NEAR)
        e.add(mean_record("memorized", near, **source.labels, **fields, **extra))
    for i in distances.argsort()[:SHOWN].tolist():
        pictures = [("sample", samples.read(i)), ("training", e.train[indices[i]]["image"])]
        note = f"distance {distances[i]:.3g}; the training picture: {e.train.captions(indices[i])[0]}"
        e.show("copies", pictures, e.captions[i], note)


def robustness(e: Evaluation, g: float) -> None:
    """The change of each image's cosine with the caption as first worded, where the model was asked in other words, in
    upper case or with a typo, from the same noise. Captions that cannot be changed so do not count."""
    first, plain = e.captions[:WORDED], e.samples[g]
    texts = e.judge.texts(first)
    kinds = {
        "other wording": [_other_wording(e, i) for i in range(len(first))],
        "upper case": [caption.upper() for caption in first],
        "typos": [typos(caption, e.config.seed) for caption in first],
    }
    kinds = {kind: captions for kind, captions in kinds.items() if captions != first}
    rows: list[list] = [[("as asked", plain.read(i))] for i in range(min(SHOWN, len(first)))]
    for kind, captions in kinds.items():
        source = e.sample(f"wording/{kind.replace(' ', '-')}", captions, [g], kind)[g]
        change = cosine(e.judge(source), texts) - cosine(e.judge(plain)[: len(first)], texts)
        other = torch.tensor([a != b for a, b in zip(captions, first, strict=True)])
        e.add(mean_record("clip_cosine_change", change[other], **source.labels, **e.judge.metadata))
        for i, row in enumerate(rows):
            row.append((kind, source.read(i)))
    for i, row in enumerate(rows if kinds else []):
        e.show("wording", row, first[i], "; ".join(captions[i] for captions in kinds.values()))


def _other_wording(e: Evaluation, i: int) -> str:
    """Another caption of held-out image i that says as much; the same one where there is none."""
    caption = e.captions[i]
    others = [c for c in e.dataset.captions(e.indices[i]) if c != caption and _content(c) == _content(caption)]
    return random.Random(f"{e.config.seed}/{i}/other").choice(others) if others else caption


def _content(caption: str) -> tuple:
    """What one caption of an image may say and another leave open: attributes, sizes, places."""
    sizes = sorted(re.findall(r"\b(?:small|large)\b", caption))
    return *(attribute.named(caption) for attribute in ATTRIBUTES), *sizes, bool(re.search(PLACES, caption))


def groups(e: Evaluation, g: float) -> None:
    """For each group that captions name: alignment, the right value preferred to wrong ones, and variety, of samples
    and of real images; and the values in images whose captions leave the group open."""
    for attribute in ATTRIBUTES:
        left_open(e, g, attribute)
        named = [attribute.named(caption) for caption in e.captions]
        for value in attribute.values:
            rows = [i for i, name in enumerate(named) if name == value]
            for source in (e.real, e.samples[g]) if len(rows) > 1 else ():
                names = {"attribute": attribute.name, "group": value}
                e.add(*(r | names for r in _group(e, source, rows, attribute)))


def _group(e: Evaluation, source: Pictures, rows: list[int], attribute: Attribute) -> Iterator[Record]:
    """Of the images in the given rows, whose captions name one value of the attribute."""
    captions, network, fields = [e.captions[i] for i in rows], e.features or e.judge, source.labels | e.judge.metadata
    images, features = e.judge(source)[rows], network(source)[rows]
    yield mean_record("group_clip_cosine", cosine(images, e.judge.texts(captions)), **fields)
    yield mean_record("group_paired", paired(images, captions, e.judge.texts, attribute)[0], chance=0.5, **fields)
    value = _spread(features)
    interval = resampled_interval(_spread, (features,), value, e.config.seed)
    yield record("group_diversity", value, interval, n=len(rows), **fields | network.metadata)


def _spread(features: Tensor) -> float:
    """The mean distance between two different rows of (N, D)."""
    distances = torch.cdist(features.double(), features.double())
    return float(distances.sum() / (len(features) * (len(features) - 1)))


def combinations(e: Evaluation, g: float) -> None:
    """On captions whose combination of skin tone and gender training never has: the share of wrong combinations to
    which the right one is preferred, and in `every` how often to all."""
    is_new = getattr(e.dataset, "new_combination", lambda index: False)
    rows = [i for i, index in enumerate(e.indices) if is_new(index)]
    for source in (e.real, e.samples[g]):
        shares, _ = paired(e.judge(source)[rows], [e.captions[i] for i in rows], e.judge.texts, *PERSON)
        if len(shares) > 1:
            every = (shares == 1).double()
            fields = {"every": float(every.mean()), "every_interval": mean_interval(every), "chance": 0.5}
            e.add(mean_record("new_combinations", shares, **fields, **source.labels, **e.judge.metadata))


def left_open(e: Evaluation, g: float, attribute: Attribute) -> None:
    """Which value the judge sees in images whose captions leave the attribute open: the caption that it prefers."""
    named = {attribute.open(caption): caption for caption in e.captions}
    captions = [caption for caption in named if caption][:OPENED]
    if not captions:
        return
    name, values, seen = attribute.name, [*attribute.values, NONE], []
    source = e.sample(f"open/{name.replace(' ', '-')}", captions, [g])[g]
    for i, (image, caption) in enumerate(zip(e.judge(source), captions, strict=True)):
        options = [*(attribute.exchanged(named[caption], value) for value in attribute.values), caption]
        seen.append(values[int((e.judge.texts(options) @ image).argmax())])
        if i < 2 * SHOWN:
            e.show(name, [("", source.read(i))], caption, f"judged: {seen[i]}")
    value = {each: Counter(seen)[each] / len(seen) for each in values}
    interval = {each: mean_interval([s == each for s in seen]) for each in values}
    fields = {"attribute": name, "n": len(seen), **source.labels, **e.judge.metadata}
    e.add(record("left_open", value, interval, **fields))
