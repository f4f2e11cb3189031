"""Image-to-image, inpainting, embeddings and interpolation, against diffusers and by hand."""

import math
from collections.abc import Callable

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import arrays, no_complaints, tiny_parts

from ldm.config import UserError
from ldm.diffusion import Schedule, ScheduleConfig
from ldm.edit import between, keep, slerp
from ldm.pipeline import Pipeline
from ldm.samplers import SAMPLERS as FUNCTIONS
from ldm.samplers import ImageNoise, make_grid

PROMPTS = ["a red circle", "a blue square above a red circle", ""]


def pictures(count: int = 3, width: int = 16, height: int = 16) -> list[Image.Image]:
    """Smooth random colours."""
    generator = np.random.default_rng(0)
    small = generator.integers(0, 256, (count, 4, 4, 3), np.uint8)
    return [Image.fromarray(x).resize((width, height), Image.Resampling.BICUBIC) for x in small]


def mask(width: int = 16, height: int = 16) -> Image.Image:
    """White on the right."""
    white = np.zeros((height, width), np.uint8)
    white[:, width // 2 :] = 255
    return Image.fromarray(white)


def theirs(pipe: Pipeline, kind: str, folder) -> Callable[..., np.ndarray]:
    pipe.save_pretrained(folder)
    with no_complaints():
        other = getattr(diffusers, kind).from_pretrained(folder)
    other.set_progress_bar_config(disable=True)

    def make(**options) -> np.ndarray:
        generators = [torch.Generator().manual_seed(7 + i) for i in range(len(PROMPTS))]
        options |= {"generator": generators, "negative_prompt": ["blue"] * len(PROMPTS), "guidance_scale": 5.0}
        return arrays(other(PROMPTS, **options).images)

    return make


SAMPLERS = ["ddim", "euler", "heun", "dpmpp_2m", "unipc"]  # diffusers loses count where PNDM begins in the middle


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_to_image_equals_diffusers(tmp_path, sampler):
    pipe, images = Pipeline(tiny_parts(sampler=sampler)), pictures()
    expected = theirs(pipe, "StableDiffusionImg2ImgPipeline", tmp_path)
    for strength in (0.25, 0.6, 1.0):
        ours = arrays(pipe(PROMPTS, image=images, strength=strength, steps=8, seed=7, negative_prompt="blue"))
        assert abs(ours - expected(image=images, strength=strength, num_inference_steps=8)).max() <= 1
        assert abs(ours[0] - ours[1]).max() > 10


@pytest.mark.parametrize(
    ("sampler", "schedule"),
    [*((sampler, {}) for sampler in SAMPLERS), ("ddim", {"timestep_spacing": "trailing", "set_alpha_to_one": False})],
)
def test_inpainting_equals_diffusers(tmp_path, sampler, schedule):
    pipe, images = Pipeline(tiny_parts(sampler=sampler, **schedule)), pictures(width=16, height=24)
    options = {"image": images, "strength": 0.6}
    ours = arrays(pipe(PROMPTS, mask=mask(16, 24), steps=9, seed=7, negative_prompt="blue", **options))
    options |= {"mask_image": [mask(16, 24)] * 3, "num_inference_steps": 9, "height": 24, "width": 16}
    assert abs(ours - theirs(pipe, "StableDiffusionInpaintPipeline", tmp_path)(**options)).max() <= 1


@pytest.mark.parametrize(
    ("sampler", "strength", "spacing"),
    [("ddim", 0.5, "leading"), ("pndm", 1.0, "leading"), ("dpmpp_2m", 1.0, "trailing"), ("euler_a", 0.5, "trailing")],
)
@torch.no_grad()
def test_where_the_mask_is_black_the_latent_stays(pipe, monkeypatch, sampler, strength, spacing):
    (image,), decoded, decode = pictures(1), [], pipe.decode
    monkeypatch.setattr(pipe, "decode", lambda z: decoded.append(z) or decode(z))
    options = {"image": image, "strength": strength, "steps": 7, "sampler": sampler, "guidance": 1.0, "seed": 3}
    seen = []
    pipe("a red circle", mask=mask(), spacing=spacing, callback=lambda progress: seen.append(progress), **options)
    posterior = pipe.vae.encode(torch.from_numpy(np.asarray(image)).permute(2, 0, 1)[None] / 127.5 - 1)
    z0 = pipe.vae.normalize(posterior.mean + posterior.std * ImageNoise([3], (4, 8, 8))())
    assert len(seen) == seen[0].steps == int(7 * strength)
    assert torch.allclose(decoded[0][..., :4], z0[..., :4], atol=1e-5)
    assert (decoded[0][..., 4:] - z0[..., 4:]).abs().max() > 0.1


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m"])
def test_resampling_draws_what_fits_the_part_that_is_kept(sampler):
    """Two latents with a correlation of 0.95, denoised exactly (the posterior mean of a Gaussian): given the left one,
    the right one is 0.95 of it with a deviation of 0.31."""
    grid, covariance = make_grid(Schedule(ScheduleConfig()), sampler, 20), torch.tensor([[1, 0.95], [0.95, 1]])
    drawn = torch.tensor([0.0, 1.0]).expand(4096, 1, 1, 2)
    left = ImageNoise(range(4096), (1, 1, 1))().expand(-1, -1, -1, 2)

    def denoise(z, s):
        return z @ torch.linalg.inv(s.alpha**2 * covariance + s.sigma**2 * torch.eye(2)) @ (s.alpha * covariance)

    errors = []
    for resample in (1, 2, 8):
        noise = ImageNoise(range(9000, 9000 + 4096), (1, 1, 2))
        eps = noise()
        keeping = keep(denoise, left, eps, drawn, noise, resample)
        z = torch.lerp(left, FUNCTIONS[sampler](keeping, grid.initial_scale * eps, grid, noise), drawn)
        deviation = float((z[..., 1] - 0.95 * left[..., 0]).square().mean().sqrt())
        errors.append(abs(deviation - math.sqrt(1 - 0.95**2)))
    assert errors[0] > 3 * errors[1] and errors[1] > errors[2]


def test_one_image_for_all_and_one_each(pipe):
    images = pictures(2)
    both = arrays(pipe(PROMPTS[:2], image=images, steps=4, batch_size=1))
    assert abs(both - arrays(pipe(PROMPTS[:2], image=images, steps=4))).max() <= 1
    shared = arrays(pipe(PROMPTS[:2], image=images[0], steps=4))
    assert abs(shared[0] - both[0]).max() <= 1 and abs(shared[1] - both[1]).max() > 10


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_a"])
def test_embeddings_and_latents_replace_prompts_and_seeds(pipe, sampler):
    """Also of a batch that is split; noise of later steps is that of the seeds."""
    options = {"steps": 3, "seed": 5, "sampler": sampler}
    expected = arrays(pipe(PROMPTS, negative_prompt=["blue", "", "red"], **options))
    options |= {"prompt_embeds": pipe.encode_prompt(PROMPTS), "latents": ImageNoise([5, 6, 7], (4, 8, 8))()}
    negative = pipe.encode_prompt(["blue", "", "red"])
    assert abs(arrays(pipe(negative_prompt_embeds=negative, batch_size=2, **options)) - expected).max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": pictures(1)[0], "strength": 0.2}, "leaves none of 4 steps"),
        ({"image": pictures(1)[0], "resample": 2}, "resample 2 is not allowed"),
        ({"image": pictures(2)}, "2 images for 3 prompts"),
        ({"image": pictures(2) + pictures(1, 32)}, "one size; these have 16x16, 32x16"),
        ({"image": pictures(1)[0], "height": 32}, "the image is 16x16; resize it"),
        ({"image": pictures(1, 17)[0]}, "size 17 px cannot be made"),
        ({"negative_prompt": ["a", "b"]}, "2 of 12 tokens for 3 prompts of 12"),
        ({"prompt_embeds": torch.zeros(3, 12, 24)}, "give either prompt or prompt_embeds"),
        ({"negative_prompt_embeds": torch.zeros(3, 12, 25)}, "negative_prompt_embeds are"),
        ({"negative_prompt_embeds": torch.zeros(3, 13, 24)}, "3 of 13 tokens for 3 prompts of 12"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, "3 prompts need"),
    ],
)
def test_mistakes_are_one_clear_line(pipe, options, message):
    with pytest.raises(UserError, match=message) as error:
        pipe(PROMPTS, steps=4, **options)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="give either prompt or prompt_embeds"):
        pipe()


def test_a_mask_of_16_bits_is_scaled(pipe):
    black = Image.fromarray(np.full((16, 16), 300, np.uint16))  # of 65535
    options = {"image": pictures(1)[0], "mask": black, "strength": 1.0, "steps": 3}
    assert np.array_equal(arrays(pipe("a", **options)), arrays(pipe("b", **options)))


def test_spherical_interpolation():
    a, b = torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(slerp(a, b, 0.0), a, atol=1e-5) and torch.allclose(slerp(a, b, 1.0), b, atol=1e-5)
    for share in (0.25, 0.5, 0.9):
        assert slerp(a, b, share).std().item() == pytest.approx(1, abs=0.02)
    x, y = torch.eye(2).reshape(2, 2, 1, 1)
    assert torch.allclose(slerp(x, y, 1 / 3).flatten(), torch.tensor([3**0.5 / 2, 0.5]))
    assert torch.equal(slerp(x, x, 0.3), x)
    assert torch.allclose(slerp(x, -x, 0.5), torch.zeros_like(x))
    assert torch.allclose(between(torch.zeros(1, 3, 2), torch.ones(1, 3, 2), [0.0, 0.25])[1], torch.full((3, 2), 0.25))
