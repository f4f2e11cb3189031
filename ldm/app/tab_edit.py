"""Edit: redraw a picture, or the part of it under a brush."""

import gradio as gr
from PIL import Image, ImageOps

from ldm.app.workspace import IMMEDIATE, Workspace, user_errors
from ldm.config import UserError
from ldm.images import upright_rgb

CANVAS = 512  # pixels; a larger one sends PNGs above the limit on uploads, on a smaller one the brush hides the picture
RESAMPLE = 2  # model calls per step within a mask; with one, the model of shapes left some masks grey


def build(ui: Workspace) -> None:
    """Builds the tab, and the way of a picture into it."""
    with ui.tabs["edit"]:
        gr.Markdown("Brush over the part to redraw, or redraw all of it.")
        editor = gr.ImageEditor(
            label="Picture (its centre square is used)",
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

    def edit(values):
        settings = ui.settings(values, width=0, height=0)
        pipe = ui.models[settings.model]
        image, mask = read_drawing(values[editor], pipe.latent_shape()[1] * pipe.vae.factor, pipe.vae.factor)
        options = {"strength": settings.strength} | ({"resample": RESAMPLE} if mask else {})
        metadata = {"image": "uploaded", "mask": "drawn" if mask else ""} | options
        yield from ui.sample(values, settings, metadata, image=image, mask=mask, **options)

    @user_errors()
    def take(path):
        return {editor: open_picture(ui.pictures.find(path)), ui.tab_bar: gr.Tabs(selected="edit")}

    ui.on_start("edit", edit, [editor])
    ui.edit.click(take, ui.download, {editor, ui.tab_bar}, **IMMEDIATE)


def open_picture(path: str) -> Image.Image:
    """The value of the editor for a finished picture, from which `read_drawing` returns the picture exactly."""
    image = Image.open(path)
    return ImageOps.scale(image, max(1, CANVAS // max(image.size)), Image.Resampling.NEAREST)


def read_drawing(drawing: dict | None, side: int, factor: int) -> tuple[Image.Image, Image.Image | None]:
    """The centre square of an editor's picture within its transparent margins, resized to `side`, and the mask that was
    brushed, in whole latents of `factor` pixels; None without a stroke. Raises UserError without a picture."""
    background = (drawing or {}).get("background") or Image.new("RGBA", (1, 1))
    if not (box := background.convert("RGBA").getchannel("A").getbbox()):
        raise UserError("there is no picture to edit; upload one")

    def square(layer: Image.Image, side: int) -> Image.Image:
        return ImageOps.fit(layer.convert("RGBA").crop(box), (side, side), Image.Resampling.BOX)

    mask = Image.new("L", (side, side))
    for layer in drawing.get("layers") or ():
        # a latent is redrawn when some 5% of it are brushed: the brush is translucent
        brushed = square(layer, side // factor).getchannel("A").point(lambda alpha: 255 * (alpha >= 8))
        mask = brushed.resize(mask.size, Image.Resampling.NEAREST)
    return upright_rgb(square(background, side)), mask if mask.getbbox() else None
