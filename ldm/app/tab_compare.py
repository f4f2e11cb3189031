"""Compare: one prompt and seed over values of one setting."""

from dataclasses import replace

import gradio as gr

from ldm.app.sampling import Settings, picture_metadata
from ldm.app.workspace import IMMEDIATE, Workspace
from ldm.config import UserError
from ldm.images import captioned_grid

LIMIT = 8  # values
EXAMPLES = {
    "guidance": "1, 2, 3, 5, 8",
    "steps": "5, 10, 20, 40",
    "sampler": "ddim, euler, dpmpp_2m, unipc",
    "model": "",
    "guidance_rescale": "0, 0.3, 0.7, 1",
    "seed": "0, 1, 2, 3, 4, 5",
}


def build(ui: Workspace) -> None:
    """Builds the tab."""
    with ui.tabs["compare"]:
        name = gr.Dropdown(list(EXAMPLES), value="guidance", label="Setting to compare")
        text = gr.Textbox(EXAMPLES["guidance"], label=f"Values, up to {LIMIT}, separated by commas")

    def compare(values):
        settings = ui.settings(values, count=1)
        pictures = {}
        for label, variant in variants(settings, values[name], values[text]).items():
            pictures[label] = yield from ui.sample(values, variant)
        images, labels = [image for _, (image,) in pictures.values()], list(pictures)
        sheet = captioned_grid(images, labels, columns=min(4, len(labels)), cell=200)
        metadata = {"compared": values[name], "values": values[text]}
        files = ui.pictures.save([sheet], picture_metadata(ui.models[settings.model], settings, **metadata))
        shown = [(*files, "all"), *((file, label) for label, ((file,), _) in pictures.items())]
        yield {ui.gallery: gr.Gallery(shown, selected_index=0)} | ui.choose(*files)

    def examples(name):
        return EXAMPLES[name] or ", ".join(ui.models.names[:LIMIT])

    name.change(examples, name, text, **IMMEDIATE)
    ui.on_start("compare", compare, [name, text])


def variants(settings: Settings, name: str, text: str) -> dict[str, Settings]:
    """{label: settings} per value in a comma-separated list. Raises UserError for values that the setting refuses."""
    words = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not 1 <= len(words) <= LIMIT:
        raise UserError(f"{len(words)} values to compare; write 1 to {LIMIT}, separated by commas")
    kind = type(getattr(settings, name))
    try:
        return {f"{name} {word}": replace(settings, **{name: kind(word)}) for word in words}
    except ValueError as error:
        raise UserError(f"no value of {name}: {error}") from None
