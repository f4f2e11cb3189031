"""Run by tests/test_train.py in two processes, through `torchrun`: trains, and saves what came out; caches latents and
reads shards and cache, and says which samples each process saw.

two_processes.py OUT
"""

import sys
from dataclasses import replace
from pathlib import Path

import tiny
import torch
from accelerate.utils import gather_object

from ldm.data.latents import open_latents
from ldm.data.shards import Shards
from ldm.metrics import GaussianMoments
from ldm.model_io import save_tensors, write_json
from ldm.train.autoencoder import AutoencoderTask
from ldm.train.clip import CLIPTask
from ldm.train.loop import Run, train


def main(out: Path) -> None:
    """The loop on the toy, a VAE with its discriminator, and CLIP with one caption a picture and with readers; what
    both have seen of some features; then the data."""
    clip = CLIPTask(tiny.clip())
    clip.dataset = tiny.samples(16, captions=1)
    trainings = {
        "toy": (tiny.Toy(noise=0.0), tiny.TRAIN),
        "autoencoder": (AutoencoderTask(tiny.autoencoder()), replace(tiny.TRAIN, steps=2)),
        "clip": (clip, tiny.PLAIN),
        "readers": (CLIPTask(tiny.clip(grounding=tiny.READERS)), tiny.PLAIN),
    }
    for name, (task, config) in trainings.items():
        train(task, config, out / name, {})
        for part, module in task.modules.items():
            flat = torch.cat([value.flatten().double() for value in module.state_dict().values()])
            sums = gather_object([float(flat.sum()), float(flat.square().sum())])
            assert sums[:2] == sums[2:], f"{name} {part} differs between the processes"
        if int(torch.distributed.get_rank()) == 0:
            save_tensors(out / f"{name}.safetensors", next(iter(task.modules.values())).state_dict())
    rank = int(torch.distributed.get_rank())
    rows = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 100
    gathered = GaussianMoments()
    for part in gather_object([GaussianMoments().update(rows[:13] if rank == 0 else rows[13:])]):
        gathered.merge(part)
    assert gathered.count == 50 and torch.allclose(gathered.mean, rows.mean(0), rtol=1e-12)
    assert torch.allclose(gathered.covariance, rows.T.cov(), atol=1e-9), "moments of two processes are not those of one"
    data(out, rank)
    torch.distributed.destroy_process_group()


def data(out: Path, rank: int) -> None:
    """Which samples of shards and of a cache each process gets in three epochs, in names-RANK.json."""
    shards = Shards(out / "shards", 32)
    cached = open_latents(out / "latents.safetensors", tiny.encoder(), shards, 4, torch.device("cpu"))
    names = {}
    for name, dataset in (("shards", shards), ("cache", cached)):
        task = tiny.Toy()
        task.dataset, task.collate = dataset, lambda samples: {"keys": [sample["key"] for sample in samples]}
        steps = -(-3 * len(dataset) // 6)
        run = Run(task, replace(tiny.TRAIN, batch_size=3, steps=steps, workers=rank), out / name)
        names[name] = [batch["keys"] for batch, _ in run.batches(0)]
    write_json(out / f"names-{rank}.json", names)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
