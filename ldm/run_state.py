"""What a run folder keeps for going on: checkpoints with the training's state, and the lines logged so far."""

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ldm import weights
from ldm.config import UserError
from ldm.ema import EMA


class Trained(NamedTuple):
    """What training changes, each under the names of the trained modules; a module may have a second optimizer."""

    modules: dict[str, nn.Module]
    averages: dict[str, EMA]
    optimizers: dict[str, torch.optim.Optimizer]


def checkpoints(out: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted((out / "checkpoints").glob("step-????????"))


@contextmanager
def new_checkpoint(out: Path, done: int, keep: int) -> Iterator[Path]:
    """A folder to fill; after the block it becomes `checkpoints/step-N` in one move, and all but the newest
    `keep` go. What is broken off before that stays hidden and is never opened."""
    folder = out / "checkpoints" / f"step-{done:08d}"
    hidden = folder.with_name(f".{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    yield hidden
    shutil.rmtree(folder, ignore_errors=True)
    hidden.rename(folder)
    for old in checkpoints(out)[:-keep]:
        shutil.rmtree(old)


def write_state(folder: Path, trained: Trained, about: dict[str, Any]) -> None:
    """Weights, averages and optimizers of all modules, and `about` (JSON), into `folder`."""
    folder.mkdir()
    for name, module in trained.modules.items():
        weights.save_tensors(folder / f"{name}.safetensors", module.state_dict())
        weights.save_tensors(folder / f"{name}-ema.safetensors", trained.averages[name].state_dict())
    for name, optimizer in trained.optimizers.items():
        torch.save(optimizer.state_dict(), folder / f"{name}-optimizer.pt")
    weights.write_json(folder / "state.json", about)


def read_state(folder: Path, trained: Trained) -> dict[str, Any]:
    """Loads what `write_state` wrote into the modules, averages and optimizers; returns `about`.

    UserError where the state is of other modules.
    """
    try:
        for name, module in trained.modules.items():
            if not (folder / f"{name}.safetensors").is_file():
                raise ValueError(f"it has no {name}")
            module.load_state_dict(weights.load_tensors(folder / f"{name}.safetensors"))
            trained.averages[name].load_state_dict(weights.load_tensors(folder / f"{name}-ema.safetensors"))
        for name, optimizer in trained.optimizers.items():
            if not (folder / f"{name}-optimizer.pt").is_file():
                raise ValueError(f"it has no optimizer {name}")
            # load_state_dict moves what belongs on the device; the step counts stay on the CPU, where AdamW has them
            state = torch.load(folder / f"{name}-optimizer.pt", map_location="cpu", weights_only=True)
            optimizer.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the checkpoint {str(folder.parent)!r} is of another model than the config describes ({reason}); "
            "use another --out, or the config that the run was started with"
        ) from None
    return weights.read_json(folder / "state.json")


def drop_later_lines(metrics: Path, step: int) -> None:
    """Takes the lines after `step` out of metrics.jsonl: the steps are done again after a resume."""
    if metrics.is_file():
        lines = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
        metrics.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))


def warn_of_changes(file: Path, resolved: dict[str, Any]) -> None:
    """Warns where a resumed run's `config.json` has other values than the config now."""
    if not file.is_file():
        return
    before, now = (dict(_flat(table)) for table in (weights.read_json(file), json.loads(json.dumps(resolved))))
    changed = [key for key in now if before.get(key) != now[key]]
    if changed:
        warnings.warn(f"resuming with other values than before of: {', '.join(changed)}", stacklevel=2)


def _flat(table: dict[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{where}{key}.")
        else:
            yield where + key, value
