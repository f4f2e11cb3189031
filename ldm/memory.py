"""Running out of memory: how it is told from other errors."""

import torch

from ldm.config import UserError


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
