"""The training loop, from top to bottom: batch, losses, backward, clip, step, EMA, log, validation, checkpoint.

It knows no model: a task computes the losses. All random numbers of a step come from `Draws`, and the order of the data
is a pure function of (seed, step), so a run that is resumed, or shared by many processes, takes the same steps.
"""

import signal
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ldm.config import UserError
from ldm.data import flip_half, open_dataset, sampling_weights
from ldm.data.loader import load
from ldm.data.order import EpochBatches
from ldm.distributed import (
    Draws,
    beat,
    connected,
    fast_kernels,
    from_main,
    fsdp_requested,
    map_over_processes,
    memory_errors,
    processes,
    upload,
)
from ldm.images import to_float
from ldm.train import sharding, state
from ldm.train.config import OptimizerConfig, TrainConfig

Modules = dict[str, nn.Module]
Losses = Iterator[tuple[str, Tensor, dict]]  # the name of a module, its loss, values to log


class Task:
    """One kind of training: which modules are trained, on which data, by which losses."""

    modules: Modules
    optimizers: dict[str, OptimizerConfig] = {}  # of modules that do not use that of the run
    balance = "picture"  # what is drawn alike often: see DataConfig
    open_data = staticmethod(open_dataset)  # (data config, split, need_captions) -> the data set

    def __init__(self, config: Any, need_captions: bool = True) -> None:
        """`config` has the tables `data` and `train`; seeds the initial weights."""
        self.device, self.balance = processes().device, config.data.balance
        self.config = replace(config, train=config.train.on(self.device))
        self.dataset, self.held_out = (self.open_data(config.data, split, need_captions) for split in ("train", "val"))
        self.batch_size = min(64, config.train.batch_size)  # outside the training steps
        torch.manual_seed(config.train.seed)

    def images(self, batch: dict, draws: Draws) -> Tensor:
        """The images x (B, 3, H, W) in [-1, 1] of a batch, half of them mirrored where `data.flip` is set."""
        x = to_float(batch["image"])
        return flip_half(x, upload(draws.rand(len(x)), x.device)) if self.config.data.flip else x

    def autocast(self) -> torch.autocast:
        """The precision of the run, for models that it does not train."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16")

    def share(self, work: Callable[[slice, Tensor], Any], dataset: Any, indices: list[int], size: int = 0) -> list[Any]:
        """`work(rows, x)` of batches of a data set's images x (B, 3, H, W) in [-1, 1], of which those of `rows` among
        the indices; shared by the processes, all results in order in all of them."""
        size = size or self.batch_size

        def batch(start: int) -> Any:
            rows = slice(start, start + size)
            images = torch.stack([dataset[i]["image"] for i in indices[rows]])
            return work(rows, to_float(images.to(self.device)))

        return map_over_processes(batch, range(0, len(indices), size), "held-out batches", fsdp_requested())

    def losses(self, modules: Modules, batch: dict, step: int, draws: Draws) -> Losses:
        """The losses of a batch in turn; the loop runs backward after each."""

    def after_step(self) -> None:
        """Restores constraints after the weights have changed, e.g. by a clamp."""

    def validate(self, modules: Modules) -> dict[str, float]:
        """Values on held-out data, of the averaged `modules`; all processes call it, and get the same."""

    def preview(self, modules: Modules) -> Image.Image | None:
        """A picture to look at, from fixed inputs and seeds; all processes call it."""

    def measure(self, modules: Modules, final: bool) -> Any:
        """What `export` needs to know of the data, by all processes; `final` at the end of the run."""

    def export(self, modules: Modules, folder: Path, measured: Any) -> None:
        """Writes the loadable folder, in the main process."""

    def check_export(self, folder: Path) -> None:
        """Raises UserError where the run that exported `folder` cannot be resumed by this task."""


def train(task: Task, config: TrainConfig, out: str | Path, resolved: dict, force: bool = False) -> None:
    """Trains `task` to `config.steps` from the newest whole checkpoint in `out`; ends with an export into `out`.

    `resolved` is the config as a dict, stored as `out/config.json`. Raises UserError where a resumed run has another
    one, unless `force`; where losses stay non-finite; and where memory runs out. At SIGINT or SIGTERM the step is
    finished and saved, then `Stopped` is raised; a second signal ends the process at once.
    """
    c, out = config.on(processes().device), Path(out)
    with ExitStack() as stack:
        # Set up, or resume
        from_main(stack.enter_context, state.lock(out))
        signals = stack.enter_context(caught_signals())
        way_out = "train.checkpointing=true, or a smaller batch, as much more train.accumulate, and --force"
        stack.enter_context(memory_errors(f"with train.batch_size={c.batch_size}; resume with {way_out}"))
        stack.enter_context(fast_kernels(processes().device))
        stack.enter_context(connected())
        run = state.Run(task, c, out)
        a, optimizers = run.accelerator, run.optimizers.values()
        start = run.resume()
        if start >= c.steps:
            return
        from_main(state.begin, out, resolved, start, force)
        a.init_trackers("ldm")
        loaded = stack.enter_context(closing(micro_batches(task, c, a, start)))
        bar = stack.enter_context(tqdm(initial=start, total=c.steps, disable=not a.is_main_process, unit="step"))
        late, skipped, stopped_by = Late(a.device), 0, 0  # skipped steps in a row; a signal's number

        for step in range(start, c.steps):
            # Gradients of every micro-batch
            kept, values = [], []
            for micro in range(c.accumulate):
                batch = next(loaded)
                kept.append(batch)
                draws = Draws(c.seed, step * c.accumulate + micro, a.process_index, a.num_processes, a.device)
                for module in run.called.values():
                    sharding.set_gradient_sync(module, micro == c.accumulate - 1)
                for name, loss, extra in task.losses(run.called, batch, step, draws):
                    beat()
                    (loss / c.accumulate).backward()
                    values.append({f"{name}_loss": loss} | extra)

            # Clip and update, in all processes or in none: the device decides
            values.append({f"{n}_grad_norm": sharding.clip(m, c.clip, a) for n, m in task.modules.items()})
            votes = agree(values, signals, a)
            rate, skip = c.optimizer.rate(step, c.steps), votes[0]
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate * optimizer.defaults["lr"]
                optimizer.found_inf = skip
                optimizer.step()
                optimizer.zero_grad()
            task.after_step()
            for name, average in run.averages.items():
                average.update(task.modules[name], step, skip)
            run.log([*values, {"lr": rate * c.optimizer.lr}], skip)

            # Give up where losses stay non-finite
            for (broken, number), (at, batches) in late(votes, (step, kept), step + 1 == c.steps):
                stopped_by, skipped = number or stopped_by, skipped + 1 if broken else 0
                if skipped == c.max_skipped:
                    file = out / f"non-finite-step-{at:08d}-process-{a.process_index}.pt"
                    torch.save(batches, file)
                    raise UserError(
                        f"{skipped} steps in a row had a non-finite loss or gradient, the last at step {at}, whose"
                        f" batch is in {str(file)!r}. Lower train.optimizer.lr, or set train.precision='no'"
                    )

            # Log, validate, preview, save
            bar.update()
            done = step + 1
            if c.due(done, c.log_every):
                bar.set_postfix_str(run.write_means(done))
            if stopped_by:
                run.save(done)  # first: whoever stops the run may not wait for a validation
            improved = c.due(done, c.validate_every) and run.validate(done)
            if c.due(done, c.preview_every):
                run.preview(done)
            if done == c.steps:
                run.export(out, final=True)  # before the last checkpoint, which marks the run as finished
            if improved or (c.due(done, c.save_every) and not stopped_by):
                run.save(done)
            if stopped_by:
                raise Stopped(stopped_by, done)
        for tracker in a.trackers:
            tracker.finish()


def micro_batches(task: Task, config: TrainConfig, accelerator: Accelerator, start: int) -> Generator[dict, None, None]:
    """Batches on the device from step `start` on; lists the samples that could not be read."""
    c, a, blocks = config, accelerator, getattr(task.dataset, "lengths", None)
    weights = sampling_weights(task.dataset, task.balance)
    first, last = start * c.accumulate, c.steps * c.accumulate
    rank, world = a.process_index, a.num_processes
    order = EpochBatches(len(task.dataset), c.batch_size, c.seed, rank, world, first, last, blocks, weights)
    for batch, faults in load(task.dataset, order, workers=c.workers, pin_memory=a.device.type == "cuda"):
        for fault in faults.items():
            task.dataset.faults.add(*fault)
        yield to_device(batch, a.device)


@torch.no_grad()
def agree(tables: list[dict[str, Any]], signals: list[int], accelerator: Accelerator) -> Tensor:
    """Votes (2,) on the device: 1 where a loss or gradient norm of any process is not finite, else 0; and the number of
    a signal that any of them got, else 0."""
    checked = torch.stack([v for table in tables for k, v in table.items() if k.endswith(("_loss", "_norm"))])
    broken = (~checked.isfinite()).any().float()
    votes = torch.stack([broken, torch.full_like(broken, signals[0] if signals else 0)])
    return accelerator.gather(votes[None]).amax(0)


class Late:
    """Reads the votes of a step: on a GPU those of the step before, as waiting for them would leave it without work."""

    def __init__(self, device: torch.device) -> None:
        self.late, self.steps = device.type == "cuda", deque()

    def __call__(self, votes: Tensor, note: Any, last: bool) -> Iterator[tuple[list[int], Any]]:
        """The votes (2,) of that step, and its `note`; after the `last` step all that are left."""
        votes = votes.to("cpu", non_blocking=True)  # pinned, where they come from a GPU
        self.steps.append((votes, note, torch.cuda.current_stream().record_event() if self.late else None))
        while len(self.steps) > (self.late and not last):
            votes, note, copied = self.steps.popleft()
            if copied:
                copied.synchronize()
            yield [int(vote) for vote in votes.tolist()], note


def to_device(batch: dict, device: torch.device) -> dict:
    """A batch with its tensors on `device`; on a GPU images and latents are channels-last, for tensor cores."""
    tensors = {name: x.to(device, non_blocking=True) for name, x in batch.items() if torch.is_tensor(x)}
    for name, x in tensors.items():
        if x.ndim == 4 and x.is_cuda:
            tensors[name] = x.contiguous(memory_format=torch.channels_last)
    return batch | tensors


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
        for handler in handlers.items():
            signal.signal(*handler)
