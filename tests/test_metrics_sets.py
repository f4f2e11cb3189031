"""Distances between sets of pictures and their intervals, against torch-fidelity, torchmetrics, prdc, scipy, and closed
forms."""

import numpy as np
import pytest
import torch
from test_metrics import two_sets

from ldm.metrics import (
    GaussianMoments,
    cmmd,
    cosine,
    frechet_distance,
    frechet_distance_infinite,
    inception_score,
    kernel_distance,
    precision_recall,
)
from ldm.metrics.diversity import nearest, neighbourhoods
from ldm.metrics.intervals import kernel_interval, mean_interval, resampled_interval


def normal(count: int, dimensions: int, seed: int, mean: float = 0.0, deviation: float = 1.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return mean + deviation * torch.randn(count, dimensions, generator=g, dtype=torch.float64)


def rows_with(mean: list[float], covariance: list[list[float]]) -> torch.Tensor:
    """Rows whose mean and covariance (ddof 1) are exactly those."""
    x = normal(50, len(mean), 0)
    x = x - x.mean(0)
    whiten = torch.linalg.inv(torch.linalg.cholesky(x.T @ x / 49)).T
    root = torch.linalg.cholesky(torch.tensor(covariance, dtype=torch.float64)).T
    return x @ whiten @ root + torch.tensor(mean, dtype=torch.float64)


def test_frechet_vectors():
    eye = torch.eye(8).tolist()
    four = (4 * torch.eye(8)).tolist()
    assert frechet_distance(rows_with([0.0] * 8, eye), rows_with([1.0] * 8, four)) == pytest.approx(16, abs=1e-9)
    a, b = rows_with([0.0, 0.0], [[2, 1], [1, 2]]), rows_with([0.0, 0.0], [[1, 0], [0, 3]])
    assert frechet_distance(a, b) == pytest.approx(0.5166852264521, abs=1e-9)
    x, y = two_sets()
    assert frechet_distance(x, y) == pytest.approx(13.952707919131, abs=1e-9)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_frechet_equals_scipy_torchmetrics_and_torch_fidelity():
    from scipy.linalg import sqrtm
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torchmetrics.image.fid import _compute_fid

    x, y = two_sets()
    s1, s2 = np.cov(x.numpy().T), np.cov(y.numpy().T)
    scipy = (x.mean(0) - y.mean(0)).square().sum().item() + np.trace(s1 + s2 - 2 * np.real(sqrtm(s1 @ s2)))
    torchmetrics = _compute_fid(x.mean(0), x.T.cov(), y.mean(0), y.T.cov()).item()
    fidelity = fid_statistics_to_metric(*map(fid_features_to_statistics, (x, y)), verbose=False)
    for oracle in (scipy, torchmetrics, fidelity["frechet_inception_distance"]):
        assert frechet_distance(x, y) == pytest.approx(oracle, rel=1e-8)


@pytest.mark.parametrize("count", [20, 63])
def test_frechet_of_fewer_rows_than_dimensions_equals_that_of_moments(count):
    x, y = two_sets()
    moments = GaussianMoments().update(x[:count]), GaussianMoments().update(y)
    assert frechet_distance(x[:count], y) == pytest.approx(frechet_distance(*moments), rel=1e-6)
    assert frechet_distance(x[:count], y[:20]) == pytest.approx(frechet_distance(y[:20], x[:count]), rel=1e-6)
    assert frechet_distance(x[:count], x[:count]) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("batch", [1, 7, 500])
def test_moments_do_not_depend_on_batches_or_processes(batch):
    x = two_sets()[0] + 1e4  # a large mean costs the naive formula its digits
    parts = [GaussianMoments(), GaussianMoments()]
    for i, rows in enumerate(x.split(batch)):
        parts[i % 2].update(rows)
    moments = GaussianMoments().merge(parts[0]).merge(parts[1]).merge(GaussianMoments())
    assert moments.count == 500 and torch.allclose(moments.mean, x.mean(0), rtol=1e-12)
    assert torch.allclose(moments.covariance, x.T.cov(), atol=1e-9)
    assert parts[0].count < 500 or batch == 500  # merging changes only its target


def test_bias_of_the_frechet_distance_is_its_formula():
    d, n = 64, 10_000
    measured = [frechet_distance(normal(n, d, 2 * s), normal(n, d, 2 * s + 1)) for s in range(4)]
    assert np.mean(measured) == pytest.approx(2 * (d + d * (d + 1) / 4) / n, rel=0.05)


def test_infinite_frechet_distance_is_nearer_to_the_truth():
    x, y = normal(10_000, 64, 0, 0.1, 1.2), normal(10_000, 64, 1)
    endless, true = frechet_distance_infinite(x, y), 64 * (0.1**2 + 0.2**2)
    assert endless == pytest.approx(true, abs=0.1) and abs(endless - true) < abs(frechet_distance(x, y) - true) / 3
    assert endless == frechet_distance_infinite(x, y) != frechet_distance_infinite(x, y, seed=1)
    one = normal(400, 1, 0) + 2, normal(400, 1, 1)
    assert frechet_distance_infinite(*one) == pytest.approx(4, abs=0.5)
    assert np.isfinite(frechet_distance_infinite(*(rows[:4] for rows in one)))


def test_kernel_distance_vectors_and_libraries():
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torchmetrics.image.kid import poly_mmd

    assert kernel_distance(torch.zeros(6, 4), torch.ones(6, 4), 1, 6) == (7.0, 0.0)
    x, y = two_sets()
    value, deviation = kernel_distance(x, y, subsets=1, subset_size=500)
    assert value == pytest.approx(0.1731452052726, abs=1e-12) and deviation == 0
    assert value == pytest.approx(poly_mmd(x, y).item(), abs=1e-9)
    options = {"kid_subsets": 1, "kid_subset_size": 500, "verbose": False}
    assert value == pytest.approx(kid_features_to_metric(x, y, **options)["kernel_inception_distance_mean"], abs=1e-9)


def test_kernel_distance_of_subsets_is_unbiased_and_seeded():
    x, y = normal(400, 8, 0), normal(400, 8, 1)
    many = [kernel_distance(x, y, subsets=40, subset_size=100, seed=s)[0] for s in range(5)]
    assert abs(np.mean(many)) < 0.02 and len(set(many)) == 5
    assert kernel_distance(x, y, 7, 50, seed=3) == kernel_distance(x, y, 7, 50, seed=3)
    assert kernel_distance(x, y + 0.5, 10, 100)[0] > 0.2


def test_cmmd_vectors_and_direct_sum():
    one = torch.tensor([[1.0, 0.0]])
    assert cmmd(one, -one) == pytest.approx(39.6026533865, abs=1e-8)
    assert cmmd(one, torch.tensor([[0.0, 2.0]])) == pytest.approx(19.9003325017, abs=1e-8)
    x, y = two_sets()
    assert cmmd(x, 3 * x) == pytest.approx(0, abs=1e-9)
    assert all(cmmd(normal(30, 8, seed), normal(30, 8, seed).flip(0)) >= 0 for seed in range(20))  # round-off
    u, v = (rows / rows.norm(dim=1, keepdim=True) for rows in (x[:40], y[:60]))
    kernel = lambda a, b: np.exp(-((a[:, None] - b[None]).square().sum(-1).numpy()) / 200).mean()  # noqa: E731
    assert cmmd(x[:40], y[:60]) == pytest.approx(1000 * (kernel(u, u) + kernel(v, v) - 2 * kernel(u, v)), abs=1e-8)


@pytest.mark.parametrize("count", [57, 200, 205])
def test_inception_score_vectors_and_torch_fidelity(count):
    from torch_fidelity.metric_isc import isc_features_to_metric

    assert inception_score(torch.eye(10).repeat(10, 1)) == pytest.approx((10, 0))
    assert inception_score(torch.full((40, 7), 1 / 7)) == pytest.approx((1, 0))
    logits = 3 * normal(count, 12, 0)
    theirs = isc_features_to_metric(logits, splits=10, shuffle=False)
    want = theirs["inception_score_mean"], theirs["inception_score_std"]
    assert inception_score(logits.softmax(1)) == pytest.approx(want, abs=1e-9)


def test_precision_recall_vectors():
    real, fake = torch.arange(5.0)[:, None], torch.tensor([[0.5], [10.0], [11.0]])
    want = {"precision": 1 / 3, "recall": 1, "density": 2 / 3, "coverage": 0.4}
    assert precision_recall(real, fake, k=1) == pytest.approx(want)
    x, _ = two_sets()
    assert precision_recall(x, x) == {"precision": 1, "recall": 1, "density": 1, "coverage": 1}


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_recall_equals_prdc_and_torch_fidelity(k):
    from prdc import compute_prdc
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, fake = normal(300, 6, 0), normal(1100, 6, 1, 0.3, 0.8)  # more than one chunk
    ours = precision_recall(real, fake, k)
    assert 0.3 < ours["recall"] < ours["precision"] < 1
    assert ours == pytest.approx(compute_prdc(real.numpy(), fake.numpy(), k), abs=1e-12)
    theirs = prc_features_to_metric(fake, real, prc_neighborhood=k, verbose=False)
    assert (ours["precision"], ours["recall"]) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)
    lengths = {"precision": 1100, "density": 1100, "recall": 300, "coverage": 300}
    assert {name: len(values) for name, values in neighbourhoods(real, fake, k).items()} == lengths


def test_nearest_is_exact():
    real, fake = normal(50, 4, 0), normal(30, 4, 1)
    distances, which = nearest(fake, real)
    direct = (fake[:, None] - real[None]).norm(dim=-1)
    assert torch.allclose(distances, direct.min(1).values) and torch.equal(which, direct.argmin(1))
    assert nearest(real, real)[0].max() == 0


def test_distances_grow_with_blur_and_noise():
    x = normal(400, 16, 0)
    for other in (lambda s: x + s * normal(400, 16, 1), lambda s: x * (1 - s) + s * x.roll(1, 1)):
        levels = [other(s) for s in (0.1, 0.2, 0.3, 0.45)]
        for distance in (frechet_distance, cmmd, lambda a, b: kernel_distance(a, b, 1, 400)[0]):
            values = [distance(x, level) for level in levels]
            assert values == sorted(values) and len(set(values)) == 4


def test_mean_interval_is_scipys_and_covers_the_mean():
    from scipy.stats import bootstrap

    values = normal(200, 1, 0)[:, 0]
    theirs = bootstrap((values.numpy(),), np.mean, method="percentile", n_resamples=4000, rng=0).confidence_interval
    assert mean_interval(values) == pytest.approx((theirs.low, theirs.high), abs=0.02)
    assert mean_interval(values) == mean_interval(values.numpy()) != mean_interval(values, 1)
    assert mean_interval([True]) == (1.0, 1.0) and mean_interval([0.5] * 9) == (0.5, 0.5)
    bounds = [mean_interval(normal(60, 1, seed)[:, 0], seed) for seed in range(100)]
    assert 87 <= sum(low < 0 < high for low, high in bounds) <= 99


def whole_kernel_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    return kernel_distance(x, y, 1, len(x))[0]


@pytest.mark.parametrize(
    "distance, kind",
    [(whole_kernel_distance, "kid"), (cmmd, "cmmd"), (frechet_distance, ""), (frechet_distance_infinite, "few")],
)
def test_intervals_of_distances_hold_the_spread_over_new_samples(distance, kind):
    samples = [(normal(150, 6, 2 * seed, 0.3), normal(150, 6, 2 * seed + 1)) for seed in range(60)]
    values = [distance(x, y) for x, y in samples]
    if kind in ("kid", "cmmd"):
        low, high = kernel_interval(*samples[0], kind, values[0])
    else:
        low, high = resampled_interval(distance, samples[0], values[0], few=kind == "few")
    spread = np.quantile(values, [0.025, 0.975])
    assert low < values[0] < high
    assert 0.6 < (high - low) / (spread[1] - spread[0]) < 1.7


def test_the_interval_of_many_rows_is_that_of_the_first_scaled(monkeypatch):
    x, y = normal(600, 6, 0, 0.3), normal(600, 6, 1)
    exact = kernel_interval(x, y, "cmmd", 1.0)
    monkeypatch.setattr("ldm.metrics.intervals.MOST", 150)
    scaled = kernel_interval(x, y, "cmmd", 1.0)
    assert 0.6 < (scaled[1] - scaled[0]) / (exact[1] - exact[0]) < 1.7


def test_shuffled_captions_lower_the_clip_score():
    from scipy.stats import ttest_rel

    texts = normal(200, 32, 0)
    images = texts + 3 * normal(200, 32, 1)
    right, wrong = cosine(images, texts), cosine(images, texts.roll(1, 0))
    assert ttest_rel(right.numpy(), wrong.numpy(), alternative="greater").pvalue < 0.01
