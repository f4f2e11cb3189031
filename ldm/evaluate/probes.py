"""Beyond quality and alignment: does a model copy its training set, does wording matter, are groups alike?

A probe adds its records and images to an evaluation, at one guidance.
"""

import random
import re
import warnings
from collections import Counter
from functools import partial

import torch
from torch import Tensor

from ldm.evaluate.evaluation import Evaluation
from ldm.evaluate.records import Record, mean_record
from ldm.evaluate.report import Row
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
    bank, real = e.features(e.searched), e.features(e.real)
    held_out, _ = nearest(real, bank)
    distances, which = nearest(e.features(e.samples[g]), bank)
    if shared := int((held_out <= SAME * real.norm(dim=1)).sum()):
        warnings.warn(
            f"{shared} of the {len(real)} held-out pictures are in the training set too and flatter the model; keep one"
            " copy of each picture, or sort them into sub-folders train, val and test",
            stacklevel=2,
        )
    indices = [e.bank[i] for i in which.tolist()]
    about = {
        "bank": len(e.bank),
        "bank_is_whole": len(e.bank) == len(e.train),
        "near": NEAR,
        **e.features.network.metadata,
    }
    about["held_out_in_train"] = shared
    extra = ({}, {"nearest": indices, "distances": distances.tolist()})
    for (source, fields), each, own in zip(e.sources(g), (held_out, distances), extra, strict=True):
        nearer = mean_record("", "", each < held_out.min())
        about |= {"nearer_than_any": nearer["value"], "nearer_interval": nearer["interval"]}
        about["quantiles"] = torch.quantile(each, torch.linspace(0, 1, QUANTILES + 1).double()).tolist()
        memorized = mean_record("memorized", source.of, each < torch.quantile(held_out, NEAR))
        e.add([memorized], **about, **fields, **own)
    for i in distances.argsort()[:SHOWN].tolist():
        pictures = [("sample", e.samples[g].read(i)), ("training", e.train[indices[i]]["image"])]
        note = f"distance {distances[i]:.3g}; the training picture: {e.train.captions(indices[i])[0]}"
        e.show("copies", Row(caption=e.captions[i], pictures=pictures, note=note))


def robustness(e: Evaluation, g: float) -> None:
    """The change of each image's cosine with the caption as first worded, where the model was asked in other words, in
    upper case or with a typo, from the same noise. Captions that cannot be changed so do not count."""
    first = e.captions[:WORDED]
    kinds = {
        "other wording": [_other_wording(e, i) for i in range(len(first))],
        "upper case": [caption.upper() for caption in first],
        "typos": [typos(caption, e.config.seed) for caption in first],
    }
    kinds = {kind: captions for kind, captions in kinds.items() if captions != first}
    sources = {k: e.sample(f"wording/{k.replace(' ', '-')}", texts, g, k) for k, texts in kinds.items()}
    plain = cosine(e.embeddings(e.samples[g])[: len(first)], e.texts(first))
    for kind, source in sources.items():
        changed = cosine(e.embeddings(source), e.texts(first))
        other = torch.tensor([a != b for a, b in zip(kinds[kind], first, strict=True)])
        e.add([mean_record("clip_cosine_change", kind, (changed - plain)[other])], **e.about(g), **e.judge.metadata)
    for i in range(min(SHOWN, len(first)) if kinds else 0):
        pictures = [("as asked", e.samples[g].read(i)), *((kind, source.read(i)) for kind, source in sources.items())]
        note = "; ".join(captions[i] for captions in kinds.values())
        e.show("wording", Row(caption=first[i], pictures=pictures, note=note))


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
        for source, fields in e.sources(g):
            embeddings, features = e.embeddings(source), (e.features or e.embeddings)(source)
            for value in attribute.values:
                rows = [i for i, name in enumerate(named) if name == value]
                if len(rows) > 1:
                    records = _group(e, embeddings[rows], features[rows], [e.captions[i] for i in rows], attribute)
                    e.add(records, of=source.of, attribute=attribute.name, group=value, **fields)


def _group(e: Evaluation, images: Tensor, features: Tensor, captions: list[str], attribute: Attribute) -> list[Record]:
    mean = partial(mean_record, of="", **e.judge.metadata)
    shares, _ = paired(images, captions, e.texts, attribute)
    value = _spread(features)
    interval = resampled_interval(_spread, (features,), value, e.config.seed)
    diversity = {"metric": "group_diversity", "value": value, "interval": interval, "n": len(captions)}
    return [
        mean("group_clip_cosine", values=cosine(images, e.texts(captions))),
        mean("group_paired", values=shares, chance=0.5),
        diversity | (e.features or e.embeddings).network.metadata,
    ]


def _spread(features: Tensor) -> float:
    """The mean distance between two different rows of (N, D)."""
    distances = torch.cdist(features.double(), features.double())
    return float(distances.sum() / (len(features) * (len(features) - 1)))


def combinations(e: Evaluation, g: float) -> None:
    """On captions whose combination of skin tone and gender training never has: the share of wrong combinations to
    which the right one is preferred, and in `every` how often to all."""
    is_new = getattr(e.dataset, "new_combination", lambda index: False)
    rows = [i for i, index in enumerate(e.indices) if is_new(index)]
    for source, fields in e.sources(g):
        shares, _ = paired(e.embeddings(source)[rows], [e.captions[i] for i in rows], e.texts, *PERSON)
        if len(shares) > 1:
            every = mean_record("", "", shares == 1)
            record = mean_record("new_combinations", source.of, shares, chance=0.5, every=every["value"])
            e.add([record | {"every_interval": every["interval"]}], **e.judge.metadata, **fields)


def left_open(e: Evaluation, g: float, attribute: Attribute) -> None:
    """Which value the judge sees in images whose captions leave the attribute open: the caption that it prefers."""
    named = {attribute.open(caption): caption for caption in e.captions}
    captions = [caption for caption in named if caption][:OPENED]
    if not captions:
        return
    name, values, seen = attribute.name, [*attribute.values, NONE], []
    source = e.sample(f"open/{name.replace(' ', '-')}", captions, g, f"{name} left open")
    for image, short in zip(e.embeddings(source), captions, strict=True):
        options = e.texts([*(attribute.exchanged(named[short], value) for value in attribute.values), short])
        seen.append(values[int((options @ image).argmax())])
    value = {each: Counter(seen)[each] / len(seen) for each in values}
    interval = {each: mean_interval(torch.tensor([s == each for s in seen])) for each in values}
    record = {"metric": "left_open", "of": "samples", "value": value, "interval": interval, "n": len(seen)}
    e.add([record], attribute=name, **e.about(g), **e.judge.metadata)
    for i, caption in enumerate(captions[: 2 * SHOWN]):
        e.show(name, Row(caption=caption, pictures=[("", source.read(i))], note=f"judged: {seen[i]}"))
