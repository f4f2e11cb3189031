"""Measuring an autoencoder alone: what it keeps of held-out images, in how many bits, and what its latents hold."""

import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from ldm.config import UserError
from ldm.data import open_dataset
from ldm.data.faults import readable
from ldm.data.latents import data_hash
from ldm.data.shapes import MIN_SIZE, render, sample_scene
from ldm.distributed import find_device, map_over_processes
from ldm.evaluate.config import LARGEST, SMALLEST, AutoencoderEvaluation
from ldm.evaluate.evaluation import TAUGHT, Evaluation
from ldm.evaluate.pictures import Pictures, data_config, held_out_indices, of_dataset, sample_indices
from ldm.evaluate.records import Record, blank_record, left_out, mean_record, record, resampled_record
from ldm.images import to_float, to_uint8
from ldm.metrics import bits_per_dimension, dci, linear_probe, mig, perceptual_distance, psnr, sharpness, ssim
from ldm.metrics.codecs import CODECS, curve
from ldm.metrics.intervals import mean_interval
from ldm.metrics.reconstruction import discretized_logistic
from ldm.metrics.representation import agreement, clusters
from ldm.model_io import module_hash
from ldm.perceptual import perceptual_network
from ldm.vae import VAE

FITTED = 256  # training images to which the scale of the likelihood is fitted
SCALES = torch.logspace(-3.5, -0.5, 25).tolist()  # of the likelihood that are tried, in pixels of [-1, 1]
CODED = 128  # images through other codecs
SHOWN = 24  # rows of the gallery
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
UNIT = {"least": 0.0, "most": 1.0}
Split = tuple[np.ndarray, np.ndarray]  # codes (N, D) and labels (N, K), as text


def evaluate_autoencoder(config: AutoencoderEvaluation) -> list[str]:
    """Measures, and writes metrics.json and report.html into `config.out`. Returns the headline numbers, one per line.

    Raises UserError for wrong settings or too few images; nothing is written then.
    """
    vae = VAE.from_pretrained(config.autoencoder).to(find_device(config.device))
    size = config.size or vae.config.sample_size
    if not SMALLEST <= size <= LARGEST or size % vae.factor:
        allowed = f"--size is {SMALLEST} to {LARGEST} px, a multiple of {vae.factor}"
        raise UserError(f"pictures of {size} px cannot be measured: {allowed}")
    data = data_config(config.autoencoder, config.data, config.data_path, size)
    dataset, train = (open_dataset(data, split, need_captions=False) for split in (config.split, "train"))
    indices = held_out_indices(dataset, config)
    fitted = readable(train, sample_indices(len(train), FITTED, config.seed))
    distance, teacher = perceptual_network(config.perceptual), vae.perceptual_net or "unknown"
    settings = {
        "autoencoder_sha256": module_hash(vae),
        "parameters": {"vae": sum(p.numel() for p in vae.parameters())},
        "data_sha256": data_hash(dataset),
        "num": len(indices),
        "size": size,
        "latent": f"{vae.config.latent_channels}x{size // vae.factor}x{size // vae.factor}",
        "perceptual_net_of_vae": teacher,
    }
    e = Evaluation(config, teacher, **settings)
    e.claim(*CLAIMED)

    coded = partial(Coded, vae, config.batch_size)
    training, held_out = coded(train, fitted), coded(dataset, indices)
    scale = min(SCALES, key=lambda scale: float(training.nll(scale).mean()))  # of training images alone
    real = of_dataset("real held-out", dataset, indices)
    decoded = replace(real, of=OF, read=held_out.decoded.__getitem__)
    e.add(*reconstruction_records(held_out, decoded, scale, distance, config.perceptual, teacher))
    e.add(latent_record(held_out), *(blank_record(source, config.batch_size) for source in (real, decoded)))
    e.add(*left_out(dataset, train))
    if e.features:
        e.add(*e.features.distances(decoded, real))
    e.add(rate_record(held_out))
    if config.data == "emoji":
        e.add(*label_records(*(emoji(data, config.seed, coded) for data in (train, dataset)), EMOJI, config.seed))
    elif config.data == "shapes":
        e.add(*factor_records(*scenes(max(vae.config.sample_size, MIN_SIZE), config.seed, coded), config.seed))
    levels = held_out.compare(psnr)
    for i in range(min(SHOWN, len(levels))):
        pictures = [("real", held_out.pixels[i]), ("decoded", held_out.decoded[i])]
        e.show("reconstructions", pictures, note=f"{levels[i]:.1f} dB")
    return e.finish("autoencoder", [OF], HEADLINES)


class Coded:
    """Images of a data set through an autoencoder, `size` of them at a time; decoded when that is asked for."""

    def __init__(self, vae: VAE, size: int, dataset: Any, indices: Iterable[int]) -> None:
        self.vae, self.size, self.device = vae, size, next(vae.parameters()).device
        self.pixels = torch.stack([dataset[i]["image"] for i in indices])  # uint8 (N, 3, H, W)
        self.raw_mean, self.raw_std = self.run(self._moments, self.pixels).unbind(1)
        # of the latents as diffusion sees them (N, C, h, w)
        self.mean, self.std = vae.normalize(self.raw_mean), self.raw_std * vae.config.scaling_factor

    def _moments(self, pixels: Tensor) -> Tensor:
        posterior = self.vae.encode(to_float(pixels))
        return torch.stack([posterior.mean, posterior.std], 1)

    @torch.no_grad()
    def run(self, function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        """`function` of tensors (N, ...), in batches on the autoencoder's device, which the processes share; the result
        (N, ...) on the CPU."""
        batches = [*zip(*(x.split(self.size) for x in rows), strict=True)]
        parts = map_over_processes(
            lambda batch: function(*(x.to(self.device) for x in batch)).cpu(), batches, "batches"
        )
        return torch.cat(parts)

    @cached_property
    def decoded(self) -> Tensor:
        """From the mean, uint8."""
        return self.run(lambda z: to_uint8(self.vae.decode_raw(z)), self.raw_mean)

    @cached_property
    def sampled(self) -> Tensor:
        """From one sample of the latent, that of image i with seed i; in [-1, 1]."""
        seeds = map(torch.Generator().manual_seed, range(len(self.pixels)))
        eps = torch.stack([torch.randn(self.mean.shape[1:], generator=seed) for seed in seeds])
        return self.run(self.vae.decode_raw, self.raw_mean + self.raw_std * eps)

    @property
    def codes(self) -> np.ndarray:
        """The means (N, C h w), averaged to 8x8 positions where there are more."""
        z = F.adaptive_avg_pool2d(self.mean, COARSE) if min(self.mean.shape[-2:]) > COARSE else self.mean
        return rearrange(z, "n c h w -> n (c h w)").double().numpy()

    def compare(self, metric: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """A metric (N,) of the images and what is decoded from the mean."""
        return self.run(lambda x, y: metric(to_float(x), to_float(y)), self.pixels, self.decoded)

    def nll(self, scale: float) -> Tensor:
        """Nats of the images around the decoded sample (N,)."""
        pairs = zip(self.pixels.split(16), self.sampled.split(16), strict=True)
        return torch.cat([reduce(discretized_logistic(*pair, scale), "b c h w -> b", "sum") for pair in pairs])

    def kl(self) -> Tensor:
        """KL of each posterior from the standard normal in nats, float64 (N, C, h, w); of the latents as diffusion sees
        them, whatever the autoencoder's own scale, so that the rates of several compare."""
        mean, variance = self.mean.double(), self.std.double().square()
        return 0.5 * (mean.square() + variance - 1 - variance.log())


def reconstruction_records(
    coded: Coded, decoded: Pictures, scale: float, network: nn.Module, name: str, teacher: str
) -> Iterator[Record]:
    """Fidelity from the mean of the latents, by `network` too, and bits from one sample of them."""
    smallest = getattr(network, "smallest", 0)
    perceptual = {"extractor": name, "extractor_sha256": module_hash(network)}
    perceptual |= {"resize": f"none; sides under {smallest} px doubled" if smallest else "none"}
    perceptual |= TAUGHT if name in teacher.split(", ") else {}
    distance = partial(perceptual_distance, network=network.to(coded.device))
    for metric, function in {"psnr_db": psnr, "ssim": ssim, "sharpness": sharpness}.items():
        yield mean_record(metric, coded.compare(function), decoded, latent="mean")
    yield mean_record("perceptual_distance", coded.compare(distance), decoded, latent="mean", **perceptual)
    nll, kl = coded.nll(scale), reduce(coded.kl(), "n c h w -> n", "sum")
    bits = bits_per_dimension(nll, kl, math.prod(coded.pixels.shape[1:]))
    yield mean_record("bits_per_dimension", bits, decoded, latent="one sample", assumes=ASSUMPTIONS, scale=scale)


def latent_record(coded: Coded) -> Record:
    """Each channel of the latents as diffusion sees it: mean, deviation, the posterior's share of the variance, KL."""
    z, noise, over = coded.mean.double(), coded.std.double().square().mean((0, 2, 3)), (0, 2, 3)
    variance = z.var(over)
    channels = torch.stack([z.mean(over), variance.sqrt(), noise / (noise + variance), coded.kl().mean(over)], 1)
    names = ("mean", "std", "noise_share", "kl_nats")
    value = [dict(zip(names, channel, strict=True)) for channel in channels.tolist()]
    return record("latent_channels", value, "latents", n=len(z))


def rate_record(coded: Coded) -> Record:
    """(bytes, PSNR) per image of latents in 8 bits, in 256 levels over four deviations to both sides, and of other
    codecs at several qualities."""
    pixels, step = coded.pixels[:CODED], 8 / 255
    levels = ((coded.mean[:CODED].clamp(-4, 4) + 4) / step).round() * step - 4
    decoded = to_float(to_uint8(coded.run(coded.vae.decode, levels)))
    point = float(math.prod(levels.shape[1:])), float(psnr(to_float(pixels), decoded).mean())
    value = {"latents, 8 bits": [point]} | {codec: curve(pixels, codec) for codec in CODECS}
    return record("rate_distortion", value, OF, n=len(pixels))


def emoji(dataset: Any, seed: int, coded: Callable[..., Coded]) -> Split:
    """Images of emoji, and what they are of."""
    rows = sample_indices(len(dataset), LABELLED, seed)
    return coded(dataset, rows).codes, np.array([[dataset.records[i][label] for label in EMOJI] for i in rows])


def scenes(size: int, seed: int, coded: Callable[..., Coded]) -> Split:
    """Images of shapes with one thing, and its factors."""
    images, labels = [], []
    for i in range(SCENES):
        scene = sample_scene(random.Random(f"{seed}/factors/{i}"), False, "single")
        (thing,) = scene.things
        position = [str(min(int(THIRDS * value), THIRDS - 1)) for value in (thing.x, thing.y)]
        labels.append([thing.colour, thing.shape, thing.size, *position])
        images.append({"image": rearrange(torch.from_numpy(render(scene, size)), "h w c -> c h w")})
    return coded(images, range(SCENES)).codes, np.array(labels)


def factor_records(codes: np.ndarray, labels: np.ndarray, seed: int) -> Iterator[Record]:
    """Those of labels, and how well single values of the latents follow single factors."""
    cut = len(codes) * 2 // 3
    yield from label_records((codes[:cut], labels[:cut]), (codes[cut:], labels[cut:]), FACTORS, seed)
    numbers = np.stack([np.unique(column, return_inverse=True)[1] for column in labels.T], 1)
    fields, options = {"n": len(codes), "factors": list(FACTORS)}, {"seed": seed, "few": True, **UNIT}
    gap, rows = lambda rows: mig(codes[rows], numbers[rows]), [torch.arange(len(codes))]
    yield resampled_record("mig", gap, rows, "latents", options, **fields)
    # without intervals, for which trees would have to grow anew many times
    yield from (record(f"dci_{key}", value, "latents", **fields) for key, value in dci(codes, numbers, seed).items())


def label_records(train: Split, test: Split, names: tuple[str, ...], seed: int) -> Iterator[Record]:
    """For each label: k-means of the test codes, and a linear probe from train to test. The intervals are for other
    test images and the same clusters and probe."""
    for i, name in enumerate(names):
        labels = test[1][:, i]
        counts = np.unique(labels, return_counts=True)[1]
        fields = {"label": name, "classes": len(counts), "n": len(labels)}
        code, rows = clusters(test[0], len(counts), seed), [torch.arange(len(labels))]
        for key in ("homogeneity", "completeness", "v_measure"):
            score = lambda r, k=key, y=labels, c=code: agreement(y[r], c[r])[k]  # noqa: E731
            yield resampled_record(key, score, rows, "latents", {"seed": seed, **UNIT}, **fields)
        probe = linear_probe(train[0], train[1][:, i], test[0], labels)
        interval = mean_interval(np.arange(len(labels)) < round(probe * len(labels)), seed)
        yield record("linear_probe", probe, "latents", interval, chance=float(counts.max() / counts.sum()), **fields)
