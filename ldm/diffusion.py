"""The forward process, what the U-Net predicts, and classifier-free guidance. Imports no model.

Variance preserving throughout: z_t = alpha_t z0 + sigma_t eps with alpha_t^2 + sigma_t^2 = 1.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from einops import rearrange
from torch import Tensor

from ldm.config import UserError

Prediction = Literal["epsilon", "v_prediction", "sample"]
Density = Literal["uniform", "stratified", "logit_normal"]
Context = Tensor | tuple  # (B, L, D), or what the U-Net made of it: nested tuples of tensors, batch first
Denoise = Callable[[Tensor, Tensor], Tensor]  # (z_t, t) -> z0

# What diffusers puts in the place of a last alpha^2 of zero, for samplers that divide by it.
TINY_ALPHA2 = 2.0**-24


def refuse_undefined(prediction: str, zero_terminal_snr: bool) -> None:
    """UserError for an unknown prediction, and for epsilon with zero terminal SNR."""
    if prediction not in get_args(Prediction):
        raise UserError(f"prediction {prediction!r} is unknown; allowed: {', '.join(get_args(Prediction))}")
    if prediction == "epsilon" and zero_terminal_snr:
        raise UserError(
            "prediction 'epsilon' cannot go with rescale_betas_zero_snr: at the last timestep z_t is pure "
            "noise and eps says nothing about z0; use 'v_prediction' or 'sample', or turn the rescaling off"
        )


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Noise schedule and the folder's sampling defaults, under the names of diffusers' scheduler_config.json
    (`sampler` apart, which stands for its class). The defaults are Stable Diffusion 1's betas."""

    beta_schedule: Literal["scaled_linear", "linear", "squaredcos_cap_v2"] = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_train_timesteps: int = 1000
    rescale_betas_zero_snr: bool = False
    prediction_type: Prediction = "epsilon"
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = (
        "leading"  # none: that of the sampler that runs
    )
    steps_offset: int = 1  # as in Stable Diffusion; diffusers insists on it
    set_alpha_to_one: bool | None = True  # none: that of the sampler that runs
    sampler: str = "dpmpp_2m"

    def __post_init__(self) -> None:
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise UserError(
                f"beta_start {self.beta_start} and beta_end {self.beta_end} are out of range; "
                "allowed: 0 < beta_start <= beta_end < 1"
            )
        if self.num_train_timesteps < 2 or self.steps_offset < 0:
            raise UserError(
                f"num_train_timesteps {self.num_train_timesteps} must be at least 2 and "
                f"steps_offset {self.steps_offset} at least 0"
            )
        refuse_undefined(self.prediction_type, self.rescale_betas_zero_snr)


def _betas(config: ScheduleConfig) -> Tensor:
    count = config.num_train_timesteps
    if config.beta_schedule == "linear":
        return torch.linspace(config.beta_start, config.beta_end, count, dtype=torch.float64)
    if config.beta_schedule == "scaled_linear":
        return torch.linspace(config.beta_start**0.5, config.beta_end**0.5, count, dtype=torch.float64) ** 2
    # Nichol & Dhariwal 2021, eq. 17: alpha^2 falls as a squared cosine, no beta above 0.999.
    edges = torch.arange(count + 1, dtype=torch.float64) / count
    alpha2 = torch.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alpha2[1:] / alpha2[:-1]).clamp(max=0.999)


def _zero_terminal_snr(alpha2: Tensor) -> Tensor:
    """Lin et al. 2023, algorithm 1: shifts and scales alpha so that the last is 0 and the first stays."""
    alpha = alpha2.sqrt()
    return ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2


class Schedule:
    """alpha_t, sigma_t and log SNR of the forward process for t in [0, T - 1].

    Tables are float64 on the CPU. `alphas_cumprod` (T,) is alpha_t^2, equal to diffusers'; `ratio` (T,) is
    sigma_t / alpha_t, what diffusers calls `sigmas`. Between integers `ratio` is interpolated linearly, as
    diffusers' Euler samplers do. `finite` lifts a last alpha of exactly 0 to 2**-12, as diffusers does for
    every sampler that divides by it.
    """

    def __init__(self, config: ScheduleConfig, finite: bool = False):
        self.config = config
        self.alphas_cumprod = torch.cumprod(1 - _betas(config), 0)
        if config.rescale_betas_zero_snr:
            self.alphas_cumprod = _zero_terminal_snr(self.alphas_cumprod)
            if finite:
                self.alphas_cumprod[-1] = TINY_ALPHA2
        self.ratio = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()

    def __len__(self) -> int:
        return len(self.ratio)

    def ratio_at(self, t: Tensor | float) -> Tensor:
        """sigma_t / alpha_t for integer or fractional t of any shape: float64 on the CPU, float32 elsewhere.
        Infinite where alpha_t is 0."""
        t = torch.as_tensor(t)
        # Not every accelerator has float64.
        ratio = self.ratio if t.device.type == "cpu" else self.ratio.to(t.device, torch.float32)
        if not t.is_floating_point():
            return ratio[t]
        low = t.floor().long().clamp(0, len(self) - 1)
        weight = (t - low).to(ratio.dtype)
        high = (low + 1).clamp(max=len(self) - 1)
        return torch.where(weight == 0, ratio[low], ratio[low] + weight * (ratio[high] - ratio[low]))

    def alpha(self, t: Tensor | float) -> Tensor:
        """Share of z0 in z_t, in [0, 1], of t's shape."""
        return (1 + self.ratio_at(t) ** 2).rsqrt()

    def sigma(self, t: Tensor | float) -> Tensor:
        """Share of noise in z_t, in (0, 1], of t's shape."""
        return (1 + self.ratio_at(t) ** -2).rsqrt()

    def log_snr(self, t: Tensor | float) -> Tensor:
        """log(alpha_t^2 / sigma_t^2), of t's shape; -inf at zero terminal SNR."""
        return -2 * self.ratio_at(t).log()

    def add_noise(self, z0: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
        """z_t = alpha_t z0 + sigma_t eps; z0, eps (B, ...), t (B,) or a scalar."""
        return _along(self.alpha(t), z0) * z0 + _along(self.sigma(t), z0) * eps


def _along(values: Tensor, z: Tensor) -> Tensor:
    """(B,) values shaped to multiply z (B, ...), in z's dtype and device; a scalar stays one."""
    values = values.to(z.device, z.dtype)
    return rearrange(values, "b -> b" + " 1" * (z.ndim - 1)) if values.ndim else values


class Denoiser:
    """The only place that knows eps from v from z0.

    `model(z_t (B,C,h,w), t, context) -> prediction (B,C,h,w)` is called, never changed; `prediction` names
    what it predicts (default: as in the schedule's config). v is Salimans & Ho 2022, appendix D.
    UserError: an unknown prediction, or eps with zero terminal SNR.
    """

    def __init__(self, model: Callable[..., Tensor], schedule: Schedule, prediction: str | None = None):
        self.model, self.schedule = model, schedule
        self.prediction = schedule.config.prediction_type if prediction is None else prediction
        refuse_undefined(self.prediction, schedule.config.rescale_betas_zero_snr)

    def target(self, z0: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
        """What the model should predict at t: eps, v = alpha_t eps - sigma_t z0, or z0; as add_noise."""
        if self.prediction == "epsilon":
            return eps
        if self.prediction == "sample":
            return z0
        return _along(self.schedule.alpha(t), z0) * eps - _along(self.schedule.sigma(t), z0) * z0

    def predict(self, z_t: Tensor, t: Tensor | float, context: Context) -> Tensor:
        """The model's own prediction at z_t (B,C,h,w), t (B,) or a scalar, in z_t's dtype."""
        return self.model(z_t, torch.as_tensor(t).to(z_t.device), context).to(z_t.dtype)

    def to_z0(self, z_t: Tensor, t: Tensor | float, prediction: Tensor) -> Tensor:
        """The z0 that a prediction at (z_t, t) stands for."""
        if self.prediction == "sample":
            return prediction
        alpha_t, sigma_t = _along(self.schedule.alpha(t), z_t), _along(self.schedule.sigma(t), z_t)
        if self.prediction == "epsilon":
            return (z_t - sigma_t * prediction) / alpha_t
        return alpha_t * z_t - sigma_t * prediction

    def __call__(self, z_t: Tensor, t: Tensor | float, context: Context) -> Tensor:
        """(z_t (B,C,h,w), t, context) -> estimate of z0 (B,C,h,w)."""
        return self.to_z0(z_t, t, self.predict(z_t, t, context))


def loss_weight(schedule: Schedule, t: Tensor, prediction: str, min_snr_gamma: float | None) -> Tensor:
    """Weight of the squared error at t (B,) -> (B,); ones when `min_snr_gamma` is None.

    Min-SNR (Hang et al. 2023, section 3.4), which clips the weight of the z0 error to min(SNR, gamma); hence
    min(SNR, gamma) / SNR for eps and min(SNR, gamma) / (SNR + 1) for v. At zero terminal SNR it is 0 for v.
    """
    refuse_undefined(prediction, schedule.config.rescale_betas_zero_snr)
    snr = schedule.ratio_at(t) ** -2
    if min_snr_gamma is None:
        return torch.ones_like(snr)
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction]
    return snr.clamp(max=min_snr_gamma) / divisor


def sample_timesteps(
    count: int,
    total: int,
    density: str = "uniform",
    generator: torch.Generator | None = None,
    mean: float = 0.0,
    std: float = 1.0,
) -> Tensor:
    """Training timesteps (count,), int64 in [0, total - 1], on the generator's device (CPU without one).

    "uniform": independent; "stratified": one shared offset and equal strides, each still uniform (Kingma et
    al. 2021, appendix I.1); "logit_normal": sigmoid of a normal of `mean` and `std`, more in the middle (Esser et al.
    2024, eq. 19), the normal's quantiles being stratified. UserError for another.
    """
    device = generator.device if generator is not None else torch.device("cpu")
    if density == "uniform":
        return torch.randint(total, (count,), generator=generator, device=device)
    if density not in get_args(Density):
        raise UserError(f"timestep density {density!r} is unknown; allowed: {', '.join(get_args(Density))}")
    offset = torch.rand((), generator=generator, device=device)
    share = (offset + torch.arange(count, device=device) / count) % 1
    if density == "logit_normal":
        share = (mean + std * torch.special.ndtri(share)).sigmoid()
    return (share * total).long().clamp(max=total - 1)


def concat_contexts(contexts: Sequence[Context]) -> Context:
    """Joins contexts of one structure along the batch: tensors, or nested tuples of them (keys, values)."""
    if isinstance(contexts[0], Tensor):
        return torch.cat(list(contexts))
    return tuple(concat_contexts(parts) for parts in zip(*contexts, strict=True))


def slice_context(context: Context, index: slice) -> Context:
    """The pictures `index` of a context, prepared or not."""
    if isinstance(context, Tensor):
        return context[index]
    return tuple(slice_context(part, index) for part in context)


def rescale_guidance(guided: Tensor, conditional: Tensor, rescale: float) -> Tensor:
    """Lin et al. 2023, eq. 15-16: gives the guided prediction (B, ...) the conditional one's deviation over
    each picture, mixed in by `rescale` in [0, 1]."""
    axes = tuple(range(1, guided.ndim))
    matched = guided * (conditional.std(axes, keepdim=True) / guided.std(axes, keepdim=True))
    return rescale * matched + (1 - rescale) * guided


def guided(
    denoiser: Denoiser,
    context: Context,
    negative: Context | None,
    guidance: float,
    rescale: float = 0.0,
    interval: tuple[float, float] = (0, math.inf),
) -> Denoise:
    """`denoise(z_t (B,C,h,w), t) -> z0` with classifier-free guidance (Ho & Salimans 2022, eq. 6).

    context, negative: (B, L, D), or already prepared keys and values of that batch; joined once, here.
    guidance: 1 is none. interval: the t, ends included, where guidance acts (Kynkaanniemi et al. 2024).
    One model call a step, of batch 2B where guidance acts and of batch B where it does not; t is a scalar.
    UserError: guidance other than 1 without a negative context.
    """
    if guidance == 1:
        return lambda z_t, t: denoiser(z_t, t, context)
    if negative is None:
        raise UserError(f"guidance {guidance} needs a negative context (the empty prompt's); guidance 1 needs none")
    both = concat_contexts([negative, context])

    def denoise(z_t: Tensor, t: Tensor) -> Tensor:
        if not interval[0] <= float(t) <= interval[1]:
            return denoiser(z_t, t, context)
        off, on = denoiser.predict(z_t, t, both).chunk(2)
        prediction = off + guidance * (on - off)
        if rescale:
            prediction = rescale_guidance(prediction, on, rescale)
        return denoiser.to_z0(z_t, t, prediction)

    return denoise
