"""Samplers: one short pure function each, from noise to z0 through `denoise(z_t, step) -> z0`.

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
from ldm.diffusion import Denoise, Schedule, ScheduleConfig, Sigmas, Step

Noise = Callable[[], Tensor]  # draws a standard normal of z's shape
OnStep = Callable[[int, float, Tensor, Tensor], None]  # (step, t, z_t, z0)
ADAMS_BASHFORTH = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
EULER = ("euler", "euler_a", "heun", "dpmpp_sde")
MULTISTEP = ("dpmpp_2m", "dpmpp_2m_sde", "unipc", "deis")
PLACED = ("euler", "heun", "dpmpp_sde", *MULTISTEP)  # samplers that take sigmas
BLOCK = 2**24  # random numbers that are drawn ahead
LCM_STEPS = 50  # on which latent consistency models are distilled


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The steps of a sampler from `initial_scale` times a standard normal; `schedule` is its Denoiser's."""

    schedule: Schedule
    steps: tuple[Step, ...]
    initial_scale: float


class ImageNoise:
    """Noise that depends on each image's seed alone, never on the batch it is drawn in.

    Each call returns the next (len(seeds), *shape) float32 standard normals, image i from
    `torch.Generator("cpu").manual_seed(seeds[i])`. `count` calls are drawn ahead, within BLOCK, and uploaded as one.
    Raises UserError unless 0 <= seed < 2**63.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu", count: int = 1):
        for seed in seeds:
            if not 0 <= seed < 2**63:
                raise UserError(f"seed {seed} is not allowed: 0 to 2^63 - 1")
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self.shape, self.device, self.count, self.block = tuple(shape), device, count, []

    def __call__(self) -> Tensor:
        if not self.block:
            size = max(1, min(self.count, BLOCK // (len(self.generators) * math.prod(self.shape))))
            self.count -= size
            draws = [torch.randn(self.shape, generator=g) for _ in range(size) for g in self.generators]
            self.block = [*torch.stack(draws).to(self.device).unflatten(0, (size, -1))]
        return self.block.pop(0)


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
    """Euler's method on Karras et al. 2022, eq. 1 (algorithm 2 with no churn and no second order): the step of DDIM."""
    return ddim(denoise, z, grid, noise, on_step)


def euler_a(denoise: Denoise, z: Tensor, grid: Grid, noise: Noise, on_step: OnStep | None = None) -> Tensor:
    """Euler with ancestral noise: a step down to less noise than asked for, the rest drawn afresh."""
    for i, s in enumerate(grid.steps):
        z0, _ = _evaluate(denoise, z, s, i, on_step)
        z = _ancestral_step(z, z0, s, noise)
    return z


def dpmpp_sde(denoise: Denoise, z: Tensor, grid: Grid, noise: Noise, on_step: OnStep | None = None) -> Tensor:
    """DPM-Solver++(S) of order 2 on the SDE, as k-diffusion and diffusers take it: an ancestral step to the geometric
    mean of the noise levels, and the whole step with z0 from there; two model calls per step, one for the last."""
    for i, s in enumerate(grid.steps):
        z0, _ = _evaluate(denoise, z, s, i, on_step)
        if s.to_sigma:
            half = _ancestral_step(z, z0, s._replace(to_alpha=s.second.alpha, to_sigma=s.second.sigma), noise)
            z0 = denoise(half, s.second)
        z = _ancestral_step(z, z0, s, noise)
    return z


def lcm(denoise: Denoise, z: Tensor, grid: Grid, noise: Noise, on_step: OnStep | None = None) -> Tensor:
    """Multistep consistency sampling (Luo et al. 2023, algorithm 3): z0, and noise of the next level on it."""
    for i, s in enumerate(grid.steps):
        z0, _ = _evaluate(denoise, z, s, i, on_step)
        scaled = 20 * s.t  # t * 10 / 0.5, of the boundary condition (Luo et al. 2023, section 4.1)
        z0 = (scaled * z0 + z / math.hypot(scaled, 1)) / math.hypot(scaled, 1)
        z = s.to_alpha * z0
        if s.to_sigma:
            z = z + s.to_sigma * noise()
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


def dpmpp_2m_sde(denoise: Denoise, z: Tensor, grid: Grid, noise: Noise, on_step: OnStep | None = None) -> Tensor:
    """dpmpp_2m on the SDE (Lu et al. 2022, appendix B): twice the noise is taken out, and as much drawn afresh."""
    last_z0 = None
    for i, s in enumerate(grid.steps):
        z0, _ = _evaluate(denoise, z, s, i, on_step)
        kept = s.alpha * s.to_sigma / (s.sigma * s.to_alpha)  # exp(-h)
        change = s.to_alpha * (1 - kept**2) * (z0 + _slope(grid.steps, i, z0, last_z0) / 2)
        z = kept * s.to_sigma / s.sigma * z + change
        if s.to_sigma:
            z = z + s.to_sigma * math.sqrt(1 - kept**2) * noise()
        last_z0 = z0
    return z


def deis(denoise: Denoise, z: Tensor, grid: Grid, noise: Noise, on_step: OnStep | None = None) -> Tensor:
    """tAB-DEIS of order 2 in log(sigma / alpha) (Zhang & Chen 2023, eq. 15); ends at timestep 0, as in diffusers."""
    last_eps = last = None
    for i, s in enumerate(grid.steps):
        _, eps = _evaluate(denoise, z, s, i, on_step)
        here, there = s.sigma / s.alpha, s.to_sigma / s.to_alpha
        change = (there - here) * eps
        if i and not (i + 1 == len(grid.steps) < 15):
            # the integral of log(rho / here) / log(here / last), from here to there
            weight = (there * (math.log(there / here) - 1) + here) / math.log(here / last)
            change = change + weight * (eps - last_eps)
        z = s.to_alpha * (z / s.alpha + change)
        last_eps, last = eps, here
    return z


def unipc(denoise: Denoise, z: Tensor, grid: Grid, noise: Noise, on_step: OnStep | None = None) -> Tensor:
    """UniPC of order 2 with B2(h) on z0 (Zhao et al. 2023, algorithms 5 and 6): the step of dpmpp_2m, corrected with
    the model's output at its end, which costs no further call."""
    start = last_z0 = slope = None
    for i, s in enumerate(grid.steps):
        z0, _ = _evaluate(denoise, z, s, i, on_step)
        if i:
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
            z = move(z, (past[0] + again) / 2, there.second)  # with leading spacing it is this step
        else:
            z = move(z, sum(w * output for w, output in zip(ADAMS_BASHFORTH[min(i, 3)], past, strict=True)), s)
    return z


def _evaluate(denoise: Denoise, z: Tensor, s: Step, i: int = 0, on_step: OnStep | None = None) -> tuple[Tensor, Tensor]:
    """z0 and eps at the start of a step, reported to `on_step`."""
    z0 = denoise(z, s)
    if on_step is not None:
        on_step(i, s.t, z, z0)
    return z0, (z - s.alpha * z0) / s.sigma


def _ancestral_step(z: Tensor, z0: Tensor, s: Step, noise: Noise) -> Tensor:
    """A step down to less noise than it ends at, and the rest drawn afresh: there^2 = down^2 + up^2."""
    here, there = s.sigma / s.alpha, s.to_sigma / s.to_alpha
    up, eps = there * math.sqrt(1 - (there / here) ** 2), (z - s.alpha * z0) / s.sigma
    z = s.to_alpha * (z0 + there**2 / here * eps)
    return z + s.to_alpha * up * noise() if up else z


def _exponential_step(z: Tensor, z0: Tensor, s: Step, correction: Tensor | float) -> Tensor:
    """Exact step for a z0 that is constant in lambda (Lu et al. 2022, eq. 3.7), with `correction` added."""
    shrink = s.to_sigma / s.sigma
    return shrink * z + (s.to_alpha - shrink * s.alpha) * (z0 + correction)


def _half_log_snrs(steps: Sequence[Step]) -> list[float]:
    """lambda = log(alpha / sigma) at the start of each step, the time of the DPM-Solver papers."""
    return [math.log(s.alpha / s.sigma) for s in steps]


def _slope(steps: Sequence[Step], i: int, z0: Tensor, last_z0: Tensor | None) -> Tensor | float:
    """Change of z0 over step i, extrapolated from the step before; 0 where order 1 is due: at the first step, and at
    the last, which ends at infinite lambda."""
    if i == 0 or i + 1 == len(steps):
        return 0.0
    before, here, after = _half_log_snrs(steps[i - 1 : i + 2])
    return (z0 - last_z0) * ((after - here) / (here - before))


def _corrector(steps: Sequence[Step], i: int, change: Tensor, slope: Tensor) -> Tensor:
    """UniC's addition to z0 over step i - 1, from the `change` of z0 at its end and the predicted `slope` (Zhao et al.
    2023, eq. 5: two equations for two weights, solved by hand)."""
    if i == 1:
        return change / 2
    before, here, after = _half_log_snrs(steps[i - 2 : i + 1])
    h = after - here
    b_h = math.expm1(-h)
    phi_2 = b_h / -h - 1
    phi_3 = phi_2 / -h - 1 / 2
    b_1, b_2 = phi_2 / b_h, 2 * phi_3 / b_h
    weight = (b_1 - b_2) / (1 - (before - here) / h)
    return weight * slope + (b_1 - weight) * change


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "euler_a": euler_a,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_sde": dpmpp_sde,
    "unipc": unipc,
    "deis": deis,
    "pndm": pndm,
    "lcm": lcm,
}


def count_draws(name: str, steps: int, eta: float = 0.0, resample: int = 1) -> int:
    """Calls of `noise` in a sampling, at most: the first, those of its steps, and `resample` - 1 per model call."""
    fresh = 2 if name == "dpmpp_sde" else int(eta > 0 or name in ("ddpm", "euler_a", "dpmpp_2m_sde", "lcm"))
    calls = (2 if name in ("heun", "dpmpp_sde") else 1) * steps + (name == "pndm")
    return 1 + steps * fresh + (resample - 1) * calls


def get_sampler(name: str) -> Callable[..., Tensor]:
    """The sampler of that name. Raises UserError for an unknown one."""
    if name not in SAMPLERS:
        raise UserError(f"sampler {name!r} is unknown; allowed: {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def place_ratios(name: Sigmas, low: Tensor, high: Tensor, steps: int) -> Tensor:
    """sigma / alpha of the steps, float64 (steps,) from `high` to `low`."""
    place = torch.linspace(0, 1, steps, dtype=torch.float64)
    if name == "karras":  # Karras et al. 2022, eq. 5
        return torch.lerp(high ** (1 / 7), low ** (1 / 7), place) ** 7
    if name == "exponential":
        return torch.lerp(high.log(), low.log(), place).exp()
    if name == "beta":  # Lee et al. 2024, "Beta sampling is all you need"
        from scipy.stats import beta

        return torch.lerp(low, high, torch.from_numpy(beta.ppf(1 - place.numpy(), 0.6, 0.6)))
    raise UserError(
        f"sigmas {name!r} are unknown; allowed: karras, exponential, beta, or none for those of the spacing"
    )


def make_grid(
    schedule: Schedule, sampler: str, steps: int, spacing: str | None = None, sigmas: str | None = None
) -> Grid:
    """The timesteps of diffusers' scheduler for `sampler`, with `spacing` (Lin et al. 2023, table 2) or at the noise
    levels `sigmas` (default: the config's; "none": those of the spacing).

    They are whole numbers, but for the Euler family with linspace or `sigmas`. Where alpha ends at exactly 0,
    samplers that divide by it get the finite schedule. Raises UserError for an unknown sampler, spacing or sigmas, or
    more steps than the timesteps allow.
    """
    get_sampler(sampler)
    config, total, stride = schedule.config, len(schedule), len(schedule) // max(steps, 1)
    default = "leading" if sampler in ("ddpm", "ddim", "pndm") else "linspace"  # as in diffusers
    spacing = spacing or config.timestep_spacing or default
    if sigmas not in (None, "none") and sampler not in PLACED:
        raise UserError(f"{sampler} has no sigmas {sigmas!r}; samplers that have: {', '.join(PLACED)}")
    sigmas = (sigmas or config.sigmas or "none") if sampler in PLACED else "none"
    most = min(total, LCM_STEPS) if sampler == "lcm" else total
    if not 1 <= steps <= most:
        raise UserError(f"steps {steps} is out of range for {sampler}; allowed: 1 to {most}")
    count = steps + (sampler in MULTISTEP)  # these place one timestep more and drop the last
    if sampler == "lcm":
        t = (LCM_STEPS - torch.arange(steps) * LCM_STEPS // steps) * (total // LCM_STEPS) - 1
    elif spacing == "trailing":
        t = (total - torch.arange(steps, dtype=torch.float64) * (total / steps)).round() - 1
    elif spacing == "leading":
        t = torch.arange(count).flip(0)[:steps] * (total // count) + config.steps_offset
    elif spacing == "linspace":
        t = torch.linspace(0, total - 1, count, dtype=torch.float64).flip(0)[:steps]
        t = t if sampler in EULER else t.round()
    else:
        raise UserError(f"timestep spacing {spacing!r} is unknown; allowed: leading, trailing, linspace")
    if t[0] > total - 1 or (t.diff() >= 0).any():
        raise UserError(f"{sampler} with {spacing} spacing cannot place {steps} steps on {total} timesteps; use fewer")
    schedule = Schedule(config, finite=sampler not in ("ddpm", "ddim", "lcm"))
    if sigmas != "none" or sampler == "dpmpp_sde":
        ratios = schedule.ratio_at(t)
        if sigmas != "none":
            ends = ratios[[-1, 0]] if sampler in EULER else schedule.ratio[[0, -1]]
            ratios = place_ratios(sigmas, *ends, steps)
        schedule = Schedule(config, finite=True, geometric=True)
        t = schedule.timestep(ratios)
    t = t.float()
    alpha, sigma = schedule.alpha(t).tolist(), schedule.sigma(t).tolist()
    # Each step ends where the next starts, the last at alpha 1; diffusers' DDIM and PNDM go to t - T // steps.
    ends = [*zip(alpha[1:], sigma[1:], strict=True), (1.0, 0.0)]
    if sampler in ("ddim", "pndm"):
        before = t.long() - stride
        ends = torch.stack([schedule.alpha(before.clamp(min=0)), schedule.sigma(before.clamp(min=0))], 1).tolist()
        to_one = sampler == "ddim" if config.set_alpha_to_one is None else config.set_alpha_to_one
        if to_one and before[-1] < 0:
            ends[-1] = (1.0, 0.0)
    if sampler == "deis":
        ends[-1] = schedule.alpha(0).item(), schedule.sigma(0).item()
    placed = [
        Step(*start, *end) for *start, end in zip(_asked(t, sampler, sigmas, config), alpha, sigma, ends, strict=True)
    ]
    if sampler in ("pndm", "dpmpp_sde"):
        middle = torch.tensor([s.sigma * s.to_sigma / s.alpha / s.to_alpha for s in placed], dtype=torch.float64).sqrt()
        t = t + stride if sampler == "pndm" else schedule.timestep(middle).float()
        second = zip(t.tolist(), schedule.alpha(t).tolist(), schedule.sigma(t).tolist(), alpha, sigma, strict=True)
        placed = [s._replace(second=Step(*other)) for s, other in zip(placed, second, strict=True)]
    # diffusers starts its Euler family at x = ratio * noise; for leading, at sqrt(ratio^2 + 1) * noise.
    scale = sigma[0] if sampler in EULER and spacing != "leading" else 1.0
    return Grid(schedule=schedule, steps=tuple(placed), initial_scale=scale)


def _asked(t: Tensor, sampler: str, sigmas: str, config: ScheduleConfig) -> list[float]:
    """The timesteps at which diffusers' scheduler asks the model, which knows none between two whole ones."""
    if sampler in EULER or sigmas == "none":
        return t.tolist()
    cosine = config.beta_schedule == "squaredcos_cap_v2" and sampler in ("dpmpp_2m", "dpmpp_2m_sde")
    if sigmas == "karras" and not cosine:
        return t.round().tolist()
    return (t - 1e-3).floor().clamp(min=0).tolist()  # its float32 takes the first, T - 1, for a little less
