"""Measures speed and memory of this project and of diffusers on the same weights and inputs.

ldm benchmark --out outputs/benchmark

Each side runs in a fresh process per case, in alternating rounds. Writes benchmark.json, .md and .html after each case.
Exit code 1 if outputs disagree or a case fails.
"""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ldm.commands.cli import read_options
from ldm.config import UserError

NETWORK, GRADIENT, PICTURE = 1e-4, 1e-3, 1 / 200  # tolerances; a level of 255 is below the last
LEAST, MOST = 0.2, 50  # seconds to time at once, and at most so many runs to reach them
HEAD = ("case", "ldm", "diffusers", "ratio", "peak memory, MB", "largest difference")
NOTE = """Median [quartiles] of one run; ratio of the medians, theirs over ours, with its 95% bootstrap interval over
the rounds; memory is the peak of a process with this case alone, ours / theirs."""
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `ldm benchmark`."""

    out: Path  # folder for the results
    only: str | None = None  # workloads to run, separated by commas; default: all
    rounds: int = 7  # measurements per case
    threads: int = 0  # CPU threads per side; 0: all cores
    device: Literal["cpu", "cuda"] = "cpu"  # device of both sides
    quick: bool = False  # run only the first case of each workload
    compile: bool = False  # also run with torch.compile on both sides


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Cases of one job, a function of `benchmark_jobs`: name -> its arguments."""

    job: str
    cases: dict[str, Row]
    tolerance: float | None = NETWORK  # largest difference of outputs, relative to the largest value; None: ours alone


def cases(*rows: tuple[str, int, int]) -> dict[str, Row]:
    """Cases of shipped models by model, picture size and batch."""
    return {f"{m} {s} px, batch {b}": {"model": m, "size": s, "batch": b} for m, s, b in rows}


SINGLE = (("shapes", 32, 1), ("emoji", 64, 1), ("emoji", 128, 1), ("emoji", 256, 1))
LOADED = {f"{d}, {n} workers, 256 pictures": {"name": d, "workers": n} for d in ("shapes", "emoji") for n in (0, 2)}
WORKLOADS = {
    "cold-start": Workload(job="program", cases={"first 64 px picture": {}}, tolerance=PICTURE),
    "unet-forward": Workload(job="unet", cases=cases(*SINGLE)),
    "sampling": Workload(
        job="sampling", cases=cases(*SINGLE, ("shapes", 32, 8), ("emoji", 64, 8), ("emoji", 128, 8)), tolerance=PICTURE
    ),
    "vae": Workload(job="vae", cases=cases(("emoji", 64, 8), ("emoji", 256, 1))),
    "train-unet": Workload(
        job="train_unet", cases=cases(("shapes", 32, 64), ("emoji", 64, 32), ("emoji", 128, 8)), tolerance=GRADIENT
    ),
    "train-clip": Workload(job="train_clip", cases={"emoji's judge, batch 32": {}}, tolerance=GRADIENT),
    "data": Workload(job="data", cases=LOADED, tolerance=None),
}
COMPILED = ("unet-forward", "sampling", "vae")  # workloads of --compile


class CaseFailed(Exception):
    """A side could not do its work; the text is one line."""


def main() -> None:
    """Measures, prints the table, writes the files."""
    options = check(read_options(Options, __doc__))
    chosen, rows = choose(options), []
    options.out.mkdir(parents=True, exist_ok=True)
    if not find_spec("diffusers"):
        print("warning: diffusers is not installed, so this project is measured alone", file=sys.stderr)
    for name, (workload, params) in chosen.items():
        print(f"measuring {name}", file=sys.stderr)
        rows.append({"name": name} | measure(workload, params, options))
        table = write(options, rows)
    print(f"{table}\nwritten to {options.out}")
    failures = [f"error: {row['name']}: {row['problem']}\n" for row in rows if row["problem"]]
    sys.stderr.write("".join(failures))
    sys.exit(1 if failures else 0)


def check(options: Options) -> Options:
    """The options, with the number of threads. Raises UserError for values out of range."""
    if options.rounds < 1:
        raise UserError(f"--rounds {options.rounds} is not allowed; give 1 or more")
    if not 0 <= options.threads <= 1024:
        raise UserError(f"--threads {options.threads} is not allowed; give 1 to 1024, or 0 for all cores")
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {str(options.out)!r} is a file; give a folder, which may be new")
    if options.device == "cuda":
        from ldm.distributed import find_device

        find_device(options.device)
    return replace(options, threads=options.threads or os.cpu_count())


def choose(options: Options) -> dict[str, tuple[Workload, Row]]:
    """The cases of --only, --quick and --compile by name. Raises UserError for an unknown workload."""
    names = list(WORKLOADS) if options.only is None else [name.strip() for name in options.only.split(",")]
    chosen = {}
    for name in names:
        if name not in WORKLOADS:
            raise UserError(f"workload {name!r} is unknown; known: {', '.join(WORKLOADS)}")
        workload = WORKLOADS[name]
        for case, params in list(workload.cases.items())[: 1 if options.quick else None]:
            chosen[f"{name}: {case}"] = (workload, params)
            if options.compile and name in COMPILED:
                loose = replace(workload, tolerance=max(workload.tolerance, GRADIENT))
                chosen[f"{name}: {case}, compiled"] = (loose, params | {"compile": True})
    return chosen


# --- one case


def measure(workload: Workload, params: Row, options: Options) -> Row:
    """The raw times of a case, its comparison of outputs, and the `problem`, "" where there is none."""
    sides = ["ldm", "diffusers"] if workload.tolerance is not None and find_spec("diffusers") else ["ldm"]
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    try:
        with ExitStack() as stack:
            ask = {side: stack.enter_context(child(side, workload.job, params, options)) for side in sides}
            repeats = max(1, min(MOST, round(LEAST / max(ask[side](1) for side in sides))))
            for i in range(options.rounds):
                for side in sides if i % 2 == 0 else sides[::-1]:
                    seconds[side].append(ask[side](repeats))
            outputs, peaks = zip(*(ask[side](0) for side in sides), strict=True)
    except CaseFailed as error:
        return {"problem": str(error)}
    peaks = () if workload.job == "program" else peaks  # its memory is that of another process
    row = {"seconds": seconds, "peaks": peaks, "difference": None, "problem": ""}
    if len(sides) == 2:
        row["difference"] = gap = largest_difference(*outputs)
        row["problem"] = f"outputs differ by {gap:.2g}, allowed {workload.tolerance:g}" * (gap > workload.tolerance)
    return row


@contextmanager
def child(side: str, job: str, params: Row, options: Options) -> Iterator[Callable[[int], Any]]:
    """A process that has built a case and run it once; see `serve` for what the function returns.

    This process imports no torch, as Linux counts its memory in the peak of a new process.
    """
    os.environ |= {name: str(options.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
    context = multiprocessing.get_context("spawn")
    pipe, end = context.Pipe()
    process = context.Process(target=serve, args=(end, side, job, params, options), daemon=True)
    process.start()
    end.close()

    def ask(repeats: int) -> Any:
        try:
            pipe.send(repeats)
            reply = pipe.recv()
        except (EOFError, OSError):
            process.join()
            raise CaseFailed(f"{side}: its process ended with code {process.exitcode}") from None
        if isinstance(reply, CaseFailed):
            raise CaseFailed(f"{side}: {reply}")
        return reply

    try:
        ask(1)
        yield ask
    finally:
        process.kill()
        process.join()


def serve(pipe: Any, side: str, job: str, params: Row, options: Options) -> None:
    """The work of a child process: replies to a number of runs by the seconds per run, to 0 by the outputs and the peak
    bytes."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ctrl-C ends it in silence
    try:
        from ldm.commands import benchmark_jobs as jobs

        run = jobs.build(side == "ldm", job, params, options.threads, options.device)
        for repeats in iter(pipe.recv, 0):
            pipe.send(jobs.timed(run, repeats))
        pipe.send(jobs.outcome(run))
    except EOFError:  # the benchmark was stopped
        pass
    except Exception as error:
        pipe.send(CaseFailed(f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"))


def largest_difference(ours: Row, theirs: Row) -> float:
    """The largest difference of arrays, relative to their largest value; infinite where names, shapes or finiteness
    differ."""
    if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in theirs.items()}:
        return float("inf")
    gaps = [np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max() for name in theirs]
    return float(max(gaps)) if np.isfinite(gaps).all() else float("inf")


# --- the table


def write(options: Options, rows: list[Row]) -> str:
    """Writes the rows as JSON, Markdown and HTML; returns the Markdown."""
    settings = {name: getattr(options, name) for name in ("device", "rounds", "threads")}
    packages = filter(find_spec, ("torch", "diffusers", "transformers", "numpy"))
    settings |= {name: importlib.metadata.version(name) for name in packages}
    lines = [list(HEAD), *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    table = [" | ".join(map(str.ljust, line, widths)) for line in lines]
    versions = ", ".join(f"{name} {value}" for name, value in settings.items())
    markdown = "".join(f"| {line} |\n" for line in table) + f"\n{NOTE}\n\n{versions}\n"
    html = f"<!doctype html><html lang=en><meta charset=utf-8><title>Benchmark</title><pre>{escape(markdown)}</pre>"
    json_text = json.dumps({"settings": settings, "rows": rows}, indent=1)
    for ending, text in {"json": json_text, "md": markdown, "html": html}.items():
        (options.out / f"benchmark.{ending}").write_text(text, encoding="utf-8")
    return markdown


def cells(row: Row) -> list[str]:
    """A row of the table; HEAD names its columns."""
    if "seconds" not in row:
        return [row["name"], "failed", row["problem"], "-", "-", "-"]
    times = [time_text(seconds) for seconds in row["seconds"].values()]
    shown = "-"
    if len(times) == 2:
        value, low, high = ratio(row["seconds"]["diffusers"], row["seconds"]["ldm"])
        shown = f"{value:.2f}x [{low:.2f}, {high:.2f}]"
    peaks = " / ".join(f"{peak / 2**20:.0f}" for peak in row["peaks"]) or "-"
    gap = "-" if row["difference"] is None else f"{'WRONG: ' * bool(row['problem'])}{row['difference']:.1e}"
    return [row["name"], times[0], *(times[1:] or ["-"]), shown, peaks, gap]


def time_text(seconds: list[float]) -> str:
    """Median and quartiles in the unit that fits."""
    low, middle, high = np.quantile(seconds, (0.25, 0.5, 0.75))
    unit, factor = ("s", 1) if middle >= 1 else ("ms", 1e3)
    return f"{middle * factor:.3g} {unit} [{low * factor:.3g}, {high * factor:.3g}]"


def ratio(theirs: list[float], ours: list[float]) -> tuple[float, float, float]:
    """Median of `theirs` over median of `ours` with its 95% bootstrap interval over the rounds, drawn in pairs as they
    were measured (Efron 1979)."""
    draws = np.random.default_rng(0).integers(len(ours), size=(2000, len(ours)))
    ratios = np.median(np.array(theirs)[draws], 1) / np.median(np.array(ours)[draws], 1)
    return (np.median(theirs) / np.median(ours), *np.quantile(ratios, (0.025, 0.975)))
