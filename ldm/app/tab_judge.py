"""Judge: people say which pictures are real, or which fit their caption better; their answers are kept and added up."""

import secrets
import time
from collections.abc import Iterator
from functools import partial
from html import escape

import gradio as gr
from PIL import Image

from ldm.app import controls as ui
from ldm.app.judgements import JudgementStore
from ldm.app.models import Models
from ldm.app.picture_sets import PictureSet, prepare, training_data
from ldm.app.results import results
from ldm.app.storage import Pictures
from ldm.app.study import ANSWERS, FIXATION, Study, questions
from ldm.config import UserError
from ldm.images import data_url

FORMS = {
    "Real or generated?": ("single", False),
    "Real or generated? In flashes": ("single", True),
    "Which one is real?": ("pair", False),
    "Which one is real? In flashes": ("pair", True),
    "Which fits the caption better?": ("preference", False),
}
LABELS = {"real": "Real", "generated": "Generated", "left": "Left", "right": "Right", "tie": "Neither"}
INTRODUCTION = """Can you tell held-out real pictures from generated ones? Half of them are real. Or which of two models'
pictures fits its caption better? Answers are kept in a file on this machine. The first start makes the model's pictures,
which takes a while."""
EXPLANATION = """At 50% people cannot tell generated pictures from real ones. The median time of a flash that fools people
(HYPE, Zhou et al. 2019) is in milliseconds: longer is better for the model. Intervals are 95%."""


def build(models: Models, pictures: Pictures, page: gr.Blocks, seed: int) -> None:
    """Builds the tab; `seed` orders the questions."""
    store = JudgementStore(pictures.folder.parent / "judgements.sqlite")
    studies: dict[str, Study] = {}  # by visit, so that a reload goes on
    with gr.Tab("Judge", id="judge") as tab:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            form = gr.Dropdown(list(FORMS), value="Real or generated?", label="Question", scale=2)
            model = gr.Dropdown(models.names, value=models.names[0], label="Model")
            other = gr.Dropdown(models.names, value=models.names[-1], label="Other model (which fits better)")
            count = gr.Slider(4, 200, 20, step=1, label="Questions")
            each = gr.Slider(4, 200, 24, step=1, label="Pictures of each kind")
        panel = ui.Panel.build("judge", "Start", "Choose a question and press Start.")
        view = gr.HTML(min_height=330, elem_id="judge-view")
        with gr.Row():
            buttons = [gr.Button("", visible=False, elem_id=f"judge-answer-{i}") for i in range(3)]
        with gr.Accordion("Results", open=False) as accordion:
            report = gr.HTML(elem_id="judge-results")
            export = gr.DownloadButton("Download preferences (JSONL)", interactive=False, elem_id="judge-export")
        visit = gr.BrowserState("", storage_key="ldm-visit", secret="ldm")

    def start(values: dict) -> Iterator[dict]:
        kind, flash = FORMS[values[form]]
        names = [values[model], *([values[other]] if kind == "preference" else [])]
        if len({*names}) < len(names):
            raise UserError("choose two different models; `--model` may be given several times")
        yield {view: "", **dict.fromkeys(buttons, gr.Button(visible=False))}
        data = training_data(models.folders[names[0]], models[names[0]])
        sets: dict[str, PictureSet] = {}
        for name in names:
            for result in prepare(models, name, data, values[each], seed, pictures.folder.parent / "judged"):
                if isinstance(result, PictureSet):
                    sets[name] = result
                else:
                    yield {panel.status: ui.message(f"Making pictures of {name}") + ui.progress(result)}
        past = store.judgements()
        session = values[visit] or secrets.token_hex(6)
        earlier = [j for j in past if (j.kind, j.session, j.model) == ("flash", session, names[0])]
        rights = [bool(j.right) for j in earlier if j.answer in ANSWERS[kind]]
        asked = questions(kind, values[count], sets, seed + len(past), session)
        studies[session] = Study(kind=kind, flash=flash, questions=asked, rights=rights)
        yield {visit: session, panel.status: ""} | ask(studies[session])

    def ask(study: Study) -> dict:
        study.shown_at = time.monotonic()
        labels = [LABELS[answer] for answer in ANSWERS[study.kind]] if study.question else []
        labels += [""] * (len(buttons) - len(labels))
        shown = [gr.Button(label, visible=bool(label)) for label in labels]
        return {view: question_html(study, store)} | dict(zip(buttons, shown, strict=True))

    @ui.user_errors()
    def answer(number: int, session: str) -> dict:
        study = studies.get(session)
        if study is None or not study.answer(ANSWERS[study.kind][number], store):
            return {view: gr.skip()}
        return ask(study) | ({} if study.question else {accordion: gr.Accordion(open=True), **show_results()})

    def reload(session: str) -> dict:
        study = studies.get(session)  # a flash that was seen does not come again
        return ask(study) if study and study.question and not study.flash else {view: gr.skip()}

    def show_results() -> dict:
        file = pictures.folder.parent / "exported" / "preferences.jsonl"
        exported = store.export_preferences(file) > 0
        download = gr.DownloadButton(value=str(file) if exported else None, interactive=exported)
        return {report: results_html(results(store.judgements())), export: download}

    panel.on([panel.start.click], start, [visit, form, model, other, count, each], [visit, view, *buttons])
    for number, button in enumerate(buttons):
        outputs = {view, *buttons, accordion, report, export}
        button.click(partial(answer, number), visit, outputs, **ui.IMMEDIATE)
    page.load(reload, visit, {view, *buttons}, **ui.IMMEDIATE)
    for event in (tab.select, accordion.expand):
        event(show_results, None, {report, export}, **ui.IMMEDIATE)


def question_html(study: Study, store: JudgementStore) -> str:
    """The question with its pictures as data, whose names could tell which is which."""
    question = study.question
    if question is None:
        return ui.message("That was the last one. Thank you.")
    files = [store.path.parent / name for name in question.extra["pictures"]]
    sides = ("left picture", "right picture") if len(files) > 1 else ("picture",)
    images = "".join(
        f'<div class="cell"><span class="cross">+</span><img class="shot" alt="{side}" src="{data_url(Image.open(file))}">'
        '<span class="mask"></span></div>'
        for side, file in zip(sides, files, strict=True)
    )
    texts = {"single": "Is this picture real or generated?", "pair": "Which picture is real?"}
    text = texts.get(study.kind, f"Which fits better: {question.prompt}?")
    head = f"<p role='status'><b>{escape(text)}</b> ({study.position + 1} of {len(study.questions)})</p>"
    foot = ""
    if study.exposure:
        feedback = f"; the last answer was {'right' if study.rights[-1] else 'wrong'}" if study.position else ""
        foot = f"<p>shown for {study.exposure} ms{feedback}</p>"  # HYPE gives feedback, too
    kind = f"judged {'two' if len(files) > 1 else ''} {'flash' if study.flash else ''}"
    return f'{head}{flash_css(study)}<div class="{kind}">{images}</div>{foot}'


def flash_css(study: Study) -> str:
    """A cross, the pictures for their time, then a mask, by the browser's own clock. The animations' names change with
    the question, so that each begins anew. HYPE (section 2.1) counts down where the cross is here, and its masks are
    four noise textures of 30 ms each; here one checked pattern stays."""
    if not study.exposure:
        return ""
    name, end = f"flash{study.position}", FIXATION + study.exposure
    return (
        f"<style>@keyframes {name} {{ from, to {{ visibility: visible }} }}"
        f".flash .cross {{ animation: {name} {FIXATION}ms step-end }}"
        f".flash .shot {{ animation: {name} {study.exposure}ms step-end {FIXATION}ms }}"
        f".flash .mask {{ animation: {name} 1ms step-end {end}ms forwards }}</style>"
    )


def results_html(tables: dict[str, dict[str, str]]) -> str:
    """A table per model."""
    html = ""
    for model, rows in tables.items():
        cells = "".join(f"<tr><th scope='row'>{escape(a)}</th><td>{escape(b)}</td></tr>" for a, b in rows.items())
        html += f"<table><caption>{escape(model)}</caption>{cells}</table>"
    return f'<div class="results">{html}<p>{EXPLANATION}</p></div>' if html else ui.message("No answers yet.")
