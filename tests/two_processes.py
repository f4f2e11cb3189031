"""Run by tests/test_launch.py in two processes: the shares of a model's parameters that FSDP gives each of them.

two_processes.py OUT
"""

import sys
from pathlib import Path

import tiny
import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from ldm.distributed import processes, rank_and_world
from ldm.model_io import write_json
from ldm.train import sharding
from ldm.train.clip import CLIPTask
from ldm.train.optim import EMA

if __name__ == "__main__":
    processes()
    clip = CLIPTask(tiny.clip()).modules["clip"]
    sizes = [p.numel() for p in clip.parameters()]
    sharding.prepare(clip, EMA(clip).module, Accelerator())
    shares = [p.to_local().numel() if isinstance(p, DTensor) else None for p in clip.parameters()]
    write_json(Path(sys.argv[1]) / f"process-{rank_and_world()[0]}.json", {"sizes": sizes, "shares": shares})
    torch.distributed.destroy_process_group()
