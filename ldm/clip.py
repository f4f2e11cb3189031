"""CLIP (Radford et al. 2021) under transformers' parameter names.

`TextEncoder` is transformers' CLIPTextModel (what conditions the U-Net), `ImageEncoder` its CLIPVisionModel,
`CLIP` its CLIPModel: both towers with their projections into one space.
"""

import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm import model_io as weights
from ldm.clip_towers import ImageEncoder, TextConfig, TextTower, VisionConfig, init_linear
from ldm.config import UserError

__all__ = ["CLIP", "ImageEncoder", "TextConfig", "TextEncoder", "VisionConfig"]

INITIAL_SCALE, MAX_SCALE = 1 / 0.07, 100.0  # 1 / temperature, section 2.5 of the paper
TEXT_PART = "text_model."
# transformers takes the precision of the file where the config names none, and diffusers would then mix two.
RUNS_IN = {"dtype": "float32"}
OTHER_PARTS = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")


class TextEncoder(nn.Module):
    """Token ids (B, L) -> context (B, L, D): the text tower's last hidden state after its final norm."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.text_model = TextTower(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (B, L) -> context (B, L, D). UserError for more tokens than positions."""
        return self.text_model(tokens)

    def pooled(self, context: Tensor, tokens: Tensor) -> Tensor:
        """The context at the end token, (B, L, D) and (B, L) -> (B, D)."""
        return self.text_model.pooled(context, tokens)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and safetensors that transformers' CLIPTextModel and diffusers open."""
        config = {"architectures": ["CLIPTextModel"], **RUNS_IN} | self.config.to_dict()
        weights.save_model(folder, self, config, weights.TRANSFORMERS_FILE)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "TextEncoder":
        """The text tower in a folder, or in `text_encoder/` within it, of a CLIP text model or a whole CLIP,
        with or without `text_model.` prefix and `position_ids`. UserError when anything does not fit."""
        folder = weights.find_part(folder, "text_encoder")
        table = _read_config(folder, "clip_text_model", "clip")
        if table.get("model_type") == "clip":
            table = _part_config(table, "text")
        config = TextConfig.from_dict(table, f"{folder}/config.json: ")
        tensors = _without_positions(weights.read_tensors(folder))
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(OTHER_PARTS)}
        if not any(name.startswith(TEXT_PART) for name in tensors):
            tensors = {TEXT_PART + name: tensor for name, tensor in tensors.items()}
        return weights.load_model(lambda: cls(config), folder, tensors, config)


class CLIP(nn.Module):
    """Both towers and their projections; `projection_dim` must be the same in both configs.

    Images are in [-1, 1]. `image_mean` and `image_std` are those (of pixels in [0, 1]) that the weights
    expect: 0.5 for models trained here, others for models loaded.
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
        mean, std = (rearrange(torch.tensor(c), "c -> c 1 1") for c in (self.image_mean, self.image_std))
        # [-1, 1] -> [0, 1] -> normalized, in one step that is exactly the identity at 0.5
        self.register_buffer("pixel_scale", 0.5 / std, persistent=False)
        self.register_buffer("pixel_shift", (0.5 - mean) / std, persistent=False)
        self.text_model = TextTower(text_config)
        self.vision_model = ImageEncoder(vision_config)
        self.text_projection = nn.Linear(text_config.hidden_size, width, bias=False)
        self.visual_projection = nn.Linear(vision_config.hidden_size, width, bias=False)
        init_linear(self.text_projection, text_config.hidden_size**-0.5)
        init_linear(self.visual_projection, vision_config.hidden_size**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(INITIAL_SCALE)))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids (B, L) -> unit vectors (B, projection_dim)."""
        return self.embed(self.text_model(tokens), tokens)

    def embed(self, context: Tensor, tokens: Tensor) -> Tensor:
        """The text tower's context (B, L, D) of token ids (B, L) -> unit vectors (B, projection_dim)."""
        return F.normalize(self.text_projection(self.text_model.pooled(context, tokens)), dim=-1)

    def encode_image(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], `image_size` pixels a side -> unit vectors (B, projection_dim)."""
        pixels = x * self.pixel_scale + self.pixel_shift
        return F.normalize(self.visual_projection(self.vision_model(pixels)), dim=-1)

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Image embeddings (B, P), text embeddings (B, P), the scale exp(logit_scale) of the logits, and the context
        (B, L, D) that the text embeddings are made from."""
        context = self.text_model(tokens)
        return self.encode_image(x), self.embed(context, tokens), self.logit_scale.exp(), context

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Keeps the scale at 100 or below; to be called after every optimizer step (section 2.5)."""
        self.logit_scale.clamp_(max=math.log(MAX_SCALE))

    def text_encoder(self) -> TextEncoder:
        """The text tower alone, sharing its weights: what conditions the U-Net."""
        encoder = TextEncoder(self.text_config)
        encoder.text_model = self.text_model
        return encoder

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes what transformers' CLIPModel and CLIPImageProcessor open."""
        config = {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            **RUNS_IN,
            "projection_dim": self.text_config.projection_dim,
            "text_config": self.text_config.to_dict(),
            "vision_config": self.vision_config.to_dict(),
        }
        weights.save_model(folder, self, config, weights.TRANSFORMERS_FILE)
        weights.write_json(Path(folder) / "preprocessor_config.json", self.preprocessor())

    def preprocessor(self) -> dict:
        """The config of transformers' CLIPImageProcessor that turns pictures into this model's input."""
        size = self.vision_config.image_size
        return {
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

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "CLIP":
        """The CLIP in a folder, or in `clip/` within it: ours, or transformers' CLIPModel with the config of
        its image processor. UserError when anything does not fit."""
        folder = weights.find_part(folder, "clip")
        table, where = _read_config(folder, "clip"), f"{folder}/config.json: "
        width = table.get("projection_dim", 512)
        text = TextConfig.from_dict(_part_config(table, "text"), where)
        vision = VisionConfig.from_dict(_part_config(table, "vision"), where)
        pixels = weights.read_json(folder / "preprocessor_config.json")
        if "image_mean" not in pixels or "image_std" not in pixels:
            raise UserError(f"{folder}/preprocessor_config.json says no image_mean and image_std")
        configs = [replace(config, projection_dim=width) for config in (text, vision)]
        tensors = _without_positions(weights.read_tensors(folder))
        mean, std = pixels["image_mean"], pixels["image_std"]
        return weights.load_model(lambda: cls(*configs, mean, std), folder, tensors, *configs)


def _read_config(folder: Path, *kinds: str) -> dict:
    table = weights.read_json(folder / "config.json")
    if table.get("model_type", kinds[0]) not in kinds:
        raise UserError(f"{folder} holds a {table['model_type']!r} model; supported here: {', '.join(kinds)}")
    return table


def _part_config(table: dict, part: str) -> dict:
    """The text or vision config in a whole CLIP's; an old `*_config_dict` goes first, as in transformers."""
    return table.get(f"{part}_config_dict") or table.get(f"{part}_config") or {}


def _without_positions(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Older files also hold the constants 0, 1, 2, ... as `position_ids`."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}
