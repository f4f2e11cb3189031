"""Edit: redraw a picture, or the part of it under a brush; interpolate between two prompts and seeds."""

from collections.abc import Sequence
from typing import Any

import gradio as gr
import torch
from gradio.components import Component
from PIL import Image, ImageOps

from ldm.app import controls as ui
from ldm.app.models import Models
from ldm.app.sampling import Settings, picture_metadata, restore, sample
from ldm.app.storage import Pictures
from ldm.config import UserError
from ldm.edit import between, slerp
from ldm.images import upright_rgb
from ldm.pipeline import Pipeline
from ldm.samplers import ImageNoise

CANVAS = 512  # pixels; a larger one sends PNGs above the limit on uploads, on a smaller one the brush hides the picture
RESAMPLE = 2  # model calls per step within a mask; with one, the model of shapes left some masks grey


def build(models: Models, pictures: Pictures) -> tuple[gr.ImageEditor, dict[str, Component]]:
    """Builds the tab; returns the editor and the controls."""
    hint = "Upload a picture and write a prompt. Brush over the part to redraw, or redraw all of it."
    tab = ui.SamplingTab(models, "edit", "Draw", hint, leave_out=("width", "height"))
    with tab.extras:
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
        settings = tab.settings(values)
        pipe = models[settings.model]
        image, mask = read_drawing(values[editor], pipe.latent_shape()[1] * pipe.vae.factor, pipe.vae.factor)
        options = {"strength": settings.strength} | ({"resample": RESAMPLE} if mask else {})
        metadata = picture_metadata(pipe, settings, image="uploaded", mask="drawn" if mask else "", **options)
        updates = sample(pipe, settings, image=image, mask=mask, **options)
        yield from tab.follow(updates, settings, lambda images: pictures.save(images, metadata))

    tab.on(edit, [editor])
    return editor, tab.controls


def build_interpolation(models: Models, pictures: Pictures) -> None:
    """Builds the tab between two prompts."""
    leave_out = ("prompt", "seed", "random_seed", "width", "height", "strength")
    tab = ui.SamplingTab(models, "between", "Interpolate", "Write two prompts.", leave_out, count=7)
    with tab.extras:
        prompts = gr.Textbox(label="From this prompt"), gr.Textbox(label="To this prompt")
        with gr.Row():
            seeds = gr.Number(0, label="First seed", precision=0), gr.Number(1, label="Last seed", precision=0)

    def interpolate(values):
        ends = zip(prompts, seeds, strict=True)
        a, b = (tab.settings(values, prompt=values[prompt], seed=values[seed]) for prompt, seed in ends)
        pipe, shares = models[a.model], torch.linspace(0, 1, a.count).tolist()
        metadata = picture_metadata(pipe, a, prompt=f"{a.prompt} -> {b.prompt}", seed_to=b.seed)[0]

        def save(images):
            files = pictures.save(images, [metadata | {"share": f"{share:.4g}"} for share in shares])
            return [(file, f"{share:.2f}") for file, share in zip(files, shares, strict=True)]

        yield from tab.follow(sample(pipe, a, **interpolation(pipe, a, b, shares)), a, save)

    tab.on(interpolate, [*prompts, *seeds])


def open_picture(path: str, models: Models) -> tuple[Image.Image, dict[str, Any]]:
    """The value of the editor for a finished picture, and the values of the controls that the picture determines."""
    settings, _ = restore(path, models)
    image = Image.open(path)
    image = ImageOps.scale(image, max(1, CANVAS // max(image.size)), Image.Resampling.NEAREST)
    return image, {name: getattr(settings, name) for name in ("prompt", "negative_prompt", "model")}


def read_drawing(drawing: dict | None, side: int, factor: int) -> tuple[Image.Image, Image.Image | None]:
    """The centre square of an editor's picture within its transparent margins, resized to `side`, and the mask that was
    brushed, in whole latents of `factor` pixels; None without a stroke. Raises UserError without a picture."""
    background = drawing["background"].convert("RGBA") if drawing and drawing.get("background") else None
    if background is None or not (box := background.getchannel("A").getbbox()):
        raise UserError("there is no picture to edit; upload one")

    def cut(layer: Image.Image, side: int) -> Image.Image:
        # averages over whole blocks, so that a picture enlarged by `open_picture` comes back exactly
        return ImageOps.fit(layer.convert("RGBA").crop(box), (side, side), Image.Resampling.BOX)

    mask = Image.new("L", (side, side))
    for layer in (
        drawing.get("layers") or ()
    ):  # a latent is redrawn when some 5% of it are brushed: the brush is translucent
        brushed = cut(layer, side // factor).getchannel("A").point(lambda alpha: 255 * (alpha >= 8))
        mask.paste(255, mask=brushed.resize(mask.size, Image.Resampling.NEAREST))
    return upright_rgb(cut(background, side)), mask if mask.getbbox() else None


def interpolation(pipe: Pipeline, a: Settings, b: Settings, shares: Sequence[float]) -> dict[str, Any]:
    """The arguments of `sample` for pictures between the prompts and seeds of two settings; share 0 is a, 1 is b."""
    if not a.prompt or not b.prompt:
        raise UserError("write both prompts")
    noise = ImageNoise([a.seed, b.seed], pipe.latent_shape())()
    latents = torch.stack([slerp(*noise, share) for share in shares])
    return {"prompt_embeds": between(*map(pipe.encode_prompt, ([a.prompt], [b.prompt])), shares), "latents": latents}
