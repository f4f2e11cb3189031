"""What the page does, without the page: settings within bounds, pictures while they denoise, a stop that stops."""

import queue
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.config import UserError
from ldm.images import read_about
from ldm.pipeline import Pipeline, Progress
from ldm.samplers import SAMPLERS
from ldm.weights import ASSETS

LONGEST = 1000  # characters of a prompt
BOUNDS = {"steps": (1, 150), "guidance": (0.0, 30.0), "guidance_rescale": (0.0, 1.0), "count": (1, 16)}
BOUNDS |= {"seed": (0, 2**32 - 1), "strength": (0.05, 1.0), "width": (0, 1024), "height": (0, 1024)}
PREVIEW_EVERY = 0.3  # seconds


class Stopped(Exception):
    """Raised inside a sampling that was told to stop."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What pictures are made from; UserError for what is out of bounds. `sampler` "" and sizes 0 are the model's."""

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
    strength: float = 0.6  # with a picture to begin with

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            text = getattr(self, name)
            if len(text) > LONGEST:
                what = name.replace("_", " ")
                raise UserError(f"the {what} has {len(text):,} characters; at most {LONGEST:,} are read. Shorten it")
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise UserError(f"{name.replace('_', ' ')} is {value}; it must be from {low:g} to {high:g}")
        if self.sampler and self.sampler not in SAMPLERS:
            raise UserError(f"unknown sampler {self.sampler!r}; known: {', '.join(SAMPLERS)}")

    def cleaned(self) -> "Settings":
        """With prompts that every part of the way can carry: no NUL, no lone surrogates, one line."""
        return replace(self, **{name: clean(getattr(self, name)) for name in ("prompt", "negative_prompt")})


def clean(text: str) -> str:
    """A prompt without NUL and lone surrogates, in one line."""
    return " ".join(text.replace("\0", " ").encode("utf-8", "replace").decode("utf-8").split())


@dataclass(frozen=True, kw_only=True)
class Update:
    """How far a sampling is: `images` are the current estimate, the pictures themselves when `done`."""

    images: list[Image.Image]
    step: int
    steps: int
    seconds: float
    done: bool = False
    stopped: bool = False
    notes: list[str] = field(default_factory=list)


class Models:
    """Models by the names they are offered under, the last few of them open."""

    def __init__(self, names: list[str], device: Any = "cpu", keep: int = 2) -> None:
        self.names = list(dict.fromkeys(names))
        self.device, self.keep = device, keep
        self._open: OrderedDict[str, Pipeline] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> Pipeline:
        """UserError for one that is not offered: the page names models, never folders of the machine."""
        if name not in self.names:
            raise UserError(f"there is no model {str(name)[:80]!r} here; known: {', '.join(self.names)}")
        with self._lock:
            if name not in self._open:
                self._open[name] = Pipeline.from_pretrained(name, self.device)
                while len(self._open) > self.keep:
                    self._open.popitem(last=False)
            self._open.move_to_end(name)
            return self._open[name]


def find_models(given: list[str]) -> list[str]:
    """Those given, or the shipped ones; then finished runs under runs/."""
    shipped = sorted(folder.name for folder in ASSETS.iterdir() if folder.is_dir())
    runs = sorted(str(file.parent) for file in Path("runs").glob("*/*/model_index.json"))
    return given or [*shipped, *runs]


def size_of(pipe: Pipeline, settings: Settings) -> tuple[int | None, int | None]:
    """Height and width to ask the pipeline for; None is the model's own."""
    return settings.height or None, settings.width or None


def make(pipe: Pipeline, settings: Settings, stop: threading.Event, **options: Any) -> Iterator[Update]:
    """Samples in a thread of its own and yields updates: previews a few times a second, then the pictures.

    The last update is `done`, or `stopped` after `stop` was set, which ends the sampling within one step. `options`
    go to the pipeline, in place of the prompt where they give embeddings. UserError of the pipeline is raised here.
    """
    settings = settings.cleaned()
    updates: queue.Queue = queue.Queue()
    left = threading.Event()  # whoever read the updates went away
    began = last = time.monotonic()

    def on_step(progress: Progress) -> None:
        nonlocal last
        if stop.is_set() or left.is_set():
            raise Stopped
        now, number = time.monotonic(), progress.step + 1
        seen = now - last >= PREVIEW_EVERY and number < progress.steps
        images = progress.decode() if seen else []
        last = time.monotonic() if seen else last
        updates.put(Update(images=images, step=number, steps=progress.steps, seconds=now - began))

    def work() -> None:
        height, width = size_of(pipe, settings)
        about = {"negative_prompt": settings.negative_prompt, "steps": settings.steps, "guidance": settings.guidance}
        about |= {"guidance_rescale": settings.guidance_rescale, "sampler": settings.sampler or None}
        about |= {"seed": settings.seed, "height": height, "width": width, "batch_size": settings.count}
        if "prompt_embeds" not in options:
            about["prompt"] = [settings.prompt] * settings.count
        try:
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always", UserWarning)
                images = pipe(callback=on_step, **about, **options)
            notes = list(dict.fromkeys(str(w.message) for w in heard if issubclass(w.category, UserWarning)))
            updates.put((images, notes))
        except BaseException as error:  # handed to whoever reads the updates
            updates.put(error)

    thread = threading.Thread(target=work, name="sampling", daemon=True)
    thread.start()
    step, steps = 0, settings.steps
    try:
        while True:
            found = updates.get()
            if isinstance(found, Update):
                step, steps = found.step, found.steps
                yield found
                continue
            seconds = time.monotonic() - began
            if isinstance(found, Stopped):
                yield Update(images=[], step=step, steps=steps, seconds=seconds, stopped=True)
            elif isinstance(found, BaseException):
                raise found
            else:
                images, notes = found
                yield Update(images=images, step=steps, steps=steps, seconds=seconds, done=True, notes=notes)
            return
    finally:
        left.set()
        thread.join()


def about_picture(pipe: Pipeline, settings: Settings, index: int, **more: Any) -> dict[str, str]:
    """What the PNG of picture `index` says of itself: enough to make it again, as scripts/sample.py writes it."""
    settings = settings.cleaned()
    texts: dict[str, Any] = {"prompt": settings.prompt, "seed": settings.seed + index}
    texts |= {name: getattr(settings, name) for name in ("negative_prompt", "steps", "guidance", "guidance_rescale")}
    texts |= {"sampler": settings.sampler or pipe.schedule.config.sampler, "model": settings.model} | more
    if settings.width or settings.height:
        texts |= {"width": settings.width, "height": settings.height}
    return {name: str(value) for name, value in texts.items()}


def restore(file: str | Path, models: Models) -> tuple[Settings, list[str]]:
    """The settings in a PNG that this page or scripts/sample.py wrote, and notes on what could not be restored.

    UserError for a file that is no such PNG, and for settings that are out of bounds.
    """
    texts = read_about(file)
    notes = []
    kinds = {f.name: f.type for f in Settings.__dataclass_fields__.values()}
    found: dict[str, Any] = {"model": texts.get("model", "")}
    for name in kinds.keys() & texts.keys():
        try:
            found[name] = kinds[name](texts[name])
        except ValueError:
            raise UserError(
                f"the picture's {name} is {texts[name][:80]!r}, which is no {kinds[name].__name__}"
            ) from None
    if found["model"] not in models.names:
        notes.append(f"its model {found['model'][:80]!r} is not offered here; {models.names[0]!r} is chosen")
        found["model"] = models.names[0]
    if "image" in texts:
        notes.append("it began with a picture, which is not in it: see Edit")
    return Settings(**found), notes


def changed(settings: Settings, **values: Any) -> Settings:
    """Settings with other values (UserError)."""
    return Settings(**asdict(settings) | values)
