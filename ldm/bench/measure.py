"""One row: a case run on both sides in alternation."""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from ldm.bench import machine, stats
from ldm.bench.cases import PICTURE, Case
from ldm.bench.processes import measure_processes
from ldm.bench.sides import Side, WorkerFailed, alternate

LEAST = 0.2  # seconds that are timed at once; shorter runs are repeated
MOST = 50  # repeats


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What times depend on, beside the machine."""

    rounds: int
    threads: int
    device: str
    quick: bool


Start = Callable[[str], Side]  # a new worker of a side
Tick = Callable[[str], None]  # after every round


def measure(case: Case, sides: dict[str, Side], start: Start, settings: Settings, tick: Tick) -> dict[str, Any]:
    """The row of a case: raw times, figures, and what was compared. WorkerFailed with the side's name in it."""
    before, began, load = machine.ticks(), perf_counter(), machine.load()
    if case.commands:
        row = measure_processes(case, settings.rounds, settings.threads, tick)
    else:
        present = {name: side for name, side in sides.items() if name in case.sides}
        row = _alternated(case, present, case.rounds(settings.rounds), tick)
        if case.memory and not settings.quick:
            for name in present:
                row["sides"][name]["memory"] = _memory(case, start(name), row["sides"][name]["about"])
    busy = machine.others(before, machine.ticks(), perf_counter() - began)
    row |= {"load": [load, machine.load()], "others": busy, "took": perf_counter() - began}
    return row | finish(case, row)


def _alternated(case: Case, sides: dict[str, Side], rounds: int, tick: Tick) -> dict[str, Any]:
    """Set up and warmed, then timed in turns; the rates of the machine are measured in between."""
    job = {"kind": case.kind, "params": case.params}
    found: dict[str, dict] = {}
    for name, side in sides.items():
        built = _ask(name, side, "setup", case=job)
        found[name] = {"setup": built["seconds"], "about": built["about"], "seconds": []}
        found[name]["first"] = _ask(name, side, "warm")["seconds"]
    once = {name: _ask(name, side, "run")["seconds"] for name, side in sides.items()}
    differs = _compared(case, sides)
    repeats = max(1, min(MOST, round(LEAST / max(once.values()))))
    rates: dict[str, list] = {"flops": [], "bytes": []}
    for round_ in range(rounds):
        for name in alternate(list(sides), round_):
            again = round_ or repeats > 1  # the first run of what takes long is its first round
            took = _ask(name, sides[name], "run", repeats=repeats)["seconds"] if again else once[name]
            found[name]["seconds"].append(took)
        first = next(iter(sides))
        for rate, value in _ask(first, sides[first], "rates").items():
            rates[rate].append(value)
        tick(case.name)
    for name, side in sides.items():
        found[name] |= _ask(name, side, "parts")
        countable = not found[name]["parts"] and not case.params.get("compile")  # the counter sees no compiled code
        found[name] |= _ask(name, side, "count") if countable else {}
    best = {rate: max(values) for rate, values in rates.items()}
    return {"sides": found, "repeats": repeats, "rates": best, "difference": differs}


def _ask(name: str, side: Side, do: str, **arguments: Any) -> dict:
    try:
        return side.ask(do, **arguments)
    except WorkerFailed as error:
        raise WorkerFailed(f"{name}: {error}") from None


def _compared(case: Case, sides: dict[str, Side]) -> dict | None:
    """How far the outputs of both sides differ; None where there is nothing to compare."""
    if case.tolerance is None or len(sides) < 2:
        return None
    import torch

    with tempfile.TemporaryDirectory() as folder:
        tables = []
        for name, side in sides.items():
            path = Path(folder) / f"{len(tables)}.pt"
            _ask(name, side, "outputs", path=str(path))
            tables.append(torch.load(path, weights_only=True))
    return stats.difference(*tables, case.tolerance, relative=case.tolerance != PICTURE)


def _memory(case: Case, side: Side, about: dict[str, Any]) -> dict[str, int]:
    """Peak bytes of a fresh process that runs only this case: as a whole, and beyond what it held when built, in the
    layouts found before."""
    layouts = {name: about[name] for name in ("layout", "vae_layout") if name in about}
    try:
        built = side.ask("setup", case={"kind": case.kind, "params": case.params | layouts})["built"]
        side.ask("warm")
        peak = side.ask("memory")["peak"]
    finally:
        side.close()
    return {"peak": peak, "grown": max(peak - built, 0)}


def finish(case: Case, row: dict[str, Any]) -> dict[str, Any]:
    """The figures of a row's raw times: medians, quartiles, ratio, floor, and whether the targets are met."""
    sides = row["sides"]
    for side in sides.values():
        side["median"], side["quartiles"] = median(side["seconds"]), list(stats.quartiles(side["seconds"]))
    names = [name for name in case.sides if name in sides]
    pair = [sides[name] for name in names]
    both = len(pair) == 2
    more = {"name": case.name, "workload": case.workload, "note": case.note, "items": case.items}
    more["floor"] = least(pair, row["rates"])
    more |= {"point": case.point, "order": names, "compiled": bool(case.params.get("compile"))}
    more["ratio"] = stats.ratio(pair[1]["seconds"], pair[0]["seconds"]) if both else None
    more["share"] = beside_the_model(pair[0]["parts"]) if pair[0].get("parts") else None
    figures = {"ratio": more["ratio"] and more["ratio"]["value"], "share": more["share"]}
    figures["slower"] = 1 / figures["ratio"] if both else None
    memory = [side["memory"]["peak"] for side in pair if "memory" in side]
    figures["memory"] = memory[0] / memory[1] if len(memory) == 2 else None
    more["targets"] = [_judged(target, figures[target.figure]) for target in case.targets]
    return more


def least(sides: list[dict], rates: dict[str, float] | None) -> dict | None:
    """The floor of a row: of the fewest FLOPs and bytes that any side took, as those are enough; None where nothing
    was counted."""
    counted = [side for side in sides if side.get("flops") or side.get("bytes")]
    if not counted or not rates:
        return None
    return stats.floor(min(side["flops"] for side in counted), min(side["bytes"] for side in counted), rates)


def _judged(target: Any, value: float | None) -> dict:
    """A target with the value that it is of; None where that could not be had."""
    met = None if value is None else target.met(value)
    return asdict(target) | {"text": target.text, "value": value, "met": met}


def beside_the_model(parts: dict[str, float]) -> float:
    """Share of a step that is neither the model's forward nor its backward."""
    return 1 - (parts["forward"] + parts["backward"]) / parts["step"]
