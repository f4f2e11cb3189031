"""What people judged, in a local SQLite file. Threads, tabs and processes may share it: a connection each time."""

import json
import os
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ldm.app.human import Staircase, fooling, median_interval, perceptual_threshold, rate_interval, win_rate
from ldm.config import UserError

VERSION = 1  # of the table; a file's PRAGMA user_version
APPLICATION = 0x6C646D6A  # "ldmj", its PRAGMA application_id
ANSWERS = {"pair": ("left", "right"), "single": ("real", "generated"), "preference": ("left", "right", "tie")}
ANSWERS["flash"] = ANSWERS["single"] + ANSWERS["pair"]
LONGEST = 10_000  # characters of a text
TABLE = """CREATE TABLE judgements (
id INTEGER PRIMARY KEY AUTOINCREMENT, time TEXT NOT NULL, session TEXT NOT NULL, kind TEXT NOT NULL,
model TEXT NOT NULL, other_model TEXT NOT NULL, prompt TEXT NOT NULL, seed INTEGER, exposure_ms INTEGER,
answer TEXT NOT NULL, "right" INTEGER, extra TEXT NOT NULL)"""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One answer. `kind`: single ("real" or "generated"), pair (which side is real), flash (either, for `exposure_ms`)
    or preference ("left", "right" or "tie", between `model` on the left and `other_model` on the right).

    `model`: whose pictures are judged; of a real picture, whose it was mixed with. `right`: None for preferences.
    `extra`: whatever JSON holds; a preference's "pictures" are the left and the right file, relative to the folder of
    the store, and "other_seed" is that of the right one where it is not `seed`. `id` and `time` (UTC) come from the
    store.
    """

    kind: str
    session: str
    model: str
    answer: str
    right: bool | None = None
    other_model: str = ""
    prompt: str = ""
    seed: int | None = None
    exposure_ms: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    time: str = ""
    id: int | None = None


COLUMNS = tuple(f.name for f in fields(Judgement))
NAMES = ", ".join(f'"{name}"' for name in COLUMNS)


class Store:
    """The judgements in the file `path`, which is made if it is not there, with its folder. UserError, in one line, for
    a file that is something else, of another version, read-only or in use for too long."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the folder of {str(path)!r} cannot be made ({error.strerror}); name another") from None
        with self._open() as database:
            database.execute("BEGIN IMMEDIATE")
            tables = database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            marks = [database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
            if not tables and marks == [0, 0]:
                database.execute(TABLE)
                database.execute(f"PRAGMA application_id = {APPLICATION}")
            elif marks[0] != APPLICATION:
                raise UserError(f"{str(path)!r} is a database of something else; name another file for judgements")
            elif marks[1] != VERSION:
                message = f"the judgements in {str(path)!r} are of version {marks[1]}, this program's of {VERSION}"
                raise UserError(f"{message}; open them with the program that made them, or name another file")
            database.execute(f"PRAGMA user_version = {VERSION}")  # a read-only file fails here, not at an answer
            database.execute("COMMIT")

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection in autocommit; what SQLite says against it as a UserError."""
        try:
            with closing(sqlite3.connect(self.path, timeout=30, isolation_level=None)) as database:
                yield database
        except sqlite3.ProgrammingError:
            raise
        except sqlite3.Error as error:
            raise UserError(f"judgements cannot be kept in {str(self.path)!r}: {error}; name another file") from None

    def add(self, judgement: Judgement) -> Judgement:
        """Keeps it and gives it back with its id and time. UserError for an answer that is none, or too long a text."""
        judgement = replace(judgement, time=datetime.now(UTC).isoformat(timespec="milliseconds"), id=None)
        row = _row(judgement)
        marks = ", ".join("?" * len(COLUMNS))
        with self._open() as database:
            added = database.execute(f"INSERT INTO judgements ({NAMES}) VALUES ({marks})", row)
            return replace(judgement, id=added.lastrowid)

    def judgements(
        self, kind: str | None = None, model: str | None = None, session: str | None = None
    ) -> list[Judgement]:
        """Those of a kind, about a model (on either side) and of a session, oldest first."""
        where = (
            "(?1 IS NULL OR kind = ?1) AND (?2 IS NULL OR ?2 IN (model, other_model)) AND (?3 IS NULL OR session = ?3)"
        )
        query = f"SELECT {NAMES} FROM judgements WHERE {where} ORDER BY id"
        with self._open() as database:
            rows = database.execute(query, [_clean(text) for text in (kind, model, session)]).fetchall()
        return [_judgement(row) for row in rows]

    def results(self) -> dict[str, dict[str, Any]]:
        """What `results` says of all judgements."""
        return results(self.judgements())

    def export_preferences(self, path: str | Path) -> int:
        """Writes the preferences that are no ties, one JSON object a line: prompt, the files chosen and rejected,
        relative to the store's folder, their models and seeds. Gives their number."""
        lines = []
        for j in self.judgements("preference"):
            if j.answer == "tie":
                continue
            sides = [(j.model, j.seed), (j.other_model, j.extra.get("other_seed", j.seed))]
            ranked = [(*side, self._relative(file)) for side, file in zip(sides, j.extra["pictures"], strict=True)]
            ranked = ranked if j.answer == "left" else ranked[::-1]
            line: dict[str, Any] = {"prompt": j.prompt}
            for name, (model, seed, file) in zip(("chosen", "rejected"), ranked, strict=True):
                line |= {name: file, f"{name}_model": model, f"{name}_seed": seed}
            lines.append(json.dumps(line) + "\n")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(f"{path}.tmp")
        unfinished.write_text("".join(lines), encoding="utf-8")
        os.replace(unfinished, path)
        return len(lines)

    def _relative(self, file: str) -> str:
        return Path(os.path.relpath(self.path.parent / file, self.path.parent)).as_posix()


def results(judgements: Iterable[Judgement]) -> dict[str, dict[str, Any]]:
    """Of each model: the number of "judgements" by kind and of "sessions"; "single" and "flash_single" as `Fooling`,
    "pair" and "flash_pair" as the rate of pairs whose generated picture was taken for the real one; "threshold_ms" and
    "pair_threshold_ms", the median over sessions of `perceptual_threshold` (HYPE's score is the mean over people),
    with its interval, and "thresholds" and "pair_thresholds", how many sessions had enough flashes; "preference" as a
    `WinRate` by other model.

    The staircase itself sets how many flashes are wrong: compare thresholds, not those rates.
    """
    of: dict[str, list[Judgement]] = defaultdict(list)
    for j in judgements:
        for model in {j.model, j.other_model} - {""}:
            of[model].append(j)
    return {model: _results(model, found) for model, found in sorted(of.items())}


def _results(model: str, found: list[Judgement]) -> dict[str, Any]:
    kinds = Counter(j.kind for j in found)
    table: dict[str, Any] = {"judgements": dict(kinds), "sessions": len({j.session for j in found})}
    asked = {(kind, form): [] for kind in ("", "flash_") for form in ("single", "pair")}
    scores: dict[str, Counter[str]] = defaultdict(Counter)
    for j in found:
        if j.kind == "preference":
            mine, other = ("left", j.other_model) if j.model == model else ("right", j.model)
            scores[other]["ties" if j.answer == "tie" else "wins" if j.answer == mine else "losses"] += 1
        else:
            form = "single" if j.answer in ANSWERS["single"] else "pair"
            asked["flash_" if j.kind == "flash" else "", form].append(j)
    for kind in ("", "flash_"):
        fakes, reals = [], []
        for j in asked[kind, "single"]:  # a wrong "real" was said of a generated picture
            (reals if (j.answer == "real") == j.right else fakes).append(not j.right)
        table[kind + "single"] = fooling(sum(fakes), len(fakes), sum(reals), len(reals))
        wrong = [not j.right for j in asked[kind, "pair"]]
        table[kind + "pair"] = rate_interval(sum(wrong), len(wrong))
    for name, form in (("threshold", "single"), ("pair_threshold", "pair")):
        exposures: dict[str, list[int]] = defaultdict(list)
        for j in asked["flash_", form]:
            exposures[j.session].append(j.exposure_ms)
        stairs = Staircase()
        found_out = [perceptual_threshold(shown, stairs.enough, stairs.block) for shown in exposures.values()]
        known = [threshold for threshold in found_out if threshold is not None]
        table |= {f"{name}_ms": median_interval(known), f"{name}s": len(known)}
    table["preference"] = {
        other: win_rate(score["wins"], score["ties"], score["losses"]) for other, score in sorted(scores.items())
    }
    return table


def _row(judgement: Judgement) -> list[Any]:
    """Its values as SQLite keeps them; UserError for those that no question has."""
    kind, taste = judgement.kind, judgement.kind == "preference"
    if judgement.answer not in ANSWERS.get(kind, ()):
        raise UserError(
            f"answer {judgement.answer!r:.40} to {kind!r:.40}; allowed: {ANSWERS.get(kind, tuple(ANSWERS))}"
        )
    two = bool(judgement.other_model) and judgement.other_model != judgement.model
    if (judgement.right is None) != taste or two != taste or not judgement.model:
        raise UserError(
            f"a {kind} needs {'two models and no right' if taste else 'one model, and right=True or False'}"
        )
    if (judgement.exposure_ms is not None) != (kind == "flash"):
        raise UserError(
            f"a {kind} has {'an' if kind == 'flash' else 'no'} exposure_ms, not {judgement.exposure_ms!r:.40}"
        )
    pictures = judgement.extra.get("pictures")
    if taste and not (isinstance(pictures, list) and [type(file) for file in pictures] == [str, str]):
        raise UserError("a preference needs the two files it is between: extra['pictures']")
    if judgement.seed is not None and not -(2**63) <= judgement.seed < 2**63:
        raise UserError(f"seed {judgement.seed!r:.40} cannot be kept; it must fit into 64 bits")
    row = [getattr(judgement, name) for name in COLUMNS]
    row = [json.dumps(value) if isinstance(value, dict) else _clean(value) for value in row]
    for name, value in zip(COLUMNS, row, strict=True):
        if isinstance(value, str) and len(value) > LONGEST:
            raise UserError(f"{name} has {len(value):,} characters; a judgement keeps {LONGEST:,} of a text")
    return row


def _clean(value: Any) -> Any:
    """Text without lone surrogates, which no file can hold."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _judgement(row: tuple[Any, ...]) -> Judgement:
    values = dict(zip(COLUMNS, row, strict=True))
    right = None if values["right"] is None else bool(values["right"])
    return Judgement(**values | {"right": right, "extra": json.loads(values["extra"])})
