"""Judge: people say which pictures are real, or which fit their caption better; their answers are kept and added up."""

import secrets
import time
from pathlib import Path

import gradio as gr
import jinja2
from PIL import Image

from ldm.app.judgements import JudgementStore
from ldm.app.picture_sets import held_out, prepare
from ldm.app.results import BLOCK, results
from ldm.app.study import ANSWERS, FIXATION, Study, questions
from ldm.app.workspace import IMMEDIATE, Workspace, message, only
from ldm.config import UserError
from ldm.images import data_url

TEMPLATES = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
QUESTIONS = [
    ("Real or generated?", "single"),
    ("Real or generated, in flashes?", "single flash"),
    ("Which one is real?", "pair"),
    ("Which one is real, in flashes?", "pair flash"),
    ("Which fits the caption better?", "preference"),
]
INTRODUCTION = """Can you tell held-out real pictures from generated ones? Half of them are real. Or which of two
models' pictures fits its caption better? Answers are kept in a file on this machine. The first start makes the model's
pictures, which takes a while."""


def build(ui: Workspace, folder: Path, seed: int) -> None:
    """Builds the tab; pictures and answers are kept in `folder`, `seed` orders the questions."""
    store, names = JudgementStore(folder / "judgements.sqlite"), ui.models.names
    with ui.tabs["judge"]:
        gr.Markdown(INTRODUCTION)
        question = gr.Dropdown(QUESTIONS, value="single", label="Question")
        with gr.Row():
            model = gr.Dropdown(names, value=names[0], label="Model to judge")
            other = gr.Dropdown(names, value=names[-1], label="Other model (which fits better)")
        count = gr.Slider(4, BLOCK, 20, step=1, label="Questions")
    with ui.results, gr.Column(elem_classes=only("judge")):
        view = gr.HTML(elem_id="judge-view")
        choice = gr.Radio([], label="Your answer (keys 1, 2, 3)", visible=False, elem_id="judge-answer")
        report = gr.HTML(elem_id="judge-results")
        export = gr.DownloadButton("Download preferences (JSONL)", elem_id="judge-export")
    current = gr.State()

    def ask(study):
        study.shown_at = time.monotonic()
        answers = [(answer.title(), answer) for answer in ANSWERS[study.kind]]
        return {
            view: question_html(study, folder),
            choice: gr.Radio(answers, value=None, visible=study.question is not None),
        }

    def start(values):
        kind, _, flash = values[question].partition(" ")
        chosen = [values[model], values[other]] if kind == "preference" else [values[model]]
        if len(set(chosen)) < len(chosen):
            raise UserError("choose two different models; start the page with more than one --model")
        yield {view: "", choice: gr.Radio(visible=False)}
        dataset, sets = held_out(ui.models, chosen[0]), {}
        for name in chosen:
            sets[name] = yield from prepare(ui.models[name], name, dataset, values[count], seed, folder)
        order = seed + len(store.judgements())
        asked = questions(kind, values[count], sets, order, secrets.token_hex(6))
        study = Study(kind=kind, flash=bool(flash), questions=asked)
        yield {current: study, ui.status: message("")} | ask(study)

    def answer(text, study):
        if not (study and study.answer(text, store)):
            return {choice: None}
        return ask(study) | ({} if study.question else totals())

    def totals():
        file = folder / "exported" / "preferences.jsonl"
        store.export_preferences(file)
        html = TEMPLATES.get_template("results.jinja").render(results=results(store.judgements()))
        return {report: html, export: str(file)}

    ui.on_start("judge", start, [question, model, other, count], [current, view, choice])
    choice.input(ui.user_errors(answer), [choice, current], {ui.status, view, choice, report, export}, **IMMEDIATE)
    ui.tabs["judge"].select(totals, None, {report, export}, **IMMEDIATE)


def question_html(study: Study, folder: Path) -> str:
    """The question to answer next, or thanks."""
    files = study.question.extra["pictures"] if study.question else ()
    images = [data_url(Image.open(folder / file)) for file in files]
    return TEMPLATES.get_template("question.jinja").render(study=study, images=images, fixation=FIXATION)
