"""Numbers of an evaluation beside those of an earlier one of another model."""

import math

from ldm import model_io
from ldm.config import UserError
from ldm.evaluate.evaluation import Evaluation
from ldm.evaluate.records import Record, best_guidance, ratio

SHARED = ("data_sha256", "split", "size", "num", "seed")  # what the same held-out captions come from


def read_baseline(folder: str, e: Evaluation) -> dict:
    """metrics.json of an evaluation. Raises UserError where its numbers do not compare with those of `e`."""
    table = model_io.read_json(f"{folder}/metrics.json")
    try:
        settings = table["settings"]
        now = e.settings | {"num": len(e.indices)}
        pairs = [(key, settings[key], now[key]) for key in SHARED]
        networks = {r["extractor_sha256"]: r["resize"] for r in table["results"] if "extractor_sha256" in r}
    except (KeyError, TypeError):
        raise UserError(f"{folder!r} holds no evaluation of a model by this version") from None
    for network in (each.network for each in (e.features, e.embeddings) if each):
        resize = networks.get(network.sha256, "not measured")
        pairs.append((f"pictures for {network.name} {network.sha256[:8]}", resize, network.metadata["resize"]))
    for key, old, new in pairs:
        if old != new:
            raise UserError(f"{folder!r} does not compare: {key} {old}, here {new}; measure both alike")
    return table


def compare(baseline: dict, results: list[Record]) -> list[Record]:
    """For each number of the samples at the best guidance: the baseline's at its own best, `ours`, and the ratio."""
    best, other_best = best_guidance(results), best_guidance(baseline["results"])
    others = {r["metric"]: r for r in baseline["results"] if _comparable(r, other_best)}
    records = []
    for r in results:
        if r["metric"] in others and _comparable(r, best):
            other = others[r["metric"]]
            times = ratio(r, other)
            fields = {
                "of": "baseline",
                "model": baseline["settings"]["model"],
                "ours": r["value"],
                "guidance": other_best,
            }
            records.append(other | fields | {"ratio": None if math.isnan(times) else times})
    return records


def _comparable(r: Record, guidance: float) -> bool:
    """Whether a number is of features of all samples at that guidance."""
    of_samples = r["of"] == "samples" and r.get("guidance") == guidance and "extractor" in r
    return of_samples and "group" not in r and "bank" not in r and isinstance(r["value"], float)
