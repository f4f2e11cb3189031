"""What a run folder keeps for going on: checkpoints with the training's state, and the lines logged so far."""

import errno
import json
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ldm import model_io as weights
from ldm.config import UserError
from ldm.train import manifest
from ldm.train.ema import EMA
from ldm.train.sharding import gather, shard

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

LOCK = ".lock"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Keys of a config that change nothing of what is trained.
FREE = ("train.log_every", "train.validate_every", "train.preview_every", "train.save_every", "train.keep")
FREE += ("train.workers", "train.max_skipped", "preview.", "cache", "data.max_broken", "train.best")


class Trained(NamedTuple):
    """What training changes, each under the names of the trained modules; a module may have a second optimizer."""

    modules: dict[str, nn.Module]
    averages: dict[str, EMA]
    optimizers: dict[str, torch.optim.Optimizer]


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, damaged ones too."""
    return sorted((out / "checkpoints").glob("step-????????"))


def checkpoint(out: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return out / "checkpoints" / f"step-{step:08d}"


def newest(out: Path) -> Path | None:
    """The newest checkpoint that is whole; warns of newer ones that are damaged. UserError where all are."""
    found = checkpoints(out)
    for folder in reversed(found):
        wrong = manifest.problem(folder)
        if not wrong:
            return folder
        warnings.warn(f"the checkpoint {str(folder)!r} is damaged ({wrong}); passed over", stacklevel=2)
    if found:
        raise UserError(f"no checkpoint in {str(found[0].parent)!r} is whole; move them away to begin anew")
    return None


def sweep(out: Path) -> None:
    """Removes what a crash left half-written."""
    for hidden in (out / "checkpoints").glob(".step-*"):
        shutil.rmtree(hidden, ignore_errors=True)


@contextmanager
def new_checkpoint(out: Path, done: int, keep: int, best: int = -1) -> Iterator[Path]:
    """A folder to fill; after the block it is sealed and becomes `checkpoints/step-N` in one move, and once it is seen
    to be whole, all but the newest `keep` and that of step `best` go. What is broken off before that stays hidden and
    is never opened.

    UserError where the disk is full: what was there before is still whole.
    """
    folder = checkpoint(out, done)
    hidden = folder.with_name(f".{folder.name}")
    try:
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir(parents=True)
        yield hidden
        manifest.seal(hidden)
    except Exception as error:
        full = _is_full(error, out)
        shutil.rmtree(hidden, ignore_errors=True)
        if full:
            raise UserError(_disk_full(out, done)) from None
        raise
    shutil.rmtree(folder, ignore_errors=True)
    hidden.rename(folder)
    manifest.sync(folder.parent)
    if wrong := manifest.problem(folder):
        raise UserError(
            f"the checkpoint {str(folder)!r} was not written as it should be ({wrong}); is the disk failing?"
        )
    # one that is newer than this one is damaged, and was passed over
    for old in [found for found in checkpoints(out) if found.name <= folder.name][:-keep]:
        if old != checkpoint(out, best):
            shutil.rmtree(old)


def _is_full(error: Exception, out: Path) -> bool:
    """Whether writing failed for want of room: torch has errors of its own for it, which do not say why."""
    words = ("No space left", "unexpected pos", "file write failed", "iostream error")
    full = getattr(error, "errno", None) in FULL or any(word in str(error) for word in words)
    return full or shutil.disk_usage(out).free < 2**20


def _disk_full(out: Path, done: int) -> str:
    """What to do, and how much is needed: as much as the checkpoint before took."""
    before = checkpoints(out)
    size = sum(file.stat().st_size for file in before[-1].rglob("*") if file.is_file()) if before else 0
    need = f"; one took {size / 2**20:,.1f} MiB before" if before else ""
    kept = f"the one of {before[-1].name} is whole" if before else "there was none before"
    free = shutil.disk_usage(out).free / 2**20
    return (
        f"the disk is full, or a file larger than allowed (ulimit -f), so the checkpoint of step {done} could not be"
        f" written: {free:,.1f} MiB are free{need};"
        f" {kept}. Free some space and give the same command again"
    )


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Holds a run folder for this process, which may not be there yet; UserError where another one has it. On systems
    without file locks it holds nothing."""
    out.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    with (out / LOCK).open("a+") as file:
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


def note_start(out: Path, seed: int) -> None:
    """Adds a line to starts.jsonl: when, by which command, versions, commit and seed."""
    names = ("torch", "torchvision", "transformers", "accelerate", "einops", "safetensors", "numpy")
    versions = {name: _version(name) for name in names}
    about = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "command": sys.argv, "seed": seed}
    about |= {"python": platform.python_version(), "packages": versions, "commit": _commit()}
    with (out / "starts.jsonl").open("a") as file:
        file.write(json.dumps(about) + "\n")


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


def write_state(folder: Path | None, trained: Trained, about: dict[str, Any]) -> None:
    """Weights, averages and optimizers of all modules, and `about` (JSON), into `folder`; None in processes that do not
    write, but give their part of what is sharded."""
    if folder:
        folder.mkdir()
    parts: dict[str, Any] = trained.modules | {f"{name}-ema": average for name, average in trained.averages.items()}
    for name, part in parts.items():
        tensors = gather(part.state_dict(), keep=folder is not None)
        if folder:
            weights.save_tensors(folder / f"{name}.safetensors", tensors)
    for name, optimizer in trained.optimizers.items():
        state = gather(optimizer.state_dict(), keep=folder is not None)
        if folder:
            torch.save(state, folder / f"{name}-optimizer.pt")
    if folder:
        weights.write_json(folder / "state.json", about)


def read_state(folder: Path, trained: Trained) -> dict[str, Any]:
    """Loads what `write_state` wrote into the modules, averages and optimizers, or each process's part of it; returns
    `about`. UserError where the state is of other modules."""
    try:
        for name, module in trained.modules.items():
            if not (folder / f"{name}.safetensors").is_file():
                raise ValueError(f"it has no {name}")
            module.load_state_dict(shard(weights.load_tensors(folder / f"{name}.safetensors"), module.state_dict()))
            trained.averages[name].load_state_dict(weights.load_tensors(folder / f"{name}-ema.safetensors"))
        for name, optimizer in trained.optimizers.items():
            if not (folder / f"{name}-optimizer.pt").is_file():
                raise ValueError(f"it has no optimizer {name}")
            # load_state_dict moves what belongs on the device
            state = torch.load(folder / f"{name}-optimizer.pt", map_location="cpu", weights_only=True)
            parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
            state["state"] = shard(state["state"], parameters)
            optimizer.load_state_dict(state)
    # A file that is no state, or holds more than tensors, makes the unpickler raise nearly anything.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the checkpoint {str(folder.parent)!r} is of another model than the config describes ({reason}); "
            "use another --out, or the config that the run was started with"
        ) from None
    return weights.read_json(folder / "state.json")


class LeftOut:
    """Samples of data sets (`ldm.data.faults`; others have none) that were left out, and their list left_out.jsonl."""

    def __init__(self, out: Path, datasets: list[Any]) -> None:
        self.file = out / "left_out.jsonl"
        self.faults = [d.faults for d in datasets if getattr(d, "faults", None) is not None]
        self.told: set[str] = set()

    def add(self, found: dict[str, str]) -> None:
        """Notes what other processes found in the first data set; UserError where they are too many."""
        for name, why in found.items():
            self.faults[0].add(name, why)

    def new(self) -> dict[str, str]:
        """Those not given before."""
        found = {name: why for faults in self.faults for name, why in faults.reasons.items() if name not in self.told}
        self.told |= found.keys()
        return found

    def write(self, found: dict[str, str]) -> int:
        """Adds those to the list that are not in it yet; returns how many it has."""
        text = self.file.read_text() if self.file.is_file() else ""
        lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]  # a crash may leave a half one
        listed = {json.loads(line)["sample"] for line in lines}
        more = [{"sample": name, "why": why} for name, why in found.items() if name not in listed]
        temporary = self.file.with_name(self.file.name + ".tmp")
        temporary.write_text("".join(lines) + "".join(json.dumps(entry) + "\n" for entry in more))
        os.replace(temporary, self.file)
        return len(lines) + len(more)


def drop_later_lines(metrics: Path, step: int, looked: bool = True) -> None:
    """Takes the lines after `step` out of metrics.jsonl: the steps are done again after a resume. So is the validation
    of `step` itself, unless it was `looked` at before its checkpoint was saved."""
    if metrics.is_file():
        lines = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
        last = step if looked else step - 0.5
        kept = [line for line in lines if json.loads(line)["step"] <= (last if '"val/' in line else step)]
        temporary = metrics.with_name(metrics.name + ".tmp")  # so that a crash now loses no line
        temporary.write_text("".join(kept))
        os.replace(temporary, metrics)


def check_changes(file: Path, resolved: dict[str, Any], force: bool) -> None:
    """Where a resumed run's `config.json` has other values than the config now: UserError that names them, without
    `force`; with it a warning, as for the number of steps. How often things are logged and kept may always change."""
    if not file.is_file():
        return
    before, now = (dict(_flat(table)) for table in (weights.read_json(file), json.loads(json.dumps(resolved))))
    changed = [key for key in now if key in before and before[key] != now[key] and not key.startswith(FREE)]
    names = ", ".join(f"{key} ({before[key]!r} before, {now[key]!r} now)" for key in changed)
    allowed = {"train.steps"}
    if _global_batch(before) == _global_batch(now):
        allowed |= {"train.batch_size", "train.accumulate"}
    if set(changed) - allowed and not force:
        raise UserError(
            f"{str(file.parent)!r} was started with another config: {names}. Give --force to go on with these values,"
            " or another --out to begin anew"
        )
    if changed:
        warnings.warn(f"resuming with other values than before of: {', '.join(changed)}", stacklevel=2)


def _global_batch(flat: dict[str, Any]) -> int:
    """Samples that a step of one process takes."""
    return flat.get("train.batch_size", 1) * flat.get("train.accumulate", 1)


def _flat(table: dict[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{where}{key}.")
        else:
            yield where + key, value
