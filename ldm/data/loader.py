"""Batches for training, by worker processes; a sample that cannot be read is listed and replaced by another one."""

import signal
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from ldm.config import UserError
from ldm.data.faults import Faults, attempt
from ldm.data.order import EpochBatches

GRACE = 120  # seconds that a worker process outlives a SIGTERM
ATTEMPTS = 1000  # at finding a replacement
Batch = tuple[dict, dict[str, str]]


def load(dataset: Any, order: EpochBatches, *, workers: int, pin_memory: bool) -> Generator[Batch, None, None]:
    """Yields the stacked batches of `order`, each with {name: reason} of the samples that were replaced in it.

    The replacement depends on (order.seed, step, position in the global batch) alone: resuming and more processes do
    not change it. Raises a worker's UserError in one line. The workers end with the generator.
    """
    loader = DataLoader(
        _Batches(dataset, order),
        batch_size=None,  # they are batches already
        sampler=enumerate(order, order.start),
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # leaves the global generator alone
    )
    batches = iter(loader)
    try:
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    finally:
        if workers:  # an error whose traceback refers to them would keep them alive
            batches._shutdown_workers()


def ignore_signals(worker: int) -> None:
    """Keeps a worker process alive when its process group is told to stop: the main process finishes its step first.

    A SIGTERM ends it late, not never: multiprocessing sends one at exit and waits without limit.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))


@dataclass(frozen=True)
class _Batches:
    """Stacked batches by (step, indices), each with {name: reason} of the samples that could not be read."""

    dataset: Any
    order: EpochBatches

    def __getitem__(self, item: tuple[int, list[int]]) -> Batch | UserError:
        (step, indices), faults, samples = item, Faults(share=1), []
        try:
            for position, index in enumerate(indices, self.order.rank * self.order.batch_size):
                for turn in range(ATTEMPTS):
                    if sample := attempt(faults, self.dataset.__getitem__, index):
                        break
                    draw = np.random.SeedSequence([self.order.seed % 2**64, step, position, turn])
                    index = int(draw.generate_state(1, np.uint64)[0] % len(self.dataset))
                else:
                    raise UserError(f"no sample can be read; the first: {faults.samples[0]}")
                samples.append(sample)
            return stack(samples), faults.reasons
        except UserError as error:  # raised there, it would bring along the worker's traceback
            return error


def stack(samples: list[dict]) -> dict:
    """Samples -> a batch: {name: (B, ...)} of what is a tensor in each, a list of B of all else."""
    batch = {name: [sample[name] for sample in samples] for name in samples[0]}
    return {name: torch.stack(values) if torch.is_tensor(values[0]) else values for name, values in batch.items()}
