"""Plots of a report, as inline SVG."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 360, 230, 50, 38, 14, 18  # of a plot and its margins
INSET = 8  # of the first and last tick, so that a point there lies clear of the axis' numbers
COLOURS = ("var(--accent)", "var(--warm)", "var(--soft)", "#2a9d60", "#9b59b6", "#d0487e")
Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Line:
    """Points, `joined` in the order given; `marks` are texts beside them, `ring` the index of one that stands out."""

    name: str
    points: Sequence[Point]
    marks: Sequence[str] = ()
    ring: int | None = None
    dots: bool = True
    joined: bool = True


def plot(
    title: str,
    x_name: str,
    lines: Sequence[Line],
    levels: Sequence[tuple[str, float]] = (),
    zero: bool = True,
    x_text: Callable[[float], str] = "{:.4g}".format,
) -> str:
    """A figure with its title; `levels` are dashed horizontals with names; the y axis starts at 0 where `zero`;
    `x_text` writes the numbers of the x axis."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + [y for _, y in levels]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(0.0 if zero else min(ys), max(ys))
    to_x = _scale(x_ticks, LEFT + INSET, WIDTH - RIGHT - INSET)
    to_y = _scale(y_ticks, HEIGHT - BOTTOM, TOP)
    parts = []
    for value in y_ticks:
        parts.append(f'<path d="M{LEFT} {to_y(value):.1f}H{WIDTH - RIGHT}" stroke="var(--line)"/>')
        parts.append(_text(LEFT - 6, to_y(value) + 4, f"{value:.4g}", "end"))
    parts += [_text(to_x(value), HEIGHT - 21, x_text(value), "middle") for value in x_ticks]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, x_name, "middle"))
    for name, value in levels:
        dash = f'<path d="M{LEFT} {to_y(value):.1f}H{WIDTH - RIGHT}" stroke="var(--soft)" stroke-dasharray="4 4"/>'
        parts += [dash, _text(WIDTH - RIGHT, to_y(value) - 5, name, "end")]
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(lines))]
    for line, colour in zip(lines, colours, strict=True):
        parts.append(_line(line, colour, to_x, to_y))
    label = escape(title)
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    names = [f'<span style="color:{c}">{escape(n.name)}</span>' for n, c in zip(lines, colours, strict=True)]
    legend = f'<p class="legend">{" ".join(names)}</p>' if len(lines) > 1 else ""
    return f"<figure><p>{label}</p>{legend}{drawing}</figure>"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Short numbers, about `count` steps of 1, 2, 2.5 or 5 times a power of ten, from at most `low` to at least
    `high`."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _scale(values: Sequence[float], start: float, end: float):
    """The map of an axis from its first to its last tick."""
    low, high = values[0], values[-1]
    return lambda value: start + (end - start) * (value - low) / (high - low)


def _line(line: Line, colour: str, to_x, to_y) -> str:
    path = " ".join(f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in line.points)
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'] if line.joined else []
    for i, (x, y) in enumerate(line.points if line.dots else ()):
        ring = f'r="6" fill="var(--paper)" stroke="{colour}" stroke-width="2.5"'
        style = ring if i == line.ring else f'r="3.5" fill="{colour}"'
        parts.append(f'<circle cx="{to_x(x):.1f}" cy="{to_y(y):.1f}" {style}/>')
        if line.marks:
            parts.append(_text(to_x(x), to_y(y) - 9, line.marks[i], "middle"))
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
