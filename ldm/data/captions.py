"""Captions as they come in files -> clean lists of strings; shared by folders and shards."""

import json
from typing import Any

from ldm.config import UserError


def decode(data: bytes, where: str) -> str:
    """UTF-8 text (a leading byte-order mark dropped); `where` names the file in the UserError."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def parse_object(text: str, where: str) -> dict[str, Any]:
    """One JSON object; UserError naming `where` for broken JSON or JSON of another type."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error or 'nested too deeply'}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} must be a JSON object, e.g. {{...}}, but is a {type(value).__name__}")
    return value


def captions_of(value: Any, where: str) -> list[str]:
    """Captions from a string or a list of strings, stripped, empty ones dropped; at least one, or UserError.

    NUL characters and lone surrogates, which tokenizers and files trip over, become spaces and "?".
    """
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise UserError(f"{where}: the caption must be a string or a list of strings, not {str(value)[:80]!r}")
    cleaned = [item.replace("\0", " ").encode("utf-8", "replace").decode("utf-8").strip() for item in items]
    captions = [item for item in cleaned if item]
    if not captions:
        raise UserError(f"{where} has no caption; write at least one that is not empty")
    return captions


def lines_of(text: str, where: str) -> list[str]:
    """Captions of a `.txt` file: each line that is not empty is one. UserError when there is none."""
    return captions_of(text.split("\n"), where)
