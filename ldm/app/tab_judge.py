"""Judge: people say which pictures are real, or which fit their caption better; their answers are kept and added up."""

import secrets
import time
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import jinja2
from PIL import Image

from ldm.app import controls as ui
from ldm.app.judgements import JudgementStore
from ldm.app.models import Models
from ldm.app.picture_sets import prepare
from ldm.app.results import results
from ldm.app.study import ANSWERS, FIXATION, Study, questions
from ldm.config import UserError
from ldm.images import data_url

TEMPLATES = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
QUESTIONS = {
    "Real or generated?": "single",
    "Which one is real?": "pair",
    "Which fits the caption better?": "preference",
}
LABELS = {"real": "Real", "generated": "Generated", "left": "Left", "right": "Right", "tie": "Neither"}
INTRODUCTION = """Can you tell held-out real pictures from generated ones? Half of them are real. Or which of two
models' pictures fits its caption better? Answers are kept in a file on this machine. The first start makes the model's
pictures, which takes a while."""


def build(models: Models, folder: Path, tab: gr.Tab, seed: int) -> None:
    """Builds the tab; pictures and answers are kept in `folder`, `seed` orders the questions."""
    store = JudgementStore(folder / "judgements.sqlite")
    studies: dict[str, Study] = {}  # by visit, so that a reload goes on
    gr.Markdown(INTRODUCTION)
    with gr.Row():
        kind = gr.Dropdown(list(QUESTIONS.items()), value="single", label="Question", min_width=250)
        flash = gr.Checkbox(label="In flashes", min_width=250)
        model = gr.Dropdown(models.names, value=models.names[0], label="Model")
        other = gr.Dropdown(models.names, value=models.names[-1], label="Other model (which fits better)")
        count = gr.Slider(4, 200, 20, step=1, label="Questions")
    panel = ui.Panel("judge", "Start", "Choose a question and press Start.")
    view = gr.HTML(elem_id="judge-view")
    with gr.Row():
        buttons = [gr.Button(visible=False, elem_id=f"judge-answer-{i}") for i in range(3)]
    with gr.Accordion("Results", open=False) as accordion:
        report = gr.HTML(elem_id="judge-results")
        export = gr.DownloadButton("Download preferences (JSONL)", interactive=False, elem_id="judge-export")
    visit = gr.BrowserState("", storage_key="ldm-visit", secret="ldm")

    def ask(study):
        study.shown_at = time.monotonic()
        labels = [LABELS[answer] for answer in ANSWERS[study.kind]] if study.question else []
        shown = [gr.Button(label, visible=bool(label)) for label in (*labels, "", "", "")]
        return {view: question_html(study, folder)} | dict(zip(buttons, shown, strict=False))

    def start(values):
        preference = values[kind] == "preference"
        names = [values[model], values[other]] if preference else [values[model]]
        if len(set(names)) < len(names):
            raise UserError("choose two different models; start the page with more than one --model")
        yield {view: ""} | dict.fromkeys(buttons, gr.Button(visible=False))
        sets = {}
        for name in names:
            sets[name] = yield from prepare(models, name, names[0], values[count], seed, folder)
        session, past = values[visit] or secrets.token_hex(6), store.judgements()
        study = studies[session] = Study(
            kind=values[kind],
            flash=values[flash] and not preference,
            questions=questions(values[kind], values[count], sets, seed + len(past), session),
            rights=[
                bool(j.right)
                for j in past
                if (j.kind, j.session, j.model) == ("flash", session, names[0]) and j.answer in ANSWERS[values[kind]]
            ],
        )
        yield {visit: session, panel.status: ""} | ask(study)

    @ui.user_errors()
    def answer(number, session):
        study = studies.get(session)
        if study is None or not study.answer(number, store):
            return {view: gr.skip()}
        return ask(study) | ({} if study.question else {accordion: gr.Accordion(open=True)} | show_results())

    def reload(session):
        study = studies.get(session)
        return ask(study) if study and study.question and not study.flash else {view: gr.skip()}  # no flash comes again

    def show_results():
        file = folder / "exported" / "preferences.jsonl"
        exported = store.export_preferences(file) > 0
        html = TEMPLATES.get_template("results.jinja").render(results=results(store.judgements()))
        return {report: html, export: gr.DownloadButton(value=str(file), interactive=exported)}

    panel.on([panel.start.click], start, {visit, kind, flash, model, other, count}, {visit, view, *buttons})
    shown: Any = {view, *buttons, accordion, report, export}
    for number, button in enumerate(buttons):
        button.click(partial(answer, number), visit, shown, **ui.IMMEDIATE)
    tab.select(reload, visit, shown, **ui.IMMEDIATE)
    accordion.expand(show_results, None, shown, **ui.IMMEDIATE)


def question_html(study: Study, folder: Path) -> str:
    """The question to answer next, or thanks."""
    files = study.question.extra["pictures"] if study.question else []
    images = [data_url(Image.open(folder / file)) for file in files]
    return TEMPLATES.get_template("question.jinja").render(study=study, images=images, fixation=FIXATION)
