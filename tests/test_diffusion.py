"""Schedules against diffusers, predictions, weights, timestep densities and guidance."""

import diffusers
import pytest
import scipy.special
import scipy.stats
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from tiny_models import normal

from ldm.diffusion import Denoiser, Schedule, ScheduleConfig, Step, guided, loss_weight, sample_timesteps

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SCHEDULES = ("scaled_linear", "linear", "squaredcos_cap_v2")
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
T = torch.tensor([0, 1, 250, 998, 999])
STEP = Step(400.0, 0.6, 0.8)


def schedule(prediction="v_prediction", zero=False, **options):
    return Schedule(ScheduleConfig(prediction_type=prediction, rescale_betas_zero_snr=zero, **options))


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_equals_diffusers(name, zero):
    ours = schedule(zero=zero, beta_schedule=name)
    for kind in (diffusers.DDPMScheduler, diffusers.DDIMScheduler):
        theirs = kind(**BETAS | {"beta_schedule": name}, rescale_betas_zero_snr=zero)
        assert (ours.alphas_cumprod - theirs.alphas_cumprod).abs().max() < 2e-6
    t = torch.arange(1000)
    assert torch.allclose(ours.alpha(t) ** 2, ours.alphas_cumprod, atol=1e-14, rtol=1e-12)
    assert torch.allclose(ours.alpha(t) ** 2 + ours.sigma(t) ** 2, torch.ones(1000).double(), atol=1e-14)
    assert (ours.ratio_at(t).diff() > 0).all() and (ours.alpha(999).item() == 0) == zero
    finite = diffusers.EulerDiscreteScheduler(**BETAS | {"beta_schedule": name}, rescale_betas_zero_snr=zero)
    last = Schedule(ours.config, finite=True).alphas_cumprod[-1]
    assert last.item() == pytest.approx(finite.alphas_cumprod[-1].item(), rel=1e-3)


@pytest.mark.parametrize("zero", [False, True])
def test_noise_and_velocity_equal_diffusers(zero):
    s, theirs = schedule(zero=zero), diffusers.DDPMScheduler(**BETAS, rescale_betas_zero_snr=zero)
    z0, eps = normal(5, 4, 3, 3), normal(5, 4, 3, 3, seed=3)
    assert torch.allclose(s.add_noise(z0, eps, T), theirs.add_noise(z0, eps, T), atol=1e-5)
    assert torch.allclose(Denoiser(None, s).target(z0, eps, T), theirs.get_velocity(z0, eps, T), atol=1e-5)


def test_min_snr_weights():
    """Each prediction's weighted error is the same weighted error of z0, with weight min(SNR, gamma)."""
    s, gamma = schedule(), 5.0
    snr = s.ratio_at(T) ** -2
    z0, eps, guess = normal(5, 4).double(), normal(5, 4, seed=3).double(), normal(5, 4, seed=2).double()
    z_t = s.add_noise(z0, eps, T)
    assert (snr > gamma).any() and (snr < gamma).any()
    for prediction in PREDICTIONS:
        denoiser = Denoiser(None, schedule(prediction))
        error = (guess - denoiser.target(z0, eps, T)).square().mean(1)
        step = Step(T, s.alpha(T)[:, None], s.sigma(T)[:, None])
        z0_error = (denoiser.to_z0(z_t, step, guess) - z0).square().mean(1)
        weighted = loss_weight(s, T, prediction, gamma) * error
        assert torch.allclose(weighted, snr.clamp(max=gamma) * z0_error, rtol=1e-8)
        assert torch.equal(loss_weight(s, T, prediction, None), torch.ones(5).double())
    assert loss_weight(schedule(zero=True), T, "v_prediction", gamma)[-1] == 0


@pytest.mark.parametrize("density", ["uniform", "stratified", "logit_normal"])
def test_timestep_densities(density):
    t = sample_timesteps(40_000, 1000, density, torch.Generator().manual_seed(0), mean=0.7, std=1.2)
    assert t.dtype == torch.int64 and t.min() >= 0 and t.max() <= 999
    share = (t.float() + 0.5) / 1000
    if density == "logit_normal":
        assert (share.logit().mean().item(), share.logit().std().item()) == pytest.approx((0.7, 1.2), abs=0.02)
    else:
        assert (share.mean().item(), share.std().item()) == pytest.approx((0.5, 12**-0.5), abs=0.01)


def test_stratified_timesteps_cover_every_stratum():
    for seed in range(5):
        t = sample_timesteps(10, 1000, "stratified", torch.Generator().manual_seed(seed))
        assert ((t.sort().values // 100).unique() == torch.arange(10)).all()
        t = sample_timesteps(10, 100_000, "logit_normal", torch.Generator().manual_seed(seed))
        tenths = torch.from_numpy(scipy.stats.norm.cdf(scipy.special.logit((t.sort().values + 0.5) / 100_000))) * 10
        assert (tenths.floor() == torch.arange(10)).all()


class Counter:
    """A stand-in U-Net that counts calls and the contexts in each."""

    def __init__(self):
        self.batches = []

    def __call__(self, z_t, t, context):
        self.batches.append(len(context))
        return torch.tanh(z_t * (1 + t / 1000) + context.mean((1, 2))[:, None, None, None])


CONTEXTS = normal(3, 5, 6, seed=3), normal(3, 5, 6, seed=2)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guidance_equals_two_passes_and_diffusers_rescale(prediction, rescale):
    z_t, t, (context, negative) = normal(3, 2, 4, 4), STEP.t, CONTEXTS
    denoiser = Denoiser(Counter(), schedule(prediction))
    on, off = denoiser.predict(z_t, t, context), denoiser.predict(z_t, t, negative)
    want = rescale_noise_cfg(off + 4 * (on - off), on, rescale)
    got = guided(denoiser, context, negative, 4.0, rescale)(z_t, STEP)
    assert torch.allclose(got, denoiser.to_z0(z_t, STEP, want), atol=1e-5)


def test_guidance_acts_in_its_interval_only():
    model, (context, negative) = Counter(), CONTEXTS
    denoiser = Denoiser(model, schedule())
    denoise = guided(denoiser, context, negative, 3.0, interval=(200, 800))
    z_t = normal(3, 2, 4, 4)
    for t in (199.0, 200.0, 800.0, 801.0):
        denoise(z_t, STEP._replace(t=t))
    guided(denoiser, context, negative, guidance=1.0)(z_t, STEP)
    assert model.batches == [3, 6, 6, 3, 3]
    half = Denoiser(lambda z_t, t, context: z_t.bfloat16(), schedule("sample"))
    assert half(z_t, STEP, None).dtype == torch.float32
    outside = STEP._replace(t=900.0)
    assert torch.equal(denoise(z_t, outside), denoiser(z_t, outside, context))
