"""The process of one side: told over a pipe, a JSON line at a time, to build a case and to run it."""

import gc
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import IO, Any

Outputs = dict[str, Any]  # tensors by name


@dataclass(kw_only=True)
class Job:
    """A case made ready. `run` is what is timed; `outputs` makes tensors of what it gave, to compare."""

    run: Callable[[], Any]
    outputs: Callable[[Any], Outputs] = lambda found: found
    warm: Callable[[], Any] | None = None  # a shorter run that reaches all that the whole one does
    count: Callable[[], int] | None = None  # FLOPs of a run, where counting one would take long
    bytes_moved: int = 0  # at least: weights once for each time the model is asked, inputs and outputs
    about: dict[str, Any] = field(default_factory=dict)  # e.g. the layout chosen
    parts: Callable[[], dict[str, float]] | None = None  # seconds of the last runs by what they were spent on


Build = Callable[[dict], Job]


class Worker:
    """Answers commands about the one job it holds."""

    def __init__(self, build: Build):
        self.build, self.job, self.result = build, None, None

    def setup(self, case: dict) -> dict:
        """Builds a case; the one before is forgotten."""
        self.job = self.result = None
        gc.collect()
        start = perf_counter()
        self.job = self.build(case)
        reset_peak()
        return {"seconds": perf_counter() - start, "about": self.job.about, "built": resident()}

    def warm(self) -> dict:
        """The first run, or a shorter one in its place."""
        start = perf_counter()
        (self.job.warm or self.job.run)()
        synchronize()
        return {"seconds": perf_counter() - start}

    def run(self, repeats: int = 1) -> dict:
        """So many runs on end; seconds of one on average."""
        start = perf_counter()
        for _ in range(repeats):
            self.result = self.job.run()
        synchronize()
        return {"seconds": (perf_counter() - start) / repeats}

    def outputs(self, path: str) -> dict:
        """Writes what the last run gave."""
        import torch

        torch.save({name: value.detach().cpu() for name, value in self.job.outputs(self.result).items()}, path)
        return {}

    def count(self) -> dict:
        """FLOPs of a run and bytes that it moves at least."""
        flops = self.job.count() if self.job.count else count_flops(self.job.run)
        return {"flops": flops, "bytes": self.job.bytes_moved}

    def parts(self) -> dict:
        """Where the time of the last runs went."""
        return {"parts": self.job.parts() if self.job.parts else {}}

    def memory(self) -> dict:
        """The peak since the case was built, in bytes; of the CUDA allocator where that is used."""
        return {"peak": peak()}

    def rates(self) -> dict:
        """FLOP/s of the matrix product and bytes a second of a copy, the best of a few of each."""
        return measure_rates()


def serve(build: Build, requests: IO[str], replies: IO[str]) -> None:
    """Answers every line of `requests`, {"do": name, ...}, by a line: what the command gives, or {"error": text}."""
    worker = Worker(build)
    for line in requests:
        command = json.loads(line)
        try:
            reply = getattr(worker, command.pop("do"))(**command)
        except Exception as error:
            import traceback

            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def count_flops(run: Callable[[], Any]) -> int:
    """FLOPs of matrix products, convolutions and attention, a product and a sum counted apart; what torch's counter
    has no formula for (norms, activations, optimizers) is left out, so this is a lower bound."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def size_of(*modules: Any) -> int:
    """Bytes of the parameters."""
    return sum(p.nbytes for module in modules for p in module.parameters())


def sampling_job(sample: Callable[[int], list], steps: int, moved: int) -> Job:
    """The job of a function of the number of steps that gives PIL pictures; FLOPs are a line in the steps."""

    def count() -> int:
        first, second = (count_flops(lambda n=n: sample(n)) for n in (1, 2))
        return first + (steps - 1) * (second - first)

    few = min(steps, 2)
    return Job(
        run=lambda: sample(steps),
        warm=lambda: sample(few),
        outputs=picture_tensors,
        count=count,
        bytes_moved=moved,
    )


def picture_tensors(found: list) -> dict:
    """PIL pictures as one tensor of 0 to 255."""
    import numpy as np
    import torch

    return {"pictures": torch.from_numpy(np.stack([np.asarray(picture.convert("RGB")) for picture in found])).float()}


def measure_rates() -> dict:
    """The best of several sizes: square float32 products, and copies of 64 MB (read and written: 128 MB)."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
    flops = copied = 0.0
    for side in (512, 1024, 1536) if device.type == "cpu" else (4096, 8192):
        a = torch.ones(side, side, device=device)
        flops = max(flops, 2 * side**3 / min(_seconds(lambda a=a: a @ a) for _ in range(3)))
    source = torch.ones(16 * 2**20, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / min(_seconds(lambda: target.copy_(source)) for _ in range(3))
    return {"flops": flops, "bytes": copied}


def _seconds(run: Callable[[], Any]) -> float:
    synchronize()
    start = perf_counter()
    run()
    synchronize()
    return perf_counter() - start


def synchronize() -> None:
    """Waits for a GPU, where one is in use."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def reset_peak() -> None:
    """Lets the peak begin anew, where the system can: Linux does on a 5 in clear_refs (man 5 proc)."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def resident() -> int:
    """Bytes held now: of the CUDA allocator where that is used, else resident memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.memory_allocated()
    return _status("VmRSS") or _largest()


def peak() -> int:
    """The most bytes held since `reset_peak`, or since the process began where that has no effect."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM") or _largest()


def _status(name: str) -> int:
    """A size of this process by the system's name, 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def _largest() -> int:
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main(side: str, threads: int, device: str, home: str) -> None:
    """Serves one side on standard input and output; what is printed goes to standard error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a ctrl-C is the parent's, who ends this process
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(threads)
    if side == "ldm":
        from ldm.bench.ours import build
    else:
        from ldm.bench.theirs import build
    serve(lambda case: build(case, Path(home), torch.device(device)), sys.stdin, replies)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])
