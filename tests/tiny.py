"""The smallest trainings that still have every part; shared by the tests of the loop, the tasks and the scripts."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from inventory_tools import flat
from PIL import Image
from torch import Tensor, nn

from ldm.clip import TextConfig, VisionConfig
from ldm.config import to_dict
from ldm.data import DataConfig, open_dataset
from ldm.diffusion import ScheduleConfig
from ldm.distributed import Draws
from ldm.model_io import load_tensors, save_tensors, write_json
from ldm.train.autoencoder import AutoencoderConfig, LossConfig
from ldm.train.auxiliary import GroundingConfig
from ldm.train.clip import CLIPConfig
from ldm.train.config import OptimizerConfig, TrainConfig
from ldm.train.diffusion import DiffusionConfig, PreviewConfig
from ldm.train.loop import Losses, Modules, Task
from ldm.unet import UNetConfig
from ldm.vae import VAE, VAEConfig

DATA = DataConfig(length=24)
TRAIN = TrainConfig(
    steps=4,
    batch_size=4,
    log_every=2,
    validate_every=0,
    preview_every=0,
    save_every=0,
    optimizer=OptimizerConfig(lr=2e-3, warmup=0, decay="constant", weight_decay=0.0),
)
LOSS = LossConfig(perceptual_depth=1, gan_start=0, gan_ramp=0, discriminator_channels=4, discriminator_layers=2)
NO_READERS, READERS = GroundingConfig(), GroundingConfig(words=1.0, picture=10.0, window=3, layers=1)
EMPTY = ("--config", os.devnull)
TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def autoencoder(train: TrainConfig = TRAIN, loss: LossConfig = LOSS) -> AutoencoderConfig:
    """32 px -> 8 x 8 latents, with a GAN from the first step on."""
    model = VAEConfig(block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4)
    return AutoencoderConfig(data=DATA, model=model, loss=loss, train=train, held_out=4, statistics=24)


def encoder() -> VAE:
    """A VAE that nobody has trained."""
    torch.manual_seed(0)
    return VAE(autoencoder().model)


def clip(train: TrainConfig = TRAIN, grounding: GroundingConfig = NO_READERS) -> CLIPConfig:
    """A context of 32 x 32."""
    text = TextConfig(**TOWER, projection_dim=16, max_position_embeddings=32)
    vision = VisionConfig(**TOWER, projection_dim=16, patch_size=8)
    return CLIPConfig(
        data=DATA, vocab_size=560, text=text, vision=vision, train=train, grounding=grounding, held_out=16
    )


def diffusion(vae: Path | str, text_encoder: Path | str, train: TrainConfig = TRAIN, **changes) -> DiffusionConfig:
    """Two levels, one of them with cross-attention."""
    model = UNetConfig(
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    fixed = {"data": DATA, "model": model, "train": train, "held_out": 4, "preview": PreviewConfig(count=2, steps=2)}
    fixed["schedule"] = ScheduleConfig(timestep_spacing="trailing", sampler="ddim")
    return DiffusionConfig(**{"vae": str(vae), "text_encoder": str(text_encoder)} | fixed | changes)


def overrides(config: Any) -> list[str]:
    """Every value of a config as `key=value`."""
    return [f"{key}={json.dumps(value)}" for key, value in flat(to_dict(config)).items() if value is not None]


def samples(count: int) -> list[dict]:
    """The first shapes scenes."""
    dataset = open_dataset(DATA, "train")
    return [dataset[i] for i in range(count)]


def fail(error: BaseException) -> None:
    raise error


def draws(step: int = 0) -> Draws:
    """The random numbers of a step."""
    return Draws(0, step)


def copied(module: nn.Module) -> dict[str, Tensor]:
    """A module's state as it is now."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the safetensors below a folder."""
    files = {file.relative_to(folder).with_suffix(""): load_tensors(file) for file in folder.rglob("*.safetensors")}
    return {f"{name}/{key}": tensor for name, tensors in files.items() for key, tensor in tensors.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two states are the same to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Toy(Task):
    """Two linear maps on noisy points: a task for the loop alone. `wrong` is added to the loss at a step, and `events`
    are called at the start of one, once; both by step."""

    def __init__(self, noise: float = 0.1, wrong: dict | None = None, events: dict | None = None):
        torch.manual_seed(0)
        self.modules = {"first": nn.Linear(3, 2), "second": nn.Linear(2, 1)}
        points = torch.randn(11, 3)
        self.dataset, self.held_out = [{"x": x, "y": x.sum()} for x in points], None
        self.noise, self.wrong, self.events = noise, wrong or {}, events or {}
        self.exports = 0

    def losses(self, modules: Modules, batch: dict, step: int, draws: Draws) -> Losses:
        self.events.pop(step, lambda: None)()
        hidden = modules["first"](batch["x"] + self.noise * draws.randn(*batch["x"].shape))
        yield "first", (hidden.sum(1) - batch["y"]).square().mean(), {}
        loss = (modules["second"](hidden.detach())[:, 0] - batch["y"]).square().mean()
        yield "second", loss * 1.0 + self.wrong.get(step, 0.0), {"noted": step}

    def validate(self, modules: Modules) -> dict[str, float]:
        return {"noise": float(torch.rand(()))}

    def preview(self, modules: Modules) -> Image.Image:
        return Image.new("RGB", (2, 2))

    def measure(self, modules: Modules, final: bool) -> dict[str, bool]:
        return {"final": final}

    def export(self, modules: Modules, folder: Path, measured: dict[str, bool]) -> None:
        self.exports += 1
        (folder / "first").mkdir(parents=True, exist_ok=True)
        save_tensors(folder / "first" / "model.safetensors", modules["first"].state_dict())
        write_json(folder / "first" / "config.json", measured)
