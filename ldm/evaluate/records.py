"""Numbers as records that stand alone: {"metric", "of", "value", "interval", "n", ...} with all that they depend on.

Intervals are 95% bootstrap intervals. A further metric is a function that returns records, called by an evaluation.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.evaluate.pictures import Pictures
from ldm.metrics.intervals import mean_interval, resampled_interval

Record = dict[str, Any]
SHUFFLED = "samples, shuffled captions"
BLANK = 4  # levels of 255; an image that spans no more in any channel is of one plain colour
FAR, LEAST, MOST = 5.0, 0.1, 0.5  # a judge finds real images with FAR times chance, at least LEAST; MOST is enough
# What guidance is chosen by, and 1 where less is better: the first that was measured
CRITERIA = {"compositional_score": -1, "frechet_distance": 1, "clip_cosine": -1, "blank_pictures": 1}
# The curve of quality against model passes: metric, name and factor of each column
CURVE = {
    "model_passes": ("model passes", 1),
    "compositional_score": ("exactly right, %", 100),
    "image_to_text@1": ("right caption first, %", 100),
    "frechet_distance": ("Frechet distance", 1),
    "seconds_per_picture": ("seconds per picture", 1),
}


def record(metric: str, value: Any, source: Pictures | str, interval: Any = None, **fields: Any) -> Record:
    """A number of the images `source`, or of what a text names, which then needs the field "n"."""
    named = {"of": source} if isinstance(source, str) else {"of": source.of, "n": source.count, **source.labels}
    return {"metric": metric, "value": value} | ({} if interval is None else {"interval": interval}) | named | fields


def mean_record(metric: str, values: Any, source: Pictures | str, **fields: Any) -> Record:
    """The mean of one value per image, the interval over concepts where the images have them; of a dictionary of values
    dictionaries of means and intervals."""
    if isinstance(values, dict):
        means = {key: mean_record(metric, each, source) for key, each in values.items()}
        value, interval = ({key: r[field] for key, r in means.items()} for field in ("value", "interval"))
        return record(metric, value, source, interval, **fields)
    values = torch.as_tensor(values).double()
    groups = source.concepts if isinstance(source, Pictures) and source.count == len(values) else ()
    interval = mean_interval(values, groups=groups)
    return record(metric, float(values.mean()), source, interval, **{"n": len(values)} | fields)


def resampled_record(
    metric: str,
    statistic: Callable[..., float],
    sets: Sequence[Tensor],
    source: Pictures | str,
    options: dict,
    **fields: Any,
) -> Record:
    """A statistic of sets of rows, with its interval by `resampled_interval` with these options."""
    value = statistic(*sets)
    return record(metric, value, source, resampled_interval(statistic, sets, value, **options), **fields)


def blank_record(source: Pictures, batch_size: int) -> Record:
    """How many images are of one plain colour: failures, which count in every other number all the same."""
    spans = [x.amax((2, 3)).int() - x.amin((2, 3)).int() for x in source.batches(batch_size)]
    return record("blank_pictures", int((torch.cat(spans).amax(1) <= BLANK).sum()), source)


def judge_fault(r: Record) -> str:
    """Why a judge whose "text_to_image@1" of real images is `r` cannot judge; "" where it beats chance by far."""
    least = min(max(FAR * r["chance"], LEAST), MOST)
    if r["value"] >= least:
        return ""
    kind = r["of"].removesuffix(" held-out")
    return (
        f"judge {r['extractor']!r} finds the right one of {r['n']} {kind} pictures for a caption in {r['value']:.1%}"
        f" (chance {r['chance']:.1%}, {least:.1%} needed)"
    )


def left_out(*datasets: Any) -> list[Record]:
    """How many samples of data sets could not be used, with the first reason; nothing where all could."""
    faults = [dataset.faults for dataset in datasets if hasattr(dataset, "faults")]
    reasons = {name: why for each in faults for name, why in each.reasons.items()}
    total, note = max((each.total or 0 for each in faults), default=0), next(iter(reasons.values()), "")
    return [record("left_out", len(reasons), "data", n=total, note=note)] if reasons else []


# --- reading records --------------------------------------------------------------------------------------------------


def find(results: Sequence[Record], metric: str, of: str, **where: Any) -> list[Record]:
    """The records of a metric that have a value and agree with `where`."""
    where |= {"metric": metric, "of": of}
    return [r for r in results if r["value"] is not None and all(r.get(key) == value for key, value in where.items())]


def criterion(results: Sequence[Record], of: str) -> str:
    """The first of CRITERIA that was measured. Raises ValueError without any."""
    for metric in CRITERIA:
        if find(results, metric, of):
            return metric
    raise ValueError(f"nothing was measured of {of!r}")


def best_guidance(results: Sequence[Record], of: str = "samples") -> float:
    """The guidance of the highest compositional score; without one, of the lowest Frechet distance; without that, of
    the highest cosine with the captions; else of the fewest blank images."""
    metric = criterion(results, of)
    return min((CRITERIA[metric] * mean(r["value"]), r["guidance"]) for r in find(results, metric, of))[1]


def mean(value: Any) -> Any:
    """A value, of a table of tasks the mean over all."""
    return value["mean"]["all"] if isinstance(value, dict) and "mean" in value else value


def part(r: Record, *keys: str) -> Record:
    """One number of a record whose value is a dictionary, with its interval; of value None where there is none."""
    value, interval = r["value"], r.get("intervals", r.get("interval"))
    for key in keys:
        value, interval = value.get(key), interval.get(key) if interval else None
    return r | {"value": value, "interval": interval}


def ratio(a: Record, b: Record) -> float | None:
    """a's value over b's; None unless b's is above 0, as a kernel distance may not be."""
    return a["value"] / b["value"] if b["value"] > 0 else None


def named(r: Record) -> str:
    """The source that a record is of, with its guidance."""
    return f"{r['of']} at {r['guidance']:g}" if "guidance" in r else r["of"]


def over_passes(results: Sequence[Record]) -> dict[str, list[Record]]:
    """By name of CURVE its records, values times factor, for each sampler and number of steps; {} for a single one."""
    points, columns = [r for r in results if r["metric"] == "model_passes"], {}
    for metric, (name, factor) in CURVE.items():
        each = [r for p in points for r in find(results, metric, p["of"], guidance=p["guidance"])]
        for r in each:
            scaled = {"value": factor * mean(r["value"]), "interval": [factor * x for x in r.get("interval", ())]}
            columns.setdefault(name, []).append(r | scaled)
    return columns


def headlines(results: Sequence[Record], sources: Sequence[str], metrics: Sequence[str] = ()) -> list[str]:
    """Lines for a terminal: the numbers of sources in the given metrics, or all, failures of any source, the curve over
    model passes, and a warning where Frechet distances are of too few images for their features."""
    lines = []
    for r in results:
        failed = r["metric"] in ("blank_pictures", "left_out") and r["value"]
        shown = named(r) in sources and r["value"] is not None and (not metrics or r["metric"] in metrics)
        if failed or shown:
            network = f"{r['extractor']}, " if "extractor" in r else ""
            text = number(r | {"value": mean(r["value"])})
            lines.append(f"{r['metric'].replace('_', ' ')} of {named(r)} ({network}N={r['n']}): {text}")
    columns = over_passes(results)
    for point in zip(*columns.values(), strict=True):
        cells = "; ".join(f"{name} {number(r)}" for name, r in zip(columns, point, strict=True))
        lines.append(f"{point[0]['sampler']}, steps {point[0]['steps']}: {cells}")
    notes = dict.fromkeys(r["note"] for r in results if r["metric"] == "frechet_distance" and r.get("biased"))
    return lines + [f"Frechet distance is biased: it {n}; the kernel distance and CMMD need no more" for n in notes]


def number(r: Record | None, factor: float = 1, interval: bool = True) -> str:
    """A record's value times `factor`, with its interval where it has one; "-" for none."""
    if r is None or r["value"] is None:
        return "-"
    bounds = r.get("interval") if interval else None
    return short(factor * r["value"]) + (f" [{', '.join(short(factor * bound) for bound in bounds)}]" if bounds else "")


def short(value: float) -> str:
    """About three digits, without exponents; all of a whole number."""
    digits = next((d for d, low in enumerate((1000, 10, 1, 0.1)) if abs(value) >= low or isinstance(value, int)), 4)
    return f"{value:.{digits}f}" if value else "0"
