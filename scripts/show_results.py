"""Curves and the tables of an autoencoder's ablations, from the numbers that a family of configs keeps in results/.

python scripts/show_results.py --results configs/emoji/results --out .github/emoji-curves.svg

decoder.jsonl, clip.jsonl and diffusion.jsonl are the trainings' metrics.jsonl, evaluation.json is the metrics.json of
the model's evaluation, ablation/ARM.json and gan/ARM.json those of autoencoders, one an arm. The curves go into an SVG,
the tables are printed.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.commands.cli import argument_parser, run_script
from ldm.config import UserError

if TYPE_CHECKING:
    from ldm.evaluate.report_plots import Point

MEASURED = (  # name, metric, factor, decimals
    ("PSNR in dB", "psnr_db", 1, 2),
    ("SSIM", "ssim", 1, 3),
    ("sharpness", "sharpness", 1, 3),
    ("perceptual distance x 1000", "perceptual_distance", 1000, 1),
    ("Frechet distance", "frechet_distance", 1, 1),
    ("kernel distance x 1000", "kernel_distance", 1000, 1),
)
COLOURS = {"accent": "#2563eb", "warm": "#d97706", "soft": "#6b7280", "line": "#e5e7eb", "paper": "#ffffff"}
ABLATIONS = ("ablation", "gan")  # folders of an evaluation for each arm
WIDTH, HEIGHT = 400, 270  # of one plot with its title


def parse_arguments() -> argparse.Namespace:
    """The command line; --help needs no heavy import."""
    parser = argument_parser(__doc__)
    parser.add_argument("--results", type=Path, required=True, metavar="DIR", help="e.g. configs/emoji/results")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the curves, an SVG")
    return parser.parse_args()


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, or the records of a metrics.json (UserError)."""
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text)["results"] if path.suffix == ".json" else list(map(json.loads, text.splitlines()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{str(path)!r} holds no results: {type(error).__name__} {error}") from None


def over_steps(lines: list[dict[str, Any]], name: str, factor: float = 1.0) -> list[Point]:
    """One number of a training over its steps."""
    return [(line["step"], factor * line[name]) for line in lines if name in line]


def curves(folder: Path) -> str:
    """Three trainings and the choice of guidance, as one SVG."""
    from ldm.evaluate.records import find
    from ldm.evaluate.report_plots import Line, plot

    decoder, clip, diffusion = (read(folder / f"{name}.jsonl") for name in ("decoder", "clip", "diffusion"))
    records = read(folder / "evaluation.json")
    sides = (("caption", "val/image_to_text@1"), ("picture", "val/text_to_image@1"))
    found = [Line(name=f"right {name} first", points=over_steps(clip, key, 100)) for name, key in sides]
    loss = [
        Line(name="training", points=over_steps(diffusion, "unet_loss"), dots=False),
        Line(name="validation", points=over_steps(diffusion, "val/loss")),
    ]
    psnr, distance = (Line(name="", points=over_steps(decoder, f"val/{name}")) for name in ("psnr", "perceptual"))
    plots = [
        plot("Decoder: PSNR on validation, dB", "step", [psnr], zero=False),
        plot("Decoder: perceptual distance", "step", [distance]),
        plot("Text encoder: found first on validation, %", "step", found),
        plot("U-Net: loss", "step", loss, zero=False),
    ]
    for title, metric, floor, factor in (
        ("Right caption found first, %", "image_to_text@1", "real held-out", 100),
        ("Frechet distance", "frechet_distance", "real train", 1),
    ):
        points = sorted((r["guidance"], factor * r["value"]) for r in find(records, metric, "samples"))
        levels = [("real pictures", factor * r["value"]) for r in find(records, metric, floor)]
        plots.append(plot(f"{title} over guidance", "guidance", [Line(name="", points=points)], levels))
    return sheet(plots)


def sheet(figures: list[str]) -> str:
    """Figures of a report, two in a row, as an SVG that needs no style sheet."""
    parts = []
    for i, figure in enumerate(figures):
        x, y = WIDTH * (i % 2), HEIGHT * (i // 2)
        title = re.search(r"<p>(.*?)</p>", figure)[1]
        names = re.findall(r'<span style="color:(.*?)">(.*?)</span>', figure)
        legend = " ".join(f'<tspan fill="{colour}">{name}</tspan>' for colour, name in names)
        drawing = re.search(r"<svg (viewBox=.*?)>(.*)</svg>", figure, re.DOTALL)
        parts.append(f'<text x="{x + 20}" y="{y + 18}" font-weight="bold">{title}</text>')
        parts.append(f'<text x="{x + 20}" y="{y + 34}">{legend}</text>')
        parts.append(f'<svg x="{x + 20}" y="{y + 40}" width="360" height="230" {drawing[1]}>{drawing[2]}</svg>')
    height = HEIGHT * -(-len(figures) // 2)
    style = f'width="{2 * WIDTH}" height="{height}" font-family="sans-serif" font-size="12"'
    body = f'<rect width="100%" height="100%" fill="var(--paper)"/>{"".join(parts)}'
    body = re.sub(r"var\(--(\w+)\)", lambda match: COLOURS[match[1]], body)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {style}>{body}</svg>\n'


def table(folder: Path) -> str:
    """An ablation as Markdown, an arm a row, a number that any of them has a column; "" where there are none."""
    arms = {path.stem: read(path) for path in sorted(folder.glob("*.json"))}
    columns = {name: [cell(records, *measured) for records in arms.values()] for name, *measured in MEASURED}
    columns = {name: cells for name, cells in columns.items() if set(cells) - {"-"}}
    lines = ["| arm | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in zip(arms, *columns.values(), strict=True)]
    return "\n".join(lines) if arms else ""


def cell(records: list[dict[str, Any]], metric: str, factor: float, decimals: int) -> str:
    """A number of the reconstructions with its interval, "-" where it was not measured."""
    for record in records:
        if record["metric"] == metric and record["of"] == "reconstructions":
            value, low, high = (f"{factor * x:.{decimals}f}" for x in (record["value"], *record["interval"]))
            return f"{value} [{low}, {high}]"
    return "-"


def main() -> None:
    """Writes the curves and prints the tables."""
    args = parse_arguments()
    drawing, rows = curves(args.results), [table(args.results / name) for name in ABLATIONS]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(drawing, encoding="utf-8")
    print(*(f"{each}\n" for each in rows if each), sep="\n", end="")
    print(f"curves in {args.out}")


if __name__ == "__main__":
    run_script(main)
