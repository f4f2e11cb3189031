"""Draws the curves of runs and evaluations, several in one plot, as an HTML page that opens offline.

ldm plot runs/a/diffusion runs/b/diffusion outputs/evaluation --out outputs/curves.html

Takes run folders or their metrics.jsonl (every logged number over the steps), and evaluation folders or their
metrics.json (distances and alignment over guidance).
"""

import io
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.commands.cli import positional, read_options
from ldm.config import UserError

METRICS_FILES = ("metrics.jsonl", "metrics.json")  # of a run, of an evaluation
GUIDED = ("frechet_distance", "image_to_text@1", "clip_score_100", "precision", "recall", "compositional_score")
SOURCES = ("samples", "validation samples", "real held-out", "real train")
RESULTS = (  # plots of `ldm results`: title, file, curves of that file
    ("Decoder: PSNR on validation, dB", "decoder.jsonl", ("val/psnr",)),
    ("Decoder: perceptual distance on validation", "decoder.jsonl", ("val/perceptual",)),
    ("Text encoder: share found first on validation", "clip.jsonl", ("val/image_to_text@1", "val/text_to_image@1")),
    ("U-Net: loss", "diffusion.jsonl", ("unet_loss", "val/loss")),
    ("Right caption found first over guidance", "evaluation.json", ("image_to_text@1 over guidance",)),
    ("Frechet distance over guidance", "evaluation.json", ("frechet_distance over guidance",)),
)
PAGE = "<!doctype html><html lang=en><meta charset=utf-8><title>Curves</title>{}</html>"
RECONSTRUCTED = ("psnr_db", "ssim", "sharpness", "perceptual_distance", "frechet_distance", "kernel_distance")
RESULTS_HELP = """Draws and prints the results that a family of configs keeps.

ldm results --results configs/emoji/results --out .github/emoji-curves.svg

decoder.jsonl, clip.jsonl and diffusion.jsonl are the metrics.jsonl of the runs, evaluation.json is the metrics.json of
the model's evaluation, ablation/*.json and gan/*.json are those of autoencoders. Curves go into an SVG; tables are
printed.
"""
Record = dict[str, Any]
Lines = dict[str, list[tuple[float | None, float]]]  # points (x, y) by label; a level has one, without x


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `ldm plot`."""

    paths: tuple[Path, ...] = positional()  # run and evaluation folders, or their metrics files
    out: Path  # HTML page to write


@dataclass(frozen=True, kw_only=True)
class ResultsOptions:
    """Options of `ldm results`."""

    results: Path  # folder of results, e.g. configs/emoji/results
    out: Path  # SVG file to write


def main() -> None:
    """Writes the page and prints the titles of its plots."""
    options = read_options(Options, __doc__)
    plots: dict[str, Lines] = defaultdict(dict)
    for path in options.paths:
        file = next((path / name for name in METRICS_FILES if (path / name).is_file()), path)
        for title, lines in curves(file).items():
            plots[title] |= {f"{path} {label}".strip(): points for label, points in lines.items()}
    draw(plots, options.out, PAGE)
    print(f"{len(plots)} plots in {options.out}: {', '.join(plots)}")


def results() -> None:
    """Writes the curves of three runs and over guidance; prints the autoencoders' tables."""
    options = read_options(ResultsOptions, RESULTS_HELP)
    plots: dict[str, Lines] = {}
    for title, file, names in RESULTS:
        logged = curves(options.results / file)
        plots[title] = {label or name: points for name in names for label, points in logged.get(name, {}).items()}
    tables = "".join(table(options.results / name) for name in ("ablation", "gan"))
    draw(plots, options.out)
    print(f"{tables}curves in {options.out}")


def read(path: Path, *keys: str) -> list[Record]:
    """The lines of a metrics.jsonl, or the records of a metrics.json. Raises UserError unless all have these keys."""
    try:
        text = path.read_text(encoding="utf-8")
        records = json.loads(text)["results"] if path.suffix == ".json" else [*map(json.loads, text.splitlines())]
        if not records or not all(key in record for record in records for key in keys):
            raise ValueError(f"lines with {', '.join(keys)} are missing")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{str(path)!r} holds no results: {type(error).__name__} {error}") from None
    return records


def curves(path: Path) -> dict[str, Lines]:
    """Every number of a run over the steps, by name, as the line ""; or the GUIDED metrics of an evaluation over
    guidance, those of real pictures as levels."""
    plots: dict[str, Lines] = defaultdict(lambda: defaultdict(list))
    if path.suffix != ".json":
        for record in read(path, "step"):
            for name in record:
                plots[name][""].append((record["step"], record[name]))
        del plots["step"]
        return plots
    for record in read(path, "of", "metric", "value"):
        metric, of, value = record["metric"], record["of"], record["value"]
        if metric in GUIDED and value is not None and of in SOURCES:
            value = value["mean"]["all"] if isinstance(value, dict) else value
            plots[f"{metric} over guidance"][of].append((record.get("guidance"), value))
    return plots


def draw(plots: dict[str, Lines], out: Path, page: str = "{}") -> None:
    """Writes all plots, two in a row, as one SVG within a page. Raises UserError where there are none."""
    from ldm.metrics.libraries import library

    if not plots:
        raise UserError("there are no curves: none of the files is of a run or of a model's evaluation")
    rows, file = -(-len(plots) // 2), io.StringIO()
    figure = library("matplotlib.figure").Figure(figsize=(10, 3.4 * rows), layout="constrained")
    for position, (title, lines) in enumerate(plots.items(), 1):
        axes = figure.add_subplot(rows, 2, position)
        for i, (label, points) in enumerate(lines.items()):
            if points[0][0] is None:
                axes.axhline(points[0][1], linestyle="--", color=f"C{i}", label=label)
            else:
                axes.plot(*zip(*sorted(points), strict=True), ".-", markersize=4, color=f"C{i}", label=label)
        axes.set(title=title, xlabel="guidance" if "guidance" in title else "step")
        axes.grid(alpha=0.3)
        axes.legend()
    with library("matplotlib").rc_context({"svg.fonttype": "none", "svg.hashsalt": "ldm"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page.format("<svg" + file.getvalue().partition("<svg")[2]), encoding="utf-8")


def table(folder: Path) -> str:
    """The autoencoders' evaluations in a folder as a Markdown table, a row each; "" where there are none."""
    rows = [["arm", *RECONSTRUCTED], ["---"] * (1 + len(RECONSTRUCTED))]
    for path in sorted(folder.glob("*.json")):
        records = [record for record in read(path, "metric", "value") if record["metric"] in RECONSTRUCTED]
        cells = {r["metric"]: "{value:.4g} [{interval[0]:.4g}, {interval[1]:.4g}]".format(**r) for r in records}
        rows.append([path.stem, *(cells.get(metric, "-") for metric in RECONSTRUCTED)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows) if len(rows) > 2 else ""
