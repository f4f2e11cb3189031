"""The page and its server."""

from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ldm.app import controls as ui
from ldm.app import tab_compare, tab_edit, tab_inside, tab_judge, tab_make
from ldm.app.models import Models
from ldm.app.sampling import EXIT
from ldm.app.storage import Pictures
from ldm.app.style import CSS, HEAD

LOCAL = ("127.0.0.1", "localhost", "::1")


def build(models: Models, folder: Path, seed: int = 0) -> gr.Blocks:
    """The page; pictures and judgements are kept under `folder`."""
    pictures = Pictures(folder / "pictures")
    with gr.Blocks(title="ldm", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86_400)) as page:
        gr.Markdown("# Pictures from words")
        with gr.Tabs() as tabs:
            with gr.Tab("Make"):
                edit, chosen = tab_make.build(models, pictures, page)
            with gr.Tab("Edit", id="edit"), gr.Tabs() as inner:
                with gr.Tab("A picture", id="picture"):
                    editor, controls = tab_edit.build(models, pictures)
                with gr.Tab("Between two prompts"):
                    tab_edit.build_interpolation(models, pictures)
            with gr.Tab("Compare"):
                tab_compare.build(models, pictures)
            with gr.Tab("Look inside"):
                tab_inside.build(models, pictures)
            with gr.Tab("Judge") as judge:
                tab_judge.build(models, folder, judge, seed)

        @ui.user_errors()
        def open_editor(path):
            image, values = tab_edit.open_picture(pictures.find(path), models)
            shown = {controls[name]: value for name, value in values.items()}
            return shown | {editor: image, tabs: gr.Tabs(selected="edit"), inner: gr.Tabs(selected="picture")}

        edit.click(open_editor, chosen, {tabs, inner, editor, *controls.values()}, **ui.IMMEDIATE)
    return page.queue(default_concurrency_limit=1, max_size=32, api_open=False)


def serve(models: Models, folder: Path, host: str, port: int, seed: int = 0) -> None:
    """Serves the page until the process is interrupted."""
    # on this machine alone, another site's name that resolves to it must not be answered (DNS rebinding)
    hosts = [*LOCAL, "[::1]"] if host in LOCAL else ["*"]
    page = build(models, folder, seed)
    page.launch(
        server_name=host,
        server_port=port,
        allowed_paths=[str(folder / name) for name in ("pictures", "exported")],
        max_file_size="8mb",
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=CSS,
        head=HEAD,
        footer_links=[],
        ssr_mode=False,
        quiet=True,
        app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)]},
        prevent_thread_lock=True,
    )
    try:
        EXIT.wait()  # until ctrl-C
    finally:
        EXIT.set()
        page.close(verbose=False)
