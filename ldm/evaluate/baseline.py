"""Numbers of an evaluation beside those of an earlier one, where they may be compared."""

import math
from pathlib import Path

from ldm import model_io as weights
from ldm.config import UserError
from ldm.evaluate.bench import Bench
from ldm.evaluate.records import Record, best_guidance, ratio

SHARED = ("data_sha256", "split", "size", "num", "seed")  # what the same held-out captions come from


def read_baseline(folder: str | Path, bench: Bench) -> dict:
    """metrics.json of another evaluation; UserError where its numbers do not compare with what will be measured."""
    table = weights.read_json(Path(folder) / "metrics.json")
    try:
        before, results = table["settings"], table["results"]
        now = bench.settings | {"num": bench.n}
        pairs = [(key, before[key], now[key]) for key in SHARED]
        networks = {r["extractor_sha256"]: r for r in results if "extractor_sha256" in r}
    except (KeyError, TypeError):
        raise UserError(f"{str(folder)!r} holds no evaluation of a model by this version") from None
    for key, old, new in pairs:
        if old != new:
            raise UserError(f"{str(folder)!r} does not compare: {key} {old}, here {new}; measure both alike")
    for network in filter(None, (bench.extractor, bench.judge)):
        if network.sha256 not in networks:
            known = ", ".join(sorted({r["extractor"] for r in networks.values()})) or "none"
            raise UserError(
                f"{str(folder)!r} does not compare: it was measured with {known}, not with {network.name} of"
                f" {network.sha256[:8]}; measure both with the same networks"
            )
        resize = networks[network.sha256]["resize"]
        if resize != network.about["resize"]:
            raise UserError(
                f"{str(folder)!r} does not compare: {network.name} saw pictures resized to {resize}, here to"
                f" {network.about['resize']}; measure both alike"
            )
    return table


def _whole(r: Record, guidance: float) -> bool:
    """Whether a number is of all samples at that guidance, and of features."""
    mine = r["of"] == "samples" and r.get("guidance") == guidance and "extractor" in r
    return mine and "group" not in r and "bank" not in r and isinstance(r["value"], float)


def against(baseline: dict, results: list[Record], model: str) -> list[Record]:
    """For each number of the samples at the best guidance: the other's at its best, and the ratio of both."""
    best, other_best = best_guidance(results), best_guidance(baseline["results"])
    others = {r["metric"]: r for r in baseline["results"] if _whole(r, other_best)}
    found = []
    for r in results:
        other = others.get(r["metric"])
        if other and _whole(r, best):
            times = ratio(r, other)
            extra = {"ratio": None if math.isnan(times) else times, "guidance": other_best}
            found.append(other | {"of": "baseline", "model": model, "ours": r["value"]} | extra)
    return found
