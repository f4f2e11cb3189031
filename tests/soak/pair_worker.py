"""Run by pair.py in two processes, through `torch.distributed.run`: a slow training.

pair_worker.py OUT STEPS
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import tiny
import torch

from ldm.commands.cli import run_script
from ldm.train.loop import train
from soak.common import Slow


def main() -> None:
    print("pid", os.environ["RANK"], os.getpid(), flush=True)
    config = replace(tiny.TRAIN, steps=int(sys.argv[2]), save_every=5, log_every=5, ema_decay=0.9)
    train(Slow(0.02), config, Path(sys.argv[1]), {})
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
