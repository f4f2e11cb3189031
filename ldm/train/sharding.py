"""Training with accelerate's FSDP, version 2: each process keeps a share of every parameter, its gradient, its average
and its optimizer's state, as DTensors, and has a layer whole only while it computes with it (Zhao et al. 2023,
arXiv:2304.11277).

A step is that of DDP: weights and gradients are gathered and summed in float32, and the forward pass runs under the
same autocast.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from ldm.config import UserError
from ldm.distributed import asked


def prepare(
    accelerator: Accelerator, module: nn.Module, optimizers: Iterable[torch.optim.Optimizer]
) -> tuple[nn.Module, nn.Module | None]:
    """What to call in a step, and in the first process a copy on the CPU where `module` is sharded, which happens in
    place and to the parameters of the optimizers too; UserError where FSDP was asked for and cannot be had.

    A layer is a module of the classes that `module` names in `_no_split_modules`. What has no dimensions cannot be
    sharded and stays whole.
    """
    if not accelerator.is_fsdp2:
        if asked():
            raise UserError(
                "accelerate has FSDP on GPUs only; launch with --config_file configs/accelerate/two-cpus.yaml"
            )
        return accelerator.prepare(module), None
    accelerator.prepare_model(module, evaluation_mode=True)  # for its autocast
    whole = copy.deepcopy(module).cpu() if accelerator.is_main_process else None
    plugin: Any = accelerator.state.fsdp_plugin
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = list(getattr(module, "_no_split_modules", ()))
    plugin.ignored_modules = [nn.ParameterList(p for p in module.parameters() if not p.ndim)]
    plugin.cpu_ram_efficient_loading = False  # every process has made or loaded the same weights
    plugin.mixed_precision_policy = None
    module.to(memory_format=torch.contiguous_format)  # channels-last parameters are refused
    return accelerator.prepare(module, *optimizers)[0], whole


@contextmanager
def replaced(
    modules: dict[str, nn.Module], name: str, whole: nn.Module | None, state: dict[str, Tensor]
) -> Iterator[nn.Module]:
    """Within the block `whole`, with the sharded `state`, is in the place of a sharded module, where there is one. All
    processes must call this alike."""
    trained, state = modules[name], gather(state, keep=whole is not None)
    if whole is None:
        yield trained
        return
    whole.load_state_dict(state)
    modules[name] = whole.to(next(trained.parameters()).device)
    try:
        yield whole
    finally:
        modules[name] = trained
        whole.cpu()


def clip(accelerator: Accelerator, module: nn.Module, maximum: float) -> Tensor:
    """Scales the module's gradients to the largest norm allowed; returns their norm before, on the device (where a
    module has no gradients yet, torch gives it on the CPU). Averages those that FSDP leaves to each process first."""
    for parameter in module.parameters() if accelerator.is_fsdp2 else ():
        if parameter.grad is not None and not isinstance(parameter, DTensor):
            parameter.grad = accelerator.reduce(parameter.grad, "mean")
    return full(nn.utils.clip_grad_norm_(module.parameters(), maximum)).to(accelerator.device)


def full(x: Tensor) -> Tensor:
    """The whole of a sharded tensor, which all processes must ask for alike; another one itself."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def local(x: Tensor) -> Tensor:
    """This process's share of a sharded tensor, in the same memory; another one itself."""
    return x.to_local() if isinstance(x, DTensor) else x


def shard(x: Any, like: Any) -> Any:
    """Of a whole tensor, which is the same in all processes, what `like` has of its own; itself where `like` is whole
    or of another shape. Of a dict each entry, by the one of that name where `like` is a dict."""
    if isinstance(x, dict):
        return {name: shard(value, like.get(name) if isinstance(like, dict) else like) for name, value in x.items()}
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
