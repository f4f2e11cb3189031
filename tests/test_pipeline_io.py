"""Whole folders against diffusers' StableDiffusionPipeline: ours opened there, theirs opened here, same pictures."""

import json
import shutil
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
from sde_scheduler import DPMSolverSDEScheduler
from tiny_models import arrays, no_complaints, shapes, tiny_parts

from ldm import pipeline_io
from ldm.config import UserError, load
from ldm.diffusion import ScheduleConfig
from ldm.pipeline import Pipeline
from ldm.samplers import PLACED, SAMPLERS, ImageNoise
from ldm.train.clip import CLIPConfig

PROMPTS = ["a red circle", "a blue square above a red circle", ""]


def far(ours: Pipeline, theirs, steps: int = 5, sampler: str | None = None) -> int:
    """The largest difference of pictures in [0, 255] from the same noise, here and in diffusers."""
    theirs.set_progress_bar_config(disable=True)
    noise, negative = ImageNoise(range(3, 6), (4, 8, 8))(), ["blue"] * len(PROMPTS)
    images = theirs(PROMPTS, num_inference_steps=steps, latents=noise, guidance_scale=5.0, negative_prompt=negative)
    expected = arrays(images.images)
    assert expected.std() > 10 and abs(expected[0] - expected[1]).max() > 10
    pictures = ours(PROMPTS, steps=steps, guidance=5.0, seed=3, negative_prompt="blue", sampler=sampler)
    return abs(arrays(pictures) - expected).max()


def open_in_diffusers(folder: Path) -> diffusers.StableDiffusionPipeline:
    with no_complaints(), warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # how diffusers speaks of outdated configs
        return diffusers.StableDiffusionPipeline.from_pretrained(folder)


SCHEDULES = {
    "ddim as Stable Diffusion 1": {"sampler": "ddim", "set_alpha_to_one": False, "prediction_type": "epsilon"},
    "ddim, zero terminal SNR": {"sampler": "ddim", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    "euler, linspace": {"sampler": "euler", "timestep_spacing": "linspace", "prediction_type": "sample"},
    "dpmpp_2m, cosine, trailing": {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"},
    "heun": {"sampler": "heun"},
    "unipc": {"sampler": "unipc", "timestep_spacing": "linspace"},
    "pndm as Stable Diffusion 2": {"sampler": "pndm", "set_alpha_to_one": False},
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_our_folder_gives_the_same_pictures_in_diffusers(tmp_path, schedule):
    pipe = Pipeline(tiny_parts(**schedule))
    pipe.save_pretrained(tmp_path)
    theirs = open_in_diffusers(tmp_path)
    assert theirs.safety_checker is None and far(pipe, theirs) <= 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_schedules_round_trip_and_open_in_diffusers(tmp_path, sampler):
    values = {"beta_start": 0.001, "beta_end": 0.01, "steps_offset": 1, "set_alpha_to_one": False}
    config = ScheduleConfig(
        sampler=sampler,
        sigmas="karras" if sampler in PLACED else None,
        beta_schedule="linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        **values,
    )
    pipeline_io.save_schedule(tmp_path / "ours", config)
    assert pipeline_io.read_schedule(tmp_path / "ours") == config
    name = pipeline_io.SCHEDULERS[sampler]
    scheduler = DPMSolverSDEScheduler if sampler == "dpmpp_sde" else getattr(diffusers, name)
    with no_complaints():
        theirs = scheduler.from_pretrained(tmp_path / "ours")
        other = diffusers.DDIMScheduler.from_config(theirs.config)
    kept = {"set_alpha_to_one", "clip_sample"}
    assert getattr(theirs.config, "use_karras_sigmas", True) and not getattr(theirs.config, "use_beta_sigmas", False)
    assert all(getattr(theirs.config, name) == values[name] for name in values if name not in kept)
    assert other.config.set_alpha_to_one is False and other.config.clip_sample is False
    theirs.save_pretrained(tmp_path / "theirs")
    assert pipeline_io.read_schedule(tmp_path / "theirs") == config


# As in the folders of 2022: neither timestep_spacing nor clip_sample, and some without steps_offset.
SD1 = {"beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000}
PNDM = SD1 | {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False, "trained_betas": None}
DDIM = SD1 | {"_class_name": "DDIMScheduler", "steps_offset": 1}


def write(folder, table: dict):
    folder.mkdir(exist_ok=True)
    (folder / "scheduler_config.json").write_text(json.dumps(table))
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    pipeline_io.save_parts(folder, tiny_parts())
    return folder


def with_scheduler(saved: Path, folder: Path, table: dict) -> Path:
    shutil.copytree(saved, folder)
    write(folder / "scheduler", table)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", table["_class_name"]]}))
    return folder


@pytest.mark.parametrize("table", [PNDM, DDIM], ids=["PNDM", "DDIM"])
def test_keys_that_are_left_out_take_the_defaults_of_the_sampler_that_runs(saved, tmp_path, table):
    """As diffusers' `from_config` exchanges the scheduler of the same folder."""
    folder = with_scheduler(saved, tmp_path / "pipe", table)
    ours = Pipeline.from_pretrained(folder)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    config = theirs.scheduler.config
    for sampler in ("ddim", "pndm", "euler", "heun", "dpmpp_2m", "unipc", "deis"):
        options = {"skip_prk_steps": True} if sampler == "pndm" else {"clip_sample": False} if sampler == "ddim" else {}
        scheduler = getattr(diffusers, pipeline_io.SCHEDULERS[sampler])
        theirs.scheduler = scheduler.from_config(config, **options, steps_offset=1)
        assert far(ours, theirs, 10, sampler) <= 1, sampler


OTHERS = {"use_karras_sigmas": True, "solver_order": 3, "algorithm_type": "sde-dpmsolver++", "steps_offset": 0}


@pytest.mark.parametrize("change", [OTHERS, {"clip_sample": True}], ids=["other classes' keys", "clip_sample"])
def test_keys_without_effect_give_the_same_pictures_as_in_diffusers(saved, tmp_path, recwarn, change):
    folder = with_scheduler(saved, tmp_path / "pipe", DDIM | change)
    pipe = Pipeline.from_pretrained(folder)
    assert not list(recwarn)
    assert far(pipe, diffusers.StableDiffusionPipeline.from_pretrained(folder)) <= 1


SDE = {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}


@pytest.mark.parametrize(
    ("name", "change", "sampler", "message"),
    [
        ("SASolverScheduler", {}, "dpmpp_2m", "SASolverScheduler is not supported; 'dpmpp_2m' takes its"),
        ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}, "euler", "final_sigmas_type = 'sigma_min'"),
        ("PNDMScheduler", {}, "pndm", "skip_prk_steps = False"),
        ("TCDScheduler", {}, "lcm", "TCDScheduler is not supported; 'lcm' takes its place"),
        ("DPMSolverMultistepScheduler", SDE, "dpmpp_2m_sde", "Scheduler, solver_order = 3 is not supported"),
    ],
)
def test_another_sampler_replaces_one_that_is_not_here_with_a_warning(tmp_path, name, change, sampler, message):
    with pytest.warns(UserWarning, match=message) as warned:
        config = pipeline_io.read_schedule(write(tmp_path / "s", DDIM | {"_class_name": name} | change))
    assert config.sampler == sampler and len(warned) == 1 and "\n" not in str(warned[0].message)


@pytest.mark.parametrize(
    "config",
    [
        {"rescale_betas_zero_snr": True, "sampler": "heun", "prediction_type": "v_prediction"},
        {"prediction_type": "sample", "sampler": "pndm"},
        {"steps_offset": 0, "timestep_spacing": "leading"},
    ],
)
def test_schedules_that_diffusers_cannot_follow_are_written_with_a_warning(tmp_path, config):
    with pytest.warns(UserWarning, match=f"ignores {next(iter(config))} = "):
        pipeline_io.save_schedule(tmp_path, ScheduleConfig(**config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_type": "flow_prediction"}, "prediction_type"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule"),
        ({"trained_betas": [0.1, 0.2]}, "the noise schedule of this DDIMScheduler is not supported"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler is not supported"),
        ({"rescale_betas_zero_snr": True}, "epsilon"),
    ],
)
def test_schedules_that_would_give_wrong_pictures_are_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        pipeline_io.read_schedule(write(tmp_path / "s", DDIM | change))


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("unet", "in_channels", 9, "U-Net .*9 channels in.*latents of 4 channels"),
        ("unet", "out_channels", 8, "U-Net .*4 channels in, 8 out.*latents of 4 channels"),
        ("unet", "cross_attention_dim", 12, "U-Net .*contexts of width 12.*width 24"),
        ("text_encoder", "vocab_size", 20, "tokenizer .*text encoder .20 tokens"),
        ("tokenizer", "model_max_length", 77, "context length 77.*length 12"),
    ],
)
def test_parts_that_do_not_fit(saved, tmp_path, monkeypatch, part, key, value, message):
    folder = shutil.copytree(saved, tmp_path / "copy")
    path = folder / part / ("tokenizer_config.json" if part == "tokenizer" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    # The sizes are looked at after the weights, which would not fit either.
    monkeypatch.setattr("ldm.model_io.load_model", lambda make, folder, tensors, *configs, **_: make())
    with pytest.raises(UserError, match=message):
        pipeline_io.load_parts(folder)


def test_incomplete_folders(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "copy")
    shutil.rmtree(folder / "unet")
    with pytest.raises(UserError, match="not a whole pipeline: unet missing; .* train_diffusion writes one"):
        pipeline_io.load_parts(folder)


def test_sd15_text_encoder_has_the_published_sizes():
    from transformers import CLIPConfig as TheirConfig
    from transformers import CLIPModel

    from ldm.clip import CLIP

    config = load(CLIPConfig, Path(__file__).parent.parent / "configs/sd15/clip.toml")
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
    vision |= {"patch_size": 14, "image_size": 224}
    with torch.device("meta"):
        theirs = CLIPModel(TheirConfig(text_config=text, vision_config=vision, projection_dim=768))
        ours = CLIP(config.text, config.vision)
    assert shapes(ours) == shapes(theirs)


def test_models_of_the_hub_open_from_its_cache_and_say_where_they_are_not(saved, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--somebody--tiny"
    shutil.copytree(saved, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    pipe = Pipeline.from_pretrained("somebody/tiny")
    assert far(pipe, diffusers.StableDiffusionPipeline.from_pretrained("somebody/tiny", local_files_only=True)) <= 1
    with pytest.raises(UserError, match="'somebody/other' is no folder here, and the hub does not give it: "):
        Pipeline.from_pretrained("somebody/other")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("runs/mistyped", "emoij", "/mistyped", "a/b/c"):
        with pytest.raises(UserError, match="no folder, file or shipped one"):
            Pipeline.from_pretrained(name)
