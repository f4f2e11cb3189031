"""Two processes that train together, one of them killed: the other ends too, and both are taken up again."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from ldm.train import manifest
from ldm.train import state as run_state
from soak.common import Row, differences

STEPS, KILLS, BOUND = 150, 2, 120  # BOUND: seconds until all is over


def run(folder: Path, seed: int) -> list[Row]:
    """Each of the two is killed once in one training, held against one that was left alone."""
    row, draw, out = Row("two processes, one killed by SIGKILL"), random.Random(seed), folder / "killed"
    worst = 0.0
    for number in range(KILLS):
        process, log = _start(out, folder / f"kill-{number}")
        saved = run_state.newest(out)
        pids = _wait(row, process, log, out, saved)
        time.sleep(draw.uniform(0.0, 0.6))
        os.kill(pids[str(number % 2)], signal.SIGKILL)
        killed = time.monotonic()
        code = _end(process)
        worst = max(worst, time.monotonic() - killed)
        text = log.read_text(errors="replace")
        row.count += 1
        row.expect(code not in (None, 0), f"kill {number}: exit code {code}")
        row.expect("SIGKILL" in text or "Signal 9" in text, f"kill {number}: no message: {text[-300:]}")
        row.expect(not any(_alive(pid) for pid in pids.values()), f"kill {number}: a process lives on")
        newest = run_state.newest(out)
        row.expect(newest is not None and (saved is None or newest.name >= saved.name), f"kill {number}: {newest}")
        row.expect(all(not manifest.problem(f) for f in run_state.checkpoints(out)), f"kill {number}: damaged")
    for where in (out, folder / "straight"):
        process, log = _start(where, folder / f"end-{where.name}")
        row.expect(_end(process) == 0, f"{where.name}: {log.read_text(errors='replace')[-400:]}")
    unlike = differences(out, folder / "straight", STEPS)
    row.expect(not unlike, f"unlike an undisturbed run: {unlike}")
    row.notes.append(f"the other ended with a message within {worst:.0f} s; resumed, then {unlike or 'bit-identical'}")
    return [row]


def _start(out: Path, log: Path) -> tuple[subprocess.Popen, Path]:
    worker = Path(__file__).with_name("pair_worker.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(worker)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        command = [*launch, str(out), str(STEPS)]
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True), log


def _wait(row: Row, process: subprocess.Popen, log: Path, out: Path, saved: Path | None) -> dict[str, int]:
    """Waits for the first checkpoint after `saved`; the numbers of the processes by rank."""
    end = time.monotonic() + BOUND
    while time.monotonic() < end and process.poll() is None:
        found = run_state.checkpoints(out)
        if found and found[-1] != saved:
            break
        time.sleep(0.05)
    lines = [line.split() for line in log.read_text(errors="replace").splitlines() if line.startswith("pid ")]
    row.expect(len(lines) == 2, f"did not start: {log.read_text(errors='replace')[-400:]}")
    return {rank: int(pid) for _, rank, pid in lines}


def _end(process: subprocess.Popen) -> int | None:
    """The exit code, None where it hangs."""
    try:
        return process.wait(BOUND)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
