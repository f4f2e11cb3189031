"""What the training loop asks of a task, and the processes it runs in."""

import fnmatch
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from ldm.config import UserError
from ldm.distributed import processes


class Task(Protocol):
    """What one kind of training does; `modules` are those trained, each with its own optimizer: that of the config, or
    what `optimizers` has under its name, where a task has such."""

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


def freeze(module: nn.Module, patterns: tuple[str, ...]) -> None:
    """Takes the gradient from the parameters whose names match a shell pattern; UserError for one that matches none,
    or when nothing is left to train."""
    names = [name for name, _ in module.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise UserError(f"frozen pattern {pattern!r} matches no parameter, e.g. {names[0]!r}")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))
    if not any(p.requires_grad for p in module.parameters()):
        raise UserError(f"frozen {list(patterns)} leaves no parameter to train; name fewer")


def training_layout() -> torch.memory_format:
    """The memory layout of pictures, latents and convolutions in a training: channels-last for tensor cores; on CPUs it
    made steps with a backward pass 3 to 10% slower."""
    return torch.contiguous_format if processes().device.type == "cpu" else torch.channels_last
