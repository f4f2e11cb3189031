"""Training with FSDP, version 2: each process keeps a share of every parameter, its gradient, average and optimizer
state as DTensors, and gathers a layer only while it computes with it (Zhao et al. 2023, arXiv:2304.11277).

A step equals that of DDP: gradients are summed in float32, and the forward pass runs under the same autocast.
"""

import copy

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ldm.distributed import fsdp_requested, rank_and_world, upload

LAYERS = ("ResnetBlock", "SpatialTransformer", "Layer")  # classes whose parameters are gathered together


def prepare(module: nn.Module, average: nn.Module, accelerator: Accelerator) -> tuple[nn.Module, nn.Module | None]:
    """The module as a step calls it, with autocast and DDP. With FSDP it and its average are sharded in place instead,
    and the main process gets an unsharded copy of the average on the CPU as well, for `unshard`."""
    if not (fsdp_requested() and accelerator.num_processes > 1):
        return accelerator.prepare_model(module), None
    called = accelerator.prepare_model(module, evaluation_mode=True)  # autocast alone
    whole = copy.deepcopy(average).cpu() if accelerator.is_main_process else None
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for root in (module, average):
        scalars = {p for p in root.parameters() if not p.ndim}  # cannot be sharded
        layers = [m for m in root.modules() if type(m).__name__ in LAYERS]
        for unit in (*reversed(layers), root):
            fully_shard(unit, mesh=mesh, ignored_params=scalars)
    return called, whole


def unshard(average: nn.Module, whole: nn.Module | None, device: torch.device) -> nn.Module:
    """The average, or where it is sharded a copy of `whole` with its values, in the main process; a collective."""
    tensors = gather(average.state_dict()) if isinstance(average, FSDPModule) else {}
    if not tensors:
        return average
    whole = copy.deepcopy(whole)
    whole.load_state_dict(tensors)
    return whole.to(device)


def set_gradient_sync(module: nn.Module, sync: bool) -> None:
    """Whether the next backward pass sums gradients over processes, or only accumulates them in each."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(sync)
    elif isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = sync


def clip(module: nn.Module, maximum: float, accelerator: Accelerator) -> Tensor:
    """Scales the module's gradients to a norm of at most `maximum`; returns their norm before, on the device."""
    for parameter in module.parameters() if isinstance(module, FSDPModule) else ():
        if not parameter.ndim and parameter.grad is not None:  # not sharded, so FSDP does not sum it
            parameter.grad = accelerator.reduce(parameter.grad, "mean")
    return upload(full(nn.utils.clip_grad_norm_(module.parameters(), maximum)), accelerator.device)


def gather(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whole and on the CPU in the main process, nothing in the others; a collective."""
    whole = {}
    for name, x in tensors.items():
        x = full(x)
        if rank_and_world()[0] == 0:
            whole[name] = x.cpu()
    return whole


def full(x: Tensor) -> Tensor:
    """A sharded tensor gathered, which is a collective; any other tensor itself."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def local(x: Tensor) -> Tensor:
    """This process's share of a sharded tensor, in the same memory; any other tensor itself."""
    return x.to_local() if isinstance(x, DTensor) else x


def shard_like(x: Tensor, like: Tensor) -> Tensor:
    """This process's shard of `x`, which is the same in all processes, laid out as `like`; `x` itself where `like` is
    not sharded or has another shape."""
    if not isinstance(like, DTensor) or x.shape != like.shape:
        return x
    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
