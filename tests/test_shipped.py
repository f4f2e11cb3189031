"""The shipped models open here and in diffusers, and give the same pictures."""

import numpy as np
import pytest
import torch
from test_pipeline_io import open_in_diffusers
from tiny_models import arrays

from ldm import Pipeline
from ldm.data import DataConfig, batches, open_dataset, spread
from ldm.images import to_float
from ldm.metrics.alignment import retrieval, sharing
from ldm.metrics.compositional import cases, check, tally
from ldm.metrics.judges import JUDGES, image_text_model
from ldm.model_io import ASSETS, module_hash
from ldm.samplers import ImageNoise

PROMPTS = {
    "emoji": ["a 3D emoji of a red apple", "flag of Japan"],
    "shapes": ["a red circle above a blue square", "three green crosses"],
}
TURBO = {f"{name}-turbo": prompts for name, prompts in PROMPTS.items()}


def test_every_shipped_model_and_judge_is_tested():
    for folder, tested in ((ASSETS, PROMPTS | TURBO), (JUDGES, PROMPTS)):
        assert {path.name for path in folder.iterdir() if path.is_dir()} == tested.keys()


@pytest.mark.parametrize(("name", "prompts"), (PROMPTS | TURBO).items())
def test_shipped_model_gives_the_same_pictures_in_diffusers(name, prompts):
    ours = Pipeline.from_pretrained(name)
    options = {"steps": 4, "guidance": 1.0} if name in TURBO else {"steps": 6, "guidance": 3.0}
    assert name in PROMPTS or ours.defaults == options
    images = ours(prompts, seed=5, **options)
    theirs = open_in_diffusers(ASSETS / name)
    theirs.set_progress_bar_config(disable=True)
    noise = ImageNoise(range(5, 7), ours.latent_shape())()
    renamed = {"num_inference_steps": options["steps"], "guidance_scale": options["guidance"]}
    expected = theirs(prompts, latents=noise, **renamed).images
    assert arrays(images).std() > 10 and abs(arrays(images) - arrays(expected)).max() <= 1


@pytest.mark.parametrize("name", PROMPTS)
def test_a_shipped_models_picture_is_the_same_in_any_batch_on_any_number_of_threads(name):
    """With the model's own sampler and 10 steps, long enough for rounding to grow."""
    pipe, prompts, threads = Pipeline.from_pretrained(name), (PROMPTS[name] * 2)[:3], torch.get_num_threads()
    options = {"steps": 10, "guidance": 3.0}
    try:
        torch.set_num_threads(1)
        together = pipe(prompts, seed=3, **options)
        torch.set_num_threads(2)
        split, alone = pipe(prompts, seed=3, batch_size=2, **options), pipe(prompts[2], seed=5, **options)
    finally:
        torch.set_num_threads(threads)
    together, split, alone = map(arrays, (together, split, alone))
    assert abs(split - together).max() <= 1 and abs(alone - together[2:]).max() <= 1
    assert abs(together[0] - together[2]).max() > 20  # the same prompt, another seed


@pytest.mark.parametrize(
    ("name", "options"),
    [("shapes", {"steps": 20, "guidance": 3.0, "guidance_rescale": 0.7}), ("shapes-turbo", {})],
    ids=["shapes", "turbo"],
)
def test_shipped_shapes_is_small_and_draws_what_captions_say(name, options):
    """36 cases, three of each task and half, none of them those that the README's score is of."""
    pipe, posed = Pipeline.from_pretrained(name), cases(3, seed=1)
    assert sum(p.numel() for part in (pipe.vae, pipe.text_encoder, pipe.unet) for p in part.parameters()) < 5e6
    images = pipe([case.caption for case in posed], seed=100, **options)
    right = [check(np.asarray(image), case.required) for image, case in zip(images, posed, strict=True)]
    assert tally(right, posed)["mean"]["all"] > 0.75


@pytest.mark.parametrize("name", PROMPTS)
def test_shipped_judge_finds_the_captions_of_held_out_pictures(name):
    """Among 200, where chance is 0.5%; it conditions no shipped model."""
    judge = image_text_model(name)
    dataset = open_dataset(DataConfig(name=name, size=judge.size), "test")
    chosen = spread(dataset, 200)
    images = torch.cat([judge.images(to_float(batch["image"])) for batch in batches(dataset, chosen, 50)])
    captions = [dataset.captions(i) for i in chosen]
    texts = judge.texts([own[-1] for own in captions])
    found = retrieval(images, texts, same=sharing(captions))
    assert found["image_to_text@1"] > 0.6 and found["text_to_image@1"] > 0.6
    conditioning = {module_hash(Pipeline.from_pretrained(model).text_encoder.text_model) for model in PROMPTS}
    assert module_hash(judge.network.text_model) not in conditioning
