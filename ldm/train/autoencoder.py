"""Training the VAE: reconstruction + perceptual + KL + patch-GAN (Rombach et al. 2022, section 3.1)."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ldm import losses
from ldm.config import require
from ldm.data import DataConfig, spread
from ldm.discriminator import PatchDiscriminator
from ldm.distributed import Draws, mean_over_processes
from ldm.images import tile, to_float
from ldm.metrics import psnr, ssim
from ldm.perceptual import perceptual_network
from ldm.train.config import TrainConfig, require_above_zero, require_least
from ldm.train.loop import Losses, Modules, Task
from ldm.train.optim import freeze
from ldm.vae import VAE, VAEConfig

DISCRIMINATOR_BETAS = (0.5, 0.9)  # as in the published code of VQGAN (Esser et al. 2021)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the terms; every term is a mean over elements."""

    l2: float = 0.0  # weight of the squared error beside the absolute error
    perceptual: float = 1.0  # weight of the perceptual distance
    perceptual_net: str = "effnet-lite0"  # or lpips-vgg, lpips-alex
    perceptual_path: str | None = None  # file of its weights; none: where they are downloaded to
    perceptual_depth: int | None = None  # stages of it to compare; none: 4 of effnet-lite0, all 5 of LPIPS
    kl: float = 1e-4  # weight of the KL divergence per latent element
    gan: float = 0.5  # weight of the GAN term, times the adaptive weight and the ramp; 0: no discriminator
    gan_start: int = 5000  # first step of the GAN term; the discriminator learns from half of that on
    gan_ramp: int = 1000  # steps over which the GAN term grows to its full weight
    gan_maximum: float = 1e4  # largest adaptive weight
    discriminator_lr: float | None = None  # of an AdamW with betas 0.5 and 0.9; none: train.optimizer
    discriminator_channels: int = 64  # of its first layer, a multiple of 4
    discriminator_layers: int = 3  # halvings of the resolution

    def __post_init__(self) -> None:
        require_least(self, "loss.", 0, "l2", "perceptual", "kl", "gan", "gan_start", "gan_ramp", "gan_maximum")
        require_above_zero(self, "loss.", "discriminator_lr")


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """All options of `train_autoencoder`. `model.sample_size` is set from `data.size`."""

    vae: str = ""  # start from these weights (run folder, shipped model, Stable Diffusion) instead of `model`
    data: DataConfig = field(default_factory=DataConfig)
    model: VAEConfig = field(default_factory=VAEConfig)
    frozen: tuple[str, ...] = ()  # name patterns of VAE parameters that are not trained, e.g. "encoder.*"
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    held_out: int = 512  # validation images
    statistics: int = 50_000  # largest number of training images that the latent shift and scale are measured on

    def __post_init__(self) -> None:
        require_least(self, "", 1, "held_out", "statistics")


class AutoencoderTask(Task):
    """The generator's and the discriminator's step on one batch of images."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__(config, need_captions=False)
        loss, size, smallest = config.loss, config.data.size, 11  # pixels, the window of SSIM
        vae = VAE.from_pretrained(config.vae) if config.vae else VAE(config.model)
        vae.config = replace(vae.config, sample_size=size)
        if loss.perceptual:
            names = [*filter(None, vae.perceptual_net.split(", ")), loss.perceptual_net]
            vae.perceptual_net = ", ".join(dict.fromkeys(names))
        freeze(vae, config.frozen)
        self.modules = {"vae": vae}
        if loss.gan:
            discriminator = PatchDiscriminator(loss.discriminator_channels, loss.discriminator_layers)
            smallest = max(smallest, discriminator.smallest)
            self.modules["discriminator"] = discriminator
            last = vae.decoder.conv_out.weight.requires_grad
            require(last, "frozen", config.frozen, "without the decoder's last layer, unless loss.gan=0")
        allowed = f"a multiple of {vae.factor}, the VAE's reduction, and {smallest} or more, for SSIM and discriminator"
        require(size % vae.factor == 0 and size >= smallest, "data.size", size, allowed)
        if loss.discriminator_lr:
            changes = {"lr": loss.discriminator_lr, "muon_lr": None, "betas": DISCRIMINATOR_BETAS}
            self.optimizers = {"discriminator": replace(config.train.optimizer, **changes)}
        perceptual = perceptual_network(loss.perceptual_net, loss.perceptual_path, loss.perceptual_depth)
        self.perceptual = perceptual.to(self.device)

    def losses(self, modules: Modules, batch: dict, step: int, draws: Draws) -> Losses:
        """The VAE's loss with the discriminator frozen, then the discriminator's on detached pictures."""
        c, vae, x = self.config.loss, self.modules["vae"], self.images(batch, draws)
        side = x.shape[-1] // vae.factor
        eps = draws.randn(len(x), vae.config.latent_channels, side, side)

        # VAE
        reconstruction, posterior = modules["vae"](x, eps)
        l1 = losses.reconstruction(reconstruction, x, c.l2)
        perceptual = self.perceptual(reconstruction, x).mean()
        kl = losses.kl(posterior.mean.float(), posterior.logvar.float())  # bfloat16 under autocast
        fidelity = l1 + c.perceptual * perceptual
        total, values = fidelity + c.kl * kl, {"l1": l1, "perceptual": perceptual, "kl": kl}
        if c.gan and step >= c.gan_start:
            discriminator = self.modules["discriminator"]  # not the wrapped one: it has no gradients to sum
            parameters = list(discriminator.parameters())  # a sharded module has others after its forward pass
            for p in parameters:
                p.requires_grad_(False)
            verdict = losses.hinge_generator(discriminator(reconstruction))
            for p in parameters:
                p.requires_grad_(True)
            last = vae.decoder.conv_out.weight
            weight = losses.adaptive_weight(fidelity, verdict, last, c.gan_maximum, mean=mean_over_processes)
            total = total + c.gan * losses.ramp(step, c.gan_start, c.gan_ramp) * weight * verdict
            values["gan_weight"] = weight
        yield "vae", total, values

        # Discriminator
        if c.gan and step >= c.gan_start // 2:
            real, fake = modules["discriminator"](torch.cat([x, reconstruction.detach()])).chunk(2)
            values = {"logits_real": real.mean(), "logits_fake": fake.mean()}
            yield "discriminator", losses.hinge_discriminator(real, fake), values

    def validate(self, modules: Modules) -> dict[str, float]:
        """PSNR (dB), SSIM and perceptual distance of the reconstructions (from the mean) of held-out images."""
        metrics = {"psnr": psnr, "ssim": ssim, "perceptual": self.perceptual}

        def measure(rows: slice, x: Tensor) -> Tensor:
            y = reconstruct(modules["vae"], x)
            return torch.stack([metric(y, x) for metric in metrics.values()]).cpu()

        values = self.share(measure, self.held_out, spread(self.held_out, self.config.held_out))
        return dict(zip(metrics, torch.cat(values, 1).mean(1).tolist(), strict=True))

    def preview(self, modules: Modules) -> Image.Image:
        """Up to eight held-out images, each above its reconstruction."""
        x = to_float(torch.stack([self.held_out[i]["image"] for i in spread(self.held_out, 8)]).to(self.device))
        pairs = torch.cat([x, reconstruct(modules["vae"], x)])
        return tile(pairs, columns=len(x), scale=max(1, 128 // x.shape[-1]))

    def measure(self, modules: Modules, final: bool) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation (C,) of raw latent samples of training images, of few of them unless `final`;
        None where the encoder is frozen.

        The variance of a sampled latent is E[std^2] + Var[mean]; accumulated in float64.
        """
        trained = self.modules["vae"]
        if not any(p.requires_grad for part in (trained.encoder, trained.quant_conv) for p in part.parameters()):
            return None

        def moments(rows: slice, x: Tensor) -> Tensor:
            posterior = modules["vae"].encode(x)
            mean, std = posterior.mean.double(), posterior.std.double()
            return len(x) * torch.stack([mean, mean**2 + std**2]).mean((1, 3, 4)).cpu()

        indices = spread(self.dataset, self.config.statistics if final else 1024)
        first, second = sum(self.share(moments, self.dataset, indices)) / len(indices)
        return first.float(), (second - first**2).sqrt().float()

    def export(self, modules: Modules, folder: Path, measured: tuple[Tensor, Tensor] | None) -> None:
        """Writes `folder/vae` with the shift and scale of the training set's latents folded in. A frozen encoder keeps
        its own: models trained on its latents still fit."""
        vae = modules["vae"]
        if measured:
            vae = vae.with_statistics(*(x.to(vae.quant_conv.bias.device) for x in measured))
        vae.save_pretrained(folder / "vae")


def reconstruct(vae: VAE, x: Tensor) -> Tensor:
    """Images through the posterior mean and back, clamped to [-1, 1]."""
    return vae.decode_raw(vae.encode(x).mean).clamp(-1, 1)
