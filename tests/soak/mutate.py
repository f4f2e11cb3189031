"""Valid input made wrong at random: bytes, JSON trees, texts. All draws come from one `random.Random`."""

import json
import random
from typing import Any

SIZES = (-1, 0, 1, 2, 3, 7, 255, 2**15, 2**31 - 1, 2**31, 2**40, 2**63 - 1, 2**63, 10**30, -(2**63))
VALUES = (None, True, False, "", "x", "a b", "../x", "\x00", "\ud800", "é" * 300, 0.5, -0.0, 1e308, 5e-324)
VALUES += (float("nan"), float("inf"), [], {}, [[]], [None], [1, "a"], {"a": {"b": 1}}, [0] * 1000)
WORDS = (
    "a red circle",
    "<|endoftext|>",
    "<|startoftext|>",
    "</w>",
    "\u0130",
    "\ufeff",
    "\u202e",
    "🦊",
    "e\u0301\u0301",
)
WORDS += ("\x00", "\udcff", "\n", "\t", "%s", "../../x", "{0}", "'", '"', "\\", "ﬃ", "\u2028", "x" * 5000, "漢字", "١٢")


def spoiled_bytes(draw: random.Random, data: bytes) -> bytes:
    """Flipped, cut, repeated, inserted, or other bytes altogether."""
    place = draw.randrange(len(data) + 1)
    kind = draw.randrange(7)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + draw.randbytes(draw.randrange(1, 30)) + data[place:]
    if kind == 2:
        return data[:place] + data[place + draw.randrange(1, 50) :]
    if kind == 3:
        return data[:place] + draw.choice((b"[", b'{"a":', b"(", b"<", b"9")) * draw.choice((10, 5000, 200_000))
    if kind == 4:
        return draw.choice((b"", b"\xff\xfe" + data, b"\xef\xbb\xbf" + data, draw.randbytes(200), b"\x00" * 4096))
    changed = bytearray(data or b"\x00")
    for _ in range(draw.choice((1, 2, 8, 40))):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def spoiled_json(draw: random.Random, value: Any) -> Any:
    """One or a few places of a JSON value replaced, removed, or filled with what stands elsewhere."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        places = list(_places(value))
        if not places:
            return hostile(draw)
        holder, key = draw.choice(places)
        kind = draw.randrange(8)
        if kind == 0:
            del holder[key]
        elif kind == 1:
            other, name = draw.choice(places)
            holder[key] = json.loads(json.dumps(other[name])) if _has(other, name) else None
        elif kind == 2 and isinstance(holder, dict):
            holder[draw.choice(("x", "", "_x", "\x00", key + "s"))] = hostile(draw)
        else:
            holder[key] = hostile(draw)
    return value


def hostile(draw: random.Random) -> Any:
    """A value that a config hardly means."""
    return draw.choice(SIZES) if draw.random() < 0.5 else draw.choice(VALUES)


def json_bytes(draw: random.Random, value: Any) -> bytes:
    """A spoiled value as JSON, sometimes with spoiled bytes too."""
    data = json.dumps(spoiled_json(draw, value)).encode()
    return spoiled_bytes(draw, data) if draw.random() < 0.25 else data


def text(draw: random.Random) -> str:
    """Words and characters that are hard on tokenizers, file names and terminals."""
    parts = [draw.choice(WORDS) for _ in range(draw.randrange(0, 12))]
    parts += [
        chr(draw.choice((draw.randrange(128), draw.randrange(0x3000), draw.randrange(0x110000)))) for _ in range(5)
    ]
    draw.shuffle(parts)
    return draw.choice(("", " ")).join(parts)


def _has(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a tree: what holds it, and its key or index there."""
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list):
        pairs = list(enumerate(value))
    else:
        return []
    return [(value, key) for key, _ in pairs] + [place for _, inner in pairs for place in _places(inner)]
