"""Checkpoints with one bit flipped, or cut short: found out each time, and the one before is used."""

import random
import warnings
from collections import Counter
from pathlib import Path

from ldm.model_io import read_json
from ldm.train import manifest
from ldm.train import state as run_state
from soak.common import Row
from soak.models import trained

TIMES = 100


def run(folder: Path, seed: int) -> list[Row]:
    """Flips and cuts in all kinds of files of a real checkpoint, in turn."""
    rows = [Row("bit flips in checkpoint files"), Row("checkpoint files cut short")]
    trained(rows[0], folder)
    last = run_state.checkpoints(folder / "diffusion")[-1]
    kinds: dict[str, list[Path]] = {}
    for path in sorted(p for p in last.rglob("*") if p.is_file()):
        special = path.name in (manifest.NAME, "state.json")
        kinds.setdefault(path.name if special else path.suffix, []).append(path)
    for row, harm in zip(rows, (_flip, _cut), strict=True):
        draw, seen, harmless = random.Random(f"{seed} {row.what}"), Counter(), 0
        for number in range(TIMES):
            kind = list(kinds)[number % len(kinds)]
            path = draw.choice(kinds[kind])
            harmless += _check(row, folder / "diffusion", path, harm(draw, path.read_bytes()))
            seen[kind] += 1
        row.notes.append(", ".join(f"{n} {kind}" for kind, n in seen.items()))
        row.notes.append(
            f"{harmless} left manifest.json with the same meaning: the folder is whole" if harmless else "all detected"
        )
    return rows


def _flip(draw: random.Random, data: bytes) -> bytes:
    changed, place = bytearray(data), draw.randrange(8 * len(data))
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


def _cut(draw: random.Random, data: bytes) -> bytes:
    return data[: draw.randrange(len(data))]


def _check(row: Row, out: Path, path: Path, damaged: bytes) -> bool:
    """Puts `damaged` in a file's place and back; True where it changes nothing of a manifest's meaning."""
    last, before = run_state.checkpoints(out)[-1], run_state.checkpoints(out)[-2]
    whole, is_manifest = path.read_bytes(), path.name == manifest.NAME
    meaning = read_json(path) if is_manifest else None
    path.write_bytes(damaged)
    row.count += 1
    try:
        wrong = manifest.problem(last)
        if is_manifest and not wrong and read_json(path) == meaning:
            return True
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = run_state.newest(out)
        name = path.relative_to(last).as_posix()
        row.expect(bool(wrong) and found == before and len(caught) == 1, f"{name}: {wrong or 'not detected'}, {found}")
        row.expect("\n" not in wrong, f"{name}: the words have more than one line")
    except Exception as error:  # anything else would be a traceback for the user
        row.expect(False, f"{path.name}: {type(error).__name__}: {error}")
    finally:
        path.write_bytes(whole)
    return False
