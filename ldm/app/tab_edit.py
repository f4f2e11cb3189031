"""Edit: begin with a picture, draw a part of it anew; in a tab within it, go from one prompt to another."""

from collections.abc import Iterator
from typing import Any

import gradio as gr
import numpy as np
from einops import reduce, repeat
from PIL import Image

from ldm.app import tab_between
from ldm.app.desk import Desk, begins, stops
from ldm.app.parts import QUIET, Controls, controls, finished, pictures, said, shown
from ldm.app.studio import Models, about_picture, make, restore
from ldm.config import UserError
from ldm.pipeline import Pipeline

# Pixels a side of the editor: what is larger would be sent as PNGs that the page refuses, what is smaller is all brush.
CANVAS = 512
RESAMPLE = 2  # asks the model twice a step within a mask: asked once, shapes left some masks grey
HANDED = ("prompt", "negative_prompt", "model")  # what a picture brings along from Make; its seed's noise is in it


class Editing:
    """What the tab does with a picture."""

    def __init__(self, desk: Desk, given: Controls) -> None:
        """`given` are the settings of what is drawn."""
        self.desk, self.given = desk, given

    def run(self, request: gr.Request, drawn: dict | None, *values: Any) -> Iterator[tuple]:
        """Previews, then the pictures."""
        try:
            with self.desk.working(request, "edit") as stop:
                settings = self.given.read(values)
                pipe = self.desk.models[settings.model]
                image, mask = read_drawing(drawn, side_of(pipe), pipe.vae.factor)
                if not settings.cleaned().prompt:
                    raise UserError("there is no prompt; write what is to be drawn")
                again = {"resample": RESAMPLE} if mask else {}
                about = {"image": "uploaded", "mask": "drawn" if mask else "", "strength": settings.strength} | again
                options: dict[str, Any] = {"image": image, "mask": mask, "strength": settings.strength} | again
                for update in make(pipe, settings, stop, **options):
                    if update.done:
                        told = [about_picture(pipe, settings, i, **about) for i in range(len(update.images))]
                        files = [self.desk.keep(made, a) for made, a in zip(update.images, told, strict=True)]
                        ready = gr.DownloadButton(value=files[0], interactive=True)
                        yield files, finished(update, settings.count, settings.seed), settings.seed, ready
                    elif update.stopped:
                        yield gr.skip(), finished(update, settings.count, settings.seed), settings.seed, gr.skip()
                    else:
                        yield update.images or gr.skip(), shown(update), settings.seed, gr.skip()
        except UserError as error:
            yield gr.skip(), said(str(error), wrong=True), gr.skip(), gr.skip()


def build(desk: Desk) -> list[Any]:
    """The tab, inside the page's tabs; gives what `handed` fills in."""
    with gr.Tab("Edit", id="edit"), gr.Tabs() as tabs:
        with gr.Tab("A picture", id="picture"):
            editor, parts = a_picture(desk)
        with gr.Tab("Between two prompts"):
            tab_between.build(desk)
    return [tabs, editor, *(parts[name] for name in HANDED)]


def handed(path: str, models: Models) -> list[Any]:
    """A picture that was made here and what it was made from, for `build`'s components (UserError)."""
    settings, _ = restore(path, models)
    image = Image.open(path)
    scale = max(1, CANVAS // max(image.size))
    image = image.resize((scale * image.width, scale * image.height), Image.Resampling.NEAREST)
    drawn = {"background": image, "layers": [], "composite": image}
    return [gr.Tabs(selected="picture"), drawn, *(getattr(settings, name) for name in HANDED)]


def a_picture(desk: Desk) -> tuple[gr.ImageEditor, dict[str, Any]]:
    """The tab within the tab where a picture is drawn anew; its editor and its controls."""
    gr.Markdown(
        "Upload a picture; its centre square counts. What you brush over is drawn anew; without a stroke, all of it is."
    )
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
            given = controls(desk.models, leave_out=("width", "height"))
        with gr.Column(scale=3, min_width=300):
            with gr.Row():
                go = gr.Button("Draw", variant="primary", elem_id="edit-go")
                halt = gr.Button("Stop", elem_id="edit-stop")
            status = gr.HTML(said("Upload a picture and write a prompt."), elem_classes="status", elem_id="edit-status")
            gallery = pictures("Pictures", "edit-pictures", 440)
            download = gr.DownloadButton("Download the chosen picture", interactive=False, elem_id="edit-download")

    outputs = [gallery, status, given.parts["seed"], download]
    work = {"fn": Editing(desk, given).run, "inputs": [editor, *given.inputs], "outputs": outputs}
    begins(desk, "edit", [go.click], work, status)
    stops(desk, "edit", halt, status)
    gallery.select(desk.offered, None, download, **QUIET)
    return editor, given.parts


def side_of(pipe: Pipeline) -> int:
    """The side of the model's own pictures, in pixels."""
    return pipe.latent_shape()[1] * pipe.vae.factor


def read_drawing(drawn: dict | None, side: int, factor: int) -> tuple[Image.Image, Image.Image | None]:
    """The centre square of an editor's picture, resized, and the mask of what was brushed over, in whole latents of
    `factor` pixels, None for nothing (UserError without a picture)."""
    background = drawn["background"].convert("RGBA") if drawn and drawn.get("background") is not None else None
    if background is None or background.getchannel("A").getbbox() is None:
        raise UserError("there is no picture to begin with; upload one")
    box = centre_square(background)
    # by whole blocks where it can be, so that what was enlarged comes back exactly
    way = Image.Resampling.BICUBIC if (box[2] - box[0]) % side else Image.Resampling.BOX
    image = background.crop(box).resize((side, side), way)
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    brushed = np.zeros((side, side), bool)
    for layer in (drawn or {}).get("layers") or []:
        alpha = layer.convert("RGBA").crop(box).resize((side, side), Image.Resampling.BOX)
        brushed |= np.asarray(alpha)[..., 3] >= 64  # the brush is not opaque
    latents = reduce(brushed, "(h a) (w b) -> h w", "max", a=factor, b=factor)
    whole = repeat(latents, "h w -> (h a) (w b)", a=factor, b=factor)
    return image, Image.fromarray(whole) if whole.any() else None


def centre_square(image: Image.Image) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the centre square of an RGBA picture, without the margins of an editor whose
    canvas the picture does not fill: two opposite sides without colour, alike to a pixel."""
    left, top, right, bottom = image.getchannel("A").getbbox() or (0, 0, *image.size)
    beside, above = (left, image.width - right), (top, image.height - bottom)
    if any(above) or abs(beside[0] - beside[1]) > 1:
        left, right = 0, image.width
    if any(beside) or abs(above[0] - above[1]) > 1:
        top, bottom = 0, image.height
    short = min(right - left, bottom - top)
    x, y = (left + right - short) // 2, (top + bottom - short) // 2
    return x, y, x + short, y + short
