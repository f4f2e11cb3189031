"""This process among the others of the run: device, rank, gathering, and the random numbers of a global batch."""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, distributed

from ldm.config import UserError

Item, Result = TypeVar("Item"), TypeVar("Result")
# Options of `accelerate launch` for FSDP, as it hands them on: the default there, and the only value supported here.
FSDP = (("VERSION", "1", "2"), ("OFFLOAD_PARAMS", "false", "false"), ("ACTIVATION_CHECKPOINTING", "false", "false"))


def processes() -> PartialState:
    """This process among those of the run: its device, and `main_process_first()` for work that one does for all.

    Collectives wait for up to a day: one process may encode a data set meanwhile. Raises UserError for an unsupported
    launch.
    """
    check_launch()
    cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    cpu = cpu or not torch.cuda.is_available()  # accelerate would take MPS, which has no float64 for the metrics
    return PartialState(cpu=cpu, timeout=timedelta(days=1))


def check_launch() -> None:
    """Raises UserError where the environment asks for a way to split the model that is not supported, or for several
    processes that nobody has started."""
    env = os.environ
    for name in ("DEEPSPEED", "MEGATRON_LM"):
        if env.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise UserError(f"{name} is not supported; launch with a file of configs/accelerate/, fsdp.yaml to shard")
    fsdp_requested()
    if "WORLD_SIZE" not in env and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= env.keys():
        raise UserError(
            "accelerate launch was to start several processes and started one, as it does without a GPU; add"
            " --multi_gpu, which starts them on CPUs too (for a single process, unset MASTER_ADDR)"
        )
    if env.get("WORLD_SIZE", "1") not in ("", "1") and "RANK" not in env:
        world = env["WORLD_SIZE"]
        raise UserError(f"WORLD_SIZE is {world}, but no launcher has started this process; unset it, or use one")


def fsdp_requested() -> bool:
    """Whether `accelerate launch` asks for FSDP. Raises UserError for options of it that are not supported."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return False
    for key, default, supported in FSDP:
        value = os.environ.get(f"FSDP_{key}", default).lower()
        if value != supported:
            raise UserError(f"fsdp_{key.lower()} is {value}; it must be {supported}: configs/accelerate/fsdp.yaml")
    return True


def find_device(name: str) -> torch.device:
    """The device called `name`; for an empty name this process's GPU, or the CPU. Raises UserError where it is
    unusable."""
    if not name and int(os.environ.get("WORLD_SIZE") or 1) > 1:
        return processes().device
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()  # "meta" holds no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} cannot be used ({reason}); without --device the best one is") from None
    return device


def rank_and_world() -> tuple[int, int]:
    """This process's rank, and the number of processes."""
    ready = distributed.is_available() and distributed.is_initialized()
    return (distributed.get_rank(), distributed.get_world_size()) if ready else (0, 1)


def gather_objects(x: Any) -> list[Any]:
    """`x` of every process in order of rank, in all processes."""
    world = rank_and_world()[1]
    gathered = [x] * world
    if world > 1:
        distributed.all_gather_object(gathered, x)
    return gathered


def map_over_processes(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`work` of each item, shared out among the processes; all results in all of them."""
    rank, world = rank_and_world()
    parts = gather_objects([work(item) for item in items[rank::world]])
    return [parts[i % world][i // world] for i in range(len(items))]


def from_main(work: Callable[[], Result]) -> Result:
    """The result of `work`, which runs in process 0 alone, in all processes; which raise its UserError alike."""
    outcome: Any = None
    if rank_and_world()[0] == 0:
        try:
            outcome = work()
        except UserError as error:
            outcome = error
    outcome = gather_objects(outcome)[0]
    if isinstance(outcome, UserError):
        raise outcome
    return outcome


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean of `x` over all processes, without a graph."""
    return reduce(x.detach().contiguous(), "mean")


class Draws:
    """The random numbers of one step, drawn for the samples of all processes; each process gets its own rows.

    So they belong to a sample's position in the global batch, however many processes share it. For 256 processes with
    16 latents of 4x64x64 each that is 268 MB of noise, for a moment. `randn` returns tensors on the device, the others
    on the CPU.
    """

    def __init__(self, seed: int, step: int, rank: int = 0, world: int = 1, device: torch.device | str = "cpu") -> None:
        self.rank, self.world, self.device = rank, world, torch.device(device)
        mixed = int(np.random.SeedSequence((seed, step, 0)).generate_state(1, np.uint64)[0] >> np.uint64(1))
        self.generator = torch.Generator().manual_seed(mixed)
        on_cpu = self.device.type == "cpu"
        self.noise = self.generator if on_cpu else torch.Generator(self.device).manual_seed(mixed)

    def rows(self, function: Callable[[int, torch.Generator], Tensor], rows: int) -> Tensor:
        """This process's `rows` of `function(n, generator)`, n being the rows of all processes."""
        return function(rows * self.world, self.generator).chunk(self.world)[self.rank]

    def rand(self, rows: int, *shape: int) -> Tensor:
        """Uniform in [0, 1), (rows, *shape)."""
        return self.rows(lambda n, generator: torch.rand(n, *shape, generator=generator), rows)

    def randn(self, rows: int, *shape: int) -> Tensor:
        """Standard normal, (rows, *shape)."""
        size = (rows * self.world, *shape)
        return torch.randn(size, generator=self.noise, device=self.device).chunk(self.world)[self.rank]
