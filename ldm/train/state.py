"""A run folder: checkpoints that are whole or not there, the lock, the config that it was started with, its logs."""

import fcntl
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
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from ldm import model_io
from ldm.config import UserError
from ldm.distributed import gather_objects
from ldm.train.optim import EMA
from ldm.train.sharding import gather, shard_like

FORMAT = 2  # of the training state; runs of format 1 had other optimizer groups
MANIFEST = "manifest.json"
# Keys of a config that do not change the trained weights.
FREE = ("train.log_every", "train.validate_every", "train.preview_every", "train.save_every", "train.keep")
FREE += ("train.workers", "train.max_skipped", "train.best", "preview.", "cache", "data.max_broken")
PRODUCT = "train.batch_size * train.accumulate"  # how these share it may change
PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "einops", "safetensors", "numpy")


class Trained:
    """Everything that training changes: modules, averages and optimizers, by the names of their files."""

    def __init__(
        self, modules: dict[str, nn.Module], averages: dict[str, EMA], optimizers: dict[str, torch.optim.Optimizer]
    ) -> None:
        self.parts = modules | {f"{name}-ema": average.module for name, average in averages.items()}
        self.optimizers = optimizers
        self.names = {p: name for module in modules.values() for name, p in module.named_parameters()}

    def write(self, folder: Path | None, progress: dict[str, Any]) -> None:
        """Writes it, and `progress` (JSON), into `folder`; None in processes that only contribute their shards."""
        states = {name: part.state_dict() for name, part in self.parts.items()}
        for name, optimizer in self.optimizers.items():
            entries = ((self.names[p], key, x) for p, entry in optimizer.state.items() for key, x in entry.items())
            states[f"{name}-optimizer"] = {f"{parameter}/{key}": x for parameter, key, x in entries}
        for name, tensors in states.items():
            tensors = gather(tensors)
            if folder:
                model_io.save_tensors(folder / f"{name}.safetensors", tensors)
        if folder:
            model_io.write_json(folder / "state.json", {"format": FORMAT} | progress)

    def read(self, folder: Path) -> dict[str, Any]:
        """Loads what `write` wrote, sharded as the modules are; returns `progress`. Raises UserError for a state of an
        earlier version of this code, or of other modules or optimizers."""
        progress = model_io.read_json(folder / "state.json")
        if progress.get("format") != FORMAT:
            raise UserError(
                f"the run in {str(folder.parents[2])!r} was written by an earlier version of this code and cannot be"
                " resumed, though its model still opens; use another --out to start anew"
            )
        try:
            self._load(folder)
        except (UserError, RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"the checkpoint {str(folder.parent)!r} is of another model than the config describes ({reason}); "
                "use another --out, or the config that the run was started with"
            ) from None
        return progress

    def _load(self, folder: Path) -> None:
        for name, part in self.parts.items():
            tensors, live = model_io.load_tensors(folder / f"{name}.safetensors"), part.state_dict()
            part.load_state_dict({key: shard_like(x, live.get(key, x)) for key, x in tensors.items()})
        for name, optimizer in self.optimizers.items():
            parameters = {self.names[p]: p for group in optimizer.param_groups for p in group["params"]}
            optimizer.state.clear()
            for key, x in model_io.load_tensors(folder / f"{name}-optimizer.safetensors").items():
                parameter, _, entry = key.rpartition("/")
                p = parameters[parameter]
                optimizer.state[p][entry] = shard_like(x.to(p.device), p)
            if optimizer.state and len(optimizer.state) < len(parameters):
                raise UserError("its optimizers have other parameters")


def checkpoint(out: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return out / "checkpoints" / f"step-{step:08d}"


def newest(out: Path) -> Path | None:
    """The newest checkpoint that is whole; warns of damaged ones. Raises UserError where all are damaged."""
    folders = sorted((out / "checkpoints").glob("step-????????"), reverse=True)
    for folder in folders:
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
    for unfinished in folder.parent.glob(".step-*"):
        shutil.rmtree(unfinished)
    hidden = folder.with_name(f".{folder.name}")
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
    older = [path for path in sorted(folder.parent.glob("step-????????")) if path <= folder]
    for path in older[:-keep]:
        if best is None or path != checkpoint(out, best):
            shutil.rmtree(path)


def seal(folder: Path) -> None:
    """Syncs all files of a folder to the disk, and lists them with their SHA-256 in its manifest."""
    files = {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    model_io.write_json(folder / MANIFEST, {"files": files})
    for path in (*folder.rglob("*"), folder):
        sync(path)


def find_damage(folder: Path) -> str:
    """The first fault of a sealed folder; "" where every file is there and unchanged. (A flipped bit in tensor data
    loads without an error.)"""
    try:
        files = model_io.read_json(folder / MANIFEST)["files"]
        for name, expected in files.items():
            if sha256(folder / name) != expected:
                return f"{name} was changed since it was written"
    except (UserError, OSError, KeyError, AttributeError) as error:
        return " ".join(str(error).split())
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


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """Holds a run folder, which is made where it does not exist. Raises UserError where another process holds it."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{str(out)!r} is a file; --out names the run folder, which may be new")
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{str(out)!r} is in use by another run; wait for it, or use another --out") from None
        yield


def begin(out: Path, resolved: dict[str, Any], seed: int, start: int, force: bool) -> None:
    """Prepares the run folder for the steps after `start`: config.json, metrics.jsonl, starts.jsonl. Raises UserError
    for a config that has changed, unless `force`."""
    if start:
        check_changes(out / "config.json", resolved, force)
    drop_later_lines(out / "metrics.jsonl", start)
    model_io.write_json(out / "config.json", resolved)
    entry = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "command": sys.argv, "seed": seed}
    entry |= {"python": platform.python_version(), "packages": {name: version(name) for name in PACKAGES}}
    with (out / "starts.jsonl").open("a") as file:
        file.write(json.dumps(entry | {"commit": commit()}) + "\n")


def check_changes(file: Path, resolved: dict[str, Any], force: bool) -> None:
    """Compares a config with that in `file`: changes of keys that are not FREE raise UserError, or warn if `force`, as
    the number of steps always does."""
    before, now = (flat(table) for table in (model_io.read_json(file), json.loads(json.dumps(resolved))))
    for table in (before, now):
        table[PRODUCT] = table.pop("train.batch_size", 1) * table.pop("train.accumulate", 1)
    changed = [key for key in now if key in before and before[key] != now[key] and not key.startswith(FREE)]
    text = ", ".join(f"{key} ({before[key]!r} before, {now[key]!r} now)" for key in changed)
    if {*changed} - {"train.steps"} and not force:
        raise UserError(
            f"{str(file.parent)!r} was started with another config: {text}. Give --force to go on with these values,"
            " or another --out to start anew"
        )
    if changed:
        warnings.warn(f"resuming with another config: {text}", stacklevel=2)


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested table with dotted keys."""
    values: dict[str, Any] = {}
    for key, value in table.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return values


def drop_later_lines(metrics: Path, step: int) -> None:
    """Removes the lines after `step` from metrics.jsonl, as these steps are taken again, and half a line at its end."""
    if metrics.is_file():
        lines = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
        with model_io.atomic_write(metrics) as temporary:
            temporary.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))


def commit() -> str | None:
    """The commit of the code, with "+" where files were changed since; None outside a repository."""
    describe = ["describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    try:
        done = subprocess.run(["git", *describe], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


class Log:
    """Means of the logged values over steps and processes; they stay on the device until a line is written."""

    def __init__(self, accelerator: Accelerator, out: Path, datasets: list[Any]) -> None:
        self.accelerator, self.out = accelerator, out
        self.sums: dict[str, Tensor] = {}  # (total, count) since the last line
        self.skipped = 0  # steps since the last line
        self.faults = [d.faults for d in datasets if getattr(d, "faults", None) is not None]
        self.listed = 0  # samples of theirs in left_out.jsonl

    def say(self, text: str) -> None:
        """Prints a line above the progress bar, once for all processes."""
        if self.accelerator.is_main_process:
            tqdm.write(text)

    def add(self, values: dict[str, Tensor]) -> None:
        """Adds values to the means."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + torch.stack([value, torch.ones_like(value)])

    def write_means(self, step: int) -> str:
        """Writes the means since the last line; returns the losses for the progress bar."""
        means = {}
        if self.sums:
            totals, counts = self.accelerator.reduce(torch.stack(list(self.sums.values())), "sum").unbind(1)
            means = dict(zip(self.sums, (totals / counts).tolist(), strict=True))
        self.write(step, means | {"skipped": self.skipped})
        self.list_left_out()
        self.sums, self.skipped = {}, 0
        return " ".join(f"{name} {value:.4g}" for name, value in means.items() if name.endswith("_loss"))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends a line to metrics.jsonl and the trackers."""
        if self.accelerator.is_main_process:
            with (self.out / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step} | values) + "\n")
        self.accelerator.log(values, step=step)

    def list_left_out(self) -> None:
        """Lists the samples that any process has left out in left_out.jsonl, beside those listed before. Raises
        UserError, in all processes, where they are too many."""
        reasons: dict[str, str] = {}
        for faults in self.faults:
            for table in gather_objects(faults.reasons):
                for name, reason in table.items():
                    faults.add(name, reason)
            reasons |= faults.reasons
        if self.accelerator.is_main_process and len(reasons) > self.listed:
            self.listed, file = len(reasons), self.out / "left_out.jsonl"
            lines = file.read_text().splitlines() if file.is_file() else []
            entries = {entry["sample"]: entry["why"] for entry in map(json.loads, lines)} | reasons
            with model_io.atomic_write(file) as temporary:
                lines = [json.dumps({"sample": name, "why": reason}) + "\n" for name, reason in entries.items()]
                temporary.write_text("".join(lines))
            self.say(f"{len(reasons)} samples are left out, listed in {file}")
