"""A pipeline as a folder in diffusers' Stable Diffusion layout, both ways."""

import copy
import typing
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ldm import model_io, single_file
from ldm.clip import TextEncoder
from ldm.config import UserError, build
from ldm.diffusion import Schedule, ScheduleConfig, Sigmas
from ldm.lora import FILE
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
    "dpmpp_2m_sde": "DPMSolverMultistepScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "dpmpp_sde": "DPMSolverSDEScheduler",
    "unipc": "UniPCMultistepScheduler",
    "deis": "DEISMultistepScheduler",
    "pndm": "PNDMScheduler",
    "lcm": "LCMScheduler",
}
# The nearest sampler to other classes; "dpmpp_2m" to those that are not listed.
NEAREST = {
    "DDIMParallelScheduler": "ddim",
    "DDPMParallelScheduler": "ddpm",
    "IPNDMScheduler": "pndm",
    "KDPM2AncestralDiscreteScheduler": "euler_a",
    "KDPM2DiscreteScheduler": "heun",
    "LMSDiscreteScheduler": "euler",
    "TCDScheduler": "lcm",
}
# The options of each class that change its steps, with their values in the sampler here.
SOLVER = {"solver_order": 2, "lower_order_final": True, "final_sigmas_type": "zero", "thresholding": False}
OPTIONS: dict[str, dict] = {
    "ddpm": {"variance_type": "fixed_small", "thresholding": False},
    "ddim": {"thresholding": False},
    "euler": {"interpolation_type": "linear", "timestep_type": "discrete", "final_sigmas_type": "zero"},
    "euler_a": {},
    "heun": {},
    "dpmpp_2m": SOLVER | {"algorithm_type": "dpmsolver++", "use_lu_lambdas": False, "euler_at_final": False},
    "dpmpp_sde": {},
    "unipc": SOLVER | {"solver_type": "bh2", "predict_x0": True, "disable_corrector": []},
    "deis": {"solver_order": 2, "lower_order_final": True, "thresholding": False},
    "pndm": {"skip_prk_steps": True},
    "lcm": {"original_inference_steps": 50, "timestep_scaling": 10.0, "thresholding": False},
}
OPTIONS["dpmpp_2m_sde"] = OPTIONS["dpmpp_2m"] | {"algorithm_type": "sde-dpmsolver++"}
WRITTEN = {"pndm": ("skip_prk_steps",), "dpmpp_2m_sde": ("algorithm_type",)}  # of them those that are no default
UNSCALED = ("heun", "pndm", "deis", "dpmpp_sde")  # whose classes know no zero terminal SNR
LAYOUT = "0.42.1"  # the diffusers version whose layout is written
CLASSES = {
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
} | dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"), [None, None])


class Parts(NamedTuple):
    """The parts of a pipeline."""

    vae: VAE
    text_encoder: TextEncoder
    tokenizer: Tokenizer
    unet: UNet
    schedule: Schedule


def save_parts(folder: str | Path, parts: Parts, half: bool = False) -> None:
    """Writes the parts and, last, `model_index.json`, for diffusers' `StableDiffusionPipeline.from_pretrained`.

    `half` stores the weights as float16, which load as float32. Raises UserError for weights that float16 cannot hold.
    """
    folder = Path(folder)
    for name, model in _models(parts, half).items():
        model.save_pretrained(folder / name)
    parts.tokenizer.save_pretrained(folder / "tokenizer")
    save_schedule(folder / "scheduler", parts.schedule.config)
    scheduler = ["diffusers", SCHEDULERS[parts.schedule.config.sampler]]
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": LAYOUT, **CLASSES, "scheduler": scheduler}
    model_io.write_json(folder / "model_index.json", index | {"requires_safety_checker": False})


def save_single_file(path: Path, parts: Parts, half: bool = False) -> None:
    """Writes all but the tokenizer as one file in Stable Diffusion's original layout; `half` as in `save_parts`."""
    models = _models(parts, half)
    configs = {name: asdict(part.config) for name, part in (models | {"scheduler": parts.schedule}).items()}
    configs["vae"]["_perceptual_net"] = parts.vae.perceptual_net
    configs["unet"]["_distilled_steps"] = parts.unet.distilled_steps
    single_file.write(path, models, configs)


def _models(parts: Parts, half: bool) -> dict[str, nn.Module]:
    models = {"vae": parts.vae, "text_encoder": parts.text_encoder, "unet": parts.unet}
    if half:
        models = {name: copy.deepcopy(model).half() for name, model in models.items()}
        for key, tensor in nn.ModuleDict(models).state_dict().items():
            if not tensor.isfinite().all():
                raise UserError(f"{key} has values above 65504, which float16 cannot hold; save it whole")
    return models


def load_parts(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    vae: str | Path = "",
    tokenizer: str | Path = "",
    prediction: str = "",
    zero_snr: bool = False,
    ema: bool = False,
) -> Parts:
    """The parts in a run folder, a Stable Diffusion folder or file, or of a shipped model, on `device` in `dtype`; the
    VAE stays float32 instead of float16, in which it overflows. `vae` and `tokenizer` are those of another model;
    `prediction`, `zero_snr` and `ema` are for single files: see `ldm.single_file`. Raises UserError where a part is
    missing, is not supported, or does not fit the others."""
    root = model_io.find_root(folder)
    if root.is_file():
        config = single_file.read_schedule(root, prediction, zero_snr)
    elif prediction or zero_snr or ema:
        raise UserError(f"{str(root)!r} is a folder; prediction, zero_snr and ema are for single files")
    elif missing := [part for part in (*Parts._fields[:4], "scheduler") if not (root / part).is_dir()]:
        way_out = "Stable Diffusion 1.x and 2.x have one, and train_diffusion writes one"
        if (root / FILE).is_file():
            way_out = f"it is an adapter: --lora {root} --model MODEL, the model that it was trained on"
        raise UserError(f"{str(root)!r} is not a whole pipeline: {', '.join(missing)} missing; {way_out}")
    else:
        config = read_schedule(root / "scheduler")  # first, since it is read at once
    placement = {"device": device, "dtype": dtype}
    wide = placement | {"dtype": torch.float32 if dtype == torch.float16 else dtype}
    autoencoder, text_encoder = VAE.from_pretrained(vae or root, **wide), TextEncoder.from_pretrained(root, **placement)
    tokens, unet = Tokenizer.from_pretrained(tokenizer or root), UNet.from_pretrained(root, ema, **placement)
    latent, c, text = autoencoder.config.latent_channels, unet.config, text_encoder.config
    if (c.in_channels, c.out_channels, c.cross_attention_dim) != (latent, latent, text.hidden_size):
        sizes = f"{c.in_channels} channels in, {c.out_channels} out, contexts of width {c.cross_attention_dim}"
        others = f"the VAE (latents of {latent} channels) or the text encoder (width {text.hidden_size})"
        raise UserError(f"the U-Net in {str(root)!r} ({sizes}) does not fit {others}")
    check_tokenizer(tokens, text_encoder)
    return Parts(autoencoder, text_encoder, tokens, unet, Schedule(config))


def check_tokenizer(tokenizer: Tokenizer, text_encoder: TextEncoder) -> None:
    """Raises UserError for tokens or lengths that the text encoder does not have."""
    text = text_encoder.config
    if len(tokenizer) > text.vocab_size or tokenizer.context_length > text.max_position_embeddings:
        sizes = f"{len(tokenizer)} tokens, context length {tokenizer.context_length}"
        others = f"the text encoder ({text.vocab_size} tokens, length {text.max_position_embeddings})"
        raise UserError(f"the tokenizer ({sizes}) does not fit {others}; name the folder of its own")


def save_schedule(folder: Path, config: ScheduleConfig) -> None:
    """Writes `scheduler_config.json` for the diffusers class of `config.sampler`, with the keys that only other classes
    read, which diffusers keeps for an exchange of the scheduler."""
    sampler, name = config.sampler, SCHEDULERS[config.sampler]
    for key, ignored in (
        ("rescale_betas_zero_snr", sampler in UNSCALED and config.rescale_betas_zero_snr),
        ("prediction_type", sampler == "pndm" and config.prediction_type == "sample"),
        ("steps_offset", config.timestep_spacing == "leading" and config.steps_offset != 1),
    ):
        if ignored:
            value = repr(getattr(config, key))
            warnings.warn(f"diffusers' {name} ignores {key} = {value}: other pictures there", stacklevel=2)
    values = {key: value for key, value in asdict(config).items() if value is not None}
    values = {key: value for key, value in values.items() if key not in ("sampler", "sigmas")}
    values |= {key: OPTIONS[sampler][key] for key in WRITTEN.get(sampler, ())}
    values |= {f"use_{config.sigmas}_sigmas": True} if config.sigmas else {}
    folder.mkdir(parents=True, exist_ok=True)
    model_io.write_json(folder / "scheduler_config.json", {"_class_name": name, **values, "clip_sample": False})


def read_schedule(folder: Path) -> ScheduleConfig:
    """`scheduler_config.json` as diffusers' Stable Diffusion pipeline runs it, which sets steps_offset and clip_sample.

    Keys of other classes are ignored. For a class or an option that no sampler here has, the nearest sampler takes its
    place, with a warning. Raises UserError for noise schedules and predictions that would give wrong pictures.
    """
    if folder.is_file():
        return single_file.read_schedule(folder)
    path = folder / "scheduler_config.json"
    table = model_io.read_json(path)
    name = str(table.get("_class_name"))
    samplers = {scheduler: sampler for sampler, scheduler in SCHEDULERS.items()}
    if table.get("trained_betas") is not None or "Flow" in name or "EDM" in name:
        raise UserError(f"{path}: the noise schedule of this {name} is not supported; known: {', '.join(samplers)}")
    sampler = samplers.get(name) or NEAREST.get(name, "dpmpp_2m")
    if sampler == "dpmpp_2m" and table.get("algorithm_type") == "sde-dpmsolver++":
        sampler = "dpmpp_2m_sde"
    start, end = (0.00085, 0.012) if sampler in ("heun", "dpmpp_sde", "lcm") else (0.0001, 0.02)
    betas = "scaled_linear" if sampler == "lcm" else "linear"
    sigmas = [each for each in typing.get_args(Sigmas) if table.get(f"use_{each}_sigmas")]
    defaults = {"beta_schedule": betas, "beta_start": start, "beta_end": end, "skip_prk_steps": False}
    table = defaults | {"timestep_spacing": None, "set_alpha_to_one": None} | table
    options = [key for key, value in OPTIONS[sampler].items() if table.get(key, value) not in (value, None)]
    if options or name not in samplers:
        variant = ", ".join([name, *(f"{key} = {table[key]!r}" for key in options)])
        warnings.warn(f"{path}: {variant} is not supported; {sampler!r} takes its place by default", stacklevel=2)
    values = {key: value for key, value in table.items() if key in ScheduleConfig.__dataclass_fields__}
    return build(
        ScheduleConfig,
        values | {"steps_offset": 1, "sampler": sampler, "sigmas": next(iter(sigmas), None)},
        f"{path}: ",
    )
