"""A whole pipeline as a folder in diffusers' Stable Diffusion layout, both ways."""

import math
import warnings
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from ldm import model_io as weights
from ldm.clip import TextEncoder
from ldm.config import UserError, build
from ldm.diffusion import Schedule, ScheduleConfig
from ldm.samplers import get_sampler
from ldm.tokenizer import Tokenizer
from ldm.unet import UNet
from ldm.vae import VAE

# For each sampler, the diffusers class that takes the same steps.
SCHEDULERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "pndm": "PNDMScheduler",
}
# What else a class needs to take these steps: PNDM would begin with Runge-Kutta ones.
EXTRAS: dict[str, dict] = {"pndm": {"skip_prk_steps": True}}
# Keys of scheduler configs beside ScheduleConfig's, and the values that this code supports.
SUPPORTED: dict[str, tuple] = {
    "trained_betas": (None,),
    "clip_sample": (False,),
    "thresholding": (False,),
    "algorithm_type": ("dpmsolver++",),
    "solver_order": (2,),
    "solver_type": ("midpoint", "bh2"),
    "solver_p": (None,),
    "lower_order_final": (True,),
    "final_sigmas_type": ("zero",),
    "predict_x0": (True,),
    "interpolation_type": ("linear",),
    "variance_type": ("fixed_small", None),
    "timestep_type": ("discrete",),
    "disable_corrector": (None,),  # or an empty list
    "lambda_min_clipped": (-math.inf,),
    "skip_prk_steps": (True,),
}
# Keys that say nothing while those above are switched off.
UNUSED = {"clip_sample_range", "sample_max_value", "dynamic_thresholding_ratio", "sigma_min"}
UNUSED |= {"sigma_max", "flow_shift", "use_dynamic_shifting", "time_shift_type", "shift_terminal"}
LAYOUT = "0.42.1"  # the diffusers whose layout is written; its inpainting asks for a version
# What opens; the last two hold the same parts.
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
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


def save_parts(folder: str | Path, parts: Parts, half: bool = False) -> None:
    """Writes the five parts and `model_index.json` last, for `StableDiffusionPipeline.from_pretrained`. `half`
    stores the weights as float16; both libraries load them as float32."""
    folder = Path(folder)
    parts.vae.save_pretrained(folder / "vae")
    parts.text_encoder.save_pretrained(folder / "text_encoder")
    parts.tokenizer.save_pretrained(folder / "tokenizer")
    parts.unet.save_pretrained(folder / "unet")
    save_schedule(folder / "scheduler", parts.schedule.config)
    for file in folder.glob("*/*.safetensors") if half else ():
        weights.save_tensors(file, {name: tensor.half() for name, tensor in weights.load_tensors(file).items()})
    scheduler = ["diffusers", SCHEDULERS[parts.schedule.config.sampler]]
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": LAYOUT, **CLASSES, "scheduler": scheduler}
    weights.write_json(folder / "model_index.json", index | {"requires_safety_checker": False})


def load_parts(folder: str | Path) -> Parts:
    """The five parts of a run folder, a shipped model's name or a Stable Diffusion folder. UserError when one is
    missing, is not supported, or does not fit the others."""
    root = weights.find_root(folder)
    if (root / "model_index.json").is_file():
        kind = weights.read_json(root / "model_index.json").get("_class_name")
        if kind not in PIPELINES:
            raise UserError(f"{str(root)!r} is a {kind}; supported: {PIPELINES[0]}, of Stable Diffusion 1.x and 2.x")
    missing = [p for p in ("vae", "text_encoder", "tokenizer", "unet", "scheduler") if not (root / p).is_dir()]
    if missing:
        raise UserError(
            f"{str(root)!r} is not a whole pipeline: {', '.join(missing)} missing; "
            "train_diffusion writes one, from a VAE and a text encoder"
        )
    schedule = Schedule(read_schedule(root / "scheduler"))  # first: what it refuses, it refuses at once
    parts = Parts(
        VAE.from_pretrained(root / "vae"),
        TextEncoder.from_pretrained(root / "text_encoder"),
        Tokenizer.from_pretrained(root / "tokenizer"),
        UNet.from_pretrained(root / "unet"),
        schedule,
    )
    _check_fit(parts, str(root))
    return parts


def _check_fit(parts: Parts, where: str) -> None:
    """UserError unless the parts have the same sizes where they meet."""
    channels, unet, text = parts.vae.config.latent_channels, parts.unet.config, parts.text_encoder.config
    tokenizer = parts.tokenizer
    if (unet.in_channels, unet.out_channels) != (channels, channels):
        problem = f"U-Net of {unet.in_channels} channels in, {unet.out_channels} out; latents have {channels}"
    elif unet.cross_attention_dim != text.hidden_size:
        problem = f"U-Net for a context of width {unet.cross_attention_dim}; the text encoder's is {text.hidden_size}"
    elif len(tokenizer) > text.vocab_size:
        problem = f"tokenizer of {len(tokenizer)} tokens; the text encoder knows {text.vocab_size}"
    elif tokenizer.context_length > text.max_position_embeddings:
        problem = (
            f"tokenizer of context length {tokenizer.context_length}; "
            f"the text encoder reads {text.max_position_embeddings}"
        )
    else:
        return
    raise UserError(f"the parts in {where!r} do not fit each other: {problem}")


def save_schedule(folder: Path, config: ScheduleConfig) -> None:
    """Writes `scheduler_config.json` for the diffusers class that takes the steps of `config.sampler`.

    Every field is written, also those which only other classes read: diffusers keeps them, in silence, for when
    the scheduler is exchanged. UserError for an unknown sampler.
    """
    get_sampler(config.sampler)
    name = SCHEDULERS[config.sampler]
    if config.sampler in ("heun", "pndm") and config.rescale_betas_zero_snr:
        warnings.warn(f"diffusers' {name} has no zero terminal SNR: other pictures there", stacklevel=2)
    if config.sampler == "pndm" and config.prediction_type == "sample":
        warnings.warn(f"diffusers' {name} cannot sample with prediction 'sample'", stacklevel=2)
    if config.timestep_spacing == "leading" and config.steps_offset != 1:
        message = (
            f"diffusers' Stable Diffusion pipeline sets steps_offset {config.steps_offset} to 1: other pictures there"
        )
        warnings.warn(message, stacklevel=2)
    values = {key: value for key, value in asdict(config).items() if key != "sampler"} | EXTRAS.get(config.sampler, {})
    folder.mkdir(parents=True, exist_ok=True)
    table = {"_class_name": name, **values, "clip_sample": False}
    weights.write_json(folder / "scheduler_config.json", table)


def read_schedule(folder: Path) -> ScheduleConfig:
    """`scheduler_config.json` of any class in SCHEDULERS; a missing key has that class's default. UserError names what
    is not supported."""
    path = folder / "scheduler_config.json"
    table = weights.read_json(path)
    name, names = table.get("_class_name"), {f.name for f in fields(ScheduleConfig)} - {"sampler"}
    samplers = {cls: sampler for sampler, cls in SCHEDULERS.items()}
    if not isinstance(name, str) or name not in samplers:
        raise UserError(f"scheduler {name!r} in {str(folder)!r} is not supported; known: {', '.join(samplers)}")
    table = _class_defaults(name) | table
    unused = UNUSED if name == SCHEDULERS["pndm"] else UNUSED | {"skip_prk_steps"}
    for key, value in table.items():
        if key not in names and key not in unused and not key.startswith("_"):
            weights.check_supported(key, value, SUPPORTED, path)
    values = {key: value for key, value in table.items() if key in names}
    return build(ScheduleConfig, values | {"sampler": samplers[name]}, f"{path}: ")


def _class_defaults(name: str) -> dict[str, Any]:
    """What diffusers' scheduler `name` takes for keys that its config does not have, where that is not ours."""
    start, end = (0.00085, 0.012) if name == "HeunDiscreteScheduler" else (0.0001, 0.02)
    pndm = name == SCHEDULERS["pndm"]
    leading = pndm or name in ("DDPMScheduler", "DDIMScheduler")
    return {
        "beta_schedule": "linear",
        "beta_start": start,
        "beta_end": end,
        "timestep_spacing": "leading" if leading else "linspace",
        "set_alpha_to_one": not pndm,
        "clip_sample": name in ("DDPMScheduler", "DDIMScheduler"),
    } | ({"skip_prk_steps": False} if pndm else {})
