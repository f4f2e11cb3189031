"""The parts of the page that all tabs share: settings, start and stop, progress, the gallery."""

import secrets
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from html import escape
from typing import Any

import gradio as gr
from gradio.components import Component

from ldm.app.models import Models
from ldm.app.pictures import Pictures
from ldm.app.sampling import BOUNDS, INTERVAL, Settings, picture_metadata, sample
from ldm.config import UserError
from ldm.pipeline import Pipeline, Progress
from ldm.samplers import SAMPLERS

Values = dict[Component, Any]  # of the page's components
Components = Iterable[Component]
Events = Generator[Values | Progress | str, None, Any]
Handler = Callable[[Values], Events]
SAMPLING = {"generate": "Generate", "edit": "Edit", "compare": "Compare", "inside": "Look inside"}
TABS = SAMPLING | {"judge": "Judge"}
SLIDERS = {  # label, step, tabs
    "count": ("Pictures", 1, ("generate", "edit")),
    "steps": ("Steps", 1, SAMPLING),
    "guidance": ("Guidance", 0.5, SAMPLING),
    "strength": ("Strength (1 redraws everything)", 0.05, ("edit",)),
    "guidance_rescale": ("Guidance rescale", 0.1, SAMPLING),
    "width": ("Width (0: model default)", 8, ("generate", "compare")),
    "height": ("Height (0: model default)", 8, ("generate", "compare")),
    "adapter_weight": ("Adapter weight", 0.05, SAMPLING),
}
HISTORY = 60  # pictures
QUEUE = 32  # runs at a time, all but the first in line
IMMEDIATE = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}


class Workspace:
    """`tabs` and `results` are the columns where a tab adds its inputs and its outputs. The picture that the gallery
    marks is the one that Download, Edit and the others take: `marked()` of the page's script reads it at the click."""

    def __init__(self, models: Models, pictures: Pictures) -> None:
        self.models, self.pictures, sampling = models, pictures, only(*SAMPLING)
        self.line: list[tuple[str, threading.Event]] = []  # each run's browser and stop; the first one samples
        with gr.Row(elem_classes="columns"):
            with gr.Column(scale=2, min_width=300):
                with gr.Tabs() as self.tab_bar:
                    self.tabs = {name: gr.Tab(label, id=name) for name, label in TABS.items()}
                self.prompt = gr.Textbox(
                    label="Prompt", placeholder="Describe a picture", max_lines=4, elem_classes=sampling
                )
                with gr.Row():
                    self.buttons = {
                        name: gr.Button(
                            label, variant="primary", elem_id=f"{name}-start", elem_classes=f"start {only(name)}"
                        )
                        for name, label in TABS.items()
                    }
                    self.stop = gr.Button("Stop (Esc)", elem_id="stop")
                self.status = gr.HTML(message(""), elem_id="status")
                self.examples = gr.Dataset(
                    components=[self.prompt],
                    samples=models.examples(models.names[0]),
                    label="Examples",
                    elem_id="examples",
                    elem_classes=only("generate"),
                )
                with gr.Column(elem_classes=f"settings {sampling}"):
                    self.controls = settings_controls(models) | {"prompt": self.prompt}
            with gr.Column(scale=3, min_width=300) as self.results, gr.Column(elem_classes=sampling):
                self.gallery = gr.Gallery(  # a click marks a picture instead of enlarging it
                    label="Pictures of this browser, newest first",
                    format="png",
                    interactive=False,
                    allow_preview=False,
                    buttons=[],
                    object_fit="contain",
                    elem_id="pictures",
                )
                with gr.Row(elem_classes="taking"):
                    enlarge, download, self.edit, self.reuse, same = (
                        gr.Button(label, size="sm", min_width=80, elem_id=label.split()[0].lower())
                        for label in ("Enlarge", "Download", "Edit", "Use these settings", "Same seed")
                    )
        self.marked = gr.Textbox(visible=False)  # the file's name, from the script
        self.history = gr.BrowserState([], storage_key="ldm-history", secret="ldm")
        controls = [*self.controls.values()]
        key = " ".join(["ldm", *models.names, *models.adapters, *self.controls])  # kept values are of these
        self.kept = gr.BrowserState([control.value for control in controls], storage_key=key, secret="ldm")
        enlarge.click(None, js="enlarge", **IMMEDIATE)
        download.click(None, js="download", **IMMEDIATE)
        same.click(None, None, self.controls["seed"], js="() => marked().split('-').at(-2)", **IMMEDIATE)

    def on_start(self, tab: str, handler: Handler, inputs: Components = (), outputs: Components = ()) -> None:
        """Runs a tab's handler at its button, one in all browsers at a time, until it ends or Stop is pressed. It
        receives the settings and `inputs`, and yields steps of a sampling, a status, or new values of components."""

        def run(values: Values, request: gr.Request) -> Iterator[Values]:
            yield {self.gallery: gr.Gallery(selected_index=None), self.status: busy("Starting.")}
            try:
                for shown in self.in_line(handler, values, request):
                    if isinstance(shown, Progress):
                        preview = {self.gallery: shown.decode()} if tab in SAMPLING else {}
                        text = f"Step {shown.step + 1} of {shown.steps}."
                        shown = {self.status: busy(text, shown.step + 1, shown.steps)} | preview
                    elif isinstance(shown, str):
                        shown = {self.status: busy(shown)}
                    yield shown
            except UserError as error:
                yield {self.status: message(str(error)), self.gallery: self.earlier(values[self.history])}

        inputs = {self.history, *self.controls.values(), *inputs}
        outputs = {self.status, self.gallery, self.history, *outputs}
        queued = IMMEDIATE | {"concurrency_limit": QUEUE, "concurrency_id": "model"}
        self.buttons[tab].click(run, inputs, outputs, **queued)

    def in_line(self, handler: Handler, values: Values, request: gr.Request) -> Events:
        """The events of a handler once the runs before it have ended. Raises UserError where Stop is pressed."""
        stopped = threading.Event()
        self.line.append((request.session_hash, stopped))
        try:
            while place := [event for _, event in self.line].index(stopped):
                yield {self.status: busy(f"Number {place + 1} in line.")}
                if stopped.wait(INTERVAL):
                    raise UserError("Stopped.")
            with closing(handler(values)) as events:
                for shown in events:
                    if stopped.is_set():
                        raise UserError("Stopped.")
                    yield shown
        finally:
            self.line.remove((request.session_hash, stopped))

    def on_marked(self, button: gr.Button, handler: Callable[[str], Values], outputs: Components) -> None:
        """Calls the handler with the path of the marked picture."""
        find = self.user_errors(lambda name: handler(self.pictures.find(name)))
        button.click(find, self.marked, {self.status, *outputs}, js="marked", **IMMEDIATE)

    def user_errors(self, handler: Callable[..., Values]) -> Callable[..., Values]:
        """The handler, with a UserError shown as the status."""

        def shown(*values: Any) -> Values:
            try:
                return handler(*values)
            except UserError as error:
                return {self.status: message(str(error))}

        return shown

    def connect(self, page: gr.Blocks) -> None:
        """Adds the events that all tabs share, after `on_start` of each."""

        def stop(request: gr.Request):
            for session, stopped in self.line:
                if session == request.session_hash:
                    stopped.set()

        def examples(model):
            return gr.Dataset(samples=self.models.examples(model))

        def defaults(model):
            return {self.controls[name]: value for name, value in self.models.defaults(model).items()}

        controls = [*self.controls.values()]
        page.load(self.earlier, self.history, self.gallery, **IMMEDIATE)
        page.load(None, self.kept, controls, js="values => values", **IMMEDIATE)
        gr.on([c.change for c in controls], None, controls, self.kept, js="(...values) => [values]", **IMMEDIATE)
        self.stop.click(stop, queue=False, **IMMEDIATE)
        self.controls["model"].change(examples, self.controls["model"], self.examples, **IMMEDIATE)
        asked = self.controls["steps"], self.controls["guidance"]
        self.controls["model"].input(
            self.user_errors(defaults), self.controls["model"], {self.status, *asked}, **IMMEDIATE
        )
        self.examples.click(lambda sample: sample[0], self.examples, self.prompt, **IMMEDIATE)
        self.prompt.submit(None, js="() => shown('.start').click()", **IMMEDIATE)
        for name, tab in self.tabs.items():
            tab.select(None, js=f"() => {{ document.documentElement.dataset.tab = '{name}' }}", **IMMEDIATE)

    def earlier(self, files: Sequence[str], **options: Any) -> gr.Gallery:
        """The gallery of finished pictures, each with its prompt."""
        return gr.Gallery(self.pictures.captioned(files), **{"selected_index": None} | options)

    def settings(self, values: Values, **changes: Any) -> Settings:
        """The settings that the page sent. Raises UserError for values out of bounds."""
        settings = {name: values[control] for name, control in self.controls.items()} | changes
        if settings["seed"] == -1:
            settings["seed"] = secrets.randbelow(BOUNDS["seed"][1] + 1)
        return Settings(**settings)

    def pipeline(self, settings: Settings) -> Pipeline:
        """The model with the adapters of the settings."""
        return self.models.merged(settings.model, settings.adapters, settings.adapter_weight)

    def sample(
        self, values: Values, settings: Settings, metadata: dict[str, Any] | None = None, **arguments: Any
    ) -> Events:
        """Samples with further arguments of `sampling.sample`, keeps the pictures with further metadata, shows them
        before the earlier ones, and marks the first. Returns the files and the images."""
        pipe = self.pipeline(settings)
        images, notes = yield from sample(pipe, settings, **arguments)
        files = self.pictures.save(images, picture_metadata(pipe, settings, **metadata or {}))
        values[self.history] = [*files, *self.pictures.existing(values[self.history])][:HISTORY]
        text = f"{len(files)} picture{'s' * (len(files) > 1)}, seed {settings.seed}."
        yield {
            self.status: message(text, *notes),
            self.gallery: self.earlier(values[self.history], selected_index=0),
            self.history: values[self.history],
        }
        return files, images


def settings_controls(models: Models) -> dict[str, Component]:
    """The controls by setting, without the prompt."""
    values = {name: getattr(Settings, name) for name in SLIDERS} | models.defaults(models.names[0])

    def slider(name: str) -> gr.Slider:
        label, step, tabs = SLIDERS[name]
        default, look = values[name], {"elem_id": f"setting-{name}", "elem_classes": only(*tabs)}
        return gr.Slider(*BOUNDS[name], default, step=step, label=label, **look)

    first, more = list(SLIDERS)[:4], list(SLIDERS)[4:]
    controls: dict[str, Component] = {}
    with gr.Row():
        controls["model"] = gr.Dropdown(models.names, value=models.names[0], label="Model", elem_id="setting-model")
        controls["seed"] = gr.Number(-1, label="Seed (-1: random)", precision=0, elem_id="setting-seed")
        controls |= {name: slider(name) for name in first}
        controls["negative_prompt"] = gr.Textbox(label="Negative prompt (what to avoid)")
    with gr.Accordion("More settings", open=False), gr.Row():
        samplers = [("Model default", ""), *SAMPLERS]
        controls["sampler"] = gr.Dropdown(samplers, value="", label="Sampler", elem_id="setting-sampler")
        controls |= {name: slider(name) for name in more[:-1]}
        with gr.Row(visible=bool(models.adapters)):
            controls["adapters"] = gr.Dropdown([*models.adapters], value=[], multiselect=True, label="Adapters")
            controls["adapter_weight"] = slider("adapter_weight")
    return controls


def only(*tabs: str) -> str:
    """The classes of an element that is shown on these tabs alone."""
    return " ".join(["only", *(f"on-{tab}" for tab in tabs)])


def message(*texts: str) -> str:
    """A status as HTML, a paragraph per text."""
    return "".join(f'<p role="status">{escape(text[:1].upper() + text[1:])}</p>' for text in texts)


def busy(text: str, step: int | None = None, steps: int = 1) -> str:
    """A status with a progress bar, at `step` if that is known."""
    value = "" if step is None else f' value="{step}"'
    return f'{message(text)}<progress max="{steps}"{value} aria-label="{text}"></progress>'
