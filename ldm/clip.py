"""CLIP (Radford et al. 2021) under transformers' parameter names.

`TextEncoder` is transformers' CLIPTextModel (the U-Net's conditioning), `ImageEncoder` its CLIPVisionModel, `CLIP` its
CLIPModel: both towers with their projections into one space.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from ldm import model_io
from ldm.config import UserError, build, convert, require_positive
from ldm.layers import attend
from ldm.single_file import open_part

HALF = (0.5, 0.5, 0.5)
MAX_SCALE = 100.0  # of the logits: the highest 1 / temperature, section 2.5
# Without it transformers takes the precision of the file, and diffusers would then mix two.
DTYPE = {"dtype": "float32"}
OTHER_PARTS = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Sizes of the text tower, with transformers' names and defaults."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77  # tokens of a caption, both ends included
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512
    pad_token_id: int | None = 1
    bos_token_id: int | None = 49406
    eos_token_id: int = 49407

    def __post_init__(self) -> None:
        _check_sizes(self)


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Sizes of the image tower, with transformers' names and defaults."""

    image_size: int = 224  # pixels per side
    patch_size: int = 32
    num_channels: int = 3
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512

    def __post_init__(self) -> None:
        _check_sizes(self)


TowerConfig = TextConfig | VisionConfig


def _check_sizes(config: TowerConfig) -> None:
    require_positive(config, "pad_token_id", "bos_token_id", "eos_token_id")
    if config.hidden_size % config.num_attention_heads:
        heads = f"num_attention_heads {config.num_attention_heads}"
        raise UserError(f"CLIP hidden_size {config.hidden_size} must be a multiple of {heads}")


class Layer(nn.Module):
    """Pre-norm transformer layer, (B, N, D) -> (B, N, D). With `causal` each position sees only itself and those before
    it. GELU is exact or CLIP's quick form x * sigmoid(1.702 x)."""

    def __init__(self, config: TowerConfig, causal: bool):
        super().__init__()
        width, hidden, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.heads, self.causal, self.quick = config.num_attention_heads, causal, config.hidden_act == "quick_gelu"
        self.self_attn = nn.ModuleDict({f"{name}_proj": nn.Linear(width, width) for name in ("k", "v", "q", "out")})
        self.layer_norm1 = nn.LayerNorm(width, eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})
        self.layer_norm2 = nn.LayerNorm(width, eps)

    def forward(self, x: Tensor) -> Tensor:
        attention, mlp, h = self.self_attn, self.mlp, self.layer_norm1(x)
        h = attend(attention.q_proj(h), attention.k_proj(h), attention.v_proj(h), self.heads, self.causal)
        x = x + attention.out_proj(h)
        h = mlp.fc1(self.layer_norm2(x))
        return x + mlp.fc2(h * torch.sigmoid(1.702 * h) if self.quick else F.gelu(h))


def _transformer(config: TowerConfig, causal: bool) -> nn.Sequential:
    """The layers of a tower, (B, N, D) -> (B, N, D), initialized as in CLIP's published code (`initialize_parameters`
    of model.py): layers that read the residual stream by its width, layers that write to it also by the depth."""
    layers = nn.Sequential(*(Layer(config, causal) for _ in range(config.num_hidden_layers)))
    width, write = config.hidden_size, (2 * config.hidden_size * config.num_hidden_layers) ** -0.5
    stds = dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), width**-0.5)
    stds |= {"self_attn.out_proj": write, "mlp.fc1": (2 * width) ** -0.5, "mlp.fc2": write}
    for layer in layers:
        for name, std in stds.items():
            nn.init.normal_(layer.get_submodule(name).weight, std=std)
            nn.init.zeros_(layer.get_submodule(name).bias)
    return nn.Sequential(OrderedDict(layers=layers))


class TextTower(nn.Module):
    """The text transformer under `text_model.`."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        nn.init.normal_(tokens.weight, std=0.02)
        nn.init.normal_(positions.weight, std=0.01)
        self.embeddings = nn.ModuleDict({"token_embedding": tokens, "position_embedding": positions})
        self.encoder = _transformer(config, causal=True)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (B, L), at most `max_position_embeddings` of them -> (B, L, D)."""
        positions = self.embeddings.position_embedding.weight[: tokens.shape[1]]
        return self.final_layer_norm(self.encoder(self.embeddings.token_embedding(tokens) + positions))

    def pooled(self, context: Tensor, tokens: Tensor) -> Tensor:
        """The context at the first end token, (B, L, D) and (B, L) -> (B, D). Older configs have eos_token_id 2 for
        every vocabulary; the end token is then the highest id, as in transformers."""
        ends = tokens if self.config.eos_token_id == 2 else (tokens == self.config.eos_token_id).int()
        return context[torch.arange(len(context), device=context.device), ends.argmax(dim=1)]


class TextEncoder(nn.Module):
    """Token ids (B, L) -> context (B, L, D): the text tower's last hidden state after its final norm."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.text_model = TextTower(config)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.text_model(tokens)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and safetensors that transformers' CLIPTextModel and diffusers open."""
        config = {"architectures": ["CLIPTextModel"], **DTYPE, **_tower_table("text", self.config)}
        model_io.save_model(folder, self, config, model_io.TRANSFORMERS_FILE)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **placement: Any) -> "TextEncoder":
        """The text tower in a single file, in a folder, or in `text_encoder/` within it, of a CLIP text model or a
        complete CLIP, with or without the prefix `text_model.`, on a `device` in a `dtype`. Raises UserError where
        anything does not fit."""
        folder, table, tensors = _read(folder, "text_encoder", "clip_text_model", "clip")
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(OTHER_PARTS)}
        tensors = {"text_model." + name.removeprefix("text_model."): tensor for name, tensor in own.items()}
        config = _build(TextConfig, table.get("text_config", table), folder)
        return model_io.load_model(lambda: cls(config), folder, tensors, config, **placement)


class ImageEncoder(nn.Module):
    """The image tower: normalized pixels (B, C, H, W) -> (B, D), the class token after the last norm."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        width, patch, eps = config.hidden_size, config.patch_size, config.layer_norm_eps
        self.config = config
        patches = nn.Conv2d(config.num_channels, width, patch, stride=patch, bias=False)
        positions = nn.Embedding((config.image_size // patch) ** 2 + 1, width)
        self.embeddings = nn.ModuleDict({"patch_embedding": patches, "position_embedding": positions})
        self.embeddings.register_parameter("class_embedding", nn.Parameter(torch.empty(width)))
        nn.init.normal_(self.embeddings.class_embedding, std=width**-0.5)
        nn.init.normal_(positions.weight, std=width**-0.5)
        self.pre_layrnorm = nn.LayerNorm(width, eps)  # transformers' spelling
        self.encoder = _transformer(config, causal=False)
        self.post_layernorm = nn.LayerNorm(width, eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalized pixels (B, C, H, W), `image_size` a side -> (B, D)."""
        embeddings = self.embeddings
        patches = rearrange(embeddings.patch_embedding(pixels), "b d h w -> b (h w) d")
        first = repeat(embeddings.class_embedding, "d -> b 1 d", b=len(patches)).to(patches.dtype)
        h = torch.cat([first, patches], dim=1) + embeddings.position_embedding.weight  # (B, 1 + patches, D)
        return self.post_layernorm(self.encoder(self.pre_layrnorm(h))[:, 0])


class CLIP(nn.Module):
    """Both towers and their projections; images are in [-1, 1].

    `image_mean` and `image_std` are those of pixels in [0, 1] that the weights expect: 0.5 for models trained here.
    Raises UserError unless both configs have one `projection_dim`.
    """

    def __init__(
        self,
        text_config: TextConfig,
        vision_config: VisionConfig,
        image_mean: Sequence[float] = HALF,
        image_std: Sequence[float] = HALF,
    ):
        super().__init__()
        width, image_width = text_config.projection_dim, vision_config.projection_dim
        if width != image_width:
            raise UserError(f"projection_dim is {width} for text and {image_width} for images")
        self.text_config, self.vision_config = text_config, vision_config
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)
        self.text_model = TextTower(text_config)
        self.vision_model = ImageEncoder(vision_config)
        self.text_projection = nn.Linear(text_config.hidden_size, width, bias=False)
        self.visual_projection = nn.Linear(vision_config.hidden_size, width, bias=False)
        nn.init.normal_(self.text_projection.weight, std=text_config.hidden_size**-0.5)
        nn.init.normal_(self.visual_projection.weight, std=vision_config.hidden_size**-0.5)
        # 1 / temperature, section 2.5
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids (B, L) -> unit vectors (B, projection_dim)."""
        return self.embed(self.text_model(tokens), tokens)

    def embed(self, context: Tensor, tokens: Tensor) -> Tensor:
        """The text tower's context (B, L, D) of token ids (B, L) -> unit vectors (B, projection_dim)."""
        return F.normalize(self.text_projection(self.text_model.pooled(context, tokens)), dim=-1)

    def encode_image(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], `image_size` pixels a side -> unit vectors (B, projection_dim)."""
        if self.image_mean + self.image_std != HALF + HALF:  # there normalized pixels are x itself
            mean, std = (rearrange(x.new_tensor(c), "c -> c 1 1") for c in (self.image_mean, self.image_std))
            x = ((x + 1) / 2 - mean) / std
        return F.normalize(self.visual_projection(self.vision_model(x)), dim=-1)

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images (B, 3, H, W), token ids (B, L) -> image and text embeddings (B, P), the scale exp(logit_scale), and
        the context (B, L, D) that the text embeddings come from."""
        context = self.text_model(tokens)
        return self.encode_image(x), self.embed(context, tokens), self.logit_scale.exp(), context

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Keeps the scale at 100 or below; called after every optimizer step (section 2.5)."""
        self.logit_scale.clamp_(max=math.log(MAX_SCALE))

    def text_encoder(self) -> TextEncoder:
        """The text tower alone, sharing its weights."""
        encoder = TextEncoder(self.text_config)
        encoder.text_model = self.text_model
        return encoder

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes files that transformers' CLIPModel and CLIPImageProcessor open."""
        configs, width = {"text": self.text_config, "vision": self.vision_config}, self.text_config.projection_dim
        towers = {f"{name}_config": _tower_table(name, config) for name, config in configs.items()}
        config = {"architectures": ["CLIPModel"], "model_type": "clip", **DTYPE, **towers, "projection_dim": width}
        model_io.save_model(folder, self, config, model_io.TRANSFORMERS_FILE)
        size = self.vision_config.image_size
        processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": size}}
        processor |= {"crop_size": {"height": size, "width": size}}
        processor |= {"image_mean": self.image_mean, "image_std": self.image_std}
        model_io.write_json(Path(folder) / "preprocessor_config.json", processor)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "CLIP":
        """The CLIP in a folder, or in `clip/` within it: ours, or transformers' CLIPModel with the config of its image
        processor. Raises UserError where anything does not fit."""
        folder, table, tensors = _read(folder, "clip", "clip")
        pixels = model_io.read_json(folder / "preprocessor_config.json")
        width = {"projection_dim": table.get("projection_dim", 512)}
        text = _build(TextConfig, table.get("text_config"), folder, **width)
        vision = _build(VisionConfig, table.get("vision_config"), folder, **width)
        where, kind = f"{folder}/preprocessor_config.json: ", tuple[float, float, float]
        mean, std = (convert(kind, pixels.get(key), where + key) for key in ("image_mean", "image_std"))
        return model_io.load_model(lambda: cls(text, vision, mean, std), folder, tensors, text, vision)


def _tower_table(name: str, config: TowerConfig) -> dict[str, Any]:
    return {"model_type": f"clip_{name}_model"} | asdict(config)


def _read(source: str | Path, part: str, *kinds: str) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """A part's path, its config, whose type must be one of `kinds`, and its weights, without the constants 0, 1, 2, ...
    that older files have as `position_ids`."""
    folder, table, tensors = open_part(source, part)
    if table.get("model_type", kinds[0]) not in kinds:
        raise UserError(f"{folder} holds a {table['model_type']!r} model; supported here: {', '.join(kinds)}")
    return folder, table, {name: tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}


def _build(cls: type, table: dict, folder: Path, **sizes: int) -> TowerConfig:
    """The fields of `cls` in transformers' table, and `sizes`. Its other keys change no result without other weights,
    which are then refused for their names or shapes."""
    where = f"{folder}/config.json: "
    if not isinstance(table, dict):
        raise UserError(f"{where}the table of {cls.__name__} is {table!r}; it must be an object")
    known = {key: value for key, value in table.items() if key in cls.__dataclass_fields__}
    return build(cls, known | sizes, where)
