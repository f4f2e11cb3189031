"""What the tabs share: the controls, how things are said, where pictures are kept."""

import re
import secrets
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ldm.app.studio import BOUNDS, Models, Settings, Update
from ldm.config import UserError
from ldm.images import save_png
from ldm.samplers import SAMPLERS

OWN = "the model's own"
# One sampling at a time, whichever tab asks; the page shows the place in the queue.
QUEUED: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "show_progress": "minimal"}
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
CSS = """
.status { height: 4.6em; overflow-y: auto; }
.status progress { width: 100%; height: .6em; }
.wrong { color: #b00020; font-weight: 600; }
.dark .wrong { color: #ff9aa8; }
input:focus-visible, textarea:focus-visible, button:focus-visible { outline: 2px solid #2f6fde; outline-offset: 2px; }
.still .grid-wrap, .still .image-container { padding-top: 2.2em; }
.still .grid-container { grid-template-columns: repeat(auto-fill, minmax(96px, 160px)) !important; }
.plots { display: flex; flex-wrap: wrap; gap: 1em; --accent: #2f6fde; --warm: #d9822b; --soft: #888; --line: #8884; }
.plots figure { margin: 0; flex: 1 1 280px; max-width: 480px; }
.plots svg { width: 100%; height: auto; }
.plots svg text { fill: currentColor; font-size: 11px; }
.words { display: flex; flex-wrap: wrap; gap: .6em; }
.words figure { margin: 0; text-align: center; }
.words img { width: 112px; height: 112px; image-rendering: pixelated; border-radius: 6px; }
.judged { display: flex; gap: 1em; justify-content: center; align-items: start; min-height: 264px; }
.judged > img, .judged .cell { width: min(256px, 42vw); aspect-ratio: 1; border-radius: 8px; }
.judged .cell { position: relative; }
.judged .cell > * { position: absolute; inset: 0; width: 100%; height: 100%; border-radius: 8px; margin: 0; }
.judged .cross { display: grid; place-items: center; font-size: 2em; }
.judged .mask { background: repeating-conic-gradient(#777 0 25%, #aaa 0 50%) 0 0 / 24px 24px; }
.results { display: flex; flex-wrap: wrap; gap: 1.5em; }
.results table { border-collapse: collapse; } .results caption { font-weight: 600; text-align: left; }
.results p { flex-basis: 100%; }
.results th, .results td { border: 0; border-bottom: 1px solid #8884; padding: .2em .6em; }
.results th { font-weight: 400; text-align: left; } .results td { text-align: right; }
footer { display: none !important; }
"""


@dataclass
class Desk:
    """What one running page has: its models, its folder, and who was told to stop."""

    models: Models
    folder: Path
    seed: int = 0  # of the order of questions
    stops: dict[tuple[str, str], threading.Event] = field(default_factory=dict)

    def arm(self, tab: str) -> Callable[[gr.Request], None]:
        """For a click, before its work is queued: from here on a stop is meant for that work."""

        def arm(request: gr.Request) -> None:  # gradio goes by the annotation
            self.stops[str(request.session_hash), tab] = threading.Event()

        return arm

    def event(self, request: gr.Request, tab: str) -> threading.Event:
        """What stops the work of a tab of the page, in one browser's tab."""
        return self.stops.setdefault((str(request.session_hash), tab), threading.Event())

    def stop(self, tab: str) -> Callable[[gr.Request], str]:
        """For a stop button: stops the tab's work, also where it still waits in the queue; what to say of it."""

        def stop(request: gr.Request) -> str:
            self.event(request, tab).set()
            return said("Stopped.")

        return stop

    def forget(self, request: gr.Request) -> None:
        """For a browser's tab that is closed: stops all that it began."""
        for key in [key for key in self.stops if key[0] == str(request.session_hash)]:
            self.stops.pop(key).set()

    def own(self, path: str) -> str:
        """A path that the page was told of, as long as it is one of a file that the page serves (UserError)."""
        served, asked = self.folder.resolve(), Path(path).resolve()
        if not asked.is_relative_to(served) or asked.suffix != ".png" or not asked.is_file():
            raise UserError("that picture is no longer here")
        return str(asked)

    def keep(self, image: Image.Image, about: dict[str, str]) -> str:
        """Writes a PNG that says what it was made from; its path, under the page's folder."""
        pictures = self.folder / "pictures"
        pictures.mkdir(parents=True, exist_ok=True)
        path = pictures / f"{uuid.uuid4().hex}.png"
        save_png(image, path, about)
        return str(path)


def begins(desk: Desk, tab: str, triggers: list[Any], work: dict[str, Any], status: gr.HTML) -> None:
    """Wires what begins a tab's work, which waits in the queue for its turn."""
    for trigger in triggers:
        trigger(desk.arm(tab), None, None, **QUIET).then(**work, show_progress_on=[status], **QUEUED)


def stops(desk: Desk, tab: str, halt: gr.Button, status: gr.HTML) -> None:
    """Wires the button that stops a tab's work."""
    halt.click(desk.stop(tab), None, status, **QUIET)


def said(text: str, wrong: bool = False) -> str:
    """A message as HTML: a sentence that begins as one, without the machine's paths; whatever is in it is text."""
    text = placeless(text)
    return f'<p role="status" class="{"wrong" if wrong else ""}">{escape(text[:1].upper() + text[1:])}</p>'


def placeless(text: str) -> str:
    """A message in which files and folders go by their own names alone, without the path to them."""
    quoted = re.sub(r"""(['"])/(?:[^'"]*/)?([^'"/]+)/?\1""", r"\1\2\1", text)
    return re.sub(r"(?<![\w./<])/(?:[^\s/'\"<>]+/)+", "", quoted)


def shown(update: Update) -> str:
    """How far a sampling is, as HTML."""
    text = f"step {update.step} of {update.steps}, {update.seconds:.1f} s"
    bar = f'<progress max="{update.steps}" value="{update.step}" aria-label="steps"></progress>'
    return f"<p>{escape(text)}</p>{bar}"


def finished(update: Update, count: int, seed: int) -> str:
    """The last word on a sampling, as HTML."""
    if update.stopped:
        return said(f"Stopped at step {update.step} of {update.steps}.")
    seeds = f"seed {seed}" if count == 1 else f"seeds {seed} to {seed + count - 1}"
    done = said(f"{count} {'picture' if count == 1 else 'pictures'} in {update.seconds:.1f} s, {seeds}.")
    return done + "".join(said(note) for note in update.notes)


def pictures(label: str, name: str, height: int, columns: int = 4) -> gr.Gallery:
    """A place for pictures, of a height that stays while they come."""
    return gr.Gallery(
        label=label,
        elem_id=name,
        elem_classes="still",
        height=height,
        columns=columns,
        object_fit="contain",
        format="png",
        interactive=False,
        allow_preview=False,
        buttons=[],
    )


@dataclass
class Controls:
    """The controls of a sampling, in the order of `names`."""

    parts: dict[str, Any]
    random: gr.Checkbox | None = None

    @property
    def names(self) -> list[str]:
        """The names of `Settings` that these give."""
        return list(self.parts)

    @property
    def inputs(self) -> list[Any]:
        """The components, for an event; with whether the seed is random, where that can be said, at the end."""
        return [*self.parts.values(), *([self.random] if self.random else [])]

    def read(self, values: tuple) -> Settings:
        """Settings from what the page sent (UserError)."""
        found = dict(zip(self.names, values[: len(self.names)], strict=True))
        if self.random and values[len(self.names)]:
            found["seed"] = secrets.randbelow(2**32 - 16)
        if found.get("sampler") == OWN:
            found["sampler"] = ""
        for name, kind in (("seed", int), ("steps", int), ("count", int), ("width", int), ("height", int)):
            if name in found:
                found[name] = kind(found[name] or 0)
        for name in {"guidance", "guidance_rescale", "strength"} & found.keys():
            found[name] = float(found[name] or 0)
        return Settings(**found)

    def show(self, settings: Settings) -> list[Any]:
        """What the controls say of settings, in the order of `inputs`."""
        values = [
            getattr(settings, name) or (OWN if name == "sampler" else getattr(settings, name)) for name in self.names
        ]
        return [*values, *([False] if self.random else [])]


def controls(desk: Desk, leave_out: tuple[str, ...] = ()) -> Controls:
    """The controls of a sampling, all but those left out."""
    slider = lambda name, label, value, step: gr.Slider(  # noqa: E731
        *BOUNDS[name], value, step=step, label=label
    )
    make: dict[str, Callable[[], Any]] = {
        "prompt": lambda: gr.Textbox(
            label="Prompt", lines=1, max_lines=4, placeholder="a red circle above a blue square"
        ),
        "negative_prompt": lambda: gr.Textbox(label="Negative prompt (what to keep away from)", lines=1),
        "model": lambda: gr.Dropdown(desk.models.names, value=desk.models.names[0], label="Model"),
        "sampler": lambda: gr.Dropdown([OWN, *SAMPLERS], value=OWN, label="Sampler"),
        "steps": lambda: slider("steps", "Steps", 30, 1),
        "guidance": lambda: slider("guidance", "Guidance", 3.0, 0.5),
        "guidance_rescale": lambda: slider("guidance_rescale", "Guidance rescale", 0.0, 0.1),
        "count": lambda: slider("count", "Pictures", 4, 1),
        "seed": lambda: gr.Number(0, label="Seed", precision=0),
        "width": lambda: gr.Number(0, label="Width in pixels (0: the model's)", precision=0),
        "height": lambda: gr.Number(0, label="Height in pixels (0: the model's)", precision=0),
        "strength": lambda: slider("strength", "Strength (how much is drawn anew)", 0.6, 0.05),
    }
    parts: dict[str, Any] = {}
    random = None
    wanted = [name for name in make if name not in leave_out]
    for name in [n for n in ("prompt", "negative_prompt", "model") if n in wanted]:
        parts[name] = make[name]()
    for row in (("steps", "guidance"), ("count", "strength"), ("seed",)):
        if names := [name for name in row if name in wanted]:
            with gr.Row():
                for name in names:
                    parts[name] = make[name]()
                if "seed" in names:
                    random = gr.Checkbox(False, label="Random seed")
    if names := [n for n in ("sampler", "guidance_rescale", "width", "height") if n in wanted]:
        with gr.Accordion("More", open=False):
            for name in names:
                parts[name] = make[name]()
    return Controls(parts, random)
