"""Sections of a model's report on shapes: what the exact checker says."""

from collections.abc import Sequence

from ldm.evaluate.records import SHUFFLED, Record, best_guidance, find, named
from ldm.evaluate.report_html import number, percent, table


def composed(results: Sequence[Record], best: float) -> list[list[str]]:
    """The row of what the exact checker says; real pictures and reconstructions must have the places too."""
    cells = []
    for of, where in (("samples", {"guidance": best}), ("untrained", {}), (SHUFFLED, {"guidance": best})):
        for r in find(results, "compositional_score", of, **where):
            cells.append(number({"value": r["value"]["mean"]["all"], "interval": r["interval"]}, 100))
    whole = []
    for of in ("real held-out", "reconstructions"):
        for r in find(results, "scene_accuracy", of):
            whole.append(number({"value": r["value"]["all"], "interval": r["interval"]["all"]}, 100))
    return [["shows exactly what is asked for, %", cells[0], *whole, *cells[1:], "higher"]] if cells else []


def tasks(settings: dict, results: Sequence[Record]) -> str:
    """The six compositional tasks at each guidance."""
    records = find(results, "compositional_score", "samples")
    if not records:
        return ""
    best = best_guidance(results)
    text = "Share of pictures that show exactly what the caption says, by an exact checker."
    head = ["task", *(f"at {r['guidance']:g}" for r in records), "seen", "held-out", "pictures"]
    chosen = next(r for r in records if r["guidance"] == best)
    rows = []
    for task, own in chosen["value"].items():
        whole = [_share(r, task, "all", r is chosen) for r in records]
        rows.append([task, *whole, *(_share(chosen, task, half) for half in ("seen", "held_out")), str(own["n"])])
    text += f" All at each guidance, then seen and held-out compositions at guidance {best:g}, with 95% intervals."
    for r in find(results, "compositional_score", SHUFFLED, guidance=best):
        text += f" Held against the caption of another case, {percent(r['value']['mean']['all'])} would be right."
    return f"<h2>What the captions ask for</h2><p>{text}</p>{table(head, rows, best=len(rows) - 1)}"


def _share(r: Record, task: str, half: str, interval: bool = True) -> str:
    """A share of right pictures in percent; a dash where there were none of the kind."""
    if half not in r["value"][task]:
        return "-"
    spread = {"interval": r["intervals"][task][half]} if interval else {}
    return number({"value": r["value"][task][half]} | spread, 100)


def links(settings: dict, results: Sequence[Record]) -> str:
    """Where along the chain a picture goes wrong."""
    records = [r for of in ("real held-out", "reconstructions") for r in find(results, "scene_accuracy", of)]
    if not records:
        return ""
    aspects, rows = list(records[0]["value"]), []
    for r in [*records, *find(results, "scene_accuracy", "samples")]:
        cells = [number({"value": r["value"][a], "interval": r["interval"][a]}, 100) for a in aspects]
        rows.append([named(r), *cells, str(r["n"])])
    text = "The same checker on each link of the chain: the first row that falls short is what limits the model."
    return f"<h2>Link by link</h2><p>{text}</p>{table(['pictures', *aspects, 'N'], rows)}"
