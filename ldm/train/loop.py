"""The training loop, from top to bottom: batch, losses, backward, clip, step, EMA, log, validation, checkpoint.

It knows no model: a task computes the losses. All random numbers of a step come from `Draws`, and the order of the data
is a pure function of (seed, step), so a run that is resumed, or shared by many processes, takes the same steps.
"""

import copy
import math
import signal
import threading
import warnings
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Protocol

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ldm import model_io
from ldm.config import UserError
from ldm.data.loader import load
from ldm.data.order import EpochBatches
from ldm.distributed import Draws, from_main, fsdp_requested, processes
from ldm.train import sharding, state
from ldm.train.config import TrainConfig
from ldm.train.log import Log
from ldm.train.optim import EMA, make_optimizers


class Task(Protocol):
    """One kind of training. `modules` are those trained, each with an optimizer of its own: by `optimizers[name]`, an
    OptimizerConfig, where a task has one, else by that of the run. `held_out` is an optional second data set, and
    `contrasts` is true where a loss compares the samples of a batch."""

    modules: dict[str, nn.Module]
    dataset: Any

    def collate(self, samples: list[dict]) -> dict:
        """Samples -> a batch; runs in the loading processes, without random numbers."""

    def losses(
        self, modules: dict[str, nn.Module], batch: dict, step: int, draws: Draws
    ) -> Iterator[tuple[str, Tensor, dict]]:
        """Yields (module, its loss, values to log) in turn; the loop runs backward after each."""

    def after_step(self) -> None:
        """Restores constraints after the weights have changed, e.g. by a clamp."""

    def validate(self, modules: dict[str, nn.Module], device: torch.device) -> dict[str, float]:
        """Values on held-out data, of the averaged `modules`."""

    def preview(self, modules: dict[str, nn.Module], device: torch.device) -> Image.Image | None:
        """A picture to look at, from fixed inputs and seeds."""

    def export(self, modules: dict[str, nn.Module], folder: Path, device: torch.device, final: bool) -> None:
        """Writes the loadable folder; `final` at the end of the run."""


def train(task: Task, config: TrainConfig, out: str | Path, resolved: dict, force: bool = False) -> None:
    """Trains `task` to `config.steps` from the newest whole checkpoint in `out`; ends with an export into `out`.

    `resolved` is the config as a dict, stored as `out/config.json`. Raises UserError where a resumed run has another
    one, unless `force`; where losses stay non-finite; and where memory or disk run out. At SIGINT or SIGTERM the step
    is finished and saved, then `Stopped` is raised; a second signal ends the process at once.
    """
    c, out = config, Path(out)
    with ExitStack() as stack:
        # Set up
        processes()
        from_main(partial(stack.enter_context, state.lock(out)))
        signals = stack.enter_context(Signals())
        run = Run(task, c, out)
        accelerator, log, optimizers = run.accelerator, run.log, run.optimizers

        # Resume
        if run.resume():
            return
        run.begin(resolved, force)

        # Train
        batches = stack.enter_context(closing(run.batches()))
        bar = stack.enter_context(tqdm(initial=run.start, total=c.steps, disable=not run.main, unit="step"))
        for step in range(run.start, c.steps):
            kept, values, updating, fits = [], [], False, True
            try:
                # Gradients of every micro-batch
                for micro in range(c.accumulate):
                    batch, faults = next(batches)
                    log.note_faults(faults)
                    batch = to_device(batch, run.device)
                    kept.append(batch)
                    draws = Draws(c.seed, step * c.accumulate + micro, run.rank, run.world, run.device)
                    sharding.set_gradient_sync(run.called.values(), micro == c.accumulate - 1)
                    for name, loss, extra in task.losses(run.called, batch, step, draws):
                        accelerator.backward(loss / c.accumulate)
                        values.append(scalars({f"{name}_loss": loss} | extra, run.device))

                # Clip and update, in all processes or in none
                norms = {f"{n}_grad_norm": sharding.clip(m, c.clip, accelerator) for n, m in task.modules.items()}
                finite, number = run.agree([*values, norms], signals.received)
                if finite:
                    updating, rate = True, c.optimizer.rate(step, c.steps)
                    for optimizer in optimizers:
                        for group in optimizer.param_groups:
                            group["lr"] = rate * optimizer.defaults["lr"]
                        optimizer.step()
                    task.after_step()
                    for name, average in run.trained.averages.items():
                        average.update(task.modules[name], step)
                    log.add([*values, norms, scalars({"lr": rate * c.optimizer.lr}, run.device)])
                run.count_skipped(finite)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                fits = False
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)

            # Give up where memory ran out or losses stay non-finite
            if not fits:  # here, where no error holds the memory any more
                batch = loss = extra = None
                if step > run.start and run.world == 1 and not updating:
                    run.save(step)
                raise UserError(how_to_fit(c, getattr(task, "contrasts", False), step))
            if run.skipped >= c.max_skipped:
                run.give_up(kept, step)

            # Log, validate, preview, save
            bar.update()
            done = step + 1
            if c.due(done, c.log_every):
                bar.set_postfix_str(log.write_means(done))
            if number:
                batches.close()  # the loading processes may have got the signal as well
                run.save(done, looked=False)
                raise Stopped(number, done)
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
        self.accelerator = a = Accelerator(mixed_precision=config.precision, log_with=trackers, project_dir=out)
        self.device, self.main, self.rank, self.world = a.device, a.is_main_process, a.process_index, a.num_processes
        self.log = Log(a, out, [task.dataset, getattr(task, "held_out", None)])
        self.start, self.looked = 0, True  # the first step; whether the one before was validated and previewed
        self.skipped = 0  # consecutive steps
        self.best: dict[str, Any] | None = None  # step, value and name of the best validation
        self.called: dict[str, nn.Module] = {}  # the modules as a step calls them, with autocast and DDP
        self.whole: dict[str, nn.Module] = {}  # of sharded modules, copies for evaluation, in the main process
        self.sharded = fsdp_requested() and self.world > 1
        averages, by_module = {}, {}
        for name, module in task.modules.items():
            module.train().to(self.device)
            averages[name] = EMA(module, config.ema_decay, config.ema_power)
            if self.sharded:
                self.called[name] = a.prepare_model(module, evaluation_mode=True)  # adds autocast
                if self.main:
                    self.whole[name] = copy.deepcopy(averages[name].module).cpu()
                sharding.shard(module, a)
                sharding.shard(averages[name].module, a)
            else:
                self.called[name] = a.prepare_model(module)
            by_module[name] = make_optimizers(name, module, getattr(task, "optimizers", {}).get(name, config.optimizer))
        self.optimizers = [optimizer for table in by_module.values() for optimizer in table.values()]
        self.trained = state.Trained(modules=task.modules, averages=averages, optimizers=by_module)

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
            self.export()
        self.log.say(
            f"{self.out} is finished at step {self.start}; raise train.steps (now {self.config.steps}) to go on"
        )
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
        c, dataset = self.config, self.task.dataset
        order = EpochBatches(
            len(dataset),
            c.batch_size,
            c.seed,
            rank=self.rank,
            world=self.world,
            start=self.start * c.accumulate,
            steps=c.steps * c.accumulate,
            blocks=getattr(dataset, "lengths", None),
        )
        pin = self.device.type == "cuda"
        return load(dataset, order, self.task.collate, workers=c.workers, seed=c.seed, pin_memory=pin)

    def agree(self, tables: list[dict[str, Tensor]], received: int) -> tuple[bool, int]:
        """Whether all losses and gradient norms of all processes are finite, and the number of a signal that any of
        them got, else 0."""
        checked = [v for table in tables for k, v in table.items() if k.endswith(("_loss", "_norm"))]
        finite = torch.isfinite(torch.stack(checked)).all().float()
        votes = self.accelerator.gather(torch.stack([1 - finite, torch.full_like(finite, received)])[None])
        skip, number = votes.amax(0).tolist()
        return not skip, int(number)

    def count_skipped(self, finite: bool) -> None:
        """Counts consecutive steps that were skipped."""
        self.skipped = 0 if finite else self.skipped + 1
        self.log.skipped += not finite

    def give_up(self, kept: list[dict], step: int) -> NoReturn:
        """Saves the batch of a non-finite step and raises UserError."""
        file = self.out / f"non-finite-step-{step:08d}-process-{self.rank}.pt"
        torch.save([to_device(batch, torch.device("cpu")) for batch in kept], file)
        raise UserError(
            f"{self.skipped} steps in a row had a non-finite loss or gradient, the last at step {step}; the weights"
            f" are those from before, that step's batch is in {str(file)!r}. Lower train.optimizer.lr, or set"
            " train.precision='no'"
        )

    @contextmanager
    def averaged(self) -> Iterator[dict[str, nn.Module]]:
        """The averaged modules, whole in the main process, without gradients and with a random state of their own. All
        processes must enter it."""
        modules = {name: average.module for name, average in self.trained.averages.items()}
        for name, average in self.trained.averages.items() if self.sharded else ():
            tensors = sharding.model_state(average.module)
            if self.main:
                self.whole[name].load_state_dict(tensors)
                modules[name] = self.whole[name].to(self.device)
        with torch.no_grad(), torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.config.seed)
            yield modules
        for module in self.whole.values():
            module.cpu()

    def look(self, done: int) -> bool:
        """Validates and previews where that is due; returns whether the validation was the best so far."""
        c, improved = self.config, False
        if c.due(done, c.validate_every):
            with self.averaged() as modules:
                values = from_main(partial(self.task.validate, modules, self.device))
            self.log.write(done, {f"val/{name}": value for name, value in values.items()})
            self.log.say(f"step {done}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
            improved = bool(c.best) and self.is_best(done, values)
        if c.due(done, c.preview_every):
            with self.averaged() as modules:
                from_main(partial(self.preview, modules, done))
        self.looked = True
        return improved

    def is_best(self, done: int, values: dict[str, float]) -> bool:
        """Whether a validation is the best so far by `train.best`, and remembers it."""
        name = self.config.best.removeprefix("-")
        if name not in values and self.main:
            known = ", ".join(values)
            warnings.warn(f"train.best is {name!r}, which is not validated; these are: {known}", stacklevel=2)
        value = values.get(name, math.nan) * (-1 if self.config.best.startswith("-") else 1)
        if not value < (self.best["value"] if self.best else math.inf):
            return False
        self.best = {"step": done, "value": value, "name": self.config.best}
        return True

    def preview(self, modules: dict[str, nn.Module], done: int) -> None:
        """Saves the task's picture as previews/step-N.png."""
        image = self.task.preview(modules, self.device)
        if image is not None:
            (self.out / "previews").mkdir(exist_ok=True)
            image.save(self.out / "previews" / f"step-{done:08d}.png")

    def export(self) -> None:
        """Writes the loadable folder into the run folder, from the averaged weights."""
        with self.averaged() as modules:
            from_main(partial(self.task.export, modules, self.out, self.device, final=True))

    def save(self, done: int, looked: bool = True) -> None:
        """Writes a checkpoint: the loadable folder, and `state/` with all that resuming needs. `looked`: whether the
        step was validated and previewed."""
        self.log.list_left_out()
        progress = {"step": done, "skipped": self.skipped, "looked": looked, "best": self.best} | self.log.state()
        best = self.best["step"] if self.best else None
        new = state.new_checkpoint(self.out, done, self.config.keep, best) if self.main else nullcontext()
        with new as folder:
            with self.averaged() as modules:
                if folder:
                    self.task.export(modules, folder, self.device, final=False)
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
    moved = {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
    for key, value in moved.items() if device.type == "cuda" else ():
        if torch.is_tensor(value) and value.ndim == 4:
            moved[key] = value.contiguous(memory_format=torch.channels_last)
    return moved


def scalars(table: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    """Values to log as float32 tensors on the device, without their graphs."""
    return {name: torch.as_tensor(value, device=device).detach().float() for name, value in table.items()}


class Stopped(KeyboardInterrupt):
    """A run that a signal has stopped and that is saved; `number` is the signal's."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} at step {step}, which is saved")
        self.number = number


class Signals:
    """While entered, the first SIGINT or SIGTERM only sets `received` to its number; a second one has its usual effect.

    Only the main thread can have handlers; in another one this does nothing.
    """

    def __init__(self) -> None:
        self.received = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            self.before = {n: signal.signal(n, self.receive) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        self.received = number
        for each in self.before:
            signal.signal(each, signal.SIG_DFL)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out; on the CPU torch raises a plain RuntimeError."""
    words = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


def how_to_fit(config: TrainConfig, contrasts: bool, step: int) -> str:
    """The error's text where a step needs too much memory; `contrasts`: its loss depends on the batch's size."""
    c = config
    if contrasts:
        way = "a smaller train.batch_size with --force (the contrast then has fewer negatives)"
    elif c.batch_size == 1:
        way = "smaller pictures or a smaller model with another --out, or train.precision='bf16' with --force"
    elif c.batch_size % 2:
        way = "a smaller train.batch_size and as much more train.accumulate"
    else:
        way = f"train.batch_size={c.batch_size // 2} train.accumulate={c.accumulate * 2}, the same batch in all"
    return f"out of memory in step {step + 1} with train.batch_size={c.batch_size}; go on with {way}"
