"""The report of an evaluation: one HTML file with its images and plots inside, which opens offline.

All that it says is in report.jinja; a further section is one there.
"""

import math
import re
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from PIL import Image
from torch import Tensor

from ldm.config import UserError
from ldm.distributed import processes
from ldm.evaluate.plots import plot
from ldm.evaluate.records import SHUFFLED, Record, find, named, number, over_passes, part, ratio, short
from ldm.images import data_url
from ldm.model_io import atomic_write, write_json

FORMATS = {"model": "ldm-evaluation-2", "folders": "ldm-evaluation-2", "autoencoder": "ldm-autoencoder-evaluation-1"}
PACKAGES = ("scipy", "sklearn", "torch_fidelity", "jinja2", "matplotlib", "psutil")
LARGEST = 256  # pixels per side of an image in the report; larger ones are reduced


def check_installed() -> None:
    """Raises UserError where a package of the extra `evaluate` is missing."""
    if missing := [name for name in PACKAGES if not find_spec(name)]:
        raise UserError(f"reports and curves need {', '.join(missing)}: pip install 'ldm[evaluate]'")


def write_results(
    kind: str, out: Path, settings: dict, results: Sequence[Record], galleries: dict[str, list[dict]]
) -> None:
    """Writes metrics.json and report.html into `out`, in the main process; `kind` is one of FORMATS. A row of a
    gallery has "pictures", each a label and uint8 (3, H, W), a "caption" and a "note"."""
    if not processes().is_main_process:
        return
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup, escape

    def cell(text: str) -> Markup:
        """An interval at the end of a text in small letters on a line of its own."""
        return Markup(re.sub(r" (\[[^\]]*\])$", r"<small>\1</small>", str(escape(text))))

    def one(metric: str, of: str, **where: Any) -> Record | None:
        return next(iter(find(results, metric, of, **where)), None)

    def numbers(
        metric: str, sources: list[str], factor: float = 1.0, keys: Sequence[str] = (), interval: bool = True, **where
    ) -> list[str]:
        """Of each source a metric's numbers, "-" where it has none; `keys` lead to one of a dictionary."""
        each = [r for of in sources for r in find(results, metric, of, **where) or [None]]
        return [number(r and part(r, *keys), factor, interval) for r in each]

    write_json(out / "metrics.json", {"format": FORMATS[kind], "settings": settings, "results": results})
    folder, options = FileSystemLoader(Path(__file__).parent), {"trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=folder, autoescape=True, extensions=["jinja2.ext.do"], **options)
    environment.filters |= {"cell": cell, "markup": Markup, "g": "{:g}".format, "number": number}
    functions = (number, numbers, named, part, short, ratio, image, at_size, headings, one, over_passes, plot, zip)
    environment.globals |= {function.__name__: function for function in functions}
    environment.globals |= {"find": partial(find, results), "percent": "{:.1%}".format, "SHUFFLED": SHUFFLED}
    values = {"kind": kind, "settings": settings, "results": results, "galleries": galleries}
    with atomic_write(out / "report.html") as temporary:
        html = environment.get_template("report.jinja").render(values)
        temporary.write_text(html, encoding="utf-8", errors="backslashreplace")  # file names may be any bytes


def headings(html: str) -> list[tuple[str, str]]:
    """The anchors and titles of sections."""
    return re.findall(r'<h2 id="([^"]*)">(.*?)</h2>', html)


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
    nearest = 0 if size < sizes[0] else -1
    return f"none; {levels[nearest]:.2f} at {sizes[nearest]:.0f}"
