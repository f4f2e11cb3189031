"""The noise schedule, the parametrizations eps, v and x0, and classifier-free guidance.

Variance preserving throughout: z_t = alpha_t z0 + sigma_t eps with alpha_t^2 + sigma_t^2 = 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from ldm.config import UserError, require

Prediction = Literal["epsilon", "v_prediction", "sample"]
Sigmas = Literal["karras", "exponential", "beta"]
Density = Literal["uniform", "stratified", "logit_normal"]
Denoise = Callable[[Tensor, "Step"], Tensor]  # (z_t, step) -> z0

TINY_ALPHA2 = 2.0**-24  # replaces a last alpha^2 of zero for samplers that divide by it, as in diffusers


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Noise schedule and sampling defaults of a folder, under the names of diffusers' scheduler_config.json, where
    `sampler` is its class. The default betas are Stable Diffusion 1's."""

    beta_schedule: Literal["scaled_linear", "linear", "squaredcos_cap_v2"] = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_train_timesteps: int = 1000
    rescale_betas_zero_snr: bool = False
    prediction_type: Prediction = "epsilon"  # epsilon, v_prediction or sample (z0)
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = "leading"  # none: the sampler's
    steps_offset: int = 1  # of leading spacing; diffusers' pipelines set 1
    sigmas: Sigmas | None = None  # noise levels of the steps; none: those of `timestep_spacing`
    set_alpha_to_one: bool | None = True  # ddim, pndm: end at alpha 1, not at timestep 0; none: the sampler's
    sampler: str = "dpmpp_2m"

    def __post_init__(self) -> None:
        betas = self.beta_start, self.beta_end
        require(0 < betas[0] <= betas[1] < 1, "beta_start, beta_end", betas, "above 0, in order and below 1")
        require(self.num_train_timesteps >= 2, "num_train_timesteps", self.num_train_timesteps, "at least 2")
        require(self.steps_offset >= 0, "steps_offset", self.steps_offset, "at least 0")
        if self.prediction_type == "epsilon" and self.rescale_betas_zero_snr:
            raise UserError(
                "prediction 'epsilon' is undefined with rescale_betas_zero_snr: at the last timestep z_t is pure noise,"
                " which does not determine z0; use 'v_prediction' or 'sample', or turn the rescaling off"
            )


class Schedule:
    """alpha_t and sigma_t of the forward process for t in [0, T - 1].

    `alphas_cumprod` (T,) is alpha_t^2 and `ratio` (T,) sigma_t / alpha_t (diffusers' `sigmas`), float64 on the CPU.
    Between integers `ratio` is interpolated linearly, as in diffusers' Euler samplers; `geometric`: its logarithm is.
    `finite` raises a last alpha of 0 to 2^-12.
    """

    def __init__(self, config: ScheduleConfig, finite: bool = False, geometric: bool = False):
        self.config, self.geometric = config, geometric
        total = config.num_train_timesteps
        if config.beta_schedule == "squaredcos_cap_v2":
            # Nichol & Dhariwal 2021, eq. 17: alpha^2 falls as a squared cosine, no beta above 0.999.
            edges = torch.arange(total + 1, dtype=torch.float64) / total
            alpha2 = torch.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - alpha2[1:] / alpha2[:-1]).clamp(max=0.999)
        else:
            power = 0.5 if config.beta_schedule == "scaled_linear" else 1
            ends = config.beta_start**power, config.beta_end**power
            betas = torch.linspace(*ends, total, dtype=torch.float64) ** (1 / power)
        self.alphas_cumprod = torch.cumprod(1 - betas, 0)
        if config.rescale_betas_zero_snr:
            # Lin et al. 2023, algorithm 1: shifts and scales alpha so that the last is 0 and the first stays.
            alpha = self.alphas_cumprod.sqrt()
            self.alphas_cumprod = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
            if finite:
                self.alphas_cumprod[-1] = TINY_ALPHA2
        self.ratio = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()
        self.ratios = {self.ratio.device: self.ratio}  # by device

    def __len__(self) -> int:
        return len(self.ratio)

    def ratio_at(self, t: Tensor | float) -> Tensor:
        """sigma_t / alpha_t for integer or fractional t of any shape; float64 on the CPU, float32 on accelerators, of
        which not all have float64. Infinite where alpha_t is 0."""
        t = torch.as_tensor(t)
        if t.device not in self.ratios:
            self.ratios[t.device] = self.ratio.to(t.device, torch.float32)
        ratio = self.ratios[t.device]
        low = t.long().clamp(max=len(self) - 1)
        weight = (t - low).to(ratio.dtype)
        high = (low + 1).clamp(max=len(self) - 1)
        between = ratio[low] + weight * (ratio[high] - ratio[low])
        if self.geometric:
            between = ratio[low] ** (1 - weight) * ratio[high] ** weight
        return torch.where(weight == 0, ratio[low], between)

    def timestep(self, ratio: Tensor) -> Tensor:
        """The t, float64 in [0, T - 1], at which a `geometric` schedule has these sigma_t / alpha_t (float64)."""
        logs, wanted = self.ratio.log(), ratio.log()
        high = torch.searchsorted(logs, wanted).clamp(1, len(self) - 1)
        return high - 1 + ((wanted - logs[high - 1]) / (logs[high] - logs[high - 1])).clamp(0, 1)

    def alpha(self, t: Tensor | float) -> Tensor:
        """Coefficient of z0 in z_t, in [0, 1], of t's shape."""
        return (1 + self.ratio_at(t) ** 2).rsqrt()

    def sigma(self, t: Tensor | float) -> Tensor:
        """Coefficient of the noise in z_t, in (0, 1], of t's shape."""
        return (1 + self.ratio_at(t) ** -2).rsqrt()

    def add_noise(self, z0: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
        """z_t = alpha_t z0 + sigma_t eps; z0, eps (B, ...), t (B,) or a scalar."""
        return _along(self.alpha(t), z0) * z0 + _along(self.sigma(t), z0) * eps


def _along(values: Tensor, z: Tensor) -> Tensor:
    """(B,) values shaped to multiply z (B, ...), in z's dtype and device; a scalar stays one."""
    values = values.to(z.device, z.dtype)
    return rearrange(values, "b -> b" + " 1" * (z.ndim - 1)) if values.ndim else values


class Step(NamedTuple):
    """One step of a sampler: the model is evaluated at t, where z_t has (alpha, sigma); the step ends at (to_alpha,
    to_sigma). Numbers of Python, which an accelerator neither waits for nor has to be sent."""

    t: float
    alpha: float
    sigma: float
    to_alpha: float = 1.0
    to_sigma: float = 0.0
    second: "Step | None" = None  # dpmpp_sde: from the midpoint; pndm: of usual length, to where this one starts


class Denoiser:
    """A model `(z_t (B,C,h,w), t, context (B,L,D)) -> prediction (B,C,h,w)` as an estimate of z0.

    The only place that knows eps from v (Salimans & Ho 2022, appendix D) from z0. The model, whose weights and context
    are in `dtype`, sees z_t in it; by default in its own.
    """

    def __init__(self, model: Callable[..., Tensor], schedule: Schedule, dtype: torch.dtype | None = None):
        self.model, self.schedule, self.dtype = model, schedule, dtype
        self.prediction = schedule.config.prediction_type

    def target(self, z0: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
        """The training target at t: eps, v = alpha_t eps - sigma_t z0, or z0; shapes as in add_noise."""
        if self.prediction == "epsilon":
            return eps
        if self.prediction == "sample":
            return z0
        return _along(self.schedule.alpha(t), z0) * eps - _along(self.schedule.sigma(t), z0) * z0

    def predict(self, z_t: Tensor, t: Tensor | float, context: Tensor) -> Tensor:
        """The model's prediction at z_t (B,C,h,w), t (B,) or a number, in z_t's dtype."""
        t = t.to(z_t.device) if torch.is_tensor(t) else z_t.new_full((), t, dtype=torch.float32)  # filled there
        return self.model(z_t.to(self.dtype or z_t.dtype), t, context).to(z_t.dtype)

    def to_z0(self, z_t: Tensor, s: Step, prediction: Tensor) -> Tensor:
        """The estimate of z0 that a prediction at the start of a step implies."""
        if self.prediction == "sample":
            return prediction
        if self.prediction == "epsilon":
            return (z_t - s.sigma * prediction) / s.alpha
        return s.alpha * z_t - s.sigma * prediction

    def __call__(self, z_t: Tensor, s: Step, context: Tensor) -> Tensor:
        """z_t (B,C,h,w) at the start of a step, context -> estimate of z0 (B,C,h,w)."""
        return self.to_z0(z_t, s, self.predict(z_t, s.t, context))


def loss_weight(schedule: Schedule, t: Tensor, prediction: str, min_snr_gamma: float | None) -> Tensor:
    """Weight of the squared error at t (B,) -> (B,); ones when `min_snr_gamma` is None.

    Min-SNR (Hang et al. 2023, section 3.4) weighs the z0 error by min(SNR, gamma); hence min(SNR, gamma) / SNR for eps
    and min(SNR, gamma) / (SNR + 1) for v, which is 0 at zero terminal SNR.
    """
    snr = schedule.ratio_at(t) ** -2
    if min_snr_gamma is None:
        return torch.ones_like(snr)
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction]
    return snr.clamp(max=min_snr_gamma) / divisor


def sample_timesteps(
    count: int,
    total: int,
    density: Density,
    generator: torch.Generator,
    mean: float = 0.0,
    std: float = 1.0,
) -> Tensor:
    """Training timesteps (count,), int64 in [0, total - 1], on the generator's device.

    "uniform": independent; "stratified": one shared offset and equal strides, each still uniform (Kingma et al. 2021,
    appendix I.1); "logit_normal": the sigmoid of a normal with `mean` and `std`, more in the middle (Esser et al. 2024,
    eq. 19), stratified in the normal's quantiles.
    """
    device = generator.device
    if density == "uniform":
        return torch.randint(total, (count,), generator=generator, device=device)
    offset = torch.rand((), generator=generator, device=device)
    quantiles = (offset + torch.arange(count, device=device) / count) % 1
    if density == "logit_normal":
        quantiles = (mean + std * torch.special.ndtri(quantiles)).sigmoid()
    return (quantiles * total).long().clamp(max=total - 1)


def guided(
    denoiser: Denoiser,
    context: Tensor,
    negative: Tensor,
    guidance: float,
    rescale: float = 0.0,
    interval: tuple[float, float] = (0, math.inf),
) -> Denoise:
    """`denoise(z_t (B,C,h,w), step) -> z0` with classifier-free guidance (Ho & Salimans 2022, eq. 6).

    context, negative: (B, L, D). guidance: 1 is none. rescale, in [0, 1]: the share of the guided prediction scaled to
    the conditional one's standard deviation per image (Lin et al. 2023, eq. 15-16). interval: the t, ends included,
    where guidance acts (Kynkaanniemi et al. 2024). Each step is one model call, of batch 2B where guidance acts, else
    of batch B.
    """
    both = torch.cat([negative, context])

    def denoise(z_t: Tensor, s: Step) -> Tensor:
        if guidance == 1 or not interval[0] <= s.t <= interval[1]:
            return denoiser(z_t, s, context)
        unconditional, conditional = denoiser.predict(torch.cat([z_t, z_t]), s.t, both).chunk(2)
        prediction = unconditional + guidance * (conditional - unconditional)
        if rescale:
            axes = tuple(range(1, prediction.ndim))
            matched = prediction * (conditional.std(axes, keepdim=True) / prediction.std(axes, keepdim=True))
            prediction = rescale * matched + (1 - rescale) * prediction
        return denoiser.to_z0(z_t, s, prediction)

    return denoise
