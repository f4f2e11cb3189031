"""Beyond quality and alignment: does a model copy its training set, does wording matter, are groups alike?"""

import random
import re
import warnings
from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldm.evaluate.evaluation import Evaluation
from ldm.evaluate.pictures import PictureSet
from ldm.evaluate.records import Record, mean_record
from ldm.metrics.alignment import cosine
from ldm.metrics.attributes import ATTRIBUTES, PERSON, Attribute, combined, paired, typos
from ldm.metrics.diversity import nearest
from ldm.metrics.intervals import mean_interval, resampled_interval

WORDED = 96  # captions that are asked for in other wording
OPENED = 48  # captions that leave an attribute open
NEAR = 0.05  # share of real held-out images that lie nearest to the training set
QUANTILES = 50
SAME = 1e-4  # of the length of two rows of features: nearer, they are of one image and differ by rounding
NONE = "none named"
PLACES = r"\b(?:above|below|left|right|over|under|on top of)\b"


def memorization(e: Evaluation, g: float) -> list[Record]:
    """How near each sample lies to its nearest training image, against how near real held-out images lie.

    "memorized" is the share of samples nearer than the nearest 5% of held-out images, `nearer_than_any` than all of
    them. Real held-out images have 5% and 0% by definition. Warns where some of these are training images.
    """
    bank, real = e.features(e.searched), e.features(e.real)
    held_out, _ = nearest(real, bank)
    distances, which = nearest(e.features(e.samples[g]), bank)
    shared = int((held_out <= SAME * real.norm(dim=1)).sum())
    if shared:
        warnings.warn(
            f"{shared} of the {len(real)} held-out pictures are in the training set too and flatter the model; keep one"
            " copy of each picture, or sort them into sub-folders train, val and test",
            stacklevel=2,
        )
    threshold, least = torch.quantile(held_out, NEAR), held_out.min()
    levels = torch.linspace(0, 1, QUANTILES + 1, dtype=torch.float64)
    about = {
        "bank": len(e.bank),
        "bank_is_whole": len(e.bank) == len(e.train),
        "near": NEAR,
        "held_out_in_train": shared,
    }
    nearest_of = {"nearest": [e.bank[i] for i in which.tolist()], "distances": distances.tolist()}
    records = []
    for (source, fields), each in zip(e.sources(g), (held_out, distances), strict=True):
        nearer = mean_record("", "", each < least)
        fields = fields | about | (nearest_of if each is distances else {}) | e.features.network.about
        fields |= {"nearer_than_any": nearer["value"], "nearer_interval": nearer["interval"]}
        fields["quantiles"] = torch.quantile(each, levels).tolist()
        records.append(mean_record("memorized", source.of, each < threshold, **fields))
    return records


def reworded(e: Evaluation) -> dict[str, PictureSet]:
    """The first captions in other words that say as much, in upper case and with a typo, where that changes any."""
    first, seed = e.captions[:WORDED], e.config.seed
    kinds = {
        "other wording": [_other_wording(e, i) for i in range(len(first))],
        "upper case": [caption.upper() for caption in first],
        "typos": [typos(caption, seed) for caption in first],
    }
    return {k: e.picture_set(f"wording/{k.replace(' ', '-')}", texts) for k, texts in kinds.items() if texts != first}


def _other_wording(e: Evaluation, i: int) -> str:
    """Another caption of held-out image i that says as much; the same one where there is none."""
    caption = e.captions[i]
    others = [c for c in e.dataset.captions(e.indices[i]) if c != caption and _content(c) == _content(caption)]
    return random.Random(f"{e.config.seed}/{i}/other").choice(others) if others else caption


def _content(caption: str) -> tuple:
    """What one caption of an image may say and another leave open: attributes, sizes, places."""
    sizes = sorted(re.findall(r"\b(?:small|large)\b", caption))
    return *(attribute.named(caption) for attribute in ATTRIBUTES), *sizes, bool(re.search(PLACES, caption))


def robustness(e: Evaluation, g: float) -> list[Record]:
    """The change of each image's cosine with the caption as first worded, where the model was asked in other words and
    from the same noise. Captions that cannot be changed so do not count."""
    sets, texts = reworded(e), e.texts(e.captions[:WORDED])
    e.make(list(sets.values()), [g], "sampling, other wording")
    plain, records = cosine(e.embeddings(e.samples[g])[: len(texts)], texts), []
    for kind, images in sets.items():
        changed = cosine(e.embeddings(images.at(g, kind)), texts)
        other = torch.tensor([a != b for a, b in zip(images.captions, e.captions, strict=False)])
        fields = {"guidance": g, **e.about, **e.judge.about}
        records.append(mean_record("clip_cosine_change", kind, (changed - plain)[other], **fields))
    return records


def groups(e: Evaluation, g: float) -> list[Record]:
    """For each group that captions name: alignment, the right value preferred to wrong ones, and variety, of samples and
    of real images; and which values images have whose captions leave the group open."""
    records = []
    for attribute in ATTRIBUTES:
        records += left_open(e, g, attribute)
        named = [attribute.named(caption) for caption in e.captions]
        for source, fields in e.sources(g):
            embeddings, features = e.embeddings(source), (e.features or e.embeddings)(source)
            for value in attribute.values:
                rows = [i for i, name in enumerate(named) if name == value]
                if len(rows) > 1:
                    base = {"of": source.of, "attribute": attribute.name, "group": value, **fields}
                    captions = [e.captions[i] for i in rows]
                    records += _group(e, embeddings[rows], features[rows], captions, attribute, base)
    return records


def _group(
    e: Evaluation, images: Tensor, features: Tensor, captions: list[str], attribute: Attribute, base: Record
) -> list[Record]:
    mean = partial(mean_record, **base | e.judge.about)
    shares, _ = paired(images, captions, e.texts, attribute)
    value = _spread(features)
    interval = resampled_interval(_spread, (features,), value, e.config.seed)
    network = (e.features or e.embeddings).network.about
    diversity = {"metric": "group_diversity", "value": value, "interval": interval, "n": len(captions)}
    return [
        mean("group_clip_cosine", values=cosine(images, e.texts(captions))),
        mean("group_paired", values=shares, chance=0.5),
        base | network | diversity,
    ]


def _spread(features: Tensor) -> float:
    """The mean distance between two different rows of (N, D)."""
    distances = torch.cdist(features.double(), features.double())
    return float(distances.sum() / (len(features) * (len(features) - 1)))


def combinations(e: Evaluation, g: float) -> list[Record]:
    """On captions whose combination of skin tone and gender training never has: the share of wrong combinations to which
    the right one is preferred, and in `every` how often to all."""
    is_new = getattr(e.dataset, "new_combination", lambda index: False)
    rows = [i for i, index in enumerate(e.indices) if is_new(index)]
    records = []
    for source, fields in e.sources(g):
        shares, _ = combined(e.embeddings(source)[rows], [e.captions[i] for i in rows], e.texts, PERSON)
        if len(shares) > 1:
            every = mean_record("", "", shares == 1)
            fields = fields | {"every": every["value"], "every_interval": every["interval"], "chance": 0.5}
            records.append(mean_record("new_combinations", source.of, shares, **fields, **e.judge.about))
    return records


def opened(e: Evaluation, attribute: Attribute) -> PictureSet:
    """Captions without the attribute that they name."""
    short = dict.fromkeys(attribute.open(caption) for caption in e.captions)
    return e.picture_set(f"open/{attribute.name.replace(' ', '-')}", [caption for caption in short if caption][:OPENED])


def seen_values(e: Evaluation, g: float, attribute: Attribute, images: PictureSet) -> list[str]:
    """The value of the attribute that the judge sees in each image of `opened`: the caption that it prefers."""
    named: dict[Any, str] = {attribute.open(caption): caption for caption in e.captions}
    values, seen = [*attribute.values, NONE], []
    for embedding, short in zip(
        e.embeddings(images.at(g, f"{attribute.name} left open")), images.captions, strict=True
    ):
        options = e.texts([*(attribute.exchanged(named[short], value) for value in attribute.values), short])
        seen.append(values[int((options @ embedding).argmax())])
    return seen


def left_open(e: Evaluation, g: float, attribute: Attribute) -> list[Record]:
    """How often images have each value of an attribute that their captions leave open."""
    images = opened(e, attribute)
    if not images.captions:
        return []
    e.make([images], [g], f"sampling, {attribute.name} left open")
    seen = seen_values(e, g, attribute, images)
    counts, values = Counter(seen), [*attribute.values, NONE]
    value = {name: counts[name] / len(seen) for name in values}
    interval = {name: mean_interval(torch.tensor([s == name for s in seen])) for name in values}
    base = {"attribute": attribute.name, "n": len(seen), "guidance": g, **e.about, **e.judge.about}
    return [{"metric": "left_open", "of": "samples", "value": value, "interval": interval, **base}]
