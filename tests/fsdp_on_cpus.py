"""Run by tests/test_fsdp.py in two processes: a training of the project, on CPUs as it would be on GPUs.

accelerate takes FSDP for accelerators only; here it takes it for CPUs too, in the words that it has for GPUs
(accelerate/state.py, AcceleratorState). The layout is that of GPUs. At its end each process writes what it holds of
every parameter into OUT-RANK.json.

fsdp_on_cpus.py SCRIPT ARGUMENTS...
"""

import json
import runpy
import sys

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import ldm.train.task
from ldm.train.run import Run

INIT, END = AcceleratorState.__init__, Run.end


def init(self: AcceleratorState, *args: object, **named: object) -> None:
    """As it is, then FSDP where there is a plugin for it."""
    INIT(self, *args, **named)
    plugin = named.get("fsdp_plugin")
    if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = plugin


def end(self: Run) -> None:
    """As it is, then the file."""
    END(self)
    modules = self.task.modules.items()
    held = {name: [holding(p) for p in module.parameters()] for name, module in modules}
    layers = {name: sum(isinstance(m, FSDPModule) for m in module.modules()) for name, module in modules}
    file = self.out.with_name(f"{self.out.name}-{self.accelerator.process_index}.json")
    file.write_text(json.dumps({"held": held, "layers": layers}))


def holding(parameter: nn.Parameter) -> dict:
    """The size of a parameter and of the share here; None for what is whole, and its value."""
    if isinstance(parameter, DTensor):
        return {"size": parameter.numel(), "share": parameter.to_local().numel()}
    return {"size": parameter.numel(), "share": None, "value": parameter.tolist()}


if __name__ == "__main__":
    AcceleratorState.__init__, Run.end = init, end
    ldm.train.task.training_layout = lambda: torch.channels_last  # before the tasks are imported
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
