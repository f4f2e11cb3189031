"""Make: a prompt becomes pictures that appear while they denoise."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from ldm.app.desk import Desk, begins, stops
from ldm.app.parts import QUIET, Controls, controls, finished, pictures, said, shown
from ldm.app.studio import about_picture, changed, make, restore
from ldm.config import UserError

KEPT = 60  # pictures of a session's history
# The browser's tab keeps the names of its pictures, so that a reload does not lose them.
REMEMBER = "names => { if (names?.length) sessionStorage.setItem('history', JSON.stringify(names)); }"
RECALL = "() => [JSON.parse(sessionStorage.getItem('history') || '[]')]"


class Making:
    """What the tab does."""

    def __init__(self, desk: Desk, given: Controls) -> None:
        """`given` are the settings of the pictures."""
        self.desk, self.given = desk, given

    def run(self, request: gr.Request, history: list[str], *values: Any) -> Iterator[tuple]:
        """Previews, then the pictures, which go to the history."""
        still = (gr.skip(),) * 3
        try:
            with self.desk.working(request, "make") as stop:
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
                    text = finished(update, settings.count, settings.seed)
                    first = gr.DownloadButton(value=files[0], interactive=True) if files else gr.skip()
                    past = self.past([*(Path(file).name for file in files), *history]) if files else still[:2]
                    yield (files or gr.skip(), text, settings.seed, *past, first)
        except UserError as error:
            yield gr.skip(), said(str(error), wrong=True), gr.skip(), *still

    def past(self, names: Any) -> tuple[list[str], list[str]]:
        """The names and the files of a history, as far as they are still here."""
        there = self.desk.still_there(names)[:KEPT]
        return there, [str(self.desk.pictures / name) for name in there]

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


def build(desk: Desk, page: gr.Blocks) -> tuple[gr.Button, gr.DownloadButton, gr.HTML]:
    """The tab, inside the page's tabs; gives the button that takes the chosen picture to Edit, what holds that picture,
    and where something can be said."""
    with gr.Tab("Make", id="make"), gr.Row():
        with gr.Column(scale=2, min_width=300):
            given = controls(desk.models, leave_out=("strength",))
            with gr.Row():
                go = gr.Button("Make", variant="primary", elem_id="make-go")
                halt = gr.Button("Stop", elem_id="make-stop")
            status = gr.HTML(said("Write a prompt and press Make."), elem_classes="status", elem_id="make-status")
        with gr.Column(scale=3, min_width=300):
            gallery = pictures("Pictures (click one to reuse its settings)", "make-pictures", 440)
            with gr.Row():
                download = gr.DownloadButton("Download the chosen picture", interactive=False, elem_id="make-download")
                edit = gr.Button("Edit it", elem_id="make-edit")
            history = gr.JSON([], visible="hidden", elem_id="make-names")
            past = pictures("History of this session", "make-history", 220, columns=6)
            label = "Restore settings from a PNG made here"
            file = gr.File(label=label, file_types=[".png"], height=160, elem_id="make-file")

    making = Making(desk, given)
    outputs = [gallery, status, given.parts["seed"], history, past, download]
    work = {"fn": making.run, "inputs": [history, *given.inputs], "outputs": outputs}
    begins(desk, "make", [go.click, given.parts["prompt"].submit], work, status)
    stops(desk, "make", halt, status)
    for shelf in (gallery, past):
        shelf.select(making.choose, None, [status, *given.inputs, download], **QUIET)
    # afterwards there is room for another
    file.upload(making.dropped, file, [status, *given.inputs], **QUIET).then(lambda: None, None, file, **QUIET)
    history.change(None, history, None, js=REMEMBER, **QUIET)
    page.load(making.past, history, [history, past], js=RECALL, **QUIET)
    return edit, download, status
