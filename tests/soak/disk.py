"""No room: a limit on the size of files, a full disk. What was saved is whole, with room the training goes on."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import tiny

from ldm.train import manifest
from ldm.train import state as run_state
from soak.common import Child, Row, differences, hidden, training
from soak.models import finish
from soak.resume import stopped_at

STEPS = 12
CONFIG = replace(tiny.TRAIN, steps=STEPS, save_every=2, keep=2, log_every=1, validate_every=3, preview_every=4)
BLOCK = 4096


class Large(tiny.Toy):
    """The toy with a first layer of so many inputs: states of some 100 kB to fill a small disk with."""

    def __init__(self) -> None:
        super().__init__()
        self.modules["third"] = tiny.nn.Linear(100, 200)

    def losses(self, modules: dict, batch: dict, step: int) -> object:
        yield from super().losses(modules, batch, step)
        yield "third", modules["third"](batch["x"].repeat(1, 34)[:, :100]).square().mean(), {}


def run(folder: Path, seed: int) -> list[Row]:
    """Both rows, against one undisturbed run."""
    rows = [Row("a limit on the size of files (RLIMIT_FSIZE)"), Row("a full disk (a small tmpfs)")]
    finish(rows[0], folder / "straight-log", Large, CONFIG, folder / "straight")
    _limited(rows[0], folder)
    _full(rows[1], folder)
    return rows


def _refused(row: Row, where: str, child: Child, out: Path, before: list[str]) -> None:
    """One line and exit code 2; the checkpoints from before are there and whole."""
    code = child.end()
    time.sleep(0.1)  # for what copies its last line
    error = child.error()
    lines = [line for line in error.splitlines() if line.startswith("error:")]
    row.expect(code == 2 and len(lines) == 1 and "Traceback" not in error, f"{where}: exit code {code}: {error[-300:]}")
    have = [f.name for f in run_state.checkpoints(out) if not manifest.problem(f)]
    row.expect(not before or bool(have) and have[-1] >= before[-1], f"{where}: {before} before, {have} now")
    row.count += 1


def _goes_on(row: Row, where: str, folder: Path, out: Path) -> None:
    finish(row, folder / f"end-{where}", Large, CONFIG, out)
    unlike = differences(out, folder / "straight", STEPS)
    row.expect(not unlike and not hidden(out), f"{where}: then {unlike or hidden(out)}")


def _limited(row: Row, folder: Path) -> None:
    """A limit just below the size of each kind of file that a run writes, from the largest to the smallest."""
    base = folder / "base"
    finish(row, folder / "base-log", stopped_at(Large, 4, signal.SIGTERM), CONFIG, base, code=143)
    before = [f.name for f in run_state.checkpoints(base)]
    sizes = {p.stat().st_size for p in (folder / "straight").rglob("*") if p.is_file() and p.stat().st_size > 4}
    limits = sorted({size - 1 for size in sizes}, reverse=True)
    for limit in limits:
        out = folder / f"limit-{limit}"
        shutil.copytree(base, out)

        def work(limit: int = limit, out: Path = out) -> None:
            _out_through_pipes()
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            training(Large, CONFIG, out)()

        child = Child(work, folder / f"log-limit-{limit}")
        if child.end() == 0:  # files that grow with the time, as the names in them
            continue
        _refused(row, f"limit {limit}", child, out, before)
        _goes_on(row, f"limit-{limit}", folder, out)
    row.notes.append(f"limits of {limits[-1]:,} to {limits[0]:,} bytes; exit code 2 in one line, then bit-identical")


def _out_through_pipes() -> None:
    """Lets other processes write the logs, which the limit would hold for as well."""
    for stream in (sys.stdout, sys.stderr):
        other = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=stream)
        os.dup2(other.stdin.fileno(), stream.fileno())


def _full(row: Row, folder: Path) -> None:
    """Disks of several sizes, each filled up; then the filling is taken away."""
    disk = folder / "disk"
    disk.mkdir()
    sizes = range(10, 100, 9)
    for free in sizes:
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True).returncode:
            row.status = "not run"
            row.notes.append("a disk cannot be mounted here (root may)")
            return
        try:
            _filled(row, f"{free}-blocks", folder, disk, free * BLOCK)
        finally:
            subprocess.run(["umount", disk], check=True)
    row.notes.append(
        f"{row.count} of {len(sizes)} disks with {sizes[0] * 4} to {sizes[-1] * 4} KiB free were too small"
    )
    row.notes.append("exit code 2 in one line, old checkpoint whole, then bit-identical")


def _filled(row: Row, where: str, folder: Path, disk: Path, free: int) -> None:
    out: Path = disk / "run"
    finish(row, folder / f"full-base-{where}", stopped_at(Large, 4, signal.SIGTERM), CONFIG, out, code=143)
    before = [f.name for f in run_state.checkpoints(out)]
    (disk / "filling").write_bytes(bytes(max(shutil.disk_usage(disk).free - free, 0)))
    child = Child(training(Large, CONFIG, out), folder / f"full-{where}")
    if child.end() == 0:
        return
    _refused(row, where, child, out, before)
    (disk / "filling").unlink()
    _goes_on(row, where, folder, out)
