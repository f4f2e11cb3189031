"""Look inside: the way from noise to a picture, where each word looks, and the noise schedule."""

import gradio as gr

from ldm.app import controls as ui
from ldm.app.attention import attention_maps, schedule_figure, word_overlays
from ldm.app.models import Models
from ldm.app.sampling import picture_metadata, sample
from ldm.app.storage import Pictures

ESTIMATES = 8


def build(models: Models, pictures: Pictures) -> None:
    """Builds the tab."""
    hint = "Shows the model's estimates on the way from noise to a picture."
    tab = ui.SamplingTab(models, "inside", "Look", hint, leave_out=("count", "width", "height", "strength"))
    with tab.results:
        words = ui.gallery("inside-words", "Where each word looks: bright where cross-attention reads it", None)
        plot = gr.Plot(show_label=False, elem_id="inside-plot")

    def look(values):
        settings = tab.settings(values)
        pipe = models[settings.model]
        estimates = []
        shown = {round(i * (settings.steps - 1) / ESTIMATES) for i in range(ESTIMATES)}
        with attention_maps(pipe) as maps:
            for update in sample(pipe, settings, preview_steps=shown):
                yield update
                if update.images:
                    estimates.append((ui.cached(update.images[0], tab.gallery), f"t = {update.t:.0f}"))
                    yield {tab.gallery: estimates}
        (image,) = update.images
        (file,) = pictures.save([image], picture_metadata(pipe, settings))
        yield tab.done(file, f"Seed {settings.seed}.", *update.notes) | {
            tab.gallery: [*estimates[:-1], (file, "the picture")],
            tab.controls["seed"]: settings.seed,
            words: word_overlays(maps, pipe, settings.prompt, image),
            plot: schedule_figure(pipe.schedule, settings.sampler or pipe.schedule.config.sampler, settings.steps),
        }

    tab.on(look, outputs=[words, plot])
