"""The three real trainings, broken off at random steps and taken up again, against the same left alone."""

import random
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import tiny
from ldm.train.task import Task

from ldm.train.autoencoder import AutoencoderTask
from ldm.train.clip import CLIPTask
from ldm.train.diffusion import DiffusionTask
from soak.common import Child, Row, differences, training
from soak.models import finish, trained

STEPS = 14
CONFIG = replace(
    tiny.TRAIN, steps=STEPS, save_every=4, validate_every=5, log_every=3, keep=2, ema_decay=0.9, batch_size=5
)  # 24 pictures: an epoch of 5 batches, or 2 1/2 steps where two are accumulated
# Autoencoder: the discriminator joins in the middle, so that it is stopped before and after.
LATE = replace(tiny.LOSS, gan_start=5, gan_ramp=4)


def stopped_at(task: Callable[[], Task], step: int, number: int) -> Callable[[], Task]:
    """The task, with a signal to its own process within that step."""

    def make() -> Task:
        made = task()
        losses, told = made.losses, []

        def changed(modules: dict, batch: dict, now: int) -> object:
            if now == step and not told:
                told.append(number)  # once: a second one would end the process
                signal.raise_signal(number)
            return losses(modules, batch, now)

        made.losses = changed
        return made

    return make


def run(folder: Path, seed: int) -> list[Row]:
    """Five stops of each training; every second one by SIGKILL, which goes back to the checkpoint before."""
    row, draw = Row("resume of autoencoder with discriminator, CLIP, diffusion from a cache"), random.Random(seed)
    trained(row, folder / "parts")
    parts, cache = (folder / "parts/autoencoder", folder / "parts/clip"), str(folder / "latents.safetensors")
    tasks: dict[str, Callable[[], Task]] = {
        "autoencoder": lambda: AutoencoderTask(tiny.autoencoder(loss=LATE)),
        "clip": lambda: CLIPTask(tiny.clip(grounding=tiny.READERS)),
        "diffusion": lambda: DiffusionTask(tiny.diffusion(*parts, cache=cache)),
    }
    for name, task in tasks.items():
        for accumulate in (1, 2):
            config = replace(CONFIG, accumulate=accumulate)
            finish(row, folder / f"{name}-{accumulate}", task, config, folder / f"{name}-straight-{accumulate}")
        for number, step in enumerate(draw.sample(range(STEPS - 1), 5)):
            config = replace(CONFIG, workers=(0, 2)[number % 2], accumulate=(1, 2)[number // 2 % 2])
            how = signal.SIGKILL if number % 2 else signal.SIGTERM
            where = f"{name} step {step} workers {config.workers} accumulate {config.accumulate} {how.name}"
            out = folder / f"{name}-stopped-{number}"
            child = Child(training(stopped_at(task, step, how), config, out), folder / f"{name}-stop-{number}")
            code = child.end()
            row.expect(code == {9: -9, 15: 143}[how], f"{where}: exit code {code}: {child.error()[-200:]}")
            finish(row, folder / f"{name}-end-{number}", task, config, out)
            unlike = differences(out, folder / f"{name}-straight-{config.accumulate}", STEPS)
            row.expect(not unlike, f"{where}: {unlike}")
            row.count += 1
        _twice(row, folder, name, task)
    row.notes.append("0 and 2 loading processes, 1 and 2 micro-batches; tensors and log lines bit-identical")
    return [row]


def _twice(row: Row, folder: Path, name: str, task: Callable[[], Task]) -> None:
    """Stopped after a step that is to be validated, which is done on resuming; then killed before the next save."""
    out = folder / f"{name}-twice"
    for step, how, code in ((4, signal.SIGTERM, 143), (6, signal.SIGKILL, -9)):
        finish(row, folder / f"{name}-twice-{step}", stopped_at(task, step, how), CONFIG, out, code)
    finish(row, folder / f"{name}-twice-end", task, CONFIG, out)
    unlike = differences(out, folder / f"{name}-straight-1", STEPS)
    row.expect(not unlike, f"{name} stopped where validation is due, then killed: {unlike}")
    row.count += 1
