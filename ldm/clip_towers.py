"""The two transformers of CLIP (Radford et al. 2021) and their configs, under transformers' names."""

from dataclasses import asdict, dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from ldm.config import UserError, build

# Keys that transformers writes into configs and that say nothing about what the network computes.
_RECORDS = {"architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "return_dict"}
_INITIAL = {"initializer_factor", "initializer_range", "logit_scale_init_value", "tie_word_embeddings"}
_LABELS = {
    "id2label",
    "label2id",
    "max_length",
    "length_penalty",
    "num_beams",
    "num_beam_groups",
    "use_cache",
}
_SEARCH = {"num_return_sequences", "repetition_penalty", "temperature", "top_k", "top_p", "typical_p"}
INERT = frozenset(_RECORDS | _INITIAL | _LABELS | _SEARCH)


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Sizes of the text tower, with transformers' names and defaults. `max_position_embeddings` is L."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512
    pad_token_id: int | None = 1
    bos_token_id: int | None = 49406
    eos_token_id: int = 49407

    def __post_init__(self):
        _check_heads(self)

    def to_dict(self) -> dict:
        """The config as transformers writes it."""
        return {"model_type": "clip_text_model"} | asdict(self)

    @classmethod
    def from_dict(cls, table: dict, where: str = "") -> "TextConfig":
        """From transformers' config. UserError names a value that is not supported, `where` the file."""
        return build(cls, _fields(cls, table, where), where)


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Sizes of the image tower, with transformers' names and defaults; `image_size` pixels a side."""

    image_size: int = 224
    patch_size: int = 32
    num_channels: int = 3
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512

    def __post_init__(self):
        _check_heads(self)

    def to_dict(self) -> dict:
        """The config as transformers writes it."""
        return {"model_type": "clip_vision_model"} | asdict(self)

    @classmethod
    def from_dict(cls, table: dict, where: str = "") -> "VisionConfig":
        """From transformers' config. UserError names a value that is not supported, `where` the file."""
        return build(cls, _fields(cls, table, where), where)


def _check_heads(config: TextConfig | VisionConfig) -> None:
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"CLIP hidden_size {config.hidden_size} must be a multiple of num_attention_heads "
            f"{config.num_attention_heads}"
        )


def _fields(cls: type, table: dict, where: str) -> dict:
    """The entries of `table` that `cls` has; others must be inert or switched off (None, False, 0, empty)."""
    known = cls.__dataclass_fields__
    for key, value in table.items():
        if key not in known and key not in INERT and not key.startswith("_") and value:
            raise UserError(f"{where}{key} = {value!r} is not supported; it must be absent or switched off")
    return {key: value for key, value in table.items() if key in known}


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017), (B, N, D) -> (B, N, D)."""

    def __init__(self, config: TextConfig | VisionConfig):
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, h: Tensor, causal: bool) -> Tensor:
        """(B, N, D) -> (B, N, D); `causal` hides what comes after each place."""
        projected = (self.q_proj(h), self.k_proj(h), self.v_proj(h))
        q, k, v = (rearrange(p, "b n (heads d) -> b heads n d", heads=self.heads) for p in projected)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(rearrange(h, "b heads n d -> b n (heads d)"))


class MLP(nn.Module):
    """Two linear layers with GELU between them, exact or CLIP's quick form x * sigmoid(1.702 x)."""

    def __init__(self, config: TextConfig | VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.quick = config.hidden_act == "quick_gelu"

    def forward(self, h: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
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
    """The layers of a tower, initialized as in CLIP's published code (`initialize_parameters` of model.py):
    what reads the residual stream by its width, what writes to it also by the depth. Biases start at 0."""

    def __init__(self, config: TextConfig | VisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        read, write = config.hidden_size**-0.5, (2 * config.hidden_size * config.num_hidden_layers) ** -0.5
        for layer in self.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
                init_linear(linear, read)
            init_linear(attention.out_proj, write)
            init_linear(mlp.fc1, (2 * config.hidden_size) ** -0.5)
            init_linear(mlp.fc2, write)

    def forward(self, h: Tensor, causal: bool) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        for layer in self.layers:
            h = layer(h, causal)
        return h


def init_linear(linear: nn.Linear, std: float) -> None:
    """Normal weights of that standard deviation, biases 0."""
    nn.init.normal_(linear.weight, std=std)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


class TextEmbeddings(nn.Module):
    """Token plus position embeddings, (B, L) -> (B, L, D)."""

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
    """The text transformer under `text_model.`: (B, L) -> (B, L, D)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(config)
        self.encoder = Transformer(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (B, L) -> (B, L, D). UserError for more tokens than `max_position_embeddings`."""
        length = self.config.max_position_embeddings
        if tokens.shape[1] > length:
            raise UserError(f"{tokens.shape[1]} tokens are too many for this text encoder, which reads {length}")
        return self.final_layer_norm(self.encoder(self.embeddings(tokens), causal=True))

    def pooled(self, context: Tensor, tokens: Tensor) -> Tensor:
        """The context at the first end token, (B, L, D) and (B, L) -> (B, D). Older configs say eos_token_id
        2 for every vocabulary; the end is then the highest id, as transformers still has it."""
        ends = tokens if self.config.eos_token_id == 2 else (tokens == self.config.eos_token_id).int()
        return context[torch.arange(len(context), device=context.device), ends.argmax(dim=1)]


class VisionEmbeddings(nn.Module):
    """A class token and the patches, with positions: (B, C, H, W) -> (B, 1 + patches, D)."""

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
    """The image tower, transformers' CLIPVisionModel: normalized pixels (B, C, H, W), `image_size` a side ->
    (B, D), the class token after the last norm."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # spelled so there
        self.encoder = Transformer(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalized pixels (B, C, H, W) -> (B, D). UserError for another size than `image_size`."""
        size = self.config.image_size
        if tuple(pixels.shape[2:]) != (size, size):
            height, width = pixels.shape[2:]
            raise UserError(f"this image encoder reads {size}x{size} pixels, not {height}x{width}: resize first")
        h = self.pre_layrnorm(self.embeddings(pixels))  # (B, 1 + patches, D)
        return self.post_layernorm(self.encoder(h, causal=False)[:, 0])
