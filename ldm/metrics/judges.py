"""Image-text models that judge whether pictures show what captions say.

Never the model's own text encoder: scores by the encoder that conditions a model flatter it. A judge is trained apart
(`judge = true` in a config of train_clip), or is a published CLIP.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.clip import CLIP
from ldm.config import UserError
from ldm.metrics.preprocess import RESIZE, checked_batch, from_unit_range, resized
from ldm.model_io import ASSETS, find_part, module_hash
from ldm.tokenizer import Tokenizer

JUDGES = ASSETS.parent / "judges"


class ImageTextModel(nn.Module):
    """Both towers of a network, frozen and in eval mode.

    `name`, `sha256` of the weights, `size` in pixels and `resize` belong beside every number of it (`about`).
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
        """Pictures (B, 3, H, W) in [-1, 1] -> unit embeddings (B, D), float32. Raises ValueError for other input."""
        return F.normalize(self._images(checked_batch(x)).float(), dim=-1)

    forward = images  # the image tower is the network of a feature extractor

    @torch.no_grad()
    def texts(self, captions: list[str]) -> Tensor:
        """Captions -> unit embeddings (B, D), float32."""
        return F.normalize(self._texts(captions).float(), dim=-1)

    @property
    def about(self) -> dict[str, str]:
        """The fields that every number of this judge carries."""
        return {"extractor": self.name, "extractor_sha256": self.sha256, "resize": f"{self.size} px, {self.resize}"}

    @property
    def learned_val(self) -> bool:
        """Whether it was trained on the validation split too, as judges are."""
        return self.name.startswith("judge:")


def image_text_model(name: str) -> ImageTextModel:
    """ "judge:NAME" (a shipped one, or a folder of train_clip), NAME alone, or "clip:NAME" (a folder or a hub's name),
    on the CPU. Raises UserError for others and for models that do not open."""
    kind, colon, where = name.partition(":")
    if colon and kind == "clip":
        return _published_clip(where)
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

    def images(x: Tensor) -> Tensor:
        return clip.encode_image(prepare(x))

    def texts(captions: list[str]) -> Tensor:
        return clip.encode_text(tokenizer(captions, warn=False).to(clip.logit_scale.device))

    return ImageTextModel(f"judge:{where}", clip, size, images, texts)


def _published_clip(where: str) -> ImageTextModel:
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    model = pretrained(CLIPModel, where, "clip")
    size, prepare = preparation(pretrained(CLIPImageProcessor, where, "clip"), where)
    tokenizer = pretrained(AutoTokenizer, where, "clip")
    length = model.config.text_config.max_position_embeddings

    def images(x: Tensor) -> Tensor:
        return model.visual_projection(model.vision_model(pixel_values=prepare(x)).pooler_output)

    def texts(captions: list[str]) -> Tensor:
        tokens = tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return model.text_projection(model.text_model(**tokens.to(model.device)).pooler_output)

    return ImageTextModel(f"clip:{where}", model, size, images, texts)


def preparation(processor: Any, where: str) -> tuple[int, Callable[[Tensor], Tensor]]:
    """Size and preparation of pictures by a transformers image processor. Raises UserError without a square crop."""
    crop = getattr(processor, "crop_size", None) or {}
    size = crop.get("height")
    if not size or size != crop.get("width"):
        raise UserError(f"the image processor of {where!r} names no square crop_size")
    return size, resized(size, *from_unit_range(processor.image_mean, processor.image_std))


def pretrained(kind: type, where: str, name: str) -> Any:
    """`kind.from_pretrained(where)` of transformers: a folder, or a hub's name. Raises UserError where it does not
    open, and where weights of a network are missing, which transformers would initialize at random."""
    if not where:
        raise UserError(f"features {name!r} need a folder or a hub's name: {name}:FOLDER")
    if where.startswith((".", "/", "~")) and not Path(where).is_dir():
        raise UserError(f"{name}:{where} cannot be opened: there is no such folder; put the model's files there")
    is_network = issubclass(kind, nn.Module)
    try:
        loaded = kind.from_pretrained(where, **({"output_loading_info": True} if is_network else {}))
    except Exception as error:  # broken files make it raise nearly anything
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{name}:{where} cannot be opened ({reason}); put the model into a folder and name that"
        ) from None
    if not is_network:
        return loaded
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{name}:{where} has not all weights of a {kind.__name__}: {missing[0]!r} is missing")
    return model
