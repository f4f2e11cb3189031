"""What the training loop asks of a task, and the processes it runs in."""

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor, nn


class Task(Protocol):
    """What one kind of training does; `modules` are those trained, each with its own optimizer."""

    modules: dict[str, nn.Module]
    dataset: Any

    def collate(self, samples: list[dict]) -> dict:
        """Samples of the data set -> a batch; runs in the loader's processes, so without randomness."""

    def losses(self, modules: dict[str, nn.Module], batch: dict, step: int) -> Iterator[tuple[str, Tensor, dict]]:
        """Yields (module, its loss, values to log) in turn; the loop runs backward after each."""

    def after_step(self) -> None:
        """What must hold after the weights changed, e.g. a clamp."""

    def validate(self, device: torch.device) -> dict[str, float]:
        """Numbers on held-out data, with the averaged weights in place."""

    def preview(self, device: torch.device) -> Image.Image | None:
        """A picture to look at, with the averaged weights in place, from fixed inputs and seeds."""

    def export(self, folder: Path, device: torch.device, final: bool) -> None:
        """Writes the loadable folder, with the averaged weights in place; `final` at the end of the training."""


def processes() -> PartialState:
    """This process among those of the run: its device, and `main_process_first()` for work that one does for all.

    The others wait for up to a day where the usual ten minutes would end the run.
    """
    cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    cpu = cpu or not torch.cuda.is_available()  # accelerate would take MPS, which has no float64 for the metrics
    return PartialState(cpu=cpu, timeout=timedelta(days=1))
