"""The images of a report."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.evaluate.evaluation import Evaluation, to_arrays
from ldm.evaluate.probes import opened, reworded, seen_values
from ldm.evaluate.records import Record, best_guidance, find
from ldm.metrics.attributes import ATTRIBUTES
from ldm.metrics.compositional_parse import parse

FAILURES = 48
SHOWN = 12  # rows of the other galleries; twice as many where a row is one image


@dataclass(frozen=True, kw_only=True)
class Row:
    """Images of one caption side by side, each a label and uint8 (3, H, W)."""

    caption: str = ""
    pictures: list[tuple[str, Tensor]]
    note: str = ""


def galleries(e: Evaluation, results: list[Record]) -> dict[str, list[Row]]:
    """By name: prompts at each guidance, reconstructions, and images that the measures came upon."""
    g, first = best_guidance(results), range(min(SHOWN, len(e.indices)))
    real = [("real", e.real.read(i)) for i in first]
    rows = {
        "prompts": [
            Row(caption=e.captions[i], pictures=[real[i], *((f"{s:g}", e.sampled.read(s, i)) for s in e.guidance)])
            for i in first
        ],
        "reconstructions": [Row(pictures=[real[i], ("decoded", e.reconstructed[i])]) for i in first],
        "copies": [row for record in find(results, "memorized", "samples") for row in _copies(e, record, g)],
        "failures": _failures(e, g) if e.cases else [],
    }
    if e.judge:
        sets = reworded(e)
        for i in first:
            pictures = [("as asked", e.sampled.read(g, i)), *((kind, s.read(g, i)) for kind, s in sets.items())]
            note = "; ".join(s.captions[i] for s in sets.values())
            rows.setdefault("wording", []).append(Row(caption=e.captions[i], pictures=pictures, note=note))
        for attribute in ATTRIBUTES:
            images = opened(e, attribute)
            values = seen_values(e, g, attribute, images) if images.captions else []
            rows[attribute.name] = [
                Row(caption=caption, pictures=[("", images.read(g, i))], note=f"judged: {value}")
                for i, (caption, value) in enumerate(zip(images.captions[: 2 * SHOWN], values, strict=False))
            ]
    return rows


def _copies(e: Evaluation, record: Record, g: float) -> list[Row]:
    """The samples that lie nearest to a training image, beside it."""
    rows = []
    for i in torch.tensor(record["distances"]).argsort()[:SHOWN].tolist():
        index, distance = record["nearest"][i], record["distances"][i]
        pictures = [("sample", e.sampled.read(g, i)), ("training", e.train[index]["image"])]
        note = f"distance {distance:.3g}; the training picture: {e.train.captions(index)[0]}"
        rows.append(Row(caption=e.captions[i], pictures=pictures, note=note))
    return rows


def _failures(e: Evaluation, g: float) -> list[Row]:
    """The images that do not show their caption, with what the exact checker sees."""
    rows = []
    for i in [i for i, right in enumerate(e.right[g]) if not right]:
        case, picture = e.cases[i], e.sampled_cases.read(g, i)
        things = [" ".join(filter(None, (t.size, t.colour, t.shape))) for t in parse(*to_arrays([picture]))]
        note = f"{case.task}{', held-out' if case.held_out else ''}; seen: {', '.join(things) or 'nothing'}"
        rows.append(Row(caption=case.caption, pictures=[("", picture)], note=note))
    return rows
