"""A run around its steps: all that training changes, the log, and the run folder, whose checkpoints are whole or not
there."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch import Tensor, nn
from tqdm import tqdm

from ldm import model_io
from ldm.config import UserError
from ldm.distributed import from_main, gather_objects, gather_results, processes
from ldm.train import blocks, sharding
from ldm.train.config import TrainConfig
from ldm.train.optim import EMA, make_optimizers

if TYPE_CHECKING:
    from ldm.train.loop import Task

FORMAT = 2  # of the training state; runs of format 1 had other optimizer groups
MANIFEST = "manifest.json"
# Keys of a config that do not change the trained weights.
FREE = ("train.log_every", "train.validate_every", "train.preview_every", "train.save_every", "train.keep")
FREE += ("train.trackers", "train.workers", "train.max_skipped", "train.best", "preview.", "cache", "data.max_broken")
FREE += ("train.checkpointing", "data.cache_gb")
PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "einops", "safetensors", "numpy")


class Run:
    """The modules, averages and optimizers of a run, its log, and the work at intervals."""

    def __init__(self, task: Task, config: TrainConfig, out: Path) -> None:
        self.task, self.config, self.out = task, config, out
        folders = ProjectConfiguration(out, logging_dir=out / "tensorboard")
        options = {"mixed_precision": config.precision, "project_config": folders}
        try:
            self.accelerator = Accelerator(log_with=[*config.trackers] or None, **options)
        except ValueError as error:
            raise UserError(f"train.trackers is {config.trackers}: {error}") from None
        missing = {*config.trackers} - {str(tracker) for tracker in self.accelerator.log_with} - {"tensorboard"}
        if missing:  # but for the default
            raise UserError(f"train.trackers: {', '.join(missing)} is not installed; pip install it, or leave it out")
        requested = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if requested not in ("no", config.precision):
            warnings.warn(f"accelerate's mixed precision {requested} is not used; set train.precision", stacklevel=2)
        self.main = self.accelerator.is_main_process
        self.called, self.averages, self.optimizers = {}, {}, {}
        for name, module in task.modules.items():
            average = self.averages[name] = EMA(module.train(), config.ema_decay, config.ema_power)
            blocks.prepare(module, config)
            self.called[name], average.blank = sharding.prepare(module, average.module, self.accelerator)
            self.optimizers |= make_optimizers(name, module, task.optimizers.get(name, config.optimizer))
        self.parts = task.modules | {f"{name}-ema": average.module for name, average in self.averages.items()}
        self.names = {p: name for module in task.modules.values() for name, p in module.named_parameters()}
        self.best: dict[str, Any] | None = None  # step, value and name of the best validation
        self.logged: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)  # since the last line, on the device
        self.skips: list[Tensor] = []  # of each step since then: 1 where it was skipped

    # Resume, validate, preview, export, save

    def resume(self) -> int:
        """Loads the newest whole checkpoint, if there is one, and exports it if it is the last; returns its step."""
        folder, steps = from_main(newest, self.out), self.config.steps
        if folder is None:
            return 0
        self.task.check_export(folder)
        progress = self.read(folder / "state")
        step, best = progress["step"], progress["best"]
        if best and best["name"] == self.config.best:
            self.best = best
        if step >= steps:
            if not from_main(model_io.is_finished, self.out, folder):  # train.steps was lowered
                self.export(self.out, final=True)
            self.say(f"{self.out} is finished at step {step}; raise train.steps (now {steps}) to go on")
        return step

    @contextmanager
    def averaged(self) -> Iterator[dict[str, nn.Module]]:
        """The averaged modules, without gradients and with a random state of their own. Where they are sharded, all
        processes must call them equally often."""
        device, modules = self.accelerator.device, {name: average.module for name, average in self.averages.items()}
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.config.seed)
            yield modules
        for module in modules.values():
            sharding.reshard(module)

    def validate(self, step: int) -> bool:
        """Logs the validation after `step` steps; returns whether it was the best so far by `train.best`."""
        with self.averaged() as modules:
            values = gather_objects(self.task.validate(modules))[0]  # alike, where devices round differently
        self.write_line(step, {f"val/{name}": value for name, value in values.items()})
        self.say(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
        best, scores = self.config.best, values | {f"-{name}": -value for name, value in values.items()}
        if best and best not in scores:
            known = ", ".join(values)
            warnings.warn(f"train.best is {best!r}, which is not validated; these are: {known}", stacklevel=2)
        score = scores.get(best, math.nan)
        improved = score < (self.best["value"] if self.best else math.inf)
        if improved:
            self.best = {"step": step, "value": score, "name": best}
            self.say(f"{best} is the best so far")
        return improved

    def preview(self, step: int) -> None:
        """Saves the task's picture as previews/step-N.png."""
        with self.averaged() as modules:
            image = self.task.preview(modules)
        if image and self.main:
            (self.out / "previews").mkdir(exist_ok=True)
            image.save(self.out / "previews" / f"step-{step:08d}.png")

    def export(self, folder: Path, final: bool) -> None:
        """Writes the loadable folder, from the averaged weights."""
        with self.averaged() as modules:
            measured = self.task.measure(modules, final)
            modules = {name: sharding.whole(e.module, e.blank) for name, e in self.averages.items()}
            from_main(self.task.export, modules, folder, measured)

    def save(self, step: int) -> None:
        """Writes a checkpoint: the loadable folder, and `state/` with all that resuming needs."""
        folder = self.out / "checkpoints" / f".step-{step:08d}"  # hidden until it is whole
        for unfinished in folder.parent.glob(".step-*") if self.main else ():
            shutil.rmtree(unfinished)
        self.export(folder, final=False)
        progress = {"format": FORMAT, "step": step, "best": self.best}
        parts = gather_results(partial(self.write, folder, progress))
        files = {name: digest for part in parts for name, digest in part.items()}
        from_main(publish, folder, files, self.config.keep, self.best and self.best["step"])

    # The training state, by the names of its files

    def write(self, checkpoint: Path, progress: dict[str, Any]) -> dict[str, str]:
        """Writes `state/`: modules, averages, optimizers and `progress` (JSON); where they are sharded, each process
        its shards. Returns the files that this process has written to the checkpoint, sealed."""
        states = {name: part.state_dict() for name, part in self.parts.items()}
        for name, optimizer in self.optimizers.items():
            states[f"{name}-optimizer"] = {
                f"{self.names[p]}/{key}": x for p, entry in optimizer.state.items() for key, x in entry.items()
            }
        folder, exported = checkpoint / "state", checkpoint.rglob("*") if self.main else ()
        files = [path for path in exported if folder not in path.parents and path.is_file()]  # others write there
        folder.mkdir(exist_ok=True)
        if self.main:
            model_io.write_json(folder / "state.json", progress)
            files.append(folder / "state.json")
        written = (sharding.save(folder, name, tensors) for name, tensors in states.items())
        return seal(checkpoint, [*files, *filter(None, written)])

    def read(self, folder: Path) -> dict[str, Any]:
        """Loads the files of `write`, sharded as the modules are; returns `progress`. Raises UserError for the state of
        an earlier version of this code, or of other modules or optimizers."""
        progress = model_io.read_json(folder / "state.json")
        try:
            if progress.get("format") != FORMAT:
                raise UserError("an earlier version of this code wrote it; its model still opens")
            for name, part in self.parts.items():
                live, tensors = part.state_dict(), sharding.load(folder, name)
                part.load_state_dict({key: sharding.shard_like(x, live[key]) for key, x in tensors.items()})
            for name, optimizer in self.optimizers.items():
                tensors = sharding.load(folder, f"{name}-optimizer")
                entries = {key.rpartition("/")[2] for key in tensors}
                for p in [p for group in optimizer.param_groups for p in group["params"]]:
                    entry = {key: tensors[f"{self.names[p]}/{key}"].to(p.device) for key in entries}
                    optimizer.state[p] = {key: sharding.shard_like(x, p) for key, x in entry.items()}
        except (UserError, RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"the checkpoint {str(folder.parent)!r} is of another model than the config describes ({reason}); "
                "use another --out, or the config that the run was started with"
            ) from None
        return progress

    # The log

    def say(self, text: str) -> None:
        """Prints a line above the progress bar, once for all processes."""
        if self.main:
            tqdm.write(text)

    def log(self, tables: list[dict[str, Any]], skip: Tensor) -> None:
        """Adds the scalars of a step to the means of the next line, unless `skip` is 1."""
        self.skips.append(skip)
        for name, value in (entry for table in tables for entry in table.items()):
            x = value.detach().float() if torch.is_tensor(value) else torch.full_like(skip, value)
            self.logged[name].append((x, skip))

    def write_means(self, step: int) -> str:
        """Writes the means over steps and processes since the last line; returns the losses for the progress bar."""
        means = {}
        for name, rows in self.logged.items():
            values, skips = map(torch.stack, zip(*rows, strict=True))
            if len(kept := values[skips == 0]):
                means[name] = kept.mean()
        means = {name: float(x) for name, x in self.accelerator.reduce(means, "mean").items()}
        self.write_line(step, means | {"skipped": int(sum(self.skips))})
        self.list_left_out()
        self.logged.clear()
        self.skips.clear()
        return " ".join(f"{name} {value:.4g}" for name, value in means.items() if name.endswith("_loss"))

    def write_line(self, step: int, values: dict[str, float]) -> None:
        """Appends a line to metrics.jsonl and the trackers."""
        if self.main:
            with (self.out / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step} | values) + "\n")
        self.accelerator.log(values, step=step)

    def list_left_out(self) -> None:
        """Lists the samples that any process has left out in left_out.jsonl, beside those listed before. Raises
        UserError, in all processes, where they are too many."""
        file = self.out / "left_out.jsonl"
        before = whole_lines(file)
        lines = dict.fromkeys(before)
        datasets = self.task.dataset, self.task.held_out
        for faults in filter(None, (getattr(dataset, "faults", None) for dataset in datasets)):
            for table in gather_objects(faults.reasons):
                for fault in table.items():
                    faults.add(*fault)
            lines |= {json.dumps({"sample": name, "why": why}) + "\n": None for name, why in faults.reasons.items()}
        if self.main and len(lines) > len(before):
            write_lines(file, lines)
            self.say(f"{len(lines)} samples are left out, listed in {file}")


def newest(out: Path) -> Path | None:
    """The newest checkpoint that is whole; warns of damaged ones. Raises UserError where all are damaged."""
    folders = sorted((out / "checkpoints").glob("step-????????"), reverse=True)
    for folder in folders:
        try:
            verify(folder)
            return folder
        except (UserError, OSError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split())
            warnings.warn(f"the checkpoint {str(folder)!r} is damaged ({reason}); skipped", stacklevel=2)
    if folders:
        raise UserError(f"no checkpoint in {str(out / 'checkpoints')!r} is whole; move them away to start anew")
    return None


def publish(hidden: Path, files: dict[str, str], keep: int, best: int | None = None) -> None:
    """Renames a folder `.step-N`, whose sealed `files` go into its manifest, to `step-N`; then removes all checkpoints
    but the newest `keep` and that of step `best`."""
    model_io.write_json(hidden / MANIFEST, {"files": dict(sorted(files.items()))})
    for path in (hidden / MANIFEST, *hidden.rglob("*/"), hidden):
        sync(path)
    folder = hidden.with_name(hidden.name[1:])
    shutil.rmtree(folder, ignore_errors=True)
    hidden.rename(folder)
    sync(folder.parent)
    # a checkpoint newer than this one is damaged, and was skipped
    older = [path for path in sorted(folder.parent.glob("step-????????")) if path <= folder]
    for path in {*older[:-keep]} - {folder.with_name(f"step-{best or 0:08d}")}:
        shutil.rmtree(path)


def seal(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """Syncs files in a folder to the disk; returns their SHA-256 by name."""
    for path in files:
        sync(path)
    return {str(path.relative_to(folder)): sha256(path) for path in files}


def verify(folder: Path) -> None:
    """Raises an error where a file of a sealed folder is missing or has changed. (A flipped bit in tensor data loads
    without one.)"""
    for name, expected in model_io.read_json(folder / MANIFEST)["files"].items():
        if sha256(folder / name) != expected:
            raise UserError(f"{name} was changed since it was written")


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
    """Holds a run folder, which is made where it does not exist. Raises UserError where another process holds it, and
    for a name that is not UTF-8."""
    try:
        str(out).encode()
        out.mkdir(parents=True, exist_ok=True)
        file = (out / ".lock").open("a")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except UnicodeEncodeError:
        raise UserError(f"--out {str(out)!r} is not UTF-8, which files of models need; use another name") from None
    except OSError as error:
        raise UserError(f"--out {str(out)!r} is a file, or in use by another run ({error.strerror})") from None
    with file:
        yield


def begin(out: Path, resolved: dict[str, Any], start: int, force: bool) -> None:
    """Prepares the run folder for the steps after `start`: config.json, starts.jsonl, and metrics.jsonl without the
    steps that are taken again. Raises UserError for a config that has changed, unless `force`."""
    if start:
        check_changes(out / "config.json", resolved, force)
    model_io.write_json(out / "config.json", resolved)
    lines = [line for line in whole_lines(out / "metrics.jsonl") if json.loads(line)["step"] <= start]
    write_lines(out / "metrics.jsonl", lines)
    entry = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "device": str(processes().device),
    }
    entry |= {"packages": {name: version(name) for name in PACKAGES}, "commit": commit()}
    with (out / "starts.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")


def check_changes(file: Path, resolved: dict[str, Any], force: bool) -> None:
    """Compares a config with that in `file`: changes of keys that are not FREE raise UserError, or warn if `force`, as
    the number of steps always does."""
    before, now = flat(model_io.read_json(file)), flat(json.loads(json.dumps(resolved)))
    changed = {k for k in now.keys() & before.keys() if before[k] != now[k] and not k.startswith(FREE)}
    text = ", ".join(f"{key} ({before[key]!r} before, {now[key]!r} now)" for key in sorted(changed))
    if changed - {"train.steps"} and not force:
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


def whole_lines(file: Path) -> list[str]:
    """The lines of a file, if there is one, without half a line at its end, as a kill leaves it."""
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [line for line in lines if line.endswith("\n")]


def write_lines(file: Path, lines: Iterable[str]) -> None:
    """Replaces a file at once."""
    with model_io.atomic_write(file) as temporary:
        temporary.write_text("".join(lines))


def commit() -> str | None:
    """The commit of the code, with "+" where files were changed since; None outside a repository."""
    describe = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    try:
        done = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None
