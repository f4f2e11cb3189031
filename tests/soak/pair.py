"""One of two processes that train together, started by torch.distributed.run: python -m soak.pair OUT."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import tiny

from ldm.distributed import leave
from soak.common import training, watched

if __name__ == "__main__":
    print("pid", os.getpid(), flush=True)
    config = replace(tiny.TRAIN, steps=150, save_every=5, keep=99, log_every=5, ema_decay=0.9)
    training(watched(tiny.Toy, 0.02), config, Path(sys.argv[1]))()
    leave()
