"""Whole folders against diffusers' StableDiffusionPipeline: ours opened there, theirs opened here, same pictures."""

import inspect
import json
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from tiny_models import LENGTH, diffusers_unet, diffusers_vae, no_complaints, shapes, tiny_parts

from ldm import pipeline_io as checkpoint
from ldm.config import UserError, load
from ldm.diffusion import ScheduleConfig
from ldm.pipeline import Pipeline
from ldm.samplers import SAMPLERS, ImageNoise
from ldm.train.clip import CLIPConfig

CONFIGS = Path(__file__).parent.parent / "configs"
PROMPTS = ["a red circle", "a blue square above a red circle", ""]


def diffusers_pictures(pipe, steps: int, guidance: float, seed: int, **options) -> np.ndarray:
    """Pictures (B, H, W, 3) in [0, 255] from the noise of our seeds."""
    pipe.set_progress_bar_config(disable=True)
    noise = ImageNoise(range(seed, seed + len(PROMPTS)), (4, 8, 8))()
    images = pipe(PROMPTS, num_inference_steps=steps, guidance_scale=guidance, latents=noise, **options).images
    return np.stack([np.asarray(image, np.int16) for image in images])


def our_pictures(pipe: Pipeline, steps: int, guidance: float, seed: int, **options) -> np.ndarray:
    images = pipe(PROMPTS, steps=steps, guidance=guidance, seed=seed, **options)
    return np.stack([np.asarray(image, np.int16) for image in images])


def open_in_diffusers(folder: Path) -> diffusers.StableDiffusionPipeline:
    with no_complaints(), warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # how diffusers speaks of outdated configs
        return diffusers.StableDiffusionPipeline.from_pretrained(folder)


SCHEDULES = {
    "ddim": {"sampler": "ddim"},
    "ddim as Stable Diffusion 1": {"sampler": "ddim", "set_alpha_to_one": False, "prediction_type": "epsilon"},
    "ddim, zero terminal SNR": {"sampler": "ddim", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    "euler": {"sampler": "euler"},
    "euler, linspace": {"sampler": "euler", "timestep_spacing": "linspace", "prediction_type": "sample"},
    "dpmpp_2m": {"sampler": "dpmpp_2m"},
    "dpmpp_2m, cosine, trailing": {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"},
    "heun": {"sampler": "heun"},
    "unipc": {"sampler": "unipc", "timestep_spacing": "linspace"},
    "pndm": {"sampler": "pndm", "prediction_type": "epsilon"},
    "pndm as Stable Diffusion 2": {"sampler": "pndm", "set_alpha_to_one": False},
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_our_folder_gives_the_same_pictures_in_diffusers(tmp_path, schedule):
    pipe = Pipeline(tiny_parts(**schedule))
    pipe.save_pretrained(tmp_path)
    theirs = open_in_diffusers(tmp_path)
    assert theirs.safety_checker is None
    for guidance, options in ((1.0, {}), (5.0, {"negative_prompt": "blue"})):
        ours = our_pictures(pipe, 5, guidance, 3, **options)
        many = {name: [value] * len(PROMPTS) for name, value in options.items()}
        expected = diffusers_pictures(theirs, 5, guidance, 3, **many)
        assert abs(ours - expected).max() <= 1
        assert expected.std() > 10 and abs(expected[0] - expected[1]).max() > 10


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler"]
)
def test_diffusers_folder_gives_the_same_pictures_here(tmp_path, name):
    from transformers import CLIPTextModel, CLIPTokenizer

    parts = tiny_parts()
    parts.text_encoder.save_pretrained(tmp_path / "text")
    parts.tokenizer.save_pretrained(tmp_path / "tokens")
    vae, unet = diffusers_vae(parts.vae.config), diffusers_unet(parts.unet.config)
    vae.load_state_dict(parts.vae.state_dict())
    unet.load_state_dict(parts.unet.state_dict())
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    if name == "DDIMScheduler":
        betas |= {"clip_sample": False, "set_alpha_to_one": False}
    if name == "PNDMScheduler":
        betas |= {"skip_prk_steps": True}
    theirs = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel.from_pretrained(tmp_path / "text"),
        tokenizer=CLIPTokenizer.from_pretrained(tmp_path / "tokens"),
        unet=unet,
        scheduler=getattr(diffusers, name)(**betas),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    theirs.save_pretrained(tmp_path / "pipe")
    pipe = Pipeline.from_pretrained(tmp_path / "pipe")
    assert checkpoint.SCHEDULERS[pipe.schedule.config.sampler] == name
    for guidance in (1.0, 5.0):
        assert abs(our_pictures(pipe, 4, guidance, 0) - diffusers_pictures(theirs, 4, guidance, 0)).max() <= 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_schedules_round_trip_and_open_in_diffusers(tmp_path, sampler):
    values = {"beta_start": 0.001, "beta_end": 0.01, "steps_offset": 1, "set_alpha_to_one": False}
    config = ScheduleConfig(
        sampler=sampler, beta_schedule="linear", prediction_type="v_prediction", timestep_spacing="trailing", **values
    )
    checkpoint.save_schedule(tmp_path / "ours", config)
    assert checkpoint.read_schedule(tmp_path / "ours") == config
    with no_complaints():
        theirs = getattr(diffusers, checkpoint.SCHEDULERS[sampler]).from_pretrained(tmp_path / "ours")
        other = diffusers.DDIMScheduler.from_config(theirs.config)
    kept = {"set_alpha_to_one", "clip_sample"}
    assert all(getattr(theirs.config, name) == values[name] for name in values if name not in kept)
    assert other.config.set_alpha_to_one is False and other.config.clip_sample is False
    theirs.save_pretrained(tmp_path / "theirs")
    assert checkpoint.read_schedule(tmp_path / "theirs") == config


@pytest.mark.parametrize("name", checkpoint.SCHEDULERS.values())
def test_missing_scheduler_keys_have_the_defaults_of_diffusers(name):
    defaults = {key: p.default for key, p in inspect.signature(getattr(diffusers, name)).parameters.items()}
    for key, value in checkpoint._class_defaults(name).items():
        assert defaults.get(key, value) == value, key
    ours = asdict(ScheduleConfig()) | checkpoint._class_defaults(name)
    for key in ScheduleConfig.__dataclass_fields__.keys() & defaults.keys():
        # the offset is 0 in diffusers' schedulers, but its Stable Diffusion pipeline makes it 1
        assert ours[key] == (1 if key == "steps_offset" else defaults[key]), key


def test_stable_diffusion_1_scheduler(tmp_path):
    table = {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012}
    table |= {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000}
    table |= {"set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(table | {"clip_sample": False}))
    config = checkpoint.read_schedule(tmp_path)
    assert config == ScheduleConfig(sampler="pndm", steps_offset=1, set_alpha_to_one=False)
    (tmp_path / "scheduler_config.json").write_text(json.dumps(table | {"skip_prk_steps": False}))
    with pytest.raises(UserError, match="skip_prk_steps = False is not supported"):
        checkpoint.read_schedule(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "LCMScheduler"}, "scheduler 'LCMScheduler' .* known: DDPMScheduler"),
        ({"_class_name": None}, "scheduler None"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas = True is not supported"),
        ({"clip_sample": True}, "clip_sample = True"),
        ({"clip_sample": "absent"}, "clip_sample = True"),  # what diffusers' DDIM then does
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule"),
        ({"rescale_betas_zero_snr": True}, "epsilon"),
        ({"brand_new": 3}, "brand_new = 3"),
    ],
)
def test_unsupported_schedulers_are_named(tmp_path, change, message):
    checkpoint.save_schedule(tmp_path, ScheduleConfig(sampler="ddim", steps_offset=1))
    table = json.loads((tmp_path / "scheduler_config.json").read_text()) | change
    table = {key: value for key, value in table.items() if value != "absent"}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match=message):
        checkpoint.read_schedule(tmp_path)


def test_schedules_that_diffusers_cannot_follow(tmp_path):
    with pytest.warns(UserWarning, match="Heun"):
        config = ScheduleConfig(
            sampler="heun", rescale_betas_zero_snr=True, prediction_type="v_prediction", steps_offset=1
        )
        checkpoint.save_schedule(tmp_path, config)
    assert checkpoint.read_schedule(tmp_path) == config
    with pytest.warns(UserWarning, match="steps_offset 0"):
        checkpoint.save_schedule(tmp_path, ScheduleConfig(timestep_spacing="leading", steps_offset=0))
    with pytest.raises(UserError, match="sampler 'eulr' is unknown"):
        checkpoint.save_schedule(tmp_path, ScheduleConfig(sampler="eulr"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    checkpoint.save_parts(folder, tiny_parts())
    return folder


def test_parts_round_trip(saved):
    before, after = tiny_parts(), checkpoint.load_parts(saved)
    for ours, loaded in zip(before[:2], after[:2], strict=True):
        assert ours.config == loaded.config
        assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in ours.state_dict().items())
    assert after.tokenizer.vocab == before.tokenizer.vocab and after.tokenizer.context_length == LENGTH
    assert after.schedule.config == before.schedule.config


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("unet", "in_channels", 9, "U-Net of 9 channels in, 4 out; latents have 4"),
        ("unet", "cross_attention_dim", 12, "context of width 12; the text encoder's is 24"),
        ("tokenizer", "model_max_length", 77, "context length 77; the text encoder reads 12"),
    ],
)
def test_parts_that_do_not_fit(saved, tmp_path, monkeypatch, part, key, value, message):
    folder = shutil.copytree(saved, tmp_path / "copy")
    path = folder / part / ("tokenizer_config.json" if part == "tokenizer" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    # The sizes are looked at after the weights, which would not fit either.
    monkeypatch.setattr("ldm.model_io.load_model", lambda make, folder, tensors, *configs: make())
    with pytest.raises(UserError, match=message):
        checkpoint.load_parts(folder)


@pytest.mark.parametrize("kind", ["StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline", None])
def test_other_pipelines_are_named(saved, tmp_path, kind):
    folder = shutil.copytree(saved, tmp_path / "copy")
    shutil.rmtree(folder / "unet")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(
        UserError, match=f"is a {kind}; supported: StableDiffusionPipeline, of Stable Diffusion 1.x and"
    ):
        checkpoint.load_parts(folder)


def test_incomplete_folders(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "copy")
    shutil.rmtree(folder / "unet")
    with pytest.raises(UserError, match="not a whole pipeline: unet missing; train_diffusion writes one"):
        checkpoint.load_parts(folder)
    with pytest.raises(UserError, match="unknown model"):
        checkpoint.load_parts(tmp_path / "nowhere")


def test_sd15_text_encoder_has_the_published_sizes():
    from transformers import CLIPConfig as TheirConfig
    from transformers import CLIPModel

    from ldm.clip import CLIP

    config = load(CLIPConfig, CONFIGS / "sd15" / "clip.toml")
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
    vision |= {"patch_size": 14, "image_size": 224}
    with torch.device("meta"):
        theirs = CLIPModel(TheirConfig(text_config=text, vision_config=vision, projection_dim=768))
        ours = CLIP(config.text, config.vision)
    assert shapes(ours) == shapes(theirs)
