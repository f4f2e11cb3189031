"""Image-text models that judge whether pictures say what captions say.

Never the model's own text encoder: scores by the encoder that conditions a model flatter it. A judge is trained apart
(`judge = true` in a config of train_clip), or is a CLIP of others.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.clip import CLIP
from ldm.config import UserError
from ldm.metrics.preprocess import RESIZE, resized, to_unit_range
from ldm.tokenizer import Tokenizer
from ldm.weights import ASSETS, find_part, module_hash

JUDGES = ASSETS.parent / "judges"


class ImageTextModel(nn.Module):
    """Both towers, frozen and in eval mode; `name`, `sha256` of the weights, `size` in pixels, as of an extractor."""

    def __init__(self, name: str, network: nn.Module, size: int) -> None:
        super().__init__()
        self.name, self.network, self.size = name, network, size
        self.sha256, self.resize = module_hash(network), RESIZE
        self.requires_grad_(False).eval()

    def images(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> unit embeddings (B, D), float32."""
        raise NotImplementedError

    def texts(self, captions: list[str]) -> Tensor:
        """Captions -> unit embeddings (B, D), float32."""
        raise NotImplementedError


class Judge(ImageTextModel):
    """A CLIP trained here."""

    def __init__(self, name: str, clip: CLIP, tokenizer: Tokenizer) -> None:
        super().__init__(name, clip, clip.vision_config.image_size)
        self.tokenizer = tokenizer
        self.prepare = resized(self.size, torch.zeros(3), torch.ones(3))

    @torch.no_grad()
    def images(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> unit embeddings (B, D)."""
        return self.network.encode_image(self.prepare(x.float())).float()

    @torch.no_grad()
    def texts(self, captions: list[str]) -> Tensor:
        """Captions -> unit embeddings (B, D)."""
        tokens = self.tokenizer(captions, warn=False)
        return self.network.encode_text(tokens.to(self.network.logit_scale.device)).float()


class TransformersCLIP(ImageTextModel):
    """A CLIP of others, by transformers."""

    def __init__(self, name: str, where: str) -> None:
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        model: Any = pretrained(CLIPModel, where, "clip")
        pixels: Any = pretrained(CLIPImageProcessor, where, "clip")
        super().__init__(name, model, pixels.crop_size["height"])
        self.tokenizer: Any = pretrained(AutoTokenizer, where, "clip")
        self.prepare = resized(self.size, *to_unit_range(pixels.image_mean, pixels.image_std))

    @torch.no_grad()
    def images(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> unit embeddings (B, D)."""
        pooled = self.network.vision_model(pixel_values=self.prepare(x.float())).pooler_output
        return F.normalize(self.network.visual_projection(pooled), dim=-1).float()

    @torch.no_grad()
    def texts(self, captions: list[str]) -> Tensor:
        """Captions -> unit embeddings (B, D)."""
        length = self.network.config.text_config.max_position_embeddings
        options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        tokens = self.tokenizer(captions, **options).to(self.network.device)
        pooled = self.network.text_model(**tokens).pooler_output
        return F.normalize(self.network.text_projection(pooled), dim=-1).float()


def image_text_model(name: str) -> ImageTextModel:
    """ "judge:NAME" (one that ships, or a folder of train_clip) or "clip:NAME" (a folder or a hub's name), on the CPU.

    A bare NAME is a judge's. UserError for others and for what does not open.
    """
    kind, colon, where = name.partition(":")
    if kind == "clip" and where:
        return TransformersCLIP(name, where)
    where = where if colon and kind == "judge" else name
    shipped = sorted(path.name for path in JUDGES.iterdir()) if JUDGES.is_dir() else []
    if where not in shipped and not Path(where).is_dir():
        known = ", ".join(shipped) or "none"
        raise UserError(f"unknown judge {where!r}: neither a folder nor one that ships ({known}), nor clip:FOLDER")
    folder = find_part(JUDGES / where if where in shipped and not Path(where).exists() else where, "judge")
    return Judge(f"judge:{where}", CLIP.from_pretrained(folder), Tokenizer.from_pretrained(folder))


def pretrained(kind: Any, where: str, name: str) -> Any:
    """`kind.from_pretrained(where)` of transformers: a folder, or a hub's name; UserError where it cannot be had."""
    if not where:
        raise UserError(f"features {name!r} need a folder or a hub's name: {name}:FOLDER")
    try:
        return kind.from_pretrained(where)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{name}:{where} cannot be opened ({reason}); put the model into a folder and name that"
        ) from None
