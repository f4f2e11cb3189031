"""The cost of an image: time, memory, and the size of the model."""

import ctypes
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import torch

from ldm.evaluate.evaluation import Evaluation
from ldm.evaluate.pictures import SAMPLING
from ldm.evaluate.records import Record

TIMED = 8  # images


def cost_records(e: Evaluation, g: float) -> list[Record]:
    """Seconds and bytes per image, in a batch after a first one to warm up, and parameters.

    Memory is what the batch takes beyond weights and all else, shared by its images; None where the system does not
    tell. `peak` is that of the process (on a GPU: of torch).
    """
    captions, device = e.captions[:TIMED], e.pipe.device
    options = {key: e.settings[key] for key in SAMPLING} | {"guidance": g, "batch_size": len(captions)}
    sample = partial(e.pipe, captions, **options)
    sample()
    before = _reset_peak(device)
    start = time.perf_counter()
    sample()
    seconds = (time.perf_counter() - start) / len(captions)
    peak = _peak(device)
    memory = (peak - before) / len(captions) if before else None
    values = {"seconds_per_picture": seconds, "parameters": sum(e.settings["parameters"].values())}
    base = {
        "of": "samples",
        "n": len(captions),
        **e.about(g),
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    records = [{"metric": metric, "value": value, **base} for metric, value in values.items()]
    return [*records, {"metric": "memory_per_picture_bytes", "value": memory, "peak": peak, **base}]


def _reset_peak(device: torch.device) -> int:
    """The bytes in use now, from which a new peak counts; 0 where the peak cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # free memory of the process would hide what a batch takes
        Path("/proc/self/clear_refs").write_text("5")
        return psutil.Process().memory_info().rss
    except (OSError, AttributeError, TypeError):  # not Linux, or another C library
        return 0


def _peak(device: torch.device) -> int:
    """The most bytes since then, or so far where the peak cannot be reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
