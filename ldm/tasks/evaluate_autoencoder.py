"""Measuring an autoencoder alone: what it keeps of held-out pictures, in how many bits, and what its latents say."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from einops import reduce
from torch import Tensor
from tqdm import tqdm

from ldm import weights
from ldm.cli import find_device
from ldm.config import UserError
from ldm.data import open_dataset, to_float, to_uint8
from ldm.data.latents import data_hash
from ldm.images import to_pil
from ldm.metrics import bits_per_dimension, perceptual_distance, psnr, ssim
from ldm.metrics.codecs import CODECS, curve
from ldm.metrics.features import FeatureExtractor, feature_extractor
from ldm.metrics.reconstruction import discretized_logistic
from ldm.metrics.records import Record, frechet_records, mean_record, picture_records
from ldm.metrics.report_autoencoder import write_autoencoder_report
from ldm.metrics.report_html import Gallery, Row
from ldm.perceptual import perceptual_network
from ldm.task import processes
from ldm.tasks.evaluate import FEWEST, SMALLEST, USUAL, check_numbers, sample_indices, trained_on
from ldm.tasks.evaluate_features import FeatureCache
from ldm.tasks.evaluate_latents import representation
from ldm.tasks.evaluate_pictures import claim
from ldm.vae import VAE

FITTED = 256  # training pictures that the likelihood's scale is fitted to
CODED = 128  # pictures through the other codecs
WORST = 12  # pictures in the report
FORMAT = "ldm-autoencoder-evaluation-1"


@dataclass(frozen=True, kw_only=True)
class AutoencoderEvaluation:
    """What is measured, and how."""

    autoencoder: str  # a shipped model's name, a run folder, a Stable Diffusion folder, or a VAE's
    data: str
    data_path: str = ""
    split: str = "test"
    num: int = 0  # held-out pictures; 0: USUAL, or all where there are fewer
    seed: int = 0
    batch_size: int = 32
    size: int = 0  # side of the pictures in pixels; 0: the autoencoder's own
    features: str = "effnet-lite0"
    perceptual: str = "effnet-lite0"


@dataclass(frozen=True, kw_only=True)
class Coded:
    """What an autoencoder makes of uint8 pictures (N, 3, H, W)."""

    pixels: Tensor
    mean: Tensor  # of the normalized latents (N, C, h, w)
    std: Tensor
    decoded: Tensor  # uint8, from the mean
    sampled: Tensor  # uint8, from one sample, of the first CODED
    nll: dict[float, Tensor]  # of pictures in nats (N,), around the decoded sample, by the likelihood's scale


def evaluate_autoencoder(config: AutoencoderEvaluation, out: Path, device: str = "") -> list[str]:
    """Measures, and writes metrics.json and report.html into `out`. Gives the headline numbers, a line each.

    UserError for wrong settings or too few pictures; nothing is written then.
    """
    vae = VAE.from_pretrained(config.autoencoder).to(find_device(device))
    dataset, train, num = open_splits(config, vae)
    distance = perceptual_network(config.perceptual).to(next(vae.parameters()).device)
    name = f"judge:{config.data}" if config.features == "judge" else config.features
    extractor = None if name == "none" else feature_extractor(name)
    settings = settings_of(config, vae, dataset, num)
    claim(out, {key: settings[key] for key in ("autoencoder_sha256", "data_sha256", "split", "size", "seed")})
    fitting = sample_indices(len(train), min(FITTED, len(train)), config.seed)
    scale = fit_scale(code(vae, train, fitting, config, "fitting the likelihood", scales()))
    coded = code(vae, dataset, sample_indices(len(dataset), num, config.seed), config, "autoencoder", [scale])

    results = [*quality(coded, distance, config), *bits(coded, scale), *latent_records(coded)]
    if extractor is not None:
        results += feature_records(coded, extractor, vae, config, out)
    results.append(rates(vae, coded, config.batch_size))
    if find_spec("sklearn"):
        results += representation(vae, dataset, train, config.data, config.seed)
    else:
        warnings.warn(
            "what the latents say is left out: it needs scikit-learn (pip install scikit-learn)", stacklevel=2
        )
    if processes().is_main_process:
        weights.write_json(out / "metrics.json", {"format": FORMAT, "settings": settings, "results": results})
        write_autoencoder_report(out / "report.html", settings, results, galleries(coded))
    return [
        f"PSNR: {results[0]['value']:.2f} dB, SSIM: {results[1]['value']:.4f} (N={num})",
        *(f"{r['metric']}: {r['value']:.4g}" for r in results if r["metric"] in HEADLINES),
    ]


def open_splits(config: AutoencoderEvaluation, vae: VAE) -> tuple[Any, Any, int]:
    """The held-out split, the training split and how many pictures are measured (UserError)."""
    check_numbers(config.batch_size, config.seed)
    if config.split not in ("test", "val"):
        raise UserError(f"split {config.split!r} cannot be evaluated on: held-out pictures are in 'test' or 'val'")
    size = config.size or vae.config.sample_size
    if size < SMALLEST or size % vae.factor:
        raise UserError(
            f"pictures of {size} px cannot be measured: --size is {SMALLEST} px or more, a multiple of {vae.factor}"
        )
    data = trained_on(config.autoencoder, config.data, config.data_path, size)
    dataset, train = (open_dataset(data, split, need_captions=False) for split in (config.split, "train"))
    num = config.num or min(USUAL, len(dataset))
    if not FEWEST <= num <= len(dataset):
        have = f"split {config.split!r} of {config.data} has {len(dataset)}"
        raise UserError(f"--num {num} is not possible: {have}, and {FEWEST} or more are needed")
    return dataset, train, num


def feature_records(
    coded: Coded, extractor: FeatureExtractor, vae: VAE, config: AutoencoderEvaluation, out: Path
) -> list[Record]:
    """Distances between the pictures and their reconstructions."""
    device, size = next(vae.parameters()).device, config.batch_size
    cache = FeatureCache(out / "features", extractor.name, extractor.sha256, extractor.to(device), device)
    batches = -(-len(coded.pixels) // size)
    sets = (pictures.split(size) for pictures in (coded.pixels, coded.decoded))
    real, fake = (cache(parts.__getitem__, batches, "features") for parts in sets)
    about = (fake, real, "reconstructions", extractor.about, config.seed)
    return [*frechet_records(*about), *picture_records(*about)]


HEADLINES = ("perceptual_distance", "frechet_distance", "bits_per_dimension")


def settings_of(config: AutoencoderEvaluation, vae: VAE, dataset: Any, num: int) -> dict[str, Any]:
    """What the numbers depend on, ready for JSON."""
    size = config.size or vae.config.sample_size
    latent = [vae.config.latent_channels, *[size // vae.factor] * 2]
    return {
        "autoencoder": config.autoencoder,
        "autoencoder_sha256": weights.module_hash(vae),
        "parameters": {"vae": sum(p.numel() for p in vae.parameters())},
        "data": config.data,
        "data_sha256": data_hash(dataset),
        "split": config.split,
        "num": num,
        "size": size,
        "latent": "x".join(map(str, latent)),
        "seed": config.seed,
    }


def scales() -> list[float]:
    """Scales of the likelihood that are tried, in pixels of [-1, 1]."""
    return torch.logspace(-3.5, -0.5, 25).tolist()


@torch.no_grad()
def code(
    vae: VAE, dataset: Any, indices: list[int], config: AutoencoderEvaluation, text: str, tried: list[float]
) -> Coded:
    """Pictures through the autoencoder, with one sample of each latent, whose seed is the place in `indices`."""
    device = next(vae.parameters()).device
    parts: dict[str, list[Tensor]] = {key: [] for key in ("pixels", "mean", "std", "decoded", "sampled")}
    nll: dict[float, list[Tensor]] = {scale: [] for scale in tried}
    for start in tqdm(range(0, len(indices), config.batch_size), desc=text, unit="batch", leave=False):
        pixels = torch.stack([dataset[i]["image"] for i in indices[start : start + config.batch_size]])
        posterior = vae.encode(to_float(pixels).to(device))
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(pixels))]
        eps = torch.stack([torch.randn(posterior.mean.shape[1:], generator=g) for g in generators])
        sampled = vae.decode_raw(posterior.mean + posterior.std * eps.to(device)).cpu()
        for scale in tried:
            each = discretized_logistic(pixels, sampled, scale)
            nll[scale].append(reduce(each, "b c h w -> b", "sum"))
        decoded = vae.decode_raw(posterior.mean).cpu()
        mean, std = vae.normalize(posterior.mean).cpu(), (posterior.std * vae.config.scaling_factor).cpu()
        found = (pixels, mean, std, to_uint8(decoded), to_uint8(sampled)[: max(CODED - start, 0)])
        for key, value in zip(parts, found, strict=True):
            parts[key].append(value)
    joined = {key: torch.cat(values) for key, values in parts.items()}
    return Coded(**joined, nll={scale: torch.cat(values) for scale, values in nll.items()})


def fit_scale(coded: Coded) -> float:
    """The scale of the likelihood with the least bits on (training) pictures: fixed before held-out ones are seen."""
    return min(coded.nll, key=lambda scale: float(coded.nll[scale].mean()))


def quality(coded: Coded, distance: torch.nn.Module, config: AutoencoderEvaluation) -> Iterator[Record]:
    """How near the reconstructions are, through the mean of the latent."""
    found: dict[str, list[Tensor]] = {"psnr_db": [], "ssim": [], "perceptual_distance": []}
    device = next(distance.buffers()).device
    for a, b in zip(coded.pixels.split(config.batch_size), coded.decoded.split(config.batch_size), strict=True):
        x, y = to_float(a).to(device), to_float(b).to(device)
        found["psnr_db"].append(psnr(x, y).cpu())
        found["ssim"].append(ssim(x, y).cpu())
        found["perceptual_distance"].append(perceptual_distance(x, y, distance).cpu())
    for metric, values in found.items():
        about = {"network": config.perceptual} if metric == "perceptual_distance" else {}
        yield mean_record(metric, "reconstructions", torch.cat(values), latent="mean", **about)


def kl_nats(coded: Coded) -> Tensor:
    """KL of each normalized latent's posterior from the standard normal, in nats, (N, C, h, w) float64.

    Normalized as diffusion sees it: that prior has the training set's own mean and deviation, whatever an
    autoencoder's scale, so that the rates of several compare.
    """
    mean, variance = coded.mean.double(), coded.std.double().square()
    return 0.5 * (mean.square() + variance - 1 - variance.log())


def bits(coded: Coded, scale: float) -> list[Record]:
    """The negative evidence lower bound, and its two parts."""
    dimensions = math.prod(coded.pixels.shape[1:])
    kl = reduce(kl_nats(coded), "n c h w -> n", "sum")
    nll = coded.nll[scale]
    assumes = "discretized logistic around the decoded sample; standard normal prior of the normalized latent; scale"
    assumes += " fitted to training pictures"
    about = {"assumes": assumes, "scale": scale, "latent": "one sample"}
    return [
        mean_record("bits_per_dimension", "reconstructions", bits_per_dimension(nll, kl, dimensions), **about),
        mean_record("bits_of_latent", "reconstructions", bits_per_dimension(0 * nll, kl, dimensions), **about),
        mean_record("bits_of_rest", "reconstructions", bits_per_dimension(nll, 0 * kl, dimensions), **about),
    ]


def latent_records(coded: Coded) -> list[Record]:
    """Each channel of the latents: mean and deviation as diffusion sees them, the posterior's share, and KL."""
    kl = reduce(kl_nats(coded), "n c h w -> c", "mean")
    rows = []
    for channel in range(coded.mean.shape[1]):
        values, noise = coded.mean[:, channel].double(), coded.std[:, channel].double()
        share = float(noise.square().mean() / (noise.square().mean() + values.var()))
        row = {"mean": float(values.mean()), "std": float(values.std()), "noise_share": share}
        rows.append(row | {"kl_nats": float(kl[channel])})
    return [{"metric": "latent_channels", "of": "latents", "value": rows, "n": len(coded.mean)}]


@torch.no_grad()
def rates(vae: VAE, coded: Coded, batch_size: int) -> Record:
    """Bytes and PSNR a picture of this autoencoder, with its latents in 8 bits and at the rate of the KL (which
    bits-back coding would reach), and of JPEG and WebP."""
    some = coded.pixels[:CODED]
    device = next(vae.parameters()).device
    z = coded.mean[:CODED]
    step = 8 / 255  # 256 levels over four deviations to both sides
    levels = ((z.clamp(-4, 4) + 4) / step).round() * step - 4
    decoded = torch.cat([vae.decode(part.to(device)).cpu() for part in levels.split(batch_size)])
    kl_bytes = reduce(kl_nats(coded)[:CODED], "n c h w -> n", "sum").mean() / math.log(2) / 8
    at_kl = psnr(to_float(some), to_float(coded.sampled)).mean()
    at_8_bits = psnr(to_float(some), to_float(to_uint8(decoded))).mean()
    ours = [(float(math.prod(z.shape[1:])), float(at_8_bits)), (float(kl_bytes), float(at_kl))]
    value = {"latents, 8 bits": [ours[0]], "latents, KL": [ours[1]]} | {codec: curve(some, codec) for codec in CODECS}
    return {"metric": "rate_distortion", "of": "reconstructions", "value": value, "n": len(some)}


def galleries(coded: Coded) -> list[Gallery]:
    """Reconstructions, and those that are furthest off."""
    levels = psnr(to_float(coded.pixels), to_float(coded.decoded))
    titles = (
        ("Reconstructions", "Held-out pictures, and what is decoded from the mean of the latent.", range(2 * WORST)),
        ("Furthest off", "The pictures with the lowest PSNR.", levels.argsort()[:WORST].tolist()),
    )
    found = []
    for title, about, chosen in titles:
        rows = []
        for i in list(chosen)[: len(coded.pixels)]:
            pair = to_pil(to_float(torch.stack([coded.pixels[i], coded.decoded[i]])))
            pictures = list(zip(("real", "decoded"), pair, strict=True))
            rows.append(Row(caption="", pictures=pictures, note=f"{levels[i]:.1f} dB"))
        found.append(Gallery(title=title, about=about, rows=rows))
    return found
