"""This process among the others of the run: device, rank, gathering, and the random numbers of a global batch."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, partial
from threading import Event, Thread
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, reduce
from torch import Tensor, distributed
from tqdm import tqdm

from ldm.config import Typed, UserError, convert

Item, Result = TypeVar("Item"), TypeVar("Result")
# Variables that `accelerate launch` sets, and the only value supported here; those of FSDP count with FSDP alone.
SUPPORTED = {"ACCELERATE_USE_DEEPSPEED": "false", "ACCELERATE_USE_MEGATRON_LM": "false"}
FSDP = {"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false", "FSDP_ACTIVATION_CHECKPOINTING": "false"}


def processes() -> PartialState:
    """This process among those of the run: its device, and `main_process_first()` for work that one does for all.

    Among several a `Watch` ends those that wait in vain. Raises UserError for an unsupported launch.
    """
    check_launch()
    # without a GPU accelerate would take MPS, which has no float64 for the metrics
    cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") or not torch.cuda.is_available()
    state = PartialState(cpu=cpu, timeout=timedelta(days=1))  # long work is watched, not limited
    if state.num_processes > 1:
        watch()
    return state


@cache
def watch() -> "Watch":
    """The watch over this process and the others."""
    return Watch(convert(float, Typed(os.environ.get("LDM_TIMEOUT", "1800")), "LDM_TIMEOUT", "{}"))


class Watch(Thread):
    """Ends this process with one line, which names the missing ones, once none has made progress for `limit` seconds.

    So long work may be waited for, whoever does it, as long as it goes on. Each process counts its `beats` and the
    seconds it has lived where all can read them; a timeout of collectives would tell neither who is missing nor why.
    """

    def __init__(self, limit: float) -> None:
        super().__init__(daemon=True)
        self.limit, self.beats, self.done = limit, 0, Event()
        self.store = distributed.distributed_c10d._get_default_store().clone()  # a connection of its own
        self.rank, self.world = rank_and_world()
        self.start()

    def run(self) -> None:
        sent, seen, since = 0, [], 0.0
        while not self.done.wait(1):
            try:
                beats, now = self.beats - sent, time.monotonic()
                self.store.add(f"alive/{self.rank}", 1)
                self.store.add(f"beats/{self.rank}", beats)
                sent += beats
                if beats:
                    since = now
                elif sent and now - since > self.limit / 2:
                    if (counts := self.read("beats")) == seen:
                        self.end()
                    seen, since = counts, now
            except RuntimeError:  # the store has gone with process 0, which is well if this one is done too
                self.done.wait(10) or self.end()
                return

    def read(self, name: str) -> list[int]:
        """A counter of every process."""
        return [self.store.add(f"{name}/{rank}", 0) for rank in range(self.world)]

    def missing(self) -> str:
        """Who is missing, as the first that asks finds out, and what to do."""
        hint = "see its own output; the same command goes on from what is saved"
        try:
            before, beats = self.read("alive"), self.read("beats")
            for _ in range(3):
                time.sleep(1)
                self.store.add(f"alive/{self.rank}", 1)
            dead = [rank for rank, (a, b) in enumerate(zip(before, self.read("alive"), strict=True)) if a == b]
            late = [rank for rank, count in enumerate(beats) if count == min(beats) < max(beats)]
            who = f"rank {', '.join(map(str, dead or late or range(self.world)))} of {self.world} processes"
            what = "has ended" if dead else f"has made no progress for {self.limit:g} s (LDM_TIMEOUT)"
            return self.store.compare_set("missing", "", f"{who} {what}: {hint}").decode()
        except RuntimeError:
            return f"rank 0 of {self.world} processes has ended: {hint}"

    def end(self) -> None:
        print(f"error: {self.missing()}", file=sys.stderr, flush=True)
        os._exit(2)


def beat() -> None:
    """Counts this process's progress, before it waits for others and within long work that they wait for."""
    if rank_and_world()[1] > 1:
        watch().beats += 1


@contextmanager
def connected() -> Iterator[None]:
    """Turns the loss of another process into a UserError that names it."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, distributed.DistError) or "Connection" in str(error)
        if not lost or rank_and_world()[1] == 1:
            raise
        raise UserError(f"{watch().missing()} ({str(error).splitlines()[0]})") from None


def leave() -> None:
    """Ends the connection with the other processes, after the last work that they share."""
    if rank_and_world()[1] > 1:
        watch().done.set()
        watch().join()
    PartialState().destroy_process_group()


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
        beat()
        with connected():
            distributed.all_gather_object(gathered, x)
    return gathered


def gather_results(work: Callable[[], Result]) -> list[Result]:
    """The result of `work()` of every process in order of rank, in all processes; or all raise the first error among
    them that has a line for the user."""
    try:
        result: Any = work()
    except (UserError, OSError) as error:
        result = error
    results = gather_objects(result)
    for result in results:
        if isinstance(result, UserError | OSError):
            raise result
    return results


def map_over_processes(
    work: Callable[[Item], Result], items: Sequence[Item], name: str = "", even: bool = False
) -> list[Result]:
    """`work` of each item, shared out among the processes; all results in all of them. `name` is that of a progress
    bar. With `even` all work equally often, the last item twice if need be, as a sharded model must be called."""
    rank, world = rank_and_world()
    end = -(-len(items) // world) * world if even else len(items)

    def share() -> list[Result]:
        results = []
        for i in tqdm(range(rank, end, world), name, leave=False, disable=not name or rank > 0):
            results.append(work(items[min(i, len(items) - 1)]))
            beat()
        return results

    parts = gather_results(share)
    return [parts[i % world][i // world] for i in range(len(items))]


def from_main(work: Callable[..., Result], *arguments: Any) -> Result:
    """The result of `work(*arguments)`, which runs in process 0 alone, in all processes, which raise its errors."""
    return gather_results(partial(work, *arguments) if rank_and_world()[0] == 0 else tuple)[0]


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean of `x` over all processes, without a graph."""
    return reduce(x.detach().contiguous(), "mean")


def upload(x: Tensor, device: torch.device) -> Tensor:
    """`x` on the device; to a GPU it is copied from pinned memory, without waiting."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and not x.is_cuda else x.to(device)


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
