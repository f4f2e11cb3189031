"""A whole pipeline as a folder in diffusers' Stable Diffusion layout, both ways."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple

from ldm import weights
from ldm.clip import TextEncoder
from ldm.config import UserError, build
from ldm.diffusion import Schedule, ScheduleConfig
from ldm.samplers import SAMPLERS
from ldm.tokenizer import Tokenizer
from ldm.unet import UNet
from ldm.vae import VAE

# diffusers' scheduler classes, for each the sampler here that takes the same steps.
SCHEDULERS = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "UniPCMultistepScheduler": "unipc",
    "PNDMScheduler": "dpmpp_2m",  # no PLMS here; the same picture to the eye in fewer steps
}
# Keys of scheduler configs that change nothing here at these values; others are refused by name.
NEUTRAL: dict[str, tuple] = {
    "trained_betas": (None,),
    "clip_sample": (False,),
    "thresholding": (False,),
    "skip_prk_steps": (True,),
    "algorithm_type": ("dpmsolver++",),
    "solver_order": (2,),
    "solver_type": ("midpoint", "bh2"),
    "lower_order_final": (True,),
    "final_sigmas_type": ("zero",),
    "predict_x0": (True,),
    "interpolation_type": ("linear",),
    "variance_type": ("fixed_small", None),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
    "euler_at_final": (False,),
    "timestep_type": ("discrete",),
    "disable_corrector": (None,),
}
UNUSED = {"clip_sample_range", "sample_max_value", "dynamic_thresholding_ratio", "lambda_min_clipped", "solver_p"}
UNUSED |= {"sigma_min", "sigma_max", "flow_shift", "use_dynamic_shifting", "time_shift_type", "shift_terminal"}
CLASSES = {
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
}


class Parts(NamedTuple):
    """What a pipeline is composed of."""

    vae: VAE
    text_encoder: TextEncoder
    tokenizer: Tokenizer
    unet: UNet
    schedule: Schedule


def save_parts(folder: str | Path, parts: Parts) -> None:
    """Writes the five parts and `model_index.json` last, for `StableDiffusionPipeline.from_pretrained`."""
    folder = Path(folder)
    parts.vae.save_pretrained(folder / "vae")
    parts.text_encoder.save_pretrained(folder / "text_encoder")
    parts.tokenizer.save_pretrained(folder / "tokenizer")
    parts.unet.save_pretrained(folder / "unet")
    save_schedule(folder / "scheduler", parts.schedule.config)
    scheduler = weights.read_json(folder / "scheduler" / "scheduler_config.json")["_class_name"]
    index = {"_class_name": "StableDiffusionPipeline", **CLASSES, "scheduler": ["diffusers", scheduler]}
    weights.write_json(folder / "model_index.json", index | {"requires_safety_checker": False})


def load_parts(folder: str | Path) -> Parts:
    """The five parts of a run folder, a shipped model's name or a Stable Diffusion folder (UserError)."""
    root = weights.find_root(folder)
    missing = [p for p in ("vae", "text_encoder", "tokenizer", "unet", "scheduler") if not (root / p).is_dir()]
    if missing:
        raise UserError(
            f"{str(root)!r} is not a whole pipeline: {', '.join(missing)} missing; "
            "train_diffusion writes one, from a VAE and a text encoder"
        )
    return Parts(
        VAE.from_pretrained(root / "vae"),
        TextEncoder.from_pretrained(root / "text_encoder"),
        Tokenizer.from_pretrained(root / "tokenizer"),
        UNet.from_pretrained(root / "unet"),
        Schedule(read_schedule(root / "scheduler")),
    )


def save_schedule(folder: Path, config: ScheduleConfig) -> None:
    """Writes `scheduler_config.json` with the diffusers class that takes the steps of `config.sampler`."""
    folder.mkdir(parents=True, exist_ok=True)
    name = {sampler: cls for cls, sampler in reversed(SCHEDULERS.items())}[config.sampler]
    values = {key: value for key, value in asdict(config).items() if key != "sampler"}
    if name != "DDIMScheduler":
        del values["set_alpha_to_one"]
    if name in ("DDPMScheduler", "DDIMScheduler"):
        values["clip_sample"] = False
    if name == "HeunDiscreteScheduler":
        del values["rescale_betas_zero_snr"]
    weights.write_json(folder / "scheduler_config.json", {"_class_name": name} | values)


def read_schedule(folder: Path) -> ScheduleConfig:
    """`scheduler_config.json` of any class in SCHEDULERS; UserError names a value that is not supported."""
    table = weights.read_json(folder / "scheduler_config.json")
    cls, names = table.get("_class_name"), {f.name for f in fields(ScheduleConfig)} - {"sampler"}
    if cls not in SCHEDULERS:
        raise UserError(f"scheduler {cls!r} in {str(folder)!r} is not supported; known: {', '.join(SCHEDULERS)}")
    for key, value in table.items():
        known = key in names or key in UNUSED or key.startswith("_")
        if not known and value not in NEUTRAL.get(key, (None, False)):
            raise UserError(f"{folder}/scheduler_config.json: {key} = {value!r} is not supported")
    values = {key: value for key, value in table.items() if key in names}
    sampler = SCHEDULERS[cls]
    assert sampler in SAMPLERS
    return build(ScheduleConfig, values | {"sampler": sampler}, f"{folder}/scheduler_config.json: ")
