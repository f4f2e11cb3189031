"""A frozen network that embeds pictures, and captions where it is an image-text model: one class for all of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config import UserError
from ldm.metrics.inputs import RESIZE, checked, resized
from ldm.model_io import module_hash


class FeatureExtractor(nn.Module):
    """Pictures -> features by a frozen network in eval mode.

    `name`, `sha256` of the weights (None: hashed here), `size` in pixels and `resize` filter belong beside every number
    (`metadata`). `embed` maps pictures in [-1, 1] of any size to features (B, D) by way of `network`, `embed_texts`
    captions to embeddings (B, D) of the same space, `classifier` features to logits.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        size: int,
        embed: Callable[[Tensor], Tensor],
        embed_texts: Callable[[list[str]], Tensor] | None = None,
        *,
        classifier: nn.Module | None = None,
        resize: str = RESIZE,
        sha256: str | None = None,
    ) -> None:
        super().__init__()
        self.name, self.size, self.resize, self.sha256 = name, size, resize, sha256 or module_hash(network)
        self.network, self.classifier, self._embed, self._embed_texts = network, classifier, embed, embed_texts
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def images(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in [-1, 1] -> features (B, D), float32; of an image-text model unit embeddings. Raises
        ValueError for other input."""
        return self._unit(self._embed(checked(x, side=1).float()))

    forward = images

    @torch.no_grad()
    def texts(self, captions: list[str]) -> Tensor:
        """Captions -> unit embeddings (B, D), float32, by an image-text model."""
        return self._unit(self._embed_texts(captions))

    def _unit(self, rows: Tensor) -> Tensor:
        return rows.float() if self._embed_texts is None else nn.functional.normalize(rows.float(), dim=-1)

    @torch.no_grad()
    def probabilities(self, features: Tensor) -> Tensor | None:
        """Class probabilities (B, classes) of features (B, D); None for a network without classes."""
        return None if self.classifier is None else self.classifier(features).softmax(1)

    @property
    def metadata(self) -> dict[str, str]:
        """The fields that every number of these features carries."""
        return {"extractor": self.name, "extractor_sha256": self.sha256, "resize": f"{self.size} px, {self.resize}"}

    @property
    def learned_val(self) -> bool:
        """Whether it was trained on the validation split too, as judges are."""
        return self.name.startswith("judge:")


def pretrained(kind: type, where: str, name: str) -> Any:
    """`kind.from_pretrained(where)` of transformers: a folder, or a hub's name. Raises UserError where it does not
    open, and where weights of a network are missing, which transformers would initialize at random."""
    options = {"output_loading_info": True} if issubclass(kind, nn.Module) else {}
    try:
        loaded = kind.from_pretrained(where, **options)
    except Exception as error:  # broken files make it raise nearly anything
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{name}:{where} cannot be opened ({reason}); name a folder with the model's files") from None
    model, info = loaded if options else (loaded, {"missing_keys": []})
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{name}:{where} has not all weights of a {kind.__name__}: {missing[0]!r} is missing")
    return model


def preparation(kind: type, where: str, name: str) -> tuple[int, Callable[[Tensor], Tensor]]:
    """Size and preparation of pictures by an image processor of transformers. Raises UserError without a square
    crop."""
    processor = pretrained(kind, where, name)
    crop = getattr(processor, "crop_size", None) or {"height": 0, "width": 0}
    size = crop["height"]
    if not size or size != crop["width"]:
        raise UserError(f"the image processor of {where!r} names no square crop_size")
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    return size, resized(size, 2 * mean - 1, 2 * std)  # from pixels in [0, 1]
