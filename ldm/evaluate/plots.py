"""Line plots by matplotlib, as SVG inside a page, in the page's own light or dark colours."""

import io
import re
from collections.abc import Sequence
from html import escape
from typing import Any

COLOURS = ("#0b5cad", "#b3470c", "#2a9d60", "#9b59b6")
INK, LINE, PAPER = "#656d76", "#d8dee4", "#ffffff"
VARIABLES = {COLOURS[0]: "accent", COLOURS[1]: "warm", INK: "soft", LINE: "line", PAPER: "paper"}  # of the page's CSS
STYLE = {
    "svg.hashsalt": "ldm",  # the same plot is the same text
    "svg.fonttype": "none",
    "font.size": 8,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "xtick.color": INK,
    "ytick.color": INK,
}


def plot(
    title: str,
    x_name: str,
    lines: Sequence[dict[str, Any]],
    levels: Sequence[tuple[str, float]] = (),
    zero: bool = True,
    log: bool = False,
) -> str:
    """An HTML figure with its title.

    A line has a "name", "points", texts beside them ("marks"), the index of one to mark ("ring"), and a format
    ("style"). `levels` are dashed horizontals with names. The y axis starts at 0 where `zero`, the x axis is
    logarithmic where `log`.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    file = io.StringIO()
    with rc_context(STYLE):
        figure = Figure((4, 2.6), layout="constrained")
        axes = figure.subplots()
        axes.set_xlabel(x_name)
        axes.tick_params(length=0)
        for name, value in levels:
            axes.axhline(value, color=INK, linewidth=1, linestyle="--")
            coords = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            axes.annotate(name, (1, value), xytext=(0, -10), ha="right", **coords)
        for line, colour in zip(lines, COLOURS, strict=False):
            axes.plot(*zip(*line["points"], strict=True), line.get("style", "o-"), color=colour, markersize=4)
            if "ring" in line:
                ring = {"color": PAPER, "markeredgecolor": colour, "markeredgewidth": 1.8}
                axes.plot(*line["points"][line["ring"]], "o", markersize=8, **ring)
            for mark, point in zip(line.get("marks", ()), line["points"], strict=False):
                axes.annotate(mark, point, xytext=(0, 7), textcoords="offset points", ha="center")
        axes.margins(0.08, 0.15)
        if log:
            axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        if zero:
            axes.set_ylim(bottom=0)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>| xmlns(:xlink)?=\"[^\"]*\"", "", file.getvalue(), flags=re.DOTALL)
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    names = (f'<span style="color: {c}">{escape(line["name"])}</span>' for line, c in zip(lines, COLOURS, strict=False))
    legend = f'<p class="legend">{" ".join(names)}</p>' if len(lines) > 1 else ""
    html = f"<figure><p>{escape(title)}</p>{legend}{svg}</figure>"
    return re.sub("|".join(VARIABLES), lambda colour: f"var(--{VARIABLES[colour[0]]})", html)
