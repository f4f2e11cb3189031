"""Shared by the groups: a row of the table, child processes, and trainings that print where they are."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny
import torch
import torch._dynamo  # optimizers import it; here, once for all children
import torch.utils.tensorboard  # noqa: F401
from inventory_tools import metrics

from ldm.commands.cli import run_command
from ldm.train.autoencoder import AutoencoderTask
from ldm.train.clip import CLIPTask
from ldm.train.config import TrainConfig
from ldm.train.diffusion import DiffusionTask
from ldm.train.loop import train

FORK = multiprocessing.get_context("fork")  # imports, 4 s of every start, are made once
LIMIT = 300.0  # seconds until a process counts as hanging
Work = Callable[[], Any]


class Row:
    """One row of the table: counts the cases and keeps the failures."""

    def __init__(self, name: str):
        self.name, self.count, self.notes, self.failures, self.status = name, 0, [], [], "ok"

    def expect(self, holds: bool, failure: str) -> None:
        """Notes `failure` unless `holds`."""
        if not holds:
            self.failures.append(failure)
            self.status = f"FAILED ({len(self.failures)})"
            print(f"FAILED: {self.name}: {failure}", file=sys.stderr, flush=True)

    def line(self) -> str:
        """A line of a Markdown table."""
        texts = [" ".join(text.replace("|", "/").split())[:200] for text in self.failures[:3]]
        return f"| {self.name} | {self.count:,} | {self.status} | {'; '.join(texts or self.notes)} |"


class Child:
    """`work` in a process forked from this one; its stdout and stderr go into files beside `log`."""

    def __init__(self, work: Work, log: Path):
        self.out, self.err = log.with_suffix(".out"), log.with_suffix(".err")
        log.parent.mkdir(parents=True, exist_ok=True)
        self.process = FORK.Process(target=self._run, args=(work,))
        self.process.start()

    def _run(self, work: Work) -> None:
        os.setsid()
        for stream, path in ((sys.stdout, self.out), (sys.stderr, self.err)):
            stream.flush()
            with path.open("wb") as file:
                os.dup2(file.fileno(), stream.fileno())
        torch.set_num_threads(1)
        work()

    def steps(self) -> list[int]:
        """The steps, from 0, that a `watched` training has begun."""
        lines = self.out.read_text(errors="replace").split("\n")[:-1] if self.out.exists() else []
        return [int(line.split()[1]) for line in lines if line.startswith("begins ")]

    def wait(self) -> None:
        """Waits for the first step."""
        end = time.monotonic() + LIMIT
        while time.monotonic() < end and self.process.is_alive() and not self.steps():
            time.sleep(0.002)

    def end(self, limit: float = LIMIT) -> int | None:
        """The exit code, minus the number of a signal that ended it; None where it hangs."""
        self.process.join(limit)
        if self.process.exitcode is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.join()
            return None
        return self.process.exitcode

    def error(self) -> str:
        """Its stderr without progress bars."""
        lines = self.err.read_text(errors="replace").replace("\r", "\n").splitlines()
        return "\n".join(line for line in lines if line.strip() and "step/s" not in line and "?step" not in line)

    def refused(self) -> bool:
        """Whether it ended with exit code 2 and one line of error."""
        return self.end() == 2 and one_error(self.error())


def one_error(text: str) -> bool:
    """Whether stderr holds one line of error and no traceback."""
    return "Traceback" not in text and sum(line.startswith("error:") for line in text.splitlines()) == 1


def watched(make: Work, delay: float = 0.0, stop: int = -1, number: int = 0) -> Work:
    """A task that prints each step, takes `delay` seconds per step, and gets a signal within the step `stop`."""

    def made() -> Any:
        task, sent = make(), []
        losses = task.losses

        def changed(modules: dict, batch: dict, step: int, *rest: Any) -> Any:
            print("begins", step, flush=True)
            time.sleep(delay)
            if step == stop and not sent:
                sent.append(number)  # once: a second signal ends the process
                signal.raise_signal(number)
            return losses(modules, batch, step, *rest)

        task.losses = changed
        return task

    return made


def training(make: Work, config: TrainConfig, out: Path) -> Work:
    """A training with the exit codes of the command."""
    return lambda: run_command(lambda: train(make(), config, out, {}))


def finish(row: Row, make: Work, config: TrainConfig, out: Path, log: Path, code: int = 0) -> Child:
    """Trains in a child to its end; the exit code must be `code`."""
    child = Child(training(make, config, out), log)
    row.expect(child.end() == code, f"{log.name}: exit code {child.process.exitcode}: {child.error()[-300:]}")
    return child


def trained(row: Row, folder: Path) -> dict[str, Work]:
    """Trains the smallest models into `autoencoder`, `clip` and `diffusion` of `folder`; returns their tasks."""
    cache = str(folder / "latents.safetensors")
    tasks = {
        "autoencoder": lambda: AutoencoderTask(tiny.autoencoder(loss=replace(tiny.LOSS, gan_start=5, gan_ramp=4))),
        "clip": lambda: CLIPTask(tiny.clip(grounding=tiny.READERS)),
        "diffusion": lambda: DiffusionTask(tiny.diffusion(folder / "autoencoder", folder / "clip", cache=cache)),
    }
    for name, task in tasks.items():
        finish(row, task, replace(tiny.TRAIN, save_every=2), folder / name, folder / f"{name}-log")
    return tasks


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((out / "checkpoints").glob("step-*"))


def identical(a: Path, b: Path) -> bool:
    """Whether two finished runs have the same last state and log, and no half-written files."""
    hidden = [p for p in a.rglob("*") if p.name.startswith(".step-") or p.suffix in (".tmp", ".part")]
    last = (tiny.tensors(checkpoints(run)[-1]) for run in (a, b))
    return not hidden and metrics(a) == metrics(b) and tiny.same(*last)
