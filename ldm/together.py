"""A step that several processes take together: what makes it the step of one process with all their batches.

A mean over samples is the mean of the processes' means, and DDP averages gradients. Three things need more: what is
random, a mean over a number of things that differs between the batches, and what is no mean at all, such as a norm.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, distributed
from torch.overrides import TorchFunctionMode

LIKE = (torch.rand_like, torch.randn_like)
SIZED = (torch.rand, torch.randn, torch.randint)


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


def mean_of_all(x: Tensor) -> Tensor:
    """The mean of `x` over the processes that take a step together, without a graph; else `x` itself."""
    step = Together.current
    if step is None:
        return x.detach()
    total = x.detach().clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total)
    return total / step.world


def place() -> tuple[int, int]:
    """This process's rank among those of the launch, and how many they are."""
    there = distributed.is_available() and distributed.is_initialized()
    return (distributed.get_rank(), distributed.get_world_size()) if there else (0, 1)


def gather(x: Any) -> list[Any]:
    """What each process gives, in order of rank, in process 0; nothing in the others, which wait for the slowest."""
    rank, world = place()
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
