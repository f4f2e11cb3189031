"""Curves of trainings and of guidance, from the files that these write, several runs in one plot."""

import json
from collections.abc import Sequence
from pathlib import Path

from ldm.config import UserError
from ldm.evaluate.records import best_guidance, find
from ldm.evaluate.report import write_page
from ldm.evaluate.report_plots import Line, plot
from ldm.model_io import read_json

RUN, EVALUATION = "metrics.jsonl", "metrics.json"  # in a folder; other names are as good
# What an evaluation has at every guidance: metric, title, factor.
GUIDED = (
    ("frechet_distance", "Frechet distance", 1),
    ("image_to_text@1", "Right caption found first, %", 100),
    ("clip_score_100", "CLIP score, 100 max(cos, 0)", 1),
    ("precision", "Precision, %", 100),
    ("recall", "Recall, %", 100),
    ("compositional_score", "Exactly right, %", 100),
)
Curves = dict[str, list[Line]]  # by title


def write_curves(out: Path, paths: Sequence[Path]) -> list[str]:
    """Draws the files, or the folders of runs and evaluations, into a page that needs no other file; its plots' titles.

    Trainings: every logged number over the steps. Evaluations: what is measured at each guidance, the best one ringed.
    UserError for a file that is neither, or has nothing to draw.
    """
    by_step: Curves = {}
    by_guidance: Curves = {}
    for path in map(_file, paths):
        name = path.parent.name if path.name in (RUN, EVALUATION) else path.stem
        found = _training(path, name) if path.suffix == ".jsonl" else _evaluation(path, name)
        curves = by_step if path.suffix == ".jsonl" else by_guidance
        for title, line in found.items():
            curves.setdefault(title, []).append(line)
    body = []
    for heading, x_name, curves in (("Training", "step", by_step), ("Guidance", "guidance", by_guidance)):
        alone = {title: f": {lines[0].name}" for title, lines in curves.items() if len(lines) == 1 < len(paths)}
        drawn = [plot(title + alone.get(title, ""), x_name, lines, zero=False) for title, lines in curves.items()]
        body += [f'<h2>{heading}</h2><div class="plots">{"".join(drawn)}</div>'] if drawn else []
    out.parent.mkdir(parents=True, exist_ok=True)
    write_page(out, "Curves", body)
    return [*by_step, *by_guidance]


def _file(path: Path) -> Path:
    if path.is_dir():
        found = [path / name for name in (RUN, EVALUATION) if (path / name).is_file()]
        if not found:
            raise UserError(f"folder {str(path)!r} has neither {RUN} (of a run) nor {EVALUATION} (of an evaluation)")
        return found[0]
    if not path.is_file() or path.suffix not in (".jsonl", ".json"):
        raise UserError(f"{str(path)!r} is no .jsonl file of a run and no .json file of an evaluation")
    return path


def _training(path: Path, name: str) -> dict[str, Line]:
    """One line for each number of a run's log."""
    points: dict[str, list[tuple[float, float]]] = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            table = json.loads(text)
            step = table.pop("step")
            for key, value in table.items():
                points.setdefault(key, []).append((float(step), float(value)))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"line {number} of {str(path)!r} is no line of a training's log") from None
    if not points:
        raise UserError(f"{str(path)!r} is empty")
    return {key: Line(name=name, points=values, dots=len(values) < 16) for key, values in points.items()}


def _evaluation(path: Path, name: str) -> dict[str, Line]:
    """One line for each number that an evaluation has at every guidance."""
    results = read_json(path).get("results")
    try:
        best = best_guidance(results)
        lines = {}
        for metric, title, factor in GUIDED:
            records = sorted(find(results, metric, "samples"), key=lambda r: r["guidance"])
            values = [r["value"]["mean"]["all"] if isinstance(r["value"], dict) else r["value"] for r in records]
            points = [(r["guidance"], factor * value) for r, value in zip(records, values, strict=True)]
            if points:
                ring = [r["guidance"] for r in records].index(best)
                lines[title] = Line(name=name, points=points, ring=ring)
    except (TypeError, KeyError, ValueError, IndexError, AttributeError):
        raise UserError(f"{str(path)!r} is no metrics.json of an evaluation of a model") from None
    return lines
