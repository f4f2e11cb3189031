"""Make: a prompt becomes pictures that appear while they denoise."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from ldm.app.parts import QUIET, Controls, Desk, begins, controls, finished, pictures, said, shown, stops
from ldm.app.studio import about_picture, changed, make, restore
from ldm.config import UserError

KEPT = 60  # pictures of a session's history


class Making:
    """What the tab does."""

    def __init__(self, desk: Desk, given: Controls) -> None:
        self.desk, self.given = desk, given

    def run(self, request: gr.Request, history: list[str], *values: Any) -> Iterator[tuple]:
        """Previews, then the pictures, which go to the history."""
        still = (gr.skip(),) * 3
        stop = self.desk.event(request, "make")
        try:
            settings = self.given.read(values)
            if not settings.cleaned().prompt:
                raise UserError("the prompt is empty; write what the picture should show")
            pipe = self.desk.models[settings.model]
            for update in make(pipe, settings, stop):
                if not (update.done or update.stopped):
                    yield (update.images or gr.skip(), shown(update), settings.seed, *still)
                    continue
                about = [about_picture(pipe, settings, i) for i in range(len(update.images))]
                files = [self.desk.keep(image, a) for image, a in zip(update.images, about, strict=True)]
                history = (files + history)[:KEPT]
                text = finished(update, settings.count, settings.seed)
                first = gr.DownloadButton(value=files[0], interactive=True) if files else gr.skip()
                yield files or gr.skip(), text, settings.seed, history, history, first
        except UserError as error:
            yield gr.skip(), said(str(error), wrong=True), gr.skip(), *still

    def restored(self, path: str) -> list[Any]:
        """The controls as a picture's settings have them, and a word on it."""
        try:
            settings, notes = restore(path, self.desk.models)
        except UserError as error:
            return [said(str(error), wrong=True), *([gr.skip()] * len(self.given.inputs))]
        kept = changed(settings, count=1)
        text = "".join(said(note) for note in notes)
        return [said("These are the settings of that picture, for one picture.") + text, *self.given.show(kept)]

    def choose(self, chosen: gr.SelectData) -> list[Any]:
        """Restores a picture that was clicked on, and offers it for download."""
        try:
            path = self.desk.own(str(chosen.value["image"]["path"]))
        except UserError as error:
            return [said(str(error), wrong=True), *([gr.skip()] * (1 + len(self.given.inputs)))]
        return [*self.restored(path), gr.DownloadButton(value=path, interactive=True)]

    def dropped(self, path: str | None) -> list[Any]:
        """Restores a picture that was dropped."""
        return self.restored(path) if path else [gr.skip()] * (1 + len(self.given.inputs))


def build(desk: Desk) -> tuple[gr.Button, gr.DownloadButton]:
    """The tab, inside the page's tabs; gives the button that takes the chosen picture to Edit, and what holds that."""
    with gr.Tab("Make", id="make"):
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                given = controls(desk, leave_out=("strength",))
                with gr.Row():
                    go = gr.Button("Make", variant="primary", elem_id="make-go")
                    halt = gr.Button("Stop", elem_id="make-stop")
                status = gr.HTML(said("Write a prompt and press Make."), elem_classes="status", elem_id="make-status")
                file = gr.File(
                    label="Drop a PNG that was made here to restore its settings",
                    file_types=[".png"],
                    height=160,
                    elem_id="make-file",
                )
            with gr.Column(scale=3, min_width=300):
                gallery = pictures("Pictures (click one to reuse its settings)", "make-pictures", 440)
                with gr.Row():
                    download = gr.DownloadButton(
                        "Download the chosen picture", interactive=False, elem_id="make-download"
                    )
                    edit = gr.Button("Edit it", elem_id="make-edit")
                history = gr.State([])
                past = pictures("History of this session", "make-history", 220, columns=6)

        making = Making(desk, given)
        outputs = [gallery, status, given.parts["seed"], history, past, download]
        work = {"fn": making.run, "inputs": [history, *given.inputs], "outputs": outputs}
        begins(desk, "make", [go.click, given.parts["prompt"].submit], work, status)
        stops(desk, "make", halt, status)
        for shelf in (gallery, past):
            shelf.select(making.choose, None, [status, *given.inputs, download], **QUIET)
        file.upload(making.dropped, file, [status, *given.inputs], **QUIET)
    return edit, download
