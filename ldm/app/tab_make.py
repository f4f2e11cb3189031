"""Make: a prompt becomes pictures that appear while they denoise."""

import gradio as gr

from ldm.app import controls as ui
from ldm.app.models import Models
from ldm.app.sampling import picture_metadata, restore, sample
from ldm.app.storage import Pictures

HISTORY = 60  # pictures


def build(models: Models, pictures: Pictures, page: gr.Blocks) -> tuple[gr.Button, gr.DownloadButton]:
    """Builds the tab; returns the button that takes a picture to Edit, and the one that holds the chosen picture."""
    tab = ui.SamplingTab(models, "make", "Make", "Write a prompt and press Make.", ("strength",), count=4)
    with tab.results:
        gr.Markdown(f"""Click a picture to restore its settings; downloaded pictures contain theirs. All are kept in the
            output folder ({pictures.folder.parent.name}/{pictures.folder.name}) until somebody deletes them.""")
        edit = gr.Button("Edit the chosen picture", elem_id="make-edit")
        history = ui.gallery("make-history", "History of this browser", 220)
        names = gr.BrowserState([], storage_key="ldm-history", secret="ldm")
        png = gr.File(label="Restore settings from a PNG", file_types=[".png"], height=160, elem_id="make-file")

    def make(values):
        settings = tab.settings(values)
        pipe = models[settings.model]
        past = pictures.existing(values[names])

        def save(images):
            files = pictures.save(images, picture_metadata(pipe, settings))
            past[:0] = files
            return files

        yield from tab.follow(sample(pipe, settings), settings, save)
        yield dict.fromkeys((history, names), past[:HISTORY])

    @ui.user_errors()
    def show(path):
        settings, notes = restore(path, models)
        return tab.show(settings) | tab.done(path, "The settings of that picture, for one picture.", *notes)

    @ui.user_errors()
    def choose(event: gr.SelectData):
        return show(pictures.find(event.value["image"]["path"]))

    tab.on(make, [names], [history, names])
    shown = {tab.panel.status, tab.download, *tab.controls.values()}
    for gallery in (tab.gallery, history):
        gallery.select(choose, None, shown, **ui.IMMEDIATE)
    png.upload(show, png, shown, **ui.IMMEDIATE).then(lambda: None, None, png, **ui.IMMEDIATE)
    page.load(pictures.existing, names, history, **ui.IMMEDIATE)
    return edit, tab.download
