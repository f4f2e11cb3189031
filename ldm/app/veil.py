"""Keeps the machine's paths out of all that the page sends: gradio names files by where they are."""

import json
import os
import re
import tempfile
from collections.abc import Awaitable, Callable, MutableMapping
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import ldm

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]
# What says where files are. Scripts and styles are gradio's own files, which stay as they are.
TEXTS = (b"text/html", b"text/plain", b"text/event-stream", b"application/json")
FIXED = ("/assets/", "/static/")


class Veil:
    """An ASGI application around another one, in whose texts folders have other names.

    Folders that the page serves files of (`folder`, and gradio's for uploads) are "/page" and "/uploads", in answers
    and back again in what is asked for; in answers the package is "ldm", the working folder "." and the home "~".
    """

    def __init__(self, app: Application, folder: Path) -> None:
        self.app = app
        uploads = os.environ.get("GRADIO_TEMP_DIR") or os.path.join(tempfile.gettempdir(), "gradio")
        self.served = {"/page": str(folder.resolve()), "/uploads": str(Path(uploads).resolve())}
        others = {"ldm": str(Path(ldm.__file__).parent), ".": os.getcwd(), "~": str(Path.home())}
        found = {path: name for name, path in (*others.items(), *self.served.items()) if len(path) > 1}
        spelt = {way.encode(): name.encode() for path, name in found.items() for way in _spellings(path)}
        # the longest first: a folder's name before that of one around it; and whole names, not the half of another one
        ways = b"|".join(re.escape(way) for way in sorted(spelt, key=len, reverse=True))
        self.names, self.ways = spelt, re.compile(rb"(?:" + ways + rb")(?![\w-])")

    def veiled(self, text: bytes) -> bytes:
        """A text of an answer, without the machine's paths."""
        return self.ways.sub(lambda found: self.names[found[0]], text)

    def path(self, asked: str) -> str:
        """The path that a request means, by the names that the page knows. Gradio refuses what it does not serve."""
        for marker in ("/file=", "/file/"):
            before, found, file = asked.partition(marker)
            if found:
                return before + found + self.place(file)
        return asked

    def place(self, file: str) -> str:
        """Where a file is that the page knows by another name."""
        for name, path in self.served.items():
            if file.startswith(name + "/"):
                return path + file.removeprefix(name)
        return file

    def unveiled(self, value: Any) -> Any:
        """What a page sends, its files' names where gradio looks for them."""
        if isinstance(value, dict):
            found = {key: self.unveiled(part) for key, part in value.items()}
            path = found.get("path")
            return found | {"path": self.place(path)} if isinstance(path, str) else found
        return [self.unveiled(part) for part in value] if isinstance(value, list) else value

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Passes a request on, and the answer back."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = self.path(scope["path"])
        scope = {**scope, "path": path, "raw_path": quote(path).encode()}
        if not path.startswith(FIXED):  # what is compressed cannot be read here
            scope["headers"] = [(k, v) for k, v in scope["headers"] if k != b"accept-encoding"]
        headers = dict(scope["headers"])
        if headers.get(b"content-type", b"").startswith(b"application/json"):
            body = await _whole(receive)
            body = self.asked(body)
            scope["headers"] = [(k, v) for k, v in scope["headers"] if k != b"content-length"]
            scope["headers"].append((b"content-length", str(len(body)).encode()))
            receive = _again(body, receive)
        await self.app(scope, receive, _Answer(self, send))

    def asked(self, body: bytes) -> bytes:
        """A request's JSON for gradio; what is none stays as it is, for gradio to refuse."""
        try:
            return json.dumps(self.unveiled(json.loads(body))).encode()
        except (ValueError, RecursionError):
            return body


class _Answer:
    """Sends an answer on, texts veiled: whole ones with their new length, streams piece by piece."""

    def __init__(self, veil: Veil, send: Send) -> None:
        self.veil, self.send = veil, send
        self.start: Message | None = None
        self.text = False

    async def __call__(self, message: Message) -> None:
        """One message of the answer."""
        if message["type"] == "http.response.start":
            kind = dict(message["headers"]).get(b"content-type", b"")
            self.text, self.start = kind.startswith(TEXTS), message
            return
        if message["type"] == "http.response.body":
            if self.text:
                message = {**message, "body": self.veil.veiled(message.get("body", b""))}
            if self.start is not None:
                await self.send(self.begun(message))
                self.start = None
        await self.send(message)

    def begun(self, first: Message) -> Message:
        """The answer's beginning, with the length that its text has now; of a stream nobody knows it."""
        start = self.start or {}
        if not self.text:
            return start
        headers = [(k, self.veil.veiled(v)) for k, v in start["headers"] if k != b"content-length"]
        if not first.get("more_body"):
            headers.append((b"content-length", str(len(first["body"])).encode()))
        return {**start, "headers": headers}


def _spellings(path: str) -> tuple[str, ...]:
    """How a path looks in plain text, in JSON, in an address and in HTML."""
    return path, json.dumps(path)[1:-1], quote(path), escape(path)


async def _whole(receive: Receive) -> bytes:
    """A request's body."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if message["type"] != "http.request" or not message.get("more_body"):
            return body


def _again(body: bytes, receive: Receive) -> Receive:
    """Gives a body that was already read, and then what comes."""
    given = False

    async def receive_again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again
