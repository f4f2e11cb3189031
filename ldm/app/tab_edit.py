"""Edit: begin with a picture, draw a part of it anew; in a tab within it, go from one prompt to another."""

from collections.abc import Iterator
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from ldm.app import tab_between
from ldm.app.desk import Desk, begins, stops
from ldm.app.parts import QUIET, Controls, controls, finished, pictures, said, shown
from ldm.app.studio import about_picture, make
from ldm.config import UserError
from ldm.pipeline import Pipeline


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
                image, mask = read_drawing(drawn, side_of(pipe))
                if not settings.cleaned().prompt:
                    raise UserError("there is no prompt; write what is to be drawn")
                about = {"image": "uploaded", "mask": "drawn" if mask else "", "strength": settings.strength}
                options = {"image": image, "strength": settings.strength} | ({"mask": mask} if mask else {})
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


def build(desk: Desk) -> gr.ImageEditor:
    """The tab, inside the page's tabs; gives what a picture can be put into."""
    with gr.Tab("Edit", id="edit"), gr.Tabs():
        with gr.Tab("A picture"):
            editor = a_picture(desk)
        with gr.Tab("Between two prompts"):
            tab_between.build(desk)
    return editor


def a_picture(desk: Desk) -> gr.ImageEditor:
    """The tab within the tab where a picture is drawn anew."""
    gr.Markdown("Upload a picture. What you brush over is drawn anew; without a stroke, all of it is.")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            editor = gr.ImageEditor(
                label="Picture and mask",
                type="pil",
                height=420,
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
    return editor


def side_of(pipe: Pipeline) -> int:
    """The side of the model's own pictures, in pixels."""
    return pipe.latent_shape()[1] * pipe.vae.factor


def read_drawing(drawn: dict | None, side: int) -> tuple[Image.Image, Image.Image | None]:
    """The centre square of an editor's picture, resized, and the mask of what was brushed over, None for nothing
    (UserError without a picture)."""
    if (
        not drawn
        or drawn.get("background") is None
        or not np.asarray(drawn["background"].convert("RGBA"))[..., 3].any()
    ):
        raise UserError("there is no picture to begin with; upload one")
    image = square(drawn["background"].convert("RGBA"), side, Image.Resampling.BICUBIC)
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    brushed = np.zeros((side, side), bool)
    for layer in drawn.get("layers") or []:
        alpha = square(layer.convert("RGBA"), side, Image.Resampling.BOX)
        brushed |= np.asarray(alpha)[..., 3] >= 64  # the brush is not opaque
    return image, Image.fromarray(brushed) if brushed.any() else None


def square(image: Image.Image, side: int, way: Image.Resampling) -> Image.Image:
    """The centre square, `side` pixels wide."""
    short = min(image.size)
    left, top = (image.width - short) / 2, (image.height - short) / 2
    return image.resize((side, side), way, box=(left, top, left + short, top + short))
