"""The repeated blocks of models in training: recomputed to save memory, compiled to save time."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from ldm.train.config import TrainConfig
from ldm.train.sharding import LAYERS


def prepare(module: nn.Module, config: TrainConfig) -> None:
    """Changes how the blocks of a module are called, and no name in its state."""
    for block in module.modules():
        if type(block).__name__ in LAYERS:
            if config.checkpointing:  # nothing in a block is random
                block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
            if config.compile:
                block.compile()
