"""The training loop, from top to bottom: batch, losses, backward, clip, step, EMA, log, validation, checkpoint.

It knows no model: a task computes the losses. All random numbers of a step come from `Draws`, and the order of the data
is a pure function of (seed, step), so a run that is resumed, or shared by many processes, takes the same steps.
"""

import math
import signal
import threading
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
from ldm.train.log import Log
from ldm.train.optim import EMA, make_optimizers

Modules = dict[str, nn.Module]
Losses = Iterator[tuple[str, Tensor, dict]]  # the name of a module, its loss, values to log


class Task:
    """One kind of training: which modules are trained, on which data, by which losses."""

    modules: Modules
    dataset: Any
    held_out: Any = None  # a second data set
    optimizers: dict[str, OptimizerConfig] = {}  # of modules that do not use that of the run
    contrasts = False  # whether a loss compares the samples of a batch

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
        run = Run(task, c, out)
        a, log, trained = run.accelerator, run.log, run.trained

        # Resume
        if run.resume():
            return
        run.begin(resolved, force)

        # Train
        batches = stack.enter_context(closing(run.batches()))
        bar = stack.enter_context(tqdm(initial=run.start, total=c.steps, disable=not a.is_main_process, unit="step"))
        for step in range(run.start, c.steps):
            kept, values, updating, fits = [], [], False, True
            try:
                # Gradients of every micro-batch
                for micro in range(c.accumulate):
                    batch, faults = next(batches)
                    log.note_faults(faults)
                    batch = to_device(batch, a.device)
                    kept.append(batch)
                    draws = Draws(c.seed, step * c.accumulate + micro, a.process_index, a.num_processes, a.device)
                    sharding.set_gradient_sync(run.called.values(), micro == c.accumulate - 1)
                    for name, loss, extra in task.losses(run.called, batch, step, draws):
                        a.backward(loss / c.accumulate)
                        values.append(scalars({f"{name}_loss": loss} | extra, a.device))

                # Clip and update, in all processes or in none
                values.append({f"{n}_grad_norm": sharding.clip(m, c.clip, a) for n, m in task.modules.items()})
                finite, stopped_by = run.agree(values, signals)
                if finite:
                    updating, rate = True, c.optimizer.rate(step, c.steps)
                    for optimizer in trained.all_optimizers():
                        for group in optimizer.param_groups:
                            group["lr"] = rate * optimizer.defaults["lr"]
                        optimizer.step()
                    task.after_step()
                    for name, average in trained.averages.items():
                        average.update(task.modules[name], step)
                    log.add([*values, scalars({"lr": rate * c.optimizer.lr}, a.device)])
                run.skipped = 0 if finite else run.skipped + 1
                log.skipped += not finite
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                fits = False
            for optimizer in trained.all_optimizers():
                optimizer.zero_grad(set_to_none=True)

            # Give up where memory ran out or losses stay non-finite
            if not fits:  # here, where no error holds the memory any more
                batch = loss = extra = None
                if step > run.start and a.num_processes == 1 and not updating:
                    run.save(step)
                raise UserError(how_to_fit(c, task.contrasts, step))
            if run.skipped >= c.max_skipped:
                run.give_up(kept, step)

            # Log, validate, preview, save
            bar.update()
            done = step + 1
            if c.due(done, c.log_every):
                bar.set_postfix_str(log.write_means(done))
            if stopped_by:
                batches.close()  # the loading processes may have got the signal as well
                run.save(done, looked=False)
                raise Stopped(stopped_by, done)
            improved = run.look(done)
            if done == c.steps:
                run.export()  # before the last checkpoint, which marks the run as finished
            if improved or c.due(done, c.save_every):
                run.save(done)
        run.end()


class Run:
    """One process's view of a run: everything around the steps."""

    def __init__(self, task: Task, config: TrainConfig, out: Path) -> None:
        self.task, self.config, self.out = task, config, out
        trackers = ["tensorboard"] if find_spec("tensorboard") else []
        self.accelerator = Accelerator(mixed_precision=config.precision, log_with=trackers, project_dir=out)
        self.log = Log(self.accelerator, out, [task.dataset, task.held_out])
        self.start, self.looked = 0, True  # the first step; whether the one before was validated and previewed
        self.skipped = 0  # consecutive steps
        self.best: dict[str, Any] | None = None  # step, value and name of the best validation
        self.called: Modules = {}  # the modules as a step calls them, with autocast and DDP or FSDP
        self.whole: Modules = {}  # where the averages are sharded, copies to evaluate, in the main process
        averages, optimizers = {}, {}
        for name, module in task.modules.items():
            module.train().to(self.accelerator.device)
            averages[name] = EMA(module, config.ema_decay, config.ema_power)
            self.called[name], whole = sharding.prepare(module, averages[name].module, self.accelerator)
            if whole is not None:
                self.whole[name] = whole
            optimizers[name] = make_optimizers(name, module, task.optimizers.get(name, config.optimizer))
        self.trained = state.Trained(modules=task.modules, averages=averages, optimizers=optimizers)

    def resume(self) -> bool:
        """Loads the newest whole checkpoint, if there is one; returns whether the run is finished."""
        folder = from_main(partial(state.newest, self.out))
        if folder is None:
            return False
        progress = state.read_state(folder / "state", self.trained)
        self.start, self.skipped, self.looked = progress["step"], progress["skipped"], progress["looked"]
        if progress["best"] and progress["best"]["name"] == self.config.best:
            self.best = progress["best"]
        self.log.restore(progress)
        if self.start < self.config.steps:
            return False
        if not model_io.is_finished(self.out, folder):  # stopped at the last step, or train.steps was lowered
            if not self.looked:
                self.look(self.start)
            self.export()
        steps = self.config.steps
        self.log.say(f"{self.out} is finished at step {self.start}; raise train.steps (now {steps}) to go on")
        return True

    def begin(self, resolved: dict, force: bool) -> None:
        """Prepares the run folder and the logs; does the validation that a signal has prevented."""
        from_main(partial(state.begin, self.out, resolved, self.config.seed, self.start, self.looked, force))
        self.accelerator.init_trackers("tensorboard")
        if self.start:
            self.log.say(f"resuming {self.out} at step {self.start} of {self.config.steps}")
        self.log.list_left_out()
        if not self.looked:
            self.look(self.start)

    def batches(self) -> Generator[tuple[dict, dict], None, None]:
        """Micro-batches from the first step on, each with {name: reason} of samples that could not be read."""
        c, a, dataset = self.config, self.accelerator, self.task.dataset
        start, steps, blocks = self.start * c.accumulate, c.steps * c.accumulate, getattr(dataset, "lengths", None)
        rank, world = a.process_index, a.num_processes
        order = EpochBatches(len(dataset), c.batch_size, c.seed, rank, world, start, steps, blocks)
        pin = a.device.type == "cuda"
        return load(dataset, order, self.task.collate, workers=c.workers, seed=c.seed, pin_memory=pin)

    def agree(self, tables: list[dict[str, Tensor]], signals: list[int]) -> tuple[bool, int]:
        """Whether all losses and gradient norms of all processes are finite, and the number of a signal that any of
        them got, else 0."""
        checked = [v for table in tables for k, v in table.items() if k.endswith(("_loss", "_norm"))]
        broken = (~torch.isfinite(torch.stack(checked))).any().float()
        votes = torch.stack([broken, torch.full_like(broken, signals[0] if signals else 0)])
        skip, number = self.accelerator.gather(votes[None]).amax(0).tolist()
        return not skip, int(number)

    def give_up(self, kept: list[dict], step: int) -> None:
        """Saves the batch of a non-finite step and raises UserError."""
        file = self.out / f"non-finite-step-{step:08d}-process-{self.accelerator.process_index}.pt"
        torch.save([to_device(batch, torch.device("cpu")) for batch in kept], file)
        raise UserError(
            f"{self.skipped} steps in a row had a non-finite loss or gradient, the last at step {step}; the weights"
            f" are those from before, that step's batch is in {str(file)!r}. Lower train.optimizer.lr, or set"
            " train.precision='no'"
        )

    @contextmanager
    def averaged(self) -> Iterator[Modules]:
        """The averaged modules, whole in the main process, without gradients and with a random state of their own. All
        processes must enter it."""
        device = self.accelerator.device
        modules = {name: average.module for name, average in self.trained.averages.items()}
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

    def look(self, done: int) -> bool:
        """Validates and previews where that is due; returns whether the validation was the best so far."""
        c, improved = self.config, False
        if c.due(done, c.validate_every):
            with self.averaged() as modules:
                values = from_main(partial(self.task.validate, modules))
            self.log.write(done, {f"val/{name}": value for name, value in values.items()})
            self.log.say(f"step {done}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
            improved = bool(c.best) and self.is_best(done, values)
        if c.due(done, c.preview_every):
            with self.averaged() as modules:
                from_main(partial(self.preview, modules, done))
        self.looked = True
        return improved

    def is_best(self, done: int, values: dict[str, float]) -> bool:
        """Whether a validation is the best so far by `train.best`; remembers it."""
        name, sign = self.config.best.removeprefix("-"), -1 if self.config.best.startswith("-") else 1
        if name not in values:
            known = ", ".join(values)
            warnings.warn(f"train.best is {name!r}, which is not validated; these are: {known}", stacklevel=2)
        value = sign * values.get(name, math.nan)
        improved = value < (self.best["value"] if self.best else math.inf)
        if improved:
            self.best = {"step": done, "value": value, "name": self.config.best}
        return improved

    def preview(self, modules: Modules, done: int) -> None:
        """Saves the task's picture as previews/step-N.png."""
        image = self.task.preview(modules)
        if image is not None:
            (self.out / "previews").mkdir(exist_ok=True)
            image.save(self.out / "previews" / f"step-{done:08d}.png")

    def export(self) -> None:
        """Writes the loadable folder into the run folder, from the averaged weights."""
        with self.averaged() as modules:
            from_main(partial(self.task.export, modules, self.out, final=True))

    def save(self, done: int, looked: bool = True) -> None:
        """Writes a checkpoint: the loadable folder, and `state/` with all that resuming needs. `looked`: whether the
        step was validated and previewed."""
        self.log.list_left_out()
        progress = {"step": done, "skipped": self.skipped, "looked": looked, "best": self.best} | self.log.state()
        new = nullcontext()
        if self.accelerator.is_main_process:
            new = state.new_checkpoint(self.out, done, self.config.keep, self.best and self.best["step"])
        with new as folder:
            with self.averaged() as modules:
                if folder:
                    self.task.export(modules, folder, final=False)
            state.write_state(folder and folder / "state", self.trained, progress)
        self.accelerator.wait_for_everyone()

    def end(self) -> None:
        """Names the best checkpoint and closes the logs."""
        if self.best:
            folder = state.checkpoint(self.out, self.best["step"])
            self.log.say(f"{self.config.best} was best at step {self.best['step']}: {folder}")
        for tracker in self.accelerator.trackers:
            tracker.finish()


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
    """Within the block the first SIGINT or SIGTERM only adds its number to the list; a second one ends the process.

    Only the main thread can have handlers; in another one the list stays empty.
    """
    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        received.append(number)
        for each in handlers:
            signal.signal(each, signal.SIG_DFL)

    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    handlers = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out; on the CPU torch raises a plain RuntimeError."""
    words = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


def how_to_fit(config: TrainConfig, contrasts: bool, step: int) -> str:
    """The error's text where a step needs too much memory."""
    size, accumulate = config.batch_size, config.accumulate
    way = "a smaller train.batch_size or a smaller model, with --force"
    if contrasts:
        way = "a smaller train.batch_size with --force (the contrast then has fewer negatives)"
    elif size % 2 == 0:
        way = f"train.batch_size={size // 2} train.accumulate={accumulate * 2}, the same batch in all"
    return f"out of memory in step {step + 1} with train.batch_size={size}; go on with {way}"
