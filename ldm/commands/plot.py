"""Draws the curves of runs and evaluations, several in one plot, as an HTML page that opens offline.

ldm plot runs/a/diffusion runs/b/diffusion outputs/evaluation --out outputs/curves.html

Takes run folders or their metrics.jsonl (every logged number over the steps), and evaluation folders or their
metrics.json (distances and alignment over guidance).
"""

from __future__ import annotations

import io
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.commands.cli import positional, read_options
from ldm.config import UserError

RUN, EVALUATION = "metrics.jsonl", "metrics.json"
GUIDED = {  # metrics of an evaluation that depend on guidance: title -> name, factor
    "Frechet distance": ("frechet_distance", 1),
    "Right caption found first, %": ("image_to_text@1", 100),
    "CLIP score, 100 max(cos, 0)": ("clip_score_100", 1),
    "Precision, %": ("precision", 100),
    "Recall, %": ("recall", 100),
    "Exactly right, %": ("compositional_score", 100),
}
RESULTS = {  # plots of `ldm results`: title -> file, {line: number in the file}
    "Decoder: PSNR on validation, dB": ("decoder.jsonl", {"": "val/psnr"}),
    "Decoder: perceptual distance on validation": ("decoder.jsonl", {"": "val/perceptual"}),
    "Text encoder: share found first on validation": (
        "clip.jsonl",
        {"caption of a picture": "val/image_to_text@1", "picture of a caption": "val/text_to_image@1"},
    ),
    "U-Net: loss": ("diffusion.jsonl", {"training": "unet_loss", "validation": "val/loss"}),
}
RECONSTRUCTED = (  # columns of an autoencoders' table: title, metric, factor, decimals
    ("PSNR in dB", "psnr_db", 1, 2),
    ("SSIM", "ssim", 1, 3),
    ("sharpness", "sharpness", 1, 3),
    ("perceptual distance x 1000", "perceptual_distance", 1000, 1),
    ("Frechet distance", "frechet_distance", 1, 1),
    ("kernel distance x 1000", "kernel_distance", 1000, 1),
)
RESULTS_HELP = """Draws and prints the results that a family of configs keeps.

ldm results --results configs/emoji/results --out .github/emoji-curves.svg

decoder.jsonl, clip.jsonl and diffusion.jsonl are the metrics.jsonl of the runs, evaluation.json is the metrics.json of
the model's evaluation, ablation/*.json and gan/*.json are those of autoencoders. Curves go into an SVG; tables are
printed.
"""
Record = dict[str, Any]
Lines = dict[str, list[tuple[float, float]]]  # points (x, y) by the label of their line


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
    for path in map(metrics_file, options.paths):
        name = path.parent.name if path.name in (RUN, EVALUATION) else path.stem
        for title, lines in curves(path).items():
            plots[title] |= {f"{name} {label}".strip(): points for label, points in lines.items()}
    write(options.out, f"<!doctype html><html lang=en><meta charset=utf-8><title>Curves</title>{draw(plots)}</html>")
    print(f"{len(plots)} plots in {options.out}: {', '.join(plots)}")


def results() -> None:
    """Writes the curves of three runs and over guidance; prints the autoencoders' tables."""
    options = read_options(ResultsOptions, RESULTS_HELP)
    plots: dict[str, Lines] = {}
    for title, (file, lines) in RESULTS.items():
        logged = curves(options.results / file)
        plots[title] = {label: logged[key][""] for label, key in lines.items() if key in logged}
    guided = curves(options.results / "evaluation.json")
    plots |= {title: guided[title] for title in ("Right caption found first, %", "Frechet distance") if title in guided}
    tables = [table(options.results / name) for name in ("ablation", "gan")]
    write(options.out, draw(plots))
    print(*filter(None, tables), f"curves in {options.out}", sep="\n")


def metrics_file(path: Path) -> Path:
    """The metrics of a run or evaluation folder, or the file itself."""
    for file in (path / RUN, path / EVALUATION, path):
        if file.is_file() and file.suffix in (".jsonl", ".json"):
            return file
    raise UserError(f"{str(path)!r} is no .jsonl file of a run, .json file of an evaluation, or folder with {RUN}")


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


def curves(path: Path) -> dict[str, Lines]:
    """By title, every number of a run over the steps, as the line ""; or the GUIDED metrics of an evaluation over
    guidance, those of real pictures as level lines."""
    plots: dict[str, Lines] = defaultdict(lambda: defaultdict(list))
    records = read(path)
    if path.suffix == ".jsonl":
        for line in records:
            for key in line.keys() - {"step"}:
                plots[key][""].append((line["step"], line[key]))
        return plots
    for title, (metric, factor) in GUIDED.items():
        values = [(r, r["value"]) for r in records if r["metric"] == metric and r["value"] is not None]
        values = [(r, factor * (v["mean"]["all"] if isinstance(v, dict) else v)) for r, v in values]
        curve = "validation samples" if any(r["of"] == "validation samples" for r, _ in values) else "samples"
        samples = sorted((r["guidance"], value) for r, value in values if r["of"] == curve)
        if samples:
            levels = {r["of"]: value for r, value in values if r["of"] in ("real held-out", "real train")}
            ends = (samples[0][0], samples[-1][0])
            plots[title] = {curve: samples} | {of: [(x, value) for x in ends] for of, value in levels.items()}
    if not plots:
        raise UserError(f"{str(path)!r} is no evaluation of a model")
    return plots


def draw(plots: dict[str, Lines]) -> str:
    """All plots, two in a row, as one SVG."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib is not installed: pip install matplotlib") from None

    rows = -(-len(plots) // 2)
    figure = Figure(figsize=(10, 3.4 * rows), layout="constrained")
    for (title, lines), axes in zip(plots.items(), figure.subplots(rows, 2, squeeze=False).flat, strict=False):
        for label, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker="o" if len(points) < 16 else "", markersize=3, label=label)
        axes.set(title=title, xlabel="guidance" if title in GUIDED else "step")
        axes.grid(alpha=0.3)
        if any(lines):
            axes.legend()
    for axes in figure.axes[len(plots) :]:
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
    """The autoencoders' evaluations in a folder as a Markdown table, a row each; "" where there are none."""
    arms = {path.stem: read(path) for path in sorted(folder.glob("*.json"))}
    columns = [(title, *(cell(records, *column) for records in arms.values())) for title, *column in RECONSTRUCTED]
    columns = [("arm", *arms), *(column for column in columns if set(column[1:]) - {"-"})]
    head, *rows = ("| " + " | ".join(line) + " |\n" for line in zip(*columns, strict=True))
    return "".join([head, "| --- " * len(columns) + "|\n", *rows]) if arms else ""


def cell(records: list[Record], metric: str, factor: float, decimals: int) -> str:
    """A metric of the reconstructions with its interval, "-" where it was not measured."""
    for record in records:
        if record["metric"] == metric and record["of"] == "reconstructions":
            value, low, high = (f"{factor * x:.{decimals}f}" for x in (record["value"], *record["interval"]))
            return f"{value} [{low}, {high}]"
    return "-"
