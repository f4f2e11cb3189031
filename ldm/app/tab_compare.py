"""Compare: one prompt and seed over values of one setting."""

from dataclasses import replace

import gradio as gr

from ldm.app import controls as ui
from ldm.app.models import Models
from ldm.app.sampling import Settings, picture_metadata, sample
from ldm.app.storage import Pictures
from ldm.config import UserError
from ldm.images import captioned_grid

LIMIT = 8  # values
SETTINGS = {
    "guidance": (float, "1, 2, 3, 5, 8"),
    "steps": (int, "5, 10, 20, 40"),
    "sampler": (str, "ddim, euler, dpmpp_2m, unipc"),
    "model": (str, ""),
    "guidance_rescale": (float, "0, 0.3, 0.7, 1"),
    "seed": (int, "0, 1, 2, 3, 4, 5"),
}


def build(models: Models, pictures: Pictures) -> None:
    """Builds the tab."""
    hint = "One picture per value, from one prompt and seed; to download as one picture."
    tab = ui.SamplingTab(models, "compare", "Compare", hint, leave_out=("count", "width", "height", "strength"))
    with tab.extras:
        name = gr.Dropdown(list(SETTINGS), value="guidance", label="Setting to compare")
        text = gr.Textbox(SETTINGS["guidance"][1], label=f"Values, up to {LIMIT}, separated by commas")

    def compare(values):
        settings = tab.settings(values)
        images, shown = [], []
        for label, variant in variants(settings, values[name], values[text]).items():
            update = yield from sample(models[variant.model], variant, preview_steps=())
            images += update.images
            shown.append((ui.cached(images[-1], tab.gallery), label))
            yield {tab.gallery: shown, tab.controls["seed"]: settings.seed}
        sheet = captioned_grid(images, [label for _, label in shown], columns=min(4, len(shown)), cell=200)
        more = {"compared": values[name], "values": values[text]}
        (file,) = pictures.save([sheet], picture_metadata(models[settings.model], settings, **more))
        yield tab.done(file, f"Done, with seed {settings.seed}.")

    name.change(lambda name: SETTINGS[name][1] or ", ".join(models.names[:LIMIT]), name, text, **ui.IMMEDIATE)
    tab.on(compare, [name, text])


def variants(settings: Settings, name: str, text: str) -> dict[str, Settings]:
    """{label: settings} per value in a comma-separated list. Raises UserError for values that the setting refuses."""
    words = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not 1 <= len(words) <= LIMIT:
        raise UserError(f"{len(words)} values to compare; write 1 to {LIMIT}, separated by commas")
    try:
        return {f"{name} {word}": replace(settings, **{name: SETTINGS[name][0](word)}) for word in words}
    except ValueError as error:
        raise UserError(f"no value of {name}: {error}") from None
