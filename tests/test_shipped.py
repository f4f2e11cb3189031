"""The shipped models open here and in diffusers, and give the same pictures."""

import numpy as np
import pytest
from test_checkpoint import open_in_diffusers

from ldm import Pipeline
from ldm.metrics.compositional import cases, score
from ldm.samplers import ImageNoise
from ldm.weights import ASSETS

PROMPTS = {
    "emoji": ["a 3D emoji of a red apple", "flag of Japan"],
    "shapes": ["a red circle above a blue square", "three green crosses"],
}


def test_every_shipped_model_is_tested():
    assert {folder.name for folder in ASSETS.iterdir() if folder.is_dir()} == PROMPTS.keys()


@pytest.mark.parametrize("name", PROMPTS)
def test_shipped_model_gives_the_same_pictures_in_diffusers(name):
    ours = Pipeline.from_pretrained(name)
    images = ours(PROMPTS[name], steps=6, guidance=3.0, seed=5)
    theirs = open_in_diffusers(ASSETS / name)
    theirs.set_progress_bar_config(disable=True)
    noise = ImageNoise(range(5, 7), ours.latent_shape())()
    expected = theirs(PROMPTS[name], num_inference_steps=6, guidance_scale=3.0, latents=noise).images
    for a, b in zip(images, expected, strict=True):
        assert np.asarray(a).std() > 10
        assert np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max() <= 1


def test_shipped_shapes_is_small_and_draws_what_captions_say():
    """36 cases, three of each task and half, none of them those that the README's score is of."""
    pipe, posed = Pipeline.from_pretrained("shapes"), cases(3, seed=1)
    assert sum(p.numel() for part in (pipe.vae, pipe.text_encoder, pipe.unet) for p in part.parameters()) < 5e6
    images = pipe([case.caption for case in posed], steps=20, guidance=3.0, guidance_rescale=0.7, seed=100)
    assert score([np.asarray(image) for image in images], posed)["mean"]["all"] > 0.75
