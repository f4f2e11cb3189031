"""Damaged files: checkpoints with a flipped bit, or cut."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny

from soak.common import Row, checkpoints, finish, watched

CONFIG = replace(tiny.TRAIN, save_every=2, ema_decay=0.9)
TIMES = 100


def damage(folder: Path, seed: int) -> list[Row]:
    """Flips a bit in, or cuts, one file of the newest checkpoint: it is detected, and the one before is used."""
    rows, whole = [Row("bit flips in checkpoint files"), Row("checkpoint files cut short")], folder / "whole"
    finish(rows[0], tiny.Toy, CONFIG, whole, folder / "log")
    before, last = (int(c.name[-8:]) for c in checkpoints(whole))
    names = sorted(p.relative_to(whole) for p in checkpoints(whole)[-1].rglob("*") if p.is_file())
    for row in rows:
        draw = random.Random(f"{seed} {row.name}")
        for number in range(TIMES):
            out, name = folder / "copy", names[number % len(names)]
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(whole, out)
            data, bit = bytearray((whole / name).read_bytes()), draw.randrange(8 * (whole / name).stat().st_size)
            if row is rows[0]:
                data[bit // 8] ^= 1 << bit % 8
            else:
                del data[bit // 8 :]
            (out / name).write_bytes(data)
            child = finish(row, watched(tiny.Toy), replace(CONFIG, steps=last + 1), out, folder / "damaged")
            detected = child.steps()[0] == before and child.error().count("warning: the checkpoint") == 1
            harmless = child.steps()[0] == last and _json(bytes(data)) == _json((whole / name).read_bytes()) is not None
            row.expect(detected or harmless, f"{name}: not detected: {child.error()[-200:]}")
            row.count += 1
        row.notes.append(f"all detected, in {', '.join(sorted({name.name for name in names}))}")
    return rows


def _json(data: bytes) -> Any:
    """The value of JSON, None for other bytes."""
    try:
        return json.loads(data)
    except ValueError:
        return None
