"""Measuring an autoencoder alone: what it keeps of held-out images, in how many bits, and what its latents hold."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from einops import reduce, repeat
from torch import Tensor
from tqdm import tqdm

from ldm import model_io
from ldm.config import UserError
from ldm.data import open_dataset
from ldm.data.faults import readable
from ldm.data.latents import data_hash
from ldm.distributed import find_device, processes
from ldm.evaluate.config import LARGEST, SMALLEST, AutoencoderEvaluation
from ldm.evaluate.features import Features
from ldm.evaluate.gallery import Row
from ldm.evaluate.latents import representation
from ldm.evaluate.pictures import Pictures, claim
from ldm.evaluate.records import Record, biases, frechet_records, headline, left_out, mean_record, picture_records
from ldm.evaluate.report import check_installed, write_report
from ldm.evaluate.samples import data_config, held_out_indices, judge_name, open_extractor, sample_indices
from ldm.images import to_float, to_uint8
from ldm.metrics import bits_per_dimension, perceptual_distance, psnr, sharpness, ssim
from ldm.metrics.codecs import CODECS, curve, nearest_to
from ldm.metrics.reconstruction import discretized_logistic
from ldm.perceptual import PerceptualDistance, perceptual_network
from ldm.vae import VAE

FORMAT = "ldm-autoencoder-evaluation-1"
FITTED = 256  # training images to which the scale of the likelihood is fitted
CODED = 128  # images through other codecs
SHOWN = 12  # rows of a gallery
HEADLINES = ("perceptual_distance", "frechet_distance", "bits_per_dimension")
ASSUMPTIONS = (
    "discretized logistic around the decoded sample; standard normal prior of the normalized latent; scale fitted to"
    " training pictures"
)


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
        return reduce(discretized_logistic(self.pixels, self.sampled, scale), "b c h w -> b", "sum")

    def kl(self) -> Tensor:
        """KL of each posterior from the standard normal in nats, float64 (N, C, h, w); of the latents as diffusion sees
        them, whatever the autoencoder's own scale, so that the rates of several compare."""
        mean, variance = self.mean.double(), self.std.double().square()
        return 0.5 * (mean.square() + variance - 1 - variance.log())


def evaluate_autoencoder(config: AutoencoderEvaluation) -> list[str]:
    """Measures, and writes metrics.json and report.html into `config.out`. Returns the headline numbers, one per line.

    Raises UserError for wrong settings or too few images; nothing is written then.
    """
    check_installed()
    device = find_device(config.device)
    vae = VAE.from_pretrained(config.autoencoder).to(device)
    size = config.size or vae.config.sample_size
    if not SMALLEST <= size <= LARGEST or size % vae.factor:
        allowed = f"--size is {SMALLEST} to {LARGEST} px, a multiple of {vae.factor}"
        raise UserError(f"pictures of {size} px cannot be measured: {allowed}")
    data = data_config(config.autoencoder, config.data, config.data_path, size)
    dataset, train = (open_dataset(data, split, need_captions=False) for split in (config.split, "train"))
    indices = held_out_indices(dataset, config)
    fitted = readable(train, sample_indices(len(train), min(FITTED, len(train)), config.seed))
    distance = perceptual_network(config.perceptual).to(device)
    extractor = open_extractor(config.features, judge_name("", config.data))
    settings = {
        "autoencoder": config.autoencoder,
        "autoencoder_sha256": model_io.module_hash(vae),
        "parameters": {"vae": sum(p.numel() for p in vae.parameters())},
        "data": config.data,
        "data_sha256": data_hash(dataset),
        "split": config.split,
        "num": len(indices),
        "size": size,
        "latent": f"{vae.config.latent_channels}x{size // vae.factor}x{size // vae.factor}",
        "seed": config.seed,
    }
    claim(config.out, {key: settings[key] for key in ("autoencoder_sha256", "data_sha256", "split", "size", "seed")})
    scale = fit_scale(code(vae, train, fitted, config.batch_size, "fitting the likelihood"))
    coded = code(vae, dataset, indices, config.batch_size, "autoencoder")

    results = [*quality(coded, distance, config), *bits(coded, scale), latent_record(coded)]
    real, decoded = (
        Pictures(of=of, count=len(x), read=x.__getitem__)
        for of, x in (("real held-out", coded.pixels), ("reconstructions", coded.decoded))
    )
    results += [
        real.blank_record(config.batch_size),
        decoded.blank_record(config.batch_size),
        *left_out(dataset, train),
    ]
    if extractor:
        features = Features(config.out / "features", extractor, device, config.batch_size)
        for compute in (frechet_records, picture_records):
            results += compute(features(decoded), features(real), decoded.of, extractor.about, config.seed)
    as_bytes = decode_bytes(vae, coded, config.batch_size)
    results.append(rates(coded, as_bytes))
    if find_spec("sklearn"):
        results += representation(vae, dataset, train, config.data, config.seed)
    else:
        warnings.warn(
            "probes of the latents are left out: they need scikit-learn (pip install scikit-learn)", stacklevel=2
        )
    if processes().is_main_process:
        model_io.write_json(config.out / "metrics.json", {"format": FORMAT, "settings": settings, "results": results})
        write_report("autoencoder", config.out, settings, results, galleries(coded, as_bytes))
    level, similarity, *_ = results
    first = f"PSNR: {level['value']:.2f} dB, SSIM: {similarity['value']:.4f} (N={len(indices)})"
    return [first, *(headline(r) for r in results if r["metric"] in HEADLINES), *biases(results)]


@torch.no_grad()
def code(vae: VAE, dataset: Any, indices: list[int], batch_size: int, text: str) -> Coded:
    """Images through the autoencoder; the sample of latent i of `indices` has the seed i."""
    device, parts = next(vae.parameters()).device, []
    for start in tqdm(range(0, len(indices), batch_size), desc=text, unit="batch", leave=False):
        pixels = torch.stack([dataset[i]["image"] for i in indices[start : start + batch_size]])
        posterior = vae.encode(to_float(pixels).to(device))
        seeds = (torch.Generator().manual_seed(start + i) for i in range(len(pixels)))
        eps = torch.stack([torch.randn(posterior.mean.shape[1:], generator=seed) for seed in seeds]).to(device)
        sampled, decoded = vae.decode_raw(posterior.mean + posterior.std * eps), vae.decode_raw(posterior.mean)
        std = posterior.std * vae.config.scaling_factor
        parts.append((pixels, vae.normalize(posterior.mean).cpu(), std.cpu(), to_uint8(decoded).cpu(), sampled.cpu()))
    pixels, mean, std, decoded, sampled = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Coded(pixels=pixels, mean=mean, std=std, decoded=decoded, sampled=sampled)


def scales() -> list[float]:
    """Scales of the likelihood that are tried, in pixels of [-1, 1]."""
    return torch.logspace(-3.5, -0.5, 25).tolist()


def fit_scale(coded: Coded) -> float:
    """The scale of the likelihood with the fewest bits on training images: fixed before held-out ones are seen."""
    return min(scales(), key=lambda scale: float(coded.nll(scale).mean()))


def quality(coded: Coded, network: PerceptualDistance, config: AutoencoderEvaluation) -> Iterator[Record]:
    """How near reconstructions from the mean of the latent are."""
    device, parts = next(network.buffers()).device, []
    for pixels, decoded in zip(
        coded.pixels.split(config.batch_size), coded.decoded.split(config.batch_size), strict=True
    ):
        x, y = to_float(pixels).to(device), to_float(decoded).to(device)
        parts.append((psnr(x, y), ssim(x, y), sharpness(x, y), perceptual_distance(x, y, network)))
    smallest = getattr(network, "smallest", 0)
    fields = {"extractor": config.perceptual, "extractor_sha256": model_io.module_hash(network)}
    fields["resize"] = f"none; sides under {smallest} px doubled" if smallest else "none"
    metrics = ("psnr_db", "ssim", "sharpness", "perceptual_distance")
    for metric, values in zip(metrics, zip(*parts, strict=True), strict=True):
        extra = fields if metric == "perceptual_distance" else {}
        yield mean_record(metric, "reconstructions", torch.cat(values).cpu(), latent="mean", **extra)


def bits(coded: Coded, scale: float) -> Iterator[Record]:
    """The negative evidence lower bound in bits per dimension, and its two parts."""
    nll, kl = coded.nll(scale), reduce(coded.kl(), "n c h w -> n", "sum")
    dimensions = math.prod(coded.pixels.shape[1:])
    fields = {"assumes": ASSUMPTIONS, "scale": scale, "latent": "one sample"}
    parts = {"bits_per_dimension": (nll, kl), "bits_of_latent": (0 * nll, kl), "bits_of_rest": (nll, 0 * kl)}
    for metric, pair in parts.items():
        yield mean_record(metric, "reconstructions", bits_per_dimension(*pair, dimensions), **fields)


def latent_record(coded: Coded) -> Record:
    """Each channel of the latents as diffusion sees it: mean, deviation, the posterior's share of the variance, KL."""
    rows = []
    for z, std, kl in zip(*(x.double().transpose(0, 1) for x in (coded.mean, coded.std, coded.kl())), strict=True):
        noise, variance = std.square().mean(), z.var()
        row = {"mean": z.mean(), "std": z.std(), "noise_share": noise / (noise + variance), "kl_nats": kl.mean()}
        rows.append({key: float(value) for key, value in row.items()})
    return {"metric": "latent_channels", "of": "latents", "value": rows, "n": len(coded.mean)}


@torch.no_grad()
def decode_bytes(vae: VAE, coded: Coded, batch_size: int) -> Tensor:
    """The first CODED images decoded from latents in 8 bits, 256 levels over four deviations to both sides; uint8."""
    step = 8 / 255
    z = ((coded.mean[:CODED].clamp(-4, 4) + 4) / step).round() * step - 4
    device = next(vae.parameters()).device
    return torch.cat([to_uint8(vae.decode(part.to(device))).cpu() for part in z.split(batch_size)])


def rates(coded: Coded, as_bytes: Tensor) -> Record:
    """Bytes and PSNR per image, with the latents in 8 bits, at the rate of their KL (which bits-back coding reaches), and
    of JPEG and WebP."""
    pixels = coded.pixels[:CODED]
    x, sampled = to_float(pixels), to_float(to_uint8(coded.sampled[:CODED]))
    nats = reduce(coded.kl()[:CODED], "n c h w -> n", "sum").mean()
    value = {
        "latents, 8 bits": [(float(math.prod(coded.mean.shape[1:])), float(psnr(x, to_float(as_bytes)).mean()))],
        "latents, KL": [(float(nats / math.log(2) / 8), float(psnr(x, sampled).mean()))],
        **{codec: curve(pixels, codec) for codec in CODECS},
    }
    return {"metric": "rate_distortion", "of": "reconstructions", "value": value, "n": len(pixels)}


def galleries(coded: Coded, as_bytes: Tensor) -> dict[str, list[Row]]:
    """Reconstructions, those with the lowest PSNR, and images beside other codecs at as many bytes."""
    levels = psnr(to_float(coded.pixels), to_float(coded.decoded))

    def row(i: int) -> Row:
        return Row(pictures=[("real", coded.pixels[i]), ("decoded", coded.decoded[i])], note=f"{levels[i]:.1f} dB")

    reconstructions = [row(i) for i in range(min(2 * SHOWN, len(coded.pixels)))]
    worst = [row(i) for i in levels.argsort()[:SHOWN].tolist()]
    size, rows = math.prod(coded.mean.shape[1:]), []
    for x, y in zip(coded.pixels[:SHOWN], as_bytes, strict=False):
        pictures = [("real", x), (f"latents, {size} B", y)]
        for codec in CODECS:
            used, decoded = nearest_to(x, codec, size)
            pictures.append((f"{codec}, {used} B", decoded))
        others = torch.stack([to_float(picture) for _, picture in pictures[1:]])
        near = psnr(repeat(to_float(x), "c h w -> n c h w", n=len(others)), others)
        rows.append(Row(pictures=pictures, note=f"{', '.join(f'{level:.1f}' for level in near.tolist())} dB"))
    return {"reconstructions": reconstructions, "worst": worst, "codecs": rows}
