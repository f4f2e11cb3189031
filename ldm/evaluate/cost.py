"""The cost of an image: time, memory, and the size of the model."""

import ctypes
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ldm.evaluate.evaluation import Evaluation
from ldm.evaluate.records import Record, record

TIMED = 8  # images


def cost_records(e: Evaluation, g: float) -> list[Record]:
    """Seconds and bytes per image, in a batch after a first one to warm up, and parameters.

    Memory is what the batch takes beyond weights and all else, shared by its images; None where the system does not
    tell. `peak` is that of the process (on a GPU: of torch).
    """
    captions, device, about = e.captions[:TIMED], e.pipe.device, e.samples[g].about
    options = {key: value for key, value in about.items() if key != "of"}
    sample = partial(e.pipe, captions, batch_size=len(captions), **options)
    sample()
    start = time.perf_counter()
    sample()
    seconds = (time.perf_counter() - start) / len(captions)
    before, peak = _memory(sample, device)
    fields = {"n": len(captions), **about, "device": str(device), "threads": torch.get_num_threads()}
    return [
        record("seconds_per_picture", seconds, **fields),
        record("parameters", sum(e.settings["parameters"].values()), **fields),
        record("memory_per_picture_bytes", before and (peak - before) / len(captions), peak=peak, **fields),
    ]


def _memory(work: Callable[[], Any], device: torch.device) -> tuple[int | None, int]:
    """The bytes in use before some work, None where the system does not tell, and the most until its end."""
    import psutil

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return before, torch.cuda.max_memory_allocated(device)
    memory, before = psutil.Process().memory_info, None
    try:
        ctypes.CDLL(None).malloc_trim(0)  # free memory of the process would hide what a batch takes
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts anew from here
        before = memory().rss
        work()
    except (OSError, AttributeError, TypeError):  # not Linux, or another C library
        return None, memory().rss
    import resource

    return before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
