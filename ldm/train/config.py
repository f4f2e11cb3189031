"""How long and how a training runs; the same for every task."""

import math
from dataclasses import dataclass, field
from typing import Literal

from ldm.config import require


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) with linear warm-up, then constant or cosine decay to `final_lr`; weights of
    hidden layers by Muon where `muon_lr` is given."""

    lr: float = 1e-4
    muon_lr: float | None = None  # for the matrices and kernels of hidden layers; None: AdamW moves these too
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup: int = 100  # steps
    decay: Literal["constant", "cosine"] = "cosine"
    final_lr: float = 0.0  # as a share of lr, at the last step of a cosine

    def __post_init__(self) -> None:
        require(self.lr > 0, "train.optimizer.lr", self.lr, "above 0")
        require(self.muon_lr is None or self.muon_lr > 0, "train.optimizer.muon_lr", self.muon_lr, "above 0")
        require(all(0 <= b < 1 for b in self.betas), "train.optimizer.betas", self.betas, "each in [0, 1)")
        require(self.eps > 0, "train.optimizer.eps", self.eps, "above 0")
        require(self.weight_decay >= 0, "train.optimizer.weight_decay", self.weight_decay, "0 or more")
        require(self.warmup >= 0, "train.optimizer.warmup", self.warmup, "0 or more")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate at a step counted from 0, as a share of `lr`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.decay == "constant":
            return 1.0
        progress = (step - self.warmup) / max(steps - self.warmup, 1)
        return self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and how a training runs; intervals are in optimizer steps. 0 switches
    validation, previews and checkpoints off, but for those after the last step."""

    steps: int = 10_000
    batch_size: int = 64  # of one process and micro-batch
    accumulate: int = 1  # micro-batches an optimizer step
    seed: int = 0
    precision: Literal["no", "bf16"] = "no"  # autocast; the trained weights stay float32
    clip: float = 1.0  # gradient norm of each module
    workers: int = 0  # processes that load data
    ema_decay: float = 0.999
    ema_power: float = 0.75
    log_every: int = 50
    validate_every: int = 1000
    preview_every: int = 1000
    save_every: int = 1000
    keep: int = 2  # checkpoints
    best: str = ""  # a validated value by which the best checkpoint is kept as well: "loss", or "-psnr", the highest
    max_skipped: int = 20  # steps in a row without a finite loss before giving up
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every", "keep", "max_skipped"):
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "1 or more")
        for name in ("seed", "workers", "validate_every", "preview_every", "save_every"):
            require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "0 or more")
        for name in ("clip", "ema_power"):
            require(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "above 0")
        require(not self.best or self.validate_every, "train.best", self.best, "empty where validate_every is 0")
        require(0 <= self.ema_decay < 1, "train.ema_decay", self.ema_decay, "in [0, 1)")


def due(done: int, every: int) -> bool:
    """Whether something that happens `every` so many steps, 0 for never, happens after step `done`."""
    return every > 0 and done % every == 0
