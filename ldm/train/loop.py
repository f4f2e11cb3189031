"""The training loop, from top to bottom: batch, losses, backward, clip, step, EMA, log, validation, checkpoint.

It knows no model: a task computes the losses. All random numbers of a step come from `Draws`, and the order of the data
is a pure function of (seed, step), so a run that is resumed, or shared by many processes, takes the same steps.
"""

import math
import os
import signal
import warnings
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ldm import model_io
from ldm.config import UserError
from ldm.data.loader import load
from ldm.data.order import EpochBatches
from ldm.distributed import Draws, from_main, processes
from ldm.train import sharding, state
from ldm.train.config import OptimizerConfig, TrainConfig
from ldm.train.optim import EMA, make_optimizers

Modules = dict[str, nn.Module]
Losses = Iterator[tuple[str, Tensor, dict]]  # the name of a module, its loss, values to log


class Task:
    """One kind of training: which modules are trained, on which data, by which losses."""

    modules: Modules
    dataset: Any
    held_out: Any = None  # a second data set
    optimizers: dict[str, OptimizerConfig] = {}  # of modules that do not use that of the run

    def collate(self, samples: list[dict]) -> dict:
        """Samples -> a batch; runs in the loading processes, without random numbers."""

    def losses(self, modules: Modules, batch: dict, step: int, draws: Draws) -> Losses:
        """The losses of a batch in turn; the loop runs backward after each."""

    def after_step(self) -> None:
        """Restores constraints after the weights have changed, e.g. by a clamp."""

    def validate(self, modules: Modules) -> dict[str, float]:
        """Values on held-out data, of the averaged `modules`."""

    def preview(self, modules: Modules) -> Image.Image | None:
        """A picture to look at, from fixed inputs and seeds."""

    def export(self, modules: Modules, folder: Path, final: bool) -> None:
        """Writes the loadable folder; `final` at the end of the run."""


def train(task: Task, config: TrainConfig, out: str | Path, resolved: dict, force: bool = False) -> None:
    """Trains `task` to `config.steps` from the newest whole checkpoint in `out`; ends with an export into `out`.

    `resolved` is the config as a dict, stored as `out/config.json`. Raises UserError where a resumed run has another
    one, unless `force`; where losses stay non-finite; and where memory runs out. At SIGINT or SIGTERM the step is
    finished and saved, then `Stopped` is raised; a second signal ends the process at once.
    """
    c, out = config, Path(out)
    with ExitStack() as stack:
        # Set up
        processes()
        from_main(partial(stack.enter_context, state.lock(out)))
        signals = stack.enter_context(caught_signals())
        stack.enter_context(memory_errors(c))
        run = Run(task, c, out)
        a, log, trained = run.accelerator, run.log, run.trained

        # Resume
        start = run.resume()
        if start >= c.steps:
            return
        from_main(partial(state.begin, out, resolved, c.seed, start, force))
        a.init_trackers("tensorboard")
        if start:
            log.say(f"resuming {out} at step {start} of {c.steps}")
        batches = stack.enter_context(closing(run.batches(start)))
        bar = stack.enter_context(tqdm(initial=start, total=c.steps, disable=not a.is_main_process, unit="step"))
        skipped = 0  # steps in a row

        for step in range(start, c.steps):
            # Gradients of every micro-batch
            kept, values = [], []
            for micro in range(c.accumulate):
                batch, faults = next(batches)
                for name, reason in faults.items():
                    task.dataset.faults.add(name, reason)
                batch = to_device(batch, a.device)
                kept.append(batch)
                draws = Draws(c.seed, step * c.accumulate + micro, a.process_index, a.num_processes, a.device)
                sharding.set_gradient_sync(run.called.values(), micro == c.accumulate - 1)
                for name, loss, extra in task.losses(run.called, batch, step, draws):
                    a.backward(loss / c.accumulate)
                    values.append(scalars({f"{name}_loss": loss} | extra, a.device))

            # Clip and update, in all processes or in none
            values.append({f"{n}_grad_norm": sharding.clip(m, c.clip, a) for n, m in task.modules.items()})
            finite, stopped_by = agree(values, signals, a)
            if finite:
                rate = c.optimizer.rate(step, c.steps)
                for optimizer in trained.optimizers.values():
                    for group in optimizer.param_groups:
                        group["lr"] = rate * optimizer.defaults["lr"]
                    optimizer.step()
                task.after_step()
                for name, average in run.averages.items():
                    average.update(task.modules[name], step)
                for table in (*values, scalars({"lr": rate * c.optimizer.lr}, a.device)):
                    log.add(table)
            for optimizer in trained.optimizers.values():
                optimizer.zero_grad(set_to_none=True)

            # Give up where losses stay non-finite
            log.skipped += not finite
            skipped = 0 if finite else skipped + 1
            if skipped == c.max_skipped:
                file = out / f"non-finite-step-{step:08d}-process-{a.process_index}.pt"
                torch.save(kept, file)
                raise UserError(
                    f"{skipped} steps in a row had a non-finite loss or gradient, the last at step {step}, whose batch"
                    f" is in {str(file)!r}. Lower train.optimizer.lr, or set train.precision='no'"
                )

            # Log, validate, preview, save
            bar.update()
            done = step + 1
            if c.due(done, c.log_every):
                bar.set_postfix_str(log.write_means(done))
            if stopped_by:
                run.save(done)  # first: whoever stops the run may not wait for a validation
            improved = run.validate(done) if c.due(done, c.validate_every) else False
            if c.due(done, c.preview_every):
                run.preview(done)
            if done == c.steps:
                run.export()  # before the last checkpoint, which marks the run as finished
            if improved or (c.due(done, c.save_every) and not stopped_by):
                run.save(done)
            if stopped_by:
                raise Stopped(stopped_by, done)
        if run.best:
            log.say(f"{c.best} was best at step {run.best['step']}: {state.checkpoint(out, run.best['step'])}")
        for tracker in a.trackers:
            tracker.finish()


class Run:
    """One process's view of a run: everything around the steps."""

    def __init__(self, task: Task, config: TrainConfig, out: Path) -> None:
        self.task, self.config, self.out = task, config, out
        trackers = ["tensorboard"] if find_spec("tensorboard") else []
        self.accelerator = Accelerator(mixed_precision=config.precision, log_with=trackers, project_dir=out)
        self.accelerator.gradient_accumulation_steps = 1  # whatever the environment says: the loop accumulates
        requested = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if requested not in ("no", config.precision):
            warnings.warn(f"accelerate's mixed precision {requested} is not used; set train.precision", stacklevel=2)
        self.log = state.Log(self.accelerator, out, [task.dataset, task.held_out])
        self.best: dict[str, Any] | None = None  # step, value and name of the best validation
        self.called: Modules = {}  # the modules as a step calls them, with autocast and DDP or FSDP
        self.whole: Modules = {}  # where the averages are sharded, copies to evaluate, in the main process
        averages, optimizers = {}, {}
        for name, module in task.modules.items():
            module.train().to(self.accelerator.device)
            averages[name] = EMA(module, config.ema_decay, config.ema_power)
            self.called[name], whole = sharding.prepare(module, averages[name].module, self.accelerator)
            self.whole |= {name: whole} if whole else {}
            optimizers |= make_optimizers(name, module, task.optimizers.get(name, config.optimizer))
        self.averages, self.trained = averages, state.Trained(task.modules, averages, optimizers)

    def resume(self) -> int:
        """Loads the newest whole checkpoint, if there is one, and exports it if it is the last; returns its step."""
        folder = from_main(partial(state.newest, self.out))
        if folder is None:
            return 0
        progress = self.trained.read(folder / "state")
        step, steps = progress["step"], self.config.steps
        if progress["best"] and progress["best"]["name"] == self.config.best:
            self.best = progress["best"]
        if step >= steps:
            if not from_main(partial(model_io.is_finished, self.out, folder)):  # train.steps was lowered
                self.export()
            self.log.say(f"{self.out} is finished at step {step}; raise train.steps (now {steps}) to go on")
        return step

    def batches(self, start: int) -> Generator[tuple[dict, dict], None, None]:
        """Micro-batches from step `start` on, each with {name: reason} of samples that could not be read."""
        c, a, dataset = self.config, self.accelerator, self.task.dataset
        start, stop, blocks = start * c.accumulate, c.steps * c.accumulate, getattr(dataset, "lengths", None)
        rank, world = a.process_index, a.num_processes
        order = EpochBatches(len(dataset), c.batch_size, c.seed, rank, world, start, stop, blocks)
        pin = a.device.type == "cuda"
        return load(dataset, order, self.task.collate, workers=c.workers, seed=c.seed, pin_memory=pin)

    @contextmanager
    def averaged(self) -> Iterator[Modules]:
        """The averaged modules, whole in the main process, without gradients and with a random state of their own. All
        processes must enter it."""
        device = self.accelerator.device
        modules = {name: average.module for name, average in self.averages.items()}
        for name, module in modules.items() if sharding.is_sharded(self.accelerator) else ():
            tensors = sharding.gather(module.state_dict())
            if name in self.whole:
                self.whole[name].load_state_dict(tensors)
                modules[name] = self.whole[name].to(device)
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.config.seed)
            yield modules
        for module in self.whole.values():
            module.cpu()

    def validate(self, done: int) -> bool:
        """Logs the validation after step `done`; returns whether it was the best so far by `train.best`."""
        with self.averaged() as modules:
            values = from_main(partial(self.task.validate, modules))
        self.log.write(done, {f"val/{name}": value for name, value in values.items()})
        self.log.say(f"step {done}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
        best = self.config.best
        if not best:
            return False
        name, sign = best.removeprefix("-"), -1 if best.startswith("-") else 1
        if name not in values:
            known = ", ".join(values)
            warnings.warn(f"train.best is {name!r}, which is not validated; these are: {known}", stacklevel=2)
        value = sign * values.get(name, math.nan)
        improved = value < (self.best["value"] if self.best else math.inf)
        if improved:
            self.best = {"step": done, "value": value, "name": best}
        return improved

    def preview(self, done: int) -> None:
        """Saves the task's picture as previews/step-N.png."""
        with self.averaged() as modules:
            image = from_main(partial(self.task.preview, modules))
        if image is not None and self.accelerator.is_main_process:
            (self.out / "previews").mkdir(exist_ok=True)
            image.save(self.out / "previews" / f"step-{done:08d}.png")

    def export(self) -> None:
        """Writes the loadable folder into the run folder, from the averaged weights."""
        with self.averaged() as modules:
            from_main(partial(self.task.export, modules, self.out, final=True))

    def save(self, done: int) -> None:
        """Writes a checkpoint: the loadable folder, and `state/` with all that resuming needs."""
        self.log.list_left_out()
        new = nullcontext()
        if self.accelerator.is_main_process:
            new = state.new_checkpoint(self.out, done, self.config.keep, self.best and self.best["step"])
        with new as folder:
            with self.averaged() as modules:
                if folder:
                    self.task.export(modules, folder, final=False)
            self.trained.write(folder and folder / "state", {"step": done, "best": self.best})
        self.accelerator.wait_for_everyone()


def agree(tables: list[dict[str, Tensor]], signals: list[int], accelerator: Accelerator) -> tuple[bool, int]:
    """Whether all losses and gradient norms of all processes are finite, and the number of a signal that any of them
    got, else 0."""
    checked = [v for table in tables for k, v in table.items() if k.endswith(("_loss", "_norm"))]
    broken = (~torch.isfinite(torch.stack(checked))).any().float()
    votes = torch.stack([broken, torch.full_like(broken, signals[0] if signals else 0)])
    skip, number = accelerator.gather(votes[None]).amax(0).tolist()
    return not skip, int(number)


def to_device(batch: dict, device: torch.device) -> dict:
    """A batch with its tensors on `device`; on a GPU images and latents are channels-last, for tensor cores."""
    tensors = {k: v.to(device, non_blocking=True) for k, v in batch.items() if torch.is_tensor(v)}
    for name in [k for k, v in tensors.items() if v.ndim == 4 and device.type == "cuda"]:
        tensors[name] = tensors[name].contiguous(memory_format=torch.channels_last)
    return batch | tensors


def scalars(table: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    """Values to log as float32 tensors on the device, without their graphs."""
    return {name: torch.as_tensor(value, device=device).detach().float() for name, value in table.items()}


class Stopped(KeyboardInterrupt):
    """A run that a signal has stopped and that is saved; `number` is the signal's."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} at step {step}, which is saved")
        self.number = number


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Within the block the first SIGINT or SIGTERM only adds its number to the list; a second one ends the process."""
    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        received.append(number)
        for each in handlers:
            signal.signal(each, signal.SIG_DFL)

    handlers = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def memory_errors(config: TrainConfig) -> Iterator[None]:
    """Turns running out of memory into a UserError; on the CPU torch raises a plain RuntimeError for it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise UserError(
            f"out of memory with train.batch_size={config.batch_size}; go on from the last checkpoint with a smaller"
            " one and as much more train.accumulate"
        ) from None
