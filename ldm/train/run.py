"""One process's view of a training: its steps, looks and checkpoints."""

import math
import warnings
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ldm import model_io as weights
from ldm.config import UserError
from ldm.data.loader import load
from ldm.data.order import EpochBatches
from ldm.distributed import Together, processes
from ldm.train import sharding as sharded
from ldm.train import state as run_state
from ldm.train.config import TrainConfig, due
from ldm.train.ema import EMA
from ldm.train.interrupt import Interrupts
from ldm.train.memory import OutOfMemory, how_to_fit, is_out_of_memory
from ldm.train.optim import optimizers_of
from ldm.train.run_log import Log
from ldm.train.task import Task


class Run:
    """One process's view of a training: its modules, optimizers, averages and log."""

    def __init__(self, task: Task, config: TrainConfig, out: Path):
        self.task, self.config, self.out = task, config, out
        self.device, self.main = processes().device, processes().is_main_process
        trackers = ["tensorboard"] if find_spec("tensorboard") else []
        self.accelerator = Accelerator(mixed_precision=config.precision, log_with=trackers, project_dir=out)
        self.wrapped, self.stand_ins, optimizers = {}, {}, {}
        for name, module in task.modules.items():
            module.train().to(self.device)
            own = optimizers_of(name, module, getattr(task, "optimizers", {}).get(name, config.optimizer))
            self.wrapped[name], self.stand_ins[name] = sharded.prepare(self.accelerator, module, own.values())
            optimizers |= own
        averages = {name: EMA(m, config.ema_decay, config.ema_power) for name, m in task.modules.items()}
        self.trained = run_state.Trained(task.modules, averages, optimizers)
        self.skipped = 0  # in a row
        self.offending: list[dict] = []  # the micro-batches of the last step that was left out
        self.looked = True  # whether the step resumed from was validated and previewed, where that was due
        self.best: dict[str, Any] | None = None  # the step validated best so far, its value and what that is of
        self.improved = False  # whether the last validation was the best so far
        self.how_to_fit = partial(how_to_fit, config, getattr(task, "contrasts", False))
        self.log = Log(self.accelerator, out, [task.dataset, getattr(task, "held_out", None)])

    def resume(self) -> int:
        """Loads the newest whole checkpoint, if there is one; returns the step to go on from."""
        if self.main:
            run_state.sweep(self.out)
        found = run_state.newest(self.out)
        if found is None:
            return 0
        state = run_state.read_state(found / "state", self.trained)
        self.skipped, self.looked = state["skipped"], state.get("looked", True)
        best = state.get("best")
        self.best = best if best and best["of"] == self.config.best else None
        self.log.restore(state)
        return state["step"]

    def begin(self, start: int, resolved: dict, force: bool = False) -> None:
        """Makes the run folder, with the config in it, and starts to log."""
        if self.main:
            self.out.mkdir(parents=True, exist_ok=True)
            if start:
                run_state.check_changes(self.out / "config.json", resolved, force)
                self.log.say(f"resuming {self.out} at step {start} of {self.config.steps}")
            run_state.drop_later_lines(self.out / "metrics.jsonl", start, self.looked)
            weights.write_json(self.out / "config.json", resolved)
            run_state.note_start(self.out, self.config.seed)
        self.accelerator.wait_for_everyone()
        self.accelerator.init_trackers("tensorboard")
        self.log.faults()
        if not self.looked:
            self.look(start)

    def end(self) -> None:
        """Says which checkpoint was the best, where one is kept; closes the logs."""
        if self.best:
            folder = run_state.checkpoint(self.out, int(self.best["step"]))
            self.log.say(f"{self.config.best} was best at step {self.best['step']}: {folder}")
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def batches(self, start: int) -> Generator[tuple[dict, dict], None, None]:
        """From optimizer step `start` on: collated batches, and {name: why} of samples passed over for them."""
        c, a = self.config, self.accelerator
        order = EpochBatches(
            len(self.task.dataset),
            c.batch_size,
            c.seed,
            rank=a.process_index,
            world=a.num_processes,
            start=start * c.accumulate,
            steps=c.steps * c.accumulate,
            blocks=getattr(self.task.dataset, "lengths", None),
        )
        pin = self.device.type == "cuda"
        return load(self.task.dataset, order, self.task.collate, workers=c.workers, seed=c.seed, pin_memory=pin)

    def step(self, batches: Iterator[tuple[dict, dict]], step: int) -> None:
        """One optimizer step: every micro-batch backward, then each module moves unless something is non-finite."""
        values = self.gradients(batches, step)
        try:
            self.move(values, step)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(self.how_to_fit(step), whole=False) from None
        self.forget_gradients()
        if self.skipped >= self.config.max_skipped:
            kept = self.out / f"non-finite-step-{step:08d}-process-{self.accelerator.process_index}.pt"
            torch.save([_to(batch, torch.device("cpu")) for batch in self.offending], kept)
            raise UserError(
                f"{self.skipped} steps in a row had a non-finite loss or gradient, the last at step {step}; the weights"
                f" are those from before, that step's batch is in {str(kept)!r}. Lower train.optimizer.lr, or set"
                " train.precision='no'"
            )

    def gradients(self, batches: Iterator[tuple[dict, dict]], step: int) -> list[dict[str, Tensor]]:
        """Every micro-batch backward; what to log. OutOfMemory where one does not fit."""
        c, values, self.offending = self.config, [], []
        for micro in range(c.accumulate):
            batch, faults = next(batches)
            self.log.left_out.add(faults)
            fits = True
            try:
                batch = _to(batch, self.device)
                self.offending.append(batch)
                torch.manual_seed(_mix(c.seed, step * c.accumulate + micro, 0))  # alike in all processes
                with self.together():
                    values += self.backward(batch, step, last=micro == c.accumulate - 1)
            except (RuntimeError, MemoryError) as error:
                fits = not is_out_of_memory(error)
                if fits:
                    raise
            if not fits:  # here, where the error no longer holds what filled the memory
                self.forget_gradients()
                raise OutOfMemory(self.how_to_fit(step), whole=True)
        return values

    def together(self) -> AbstractContextManager:
        """While entered, what is random is drawn for the batch of all processes."""
        a = self.accelerator
        if a.num_processes == 1:
            return nullcontext()
        return Together(self.config.batch_size, a.process_index, a.num_processes)

    def move(self, values: list[dict[str, Tensor]], step: int) -> None:
        """Each module moves, unless something is non-finite."""
        a, clip = self.accelerator, self.config.clip
        values.append({f"{n}_grad_norm": sharded.clip(a, m, clip) for n, m in self.trained.modules.items()})
        if self.all_finite(values):
            self.skipped, self.offending = 0, []
            self.log.note(values)
            self.update(step)
        else:
            self.skipped, self.log.skipped = self.skipped + 1, self.log.skipped + 1

    def forget_gradients(self) -> None:
        """Frees the gradients."""
        for optimizer in self.trained.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def backward(self, batch: dict, step: int, last: bool) -> list[dict[str, Tensor]]:
        """Gradients of one micro-batch, synced between processes at the `last`; returns what to log, on the device."""
        noted = []
        with ExitStack() as stack:
            for module in self.wrapped.values() if not last else ():
                stack.enter_context(self.accelerator.no_sync(module))
            for name, loss, values in self.task.losses(self.wrapped, batch, step):
                self.accelerator.backward(loss / self.config.accumulate)
                noted.append({f"{name}_loss": loss} | values)
        return [{k: torch.as_tensor(v, device=self.device).detach().float() for k, v in d.items()} for d in noted]

    def all_finite(self, values: list[dict[str, Tensor]]) -> bool:
        """Whether all values are finite, in all processes: either all of them move or none."""
        flags = [torch.isfinite(v) for table in values for k, v in table.items() if k.endswith(("_loss", "_norm"))]
        flag = torch.stack(flags).all().float()
        return float(self.accelerator.reduce(flag, "mean")) == 1.0

    def update(self, step: int) -> None:
        """Moves the weights and their averages."""
        rate = self.config.optimizer.rate(step, self.config.steps)
        for optimizer in self.trained.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate * optimizer.defaults["lr"]
            optimizer.step()
        self.task.after_step()
        for name, average in self.trained.averages.items():
            average.update(self.task.modules[name], step)
        self.log.note([{"lr": torch.tensor(rate * self.config.optimizer.lr, device=self.device)}])

    def averaged(self) -> ExitStack:
        """A context in which every module of the first process carries its averaged weights and is in evaluation mode,
        with a fixed random state (that of the training needs no keeping: every step seeds its own). All processes must
        enter it alike."""
        stack, modules = ExitStack(), self.task.modules
        stack.enter_context(torch.no_grad())
        for name, average in self.trained.averages.items():
            if self.accelerator.is_fsdp2:
                module = stack.enter_context(sharded.replaced(modules, name, self.stand_ins[name], average.shadow))
            else:
                module = stack.enter_context(average.swapped(modules[name]))
            stack.callback(module.train)
            module.eval()
        torch.manual_seed(self.config.seed)
        return stack

    def told_to_stop(self, interrupts: Interrupts) -> int:
        """The number of the signal that any process got, 0 for none; the same in all processes."""
        if self.accelerator.num_processes == 1:
            return interrupts.received
        flag = torch.tensor(float(interrupts.received), device=self.device)
        return int(self.accelerator.gather(flag[None]).max())

    def look(self, done: int) -> None:
        """Validates and previews where that is due."""
        self.improved = False
        last = done == self.config.steps
        if last or due(done, self.config.validate_every):
            self.validate(done)
        if last or due(done, self.config.preview_every):
            self.preview(done)
        self.looked = True

    def validate(self, done: int) -> None:
        """Logs the task's numbers on held-out data; `improved` if the one that `train.best` names is the best yet."""
        value = math.nan
        with self.averaged():
            found = self.task.validate(self.device) if self.main else {}
        values = {f"val/{name}": value for name, value in found.items()}
        if self.main:
            self.log.write(done, values)
            self.log.say(f"step {done}: " + ", ".join(f"{n[4:]} {v:.4g}" for n, v in values.items()))
            value = self.valued(values)
        self.accelerator.wait_for_everyone()
        if self.config.best:
            value = float(self.accelerator.gather(torch.tensor([value], device=self.device))[0])
            self.improved = value < (self.best["value"] if self.best else math.inf)
            self.best = {"step": done, "value": value, "of": self.config.best} if self.improved else self.best

    def valued(self, values: dict[str, float]) -> float:
        """What `train.best` looks at, the lower the better."""
        name = self.config.best.removeprefix("-")
        if name and f"val/{name}" not in values:
            known = ", ".join(key[4:] for key in values)
            warnings.warn(f"train.best is {name!r}, which is not validated; these are: {known}", stacklevel=2)
        value = values.get(f"val/{name}", math.nan)
        return -value if self.config.best.startswith("-") else value

    def preview(self, done: int) -> None:
        """Saves the task's picture as previews/step-N.png."""
        with self.averaged():
            image = self.task.preview(self.device) if self.main else None
        if image is not None:
            (self.out / "previews").mkdir(exist_ok=True)
            image.save(self.out / "previews" / f"step-{done:08d}.png")
        self.accelerator.wait_for_everyone()

    def exported(self) -> bool:
        """Whether the run folder holds the model that its newest checkpoint holds."""
        return weights.is_finished(self.out, run_state.checkpoints(self.out)[-1])

    def export(self) -> None:
        """The task's loadable folder in the run folder, from the averaged weights at the end of the training."""
        with self.averaged():
            if self.main:
                self.task.export(self.out, self.device, final=True)
        self.accelerator.wait_for_everyone()

    def save(self, done: int, looked: bool = True) -> None:
        """A checkpoint: the loadable folder, and `state/` with all that resuming needs; `looked`: whether the step was
        validated and previewed, where that is due."""
        self.log.faults()
        state = {"step": done, "skipped": self.skipped, "looked": looked, "best": self.best} | self.log.state()
        best = int(self.best["step"]) if self.best else -1
        new = run_state.new_checkpoint(self.out, done, self.config.keep, best) if self.main else nullcontext()
        with new as folder:
            with self.averaged():
                if folder:
                    self.task.export(folder, self.device, final=False)
            run_state.write_state(folder and folder / "state", self.trained, state)
        self.accelerator.wait_for_everyone()


def _mix(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _to(batch: dict, device: torch.device) -> dict:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
