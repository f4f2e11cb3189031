"""What the groups share: a row of the table, processes to kill, and a training that says where it is."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import tiny
import torch
import torch._dynamo  # optimizers import it; here, once for all children
import torch.utils.tensorboard  # noqa: F401
from ldm.train.run import Run
from test_train import lines_of, state_of

import ldm.train.loop
from ldm.commands.cli import run_script
from ldm.train.loop import TrainConfig

FORK = multiprocessing.get_context("fork")  # the imports, 4 s of every start, are made once
LIMIT = 300.0  # seconds that anything may take before it counts as hanging


class Row:
    """One row of the table: counts what was tried and keeps what went wrong."""

    def __init__(self, what: str, status: str = ""):
        self.what, self.status, self.count, self.notes = what, status, 0, []
        self.wrong: list[str] = []

    def expect(self, holds: bool, otherwise: str) -> None:
        """Notes `otherwise` as what went wrong, unless `holds`."""
        if not holds:
            self.wrong.append(otherwise)
            print(f"WRONG: {self.what}: {otherwise}", file=sys.stderr, flush=True)

    @property
    def outcome(self) -> str:
        """ok, FAILED, or why the row was not run."""
        return f"FAILED ({len(self.wrong)})" if self.wrong else self.status or "ok"

    def line(self) -> str:
        """As a line of a Markdown table."""
        wrong = [" ".join(text.replace("|", "/").split())[:200] for text in self.wrong[:3]]
        words = "; ".join(wrong or self.notes)
        return f"| {self.what} | {self.count:,} | {self.outcome} | {words} |"


class Child:
    """`work` in a process of its own, forked from this one; its stdout and stderr go into files beside `log`."""

    def __init__(self, work: Callable[[], None], log: Path):
        self.out, self.err = log.with_suffix(".out"), log.with_suffix(".err")
        log.parent.mkdir(parents=True, exist_ok=True)
        self.process = FORK.Process(target=self._inside, args=(work,))
        self.process.start()

    def _inside(self, work: Callable[[], None]) -> None:
        os.setsid()
        for stream, path in ((sys.stdout, self.out), (sys.stderr, self.err)):
            stream.flush()
            with path.open("wb") as file:
                os.dup2(file.fileno(), stream.fileno())
        torch.set_num_threads(1)
        work()

    def wait_for(self, word: str) -> bool:
        """Waits until it has printed a line that begins with `word`; False where it ends without."""
        end = time.monotonic() + LIMIT
        while time.monotonic() < end:
            alive = self.process.is_alive()
            if self.lines(word):
                return True
            if not alive:
                return False
            time.sleep(0.002)
        return False

    def send(self, number: int, group: bool = False) -> None:
        """A signal, to its loader's processes too with `group`."""
        (os.killpg if group else os.kill)(self.process.pid, number)

    def end(self, limit: float = LIMIT) -> int | None:
        """Its exit code once it has ended, minus the signal's number where one ended it; None where it hangs."""
        self.process.join(limit)
        if self.process.exitcode is None:
            self.send(signal.SIGKILL, group=True)
            self.process.join()
            return None
        return self.process.exitcode

    def lines(self, word: str) -> list[list[str]]:
        """What it printed in whole lines that begin with `word`, split at spaces."""
        text = self.out.read_text(errors="replace") if self.out.exists() else ""
        return [line.split() for line in text.split("\n")[:-1] if line.startswith(word)]

    def error(self) -> str:
        """What it wrote to stderr, without progress bars and the lines about signals."""
        lines = self.err.read_text(errors="replace").replace("\r", "\n").splitlines()
        return "\n".join(line for line in lines if line.strip() and "step/s" not in line and "?step" not in line)


class Reporting(Run):
    """A run that says where it is, in lines: began, step, saved."""

    def begin(self, start: int, *rest: object) -> None:
        super().begin(start, *rest)
        print("began", start, *hidden(self.out), flush=True)

    def step(self, batches: object, step: int) -> None:
        super().step(batches, step)
        print("step", step + 1, flush=True)

    def save(self, done: int, looked: bool = True) -> None:
        super().save(done, looked)
        print("saved", done, flush=True)


class Slow(tiny.Toy):
    """The toy with so many seconds a step."""

    def __init__(self, delay: float = 0.0):
        super().__init__()
        self.delay = delay

    def losses(self, modules: dict, batch: dict, step: int) -> object:
        time.sleep(self.delay)
        yield from super().losses(modules, batch, step)


def training(task: Callable[[], object], config: TrainConfig, out: Path) -> Callable[[], None]:
    """What a child does: trains as the scripts do, with exit codes, and says where it is."""

    def work() -> None:
        ldm.train.loop.Run = Reporting
        run_script(lambda: ldm.train.loop.train(task(), config, out, {}))

    return work


def hidden(out: Path) -> list[str]:
    """Names of half-written files and folders in a run folder."""
    return sorted(p.name for p in out.rglob("*") if p.name.startswith(".step-") or p.name.endswith((".tmp", ".part")))


def differences(a: Path, b: Path, step: int) -> str:
    """What differs between two finished runs, in words; "" where every tensor and every logged line is the same."""
    first, second = state_of(a, step), state_of(b, step)
    if first.keys() != second.keys():
        return f"other files or tensors: {sorted(first.keys() ^ second.keys())[:3]}"
    if unlike := [name for name in first if not torch.equal(first[name], second[name])]:
        return f"{len(unlike)} of {len(first)} tensors differ, e.g. {unlike[0]}"
    return "" if lines_of(a) == lines_of(b) else "metrics.jsonl differs"
