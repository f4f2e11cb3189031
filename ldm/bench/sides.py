"""The parent's end of the two worker processes."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

GRACE = 5.0  # seconds for a worker to end by itself


class WorkerFailed(Exception):
    """A worker could not do what it was told; the text says why in one line."""


def environment(threads: int) -> dict[str, str]:
    """The workers': so many threads, this package first, nothing fetched, nothing to say but errors."""
    root = str(Path(__file__).parents[2])
    found = dict(os.environ) | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    found["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    return found | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}


def command(side: str, threads: int, device: str, home: Path) -> list[str]:
    """What starts the worker of a side."""
    return [sys.executable, "-m", "ldm.bench.worker", side, str(threads), device, str(home)]


class Side:
    """A worker process, started when it is first asked something."""

    def __init__(self, command: Sequence[str], log: Path, env: dict[str, str] | None = None):
        self.command, self.log, self.env = list(command), log, env
        self.process: subprocess.Popen[str] | None = None

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The reply to a command. WorkerFailed where it says so, or has ended."""
        if self.process is None:
            with self.log.open("a") as log:
                self.process = subprocess.Popen(
                    self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=self.env
                )
        try:
            self.process.stdin.write(json.dumps({"do": do} | arguments) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.process.wait()
            self.close()
            raise WorkerFailed(f"its process ended with code {code} in {do!r}; see {self.log}")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerFailed(reply["error"])
        return reply

    def close(self) -> None:
        """Ends the process: it sees the end of its input; if it does not, it is killed."""
        if self.process is None:
            return
        process, self.process = self.process, None
        with suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def kill(self) -> None:
        """Ends the process at once."""
        if self.process is not None:
            self.process.kill()
        self.close()


def alternate(names: Sequence[str], round_: int) -> list[str]:
    """The order of a round: as given, and turned round in every second one."""
    return list(names) if round_ % 2 == 0 else list(names)[::-1]
