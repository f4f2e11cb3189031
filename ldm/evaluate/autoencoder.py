"""Measuring an autoencoder alone: what it keeps of held-out images, in how many bits, and what its latents hold."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor
from tqdm import tqdm

from ldm.config import UserError
from ldm.data import open_dataset
from ldm.data.faults import readable
from ldm.data.latents import data_hash
from ldm.distributed import find_device, processes
from ldm.evaluate.config import LARGEST, SMALLEST, AutoencoderEvaluation
from ldm.evaluate.features import Features
from ldm.evaluate.latents import representation
from ldm.evaluate.pictures import Pictures, claim
from ldm.evaluate.records import Record, biases, distance_records, headline, left_out, mean_record
from ldm.evaluate.report import Row, check_installed, write_results
from ldm.evaluate.samples import data_config, held_out_indices, judge_name, open_extractor, sample_indices
from ldm.images import to_float, to_uint8
from ldm.metrics import bits_per_dimension, perceptual_distance, psnr, sharpness, ssim
from ldm.metrics.codecs import CODECS, curve, nearest_to
from ldm.metrics.reconstruction import discretized_logistic
from ldm.model_io import module_hash
from ldm.perceptual import PerceptualDistance, perceptual_network
from ldm.vae import VAE

FITTED = 256  # training images to which the scale of the likelihood is fitted
SCALES = torch.logspace(-3.5, -0.5, 25).tolist()  # of the likelihood that are tried, in pixels of [-1, 1]
CODED = 128  # images through other codecs
SHOWN = 12  # rows of a gallery
HEADLINES = ("perceptual_distance", "frechet_distance", "bits_per_dimension")
ASSUMPTIONS = (
    "discretized logistic around the decoded sample; standard normal prior of the normalized latent; scale fitted to"
    " training pictures"
)


def evaluate_autoencoder(config: AutoencoderEvaluation) -> list[str]:
    """Measures, and writes metrics.json and report.html into `config.out`. Returns the headline numbers, one per line.

    Raises UserError for wrong settings or too few images; nothing is written then.
    """
    check_installed()
    device, batch_size = find_device(config.device), config.batch_size
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
    side = size // vae.factor
    settings = {
        "autoencoder": config.autoencoder,
        "autoencoder_sha256": module_hash(vae),
        "parameters": {"vae": sum(p.numel() for p in vae.parameters())},
        "data": config.data,
        "data_sha256": data_hash(dataset),
        "split": config.split,
        "num": len(indices),
        "size": size,
        "latent": f"{vae.config.latent_channels}x{side}x{side}",
        "seed": config.seed,
    }
    claim(config.out, {key: settings[key] for key in ("autoencoder_sha256", "data_sha256", "split", "size", "seed")})
    training = code(vae, train, fitted, batch_size, "fitting the likelihood")
    scale = min(SCALES, key=lambda scale: float(training.nll(scale).mean()))  # before held-out images are seen
    coded = code(vae, dataset, indices, batch_size, "autoencoder")

    results = [*quality(coded, distance, config.perceptual, batch_size), *bits(coded, scale), latent_record(coded)]
    real, decoded = (
        Pictures(of=of, count=len(x), read=x.__getitem__)
        for of, x in (("real held-out", coded.pixels), ("reconstructions", coded.decoded))
    )
    results += [real.blank_record(batch_size), decoded.blank_record(batch_size), *left_out(dataset, train)]
    if extractor:
        features = Features(config.out / "features", extractor, device, batch_size)
        results += distance_records(features, decoded, real, config.seed)
    compressed = decode_8_bits(vae, coded.mean[:CODED], batch_size)
    results.append(rates(coded, compressed))
    if find_spec("sklearn"):
        results += representation(vae, dataset, train, config.data, config.seed)
    else:
        warnings.warn(
            "probes of the latents need scikit-learn and are left out: pip install scikit-learn", stacklevel=2
        )
    if processes().is_main_process:
        write_results("autoencoder", config.out, settings, results, galleries(coded, compressed))
    level, similarity = results[:2]
    first = f"PSNR: {level['value']:.2f} dB, SSIM: {similarity['value']:.4f} (N={len(indices)})"
    return [first, *(headline(r) for r in results if r["metric"] in HEADLINES), *biases(results)]


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
        parts.append([x.cpu() for x in (pixels, vae.normalize(posterior.mean), std, to_uint8(decoded), sampled)])
    pixels, mean, std, decoded, sampled = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Coded(pixels=pixels, mean=mean, std=std, decoded=decoded, sampled=sampled)


def quality(coded: Coded, network: PerceptualDistance, name: str, batch_size: int) -> Iterator[Record]:
    """How near reconstructions from the mean of the latent are."""
    device, parts = next(network.buffers()).device, []
    for pair in zip(coded.pixels.split(batch_size), coded.decoded.split(batch_size), strict=True):
        x, y = (to_float(pixels).to(device) for pixels in pair)
        parts.append((psnr(x, y), ssim(x, y), sharpness(x, y), perceptual_distance(x, y, network)))
    smallest = getattr(network, "smallest", 0)
    resize = f"none; sides under {smallest} px doubled" if smallest else "none"
    of_network = {"extractor": name, "extractor_sha256": module_hash(network), "resize": resize}
    metrics = {"psnr_db": {}, "ssim": {}, "sharpness": {}, "perceptual_distance": of_network}
    for (metric, fields), values in zip(metrics.items(), zip(*parts, strict=True), strict=True):
        yield mean_record(metric, "reconstructions", torch.cat(values).cpu(), latent="mean", **fields)


def bits(coded: Coded, scale: float) -> Iterator[Record]:
    """The negative evidence lower bound in bits per dimension, and its two parts."""
    nll, kl = coded.nll(scale), reduce(coded.kl(), "n c h w -> n", "sum")
    parts = {"bits_per_dimension": (nll, kl), "bits_of_latent": (0 * nll, kl), "bits_of_rest": (nll, 0 * kl)}
    for metric, pair in parts.items():
        values = bits_per_dimension(*pair, math.prod(coded.pixels.shape[1:]))
        yield mean_record(metric, "reconstructions", values, assumes=ASSUMPTIONS, scale=scale, latent="one sample")


def latent_record(coded: Coded) -> Record:
    """Each channel of the latents as diffusion sees it: mean, deviation, the posterior's share of the variance, KL."""
    rows = []
    for z, std, kl in zip(
        *(rearrange(x.double(), "n c h w -> c n h w") for x in (coded.mean, coded.std, coded.kl())), strict=True
    ):
        noise = std.square().mean()
        row = {"mean": z.mean(), "std": z.std(), "noise_share": noise / (noise + z.var()), "kl_nats": kl.mean()}
        rows.append({key: float(value) for key, value in row.items()})
    return {"metric": "latent_channels", "of": "latents", "value": rows, "n": len(coded.mean)}


@torch.no_grad()
def decode_8_bits(vae: VAE, z: Tensor, batch_size: int) -> Tensor:
    """uint8 images decoded from latents in 256 levels over four deviations to both sides."""
    step, device = 8 / 255, next(vae.parameters()).device
    levels = ((z.clamp(-4, 4) + 4) / step).round() * step - 4
    return torch.cat([to_uint8(vae.decode(part.to(device))).cpu() for part in levels.split(batch_size)])


def rates(coded: Coded, compressed: Tensor) -> Record:
    """(bytes, PSNR) per image of latents in 8 bits, of latents at the rate of their KL, which bits-back coding reaches,
    and of other codecs at several qualities."""
    pixels, nats = coded.pixels[:CODED], reduce(coded.kl()[:CODED], "n c h w -> n", "sum").mean()
    decoded = (to_float(compressed), to_float(to_uint8(coded.sampled[:CODED])))
    levels = [float(psnr(to_float(pixels), y).mean()) for y in decoded]
    sizes = float(math.prod(coded.mean.shape[1:])), float(nats / math.log(2) / 8)
    names = "latents, 8 bits", "latents, KL"
    value = {name: [point] for name, *point in zip(names, sizes, levels, strict=True)}
    value |= {codec: curve(pixels, codec) for codec in CODECS}
    return {"metric": "rate_distortion", "of": "reconstructions", "value": value, "n": len(pixels)}


def galleries(coded: Coded, compressed: Tensor) -> dict[str, list[Row]]:
    """Reconstructions, those with the lowest PSNR, and images beside other codecs at as many bytes."""
    levels = psnr(to_float(coded.pixels), to_float(coded.decoded))
    size, rows = math.prod(coded.mean.shape[1:]), []
    pairs = [
        Row(pictures=[("real", x), ("decoded", y)], note=f"{level:.1f} dB")
        for x, y, level in zip(coded.pixels, coded.decoded, levels, strict=True)
    ]
    for x, y in zip(coded.pixels[:SHOWN], compressed, strict=False):
        others = [("latents", size, y), *((codec, *nearest_to(x, codec, size)) for codec in CODECS)]
        near = [f"{float(psnr(to_float(x)[None], to_float(z)[None])):.1f}" for *_, z in others]
        pictures = [("real", x), *((f"{name}, {used} B", z) for name, used, z in others)]
        rows.append(Row(pictures=pictures, note=f"{', '.join(near)} dB"))
    worst = [pairs[i] for i in levels.argsort()[:SHOWN].tolist()]
    return {"reconstructions": pairs[: 2 * SHOWN], "worst": worst, "codecs": rows}
