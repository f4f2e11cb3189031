"""The one training loop: accelerate, EMA, checkpoints, resume, logging, previews. It knows no model.

A task says what one step is (`ldm/tasks/`). Everything random in a step is drawn after seeding with
(seed, step, process), and the order of the data is a pure function of (seed, step): to resume is to go on.
"""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ldm import weights
from ldm.config import UserError
from ldm.data.order import EpochBatches
from ldm.ema import EMA


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) with linear warm-up, then constant or cosine decay to `final_lr`."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup: int = 100  # steps
    decay: Literal["constant", "cosine"] = "cosine"
    final_lr: float = 0.0  # as a share of lr, at the last step of a cosine

    def rate(self, step: int, steps: int) -> float:
        """The learning rate at a step counted from 0, as a share of `lr`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.decay == "constant":
            return 1.0
        progress = (step - self.warmup) / max(steps - self.warmup, 1)
        return self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and how a training runs; intervals are in optimizer steps, 0 switches one off."""

    steps: int = 10_000
    batch_size: int = 64  # of one process and micro-batch
    accumulate: int = 1  # micro-batches an optimizer step
    seed: int = 0
    precision: Literal["no", "bf16"] = "no"  # autocast; the trained weights stay float32
    clip: float = 1.0  # gradient norm of each module
    workers: int = 0  # processes that load data
    ema_decay: float = 0.999
    ema_power: float = 0.75
    log_every: int = 50
    validate_every: int = 1000
    preview_every: int = 1000
    save_every: int = 1000
    keep: int = 2  # checkpoints
    max_skipped: int = 20  # steps in a row without a finite loss before giving up
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


class Task(Protocol):
    """What one kind of training does; `modules` are those trained, each with its own optimizer."""

    modules: dict[str, nn.Module]
    dataset: Any

    def collate(self, samples: list[dict]) -> dict:
        """Samples of the data set -> a batch; runs in the loader's processes, so without randomness."""

    def losses(self, modules: dict[str, nn.Module], batch: dict, step: int) -> Iterator[tuple[str, Tensor, dict]]:
        """Yields (module, its loss, values to log) in turn; the loop runs backward after each."""

    def after_step(self) -> None:
        """What must hold after the weights changed, e.g. a clamp."""

    def validate(self, device: torch.device) -> dict[str, float]:
        """Numbers on held-out data, with the averaged weights in place."""

    def preview(self, device: torch.device) -> Image.Image | None:
        """A picture to look at, with the averaged weights in place, from fixed inputs and seeds."""

    def export(self, folder: Path, device: torch.device, final: bool) -> None:
        """Writes the loadable folder, with the averaged weights in place; `final` at the end of the training."""


def train(task: Task, config: TrainConfig, out: str | Path, resolved: dict) -> None:
    """Trains `task` to `config.steps`, resuming from the newest checkpoint in `out`; ends with `task.export(out)`.

    `resolved` is the whole config as a dict, stored as `out/config.json`. Raises UserError when losses stay
    non-finite; nothing of such a step reaches the weights.
    """
    run = Run(task, config, Path(out))
    start = run.resume()
    if run.main:
        weights.write_json(run.out / "config.json", resolved)
    batches = run.batches(start)
    bar = tqdm(range(start, config.steps), initial=start, total=config.steps, disable=not run.main, unit="step")
    for step in bar:
        run.step(batches, step)
        done = step + 1
        last = done == config.steps
        if done % config.log_every == 0 or last:
            bar.set_postfix_str(" ".join(f"{k} {v:.4g}" for k, v in run.log(done).items() if k in run.shown))
        if last or _due(done, config.validate_every):
            run.validate(done)
        if last or _due(done, config.preview_every):
            run.preview(done)
        if last or _due(done, config.save_every):
            run.save(done)
    if start < config.steps or not any(run.out.glob("*/config.json")):
        run.export(run.out, final=True)


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


class Run:
    """One process's view of a training: its modules, optimizers, averages and what was logged since last time."""

    def __init__(self, task: Task, config: TrainConfig, out: Path):
        self.task, self.config, self.out = task, config, out
        trackers = ["tensorboard"] if _installed("tensorboard") else []
        self.accelerator = Accelerator(mixed_precision=config.precision, log_with=trackers, project_dir=out)
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        out.mkdir(parents=True, exist_ok=True)
        self.accelerator.init_trackers("tensorboard")
        o = config.optimizer
        self.optimizers = {}
        for name, module in task.modules.items():
            module.train().to(self.device)
            trained = [p for p in module.parameters() if p.requires_grad]
            self.optimizers[name] = torch.optim.AdamW(
                trained, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay
            )
        self.wrapped = {name: self.accelerator.prepare(module) for name, module in task.modules.items()}
        self.averages = {name: EMA(m, config.ema_decay, config.ema_power) for name, m in task.modules.items()}
        self.skipped = 0
        self.sums: dict[str, list[Tensor]] = {}
        self.shown: set[str] = set()

    def batches(self, start: int) -> Iterator[dict]:
        """Collated batches from optimizer step `start` on."""
        c, a = self.config, self.accelerator
        order = EpochBatches(
            len(self.task.dataset),
            c.batch_size,
            c.seed,
            rank=a.process_index,
            world=a.num_processes,
            start=start * c.accumulate,
            steps=c.steps * c.accumulate,
        )
        loader = DataLoader(
            self.task.dataset,
            batch_sampler=order,
            num_workers=c.workers,
            collate_fn=self.task.collate,
            persistent_workers=c.workers > 0,
            generator=torch.Generator().manual_seed(c.seed),  # leaves the global generator alone
        )
        return iter(loader)

    def step(self, batches: Iterator[dict], step: int) -> None:
        """One optimizer step: every micro-batch backward, then each module moves unless something is non-finite."""
        c = self.config
        for micro in range(c.accumulate):
            batch = _to(next(batches), self.device)
            torch.manual_seed(_mix(c.seed, step * c.accumulate + micro, self.accelerator.process_index))
            with ExitStack() as stack:
                if micro < c.accumulate - 1:
                    for module in self.wrapped.values():
                        stack.enter_context(self.accelerator.no_sync(module))
                for name, loss, values in self.task.losses(self.wrapped, batch, step):
                    self.accelerator.backward(loss / c.accumulate)
                    self.note({f"{name}_loss": loss.detach(), **values})
        norms = {n: nn.utils.clip_grad_norm_(m.parameters(), c.clip) for n, m in self.task.modules.items()}
        finite = all(torch.isfinite(norm) for norm in norms.values())
        if finite:
            self.note({f"{name}_grad_norm": norm for name, norm in norms.items()})
            self.update(step)
        self.skipped = 0 if finite else self.skipped + 1
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        if self.skipped >= c.max_skipped:
            raise UserError(
                f"{self.skipped} steps in a row had a non-finite loss or gradient, the last at step {step}; the weights"
                " are those from before. Lower train.optimizer.lr, or set train.precision='no'"
            )

    def update(self, step: int) -> None:
        """Moves the weights and their averages."""
        rate = self.config.optimizer.rate(step, self.config.steps)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate * self.config.optimizer.lr
            optimizer.step()
        self.task.after_step()
        for name, average in self.averages.items():
            average.update(self.task.modules[name], step)

    def note(self, values: dict[str, Tensor | float]) -> None:
        """Keeps values for the next log line, which shows their mean."""
        for name, value in values.items():
            self.sums.setdefault(name, []).append(torch.as_tensor(value).detach().float().cpu())

    def log(self, done: int) -> dict[str, float]:
        """Writes the means since the last call to metrics.jsonl and the trackers."""
        means = {name: torch.stack(values).mean() for name, values in self.sums.items()}
        means = {n: float(self.accelerator.reduce(v.to(self.device), "mean")) for n, v in means.items()}
        self.shown |= {f"{name}_loss" for name in self.task.modules}
        means["skipped"] = self.skipped
        self.sums.clear()
        self.write(done, means)
        return means

    def write(self, done: int, values: dict[str, float]) -> None:
        """Appends one line to metrics.jsonl and tells the trackers."""
        if self.main:
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": done} | values) + "\n")
        self.accelerator.log(values, step=done)

    def averaged(self) -> ExitStack:
        """A context in which every module carries its averaged weights and is in evaluation mode, with the
        random state of the training put back after it."""
        stack = ExitStack()
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(torch.no_grad())
        for name, module in self.task.modules.items():
            stack.enter_context(self.averages[name].swapped(module))
            stack.callback(module.train)
            module.eval()
        torch.manual_seed(self.config.seed)
        return stack

    def validate(self, done: int) -> None:
        """Logs the task's numbers on held-out data."""
        if self.main:
            with self.averaged():
                values = {f"val/{name}": value for name, value in self.task.validate(self.device).items()}
            self.write(done, values)
            tqdm.write(f"step {done}: " + ", ".join(f"{n[4:]} {v:.4g}" for n, v in values.items()))
        self.accelerator.wait_for_everyone()

    def preview(self, done: int) -> None:
        """Saves the task's picture as previews/step-N.png."""
        if self.main:
            with self.averaged():
                image = self.task.preview(self.device)
            if image is not None:
                (self.out / "previews").mkdir(exist_ok=True)
                image.save(self.out / "previews" / f"step-{done:08d}.png")
        self.accelerator.wait_for_everyone()

    def export(self, folder: Path, final: bool) -> None:
        """The task's loadable folder, from the averaged weights."""
        if self.main:
            with self.averaged():
                self.task.export(folder, self.device, final)
        self.accelerator.wait_for_everyone()

    def save(self, done: int) -> None:
        """A checkpoint: the loadable folder, and `state/` with all that resuming needs; renamed into place whole."""
        folder = self.out / "checkpoints" / f"step-{done:08d}"
        temporary = folder.with_name(folder.name + ".tmp")
        if self.main:
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / "state").mkdir(parents=True)
        self.export(temporary, final=False)
        if self.main:
            for name, module in self.task.modules.items():
                weights.save_tensors(temporary / "state" / f"{name}.safetensors", module.state_dict())
                weights.save_tensors(temporary / "state" / f"{name}-ema.safetensors", self.averages[name].state_dict())
                torch.save(self.optimizers[name].state_dict(), temporary / "state" / f"{name}-optimizer.pt")
            weights.write_json(temporary / "state" / "state.json", {"step": done, "skipped": self.skipped})
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
            for old in sorted(folder.parent.glob("step-????????"))[: -self.config.keep]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def resume(self) -> int:
        """Loads the newest checkpoint, if there is one; returns the step to go on from."""
        found = sorted((self.out / "checkpoints").glob("step-????????"))
        if not found:
            return 0
        state = found[-1] / "state"
        try:
            for name, module in self.task.modules.items():
                module.load_state_dict(weights.load_tensors(state / f"{name}.safetensors"))
                self.averages[name].load_state_dict(weights.load_tensors(state / f"{name}-ema.safetensors"))
                optimizer = torch.load(state / f"{name}-optimizer.pt", map_location=self.device, weights_only=True)
                self.optimizers[name].load_state_dict(optimizer)
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                f"{str(found[-1])!r} is of another model than the config describes ({str(error).splitlines()[0]}); "
                "use another --out, or the config that the run was started with"
            ) from None
        step = weights.read_json(state / "state.json")["step"]
        if self.main:
            tqdm.write(f"resuming {self.out} at step {step} of {self.config.steps}")
        return step


def _installed(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def _mix(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _to(batch: dict, device: torch.device) -> dict:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
