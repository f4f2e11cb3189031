"""Line plots by matplotlib, as SVG inside a page, in the page's own light or dark colours."""

import io
import re
from collections.abc import Sequence
from html import escape
from itertools import product
from typing import Any

# Colours here, and their names in the page's CSS
VARIABLES = {"#0b5cad": "accent", "#b3470c": "warm", "#2a9d60": "green", "#9b59b6": "violet"}
VARIABLES |= {"#656d76": "soft", "#d8dee4": "line", "#ffffff": "paper"}
*COLOURS, INK, LINE, PAPER = VARIABLES
MARKERS = {"o": "", "s": "■", "^": "▲"}  # and in legends: the next where there are more lines than colours
STYLE = {  # the salt makes the same plot the same text
    **{"svg.hashsalt": "ldm", "svg.fonttype": "none", "font.size": 8, "xtick.major.size": 0, "ytick.major.size": 0},
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **{"axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": LINE, "axes.edgecolor": LINE},
    **{"axes.spines.right": False, "axes.spines.top": False, "lines.markersize": 4, "savefig.transparent": True},
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

    file, names = io.StringIO(), []
    with rc_context(STYLE):
        axes = Figure((4, 2.6), layout="constrained").subplots()
        axes.set(xlabel=x_name)
        if log:
            axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        for name, value in levels:
            axes.axhline(value, color=INK, linewidth=1, linestyle="--")
            axes.annotate(name, (1, value), (0, -10), ("axes fraction", "data"), "offset points", ha="right")
        for line, (marker, colour) in zip(lines, product(MARKERS, COLOURS), strict=False):
            names.append(f'<span style="color: {colour}">{MARKERS[marker]}{escape(line["name"])}</span>')
            axes.plot(*zip(*line["points"], strict=True), line.get("style", f"{marker}-"), color=colour)
            if "ring" in line:
                axes.plot(*line["points"][line["ring"]], "o", color=PAPER, mec=colour, mew=1.8, markersize=8)
            for mark, point in zip(line.get("marks", ()), line["points"], strict=False):
                axes.annotate(mark, point, (0, 7), textcoords="offset points", ha="center")
        axes.margins(0.08, 0.15)
        axes.set_ylim(bottom=0 if zero else None)
        axes.figure.savefig(file, format="svg", metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>| xmlns(:xlink)?=\"[^\"]*\"", "", file.getvalue(), flags=re.DOTALL)
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    legend = f'<p class="legend">{" ".join(names)}</p>' if len(names) > 1 else ""
    html = f"<figure><p>{escape(title)}</p>{legend}{svg}</figure>"
    return re.sub("|".join(VARIABLES), lambda colour: f"var(--{VARIABLES[colour[0]]})", html)
