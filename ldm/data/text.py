"""Users' text, read one way everywhere: UTF-8 with or without a byte order mark, any line ends; and captions in it."""

from pathlib import Path
from typing import Any

from ldm.config import UserError


def decode(data: bytes, name: str) -> str:
    """UTF-8 bytes as text with "\\n" as line ends. Raises UserError, naming `name`, for other bytes."""
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def read_text(file: Path) -> str:
    """A text file's content. Raises UserError when it cannot be read or is not UTF-8."""
    try:
        return decode(file.read_bytes(), repr(str(file)))
    except OSError as error:
        raise UserError(f"{str(file)!r} cannot be read: {error.strerror}") from None


def clean_captions(value: Any, name: str) -> list[str]:
    """Captions from a string or a list of strings: stripped, without empty ones, NUL characters and lone surrogates
    replaced. Raises UserError when none is left."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise UserError(f"{name}: the caption must be a string or a list of strings, not {str(value)[:80]!r}")
    items = [item.replace("\0", " ").encode("utf-8", "replace").decode().strip() for item in items]
    if not any(items):
        raise UserError(f"{name} has no caption; write at least one that is not empty")
    return [item for item in items if item]
