"""The pictures that people judge: real held-out ones, and a model's for the same captions, made once and kept."""

import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ldm import model_io as weights
from ldm.app.studio import Models, Settings, Update, about_picture, make
from ldm.config import UserError, build
from ldm.data import DATASETS, DataConfig, open_dataset
from ldm.data.faults import readable
from ldm.data.latents import data_hash
from ldm.images import save_png, to_pil
from ldm.pipeline import Pipeline

BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Pictures by caption: `made[i]` of a model and `real[i]` are of `captions[i]`, files under the page's folder."""

    captions: list[str]
    real: list[Path]
    made: list[Path]
    seeds: list[int]


def data_of(model: str, pipe: Pipeline) -> DataConfig:
    """What a model was trained on, at the size of its pictures: as its run says, or by a shipped model's name
    (UserError where neither tells)."""
    size = pipe.latent_shape()[1] * pipe.vae.factor
    root = weights.find_root(model)
    file = (root.parent.parent if root.parent.name == "checkpoints" else root) / "config.json"
    told = weights.read_json(file).get("data") if file.is_file() else None
    if told is None and model not in DATASETS:
        raise UserError("nothing says which pictures that model was trained on; choose a shipped one or a run of yours")
    return replace(build(DataConfig, told or {"name": model}), size=size)


def prepare(
    models: Models, model: str, data: DataConfig, count: int, seed: int, folder: Path, stop: threading.Event
) -> Iterator[Update | Pool]:
    """Makes what is not there yet, with updates over all pictures; then the pool (UserError).

    Picture i has the caption of the i-th of `count` held-out samples, drawn with `seed`, and the seed `seed + i`.
    """
    pipe = models[model]
    dataset = open_dataset(data, "test")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    order = readable(dataset, order)
    if len(order) < 4:
        raise UserError(f"only {len(order)} held-out pictures can be read; judging needs 4 or more")
    captions = [dataset.captions(i)[0] for i in order]
    root = folder / "judged"
    mark = f"{_slug(data.name)}-{data_hash(dataset)[:12]}-{seed}"  # of what, and which part of it
    real = [root / f"real-{mark}" / f"{i:04d}.png" for i in range(len(order))]
    for file, index in zip(real, order, strict=True):
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            _save(to_pil(dataset[index]["image"][None] / 127.5 - 1)[0], file, {})
    settings = Settings(model=model, guidance=3.0, guidance_rescale=0.0, steps=30, seed=seed)
    parts = nn.ModuleList([pipe.vae, pipe.text_encoder, pipe.unet])
    home = root / f"{_slug(model)}-{weights.module_hash(parts)[:12]}-{mark}"
    made = [home / f"{i:04d}.png" for i in range(len(order))]
    home.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(order), BATCH):
        files = made[start : start + BATCH]
        if all(file.is_file() for file in files):
            continue
        texts = captions[start : start + BATCH]
        part = replace(settings, seed=seed + start, count=len(files))
        own = {"prompt_embeds": pipe.encode_prompt(texts)}
        for update in make(pipe, part, stop, **own):
            if update.stopped:
                return
            done = start * update.steps + update.step * len(files)
            yield replace(update, images=[], step=done, steps=len(order) * update.steps, done=False)
        for i, (image, file) in enumerate(zip(update.images, files, strict=True)):
            _save(image, file, about_picture(pipe, replace(part, prompt=texts[i]), i))
    yield Pool(captions=captions, real=real, made=made, seeds=[seed + i for i in range(len(order))])


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name)[-40:].strip("-") or "model"


def _save(image: object, file: Path, about: dict[str, str]) -> None:
    part = file.with_suffix(".part")
    save_png(image, part, about)
    part.replace(file)
