"""Numbers as records that stand alone: {"metric", "of", "value", "interval", "n", ...} with all that they depend on.

Intervals are 95% bootstrap intervals. A further metric is a function that returns records, called by an evaluation.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldm.config import UserError
from ldm.evaluate.features import Features
from ldm.evaluate.pictures import Pictures
from ldm.metrics.alignment import chance, cosine, retrieval_hits
from ldm.metrics.diversity import inception_score, neighbourhoods
from ldm.metrics.frechet import frechet_distance, frechet_distance_infinite
from ldm.metrics.intervals import kernel_interval, mean_interval, resampled_interval
from ldm.metrics.kernel import cmmd, kernel_distance

Record = dict[str, Any]
# Keys in which two numbers must agree to be compared; a key that neither has does not matter.
DEPENDS = ("metric", "extractor", "extractor_sha256", "resize", "n", "k", "subset_size")
NEIGHBOURS = 5
SUBSET = 1000  # images per subset of the kernel distance; half of the images where there are fewer than twice as many
SHUFFLED = "samples, shuffled captions"
FAR, LEAST, MOST = 5.0, 0.1, 0.5  # a judge finds real images with FAR times chance, at least LEAST; MOST is enough


def find(results: Sequence[Record], metric: str, of: str, **where: Any) -> list[Record]:
    """The records of a metric that have a value and agree with `where`."""
    where |= {"metric": metric, "of": of}
    return [r for r in results if r["value"] is not None and all(r.get(key) == value for key, value in where.items())]


def named(record: Record) -> str:
    """The source that a record is of, with its guidance."""
    return f"{record['of']} at {record['guidance']:g}" if "guidance" in record else record["of"]


def best_guidance(results: Sequence[Record]) -> float:
    """The guidance of the highest compositional score; without one, of the lowest Frechet distance; without that, of
    the highest cosine with the captions; else of the fewest blank images."""
    ranked = [(-r["value"]["mean"]["all"], r["guidance"]) for r in find(results, "compositional_score", "samples")]
    for metric, sign in (("frechet_distance", 1), ("clip_cosine", -1), ("blank_pictures", 1)):
        ranked = ranked or [(sign * r["value"], r["guidance"]) for r in find(results, metric, "samples")]
    return min(ranked)[1]


def ratio(a: Record, b: Record) -> float:
    """a's value over b's, nan unless b's is above 0. Raises UserError for numbers that do not compare."""
    for key in DEPENDS:
        if a.get(key) != b.get(key):
            raise UserError(
                f"{a['metric']} of {a['of']} and of {b['of']} do not compare: {key} {a.get(key)} and {b.get(key)};"
                " measure both with the same number of images, network and resize"
            )
    return a["value"] / b["value"] if b["value"] > 0 else math.nan


def mean_record(metric: str, of: str, values: Any, **fields: Any) -> Record:
    """The mean of one value per image."""
    values = torch.as_tensor(values).double()
    interval = mean_interval(values)
    return {"metric": metric, "of": of, "value": float(values.mean()), "interval": interval, "n": len(values), **fields}


def frechet_records(fake: Tensor, real: Tensor, of: str, network: Record, seed: int = 0) -> Iterator[Record]:
    """The Frechet distance of features `fake` (N, D) and `real` (M, D), and extrapolated to N -> infinity.

    With no more rows than dimensions the covariance is singular and the distance `biased` up: it compares only at the
    same N, and its `note` says how many images it needs. With fewer rows than twice the dimensions there is no
    extrapolation, but a `note`.
    """
    n, dimensions = min(len(fake), len(real)), fake.shape[1]
    base = {"of": of, "n": n, "against": "real held-out", **network}
    value = frechet_distance(fake, real)
    low, high = resampled_interval(frechet_distance, (fake, real), value, seed)
    size: Record = {"dimensions": dimensions, "biased": n <= dimensions}
    if n <= dimensions:
        size["note"] = f"needs {dimensions + 1} pictures on both sides, one more than features, for less bias"
    yield {"metric": "frechet_distance", "value": value, "interval": (max(low, 0.0), max(high, 0.0)), **base, **size}
    base["metric"] = "frechet_distance_infinite"
    if n < 2 * max(dimensions, 2):
        yield {"value": None, "note": f"needs {2 * dimensions} pictures, twice the features", **base}
        return
    extrapolated = partial(frechet_distance_infinite, seed=seed)
    value = extrapolated(fake, real)
    yield {"value": value, "interval": resampled_interval(extrapolated, (fake, real), value, seed, few=True), **base}


def picture_records(fake: Tensor, real: Tensor, of: str, network: Record, seed: int = 0) -> Iterator[Record]:
    """Kernel distance, precision, recall, density and coverage of features `fake` (N, D) against `real` (M, D); the
    intervals of the latter four keep the neighbourhoods as they are."""
    n = min(len(fake), len(real))
    base = {"of": of, "n": n, "against": "real held-out", **network}
    subset = min(SUBSET, n // 2)
    value, deviation = kernel_distance(fake, real, subset_size=subset, seed=seed)
    interval = kernel_interval(fake[:n], real[:n], "kid", value, seed)
    kernel = {"metric": "kernel_distance", "value": value, "interval": interval}
    yield kernel | {"deviation": deviation, "subset_size": subset} | base
    for metric, values in neighbourhoods(real, fake, NEIGHBOURS).items():
        yield mean_record(metric, values=values, k=NEIGHBOURS, **base)


def class_records(probabilities: Tensor | None, of: str, network: Record, seed: int = 0) -> list[Record]:
    """The Inception Score of class probabilities (N, K), where the network has classes."""
    if probabilities is None:
        return []
    value, deviation = inception_score(probabilities)
    interval = resampled_interval(lambda rows: inception_score(rows)[0], (probabilities,), value, seed)
    base = {"of": of, "n": len(probabilities), "deviation": deviation, "splits": 10, **network}
    return [{"metric": "inception_score", "value": value, "interval": interval, **base}]


def distance_records(
    features: Features, source: Pictures, real: Pictures, seed: int, frechet: bool = True
) -> list[Record]:
    """All numbers of a feature network on images against real ones."""
    x, y, network = features(source), features(real), features.network
    kinds = (frechet_records, picture_records) if frechet else (picture_records,)
    records = [record for compute in kinds for record in compute(x, y, source.of, network.metadata, seed)]
    return records + class_records(network.probabilities(x.to(features.device)), source.of, network.metadata, seed)


def cmmd_record(fake: Tensor, real: Tensor, of: str, network: Record, seed: int = 0) -> Record:
    """CMMD of image embeddings (N, D) and (M, D), of as many images on both sides."""
    value, n = cmmd(fake, real), min(len(fake), len(real))
    low, high = kernel_interval(fake[:n], real[:n], "cmmd", value, seed)
    base = {"of": of, "n": n, "against": "real held-out", **network}
    return {"metric": "cmmd", "value": value, "interval": (max(low, 0.0), max(high, 0.0)), **base}


def alignment_records(images: Tensor, texts: Tensor, same: Tensor, of: str, network: Record) -> Iterator[Record]:
    """Cosines of images with their captions (unit embeddings (N, D)), `each` of them too, and retrieval both ways;
    `same` (N, N) marks the pairs that share a caption."""
    record = partial(mean_record, of=of, **network)
    cosines = cosine(images, texts)
    yield record("clip_cosine", values=cosines, each=[round(value, 6) for value in cosines.tolist()])
    for metric, weight in (("clip_score_100", 100), ("clip_score", 2.5)):
        yield record(metric, values=weight * cosines.clamp_min(0), weight=weight)
    for metric, hits in retrieval_hits(images, texts, (1, 5), same).items():
        yield record(metric, values=hits, chance=chance(same, int(metric[-1])))


def sharing(captions: Sequence[Sequence[str]]) -> Tensor:
    """(N, N) bool: whether two of N images, each with its captions, share one; each with itself."""
    owners = defaultdict(list)
    for row, texts in enumerate(captions):
        for text in texts:
            owners[text].append(row)
    same = torch.eye(len(captions), dtype=torch.bool)
    for rows in owners.values():
        same[torch.tensor(rows)[:, None], torch.tensor(rows)] = True
    return same


def judge_fault(record: Record) -> str:
    """Why a judge whose "text_to_image@1" of real images is `record` cannot judge; "" where it beats chance by far."""
    least = min(max(FAR * record["chance"], LEAST), MOST)
    if record["value"] >= least:
        return ""
    kind = {"real held-out": "real ", "reference": "reference "}.get(record["of"], "")
    return (
        f"judge {record['extractor']!r} finds the right one of {record['n']} {kind}pictures for a caption in"
        f" {record['value']:.1%} (chance {record['chance']:.1%}, {least:.1%} needed)"
    )


def left_out(*datasets: Any) -> list[Record]:
    """How many samples of data sets could not be used, with the first reason; nothing where all could."""
    faults = [dataset.faults for dataset in datasets if hasattr(dataset, "faults")]
    reasons = {name: why for each in faults for name, why in each.reasons.items()}
    total = max((each.total or 0 for each in faults), default=0)
    base = {"metric": "left_out", "of": "data", "value": len(reasons), "n": total}
    return [base | {"note": next(iter(reasons.values()))}] if reasons else []


def headline(record: Record) -> str:
    """A number as a terminal shows it, with its network and N."""
    source = f"{record['extractor']}, N={record['n']}" if "extractor" in record else f"N={record['n']}"
    return f"{record['metric']} ({source}): {number(record)}"


def biases(results: Sequence[Record]) -> list[str]:
    """One line where Frechet distances are of too few images for their features."""
    notes = dict.fromkeys(r["note"] for r in results if r["metric"] == "frechet_distance" and r.get("biased"))
    return [f"Frechet distance is biased: it {note}; the kernel distance and CMMD need no more" for note in notes]


def number(record: Record | None, factor: float = 1.0, interval: bool = True) -> str:
    """A record's value times `factor`, with its interval where it has one; "-" for none."""
    if record is None or record["value"] is None:
        return "-"
    text = short(factor * record["value"])
    if not interval or "interval" not in record:
        return text
    low, high = (short(factor * bound) for bound in record["interval"])
    return f"{text} [{low}, {high}]"


def short(value: float) -> str:
    """About three digits, without exponents."""
    digits = next((d for d, least in enumerate((1000, 10, 1, 0.1)) if abs(value) >= least), 4)
    return f"{value:.{digits}f}" if value else "0"
