"""Low-rank adapters (Hu et al. 2022, "LoRA") of linear and convolutional layers: W + weight * alpha / rank * up @ down.

They are trained on a frozen model, and read and written under the names of diffusers and of kohya's scripts.
"""

import fnmatch
import json
import math
import re
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ldm.config import UserError, require
from ldm.model_io import find_root, load_tensors, save_tensors

FILE = "pytorch_lora_weights.safetensors"  # diffusers' name
METADATA = "lora_adapter_metadata"  # of the file's header: peft's options as JSON
# What precedes a layer's name, written with underscores: kohya, diffusers, diffusers in early 2023.
PREFIXES = {"unet": ("lora_unet_", "unet_", ""), "text_encoder": ("lora_te_", "text_encoder_")}
KEY = re.compile(r"(.+?)(?:[._]lora[._](?:linear_layer\.)?(down|up|A|B)\.weight|\.(alpha))")  # layer, tensor
# Names that no layer here has, and what has them.
OTHERS = {
    r"single_(transformer_)?blocks|double_blocks": "Flux",
    r"^(lora_)?transformer[._]|joint_blocks": "a diffusion transformer such as Stable Diffusion 3",
    r"lora_te[12]_|text_encoder_2|(input|middle|output)_block|transformer_blocks[._][1-9]": "Stable Diffusion XL",
    r"hada_|lokr_|dora_|magnitude|lora_mid|\.diff": "another kind of adapter (LoHa, LoKr, DoRA, ...)",
}
CONTEXTS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}  # by width


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Training of adapters instead of the model's weights."""

    rank: int = 0  # of each adapter; 0: the model's weights are trained
    targets: tuple[str, ...] = ("*attn*",)  # name patterns of the linear and convolutional layers that get an adapter
    kohya: bool = False  # export under kohya's names instead of diffusers'

    def __post_init__(self) -> None:
        require(self.rank >= 0, "lora.rank", self.rank, "0 or more")


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that can have an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


class Adapter(nn.Sequential):
    """The change of a layer's output, 0 at first: the layer's own kind of map down to `rank` channels, then up."""

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        if isinstance(layer, nn.Conv2d):
            options = {"stride": layer.stride, "padding": layer.padding, "bias": False}
            self.down = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, **options)
            self.up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            self.down = nn.Linear(layer.in_features, rank, bias=False)
            self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def hook(self, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output + self(inputs[0])


class Adapters(nn.Module):
    """A frozen model with adapters, called as the model is. Its parameters are the adapters' alone: the model is shared
    by all copies, such as the average, and is in no checkpoint. Raises UserError where the patterns match no layer."""

    def __init__(self, model: nn.Module, config: LoRAConfig) -> None:
        super().__init__()
        self.config, self.distilled_steps = model.config, getattr(model, "distilled_steps", 0)
        known = layers(model.requires_grad_(False))
        names = [name for name in known if any(fnmatch.fnmatch(name, pattern) for pattern in config.targets)]
        require(names != [], "lora.targets", config.targets, f"patterns of layers, e.g. {next(iter(known))!r}")
        self.names = {name.replace(".", "_"): name for name in names}
        self.adapters = nn.ModuleDict({key: Adapter(known[name], config.rank) for key, name in self.names.items()})

        def base() -> nn.Module:  # a function, which nn.Module does not register and deepcopy does not copy
            return model

        self.base = base

    def forward(self, *inputs: Tensor) -> Tensor:
        model = self.base()
        with ExitStack() as hooks:
            for key, adapter in self.adapters.items():
                hooks.enter_context(model.get_submodule(self.names[key]).register_forward_hook(adapter.hook))
            return model(*inputs)


def save_lora(folder: Path, parts: dict[str, Adapters], kohya: bool = False) -> None:
    """Writes the adapters of "unet" and "text_encoder" into FILE, alpha being the rank, as it is without one."""
    tensors: dict[str, Tensor] = {}
    for part, adapted in parts.items():
        for key, adapter in adapted.adapters.items():
            name, a, b = f"{part}.{adapted.names[key]}", "lora_A", "lora_B"
            if kohya:
                name, a, b = PREFIXES[part][0] + key, "lora_down", "lora_up"
                tensors[f"{name}.alpha"] = torch.tensor(float(len(adapter.down.weight)))
            tensors |= {f"{name}.{a}.weight": adapter.down.weight, f"{name}.{b}.weight": adapter.up.weight}
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / FILE, tensors)


def read_lora(path: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors "down", "up" and "alpha" of each layer by its name in the file; "" for any other tensor. Alpha is by
    default peft's in the file's header, and else the rank."""
    factors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in load_tensors(path).items():
        match = KEY.fullmatch(key)
        name, kind = (match[1], match[2] or match[3]) if match else (key, "")
        factors[name][{"A": "down", "B": "up"}.get(kind, kind)] = tensor.float()
    metadata = {}
    if path.suffix != ".bin":
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
        try:
            metadata = json.loads(header.get(METADATA, "{}"))
        except ValueError as error:
            raise UserError(f"{METADATA} in the header of {str(path)!r} is not valid JSON: {error}") from None
    for name, factor in factors.items():
        part, rank = name.partition(".")[0], factor.get("down", torch.zeros(0)).shape[:1].numel()
        options = {key.removeprefix(f"{part}."): value for key, value in metadata.items()}
        patterns = (options.get("alpha_pattern") or {}).items()
        alphas = [value for pattern, value in patterns if re.fullmatch(rf"(.*\.)?({pattern})", name)]
        alpha = (*alphas, options.get("lora_alpha", rank))[0] * (rank**0.5 if options.get("use_rslora") else 1)
        factor.setdefault("alpha", torch.tensor(float(alpha)))
    return factors


def read_weight(text: str) -> tuple[str, float]:
    """FILE or FILE:WEIGHT -> the file and the weight, by default 1."""
    file, _, weight = text.rpartition(":")
    try:
        return (file or text), float(weight) if file else 1.0
    except ValueError:  # a colon in the file's name
        return text, 1.0


@torch.no_grad()
def merge_lora(models: dict[str, nn.Module], file: str | Path, weight: float = 1.0) -> None:
    """Adds `weight` times the adapters of a file, or of a run folder, to the weights of "unet" and "text_encoder".

    Raises UserError, with the models as they were, unless each tensor of the file belongs to a layer and fits it.
    """
    path = find_root(file) / FILE if Path(file).is_dir() else Path(file)
    factors, known = read_lora(path), {}
    if not math.isfinite(weight) or not all(x.isfinite().all() for factor in factors.values() for x in factor.values()):
        raise UserError(f"{str(path)!r} with weight {weight} is not finite (NaN or infinite)")
    for part, prefixes in PREFIXES.items():
        for name, layer in layers(models[part]).items():
            # without text_model by transformers since 5, without the 0 of to_out.0 by diffusers in early 2023
            for alias in {name, name.removeprefix("text_model."), name.removesuffix(".0")}:
                known |= {prefix + alias.replace(".", "_"): layer.weight for prefix in prefixes}
    targets = {name: known.get(name.replace(".processor.", ".").replace(".", "_")) for name in factors}
    unknown = [name for name, x in factors.items() if targets[name] is None or x.keys() != {"down", "up", "alpha"}]
    if unknown or not factors:
        kinds = [kind for pattern, kind in OTHERS.items() if re.search(pattern, "\n".join(unknown), re.MULTILINE)]
        raise UserError(
            f"{str(path)!r} {f'is for {kinds[0]}' if kinds else 'does not fit this model'}: "
            f"{len(unknown)} of its {len(factors)} names match no layer: {', '.join(unknown[:3])}"
        )
    for name, factor in factors.items():
        up, down, kernel = factor["up"].shape, factor["down"].shape, targets[name].shape
        fits = (up[:1], up[1:].numel(), down[1:].numel()) == (kernel[:1], down[:1].numel(), kernel[1:].numel())
        if not fits or 0 in down or factor["alpha"].numel() != 1:
            context = next((x["down"].shape[-1] for n, x in factors.items() if re.search("attn2[._]to_k$", n)), 0)
            kind = f"is for {CONTEXTS[context]}" if context in CONTEXTS else "does not fit this model"
            raise UserError(f"{str(path)!r} {kind}: {name} is {tuple(up)} by {tuple(down)}, its layer {tuple(kernel)}")
    for name, factor in factors.items():
        up, down = (factor[key].to(targets[name].device).flatten(1) for key in ("up", "down"))
        change, scale = (up @ down).view_as(targets[name]), float(factor["alpha"]) / len(down)
        targets[name].add_(change, alpha=weight * scale)
