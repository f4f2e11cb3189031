"""Samplers: one short pure function each, from noise to z0 through `denoise(z_t, t) -> z0`.

All work on variance-preserving z_t = alpha z0 + sigma eps. diffusers runs its Euler family on x = z_t / alpha with
noise level sigma / alpha; the same steps are written here for z_t, so that all samplers see one `denoise`.

    grid = make_grid(schedule, "dpmpp_2m", steps=30)
    denoise = guided(Denoiser(unet, grid.schedule), context, negative, guidance=5.0)
    noise = ImageNoise(seeds, (C, h, w))
    z0 = SAMPLERS["dpmpp_2m"](denoise, grid.initial_scale * noise(), grid, noise)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.config import UserError
from ldm.diffusion import Denoise, Schedule

Noise = Callable[[], Tensor]  # draws a standard normal of z's shape
OnStep = Callable[[int, float, Tensor, Tensor], None]  # (step, t, z_t, z0)
ADAMS_BASHFORTH = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
SPACINGS = ("leading", "trailing", "linspace")
DEFAULT_SPACING = {"ddpm": "leading", "ddim": "leading", "pndm": "leading"}  # as in diffusers; others: linspace


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step: the model is evaluated at t, where z_t has (alpha, sigma); the step ends at (to_alpha, to_sigma)."""

    t: float
    alpha: float
    sigma: float
    to_alpha: float
    to_sigma: float

    @property
    def half_log_snr(self) -> float:
        """lambda = log(alpha / sigma), the time of the DPM-Solver papers."""
        return math.log(self.alpha / self.sigma)

    @property
    def half_log_snr_to(self) -> float:
        """lambda at the end of the step; infinite at sigma 0."""
        return math.log(self.to_alpha / self.to_sigma) if self.to_sigma else math.inf


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The steps of a sampler. It starts from `initial_scale` times a standard normal; its Denoiser must use `schedule`.
    `stride` is T // steps."""

    schedule: Schedule
    steps: tuple[Step, ...]
    initial_scale: float
    stride: int


class ImageNoise:
    """Noise that depends on each image's seed alone, never on the batch it is drawn in.

    Each call returns the next (len(seeds), *shape) float32 standard normals, image i from
    `torch.Generator("cpu").manual_seed(seeds[i])`. Raises UserError unless 0 <= seed < 2**63.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu"):
        for seed in seeds:
            if not 0 <= seed < 2**63:
                raise UserError(f"seed {seed} is not allowed: 0 to 2^63 - 1")
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self.shape, self.device = tuple(shape), device

    def __call__(self) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


def ddpm(denoise: Denoise, z: Tensor, grid: Grid, noise: Noise, on_step: OnStep | None = None) -> Tensor:
    """Ancestral sampling with the smaller variance (Ho et al. 2020, eq. 6-7). z (B,C,h,w) -> z0 (B,C,h,w)."""
    return ddim(denoise, z, grid, noise, on_step, eta=1.0)


def ddim(
    denoise: Denoise, z: Tensor, grid: Grid, noise: Noise, on_step: OnStep | None = None, eta: float = 0.0
) -> Tensor:
    """Song et al. 2021 (DDIM), eq. 12 and 16; eta 0 is deterministic, eta 1 is DDPM on the same timesteps."""
    for i, s in enumerate(grid.steps):
        z0, eps = _evaluate(denoise, z, s, i, on_step)
        fresh = eta * s.to_sigma / s.sigma * math.sqrt(1 - (s.alpha / s.to_alpha) ** 2)
        z = s.to_alpha * z0 + math.sqrt(max(s.to_sigma**2 - fresh**2, 0)) * eps
        if fresh:
            z = z + fresh * noise()
    return z


def euler(denoise: Denoise, z: Tensor, grid: Grid, noise: Noise, on_step: OnStep | None = None) -> Tensor:
    """Euler's method on Karras et al. 2022, eq. 1 (algorithm 2 with no churn and no second order)."""
    for i, s in enumerate(grid.steps):
        z0, eps = _evaluate(denoise, z, s, i, on_step)
        z = s.to_alpha * z0 + s.to_sigma * eps
    return z


def euler_a(denoise: Denoise, z: Tensor, grid: Grid, noise: Noise, on_step: OnStep | None = None) -> Tensor:
    """Euler with ancestral noise: a step down to less noise than asked for, the rest drawn afresh."""
    for i, s in enumerate(grid.steps):
        z0, eps = _evaluate(denoise, z, s, i, on_step)
        here, there = s.sigma / s.alpha, s.to_sigma / s.to_alpha
        up = there * math.sqrt(1 - (there / here) ** 2)
        z = s.to_alpha * (z0 + there**2 / here * eps)  # there^2 = down^2 + up^2
        if up:
            z = z + s.to_alpha * up * noise()
    return z


def heun(denoise: Denoise, z: Tensor, grid: Grid, noise: Noise, on_step: OnStep | None = None) -> Tensor:
    """Karras et al. 2022, algorithm 1: an Euler step, then the mean of the slopes at both of its ends; two
    model calls per step, one for the last. `on_step` sees the first."""
    for i, s in enumerate(grid.steps):
        z0, eps = _evaluate(denoise, z, s, i, on_step)
        z = s.to_alpha * z0 + s.to_sigma * eps
        if i + 1 < len(grid.steps):
            _, eps_there = _evaluate(denoise, z, grid.steps[i + 1])
            width = s.to_sigma - s.to_alpha * s.sigma / s.alpha
            z = z + width / 2 * (eps_there - eps)
    return z


def dpmpp_2m(denoise: Denoise, z: Tensor, grid: Grid, noise: Noise, on_step: OnStep | None = None) -> Tensor:
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2; first order at the first and at the last step."""
    last_z0 = None
    for i, s in enumerate(grid.steps):
        z0, _ = _evaluate(denoise, z, s, i, on_step)
        z = _exponential_step(z, z0, s, _slope(grid.steps, i, z0, last_z0) / 2)
        last_z0 = z0
    return z


def unipc(denoise: Denoise, z: Tensor, grid: Grid, noise: Noise, on_step: OnStep | None = None) -> Tensor:
    """UniPC of order 2 with B2(h) on z0 (Zhao et al. 2023, algorithms 5 and 6): the step of dpmpp_2m, corrected with
    the model's output at its end, which costs no further call."""
    start = last_z0 = slope = None
    for i, s in enumerate(grid.steps):
        z0, _ = _evaluate(denoise, z, s, i, on_step)
        if start is not None:
            z = _exponential_step(start, last_z0, grid.steps[i - 1], _corrector(grid.steps, i, z0 - last_z0, slope))
        slope = _slope(grid.steps, i, z0, last_z0)
        start, last_z0 = z, z0
        z = _exponential_step(z, z0, s, slope / 2)
    return z


def pndm(denoise: Denoise, z: Tensor, grid: Grid, noise: Noise, on_step: OnStep | None = None) -> Tensor:
    """Pseudo linear multistep of order 4 (Liu et al. 2022, eq. 9 and 12-13; "PLMS"), which begins with Heun's rule: one
    model call more than steps. As in diffusers, the model's predictions are averaged: v of a v model, else eps."""
    v, past = grid.schedule.config.prediction_type == "v_prediction", []

    def predict(z: Tensor, s: Step, *report: Any) -> Tensor:
        z0, eps = _evaluate(denoise, z, s, *report)
        return s.alpha * eps - s.sigma * z0 if v else eps

    def move(z: Tensor, output: Tensor, s: Step) -> Tensor:
        z0 = s.alpha * z - s.sigma * output if v else (z - s.sigma * output) / s.alpha
        eps = s.sigma * z + s.alpha * output if v else output
        return s.to_alpha * z0 + s.to_sigma * eps

    for i, s in enumerate(grid.steps):
        past = [predict(z, s, i, on_step), *past[:3]]
        if i == 0 and len(grid.steps) > 1:
            there = grid.steps[1]
            again = predict(move(z, past[0], s), there)
            z = move(z, (past[0] + again) / 2, _backwards(grid, there))
        else:
            z = move(z, sum(w * output for w, output in zip(ADAMS_BASHFORTH[min(i, 3)], past, strict=True)), s)
    return z


def _backwards(grid: Grid, there: Step) -> Step:
    """The step of usual length that ends where `there` starts; with leading spacing it is the one before."""
    t = there.t + grid.stride
    alpha, sigma = grid.schedule.alpha(t).item(), grid.schedule.sigma(t).item()
    return Step(t=t, alpha=alpha, sigma=sigma, to_alpha=there.alpha, to_sigma=there.sigma)


def _evaluate(denoise: Denoise, z: Tensor, s: Step, i: int = 0, on_step: OnStep | None = None) -> tuple[Tensor, Tensor]:
    """z0 and eps at the start of a step, reported to `on_step`."""
    z0 = denoise(z, torch.tensor(s.t))
    if on_step is not None:
        on_step(i, s.t, z, z0)
    return z0, (z - s.alpha * z0) / s.sigma


def _exponential_step(z: Tensor, z0: Tensor, s: Step, correction: Tensor) -> Tensor:
    """Exact step for a z0 that is constant in lambda (Lu et al. 2022, eq. 3.7), with `correction` added."""
    shrink = s.to_sigma / s.sigma
    return shrink * z + (s.to_alpha - shrink * s.alpha) * (z0 + correction)


def _slope(steps: Sequence[Step], i: int, z0: Tensor, last_z0: Tensor | None) -> Tensor:
    """Change of z0 over step i, extrapolated from the step before; 0 where order 1 is due: at the first step, and at
    the last, which ends at infinite lambda."""
    if last_z0 is None or i + 1 == len(steps):
        return torch.zeros_like(z0)
    s = steps[i]
    here = s.half_log_snr
    return (z0 - last_z0) * ((s.half_log_snr_to - here) / (here - steps[i - 1].half_log_snr))


def _corrector(steps: Sequence[Step], i: int, change: Tensor, slope: Tensor) -> Tensor:
    """UniC's addition to z0 over step i - 1, from the `change` of z0 at its end and the predicted `slope` (Zhao et al.
    2023, eq. 5: two equations for two weights, solved by hand)."""
    if i == 1:
        return change / 2
    s = steps[i - 1]
    h = s.half_log_snr_to - s.half_log_snr
    r = (steps[i - 2].half_log_snr - s.half_log_snr) / h
    b_h = math.expm1(-h)
    phi_2 = b_h / -h - 1
    phi_3 = phi_2 / -h - 1 / 2
    b_1, b_2 = phi_2 / b_h, 2 * phi_3 / b_h
    weight = (b_1 - b_2) / (1 - r)
    return weight * slope + (b_1 - weight) * change


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f for f in (ddpm, ddim, euler, euler_a, heun, dpmpp_2m, unipc, pndm)
}


def get_sampler(name: str) -> Callable[..., Tensor]:
    """The sampler of that name. Raises UserError for an unknown one."""
    if name not in SAMPLERS:
        raise UserError(f"sampler {name!r} is unknown; allowed: {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def make_grid(schedule: Schedule, sampler: str, steps: int, spacing: str | None = None) -> Grid:
    """The timesteps of diffusers' scheduler for `sampler`, with `spacing` (Lin et al. 2023, table 2; default: the
    config's).

    Where alpha ends at exactly 0, samplers that divide by it get the finite schedule. Raises UserError for an unknown
    sampler or spacing, or more steps than the timesteps allow.
    """
    get_sampler(sampler)
    spacing = spacing or schedule.config.timestep_spacing or DEFAULT_SPACING.get(sampler, "linspace")
    if sampler not in ("ddpm", "ddim"):
        schedule = Schedule(schedule.config, finite=True)
    t = _timesteps(schedule, sampler, steps, spacing)
    placed = tuple(_steps(schedule, sampler, t))
    # diffusers starts its Euler family at x = ratio * noise; for leading, at sqrt(ratio^2 + 1) * noise.
    scaled = sampler in ("euler", "euler_a", "heun") and spacing != "leading"
    scale, stride = placed[0].sigma if scaled else 1.0, len(schedule) // steps
    return Grid(schedule=schedule, steps=placed, initial_scale=scale, stride=stride)


def _timesteps(schedule: Schedule, sampler: str, steps: int, spacing: str) -> Tensor:
    """Descending timesteps (steps,), float32: whole numbers, but for the Euler family with linspace."""
    total, offset = len(schedule), schedule.config.steps_offset
    if spacing not in SPACINGS:
        raise UserError(f"timestep spacing {spacing!r} is unknown; allowed: {', '.join(SPACINGS)}")
    if not 1 <= steps <= total:
        raise UserError(f"steps {steps} is out of range; allowed: 1 to {total}")
    # The multistep samplers place one timestep more and drop the last.
    extra = sampler in ("dpmpp_2m", "unipc")
    if spacing == "trailing":
        t = (total - torch.arange(steps, dtype=torch.float64) * (total / steps)).round() - 1
    elif spacing == "leading":
        t = torch.arange(steps + extra).flip(0)[:steps] * (total // (steps + extra)) + offset
    else:
        t = torch.linspace(0, total - 1, steps + extra, dtype=torch.float64).flip(0)[:steps]
        t = t if sampler in ("euler", "euler_a", "heun") else t.round()
    if t[0] > total - 1 or (t.diff() >= 0).any():
        raise UserError(f"{sampler} with {spacing} spacing cannot place {steps} steps on {total} timesteps; use fewer")
    return t.float()


def _steps(schedule: Schedule, sampler: str, t: Tensor) -> list[Step]:
    """Each step ends where the next starts, the last at alpha 1; diffusers' DDIM and PNDM go to t - T // steps."""
    alpha, sigma = schedule.alpha(t).tolist(), schedule.sigma(t).tolist()
    to = list(zip(alpha[1:] + [1.0], sigma[1:] + [0.0], strict=True))
    if sampler in ("ddim", "pndm"):
        clean = (1.0, 0.0)
        to_one = schedule.config.set_alpha_to_one
        if not (sampler == "ddim" if to_one is None else to_one):
            clean = schedule.alpha(0).item(), schedule.sigma(0).item()
        before = [int(x) - len(schedule) // len(t) for x in t]
        to = [(schedule.alpha(b).item(), schedule.sigma(b).item()) if b >= 0 else clean for b in before]
    return [
        Step(t=x, alpha=a, sigma=s, to_alpha=to_a, to_sigma=to_s)
        for x, a, s, (to_a, to_s) in zip(t.tolist(), alpha, sigma, to, strict=True)
    ]
