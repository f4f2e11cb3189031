"""Pictures through an autoencoder: its latents, and what it decodes of them."""

from dataclasses import dataclass
from typing import Any

import torch
from einops import reduce
from torch import Tensor
from tqdm import tqdm

from ldm.images import to_float, to_uint8
from ldm.metrics.reconstruction import discretized_logistic
from ldm.vae import VAE

CODED = 128  # pictures through the other codecs


@dataclass(frozen=True, kw_only=True)
class Coded:
    """What an autoencoder makes of uint8 pictures (N, 3, H, W)."""

    pixels: Tensor
    mean: Tensor  # of the normalized latents (N, C, h, w)
    std: Tensor
    decoded: Tensor  # uint8, from the mean
    sampled: Tensor  # uint8, from one sample, of the first CODED
    nll: dict[float, Tensor]  # of pictures in nats (N,), around the decoded sample, by the likelihood's scale


@torch.no_grad()
def code(vae: VAE, dataset: Any, indices: list[int], batch_size: int, text: str, tried: list[float]) -> Coded:
    """Pictures through the autoencoder, with one sample of each latent, whose seed is the place in `indices`."""
    device = next(vae.parameters()).device
    parts: dict[str, list[Tensor]] = {key: [] for key in ("pixels", "mean", "std", "decoded", "sampled")}
    nll: dict[float, list[Tensor]] = {scale: [] for scale in tried}
    for start in tqdm(range(0, len(indices), batch_size), desc=text, unit="batch", leave=False):
        pixels = torch.stack([dataset[i]["image"] for i in indices[start : start + batch_size]])
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


def kl_nats(coded: Coded) -> Tensor:
    """KL of each normalized latent's posterior from the standard normal, in nats, (N, C, h, w) float64.

    Normalized as diffusion sees it: that prior has the training set's own mean and deviation, whatever an
    autoencoder's scale, so that the rates of several compare.
    """
    mean, variance = coded.mean.double(), coded.std.double().square()
    return 0.5 * (mean.square() + variance - 1 - variance.log())
