"""Look inside: the noise schedule, the way of z0, and where each word looks in the picture."""

import queue
import threading
import time
from collections.abc import Iterator
from html import escape
from typing import Any

import gradio as gr

from ldm.app.looking import Inside, look, overlay, schedule_plots
from ldm.app.parts import QUEUED, Desk, controls, said, shown
from ldm.app.studio import Settings, Stopped, Update
from ldm.config import UserError
from ldm.images import data_url
from ldm.pipeline import Pipeline


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
        stop = desk.begin(request)
        try:
            settings = given.read(values)
            if not settings.cleaned().prompt:
                raise UserError("the prompt is empty; write what the picture should show")
            pipe = desk.models[settings.model]
            for found in watched(pipe, settings, stop):
                if isinstance(found, Update):
                    yield (shown(found) if not found.stopped else said("Stopped."), settings.seed, *still)
                    continue
                drawn = schedule_plots(pipe.schedule, settings.sampler or pipe.schedule.config.sampler, settings.steps)
                yield said(f"Seed {settings.seed}."), settings.seed, way_of(found), words_of(found), drawn
        except UserError as error:
            yield said(str(error), wrong=True), gr.skip(), *still

    go.click(run, given.inputs, [status, given.parts["seed"], way, words, plots], show_progress_on=[status], **QUEUED)
    halt.click(desk.stop, None, None, queue=False, show_progress="hidden")


def watched(pipe: Pipeline, settings: Settings, stop: threading.Event) -> Iterator[Update | Inside]:
    """`look` in a thread of its own: updates, then what was seen."""
    heard: queue.Queue = queue.Queue()
    began = time.monotonic()

    def told(step: int, steps: int) -> None:
        heard.put(Update(images=[], step=step, steps=steps, seconds=time.monotonic() - began))

    def work() -> None:
        try:
            heard.put(look(pipe, settings, stop, told))
        except Stopped:
            heard.put(Update(images=[], step=0, steps=0, seconds=0, stopped=True))
        except BaseException as error:  # handed to whoever reads
            heard.put(error)

    thread = threading.Thread(target=work, name="looking", daemon=True)
    thread.start()
    try:
        while True:
            found = heard.get()
            if isinstance(found, BaseException):
                raise found
            yield found
            if isinstance(found, Inside) or found.stopped:
                return
    finally:
        stop.set()
        thread.join()


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
