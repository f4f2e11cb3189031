"""Judge: people say which pictures are real and which fit their caption; what they said is kept and added up."""

import re
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from html import escape
from typing import Any

import gradio as gr
from PIL import Image

from ldm.app.desk import Desk, begins, stops
from ldm.app.parts import QUIET, said, shown
from ldm.app.pools import Pool, data_of, prepare
from ldm.app.store import Store
from ldm.app.study import ANSWERS, WAIT, Study, begin, caption_of, file_of, judge
from ldm.app.tables import table
from ldm.config import UserError
from ldm.images import data_url

MODES = {
    "Real or generated?": ("single", False),
    "Real or generated? In flashes": ("single", True),
    "Which one is real?": ("pair", False),
    "Which one is real? In flashes": ("pair", True),
    "Which fits the caption better?": ("preference", False),
}
LABELS = {"real": "Real", "generated": "Generated", "left": "Left", "right": "Right", "tie": "Neither"}
ASKED = {"single": "Is this picture real or generated?", "pair": "Which picture is real?"}
NONE = "none"
VISITS = 200  # whose questions are kept at a time, for a reload
# The browser's tab keeps the visit's name, so that a reload goes on with its questions.
REMEMBER = "who => { sessionStorage.setItem('visit', who); }"
RECALL = "() => [sessionStorage.getItem('visit') || '']"


def ask(study: Study) -> str:
    """The question as HTML; pictures go along as data, as a name could tell which is which."""
    question, study.asked_at = study.question, time.monotonic()
    if question is None:
        return said("That was the last one. Thank you.")
    images = [Image.open(file_of(study, picture)) for picture in question.pictures]
    text = ASKED.get(study.kind, f"Which fits better: {caption_of(study, question)}?")
    head = f'<p role="status" class="asked"><b>{escape(text)}</b> ({study.at + 1} of {len(study.asked)})</p>'
    names = ("left picture", "right picture") if len(images) > 1 else ("picture",)
    if not study.flash:
        parts = [f'<img alt="{n}" src="{data_url(i)}">' for n, i in zip(names, images, strict=True)]
        return f'{head}<div class="judged {"two" if len(images) > 1 else "one"}">{"".join(parts)}</div>'
    # as in HYPE, people are told whether they were right
    last = f"; the last answer was {'right' if study.staircase.answers[-1] else 'wrong'}" if study.at else ""
    foot = f"<p>shown for {study.staircase.exposure} ms{last}</p>"
    return head + flashed(names, images, study.staircase.exposure, study.at) + foot


def flashed(names: tuple[str, ...], images: list[Image.Image], exposure: int, number: int) -> str:
    """Pictures that are seen for `exposure` ms and then covered, by the browser's own clock: a cross, the picture, a
    mask. The names of the animations change with `number`, so that each question begins anew.

    HYPE (section 2.1) counts down from three for 1.5 s where the cross is here, and masks with four noise textures of
    30 ms each; the one mask here is a checked pattern that stays.
    """
    on, off = f"on{number}", f"off{number}"
    style = (
        f"<style>@keyframes {on} {{ from, to {{ visibility: visible }} }}"
        f"@keyframes {off} {{ from, to {{ visibility: visible }} }}"
        f".judged .shot {{ visibility: hidden; animation: {on} {exposure}ms step-end {WAIT}ms 1 }}"
        f".judged .mask {{ visibility: hidden; animation: {off} 1ms step-end {WAIT + exposure}ms 1 forwards }}"
        f".judged .cross {{ animation: {on} {WAIT}ms step-end 1; visibility: hidden }}</style>"
    )
    cells = [
        f'<div class="cell"><span class="cross">+</span><img class="shot" alt="{name}, shown for {exposure} ms"'
        f' src="{data_url(image)}"><span class="mask"></span></div>'
        for name, image in zip(names, images, strict=True)
    ]
    return f'{style}<div class="judged {"two" if len(images) > 1 else "one"}">{"".join(cells)}</div>'


class Judging:
    """What the tab does."""

    def __init__(self, desk: Desk) -> None:
        """Opens the file of answers, or makes it (UserError)."""
        self.desk, self.store = desk, Store(desk.folder / "judgements.sqlite")
        self.studies: OrderedDict[str, Study] = OrderedDict()  # by visit

    def visit(self, who: object) -> list[Any]:
        """A browser's tab is opened or loaded again: its visit's name, a new one if it has none, and its question; that
        of a flash, which was seen, does not come again."""
        if not isinstance(who, str) or not re.fullmatch("[0-9a-f]{12}", who):
            return [uuid.uuid4().hex[:12], *[gr.skip()] * 4]
        now = self.studies.get(who)
        return [who, *([ask(now), *self.labelled(now)] if now and not now.flash else [gr.skip()] * 4)]

    def labelled(self, now: Study) -> list[Any]:
        """The answer buttons of a question."""
        return [
            gr.Button(LABELS.get(a, ""), interactive=now.question is not None, visible=bool(a))
            for a in ANSWERS[now.kind]
        ]

    def reported(self) -> list[Any]:
        """The results, and the preferences to download."""
        file = self.desk.folder / "exported" / "preferences.jsonl"
        there = self.store.export_preferences(file) if self.store.judgements("preference") else 0
        download = gr.DownloadButton(value=str(file) if there else None, interactive=bool(there))
        return [table(self.store.results()), download]

    def start(
        self, request: gr.Request, who: str, asked: str, one: str, two: str, n: float, each: float
    ) -> Iterator[tuple]:
        """Makes what pictures are missing, then asks the first question."""
        # whatever was asked before is no longer shown, and must not be answered
        self.studies.pop(who, None)
        still = [gr.Button(interactive=False) for _ in range(3)]
        try:
            kind, flash = MODES[asked]
            if kind == "preference" and two in (NONE, one):
                raise UserError(
                    "this takes two models: choose another one as well, or start the page with a second --model"
                )
            pools: dict[str, Pool] = {}
            with self.desk.working(request, "judge") as stop:
                for found in self.prepared([one, two] if kind == "preference" else [one], int(each), stop):
                    if isinstance(found, str):
                        yield found, *still
                    else:
                        pools = found
            mine = [j for j in self.store.judgements("flash", one, who) if j.answer in ANSWERS[kind]]
            past = [bool(j.right) for j in mine] if flash else []
            now = begin(kind, flash, int(n), pools, self.desk.seed + len(self.store.judgements()), who, past)
            self.studies[who] = now
            while len(self.studies) > VISITS:
                self.studies.popitem(last=False)
            yield ask(now), *self.labelled(now)
        except UserError as error:
            yield said(str(error), wrong=True), *still

    def prepared(self, models: list[str], count: int, stop: threading.Event) -> Iterator[str | dict[str, Pool]]:
        """Says how far the making of pictures is that are missing, then gives those of each model (UserError)."""
        data = data_of(self.desk.models.places[models[0]], self.desk.models[models[0]])
        pools = {}
        for name in models:
            for found in prepare(self.desk.models, name, data, count, self.desk.seed, self.desk.folder, stop):
                if isinstance(found, Pool):
                    pools[name] = found
                else:
                    yield said(f"Making pictures of {name}") + shown(found)
            if name not in pools:
                raise UserError("stopped; what was made is kept")
        yield pools

    def answered(self, number: int, who: str) -> list[Any]:
        """Keeps an answer and shows the next question, after the last one the results; an answer before the picture was
        seen is none."""
        now = self.studies.get(who)
        if now is None or now.question is None or time.monotonic() < now.asked_at + now.wait:
            return [gr.skip()] * 7
        try:
            judge(now, ANSWERS[now.kind][number], self.desk.folder, self.store)
        except UserError as error:
            return [said(str(error), wrong=True), *([gr.skip()] * 6)]
        last = [gr.Accordion(open=True), *self.reported()] if now.question is None else [gr.skip()] * 3
        return [ask(now), *self.labelled(now), *last]


def build(desk: Desk, page: gr.Blocks) -> None:
    """The tab, inside the page's tabs."""
    judging = Judging(desk)
    names = desk.models.names
    with gr.Tab("Judge", id="judge") as tab:
        gr.Markdown(
            "Can you tell real held-out pictures from generated ones? Half of them are real. Or which of two models'"
            " pictures fits its caption better? Answers are kept in a file on this machine; a first start makes the"
            " model's pictures, which takes a while."
        )
        with gr.Row():
            mode = gr.Dropdown(list(MODES), value="Real or generated?", label="What to judge", scale=2)
            model = gr.Dropdown(names, value=names[0], label="Model")
            other = gr.Dropdown([NONE, *names], value=NONE, label="Other model (which fits better)")
            count = gr.Slider(4, 200, 20, step=1, label="Questions")
            pictures = gr.Slider(4, 200, 24, step=1, label="Pictures of each kind")
        with gr.Row():
            go = gr.Button("Start", variant="primary", elem_id="judge-go")
            halt = gr.Button("Stop preparing", elem_id="judge-stop")
        view = gr.HTML(said("Choose what to judge and press Start."), min_height=330, elem_id="judge-view")
        with gr.Row():
            buttons = [
                gr.Button(LABELS.get(answer, ""), interactive=False, visible=bool(answer), elem_id=f"judge-answer-{i}")
                for i, answer in enumerate(ANSWERS["single"])
            ]
        with gr.Accordion("Results", open=False) as results:
            report = gr.HTML(table(judging.store.results()), elem_id="judge-results")
            export = gr.DownloadButton("Download preferences (JSONL)", interactive=False, elem_id="judge-export")
        who = gr.Textbox("", visible="hidden", label="Visit", elem_id="judge-visit")
        page.load(judging.visit, who, [who, view, *buttons], js=RECALL, **QUIET)
        who.change(None, who, None, js=REMEMBER, **QUIET)

        inputs = [who, mode, model, other, count, pictures]
        begins(desk, "judge", [go.click], {"fn": judging.start, "inputs": inputs, "outputs": [view, *buttons]}, view)
        stops(desk, "judge", halt, view, idle=gr.skip())  # a question may stand there
        for number, button in enumerate(buttons):
            press = partial(judging.answered, number)
            button.click(press, who, [view, *buttons, results, report, export], **QUIET)
        results.expand(judging.reported, None, [report, export], **QUIET)
        tab.select(judging.reported, None, [report, export], **QUIET)
