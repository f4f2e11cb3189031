"""A run folder: checkpoints that are whole or not there, the lock, the config that it was started with, its log."""

import errno
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
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm import model_io
from ldm.config import UserError
from ldm.train import sharding
from ldm.train.optim import EMA

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

FORMAT = 2  # of the training state; runs of format 1 had other optimizer groups
MANIFEST = "manifest.json"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
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


# Checkpoints


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
    once; then all but the newest `keep` and that of step `best` are removed.

    Raises UserError where the disk is full; the earlier checkpoints are still whole.
    """
    folder = checkpoint(out, step)
    hidden = folder.with_name(f".{folder.name}")
    try:
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir(parents=True)
        yield hidden
        seal(hidden)
    except Exception as error:
        full = _is_full(error, out)
        shutil.rmtree(hidden, ignore_errors=True)
        if full:
            raise UserError(_disk_full(out, step)) from None
        raise
    shutil.rmtree(folder, ignore_errors=True)
    hidden.rename(folder)
    _sync(folder.parent)
    # a checkpoint newer than this one is damaged, and was skipped
    for old in [path for path in checkpoints(out) if path.name <= folder.name][:-keep]:
        if best is None or old != checkpoint(out, best):
            shutil.rmtree(old)


def seal(folder: Path) -> None:
    """Syncs all files of a folder to the disk, and lists them with sizes and SHA-256 in its manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    table = {str(f.relative_to(folder)): {"bytes": f.stat().st_size, "sha256": _sha256(f)} for f in files}
    model_io.write_json(folder / MANIFEST, {"files": table})
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def find_damage(folder: Path) -> str:
    """What is wrong with a sealed folder; "" where every file is there and unchanged. (A flipped bit in tensor data
    loads from safetensors and from torch's files without an error.)"""
    try:
        files = model_io.read_json(folder / MANIFEST)["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (UserError, KeyError, TypeError, AttributeError):
        return f"it has no {MANIFEST} that can be read"
    for name, (size, sha256) in expected.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
        if _sha256(file) != sha256:
            return f"{name} was changed since it was written"
    return ""


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_full(error: Exception, out: Path) -> bool:
    """Whether writing failed for lack of space; torch has errors of its own for that."""
    words = ("No space left", "unexpected pos", "file write failed", "iostream error")
    full = getattr(error, "errno", None) in FULL or any(word in str(error) for word in words)
    return full or shutil.disk_usage(out).free < 2**20


def _disk_full(out: Path, step: int) -> str:
    need = kept = ""
    for before in checkpoints(out)[-1:]:
        size = sum(file.stat().st_size for file in before.rglob("*") if file.is_file())
        need, kept = f"; one took {size / 2**20:,.1f} MiB before", f"; the one of {before.name} is whole"
    return (
        f"the disk is full, or a file larger than allowed (ulimit -f), so the checkpoint of step {step} could not be"
        f" written: {shutil.disk_usage(out).free / 2**20:,.1f} MiB are free{need}{kept}. Free some space and give the"
        " same command again"
    )


# The training's state within a checkpoint


def write_state(folder: Path | None, trained: Trained, progress: dict[str, Any]) -> None:
    """Writes weights, averages and optimizers of all modules, and `progress` (JSON), into `folder`; None in processes
    that only contribute their shards."""
    if folder:
        folder.mkdir()
    for name, module in trained.modules.items():
        for suffix, part in (("", module), ("-ema", trained.averages[name].module)):
            tensors = sharding.model_state(part)
            if folder:
                model_io.save_tensors(folder / f"{name}{suffix}.safetensors", tensors)
        for key, optimizer in trained.optimizers[name].items():
            state = sharding.optimizer_state(module, optimizer)
            if folder:
                torch.save(state, folder / f"{key}-optimizer.pt")
    if folder:
        model_io.write_json(folder / "state.json", {"format": FORMAT} | progress)


def read_state(folder: Path, trained: Trained) -> dict[str, Any]:
    """Loads what `write_state` wrote; returns `progress`. Raises UserError for a state of an earlier version of this
    code, or of other modules or optimizers."""
    progress = model_io.read_json(folder / "state.json")
    run = folder.parents[2]
    if progress.get("format") != FORMAT:
        raise UserError(
            f"the training state in {str(run)!r} was written by an earlier version of this code and cannot be resumed,"
            " though its model still opens; use another --out to start anew"
        )
    try:
        for name, module in trained.modules.items():
            for suffix, part in (("", module), ("-ema", trained.averages[name].module)):
                sharding.load_model_state(part, model_io.load_tensors(folder / f"{name}{suffix}.safetensors"))
            for key, optimizer in trained.optimizers[name].items():
                state = torch.load(folder / f"{key}-optimizer.pt", map_location="cpu", weights_only=True)
                sharding.load_optimizer_state(module, optimizer, state)
    # A file that is no state, or holds more than tensors, makes the unpickler raise nearly anything.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the checkpoint {str(folder.parent)!r} is of another model than the config describes ({reason}); "
            "use another --out, or the config that the run was started with"
        ) from None
    return progress


# The run folder


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
    versions = {name: _version(name) for name in PACKAGES}
    entry = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "command": sys.argv, "seed": seed}
    entry |= {"python": platform.python_version(), "packages": versions, "commit": _commit()}
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


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the code, with "+" where files were changed since; None outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        status = [*git, "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run(status, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")
