"""What a picture costs: time, memory, size of the model."""

import ctypes
import re
import sys
import time
from functools import partial
from pathlib import Path

import torch

from ldm.evaluate.bench import Bench
from ldm.evaluate.records import Record

TIMED = 8  # pictures


def efficiency(bench: Bench, g: float) -> list[Record]:
    """Seconds and memory a picture, in a batch after a first one to warm up, and parameters.

    Memory is what the batch took beyond what was there before it, weights among that, shared by its pictures, in bytes;
    where the system does not tell this, there is only the peak. `peak` is that of the process (on a GPU: of torch).
    """
    s, device = bench.settings, bench.pipe.device
    captions = bench.captions[:TIMED]
    options = {"guidance": g, "guidance_rescale": s["guidance_rescale"], "steps": s["steps"], "sampler": s["sampler"]}
    make = partial(bench.pipe, captions, batch_size=len(captions), **options)
    make()
    before = _reset_peak(device)
    start = time.perf_counter()
    make()
    seconds = (time.perf_counter() - start) / len(captions)
    peak = _peak(device)
    about = {"of": "samples", "n": len(captions), "guidance": g, **bench.about, "device": str(device)}
    about["threads"] = torch.get_num_threads()
    found = [
        {"metric": "seconds_per_picture", "value": seconds, **about},
        {"metric": "parameters", "value": sum(s["parameters"].values()), **about},
    ]
    if peak:
        each = (peak - before) / len(captions) if before else None
        found.append({"metric": "memory_per_picture_bytes", "value": each, "peak": peak, **about})
    return found


def _reset_peak(device: torch.device) -> int:
    """Begins to look for a peak anew; gives the bytes that are used now, 0 where that cannot be done."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is free already would hide what a batch takes
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except (OSError, AttributeError, TypeError):  # not Linux, or another C library
        return 0


def _peak(device: torch.device) -> int:
    """The most bytes since then; of the process so far where that cannot be told, 0 where nothing can."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return _status("VmHWM")
    except (OSError, TypeError):
        pass
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(key: str) -> int:
    """Bytes by the kernel's account of this process (OSError, TypeError)."""
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
