"""Training the VAE: reconstruction + perceptual + KL + patch-GAN (Rombach et al. 2022, section 3.1)."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ldm import losses
from ldm.config import UserError, require
from ldm.data import DataConfig, batches, flip_half, open_dataset, spread, stack_images
from ldm.discriminator import PatchDiscriminator
from ldm.distributed import mean_over_processes
from ldm.images import tile, to_float
from ldm.metrics import psnr, ssim
from ldm.perceptual import perceptual_network
from ldm.train.loop import TrainConfig
from ldm.train.task import freeze, training_layout
from ldm.vae import VAE, VAEConfig

DISCRIMINATOR_BETAS = (0.5, 0.9)  # as in the published code of VQGAN (Esser et al. 2021)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the terms; every term is a mean over elements."""

    l2: float = 0.0  # squared error beside the absolute error
    perceptual: float = 1.0
    perceptual_net: str = "effnet-lite0"  # or lpips-vgg, lpips-alex
    perceptual_path: str | None = None  # its weights, where they are not in their usual home
    perceptual_depth: int | None = None  # stages of it that are compared; fewer is cheaper and sees colour more
    kl: float = 1e-4  # per latent element
    gan: float = 0.5  # times the adaptive weight and the ramp
    gan_start: int = 5000  # steps before the discriminator's verdict counts; it learns from half of that on
    gan_ramp: int = 1000  # steps from no weight to the whole
    gan_maximum: float = 1e4  # clamp of the adaptive weight
    discriminator_lr: float | None = None  # of an AdamW of its own, betas DISCRIMINATOR_BETAS; None: train.optimizer
    discriminator_channels: int = 64
    discriminator_layers: int = 3

    def __post_init__(self) -> None:
        for name in ("l2", "perceptual", "kl", "gan", "gan_start", "gan_ramp", "gan_maximum"):
            require(getattr(self, name) >= 0, f"loss.{name}", getattr(self, name), "0 or more")
        lr = self.discriminator_lr
        require(lr is None or lr > 0, "loss.discriminator_lr", lr, "above 0")


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Everything `train_autoencoder` can be told. `model.sample_size` is set from `data.size`."""

    vae: str = ""  # weights to start from: run folder, shipped model or Stable Diffusion folder, in place of `model`
    data: DataConfig = field(default_factory=DataConfig)
    model: VAEConfig = field(default_factory=VAEConfig)
    frozen: tuple[str, ...] = ()  # name patterns of VAE parameters to leave as they are, e.g. "encoder.*"
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    held_out: int = 512  # validation images that are measured
    statistics: int = 50_000  # at most so many training images give the latent shift and scale

    def __post_init__(self) -> None:
        require(self.held_out >= 1, "held_out", self.held_out, "1 or more")
        require(self.statistics >= 1, "statistics", self.statistics, "1 or more")


class AutoencoderTask:
    """The generator and the discriminator step of one batch of images."""

    def __init__(self, config: AutoencoderConfig):
        self.config = config
        self.dataset = open_dataset(config.data, "train", need_captions=False)
        self.held_out = open_dataset(config.data, "val", need_captions=False)
        loss = config.loss
        torch.manual_seed(config.train.seed)
        vae = VAE.from_pretrained(config.vae) if config.vae else VAE(config.model)
        vae.config = replace(vae.config, sample_size=config.data.size)
        freeze(vae, config.frozen)
        self.modules: dict[str, nn.Module] = {"vae": vae}
        if config.data.size % vae.factor:
            raise UserError(f"data.size {config.data.size} must be a multiple of {vae.factor}, the VAE's reduction")
        if loss.gan:
            self.modules["discriminator"] = make_discriminator(config)
        if loss.discriminator_lr:
            own = {"lr": loss.discriminator_lr, "muon_lr": None, "betas": DISCRIMINATOR_BETAS}
            self.optimizers = {"discriminator": replace(config.train.optimizer, **own)}
        for module in self.modules.values():
            module.to(memory_format=training_layout())
        self.perceptual = perceptual_network(loss.perceptual_net, loss.perceptual_path, loss.perceptual_depth)
        self.collate = stack_images
        self.at_once = min(64, config.train.batch_size)  # images, outside the training steps

    def losses(self, modules: dict[str, nn.Module], batch: dict, step: int) -> Iterator[tuple[str, Tensor, dict]]:
        """The VAE's loss with the discriminator frozen, then the discriminator's on detached pictures."""
        c = self.config.loss
        x = to_float(batch["image"]).contiguous(memory_format=training_layout())
        x = flip_half(x, torch.rand(len(x), device=x.device)) if self.config.data.flip else x
        eps = torch.randn(
            len(x),
            self.modules["vae"].config.latent_channels,
            *(side // self.modules["vae"].factor for side in x.shape[2:]),
            device=x.device,
        )
        reconstruction, posterior = modules["vae"](x, eps)
        l1 = losses.reconstruction(reconstruction, x, c.l2)
        perceptual = self.perceptual.to(x.device)(reconstruction, x).mean()
        kl = losses.kl(posterior.mean.float(), posterior.logvar.float())  # bfloat16 under autocast
        fidelity = l1 + c.perceptual * perceptual
        total, values = fidelity + c.kl * kl, {"l1": l1, "perceptual": perceptual, "kl": kl}
        if c.gan and step >= c.gan_start:
            verdict, weight = self.verdict(reconstruction, fidelity)
            total = total + c.gan * losses.ramp(step, c.gan_start, c.gan_ramp) * weight * verdict
            values["gan_weight"] = weight
        yield "vae", total, values
        if c.gan and step >= c.gan_start // 2:
            logits = modules["discriminator"](torch.cat([x, reconstruction.detach()]))
            real, fake = logits.chunk(2)
            values = {"logits_real": real.mean(), "logits_fake": fake.mean()}
            yield "discriminator", losses.hinge_discriminator(real, fake), values

    def verdict(self, reconstruction: Tensor, fidelity: Tensor) -> tuple[Tensor, Tensor]:
        """The generator's GAN loss, through a discriminator that stays as it is, and its adaptive weight.

        The bare discriminator: it has nothing to sync in this step.
        """
        discriminator = self.modules["discriminator"]
        parameters = list(discriminator.parameters())  # a sharded module has others from its forward pass on
        for parameter in parameters:
            parameter.requires_grad_(False)
        verdict = losses.hinge_generator(discriminator(reconstruction))
        for parameter in parameters:
            parameter.requires_grad_(True)
        last = self.modules["vae"].decoder.conv_out.weight
        return verdict, losses.adaptive_weight(
            fidelity, verdict, last, self.config.loss.gan_maximum, mean_over_processes
        )

    def after_step(self) -> None:
        """Nothing to hold."""

    def validate(self, device: torch.device) -> dict[str, float]:
        """PSNR (dB), SSIM and perceptual distance of reconstructions (from the mean) of held-out images."""
        sums = {"psnr": 0.0, "ssim": 0.0, "perceptual": 0.0}
        count = min(self.config.held_out, len(self.held_out))
        for x in images(self.held_out, count, self.at_once, device):
            y = self.reconstruct(x)
            sums["psnr"] += float(psnr(y, x).sum())
            sums["ssim"] += float(ssim(y, x).sum())
            sums["perceptual"] += float(self.perceptual(y, x).sum())
        return {name: value / count for name, value in sums.items()}

    def reconstruct(self, x: Tensor) -> Tensor:
        """Images through the posterior mean and back, clamped to [-1, 1]."""
        vae = self.modules["vae"]
        return vae.decode_raw(vae.encode(x).mean).clamp(-1, 1)

    def preview(self, device: torch.device) -> Image.Image:
        """Two rows of eight held-out images, each above its reconstruction; of fewer than sixteen, one row."""
        x = next(images(self.held_out, 16, 16, device))
        columns = min(8, len(x))
        x = x[: len(x) - len(x) % columns]
        pairs = torch.stack([x, self.reconstruct(x)], 1)  # (B, 2, 3, H, W)
        rows = rearrange(pairs, "(r c) p k h w -> (r p c) k h w", c=columns)
        return tile(rows, columns=columns, scale=max(1, 128 // x.shape[-1]))

    def export(self, folder: Path, device: torch.device, final: bool) -> None:
        """Measures shift and scale of the training set's latents (of a sample of it, unless this is the end), folds
        them in, writes `folder/vae`. A frozen encoder keeps its own: what was trained on its latents goes on fitting.
        """
        vae = self.modules["vae"]
        if any(p.requires_grad for part in (vae.encoder, vae.quant_conv) for p in part.parameters()):
            count = min(self.config.statistics if final else 1024, len(self.dataset))
            vae = vae.with_statistics(*latent_statistics(vae, self.dataset, count, self.at_once, device))
        vae.save_pretrained(folder / "vae")


def make_discriminator(config: AutoencoderConfig) -> PatchDiscriminator:
    """A new one; UserError where it needs larger pictures, a warning where the training ends before it counts."""
    loss, size, steps = config.loss, config.data.size, config.train.steps
    discriminator = PatchDiscriminator(loss.discriminator_channels, loss.discriminator_layers)
    if size < discriminator.smallest:
        raise UserError(
            f"data.size {size} is too small for loss.discriminator_layers {loss.discriminator_layers}, which needs"
            f" {discriminator.smallest}; take fewer layers"
        )
    if loss.gan_start >= steps:
        warnings.warn(
            f"the discriminator never counts: loss.gan_start is {loss.gan_start} and train.steps {steps}; give e.g."
            f" loss.gan_start={steps * 4 // 5} loss.gan_ramp={steps // 10}, or loss.gan=0 to train without it",
            stacklevel=2,
        )
    return discriminator


def images(dataset: Any, count: int, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    """At most `count` images, spread over the data set, in batches x (B, 3, H, W) in [-1, 1]."""
    for batch in batches(dataset, spread(dataset, count), batch_size):
        yield to_float(batch["image"].to(device)).contiguous(memory_format=training_layout())


@torch.no_grad()
def latent_statistics(
    vae: VAE, dataset: Any, count: int, batch_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of raw latent samples over `count` images spread over the data set.

    The variance of a sampled latent is E[std^2] + Var[mean]; accumulated in float64.
    """
    first = second = samples = 0.0
    total = -(-count // batch_size)
    for x in tqdm(images(dataset, count, batch_size, device), total=total, desc="latent statistics", leave=False):
        posterior = vae.encode(x)
        mean, variance = posterior.mean.double(), posterior.std.double() ** 2
        first = first + mean.sum((0, 2, 3))
        second = second + (mean**2 + variance).sum((0, 2, 3))
        samples += mean[:, 0].numel()
    mean = first / samples
    return mean.float(), (second / samples - mean**2).sqrt().float()
