"""How near reconstructions are to the originals, per picture, and how many bits an autoencoder needs for one."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.metrics.inputs import checked

Pictures = Tensor | np.ndarray
LAPLACIAN = torch.tensor([[0, -1, 0], [-1, 4, -1], [0, -1, 0]])
# Mean square of the Laplacian of rounding to 8 bits alone: 4^2 + 4 * 1^2 times its variance, in [0, 1].
ROUNDING = 20 / 255**2 / 12


def psnr(x: Pictures, y: Pictures, maximum: float = 100.0) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB; (B, ...) twice in [-1, 1] -> (B,) float64.

    -10 log10 of the mean squared error on [0, 1], at most `maximum`, which identical pictures get. A set's PSNR is the
    mean of these, not the PSNR of the pooled error.
    """
    x, y = _unit_range(x, y)
    error = rearrange((x - y).square(), "b ... -> b (...)").mean(1)
    return (-10 * torch.log10(error)).clamp(max=maximum)


def ssim(x: Pictures, y: Pictures) -> Tensor:
    """Structural similarity of each picture; (B, C, H, W) twice in [-1, 1] -> (B,) float64, 1 for identical pictures.

    Wang et al. 2004, eq. 13, on pictures mapped to [0, 1], as it is not invariant to a shift: 11-tap Gaussian of sigma
    1.5, K = (0.01, 0.03), population moments, each channel alone, mean over the windows that lie wholly within the
    picture. Raises ValueError where a side has under 11 pixels.
    """
    x, y = _unit_range(x, y, side=11)
    taps = torch.exp(-torch.arange(-5, 6).double().square() / (2 * 1.5**2))
    taps = taps / taps.sum()
    blurred = (_filter(_filter(image, taps[:, None]), taps[None]) for image in (x, y, x * x, y * y, x * y))
    mean_x, mean_y, xx, yy, xy = blurred
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * (xy - mean_x * mean_y) + c2) / (xx - mean_x**2 + yy - mean_y**2 + c2)
    return (luminance * structure).mean((1, 2, 3))


def sharpness(x: Pictures, y: Pictures) -> Tensor:
    """Mean square of the Laplacian of y over that of x; (B, C, H, W) twice in [-1, 1] -> (B,) float64.

    1 is as sharp as x, less is blurred, more is noise or halos; whether the detail is the right one it cannot tell.
    The energy of rounding to 8 bits is added to both, so that two plain pictures get 1. Raises ValueError where a side
    has under 3 pixels.
    """
    energy_x, energy_y = (_filter(image, LAPLACIAN).square().mean((1, 2, 3)) for image in _unit_range(x, y, side=3))
    return (energy_y + ROUNDING) / (energy_x + ROUNDING)


def perceptual_distance(x: Pictures, y: Pictures, network: nn.Module) -> Tensor:
    """Distance of each pair in a network of `ldm.perceptual`; (B, 3, H, W) twice in [-1, 1] -> (B,) float64.

    Print it with the network's name: only that of "lpips-vgg" and "lpips-alex" is LPIPS (Zhang et al. 2018).
    """
    x, y = _pair(x, y)
    with torch.no_grad():
        return network(x.float(), y.float()).double()


def bits_per_dimension(nll: Pictures, kl: Pictures, dimensions: int) -> Tensor:
    """(NLL + KL) / (D ln 2): the negative evidence lower bound in bits per value; (B,) and (B,) in nats -> (B,).

    An upper bound on the code length where `nll` is of discrete values around the decoded sample of the latent, and
    `kl` of that latent's posterior from the prior that is coded with (Kingma & Welling 2014, eq. 3).
    """
    return (torch.as_tensor(nll).double() + torch.as_tensor(kl).double()) / (dimensions * math.log(2))


def discretized_logistic(pixels: Tensor, mean: Tensor, scale: float | Tensor) -> Tensor:
    """-log p in nats of each value of uint8 `pixels` under a logistic around `mean` in [-1, 1], float64.

    The mass of the value's own bin of width 1/127.5, the first and the last bin reaching to infinity, so that the
    256 probabilities sum to 1 (Salimans et al. 2017, eq. 2). `scale` is in the units of `mean`, a number or broadcast.
    """
    x, half = pixels.double() / 127.5 - 1, 1 / 255
    upper, lower = ((x - mean.double() + edge) / scale for edge in (half, -half))
    upper = torch.where(pixels == 255, torch.inf, upper)
    lower = torch.where(pixels == 0, -torch.inf, lower)
    # sigmoid(u) - sigmoid(l) = sigmoid(u) sigmoid(-l) (1 - exp(l - u)), which loses no digits where both are near 1
    return -(F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(lower - upper)))


def _filter(x: Tensor, kernel: Tensor) -> Tensor:
    """Each plane of (B, C, H, W) correlated with `kernel` (h, w), without padding."""
    planes = F.conv2d(rearrange(x, "b c h w -> (b c) 1 h w"), kernel.to(x)[None, None])
    return rearrange(planes, "(b c) 1 h w -> b c h w", b=len(x))


def _unit_range(x: Pictures, y: Pictures, side: int = 0) -> tuple[Tensor, Tensor]:
    """Both as float64 in [0, 1]."""
    x, y = _pair(x, y, side)
    return (x.double() + 1) / 2, (y.double() + 1) / 2


def _pair(x: Pictures, y: Pictures, side: int = 0) -> tuple[Tensor, Tensor]:
    x, y = (checked(torch.as_tensor(images), side) for images in (x, y))
    if x.shape != y.shape:
        raise ValueError(f"pictures of shapes {tuple(x.shape)} and {tuple(y.shape)} cannot be compared")
    return x, y
