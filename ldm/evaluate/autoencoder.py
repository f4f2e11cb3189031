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

from ldm import model_io as weights
from ldm.config import UserError
from ldm.data import open_dataset
from ldm.data.faults import readable
from ldm.data.latents import data_hash
from ldm.distributed import find_device, processes
from ldm.evaluate.bench import Source, blank_record, left_out
from ldm.evaluate.coded import Coded, code, kl_nats
from ldm.evaluate.features import FeatureCache
from ldm.evaluate.latents import representation
from ldm.evaluate.model import FEWEST, LARGEST, SMALLEST, USUAL, check_numbers, judge_name, sample_indices, trained_on
from ldm.evaluate.pictures import claim
from ldm.evaluate.rates import beside_codecs, galleries, rates
from ldm.evaluate.records import Record, biases, frechet_records, mean_record, picture_records
from ldm.evaluate.report_autoencoder import write_autoencoder_report
from ldm.evaluate.report_html import line
from ldm.images import to_float
from ldm.metrics import bits_per_dimension, perceptual_distance, psnr, sharpness, ssim
from ldm.metrics.features import FeatureExtractor, feature_extractor, judged_by
from ldm.perceptual import perceptual_network
from ldm.vae import VAE

FITTED = 256  # training pictures that the likelihood's scale is fitted to
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


def evaluate_autoencoder(config: AutoencoderEvaluation, out: Path, device: str = "") -> list[str]:
    """Measures, and writes metrics.json and report.html into `out`. Gives the headline numbers, a line each.

    UserError for wrong settings or too few pictures; nothing is written then.
    """
    vae = VAE.from_pretrained(config.autoencoder).to(find_device(device))
    dataset, train = open_splits(config, vae)
    chosen, fitting = choose(config, dataset, train)
    distance = perceptual_network(config.perceptual).to(next(vae.parameters()).device)
    name = judged_by(config.features, judge_name("", config.data))
    extractor = None if name == "none" else feature_extractor(name)
    settings = settings_of(config, vae, dataset, len(chosen))
    claim(out, {key: settings[key] for key in ("autoencoder_sha256", "data_sha256", "split", "size", "seed")})
    scale = fit_scale(code(vae, train, fitting, config.batch_size, "fitting the likelihood", scales()))
    coded = code(vae, dataset, chosen, config.batch_size, "autoencoder", [scale])

    results = [*quality(coded, distance, config), *bits(coded, scale), *latent_records(coded), *failures(coded)]
    results += left_out(dataset, train)
    if extractor is not None:
        results += feature_records(coded, extractor, vae, config, out)
    rate, as_codes = rates(vae, coded, config.batch_size)
    results.append(rate)
    if find_spec("sklearn"):
        results += representation(vae, dataset, train, config.data, config.seed)
    else:
        warnings.warn(
            "what the latents say is left out: it needs scikit-learn (pip install scikit-learn)", stacklevel=2
        )
    if processes().is_main_process:
        shown = [*galleries(coded), beside_codecs(coded, as_codes)]
        weights.write_json(out / "metrics.json", {"format": FORMAT, "settings": settings, "results": results})
        write_autoencoder_report(out / "report.html", settings, results, shown)
    return [
        f"PSNR: {results[0]['value']:.2f} dB, SSIM: {results[1]['value']:.4f} (N={len(chosen)})",
        *(line(r) for r in results if r["metric"] in HEADLINES),
        *biases(results),
    ]


def open_splits(config: AutoencoderEvaluation, vae: VAE) -> tuple[Any, Any]:
    """The held-out split and the training split (UserError)."""
    check_numbers(config.batch_size, config.seed)
    if config.split not in ("test", "val"):
        raise UserError(f"split {config.split!r} cannot be evaluated on: held-out pictures are in 'test' or 'val'")
    size = config.size or vae.config.sample_size
    if not SMALLEST <= size <= LARGEST or size % vae.factor:
        raise UserError(
            f"pictures of {size} px cannot be measured: --size is {SMALLEST} to {LARGEST} px, a multiple of"
            f" {vae.factor}"
        )
    data = trained_on(config.autoencoder, config.data, config.data_path, size)
    dataset, train = (open_dataset(data, split, need_captions=False) for split in (config.split, "train"))
    return dataset, train


def choose(config: AutoencoderEvaluation, dataset: Any, train: Any) -> tuple[list[int], list[int]]:
    """Which held-out pictures are measured, and on which training pictures the likelihood's scale is fitted: those that
    can be read, and each once (UserError where they are too few)."""
    num = config.num or min(USUAL, len(dataset))
    if not FEWEST <= num <= len(dataset):
        have = f"split {config.split!r} of {config.data} has {len(dataset)}"
        raise UserError(f"--num {num} is not possible: {have}, and {FEWEST} or more are needed")
    chosen = readable(dataset, sample_indices(len(dataset), num, config.seed))
    fitting = readable(train, sample_indices(len(train), min(FITTED, len(train)), config.seed))
    if len(chosen) < FEWEST or not fitting:
        raise UserError(f"only {len(chosen)} held-out pictures can be read; {FEWEST} or more are needed")
    return chosen, fitting


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


def fit_scale(coded: Coded) -> float:
    """The scale of the likelihood with the least bits on (training) pictures: fixed before held-out ones are seen."""
    return min(coded.nll, key=lambda scale: float(coded.nll[scale].mean()))


def quality(coded: Coded, distance: torch.nn.Module, config: AutoencoderEvaluation) -> Iterator[Record]:
    """How near the reconstructions are, through the mean of the latent."""
    found: dict[str, list[Tensor]] = {"psnr_db": [], "ssim": [], "sharpness": [], "perceptual_distance": []}
    device = next(distance.buffers()).device
    for a, b in zip(coded.pixels.split(config.batch_size), coded.decoded.split(config.batch_size), strict=True):
        x, y = to_float(a).to(device), to_float(b).to(device)
        found["psnr_db"].append(psnr(x, y).cpu())
        found["ssim"].append(ssim(x, y).cpu())
        found["sharpness"].append(sharpness(x, y).cpu())
        found["perceptual_distance"].append(perceptual_distance(x, y, distance).cpu())
    resize = f"none; sides under {distance.smallest} px doubled" if getattr(distance, "smallest", 0) else "none"
    network = {"extractor": config.perceptual, "extractor_sha256": weights.module_hash(distance), "resize": resize}
    for metric, values in found.items():
        about = network if metric == "perceptual_distance" else {}
        yield mean_record(metric, "reconstructions", torch.cat(values), latent="mean", **about)


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


def failures(coded: Coded) -> list[Record]:
    """How many pictures are one plain colour, and how many reconstructions."""
    sources = (("real held-out", coded.pixels), ("reconstructions", coded.decoded))
    return [blank_record(Source(of=of, count=len(x), get=x.__getitem__), len(x)) for of, x in sources]
