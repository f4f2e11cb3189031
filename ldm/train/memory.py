"""Running out of memory: how it is told from other errors, and what to do."""

import torch

from ldm.config import UserError
from ldm.train.config import TrainConfig


class OutOfMemory(UserError):
    """A step did not fit in memory; `whole`: the weights are those from before."""

    def __init__(self, text: str, whole: bool) -> None:
        super().__init__(text)
        self.whole = whole


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    # on the CPU torch raises a plain RuntimeError
    words = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


def how_to_fit(config: TrainConfig, contrasts: bool, step: int) -> str:
    """What to do where step `step` takes too much memory; `contrasts`: its loss depends on the batch's size."""
    c = config
    if contrasts:
        way = "a smaller train.batch_size with --force (the contrast then has fewer negatives)"
    elif c.batch_size == 1:
        way = "smaller pictures or a smaller model with another --out, or train.precision='bf16' with --force"
    elif c.batch_size % 2:
        way = "a smaller train.batch_size and as much more train.accumulate"
    else:
        way = f"train.batch_size={c.batch_size // 2} train.accumulate={c.accumulate * 2}, the same batch in all"
    return f"out of memory in step {step + 1} with train.batch_size={c.batch_size}; go on with {way}"
