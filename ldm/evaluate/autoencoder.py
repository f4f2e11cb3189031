"""Measuring an autoencoder alone: what it keeps of held-out images, in how many bits, and what its latents hold."""

import math
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor
from tqdm import tqdm

from ldm.config import UserError
from ldm.data import open_dataset
from ldm.data.faults import readable
from ldm.data.latents import data_hash
from ldm.data.shapes import MIN_SIZE, render, sample_scene
from ldm.distributed import find_device
from ldm.evaluate.config import LARGEST, SMALLEST, AutoencoderEvaluation
from ldm.evaluate.features import TAUGHT, judge_name, open_networks
from ldm.evaluate.pictures import (
    claim,
    data_config,
    held_out_indices,
    of_dataset,
    sample_indices,
)
from ldm.evaluate.records import Record, blank_record, distance_records, headlines, left_out, mean_record, record
from ldm.evaluate.report import Row, write_results
from ldm.images import to_float, to_uint8
from ldm.metrics import bits_per_dimension, dci, linear_probe, mig, perceptual_distance, psnr, sharpness, ssim
from ldm.metrics.codecs import CODECS, curve
from ldm.metrics.features import judged_by
from ldm.metrics.intervals import mean_interval, resampled_interval
from ldm.metrics.reconstruction import discretized_logistic
from ldm.metrics.representation import agreement, clusters
from ldm.model_io import module_hash
from ldm.perceptual import perceptual_network
from ldm.vae import VAE

FITTED = 256  # training images to which the scale of the likelihood is fitted
SCALES = torch.logspace(-3.5, -0.5, 25).tolist()  # of the likelihood that are tried, in pixels of [-1, 1]
CODED = 128  # images through other codecs
SHOWN = 12  # rows of a gallery
OF = "reconstructions"
CLAIMED = ("autoencoder_sha256", "data_sha256", "split", "size", "seed")  # settings that a folder is for
HEADLINES = ("psnr_db", "ssim", "perceptual_distance", "frechet_distance", "bits_per_dimension")
ASSUMPTIONS = (
    "discretized logistic around the decoded sample; standard normal prior of the normalized latent; scale fitted to"
    " training pictures"
)
COARSE = 8  # positions per side to which latents are averaged where they have more
SCENES = 1200  # of shapes, with one thing each
LABELLED = 1500  # images of emoji, at most, per split
THIRDS = 3  # of the image, on each axis
FACTORS = ("colour", "shape", "size", "x", "y")
EMOJI = ("group", "style")
Split = tuple[np.ndarray, np.ndarray]  # codes (N, D) and labels (N, K), as text


def evaluate_autoencoder(config: AutoencoderEvaluation) -> list[str]:
    """Measures, and writes metrics.json and report.html into `config.out`. Returns the headline numbers, one per line.

    Raises UserError for wrong settings or too few images; nothing is written then.
    """
    device = find_device(config.device)
    vae = VAE.from_pretrained(config.autoencoder).to(device)
    size = config.size or vae.config.sample_size
    if not SMALLEST <= size <= LARGEST or size % vae.factor:
        allowed = f"--size is {SMALLEST} to {LARGEST} px, a multiple of {vae.factor}"
        raise UserError(f"pictures of {size} px cannot be measured: {allowed}")
    data = data_config(config.autoencoder, config.data, config.data_path, size)
    dataset, train = (open_dataset(data, split, need_captions=False) for split in (config.split, "train"))
    indices = held_out_indices(dataset, config)
    fitted = readable(train, sample_indices(len(train), FITTED, config.seed))
    distance, teacher = perceptual_network(config.perceptual).to(device), vae.perceptual_net or "unknown"
    feature_name = judged_by(config.features, judge_name("", config.data))
    features, _ = open_networks(feature_name, "none", teacher, config.out, device, config.batch_size, config.compile)
    settings = {
        "autoencoder": config.autoencoder,
        "autoencoder_sha256": module_hash(vae),
        "parameters": {"vae": sum(p.numel() for p in vae.parameters())},
        "data": config.data,
        "data_sha256": data_hash(dataset),
        "split": config.split,
        "num": len(indices),
        "size": size,
        "latent": f"{vae.config.latent_channels}x{size // vae.factor}x{size // vae.factor}",
        "seed": config.seed,
        "features": feature_name,
        "perceptual_net_of_vae": teacher,
        "device": str(device),
        "compile": config.compile,
    }
    claim(config.out, {key: settings[key] for key in CLAIMED})
    run = partial(in_batches, device=device, size=config.batch_size)
    training = code(vae, train, fitted, run)
    scale = min(SCALES, key=lambda scale: float(training.nll(scale).mean()))  # before held-out images are seen
    coded = code(vae, dataset, indices, run)
    real = of_dataset("real held-out", dataset, indices)
    decoded = replace(real, of=OF, read=coded.decoded.__getitem__)

    smallest = getattr(distance, "smallest", 0)
    network = {"extractor": config.perceptual, "extractor_sha256": module_hash(distance)}
    network |= {"resize": f"none; sides under {smallest} px doubled" if smallest else "none"}
    network |= TAUGHT if config.perceptual in teacher.split(", ") else {}
    nll, kl = coded.nll(scale), reduce(coded.kl(), "n c h w -> n", "sum")
    bits = partial(bits_per_dimension, dimensions=math.prod(coded.pixels.shape[1:]))
    mean, sample = {"latent": "mean"}, {"latent": "one sample", "assumes": ASSUMPTIONS, "scale": scale}

    def compare(metric: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return run(lambda x, y: metric(to_float(x), to_float(y)), coded.pixels, coded.decoded)

    levels = compare(psnr)
    values = {  # by metric, of each picture; and what they depend on
        "psnr_db": (levels, mean),
        "ssim": (compare(ssim), mean),
        "sharpness": (compare(sharpness), mean),
        "perceptual_distance": (compare(partial(perceptual_distance, network=distance)), mean | network),
        "bits_per_dimension": (bits(nll, kl), sample),
        "bits_of_latent": (bits(0 * nll, kl), sample),
        "bits_of_rest": (bits(nll, 0 * kl), sample),
    }
    results = [mean_record(metric, each, decoded, **fields) for metric, (each, fields) in values.items()]
    results += [latent_record(coded), *(blank_record(source, config.batch_size) for source in (real, decoded))]
    results += left_out(dataset, train)
    results += distance_records(features, decoded, real, config.seed) if features else []
    results.append(rate_record(vae, coded, run))
    if find_spec("sklearn"):
        results += representation(vae, dataset, train, config, run)
    else:
        missing = "probes of the latents need scikit-learn and are left out: pip install scikit-learn"
        warnings.warn(missing, stacklevel=2)
    rows = [
        Row(pictures=[("real", x), ("decoded", y)], note=f"{level:.1f} dB")
        for x, y, level in zip(coded.pixels, coded.decoded, levels, strict=True)
    ]
    shown = {"reconstructions": rows[: 2 * SHOWN], "worst": [rows[i] for i in levels.argsort()[:SHOWN].tolist()]}
    write_results("autoencoder", config.out, settings, results, shown)
    return headlines(results, [OF], HEADLINES)


@torch.no_grad()
def in_batches(function: Callable[..., Tensor], *rows: Tensor, device: torch.device, size: int) -> Tensor:
    """`function` of tensors (N, ...), `size` rows at a time on the device; the result (N, ...) on the CPU."""
    batches = zip(*(x.split(size) for x in rows), strict=True)
    progress = tqdm(batches, "batches", math.ceil(len(rows[0]) / size), leave=False)
    return torch.cat([function(*(x.to(device) for x in batch)).cpu() for batch in progress])


@dataclass(frozen=True, kw_only=True)
class Coded:
    """Images through an autoencoder."""

    pixels: Tensor  # uint8 (N, 3, H, W)
    mean: Tensor  # of the normalized latents (N, C, h, w)
    std: Tensor
    decoded: Tensor  # from the mean, uint8
    sampled: Tensor  # from one sample of the latent, in [-1, 1]

    def nll(self, scale: float) -> Tensor:
        """Nats of the images around the decoded sample (N,)."""
        pairs = zip(self.pixels.split(16), self.sampled.split(16), strict=True)
        return torch.cat([reduce(discretized_logistic(*pair, scale), "b c h w -> b", "sum") for pair in pairs])

    def kl(self) -> Tensor:
        """KL of each posterior from the standard normal in nats, float64 (N, C, h, w); of the latents as diffusion sees
        them, whatever the autoencoder's own scale, so that the rates of several compare."""
        mean, variance = self.mean.double(), self.std.double().square()
        return 0.5 * (mean.square() + variance - 1 - variance.log())


def code(vae: VAE, dataset: Any, indices: list[int], run: Callable[..., Tensor]) -> Coded:
    """Images through the autoencoder; the sample of latent i of `indices` has the seed i."""
    pixels = torch.stack([dataset[i]["image"] for i in indices])
    mean, std = run(lambda x: moments(vae, x), pixels).unbind(1)
    seeds = map(torch.Generator().manual_seed, range(len(indices)))
    eps = torch.stack([torch.randn(mean.shape[1:], generator=seed) for seed in seeds])
    return Coded(
        pixels=pixels,
        mean=vae.normalize(mean),
        std=std * vae.config.scaling_factor,
        decoded=run(lambda z: to_uint8(vae.decode_raw(z)), mean),
        sampled=run(vae.decode_raw, mean + std * eps),
    )


def moments(vae: VAE, pixels: Tensor) -> Tensor:
    """uint8 images (B, 3, H, W) -> mean and deviation of their raw latents (B, 2, C, h, w)."""
    posterior = vae.encode(to_float(pixels))
    return torch.stack([posterior.mean, posterior.std], 1)


def latent_record(coded: Coded) -> Record:
    """Each channel of the latents as diffusion sees it: mean, deviation, the posterior's share of the variance, KL."""
    z, noise, over = coded.mean.double(), coded.std.double().square().mean((0, 2, 3)), (0, 2, 3)
    variance = z.var(over)
    channels = torch.stack([z.mean(over), variance.sqrt(), noise / (noise + variance), coded.kl().mean(over)], 1)
    names = ("mean", "std", "noise_share", "kl_nats")
    value = [dict(zip(names, channel, strict=True)) for channel in channels.tolist()]
    return record("latent_channels", value, "latents", n=len(z))


def rate_record(vae: VAE, coded: Coded, run: Callable[..., Tensor]) -> Record:
    """(bytes, PSNR) per image of latents in 8 bits, in 256 levels over four deviations to both sides, of latents at the
    rate of their KL, which bits-back coding reaches, and of other codecs at several qualities."""
    pixels, step = coded.pixels[:CODED], 8 / 255
    levels = ((coded.mean[:CODED].clamp(-4, 4) + 4) / step).round() * step - 4
    nats = float(reduce(coded.kl()[:CODED], "n c h w -> n", "sum").mean())
    value = {
        "latents, 8 bits": [(float(math.prod(levels.shape[1:])), run(vae.decode, levels))],
        "latents, KL": [(nats / math.log(2) / 8, coded.sampled[:CODED])],
    }
    for name, [(size, x)] in value.items():
        value[name] = [(size, float(psnr(to_float(pixels), to_float(to_uint8(x))).mean()))]
    return record("rate_distortion", value | {c: curve(pixels, c) for c in CODECS}, OF, n=len(pixels))


def representation(
    vae: VAE, dataset: Any, train: Any, config: AutoencoderEvaluation, run: Callable[..., Tensor]
) -> Iterator[Record]:
    """k-means and linear probes of the latents against labels; on shapes MIG and DCI too. Empty for other data."""

    def codes(pixels: list[Tensor]) -> np.ndarray:
        """The normalized means (N, C h w) of uint8 images, averaged to 8x8 positions where there are more."""
        z = vae.normalize(run(lambda x: moments(vae, x)[:, 0], torch.stack(pixels)))
        z = F.adaptive_avg_pool2d(z, COARSE) if min(z.shape[-2:]) > COARSE else z
        return rearrange(z, "n c h w -> n (c h w)").double().numpy()

    if config.data == "emoji":
        splits = []
        for data in (train, dataset):
            rows = sample_indices(len(data), LABELLED, config.seed)
            labels = np.array([[data.records[i][label] for label in EMOJI] for i in rows])
            splits.append((codes([data[i]["image"] for i in rows]), labels))
        yield from _label_records(*splits, EMOJI, config.seed)
    if config.data == "shapes":
        pixels, labels = _scenes(max(vae.config.sample_size, MIN_SIZE), config.seed)
        yield from _factor_records(codes(pixels), labels, config.seed)


def _scenes(size: int, seed: int) -> tuple[list[Tensor], np.ndarray]:
    """Images of shapes with one thing, and its factors."""
    pixels, labels = [], []
    for i in range(SCENES):
        scene = sample_scene(random.Random(f"{seed}/factors/{i}"), False, "single")
        (thing,) = scene.things
        position = [str(min(int(THIRDS * value), THIRDS - 1)) for value in (thing.x, thing.y)]
        labels.append([thing.colour, thing.shape, thing.size, *position])
        pixels.append(torch.from_numpy(rearrange(render(scene, size), "h w c -> c h w").copy()))
    return pixels, np.array(labels)


def _factor_records(codes: np.ndarray, labels: np.ndarray, seed: int) -> Iterator[Record]:
    cut = len(codes) * 2 // 3
    yield from _label_records((codes[:cut], labels[:cut]), (codes[cut:], labels[cut:]), FACTORS, seed)
    numbers = np.stack([np.unique(column, return_inverse=True)[1] for column in labels.T], 1)
    fields = {"n": len(codes), "factors": list(FACTORS)}
    gap = mig(codes, numbers)
    rows, unit = (torch.arange(len(codes)),), {"seed": seed, "least": 0.0, "most": 1.0}
    interval = resampled_interval(lambda rows: mig(codes[rows], numbers[rows]), rows, gap, few=True, **unit)
    yield record("mig", gap, "latents", interval, **fields)
    # without intervals, for which trees would have to grow anew many times
    yield from (record(f"dci_{key}", value, "latents", **fields) for key, value in dci(codes, numbers, seed).items())


def _label_records(train: Split, test: Split, names: tuple[str, ...], seed: int) -> Iterator[Record]:
    """For each label: k-means of the test codes, and a linear probe from train to test. The intervals are for other
    test images and the same clusters and probe."""
    for i, name in enumerate(names):
        labels = test[1][:, i]
        counts = np.unique(labels, return_counts=True)[1]
        fields = {"label": name, "classes": len(counts), "n": len(labels)}
        code, rows = clusters(test[0], len(counts), seed), (torch.arange(len(labels)),)
        for key, value in agreement(labels, code).items():
            score = lambda r, k=key, y=labels, c=code: agreement(y[r], c[r])[k]  # noqa: E731
            interval = resampled_interval(score, rows, value, seed, least=0.0, most=1.0)
            yield record(key, value, "latents", interval, **fields)
        probe = linear_probe(train[0], train[1][:, i], test[0], labels)
        interval = mean_interval(np.arange(len(labels)) < round(probe * len(labels)), seed)
        yield record("linear_probe", probe, "latents", interval, chance=float(counts.max() / counts.sum()), **fields)
