"""Stable Diffusion 1.x and 2.x as one file in the layout of the original code (CompVis, Stability AI), both ways.

Sizes are read from the tensors. What they do not tell is the convention of the generation: 8 heads in 1.x, 64 channels
per head in 2.x, groups of 32. Files written here also record the configs of their parts, for models unlike those.
"""

import json
import re
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ldm import model_io
from ldm.config import UserError, build
from ldm.diffusion import ScheduleConfig

Tensors, Names = dict[str, Tensor], dict[str, str]

CLIP, OPENCLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."  # of 1.x and of 2.x
# A part's prefix in the layout, and the end of a name that no other part has: merges change what precedes it.
ENDS = {
    "unet": {"model.diffusion_model.": "input_blocks.0.0.weight"},
    "vae": {"first_stage_model.": "decoder.mid.block_1.norm1.weight"},
    "text_encoder": {CLIP: "embeddings.token_embedding.weight", OPENCLIP: "positional_embedding"},
}
UNUSED = ("model_ema.", "loss.", "embeddings.position_ids", "text_projection", "logit_scale", "attn_mask")
FOREIGN = {  # in this order
    r"lora_|\.lora\.|\.hada_|\.lokr_": "a LoRA",
    r"string_to_param|emb_params": "a textual-inversion embedding",
    r"control_model\.|input_hint_block\.": "a ControlNet",
    r"joint_blocks\.": "Stable Diffusion 3",
    r"double_blocks\.": "Flux",
    r"conditioner\.embedders\.1\.|label_emb\.": "Stable Diffusion XL",
    r"^(encoder\.)?down_blocks\.": "a part in diffusers' layout, to open as a folder with its config.json",
}
PREDICTIONS = {"v": "v_prediction", "epsilon": "epsilon"}  # of the metadata `modelspec.prediction_type`
# Stable Diffusion's sizes, which other programs expect.
SIZES: dict[str, dict] = {
    "model.diffusion_model.": {"block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "in_channels": 4},
    "first_stage_model.": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4},
    CLIP: {"vocab_size": 49408, "hidden_size": 768, "num_hidden_layers": 12},
    OPENCLIP: {"vocab_size": 49408, "hidden_size": 1024, "num_hidden_layers": 23},
}

# Names of submodules here: in the original code.
UNET = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_out": "out.2"}
UNET |= {"conv_in": "input_blocks.0.0", "mid_block.attentions.0": "middle_block.1", "conv_norm_out": "out.0"}
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
RESNET |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
VAE = {"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut"}
VAE |= {"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2"}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
VAE |= {f"mid_block.attentions.0.{ours}": f"mid.attn_1.{theirs}" for ours, theirs in ATTENTION.items()}
TEXT = {"embeddings.token_embedding": "token_embedding", "embeddings.position_embedding.weight": "positional_embedding"}
TEXT |= {"encoder.layers": "transformer.resblocks", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn": "attn"}
TEXT |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "final_layer_norm": "ln_final"}


def open_part(source: str | Path, part: str, ema: bool = False) -> tuple[Path, dict[str, Any], Tensors]:
    """Path, config and weights of a part ("vae", "unet", "text_encoder") of a model folder or a single file, under
    diffusers' names; `ema` takes the averaged U-Net of a file. Raises UserError where there is none."""
    path = Path(source)
    if not path.is_file():
        path = model_io.find_part(source, part)
        return path, model_io.read_json(path / "config.json"), model_io.read_tensors(path)
    everything, _, recorded = _read(path)
    try:
        tensors = _cut(everything, part)
        if ema:
            tensors = {name: everything["model_ema.diffusion_model" + name.replace(".", "")] for name in tensors}
        config, tensors = _decode(part, tensors)
    except (LookupError, ValueError) as error:  # a tensor is missing, or has another shape
        names = " or ".join(prefix + end for prefix, end in ENDS[part].items())
        raise UserError(f"no whole {part} in {str(path)!r}, which begins at {names}: {error} is missing") from None
    return path, config | recorded.get(part, {}), tensors


def read_schedule(path: Path, prediction: str = "auto", zero_snr: bool = False) -> ScheduleConfig:
    """The schedule of a single file: the recorded one, else Stable Diffusion's. `prediction` auto is that of the file's
    metadata or keys; where they name none, 1.x is taken to predict eps and 2.x, with a warning, v."""
    (_, config, _), (tensors, metadata, recorded) = open_part(path, "unet"), _read(path)
    values = {"set_alpha_to_one": False} | recorded.get("scheduler", {})
    named = "v_prediction" if "v_pred" in tensors else PREDICTIONS.get(metadata.get("modelspec.prediction_type", ""))
    if prediction != "auto" or named:
        values["prediction_type"] = named if prediction == "auto" else prediction
    elif "prediction_type" not in values and config["use_linear_projection"]:
        values["prediction_type"] = "v_prediction"
        warnings.warn(f"{path} names no prediction: v_prediction is assumed, 2.x's other one is epsilon", stacklevel=2)
    if zero_snr or "ztsnr" in tensors:
        values |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return build(ScheduleConfig, values, f"{path}: ")


def write(path: Path, configs: dict[str, dict], weights: dict[str, Tensors]) -> None:
    """Writes safetensors from the weights and configs of the parts and the config of the `scheduler`. Warns where other
    programs, which go by tensors and conventions, would not open the model or take it for another."""
    everything, expected = {}, {"scheduler": asdict(ScheduleConfig())}
    for part, tensors in weights.items():
        prefix = OPENCLIP if configs[part].get("hidden_act") == "gelu" else next(iter(ENDS[part]))
        tensors = _encode(part, configs[part], tensors)
        everything |= {prefix + name: tensor for name, tensor in tensors.items()}
        expected[part] = _decode(part, tensors)[0] | SIZES[prefix]
    if other := [f"{part}.{key}" for part in expected for key, x in expected[part].items() if configs[part][key] != x]:
        where = ", ".join(other)
        warnings.warn(f"ComfyUI and A1111 take Stable Diffusion's own sizes alone; {where} differ", stacklevel=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    model_io.save_tensors(path, everything, {"ldm": json.dumps(configs)})


def _read(path: Path) -> tuple[Tensors, dict[str, str], dict[str, dict]]:
    """Tensors, metadata, and the configs recorded in them. Raises UserError for other architectures."""
    tensors, metadata = model_io.load_tensors(path), {}
    for pattern, architecture in FOREIGN.items():
        if any(re.search(pattern, name) for name in tensors):
            raise UserError(f"{str(path)!r} is {architecture}, not Stable Diffusion 1.x or 2.x in the original layout")
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    return tensors, metadata, json.loads(metadata.get("ldm", "{}"))


def _cut(tensors: Tensors, part: str) -> Tensors:
    """The tensors of a part without their prefix. Raises LookupError where there are none."""
    starts = (n.removesuffix(end) for end in ENDS[part].values() for n in tensors if re.search(rf"(^|\.){end}$", n))
    start = next(starts, None)
    if start is None:
        raise LookupError("this name")
    cut = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
    return {name: tensor for name, tensor in cut.items() if not name.startswith(UNUSED)}


def _decode(part: str, tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """A part's tensors in the layout, without prefix -> the config that they tell, the tensors here."""
    if part == "text_encoder":
        return _decode_text(tensors)
    config = _unet_config(tensors) if part == "unet" else _vae_config(tensors)
    tensors = _rename(tensors, {theirs: ours for ours, theirs in _names(part, config).items()})
    return config, {name: x.flatten(1) if ".0.to_" in name and x.ndim == 4 else x for name, x in tensors.items()}


def _encode(part: str, config: dict, tensors: Tensors) -> Tensors:
    """The reverse of `_decode`."""
    if part != "text_encoder":
        tensors = _rename(tensors, _names(part, config))
        return {name: x[..., None, None] if ".attn_1." in name and x.ndim == 2 else x for name, x in tensors.items()}
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    if config["hidden_act"] == "quick_gelu":
        return tensors
    for name in [name for name in tensors if ".q_proj." in name]:
        qkv = [tensors.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        tensors[name.replace("q_proj.", "in_proj_")] = torch.cat(qkv)
    return _rename(tensors, TEXT)


def _rename(tensors: Tensors, names: Names) -> Tensors:
    """Replaces the keys of `names` where they are complete between dots, the longest first."""
    keys = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    pattern = re.compile(rf"(?<![^.])(?:{keys})(?![^.])")
    return {pattern.sub(lambda match: names[match[0]], name): tensor for name, tensor in tensors.items()}


def _names(part: str, config: dict) -> Names:
    """Names of submodules here -> in the layout, which counts a VAE's levels from the highest resolution, and a U-Net's
    blocks through all levels: n residual blocks and a step down, n + 1 residual blocks on the way up."""
    if part == "vae":
        names, last = dict(VAE), len(config["block_out_channels"]) - 1
        for i in range(last + 1):
            names |= {f"down_blocks.{i}.resnets": f"down.{i}.block", f"up_blocks.{i}.resnets": f"up.{last - i}.block"}
            names |= {f"down_blocks.{i}.downsamplers.0": f"down.{i}.downsample"}
            names |= {f"up_blocks.{i}.upsamplers.0": f"up.{last - i}.upsample"}
        return names
    names, count = dict(UNET), config["layers_per_block"] + 1
    resnets = {f"mid_block.resnets.{i}": f"middle_block.{2 * i}" for i in (0, 1)}
    for i, kind in enumerate(config["up_block_types"]):
        for k in range(i * count, (i + 1) * count):
            for ours, theirs in ("down_blocks", f"input_blocks.{k + 1}"), ("up_blocks", f"output_blocks.{k}"):
                resnets[f"{ours}.{i}.resnets.{k % count}"] = f"{theirs}.0"
                names[f"{ours}.{i}.attentions.{k % count}"] = f"{theirs}.1"
        names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{k + 1}.0.op"
        names[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{k}.{1 + kind.startswith('Cross')}.conv"
    return names | {f"{a}.{inner}": f"{b}.{RESNET[inner]}" for a, b in resnets.items() for inner in RESNET}


def _count(tensors: Tensors, pattern: str) -> int:
    """How many different beginnings of names match."""
    return len({match[0] for name in tensors if (match := re.match(pattern, name))})


def _unet_config(tensors: Tensors) -> dict[str, Any]:
    levels = 1 + _count(tensors, r"input_blocks\.\d+\.0\.op\.")
    count = _count(tensors, r"input_blocks\.\d+\.") // levels
    down, up = (
        [f"{way}.{i * count + first}" for i in range(levels)]
        for way, first in (("input_blocks", 1), ("output_blocks", 0))
    )
    widths = tuple(len(tensors[f"{block}.0.out_layers.3.bias"]) for block in down)
    linear = tensors["middle_block.1.proj_in.weight"].ndim == 2  # in 2.x; a 1x1 convolution in 1.x
    return {
        "sample_size": 96 if linear else 64,
        "in_channels": tensors["input_blocks.0.0.weight"].shape[1],
        "out_channels": len(tensors["out.2.bias"]),
        "block_out_channels": widths,
        "down_block_types": tuple("CrossAttn" * (f"{block}.1.norm.bias" in tensors) + "DownBlock2D" for block in down),
        "up_block_types": tuple("CrossAttn" * (f"{block}.1.norm.bias" in tensors) + "UpBlock2D" for block in up),
        "layers_per_block": count - 1,
        "attention_head_dim": tuple(max(1, width // 64) for width in widths) if linear else 8,
        "cross_attention_dim": tensors["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "norm_num_groups": 32,
        "use_linear_projection": linear,
    }


def _vae_config(tensors: Tensors) -> dict[str, Any]:
    levels = _count(tensors, r"decoder\.up\.\d+\.")
    return {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": len(tensors["decoder.conv_out.bias"]),
        "block_out_channels": tuple(len(tensors[f"encoder.down.{i}.block.0.conv2.bias"]) for i in range(levels)),
        "layers_per_block": _count(tensors, r"encoder\.down\.0\.block\.\d+\."),
        "latent_channels": len(tensors["post_quant_conv.bias"]),
        "norm_num_groups": 32,
        "scaling_factor": 0.18215,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in tensors,
    }


def _decode_text(tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    openclip, tensors = "positional_embedding" in tensors, dict(tensors)
    for name in [name for name in tensors if "in_proj_" in name]:
        for letter, x in zip("qkv", tensors.pop(name).chunk(3), strict=True):
            tensors[name.replace("in_proj_", f"{letter}_proj.")] = x
    tensors = _rename(tensors, {theirs: ours for ours, theirs in TEXT.items()}) if openclip else tensors
    depth = _count(tensors, r"encoder\.layers\.\d+\.")
    if openclip and depth == 24:  # 2.x takes the output of the last layer but one
        tensors, depth = {name: x for name, x in tensors.items() if ".layers.23." not in name}, 23
    vocabulary, width = tensors["embeddings.token_embedding.weight"].shape
    config = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": len(tensors["encoder.layers.0.mlp.fc1.bias"]),
        "num_hidden_layers": depth,
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": len(tensors["embeddings.position_embedding.weight"]),
        "hidden_act": "gelu" if openclip else "quick_gelu",
    }
    return config, {f"text_model.{name}": tensor for name, tensor in tensors.items()}
