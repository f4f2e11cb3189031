"""Measures speed and memory of this project and of diffusers on the same weights and inputs.

ldm benchmark --out outputs/benchmark

Each side runs in a fresh process per case, in alternating rounds. Writes benchmark.json, .md and .html after each case.
Exit code 1 if outputs disagree or a case fails.
"""

import json
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from html import escape
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ldm.commands.cli import markdown_table, read_options
from ldm.config import Dtype, UserError

SINGLE = (("shapes", 32, 1), ("emoji", 64, 1), ("emoji", 128, 1), ("emoji", 256, 1))  # model, pixels, batch
EIGHT = (("shapes", 32, 8), ("emoji", 64, 8), ("emoji", 128, 8))
TURBO = (("shapes-turbo", 32, 1), ("emoji-turbo", 64, 1), ("emoji-turbo", 64, 8))  # beside their teachers
WORKLOADS = {  # largest difference of outputs, relative to the largest value (None: ours alone), and cases
    "unet-forward": (1e-4, SINGLE),
    "sampling": (1 / 200, SINGLE + EIGHT + TURBO),  # a level of 255 is below that
    "vae": (1e-4, (("emoji", 64, 8), ("emoji", 256, 1))),
    "train-unet": (1e-3, (("shapes", 32, 64), ("emoji", 64, 32), ("emoji", 128, 8))),
    "data": (None, (("shapes", 32, 32), ("emoji", 64, 32))),
}
GPU = {  # instead on a GPU; sd15 is emoji with a random U-Net of Stable Diffusion 1.5's sizes
    "sampling": (1 / 200, (("emoji", 64, 1), ("emoji", 64, 8), ("sd15", 512, 1), ("sd15", 512, 8))),
    "train-unet": (1e-3, (("emoji", 64, 64), ("sd15", 512, 8))),
}
HALF = 50  # times the difference is allowed in half precision
HEAD = ("case", "ldm, ms", "diffusers, ms", "ratio", "peak memory, MB", "largest difference", "matmul rate", "busy")
NOTE = """Median of one run; ratio of the medians, theirs over ours, with its 95% bootstrap interval over the rounds;
memory is the peak of a process with this case alone, ours / theirs. On a GPU also FLOPs per second as a share of those
of a large matrix product, and the share of the time in which a kernel runs."""
PAGE = "<!doctype html><html lang=en><meta charset=utf-8><title>Benchmark</title><pre>{}</pre>"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `ldm benchmark`."""

    out: Path  # folder for the results
    only: str = ",".join(WORKLOADS)  # workloads to run, separated by commas
    rounds: int = 7  # measurements per case
    threads: int = 0  # CPU threads per side; 0: all cores
    device: Literal["cpu", "cuda"] = "cpu"  # device of both sides
    dtype: Dtype = "auto"  # of both sides; auto: what a GPU is fast in, bfloat16 or float16; float32 on CPUs
    quick: bool = False  # run only the first case of each workload
    compile: bool = False  # also with compiled models, on CPUs sampling, where those of diffusers stay as they are


class Case(NamedTuple):
    """One row of the table, and whose code runs."""

    workload: str
    model: str
    size: int  # of the pictures, in pixels
    batch: int
    compiled: bool
    device: str
    dtype: str
    ours: bool = True

    def __str__(self) -> str:
        return f"{self.workload}: {self.model} {self.size} px, batch {self.batch}" + ", compiled" * self.compiled


def main() -> None:
    """Measures, prints the table, writes the files."""
    o = read_options(Options, __doc__)
    cases, rows = choose(o), []
    o.out.mkdir(parents=True, exist_ok=True)
    settings = {"device": o.device, "dtype": cases[0].dtype, "rounds": o.rounds, "threads": o.threads or os.cpu_count()}
    os.environ |= {"OMP_NUM_THREADS": str(settings["threads"]), "HF_HUB_OFFLINE": "1", "DIFFUSERS_VERBOSITY": "error"}
    settings |= {name: version(name) for name in ("torch", "diffusers", "transformers", "numpy") if find_spec(name)}
    note = f"{NOTE}\n\n{', '.join(f'{name} {value}' for name, value in settings.items())}\n"
    for case in cases:
        print(f"measuring {case}", file=sys.stderr)
        rows.append({"name": str(case)} | measure(case, o.rounds))
        table = f"{markdown_table(HEAD, *map(cells, rows))}\n{note}"
        (o.out / "benchmark.json").write_text(json.dumps({"settings": settings, "rows": rows}, indent=1))
        (o.out / "benchmark.md").write_bytes(table.encode())
        (o.out / "benchmark.html").write_bytes(PAGE.format(escape(table)).encode())
    print(f"{table}\nwritten to {o.out}")
    sys.exit("\n".join(f"error: {row['name']}: {row['problem']}" for row in rows if row["problem"]) or 0)


def choose(o: Options) -> list[Case]:
    """The cases to measure. Raises UserError for options out of range."""
    if o.rounds < 1 or o.threads < 0:
        raise UserError(f"--rounds {o.rounds} --threads {o.threads} is not allowed; give 1 or more, and 0 or more")
    if o.out.exists() and not o.out.is_dir():
        raise UserError(f"--out {str(o.out)!r} is a file; give a folder, which may be new")
    cases, dtype, workloads, compiles = [], o.dtype.replace("auto", "float32"), WORKLOADS, ("sampling",)
    if o.device == "cuda":
        from ldm.distributed import find_device, find_dtype

        dtype = str(find_dtype(o.dtype, find_device(o.device))).removeprefix("torch.")
        workloads, compiles = WORKLOADS | GPU, GPU
    for name in map(str.strip, o.only.split(",")):
        if name not in WORKLOADS:
            raise UserError(f"workload {name!r} is unknown; known: {', '.join(WORKLOADS)}")
        modes = sorted({False, o.compile and name in compiles})
        for row in workloads[name][1][: 1 if o.quick else None]:
            cases += [Case(name, *row, compiled, o.device, dtype) for compiled in modes]
    return cases


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """The raw times of a case, its peaks of memory and comparison of outputs, and the `problem`, "" where there is
    none; the problem alone where a side cannot do its work.

    This process imports no torch, as Linux counts its memory in the peak of a new process.
    """
    tolerance, spawn = WORKLOADS[case.workload][0], multiprocessing.get_context("spawn")
    sides = ("ldm", "diffusers") if tolerance else ("ldm",)
    seconds, outputs, peaks, costs = {side: [] for side in sides}, {}, {}, {}
    with ExitStack() as stack:
        workers = {side: stack.enter_context(ProcessPoolExecutor(1, spawn, end_with_parent)) for side in sides}
        for i in range(rounds + 1):
            for side in sides[:: (-1) ** i]:
                reply = workers[side].submit(run, case._replace(ours=side == "ldm"))
                if error := reply.exception():
                    return {"problem": f"{side}: {type(error).__name__}: {' '.join(str(error).split())[:400]}"}
                duration, outputs[side], peaks[side], costs[side] = reply.result()
                seconds[side] += [duration] if i else []  # the first round warms up
    row = {"seconds": seconds, "peaks": [*peaks.values()], "difference": None, "problem": ""}
    row["shares"] = [[cost / np.median(seconds[side]) for cost in costs[side]] for side in sides]
    if tolerance and not case.model.endswith("-turbo"):
        a, b = outputs.values()
        row["difference"] = gap = float(np.abs(a - b).max() / np.abs(b).max())  # NaN where there is one
        tolerance *= 1 if case.dtype == "float32" else HALF
        row["problem"] = "" if gap <= tolerance else f"outputs differ by {gap:.2g}, allowed {tolerance:g}"
    return row


def end_with_parent() -> None:
    """Lets a child process end with the benchmark, and at ctrl-C in silence."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: os._exit(parent.join() or 1), daemon=True).start()


def run(case: Case) -> tuple[float, np.ndarray, int, tuple[float, ...]]:
    """In a child process: `measured` of a case."""
    from ldm.commands.benchmark_jobs import measured

    return measured(case)


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table; HEAD names its columns."""
    if "seconds" not in row:
        return [row["name"], "failed", row["problem"], *"-----"]
    line = [row["name"], *(f"{1e3 * np.median(seconds):,.4g}" for seconds in row["seconds"].values())]
    peaks = " / ".join(f"{peak / 2**20:.0f}" for peak in row["peaks"])
    shares = [" / ".join(f"{share:.0%}" for share in both) for both in zip(*row["shares"], strict=True)] or [*"--"]
    if len(row["seconds"]) == 1:
        return [*line, "-", "-", peaks, "-", *shares]
    compared = "{:.2f}x [{:.2f}, {:.2f}]".format(*ratio(**row["seconds"]))
    difference = "-" if row["difference"] is None else f"{row['difference']:.1e}"
    return [*line, compared, peaks, "WRONG: " * bool(row["problem"]) + difference, *shares]


def ratio(ldm: list[float], diffusers: list[float]) -> tuple[float, float, float]:
    """Median of `diffusers` over that of `ldm` with its 95% bootstrap interval over the rounds, drawn in pairs as they
    were measured (Efron 1979)."""
    pairs, rounds = np.array([diffusers, ldm]), len(ldm)
    draws = np.random.default_rng(0).integers(rounds, size=(2000, rounds))
    (theirs, ours), drawn = np.median(pairs, 1), np.median(pairs[:, draws], 2)
    return (theirs / ours, *np.quantile(drawn[0] / drawn[1], (0.025, 0.975)))
