"""A run folder: checkpoints that are whole or not there, the lock, the config that it was started with, its log."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm import model_io
from ldm.config import UserError
from ldm.train.optim import EMA
from ldm.train.sharding import gather, shard_like

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

FORMAT = 2  # of the training state; runs of format 1 had other optimizer groups
MANIFEST = "manifest.json"
# Keys of a config that do not change the trained weights.
FREE = ("train.log_every", "train.validate_every", "train.preview_every", "train.save_every", "train.keep")
FREE += ("train.workers", "train.max_skipped", "preview.", "cache", "data.max_broken", "train.best")
PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "einops", "safetensors", "numpy")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Everything that training changes, by the name of the module."""

    modules: dict[str, nn.Module]
    averages: dict[str, EMA]
    optimizers: dict[str, dict[str, torch.optim.Optimizer]]  # those of each module, by a name of their own

    def all_optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers of all modules."""
        return [optimizer for table in self.optimizers.values() for optimizer in table.values()]

    def states(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The live tensors of each module, average and optimizer, by the name of its file."""
        for name, module in self.modules.items():
            yield name, module.state_dict()
            yield f"{name}-ema", self.averages[name].module.state_dict()
            names = {parameter: key for key, parameter in module.named_parameters()}
            for key, optimizer in self.optimizers[name].items():
                entries = ((names[p], k, v) for p, entry in optimizer.state.items() for k, v in entry.items())
                yield f"{key}-optimizer", {f"{parameter}/{k}": v for parameter, k, v in entries}

    def load(self, folder: Path) -> None:
        """Loads the files of `states`, sharded as the modules are. Raises UserError or RuntimeError for others."""
        for name, module in self.modules.items():
            for file, part in ((name, module), (f"{name}-ema", self.averages[name].module)):
                tensors, live = model_io.load_tensors(folder / f"{file}.safetensors"), part.state_dict()
                part.load_state_dict({k: shard_like(v, live[k]) if k in live else v for k, v in tensors.items()})
            for key, optimizer in self.optimizers[name].items():
                load_optimizer(optimizer, module, model_io.load_tensors(folder / f"{key}-optimizer.safetensors"))


def load_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Sets an optimizer's state from {"parameter/entry": tensor}. Raises UserError where it has other parameters."""
    parameters, mine = dict(module.named_parameters()), {p for g in optimizer.param_groups for p in g["params"]}
    optimizer.state.clear()
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        parameter = parameters[name]
        optimizer.state[parameter][entry] = shard_like(value.to(parameter.device), parameter)
    if tensors and optimizer.state.keys() != mine:
        raise UserError("its optimizers have other parameters")


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, damaged ones too."""
    return sorted((out / "checkpoints").glob("step-????????"))


def checkpoint(out: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return out / "checkpoints" / f"step-{step:08d}"


def newest(out: Path) -> Path | None:
    """The newest checkpoint that is whole; removes half-written ones, and warns of damaged ones. Raises UserError where
    all are damaged."""
    for hidden in (out / "checkpoints").glob(".step-*"):
        shutil.rmtree(hidden, ignore_errors=True)
    folders = checkpoints(out)
    for folder in reversed(folders):
        damage = find_damage(folder)
        if not damage:
            return folder
        warnings.warn(f"the checkpoint {str(folder)!r} is damaged ({damage}); skipped", stacklevel=2)
    if folders:
        raise UserError(f"no checkpoint in {str(out / 'checkpoints')!r} is whole; move them away to start anew")
    return None


@contextmanager
def new_checkpoint(out: Path, step: int, keep: int, best: int | None = None) -> Iterator[Path]:
    """A hidden folder to fill. After the block its files are synced, hashed and renamed to `checkpoints/step-N` at
    once; then all but the newest `keep` and that of step `best` are removed. After an error nothing has changed."""
    folder = checkpoint(out, step)
    hidden = folder.with_name(f".{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    try:
        (hidden / "state").mkdir(parents=True)
        yield hidden
        seal(hidden)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    hidden.rename(folder)
    sync(folder.parent)
    # a checkpoint newer than this one is damaged, and was skipped
    for old in [path for path in checkpoints(out) if path.name <= folder.name][:-keep]:
        if best is None or old != checkpoint(out, best):
            shutil.rmtree(old)


def seal(folder: Path) -> None:
    """Syncs all files of a folder to the disk, and lists them with their SHA-256 in its manifest."""
    files = {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    model_io.write_json(folder / MANIFEST, {"files": files})
    for path in (*folder.rglob("*"), folder):
        sync(path)


def find_damage(folder: Path) -> str:
    """What is wrong with a sealed folder; "" where every file is there and unchanged. (A flipped bit in tensor data
    loads without an error.)"""
    try:
        files = model_io.read_json(folder / MANIFEST)["files"].items()
    except (UserError, KeyError, AttributeError):
        return f"it has no {MANIFEST} that can be read"
    for name, expected in files:
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256(folder / name) != expected:
            return f"{name} was changed since it was written"
    return ""


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """The hexadecimal hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_state(folder: Path | None, trained: Trained, progress: dict[str, Any]) -> None:
    """Writes everything trained, and `progress` (JSON), into `folder`; None in processes that only contribute their
    shards."""
    for name, tensors in trained.states():
        tensors = gather(tensors)
        if folder:
            model_io.save_tensors(folder / f"{name}.safetensors", tensors)
    if folder:
        model_io.write_json(folder / "state.json", {"format": FORMAT} | progress)


def read_state(folder: Path, trained: Trained) -> dict[str, Any]:
    """Loads what `write_state` wrote; returns `progress`. Raises UserError for a state of an earlier version of this
    code, or of other modules or optimizers."""
    progress = model_io.read_json(folder / "state.json")
    if progress.get("format") != FORMAT:
        raise UserError(
            f"the training state in {str(folder.parents[2])!r} was written by an earlier version of this code and"
            " cannot be resumed, though its model still opens; use another --out to start anew"
        )
    try:
        trained.load(folder)
    except (UserError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the checkpoint {str(folder.parent)!r} is of another model than the config describes ({reason}); "
            "use another --out, or the config that the run was started with"
        ) from None
    return progress


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """Holds a run folder, which is made where it does not exist. Raises UserError where another process holds it. On
    systems without file locks it only makes the folder."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{str(out)!r} is a file; --out names the run folder, which may be new")
    out.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    with (out / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(
                f"{str(out)!r} is in use by another training (process {file.read().strip() or 'unknown'}); wait for it,"
                " stop it, or use another --out"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def begin(out: Path, resolved: dict[str, Any], seed: int, start: int, looked: bool, force: bool) -> None:
    """Prepares the run folder for the steps after `start`: config.json, metrics.jsonl, starts.jsonl. Raises UserError
    for a config that has changed, unless `force`."""
    if start:
        check_changes(out / "config.json", resolved, force)
    drop_later_lines(out / "metrics.jsonl", start, looked)
    model_io.write_json(out / "config.json", resolved)
    entry = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "command": sys.argv, "seed": seed}
    entry |= {"python": platform.python_version(), "packages": {name: version(name) for name in PACKAGES}}
    entry["commit"] = commit()
    with (out / "starts.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")


def check_changes(file: Path, resolved: dict[str, Any], force: bool) -> None:
    """Compares a config with that in `file`: changes raise UserError, with `force` they are a warning, as the number of
    steps always is. Logging, validation and checkpoints may change freely."""
    if not file.is_file():
        return
    before, now = (dict(_flat(table)) for table in (model_io.read_json(file), json.loads(json.dumps(resolved))))
    changed = [key for key in now if key in before and before[key] != now[key] and not key.startswith(FREE)]
    allowed = {"train.steps"}
    samples = [c.get("train.batch_size", 1) * c.get("train.accumulate", 1) for c in (before, now)]
    if samples[0] == samples[1]:
        allowed |= {"train.batch_size", "train.accumulate"}
    if set(changed) - allowed and not force:
        names = ", ".join(f"{key} ({before[key]!r} before, {now[key]!r} now)" for key in changed)
        raise UserError(
            f"{str(file.parent)!r} was started with another config: {names}. Give --force to go on with these values,"
            " or another --out to start anew"
        )
    if changed:
        warnings.warn(f"resuming with other values than before of: {', '.join(changed)}", stacklevel=2)


def drop_later_lines(metrics: Path, step: int, looked: bool = True) -> None:
    """Removes the lines after `step` from metrics.jsonl, as these steps are taken again; and the validation of `step`
    itself unless it was `looked` at before its checkpoint was saved."""
    if metrics.is_file():
        lines = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
        last = step if looked else step - 1
        kept = [line for line in lines if json.loads(line)["step"] <= (last if '"val/' in line else step)]
        temporary = metrics.with_name(metrics.name + ".tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, metrics)


def _flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def commit() -> str | None:
    """The commit of the code, with "+" where files were changed since; None outside a repository."""
    describe = ["describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    try:
        done = subprocess.run(["git", *describe], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
