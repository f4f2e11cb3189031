"""The pictures that people judge: held-out real ones, and a model's for the same captions, made once and kept."""

from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.app.models import Models, usual
from ldm.app.sampling import Settings, picture_metadata, sample
from ldm.config import UserError, build
from ldm.data import DATASETS, DataConfig, open_dataset
from ldm.data.faults import readable
from ldm.data.latents import data_hash
from ldm.evaluate.pictures import training_data
from ldm.images import save_png, to_float, to_pil
from ldm.model_io import atomic_write, module_hash
from ldm.pipeline import Pipeline, Progress

BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A held-out caption with its real picture and a model's from `seed`: files, relative to the page's folder."""

    caption: str
    real: str
    made: str
    seed: int


def held_out(models: Models, name: str) -> Any:
    """The held-out part of the data set of a model, from its run's config or a shipped model's name, at the size of its
    pictures. Raises UserError where neither names it."""
    pipe, model = models[name], models.folders[name]
    config = training_data(model)
    if not config and model not in DATASETS:
        raise UserError("the data set of that model is unknown; choose a shipped model or a run of yours")
    size = pipe.latent_shape()[1] * pipe.vae.factor
    return open_dataset(replace(build(DataConfig, config or {"name": model}), size=size), "test")


def prepare(
    pipe: Pipeline, model: str, dataset: Any, count: int, seed: int, folder: Path
) -> Generator[Progress | str, None, list[Sample]]:
    """Makes the pictures that are missing, and returns the samples.

    Picture i has the caption of the i-th of `count` samples of the data set, drawn by `seed`, and the seed `seed + i`.
    """
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    order = readable(dataset, order)
    if len(order) < 4:
        raise UserError(f"only {len(order)} held-out pictures can be read; judging needs 4 or more")
    subset = f"{data_hash(dataset)[:12]}-{seed}"
    weights = module_hash(nn.ModuleList([pipe.vae, pipe.text_encoder, pipe.unet]))[:12]
    pictures = Path("judged", f"{weights}-{subset}")
    (folder / pictures).mkdir(parents=True, exist_ok=True)
    samples = []
    for i, index in enumerate(order):
        real, made = (f"{pictures}/{i:04d}-{name}.png" for name in ("real", "made"))
        samples.append(Sample(caption=dataset.captions(index)[0], real=real, made=made, seed=seed + i))
    for start in range(0, len(samples), BATCH):
        batch = samples[start : start + BATCH]
        if all((folder / file).is_file() for s in batch for file in (s.real, s.made)):
            continue
        settings = Settings(model=model, seed=seed + start, count=len(batch), **usual(pipe))
        images, _ = yield from sample(pipe, settings, prompt=[s.caption for s in batch])
        metadata = picture_metadata(pipe, settings)
        for i, s in enumerate(batch):
            (real,) = to_pil(to_float(dataset[order[start + i]]["image"][None]))
            made = metadata[i] | {"prompt": s.caption}
            for file, image, texts in ((s.real, real, {}), (s.made, images[i], made)):
                with atomic_write(folder / file) as temporary:
                    save_png(image, temporary, texts)
    return samples
