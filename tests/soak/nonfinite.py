"""NaN and infinity in loss, gradient and batch: the step is left out and counted, in the end the training gives up."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import tiny
import torch
from ldm.train.run import Run
from ldm.train.task import Task

from ldm.config import UserError
from ldm.model_io import load_tensors, read_json
from ldm.train.autoencoder import AutoencoderTask
from ldm.train.diffusion import DiffusionTask
from ldm.train.loop import train
from soak.common import Row
from soak.models import trained

CONFIG = replace(tiny.TRAIN, steps=8, max_skipped=3, save_every=1, keep=9, log_every=1, ema_decay=0.9)


def in_loss(task: Task, wrong: float, at: set[int]) -> None:
    """Makes the losses of some steps `wrong`."""
    losses = task.losses

    def changed(modules: dict, batch: dict, step: int) -> object:
        for name, loss, values in losses(modules, batch, step):
            yield name, loss * wrong if step in at else loss, values

    task.losses = changed


def in_gradient(task: Task, wrong: float, at: set[int]) -> None:
    """Makes one number of one gradient `wrong`, while the losses are finite."""
    losses, now = task.losses, [-1]

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        changed = gradient.clone()
        changed.view(-1)[0] = wrong if now[0] in at else changed.view(-1)[0]
        return changed

    def noted(modules: dict, batch: dict, step: int) -> object:
        now[0] = step
        yield from losses(modules, batch, step)

    next(reversed(list(next(iter(task.modules.values())).parameters()))).register_hook(spoil)
    task.losses = noted


def in_batch(task: Task, wrong: float, at: set[int]) -> None:
    """Puts `wrong` into the floating-point part of the batches of some steps."""
    losses = task.losses

    def changed(modules: dict, batch: dict, step: int) -> object:
        if step in at:
            name = next(k for k, v in batch.items() if isinstance(v, torch.Tensor) and v.is_floating_point())
            batch[name].view(-1)[0] = wrong
        return losses(modules, batch, step)

    task.losses = changed


def run(folder: Path, seed: int) -> list[Row]:
    """Every place in every training that has it (pictures are whole numbers, so their batches hold no NaN)."""
    row, draw = Row("NaN and infinity in loss, gradient and batch"), random.Random(seed)
    trained(row, folder)
    cache = str(folder / "latents.safetensors")
    tasks: dict[str, Callable[[], Task]] = {
        "toy": tiny.Toy,
        "autoencoder": lambda: AutoencoderTask(tiny.autoencoder()),
        "diffusion": lambda: DiffusionTask(tiny.diffusion(folder / "autoencoder", folder / "clip", cache=cache)),
    }
    for name, task in tasks.items():
        for place in (in_loss, in_gradient, in_batch) if name != "autoencoder" else (in_loss, in_gradient):
            for wrong in (math.nan, math.inf, -math.inf):
                where = f"{name} {place.__name__} {wrong}"
                out = folder / where.replace(" ", "-")
                _left_out(row, where, task, place, wrong, out, draw)
                _gives_up(row, where, task, place, wrong, out)
                row.count += 2
    row.notes.append("weights, averages and optimizers as before the step; then given up after 3 in a row, batch kept")
    return [row]


def _left_out(row: Row, where: str, task: Callable, place: Callable, wrong: float, out: Path, draw: object) -> None:
    """One step is left out among finite ones: nothing of it reaches what is trained."""
    made, at = task(), draw.randrange(1, 4)
    place(made, wrong, {at})
    run = Run(made, CONFIG, out / "one")
    run.begin(0, {})
    batches = run.batches(0)
    for step in range(5):
        before = _everything(run)
        run.step(batches, step)
        same = tiny.same(before, _everything(run))
        row.expect(same == (step == at), f"{where}: step {step} {'changed nothing' if same else 'moved something'}")
        row.expect(run.skipped == (step == at), f"{where}: {run.skipped} counted at step {step}")
    row.expect(run.log.skipped == 1, f"{where}: {run.log.skipped} counted for the log")
    batches.close()


def _everything(run: Run) -> dict[str, torch.Tensor]:
    """Copies of all weights, averages and numbers of the optimizers."""
    found = {f"{n}/{k}": v.clone() for n, m in run.trained.modules.items() for k, v in m.state_dict().items()}
    found |= {f"{n}-ema/{k}": v.clone() for n, a in run.trained.averages.items() for k, v in a.state_dict().items()}
    for name, optimizer in run.trained.optimizers.items():
        for index, values in optimizer.state_dict()["state"].items():
            found |= {f"{name}-{index}/{k}": v.clone() for k, v in values.items() if isinstance(v, torch.Tensor)}
    return found


def _gives_up(row: Row, where: str, task: Callable, place: Callable, wrong: float, out: Path) -> None:
    """From step 3 on all are wrong: given up after three, the batch is kept, the checkpoints hold no NaN."""
    made = task()
    place(made, wrong, set(range(3, 99)))
    try:
        train(made, CONFIG, out / "many", {})
        row.expect(False, f"{where}: did not give up")
    except UserError as error:
        row.expect("3 steps in a row" in str(error) and "\n" not in str(error), f"{where}: {error}")
    kept = list((out / "many").glob("non-finite-step-00000005-*.pt"))
    row.expect(len(kept) == 1 and bool(torch.load(kept[0], weights_only=True)), f"{where}: kept {kept}")
    last = out / "many" / "checkpoints" / "step-00000005" / "state"
    tensors = [tensor for file in last.glob("*.safetensors") for tensor in load_tensors(file).values()]
    row.expect(bool(tensors) and all(t.isfinite().all() for t in tensors), f"{where}: the checkpoint is not finite")
    row.expect(read_json(last / "state.json")["skipped"] == 2, f"{where}: skipped steps are not in the state")
