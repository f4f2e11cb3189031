"""This process among the others of the run: device, rank, gathering, and the random numbers of a global batch."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, reduce
from torch import Tensor, distributed

from ldm.config import UserError

Item, Result = TypeVar("Item"), TypeVar("Result")
# Variables that `accelerate launch` sets, and the only value supported here; those of FSDP count with FSDP alone.
SUPPORTED = {"ACCELERATE_USE_DEEPSPEED": "false", "ACCELERATE_USE_MEGATRON_LM": "false"}
FSDP = {"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false", "FSDP_ACTIVATION_CHECKPOINTING": "false"}


def processes() -> PartialState:
    """This process among those of the run: its device, and `main_process_first()` for work that one does for all.

    Collectives wait for up to a day: one process may encode a data set meanwhile. Raises UserError for an unsupported
    launch.
    """
    check_launch()
    # without a GPU accelerate would take MPS, which has no float64 for the metrics
    cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") or not torch.cuda.is_available()
    return PartialState(cpu=cpu, timeout=timedelta(days=1))


def check_launch() -> None:
    """Raises UserError where the environment asks for a way to split the model that is not supported, or for several
    processes that nobody has started."""
    env = os.environ
    for name, supported in (SUPPORTED | (FSDP if fsdp_requested() else {})).items():
        value = env.get(name, supported).lower()
        if value != supported:
            raise UserError(f"{name} is {value}; it must be {supported}, as in configs/accelerate/ (fsdp.yaml shards)")
    if "WORLD_SIZE" not in env and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= env.keys():
        raise UserError(
            "accelerate launch was to start several processes and started one, as it does without a GPU; add"
            " --multi_gpu, which starts them on CPUs too (for a single process, unset MASTER_ADDR)"
        )
    world = env.get("WORLD_SIZE", "1")
    if world != "1" and not (world.isdigit() and {"RANK", "MASTER_ADDR"} <= env.keys()):
        raise UserError(f"WORLD_SIZE is {world!r}, but no launcher has started this process; unset it, or use one")


def fsdp_requested() -> bool:
    """Whether `accelerate launch` asks for FSDP."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def find_device(name: str | torch.device) -> torch.device:
    """The device called `name`; for an empty name this process's GPU, or the CPU. Raises UserError where it is
    unusable."""
    if not name:
        return processes().device
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" holds no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {str(name)!r} cannot be used ({reason}); without --device the best one is") from None
    return device


def find_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The floating-point type called `name`; for "auto" bfloat16 where a GPU computes in it, else float16 on GPUs and
    float32 on CPUs. Raises UserError where it is none of these or the GPU lacks it."""
    on_gpu = device.type == "cuda"
    lacks = on_gpu and torch.cuda.get_device_capability(device) < (8, 0)  # it would be emulated
    if name == "auto":
        return (torch.float16 if lacks else torch.bfloat16) if on_gpu else torch.float32
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"dtype {name} is not allowed: float32, bfloat16, float16 or auto")
    if lacks and dtype == torch.bfloat16:
        raise UserError(
            f"dtype bfloat16 is too new for the GPU {torch.cuda.get_device_name(device)}; use float16 or auto"
        )
    return dtype


@contextmanager
def fast_kernels(device: torch.device, tf32: bool = True) -> Iterator[None]:
    """On a GPU, lets cuDNN time its convolutions for each shape and, with `tf32`, float32 products round their factors
    to 10 bits; then restores the settings, which are the program's. They stay as they are where it has set torch's
    newer `fp32_precision`, with which these cannot be read; torch.compile reads these."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    try:
        before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    except RuntimeError:
        before = None
    if before is None or device.type != "cuda":
        yield
        return
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = True, tf32 or before[1], tf32 or before[2]
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before


@contextmanager
def memory_errors(advice: str) -> Iterator[None]:
    """Turns running out of memory into a UserError; on the CPU torch raises a plain RuntimeError for it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise UserError(f"out of memory {advice}") from None


def rank_and_world() -> tuple[int, int]:
    """This process's rank, and the number of processes."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def gather_objects(x: Any) -> list[Any]:
    """`x` of every process in order of rank, in all processes."""
    gathered = [x] * rank_and_world()[1]
    if len(gathered) > 1:
        distributed.all_gather_object(gathered, x)
    return gathered


def map_over_processes(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`work` of each item, shared out among the processes; all results in all of them."""
    rank, world = rank_and_world()
    parts = gather_objects([work(item) for item in items[rank::world]])
    return [parts[i % world][i // world] for i in range(len(items))]


def from_main(work: Callable[..., Result], *arguments: Any) -> Result:
    """The result of `work(*arguments)`, which runs in process 0 alone, in all processes, which raise its UserError."""
    outcome: Any = None
    if rank_and_world()[0] == 0:
        try:
            outcome = work(*arguments)
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

    def rows(self, draw: Callable[[int, torch.Generator], Tensor], rows: int) -> Tensor:
        """This process's `rows` of `draw(n, generator)`, n being the rows of all processes."""
        return draw(rows * self.world, self.generator).chunk(self.world)[self.rank]

    def rand(self, rows: int, *shape: int) -> Tensor:
        """Uniform in [0, 1), (rows, *shape)."""
        return self.rows(lambda n, generator: torch.rand(n, *shape, generator=generator), rows)

    def randn(self, rows: int, *shape: int) -> Tensor:
        """Standard normal, (rows, *shape)."""
        size = (rows * self.world, *shape)
        return torch.randn(size, generator=self.noise, device=self.device).chunk(self.world)[self.rank]
