"""The page and its server."""

from pathlib import Path
from typing import Any

import gradio as gr

from ldm.app import controls as ui
from ldm.app import tab_compare, tab_edit, tab_inside, tab_judge, tab_make
from ldm.app.models import Models
from ldm.app.sampling import EXIT
from ldm.app.storage import Pictures
from ldm.app.style import CSS, HEAD


def build(models: Models, folder: Path, seed: int = 0) -> gr.Blocks:
    """The page; pictures and judgements are kept under `folder`."""
    pictures = Pictures(folder / "pictures")
    with gr.Blocks(title="ldm", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86_400)) as page:
        gr.Markdown("# Pictures from words")
        with gr.Tabs() as tabs:
            edit, chosen = tab_make.build(models, pictures, page)
            inner, editor, controls = tab_edit.build(models, pictures)
            tab_compare.build(models, pictures)
            tab_inside.build(models)
            tab_judge.build(models, pictures, page, seed)

        @ui.user_errors()
        def open_editor(path: str | None) -> dict[Any, Any]:
            shown = tab_edit.open_picture(pictures.find(path), models, editor, controls)
            return shown | {tabs: gr.Tabs(selected="edit"), inner: gr.Tabs(selected="picture")}

        edit.click(open_editor, chosen, {tabs, inner, editor, *controls.values()}, **ui.IMMEDIATE)
    return page.queue(default_concurrency_limit=1, max_size=32, api_open=False)


def serve(models: Models, folder: Path, host: str, port: int, seed: int = 0) -> None:
    """Serves the page until the process is interrupted."""
    page = build(models, folder, seed)
    files = [str(folder / name) for name in ("pictures", "exported")]
    limits: dict[str, Any] = {"allowed_paths": files, "max_file_size": "8mb", "share": False, "ssr_mode": False}
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    look: dict[str, Any] = {"theme": theme, "css": CSS, "head": HEAD, "footer_links": [], "quiet": True}
    page.launch(server_name=host, server_port=port, prevent_thread_lock=True, **limits, **look)
    try:
        page.block_thread()
    finally:
        EXIT.set()
        page.close(verbose=False)
