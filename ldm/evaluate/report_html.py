"""What a report is made of: tables, plots and pictures as self-contained HTML."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

from ldm.images import data_url

LARGEST = 256  # pixels a side of a picture in the report; larger ones are reduced
CSS = """
:root { --ink: #1f2328; --soft: #656d76; --line: #d8dee4; --paper: #ffffff; --wash: #f6f8fa; --accent: #0b5cad;
  --warm: #b3470c; color-scheme: light dark }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --paper: #0d1117;
  --wash: #1a2029; --accent: #58a6ff; --warm: #f0883e } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1120px; padding: 40px 24px 80px; color: var(--ink); background: var(--paper);
  font: 16px/1.55 system-ui, sans-serif }
h1 { font-size: 28px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere }
h2 { font-size: 20px; margin: 56px 0 8px; padding-top: 20px; border-top: 1px solid var(--line) }
p { margin: 0 0 16px; max-width: 72ch } .failed { color: var(--warm) } .soft, .note, figcaption { color: var(--soft) }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 24px 0 }
.card { background: var(--wash); border-radius: 8px; padding: 14px 16px } .card b { display: block; font-size: 26px }
.card span { color: var(--soft); font-size: 14px }
.wide { overflow-x: auto; margin: 0 0 20px } table { border-collapse: collapse; font-size: 15px;
  min-width: min(100%, 620px) }
th, td { text-align: right; padding: 6px 12px; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; white-space: nowrap }
th { color: var(--soft); font-weight: 500; white-space: normal; vertical-align: bottom }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
td small { display: block; color: var(--soft); font-size: 12px; font-weight: 400; line-height: 1.2 }
tr.best td { background: var(--wash); font-weight: 600 }
table.settings td { text-align: left; white-space: normal; overflow-wrap: anywhere }
table.settings td:first-child { color: var(--soft); white-space: nowrap }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 24px; margin: 20px 0;
  align-items: end }
.plots figure { margin: 0; max-width: 520px } svg { width: 100%; height: auto; display: block }
p.legend { font-size: 13px; margin: 0 } .legend span { font-weight: 600; margin-right: 12px }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); paint-order: stroke; stroke: var(--paper);
  stroke-width: 3px }
.rows { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--row)), 1fr)); gap: 24px 28px }
.row p { margin: 0 0 6px; font-size: 15px; line-height: 1.35 } .row .note { font-size: 13px; margin: 6px 0 0 }
.pictures { display: grid; gap: 6px } figure { margin: 0 } figcaption { font-size: 13px; text-align: center }
img { width: 100%; display: block; border-radius: 4px; outline: 1px solid var(--line) }
img.small { image-rendering: pixelated }
@media (max-width: 600px) { body { padding: 24px 16px 60px } h1 { font-size: 23px }
  table { font-size: 13px } th, td { padding: 6px 5px } .wide th:first-child, .wide td:first-child { position: sticky;
  left: 0; background: var(--paper); white-space: normal; min-width: 8em }
  .wide .settings td:first-child { position: static }
  .wide .best td:first-child { background: var(--wash) } .card b { font-size: 21px } }
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Pictures of one caption side by side, each with a label."""

    caption: str
    pictures: list[tuple[str, Image.Image]]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """A section of pictures."""

    title: str
    about: str
    rows: list[Row]


def table(head: Sequence[str], rows: Sequence[Sequence[str]], best: int | None = None, kind: str = "") -> str:
    """An HTML table of texts; row `best` stands out."""
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = [
        f"<tr{' class=best' if i == best else ''}>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>"
        for i, row in enumerate(rows)
    ]
    top = f"<thead><tr>{cells}</tr></thead>" if head else ""
    return f'<div class="wide"><table class="{kind}">{top}<tbody>{"".join(lines)}</tbody></table></div>'


def _cell(text: str) -> str:
    """A text, an interval at its end in small letters on a line of its own."""
    return re.sub(r" (\[[^\]]*\])$", r"<small>\1</small>", escape(text))


def percent(share: float) -> str:
    """0.5 -> "50.0%"."""
    return f"{100 * share:.1f}%"


def number(record: dict | None, factor: float = 1.0, interval: bool = True) -> str:
    """A record's value times `factor`, with its 95% interval where it has one; a dash for none."""
    if record is None or record["value"] is None:
        return "-"
    text = short(factor * record["value"])
    if not interval or "interval" not in record:
        return text
    low, high = (short(factor * bound) for bound in record["interval"])
    return f"{text} [{low}, {high}]"


def network(record: dict) -> str:
    """Which network a number is of, with its weights; "" for none."""
    return f"{record['extractor']}, weights {record['extractor_sha256'][:12]}" if "extractor" in record else ""


def line(record: dict) -> str:
    """A number as a terminal shows it, with its network and N."""
    about = f"{record['extractor']}, N={record['n']}" if "extractor" in record else f"N={record['n']}"
    return f"{record['metric']} ({about}): {number(record)}"


def short(value: float) -> str:
    """About three digits, without exponents."""
    size = abs(value)
    digits = next((d for d, least in enumerate((1000, 10, 1, 0.1)) if size >= least), 4)
    return f"{value:.{digits}f}" if value else "0"


def show(gallery: Gallery) -> str:
    """A gallery as HTML, as many rows beside each other as the screen has room for."""
    rows = []
    # as wide as the row with the most pictures needs; narrower screens shrink them
    count = max((len(row.pictures) for row in gallery.rows), default=1)
    for row in gallery.rows:
        figures = "".join(f"<figure>{_img(p, row.caption)}{_label(label)}</figure>" for label, p in row.pictures)
        caption = f"<p>{escape(row.caption)}</p>" if row.caption else ""
        note = f'<p class="note">{escape(row.note)}</p>' if row.note else ""
        columns = f"grid-template-columns: repeat({len(row.pictures)}, minmax(0, 1fr))"
        rows.append(f'<div class="row">{caption}<div class="pictures" style="{columns}">{figures}</div>{note}</div>')
    width = {1: 140, 2: 150}.get(count, 96 * count)
    inside = f'<div class="rows" style="--row: {width}px">{"".join(rows)}</div>'
    return f"<h2>{escape(gallery.title)}</h2><p>{escape(gallery.about)}</p>{inside}"


def _label(text: str) -> str:
    return f"<figcaption>{escape(text)}</figcaption>" if text else ""


def _img(picture: Image.Image, caption: str) -> str:
    """A picture as a data URL."""
    if max(picture.size) > LARGEST:
        picture = picture.copy()
        picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    kind = ' class="small"' if picture.width < 64 else ""
    return f'<img{kind} alt="{escape(caption)}" src="{data_url(picture)}">'
