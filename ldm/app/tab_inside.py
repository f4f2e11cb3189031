"""Look inside: the way from noise to a picture, where each word looks, and the noise schedule."""

from collections.abc import Iterator

import gradio as gr
import numpy as np

from ldm.app import controls as ui
from ldm.app.attention import attention_maps, overlay, schedule_figure, word_maps
from ldm.app.models import Models
from ldm.app.sampling import sample

STRIP = 8  # pictures on the way


def build(models: Models) -> None:
    """Builds the tab."""
    with gr.Tab("Look inside", id="inside"), gr.Row():
        with gr.Column(scale=2, min_width=300):
            controls = ui.settings_controls(models, leave_out=("count", "width", "height", "strength"))
        with gr.Column(scale=3, min_width=300):
            panel = ui.Panel.build("inside", "Look", "Makes one picture and shows how it came about.")
            way = ui.picture_gallery("inside-way", "From noise to picture: the model's estimates on the way")
            words = ui.picture_gallery("inside-words", "Where each word looks: bright where cross-attention reads it")
            plot = gr.Plot(label="The noise schedule and the steps of the sampler", elem_id="inside-plot")

    def look(values: dict) -> Iterator[dict]:
        settings = ui.read_settings(controls, values)
        pipe = models[settings.model]
        shown = set(np.linspace(0, settings.steps - 1, STRIP).round().astype(int).tolist())
        estimates = []
        with attention_maps(pipe) as maps:
            for update in sample(pipe, settings, preview_steps=shown):
                if update.images and not update.done:
                    estimates.append((update.images[0], f"t = {update.t:.0f}"))
                yield {panel.status: ui.progress(update)}
        (image,) = update.images
        heats = word_maps(maps, pipe, settings.prompt, image.size)
        yield {
            panel.status: "".join(map(ui.message, [f"Seed {settings.seed}.", *update.notes])),
            controls["seed"]: settings.seed,
            way: estimates,
            words: [(image, "the picture"), *((overlay(image, heat), word) for word, heat in heats)],
            plot: schedule_figure(pipe.schedule, settings.sampler or pipe.schedule.config.sampler, settings.steps),
        }

    triggers = [panel.start.click, controls["prompt"].submit]
    panel.on(triggers, look, controls.values(), [controls["seed"], way, words, plot])
