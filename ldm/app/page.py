"""The page and its server."""

from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ldm.app import tab_judge, tabs
from ldm.app.models import Models
from ldm.app.pictures import Pictures
from ldm.app.sampling import EXIT
from ldm.app.style import CSS, HEAD
from ldm.app.workspace import Workspace

THEME = gr.themes.Base(primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace"]).set(
    button_primary_background_fill="*primary_600",  # with white 4.5 or more, as the subdued text has
    button_primary_background_fill_hover="*primary_700",
    color_accent="*primary_600",
    body_text_color_subdued="*neutral_500",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
)
LOCAL = ("127.0.0.1", "localhost", "::1")


def build(models: Models, folder: Path, seed: int = 0) -> gr.Blocks:
    """The page; pictures and judgements are kept under `folder`."""
    with gr.Blocks(title="ldm", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86_400)) as page:
        gr.Markdown("# Pictures from words")
        ui = Workspace(models, Pictures(folder / "pictures"))
        for build_tab in (tabs.build_generate, tabs.build_edit, tabs.build_compare, tabs.build_inside):
            build_tab(ui)
        tab_judge.build(ui, folder, seed)
        ui.connect(page)
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
        theme=THEME,
        css=CSS,
        head=HEAD,
        footer_links=[],
        run_history=False,
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
