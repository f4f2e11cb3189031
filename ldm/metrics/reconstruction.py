"""How near reconstructions are to the originals, per picture, and how many bits an autoencoder needs for one."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Pictures = Tensor | np.ndarray
ROUNDING = 20 * (2 / 255) ** 2 / 12  # 4^2 + 4 * 1^2 times the variance of rounding: a picture's Laplacian of that alone


def psnr(x: Pictures, y: Pictures, data_range: float = 2.0, maximum: float = 100.0) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB; (B, ...) and (B, ...) -> (B,) float64.

    10 log10(range^2 / mean squared error), at most `maximum`, which identical pictures get. `data_range` is 2
    for [-1, 1]. A set's PSNR is the mean of these, not the PSNR of the pooled error.
    """
    x, y = _pair(x, y)
    error = rearrange((x.double() - y.double()).square(), "b ... -> b (...)").mean(1)
    return (10 * torch.log10(data_range**2 / error)).clamp(max=maximum)


def ssim(x: Pictures, y: Pictures, data_range: float = 2.0) -> Tensor:
    """Structural similarity of each picture; (B, C, H, W) twice -> (B,) float64, 1 for identical pictures.

    Wang et al. 2004, eq. 13, as published: 11-tap Gaussian of sigma 1.5, K = (0.01, 0.03), population
    moments, each channel alone, mean over the windows that lie whole within the picture. ValueError where a
    side has under 11 pixels.
    """
    x, y = _pair(x, y)
    if x.ndim != 4 or min(x.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs (B, C, H, W) pictures of at least 11x11 pixels, not {tuple(x.shape)}")
    x, y = x.double(), y.double()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).mean((1, 2, 3))


def sharpness(x: Pictures, y: Pictures) -> Tensor:
    """How much of the detail of x is in y: the mean square of the Laplacian of y over that of x, each picture;
    (B, C, H, W) twice in [-1, 1] -> (B,) float64.

    1 is as sharp, less is blurred, more is noise or halos. Both get the 1e-4 that rounding to 8 bits makes, which also
    gives two plain pictures 1. It says nothing of whether the detail is the right one. ValueError where a side has
    under 3 pixels.
    """
    x, y = _pair(x, y)
    if x.ndim != 4 or min(x.shape[-2:]) < 3:
        raise ValueError(f"sharpness needs (B, C, H, W) pictures of at least 3x3 pixels, not {tuple(x.shape)}")
    of_x, of_y = (_laplacian(side.double()).square().mean((1, 2, 3)) for side in (x, y))
    return (of_y + ROUNDING) / (of_x + ROUNDING)


def perceptual_distance(x: Pictures, y: Pictures, network: nn.Module) -> Tensor:
    """Distance of each pair in a network of `ldm.perceptual`; (B, 3, H, W) twice in [-1, 1] -> (B,) float64.

    To be printed with the network's name: only that of "lpips-vgg" and "lpips-alex" is LPIPS (Zhang et al. 2018).
    """
    x, y = _pair(x, y)
    with torch.no_grad():
        return network(x.float(), y.float()).double()


def bits_per_dimension(nll: Pictures, kl: Pictures, dimensions: int) -> Tensor:
    """(NLL + KL) / (D ln 2): the negative evidence lower bound of each picture, in bits a value; (B,) and (B,) in nats.

    An upper bound on the code length where `nll` is of discrete values around what a sample of the latent decodes to,
    and `kl` of that latent's posterior from the prior that is coded with (Kingma & Welling 2014, eq. 3).
    """
    nll, kl = torch.as_tensor(nll), torch.as_tensor(kl)
    return (nll.double() + kl.double()) / (dimensions * math.log(2))


def discretized_logistic(pixels: Tensor, mean: Tensor, scale: float | Tensor) -> Tensor:
    """-log p in nats of each value of uint8 `pixels` under a logistic around `mean` in [-1, 1], float64.

    The mass of the value's own 1/127.5 wide bin, with all that lies beyond in the first and the last one, so that the
    256 probabilities sum to 1 (Salimans et al. 2017, eq. 2). `scale` in the units of `mean`, a number or broadcast.
    """
    x, half = pixels.double() / 127.5 - 1, 1 / 255
    scale = torch.as_tensor(scale, dtype=torch.float64)
    upper, lower = (x - mean.double() + half) / scale, (x - mean.double() - half) / scale
    upper = torch.where(pixels == 255, torch.inf, upper)
    lower = torch.where(pixels == 0, -torch.inf, lower)
    # log(sigmoid(u) - sigmoid(l)), taken on the side where both are small, without losing digits
    flip = lower > 0
    u, low = torch.where(flip, -lower, upper), torch.where(flip, -upper, lower)
    log_u, log_low = F.logsigmoid(u), F.logsigmoid(low)
    return -(log_u + torch.log1p(-torch.exp(log_low - log_u).clamp_max(1 - 1e-16)))


def _laplacian(x: Tensor) -> Tensor:
    """Four times each pixel less its four neighbours, (B, C, H, W) -> (B, C, H-2, W-2)."""
    rows = 2 * x[..., 1:-1, :] - x[..., 2:, :] - x[..., :-2, :]
    columns = 2 * x[..., 1:-1] - x[..., 2:] - x[..., :-2]
    return rows[..., 1:-1] + columns[..., 1:-1, :]


def _blur(x: Tensor) -> Tensor:
    """The 11-tap Gaussian of sigma 1.5 over (B, C, H, W) -> (B, C, H-10, W-10)."""
    taps = torch.arange(-5, 6, dtype=x.dtype, device=x.device)
    taps = torch.exp(-taps.square() / (2 * 1.5**2))
    taps = rearrange(taps / taps.sum(), "k -> 1 1 k 1")
    planes = rearrange(x, "b c h w -> (b c) 1 h w")
    planes = F.conv2d(F.conv2d(planes, taps), rearrange(taps, "1 1 k 1 -> 1 1 1 k"))
    return rearrange(planes, "(b c) 1 h w -> b c h w", b=len(x))


def _pair(x: Pictures, y: Pictures) -> tuple[Tensor, Tensor]:
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    if x.shape != y.shape:
        raise ValueError(f"pictures of shapes {tuple(x.shape)} and {tuple(y.shape)} cannot be compared")
    return x, y
