"""Beyond quality and alignment: does the model copy, does wording matter, are groups alike, what does it cost?"""

import random
import resource
import time
from collections import Counter

import torch
from torch import Tensor

from ldm.metrics.alignment import cosine
from ldm.metrics.attributes import ATTRIBUTES, paired, typos
from ldm.metrics.diversity import nearest
from ldm.metrics.records import Record, mean_record
from ldm.tasks.evaluate_bench import Bench, Measured, source_of
from ldm.tasks.evaluate_pictures import PictureSet

WORDED = 96  # captions that are asked for in other wording
OPENED = 48  # captions that leave an attribute open
CLOSEST = 12  # pairs of sample and training picture for the report
NEAR = 0.05  # share of real held-out pictures that lie nearest to the training set
QUANTILES = 50
TIMED = 8  # pictures


def memorization(bench: Bench, measured: Measured, g: float) -> None:
    """How near each sample lies to its nearest training picture, against how near real held-out pictures lie.

    "memorized": share of samples nearer than the nearest 5% of the held-out pictures; `nearer_than_any`: than all of
    them. Real held-out pictures have 5% and 0% by definition.
    """
    bank = bench.features(bench.real_train(len(bench.bank)), "memorization: training set")
    held_out, _ = nearest(bench.features(bench.real()), bank)
    distances, which = nearest(bench.features(bench.samples(g)), bank)
    threshold = torch.quantile(held_out, NEAR)
    levels = torch.linspace(0, 1, QUANTILES + 1, dtype=torch.float64)
    whole = len(bench.bank) == len(bench.train)
    about = bench.extractor.about | {"bank": len(bench.bank), "bank_is_whole": whole, "near": NEAR}
    for of, found, extra in (
        ("real held-out", held_out, {}),
        ("samples", distances, {"guidance": g, **bench.about}),
    ):
        record = mean_record("memorized", of, (found < threshold).double(), **about, **extra)
        record["nearer_than_any"] = float((found < held_out.min()).double().mean())
        record["quantiles"] = torch.quantile(found, levels).tolist()
        measured.results.append(record)
    order = distances.argsort()[:CLOSEST].tolist()
    measured.copies = [(i, bench.bank[int(which[i])], float(distances[i])) for i in order]


def robustness(bench: Bench, measured: Measured, g: float) -> None:
    """The change of alignment with the caption as first worded, where it is put in other words, in upper case, or with
    a typo; same seeds, so that each picture has its own to be held against."""
    seed, count = bench.settings["seed"], min(WORDED, bench.n)
    first, texts = bench.captions[:count], bench.texts(bench.captions[:count])
    kinds = {
        "other wording": [_reworded(bench, i) for i in range(count)],
        "upper case": [caption.upper() for caption in first],
        "typos": [typos(caption, seed) for caption in first],
    }
    kinds = {kind: worded for kind, worded in kinds.items() if worded != first}
    sets = {k: PictureSet(folder=bench.out / "wording" / k.replace(" ", "-"), captions=w) for k, w in kinds.items()}
    bench.make(list(sets.values()), [g], "generating, other wording")
    plain = cosine(bench.embeddings(bench.samples(g))[:count], texts)
    about = {"guidance": g, **bench.about, **bench.judge_about}
    for kind, made in sets.items():
        changed = cosine(bench.embeddings(source_of(made, g, kind)), texts)
        measured.results.append(mean_record("clip_cosine_change", kind, changed - plain, **about))
    measured.variants = sets


def _reworded(bench: Bench, i: int) -> str:
    """Another caption of the same picture; the same one where there is no other."""
    others = [c for c in bench.dataset.captions(bench.indices[i]) if c != bench.captions[i]]
    return random.Random(f"{bench.settings['seed']}/{i}/other").choice(others) if others else bench.captions[i]


def groups(bench: Bench, measured: Measured, g: float) -> None:
    """For each group that captions name: alignment, the right value preferred to wrong ones, and variety, of samples
    and of real pictures; and what captions turn into that leave the group open."""
    for attribute in ATTRIBUTES:
        named = [attribute.named(caption) for caption in bench.captions]
        if attribute.without and any(named):
            _opened(bench, measured, g, attribute)
        for source, about in ((bench.real(), {}), (bench.samples(g), {"guidance": g, **bench.about})):
            images = bench.embeddings(source)
            cosines = cosine(images, bench.texts(bench.captions))
            shares, asked = paired(images, bench.captions, bench.texts, attribute)
            features = bench.features(source) if bench.extractor else images
            for value in attribute.values:
                mine = [i for i, name in enumerate(named) if name == value]
                if len(mine) < 2:
                    continue
                place = {"attribute": attribute.name, "group": value, **bench.judge_about, **about}
                right = torch.tensor([float(shares[asked.index(i)]) for i in mine])
                measured.results.append(mean_record("group_clip_cosine", source.of, cosines[mine], **place))
                measured.results.append(mean_record("group_paired", source.of, right, chance=0.5, **place))
                spread = {"value": _spread(features[mine]), "n": len(mine)}
                measured.results.append({"metric": "group_diversity", "of": source.of, **place, **spread})


def _opened(bench: Bench, measured: Measured, g: float, attribute) -> None:
    """Pictures of captions without the attribute, and which value the judge sees in each."""
    found = [(attribute.open(caption), caption) for caption in bench.captions]
    asked = {short: caption for short, caption in found if short}
    chosen = dict(list(asked.items())[:OPENED])
    folder = bench.out / "open" / attribute.name.replace(" ", "-")
    made = PictureSet(folder=folder, captions=list(chosen))
    bench.make([made], [g], f"generating, {attribute.name} left open")
    images = bench.embeddings(source_of(made, g, f"{attribute.name} left open"))
    seen = []
    for image, caption in zip(images, chosen.values(), strict=True):
        options = bench.texts([attribute.exchanged(caption, value) for value in attribute.values])
        seen.append(attribute.values[int((options @ image).argmax())])
    counts = Counter(seen)
    value = {name: counts[name] / len(seen) for name in attribute.values}
    about = {"attribute": attribute.name, "n": len(seen), "guidance": g, **bench.about, **bench.judge_about}
    measured.results.append({"metric": "left_open", "of": "samples", "value": value, **about})
    measured.opened.append((attribute.name, made, seen))


def _spread(features: Tensor) -> float:
    """The mean distance between two different rows of (N, D)."""
    distances = torch.cdist(features.double(), features.double())
    return float(distances.sum() / (len(features) * (len(features) - 1)))


def efficiency(bench: Bench, g: float) -> list[Record]:
    """Seconds a picture, in a batch after a first one to warm up, and the largest memory of this process so far."""
    captions, s = bench.captions[:TIMED], bench.settings
    options = {"guidance": g, "steps": s["steps"], "sampler": s["sampler"], "batch_size": len(captions)}
    cuda = bench.pipe.device.type == "cuda"
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        bench.pipe(captions, **options)
        seconds = (time.perf_counter() - start) / len(captions)
    memory = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    about = {"of": "samples", "n": len(captions), "guidance": g, **bench.about, "device": str(bench.pipe.device)}
    about["threads"] = torch.get_num_threads()
    return [
        {"metric": "seconds_per_picture", "value": seconds, **about},
        {"metric": "peak_memory_bytes", "value": memory, **about},
        {"metric": "parameters", "value": sum(s["parameters"].values()), **about},
    ]
