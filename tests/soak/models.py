"""Small real trainings and the model folders that come of them, made once and copied by the groups."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import tiny
from ldm.train.task import Task

from ldm.train.autoencoder import AutoencoderTask
from ldm.train.clip import CLIPTask
from ldm.train.diffusion import DiffusionTask
from ldm.train.loop import TrainConfig
from soak.common import Child, Row, training

CONFIG = replace(tiny.TRAIN, steps=4, save_every=2)


def finish(row: Row, log: Path, task: Callable[[], Task], config: TrainConfig, out: Path, code: int = 0) -> Child:
    """Trains in a child to its end, which must have that exit code."""
    child = Child(training(task, config, out), log)
    row.expect(child.end() == code, f"{log.name}: exit code {child.process.exitcode}: {child.error()[-300:]}")
    return child


def trained(row: Row, folder: Path, cache: str = "") -> Callable[[], Task]:
    """Trains `autoencoder`, `clip` and `diffusion` (checkpoints of steps 2 and 4) in `folder`; the last one's task."""

    def diffusion() -> Task:
        return DiffusionTask(tiny.diffusion(folder / "autoencoder", folder / "clip", cache=cache))

    tasks = {
        "autoencoder": lambda: AutoencoderTask(tiny.autoencoder()),
        "clip": lambda: CLIPTask(tiny.clip()),
        "diffusion": diffusion,
    }
    for name, task in tasks.items():
        finish(row, folder / "logs" / name, task, CONFIG, folder / name)
    return diffusion
