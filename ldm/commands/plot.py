"""Draws the curves of runs and evaluations, several in one plot, as an HTML page that opens offline.

ldm plot runs/a/diffusion runs/b/diffusion outputs/evaluation --out outputs/curves.html

Takes run folders or their metrics.jsonl (every logged number over the steps), and evaluation folders or their
metrics.json (distances and alignment over guidance).
"""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.commands.cli import positional, read_options
from ldm.config import UserError

RUN, EVALUATION = "metrics.jsonl", "metrics.json"
GUIDED = (  # metrics of an evaluation at every guidance: name, title, factor
    ("frechet_distance", "Frechet distance", 1),
    ("image_to_text@1", "Right caption found first, %", 100),
    ("clip_score_100", "CLIP score, 100 max(cos, 0)", 1),
    ("precision", "Precision, %", 100),
    ("recall", "Recall, %", 100),
    ("compositional_score", "Exactly right, %", 100),
)
RECONSTRUCTED = (  # columns of an autoencoders' table: title, metric, factor, decimals
    ("PSNR in dB", "psnr_db", 1, 2),
    ("SSIM", "ssim", 1, 3),
    ("sharpness", "sharpness", 1, 3),
    ("perceptual distance x 1000", "perceptual_distance", 1000, 1),
    ("Frechet distance", "frechet_distance", 1, 1),
    ("kernel distance x 1000", "kernel_distance", 1000, 1),
)
RESULTS = """Draws and prints the results that a family of configs keeps.

ldm results --results configs/emoji/results --out .github/emoji-curves.svg

decoder.jsonl, clip.jsonl and diffusion.jsonl are the metrics.jsonl of the runs, evaluation.json is the metrics.json of
the model's evaluation, ablation/*.json and gan/*.json are those of autoencoders. Curves go into an SVG; tables are
printed.
"""
Record = dict[str, Any]
Points = list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `ldm plot`."""

    paths: tuple[Path, ...] = positional()  # of runs and evaluations
    out: Path  # the page to write


@dataclass(frozen=True, kw_only=True)
class ResultsOptions:
    """Options of `ldm results`."""

    results: Path  # folder, e.g. configs/emoji/results
    out: Path  # the SVG to write


@dataclass(kw_only=True)
class Panel:
    """One plot: points by line, and horizontal reference levels."""

    title: str
    x: str
    lines: dict[str, Points] = field(default_factory=dict)
    levels: dict[str, float] = field(default_factory=dict)


def main() -> None:
    """Writes the page and prints the titles of its plots."""
    options = read_options(Options, __doc__)
    panels: dict[str, Panel] = {}
    for path in map(metrics_file, options.paths):
        name = path.parent.name if path.name in (RUN, EVALUATION) else path.stem
        x = "step" if path.suffix == ".jsonl" else "guidance"
        for title, points in curves(path).items():
            panels.setdefault(title, Panel(title=title, x=x)).lines[name] = points
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>Curves</title>{draw(list(panels.values()))}</html>"
    write(options.out, page)
    print(f"{len(panels)} plots in {options.out}: {', '.join(panels)}")


def results() -> None:
    """Writes the curves of three runs and over guidance; prints the autoencoders' tables."""
    options = read_options(ResultsOptions, RESULTS)
    decoder, clip, diffusion = (curves(options.results / f"{name}.jsonl") for name in ("decoder", "clip", "diffusion"))
    evaluation = options.results / "evaluation.json"
    sides = {"caption of a picture": "val/image_to_text@1", "picture of a caption": "val/text_to_image@1"}
    found = {name: [(x, 100 * y) for x, y in clip[key]] for name, key in sides.items()}
    losses = {"training": diffusion["unet_loss"], "validation": diffusion["val/loss"]}
    panels = [
        Panel(title="Decoder: PSNR on validation, dB", x="step", lines={"": decoder["val/psnr"]}),
        Panel(title="Decoder: perceptual distance on validation", x="step", lines={"": decoder["val/perceptual"]}),
        Panel(title="Text encoder: found first on validation, %", x="step", lines=found),
        Panel(title="U-Net: loss", x="step", lines=losses),
    ]
    guided = curves(evaluation)
    for (metric, title, factor), of in zip(GUIDED[1::-1], ("real held-out", "real train"), strict=True):
        real = [factor * r["value"] for r in read(evaluation) if (r["metric"], r["of"]) == (metric, of)]
        levels = {of: real[0]} if real else {}
        panels.append(Panel(title=title, x="guidance", lines={"samples": guided[title]}, levels=levels))
    tables = [table(options.results / name) for name in ("ablation", "gan")]
    write(options.out, draw(panels))
    print(*(f"{text}\n" for text in tables if text), sep="\n", end="")
    print(f"curves in {options.out}")


def metrics_file(path: Path) -> Path:
    """The metrics of a run or evaluation folder, or the file itself."""
    for file in (path / RUN, path / EVALUATION, path):
        if file.is_file() and file.suffix in (".jsonl", ".json"):
            return file
    if path.is_dir():
        raise UserError(f"folder {str(path)!r} has neither {RUN} (of a run) nor {EVALUATION} (of an evaluation)")
    raise UserError(f"{str(path)!r} is no .jsonl file of a run and no .json file of an evaluation")


def read(path: Path) -> list[Record]:
    """The lines of a metrics.jsonl or the records of a metrics.json. Raises UserError where there are none."""
    try:
        text = path.read_text(encoding="utf-8")
        records = json.loads(text)["results"] if path.suffix == ".json" else [*map(json.loads, text.splitlines())]
        for record in records:
            record["metric" if path.suffix == ".json" else "step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{str(path)!r} holds no results: {type(error).__name__} {error}") from None
    if not records:
        raise UserError(f"{str(path)!r} is empty")
    return records


def curves(path: Path) -> dict[str, Points]:
    """By title, every number of a run over the steps or the GUIDED metrics of an evaluation over guidance; other titles
    are empty."""
    points: dict[str, Points] = defaultdict(list)
    records = read(path)
    if path.suffix == ".jsonl":
        for line in records:
            for key, value in line.items():
                points[key].append((line["step"], value))
        del points["step"]
        return points
    for metric, title, factor in GUIDED:
        for record in records:
            if record["metric"] == metric and record["of"] == "samples" and record["value"] is not None:
                value = record["value"]
                value = value["mean"]["all"] if isinstance(value, dict) else value
                points[title].append((record["guidance"], factor * value))
        if title in points:
            points[title].sort()
    return points


def draw(panels: Sequence[Panel]) -> str:
    """All panels, two in a row, as one SVG."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plots need matplotlib: pip install -e '.[evaluate]'") from None

    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(10, 3.4 * rows), layout="constrained")
    for panel, axes in zip(panels, figure.subplots(rows, 2, squeeze=False).flat, strict=False):
        for name, points in panel.lines.items():
            axes.plot(*zip(*points, strict=True), marker="o" if len(points) < 16 else "", markersize=3, label=name)
        for name, value in panel.levels.items():
            axes.axhline(value, linestyle="--", color="gray", label=name)
        axes.set(title=panel.title, xlabel=panel.x)
        axes.grid(alpha=0.3)
        if len(panel.lines) + len(panel.levels) > 1:
            axes.legend()
    for axes in figure.axes[len(panels) :]:
        axes.set_axis_off()
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ldm"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def write(path: Path, text: str) -> None:
    """A text file, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def table(folder: Path) -> str:
    """The autoencoders' evaluations in a folder as a Markdown table, one row each; "" where there are none."""
    arms = {path.stem: read(path) for path in sorted(folder.glob("*.json"))}
    columns = {title: [cell(records, *column) for records in arms.values()] for title, *column in RECONSTRUCTED}
    columns = {title: cells for title, cells in columns.items() if set(cells) - {"-"}}
    lines = [["arm", *columns], ["---"] * (len(columns) + 1), *zip(arms, *columns.values(), strict=True)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) if arms else ""


def cell(records: list[Record], metric: str, factor: float, decimals: int) -> str:
    """A metric of the reconstructions with its interval, "-" where it was not measured."""
    for record in records:
        if record["metric"] == metric and record["of"] == "reconstructions":
            value, low, high = (f"{factor * x:.{decimals}f}" for x in (record["value"], *record["interval"]))
            return f"{value} [{low}, {high}]"
    return "-"
