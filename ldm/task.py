"""What the training loop asks of a task, and the processes it runs in."""

import fnmatch
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor, distributed, nn

from ldm.config import UserError
from ldm.sharded import asked

Item, Found = TypeVar("Item"), TypeVar("Found")
# What accelerate's launch sets for ways to split a model that the training loop does not know.
SPLIT = {"DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"}


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


def processes() -> PartialState:
    """This process among those of the run: its device, and `main_process_first()` for work that one does for all.

    The others wait for up to a day where the usual ten minutes would end the run. UserError for a launch that this
    project cannot do.
    """
    check_launch()
    cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    cpu = cpu or not torch.cuda.is_available()  # accelerate would take MPS, which has no float64 for the metrics
    return PartialState(cpu=cpu, timeout=timedelta(days=1))


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


def shared(work: Callable[[Item], Found], items: Sequence[Item]) -> list[Found]:
    """`work` of each item, done in one of the processes and then known to all; all of them must call this alike."""
    place = processes()
    own = [work(item) for item in items[place.process_index :: place.num_processes]]
    if place.num_processes == 1:
        return own
    parts: list[list[Found]] = [[]] * place.num_processes
    distributed.all_gather_object(parts, own)
    return [parts[i % place.num_processes][i // place.num_processes] for i in range(len(items))]


def check_launch() -> None:
    """UserError where `accelerate launch` was told to split the model, or to start several processes and started one,
    as it does without a GPU."""
    for key, name in SPLIT.items():
        if os.environ.get(f"ACCELERATE_USE_{key}", "").lower() == "true":
            raise UserError(
                f"{name} is not supported. Launch with --config_file configs/accelerate/one-node-8-gpus.yaml or"
                " multi-node.yaml, where every process holds the whole model, or fsdp.yaml, where each holds a share"
            )
    asked()
    # its simple launcher gives several processes an address, but only mpirun, with variables of its own, starts them
    alone = not any(
        name in os.environ for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    )
    if alone and "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
        raise UserError(
            "accelerate launch was to start several processes and started one, as it does without a GPU; add"
            " --multi_gpu, which starts them on CPUs too (where one is meant, unset MASTER_ADDR)"
        )
