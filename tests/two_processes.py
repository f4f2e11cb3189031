"""Run by tests/test_launch.py in two processes: which samples of shards and of a latent cache each of them
sees in three epochs, the shares that FSDP gives them.

two_processes.py OUT
"""

import sys
from pathlib import Path

import tiny
import torch
from accelerate import Accelerator
from test_data_shards import open_shards
from torch.distributed.tensor import DTensor

from ldm.data.latents import open_latents
from ldm.data.order import EpochBatches
from ldm.distributed import processes, rank_and_world
from ldm.model_io import write_json
from ldm.train import sharding
from ldm.train.clip import CLIPTask
from ldm.train.optim import EMA


def main(out: Path) -> None:
    processes()
    rank, world = rank_and_world()
    shards = open_shards(out / "shards", 32)
    cached = open_latents(out / "latents.safetensors", tiny.encoder(), shards, 4, torch.device("cpu"))
    names = {}
    for name, dataset in (("shards", shards), ("cache", cached)):
        blocks = getattr(dataset, "lengths", None)
        order = EpochBatches(len(dataset), 3, 0, rank, world, 0, -(-3 * len(dataset) // 6), blocks)
        names[name] = [[shards.identity(i)[0] for i in batch if dataset[i]] for batch in order]

    clip = CLIPTask(tiny.clip()).modules["clip"]
    sizes = [p.numel() for p in clip.parameters()]
    sharding.prepare(clip, EMA(clip).module, Accelerator())
    shares = [p.to_local().numel() if isinstance(p, DTensor) else None for p in clip.parameters()]
    write_json(out / f"process-{rank}.json", {"names": names, "sizes": sizes, "shares": shares})
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
