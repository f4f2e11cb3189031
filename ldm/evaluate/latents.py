"""What an autoencoder's latents say of what is known of pictures, where a data set knows it."""

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from ldm.data.shapes import MIN_SIZE, render, sample_scene
from ldm.evaluate.records import Record
from ldm.images import to_float
from ldm.metrics import dci, linear_probe, mig
from ldm.metrics.intervals import mean_interval, resampled_interval
from ldm.metrics.representation import agreement, clusters
from ldm.vae import VAE

COARSE = 8  # positions a side that latents are averaged to where they have more
SCENES = 1200  # of shapes, with one thing each
LABELLED = 1500  # pictures of other data, at most, in each split
PLACES = 3  # thirds of the picture, on each axis
FACTORS = ("colour", "shape", "size", "x", "y")
EMOJI = ("group", "style")


def representation(vae: VAE, dataset: Any, train: Any, name: str, seed: int) -> list[Record]:
    """Clusters and linear probes of the normalized latents against labels; on shapes MIG and DCI too, on pictures with
    one thing, whose true factors are known. Nothing for data without labels. UserError without scikit-learn."""
    if name == "shapes":
        codes, labels = _scenes(vae, seed)
        cut = len(codes) * 2 // 3
        found = _labelled(codes[:cut], labels[:cut], codes[cut:], labels[cut:], FACTORS, seed)
        numbers = np.stack([np.unique(column, return_inverse=True)[1] for column in labels.T], 1)
        about = {"of": "latents", "n": len(codes), "factors": list(FACTORS)}
        gap = mig(codes, numbers)
        rows = torch.arange(len(codes))
        spread = resampled_interval(lambda rows: mig(codes[rows], numbers[rows]), (rows,), gap, seed, few=True)
        found.append({"metric": "mig", "value": gap, "interval": spread, **about})
        # without intervals, for which trees would have to grow anew many times
        return found + [{"metric": f"dci_{k}", "value": v, **about} for k, v in dci(codes, numbers, seed).items()]
    if name == "emoji":
        splits = []
        for data in (train, dataset):
            chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:LABELLED].tolist()
            pixels = torch.stack([data[i]["image"] for i in chosen])
            labels = np.array([[data.records[i][label] for label in EMOJI] for i in chosen])
            splits += [_codes(vae, pixels), labels]
        return _labelled(*splits, EMOJI, seed)
    return []


def _scenes(vae: VAE, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Latents (N, D) of pictures with one thing, and its factors (N, 5), as texts."""
    scenes = [sample_scene(random.Random(f"{seed}/factors/{i}"), False, "single") for i in range(SCENES)]
    size = max(vae.config.sample_size, MIN_SIZE)
    pixels = torch.stack([torch.from_numpy(rearrange(render(s, size), "h w c -> c h w").copy()) for s in scenes])
    rows = []
    for scene in scenes:
        (thing,) = scene.things
        places = [str(min(int(PLACES * value), PLACES - 1)) for value in (thing.x, thing.y)]
        rows.append([thing.colour, thing.shape, thing.size, *places])
    return _codes(vae, pixels), np.array(rows)


@torch.no_grad()
def _codes(vae: VAE, pixels: Tensor) -> np.ndarray:
    """The normalized means of uint8 pictures, (N, C h w), averaged to 8x8 positions where there are more."""
    device = next(vae.parameters()).device
    parts = tqdm(pixels.split(64), desc="latents", unit="batch", leave=False)
    found = [vae.normalize(vae.encode(to_float(part).to(device)).mean).cpu() for part in parts]
    z = torch.cat(found)
    z = F.adaptive_avg_pool2d(z, COARSE) if min(z.shape[-2:]) > COARSE else z
    return rearrange(z, "n c h w -> n (c h w)").double().numpy()


def _labelled(
    train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray, names: tuple[str, ...], seed: int
) -> list[Record]:
    """For each label: k-means of the test codes, and a linear probe from train to test; the intervals are for other
    test pictures and the same clusters and probe."""
    found: list[Record] = []
    for i, name in enumerate(names):
        labels, classes, rows = test_y[:, i], len(set(test_y[:, i])), torch.arange(len(test_x))
        about = {"of": "latents", "label": name, "classes": classes, "n": len(test_x)}
        code = clusters(test_x, classes, seed)
        for key, value in agreement(labels, code).items():
            spread = resampled_interval(lambda rows, key=key: agreement(labels[rows], code[rows])[key], (rows,), value)  # noqa: B023
            found.append({"metric": key, "value": value, "interval": spread, **about})
        counts = np.unique(test_y[:, i], return_counts=True)[1]
        probe = linear_probe(train_x, train_y[:, i], test_x, test_y[:, i])
        chance = float(counts.max() / counts.sum())  # of the most frequent label
        spread = mean_interval(np.arange(len(test_x)) < round(probe * len(test_x)), seed)
        found.append({"metric": "linear_probe", "value": probe, "interval": spread, "chance": chance, **about})
    return found
