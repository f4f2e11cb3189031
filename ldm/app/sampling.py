"""Sampling for the page: settings within bounds, previews while pictures denoise, stopping, settings in a PNG."""

import queue
import threading
import time
import warnings
from collections.abc import Collection, Generator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ldm.app.models import Models
from ldm.config import UserError
from ldm.images import read_metadata
from ldm.pipeline import Pipeline, Progress

LONGEST_PROMPT = 1000  # characters
PREVIEW_INTERVAL = 0.3  # seconds
BOUNDS = {"steps": (1, 150), "guidance": (0.0, 30.0), "guidance_rescale": (0.0, 1.0), "count": (1, 16)}
BOUNDS |= {"seed": (0, 2**32 - 17), "strength": (0.05, 1.0), "width": (0, 1024), "height": (0, 1024)}
EXIT = threading.Event()  # set when the program ends; sampling threads then stop
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a sampling; sampler "", width 0 and height 0 are the model's. Prompts become one line without NUL
    and lone surrogates. Raises UserError for values outside of BOUNDS."""

    model: str
    prompt: str = ""
    negative_prompt: str = ""
    steps: int = 30
    guidance: float = 3.0
    guidance_rescale: float = 0.0
    sampler: str = ""
    seed: int = 0
    count: int = 1
    width: int = 0
    height: int = 0
    strength: float = 0.6  # of an edit

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            text = getattr(self, name)
            if len(text) > LONGEST_PROMPT:
                raise UserError(f"{name} has {len(text):,} characters; at most {LONGEST_PROMPT:,}")
            text = text.replace("\0", " ").encode("utf-8", "replace").decode()
            object.__setattr__(self, name, " ".join(text.split()))
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            if not isinstance(value, int | float) or not low <= value <= high:
                raise UserError(f"{name} is {value}; it must be from {low:,} to {high:,}")
            object.__setattr__(self, name, type(low)(value))  # browsers send 3.0 as 3

    def arguments(self) -> dict[str, Any]:
        """The arguments of `Pipeline.__call__`, without the prompt."""
        names = ("negative_prompt", "steps", "guidance", "guidance_rescale", "seed")
        optional = {name: getattr(self, name) or None for name in ("sampler", "width", "height")}
        return {name: getattr(self, name) for name in names} | optional | {"batch_size": self.count}


@dataclass(frozen=True, kw_only=True)
class Update:
    """Progress of a sampling; the last one, and no other, has step == steps and the finished pictures."""

    images: list[Image.Image]  # none in most updates
    step: int  # taken so far
    steps: int
    seconds: float
    t: float = 0.0
    notes: tuple[str, ...] = ()  # warnings, such as that a prompt was cut


def sample(
    pipe: Pipeline, settings: Settings, preview_steps: Collection[int] | None = None, **arguments: Any
) -> Generator[Update, None, Update]:
    """Samples in a thread, with previews after the steps numbered (from 0), by default now and then; yields all updates
    and returns the last. Closing the generator stops the thread. `arguments` go to the pipeline, such as
    `prompt_embeds` instead of the prompt.

    Raises UserError for settings that the pipeline refuses or that need too much memory.
    """
    _, height, width = pipe.latent_shape(settings.height or None, settings.width or None)
    _, default_height, default_width = pipe.latent_shape()
    most = BOUNDS["count"][1] * default_height * default_width // (height * width)
    if settings.count > most:
        raise UserError(f"{settings.count} of that size are too many at once for this model; at most {most}")
    if "prompt_embeds" not in arguments:
        if not settings.prompt:
            raise UserError("the prompt is empty; describe the picture")
        arguments["prompt"] = [settings.prompt] * settings.count
    updates: queue.Queue[Update | BaseException] = queue.Queue()
    closed = threading.Event()
    start = last = time.monotonic()

    def report(images: list[Image.Image], step: int, steps: int, **more: Any) -> None:
        updates.put(Update(images=images, step=step, steps=steps, seconds=time.monotonic() - start, **more))

    def on_step(progress: Progress) -> None:
        nonlocal last
        if closed.is_set() or EXIT.is_set():
            raise UserError("stopped")
        step, images = progress.step + 1, []
        if step == progress.steps:
            return
        timely = time.monotonic() - last >= PREVIEW_INTERVAL
        if timely if preview_steps is None else progress.step in preview_steps:
            images, last = progress.decode(), time.monotonic()
        report(images, step, progress.steps, t=progress.t)

    def run() -> None:
        try:
            with _ONE_AT_A_TIME, warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                images = pipe(callback=on_step, **settings.arguments(), **arguments)
            report(images, settings.steps, settings.steps, notes=tuple({str(w.message): None for w in caught}))
        except BaseException as error:  # raised again by the reader
            updates.put(error)

    threading.Thread(target=run, name="sampling").start()  # not a daemon: torch aborts if the interpreter ends first
    try:
        update = None
        while update is None or update.step < update.steps:
            update = updates.get()
            if isinstance(update, BaseException):
                # on a CPU torch raises a plain RuntimeError when memory runs out
                memory = isinstance(update, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(update)
                raise UserError("out of memory; make fewer or smaller pictures") if memory else update
            yield update
        return update
    finally:
        closed.set()


def picture_metadata(pipe: Pipeline, settings: Settings, **more: Any) -> list[dict[str, str]]:
    """Per picture, the settings that make it again, under the names that scripts/sample.py writes too."""
    names = ["prompt", "negative_prompt", "steps", "guidance", "guidance_rescale", "model"]
    names += ["width", "height"] if settings.width or settings.height else []
    shared = {name: getattr(settings, name) for name in names}
    shared |= {"sampler": settings.sampler or pipe.schedule.config.sampler} | more
    seeds = range(settings.seed, settings.seed + settings.count)
    return [{name: str(value) for name, value in (shared | {"seed": seed}).items()} for seed in seeds]


def restore(file: str | Path, models: Models) -> tuple[Settings, list[str]]:
    """The settings in a PNG of this page or of scripts/sample.py, for one picture, and notes on what is not restored.

    Raises UserError for a file without settings, and for settings out of bounds.
    """
    metadata = read_metadata(file)
    values: dict[str, Any] = {"model": metadata.get("model", "")}
    for field in fields(Settings):
        if field.name in metadata:
            try:
                values[field.name] = field.type(metadata[field.name])
            except ValueError:
                raise UserError(f"{field.name} of that PNG is {metadata[field.name][:80]!r}") from None
    notes = []
    if metadata.keys() & {"image", "share", "compared"}:
        notes.append("It was made by Edit or Compare, whose other inputs are not in the PNG.")
    if values["model"] not in models.names:
        notes.append(f"Its model {values['model'][:80]!r} is not offered here; {models.names[0]!r} is chosen.")
        values["model"] = models.names[0]
    return replace(Settings(**values), count=1), notes
