"""Make: a prompt becomes pictures that appear while they denoise."""

import gradio as gr

from ldm.app.sampling import restore
from ldm.app.workspace import IMMEDIATE, Workspace, message, only, user_errors


def build(ui: Workspace) -> None:
    """Builds the tab, and the restoring of settings."""
    folder = ui.pictures.folder
    with ui.tabs["make"]:
        gr.Markdown(f"Pictures and their settings are kept in {folder.parent.name}/{folder.name} until deleted.")
    with ui.results, gr.Column(elem_classes=only("make")):
        png = gr.File(label="Load settings from a PNG", file_types=[".png"], height=120, elem_id="make-file")

    def make(values):
        yield from ui.sample(values, ui.settings(values))

    @user_errors()
    def show(path):
        settings, notes = restore(path, ui.models)
        shown = {ui.controls[name]: value for name, value in vars(settings).items() if name != "count"}
        return shown | {ui.status: message(f"The settings of that picture, seed {settings.seed}.", *notes)}

    @user_errors()
    def reuse(path):
        return show(ui.pictures.find(path))

    ui.on_start("make", make)
    shown = {ui.status, *ui.controls.values()}
    ui.reuse.click(reuse, ui.download, shown, **IMMEDIATE)
    png.upload(show, png, shown, **IMMEDIATE).then(lambda: None, None, png, **IMMEDIATE)
