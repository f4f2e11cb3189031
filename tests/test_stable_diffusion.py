"""Whole Stable Diffusion folders as diffusers writes them, both generations, small and with random weights."""

from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import LENGTH, arrays, no_complaints, randomize, tiny_parts, unet_config
from transformers import CLIPTextModel, CLIPTokenizer

from ldm.clip import TextEncoder
from ldm.pipeline import Pipeline
from ldm.samplers import ImageNoise
from ldm.unet import UNet

PROMPTS = ["a red circle", "a blue square above a red circle and a blue circle", ""]
NEGATIVES = ["blue", "", "a red square"]
SIZE = {"height": 16, "width": 24}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SCHEDULERS = {
    "DDIMScheduler": {"clip_sample": False, "set_alpha_to_one": False},
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True, "set_alpha_to_one": False},
}
SHARDS, VARIANT, BIN = {"max_shard_size": "20KB"}, {"variant": "fp16"}, {"safe_serialization": False}
SAVED = {"plain": {}, "shards": SHARDS, "variant": VARIANT, "shards of a variant": SHARDS | VARIANT, "bin": BIN}


def stable_diffusion(folder: Path, generation: int, scheduler: str) -> diffusers.StableDiffusionPipeline:
    """1: convolutions around the transformers, quick GELU, epsilon, padded with the end token. 2: linear layers, heads
    a level, GELU, v, padded with "!"."""
    parts = tiny_parts()
    if generation == 2:
        text = replace(parts.text_encoder.config, hidden_act="gelu")
        unet = unet_config(use_linear_projection=True, attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2))
        parts = parts._replace(text_encoder=randomize(TextEncoder(text), 5), unet=randomize(UNet(unet), 6))
    for name in ("vae", "text_encoder", "tokenizer", "unet"):
        getattr(parts, name).save_pretrained(folder / name)
    prediction = "epsilon" if generation == 1 else "v_prediction"
    pipe = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer", **{"pad_token": "!"} if generation == 2 else {}),
        unet=diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"),
        scheduler=getattr(diffusers, scheduler)(**BETAS, **SCHEDULERS[scheduler], prediction_type=prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("generation", [1, 2])
def test_a_folder_gives_the_same_pictures(tmp_path, generation, scheduler):
    theirs = stable_diffusion(tmp_path / "parts", generation, scheduler)
    theirs.save_pretrained(tmp_path / "pipe")
    ours = Pipeline.from_pretrained(tmp_path / "pipe")
    noise = ImageNoise(range(7, 10), ours.latent_shape(**SIZE))()
    for steps, guidance in ((4, 1.0), (15, 7.5)):
        options = {"num_inference_steps": steps, "guidance_scale": guidance, "negative_prompt": NEGATIVES}
        expected = theirs(PROMPTS, latents=noise, **options, **SIZE).images
        images = ours(PROMPTS, steps=steps, guidance=guidance, negative_prompt=NEGATIVES, seed=7, **SIZE)
        a, b = arrays(images), arrays(expected)
        assert abs(a - b).max() <= 1, (steps, guidance)
        assert b.std() > 10 and abs(b[0] - b[1]).max() > 10


@pytest.mark.parametrize(("saved", "generation"), zip(SAVED, (1, 2, 1, 2, 1), strict=True))
def test_through_here_and_back_every_tensor_is_the_same(tmp_path, generation, saved):
    theirs = stable_diffusion(tmp_path / "parts", generation, "DDIMScheduler")
    theirs.save_pretrained(tmp_path / "pipe", **SAVED[saved])
    assert (len(list((tmp_path / "pipe" / "unet").glob("*-of-*"))) > 1) == ("shards" in saved)
    Pipeline.from_pretrained(tmp_path / "pipe").save_pretrained(tmp_path / "ours")
    for part in ("vae", "unet", "text_encoder"):
        (file,) = (tmp_path / "ours" / part).glob("*.safetensors")
        written = load_file(file)
        written = {name.removeprefix("text_model."): tensor for name, tensor in written.items()}  # theirs may lack it
        expected = {n.removeprefix("text_model."): t for n, t in getattr(theirs, part).state_dict().items()}
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    with no_complaints():
        again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "ours")
    ours, opened = (UNet.from_pretrained(tmp_path / folder).config for folder in ("ours", "pipe"))
    assert ours == opened and (generation == 1 or opened.attention_head_dim == (2, 4))
    tokens = {"padding": "max_length", "max_length": LENGTH, "truncation": True}
    assert again.tokenizer(PROMPTS, **tokens).input_ids == theirs.tokenizer(PROMPTS, **tokens).input_ids
