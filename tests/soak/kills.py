"""A training that saves all the time, killed or stopped at random moments, again and again."""

import random
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import tiny

from ldm.train import manifest
from ldm.train import state as run_state
from soak.common import Child, Row, Slow, differences, hidden, training

KILLS, STOPS, EVERY = 50, 20, 2
CONFIG = replace(tiny.TRAIN, save_every=EVERY, keep=2, log_every=2, ema_decay=0.9)


def kill(folder: Path, seed: int) -> list[Row]:
    """SIGKILL: what was reported as saved is there and whole, and the end is that of a run left alone."""
    row, draw, out = Row("`kill -9` of a training that saves every 2 steps"), random.Random(seed), folder / "killed"
    config, within = replace(CONFIG, steps=1_000_000), 0
    for number in range(KILLS):
        child = Child(training(Slow, config, out), folder / f"kill-{number}")
        if number % 5:
            row.expect(child.wait_for("began"), f"kill {number}: it did not start: {child.error()[-200:]}")
        time.sleep(draw.uniform(0.0, 0.6))
        child.send(signal.SIGKILL)
        row.expect(child.end() == -signal.SIGKILL, f"kill {number}: exit code {child.process.exitcode}")
        row.count += 1
        within += bool(hidden(out))
        _check_loss(row, number, child, out)
    newest = run_state.newest(out)
    last = (int(newest.name[-8:]) if newest else 0) + 11
    row.notes.append(f"{within} of them left a half-written file; killed at steps up to {last - 11:,}")
    _finish(row, folder, out, Slow, replace(config, steps=last))
    return [row]


def _check_loss(row: Row, number: int, child: Child, out: Path) -> None:
    if not child.lines("began"):  # killed while it started
        row.expect(not run_state.checkpoints(out) or run_state.newest(out) is not None, f"kill {number}: nothing left")
        return
    (began,) = child.lines("began")
    row.expect(len(began) == 2, f"kill {number}: left from before: {began[2:]}")
    saved = [int(words[1]) for words in child.lines("saved")] or [int(began[1])]
    done = [int(words[1]) for words in child.lines("step")] or [int(began[1])]
    newest = run_state.newest(out)  # warns of a damaged one: the row's warnings are errors
    have = int(newest.name[-8:]) if newest else 0
    row.expect(have >= saved[-1], f"kill {number}: step {saved[-1]} was saved, the newest whole one is {have}")
    row.expect(done[-1] - have <= EVERY, f"kill {number}: {done[-1] - have} steps lost, more than {EVERY}")


def _finish(row: Row, folder: Path, out: Path, task: object, config: object) -> None:
    """Lets the run end, and holds it against one that was never disturbed."""
    straight = folder / f"{out.name}-straight"
    for name, where in (("the end", out), ("the undisturbed run", straight)):
        plain = config if where == out else replace(config, save_every=0)
        child = Child(training(task, plain, where), folder / f"{where.name}-end")
        row.expect(child.end() == 0, f"{name}: exit code {child.process.exitcode}: {child.error()[-200:]}")
    row.expect(not hidden(out), f"left behind: {hidden(out)}")
    unlike = differences(out, straight, config.steps)
    row.expect(not unlike, f"unlike an undisturbed run: {unlike}")
    row.notes.append(unlike if unlike else "then bit-identical to an undisturbed run")


def stop(folder: Path, seed: int) -> list[Row]:
    """SIGTERM, to the process or its whole group: the step is saved, the exit code is 143."""
    row, draw, out = Row("SIGTERM at random moments"), random.Random(seed), folder / "stopped"
    task, config = partial(Slow, 0.01), replace(CONFIG, save_every=9, validate_every=4, steps=1_000_000)
    for number in range(STOPS):
        now = replace(config, workers=number % 2)  # may change from one start to the next
        child = Child(training(task, now, out), folder / f"stop-{number}")
        row.expect(child.wait_for("began"), f"stop {number}: it did not start: {child.error()[-200:]}")
        time.sleep(draw.uniform(0.0, 0.8))
        child.send(signal.SIGTERM, group=number % 4 > 1)
        row.count += 1
        row.expect(child.end() == 143, f"stop {number}: exit code {child.process.exitcode}: {child.error()[-200:]}")
        steps = child.lines("step")
        newest = run_state.newest(out)
        have = newest.name[-8:].lstrip("0") if newest else ""
        row.expect(bool(steps) and have == steps[-1][1], f"stop {number}: newest {have}, last step {steps[-1:]}")
        row.expect(f"at step {have}, which is saved" in child.error(), f"stop {number}: {child.error()[-200:]}")
        row.expect("Traceback" not in child.error(), f"stop {number}: {child.error()[-200:]}")
        row.expect(all(not manifest.problem(f) for f in run_state.checkpoints(out)), f"stop {number}: damaged")
    row.notes.append("exit code 143 and the step saved each time")
    _finish(row, folder, out, task, replace(config, steps=int(have or 0) + 11))
    return [row]
