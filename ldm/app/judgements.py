"""People's answers, in a SQLite file that threads, browsers and processes may share."""

import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ldm.config import UserError


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A question about pictures, and its answer. `kind`: single ("real" or "generated"), pair (which side is real),
    flash (either, for `exposure_ms`) or preference ("left", "right" or "tie", between `model` on the left and
    `other_model` on the right).

    `model`: whose pictures are judged, also where the picture is real. `right`: None for preferences. `extra`: JSON;
    "pictures" are the files shown, relative to the database's folder.
    """

    kind: str
    session: str
    model: str
    answer: str = ""
    right: bool | None = None
    other_model: str = ""
    prompt: str = ""
    seed: int | None = None
    exposure_ms: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    time: str = ""  # UTC, set by the store


COLUMNS = ", ".join(f'"{field.name}"' for field in fields(Judgement))


class JudgementStore:
    """The judgements in the file `path`. Raises UserError where SQLite cannot use it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._execute(f"CREATE TABLE IF NOT EXISTS judgements (id INTEGER PRIMARY KEY, {COLUMNS})")

    def _execute(self, sql: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        try:
            with closing(sqlite3.connect(self.path, timeout=30, isolation_level=None)) as database:
                database.row_factory = sqlite3.Row
                return database.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise UserError(f"judgements cannot be kept in {str(self.path)!r}: {error}; use another --out") from None

    def add(self, judgement: Judgement) -> None:
        """Stores an answer with the time."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        row = vars(judgement) | {"time": now, "extra": json.dumps(judgement.extra)}
        self._execute(f"INSERT INTO judgements ({COLUMNS}) VALUES ({', '.join('?' * len(row))})", [*row.values()])

    def judgements(self) -> list[Judgement]:
        """All of them, oldest first."""
        rows = self._execute(f"SELECT {COLUMNS} FROM judgements ORDER BY id")
        return [Judgement(**dict(row) | {"extra": json.loads(row["extra"])}) for row in rows]

    def export_preferences(self, path: Path) -> int:
        """Writes the preferences without ties as JSONL (prompt, and file, model and seed of the chosen and of the
        rejected picture) and returns their number."""
        lines = []
        for j in self.judgements():
            if j.kind == "preference" and j.answer != "tie":
                line: dict[str, Any] = {"prompt": j.prompt}
                for side, file, model in zip(
                    ("left", "right"), j.extra["pictures"], (j.model, j.other_model), strict=True
                ):
                    name = "chosen" if j.answer == side else "rejected"
                    line |= {name: file, f"{name}_model": model, f"{name}_seed": j.seed}
                lines.append(json.dumps(line) + "\n")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8")
        return len(lines)
