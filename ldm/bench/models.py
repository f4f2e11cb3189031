"""The weights and inputs that both sides get: seeded, through a folder that both libraries open."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.clip import CLIP, TextConfig, TextEncoder, VisionConfig
from ldm.config import UserError
from ldm.diffusion import Schedule, ScheduleConfig
from ldm.model_io import find_root, read_json
from ldm.pipeline_io import Parts, save_parts
from ldm.tokenizer import Tokenizer
from ldm.unet import UNet, UNetConfig
from ldm.vae import VAE, VAEConfig

PROMPTS = ("a red circle above a blue square", "a green star", "a 3D emoji of a red apple", "a flat emoji of a dog")
PROMPTS += ("two blue crosses", "a yellow triangle left of a red ring", "a smiling cat", "a house")
CONTEXT_WIDTH, LENGTH = 64, 77  # of the models in Stable Diffusion's shape
CLIP_NAME = "clip"
KL, LR = 1e-4, 1e-4  # of training steps
FORWARDS = 3  # a backward reads the weights twice more


def folder(model: str, home: Path) -> Path:
    """Where the model lies: a shipped one, `sd-W` (Stable Diffusion 1.5's shape with widths W, 2W, 3W, 3W) or a CLIP
    of emoji's sizes; the last two are written into `home` on first use, with random weights."""
    if not model.startswith("sd-") and model != CLIP_NAME:
        return find_root(model)
    path = home / model
    if not path.exists():
        part = home / f".{model}.part"
        shutil.rmtree(part, ignore_errors=True)
        if model == CLIP_NAME:
            clip().save_pretrained(part)
        else:
            save_parts(part, stable_diffusion(int(model.removeprefix("sd-"))))
        part.rename(path)
    return path


def stable_diffusion(width: int) -> Parts:
    """A whole pipeline in Stable Diffusion 1.5's shape, of that width, with 8 heads and a small text encoder."""
    if width < 32 or width % 32:
        raise UserError(f"width {width} is not allowed: a multiple of 32, which norm groups need")
    widths = (width, 2 * width, 3 * width, 3 * width)
    tokenizer = Tokenizer.train(PROMPTS, 560, LENGTH)
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes = {"hidden_size": CONTEXT_WIDTH, "intermediate_size": 4 * CONTEXT_WIDTH, "projection_dim": CONTEXT_WIDTH}
    text = TextConfig(vocab_size=len(tokenizer), num_hidden_layers=2, num_attention_heads=4, **sizes, **ends)
    unet = UNetConfig(block_out_channels=widths, cross_attention_dim=CONTEXT_WIDTH, sample_size=16)
    vae = VAEConfig(block_out_channels=(32, 64, 96, 96), sample_size=128)
    schedule = ScheduleConfig(sampler="ddim", prediction_type="v_prediction", timestep_spacing="trailing")
    models = (randomize(VAE(vae), 1), randomize(TextEncoder(text), 2), tokenizer, randomize(UNet(unet), 3))
    return Parts(*models, Schedule(schedule))


def clip() -> CLIP:
    """Both towers at emoji's sizes."""
    sizes = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 6, "projection_dim": 192}
    ends = {"bos_token_id": 2046, "eos_token_id": 2047, "pad_token_id": 2047}
    text = TextConfig(vocab_size=2048, num_hidden_layers=4, max_position_embeddings=32, **sizes, **ends)
    torch.manual_seed(0)
    return CLIP(text, VisionConfig(image_size=64, patch_size=8, num_hidden_layers=4, **sizes))


def randomize(model: nn.Module, seed: int) -> nn.Module:
    """Every parameter drawn anew so that what passes through keeps its size: an error anywhere is seen at the end."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(draw * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(0.1 * draw + name.endswith("weight"))
    return model


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normals that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text_length(model: str, home: Path) -> int:
    """Tokens of the model's prompts."""
    return read_json(folder(model, home) / "text_encoder" / "config.json")["max_position_embeddings"]


def unet_inputs(
    params: dict[str, Any], config: UNetConfig, home: Path, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """z_t (B, C, s, s), a timestep and a context (2B, L, D), negatives first; (B, L, D) unless guided."""
    batch, side = params["batch"], params["side"]
    contexts = 2 * batch if params["guided"] else batch
    z_t = normal(batch, config.in_channels, side, side, seed=1).to(device)
    length = params.get("length") or text_length(params["model"], home)
    context = normal(contexts, length, config.cross_attention_dim, seed=2).to(device)
    return z_t, torch.tensor(500, device=device), context


def pictures(batch: int, size: int, device: torch.device) -> Tensor:
    """Smooth pictures (B, 3, size, size) in [-1, 1]."""
    small = normal(batch, 3, max(size // 8, 1), max(size // 8, 1), seed=3)
    return nn.functional.interpolate(small, size=(size, size), mode="bilinear").tanh().to(device)


def prompts(batch: int) -> list[str]:
    """As many as pictures are made."""
    return [PROMPTS[i % len(PROMPTS)] for i in range(batch)]


def training_batch(kind: str, params: dict[str, Any], home: Path, device: torch.device) -> dict[str, Tensor]:
    """What a training step of `kind` sees, ready on the device."""
    batch = params["batch"]
    if kind == "train-unet":
        table = read_json(folder(params["model"], home) / "unet" / "config.json")
        channels, side, width = table["in_channels"], params["side"], table["cross_attention_dim"]
        length = text_length(params["model"], home)
        found = {
            "z_t": normal(batch, channels, side, side, seed=4),
            "target": normal(batch, channels, side, side, seed=5),
            "t": torch.arange(batch) * 999 // max(batch - 1, 1),
            "context": normal(batch, length, width, seed=6),
        }
    elif kind == "train-clip":
        tokens = torch.randint(0, 2040, (batch, 32), generator=torch.Generator().manual_seed(7))
        tokens[:, 0], tokens[:, 20:] = 2046, 2047
        found = {"x": pictures(batch, 64, device), "tokens": tokens}
    else:
        found = {"x": pictures(batch, params["size"], device)}
    return {name: value.to(device) for name, value in found.items()}


def gradient(module: nn.Module) -> Tensor:
    """All gradients as one vector, in the order of the parameters' names."""
    found = dict(module.named_parameters())
    return torch.cat([found[name].grad.flatten() for name in sorted(found) if found[name].grad is not None])
