"""Stable Diffusion 1.x and 2.x as one file in the layout of the original code (CompVis, Stability AI), both ways.

Sizes are read from the tensors. What they do not tell is the convention of the generation: 8 heads in 1.x, 64 channels
per head in 2.x, groups of 32. Files written here also record the configs of their parts, for models unlike those.
"""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ldm import model_io
from ldm.config import UserError, build
from ldm.diffusion import ScheduleConfig

Tensors = dict[str, Tensor]

CLIP, OPENCLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."  # of 1.x and of 2.x
# A part's prefix in the layout, and the end of a name that no other part has: merges change what precedes it.
ENDS = {
    "unet": {"model.diffusion_model.": "input_blocks.0.0.weight"},
    "vae": {"first_stage_model.": "decoder.mid.block_1.norm1.weight"},
    "text_encoder": {CLIP: "embeddings.token_embedding.weight", OPENCLIP: "positional_embedding"},
}
PREDICTIONS = {"v": {"prediction_type": "v_prediction"}, "epsilon": {"prediction_type": "epsilon"}}
UNUSED = r"model_ema\.|loss\.|text_projection|logit_scale|attn_mask"
FOREIGN = {  # in this order
    r"lora_|\.lora\.|\.hada_|\.lokr_": "a LoRA",
    r"string_to_param|emb_params": "a textual-inversion embedding",
    r"control_model\.|input_hint_block\.": "a ControlNet",
    r"joint_blocks\.": "Stable Diffusion 3",
    r"double_blocks\.": "Flux",
    r"conditioner\.embedders\.1\.|label_emb\.": "Stable Diffusion XL or unCLIP",
    r"^(encoder\.)?down_blocks\.": "a part in diffusers' layout, to open as a folder with its config.json",
}
# What other programs take for granted, beside the heads and, in 1.x, the prediction of eps.
OWN = {"unet.block_out_channels": (320, 640, 1280, 1280), "vae.block_out_channels": (128, 256, 512, 512)}
OWN |= {"vae.scaling_factor": 0.18215, "scheduler.beta_schedule": "scaled_linear", "scheduler.beta_start": 0.00085}
OWN |= {"scheduler.beta_end": 0.012, "scheduler.rescale_betas_zero_snr": False}

# Names of submodules here: in the original code.
UNET = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_out": "out.2"}
UNET |= {"conv_in": "input_blocks.0.0", "mid_block.attentions.0": "middle_block.1", "conv_norm_out": "out.0"}
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
RESNET |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
VAE = {"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2", "conv_norm_out": "norm_out"}
VAE |= {"mid_block.attentions.0": "mid.attn_1", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v"}
VAE |= {"to_out.0": "proj_out", "conv_shortcut": "nin_shortcut"}
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
    try:
        everything, recorded = _read(path)
        tensors = _cut(everything, part)
        if ema:
            tensors = {name: everything["model_ema.diffusion_model" + name.replace(".", "")] for name in tensors}
        config, tensors = decode(part, tensors)
        return path, config | recorded.get(part, {}), tensors
    except UserError:
        raise
    except Exception as error:  # missing tensors, impossible shapes and broken metadata raise nearly anything
        raise UserError(f"no SD 1.x or 2.x {part} in {str(path)!r}; missing: {str(error) or 'all of it'}") from None


def read_schedule(path: Path, prediction: str = "", zero_snr: bool = False) -> ScheduleConfig:
    """The schedule of a single file: the recorded one, else Stable Diffusion's. Where neither `prediction` nor the
    metadata name one, 1.x is taken to predict eps and 2.x, with a warning, v."""
    (_, config, _), (_, recorded) = open_part(path, "unet"), _read(path)
    values = {"set_alpha_to_one": False} | recorded["scheduler"]
    if prediction:
        values["prediction_type"] = prediction
    elif "prediction_type" not in values and config.get("use_linear_projection"):
        values["prediction_type"] = "v_prediction"
        warnings.warn(f"{path} names no prediction: v_prediction is assumed, the other is epsilon", stacklevel=2)
    if zero_snr:
        values |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return build(ScheduleConfig, values, f"{path}: ")


def write(path: Path, models: dict[str, nn.Module], configs: dict[str, dict]) -> None:
    """Writes the models as safetensors, with the configs of all and of the `scheduler`. Warns where other programs,
    which go by names and conventions, would not open them or take them for others."""
    everything, openclip = {}, configs["text_encoder"]["hidden_act"] == "gelu"
    for part, model in models.items():
        prefix, tensors = list(ENDS[part])[-openclip], encode(part, configs[part], model.state_dict())
        everything |= {prefix + name: tensor for name, tensor in tensors.items()}
    config = {f"{part}.{key}": value for part, table in configs.items() for key, value in table.items()}
    own = {"unet.attention_head_dim": 8, "scheduler.prediction_type": "epsilon"}
    own = OWN | ({"unet.attention_head_dim": (5, 10, 20, 20)} if openclip else own)
    if other := [key for key in own if config[key] != own[key]]:
        warnings.warn(f"ComfyUI and A1111 take only Stable Diffusion's own {', '.join(other)}", stacklevel=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    model_io.save_tensors(path, everything, ldm=json.dumps(configs))


def _read(path: Path) -> tuple[Tensors, dict[str, dict]]:
    """Tensors, and the configs that the metadata record. Raises UserError for other architectures."""
    tensors, metadata = model_io.load_tensors(path), {}
    for pattern, architecture in FOREIGN.items():
        if any(re.search(pattern, name) for name in tensors):
            raise UserError(f"{str(path)!r} is {architecture}, not Stable Diffusion 1.x or 2.x in the original layout")
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    prediction = PREDICTIONS.get(metadata.get("modelspec.prediction_type", ""), {})
    return tensors, {"scheduler": prediction} | json.loads(metadata.get("ldm", "{}"))


def _cut(tensors: Tensors, part: str) -> Tensors:
    """The tensors of a part without their prefix. Raises StopIteration where there are none."""
    ends = re.compile(rf"(|.*\.)({'|'.join(ENDS[part].values())})")
    start = next(match[1] for name in tensors if (match := ends.fullmatch(name)))
    cut = re.compile(rf"{re.escape(start)}(?!{UNUSED})(.*)")
    return {match[1]: tensor for name, tensor in tensors.items() if (match := cut.fullmatch(name))}


def decode(part: str, tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """A part's tensors in the layout, without prefix -> the config that they tell, the tensors here."""
    if part == "text_encoder":
        return _decode_text(tensors)
    if part == "vae":
        levels, count = (_count(tensors, rf"decoder\.up\.{i}\.") for i in (r"\d+", r"0\.block\.\d+"))
    else:
        levels = 1 + _count(tensors, r"input_blocks\.\d+\.0\.op\.")
        count = _count(tensors, r"input_blocks\.\d+\.") // levels
    renamed = _rename(tensors, dict(map(reversed, _names(part, levels, count, tensors).items())))
    tensors = {name: x.flatten(1) if ".0.to_" in name and x.ndim == 4 else x for name, x in renamed.items()}
    down = "encoder.down_blocks" if part == "vae" else "down_blocks"
    widths = tuple(len(tensors[f"{down}.{i}.resnets.0.conv2.bias"]) for i in range(levels))
    config = {"layers_per_block": count - 1, "block_out_channels": widths}
    if part == "vae":
        return config | {"latent_channels": len(tensors["post_quant_conv.bias"])}, tensors
    for way, kind in ("down", "DownBlock2D"), ("up", "UpBlock2D"):
        attends = (f"{way}_blocks.{i}.attentions.0.norm.bias" in tensors for i in range(levels))
        config[f"{way}_block_types"] = tuple("CrossAttn" * cross + kind for cross in attends)
    config["in_channels"] = tensors["conv_in.weight"].shape[1]
    config["cross_attention_dim"] = tensors["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1]
    if tensors["mid_block.attentions.0.proj_in.weight"].ndim == 2:  # 2.x, made for 768 px
        heads = tuple(width // 64 for width in widths)
        config |= {"use_linear_projection": True, "attention_head_dim": heads, "sample_size": 96}
    return config, tensors


def _decode_text(tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    openclip = "positional_embedding" in tensors
    tensors = {
        name.replace("in_proj_", f"{letter}_proj."): x
        for name, tensor in tensors.items()
        for letter, x in zip("qkv", tensor.chunk(3) if "in_proj_" in name else (tensor,), strict=False)
    }
    if openclip:  # of its 24 layers 2.x leaves out the last
        renamed = _rename(tensors, dict(map(reversed, TEXT.items())))
        tensors = {name: x for name, x in renamed.items() if ".layers.23." not in name}
    vocabulary, width = tensors["embeddings.token_embedding.weight"].shape
    config = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": len(tensors["encoder.layers.0.mlp.fc1.bias"]),
        "num_hidden_layers": _count(tensors, r"encoder\.layers\.\d+\."),
        "num_attention_heads": width // 64,
        "max_position_embeddings": len(tensors["embeddings.position_embedding.weight"]),
        "hidden_act": "gelu" if openclip else "quick_gelu",
    }
    return config, {f"text_model.{name}": tensor for name, tensor in tensors.items()}


def encode(part: str, config: dict, tensors: Tensors) -> Tensors:
    """The reverse of `decode`."""
    if part != "text_encoder":
        names = _names(part, len(config["block_out_channels"]), config["layers_per_block"] + 1, tensors)
        tensors = _rename(tensors, names)
        return {name: x[..., None, None] if ".attn_1." in name and x.ndim == 2 else x for name, x in tensors.items()}
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    if config["hidden_act"] == "quick_gelu":
        return tensors
    for name in [name for name in tensors if ".q_proj." in name]:
        qkv = [tensors.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        tensors[name.replace("q_proj.", "in_proj_")] = torch.cat(qkv)
    return _rename(tensors, TEXT)


def _count(tensors: Tensors, pattern: str) -> int:
    """How many different beginnings of names match."""
    return len({match[0] for name in tensors if (match := re.match(pattern, name))})


def _rename(tensors: Tensors, names: dict[str, str]) -> Tensors:
    """Replaces the keys of `names` where they are complete between dots, the longest first."""
    keys = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    pattern = re.compile(rf"(?<![^.])(?:{keys})(?![^.])")
    return {pattern.sub(lambda match: names[match[0]], name): tensor for name, tensor in tensors.items()}


def _names(part: str, levels: int, count: int, tensors: Tensors) -> dict[str, str]:
    """Names of submodules here -> in the layout, of a model with `count` residual blocks per level on the way up. The
    layout numbers a VAE's levels from the highest resolution, and the blocks and steps of a U-Net in one row, of which
    the names of `tensors`, of either kind, tell which attend."""
    if part == "vae":
        names = dict(VAE)
        for i in range(levels):
            up = f"up.{levels - 1 - i}"
            names |= {f"down_blocks.{i}.resnets": f"down.{i}.block", f"up_blocks.{i}.resnets": f"{up}.block"}
            names[f"down_blocks.{i}.downsamplers.0"] = f"down.{i}.downsample"
            names[f"up_blocks.{i}.upsamplers.0"] = f"{up}.upsample"
        return names
    names, resnets = dict(UNET), {f"mid_block.resnets.{i}": f"middle_block.{2 * i}" for i in (0, 1)}
    for i in range(levels):
        down, up = f"down_blocks.{i}", f"up_blocks.{i}"
        for k in range(i * count, (i + 1) * count):
            for ours, theirs in (down, f"input_blocks.{k + 1}"), (up, f"output_blocks.{k}"):
                resnets[f"{ours}.resnets.{k % count}"] = f"{theirs}.0"
                names[f"{ours}.attentions.{k % count}"] = f"{theirs}.1"
        attends = tensors.keys() & {f"{up}.attentions.0.norm.bias", f"output_blocks.{k}.1.norm.bias"}
        names[f"{down}.downsamplers.0.conv"] = f"input_blocks.{k + 1}.0.op"
        names[f"{up}.upsamplers.0.conv"] = f"output_blocks.{k}.{1 + len(attends)}.conv"
    return names | {f"{a}.{inner}": f"{b}.{RESNET[inner]}" for a, b in resnets.items() for inner in RESNET}
