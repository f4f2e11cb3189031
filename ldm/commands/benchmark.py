"""Measures speed and memory of this project and of diffusers on the same weights and inputs.

ldm benchmark --out outputs/benchmark

Each side runs in a fresh process per case, in alternating rounds. Writes benchmark.json, .md and .html after each case.
Exit code 1 if outputs disagree or a case fails.
"""

import importlib.metadata
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ldm.commands.cli import read_options
from ldm.config import UserError

NETWORK, GRADIENT, PICTURE = 1e-4, 1e-3, 1 / 200  # tolerances; a level of 255 is below the last
SINGLE = (("shapes", 32, 1), ("emoji", 64, 1), ("emoji", 128, 1), ("emoji", 256, 1))  # model, pixels, batch
EIGHT = (("shapes", 32, 8), ("emoji", 64, 8), ("emoji", 128, 8))
WORKLOADS = {  # largest difference of outputs, relative to the largest value (None: ours alone), and cases
    "unet-forward": (NETWORK, SINGLE),
    "sampling": (PICTURE, SINGLE + EIGHT),
    "vae": (NETWORK, (("emoji", 64, 8), ("emoji", 256, 1))),
    "train-unet": (GRADIENT, (("shapes", 32, 64), ("emoji", 64, 32), ("emoji", 128, 8))),
    "data": (None, (("shapes", 32, 32), ("emoji", 64, 32))),
}
HEAD = ("case", "ldm, ms", "diffusers, ms", "ratio", "peak memory, MB", "largest difference")
NOTE = """Median of one run; ratio of the medians, theirs over ours, with its 95% bootstrap interval over the rounds;
memory is the peak of a process with this case alone, ours / theirs."""
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
    compile: bool = False  # also sample with compiled models; those of diffusers are compiled on a GPU alone


class Case(NamedTuple):
    """One row of the table, and whose code runs."""

    workload: str
    model: str
    size: int  # of the pictures, in pixels
    batch: int
    compiled: bool
    device: str
    ours: bool = True

    def __str__(self) -> str:
        return f"{self.workload}: {self.model} {self.size} px, batch {self.batch}" + ", compiled" * self.compiled


def main() -> None:
    """Measures, prints the table, writes the files."""
    options = read_options(Options, __doc__)
    cases, rows = choose(options), []
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {"device": options.device, "rounds": options.rounds, "threads": options.threads or os.cpu_count()}
    os.environ |= {"OMP_NUM_THREADS": str(settings["threads"]), "HF_HUB_OFFLINE": "1", "DIFFUSERS_VERBOSITY": "error"}
    for case in cases:
        print(f"measuring {case}", file=sys.stderr)
        try:
            row = measure(case, options.rounds)
        except ChildProcessError as error:
            row = {"problem": str(error)}
        rows.append({"name": str(case)} | row)
        table = write(options.out, settings, rows)
    print(f"{table}\nwritten to {options.out}")
    failures = [f"error: {row['name']}: {row['problem']}" for row in rows if row["problem"]]
    sys.exit("\n".join(failures) or 0)


def choose(options: Options) -> list[Case]:
    """The cases to measure. Raises UserError for options out of range."""
    for name, least in (("rounds", 1), ("threads", 0)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} {getattr(options, name)} is not allowed; give {least} or more")
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {str(options.out)!r} is a file; give a folder, which may be new")
    if options.device == "cuda":
        from ldm.distributed import find_device

        find_device(options.device)
    cases = []
    for name in WORKLOADS if options.only is None else map(str.strip, options.only.split(",")):
        if name not in WORKLOADS:
            raise UserError(f"workload {name!r} is unknown; known: {', '.join(WORKLOADS)}")
        rows = WORKLOADS[name][1][: 1 if options.quick else None]
        compile = {False, options.compile and name == "sampling"}
        cases += [Case(name, *row, compiled, options.device) for row in rows for compiled in sorted(compile)]
    return cases


# --- one case


def measure(case: Case, rounds: int) -> Row:
    """The raw times of a case, its comparison of outputs, and the `problem`, "" where there is none. Raises
    ChildProcessError where a side cannot do its work."""
    tolerance = WORKLOADS[case.workload][0]
    sides = {"ldm": case} | ({"diffusers": case._replace(ours=False)} if tolerance else {})
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    with ExitStack() as stack:
        ask = {side: stack.enter_context(child(side, sides[side])) for side in sides}
        for i in range(rounds):
            for side in sorted(sides, reverse=i % 2 == 0):
                seconds[side].append(ask[side]("time"))
        outputs, peaks = zip(*(ask[side]("outcome") for side in sides), strict=True)
    row = {"seconds": seconds, "peaks": peaks, "difference": None, "problem": ""}
    if tolerance:
        row["difference"] = gap = largest_difference(*outputs)
        row["problem"] = "" if gap <= tolerance else f"outputs differ by {gap:.2g}, allowed {tolerance:g}"
    return row


@contextmanager
def child(side: str, case: Case) -> Iterator[Callable[[str], Any]]:
    """A process that has built a case and run it once, and does what it is asked: "time" returns the seconds of a run,
    "outcome" the outputs and the peak bytes.

    This process imports no torch, as Linux counts its memory in the peak of a new process.
    """
    context = multiprocessing.get_context("spawn")
    pipe, end = context.Pipe()
    process = context.Process(target=serve, args=(end, case), daemon=True)
    process.start()
    end.close()

    def ask(task: str) -> Any:
        try:
            pipe.send(task)
            reply = pipe.recv()
        except (EOFError, OSError):
            process.join()
            reply = f"its process ended with code {process.exitcode}"
        if isinstance(reply, str):
            raise ChildProcessError(f"{side}: {reply}")
        return reply

    try:
        ask("time")
        yield ask
    finally:
        process.kill()
        process.join()


def serve(pipe: Connection, case: Case) -> None:
    """The work of a child process; an error is replied as its text."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ctrl-C ends it in silence
    try:
        from ldm.commands import benchmark_jobs as jobs

        run = jobs.build(case)
        while True:
            pipe.send(jobs.timed(run, least=0.2) if pipe.recv() == "time" else jobs.outcome(run))
    except EOFError:  # the benchmark was stopped
        pass
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")


def largest_difference(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """The largest difference of arrays, relative to their largest value."""
    gaps = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(ours, theirs, strict=True)]
    return float(np.max(gaps))  # NaN where an array has one


# --- the table


def write(out: Path, settings: Row, rows: list[Row]) -> str:
    """Writes the rows as JSON, Markdown and HTML; returns the Markdown."""
    packages = filter(find_spec, ("torch", "diffusers", "transformers", "numpy"))
    settings |= {name: importlib.metadata.version(name) for name in packages}
    lines = [HEAD, *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    table = "".join(f"| {' | '.join(map(str.ljust, line, widths))} |\n" for line in lines)
    markdown = f"{table}\n{NOTE}\n\n{', '.join(f'{name} {value}' for name, value in settings.items())}\n"
    html = f"<!doctype html><html lang=en><meta charset=utf-8><title>Benchmark</title><pre>{escape(markdown)}</pre>"
    json_text = json.dumps({"settings": settings, "rows": rows}, indent=1)
    for ending, text in {"json": json_text, "md": markdown, "html": html}.items():
        (out / f"benchmark.{ending}").write_text(text, encoding="utf-8")
    return markdown


def cells(row: Row) -> list[str]:
    """A row of the table; HEAD names its columns."""
    if "seconds" not in row:
        return [row["name"], "failed", row["problem"], "-", "-", "-"]
    line = [row["name"], *(f"{1e3 * np.median(seconds):,.4g}" for seconds in row["seconds"].values())]
    peaks = " / ".join(f"{peak / 2**20:.0f}" for peak in row["peaks"])
    if row["difference"] is None:
        return [*line, "-", "-", peaks, "-"]
    compared = "{:.2f}x [{:.2f}, {:.2f}]".format(*ratio(**row["seconds"]))
    return [*line, compared, peaks, f"{'WRONG: ' * bool(row['problem'])}{row['difference']:.1e}"]


def ratio(ldm: list[float], diffusers: list[float]) -> tuple[float, float, float]:
    """Median of `diffusers` over that of `ldm` with its 95% bootstrap interval over the rounds, drawn in pairs as they
    were measured (Efron 1979)."""
    draws = np.random.default_rng(0).integers(len(ldm), size=(2000, len(ldm)))
    ratios = np.median(np.array(diffusers)[draws], 1) / np.median(np.array(ldm)[draws], 1)
    return (np.median(diffusers) / np.median(ldm), *np.quantile(ratios, (0.025, 0.975)))
