"""Run by tests/test_launch.py in two processes: which samples of shards and of a latent cache each of them
sees in three epochs, the shares that FSDP gives them, and the moments of features from both.

two_processes.py OUT
"""

import sys
from pathlib import Path

import tiny
import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from ldm.data.latents import open_latents
from ldm.data.order import EpochBatches
from ldm.data.shards import Shards
from ldm.distributed import gather_objects, processes, rank_and_world
from ldm.metrics import GaussianMoments
from ldm.model_io import write_json
from ldm.train import sharding
from ldm.train.clip import CLIPTask
from ldm.train.optim import EMA


def main(out: Path) -> None:
    processes()
    rank, world = rank_and_world()
    rows = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 100
    moments = GaussianMoments()
    for part in gather_objects(GaussianMoments().update(rows[:13] if rank == 0 else rows[13:])):
        moments.merge(part)
    assert moments.count == 50 and torch.allclose(moments.mean, rows.mean(0), rtol=1e-12)
    assert torch.allclose(moments.covariance, rows.T.cov(), atol=1e-9)

    shards = Shards(out / "shards", 32)
    cached = open_latents(out / "latents.safetensors", tiny.encoder(), shards, 4, torch.device("cpu"))
    names = {}
    for name, dataset in (("shards", shards), ("cache", cached)):
        blocks = getattr(dataset, "lengths", None)
        order = EpochBatches(len(dataset), 3, 0, rank, world, 0, -(-3 * len(dataset) // 6), blocks)
        names[name] = [[dataset[i]["key"] for i in batch] for batch in order]

    clip = CLIPTask(tiny.clip()).modules["clip"]
    sizes = [p.numel() for p in clip.parameters()]
    sharding.prepare(clip, EMA(clip).module, Accelerator())
    shares = [p.to_local().numel() if isinstance(p, DTensor) else None for p in clip.parameters()]
    write_json(out / f"process-{rank}.json", {"names": names, "sizes": sizes, "shares": shares})
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
