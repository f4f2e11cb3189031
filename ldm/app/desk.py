"""What one running page has: its models, its folder with a bound on it, and who was told to stop."""

import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ldm.app.parts import QUEUED, QUIET, said
from ldm.app.studio import Models
from ldm.config import UserError
from ldm.images import save_png

MOST = 1000  # pictures under the page's folder; the oldest go
IDLE = said("Nothing is running.")
NAME = re.compile(r"[a-z0-9-]{1,60}-[0-9a-f]{16}\.png")


@dataclass
class Desk:
    """`stops` are the works that wait or run, by browser's tab and page's tab, and what stops each."""

    models: Models
    folder: Path
    seed: int = 0  # of the order of questions
    stops: dict[tuple[str, str], threading.Event] = field(default_factory=dict)

    def arm(self, tab: str) -> Callable[[gr.Request], None]:
        """For a click, before its work is queued: from here on a stop is meant for that work."""

        def arm(request: gr.Request) -> None:
            """A further click while the work runs or waits begins nothing, and changes nothing."""
            key = (str(request.session_hash), tab)
            if key not in self.stops or self.stops[key].is_set():
                self.stops[key] = threading.Event()

        return arm

    @contextmanager
    def working(self, request: gr.Request, tab: str) -> Iterator[threading.Event]:
        """What stops the work of a tab of the page, in one browser's tab; afterwards there is none to stop."""
        key = (str(request.session_hash), tab)
        event = self.stops.setdefault(key, threading.Event())
        try:
            yield event
        finally:
            if self.stops.get(key) is event:
                del self.stops[key]

    def stop(self, tab: str, idle: Any) -> Callable[[gr.Request], Any]:
        """For a stop button: stops the tab's work, also where it still waits in the queue; `idle` where there is none.
        Of work that was stopped its own last word is said, which may be there before this is answered."""

        def stop(request: gr.Request) -> Any:
            """Sets the event that the work looks at."""
            event = self.stops.get((str(request.session_hash), tab))
            if event is None:
                return idle
            event.set()
            return gr.skip()

        return stop

    def forget(self, request: gr.Request) -> None:
        """For a browser's tab that is closed: stops all that it began."""
        for key in [key for key in self.stops if key[0] == str(request.session_hash)]:
            self.stops.pop(key).set()

    @property
    def pictures(self) -> Path:
        """Where pictures are kept."""
        return self.folder / "pictures"

    def own(self, path: str) -> str:
        """Where the finished picture is kept that the page shows under this path (UserError)."""
        if not self.still_there([name := Path(path).name]):
            raise UserError("that is a preview, or it is no longer here: there is nothing to take from it")
        return str(self.pictures / name)

    def offered(self, chosen: gr.SelectData) -> gr.DownloadButton:
        """What a click on a picture of a gallery makes of the download button beside it."""
        try:
            return gr.DownloadButton(value=self.own(str(chosen.value["image"]["path"])), interactive=True)
        except UserError:
            return gr.DownloadButton(value=None, interactive=False)

    def keep(self, image: Image.Image, about: dict[str, str]) -> str:
        """Writes a PNG that says what it was made from; its path, under the page's folder."""
        self.pictures.mkdir(parents=True, exist_ok=True)
        words = re.sub("[^a-z0-9]+", "-", f"{about['prompt'][:40]} {about['seed']}".lower()).strip("-")
        path = self.pictures / f"{words}-{secrets.token_hex(8)}.png"
        save_png(image, path, about)
        forget_oldest(self.pictures, MOST)
        return str(path)

    def still_there(self, names: object) -> list[str]:
        """Of what a browser says are the names of pictures, those that are kept here."""
        asked = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
        return [name for name in asked if NAME.fullmatch(name) and (self.pictures / name).is_file()]


def forget_oldest(folder: Path, most: int) -> None:
    """Deletes pictures of `Desk.keep` until there are no more than `most`, the oldest first."""
    aged = []
    with os.scandir(folder) as files:
        for file in files:
            with suppress(FileNotFoundError):  # another one deletes, too
                if NAME.fullmatch(file.name):
                    aged.append((file.stat().st_mtime_ns, file.path))
    for _, path in sorted(aged)[: max(len(aged) - most, 0)]:
        Path(path).unlink(missing_ok=True)


def begins(desk: Desk, tab: str, triggers: list[Any], work: dict[str, Any], status: gr.HTML) -> None:
    """Wires what begins a tab's work, which waits in the queue for its turn."""
    for trigger in triggers:
        trigger(desk.arm(tab), None, None, **QUIET).then(**work, show_progress_on=[status], **QUEUED)


def stops(desk: Desk, tab: str, halt: gr.Button, status: gr.HTML, idle: Any = IDLE) -> None:
    """Wires the button that stops a tab's work; `idle` is shown where there is none."""
    stopping = f"() => {{ document.querySelector('#{status.elem_id} p').textContent = 'Stopping.'; }}"
    halt.click(desk.stop(tab, idle), None, status, js=stopping if idle is IDLE else None, **QUIET)
