"""Training with FSDP, version 2: each process keeps a share of every parameter, its gradient, average and optimizer
state as DTensors, and gathers a layer only while it computes with it (Zhao et al. 2023, arXiv:2304.11277).

A step equals that of DDP: gradients are summed in float32, and the forward pass runs under the same autocast.
"""

import copy
from collections import defaultdict
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ldm import model_io
from ldm.distributed import fsdp_requested, rank_and_world, upload

LAYERS = ("ResnetBlock", "SpatialTransformer", "Layer")  # classes whose parameters are gathered together
FORWARD = ("encode", "decode_raw", "encode_text")  # methods of averages that are called as `forward` is


def prepare(module: nn.Module, average: nn.Module, accelerator: Accelerator) -> tuple[nn.Module, nn.Module | None]:
    """Moves the module and its average to the device. Returns the module as a step calls it, with autocast and DDP;
    with FSDP both are sharded in place instead, and a copy of the average without values is returned too, for
    `whole`."""
    device = accelerator.device
    if not (fsdp_requested() and accelerator.num_processes > 1):
        average.to(device)
        return accelerator.prepare_model(module), None
    called = accelerator.prepare_model(module, device_placement=False, evaluation_mode=True)  # autocast alone
    blank = copy.deepcopy(average).to("meta")
    mesh = init_device_mesh(device.type, (accelerator.num_processes,))
    for root in (module, average):
        scalars = {p for p in root.parameters() if not p.ndim}  # cannot be sharded
        layers = [m for m in root.modules() if type(m).__name__ in LAYERS]
        for unit in (*reversed(layers), root):
            fully_shard(unit, mesh=mesh, ignored_params=scalars)  # and moved: never more than one unit is whole there
        root.to(device)
    for name in FORWARD:
        if hasattr(average, name):
            register_fsdp_forward_method(average, name)
    return called, blank


def whole(average: nn.Module, blank: nn.Module | None) -> nn.Module:
    """The average, or where it is sharded a copy on the CPU of the main process, gathered tensor by tensor; a
    collective. The copy of other processes has no values."""
    if blank is None:
        return average
    reshard(average)
    copied, tensors = copy.deepcopy(blank), {}
    for name, x in average.state_dict().items():
        x = full(x)
        if rank_and_world()[0] == 0:
            tensors[name] = x.cpu()
    if tensors:
        copied.load_state_dict(tensors, assign=True)
    return copied


def reshard(module: nn.Module) -> None:
    """Frees the parameters that a sharded module keeps gathered after a forward pass, for a backward pass."""
    if isinstance(module, FSDPModule):
        module.reshard()


def save(folder: Path, name: str, tensors: dict[str, Tensor]) -> Path | None:
    """Writes tensors as `name`.safetensors in the main process; where some are sharded, each process its rows of those
    as one of N files of that name. Returns the file that this process has written."""
    rank, world = rank_and_world()
    if any(isinstance(x, DTensor) for x in tensors.values()):
        name = f"{name}-{rank + 1:05d}-of-{world:05d}"
        tensors = {key: local(x) for key, x in tensors.items() if rank == 0 or isinstance(x, DTensor)}
    elif rank:
        return None
    model_io.save_tensors(folder / f"{name}.safetensors", tensors)
    return folder / f"{name}.safetensors"


def load(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of all files of `save`, whole."""
    files = sorted(folder.glob(f"{name}-?????-of-?????.safetensors")) or [folder / f"{name}.safetensors"]
    rows = defaultdict(list)
    for file in files:
        for key, x in model_io.load_tensors(file).items():
            rows[key].append(x)
    return {key: torch.cat(parts) if len(parts) > 1 else parts[0] for key, parts in rows.items()}


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
