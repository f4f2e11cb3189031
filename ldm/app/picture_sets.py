"""The pictures that people judge: held-out real ones, and a model's for the same captions, made once and kept."""

from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from ldm.app.models import Models
from ldm.app.sampling import Settings, Update, picture_metadata, sample
from ldm.config import UserError, build
from ldm.data import DATASETS, DataConfig, open_dataset
from ldm.data.faults import readable
from ldm.data.latents import data_hash
from ldm.images import save_png, to_float, to_pil
from ldm.model_io import atomic_write, find_root, module_hash, read_json
from ldm.pipeline import Pipeline

BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A held-out caption with its real picture and a model's from `seed`: files, relative to the page's folder."""

    caption: str
    real: str
    made: str
    seed: int


def training_data(model: str, pipe: Pipeline) -> DataConfig:
    """The data set of a model, from its run's config or a shipped model's name, at the size of its pictures. Raises
    UserError where neither names it."""
    root = find_root(model)
    file = (root.parent.parent if root.parent.name == "checkpoints" else root) / "config.json"
    config = read_json(file).get("data") if file.is_file() else None
    if config is None and model not in DATASETS:
        raise UserError("the data set of that model is unknown; choose a shipped model or a run of yours")
    size = pipe.latent_shape()[1] * pipe.vae.factor
    return replace(build(DataConfig, config or {"name": model}), size=size)


def prepare(
    models: Models, model: str, data_model: str, count: int, seed: int, folder: Path
) -> Generator[Update, None, list[Sample]]:
    """Makes the pictures that are missing, with updates over all of them, for captions of the data set of `data_model`;
    returns the samples.

    Picture i has the caption of the i-th of `count` held-out samples, drawn by `seed`, and the seed `seed + i`.
    """
    pipe = models[model]
    dataset = open_dataset(training_data(models.folders[data_model], models[data_model]), "test")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    order = readable(dataset, order)
    if len(order) < 4:
        raise UserError(f"only {len(order)} held-out pictures can be read; judging needs 4 or more")
    subset = f"{data_hash(dataset)[:12]}-{seed}"
    weights = module_hash(nn.ModuleList([pipe.vae, pipe.text_encoder, pipe.unet]))[:12]
    samples = []
    for i, index in enumerate(order):
        real, made = (f"judged/{source}-{subset}/{i:04d}.png" for source in ("real", weights))
        samples.append(Sample(caption=dataset.captions(index)[0], real=real, made=made, seed=seed + i))
        if not (folder / real).is_file():
            _save(to_pil(to_float(dataset[index]["image"][None]))[0], folder / real, {})
    for start in range(0, len(samples), BATCH):
        batch = samples[start : start + BATCH]
        if all((folder / s.made).is_file() for s in batch):
            continue
        settings = Settings(model=model, seed=seed + start, count=len(batch))
        embeds = pipe.encode_prompt([s.caption for s in batch])
        for update in sample(pipe, settings, preview_steps=(), prompt_embeds=embeds):
            step = start * update.steps + update.step * len(batch)
            yield replace(update, step=step, steps=len(samples) * update.steps)
        for image, s, metadata in zip(update.images, batch, picture_metadata(pipe, settings), strict=True):
            _save(image, folder / s.made, metadata | {"prompt": s.caption})
    return samples


def _save(image: Image.Image, file: Path, metadata: dict[str, str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as temporary:
        save_png(image, temporary, metadata)
