"""The page: what is on it and what a click does. Everything it shows comes from `studio`, `looking` and `human`."""

from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ldm.app import tab_compare, tab_edit, tab_inside, tab_judge, tab_make
from ldm.app.desk import Desk
from ldm.app.parts import QUIET
from ldm.app.studio import Models

EDITED = 512  # pixels a side in the editor, whose brush is some 25 wide


def build(models: Models, folder: Path, seed: int = 0) -> gr.Blocks:
    """The page over `models`; what it writes goes under `folder`, what it serves too."""
    desk = Desk(models=models, folder=folder, seed=seed)
    with gr.Blocks(title="ldm", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86_400)) as page:
        gr.Markdown("# Pictures from words")
        with gr.Tabs() as tabs:
            edit, chosen = tab_make.build(desk, page)
            editor = tab_edit.build(desk)
            tab_compare.build(desk)
            tab_inside.build(desk)
            tab_judge.build(desk)
        edit.click(to_edit, chosen, [editor, tabs], **QUIET)
        page.unload(desk.forget)
    return page.queue(default_concurrency_limit=1, max_size=32, api_open=False)


def to_edit(path: str | None) -> list[Any]:
    """Puts a picture, if one was chosen, into the editor, as large as its brush is meant for, and turns to it."""
    drawn: Any = gr.skip()
    if path:
        image = Image.open(path)
        scale = max(1, EDITED // max(image.size))
        image = image.resize((scale * image.width, scale * image.height), Image.Resampling.NEAREST)
        drawn = {"background": image, "layers": [], "composite": image}
    return [drawn, gr.Tabs(selected="edit")]
