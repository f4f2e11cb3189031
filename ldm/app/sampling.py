"""Sampling for the page: settings within bounds, previews while pictures denoise, stopping, settings in a PNG."""

import math
import threading
import warnings
from collections import deque
from collections.abc import Generator, MutableSequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.app.models import GUIDANCE, Models
from ldm.config import UserError
from ldm.images import read_metadata
from ldm.lora import read_weight
from ldm.pipeline import Pipeline, Progress

LONGEST_PROMPT = 1000  # characters
INTERVAL = 0.3  # seconds between previews
BOUNDS = {"steps": (1, 150), "guidance": (0.0, 30.0), "guidance_rescale": (0.0, 1.0), "count": (1, 16)}
BOUNDS |= {"adapter_weight": (-2.0, 2.0)}
BOUNDS |= {"seed": (0, 2**32 - 17), "strength": (0.05, 1.0), "width": (0, 1024), "height": (0, 1024)}
EXIT = threading.Event()  # set when the program ends; sampling then stops
_WORKER = ThreadPoolExecutor(1)  # one sampling at a time


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a sampling; sampler "", width 0 and height 0 are the model's. Prompts become one line without NUL
    and lone surrogates. Raises UserError for values outside of BOUNDS."""

    model: str
    prompt: str = ""
    negative_prompt: str = ""
    steps: int = 30
    guidance: float = GUIDANCE
    guidance_rescale: float = 0.0
    sampler: str = ""
    seed: int = 0
    count: int = 4
    width: int = 0
    height: int = 0
    strength: float = 0.6  # of an edit
    adapters: tuple[str, ...] = ()  # low-rank, by name
    adapter_weight: float = 1.0  # of each

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            text = getattr(self, name) or ""
            if len(text) > LONGEST_PROMPT:
                raise UserError(f"{name} has {len(text):,} characters; at most {LONGEST_PROMPT:,}")
            text = text.replace("\0", " ").encode("utf-8", "replace").decode()
            object.__setattr__(self, name, " ".join(text.split()))
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            if not isinstance(value, int | float) or not low <= value <= high:
                raise UserError(f"{name} is {value}; it must be from {low:,} to {high:,}")
            object.__setattr__(self, name, type(low)(value))  # browsers send 3.0 as 3

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the pipeline; sampler, width and height only where they are not the model's."""
        others, optional = ("model", "prompt", "count", "strength"), ("sampler", "width", "height")
        others += ("adapters", "adapter_weight")
        return {name: x for name, x in vars(self).items() if name not in others and (x or name not in optional)}


def sample(
    pipe: Pipeline, settings: Settings, kept: MutableSequence[Progress] | None = None, **arguments: Any
) -> Generator[Progress | str, None, tuple[list[Image.Image], list[str]]]:
    """Yields the latest step now and then, a status while it compiles, and returns the pictures and warnings, such as
    that a prompt was cut.

    Closing the generator stops the sampling. All steps are appended to `kept`; `arguments` go to the pipeline, such as
    other prompts. Raises UserError for settings that the pipeline refuses.
    """
    positions = math.prod(pipe.latent_shape(settings.height or None, settings.width or None))
    most = BOUNDS["count"][1] * math.prod(pipe.latent_shape()) // positions
    if settings.count > most:
        raise UserError(f"{settings.count} of that size are too many at once for this model; at most {most}")
    if not settings.prompt and "prompt" not in arguments:
        raise UserError("the prompt is empty; describe the picture")
    arguments.setdefault("prompt", [settings.prompt] * settings.count)
    kept = deque(maxlen=1) if kept is None else kept
    closed = threading.Event()

    def on_step(progress: Progress) -> None:
        if closed.is_set() or EXIT.is_set():
            raise UserError("stopped")
        kept.append(progress)

    def run() -> tuple[list[Image.Image], list[str]]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            images = pipe(callback=on_step, batch_size=settings.count, **settings.options(), **arguments)
        return images, list(dict.fromkeys(str(w.message) for w in caught))

    future, shown = _WORKER.submit(run), None
    try:
        while wait([future], INTERVAL).not_done:
            if pipe.compiling:
                yield "Compiling the model for this number and size of pictures, once."
            elif kept and kept[-1] is not shown:
                yield (shown := kept[-1])
        return future.result()
    finally:
        closed.set()


def picture_metadata(pipe: Pipeline, settings: Settings, **more: Any) -> list[dict[str, str]]:
    """Per picture, the settings that make it again, under the names that scripts/sample.py writes too."""
    shared = {"prompt": settings.prompt, "model": settings.model, "sampler": pipe.schedule.config.sampler}
    adapters = ", ".join(f"{name}:{settings.adapter_weight:g}" for name in settings.adapters)
    optional = {"lora": adapters, "compiled": "float32" if pipe.compiled else ""}
    shared |= {"device": str(pipe.device), "dtype": str(pipe.dtype).removeprefix("torch.")}
    shared |= settings.options() | {k: x for k, x in optional.items() if x} | more
    seeds = range(settings.seed, settings.seed + settings.count)
    return [{name: str(value) for name, value in (shared | {"seed": seed}).items()} for seed in seeds]


def restore(file: str | Path, models: Models) -> tuple[Settings, list[str]]:
    """The settings in a PNG of this page or of scripts/sample.py, and notes on those that are not restored.

    Raises UserError for a file without settings, and for settings out of bounds.
    """
    metadata, notes = read_metadata(file), []
    if metadata.keys() & {"image", "share", "compared"}:
        notes.append("It was made by Edit or Compare, whose other inputs are not in the PNG.")
    if metadata.get("model") not in models.names:
        notes.append(f"Its model {metadata.get('model', '')[:80]!r} is not offered here.")
        metadata["model"] = models.names[0]
    lora = dict(read_weight(text) for text in metadata.get("lora", "").split(", ") if text)
    metadata |= {"adapters": [Path(file).stem for file in lora], "adapter_weight": max(lora.values(), default=1.0)}
    if not models.adapters.keys() >= set(metadata["adapters"]) or len(set(lora.values())) > 1:
        notes.append(f"Its adapters {metadata['lora'][:80]!r} are not offered here, or not with different weights.")
        metadata["adapters"] = ()
    try:
        return Settings(**{f.name: f.type(metadata[f.name]) for f in fields(Settings) if f.name in metadata}), notes
    except ValueError as error:
        raise UserError(f"a setting in that PNG cannot be read: {str(error)[:80]}") from None
