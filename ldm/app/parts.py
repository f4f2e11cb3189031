"""What the tabs share: the controls, and how things are said."""

import re
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr
from PIL import Image

from ldm.app.studio import BOUNDS, Models, Settings, Update
from ldm.config import UserError
from ldm.images import data_url
from ldm.samplers import SAMPLERS

OWN = "the model's own"
# One sampling at a time, whichever tab asks; the page shows the place in the queue.
QUEUED: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "show_progress": "minimal"}
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden"}


def said(text: str, wrong: bool = False) -> str:
    """A message as HTML: a sentence that begins as one, without the machine's paths; whatever is in it is text."""
    text = placeless(text)
    return f'<p role="status" class="{"wrong" if wrong else ""}">{escape(text[:1].upper() + text[1:])}</p>'


def placeless(text: str) -> str:
    """A message in which files and folders go by their own names alone, without the path to them."""
    quoted = re.sub(r"""(['"])/(?:[^'"]*/)?([^'"/]+)/?\1""", r"\1\2\1", text)
    return re.sub(r"(?<![\w./<])/(?:[^\s/'\"<>]+/)+", "", quoted)


def number(value: Any, name: str, kind: type = int) -> Any:
    """What a number's field says, 0 where it is empty (UserError)."""
    try:
        found = kind(value or 0)
        if isinstance(value, float) and found != value:
            raise ValueError
        return found
    except (TypeError, ValueError, OverflowError):
        wanted = "whole number" if kind is int else "number"
        raise UserError(f"{name.replace('_', ' ')} is {str(value)[:40]!r}, which is no {wanted} here") from None


def shown(update: Update) -> str:
    """How far a sampling is, as HTML."""
    text = f"step {update.step} of {update.steps}, {update.seconds:.1f} s"
    bar = f'<progress max="{update.steps}" value="{update.step}" aria-label="steps"></progress>'
    return f"<p>{escape(text)}</p>{bar}"


def finished(update: Update, count: int, seed: int) -> str:
    """The last word on a sampling, as HTML."""
    if update.stopped:
        return said(f"Stopped at step {update.step} of {update.steps}.")
    seeds = f"seed {seed}" if count == 1 else f"seeds {seed} to {seed + count - 1}"
    done = said(f"{count} {'picture' if count == 1 else 'pictures'} in {update.seconds:.1f} s, {seeds}.")
    return done + "".join(said(note) for note in update.notes)


def figures(labelled: Iterable[tuple[Image.Image, str]]) -> str:
    """Pictures with their labels as HTML, which stays legible at any width."""
    parts = []
    for image, text in labelled:
        kind = "coarse" if max(image.size) < 128 else "fine"
        shown = f'<img class="{kind}" alt="{escape(text)}" src="{data_url(image)}">'
        parts.append(f"<figure>{shown}<figcaption>{escape(text)}</figcaption></figure>")
    return f'<div class="figures" tabindex="0" role="group" aria-label="pictures">{"".join(parts)}</div>'


def pictures(label: str, name: str, height: int, columns: int = 4) -> gr.Gallery:
    """A place for pictures, of a height that stays while they come."""
    return gr.Gallery(
        label=label,
        elem_id=name,
        elem_classes="still",
        height=height,
        columns=columns,
        object_fit="contain",
        format="png",
        interactive=False,
        allow_preview=False,
        buttons=[],
    )


@dataclass
class Controls:
    """The controls of a sampling, in the order of `names`."""

    parts: dict[str, Any]
    random: gr.Checkbox | None = None

    @property
    def names(self) -> list[str]:
        """The names of `Settings` that these give."""
        return list(self.parts)

    @property
    def inputs(self) -> list[Any]:
        """The components, for an event; with whether the seed is random, where that can be said, at the end."""
        return [*self.parts.values(), *([self.random] if self.random else [])]

    def read(self, values: tuple) -> Settings:
        """Settings from what the page sent (UserError)."""
        found = dict(zip(self.names, values[: len(self.names)], strict=True))
        if self.random and values[len(self.names)]:
            found["seed"] = secrets.randbelow(2**32 - 16)
        if found.get("sampler") == OWN:
            found["sampler"] = ""
        for name in {"seed", "steps", "count", "width", "height"} & found.keys():
            found[name] = number(found[name], name, int)
        for name in {"guidance", "guidance_rescale", "strength"} & found.keys():
            found[name] = number(found[name], name, float)
        return Settings(**found)

    def show(self, settings: Settings) -> list[Any]:
        """What the controls say of settings, in the order of `inputs`."""
        values = [
            getattr(settings, name) or (OWN if name == "sampler" else getattr(settings, name)) for name in self.names
        ]
        return [*values, *([False] if self.random else [])]


def controls(models: Models, leave_out: tuple[str, ...] = ()) -> Controls:
    """The controls of a sampling, all but those left out."""
    slider = lambda name, label, value, step: gr.Slider(  # noqa: E731
        *BOUNDS[name], value, step=step, label=label
    )
    make: dict[str, Callable[[], Any]] = {
        "prompt": lambda: gr.Textbox(
            label="Prompt", lines=1, max_lines=4, placeholder="a red circle above a blue square"
        ),
        "negative_prompt": lambda: gr.Textbox(label="Negative prompt (what to keep away from)", lines=1),
        "model": lambda: gr.Dropdown(models.names, value=models.names[0], label="Model"),
        "sampler": lambda: gr.Dropdown([OWN, *SAMPLERS], value=OWN, label="Sampler"),
        "steps": lambda: slider("steps", "Steps", 30, 1),
        "guidance": lambda: slider("guidance", "Guidance", 3.0, 0.5),
        "guidance_rescale": lambda: slider("guidance_rescale", "Guidance rescale", 0.0, 0.1),
        "count": lambda: slider("count", "Pictures", 4, 1),
        "seed": lambda: gr.Number(0, label="Seed", precision=0),
        "width": lambda: gr.Number(0, label="Width in pixels (0: the model's)", precision=0),
        "height": lambda: gr.Number(0, label="Height in pixels (0: the model's)", precision=0),
        "strength": lambda: slider("strength", "Strength (how much is drawn anew)", 0.6, 0.05),
    }
    parts: dict[str, Any] = {}
    random = None
    wanted = [name for name in make if name not in leave_out]
    for name in [n for n in ("prompt", "negative_prompt", "model") if n in wanted]:
        parts[name] = make[name]()
    for row in (("steps", "guidance"), ("count", "strength"), ("seed",)):
        if names := [name for name in row if name in wanted]:
            with gr.Row():
                for name in names:
                    parts[name] = make[name]()
                if "seed" in names:
                    random = gr.Checkbox(False, label="Random seed")
    if names := [n for n in ("sampler", "guidance_rescale", "width", "height") if n in wanted]:
        with gr.Accordion("More", open=False):
            for name in names:
                parts[name] = make[name]()
    return Controls(parts, random)
