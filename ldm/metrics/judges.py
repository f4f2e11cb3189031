"""Image-text models that judge whether pictures say what captions say.

Never the model's own text encoder: scores by the encoder that conditions a model flatter it. A judge is trained apart
(`judge = true` in a config of train_clip), or is a CLIP of others.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.clip import CLIP
from ldm.config import UserError
from ldm.metrics.preprocess import RESIZE, resized, to_unit_range
from ldm.model_io import ASSETS, find_part, module_hash
from ldm.tokenizer import Tokenizer

JUDGES = ASSETS.parent / "judges"


class ImageTextModel(nn.Module):
    """Both towers of a network, frozen and in eval mode.

    `name`, `sha256` of the weights, `size` in pixels and `resize` are what a number must be printed with.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        size: int,
        images: Callable[[Tensor], Tensor],
        texts: Callable[[list[str]], Tensor],
    ) -> None:
        super().__init__()
        self.name, self.network, self.size, self.resize = name, network, size, RESIZE
        self.sha256, self._images, self._texts = module_hash(network), images, texts
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def images(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> unit embeddings (B, D), float32."""
        return F.normalize(self._images(x.float()).float(), dim=-1)

    @torch.no_grad()
    def texts(self, captions: list[str]) -> Tensor:
        """Captions -> unit embeddings (B, D), float32."""
        return F.normalize(self._texts(captions).float(), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """`images`, so that the image tower can be a feature extractor's network."""
        return self.images(x)

    @property
    def about(self) -> dict[str, str]:
        """The fields that every number of this judge carries."""
        resize = f"{self.size} px, {self.resize}"
        return {"extractor": self.name, "extractor_sha256": self.sha256, "resize": resize}

    @property
    def learned_val(self) -> bool:
        """Whether it was trained on the validation split too, as judges are."""
        return self.name.startswith("judge:")


def image_text_model(name: str) -> ImageTextModel:
    """ "judge:NAME" (one that ships, or a folder of train_clip) or "clip:NAME" (a folder or a hub's name), on the CPU.

    A bare NAME is a judge's. UserError for others and for what does not open.
    """
    kind, colon, where = name.partition(":")
    if kind == "clip" and colon:
        return _clip_of_others(where)
    where = where if colon and kind == "judge" else name
    shipped = sorted(path.name for path in JUDGES.iterdir() if path.is_dir()) if JUDGES.is_dir() else []
    if where not in shipped and not Path(where).is_dir():
        known = ", ".join(shipped) or "none"
        raise UserError(f"unknown judge {where!r}: neither a folder nor one that ships ({known}), nor clip:FOLDER")
    return _judge(where, find_part(JUDGES / where if where in shipped else where, "judge"))


def _judge(where: str, folder: Path) -> ImageTextModel:
    """A CLIP trained here."""
    clip, tokenizer = CLIP.from_pretrained(folder), Tokenizer.from_pretrained(folder)
    size = clip.vision_config.image_size
    prepare = resized(size, torch.zeros(3), torch.ones(3))

    def texts(captions: list[str]) -> Tensor:
        return clip.encode_text(tokenizer(captions, warn=False).to(clip.logit_scale.device))

    return ImageTextModel(f"judge:{where}", clip, size, lambda x: clip.encode_image(prepare(x)), texts)


def _clip_of_others(where: str) -> ImageTextModel:
    """A CLIP of others, by transformers."""
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    model = pretrained_network(CLIPModel, where, "clip")
    pixels, tokenizer = (pretrained(kind, where, "clip") for kind in (CLIPImageProcessor, AutoTokenizer))
    size, prepare = preparation(pixels, where)
    length = model.config.text_config.max_position_embeddings

    def images(x: Tensor) -> Tensor:
        return model.visual_projection(model.vision_model(pixel_values=prepare(x)).pooler_output)

    def texts(captions: list[str]) -> Tensor:
        options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        tokens = tokenizer(captions, **options).to(model.device)
        return model.text_projection(model.text_model(**tokens).pooler_output)

    return ImageTextModel(f"clip:{where}", model, size, images, texts)


def preparation(pixels: Any, where: str) -> tuple[int, Callable[[Tensor], Tensor]]:
    """Size and preparation of pictures as a transformers image processor says (UserError where it says no crop)."""
    crop = getattr(pixels, "crop_size", None) or {}
    if not crop.get("height") or crop["height"] != crop.get("width"):
        raise UserError(f"the image processor of {where!r} names no square crop_size")
    return crop["height"], resized(crop["height"], *to_unit_range(pixels.image_mean, pixels.image_std))


def pretrained_network(kind: Any, where: str, name: str) -> Any:
    """As `pretrained`, of a network; UserError too where weights are missing, which transformers would draw anew."""
    model, info = pretrained(kind, where, name, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{name}:{where} has not all weights of a {kind.__name__}: {missing[0]!r} is missing")
    return model


def pretrained(kind: Any, where: str, name: str, **options: Any) -> Any:
    """`kind.from_pretrained(where)` of transformers: a folder, or a hub's name; UserError where it cannot be had."""
    if not where:
        raise UserError(f"features {name!r} need a folder or a hub's name: {name}:FOLDER")
    if where.startswith((".", "/", "~")) and not Path(where).is_dir():
        raise UserError(f"{name}:{where} cannot be opened: there is no such folder; put the model's files there")
    try:
        return kind.from_pretrained(where, **options)
    except Exception as error:  # broken files make it raise nearly anything
        reason = " ".join(str(error).split())[:160]
        way_out = "put the model into a folder and name that"
        raise UserError(f"{name}:{where} cannot be opened ({reason}); {way_out}") from None
