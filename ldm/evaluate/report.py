"""The report of an evaluation: one HTML file with its images and plots inside, which opens offline.

All that it says is in report.jinja; a further section is one there.
"""

import math
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from PIL import Image
from torch import Tensor

from ldm.evaluate import plots
from ldm.evaluate.records import SHUFFLED, Record, best_guidance, find, named, number, ratio, short
from ldm.images import data_url

LARGEST = 256  # pixels per side of an image in the report; larger ones are reduced
check_installed = partial(plots.check_installed, "jinja2")


def write_report(kind: str, out: Path, settings: dict, results: Sequence[Record], galleries: dict) -> None:
    """Writes `out`/report.html; `kind` is "model", "autoencoder" or "folders", `galleries` are Rows by name."""
    rated = find(results, "blank_pictures", "samples")
    best = best_guidance(results) if rated else None

    def one(metric: str, of: str, **where: Any) -> Record | None:
        return next(iter(find(results, metric, of, **where)), None)

    values = {"kind": kind, "settings": settings, "results": results, "galleries": galleries, "best": best}
    _write(out / "report.html", "report.jinja", **values, one=one, find=partial(find, results))


def write_page(path: Path, title: str, body: Sequence[str]) -> None:
    """Writes a page of HTML fragments in the style of the reports."""
    _write(path, "page.jinja", title=title, body=body)


def _write(path: Path, template: str, **values: Any) -> None:
    check_installed()
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup, escape

    def cell(text: str) -> Markup:
        """An interval at the end of a text in small letters on a line of its own."""
        return Markup(re.sub(r" (\[[^\]]*\])$", r"<small>\1</small>", str(escape(text))))

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        extensions=["jinja2.ext.do"],
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"number": number, "named": named, "short": short, "ratio": ratio, "line": plots.Line}
    environment.globals |= {"plot": lambda *args, **options: Markup(plots.plot(*args, **options)), "image": image}
    environment.globals |= {"percent": "{:.1%}".format, "at_size": at_size, "SHUFFLED": SHUFFLED}
    environment.filters["cell"] = cell
    part = path.with_name(path.name + ".part")
    part.write_text(environment.get_template(template).render(values), encoding="utf-8")
    os.replace(part, path)


def image(pixels: Tensor) -> str:
    """A data URL of uint8 (3, H, W)."""
    picture = Image.fromarray(rearrange(pixels, "c h w -> h w c").contiguous().numpy())
    picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return data_url(picture)


def at_size(points: Sequence[tuple[float, float]], size: float) -> str:
    """A codec's PSNR at `size` bytes, interpolated between its (bytes, PSNR) over the logarithm of bytes."""
    sizes, levels = zip(*sorted(points), strict=True)
    if sizes[0] <= size <= sizes[-1]:
        return f"{np.interp(math.log(size), np.log(sizes), levels):.2f}"
    end = 0 if size < sizes[0] else -1
    return f"none; {levels[end]:.2f} at {sizes[end]:.0f}"
