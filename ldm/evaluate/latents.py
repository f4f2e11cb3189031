"""What can be read from an autoencoder's latents of the known factors of images, on data sets that know them."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ldm.data.shapes import MIN_SIZE, render, sample_scene
from ldm.evaluate.records import Record, record
from ldm.images import to_float
from ldm.metrics import dci, linear_probe, mig
from ldm.metrics.intervals import mean_interval, resampled_interval
from ldm.metrics.representation import agreement, clusters
from ldm.vae import VAE

COARSE = 8  # positions per side to which latents are averaged where they have more
SCENES = 1200  # of shapes, with one thing each
LABELLED = 1500  # images of emoji, at most, per split
THIRDS = 3  # of the image, on each axis
FACTORS = ("colour", "shape", "size", "x", "y")
EMOJI = ("group", "style")
Split = tuple[np.ndarray, np.ndarray]  # codes (N, D) and labels (N, K), as text


def representation(vae: VAE, dataset: Any, train: Any, name: str, seed: int) -> Iterator[Record]:
    """k-means and linear probes of the latents against labels; on shapes MIG and DCI too. Empty for other data."""
    if name == "emoji":
        yield from _label_records(*(_emoji(vae, data, seed) for data in (train, dataset)), EMOJI, seed)
    if name != "shapes":
        return
    codes, labels = _scenes(vae, seed)
    cut = len(codes) * 2 // 3
    yield from _label_records((codes[:cut], labels[:cut]), (codes[cut:], labels[cut:]), FACTORS, seed)
    numbers = np.stack([np.unique(column, return_inverse=True)[1] for column in labels.T], 1)
    fields = {"of": "latents", "n": len(codes), "factors": list(FACTORS)}
    gap = mig(codes, numbers)
    interval = _interval(lambda rows: mig(codes[rows], numbers[rows]), len(codes), gap, seed, few=True)
    yield record("mig", gap, interval, **fields)
    # without intervals, for which trees would have to grow anew many times
    yield from (record(f"dci_{key}", value, **fields) for key, value in dci(codes, numbers, seed).items())


def _interval(statistic: Any, count: int, value: float, seed: int, few: bool = False) -> tuple[float, float]:
    """Of a statistic in [0, 1] of row numbers."""
    low, high = resampled_interval(statistic, (torch.arange(count),), value, seed, few)
    return max(low, 0.0), min(high, 1.0)


def _scenes(vae: VAE, seed: int) -> Split:
    """Images of shapes with one thing, and its factors."""
    size, pixels, labels = max(vae.config.sample_size, MIN_SIZE), [], []
    for i in range(SCENES):
        scene = sample_scene(random.Random(f"{seed}/factors/{i}"), False, "single")
        (thing,) = scene.things
        position = [str(min(int(THIRDS * value), THIRDS - 1)) for value in (thing.x, thing.y)]
        labels.append([thing.colour, thing.shape, thing.size, *position])
        pixels.append(torch.from_numpy(rearrange(render(scene, size), "h w c -> c h w").copy()))
    return _codes(vae, torch.stack(pixels)), np.array(labels)


def _emoji(vae: VAE, dataset: Any, seed: int) -> Split:
    indices = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:LABELLED].tolist()
    pixels = torch.stack([dataset[i]["image"] for i in indices])
    return _codes(vae, pixels), np.array([[dataset.records[i][label] for label in EMOJI] for i in indices])


@torch.no_grad()
def _codes(vae: VAE, pixels: Tensor) -> np.ndarray:
    """The normalized means (N, C h w) of uint8 images, averaged to 8x8 positions where there are more."""
    device = next(vae.parameters()).device
    z = torch.cat([vae.normalize(vae.encode(to_float(part).to(device)).mean).cpu() for part in pixels.split(64)])
    z = F.adaptive_avg_pool2d(z, COARSE) if min(z.shape[-2:]) > COARSE else z
    return rearrange(z, "n c h w -> n (c h w)").double().numpy()


def _label_records(train: Split, test: Split, names: tuple[str, ...], seed: int) -> Iterator[Record]:
    """For each label: k-means of the test codes, and a linear probe from train to test. The intervals are for other
    test images and the same clusters and probe."""
    for i, name in enumerate(names):
        labels = test[1][:, i]
        counts = np.unique(labels, return_counts=True)[1]
        fields = {"of": "latents", "label": name, "classes": len(counts), "n": len(labels)}
        code = clusters(test[0], len(counts), seed)
        for key, value in agreement(labels, code).items():
            interval = _interval(lambda r, k=key, y=labels, c=code: agreement(y[r], c[r])[k], len(labels), value, seed)
            yield record(key, value, interval, **fields)
        probe = linear_probe(train[0], train[1][:, i], test[0], labels)
        interval = mean_interval(np.arange(len(labels)) < round(probe * len(labels)), seed)
        yield record("linear_probe", probe, interval, chance=float(counts.max() / counts.sum()), **fields)
