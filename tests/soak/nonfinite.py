"""NaN and infinity in loss, gradient and batch: the step is skipped; after three in a row the run gives up."""

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny
import torch

from soak.common import Row, Work, checkpoints, finish, state, trained

CONFIG = replace(tiny.TRAIN, steps=7, max_skipped=3, save_every=1, keep=9, log_every=1, ema_decay=0.9)


def spoiled(make: Work, place: str, wrong: float, at: set[int]) -> Work:
    """A task with `wrong` in its losses, one gradient or its batch in the steps `at`."""

    def made() -> Any:
        task, now = make(), [-1]
        losses, parameters = task.losses, list(next(iter(task.modules.values())).parameters())

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            changed = gradient.clone()
            changed.view(-1)[0] = wrong if now[0] in at else changed.view(-1)[0]
            return changed

        def changed(modules: dict, batch: dict, step: int, *rest: Any) -> Any:
            now[0] = step
            if place == "batch" and step in at:
                next(v for v in batch.values() if torch.is_tensor(v) and v.is_floating_point()).view(-1)[0] = wrong
            for name, loss, values in losses(modules, batch, step, *rest):
                yield name, loss * wrong if place == "loss" and step in at else loss, values

        if place == "gradient":
            parameters[-1].register_hook(spoil)
        task.losses = changed
        return task

    return made


def run(folder: Path, seed: int) -> list[Row]:
    """Every place in every training that has it; the autoencoder's batches are whole numbers."""
    row, draw = Row("NaN and infinity in loss, gradient and batch"), random.Random(seed)
    tasks = {name: task for name, task in trained(row, folder).items() if name != "clip"} | {"toy": tiny.Toy}
    for name, task in tasks.items():
        for place in ("loss", "gradient", "batch")[: 2 if name == "autoencoder" else 3]:
            for wrong in (math.nan, math.inf, -math.inf):
                where, at = f"{name}-{place}-{wrong}", draw.randrange(1, 4)
                finish(row, spoiled(task, place, wrong, {at}), CONFIG, folder / where, folder / f"{where}-log")
                states = [state(c / "state") for c in checkpoints(folder / where)]
                equal = [tiny.same(a, b) for a, b in zip(states, states[1:], strict=False)]
                row.expect(equal == [i + 1 == at for i in range(6)], f"{where}: {equal} are without effect, not {at}")
                many, out = spoiled(task, place, wrong, set(range(3, 99))), folder / f"{where}-many"
                child = finish(row, many, CONFIG, out, folder / f"{where}-many-log", 2)
                row.expect("3 steps in a row" in child.error(), f"{where}: {child.error()[-200:]}")
                row.expect(len([*out.glob("non-finite-step-*.pt")]) == 1, f"{where}: the batch is not kept")
                finite = all(t.isfinite().all() for t in state(checkpoints(out)[-1]).values())
                row.expect(finite, f"{where}: the checkpoint is not finite")
                row.count += 2
    row.notes.append("weights, averages and optimizers as before the step; then given up after 3 in a row, batch kept")
    return [row]
