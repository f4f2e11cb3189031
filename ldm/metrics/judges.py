"""Image-text models that judge whether pictures show what captions say.

Never the model's own text encoder: scores by the encoder that conditions a model flatter it. A judge is trained apart
(`judge = true` in a config of train_clip), or is a published CLIP.
"""

from pathlib import Path

import torch
from torch import Tensor

from ldm.clip import CLIP
from ldm.config import UserError
from ldm.metrics.extractor import FeatureExtractor, preparation, pretrained
from ldm.metrics.inputs import resized
from ldm.model_io import ASSETS, find_part
from ldm.tokenizer import Tokenizer

JUDGES = ASSETS.parent / "judges"


def image_text_model(name: str) -> FeatureExtractor:
    """ "judge:NAME" (a shipped one, or a folder of train_clip), NAME alone, or "clip:NAME" (a folder or a hub's name),
    on the CPU. Raises UserError if the model is missing or does not open."""
    if name.startswith("clip:"):
        return published_clip(name.removeprefix("clip:"))
    return trained_judge(name.removeprefix("judge:"))


def trained_judge(where: str) -> FeatureExtractor:
    """A CLIP trained here, shipped or in a folder."""
    shipped = sorted(path.name for path in JUDGES.iterdir() if path.is_dir()) if JUDGES.is_dir() else []
    if where not in shipped and not Path(where).is_dir():
        known = ", ".join(shipped) or "none"
        raise UserError(f"unknown judge {where!r}: neither a folder nor one that ships ({known}), nor clip:FOLDER")
    folder = find_part(JUDGES / where if where in shipped else where, "judge")
    clip, tokenizer = CLIP.from_pretrained(folder), Tokenizer.from_pretrained(folder)
    size = clip.vision_config.image_size
    prepare = resized(size, torch.zeros(3), torch.ones(3))

    def texts(captions: list[str]) -> Tensor:
        return clip.encode_text(tokenizer(captions, warn=False).to(clip.logit_scale.device))

    return FeatureExtractor(f"judge:{where}", clip, size, lambda x: clip.encode_image(prepare(x)), texts)


def published_clip(where: str) -> FeatureExtractor:
    """A CLIP of transformers: a folder, or a hub's name."""
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    model = pretrained(CLIPModel, where, "clip")
    size, prepare = preparation(CLIPImageProcessor, where, "clip")
    tokenizer = pretrained(AutoTokenizer, where, "clip")
    length = model.config.text_config.max_position_embeddings

    def images(x: Tensor) -> Tensor:
        return model.visual_projection(model.vision_model(pixel_values=prepare(x)).pooler_output)

    def texts(captions: list[str]) -> Tensor:
        tokens = tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return model.text_projection(model.text_model(**tokens.to(model.device)).pooler_output)

    return FeatureExtractor(f"clip:{where}", model, size, images, texts)
