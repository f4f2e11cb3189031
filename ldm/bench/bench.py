"""The whole benchmark: every case in turn, each row kept as soon as it is there."""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldm.bench import machine
from ldm.bench.cases import Case
from ldm.bench.measure import Settings, measure
from ldm.bench.report import FILE
from ldm.bench.sides import Side, WorkerFailed, command, environment
from ldm.config import UserError

NAMES = ("ldm", "diffusers")


def available() -> tuple[str, ...]:
    """The sides that can be run here."""
    return tuple(name for name in NAMES if find_spec(name))


def settings_table(settings: Settings) -> dict[str, Any]:
    """What must be the same for rows to be gone on with."""
    about = {"versions": machine.versions(), "machine": machine.describe(), "code": machine.code_hash()}
    return asdict(settings) | about


def begin(out: Path, settings: Settings) -> dict[str, Any]:
    """The benchmark in `out` to go on with, or a new one where there is none of these settings."""
    table = {"settings": settings_table(settings), "sides": list(available()), "rows": []}
    try:
        found = json.loads((out / FILE).read_text())
    except FileNotFoundError:
        return table
    except ValueError:
        raise UserError(
            f"{str(out / FILE)!r} is no benchmark of this program; delete it or give another --out"
        ) from None
    same = isinstance(found, dict) and found.get("settings") == table["settings"]
    if not same:
        tqdm.write(f"{out / FILE} is of other settings, versions or code: its rows are measured anew")
    return found if same and found.get("sides") == table["sides"] else table


def write(out: Path, table: dict[str, Any]) -> None:
    """`benchmark.json`, whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    part = out / f".{FILE}.part"
    part.write_text(json.dumps(table, indent=1) + "\n")
    os.replace(part, out / FILE)


class Workers:
    """The worker processes of all sides, and fresh ones for memory; all of them end with this."""

    def __init__(self, names: tuple[str, ...], out: Path, home: Path, settings: Settings):
        self.log, self.home, self.settings = out / "workers.log", home, settings
        self.started: list[Side] = []
        self.sides = {name: self.start(name) for name in names}

    def start(self, name: str) -> Side:
        """A worker of a side, which begins to run when first asked."""
        line = command(name, self.settings.threads, self.settings.device, self.home)
        side = Side(line, self.log, environment(self.settings.threads))
        self.started.append(side)
        return side

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        for side in self.started:
            side.close() if kind is None else side.kill()


def run(
    cases: list[Case],
    out: Path,
    settings: Settings,
    workers: Callable[[Path], Workers] | None = None,
) -> dict[str, Any]:
    """Measures the cases that `out` has no row of yet, and writes each row when it is there. What fails is a row that
    says so, and is tried again next time."""
    table = begin(out, settings)
    done = {row["name"] for row in table["rows"] if "failed" not in row}
    todo = [case for case in cases if case.name not in done]
    table["rows"] = [row for row in table["rows"] if row["name"] in done]
    table["load"] = {"start": machine.load()} | table.get("load", {})
    names = available()
    write(out, table)
    with tempfile.TemporaryDirectory() as folder:
        make = workers or (lambda home: Workers(names, out, home, settings))
        rounds = sum(case.rounds(settings.rounds) for case in todo)
        with make(Path(folder)) as held, tqdm(total=rounds, unit="round", disable=not todo) as bar:
            for case in todo:
                bar.set_postfix_str(case.name)
                here = bar.n
                table["rows"].append(_row(case, held, settings, bar))
                bar.update(here + case.rounds(settings.rounds) - bar.n)
                table["load"]["end"] = machine.load()
                write(out, table)
    return table


def _row(case: Case, held: Workers, settings: Settings, bar: tqdm) -> dict[str, Any]:
    """A case's row; where a side fails, one that says so, and new processes for the next."""
    if case.commands:
        absent = [name for name in case.commands if name in NAMES and name not in held.sides]
        commands = {name: line for name, line in case.commands.items() if name not in absent}
        case = _replaced(case, commands)
    try:
        return measure(case, held.sides, held.start, settings, lambda name: bar.update())
    except WorkerFailed as error:
        for side in held.sides.values():
            side.kill()
        tqdm.write(f"{case.name} failed: {error}")
        return {"name": case.name, "workload": case.workload, "failed": str(error)}


def _replaced(case: Case, commands: dict) -> Case:
    from dataclasses import replace

    return replace(case, commands=commands)


def wrong(table: dict[str, Any]) -> list[str]:
    """The rows whose outputs disagree or that failed, in words."""
    found = []
    for row in table["rows"]:
        if "failed" in row:
            found.append(f"{row['name']}: {row['failed']}")
        elif row["difference"] and not row["difference"]["agrees"]:
            value = row["difference"]["value"]
            size = "shapes, names or numbers that are not finite" if value is None else f"{value:.2g}"
            found.append(f"{row['name']}: outputs differ by {size}, allowed {row['difference']['tolerance']:g}")
    return found
