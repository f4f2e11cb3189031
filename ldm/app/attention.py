"""Looking inside of a sampling: where each word's cross-attention goes, and the noise schedule."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from matplotlib.figure import Figure
from PIL import Image, ImageEnhance
from torch import Tensor, nn

from ldm.diffusion import Schedule
from ldm.pipeline import Pipeline
from ldm.samplers import make_grid
from ldm.tokenizer import Tokenizer


@contextmanager
def attention_maps(pipe: Pipeline) -> Iterator[list[Tensor]]:
    """While entered, every cross-attention of the U-Net appends a map (L, h, w) to the list: how much each position of
    the latent attends to each token, averaged over heads, for the last picture of the batch.

    Averaged over layers and steps: Tang et al. 2022, "What the DAAM", section 3, up to a factor.
    """
    maps: list[Tensor] = []
    _, height, width = pipe.latent_shape()

    def record(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x, context = (*args, *kwargs.values())
        split = "1 n (h d) -> h n d"
        q = rearrange(attention.to_q(x[-1:]), split, h=attention.heads)
        k = rearrange(attention.to_k(context[-1:]), split, h=attention.heads)
        weights = reduce((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1), "h n l -> l n", "mean")
        rows = round((weights.shape[1] * height / width) ** 0.5)
        weights = rearrange(weights, "l (h w) -> 1 l h w", h=rows).float().cpu()
        maps.append(F.interpolate(weights, (height, width), mode="bilinear")[0])

    layers = [module for name, module in pipe.unet.named_modules() if name.endswith("attn2")]
    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


def word_overlays(maps: list[Tensor], pipe: Pipeline, prompt: str, image: Image.Image) -> list[tuple[Image.Image, str]]:
    """Per word of the prompt, the picture: as it is where the mean of `attention_maps` over the word's tokens is high,
    grey and dark where it is low."""
    dark, mean = ImageEnhance.Brightness(image.convert("L").convert("RGB")).enhance(0.25), torch.stack(maps).mean(0)
    overlays = []
    for word, tokens in token_positions(pipe.tokenizer, prompt):
        heat = mean[tokens].sum(0)
        heat = (heat - heat.min()) / (heat.max() - heat.min()) * 255
        mask = Image.fromarray(heat.byte().numpy()).resize(image.size)
        overlays.append((Image.composite(image, dark, mask), word))
    return overlays


def token_positions(tokenizer: Tokenizer, prompt: str) -> list[tuple[str, list[int]]]:
    """The words of a prompt, each with the positions of its tokens in the context; words cut off are left out."""
    words = prompt.split()
    ends = [len(tokenizer.encode(" ".join(words[:n]))) - 1 for n in range(len(words) + 1)]
    spans = [range(start, min(end, tokenizer.context_length - 1)) for start, end in zip(ends, ends[1:], strict=False)]
    return [(word, list(span)) for word, span in zip(words, spans, strict=True) if span]


def schedule_figure(schedule: Schedule, sampler: str, steps: int) -> Figure:
    """Signal and noise in the latent over t, with a dot at each step of the sampler."""
    taken = [round(step.t) for step in make_grid(schedule, sampler, steps).steps]
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    for name, level in (("signal", schedule.alpha), ("noise", schedule.sigma)):
        axes.plot(level(torch.arange(len(schedule))), marker="o", markersize=4, markevery=taken, label=name)
    axes.set(xlabel="t", title=f"Signal and noise, and the {len(taken)} steps of {sampler}")
    axes.legend(frameon=False)
    return figure
