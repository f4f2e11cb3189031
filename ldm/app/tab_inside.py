"""Look inside: the way from noise to a picture, and where each word looks."""

import gradio as gr

from ldm.app.attention import attention_maps, word_overlays
from ldm.app.workspace import Workspace, gallery, only

ESTIMATES = 8


def build(ui: Workspace) -> None:
    """Builds the tab."""
    with ui.tabs["inside"]:
        gr.Markdown("The model's estimates on the way from noise to a picture, and where each word looks.")
    with ui.results, gr.Column(elem_classes=only("inside")):
        words = gallery("inside-words", "Where each word looks: bright where cross-attention reads it")

    def look(values):
        settings, steps = ui.settings(values, count=1, width=0, height=0), []
        pipe = ui.models[settings.model]
        with attention_maps(pipe) as maps:
            files, images = yield from ui.sample(values, settings, kept=steps)
        shown = [steps[round(i * (len(steps) - 1) / ESTIMATES)] for i in range(ESTIMATES)]
        estimates = [(*step.decode(), f"t = {step.t:.0f}") for step in shown]
        yield {
            ui.gallery: gr.Gallery([(*files, "the picture"), *estimates], selected_index=0),
            words: word_overlays(maps, pipe.tokenizer, settings.prompt, *images),
        }

    ui.on_start("inside", look, outputs=[words])
