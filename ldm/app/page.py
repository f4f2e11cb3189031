"""The page: what is on it and what a click does. Everything it shows comes from `studio`, `looking` and `human`."""

from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from ldm.app import tab_compare, tab_edit, tab_inside, tab_judge, tab_make
from ldm.app.desk import Desk
from ldm.app.parts import QUIET, said
from ldm.app.studio import Models
from ldm.config import UserError


def build(models: Models, folder: Path, seed: int = 0) -> gr.Blocks:
    """The page over `models`; what it writes goes under `folder`, what it serves too."""
    desk = Desk(models=models, folder=folder, seed=seed)
    with gr.Blocks(title="ldm", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86_400)) as page:
        gr.Markdown("# Pictures from words")
        with gr.Tabs() as tabs:
            edit, chosen, status = tab_make.build(desk, page)
            taken = tab_edit.build(desk)
            tab_compare.build(desk)
            tab_inside.build(desk)
            tab_judge.build(desk, page)
        edit.click(partial(to_edit, models), chosen, [status, tabs, *taken], **QUIET)
        page.unload(desk.forget)
    return page.queue(default_concurrency_limit=1, max_size=32, api_open=False)


def to_edit(models: Models, path: str | None) -> list[Any]:
    """Turns to Edit with the chosen picture in it, or says what is missing."""
    try:
        if not path:
            raise UserError("there is no picture to edit yet; make one, or click on one")
        return [gr.skip(), gr.Tabs(selected="edit"), *tab_edit.handed(path, models)]
    except UserError as error:
        return [said(str(error), wrong=True), gr.skip(), *[gr.skip()] * (2 + len(tab_edit.HANDED))]
