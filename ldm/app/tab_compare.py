"""Compare: one prompt and seed over values of one setting."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import gradio as gr

from ldm.app import controls as ui
from ldm.app.models import Models
from ldm.app.sampling import Settings, picture_metadata, sample
from ldm.app.storage import Pictures
from ldm.config import UserError
from ldm.images import captioned_grid

LIMIT = 8  # values
SETTINGS: dict[str, tuple[Callable[[str], Any], str]] = {
    "guidance": (float, "1, 2, 3, 5, 8"),
    "steps": (int, "5, 10, 20, 40"),
    "sampler": (str, "ddim, euler, dpmpp_2m, unipc"),
    "model": (str, ""),
    "guidance_rescale": (float, "0, 0.3, 0.7, 1"),
    "seed": (int, "0, 1, 2, 3, 4, 5"),
}


def build(models: Models, pictures: Pictures) -> None:
    """Builds the tab."""
    with gr.Tab("Compare", id="compare"), gr.Row():
        with gr.Column(scale=2, min_width=300):
            name = gr.Dropdown(list(SETTINGS), value="guidance", label="Setting to compare")
            text = gr.Textbox(SETTINGS["guidance"][1], label=f"Values, up to {LIMIT}, separated by commas")
            controls = ui.settings_controls(models, leave_out=("count", "width", "height", "strength"))
        with gr.Column(scale=3, min_width=300):
            panel = ui.Panel.build("compare", "Compare", "One picture per value, from one prompt and seed.")
            results = ui.Results.build("compare", "Pictures", "Download as one picture")

    def compare(values: dict) -> Iterator[dict]:
        settings = ui.read_settings(controls, values)
        labelled = []
        for label, variant in variants(settings, values[name], values[text]).items():
            for update in sample(models[variant.model], variant, preview_steps=()):
                yield {panel.status: ui.message(label) + ui.progress(update)}
            labelled.append((update.images[0], label))
            yield {results.gallery: labelled, controls["seed"]: settings.seed}
        sheet = captioned_grid(*map(list, zip(*labelled, strict=True)), columns=min(4, len(labelled)), cell=200)
        more = {"compared": values[name], "values": values[text]}
        (file,) = pictures.save([sheet], picture_metadata(models[settings.model], settings, **more))
        download = gr.DownloadButton(value=file, interactive=True)
        yield {results.download: download, panel.status: ui.message(f"Done, with seed {settings.seed}.")}

    def suggest(name: str) -> str:
        return SETTINGS[name][1] or ", ".join(models.names[:LIMIT])

    name.change(suggest, name, text, **ui.IMMEDIATE)
    outputs = [results.gallery, results.download, controls["seed"]]
    panel.on([panel.start.click], compare, [name, text, *controls.values()], outputs)


def variants(settings: Settings, name: str, text: str) -> dict[str, Settings]:
    """{label: settings} per value in a comma-separated list. Raises UserError for values that the setting refuses."""
    words = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not 1 <= len(words) <= LIMIT:
        raise UserError(f"{len(words)} values to compare; write 1 to {LIMIT}, separated by commas")
    label, read = name.replace("_", " "), SETTINGS[name][0]
    try:
        return {f"{label} {word}": replace(settings, **{name: read(word)}) for word in words}
    except ValueError as error:
        raise UserError(f"no value of {label}: {error}") from None
