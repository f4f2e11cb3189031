"""Line plots by matplotlib, as SVG inside a page, in the page's own light or dark colours."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from typing import Any

from ldm.config import UserError

Point = tuple[float, float]
COLOURS = ("#0b5cad", "#b3470c", "#2a9d60", "#9b59b6", "#d0487e", "#7a7a7a")
INK, LINE = "#656d76", "#d8dee4"
# A page has other colours on a dark background; a picture alone keeps those above.
VARIABLES = {COLOURS[0]: "var(--accent)", COLOURS[1]: "var(--warm)", INK: "var(--soft)", LINE: "var(--line)"}
STYLE = {
    "svg.hashsalt": "ldm",  # the same plot is the same file
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": LINE,
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """Points, `joined` in the given order; `marks` are texts beside them, `ring` is the index of one to mark."""

    name: str
    points: Sequence[Point]
    marks: Sequence[str] = ()
    ring: int | None = None
    dots: bool = True
    joined: bool = True


def check_installed(*packages: str) -> None:
    """Raises UserError where a package of the extra `evaluate` is missing."""
    missing = [name for name in ("matplotlib", *packages) if not find_spec(name)]
    if missing:
        raise UserError(f"reports need {' and '.join(missing)}: pip install {' '.join(missing)}")


def plot(
    title: str,
    x_name: str,
    lines: Sequence[Line],
    levels: Sequence[tuple[str, float]] = (),
    zero: bool = True,
    log: bool = False,
) -> str:
    """An HTML figure with its title; `levels` are dashed horizontals with names; the y axis starts at 0 where `zero`,
    the x axis is logarithmic where `log`."""
    check_installed()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    file = io.StringIO()
    with rc_context(STYLE):
        figure = Figure((4, 2.6), layout="constrained")
        draw(figure.subplots(), x_name, lines, levels, zero, log)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(
        r"<metadata>.*?</metadata>|<\?xml.*?\?>|<!DOCTYPE.*?>|\n| xmlns(:xlink)?=\"[^\"]*\"",
        " ",
        file.getvalue(),
        flags=re.S,
    )
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    names = [
        f'<span style="color: {VARIABLES.get(c, c)}">{escape(line.name)}</span>'
        for line, c in zip(lines, COLOURS, strict=False)
    ]
    legend = f'<p class="legend">{" ".join(names)}</p>' if len(lines) > 1 else ""
    return f"<figure><p>{escape(title)}</p>{legend}{svg.strip()}</figure>"


def draw(
    axes: Any,
    x_name: str,
    lines: Sequence[Line],
    levels: Sequence[tuple[str, float]] = (),
    zero: bool = True,
    log: bool = False,
) -> None:
    """Draws lines and levels on matplotlib's `axes`, within `rc_context(STYLE)`."""
    for name, value in levels:
        axes.axhline(value, color=INK, linewidth=1, linestyle="--")
        axes.annotate(
            name, (1, value), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points", ha="right"
        )
    for i, line in enumerate(lines):
        colour, (xs, ys) = COLOURS[i % len(COLOURS)], zip(*line.points, strict=True)
        style = {"linestyle": "-" if line.joined else "", "marker": "o" if line.dots else "", "markersize": 4}
        axes.plot(xs, ys, color=colour, linewidth=1.6, **style)
        if line.ring is not None:
            axes.plot(*line.points[line.ring], "o", color=colour, markersize=9, fillstyle="none")
        for mark, point in zip(line.marks, line.points, strict=False):
            axes.annotate(mark, point, xytext=(0, 6), textcoords="offset points", ha="center")
    axes.set_xlabel(x_name)
    axes.tick_params(length=0)
    if log:
        axes.set_xscale("log")
    if zero:
        axes.set_ylim(bottom=0)
