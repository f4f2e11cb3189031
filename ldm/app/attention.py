"""Looking inside of a sampling: where each word's cross-attention goes."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageEnhance
from torch import Tensor, nn

from ldm.pipeline import Pipeline
from ldm.tokenizer import Tokenizer


@contextmanager
def attention_maps(pipe: Pipeline) -> Iterator[list[Tensor]]:
    """While entered, every cross-attention of the U-Net appends a map (L, h, w) to the list: how much each position of
    the latent attends to each token, averaged over heads, for the last picture of the batch, which must be square.

    Averaged over layers and steps: Tang et al. 2022, "What the DAAM", section 3, up to a factor.
    """
    maps: list[Tensor] = []
    size = pipe.latent_shape()[1:]

    def record(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x, context = (*args, *kwargs.values())
        q, k = (
            rearrange(y[0], "n (h d) -> h n d", h=attention.heads)
            for y in (attention.to_q(x[-1:]), attention.to_k(context[-1:]))
        )
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(0).float().cpu()
        weights = rearrange(weights, "(h w) l -> 1 l h w", h=math.isqrt(len(weights)))
        maps.append(F.interpolate(weights, size, mode="bilinear")[0])

    predict, pipe.predict = pipe.predict, None  # a compiled U-Net calls no hooks
    layers = [module for name, module in pipe.unet.named_modules() if name.endswith("attn2")]
    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    try:
        yield maps
    finally:
        pipe.predict = predict
        for handle in handles:
            handle.remove()


def word_overlays(maps: list[Tensor], tokenizer: Tokenizer, prompt: str, image: Image.Image) -> list:
    """(picture, word) per word of the prompt: the picture is as it is where the mean of `attention_maps` over the
    word's tokens is high, grey and dark where it is low. Words cut off are left out."""
    dark, mean = ImageEnhance.Brightness(image.convert("L").convert("RGB")).enhance(0.25), torch.stack(maps).mean(0)
    overlays = []
    for word, tokens in token_positions(tokenizer, prompt):
        heat = mean[tokens].sum(0)
        heat = (heat - heat.min()) / (heat.max() - heat.min()) * 255
        mask = Image.fromarray(heat.byte().numpy()).resize(image.size)
        overlays.append((Image.composite(image, dark, mask), word))
    return overlays


def token_positions(tokenizer: Tokenizer, prompt: str) -> list[tuple[str, list[int]]]:
    """The words of a prompt, each with the positions of its tokens in the context; words cut off are left out."""
    words, positions, start = prompt.split(), [], 1
    for n, word in enumerate(words, start=1):
        end = min(len(tokenizer.encode(" ".join(words[:n]))), tokenizer.context_length) - 1
        if end > start:
            positions.append((word, list(range(start, end))))
        start = end
    return positions
