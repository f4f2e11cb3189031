"""Judge: people say which pictures are real and which fit their caption; what they said is kept and added up."""

import math
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ldm.app.human import Rate, Staircase
from ldm.app.parts import QUIET, Desk, begins, said, shown, stops
from ldm.app.pools import Pool, data_of, prepare
from ldm.app.questions import Question, questions
from ldm.app.store import Judgement, Store
from ldm.config import UserError
from ldm.images import data_url

MODES = {
    "Real or generated?": ("single", False),
    "Real or generated? In flashes": ("single", True),
    "Which one is real?": ("pair", False),
    "Which one is real? In flashes": ("pair", True),
    "Which fits the caption better?": ("preference", False),
}
ANSWERS = {"single": ("real", "generated", ""), "pair": ("left", "right", ""), "preference": ("left", "right", "tie")}
LABELS = {"real": "Real", "generated": "Generated", "left": "Left", "right": "Right", "tie": "Neither"}
ASKED = {"single": "Is this picture real or generated?", "pair": "Which picture is real?"}
NONE = "none"
WAIT = 900  # ms before a flash, in which a cross says where to look


@dataclass
class Study:
    """One person's way through the questions of one kind."""

    session: str
    kind: str
    flash: bool
    asked: list[Question]
    pools: dict[str, Pool]
    staircase: Staircase = field(default_factory=Staircase)
    at: int = 0
    asked_at: float = 0.0  # when the question was sent, by time.monotonic

    @property
    def wait(self) -> float:
        """Seconds until the picture of a flash has been seen, and an answer is one."""
        return (WAIT + self.staircase.exposure) / 1000 if self.flash else 0.0

    @property
    def question(self) -> Question | None:
        """The one to answer next."""
        return self.asked[self.at] if self.at < len(self.asked) else None


def begin(
    kind: str, flash: bool, count: int, pools: dict[str, Pool], seed: int, session: str = "", past: Sequence[bool] = ()
) -> Study:
    """A study with `count` questions over the pictures of pools, by model; pictures are named by (model, i), real ones
    by ("", i). `past` are the session's earlier answers to such flashes: the staircase goes on where it was."""
    (first, *_) = pools.values()
    numbers = range(len(first.captions))
    made = {model: [(model, i) for i in numbers] for model in pools}
    asked = questions(seed, kind, count, made, [("", i) for i in numbers])
    session = session or uuid.uuid4().hex[:12]
    stairs = Staircase.replay(past)
    return Study(session=session, kind=kind, flash=flash, asked=asked, pools=pools, staircase=stairs)


def file_of(study: Study, picture: tuple[str, int]) -> Path:
    """Where a picture of a question is."""
    model, i = picture
    pool = study.pools[model or next(iter(study.pools))]
    return pool.made[i] if model else pool.real[i]


def caption_of(study: Study, question: Question) -> str:
    """The caption that the (first) picture of a question is of."""
    return next(iter(study.pools.values())).captions[question.pictures[0][1]]


def judge(study: Study, answer: str, folder: Path, store: Store) -> Judgement:
    """Keeps an answer to the study's question, and on to the next one (UserError, and still at this one)."""
    question = study.question
    if question is None or answer not in ANSWERS[study.kind]:
        raise UserError(f"there is no question to answer with {answer!r:.40}")
    right = None if question.truth is None else answer == question.truth
    number = question.pictures[0][1]
    seed = next(iter(study.pools.values())).seeds[number]
    files = [file_of(study, picture).relative_to(folder).as_posix() for picture in question.pictures]
    found = store.add(
        Judgement(
            kind="flash" if study.flash else study.kind,
            session=study.session,
            model=question.model,
            other_model=question.other_model,
            prompt=caption_of(study, question),
            seed=seed,
            exposure_ms=study.staircase.exposure if study.flash else None,
            answer=answer,
            right=right,
            extra={"pictures": files},
        )
    )
    if study.flash:
        study.staircase = study.staircase.answer(bool(right))
    study.at += 1
    return found


def ask(study: Study) -> str:
    """The question as HTML; pictures go along as data, as a name could tell which is which."""
    question, study.asked_at = study.question, time.monotonic()
    if question is None:
        return said("That was the last one. Thank you.")
    images = [Image.open(file_of(study, picture)) for picture in question.pictures]
    text = ASKED.get(study.kind, f"Which fits better: {caption_of(study, question)}?")
    head = f'<p role="status"><b>{escape(text)}</b> ({study.at + 1} of {len(study.asked)})</p>'
    names = ("left picture", "right picture") if len(images) > 1 else ("picture",)
    if not study.flash:
        parts = [f'<img alt="{n}" src="{data_url(i)}">' for n, i in zip(names, images, strict=True)]
        return f'{head}<div class="judged">{"".join(parts)}</div>'
    return head + flashed(names, images, study.staircase.exposure, study.at)


def flashed(names: tuple[str, ...], images: list[Image.Image], exposure: int, number: int) -> str:
    """Pictures that are seen for `exposure` ms and then covered, by the browser's own clock: a cross, the picture, a
    mask. The names of the animations change with `number`, so that each question begins anew."""
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
    return f'{style}<div class="judged">{"".join(cells)}</div><p>shown for {exposure} ms</p>'


def share(rate: Rate) -> str:
    """A share with its interval, in words."""
    if math.isnan(rate.rate):
        return "no answers yet"
    return f"{rate.rate:.0%} [{rate.low:.0%}, {rate.high:.0%}]"


def milliseconds(rate: Rate, sessions: int) -> str:
    """A median threshold with its interval, in words."""
    if not sessions:
        return f"after {Staircase().enough} flashes in one visit"
    interval = f" [{rate.low:.0f}, {rate.high:.0f}]" if math.isfinite(rate.low) else ""
    return f"{rate.rate:.0f} ms{interval}, {sessions} {'visit' if sessions == 1 else 'visits'}"


def table(results: dict[str, dict[str, Any]]) -> str:
    """All results as HTML: for each model how often people were fooled."""
    if not results:
        return said("Nothing has been judged yet.")
    parts = []
    for model, found in results.items():
        rows = [
            ("judgements", ", ".join(f"{count} {kind}" for kind, count in found["judgements"].items())),
            ("visits", str(found["sessions"])),
            ("generated taken for real, single", share(found["single"].fakes)),
            ("real taken for generated, single", share(found["single"].reals)),
            ("wrong of all, single", share(found["single"].hype_infinity)),
            ("generated chosen as real, pairs", share(found["pair"])),
            ("how long a flash fools, single", milliseconds(found["threshold_ms"], found["thresholds"])),
            ("how long a flash fools, pairs", milliseconds(found["pair_threshold_ms"], found["pair_thresholds"])),
        ]
        for other, win in found["preference"].items():
            counts = f"{win.wins} won, {win.ties} ties, {win.losses} lost, p = {win.p:.2g}"
            rows.append((f"preferred to {other}", f"{share(Rate(*win[:3]))}: {counts}"))
        body = "".join(f"<tr><th scope='row'>{escape(a)}</th><td>{escape(b)}</td></tr>" for a, b in rows)
        parts.append(f"<table><caption>{escape(model)}</caption>{body}</table>")
    note = (
        "At 50% people cannot tell generated pictures from real ones. The median time of a flash at which they begin to"
        " (HYPE, Zhou et al. 2019) is in milliseconds: longer is better for the model. Intervals are 95%."
    )
    return f'<div class="results">{"".join(parts)}<p>{note}</p></div>'


class Judging:
    """What the tab does."""

    def __init__(self, desk: Desk) -> None:
        self.desk, self.store = desk, Store(desk.folder / "judgements.sqlite")

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
        still = (None, *(gr.Button(interactive=False) for _ in range(3)))
        stop = self.desk.event(request, "judge")
        try:
            kind, flash = MODES[asked]
            wanted = [one] if kind != "preference" else [one, two]
            if kind == "preference" and two in (NONE, one):
                raise UserError(
                    "this takes two models: choose another one as well, or start the page with a second --model"
                )
            data = data_of(self.desk.models.places[one], self.desk.models[one])
            pools = {}
            for name in wanted:
                for found in prepare(self.desk.models, name, data, int(each), self.desk.seed, self.desk.folder, stop):
                    if isinstance(found, Pool):
                        pools[name] = found
                    else:
                        yield said(f"Making pictures of {name}") + shown(found), *still
            if len(pools) < len(wanted):
                yield said("Stopped; what was made is kept."), *still
                return
            mine = [j for j in self.store.judgements("flash", one, who) if j.answer in ANSWERS[kind]]
            past = [bool(j.right) for j in mine] if flash else []
            now = begin(kind, flash, int(n), pools, self.desk.seed + len(self.store.judgements()), who, past)
            yield ask(now), now, *self.labelled(now)
        except UserError as error:
            yield said(str(error), wrong=True), *still

    def answered(self, number: int, now: Study | None) -> list[Any]:
        """Keeps an answer and shows the next question; one before the picture was seen is none."""
        if now is None or now.question is None or time.monotonic() < now.asked_at + now.wait:
            return [gr.skip()] * 7
        try:
            judge(now, ANSWERS[now.kind][number], self.desk.folder, self.store)
        except UserError as error:
            return [said(str(error), wrong=True), *([gr.skip()] * 6)]
        last = self.reported() if now.question is None else [gr.skip()] * 2
        return [ask(now), now, *self.labelled(now), *last]


def build(desk: Desk) -> None:
    """The tab, inside the page's tabs."""
    judging = Judging(desk)
    names = desk.models.names
    with gr.Tab("Judge", id="judge") as tab:
        gr.Markdown(
            "Can you tell real held-out pictures from generated ones? Answers are kept in a file on this machine;"
            " a first start makes the model's pictures, which takes a while."
        )
        with gr.Row():
            mode = gr.Dropdown(list(MODES), value="Real or generated?", label="What to judge", scale=2)
            model = gr.Dropdown(names, value=names[0], label="Model")
            other = gr.Dropdown([NONE, *names], value=NONE, label="Other model (which fits better)")
            count = gr.Slider(4, 200, 20, step=1, label="Questions")
            pictures = gr.Slider(4, 200, 24, step=1, label="Pictures of each kind")
        with gr.Row():
            go = gr.Button("Start", variant="primary", elem_id="judge-go")
            halt = gr.Button("Stop preparing")
        view = gr.HTML(said("Choose what to judge and press Start."), min_height=330, elem_id="judge-view")
        with gr.Row():
            buttons = [
                gr.Button(LABELS.get(answer, ""), interactive=False, visible=bool(answer), elem_id=f"judge-answer-{i}")
                for i, answer in enumerate(ANSWERS["single"])
            ]
        with gr.Accordion("Results", open=False) as results:
            report = gr.HTML(table(judging.store.results()), elem_id="judge-results")
            export = gr.DownloadButton("Download preferences (JSONL)", interactive=False, elem_id="judge-export")
        study = gr.State(None)
        session = gr.State(lambda: uuid.uuid4().hex[:12])

        inputs = [session, mode, model, other, count, pictures]
        begins(
            desk, "judge", [go.click], {"fn": judging.start, "inputs": inputs, "outputs": [view, study, *buttons]}, view
        )
        stops(desk, "judge", halt, view)
        for number, button in enumerate(buttons):
            press = lambda now, number=number: judging.answered(number, now)  # noqa: E731
            button.click(press, study, [view, study, *buttons, report, export], **QUIET)
        results.expand(judging.reported, None, [report, export], **QUIET)
        tab.select(judging.reported, None, [report, export], **QUIET)
