"""Length, batch and optimizer of a training run; the same for every task."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from ldm.config import require
from ldm.distributed import find_dtype


def require_least(config: Any, table: str, least: int, *names: str) -> None:
    """Raises UserError unless these values of the config table `table` are `least` or more."""
    for name in names:
        require(getattr(config, name) >= least, table + name, getattr(config, name), f"{least} or more")


def require_above_zero(config: Any, table: str, *names: str) -> None:
    """Raises UserError unless these values of the config table `table` are above 0; None is allowed as well."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value > 0, table + name, value, "above 0")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) with linear warm-up, then a constant or cosine learning rate; Muon for the
    weights of hidden layers where `muon_lr` is set."""

    lr: float = 1e-4  # peak learning rate of AdamW
    muon_lr: float | None = None  # of Muon, for matrices and kernels of hidden layers; none: AdamW for these too
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW
    eps: float = 1e-8  # of AdamW
    weight_decay: float = 0.01  # of matrices and kernels; never of norms, biases, embeddings and CLIP's scale
    warmup: int = 100  # steps of linear warm-up
    decay: Literal["constant", "cosine"] = "cosine"  # of the learning rate after the warm-up
    final_lr: float = 0.0  # at the last step of a cosine, as a share of lr

    def __post_init__(self) -> None:
        require_above_zero(self, "train.optimizer.", "lr", "muon_lr", "eps")
        require_least(self, "train.optimizer.", 0, "weight_decay", "warmup")
        require(all(0 <= b < 1 for b in self.betas), "train.optimizer.betas", self.betas, "each in [0, 1)")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate at a step, counted from 0, as a share of `lr`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.decay == "constant":
            return 1.0
        progress = (step - self.warmup) / (steps - self.warmup)
        return self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Intervals are in optimizer steps; 0 switches validation, previews or checkpoints off except after the last."""

    steps: int = 10_000  # optimizer steps
    batch_size: int = 64  # samples per process and micro-batch
    accumulate: int = 1  # micro-batches per optimizer step
    seed: int = 0  # of the initial weights, the order of the data and all random draws
    precision: Literal["auto", "no", "bf16"] = "auto"  # bf16: autocast, weights stay float32; auto: on a GPU
    compile: bool = False  # the repeated blocks, by torch's inductor: faster steps after minutes of preparation
    checkpointing: bool = False  # recompute the repeated blocks in the backward pass: less memory, slower steps
    clip: float = 1.0  # largest gradient norm of each module
    workers: int = 0  # processes that load data
    ema_decay: float = 0.999  # final decay of the averaged weights, which are validated and exported
    ema_power: float = 0.75  # warm-up of the decay: 1 - (1 + step)^-power
    log_every: int = 50  # steps between two lines of metrics.jsonl
    validate_every: int = 1000  # steps between two validations; 0: none but the last
    preview_every: int = 1000  # steps between two previews; 0: none but the last
    save_every: int = 1000  # steps between two checkpoints; 0: none but the last
    keep: int = 2  # newest checkpoints to keep
    trackers: tuple[str, ...] = ("tensorboard",)  # of accelerate, beside metrics.jsonl: tensorboard, wandb, ...
    best: str = ""  # validation value whose best checkpoint is kept as well: "loss" (lowest), "-psnr" (highest)
    max_skipped: int = 20  # consecutive steps with non-finite losses before giving up
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        require_least(self, "train.", 1, "steps", "batch_size", "accumulate", "log_every", "keep", "max_skipped")
        require_least(self, "train.", 0, "seed", "workers", "validate_every", "preview_every", "save_every")
        require_above_zero(self, "train.", "clip", "ema_power")
        require(0 <= self.ema_decay < 1, "train.ema_decay", self.ema_decay, "in [0, 1)")

    def on(self, device: torch.device) -> "TrainConfig":
        """With the precision that "auto" means on a device. Raises UserError for one that it lacks."""
        dtype = find_dtype("bfloat16" if self.precision == "bf16" else "auto", device)
        precision = "bf16" if dtype == torch.bfloat16 else "no"
        return replace(self, precision=precision) if self.precision == "auto" else self

    def due(self, step: int, every: int) -> bool:
        """Whether an action at intervals of `every` steps follows step `step`, counted from 1."""
        return step == self.steps or (every > 0 and step % every == 0)
