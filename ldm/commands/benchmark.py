"""Measures speed and memory of this project and of diffusers on the same weights and inputs.

ldm benchmark --out outputs/benchmark

Each side runs in a fresh process per case, in alternating rounds. The same command again continues a stopped benchmark.
Writes benchmark.json, benchmark.md and benchmark.html. Exit code 1 if outputs disagree or a case fails.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from html import escape
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, Literal

from ldm.commands.cli import read_options
from ldm.config import UserError

NETWORK, PICTURE, GRADIENT = 1e-4, 1.0, 1e-3  # tolerances, see Workload
LEAST, MOST = 0.2, 50  # seconds to time at once, and at most so many runs to reach them
HEAD = ("case", "ldm", "diffusers", "ratio", "peak memory, MB", "largest difference", "aim")
NOTE = (
    "Median [quartiles] of one run; ratio of the medians, theirs over ours, with its 95% bootstrap interval over the"
    " rounds; memory is the peak of a process with this case alone, ours / theirs."
)
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `ldm benchmark`."""

    out: Path  # folder for the results
    only: str | None = None  # workloads with commas; default: all
    rounds: int | None = None  # per case, fewer for slow ones; default: 11, with --quick 3
    threads: int = 0  # of each side; 0: all cores
    device: Literal["cpu", "cuda"] = "cpu"  # of both sides
    quick: bool = False  # only the first case of each workload
    compile: bool = False  # also with torch.compile on both sides


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Cases of one job, a function of `benchmark_jobs`: name -> its parameters."""

    job: str
    cases: dict[str, dict[str, Any]]
    sides: tuple[str, str] | tuple[str] = ("ldm", "diffusers")
    tolerance: float | None = NETWORK  # largest difference, relative to the largest value except for PICTURE
    aim: float | None = None  # least ratio, theirs over ours
    share: float = 1.0  # of --rounds, for slow cases


def latents(*batches: int) -> dict[str, dict[str, Any]]:
    """Cases of each model and size of latents."""
    sizes = (("shapes", 8), ("emoji", 8), ("sd-32", 16), ("sd-32", 32), ("sd-32", 64))
    every = [(model, side, batch) for model, side in sizes for batch in batches if side < 64 or batch == 1]
    return {f"{m} {s}x{s}, batch {b}": {"model": m, "side": s, "batch": b} for m, s, b in every}


VAES = {
    f"{m} {s} px, batch {b}": {"model": m, "size": s, "batch": b} for m, s, b in (("emoji", 64, 8), ("sd-32", 256, 1))
}
TRAINED = (("shapes", 8, 64), ("emoji", 8, 32), ("sd-32", 16, 8))
OURS = {"sides": ("ldm",), "tolerance": None}
WORKLOADS = {
    "import": Workload(job="program", cases={"the pipeline": {}}, tolerance=None),
    "cold-start": Workload(
        job="program", cases={"first 64 px picture": {"draws": True}}, tolerance=PICTURE, aim=2.5, share=0.6
    ),
    "unet-forward": Workload(job="unet", cases=latents(1)),
    "sampling": Workload(job="sampling", cases=latents(1, 8), tolerance=PICTURE, aim=0.95, share=0.5),
    "vae-encode": Workload(job="vae_encode", cases=VAES),
    "vae-decode": Workload(job="vae_decode", cases=VAES),
    "train-unet": Workload(
        job="train_unet",
        cases={f"{m} {s}x{s}, batch {b}": {"model": m, "side": s, "batch": b} for m, s, b in TRAINED},
        tolerance=GRADIENT,
    ),
    "train-clip": Workload(job="train_clip", cases={"64 px, against transformers": {"batch": 32}}, tolerance=GRADIENT),
    "train-vae": Workload(
        job="train_vae", cases={"emoji 64 px": {"model": "emoji", "size": 64, "batch": 8}}, tolerance=GRADIENT
    ),
    "data": Workload(
        job="data",
        cases={
            f"{d}, {n} workers, 256 pictures": {"name": d, "workers": n} for d in ("shapes", "emoji") for n in (0, 2)
        },
        **OURS,
    ),
    "features": Workload(job="features", cases={"effnet-lite0, 32 pictures": {"batch": 32}}, **OURS),
}
COMPILED = ("unet-forward", "sampling", "vae-decode")  # workloads of --compile


class WorkerFailed(Exception):
    """A side could not do its work; the text is one line."""


def main() -> None:
    """Measures, prints the table, writes the files."""
    options = check(read_options(Options, __doc__))
    chosen = choose(options)
    settings, file = environment(options), options.out / "benchmark.json"
    rows = kept_rows(file, settings)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as home:
        for name, (workload, params) in chosen.items():
            if "seconds" not in rows.get(name, {}):
                print(f"measuring {name}", file=sys.stderr)
                rows[name] = {"name": name} | measure(workload, params, options, home)
                file.write_text(json.dumps({"settings": settings, "rows": list(rows.values())}, indent=1))
    write(options.out, settings, list(rows.values()))
    failures = [f"error: {row['name']}: {row['problem']}" for row in rows.values() if row["problem"]]
    print("".join(line + "\n" for line in failures), end="", file=sys.stderr)
    sys.exit(1 if failures else 0)


def check(options: Options) -> Options:
    """The options with their defaults. Raises UserError for values out of range."""
    rounds = (3 if options.quick else 11) if options.rounds is None else options.rounds
    if rounds < 1:
        raise UserError(f"--rounds {rounds} is not allowed; give 1 or more")
    if not 0 <= options.threads <= 1024:
        raise UserError(f"--threads {options.threads} is not allowed; give 1 to 1024, or 0 for all cores")
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {str(options.out)!r} is a file; give a folder, which may be new")
    if options.device == "cuda":
        from ldm.distributed import find_device

        find_device(options.device)
    return replace(options, rounds=rounds, threads=options.threads or os.cpu_count())


def choose(options: Options) -> dict[str, tuple[Workload, dict]]:
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
                loose = replace(workload, tolerance=max(workload.tolerance, GRADIENT), aim=None)
                chosen[f"{name}: {case}, compiled"] = (loose, params | {"compile": True})
    return chosen


# --- one case


def measure(workload: Workload, params: dict[str, Any], options: Options, home: str) -> Row:
    """The raw times of a case, its comparison of outputs, and the `problem`, "" where there is none."""
    sides = [side for side in workload.sides if side == "ldm" or find_spec(side)]
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    try:
        with contextlib.ExitStack() as stack:
            children, first = {}, {}
            for side in sides:  # one after the other, as each tries memory layouts while it builds
                children[side] = Child(side, workload.job, params, options, home)
                stack.callback(children[side].process.kill)
                first[side] = children[side].receive()
            repeats = max(1, min(MOST, round(LEAST / max(child.ask(1) for child in children.values()))))
            for i in range(max(min(3, options.rounds), round(options.rounds * workload.share))):
                for side in sides if i % 2 == 0 else sides[::-1]:
                    seconds[side].append(children[side].ask(repeats))
            ends = [child.ask(0) for child in children.values()]
    except WorkerFailed as error:
        return {"problem": str(error)}
    outputs, peaks = zip(*ends, strict=True)
    row = {"seconds": seconds, "first": first, "peaks": [], "aim": workload.aim, "difference": None, "problem": ""}
    if workload.job != "program":  # its memory is that of another process
        row["peaks"] = peaks
    if workload.tolerance is not None and len(sides) == 2:
        row["difference"] = gap = largest_difference(*outputs, relative=workload.tolerance != PICTURE)
        row["problem"] = f"outputs differ by {gap:.2g}, allowed {workload.tolerance:g}" * (gap > workload.tolerance)
    return row


class Child:
    """A process that builds one case, then runs it as often as asked; the parent holds no torch, as Linux counts a
    parent's memory in the peak of a new process."""

    def __init__(self, side: str, job: str, params: dict[str, Any], options: Options, home: str):
        context = multiprocessing.get_context("spawn")
        os.environ |= {name: str(options.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
        self.side, (self.pipe, theirs) = side, context.Pipe()
        arguments = (theirs, side, job, params, options.threads, options.device, home)
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, repeats: int) -> Any:
        """Seconds per run; for 0 the outputs of the last run and the peak bytes."""
        self.pipe.send(repeats)
        return self.receive()

    def receive(self) -> Any:
        """The next reply; the first one is the seconds of the first run."""
        try:
            reply = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise WorkerFailed(f"{self.side}: its process ended with code {self.process.exitcode}") from None
        if isinstance(reply, WorkerFailed):
            raise WorkerFailed(f"{self.side}: {reply}")
        return reply


def serve(pipe: Any, side: str, job: str, params: dict, threads: int, device: str, home: str) -> None:
    """The work of a child process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches the parent, which ends this process
    sys.stdout = sys.stderr
    try:
        from ldm.commands import benchmark_jobs as jobs

        jobs.serve(pipe, jobs.build(side, job, params, threads, device, home))
    except Exception as error:
        pipe.send(WorkerFailed(f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"))


def largest_difference(ours: dict[str, Any], theirs: dict[str, Any], relative: bool) -> float:
    """The largest difference of arrays by name, infinite where names, shapes or finiteness differ; `relative` to the
    largest value of theirs."""
    import numpy as np

    if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in theirs.items()}:
        return float("inf")
    gaps = [np.abs(ours[k] - theirs[k]).max() / (np.abs(theirs[k]).max() if relative else 1.0) for k in theirs]
    return float(max(gaps)) if np.isfinite(gaps).all() else float("inf")


# --- the table


def environment(options: Options) -> Row:
    """The options, machine, versions and code that times depend on."""
    import psutil

    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    names = ("torch", "diffusers", "transformers", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names if find_spec(name)}
    machine = {"machine": platform.platform(), "cores": os.cpu_count(), "memory": psutil.virtual_memory().total}
    fixed = {name: value for name, value in asdict(options).items() if name not in ("out", "only", "compile")}
    return fixed | machine | versions | {"python": platform.python_version(), "code": digest.hexdigest()[:12]}


def kept_rows(file: Path, settings: Row) -> dict[str, Row]:
    """The rows of a stopped benchmark by name, none where its environment was another."""
    try:
        table = json.loads(file.read_text()) if file.exists() else {"settings": settings, "rows": []}
        rows = {row["name"]: row for row in table["rows"]}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{str(file)!r} is no benchmark; delete it or give another --out") from None
    if table.get("settings") == settings:
        return rows
    print(f"{file} is of other settings, versions or code: measuring anew", file=sys.stderr)
    return {}


def write(out: Path, settings: Row, rows: list[Row]) -> None:
    """Prints the table; writes it as Markdown and HTML."""
    lines = [list(HEAD), *(cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in lines]
    padded.insert(1, ["-" * width for width in widths])
    about = f"{NOTE}\n\n{', '.join(f'{name} {value}' for name, value in settings.items())}"
    markdown = "\n".join(f"| {' | '.join(line)} |" for line in padded) + f"\n\n{about}\n"
    (out / "benchmark.md").write_text(markdown)
    print(f"{markdown}\nwritten to {out}")
    body = "".join(f"<tr><td>{'<td>'.join(map(escape, line))}" for line in lines)
    page = f"<table>{body}</table><p>{escape(about)}</p>"
    head = "<!doctype html><html lang=en><meta charset=utf-8><title>Benchmark</title><style>td {padding: 0 1em}</style>"
    (out / "benchmark.html").write_text(head + page, encoding="utf-8")


def cells(row: Row) -> list[str]:
    """A row of the table; HEAD names its columns."""
    if "seconds" not in row:
        return [row["name"], "failed", row["problem"], *["-"] * 4]
    times, shown, aim = [time_text(seconds) for seconds in row["seconds"].values()], "-", "-"
    if len(times) == 2:
        value, low, high = ratio(row["seconds"]["diffusers"], row["seconds"]["ldm"])
        shown = f"{value:.2f}x [{low:.2f}, {high:.2f}]"
        aim = f"{row['aim']}x: {'met' if value >= row['aim'] else 'missed'}" if row["aim"] else "-"
    peaks = " / ".join(f"{peak / 2**20:.0f}" for peak in row["peaks"]) or "-"
    gap = "-" if row["difference"] is None else f"{'WRONG: ' * bool(row['problem'])}{row['difference']:.1e}"
    return [row["name"], times[0], *(times[1:] or ["-"]), shown, peaks, gap, aim]


def time_text(seconds: list[float]) -> str:
    """Median and quartiles in the unit that fits."""
    import numpy as np

    low, middle, high = np.quantile(seconds, (0.25, 0.5, 0.75))
    unit, factor = ("s", 1) if middle >= 1 else ("ms", 1e3)
    return f"{middle * factor:.3g} {unit} [{low * factor:.3g}, {high * factor:.3g}]"


def ratio(theirs: list[float], ours: list[float]) -> tuple[float, float, float]:
    """Median of `theirs` over median of `ours` with its 95% bootstrap interval over the rounds, drawn in pairs as they
    were measured (Efron 1979)."""
    import numpy as np

    draws = np.random.default_rng(0).integers(len(ours), size=(2000, len(ours)))
    ratios = np.median(np.array(theirs)[draws], 1) / np.median(np.array(ours)[draws], 1)
    return (median(theirs) / median(ours), *np.quantile(ratios, (0.025, 0.975)))
