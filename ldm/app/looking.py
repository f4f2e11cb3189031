"""Looking inside a sampling: where each word's cross-attention goes, the way of z0, the noise schedule."""

import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from PIL import Image
from torch import Tensor

from ldm.app.studio import Settings, Update, check_size, interruptible, notes_of, sampling_of, threaded
from ldm.diffusion import Schedule
from ldm.evaluate.report_plots import Line, plot
from ldm.layers import TransformerBlock
from ldm.pipeline import Pipeline, Progress
from ldm.samplers import make_grid
from ldm.tokenizer import Tokenizer

STRIP = 8  # pictures on the way


@dataclass(frozen=True, kw_only=True)
class Inside:
    """A picture, `way`: (t, picture of z0) on the way to it, and for each word a map (H, W) in [0, 1]."""

    image: Image.Image
    way: list[tuple[float, Image.Image]]
    words: list[tuple[str, np.ndarray]]
    notes: list[str] = field(default_factory=list)


def watch(pipe: Pipeline, settings: Settings, stop: threading.Event) -> Iterator[Update | Inside]:
    """Updates of the sampling of one picture, then what was seen on the way, unless it was stopped (UserError)."""
    check_size(pipe, settings)

    def work(put: Callable[[Any], None], stopped: Callable[[], bool]) -> None:
        began = time.monotonic()
        told = lambda step, n: put(Update(images=[], step=step, steps=n, seconds=time.monotonic() - began))  # noqa: E731
        with warnings.catch_warnings(record=True) as heard, interruptible(pipe, stopped):
            warnings.simplefilter("always", UserWarning)
            seen = look(pipe, settings, told)
        put(replace(seen, notes=notes_of(heard)))

    yield from threaded(work, stop)


def look(pipe: Pipeline, settings: Settings, told: Callable[[int, int], None]) -> Inside:
    """Makes one picture and notes what is on the way; `told(step, steps)` hears of each step."""
    settings = settings.cleaned()
    way: list[tuple[float, Image.Image]] = []

    def on_step(progress: Progress) -> None:
        told(progress.step + 1, progress.steps)
        seen = np.unique(np.linspace(0, progress.steps - 1, STRIP).round().astype(int))
        if progress.step in seen:
            way.append((progress.t, progress.decode()[0]))

    with attention(pipe) as seen:
        (image,) = pipe(settings.prompt, callback=on_step, **sampling_of(settings))
    maps = torch.stack(seen).mean(0)
    size = (image.height, image.width)
    words = []
    for word, places in words_of(pipe.tokenizer, settings.prompt):
        heat = F.interpolate(maps[places].sum(0)[None, None], size, mode="bilinear")[0, 0]
        words.append((word, ((heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-8)).numpy()))
    return Inside(image=image, way=way, words=words)


@contextmanager
def attention(pipe: Pipeline) -> Iterator[list[Tensor]]:
    """While entered, every cross-attention of the U-Net adds a map (L, h, w) to the list that is given: where each
    token is attended from, the mean over heads, for the last picture of the batch, at the latent's size.

    The mean of them over layers and steps is that of Tang et al. 2022, "What the DAAM", section 3, up to a factor.
    """
    found: list[Tensor] = []
    _, high, wide = pipe.latent_shape()

    def listen(module: torch.nn.Module, given: tuple) -> None:
        x, context = given
        weights = module.weights(x[-1:], context[0][-1:])[..., : pipe.tokenizer.context_length]
        side = round((weights.shape[1] * high / wide) ** 0.5)
        heat = rearrange(reduce(weights, "1 n h l -> n l", "mean"), "(a b) l -> 1 l a b", a=side)
        found.append(F.interpolate(heat.float().cpu(), (high, wide), mode="bilinear")[0])

    blocks = [m for m in pipe.unet.modules() if isinstance(m, TransformerBlock)]
    handles = [block.attn2.register_forward_pre_hook(listen) for block in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def words_of(tokenizer: Tokenizer, prompt: str) -> list[tuple[str, list[int]]]:
    """The words of a prompt, each with the places of its tokens in the context; those that were cut off have none and
    are left out."""
    words, found = prompt.split(), []
    for i, word in enumerate(words):
        start, end = (len(tokenizer.encode(" ".join(words[:n]))) - 1 for n in (i, i + 1))
        places = list(range(start, min(end, tokenizer.context_length - 1)))
        if places:
            found.append((word, places))
    return found


def overlay(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """A picture, grey and dark where a map is 0, as it is and bright where that is 1."""
    pixels = np.asarray(image.convert("RGB"), np.float64)
    grey = pixels.mean(2, keepdims=True) * 0.25
    mixed = grey + (pixels * 0.8 + np.array([255, 170, 0]) * 0.2 - grey) * heat[..., None]
    return Image.fromarray(mixed.clip(0, 255).round().astype(np.uint8))


def schedule_plots(schedule: Schedule, sampler: str, steps: int) -> str:
    """The signal and noise over t, and the log signal-to-noise ratio with the steps that a sampler takes, as HTML."""
    t = torch.linspace(0, len(schedule) - 1, 100)
    points = lambda values: [(float(a), float(b)) for a, b in zip(t, values, strict=True)]  # noqa: E731
    alpha, sigma = (torch.stack([f(x) for x in t]) for f in (schedule.alpha, schedule.sigma))
    ratio = torch.stack([schedule.log_snr(x) for x in t]).clamp(-20, 20)
    taken = [float(step.t) for step in make_grid(schedule, sampler, steps).steps]
    dots = [(x, float(schedule.log_snr(torch.tensor(x)).clamp(-20, 20))) for x in taken]
    first = [
        Line(name="signal", points=points(alpha), dots=False),
        Line(name="noise", points=points(sigma), dots=False),
    ]
    second = [
        Line(name="log signal-to-noise ratio", points=points(ratio), dots=False),
        Line(name=f"the {len(dots)} steps", points=dots, joined=False),
    ]
    figures = (
        plot("How much signal and noise a latent has", "t", first),
        plot("Where the sampler goes", "t", second, zero=False),
    )
    return f'<div class="plots">{"".join(figures)}</div>'
