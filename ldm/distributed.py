"""This process among the others of the run: device, rank, gathering, random draws for the global batch."""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, ClassVar, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor, distributed
from torch.overrides import TorchFunctionMode

from ldm.config import UserError

LIKE = (torch.rand_like, torch.randn_like)
SIZED = (torch.rand, torch.randn, torch.randint)
Item, Result = TypeVar("Item"), TypeVar("Result")
# What accelerate's launch sets for ways to split a model that the training loop does not know.
SPLIT = {"DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"}
# Settings of accelerate's FSDP that its launch hands on in variables, their defaults, and what they must be here.
SETTINGS = (("VERSION", "1", "2"), ("OFFLOAD_PARAMS", "false", "false"), ("ACTIVATION_CHECKPOINTING", "false", "false"))


def processes() -> PartialState:
    """This process among those of the run: its device, and `main_process_first()` for work that one does for all.

    The others wait for up to a day where the usual ten minutes would end the run. UserError for a launch that this
    project cannot do.
    """
    check_launch()
    cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    cpu = cpu or not torch.cuda.is_available()  # accelerate would take MPS, which has no float64 for the metrics
    return PartialState(cpu=cpu, timeout=timedelta(days=1))


def map_over_processes(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`work` of each item, done in one of the processes and then known to all; all of them must call this alike."""
    place = processes()
    own = [work(item) for item in items[place.process_index :: place.num_processes]]
    if place.num_processes == 1:
        return own
    parts: list[list[Result]] = [[]] * place.num_processes
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


def asked() -> bool:
    """Whether `accelerate launch` was told to use FSDP. UserError where it was told of one that is not supported."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return False
    for key, default, only in SETTINGS:
        value = os.environ.get(f"FSDP_{key}", default).lower()
        if value != only:
            raise UserError(
                f"fsdp_{key.lower()} is {value}; supported is {only}: see configs/accelerate/fsdp.yaml, or do without"
                " FSDP (one-node-8-gpus.yaml or multi-node.yaml)"
            )
    return True


def find_device(name: str) -> torch.device:
    """The device of that name, or the best one there is for an empty name (UserError)."""
    if not name and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return processes().device  # each process has one of its own
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()  # "meta" holds no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} cannot be used ({reason}); without --device the best one is") from None
    return device


class Together(TorchFunctionMode):
    """While entered, each of `world` processes, all with the same seed, has its `rows` samples of a batch of
    `rows * world`: a tensor of so many rows that torch draws (LIKE, SIZED) without a generator of its own is drawn for
    the whole batch, of which process `rank` gets its part.

    So what is random belongs to a sample's place in the batch, however many processes there are. Drawing for all costs
    `world` times the memory: for 256 processes of 16 latents of 4x64x64 that is 268 MB, for a moment.
    """

    current: ClassVar["Together | None"] = None

    def __init__(self, rows: int, rank: int, world: int) -> None:
        super().__init__()
        self.rows, self.rank, self.world = rows, rank, world

    def __enter__(self) -> "Together":
        Together.current = self
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        Together.current = None
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Every call of a torch function comes here."""
        kwargs = kwargs or {}
        if func in LIKE and len(args[0]) == self.rows:
            return self.own(func(torch.cat([args[0].detach()] * self.world), **kwargs))
        if func in SIZED and kwargs.get("generator") is None:
            head, size = _split_size(func, args)
            if size and size[0] == self.rows:
                return self.own(func(*head, (self.rows * self.world, *size[1:]), **kwargs))
        return func(*args, **kwargs)

    def own(self, drawn: Tensor) -> Tensor:
        """This process's rows of those of all."""
        return drawn.chunk(self.world)[self.rank]


def draw_for_all(draw: Callable[[int], Tensor], count: int) -> Tensor:
    """This process's `count` rows of `draw(n)`, n the samples of all processes that take a step together: for draws
    whose rows depend on each other."""
    step = Together.current
    return draw(count) if step is None else step.own(draw(count * step.world))


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean of `x` over the processes that take a step together, without a graph; else `x` itself."""
    step = Together.current
    if step is None:
        return x.detach()
    total = x.detach().clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total)
    return total / step.world


def rank_and_world() -> tuple[int, int]:
    """This process's rank among those of the launch, and how many they are."""
    there = distributed.is_available() and distributed.is_initialized()
    return (distributed.get_rank(), distributed.get_world_size()) if there else (0, 1)


def gather_objects(x: Any) -> list[Any]:
    """What each process gives, in order of rank, in process 0; nothing in the others, which wait for the slowest."""
    rank, world = rank_and_world()
    if world == 1:
        return [x]
    found: list[Any] = [None] * world
    distributed.gather_object(x, found if rank == 0 else None)
    distributed.barrier()
    return found if rank == 0 else []


def _split_size(func: Any, args: tuple) -> tuple[tuple, tuple[int, ...]]:
    """What stands before the size in the arguments, and the size; `rand` takes it as one argument or many."""
    if func is torch.randint:
        return args[:-1], tuple(args[-1])
    return (), tuple(args[0]) if args and not isinstance(args[0], int) else args
