"""Training the U-Net on latents and captions (Rombach et al. 2022, section 3.3)."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from ldm import losses
from ldm import model_io as weights
from ldm.clip import TextEncoder
from ldm.config import UserError, require
from ldm.data import DataConfig, batches, choose_captions, flip_half, open_dataset, spread, stack_images
from ldm.data.latents import open_latents
from ldm.diffusion import Denoiser, Density, Schedule, ScheduleConfig, loss_weight, sample_timesteps
from ldm.distributed import draw_for_all, processes
from ldm.images import captioned_grid, to_float
from ldm.pipeline import Pipeline
from ldm.pipeline_io import Parts, read_schedule, save_parts
from ldm.samplers import get_sampler, make_grid
from ldm.tokenizer import Tokenizer
from ldm.train.loop import TrainConfig
from ldm.train.task import freeze, training_layout
from ldm.unet import UNet, UNetConfig
from ldm.vae import VAE


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """The pictures made through the run, from fixed prompts and seeds."""

    prompts: tuple[str, ...] = ()  # empty: the first captions of the validation split
    count: int = 16
    steps: int = 20
    guidance: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.count >= 1, "preview.count", self.count, "1 or more")
        require(self.guidance >= 0, "preview.guidance", self.guidance, "0 or more")


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """Everything `train_diffusion` can be told. Latent channels, latent size and context width of `model` are
    set from the VAE and the text encoder."""

    vae: str = ""  # run folder, shipped model or Stable Diffusion folder
    text_encoder: str = ""  # the same, or any folder with a CLIP text model and its tokenizer
    unet: str = ""  # weights to start from, for fine-tuning
    data: DataConfig = field(default_factory=DataConfig)
    model: UNetConfig = field(default_factory=UNetConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    cache: str = ""  # file for the latents, written once; empty: encode every batch anew
    caption_dropout: float = 0.1  # share of captions replaced by "", which sampling uses as the null
    timesteps: Density = "uniform"
    logit_mean: float = 0.0  # of a logit_normal; above 0 it takes more of the noisy timesteps
    logit_std: float = 1.0  # of its normal, as logit_mean; other densities have no use for both
    min_snr_gamma: float | None = None
    train_text_encoder: bool = False  # let the diffusion loss move it as well, from the weights it comes with
    frozen: tuple[str, ...] = ()  # name patterns of U-Net parameters to leave as they are, e.g. "down_blocks.*"
    held_out: int = 256  # validation pairs that the loss is measured on

    def __post_init__(self) -> None:
        require(0 <= self.caption_dropout <= 1, "caption_dropout", self.caption_dropout, "in [0, 1]")
        require(abs(self.logit_mean) < math.inf, "logit_mean", self.logit_mean, "finite")
        require(0 < self.logit_std < math.inf, "logit_std", self.logit_std, "above 0 and finite")
        require(self.held_out >= 1, "held_out", self.held_out, "1 or more")
        if self.cache and self.data.flip:
            raise UserError("a latent cache holds no mirrored pictures: leave out cache, or set data.flip=false")


class DiffusionTask:
    """One denoising step on a batch of latents and captions. The VAE is frozen, so is the text encoder by default."""

    def __init__(self, config: DiffusionConfig):
        self.config = config
        for name in ("vae", "text_encoder"):
            if not getattr(config, name):
                raise UserError(f"config key {name!r} is empty: name the run folder (or model) to take it from")
        self.vae = VAE.from_pretrained(config.vae).requires_grad_(False).to(memory_format=torch.channels_last)
        self.text_encoder = TextEncoder.from_pretrained(config.text_encoder)
        self.text_encoder.requires_grad_(config.train_text_encoder)
        self.tokenizer = Tokenizer.from_pretrained(weights.find_root(config.text_encoder))
        self.schedule = Schedule(config.schedule)
        self.at_once = min(64, config.train.batch_size)  # images, outside the training steps
        get_sampler(config.schedule.sampler)
        make_grid(self.schedule, config.schedule.sampler, config.preview.steps)
        self.modules: dict[str, nn.Module] = {"unet": self.make_unet().to(memory_format=training_layout())}
        if config.train_text_encoder:
            self.modules["text_encoder"] = self.text_encoder
        images, self.held_out = (open_dataset(config.data, split) for split in ("train", "val"))
        if config.cache:
            images = open_latents(Path(config.cache), self.vae, images, self.at_once, processes().device)
        self.dataset = images
        self.collate = stack_latents if config.cache else stack_images
        self.check_latents()

    def make_unet(self) -> UNet:
        """The U-Net to start from, new or loaded, with its frozen parameters marked."""
        config = self.config
        torch.manual_seed(config.train.seed)
        unet = UNet.from_pretrained(config.unet) if config.unet else UNet(self.sized(config.model))
        if config.unet:
            warn_of_another_schedule(config.unet, config.schedule)
        fits = self.sized(unet.config)
        for key in ("in_channels", "out_channels", "cross_attention_dim"):
            have, want = getattr(unet.config, key), getattr(fits, key)
            if have != want:
                raise UserError(f"the U-Net in {config.unet!r} has {key} {have}, VAE and text encoder need {want}")
        multiple = self.vae.factor * 2 ** (len(unet.config.block_out_channels) - 1)
        if config.data.size % multiple:
            raise UserError(
                f"data.size {config.data.size} must be a multiple of {multiple}, what VAE and U-Net reduce by together"
            )
        freeze(unet, config.frozen)
        return unet

    def sized(self, model: UNetConfig) -> UNetConfig:
        """The U-Net's config with the sizes that the VAE and the text encoder fix."""
        channels = self.vae.config.latent_channels
        return replace(
            model,
            in_channels=channels,
            out_channels=channels,
            sample_size=self.config.data.size // self.vae.factor,
            cross_attention_dim=self.text_encoder.config.hidden_size,
        )

    def check_latents(self) -> None:
        """UserError when the normalized latents of some training images, evenly spread, are not near zero mean and
        unit variance."""
        batch = self.collate([self.dataset[i] for i in spread(self.dataset, self.at_once)])
        check_normalized(self.latents({k: v for k, v in batch.items() if k != "captions"}, processes().device))

    def latents(self, batch: dict, device: torch.device | None = None, flip: bool = False) -> Tensor:
        """Normalized latents (B, C, h, w), sampled anew from the batch's moments or images, half of these mirrored
        if told to."""
        batch = {k: v.to(device) if device and isinstance(v, Tensor) else v for k, v in batch.items()}
        if "mean" in batch:
            mean, std = batch["mean"], batch["std"]
            z = self.vae.normalize(mean + std * torch.randn_like(mean))
        else:
            x = to_float(batch["image"]).contiguous(memory_format=torch.channels_last)
            x = flip_half(x, torch.rand(len(x), device=x.device)) if flip else x
            with torch.no_grad():
                z = self.vae.to(x.device).normalize(self.vae.encode(x).sample())
        return z.contiguous(memory_format=training_layout())

    def context(self, modules: dict[str, nn.Module], captions: list[str], device: torch.device) -> Tensor:
        """Captions -> context (B, L, D), with a graph only where the text encoder is trained."""
        tokens = self.tokenizer(captions, warn=False).to(device)
        if "text_encoder" in modules:
            return modules["text_encoder"](tokens)
        with torch.no_grad():
            return self.text_encoder.to(device)(tokens)

    def losses(self, modules: dict[str, nn.Module], batch: dict, step: int) -> Iterator[tuple[str, Tensor, dict]]:
        """The weighted squared error at random timesteps, captions dropped at random."""
        z0 = self.latents(batch, flip=self.config.data.flip)
        captions = drop_captions(
            choose_captions(batch["captions"], torch.rand(len(batch["captions"]))), self.config.caption_dropout
        )
        c, total = self.config, len(self.schedule)
        draw = lambda count: sample_timesteps(count, total, c.timesteps, mean=c.logit_mean, std=c.logit_std)  # noqa: E731
        t = draw_for_all(draw, len(z0)).to(z0.device)
        yield "unet", self.loss(modules, z0, captions, t, torch.randn_like(z0)), {"z_std": z0.std()}

    def loss(self, modules: dict[str, nn.Module], z0: Tensor, captions: list[str], t: Tensor, eps: Tensor) -> Tensor:
        """The weighted squared error of one batch at given timesteps (B,) and noise (B, C, h, w)."""
        denoiser = Denoiser(modules["unet"], self.schedule)
        z_t = self.schedule.add_noise(z0, eps, t)
        prediction = denoiser.predict(z_t, t, self.context(modules, captions, z0.device))
        weight = loss_weight(self.schedule, t, denoiser.prediction, self.config.min_snr_gamma)
        return losses.diffusion(prediction, denoiser.target(z0, eps, t), weight.to(z0.device, z0.dtype))

    def after_step(self) -> None:
        """Nothing to hold."""

    def validate(self, device: torch.device) -> dict[str, float]:
        """The loss on held-out pairs, each at a fixed timestep, all of them evenly spread, and with fixed noise."""
        chosen = spread(self.held_out, self.config.held_out)
        fixed = torch.Generator().manual_seed(self.config.train.seed)
        order = torch.randperm(len(chosen), generator=fixed)  # the data may be sorted
        timesteps = torch.linspace(0, len(self.schedule) - 1, len(chosen)).long()[order]
        total, done = 0.0, 0
        for batch in batches(self.held_out, chosen, self.at_once):
            z0 = self.latents({"image": batch["image"]}, device)
            t = timesteps[done : done + len(z0)].to(device)
            eps = torch.stack([torch.randn(z0.shape[1:], generator=fixed) for _ in z0]).to(device)
            captions = [c[0] for c in batch["captions"]]
            total += float(self.loss(self.modules, z0, captions, t, eps)) * len(z0)
            done += len(z0)
        return {"loss": total / done}

    def preview(self, device: torch.device) -> Image.Image:
        """A captioned grid of samples from fixed prompts and seeds."""
        c = self.config.preview
        prompts = list(c.prompts) or [self.held_out.captions(i)[0] for i in spread(self.held_out, c.count)]
        pipe = Pipeline(self.parts()).to(device)
        images = pipe(prompts, steps=c.steps, guidance=c.guidance, seed=c.seed)
        return captioned_grid(images, prompts, columns=min(8, len(prompts)))

    def parts(self) -> Parts:
        """The pipeline's parts, those that are trained as they are now."""
        text_encoder = self.modules.get("text_encoder", self.text_encoder)
        return Parts(self.vae, text_encoder, self.tokenizer, self.modules["unet"], self.schedule)

    def export(self, folder: Path, device: torch.device, final: bool) -> None:
        """Writes the whole pipeline into `folder`."""
        save_parts(folder, self.parts())


def warn_of_another_schedule(folder: str, schedule: ScheduleConfig) -> None:
    """Warns where the pipeline that weights come from noises, or predicts, in another way than they will be trained."""
    root = weights.find_root(folder)
    if not (root / "scheduler").is_dir():
        return
    theirs = read_schedule(root / "scheduler")
    names = (
        "beta_schedule",
        "beta_start",
        "beta_end",
        "num_train_timesteps",
        "rescale_betas_zero_snr",
        "prediction_type",
    )
    pairs = [(name, getattr(theirs, name), getattr(schedule, name)) for name in names]
    changes = [f"{name} {was!r}, here {now!r}" for name, was, now in pairs if was != now]
    if changes:
        warnings.warn(f"the U-Net of {folder!r} was trained with schedule.{'; schedule.'.join(changes)}", stacklevel=2)


def drop_captions(captions: list[str], share: float) -> list[str]:
    """Each caption replaced by "", the null of sampling, with probability `share`, by torch's global generator."""
    dropped = (torch.rand(len(captions)) < share).tolist()
    return ["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)]


def check_normalized(z: Tensor) -> None:
    """UserError when latents (B, C, h, w) are far from zero mean and unit variance: the VAE's stored scale is then
    not that of these images, and no noise schedule fits."""
    mean, std = float(z.mean()), float(z.std())
    if not (abs(mean) < 0.5 and 0.5 < std < 2.0):
        raise UserError(
            f"the normalized latents have mean {mean:.2f} and standard deviation {std:.2f}, not about 0 and 1: "
            "the VAE's scaling_factor does not fit these images; train the VAE on them, or correct its config.json"
        )


def stack_latents(samples: list[dict]) -> dict:
    """Cached samples -> {"mean", "std": (B, C, h, w), "captions": B lists of strings}."""
    batch = {name: torch.stack([s[name] for s in samples]) for name in ("mean", "std")}
    return batch | {"captions": [s["captions"] for s in samples]}
