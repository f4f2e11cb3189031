"""Run by tests/test_fsdp.py in two processes: a script of the project, with one change. accelerate takes FSDP for
accelerators only; here it takes it for CPUs too, by what it does for GPUs (accelerate/state.py, AcceleratorState).

fsdp_on_cpus.py SCRIPT ARGUMENTS...
"""

import runpy
import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

INIT = AcceleratorState.__init__


def init(self: AcceleratorState, *args: object, **named: object) -> None:
    """As it is, then FSDP where there is a plugin for it."""
    INIT(self, *args, **named)
    plugin = named.get("fsdp_plugin")
    if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = plugin


if __name__ == "__main__":
    AcceleratorState.__init__ = init
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
