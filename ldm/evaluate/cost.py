"""The cost of an image: time, memory, and the size of the model."""

import time
from functools import partial

import psutil
import torch

from ldm.evaluate.evaluation import Evaluation
from ldm.evaluate.records import Record, record

TIMED = 8  # images


def cost_records(e: Evaluation, g: float) -> list[Record]:
    """Seconds and bytes per image, in a batch after a first one to warm up, and parameters.

    Memory is what the batch takes on a GPU beyond weights and all else, shared by its images, and None on a CPU;
    `peak` is the most that torch held on the GPU, on a CPU what the process holds.
    """
    captions, device, about = e.captions[:TIMED], e.pipe.device, e.samples[g].labels
    options = {key: value for key, value in about.items() if key != "of"}
    sample, gpu = partial(e.pipe, captions, batch_size=len(captions), **options), device.type == "cuda"
    sample()
    before = torch.cuda.memory_allocated(device) if gpu else None
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    sample()
    seconds = (time.perf_counter() - start) / len(captions)
    peak = torch.cuda.max_memory_allocated(device) if gpu else psutil.Process().memory_info().rss
    fields = {"n": len(captions), **about, "device": str(device), "threads": torch.get_num_threads()}
    return [
        record("seconds_per_picture", seconds, **fields),
        record("parameters", sum(e.settings["parameters"].values()), **fields),
        record("memory_per_picture_bytes", (peak - before) / len(captions) if gpu else None, peak=peak, **fields),
    ]
