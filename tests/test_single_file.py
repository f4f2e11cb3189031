"""Stable Diffusion's single files: through here and back, against diffusers, and what is refused."""

import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_stable_diffusion import stable_diffusion
from test_tokenizer import TEXTS, assert_same
from test_unet import SD15, SD21
from tiny_models import arrays, normal, tiny_parts

from ldm import VAE, Pipeline, TextEncoder, UNet
from ldm.clip import TextConfig
from ldm.commands.cli import run_command
from ldm.config import UserError
from ldm.pipeline_io import load_parts, save_parts, save_single_file
from ldm.single_file import open_part, write
from ldm.tokenizer import Tokenizer
from ldm.unet import UNetConfig
from ldm.vae import VAEConfig

SIZE = {"height": 16, "width": 24}
OWN = {name: value for name, value in (("unet", "model.diffusion_model."), ("vae", "first_stage_model."))}


def export(folder: Path, generation: int) -> tuple[diffusers.StableDiffusionPipeline, Path]:
    """A small model as diffusers' folder `folder`, which is returned opened, and as the single file beside it."""
    theirs = stable_diffusion(folder / "parts", generation, "DDIMScheduler")
    theirs.save_pretrained(folder / "pipe")
    with pytest.warns(UserWarning, match="own sizes.*unet.block_out_channels"):
        save_single_file(folder / "one.safetensors", load_parts(folder / "pipe"))
    return theirs, folder / "one.safetensors"


@pytest.mark.parametrize("generation", [1, 2])
def test_both_ways(tmp_path, generation):
    """Here bit for bit; in diffusers the same pictures, from the names and shapes of the original code."""
    theirs, file = export(tmp_path, generation)
    ours = Pipeline.from_pretrained(file, tokenizer=tmp_path / "pipe")
    folder = Pipeline.from_pretrained(tmp_path / "pipe")
    for part in ("vae", "unet", "text_encoder", "schedule"):
        assert getattr(ours, part).config == getattr(folder, part).config
    ours.save_pretrained(tmp_path / "back")
    for part, name in (("vae", "diffusion_pytorch_model"), ("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        expected = getattr(folder, part).state_dict()
        for tensors in (load_file(tmp_path / "back" / part / f"{name}.safetensors"), getattr(ours, part).state_dict()):
            assert tensors.keys() == expected.keys() and all(tensors[key].equal(x) for key, x in expected.items())
    single = diffusers.StableDiffusionPipeline.from_single_file(str(file), config=str(tmp_path / "pipe"))
    single.set_progress_bar_config(disable=True)
    prompts, noise = ["a red circle", "a blue square above a circle"], normal(2, 4, 8, 12)
    options = {"num_inference_steps": 4, "guidance_scale": 5.0, "latents": noise, "output_type": "np"}
    a, b = (pipe(prompts, **options, **SIZE).images for pipe in (theirs, single))
    assert abs(a - b).max() <= 1 / 255 and a.std() > 0.05
    images = ours(prompts, steps=4, guidance=5.0, latents=noise, **SIZE)
    assert abs(arrays(images) - a * 255).max() <= 1.5


def test_debug(tmp_path):
    pass
