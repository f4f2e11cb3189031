"""Numbers of an evaluation beside those of an earlier one of another model."""

from pathlib import Path

from ldm.config import UserError
from ldm.evaluate.evaluation import Evaluation
from ldm.evaluate.records import Record, best_guidance, ratio
from ldm.model_io import read_json

SHARED = ("data_sha256", "split", "size", "num", "seed")  # settings that determine the held-out captions


def read_baseline(folder: str, e: Evaluation) -> dict:
    """metrics.json of an evaluation. Raises UserError where its numbers do not compare with those of `e`."""
    table, now = read_json(Path(folder) / "metrics.json"), e.settings | {"num": len(e.indices)}
    try:
        pairs = [(key, table["settings"][key], now[key]) for key in SHARED]
        resizes = {r["extractor_sha256"]: r["resize"] for r in table["results"] if "extractor_sha256" in r}
    except (KeyError, TypeError):
        raise UserError(f"{folder!r} holds no evaluation of a model by this version") from None
    for metadata in (each.metadata for each in (e.features, e.judge) if each):
        sha256 = metadata["extractor_sha256"]
        name = f"pictures for {metadata['extractor']} {sha256[:8]}"
        pairs.append((name, resizes.get(sha256, "not measured"), metadata["resize"]))
    for key, old, new in pairs:
        if old != new:
            raise UserError(f"{folder!r} does not compare: {key} {old}, here {new}; measure both alike")
    return table


def compare(baseline: dict, results: list[Record]) -> list[Record]:
    """For each number of the samples at the best guidance: the baseline's at its own best, `ours`, and the ratio."""
    records, others = [], _comparable(baseline["results"])
    fields = {"of": "baseline", "model": baseline["settings"]["model"]}
    for metric, r in _comparable(results).items():
        if metric in others:
            records.append(others[metric] | fields | {"ours": r["value"], "ratio": ratio(r, others[metric])})
    return records


def _comparable(results: list[Record]) -> dict[str, Record]:
    """By metric, the numbers of features of all samples at the best guidance."""
    best = best_guidance(results)
    samples = [r for r in results if r["of"] == "samples" and r.get("guidance") == best and "extractor" in r]
    return {r["metric"]: r for r in samples if isinstance(r["value"], float) and not {"group", "bank"} & {*r}}
