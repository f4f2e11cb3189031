"""Run by tests/test_launch.py in two processes: the shares of a model's parameters that FSDP gives each of them, and
matrices moved by a Muon that they share.

two_processes.py OUT
"""

import sys
from pathlib import Path

import tiny
import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from ldm.distributed import processes, rank_and_world
from ldm.model_io import save_tensors, write_json
from ldm.train import sharding
from ldm.train.clip import CLIPTask
from ldm.train.optim import EMA, Muon


def moved() -> dict[str, torch.Tensor]:
    """Three matrices after two steps of Muon with the same gradients in all processes."""
    torch.manual_seed(0)
    matrices = [torch.nn.Parameter(torch.randn(size)) for size in ((16, 48), (32, 16), (24, 24))]
    optimizer = Muon(matrices, lr=0.1, weight_decay=0.1)
    for _ in range(2):
        for p in matrices:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return {str(i): p.detach() for i, p in enumerate(matrices)}


if __name__ == "__main__":
    processes()
    save_tensors(Path(sys.argv[1]) / f"muon-{rank_and_world()[0]}.safetensors", moved())
    clip = CLIPTask(tiny.clip()).modules["clip"]
    sizes = [p.numel() for p in clip.parameters()]
    sharding.prepare(clip, EMA(clip).module, Accelerator())
    shares = [p.to_local().numel() if isinstance(p, DTensor) else None for p in clip.parameters()]
    write_json(Path(sys.argv[1]) / f"process-{rank_and_world()[0]}.json", {"sizes": sizes, "shares": shares})
    torch.distributed.destroy_process_group()
