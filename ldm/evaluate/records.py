"""Numbers as records that stand alone: {"metric", "of", "value", "n", ...} with all that the value depends on."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldm.config import UserError
from ldm.metrics.alignment import chance, cosine, retrieval_hits
from ldm.metrics.diversity import inception_score, neighbourhoods
from ldm.metrics.frechet import frechet_distance, frechet_distance_infinite
from ldm.metrics.intervals import Interval, kernel_interval, mean_interval, resampled_interval
from ldm.metrics.kernel import cmmd, kernel_distance

Record = dict[str, Any]
# What two numbers must share to be compared; a key that neither has does not matter.
DEPENDS = ("metric", "extractor", "extractor_sha256", "resize", "n", "k", "subset_size")
NEIGHBOURS = 5
SHUFFLED = "samples, shuffled captions"  # what records are of where pictures are held against captions of others
SUBSET = 1000  # of the kernel distance; half of the pictures where there are fewer than twice as many


def find(results: Sequence[Record], metric: str, of: str, **where: Any) -> list[Record]:
    """The records of a metric that have a value and agree with `where`."""
    where |= {"metric": metric, "of": of}
    return [r for r in results if r["value"] is not None and all(r.get(key) == value for key, value in where.items())]


def biases(results: Sequence[Record]) -> list[str]:
    """A line where the Frechet distances are of too few pictures for their features, with what is needed; else none."""
    notes = dict.fromkeys(r["note"] for r in results if r["metric"] == "frechet_distance" and r.get("biased"))
    return [f"Frechet distance is biased: it {note}; the kernel distance and CMMD need no more" for note in notes]


def named(r: Record) -> str:
    """What a record is of, with its guidance."""
    return f"{r['of']} at {r['guidance']:g}" if "guidance" in r else r["of"]


def best_guidance(results: Sequence[Record]) -> float:
    """The guidance of the highest compositional score; without one, of the lowest Frechet distance; without that, of
    the highest cosine with the captions; else of the fewest blank pictures."""
    ranked = [(-r["value"]["mean"]["all"], r["guidance"]) for r in find(results, "compositional_score", "samples")]
    for metric, sign in (("frechet_distance", 1), ("clip_cosine", -1), ("blank_pictures", 1)):
        ranked = ranked or [(sign * r["value"], r["guidance"]) for r in find(results, metric, "samples")]
    return min(ranked)[1]


def ratio(a: Record, b: Record) -> float:
    """a's value over b's, nan where b's is not above 0; UserError, with the reason, for numbers that do not compare."""
    for key in DEPENDS:
        if a.get(key) != b.get(key):
            raise UserError(
                f"{a['metric']} of {a['of']} and of {b['of']} do not compare: {key} {a.get(key)} and {b.get(key)};"
                " measure both with the same pictures' number, network and resize"
            )
    return a["value"] / b["value"] if b["value"] > 0 else math.nan


def frechet_records(fake: Tensor, real: Tensor, of: str, about: Record, seed: int = 0) -> Iterator[Record]:
    """The Frechet distance of features `fake` (N, D) and `real` (M, D), with its 95% interval, and as N grows.

    It is `biased` where rows are no more than dimensions: the covariance is then singular and the
    distance far too large, and only against another of the same N does it say anything; its `note` says what is
    needed. One extrapolated to N -> infinity has no value, and a `note`, for fewer rows than twice the dimensions.
    """
    n, dimensions = min(len(fake), len(real)), fake.shape[1]
    base = {"of": of, "n": n, "against": "real held-out", **about}
    value = frechet_distance(fake, real)
    spread = _at_least_0(resampled_interval(frechet_distance, (fake, real), value, seed))
    size: Record = {"dimensions": dimensions, "biased": n <= dimensions}
    if n <= dimensions:
        size["note"] = f"needs {dimensions + 1} pictures on both sides, one more than features, for less bias"
    yield {"metric": "frechet_distance", "value": value, "interval": spread, **base, **size}
    if n >= 2 * max(dimensions, 2):
        extrapolated = partial(frechet_distance_infinite, seed=seed)
        value = extrapolated(fake, real)
        spread = resampled_interval(extrapolated, (fake, real), value, seed, few=True)
        yield {"metric": "frechet_distance_infinite", "value": value, "interval": spread, **base}
    else:
        note = f"needs {2 * dimensions} pictures, twice the features"
        yield {"metric": "frechet_distance_infinite", "value": None, "note": note, **base}


def picture_records(fake: Tensor, real: Tensor, of: str, about: Record, seed: int = 0) -> Iterator[Record]:
    """Kernel distance and neighbourhoods of features `fake` (N, D) against `real` (M, D), with 95% intervals; those of
    neighbourhoods hold the balls as they are."""
    n = min(len(fake), len(real))
    base = {"of": of, "n": n, "against": "real held-out", **about}
    subset = min(SUBSET, n // 2)
    value, deviation = kernel_distance(fake, real, subset_size=subset, seed=seed)
    spread = kernel_interval(fake[:n], real[:n], "kid", value, seed)
    extra = {"deviation": deviation, "subset_size": subset}
    yield {"metric": "kernel_distance", "value": value, "interval": spread, **base, **extra}
    for name, values in neighbourhoods(real, fake, NEIGHBOURS).items():
        spread = mean_interval(values, seed)
        yield {"metric": name, "value": float(values.mean()), "interval": spread, **base, "k": NEIGHBOURS}


def class_records(probabilities: Tensor | None, of: str, about: Record, seed: int = 0) -> Iterator[Record]:
    """The Inception Score with its 95% interval, where the network knows classes."""
    if probabilities is not None:
        value, deviation = inception_score(probabilities)
        spread = resampled_interval(lambda rows: inception_score(rows)[0], (probabilities,), value, seed)
        base = {"of": of, "n": len(probabilities), "interval": spread, **about, "splits": 10}
        yield {"metric": "inception_score", "value": value, "deviation": deviation, **base}


def alignment_records(
    images: Tensor, texts: Tensor, same: Tensor, of: str, about: Record, seed: int = 0
) -> Iterator[Record]:
    """The mean cosine of pictures with their captions (embeddings (N, D)), and `each`; how often the right one is
    found; `same` (N, N) marks pairs that share a caption."""
    base = {"of": of, "n": len(images), **about}
    cosines = cosine(images, texts)
    each = [round(value, 6) for value in cosines.tolist()]
    spread = mean_interval(cosines, seed)
    yield {"metric": "clip_cosine", "value": float(cosines.mean()), "interval": spread, **base, "each": each}
    for name, weight in (("clip_score_100", 100), ("clip_score", 2.5)):
        score = weight * cosines.clamp_min(0)
        spread = mean_interval(score, seed)
        yield {"metric": name, "value": float(score.mean()), "interval": spread, "weight": weight, **base}
    for name, hits in retrieval_hits(images, texts, (1, 5), same).items():
        by_chance = {"chance": chance(same, int(name[-1]))}
        spread = mean_interval(hits, seed)
        yield {"metric": name, "value": float(hits.mean()), "interval": spread, **by_chance, **base}


def cmmd_record(fake: Tensor, real: Tensor, of: str, about: Record, seed: int = 0) -> Record:
    """CMMD of image embeddings, of as many pictures on both sides."""
    value, n = cmmd(fake, real), min(len(fake), len(real))
    spread = _at_least_0(kernel_interval(fake[:n], real[:n], "cmmd", value, seed))
    base = {"of": of, "n": n, "against": "real held-out", **about}
    return {"metric": "cmmd", "value": value, "interval": spread, **base}


def _at_least_0(interval: Interval) -> Interval:
    """That of a distance which is never below 0, though a spread laid around it may reach there."""
    low, high = interval
    return max(low, 0.0), max(high, 0.0)


def mean_record(metric: str, of: str, values: Tensor, **about: Any) -> Record:
    """The mean of a value a picture, with its interval."""
    values = torch.as_tensor(values).double()
    spread = mean_interval(values)
    return {"metric": metric, "of": of, "value": float(values.mean()), "interval": spread, "n": len(values), **about}
