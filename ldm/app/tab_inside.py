"""Look inside: the noise schedule, the way of z0, and where each word looks in the picture."""

from collections.abc import Iterator
from html import escape
from typing import Any

import gradio as gr

from ldm.app.looking import Inside, overlay, schedule_plots, watch
from ldm.app.parts import Desk, begins, controls, said, shown, stops
from ldm.app.studio import Update
from ldm.config import UserError
from ldm.images import data_url


def build(desk: Desk) -> None:
    """The tab, inside the page's tabs."""
    with gr.Tab("Look inside", id="inside"), gr.Row():
        with gr.Column(scale=2, min_width=300):
            given = controls(desk, leave_out=("count", "width", "height", "strength"))
        with gr.Column(scale=3, min_width=300):
            with gr.Row():
                go = gr.Button("Look", variant="primary", elem_id="inside-go")
                halt = gr.Button("Stop")
            status = gr.HTML(
                said("One picture, and what was on the way."), elem_classes="status", elem_id="inside-status"
            )
            gr.Markdown("**From noise to picture**: what the model believes the picture to be, step by step")
            way = gr.HTML(min_height=150, elem_id="inside-way")
            gr.Markdown(
                "**Where each word looks**: bright where cross-attention reads the word, over all layers and steps"
            )
            words = gr.HTML(min_height=150, elem_id="inside-words")
            gr.Markdown("**The noise schedule** and the steps of the sampler")
            plots = gr.HTML(min_height=240, elem_id="inside-plots")

    def run(request: gr.Request, *values: Any) -> Iterator[tuple]:
        still = (gr.skip(),) * 3
        stop = desk.event(request, "inside")
        try:
            settings = given.read(values)
            if not settings.cleaned().prompt:
                raise UserError("the prompt is empty; write what the picture should show")
            pipe = desk.models[settings.model]
            found = None
            for found in watch(pipe, settings, stop):
                if isinstance(found, Update):
                    yield shown(found), settings.seed, *still
            if not isinstance(found, Inside):
                yield said("Stopped."), settings.seed, *still
            else:
                drawn = schedule_plots(pipe.schedule, settings.sampler or pipe.schedule.config.sampler, settings.steps)
                text = said(f"Seed {settings.seed}.") + "".join(said(note) for note in found.notes)
                yield text, settings.seed, way_of(found), words_of(found), drawn
        except UserError as error:
            yield said(str(error), wrong=True), gr.skip(), *still

    work = {"fn": run, "inputs": given.inputs, "outputs": [status, given.parts["seed"], way, words, plots]}
    begins(desk, "inside", [go.click], work, status)
    stops(desk, "inside", halt, status)


def way_of(inside: Inside) -> str:
    """The pictures on the way, as HTML."""
    figures = [_figure(data_url(image), f"t = {t:.0f}") for t, image in inside.way]
    return f'<div class="words">{"".join(figures)}</div>'


def words_of(inside: Inside) -> str:
    """The picture once for each word, as HTML."""
    figures = [_figure(data_url(overlay(inside.image, heat)), word) for word, heat in inside.words]
    return f'<div class="words">{_figure(data_url(inside.image), "the picture")}{"".join(figures)}</div>'


def _figure(url: str, text: str) -> str:
    return f'<figure><img alt="{escape(text)}" src="{url}"><figcaption>{escape(text)}</figcaption></figure>'
