"""Run by tests/test_train.py in two processes, through `torchrun`: trains, and saves what came out.

two_processes.py OUT
"""

import sys
from dataclasses import replace
from pathlib import Path

import tiny
import torch
from accelerate.utils import gather_object

from ldm.tasks.autoencoder import AutoencoderTask
from ldm.tasks.clip import CLIPTask
from ldm.train import train
from ldm.weights import save_tensors


def main(out: Path) -> None:
    """The loop on the toy, a VAE with its discriminator, and CLIP with one caption a picture and with readers."""
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
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
