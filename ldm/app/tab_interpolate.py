"""Between two prompts, a tab within Edit: pictures on the way from one prompt and seed to another."""

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr
import torch

from ldm.app import controls as ui
from ldm.app.models import Models
from ldm.app.sampling import Settings, picture_metadata, sample
from ldm.app.storage import Pictures
from ldm.config import UserError
from ldm.edit import between, slerp
from ldm.pipeline import Pipeline
from ldm.samplers import ImageNoise


def build(models: Models, pictures: Pictures) -> None:
    """Builds the tab, inside those of Edit."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            prompts = [gr.Textbox(label="From this prompt"), gr.Textbox(label="To this prompt")]
            with gr.Row():
                seeds = [gr.Number(0, label="First seed", precision=0), gr.Number(1, label="Last seed", precision=0)]
            leave_out = ("prompt", "seed", "random_seed", "width", "height", "strength")
            controls = ui.settings_controls(models, leave_out, count=7)
        with gr.Column(scale=3, min_width=300):
            panel = ui.Panel.build("between", "Interpolate", "Write two prompts.")
            results = ui.Results.build("between", "Pictures")

    def interpolate(values: dict) -> Iterator[dict]:
        ends = zip(prompts, seeds, strict=True)
        a, b = (ui.read_settings(controls, values, prompt=values[p], seed=values[seed]) for p, seed in ends)
        pipe, shares = models[a.model], torch.linspace(0, 1, a.count).tolist()
        (metadata, *_) = picture_metadata(pipe, a, prompt=f"{a.prompt} -> {b.prompt}", seed_to=b.seed)

        def save(images: list) -> list[tuple[str, str]]:
            files = pictures.save(images, [metadata | {"share": f"{share:.4g}"} for share in shares])
            return [(file, f"{share:.2f}") for file, share in zip(files, shares, strict=True)]

        yield from results.follow(panel, sample(pipe, a, **interpolation(pipe, a, b, shares)), save)

    inputs = [*prompts, *seeds, *controls.values()]
    panel.on([panel.start.click], interpolate, inputs, [results.gallery, results.download])


def interpolation(pipe: Pipeline, a: Settings, b: Settings, shares: Sequence[float]) -> dict[str, Any]:
    """The arguments of `sample` for pictures between the prompts and seeds of two settings; share 0 is a, 1 is b."""
    if not a.prompt or not b.prompt:
        raise UserError("write both prompts")
    noise = ImageNoise([a.seed, b.seed], pipe.latent_shape())()
    latents = torch.stack([slerp(*noise, share) for share in shares])
    return {"prompt_embeds": between(*map(pipe.encode_prompt, ([a.prompt], [b.prompt])), shares), "latents": latents}
