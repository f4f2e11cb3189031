"""Small models with random weights, and how to hold them against diffusers."""

import logging
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ldm.clip import TextConfig, TextEncoder
from ldm.diffusion import Schedule, ScheduleConfig
from ldm.pipeline_io import Parts
from ldm.tokenizer import Tokenizer
from ldm.unet import UNet, UNetConfig
from ldm.vae import VAE, VAEConfig

CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
LENGTH = 12


def randomize(model: nn.Module, seed: int = 0, scale: float = 0.1) -> nn.Module:
    """Every parameter drawn anew, also those that start at 0 or 1, so that none can be forgotten unseen: weights
    keep the size of what passes through, biases have the deviation `scale`, norms that around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(draw * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(scale * draw + name.endswith("weight"))
    return model.eval()


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def arrays(images: list[Image.Image]) -> np.ndarray:
    """Pictures (B, H, W, 3) in [0, 255], whose differences do not wrap around."""
    return np.stack([np.asarray(image, np.int16) for image in images])


def unet_config(widths: tuple[int, ...] = (16, 32), blocks: str | None = None, **changes) -> UNetConfig:
    """`blocks` has a letter a level: c attends, p does not."""
    kinds = [CROSS if letter == "c" else PLAIN for letter in blocks or "c" * len(widths)]
    sizes = {"layers_per_block": 1, "attention_head_dim": 2, "cross_attention_dim": 24, "norm_num_groups": 4}
    down, up = tuple(kind[0] for kind in kinds), tuple(kind[1] for kind in reversed(kinds))
    levels = {"block_out_channels": widths, "down_block_types": down, "up_block_types": up}
    return UNetConfig(**{"sample_size": 8} | levels | sizes | changes)


def vae_config(widths: tuple[int, ...] = (8, 16), **changes) -> VAEConfig:
    sizes = {"layers_per_block": 1, "norm_num_groups": 4, "sample_size": 16, "scaling_factor": 0.7}
    return VAEConfig(**{"block_out_channels": widths} | sizes | changes)


def diffusers_vae(config: VAEConfig) -> nn.Module:
    from diffusers import AutoencoderKL

    levels = len(config.block_out_channels)
    types = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    return AutoencoderKL(**asdict(config), **types).eval()


def diffusers_unet(config: UNetConfig) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**asdict(config)).eval()


def text_encoder(tokenizer: Tokenizer, width: int = 24) -> TextEncoder:
    sizes = {"hidden_size": width, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": LENGTH, "projection_dim": 12}
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = TextConfig(**sizes, **ends)
    return randomize(TextEncoder(config), seed=3)


def tiny_parts(**schedule) -> Parts:
    """A whole pipeline of 16 px pictures and 8x8x4 latents, all weights random."""
    tokenizer = Tokenizer.train(["a red circle", "a blue square above a red circle"] * 3, 540, LENGTH)
    config = ScheduleConfig(**{"steps_offset": 1, "prediction_type": "v_prediction"} | schedule)
    vae, unet = randomize(VAE(vae_config()), 1), randomize(UNet(unet_config()), 2)
    return Parts(vae, text_encoder(tokenizer), tokenizer, unet, Schedule(config))


def assert_same_gradients(ours: nn.Module, theirs: nn.Module, relative: float = 1e-3) -> None:
    """Every parameter's gradient, within `relative` of that parameter's largest."""
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert expected.keys() == dict(ours.named_parameters()).keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, parameter in ours.named_parameters():
        # Some are exactly 0 in exact arithmetic (a bias before a norm): those are held to the largest of all.
        bound = relative * float(expected[name].abs().max()) + 1e-6 * largest
        assert float((parameter.grad - expected[name]).abs().max()) <= bound, name


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@contextmanager
def no_complaints(*loggers: str):
    """Fails when diffusers or transformers log a warning, e.g. of a config key that they do not expect."""
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())
    found = [logging.getLogger(name) for name in loggers or ("diffusers", "transformers")]
    for logger in found:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in found:
            logger.removeHandler(handler)
    assert records == []


def open_cleanly(cls: type, folder: Path) -> nn.Module:
    """The model in diffusers, which must neither miss nor find too many weights or config keys."""
    with no_complaints():
        model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    return model.eval()
