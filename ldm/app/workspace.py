"""The parts of the page that all tabs share: settings, start and stop, progress, the gallery."""

import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import gradio as gr
from gradio.components import Component

from ldm.app.models import Models
from ldm.app.pictures import Pictures
from ldm.app.sampling import BOUNDS, Settings, picture_metadata, sample
from ldm.config import UserError
from ldm.pipeline import Progress
from ldm.samplers import SAMPLERS

Values = dict[Component, Any]  # of the page's components
Components = Iterable[Component]
Events = Iterator[Values | Progress]
Handler = Callable[[Values], Events]
SAMPLING = {"make": "Make", "edit": "Edit", "compare": "Compare", "inside": "Look inside"}
TABS = SAMPLING | {"judge": "Judge"}
SLIDERS = {  # label, step, tabs
    "steps": ("Steps", 1, SAMPLING),
    "guidance": ("Guidance", 0.5, SAMPLING),
    "count": ("Pictures", 1, ("make", "edit")),
    "strength": ("Strength (1 redraws everything)", 0.05, ("edit",)),
    "guidance_rescale": ("Guidance rescale", 0.1, SAMPLING),
    "width": ("Width (0: model default)", 8, ("make", "compare")),
    "height": ("Height (0: model default)", 8, ("make", "compare")),
}
HISTORY = 60  # pictures
IMMEDIATE = {"concurrency_limit": None, "show_progress": "hidden"}


class Workspace:
    """`tabs` and `results` are the columns where a tab adds its inputs and its outputs."""

    def __init__(self, models: Models, pictures: Pictures) -> None:
        self.models, self.pictures, self.starts, sampling = models, pictures, [], only(*SAMPLING)
        with gr.Row(elem_classes="columns"):
            with gr.Column(scale=2, min_width=300):
                with gr.Tabs() as self.tab_bar:
                    self.tabs = {name: gr.Tab(label, id=name) for name, label in TABS.items()}
                self.prompt = gr.Textbox(label="Prompt", max_lines=4, elem_classes=sampling)
                with gr.Row():
                    self.buttons = {
                        name: gr.Button(
                            label, variant="primary", elem_id=f"{name}-start", elem_classes=f"start {only(name)}"
                        )
                        for name, label in TABS.items()
                    }
                    self.stop = gr.Button("Stop", elem_id="stop")
                self.status = gr.HTML(message(""), elem_id="status")
                with gr.Row(elem_classes=f"settings {sampling}"):
                    self.controls = settings_controls(models) | {"prompt": self.prompt}
            with gr.Column(scale=3, min_width=300) as self.results, gr.Column(elem_classes=sampling):
                self.gallery = gr.Gallery(  # a click chooses a picture instead of enlarging it
                    label="Pictures of this browser, newest first",
                    format="png",
                    interactive=False,
                    allow_preview=False,
                    buttons=[],
                    object_fit="contain",
                    elem_id="pictures",
                )
                with gr.Row():
                    self.download = gr.DownloadButton("Download", interactive=False, elem_id="download")
                    self.edit = gr.Button("Edit this picture", elem_id="edit")
                    self.reuse = gr.Button("Use its settings", elem_id="reuse")
        self.history = gr.BrowserState([], storage_key="ldm-history", secret="ldm")

    def on_start(self, tab: str, handler: Handler, inputs: Components = (), outputs: Components = ()) -> None:
        """Runs a tab's handler at its button, one in all browsers at a time, until it ends or Stop is pressed. It
        receives the settings and `inputs`, and yields steps of a sampling and new values of components."""

        def run(values: Values) -> Iterator[Values]:
            with user_errors():
                yield self.choose() | {self.gallery: gr.Gallery(selected_index=None)}
                for shown in handler(values):
                    if isinstance(shown, Progress):
                        preview = {self.gallery: shown.decode()} if tab in SAMPLING else {}
                        shown = {self.status: progress_bar(shown)} | preview
                    yield shown

        inputs = {self.history, *self.controls.values(), *inputs}
        outputs = {self.status, self.gallery, self.download, self.history, *outputs}
        shown = {"show_progress": "minimal", "show_progress_on": self.status}
        self.starts += [self.buttons[tab].click(run, inputs, outputs, concurrency_id="model", **shown)]

    def connect(self, page: gr.Blocks) -> None:
        """Adds the events that all tabs share, after `on_start` of each."""

        def stop(files):
            return message("Stopped."), self.pictures.existing(files)

        def select(event: gr.SelectData):
            return self.choose(*self.pictures.existing([event.value["image"]["path"]]))

        page.load(self.pictures.existing, self.history, self.gallery, **IMMEDIATE)
        self.stop.click(stop, self.history, [self.status, self.gallery], cancels=self.starts, **IMMEDIATE)
        self.gallery.select(select, None, {self.download}, **IMMEDIATE)
        self.prompt.submit(None, js="() => [...document.querySelectorAll('.start')].find(b => b.offsetParent).click()")
        for name, tab in self.tabs.items():
            tab.select(None, js=f"() => {{ document.documentElement.dataset.tab = '{name}' }}")

    def settings(self, values: Values, **changes: Any) -> Settings:
        """The settings that the page sent. Raises UserError for values out of bounds."""
        settings = {name: values[control] for name, control in self.controls.items()} | changes
        if settings["seed"] == -1:
            settings["seed"] = secrets.randbelow(BOUNDS["seed"][1] + 1)
        return Settings(**settings)

    def sample(
        self, values: Values, settings: Settings, metadata: dict[str, Any] | None = None, **arguments: Any
    ) -> Events:
        """Samples with further arguments of `sampling.sample`, keeps the pictures with further metadata, shows them
        before the earlier ones, and chooses the first. Returns the files and the images."""
        pipe = self.models[settings.model]
        images, notes = yield from sample(pipe, settings, **arguments)
        files = self.pictures.save(images, picture_metadata(pipe, settings, **metadata or {}))
        values[self.history] = [*files, *self.pictures.existing(values[self.history])][:HISTORY]
        text = f"{len(files)} picture{'s' * (len(files) > 1)}, seed {settings.seed}."
        yield {
            self.status: message(text, *notes),
            self.gallery: gr.Gallery(values[self.history], selected_index=0),
            self.history: values[self.history],
        } | self.choose(files[0])
        return files, images

    def choose(self, file: str | None = None) -> Values:
        """Makes a finished picture the one that Download, Edit and Use its settings take."""
        return {self.download: gr.DownloadButton(value=file, interactive=file is not None)}


def settings_controls(models: Models) -> dict[str, Component]:
    """The controls by setting, without the prompt."""
    controls: dict[str, Component] = {
        "model": gr.Dropdown(models.names, value=models.names[0], label="Model"),
        "seed": gr.Number(-1, label="Seed (-1: random)", precision=0),
    }
    for name, (label, step, tabs) in SLIDERS.items():
        default = getattr(Settings, name)
        controls[name] = gr.Slider(*BOUNDS[name], default, step=step, label=label, elem_classes=only(*tabs))
    controls["sampler"] = gr.Dropdown([("Model default", ""), *SAMPLERS], value="", label="Sampler")
    controls["negative_prompt"] = gr.Textbox(label="Negative prompt (what to avoid)")
    return controls


def only(*tabs: str) -> str:
    """The classes of an element that is shown on these tabs alone."""
    return " ".join(["only", *(f"on-{tab}" for tab in tabs)])


def message(*texts: str) -> str:
    """A status as HTML, a paragraph per text."""
    return "".join(f'<p role="status">{escape(text)}</p>' for text in texts)


def progress_bar(progress: Progress) -> str:
    """A step as HTML."""
    text = f"step {progress.step + 1} of {progress.steps}"
    return f'<p>{text}</p><progress max="{progress.steps}" value="{progress.step + 1}" aria-label="{text}"></progress>'


@contextmanager
def user_errors() -> Iterator[None]:
    """Shows a UserError as a message in the page."""
    try:
        yield
    except UserError as error:
        raise gr.Error(escape(str(error)), print_exception=False) from None
