"""Edit: begin with a picture, draw a part of it anew, go from one prompt to another."""

from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image

from ldm.app.parts import QUIET, Desk, begins, controls, finished, pictures, said, shown, stops
from ldm.app.studio import Settings, about_picture, changed, clean, make
from ldm.config import UserError
from ldm.editing import between, slerp
from ldm.pipeline import Pipeline
from ldm.samplers import ImageNoise


def build(desk: Desk) -> gr.ImageEditor:
    """The tab, inside the page's tabs; gives what a picture can be put into."""
    with gr.Tab("Edit", id="edit"), gr.Tabs():
        with gr.Tab("A picture"):
            editor = _picture(desk)
        with gr.Tab("Between two prompts"):
            _between(desk)
    return editor


def _picture(desk: Desk) -> gr.ImageEditor:
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
            given = controls(desk, leave_out=("width", "height"))
        with gr.Column(scale=3, min_width=300):
            with gr.Row():
                go = gr.Button("Draw", variant="primary", elem_id="edit-go")
                halt = gr.Button("Stop")
            status = gr.HTML(said("Upload a picture and write a prompt."), elem_classes="status", elem_id="edit-status")
            gallery = pictures("Pictures", "edit-pictures", 440)
            download = gr.DownloadButton("Download the chosen picture", interactive=False, elem_id="edit-download")

    def run(request: gr.Request, drawn: dict | None, *values: Any) -> Iterator[tuple]:
        stop = desk.event(request, "edit")
        try:
            settings = given.read(values)
            pipe = desk.models[settings.model]
            image, mask = read_drawing(drawn, side_of(pipe))
            about = {"image": "uploaded", "mask": "drawn" if mask else "", "strength": settings.strength}
            options = {"image": image, "strength": settings.strength} | ({"mask": mask} if mask else {})
            for update in make(pipe, settings, stop, **options):
                if update.done:
                    told = [about_picture(pipe, settings, i, **about) for i in range(len(update.images))]
                    files = [desk.keep(made, a) for made, a in zip(update.images, told, strict=True)]
                    ready = gr.DownloadButton(value=files[0], interactive=True)
                    yield files, finished(update, settings.count, settings.seed), settings.seed, ready
                elif update.stopped:
                    yield gr.skip(), finished(update, settings.count, settings.seed), settings.seed, gr.skip()
                else:
                    yield update.images or gr.skip(), shown(update), settings.seed, gr.skip()
        except UserError as error:
            yield gr.skip(), said(str(error), wrong=True), gr.skip(), gr.skip()

    work = {"fn": run, "inputs": [editor, *given.inputs], "outputs": [gallery, status, given.parts["seed"], download]}
    begins(desk, "edit", [go.click], work, status)
    stops(desk, "edit", halt, status)
    gallery.select(chosen(desk), None, download, **QUIET)
    return editor


def chosen(desk: Desk) -> Callable[[gr.SelectData], Any]:
    """What a click on a picture of a gallery makes of the download button beside it."""

    def choose(found: gr.SelectData) -> Any:
        try:
            return gr.DownloadButton(value=desk.own(str(found.value["image"]["path"])), interactive=True)
        except UserError:
            return gr.DownloadButton(value=None, interactive=False)

    return choose


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


def _between(desk: Desk) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            first = gr.Textbox(label="From this prompt")
            second = gr.Textbox(label="To this prompt")
            with gr.Row():
                seed_a = gr.Number(0, label="Seed of the first", precision=0)
                seed_b = gr.Number(1, label="Seed of the last", precision=0)
            share = gr.Slider(0, 1, 0.5, step=0.05, label="Where between them", elem_id="between-share")
            given = controls(desk, leave_out=("prompt", "seed", "count", "width", "height", "strength"))
        with gr.Column(scale=3, min_width=300):
            with gr.Row():
                go = gr.Button("Picture there", variant="primary", elem_id="between-go")
                strip = gr.Button("Strip of 7", elem_id="between-strip")
                halt = gr.Button("Stop")
            status = gr.HTML(said("Write two prompts."), elem_classes="status", elem_id="between-status")
            gallery = pictures("Pictures", "between-pictures", 380)
            download = gr.DownloadButton("Download the chosen picture", interactive=False, elem_id="between-download")

    def run(request: gr.Request, shares: list[float], a: str, b: str, seeds: tuple, values: tuple) -> Iterator[tuple]:
        stop = desk.event(request, "between")
        try:
            settings = changed(given.read(values), prompt=a, seed=int(seeds[0] or 0), count=len(shares))
            last = changed(settings, prompt=b, seed=int(seeds[1] or 0))
            pipe = desk.models[settings.model]
            for update in make(pipe, settings, stop, **on_the_way(pipe, settings, last, shares)):
                if update.done:
                    texts = {"prompt": f"{clean(a)} -> {clean(b)}", "seed_to": last.seed}
                    told = [about_picture(pipe, settings, 0, **texts, share=f"{s:.4g}") for s in shares]
                    files = [desk.keep(made, t) for made, t in zip(update.images, told, strict=True)]
                    labels = [f"{s:.2f}" for s in shares]
                    ready = gr.DownloadButton(value=files[0], interactive=True)
                    yield list(zip(files, labels, strict=True)), said(f"Done in {update.seconds:.1f} s."), ready
                elif update.stopped:
                    yield gr.skip(), finished(update, len(shares), settings.seed), gr.skip()
                else:
                    yield update.images or gr.skip(), shown(update), gr.skip()
        except UserError as error:
            yield gr.skip(), said(str(error), wrong=True), gr.skip()

    def one(request: gr.Request, at: float, a: str, b: str, sa: float, sb: float, *values: Any) -> Iterator[tuple]:
        yield from run(request, [float(at)], a, b, (sa, sb), values)

    def many(request: gr.Request, at: float, a: str, b: str, sa: float, sb: float, *values: Any) -> Iterator[tuple]:
        yield from run(request, torch.linspace(0, 1, 7).tolist(), a, b, (sa, sb), values)

    inputs, outputs = [share, first, second, seed_a, seed_b, *given.inputs], [gallery, status, download]
    work = {"fn": one, "inputs": inputs, "outputs": outputs}
    begins(desk, "between", [go.click], work, status)
    begins(
        desk, "between", [share.release], work | {"trigger_mode": "always_last"}, status
    )  # of a drag, the last place
    begins(desk, "between", [strip.click], work | {"fn": many}, status)
    stops(desk, "between", halt, status)
    gallery.select(chosen(desk), None, download, **QUIET)


def on_the_way(pipe: Pipeline, a: Settings, b: Settings, shares: list[float]) -> dict[str, torch.Tensor]:
    """What the pipeline takes for pictures between the prompts and seeds of two settings (UserError)."""
    a, b = a.cleaned(), b.cleaned()
    if not a.prompt or not b.prompt:
        raise UserError("there are two prompts to write: where to begin and where to end")
    noise = ImageNoise([a.seed, b.seed], pipe.latent_shape())()
    first, second = (pipe.encode_prompt([s.prompt]) for s in (a, b))
    return {
        "prompt_embeds": between(first, second, shares),
        "latents": torch.stack([slerp(noise[0], noise[1], share) for share in shares]),
    }
