"""What the tabs share: the settings' controls, start and stop, progress, a gallery of results."""

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import gradio as gr
from gradio.components import Component
from gradio.processing_utils import save_pil_to_cache
from PIL import Image

from ldm.app.models import Models
from ldm.app.sampling import BOUNDS, Settings, Update
from ldm.config import UserError
from ldm.samplers import SAMPLERS

Values = dict[Component, Any]  # of the page's components
Handler = Callable[[Values], Iterator[Values | Update]]
IMMEDIATE = {"concurrency_limit": None, "show_progress": "hidden"}


@contextmanager
def user_errors() -> Iterator[None]:
    """Shows a UserError as a message in the page."""
    try:
        yield
    except UserError as error:
        raise gr.Error(escape(str(error)), print_exception=False) from None


class Panel:
    """Start and stop buttons and a status; the elements' ids begin with `name`."""

    def __init__(self, name: str, label: str, hint: str) -> None:
        with gr.Row():
            self.start = gr.Button(label, variant="primary", elem_id=f"{name}-start")
            self.stop = gr.Button("Stop", elem_id=f"{name}-stop")
        self.status = gr.HTML(message(hint), elem_classes="status", elem_id=f"{name}-status")

    def on(
        self, triggers: Sequence, handler: Handler, inputs: Iterable[Component], outputs: Iterable[Component]
    ) -> None:
        """Runs a handler, one in all browsers at a time, until it ends or Stop is pressed. It yields new values of
        components, and progress for the status."""

        def run(values: Values) -> Iterator[Values]:
            with user_errors():
                for shown in handler(values):
                    yield {self.status: progress(shown)} if isinstance(shown, Update) else shown

        shown = {"show_progress": "minimal", "show_progress_on": self.status}
        event = gr.on(triggers, run, set(inputs), {self.status, *outputs}, concurrency_id="model", **shown)
        self.stop.click(lambda: message("Stopped."), None, self.status, cancels=[event], **IMMEDIATE)


class SamplingTab:
    """The two columns of a tab that samples: `extras` (empty) and the settings but those left out; the panel, a gallery
    and a download button in `results`."""

    def __init__(
        self, models: Models, name: str, label: str, hint: str, leave_out: Sequence[str] = (), count: int = 1
    ) -> None:
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                self.extras = gr.Column()
                self.controls = settings_controls(models, count)
            with gr.Column(scale=3, min_width=300) as self.results:
                self.panel = Panel(name, label, hint)
                self.gallery = gallery(f"{name}-pictures", "Pictures")
                self.download = gr.DownloadButton("Download", interactive=False, elem_id=f"{name}-download")
        for setting in leave_out:
            self.controls[setting].visible = False

    def on(self, handler: Handler, inputs: Sequence[Component] = (), outputs: Sequence[Component] = ()) -> None:
        """Runs the handler at the start button or enter, with the controls and `inputs`."""
        triggers = [self.panel.start.click, self.controls["prompt"].submit]
        shown = [self.gallery, self.download, *self.controls.values(), *outputs]
        self.panel.on(triggers, handler, [*inputs, *self.controls.values()], shown)

    def settings(self, values: Values, **changes: Any) -> Settings:
        """The settings that the page sent. Raises UserError for values out of bounds."""
        settings = {name: values[control] for name, control in self.controls.items()} | changes
        if settings.pop("random_seed"):
            settings["seed"] = secrets.randbelow(BOUNDS["seed"][1] + 1)
        return Settings(**settings)

    def show(self, settings: Settings) -> Values:
        """The update that makes the controls show these settings."""
        return {control: getattr(settings, name, False) for name, control in self.controls.items()}

    def follow(
        self, updates: Iterator[Update], settings: Settings, save: Callable[[list], list]
    ) -> Iterator[Values | Update]:
        """Shows previews and progress, then the files that `save(images)` returns, alone or with labels."""
        for update in updates:
            yield update
            if update.images:
                yield {self.gallery: update.images}
        files = save(update.images)
        text = f"{len(files)} picture{'s' * (len(files) > 1)} in {update.seconds:.1f} s, seed {settings.seed}."
        yield {self.gallery: files, self.controls["seed"]: settings.seed} | self.done(files[0], text, *update.notes)

    def done(self, file: str | tuple[str, str], *texts: str) -> Values:
        """The update that shows a status, and makes a file, alone or with its label, the one to download."""
        file = file if isinstance(file, str) else file[0]
        return {self.panel.status: message(*texts), self.download: gr.DownloadButton(value=file, interactive=True)}


def settings_controls(models: Models, count: int) -> dict[str, Component]:
    """The controls by setting, and "random_seed"."""

    def slider(name: str, label: str, value: float, step: float) -> gr.Slider:
        return gr.Slider(*BOUNDS[name], value, step=step, label=label)

    controls = {
        "prompt": gr.Textbox(label="Prompt", max_lines=4, placeholder="a red circle above a blue square"),
        "negative_prompt": gr.Textbox(label="Negative prompt (what to avoid)"),
        "model": gr.Dropdown(models.names, value=models.names[0], label="Model"),
    }
    with gr.Row():
        controls["steps"] = slider("steps", "Steps", 30, 1)
        controls["guidance"] = slider("guidance", "Guidance", 3.0, 0.5)
        controls["count"] = slider("count", "Pictures", count, 1)
        controls["strength"] = slider("strength", "Strength (1 redraws everything)", 0.6, 0.05)
    with gr.Row():
        controls["seed"] = gr.Number(0, label="Seed", precision=0)
        controls["random_seed"] = gr.Checkbox(label="Random seed")
    with gr.Accordion("More", open=False):
        controls["sampler"] = gr.Dropdown([("the model's own", ""), *SAMPLERS], value="", label="Sampler")
        controls["guidance_rescale"] = slider("guidance_rescale", "Guidance rescale", 0.0, 0.1)
        for side in ("width", "height"):
            controls[side] = gr.Number(0, label=f"{side.title()} in pixels (0: the model's)", precision=0)
    return controls


def gallery(name: str, label: str, height: int | None = 440) -> gr.Gallery:
    """A gallery that keeps its height while pictures come, and shows a click instead of enlarging the picture."""
    options = {"label": label, "elem_id": name, "elem_classes": "still", "height": height, "object_fit": "contain"}
    return gr.Gallery(format="png", interactive=False, allow_preview=False, buttons=[], **options)


def cached(image: Image.Image, gallery: gr.Gallery) -> str:
    """The file of a picture that a gallery shows in many updates: gradio would write a PIL image again at each of them,
    while a browser may be reading it."""
    return save_pil_to_cache(image, gallery.GRADIO_CACHE, format="png")


def message(*texts: str) -> str:
    """A status as HTML, a paragraph per text."""
    return "".join(f'<p role="status">{escape(text)}</p>' for text in texts)


def progress(update: Update) -> str:
    """A progress bar as HTML."""
    bar = f'<progress max="{update.steps}" value="{update.step}" aria-label="steps"></progress>'
    return f"<p>step {update.step} of {update.steps}, {update.seconds:.1f} s</p>{bar}"
