"""Training with FSDP, version 2: each process keeps a share of every parameter, its gradient, average and optimizer
state as DTensors, and gathers a layer only while it computes with it (Zhao et al. 2023, arXiv:2304.11277).

A step equals that of DDP: gradients are summed in float32, and the forward pass runs under the same autocast.
"""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

LAYERS = ("ResnetBlock", "SpatialTransformer", "Layer")  # classes that are gathered as a unit
WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(module: nn.Module, accelerator: Accelerator) -> None:
    """Shards a module's parameters in place, except those without dimensions, which cannot be."""
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    scalars = {p for p in module.parameters() if not p.ndim}
    layers = [m for m in module.modules() if type(m).__name__ in LAYERS]
    for unit in (*reversed(layers), module):
        fully_shard(unit, mesh=mesh, ignored_params=scalars)


def set_gradient_sync(modules: Iterable[nn.Module], sync: bool) -> None:
    """Whether the next backward pass sums gradients over processes, or only accumulates them in each."""
    for module in modules:
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(sync)
        elif isinstance(module, DistributedDataParallel):
            module.require_backward_grad_sync = sync


def clip(module: nn.Module, maximum: float, accelerator: Accelerator) -> Tensor:
    """Scales the module's gradients to a norm of at most `maximum`; returns their norm before, on the device."""
    for parameter in module.parameters() if isinstance(module, FSDPModule) else ():
        if not parameter.ndim and parameter.grad is not None:  # not sharded, so FSDP does not sum it
            parameter.grad = accelerator.reduce(parameter.grad, "mean")
    return full(nn.utils.clip_grad_norm_(module.parameters(), maximum)).to(accelerator.device)


def model_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict with every tensor whole and on the CPU, in the main process; a collective."""
    return dcp.get_model_state_dict(module, options=WHOLE)


def load_model_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Loads a `model_state`, the same in all processes, sharded as the module is."""
    dcp.set_model_state_dict(module, state, options=WHOLE)


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state by parameter name, whole and on the CPU, in the main process; a collective. Empty before
    its first step, which torch would otherwise take to make one."""
    return dcp.get_optimizer_state_dict(module, optimizer, options=WHOLE) if optimizer.state else {}


def load_optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads an `optimizer_state`, the same in all processes, sharded as the module is."""
    if state:
        dcp.set_optimizer_state_dict(module, optimizer, state, options=WHOLE)


def local(x: Tensor) -> Tensor:
    """This process's share of a sharded tensor, in the same memory; any other tensor itself."""
    return x.to_local() if isinstance(x, DTensor) else x


def full(x: Tensor) -> Tensor:
    """A sharded tensor gathered, which is a collective; any other tensor itself."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def shard_like(x: Tensor, like: Tensor) -> Tensor:
    """This process's shard of `x`, which is the same in all processes, laid out as `like`; `x` where that is whole."""
    if not isinstance(like, DTensor):
        return x
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)
