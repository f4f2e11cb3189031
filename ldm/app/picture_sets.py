"""The pictures that people judge: held-out real ones, and a model's for the same captions, made once and kept."""

import re
from collections.abc import Iterator
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
from ldm.model_io import find_root, module_hash, read_json
from ldm.pipeline import Pipeline

BATCH = 8


@dataclass(frozen=True)
class PictureSet:
    """The files `real[i]`, and `made[i]` by a model with the seed `seeds[i]`, are of `captions[i]`; relative to the
    page's folder."""

    captions: list[str]
    real: list[str]
    made: list[str]
    seeds: list[int]


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
    models: Models, model: str, data: DataConfig, count: int, seed: int, folder: Path
) -> Iterator[Update | PictureSet]:
    """Makes the pictures that are missing, with updates over all of them; then yields the set.

    Picture i has the caption of the i-th of `count` held-out samples, drawn by `seed`, and the seed `seed + i`.
    """
    pipe = models[model]
    dataset = open_dataset(data, "test")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    order = readable(dataset, order)
    if len(order) < 4:
        raise UserError(f"only {len(order)} held-out pictures can be read; judging needs 4 or more")
    captions = [dataset.captions(i)[0] for i in order]
    subset = f"{_slug(data.name)}-{data_hash(dataset)[:12]}-{seed}"
    weights = module_hash(nn.ModuleList([pipe.vae, pipe.text_encoder, pipe.unet]))[:12]
    real, made = (
        [folder / name / f"{i:04d}.png" for i in range(len(order))]
        for name in (f"real-{subset}", f"{_slug(model)}-{weights}-{subset}")
    )
    for file, index in zip(real, order, strict=True):
        if not file.is_file():
            _save(to_pil(to_float(dataset[index]["image"][None]))[0], file, {})
    for start in range(0, len(order), BATCH):
        files, texts = made[start : start + BATCH], captions[start : start + BATCH]
        if all(file.is_file() for file in files):
            continue
        settings = Settings(model=model, seed=seed + start, count=len(files))
        for update in sample(pipe, settings, preview_steps=(), prompt_embeds=pipe.encode_prompt(texts)):
            step = start * update.steps + update.step * len(files)
            yield replace(update, step=step, steps=len(order) * update.steps)
        metadata = picture_metadata(pipe, settings)
        for image, file, text, caption in zip(update.images, files, metadata, texts, strict=True):
            _save(image, file, text | {"prompt": caption})
    names = ([str(file.relative_to(folder.parent)) for file in files] for files in (real, made))
    yield PictureSet(captions, *names, [seed + i for i in range(len(order))])


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name)[-40:].strip("-") or "model"


def _save(image: Image.Image, file: Path, metadata: dict[str, str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_png(image, file.with_suffix(".part"), metadata)
    file.with_suffix(".part").replace(file)
