"""Samplers against diffusers' schedulers, against a closed form, and their grids and noise."""

import contextlib
import functools
from dataclasses import replace

import diffusers
import pytest
import torch
from sde_scheduler import DPMSolverSDEScheduler
from tiny_models import unet_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldm import samplers
from ldm.config import UserError
from ldm.diffusion import Denoiser, Schedule, ScheduleConfig, guided
from ldm.edit import keep
from ldm.samplers import PLACED, SAMPLERS, ImageNoise, count_draws, make_grid
from ldm.unet import UNet

SHAPE = (2, 3, 4, 4)
REFERENCE = {
    "ddpm": (diffusers.DDPMScheduler, {"clip_sample": False}),
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_a": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_sde": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_sde": (DPMSolverSDEScheduler, {}),
    "deis": (diffusers.DEISMultistepScheduler, {}),
    "lcm": (diffusers.LCMScheduler, {}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
}
UNSCALED = ("heun", "pndm", "deis", "dpmpp_sde")  # whose classes know no zero terminal SNR
BOTH = ("beta_schedule", "beta_start", "beta_end", "prediction_type", "timestep_spacing", "steps_offset")


@functools.cache
def weights():
    g = torch.Generator().manual_seed(7)
    return torch.randn(3, 3, generator=g), torch.randn(3, 1, 1, generator=g)


def model(z_t, t, context=None):
    """A fixed smooth nonlinear net: mixes channels and neighbours, depends on t."""
    mix, bias = (w.to(z_t.dtype) for w in weights())
    h = torch.einsum("dc,bchw->bdhw", mix, z_t) + torch.roll(z_t, 1, -1) + bias * (1 + t / 500).to(z_t.dtype)
    return torch.tanh(h)


def schedule(prediction, spacing, **options):
    return ScheduleConfig(prediction_type=prediction, timestep_spacing=spacing, **options)


def reference(sampler, config, steps, first, later, eta=0.0):
    """diffusers' own loop, as its Stable Diffusion pipeline runs it: (z0, timesteps)."""
    kind, extra = REFERENCE[sampler]
    extra = extra | {name: getattr(config, name) for name in BOTH}
    prediction = config.prediction_type
    if config.sigmas:
        extra[f"use_{config.sigmas}_sigmas"] = True
    if sampler == "euler_a" and prediction == "sample":
        extra["prediction_type"] = "epsilon"  # it knows no "sample"
    if sampler not in UNSCALED:
        extra["rescale_betas_zero_snr"] = config.rescale_betas_zero_snr
    if sampler in ("ddim", "pndm"):
        extra["set_alpha_to_one"] = config.set_alpha_to_one
    scheduler = kind(**extra)
    scheduler.set_timesteps(steps)
    getattr(scheduler, "set_begin_index", int)(0)  # else it looks for the first timestep, which may come twice
    if stiff(sampler, config):
        exact = Schedule(config, finite=True)
        scheduler.alphas_cumprod = exact.alphas_cumprod
        last = exact.ratio[:1] if sampler == "deis" else torch.zeros(1)
        scheduler.sigmas = torch.cat([exact.ratio_at(scheduler.timesteps), last])
    z = first * scheduler.init_noise_sigma
    if sampler == "dpmpp_sde":
        scheduler.noise_sampler = lambda start, end: torch.randn(SHAPE, generator=later)
    options = {"generator": later} if sampler in ("ddpm", "ddim", "euler_a", "dpmpp_2m_sde", "lcm") else {}
    options |= {"eta": eta} if sampler == "ddim" else {}
    for t in scheduler.timesteps:
        z_in = scheduler.scale_model_input(z, t)
        out = model(z_in, t)
        if extra["prediction_type"] != prediction:
            ratio = scheduler.sigmas[scheduler.step_index]
            alpha, sigma = (1 + ratio**2) ** -0.5, ratio * (1 + ratio**2) ** -0.5
            out = (z_in - alpha * out) / sigma
        z = scheduler.step(out, t, z, **options).prev_sample
    return z, scheduler.timesteps


def stiff(sampler, config):
    """Heun, DEIS, and the sum that PNDM is written as, multiply differences by the first sigma / alpha, thousands here:
    in float32, with diffusers' float32 tables, only rounding errors would be compared (and they know no zero-SNR)."""
    steep = config.rescale_betas_zero_snr or config.beta_schedule == "squaredcos_cap_v2"
    return steep and sampler in ("heun", "pndm", "deis")


def compare(sampler, config, steps, **options):
    first = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    first = first.double() if stiff(sampler, config) else first
    ours, theirs = (torch.Generator().manual_seed(1) for _ in range(2))
    want, timesteps = reference(sampler, config, steps, first, theirs, options.get("eta", 0.0))
    grid = make_grid(Schedule(config), sampler, steps)
    denoise = functools.partial(Denoiser(model, grid.schedule), context=None)
    noise = functools.partial(torch.randn, SHAPE, generator=ours)
    got = SAMPLERS[sampler](denoise, first * grid.initial_scale, grid, noise, **options)
    asked = timesteps.unique().flip(0) if sampler == "pndm" else timesteps
    asked = asked[::2] if sampler in ("heun", "dpmpp_sde") else asked  # two calls per step
    placed = torch.tensor([s.t for s in grid.steps])
    assert torch.allclose(placed, asked.float(), rtol=0, atol=0.02 if sampler == "dpmpp_sde" or config.sigmas else 0)
    tolerance = 1e-4
    if sampler in ("euler", "euler_a"):  # what float32 leaves of diffusers' x = z / alpha at the start
        tolerance += torch.finfo(torch.float32).eps * grid.steps[0].sigma / grid.steps[0].alpha
    assert (got - want).abs().max() <= tolerance * max(1, want.abs().max())


PREDICTIONS = [(s, p) for s in SAMPLERS for p in ("epsilon", "v_prediction", "sample")]
PREDICTIONS = [pair for pair in PREDICTIONS if pair not in (("pndm", "sample"), ("dpmpp_sde", "sample"))]  # not there


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(("sampler", "prediction"), PREDICTIONS)
def test_equals_diffusers(sampler, spacing, prediction):
    for steps, offset, betas in ((1, 0, "linear"), (2, 1, "scaled_linear"), (5, 0, "scaled_linear")):
        compare(sampler, schedule(prediction, spacing, steps_offset=offset, beta_schedule=betas), steps)
    compare(sampler, schedule(prediction, spacing), 20)
    compare(sampler, schedule(prediction, spacing, beta_schedule="squaredcos_cap_v2"), 12)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("to_one", [False, True])
def test_last_alpha_lengths_of_pndm_and_eta_of_ddim(to_one, spacing):
    config = schedule("v_prediction", spacing, set_alpha_to_one=to_one)
    for steps in (3, 4, 7, 25):
        compare("pndm", config, steps)
    for eta in (0.3, 1.0):
        compare("ddim", config, 20, eta=eta)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in UNSCALED or name == "heun"])
def test_zero_terminal_snr_equals_diffusers(sampler, prediction):
    config = schedule(prediction, "trailing", rescale_betas_zero_snr=True)
    for steps in (1, 2, 5, 20):
        compare(sampler, config, steps)


@pytest.mark.parametrize("sigmas", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("sampler", PLACED)
def test_sigmas_equal_diffusers(sampler, sigmas):
    for spacing, prediction in (("leading", "epsilon"), ("trailing", "v_prediction")):
        config = schedule(prediction, spacing, sigmas=sigmas)
        for steps in (2, 5, 20, 50):  # at 50 some timesteps come twice
            compare(sampler, config, steps)
        if sampler in ("euler", "dpmpp_2m", "unipc"):  # in float32 the others are too stiff
            compare(sampler, replace(config, beta_schedule="squaredcos_cap_v2"), 12)
        plain = make_grid(Schedule(replace(config, sigmas=None)), sampler, 5)
        assert make_grid(Schedule(config), sampler, 5, sigmas="none").steps[1].t == int(plain.steps[1].t)


MU, S = 0.7, 0.5  # the data of the closed forms: every element N(MU, S^2)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "lcm"])  # which wants a consistency model
def test_reproduces_a_gaussian(sampler):
    config = schedule("v_prediction", "trailing", rescale_betas_zero_snr=True)
    grid, noise = make_grid(Schedule(config), sampler, 500), ImageNoise([0], (20_000,))

    def denoise(z_t, s):  # E[z0 | z_t]
        return MU + s.alpha * S**2 / (s.alpha**2 * S**2 + s.sigma**2) * (z_t - s.alpha * MU)

    z0 = SAMPLERS[sampler](denoise, grid.initial_scale * noise().double(), grid, noise)
    assert z0.mean().item() == pytest.approx(MU, abs=0.015)
    assert z0.std().item() == pytest.approx(S, rel=0.025)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_calls_reports_and_leaves_its_input_alone(sampler):
    grid = make_grid(Schedule(ScheduleConfig()), sampler, 6)
    called, seen = [], []

    def denoise(z_t, s):
        called.append(s.t)
        return 0.5 * z_t

    z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    before = z.clone()
    noise = ImageNoise([3, 4], SHAPE[1:])
    SAMPLERS[sampler](denoise, z, grid, noise, lambda i, t, z_t, z0: seen.append((i, t, z_t, z0)))
    assert torch.equal(z, before)
    assert len(called) == {"heun": 11, "dpmpp_sde": 11, "pndm": 7}.get(sampler, 6)
    assert [i for i, *_ in seen] == list(range(6)) and [t for _, t, *_ in seen] == [s.t for s in grid.steps]
    assert all(torch.equal(z0, 0.5 * z_t) for *_, z_t, z0 in seen)


class Apart(TorchDispatchMode):
    """Refuses to wait for a value of a tensor, and copies from one device to another."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "the program waits for the device"
        output = function(*args, **kwargs or {})
        devices = {x.device for x in tree_leaves((args, output)) if torch.is_tensor(x)}
        assert len(devices) < 2, f"{function} copies between {devices}"
        return output


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps_neither_wait_for_the_gpu_nor_send_to_it(sampler):
    """Once computed on the CPU, and once as if on a GPU, where tensors have a device and no values."""
    grid = make_grid(Schedule(ScheduleConfig()), sampler, 3)
    for device, numbers in ("cpu", contextlib.nullcontext()), ("cuda", FakeTensorMode()):
        with numbers:
            with torch.device(device):
                unet, context, mask = UNet(unet_config((16,))), torch.zeros(2, 3, 24), torch.ones(2, 1, 8, 8)
            noise = ImageNoise([0, 1], (4, 8, 8), device, count_draws(sampler, 3, resample=2))
            eps, denoiser = noise(), Denoiser(unet, grid.schedule)
            denoise = keep(guided(denoiser, context, context, 5.0, 0.7, (200, 800)), eps, eps, mask, noise, 2)
            with torch.no_grad(), Apart():
                z0 = SAMPLERS[sampler](denoise, grid.initial_scale * eps, grid, noise, lambda *report: None)
        assert z0.device.type == device


@pytest.mark.parametrize("block", [2**24, 3 * 3 * 60])
def test_noise_of_an_image_does_not_depend_on_its_batch(monkeypatch, block):
    """Nor on what is drawn ahead: two calls, or as many as fit a block."""
    monkeypatch.setattr(samplers, "BLOCK", block)
    shape = (3, 4, 5)
    together = ImageNoise([0, 1, 2], shape, count=2)
    alone = ImageNoise([1], shape)
    contract = torch.Generator("cpu").manual_seed(1)
    for _ in range(3):
        batch = together()
        assert batch.shape == (3, *shape) and batch.dtype == torch.float32
        assert torch.equal(batch[1:2], alone())
        assert torch.equal(batch[1], torch.randn(shape, generator=contract))
    assert not torch.equal(batch[0], batch[1])


def test_mistakes_are_one_clear_line():
    for arguments, message in (
        (("ddim", 10, "karras"), "leading, trailing, linspace"),
        (("ddim", 10, None, "karras"), "samplers that have: euler, heun, "),
        (("euler", 10, None, "cosine"), "allowed: karras, exponential, beta"),
        (("lcm", 51), "1 to 50"),
        (("ddim", 1001), "1 to 1000"),
        (("ddim", 1000), "use fewer"),  # the offset would ask for t = 1000
        (("dpmpp_2m", 1000), "use fewer"),  # 1000 // 1001 leaves no stride
    ):
        with pytest.raises(UserError, match=message):
            make_grid(Schedule(ScheduleConfig(steps_offset=1)), *arguments)
