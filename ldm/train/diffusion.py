"""Training the U-Net on latents and captions (Rombach et al. 2022, section 3.3)."""

import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm import losses, model_io
from ldm.clip import TextEncoder
from ldm.config import UserError, require
from ldm.data import DataConfig, choose_captions, spread, stack
from ldm.data.latents import open_latents
from ldm.diffusion import Denoiser, Density, Schedule, ScheduleConfig, loss_weight, sample_timesteps
from ldm.distributed import Draws, fsdp_requested, map_over_processes, rank_and_world, upload
from ldm.images import captioned_grid
from ldm.lora import Adapters, LoRAConfig, save_lora
from ldm.pipeline import Pipeline
from ldm.pipeline_io import Parts, check_tokenizer, read_schedule, save_parts
from ldm.samplers import make_grid
from ldm.tokenizer import Tokenizer
from ldm.train.config import TrainConfig, require_above_zero, require_least
from ldm.train.loop import Losses, Modules, Task, to_device
from ldm.train.optim import freeze
from ldm.unet import UNet, UNetConfig
from ldm.vae import VAE

# The fields of a schedule that a U-Net is trained for.
NOISE = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps", "rescale_betas_zero_snr", "prediction_type")


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """Pictures sampled during training, from fixed prompts and seeds."""

    prompts: tuple[str, ...] = ()  # empty: the first captions of validation images
    count: int = 16  # validation images, where no prompts are given
    steps: int = 20  # sampling steps
    guidance: float = 3.0  # guidance scale
    seed: int = 0  # of the first picture

    def __post_init__(self) -> None:
        require_least(self, "preview.", 1, "count")
        require_least(self, "preview.", 0, "guidance", "seed")


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """All options of `train_diffusion`. Latent channels, latent size and context width of `model` are set from the VAE
    and the text encoder."""

    vae: str = ""  # run folder, shipped model or Stable Diffusion folder
    text_encoder: str = ""  # the same, or any folder with a CLIP text model and its tokenizer
    unet: str = ""  # weights to start from, for fine-tuning
    data: DataConfig = field(default_factory=DataConfig)
    model: UNetConfig = field(default_factory=UNetConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    cache: str = ""  # of the latents of all training images: file, or folder/ or URL for one per shard; empty: none
    caption_dropout: float = 0.1  # share of captions replaced by "", which sampling uses as the null
    timesteps: Density = "uniform"  # density of the training timesteps: uniform, stratified or logit_normal
    logit_mean: float = 0.0  # of logit_normal; above 0 takes more of the noisy timesteps
    logit_std: float = 1.0  # of logit_normal
    min_snr_gamma: float | None = None  # limit of the loss weight by min-SNR, e.g. 5; none: no weighting
    train_text_encoder: bool = False  # train the text encoder too, from the weights it comes with
    frozen: tuple[str, ...] = ()  # name patterns of U-Net parameters that are not trained, e.g. "down_blocks.*"
    held_out: int = 256  # validation pairs

    def __post_init__(self) -> None:
        require(0 <= self.caption_dropout <= 1, "caption_dropout", self.caption_dropout, "in [0, 1]")
        require_above_zero(self, "", "logit_std", "min_snr_gamma")
        require_least(self, "", 1, "held_out")
        if self.lora.rank:
            require(self.unet != "", "unet", "", "the model to adapt, where lora.rank is set")
            require(not self.frozen, "frozen", self.frozen, "left out where lora.rank is set: all weights are frozen")
            recalled = self.train.checkpointing or self.train.compile
            require(not recalled, "train.checkpointing or train.compile", True, "false where lora.rank is set")
        if self.cache and self.data.flip:
            raise UserError("a latent cache holds no mirrored pictures: leave out cache, or set data.flip=false")


class DiffusionTask(Task):
    """One denoising step on a batch of latents and captions. The VAE is frozen, and by default the text encoder."""

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__(config)
        for name in ("vae", "text_encoder"):
            require(getattr(config, name) != "", name, "", "the run folder (or model) to take it from")
        vae = VAE.from_pretrained(config.vae).requires_grad_(False)
        self.vae = vae.to(self.device, memory_format=torch.channels_last)
        text_encoder = TextEncoder.from_pretrained(config.text_encoder).to(self.device)
        self.text_encoder = text_encoder.requires_grad_(config.train_text_encoder)
        self.tokenizer = Tokenizer.from_pretrained(config.text_encoder)
        check_tokenizer(self.tokenizer, text_encoder)
        self.schedule = Schedule(config.schedule)
        make_grid(self.schedule, config.schedule.sampler, config.preview.steps)  # refuses an unknown sampler now
        self.modules = {"unet": self.make_unet()}
        if config.train_text_encoder:
            self.modules["text_encoder"] = text_encoder
        if config.lora.rank:
            adapted = {name: Adapters(model.to(self.device), config.lora) for name, model in self.modules.items()}
            self.modules = adapted
        if config.cache:
            where = self.batch_size, self.device, config.data.cache_gb
            self.dataset = open_latents(config.cache, self.vae, self.dataset, *where)
        batch = stack([self.dataset[i] for i in spread(self.dataset, self.batch_size)])
        draws = Draws(config.train.seed, 0, device=self.device)
        check_normalized(self.latents(to_device(batch, self.device), draws))

    def make_unet(self) -> UNet:
        """The U-Net to start from, new or loaded. Raises UserError where it does not fit the other parts."""
        config, channels, size = self.config, self.vae.config.latent_channels, self.config.data.size
        sizes = {"in_channels": channels, "out_channels": channels}
        sizes["cross_attention_dim"] = self.text_encoder.config.hidden_size
        if config.unet:
            unet = UNet.from_pretrained(config.unet)
            check_schedule(config.unet, config.schedule, strict=config.lora.rank > 0)
        else:
            unet = UNet(replace(config.model, **sizes))
        for key, fitting in sizes.items():
            value = getattr(unet.config, key)
            require(value == fitting, f"{key} of {config.unet}", value, f"{fitting}, to fit VAE and text encoder")
        multiple = self.vae.factor * 2 ** (len(unet.config.block_out_channels) - 1)
        allowed = f"a multiple of {multiple}, the reduction of VAE and U-Net together"
        require(size % multiple == 0, "data.size", size, allowed)
        unet.config, unet.distilled_steps = replace(unet.config, sample_size=size // self.vae.factor), 0
        freeze(unet, config.frozen)
        return unet

    @torch.no_grad()
    def latents(self, batch: dict, draws: Draws) -> Tensor:
        """Normalized latents (B, C, h, w), sampled from the posterior that is in the batch or of its images."""
        if "image" in batch:
            with self.autocast():
                posterior = self.vae.encode(self.images(batch, draws))
            batch = {"mean": posterior.mean.float(), "std": posterior.std.float()}
        mean, std = batch["mean"], batch["std"]
        return self.vae.normalize(mean + std * draws.randn(*mean.shape))

    def losses(self, modules: Modules, batch: dict, step: int, draws: Draws) -> Losses:
        """The weighted squared error at random timesteps, with captions dropped at random."""
        c, z0 = self.config, self.latents(batch, draws)
        captions = choose_captions(batch["captions"], draws.rand(len(z0)))
        dropped = (draws.rand(len(z0)) < c.caption_dropout).tolist()
        captions = ["" if drop else caption for drop, caption in zip(dropped, captions, strict=True)]
        t = draws.rows(
            lambda n, g: sample_timesteps(n, len(self.schedule), c.timesteps, g, c.logit_mean, c.logit_std), len(z0)
        )
        eps = draws.randn(*z0.shape)
        yield "unet", self.loss(modules, z0, captions, upload(t, z0.device), eps), {"z_std": z0.std()}

    def context(self, modules: Modules, captions: list[str]) -> Tensor:
        """Captions -> context (B, L, D)."""
        tokens = upload(self.tokenizer(captions, warn=False), self.device)
        with self.autocast():
            return modules.get("text_encoder", self.text_encoder)(tokens).float()

    def loss(self, modules: Modules, z0: Tensor, captions: list[str], t: Tensor, eps: Tensor) -> Tensor:
        """The weighted squared error at timesteps t (B,) with noise eps (B, C, h, w)."""
        denoiser, context = Denoiser(modules["unet"], self.schedule), self.context(modules, captions)
        prediction = denoiser.predict(self.schedule.add_noise(z0, eps, t), t, context)
        weight = loss_weight(self.schedule, t, denoiser.prediction, self.config.min_snr_gamma)
        return losses.diffusion(prediction, denoiser.target(z0, eps, t), weight.to(z0.device, z0.dtype))

    def fixed_draws(self, count: int, *sets: int) -> tuple[Tensor, Tensor]:
        """Timesteps (count,), evenly spread in random order, and noise (count, *sets, C, h, w), always the same."""
        fixed = torch.Generator().manual_seed(self.config.train.seed)
        order = torch.randperm(count, generator=fixed)  # the data may be sorted
        side = self.config.data.size // self.vae.factor
        noise = torch.randn(count, *sets, self.vae.config.latent_channels, side, side, generator=fixed)
        return torch.linspace(0, len(self.schedule) - 1, count).long()[order].to(self.device), noise

    def validate(self, modules: Modules) -> dict[str, float]:
        """The loss on held-out pairs, each at a fixed timestep, evenly spread, and with fixed noise."""
        indices = spread(self.held_out, self.config.held_out)
        timesteps, noise = self.fixed_draws(len(indices), 2)

        def measure(rows: slice, x: Tensor) -> float:
            posterior, eps = self.vae.encode(x), noise[rows].to(self.device)
            z0 = self.vae.normalize(posterior.mean + posterior.std * eps[:, 0])
            captions = [self.held_out.captions(i)[0] for i in indices[rows]]
            return float(self.loss(modules, z0, captions, timesteps[rows], eps[:, 1])) * len(x)

        return {"loss": sum(self.share(measure, self.held_out, indices)) / len(indices)}

    def preview(self, modules: Modules) -> Image.Image:
        """A captioned grid of pictures from fixed prompts and seeds."""
        c = self.config.preview
        prompts = list(c.prompts) or [self.held_out.captions(i)[0] for i in spread(self.held_out, c.count)]
        images = sample_shared(Pipeline(self.parts(modules)), prompts, c.seed, steps=c.steps, guidance=c.guidance)
        return captioned_grid(images, prompts, columns=min(8, len(prompts)))

    def parts(self, modules: Modules) -> Parts:
        """The pipeline's parts, with the trained `modules`."""
        text_encoder = modules.get("text_encoder", self.text_encoder)
        return Parts(self.vae, text_encoder, self.tokenizer, modules["unet"], self.schedule)

    def export(self, modules: Modules, folder: Path, measured: None) -> None:
        """Writes the whole pipeline into `folder`, or its adapters alone where only these are trained."""
        if self.config.lora.rank:
            save_lora(folder, modules, self.config.lora.kohya)
        else:
            save_parts(folder, self.parts(modules))


def sample_shared(pipe: Pipeline, prompts: list[str], seed: int = 0, **options: Any) -> list[Image.Image]:
    """Pictures with the seeds from `seed` on, which the processes share."""
    size = min(16, -(-len(prompts) // rank_and_world()[1]))  # one batch, so that all call a sharded model equally often

    def sample(start: int) -> list[Image.Image]:
        return pipe(prompts[start : start + size], seed=seed + start, **options)

    parts = map_over_processes(sample, range(0, len(prompts), size), even=fsdp_requested())
    return [image for part in parts for image in part]


def check_schedule(folder: str, ours: ScheduleConfig, strict: bool) -> None:
    """Warns where the U-Net to start from was trained with another noise schedule or prediction; where `strict`, raises
    UserError, since an adapter is used with the schedule of its model."""
    root = model_io.find_root(folder)
    path = root if root.is_file() else root / "scheduler"
    theirs = read_schedule(path) if path.exists() else ours
    changes = [f"schedule.{key}={getattr(theirs, key)}" for key in NOISE if getattr(theirs, key) != getattr(ours, key)]
    text = f"the U-Net of {folder!r} was trained with {' '.join(changes)}"
    if changes and strict:
        raise UserError(f"{text}; train its adapters with the same")
    if changes:
        warnings.warn(text, stacklevel=2)


def check_normalized(z: Tensor) -> None:
    """Raises UserError where latents (B, C, h, w) are far from zero mean and unit variance: the VAE's stored scale is
    then not that of these images, and no noise schedule fits."""
    mean, std = float(z.mean()), float(z.std())
    if not (abs(mean) < 0.5 and 0.5 < std < 2.0):
        raise UserError(
            f"the normalized latents have mean {mean:.2f} and standard deviation {std:.2f}, not about 0 and 1: "
            "the VAE's scaling_factor does not fit these images; train the VAE on them, or correct its config.json"
        )
