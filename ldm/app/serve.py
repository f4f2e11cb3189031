"""Serves the page from this machine, with nothing fetched from outside."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.middleware.trustedhost import TrustedHostMiddleware

from ldm.app.front import CSS, HEAD, THEME
from ldm.app.page import build
from ldm.app.studio import ENDING, Models
from ldm.app.veil import Veil

# The browser itself refuses whatever would come from, or go to, another machine.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline';"
    " img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:;"
    " frame-ancestors 'none'"
)


def application(models: Models, folder: Path, seed: int = 0, hosts: Sequence[str] = ()) -> FastAPI:
    """The page as an application for a server that answers to `hosts`, by default to anyone who asks by any name."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if hosts:  # or another site's name that leads here could read the page
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    page = build(models, folder, seed)
    page.has_launched = True  # without it gradio takes any file of the machine for an upload

    @app.middleware("http")
    async def stay_here(request: Request, answer: Any) -> Response:
        response = await answer(request)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    app.add_middleware(Veil, folder=folder)
    return gr.mount_gradio_app(
        app,
        page,
        path="/",
        allowed_paths=[str(folder / name) for name in ("pictures", "exported")],
        theme=THEME,
        css=CSS,
        head=HEAD,
        show_error=False,
        max_file_size="8mb",
        ssr_mode=False,
        pwa=False,
        footer_links=[],
        enable_monitoring=False,
    )


def serve(models: Models, folder: Path, host: str, port: int, seed: int = 0) -> None:
    """Serves until the process is told to stop."""
    local = ("127.0.0.1", "localhost", "[::1]", "::1")
    app = application(models, folder, seed, local if host in local else ())
    config = uvicorn.Config(app, host=host, port=port, log_level="critical", timeout_graceful_shutdown=2)
    try:
        uvicorn.Server(config).run()
    finally:
        ENDING.set()
