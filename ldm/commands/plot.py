"""Draws the curves of runs and evaluations, several in one plot, as an HTML page that opens offline.

ldm plot runs/a/diffusion runs/b/diffusion outputs/evaluation --out outputs/curves.html

Takes run folders or their metrics.jsonl (every logged number over the steps), and evaluation folders or their
metrics.json (distances and alignment over guidance).
"""

import io
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.commands.cli import markdown_table, positional, read_options
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
RECONSTRUCTED = ("psnr_db", "sharpness", "perceptual_distance", "frechet_distance", "kernel_distance")
RESULTS_HELP = """Draws and prints the results that a family of configs keeps.

ldm results --results configs/emoji/results --out .github/emoji-curves.svg

decoder.jsonl, clip.jsonl and diffusion.jsonl are the metrics.jsonl of the runs, evaluation.json is the metrics.json of
the model's evaluation, ablation/*.json and gan/*.json are those of autoencoders. Curves go into an SVG; tables are
printed.
"""
Point = tuple[str, str, float | None, float]  # plot, line, x and y; a line without x is a level


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
    o = read_options(Options, __doc__)
    points = []
    for path in o.paths:
        file = next((path / name for name in METRICS_FILES if (path / name).is_file()), path)
        points += [(plot, f"{path} {line}".strip(), *xy) for plot, line, *xy in read_points(file)]
    plots = draw(points, o.out, PAGE)
    print(f"{len(plots)} plots in {o.out}: {', '.join(plots)}")


def results() -> None:
    """Writes the curves of three runs and over guidance; prints the autoencoders' tables."""
    o = read_options(ResultsOptions, RESULTS_HELP)
    points = []
    for title, file, names in RESULTS:
        logged = read_points(o.results / file)
        points += [(title, line or name, *xy) for name, line, *xy in logged if name in names]
    tables = "".join(table(o.results / name) for name in ("ablation", "gan"))
    draw(points, o.out)
    print(f"{tables}curves in {o.out}")


def read(path: Path, *keys: str) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, or the records of a metrics.json. Raises UserError unless all have these keys."""
    try:
        text = path.read_text(encoding="utf-8")
        records = json.loads(text)["results"] if path.suffix == ".json" else [*map(json.loads, text.splitlines())]
        if not records or not all(key in record for record in records for key in keys):
            raise ValueError(f"lines with {', '.join(keys)} are missing")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{str(path)!r} holds no results: {type(error).__name__} {error}") from None
    return records


def read_points(path: Path) -> Iterator[Point]:
    """Every number of a run over the steps, as the line ""; or the GUIDED metrics of an evaluation over guidance, those
    of real pictures as levels."""
    if path.suffix != ".json":
        for r in read(path, "step"):
            yield from ((name, "", r["step"], r[name]) for name in r if name != "step")
        return
    for r in read(path, "of", "metric", "value"):
        if r["metric"] in GUIDED and r["of"] in SOURCES and r["value"] is not None:
            value = r["value"]["mean"]["all"] if isinstance(r["value"], dict) else r["value"]
            yield f"{r['metric']} over guidance", r["of"], r.get("guidance"), value


def draw(points: list[Point], out: Path, page: str = "{}") -> list[str]:
    """Writes all plots, two in a row, as one SVG within a page; returns their titles. Raises UserError where there are
    none."""
    from ldm.evaluate.report import check_installed

    check_installed()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    if not points:
        raise UserError("there are no curves: none of the files is of a run or of a model's evaluation")
    plots, file = defaultdict(lambda: defaultdict(list)), io.StringIO()
    for title, line, *xy in points:
        plots[title][line].append(xy)
    rows = -(-len(plots) // 2)
    figure = Figure(figsize=(10, 3.4 * rows), layout="constrained")
    for i, (title, lines) in enumerate(plots.items(), 1):
        axes = figure.add_subplot(rows, 2, i, title=title, xlabel="guidance" if "guidance" in title else "step")
        for colour, (label, line) in enumerate(lines.items()):
            x, y = zip(*sorted(line), strict=True)
            style = {"color": f"C{colour}", "label": label}
            if x[0] is None:
                axes.axhline(y[0], linestyle="--", **style)
            else:
                axes.plot(x, y, ".-", markersize=4, **style)
        axes.grid(alpha=0.3)
        axes.legend()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "ldm"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page.format("<svg" + file.getvalue().partition("<svg")[2]), encoding="utf-8")
    return [*plots]


def table(folder: Path) -> str:
    """The autoencoders' evaluations in a folder as a Markdown table, a row each; "" where there are none."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        number = {
            r["metric"]: "{value:.4g} [{interval[0]:.4g}, {interval[1]:.4g}]".format(**r)
            for r in read(path, "metric", "value")
            if r["metric"] in RECONSTRUCTED
        }
        rows.append([path.stem, *(number.get(metric, "-") for metric in RECONSTRUCTED)])
    return markdown_table(["arm", *RECONSTRUCTED], *rows) if rows else ""
