"""The benchmark in words: a table for the terminal and for a README, and a page that opens by itself."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ldm.bench.machine import BUSY

FILE = "benchmark.json"
HEAD = ("", "ldm", "diffusers", "ratio", "times the floor", "memory", "largest difference", "target")
WIDE = (
    "body { max-width: 1400px } td { white-space: normal } td + td { min-width: 90px } td small { white-space: nowrap }"
)
Row = dict[str, Any]


def seconds(value: float) -> str:
    """With the unit that fits."""
    unit, factor = ("s", 1.0) if value >= 1 else ("ms", 1e3) if value >= 1e-3 else ("us", 1e6)
    return f"{value * factor:.3g} {unit}" if value * factor < 1000 else f"{value * factor:.0f} {unit}"


def spread(side: dict[str, Any]) -> str:
    """Median and quartiles."""
    low, high = side["quartiles"]
    return f"{seconds(side['median'])} [{seconds(low)}, {seconds(high)}]"


def megabytes(memory: dict[str, int] | None) -> str:
    """The peak, and beyond what was held before where that is known."""
    if memory is None:
        return "-"
    grown = f" (+{memory['grown'] / 2**20:.0f})" if "grown" in memory else ""
    return f"{memory['peak'] / 2**20:.0f}{grown}"


def cells(row: Row) -> list[str]:
    """A row of the table; HEAD names its columns."""
    if "failed" in row:
        return [row["name"], "failed", row["failed"], *["-"] * 5]
    sides = [row["sides"][name] for name in row["order"]]
    texts = [spread(side) for side in sides]
    if row["items"]:
        texts = [f"{text}, {row['items'] / side['median']:.0f}/s" for text, side in zip(texts, sides, strict=True)]
    if len(sides) == 2 and row["order"][1] != "diffusers":
        texts[1] = f"{row['order'][1]}: {texts[1]}"
    note = row["note"]
    if row["compiled"]:
        note += ": " + " / ".join(seconds(side["first"]) for side in sides)
    name = f"{row['name']} ({note})" if note else row["name"]
    memory = " / ".join(megabytes(side.get("memory")) for side in sides)
    return [
        name,
        texts[0],
        texts[1] if len(texts) == 2 else "-",
        ratio(row),
        " / ".join(f"{s['median'] / row['floor']['seconds']:.1f}" for s in sides) if row["floor"] else "-",
        memory if any("memory" in side for side in sides) else "-",
        difference(row),
        "; ".join(judged(target) for target in row["targets"]) or "-",
    ]


def ratio(row: Row) -> str:
    """Theirs over ours with its interval; the share beside the model where the row is of that."""
    if row["share"] is not None:
        return f"{row['share']:.1%} beside the model"
    if row["ratio"] is None:
        return "-"
    bounds = row["ratio"]["interval"]
    return f"{row['ratio']['value']:.2f}x" + (f" [{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else "")


def difference(row: Row) -> str:
    """How far the outputs differ, and whether that is too far."""
    found = row["difference"]
    if found is None:
        return "-"
    text = "not comparable" if found["value"] is None else f"{found['value']:.1e}"
    return text if found["agrees"] else f"WRONG: {text}, allowed {found['tolerance']:g}"


def judged(target: dict) -> str:
    """A target and whether it is met."""
    return target["text"] + {True: ": met", False: ": MISSED", None: ": not known"}[target["met"]]


def in_order(table: dict[str, Any], names: Sequence[str]) -> list[Row]:
    """The rows of these names, in that order."""
    found = {row["name"]: row for row in table["rows"]}
    return [found[name] for name in names if name in found]


def remarks(table: dict[str, Any]) -> list[str]:
    """What a reader must know beside the table."""
    settings = table["settings"]
    versions = ", ".join(f"{name} {v or 'not installed'}" for name, v in settings["versions"].items())
    about = settings["machine"]
    load = table.get("load", {})
    found = [
        f"{about['processor']}, {about['cores']} cores, {about['memory'] / 2**30:.0f} GB,"
        f" {' '.join(about['flags'])}; {settings['threads']} threads, {settings['device']}; {versions}.",
        "Median [quartiles] of one run; ratio of the medians, theirs over ours, with its 95% bootstrap interval over"
        " the rounds; memory in MB, ours / theirs, the peak of a fresh process (and beyond what it held when built)."
        " Times the floor: over the least time for the counted FLOPs (of the side that takes fewer) or for the bytes of"
        " weights, inputs and outputs, at the rates measured in between, ours / theirs.",
        f"Load average {load.get('start')} at the start, {load.get('end')} at the end (the benchmark's own included).",
    ]
    if "diffusers" not in table["sides"]:
        found.append("diffusers is not installed: only our side was run.")
    plain = [row["name"] for row in table["rows"] if _layout(row) == "contiguous"]
    if plain:
        found.append(f"Channels-last but where diffusers was faster with its weights contiguous: {named(plain)}.")
    busy = [row["name"] for row in table["rows"] if (row.get("others") or 0) > BUSY]
    if busy:
        found.append(f"WARNING: other programs took over {BUSY:g} cores while these were measured: {named(busy)}.")
    return found


def named(rows: Sequence[str], most: int = 6) -> str:
    """A few names, or how many there are."""
    return ", ".join(rows) if len(rows) <= most else f"{len(rows)} rows, see {FILE}"


def _layout(row: Row) -> str | None:
    """Which diffusers' networks ran in."""
    return row.get("sides", {}).get("diffusers", {}).get("about", {}).get("layout")


def widths(rows: Sequence[Sequence[str]]) -> list[int]:
    """Of the columns."""
    return [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]


def terminal(rows: Sequence[Row]) -> str:
    """Aligned columns."""
    lines = [list(HEAD), *(cells(row) for row in rows)]
    width = widths(lines)
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, width, strict=True)).rstrip() for line in lines)


def markdown(table: dict[str, Any], rows: Sequence[Row]) -> str:
    """A table and the remarks, to be pasted into a README."""
    lines = [HEAD, ["---"] * len(HEAD), *(cells(row) for row in rows if not row.get("point"))]
    body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return "\n\n".join([body, *remarks(table)]) + "\n"


def curves(rows: Sequence[Row]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """axis -> side -> (where, median seconds)."""
    found: dict[str, dict[str, list]] = {}
    for row in rows:
        if row.get("point"):
            axis, where = row["point"]
            for name in row["order"]:
                found.setdefault(axis, {}).setdefault(name, []).append((where, row["sides"][name]["median"]))
    return found


def page(table: dict[str, Any], rows: Sequence[Row]) -> str:
    """Self-contained HTML: the table, the curves, the parts of our training step."""
    from ldm.evaluate.report_html import CSS
    from ldm.evaluate.report_html import table as html_table
    from ldm.evaluate.report_plots import Line, plot

    machine, reading, *more = (f'<p class="soft">{escape(text)}</p>' for text in remarks(table))
    judged_ = [target["met"] for row in rows for target in row.get("targets", ()) if target["met"] is not None]
    met = f"<p>{sum(judged_)} of {len(judged_)} targets are met.</p>"
    parts = ["<h1>Speed beside diffusers</h1>", machine, *more, met if judged_ else ""]
    parts.append(html_table(HEAD, [cells(row) for row in rows if not row.get("point")]))
    drawn = [
        plot(f"Seconds by {axis}", axis, [Line(name=name, points=points) for name, points in sides.items()])
        for axis, sides in curves(rows).items()
    ]
    if drawn:
        about = "A guided pass of the U-Net in Stable Diffusion's shape (16x16 latents, one picture) along each axis;"
        parts.append(f"<h2>How time grows</h2><p>{about} for steps, prompts to pictures.</p>")
        parts.append(f'<div class="plots">{"".join(drawn)}</div>')
    spent = [row for row in rows if row.get("share") is not None]
    if spent:
        names = sorted({name for row in spent for name in row["sides"]["ldm"]["parts"]})
        lines = [[row["name"], *(_part(row, name) for name in names)] for row in spent]
        parts.append("<h2>What a training step consists of</h2>" + html_table(["", *names], lines))
    parts.append(f"<h2>How to read this</h2>{reading}")
    title = "<title>Speed beside diffusers</title><meta name=viewport content='width=device-width'>"
    head = f"<meta charset=utf-8>{title}<style>{CSS}{WIDE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>"


def _part(row: Row, name: str) -> str:
    """A part as a share of the step."""
    found = row["sides"]["ldm"]["parts"]
    return f"{found[name] / found['step']:.1%}" if name in found else "-"


def write(out: Path, table: dict[str, Any], rows: Sequence[Row]) -> None:
    """`benchmark.md` and `benchmark.html`."""
    (out / "benchmark.md").write_text(markdown(table, rows), encoding="utf-8")
    (out / "benchmark.html").write_text(page(table, rows), encoding="utf-8")
