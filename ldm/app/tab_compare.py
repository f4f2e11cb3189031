"""Compare: the same prompt and seed over a list of values, as one labelled picture."""

from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
from PIL import Image

from ldm.app.desk import Desk, begins, stops
from ldm.app.parts import QUIET, Controls, controls, figures, said, shown
from ldm.app.studio import Models, Settings, about_picture, changed, clean, make
from ldm.config import UserError
from ldm.images import captioned_grid

MOST = 8
AXES: dict[str, tuple[Callable[[str], Any], str]] = {
    "guidance": (float, "1, 2, 3, 5, 8"),
    "steps": (int, "5, 10, 20, 40"),
    "sampler": (str, "ddim, euler, dpmpp_2m, unipc"),
    "model": (str, ""),
    "guidance_rescale": (float, "0, 0.3, 0.7, 1"),
    "seed": (int, "0, 1, 2, 3, 4, 5"),
}


def variants(settings: Settings, axis: str, text: str, models: Models) -> list[tuple[str, Settings]]:
    """A label and settings for each value in a comma-separated list (UserError)."""
    if axis not in AXES:
        raise UserError(f"cannot compare over {axis!r}; known: {', '.join(AXES)}")
    words = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if axis == "model" and not words:
        words = models.names
    if not 1 <= len(words) <= MOST:
        raise UserError(f"{len(words)} values to compare; give 1 to {MOST}, with commas between")
    found = []
    for word in words:
        try:
            value = AXES[axis][0](word)
        except ValueError:
            raise UserError(f"{word[:80]!r} is no value of {axis.replace('_', ' ')}") from None
        if axis == "model" and value not in models.names:
            models[value]  # says which there are
        found.append((f"{axis.replace('_', ' ')} {word}", changed(settings, **{axis: value})))
    return found


class Comparing:
    """What the tab does."""

    def __init__(self, desk: Desk, given: Controls) -> None:
        """`given` are the settings that the pictures share."""
        self.desk, self.given = desk, given

    def listed(self, axis: str) -> str:
        """What to begin with, as a list of values to compare over."""
        return ", ".join(self.desk.models.names[:MOST]) if axis == "model" else AXES.get(axis, (str, ""))[1]

    def run(self, request: gr.Request, axis: str, text: str, *values: Any) -> Iterator[tuple]:
        """One picture after the other, with its label; then all of them as one to download."""
        images: list[Image.Image] = []
        seed = gr.skip()
        try:
            with self.desk.working(request, "compare") as stop:
                base = self.given.read(values)
                if not base.cleaned().prompt:
                    raise UserError("the prompt is empty; write what the pictures should show")
                seed = base.seed
                wanted = variants(base, axis, text, self.desk.models)
                labels = [label for label, _ in wanted]
                for number, (label, settings) in enumerate(wanted, start=1):
                    for update in make(self.desk.models[settings.model], settings, stop):
                        if update.stopped:
                            yield gr.skip(), said(f"Stopped at {label}."), seed, gr.skip()
                            return
                        if not update.done:
                            head = said(f"{number} of {len(wanted)}: {label}")
                            yield gr.skip(), head + shown(update), seed, gr.skip()
                    images += update.images
                    done = said(f"{number} of {len(wanted)} done.")
                    yield figures(zip(images, labels, strict=False)), done, seed, gr.skip()
                sheet = captioned_grid(images, labels, columns=min(4, len(wanted)), cell=200)
                about = about_picture(self.desk.models[base.model], base, 0, compared=axis, values=clean(text))
                ready = gr.DownloadButton(value=self.desk.keep(sheet, about), interactive=True)
                yield gr.skip(), said(f"Done, with seed {base.seed}: {', '.join(labels)}."), seed, ready
        except UserError as error:
            yield gr.skip(), said(str(error), wrong=True), seed, gr.skip()


def build(desk: Desk) -> None:
    """The tab, inside the page's tabs."""
    with gr.Tab("Compare", id="compare"), gr.Row():
        with gr.Column(scale=2, min_width=300):
            axis = gr.Dropdown(list(AXES), value="guidance", label="Compare over")
            values = gr.Textbox(AXES["guidance"][1], label=f"Values, up to {MOST}, with commas between")
            given = controls(desk.models, leave_out=("count", "width", "height", "strength"))
        with gr.Column(scale=3, min_width=300):
            with gr.Row():
                go = gr.Button("Compare", variant="primary", elem_id="compare-go")
                halt = gr.Button("Stop", elem_id="compare-stop")
            status = gr.HTML(
                said("One picture for each value, of one prompt and seed."),
                elem_classes="status",
                elem_id="compare-status",
            )
            grid = gr.HTML(min_height=440, elem_id="compare-grid", elem_classes="large")
            download = gr.DownloadButton("Download them as one picture", interactive=False, elem_id="compare-download")

    comparing = Comparing(desk, given)
    axis.change(comparing.listed, axis, values, **QUIET)
    outputs = [grid, status, given.parts["seed"], download]
    work = {"fn": comparing.run, "inputs": [axis, values, *given.inputs], "outputs": outputs}
    begins(desk, "compare", [go.click], work, status)
    stops(desk, "compare", halt, status)
