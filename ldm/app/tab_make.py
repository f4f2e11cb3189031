"""Make: a prompt becomes pictures that appear while they denoise."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from ldm.app import controls as ui
from ldm.app.models import Models
from ldm.app.sampling import picture_metadata, restore, sample
from ldm.app.storage import Pictures

HISTORY = 60  # pictures


def build(models: Models, pictures: Pictures, page: gr.Blocks) -> tuple[gr.Button, gr.DownloadButton]:
    """Builds the tab; returns the button that takes a picture to Edit, and the one that holds the chosen picture."""
    with gr.Tab("Make", id="make"), gr.Row():
        with gr.Column(scale=2, min_width=300):
            controls = ui.settings_controls(models, leave_out=("strength",))
            panel = ui.Panel.build("make", "Make", "Write a prompt and press Make.")
        with gr.Column(scale=3, min_width=300):
            results = ui.Results.build("make", "Pictures (click one to restore its settings)")
            edit = gr.Button("Edit the chosen picture", elem_id="make-edit")
            history = ui.picture_gallery("make-history", "History of this browser")
            names = gr.BrowserState([], storage_key="ldm-history", secret="ldm")
            png = gr.File(label="Restore settings from a PNG", file_types=[".png"], height=160, elem_id="make-file")

    def make(values: dict) -> Iterator[dict]:
        settings = ui.read_settings(controls, values)
        pipe = models[settings.model]
        for update in results.follow(
            panel,
            sample(pipe, settings),
            lambda images: pictures.save(images, picture_metadata(pipe, settings)),
        ):
            yield update | {controls["seed"]: settings.seed}
        past = pictures.existing([*update[results.gallery], *values[names]])[:HISTORY]
        yield {history: past, names: past}

    @ui.user_errors()
    def show(path: str) -> dict:
        settings, notes = restore(path, models)
        text = "".join(map(ui.message, ["The settings of that picture, for one picture.", *notes]))
        return {panel.status: text} | ui.show_settings(controls, settings)

    @ui.user_errors()
    def choose(event: gr.SelectData) -> dict:
        path = pictures.find(event.value["image"]["path"])
        return show(path) | {results.download: gr.DownloadButton(value=path, interactive=True)}

    shown: set[Any] = {panel.status, *controls.values()}
    outputs = [results.gallery, results.download, controls["seed"], history, names]
    panel.on([panel.start.click, controls["prompt"].submit], make, [names, *controls.values()], outputs)
    for gallery in (results.gallery, history):
        gallery.select(choose, None, shown | {results.download}, **ui.IMMEDIATE)
    png.upload(show, png, shown, **ui.IMMEDIATE).then(lambda: None, None, png, **ui.IMMEDIATE)
    page.load(pictures.existing, names, history, **ui.IMMEDIATE)
    return edit, results.download
