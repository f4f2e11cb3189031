"""Checks on a GPU, in at most 3 minutes and without a network, that this project computes there what it does on a CPU.

ldm gpu-check --out outputs/gpu-check

Prints a table and writes it as gpu-check.md and .json; what the rows print is in gpu-check.log. Exit code 1 if a row is
wrong. On a CPU it is a dry run.
"""

import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

from ldm.commands.cli import markdown_table, read_options
from ldm.config import UserError

HEAD = ("check", "largest difference, or figure", "allowed", "result", "seconds")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `ldm gpu-check`."""

    out: Path  # folder for the table
    device: Literal["cuda", "cpu"] = "cuda"  # cpu: a dry run
    only: str = ""  # runs only the rows whose names begin with one of these words, separated by commas


class Row(NamedTuple):
    """One check: `run` returns a figure, which must be finite and at most `allowed`, or a figure and a note."""

    name: str
    allowed: float
    run: Callable[[], float | tuple[float, str]]


class Skipped(Exception):
    """A check that this device cannot run; says why."""


def main() -> None:
    """Runs the rows, writes and prints the table."""
    o = read_options(Options, __doc__)
    if o.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"  # a GPU that is there would train
    os.environ |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "HF_HUB_OFFLINE": "1"}  # the former: deterministic products
    import torch

    from ldm.commands.gpu_check_rows import rows
    from ldm.distributed import find_device

    device = find_device(o.device)
    settings = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"}
    settings |= {name: version(name) for name in ("torch", "transformers")}
    results, start = [], time.perf_counter()
    with TemporaryDirectory() as work:
        table = rows(device, Path(work))
        chosen = [row for row in table if row.name.startswith(tuple(o.only.split(",")))]
        if not chosen:
            raise UserError(f"no row begins with {o.only!r}; known: {', '.join(row.name for row in table)}")
        o.out.mkdir(parents=True, exist_ok=True)
        with (o.out / "gpu-check.log").open("w") as log:
            for row in chosen:
                print(row.name, file=sys.stderr)
                with redirect_stdout(log), redirect_stderr(log):
                    results.append(result(row))
    settings["seconds"] = round(time.perf_counter() - start)
    table = markdown_table(HEAD, *map(cells, results))
    table += f"\n{', '.join(f'{name} {value}' for name, value in settings.items())}\n"
    (o.out / "gpu-check.md").write_text(table)
    (o.out / "gpu-check.json").write_text(json.dumps({"settings": settings, "rows": results}, indent=1))
    print(f"{table}\nwritten to {o.out}")
    sys.exit(any(row["result"].startswith("WRONG") for row in results))


def result(row: Row) -> dict[str, Any]:
    """What came of a row; an error, as of memory that runs out or a device that vanishes, is wrong."""
    start, figure, note, verdict = time.perf_counter(), None, "", "WRONG"
    try:
        value = row.run()
        figure, note = value if isinstance(value, tuple) else (value, "")
        verdict = "ok" if math.isfinite(figure) and figure <= row.allowed else "WRONG"
    except Skipped as reason:
        verdict, note = "skipped", str(reason)
    except Exception as error:
        traceback.print_exc()
        note = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    text, seconds = f"{verdict}: {note}" if note else verdict, time.perf_counter() - start
    return {"name": row.name, "figure": figure, "allowed": row.allowed, "result": text, "seconds": seconds}


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table; HEAD names its columns."""
    figure = "-" if row["figure"] is None else f"{row['figure']:.2g}"
    allowed = "finite" if math.isinf(row["allowed"]) else f"{row['allowed']:g}"
    return [row["name"], figure, allowed, row["result"], f"{row['seconds']:.1f}"]
