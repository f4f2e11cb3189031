"""Training with accelerate's FSDP, version 2: each process keeps a share of every parameter, its gradient, its average
and its optimizer's state, as DTensors, and has a layer whole only while it computes with it (Zhao et al. 2023,
arXiv:2304.11277).

A step is that of DDP: weights and gradients are gathered and summed in float32, and the forward pass runs under the
same autocast.
"""

import os
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from ldm.config import UserError


def check_settings() -> None:
    """UserError where `accelerate launch` was told of an FSDP that this project cannot do."""

    def told(key: str, default: str) -> str:
        return os.environ.get(f"FSDP_{key}", default).lower()

    if told("VERSION", "1") != "2":
        raise UserError("of FSDP only version 2 is supported: say fsdp_version: 2, as configs/accelerate/fsdp.yaml does")
    for key in ("OFFLOAD_PARAMS", "ACTIVATION_CHECKPOINTING"):
        if told(key, "false") == "true":
            raise UserError(f"fsdp_{key.lower()} is not supported; set it to false, as configs/accelerate/fsdp.yaml does")


def prepare(accelerator: Accelerator, module: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> nn.Module:
    """Shards a module in place, and its optimizers' parameters; a layer is a module of the classes that the module
    names in `_no_split_modules`. What has no dimensions cannot be sharded and stays whole: see `average_whole`."""
    plugin: Any = accelerator.state.fsdp_plugin
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = list(getattr(module, "_no_split_modules", ()))
    plugin.ignored_modules = [nn.ParameterList(p for p in module.parameters() if not p.ndim)]
    plugin.cpu_ram_efficient_loading = False  # every process has made or loaded the same weights
    plugin.mixed_precision_policy = None
    module.to(memory_format=torch.contiguous_format)  # channels-last parameters are refused
    return accelerator.prepare(module, *optimizers)[0]


def average_whole(accelerator: Accelerator, module: nn.Module) -> None:
    """The gradients of parameters that stay whole become their means over the processes."""
    for parameter in module.parameters():
        if parameter.grad is not None and not isinstance(parameter, DTensor):
            parameter.grad = accelerator.reduce(parameter.grad, "mean")


def full(x: Tensor) -> Tensor:
    """The whole of a sharded tensor, which all processes must ask for alike; another one itself."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def local(x: Tensor) -> Tensor:
    """This process's share of a sharded tensor, in the same memory; another one itself."""
    return x.to_local() if isinstance(x, DTensor) else x


def shard(x: Any, like: Any) -> Any:
    """Of a whole tensor, which is the same in all processes, what `like` has of its own; itself where `like` is whole
    or of another shape."""
    if not isinstance(like, DTensor) or getattr(x, "shape", None) != like.shape:
        return x
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)


def gather(state: Any, keep: bool) -> Any:
    """A nested state with each sharded tensor whole and on the CPU, one after the other; None for it where not `keep`.
    All processes must call this alike."""
    if isinstance(state, dict):
        return {name: gather(value, keep) for name, value in state.items()}
    if isinstance(state, list):
        return [gather(value, keep) for value in state]
    if isinstance(state, DTensor):
        whole = state.full_tensor()
        return whole.cpu() if keep else None
    return state
