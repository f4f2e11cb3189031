"""Look inside: the noise schedule, the way of z0, and where each word looks in the picture."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from ldm.app.desk import Desk, begins, stops
from ldm.app.looking import Inside, overlay, schedule_plots, watch
from ldm.app.parts import Controls, controls, figures, said, shown
from ldm.app.studio import Update
from ldm.config import UserError

NOTES = (
    "**From noise to picture**: what the model believes the picture to be, step by step",
    "**Where each word looks**: bright where cross-attention reads the word, over all layers and steps",
    "**The noise schedule** and the steps of the sampler",
)


class Looking:
    """What the tab does."""

    def __init__(self, desk: Desk, given: Controls) -> None:
        """`given` are the settings of the picture to look into."""
        self.desk, self.given = desk, given

    def run(self, request: gr.Request, *values: Any) -> Iterator[tuple]:
        """How far it is, then what was seen."""
        still = (gr.skip(),) * 3
        try:
            with self.desk.working(request, "inside") as stop:
                settings = self.given.read(values)
                if not settings.cleaned().prompt:
                    raise UserError("the prompt is empty; write what the picture should show")
                pipe = self.desk.models[settings.model]
                found = None
                for found in watch(pipe, settings, stop):
                    if isinstance(found, Update):
                        yield shown(found), settings.seed, *still
                if not isinstance(found, Inside):
                    yield said("Stopped."), settings.seed, *still
                    return
                sampler = settings.sampler or pipe.schedule.config.sampler
                drawn = schedule_plots(pipe.schedule, sampler, settings.steps)
                text = said(f"Seed {settings.seed}.") + "".join(said(note) for note in found.notes)
                yield text, settings.seed, way_of(found), words_of(found), drawn
        except UserError as error:
            yield said(str(error), wrong=True), gr.skip(), *still


def build(desk: Desk) -> None:
    """The tab, inside the page's tabs."""
    with gr.Tab("Look inside", id="inside"), gr.Row():
        with gr.Column(scale=2, min_width=300):
            given = controls(desk.models, leave_out=("count", "width", "height", "strength"))
        with gr.Column(scale=3, min_width=300):
            with gr.Row():
                go = gr.Button("Look", variant="primary", elem_id="inside-go")
                halt = gr.Button("Stop", elem_id="inside-stop")
            status = gr.HTML(
                said("One picture, and what was on the way."), elem_classes="status", elem_id="inside-status"
            )
            shelves = []
            for name, note, height in zip(("way", "words", "plots"), NOTES, (150, 150, 240), strict=True):
                gr.Markdown(note)
                shelves.append(gr.HTML(min_height=height, elem_id=f"inside-{name}"))

    outputs = [status, given.parts["seed"], *shelves]
    work = {"fn": Looking(desk, given).run, "inputs": given.inputs, "outputs": outputs}
    begins(desk, "inside", [go.click, given.parts["prompt"].submit], work, status)
    stops(desk, "inside", halt, status)


def way_of(inside: Inside) -> str:
    """The pictures on the way, as HTML."""
    return figures((image, f"t = {t:.0f}") for t, image in inside.way)


def words_of(inside: Inside) -> str:
    """The picture once for each word, as HTML."""
    seen = [(overlay(inside.image, heat), word) for word, heat in inside.words]
    return figures([(inside.image, "the picture"), *seen])
