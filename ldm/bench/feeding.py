"""Our side's data sets and features: how many pictures a second they give."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ldm.bench import models
from ldm.bench.worker import Job
from ldm.data import DataConfig, open_dataset, spread, stack_images
from ldm.data.emoji import Emoji
from ldm.data.latents import CachedLatents, open_latents
from ldm.data.loader import load
from ldm.data.order import EpochBatches
from ldm.data.shards import write_shards
from ldm.metrics.features import feature_extractor
from ldm.train.diffusion import stack_latents
from ldm.vae import VAE

COUNT, SIZE = 512, 64  # pictures in the folder, the shards and the cache
SPLITS = {"train": COUNT, "val": 64}


def emoji_pictures(split: str) -> Iterator[tuple[str, bytes, list[str]]]:
    """(key, PNG, captions) of emoji, evenly spread."""
    dataset = Emoji(SIZE, split)
    for number, index in enumerate(spread(dataset, SPLITS[split])):
        sample, file = dataset[index], io.BytesIO()
        Image.fromarray(sample["image"].permute(1, 2, 0).numpy()).save(file, "PNG")
        yield f"{number:06d}", file.getvalue(), sample["captions"]


def emoji_folder(home: Path) -> Path:
    """A folder of PNGs with their captions beside them, written on first use."""
    root = home / "pictures"
    if not root.exists():
        part = home / ".pictures.part"
        for split in SPLITS:
            (part / split).mkdir(parents=True, exist_ok=True)
            for key, png, captions in emoji_pictures(split):
                (part / split / f"{key}.png").write_bytes(png)
                (part / split / f"{key}.txt").write_text("\n".join(captions), encoding="utf-8")
        part.rename(root)
    return root


def emoji_shards(home: Path) -> Path:
    """The same pictures in tars of about 100 pictures."""
    root = home / "shards"
    if not root.exists():
        samples = (
            {"key": key, "image": png, "suffix": "png", "captions": captions}
            for key, png, captions in emoji_pictures("train")
        )
        write_shards(samples, root, "train", shard_bytes=2**20)
    return root


def emoji_latents(home: Path, device: torch.device) -> CachedLatents:
    """What the shipped autoencoder makes of the same pictures."""
    path, vae = home / "pictures.safetensors", VAE.from_pretrained("emoji").eval().to(device)
    return open_latents(path, vae, _open("folder", home), 64, device)


def _open(source: str, home: Path) -> Any:
    if source == "folder":
        return open_dataset(DataConfig(name="folder", path=str(emoji_folder(home)), size=SIZE), "train")
    if source == "shards":
        return open_dataset(DataConfig(name="shards", path=str(emoji_shards(home)), size=SIZE), "train")
    return open_dataset(DataConfig(size=SIZE, length=10_000), "train")


def data(kind: str, params: dict[str, Any], home: Path, device: torch.device) -> Job:
    """So many batches of a training's loader, which is running already."""
    cached = params["source"] == "latents"
    dataset = emoji_latents(home, device) if cached else _open(params["source"], home)
    order = EpochBatches(len(dataset), params["batch"], 0, blocks=getattr(dataset, "lengths", None))
    collate = stack_latents if cached else stack_images
    batches = load(dataset, order, collate, workers=params["workers"], seed=0, pin_memory=device.type == "cuda")

    def run() -> None:
        for _ in range(params["batches"]):
            next(batches)

    return Job(run=run)


def features(kind: str, params: dict[str, Any], home: Path, device: torch.device) -> Job:
    """The features of a batch of pictures, resizing included."""
    extractor = feature_extractor("effnet-lite0").to(device)
    x = models.pictures(params["batch"], params["size"], device)
    return Job(run=lambda: extractor(x), bytes_moved=sum(p.nbytes for p in extractor.parameters()) + x.nbytes)
