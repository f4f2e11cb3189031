"""Our side's training steps: through `ldm.train.run`, as the training scripts take them."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from ldm import losses
from ldm.bench import models
from ldm.bench.feeding import emoji_folder
from ldm.bench.worker import Job, synchronize
from ldm.clip import CLIP
from ldm.data import DataConfig
from ldm.train.config import OptimizerConfig, TrainConfig
from ldm.train.diffusion import DiffusionConfig, DiffusionTask
from ldm.train.run import Run
from ldm.train.task import training_layout
from ldm.unet import UNet
from ldm.vae import VAE


class FixedBatch:
    """A task of one module on one batch that lies ready."""

    def __init__(self, name: str, module: nn.Module, loss: Callable[[nn.Module, dict], Tensor]):
        self.modules, self.name, self.loss = {name: module}, name, loss
        self.dataset: list = []
        self.first: dict[str, Tensor] = {}  # loss and clipped gradients of the first step

    def losses(self, modules: dict[str, nn.Module], batch: dict, step: int) -> Iterator[tuple[str, Tensor, dict]]:
        """The one loss."""
        loss = self.loss(modules[self.name], batch)
        if "loss" not in self.first:
            self.first["loss"] = loss.detach().clone()
        yield self.name, loss, {}

    def after_step(self) -> None:
        """Keeps the gradients of the first step; clamps a CLIP's temperature, as its task does."""
        module = self.modules[self.name]
        if "gradient" not in self.first:
            self.first["gradient"] = models.gradient(module)
        if isinstance(module, CLIP):
            module.clamp_scale()


def unet_loss(model: nn.Module, batch: dict) -> Tensor:
    """The squared error of the prediction."""
    return losses.diffusion(model(batch["z_t"], batch["t"], batch["context"]), batch["target"])


def clip_loss(model: nn.Module, batch: dict) -> Tensor:
    """The contrastive loss."""
    images, texts, scale, _ = model(batch["x"], batch["tokens"])
    return losses.contrastive(images, texts, scale)


def vae_loss(model: nn.Module, batch: dict) -> Tensor:
    """The absolute error through a sample of the latent, and KL."""
    torch.manual_seed(0)  # the same latent noise on both sides
    reconstruction, posterior = model(batch["x"])
    return losses.reconstruction(reconstruction, batch["x"]) + models.KL * losses.kl(posterior.mean, posterior.logvar)


def train(kind: str, params: dict[str, Any], home: Path, device: torch.device) -> Job:
    """A whole step of `ldm.train.run` on a fixed batch: forward, backward, clip, check, AdamW, average."""
    open_model, loss = {
        "train-unet": (UNet.from_pretrained, unet_loss),
        "train-clip": (CLIP.from_pretrained, clip_loss),
        "train-vae": (VAE.from_pretrained, vae_loss),
    }[kind]
    part = {"train-unet": "unet", "train-clip": "", "train-vae": "vae"}[kind]
    module = open_model(models.folder(params.get("model", models.CLIP_NAME), home) / part)
    if kind != "train-clip":
        module.to(memory_format=training_layout())
    batch = models.training_batch(kind, params, home, device)
    batch = {n: v.contiguous(memory_format=training_layout()) if v.ndim == 4 else v for n, v in batch.items()}
    name = part or "clip"
    task = FixedBatch(name, module, loss)
    config = TrainConfig(
        batch_size=params["batch"], optimizer=OptimizerConfig(lr=models.LR, warmup=0, decay="constant")
    )
    run = Run(task, config, home / f"run-{name}")
    batches, step = itertools.repeat((batch, {})), itertools.count()

    def one() -> dict:
        run.step(batches, next(step))
        return task.first

    moved = models.FORWARDS * sum(p.nbytes for p in module.parameters()) + sum(v.nbytes for v in batch.values())
    return Job(run=one, bytes_moved=moved)


class Timers:
    """Seconds spent in some functions, each replaced where it is looked up; the clock waits for the GPU."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def watch(self, owner: Any, attribute: str, name: str) -> None:
        """From now on counts the time in `owner.attribute` as `name`."""
        inner = getattr(owner, attribute)

        def timed(*args: Any, **named: Any) -> Any:
            synchronize()
            start = perf_counter()
            try:
                return inner(*args, **named)
            finally:
                synchronize()
                self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - start

        setattr(owner, attribute, timed)


def step_share(kind: str, params: dict[str, Any], home: Path, device: torch.device) -> Job:
    """The step of a real training of the U-Net on cached latents, and the share of it that is neither the U-Net's
    forward nor its backward: loading, sampling latents, encoding captions, clip, optimizer, average."""
    model, size = params["model"], {"shapes": 32, "emoji": 64}[params["model"]]
    data = DataConfig(length=256)
    if model == "emoji":
        data = DataConfig(name="folder", path=str(emoji_folder(home)), size=size)
    optimizer = OptimizerConfig(lr=models.LR, muon_lr=1e-3 if params["muon"] else None, warmup=0, decay="constant")
    train_config = TrainConfig(steps=10**6, batch_size=params["batch"], optimizer=optimizer)
    config = DiffusionConfig(
        vae=model,
        text_encoder=model,
        unet=model,
        data=data,
        train=train_config,
        schedule=models_schedule(model),
        cache=str(home / f"{model}.safetensors"),
    )
    task = DiffusionTask(config)
    run = Run(task, train_config, home / f"run-{model}")
    batches, step, timers = run.batches(0), itertools.count(), Timers()
    timers.watch(run, "step", "step")
    timers.watch(run.wrapped["unet"], "forward", "forward")
    timers.watch(run.accelerator, "backward", "backward")
    timers.watch(task, "context", "captions")
    timers.watch(task, "latents", "latents")
    timers.watch(run, "clip", "clip")
    timers.watch(run.trained.averages["unet"], "update", "average")
    for held in run.trained.optimizers.values():
        timers.watch(held, "step", "optimizer")

    def parts() -> dict[str, float]:
        return timers.seconds

    def one() -> None:
        run.step(batches, next(step))

    def warm() -> None:
        one()
        timers.seconds.clear()

    return Job(run=one, warm=warm, parts=parts)


def models_schedule(model: str) -> Any:
    """The schedule of a shipped model."""
    from ldm.model_io import find_root
    from ldm.pipeline_io import read_schedule

    return read_schedule(find_root(model) / "scheduler")
