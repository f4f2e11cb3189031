"""Run by tests/test_launch.py in two processes: the shares of a model's parameters that FSDP gives each of them and
matrices moved by a Muon that they share, or a run in which the second process hangs or dies.

two_processes.py OUT [sleep|kill]
"""

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import tiny
import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from ldm.commands.cli import run_command
from ldm.distributed import leave, processes, rank_and_world
from ldm.model_io import save_tensors, write_json
from ldm.train import sharding
from ldm.train.clip import CLIPTask
from ldm.train.loop import train
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


FAULTS = {"sleep": partial(time.sleep, 99), "kill": lambda: os.kill(os.getpid(), signal.SIGKILL)}


def shares(out: Path) -> None:
    """Writes them, each process its own."""
    processes()
    save_tensors(out / f"muon-{rank_and_world()[0]}.safetensors", moved())
    clip = CLIPTask(tiny.clip()).modules["clip"]
    sizes = [p.numel() for p in clip.parameters()]
    sharding.prepare(clip, EMA(clip).module, Accelerator())
    shares = [p.to_local().numel() if isinstance(p, DTensor) else None for p in clip.parameters()]
    write_json(out / f"process-{rank_and_world()[0]}.json", {"sizes": sizes, "shares": shares})
    leave()


def fail(out: Path, fault: str) -> None:
    """A run with a fault in the second process."""
    processes()
    events = {2: FAULTS[fault]} if rank_and_world()[0] else {}
    train(tiny.Toy(events=events), tiny.TRAIN, out, {})


if __name__ == "__main__":
    arguments = Path(sys.argv[1]), *sys.argv[2:]
    run_command(partial(fail if len(arguments) > 1 else shares, *arguments))
