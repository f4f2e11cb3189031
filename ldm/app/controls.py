"""What the tabs share: the controls of a sampling, its buttons and status, and the wiring of events."""

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr
from gradio.components import Component
from PIL import Image

from ldm.app.models import Models
from ldm.app.sampling import BOUNDS, Settings, Update
from ldm.config import UserError
from ldm.samplers import SAMPLERS

Controls = dict[str, Component]  # by the name of the setting; "random_seed" draws a new one
IMMEDIATE: dict[str, Any] = {"queue": False, "show_progress": "hidden"}


@contextmanager
def user_errors() -> Iterator[None]:
    """Shows a UserError in the page, where the browser announces it."""
    try:
        yield
    except UserError as error:
        raise gr.Error(escape(str(error)), print_exception=False) from None


def settings_controls(models: Models, leave_out: Sequence[str] = (), count: int = 4) -> Controls:
    """The controls of all settings but those left out."""
    controls: Controls = {}

    def add(name: str, kind: Callable[..., Component], *args: Any, **options: Any) -> None:
        if name not in leave_out:
            controls[name] = kind(*args, **options)

    def slider(name: str, label: str, value: float, step: float) -> None:
        add(name, gr.Slider, *BOUNDS[name], value, step=step, label=label)

    add("prompt", gr.Textbox, label="Prompt", max_lines=4, placeholder="a red circle above a blue square")
    add("negative_prompt", gr.Textbox, label="Negative prompt (what to avoid)")
    add("model", gr.Dropdown, models.names, value=models.names[0], label="Model")
    with gr.Row():
        slider("steps", "Steps", 30, 1)
        slider("guidance", "Guidance", 3.0, 0.5)
    with gr.Row():
        slider("count", "Pictures", count, 1)
        slider("strength", "Strength (1 redraws everything)", 0.6, 0.05)
    with gr.Row():
        add("seed", gr.Number, 0, label="Seed", precision=0)
        add("random_seed", gr.Checkbox, False, label="Random seed")
    with gr.Accordion("More", open=False):
        add("sampler", gr.Dropdown, [("the model's own", ""), *SAMPLERS], value="", label="Sampler")
        slider("guidance_rescale", "Guidance rescale", 0.0, 0.1)
        add("width", gr.Number, 0, label="Width in pixels (0: the model's)", precision=0)
        add("height", gr.Number, 0, label="Height in pixels (0: the model's)", precision=0)
    return controls


def read_settings(controls: Controls, values: dict[Component, Any], **changes: Any) -> Settings:
    """The settings that the page sent. Raises UserError for values out of bounds."""
    settings = {name: values[control] for name, control in controls.items()} | changes
    if settings.pop("random_seed", False):
        settings["seed"] = secrets.randbelow(BOUNDS["seed"][1] + 1)
    return Settings(**settings)


def show_settings(controls: Controls, settings: Settings) -> dict[Component, Any]:
    """The update that makes the controls show these settings."""
    return {control: getattr(settings, name, False) for name, control in controls.items()}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Start and stop buttons, and a status below them."""

    name: str
    start: gr.Button
    stop: gr.Button
    status: gr.HTML

    @classmethod
    def build(cls, name: str, label: str, hint: str) -> "Panel":
        """The panel; the elements' ids begin with `name`."""
        with gr.Row():
            start = gr.Button(label, variant="primary", elem_id=f"{name}-start")
            stop = gr.Button("Stop", elem_id=f"{name}-stop")
        status = gr.HTML(message(hint), elem_classes="status", elem_id=f"{name}-status")
        return cls(name=name, start=start, stop=stop, status=status)

    def on(
        self,
        triggers: Sequence[Any],
        handler: Callable[[dict], Iterator[dict]],
        inputs: Iterable[Component],
        outputs: Iterable[Component],
        trigger_mode: str = "once",
    ) -> None:
        """Runs a generator of updates, one in all browsers at a time, until it ends or the stop button is pressed."""

        def run(values: dict) -> Iterator[dict]:
            with user_errors():
                yield from handler(values)

        options = {"concurrency_id": "model", "show_progress": "minimal", "show_progress_on": self.status}
        event = gr.on(triggers, run, set(inputs), {self.status, *outputs}, trigger_mode=trigger_mode, **options)
        self.stop.click(lambda: message("Stopped."), None, self.status, cancels=[event], **IMMEDIATE)


@dataclass(frozen=True, kw_only=True)
class Results:
    """A gallery and a button that downloads the chosen picture."""

    gallery: gr.Gallery
    download: gr.DownloadButton

    @classmethod
    def build(cls, name: str, label: str, download: str = "Download the chosen picture") -> "Results":
        """The gallery and the button; the elements' ids begin with `name`."""
        gallery = picture_gallery(f"{name}-pictures", label, 440)
        return cls(gallery=gallery, download=gr.DownloadButton(download, interactive=False, elem_id=f"{name}-download"))

    def follow(
        self, panel: Panel, updates: Iterator[Update], save: Callable[[list[Image.Image]], list[Any]]
    ) -> Iterator[dict]:
        """Shows previews and progress, then the files that `save(images)` returns, with labels or without."""
        for update in updates:
            if update.done:
                files = save(update.images)
                first = files[0] if isinstance(files[0], str) else files[0][0]
                notes = "".join(map(message, update.notes))
                yield {
                    self.gallery: files,
                    self.download: gr.DownloadButton(value=first, interactive=True),
                    panel.status: message(f"{plural(len(files), 'picture')} in {update.seconds:.1f} s.") + notes,
                }
            else:
                yield {panel.status: progress(update)} | ({self.gallery: update.images} if update.images else {})


def picture_gallery(name: str, label: str, height: int = 220) -> gr.Gallery:
    """A gallery whose height stays while pictures come."""
    layout: dict[str, Any] = {"height": height, "columns": 4, "object_fit": "contain", "format": "png"}
    quiet: dict[str, Any] = {"interactive": False, "allow_preview": False, "buttons": []}
    return gr.Gallery(label=label, elem_id=name, elem_classes="still", **layout, **quiet)


def message(text: str) -> str:
    """A status as HTML."""
    return f'<p role="status">{escape(text)}</p>'


def progress(update: Update) -> str:
    """A progress bar as HTML."""
    bar = f'<progress max="{update.steps}" value="{update.step}" aria-label="steps"></progress>'
    return f"<p>step {update.step} of {update.steps}, {update.seconds:.1f} s</p>{bar}"


def plural(count: int, noun: str) -> str:
    """A count with its noun."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
