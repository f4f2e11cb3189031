"""The repeated blocks of models in training: compiled to save time, recomputed to save memory."""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ldm.train.config import TrainConfig
from ldm.train.sharding import LAYERS


def prepare(module: nn.Module, config: TrainConfig) -> None:
    """Changes how the blocks of a module run, but no name in its state."""
    if config.compile:
        torch.compiler.config.recompile_limit = 64  # a block is compiled once for each of its sizes
    for block in module.modules():
        if type(block).__name__ in LAYERS:
            if config.compile:
                block.forward = torch.compile(block.forward)
            if config.checkpointing:  # nothing in a block is random
                block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
