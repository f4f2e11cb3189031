"""A training's batches from loading processes that end with it."""

import signal
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch.utils.data import DataLoader

from ldm.config import UserError
from ldm.data.order import EpochBatches

GRACE = 120  # seconds that a loader's process outlives a SIGTERM


def leave_to_the_main_process(worker: int) -> None:
    """For a loader's process: a signal to the whole group reaches it too, while the training that finishes its step
    still needs it. A SIGTERM ends it late, not never: multiprocessing sends one at exit and waits without limit."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))


def load(
    dataset: Any,
    order: EpochBatches,
    collate: Callable[[list[dict]], dict],
    *,
    workers: int,
    seed: int,
    pin_memory: bool,
) -> Generator[tuple[dict, dict], None, None]:
    """Batches in the given order of lists of indices, collated, and {name: why} of samples passed over for them."""
    loader = DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=_Collate(collate),
        pin_memory=pin_memory,
        worker_init_fn=leave_to_the_main_process,
        generator=torch.Generator().manual_seed(seed),  # leaves the global generator alone
    )
    return _plain_errors(loader)


class _Collate:
    """A task's collate, with what the samples say of those in whose place they stand."""

    def __init__(self, collate: Callable[[list[dict]], dict]) -> None:
        self.collate = collate

    def __call__(self, samples: list[dict]) -> tuple[dict, dict]:
        faults = {name: why for sample in samples for name, why in sample.get("faults", {}).items()}
        return self.collate(samples), faults


def _plain_errors(loader: DataLoader) -> Generator[tuple[dict, dict], None, None]:
    """The loader's batches; a UserError of a loading process comes without that process's traceback in its text.

    However it ends, the loading processes end with it. Left to the garbage collector they may outlive an error whose
    traceback refers to them, to the end of the program.
    """
    batches = iter(loader)
    try:
        yield from batches
    except UserError as error:
        raise UserError(str(error).strip().splitlines()[-1].split("UserError: ", 1)[-1]) from None
    finally:
        if loader.num_workers:
            batches._shutdown_workers()
