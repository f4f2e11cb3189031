"""Beyond quality and alignment: does the model copy, does wording matter, are groups alike?"""

import random
import re
import warnings
from collections import Counter

import torch
from torch import Tensor

from ldm.evaluate.bench import Bench, Measured, Source, source_of
from ldm.evaluate.records import Record, mean_record
from ldm.metrics.alignment import cosine
from ldm.metrics.attributes import ATTRIBUTES, PERSON, Attribute, combined, paired, typos
from ldm.metrics.diversity import nearest
from ldm.metrics.intervals import mean_interval, resampled_interval

WORDED = 96  # captions that are asked for in other wording
OPENED = 48  # captions that leave an attribute open
CLOSEST = 12  # pairs of sample and training picture for the report
NEAR = 0.05  # share of real held-out pictures that lie nearest to the training set
QUANTILES = 50
SAME = 1e-4  # of the length of two rows of features: nearer, they are of one picture and differ by rounding
NONE = "none named"
PLACES = r"\b(?:above|below|left|right|over|under|on top of)\b"


def memorization(bench: Bench, measured: Measured, g: float) -> None:
    """How near each sample lies to its nearest training picture, against how near real held-out pictures lie.

    "memorized": share of samples nearer than the nearest 5% of the held-out pictures; `nearer_than_any`: than all of
    them; `nearest`, `distances`: each sample's. Real held-out pictures have 5% and 0% by definition. A warning where
    some of these are training pictures.
    """
    bank = bench.features(bench.real_train(len(bench.bank)), "memorization: training set")
    real = bench.features(bench.real())
    held_out, _ = nearest(real, bank)
    if shared := int((held_out <= SAME * real.norm(dim=1)).sum()):
        warnings.warn(
            f"{shared} of the {len(real)} held-out pictures are in the training set too and flatter the model; keep one"
            " copy of each picture, or sort them into sub-folders train, val and test",
            stacklevel=2,
        )
    distances, which = nearest(bench.features(bench.samples(g)), bank)
    threshold = torch.quantile(held_out, NEAR)
    levels = torch.linspace(0, 1, QUANTILES + 1, dtype=torch.float64)
    whole = len(bench.bank) == len(bench.train)
    about = bench.extractor.about | {"bank": len(bench.bank), "bank_is_whole": whole, "near": NEAR}
    nearest_of = {"nearest": [bench.bank[i] for i in which.tolist()], "distances": distances.tolist()}
    for of, found, extra in (
        ("real held-out", held_out, {}),
        ("samples", distances, {"guidance": g, **bench.about, **nearest_of}),
    ):
        record = mean_record("memorized", of, (found < threshold).double(), **about, **extra)
        nearer = (found < held_out.min()).double()
        record |= {"nearer_than_any": float(nearer.mean()), "nearer_interval": mean_interval(nearer)}
        record["held_out_in_train"] = shared
        record["quantiles"] = torch.quantile(found, levels).tolist()
        measured.results.append(record)
    order = distances.argsort()[:CLOSEST].tolist()
    measured.copies = [(i, bench.bank[int(which[i])], float(distances[i])) for i in order]


def robustness(bench: Bench, measured: Measured, g: float) -> None:
    """The change of alignment with the caption as first worded, where it is put in other words that say the same, in
    upper case, or with a typo; same seeds, so that each picture has its own to be held against. Captions that cannot be
    changed so are not counted."""
    seed, count = bench.settings["seed"], min(WORDED, bench.n)
    first, texts = bench.captions[:count], bench.texts(bench.captions[:count])
    kinds = {
        "other wording": [_reworded(bench, i) for i in range(count)],
        "upper case": [caption.upper() for caption in first],
        "typos": [typos(caption, seed) for caption in first],
    }
    kinds = {kind: worded for kind, worded in kinds.items() if worded != first}
    sets = {k: bench.pictures(f"wording/{k.replace(' ', '-')}", w) for k, w in kinds.items()}
    bench.make(list(sets.values()), [g], "generating, other wording")
    plain = cosine(bench.embeddings(bench.samples(g))[:count], texts)
    about = {"guidance": g, **bench.about, **bench.judge.about}
    for kind, made in sets.items():
        changed = cosine(bench.embeddings(source_of(made, g, kind)), texts)
        other = torch.tensor([a != b for a, b in zip(made.captions, first, strict=True)])
        measured.results.append(mean_record("clip_cosine_change", kind, (changed - plain)[other], **about))
    measured.variants = sets


def _reworded(bench: Bench, i: int) -> str:
    """Another caption of the same picture that says as much; the same one where there is none."""
    own = bench.captions[i]
    others = [c for c in bench.dataset.captions(bench.indices[i]) if c != own and _said(c) == _said(own)]
    return random.Random(f"{bench.settings['seed']}/{i}/other").choice(others) if others else own


def _said(caption: str) -> tuple:
    """What one caption of a picture may say and another may leave open: attributes, sizes, places."""
    sizes = sorted(re.findall(r"\b(?:small|large)\b", caption))
    return *(attribute.named(caption) for attribute in ATTRIBUTES), *sizes, bool(re.search(PLACES, caption))


def groups(bench: Bench, measured: Measured, g: float) -> None:
    """For each group that captions name: alignment, the right value preferred to wrong ones, and variety, of samples
    and of real pictures; and what captions turn into that leave the group open."""
    for attribute in ATTRIBUTES:
        named = [attribute.named(caption) for caption in bench.captions]
        _opened(bench, measured, g, attribute)
        for source, about in ((bench.real(), {}), (bench.samples(g), {"guidance": g, **bench.about})):
            for value in attribute.values:
                mine = [i for i, name in enumerate(named) if name == value]
                if len(mine) > 1:
                    place = {"attribute": attribute.name, "group": value, **about}
                    measured.results += _group(bench, source, attribute, mine, place)


def combinations(bench: Bench, measured: Measured, g: float) -> None:
    """Of what training never combined so: to how many wrong combinations of skin tone and gender the right one is
    preferred, and in `every` how often to all; samples and real pictures, where the data tells which these are."""
    is_new = getattr(bench.dataset, "new_combination", lambda index: False)
    mine = [i for i, index in enumerate(bench.indices) if is_new(index)]
    captions = [bench.captions[i] for i in mine]
    for source, about in ((bench.real(), {}), (bench.samples(g), {"guidance": g, **bench.about})):
        shares, _ = combined(bench.embeddings(source)[mine], captions, bench.texts, PERSON)
        if len(shares) > 1:
            record = mean_record("new_combinations", source.of, shares, chance=0.5, **bench.judge.about, **about)
            every = (shares == 1).double()
            record |= {"every": float(every.mean()), "every_interval": mean_interval(every)}
            measured.results.append(record)


def _group(bench: Bench, source: Source, attribute: Attribute, mine: list[int], about: Record) -> list[Record]:
    """One group of a source's pictures."""
    images, captions = bench.embeddings(source)[mine], [bench.captions[i] for i in mine]
    cosines = cosine(images, bench.texts(captions))
    shares, _ = paired(images, captions, bench.texts, attribute)
    about = {**bench.judge.about, **about}
    found = [mean_record("group_clip_cosine", source.of, cosines, **about)]
    found.append(mean_record("group_paired", source.of, shares, chance=0.5, **about))
    features = bench.features(source)[mine] if bench.extractor else images
    value = _spread(features)
    interval = resampled_interval(_spread, (features,), value, bench.settings["seed"])
    variety = about | (bench.extractor or bench.judge).about | {"value": value, "interval": interval, "n": len(mine)}
    return [*found, {"metric": "group_diversity", "of": source.of, **variety}]


def _opened(bench: Bench, measured: Measured, g: float, attribute: Attribute) -> None:
    """Pictures of captions without the attribute, and whether the judge prefers to that caption one with a value."""
    asked = {attribute.open(caption): caption for caption in bench.captions}
    asked.pop(None, None)
    chosen = dict(list(asked.items())[:OPENED])
    if not chosen:
        return
    made = bench.pictures(f"open/{attribute.name.replace(' ', '-')}", list(chosen))
    bench.make([made], [g], f"generating, {attribute.name} left open")
    images = bench.embeddings(source_of(made, g, f"{attribute.name} left open"))
    values, seen = [*attribute.values, NONE], []
    for image, (short, caption) in zip(images, chosen.items(), strict=True):
        options = bench.texts([*(attribute.exchanged(caption, value) for value in attribute.values), short])
        seen.append(values[int((options @ image).argmax())])
    counts = Counter(seen)
    value = {name: counts[name] / len(seen) for name in values}
    spread = {name: mean_interval(torch.tensor([name == v for v in seen])) for name in values}
    about = {"attribute": attribute.name, "n": len(seen), "guidance": g, **bench.about, **bench.judge.about}
    measured.results.append({"metric": "left_open", "of": "samples", "value": value, "interval": spread, **about})
    measured.opened.append((attribute.name, made, seen))


def _spread(features: Tensor) -> float:
    """The mean distance between two different rows of (N, D)."""
    distances = torch.cdist(features.double(), features.double())
    return float(distances.sum() / (len(features) * (len(features) - 1)))
