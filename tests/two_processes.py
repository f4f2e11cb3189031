"""Run by tests/test_train.py in two processes, through `torchrun`: trains, and saves what came out.

two_processes.py OUT
"""

import sys
from dataclasses import replace
from pathlib import Path

import tiny
import torch
from accelerate.utils import gather_object

from ldm.metrics import GaussianMoments
from ldm.tasks.autoencoder import AutoencoderTask
from ldm.tasks.clip import CLIPTask
from ldm.train import train
from ldm.weights import save_tensors


def main(out: Path) -> None:
    """The loop on the toy, a VAE with its discriminator, and CLIP with one caption a picture and with readers; then
    what both have seen of some features."""
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
    gathered = GaussianMoments().update(rows[:13] if rank == 0 else rows[13:]).gather()
    assert gathered.count == 50 and torch.allclose(gathered.mean, rows.mean(0), rtol=1e-12)
    assert torch.allclose(gathered.covariance, rows.T.cov(), atol=1e-9), "moments of two processes are not those of one"
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
