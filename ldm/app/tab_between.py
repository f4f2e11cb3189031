"""Between two prompts, a tab within Edit: pictures on the way from one prompt and seed to another."""

from collections.abc import Iterator
from typing import Any

import gradio as gr
import torch

from ldm.app.desk import Desk, begins, stops
from ldm.app.parts import QUIET, Controls, controls, finished, number, pictures, said, shown
from ldm.app.studio import Settings, about_picture, changed, clean, make
from ldm.config import UserError
from ldm.edit import between, slerp
from ldm.pipeline import Pipeline
from ldm.samplers import ImageNoise

STRIP = 7  # pictures


class Going:
    """What the tab does."""

    def __init__(self, desk: Desk, given: Controls) -> None:
        """`given` are the settings that both ends share."""
        self.desk, self.given = desk, given

    def one(self, request: gr.Request, share: float, *ends_and_values: Any) -> Iterator[tuple]:
        """The picture at one place between the ends, from 0 to 1."""
        yield from self.run(request, [min(max(float(share or 0), 0.0), 1.0)], *ends_and_values)

    def many(self, request: gr.Request, share: float, *ends_and_values: Any) -> Iterator[tuple]:
        """A strip from end to end."""
        yield from self.run(request, torch.linspace(0, 1, STRIP).tolist(), *ends_and_values)

    def run(self, request: gr.Request, shares: list[float], *given: Any) -> Iterator[tuple]:
        """Previews, then the pictures at those places between two prompts and two seeds, which come before the rest."""
        first, second, seed, seed_to, *values = given
        try:
            with self.desk.working(request, "between") as stop:
                a = changed(self.given.read(tuple(values)), prompt=first, seed=number(seed, "seed"), count=len(shares))
                b = changed(a, prompt=second, seed=number(seed_to, "seed"))
                pipe = self.desk.models[a.model]
                for update in make(pipe, a, stop, **on_the_way(pipe, a, b, shares)):
                    if update.done:
                        texts = {"prompt": f"{clean(first)} -> {clean(second)}", "seed_to": b.seed}
                        told = [about_picture(pipe, a, 0, **texts, share=f"{share:.4g}") for share in shares]
                        files = [self.desk.keep(made, t) for made, t in zip(update.images, told, strict=True)]
                        labelled = [(file, f"{share:.2f}") for file, share in zip(files, shares, strict=True)]
                        ready = gr.DownloadButton(value=files[0], interactive=True)
                        yield labelled, said(f"Done in {update.seconds:.1f} s."), ready
                    elif update.stopped:
                        yield gr.skip(), finished(update, len(shares), a.seed), gr.skip()
                    else:
                        yield update.images or gr.skip(), shown(update), gr.skip()
        except UserError as error:
            yield gr.skip(), said(str(error), wrong=True), gr.skip()


def build(desk: Desk) -> None:
    """The tab, inside those of Edit."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            ends = [gr.Textbox(label="From this prompt"), gr.Textbox(label="To this prompt")]
            with gr.Row():
                ends += [gr.Number(0, label="Seed of the first", precision=0)]
                ends += [gr.Number(1, label="Seed of the last", precision=0)]
            share = gr.Slider(0, 1, 0.5, step=0.05, label="Where between them", elem_id="between-share")
            given = controls(desk.models, leave_out=("prompt", "seed", "count", "width", "height", "strength"))
        with gr.Column(scale=3, min_width=300):
            with gr.Row():
                go = gr.Button("Picture there", variant="primary", elem_id="between-go")
                strip = gr.Button(f"Strip of {STRIP}", elem_id="between-strip")
                halt = gr.Button("Stop", elem_id="between-stop")
            status = gr.HTML(said("Write two prompts."), elem_classes="status", elem_id="between-status")
            gallery = pictures("Pictures", "between-pictures", 380)
            download = gr.DownloadButton("Download the chosen picture", interactive=False, elem_id="between-download")

    going = Going(desk, given)
    work = {"fn": going.one, "inputs": [share, *ends, *given.inputs], "outputs": [gallery, status, download]}
    begins(desk, "between", [go.click], work, status)
    # of a drag or of keys, the last place
    begins(desk, "between", [share.release, share.input], work | {"trigger_mode": "always_last"}, status)
    begins(desk, "between", [strip.click], work | {"fn": going.many}, status)
    stops(desk, "between", halt, status)
    gallery.select(desk.offered, None, download, **QUIET)


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
