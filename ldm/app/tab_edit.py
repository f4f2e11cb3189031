"""Edit: redraw a picture or the part of it under a brush; in a second tab, interpolate between two prompts."""

from collections.abc import Iterator
from typing import Any

import gradio as gr
import numpy as np
from einops import reduce, repeat
from gradio.components import Component
from PIL import Image, ImageOps

from ldm.app import controls as ui
from ldm.app import tab_interpolate
from ldm.app.models import Models
from ldm.app.sampling import picture_metadata, restore, sample
from ldm.app.storage import Pictures
from ldm.config import UserError

CANVAS = 512  # pixels; a larger one sends PNGs above the limit on uploads, on a smaller one the brush hides the picture
RESAMPLE = 2  # model calls per step within a mask; with one, the model of shapes left some masks grey


def build(models: Models, pictures: Pictures) -> tuple[gr.Tabs, gr.ImageEditor, ui.Controls]:
    """Builds the tab; returns its inner tabs, the editor and the controls."""
    with gr.Tab("Edit", id="edit"), gr.Tabs() as tabs:
        with gr.Tab("A picture", id="picture"):
            editor, controls = _build_editor(models, pictures)
        with gr.Tab("Between two prompts"):
            tab_interpolate.build(models, pictures)
    return tabs, editor, controls


def _build_editor(models: Models, pictures: Pictures) -> tuple[gr.ImageEditor, ui.Controls]:
    gr.Markdown("Upload a picture; its centre square is used. Brush over the part to redraw, or redraw all of it.")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            editor = gr.ImageEditor(
                label="Picture",
                type="pil",
                height=420,
                canvas_size=(CANVAS, CANVAS),
                fixed_canvas=True,
                sources=("upload", "clipboard"),
                transforms=(),
                brush=gr.Brush(colors=["rgba(255, 59, 107, 0.6)"], color_mode="fixed", default_size="auto"),
                layers=False,
                elem_id="edit-editor",
            )
            controls = ui.settings_controls(models, leave_out=("width", "height"))
        with gr.Column(scale=3, min_width=300):
            panel = ui.Panel.build("edit", "Draw", "Upload a picture and write a prompt.")
            results = ui.Results.build("edit", "Pictures")

    def edit(values: dict) -> Iterator[dict]:
        settings = ui.read_settings(controls, values)
        pipe = models[settings.model]
        image, mask = read_drawing(values[editor], pipe.latent_shape()[1] * pipe.vae.factor, pipe.vae.factor)
        options: dict[str, Any] = {"strength": settings.strength} | ({"resample": RESAMPLE} if mask else {})
        metadata = picture_metadata(pipe, settings, image="uploaded", mask="drawn" if mask else "", **options)
        updates = sample(pipe, settings, image=image, mask=mask, **options)
        for update in results.follow(panel, updates, lambda images: pictures.save(images, metadata)):
            yield update | {controls["seed"]: settings.seed}

    outputs = [results.gallery, results.download, controls["seed"]]
    panel.on([panel.start.click], edit, [editor, *controls.values()], outputs)
    return editor, controls


def open_picture(path: str, models: Models, editor: gr.ImageEditor, controls: ui.Controls) -> dict[Component, Any]:
    """The update that opens a finished picture in the editor, with its prompts and model."""
    settings, _ = restore(path, models)
    image = Image.open(path)
    scale = max(1, CANVAS // max(image.size))
    image = image.resize((scale * image.width, scale * image.height), Image.Resampling.NEAREST)
    shown = {controls[name]: getattr(settings, name) for name in ("prompt", "negative_prompt", "model")}
    return shown | {editor: {"background": image, "layers": [], "composite": image}}


def read_drawing(drawing: dict | None, side: int, factor: int) -> tuple[Image.Image, Image.Image | None]:
    """The centre square of an editor's picture within its transparent margins, resized to `side`, and the mask that was
    brushed, in whole latents of `factor` pixels; None without a stroke. Raises UserError without a picture."""
    background = drawing["background"].convert("RGBA") if drawing and drawing.get("background") else None
    if background is None or not (box := background.getchannel("A").getbbox()):
        raise UserError("there is no picture to edit; upload one")

    def cut(layer: Image.Image) -> Image.Image:
        # averages over whole blocks, so that a picture enlarged by `open_picture` comes back exactly
        return ImageOps.fit(layer.convert("RGBA").crop(box), (side, side), Image.Resampling.BOX)

    image = Image.alpha_composite(Image.new("RGBA", (side, side), "white"), cut(background)).convert("RGB")
    brushed = np.zeros((side, side), bool)
    for layer in drawing.get("layers") or ():
        brushed |= np.asarray(cut(layer).getchannel("A")) >= 64  # the brush is translucent
    latents = reduce(brushed, "(h a) (w b) -> h w", "max", a=factor, b=factor)
    mask = repeat(latents, "h w -> (h a) (w b)", a=factor, b=factor)
    return image, Image.fromarray(mask) if mask.any() else None
