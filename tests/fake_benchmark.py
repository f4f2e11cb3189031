"""Workers whose failures and memory the case decides, without torch: `python fake_benchmark.py SIDE CALLS` is one;
`python fake_benchmark.py run OUT` measures two cases with such, of which the second hangs."""

import os
import signal
import sys
import time
from pathlib import Path

from ldm.bench import bench, worker
from ldm.bench.cases import Case
from ldm.bench.measure import Settings
from ldm.bench.sides import Side

ROOT = Path(__file__).parent.parent
ENV = dict(os.environ) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
SETTINGS = Settings(rounds=4, threads=1, device="cpu", quick=False)


def build(side: str, calls: Path, case: dict) -> worker.Job:
    """A job that notes its side in the file `calls`."""
    params = case["params"]

    def run() -> None:
        with calls.open("a") as file:
            file.write(f"{side}\n")
        if params.get("dies") == side:
            os._exit(3)
        if params.get("hangs") == side:
            time.sleep(600)
        if params.get("fails") == side:
            raise ValueError("two\nlines")
        if params.get("fills") == side:
            bytearray(200 * 2**20)

    return worker.Job(run=run, count=lambda: 100, bytes_moved=10, about={"side": side})


def case(name: str = "sampling/fake", **changes) -> Case:
    """A case of these workers."""
    return Case(**{"name": name, "kind": "fake", "memory": False, "tolerance": None} | changes)


class Workers:
    """Stands for bench.Workers."""

    def __init__(self, folder: Path):
        self.folder, self.started = folder, []
        self.sides = {name: self.start(name) for name in bench.NAMES}

    def start(self, name: str) -> Side:
        line = [sys.executable, __file__, name, str(self.folder / "calls")]
        self.started.append(Side(line, self.folder / "log", ENV))
        return self.started[-1]

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        for each in self.started:
            each.kill()


def measured(out: Path, *wanted: Case) -> dict:
    """The benchmark of these cases."""
    return bench.run(list(wanted), out, SETTINGS, lambda home: Workers(out))


def main(side: str, place: str) -> None:
    if side == "run":
        from ldm.commands.cli import run_script

        hangs = case("sampling/two", params={"hangs": "ldm"})
        run_script(lambda: measured(Path(place), case("sampling/one"), hangs))
    else:
        from signal import SIG_IGN, SIGINT, signal

        signal(SIGINT, SIG_IGN)
        worker.measure_rates = lambda: {"flops": 1e9, "bytes": 1e9}
        worker.serve(lambda given: build(side, Path(place), given), sys.stdin, sys.stdout)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    main(sys.argv[1], sys.argv[2])
