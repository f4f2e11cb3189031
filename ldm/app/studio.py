"""What the page does, without the page: settings within bounds, pictures while they denoise, a stop that stops."""

import queue
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.config import UserError
from ldm.images import read_metadata
from ldm.layers import ResnetBlock
from ldm.model_io import ASSETS
from ldm.pipeline import Pipeline, Progress
from ldm.samplers import SAMPLERS
from ldm.train.loop import is_out_of_memory

LONGEST = 1000  # characters of a prompt
BOUNDS = {"steps": (1, 150), "guidance": (0.0, 30.0), "guidance_rescale": (0.0, 1.0), "count": (1, 16)}
BOUNDS |= {"seed": (0, 2**32 - 17), "strength": (0.05, 1.0), "width": (0, 1024), "height": (0, 1024)}
PREVIEW_EVERY = 0.3  # seconds
SIDES = 4  # times the model's own side
ONE = threading.Lock()  # a sampling that was left may still be within a step when the next one begins
ENDING = threading.Event()  # the program is told to end: no sampling goes on
FULL = "there is not enough memory for that; make fewer or smaller pictures"


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
                raise UserError(f"{name.replace('_', ' ')} is {value}; it must be from {low:,} to {high:,}")
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

    def __init__(self, found: Mapping[str, str], device: Any = "cpu", keep: int = 2) -> None:
        self.places = dict(found)
        self.names = list(found)
        self.device, self.keep = device, keep
        self._open: OrderedDict[str, Pipeline] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> Pipeline:
        """UserError for one that is not offered: the page names models, never folders of the machine."""
        if name not in self.names:
            raise UserError(f"there is no model {str(name)[:80]!r} here; known: {', '.join(self.names)}")
        with self._lock:
            if name not in self._open:
                self._open[name] = Pipeline.from_pretrained(self.places[name], self.device)
                while len(self._open) > self.keep:
                    self._open.popitem(last=False)
            self._open.move_to_end(name)
            return self._open[name]


def find_models(given: list[str]) -> dict[str, str]:
    """{name to offer: what to open} of those given, or of the shipped ones and finished runs under runs/. A folder
    elsewhere goes by its own name: the page says no path of the machine."""
    shipped = sorted(folder.name for folder in ASSETS.iterdir() if folder.is_dir())
    runs = sorted(str(f.parent) for pattern in ("*", "*/*") for f in Path("runs").glob(f"{pattern}/model_index.json"))
    found: dict[str, str] = {}
    for where in dict.fromkeys(given or [*shipped, *runs]):
        name = where if not Path(where).is_absolute() and ".." not in Path(where).parts else Path(where).resolve().name
        taken = [n for n in found if n == name or n.startswith(f"{name} (")]
        found[f"{name} ({len(taken) + 1})" if taken else name] = where
    return found


def check_size(pipe: Pipeline, settings: Settings) -> None:
    """UserError for more than a machine should be asked for at once: sides of `SIDES` times the model's own, and as
    much in all as 16 pictures of its own size."""
    _, height, width = pipe.latent_shape(settings.height or None, settings.width or None)
    _, own_height, own_width = pipe.latent_shape()
    if height > SIDES * own_height or width > SIDES * own_width:
        most = f"{SIDES * own_width * pipe.vae.factor}x{SIDES * own_height * pipe.vae.factor}"
        raise UserError(f"{settings.width}x{settings.height} px is more than {most}, the most this model is asked for")
    most = BOUNDS["count"][1] * own_height * own_width // (height * width)
    if settings.count > most:
        raise UserError(f"{settings.count} pictures of that size are too many at once; at most {max(most, 1)}")


def threaded(work: Callable[[Callable[[Any], None], Callable[[], bool]], None], stop: threading.Event) -> Iterator[Any]:
    """Runs `work(put, stopped)` in a thread of its own and yields what it puts, until it ends; one such at a time.

    An error of it is raised here, but for Stopped. `stopped()` is true once `stop` is set or the reader has gone away,
    who does not wait for it.
    """
    heard: queue.Queue = queue.Queue()
    left = threading.Event()

    def run() -> None:
        try:
            with ONE:
                work(heard.put, lambda: stop.is_set() or left.is_set() or ENDING.is_set())
            heard.put(None)
        except BaseException as error:  # handed to whoever reads
            heard.put(error)

    threading.Thread(target=run, name="sampling").start()  # waited for at the end, or torch aborts the program
    try:
        while (found := heard.get()) is not None:
            if isinstance(found, Stopped):
                return
            if isinstance(found, BaseException):
                raise UserError(FULL) if is_out_of_memory(found) else found
            yield found
    finally:
        left.set()


@contextmanager
def interruptible(pipe: Pipeline, stopped: Callable[[], bool]) -> Iterator[None]:
    """While entered, the U-Net raises Stopped in the middle of a step as soon as `stopped()`."""

    def look(*_: Any) -> None:
        if stopped():
            raise Stopped

    handles = [m.register_forward_pre_hook(look) for m in pipe.unet.modules() if isinstance(m, ResnetBlock)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def make(pipe: Pipeline, settings: Settings, stop: threading.Event, **options: Any) -> Iterator[Update]:
    """Yields updates of a sampling: previews a few times a second, then the pictures.

    The last update is `done`, or `stopped` after `stop` was set. `options` go to the pipeline, in place of the prompt
    where they give embeddings. UserError for what is too much, and of the pipeline.
    """
    settings = settings.cleaned()
    check_size(pipe, settings)
    began = last = time.monotonic()

    def work(put: Callable[[Any], None], stopped: Callable[[], bool]) -> None:
        def on_step(progress: Progress) -> None:
            nonlocal last
            now, number = time.monotonic(), progress.step + 1
            seen = now - last >= PREVIEW_EVERY and number < progress.steps
            images = progress.decode() if seen else []
            last = time.monotonic() if seen else last
            put(Update(images=images, step=number, steps=progress.steps, seconds=now - began))

        own = {} if "prompt_embeds" in options else {"prompt": [settings.prompt] * settings.count}
        with warnings.catch_warnings(record=True) as heard, interruptible(pipe, stopped):
            warnings.simplefilter("always", UserWarning)
            images = pipe(callback=on_step, **sampling_of(settings), **own, **options)
        notes = notes_of(heard)
        seconds = time.monotonic() - began
        put(Update(images=images, step=settings.steps, steps=settings.steps, seconds=seconds, done=True, notes=notes))

    update = Update(images=[], step=0, steps=settings.steps, seconds=0.0)
    for update in threaded(work, stop):
        yield update
    if not update.done:
        yield replace(update, images=[], stopped=True)


def notes_of(heard: list[warnings.WarningMessage]) -> list[str]:
    """What was warned of, each once; of a prompt that is too long only what was cut off."""
    notes = []
    for text in dict.fromkeys(str(w.message) for w in heard if issubclass(w.category, UserWarning)):
        _, cut, rest = text.partition("this was cut off: ")
        rest = rest if len(rest) <= 80 else f"{rest[:80]}...'"
        notes.append(f"The prompt is longer than this model reads; it was cut off before {rest}" if cut else text)
    return notes


def sampling_of(settings: Settings) -> dict[str, Any]:
    """What the pipeline takes of settings, beside the prompt."""
    about = {
        name: getattr(settings, name) for name in ("negative_prompt", "steps", "guidance", "guidance_rescale", "seed")
    }
    about |= {"sampler": settings.sampler or None, "batch_size": settings.count}
    return about | {"height": settings.height or None, "width": settings.width or None}


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
    texts = read_metadata(file)
    if "share" in texts:
        raise UserError("that picture lies between two prompts; Edit makes such pictures")
    notes = (
        [f"compared over {texts['compared']}: these are the settings that they share"] if "compared" in texts else []
    )
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
