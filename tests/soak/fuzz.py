"""2,000 inputs made wrong at random: each opens, or is refused in one line; none takes much memory or time."""

import io
import os
import random
import resource
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from ldm.commands.cli import run_script
from soak.common import Row
from soak.inputs import Inputs, Work
from soak.models import trained

ROOT = Path(__file__).parents[2]
MEMORY, SECONDS = 3 * 2**30, 30  # what one input may take


def run(folder: Path, seed: int) -> list[Row]:
    """A row for each kind of input, and one for a sample of them on the real command line."""
    first = Row("fuzzed")
    trained(first, folder)
    inputs = Inputs(folder, random.Random(seed))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    signal.signal(signal.SIGALRM, _too_long)
    rows = [_many(what, count, make) for what, (count, make) in inputs.kinds.items()]
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    rows[0].wrong += first.wrong
    return [*rows, _commands(inputs)]


def _too_long(number: int, frame: object) -> None:
    raise AssertionError(f"more than {SECONDS} s")


def _many(what: str, count: int, make: Callable[[], tuple[str, Work]]) -> Row:
    """Counts how the inputs end; the same mistake at the same line is named once."""
    row, seen, slowest, refused = Row(f"fuzzed {what}"), {}, 0.0, 0
    for _ in range(count):
        about, work = make()
        start = time.monotonic()
        code, problem = _ends(work)
        slowest = max(slowest, time.monotonic() - start)
        row.count += 1
        refused += code == 2
        place = problem.split(": ")[0]
        seen[place] = seen.get(place, 0) + bool(problem)
        if problem and seen[place] == 1:
            row.expect(False, f"{problem} ({about[:300]!r})")
    row.notes.append(f"{refused} refused in one line, {row.count - refused} opened; slowest {slowest:.1f} s")
    return row


def _ends(work: Work) -> tuple[int, str]:
    """The exit code of `work` as a script, and what is wrong with how it ended."""
    out = io.StringIO()
    signal.alarm(SECONDS)
    try:
        with redirect_stderr(out), redirect_stdout(io.StringIO()), warnings.catch_warnings():
            run_script(work)
        return 0, ""
    except SystemExit as stop:
        errors = [line for line in out.getvalue().split("\n") if line.startswith("error:")]
        return stop.code, "" if stop.code == 2 and len(errors) == 1 else f"exit code {stop.code}, {len(errors)} errors"
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "/ldm/" in f.filename or "/scripts/" in f.filename]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
        return 1, f"{type(error).__name__} at {where}: {str(error)[:100]}"
    finally:
        signal.alarm(0)


def _commands(inputs: Inputs) -> Row:
    """A sample of them through the scripts, in processes of their own."""
    row = Row("fuzzed input on the command line")
    for arguments in inputs.commands():
        command = [sys.executable, str(ROOT / "scripts" / arguments[0]), *arguments[1:]]
        done = subprocess.run(command, capture_output=True, timeout=300, cwd=inputs.folder)
        error = done.stderr.decode(errors="replace")
        errors = [line for line in error.splitlines() if line.startswith("error:")]
        row.count += 1
        fine = done.returncode in (0, 2) and "Traceback" not in error and len(errors) == (done.returncode == 2)
        row.expect(fine, f"{arguments}: exit code {done.returncode}: {error[-300:]}")
    row.notes.append("exit code 0, or 2 with one line")
    return row
