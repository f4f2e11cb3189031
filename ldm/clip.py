"""CLIP (Radford et al. 2021) under transformers' parameter names.

`TextEncoder` is transformers' CLIPTextModel (the U-Net's conditioning), `ImageEncoder` its CLIPVisionModel, `CLIP` its
CLIPModel: both towers with their projections into one space.
"""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from ldm import model_io
from ldm.config import UserError, build, require_positive

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
        _check_sizes(self, "vocab_size", "max_position_embeddings")

    def to_dict(self) -> dict:
        return {"model_type": "clip_text_model"} | asdict(self)


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
        _check_sizes(self, "image_size", "patch_size", "num_channels")

    def to_dict(self) -> dict:
        return {"model_type": "clip_vision_model"} | asdict(self)


def _check_sizes(config: TextConfig | VisionConfig, *names: str) -> None:
    shared = "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "projection_dim"
    require_positive(config, *names, *shared)
    width, heads = config.hidden_size, config.num_attention_heads
    if width % heads:
        raise UserError(f"CLIP hidden_size {width} must be a multiple of num_attention_heads {heads}")


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, config: TextConfig | VisionConfig):
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, h: Tensor, causal: bool) -> Tensor:
        """(B, N, D) -> (B, N, D); `causal`: each position sees only itself and those before it."""
        projected = (self.q_proj(h), self.k_proj(h), self.v_proj(h))
        q, k, v = (rearrange(p, "b n (heads d) -> b heads n d", heads=self.heads) for p in projected)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(rearrange(h, "b heads n d -> b n (heads d)"))


class MLP(nn.Module):
    """Two linear layers with GELU between them, exact or in CLIP's quick form x * sigmoid(1.702 x)."""

    def __init__(self, config: TextConfig | VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.quick = config.hidden_act == "quick_gelu"

    def forward(self, h: Tensor) -> Tensor:
        h = self.fc1(h)
        return self.fc2(h * torch.sigmoid(1.702 * h) if self.quick else F.gelu(h))


class Layer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: TextConfig | VisionConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, h: Tensor, causal: bool) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        h = h + self.self_attn(self.layer_norm1(h), causal)
        return h + self.mlp(self.layer_norm2(h))


class Transformer(nn.Module):
    """The layers of a tower, initialized as in CLIP's published code (`initialize_parameters` of model.py): layers that
    read the residual stream by its width, layers that write to it also by the depth."""

    def __init__(self, config: TextConfig | VisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        read, write = config.hidden_size**-0.5, (2 * config.hidden_size * config.num_hidden_layers) ** -0.5
        for layer in self.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
                _init_linear(linear, read)
            _init_linear(attention.out_proj, write)
            _init_linear(mlp.fc1, (2 * config.hidden_size) ** -0.5)
            _init_linear(mlp.fc2, write)

    def forward(self, h: Tensor, causal: bool) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        for layer in self.layers:
            h = layer(h, causal)
        return h


def _init_linear(linear: nn.Linear, std: float) -> None:
    nn.init.normal_(linear.weight, std=std)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


class TextEmbeddings(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (B, L) -> (B, L, D)."""
        return self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]


class TextTower(nn.Module):
    """The text transformer under `text_model.`."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(config)
        self.encoder = Transformer(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (B, L) -> (B, L, D). Raises UserError for more tokens than `max_position_embeddings`."""
        length = self.config.max_position_embeddings
        if tokens.shape[1] > length:
            raise UserError(f"{tokens.shape[1]} tokens are too many for this text encoder, which reads {length}")
        return self.final_layer_norm(self.encoder(self.embeddings(tokens), causal=True))

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
        """Token ids (B, L) -> context (B, L, D). Raises UserError for more tokens than positions."""
        return self.text_model(tokens)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and safetensors that transformers' CLIPTextModel and diffusers open."""
        config = {"architectures": ["CLIPTextModel"], **DTYPE} | self.config.to_dict()
        model_io.save_model(folder, self, config, model_io.TRANSFORMERS_FILE)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "TextEncoder":
        """The text tower in a folder, or in `text_encoder/` within it, of a CLIP text model or a complete CLIP, with or
        without the prefix `text_model.`. Raises UserError where anything does not fit."""
        folder = model_io.find_part(folder, "text_encoder")
        table = _read_config(folder, "clip_text_model", "clip")
        if table.get("model_type") == "clip":
            table = _tower_config(table, "text")
        config = _build(TextConfig, table, folder)
        tensors = {name: tensor for name, tensor in _read_tensors(folder).items() if not name.startswith(OTHER_PARTS)}
        if not any(name.startswith("text_model.") for name in tensors):
            tensors = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
        return model_io.load_model(lambda: cls(config), folder, tensors, config)


class VisionEmbeddings(nn.Module):
    """A class token and the patches, with positions."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // patch) ** 2 + 1, width)
        nn.init.normal_(self.class_embedding, std=width**-0.5)
        nn.init.normal_(self.position_embedding.weight, std=width**-0.5)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalized pixels (B, C, H, W) -> (B, 1 + patches, D)."""
        patches = rearrange(self.patch_embedding(pixels), "b d h w -> b (h w) d")
        first = repeat(self.class_embedding, "d -> b 1 d", b=len(patches)).to(patches.dtype)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class ImageEncoder(nn.Module):
    """The image tower: normalized pixels (B, C, H, W) -> (B, D), the class token after the last norm."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # transformers' spelling
        self.encoder = Transformer(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalized pixels (B, C, H, W) -> (B, D). Raises UserError unless H and W are `image_size`."""
        size = self.config.image_size
        if tuple(pixels.shape[2:]) != (size, size):
            height, width = pixels.shape[2:]
            raise UserError(f"this image encoder reads {size}x{size} pixels, not {height}x{width}: resize first")
        h = self.pre_layrnorm(self.embeddings(pixels))  # (B, 1 + patches, D)
        return self.post_layernorm(self.encoder(h, causal=False)[:, 0])


class CLIP(nn.Module):
    """Both towers and their projections; images are in [-1, 1].

    `image_mean` and `image_std` are those of pixels in [0, 1] that the weights expect: 0.5 for models trained here.
    Raises UserError unless both configs have one `projection_dim`.
    """

    def __init__(
        self,
        text_config: TextConfig,
        vision_config: VisionConfig,
        image_mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        image_std: tuple[float, ...] = (0.5, 0.5, 0.5),
    ):
        super().__init__()
        width = text_config.projection_dim
        if width != vision_config.projection_dim:
            raise UserError(f"projection_dim is {width} for text and {vision_config.projection_dim} for images")
        self.text_config, self.vision_config = text_config, vision_config
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)
        self.text_model = TextTower(text_config)
        self.vision_model = ImageEncoder(vision_config)
        self.text_projection = nn.Linear(text_config.hidden_size, width, bias=False)
        self.visual_projection = nn.Linear(vision_config.hidden_size, width, bias=False)
        _init_linear(self.text_projection, text_config.hidden_size**-0.5)
        _init_linear(self.visual_projection, vision_config.hidden_size**-0.5)
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
        if {*self.image_mean, *self.image_std} != {0.5}:  # there normalized pixels are x itself
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
        towers = {"text_config": self.text_config.to_dict(), "vision_config": self.vision_config.to_dict()}
        config = {"architectures": ["CLIPModel"], "model_type": "clip", **DTYPE} | towers
        config["projection_dim"] = self.text_config.projection_dim
        model_io.save_model(folder, self, config, model_io.TRANSFORMERS_FILE)
        size = self.vision_config.image_size
        processor = {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": size},
            "resample": 3,  # bicubic
            "do_center_crop": True,
            "crop_size": {"height": size, "width": size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
        }
        model_io.write_json(Path(folder) / "preprocessor_config.json", processor)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "CLIP":
        """The CLIP in a folder, or in `clip/` within it: ours, or transformers' CLIPModel with the config of its image
        processor. Raises UserError where anything does not fit."""
        folder = model_io.find_part(folder, "clip")
        table, pixels = _read_config(folder, "clip"), model_io.read_json(folder / "preprocessor_config.json")
        if "image_mean" not in pixels or "image_std" not in pixels:
            raise UserError(f"{folder}/preprocessor_config.json has no image_mean and image_std")
        towers = (TextConfig, "text"), (VisionConfig, "vision")
        configs = [_build(tower, _tower_config(table, name), folder) for tower, name in towers]
        configs = [replace(config, projection_dim=table.get("projection_dim", 512)) for config in configs]
        mean, std = pixels["image_mean"], pixels["image_std"]
        return model_io.load_model(lambda: cls(*configs, mean, std), folder, _read_tensors(folder), *configs)


def _read_config(folder: Path, *kinds: str) -> dict:
    table = model_io.read_json(folder / "config.json")
    if table.get("model_type", kinds[0]) not in kinds:
        raise UserError(f"{folder} holds a {table['model_type']!r} model; supported here: {', '.join(kinds)}")
    return table


def _tower_config(table: dict, name: str) -> dict:
    """The config of one tower; an old `*_config_dict` takes precedence, as in transformers."""
    return table.get(f"{name}_config_dict") or table.get(f"{name}_config") or {}


def _build(cls: type, table: dict, folder: Path) -> TextConfig | VisionConfig:
    """The fields of `cls` in transformers' table. Its other keys change no result without other weights, which are
    then refused for their names or shapes."""
    known = {key: value for key, value in table.items() if key in cls.__dataclass_fields__}
    return build(cls, known, f"{folder}/config.json: ")


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """A folder's weights without the constants 0, 1, 2, ... that older files have as `position_ids`."""
    tensors = model_io.read_tensors(folder)
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}
