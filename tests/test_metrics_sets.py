"""Distances between sets of pictures and their intervals, against torch-fidelity, prdc, scipy, and closed forms."""

import numpy as np
import pytest
import torch
from test_metrics import two_sets

from ldm import metrics
from ldm.metrics import cmmd, frechet_distance, frechet_distance_infinite, inception_score, kernel_distance
from ldm.metrics.diversity import nearest, neighbourhoods
from ldm.metrics.intervals import kernel_interval, mean_interval, mean_of_means_interval, resampled_interval


def normal(count: int, dimensions: int, seed: int, mean: float = 0.0, deviation: float = 1.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return mean + deviation * torch.randn(count, dimensions, generator=g, dtype=torch.float64)


def test_frechet_equals_torch_fidelity_also_of_fewer_rows_than_dimensions():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    x, y = two_sets()
    for a, b in ((x, y), (x[:20], y), (y[:63], x[:20])):
        theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, (a, b)), verbose=False)
        assert frechet_distance(a, b) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    far = x + 1e4  # a large mean costs naive formulas their digits
    assert frechet_distance(far, y + 1e4) == pytest.approx(frechet_distance(x, y), rel=1e-9)


def test_infinite_frechet_distance_is_nearer_to_the_truth():
    x, y = normal(10_000, 64, 0, 0.1, 1.2), normal(10_000, 64, 1)
    endless, true = frechet_distance_infinite(x, y), 64 * (0.1**2 + 0.2**2)
    assert endless == pytest.approx(true, abs=0.1) and abs(endless - true) < abs(frechet_distance(x, y) - true) / 3
    assert endless == frechet_distance_infinite(x, y) != frechet_distance_infinite(x, y, seed=1)
    bias = 2 * (64 + 64 * 65 / 4) / 10_000  # of two equal sets
    assert frechet_distance(normal(10_000, 64, 2), y) == pytest.approx(bias, rel=0.1)
    assert np.isfinite(frechet_distance_infinite(x[:4, :1], y[:4, :1]))


def test_kernel_distance_is_torch_fidelitys_unbiased_and_seeded():
    from torch_fidelity.metric_kid import kid_features_to_metric

    assert kernel_distance(torch.zeros(6, 4), torch.ones(6, 4), 1, 6) == (7.0, 0.0)
    x, y = two_sets()
    value, deviation = kernel_distance(x, y, subsets=1, subset_size=500)
    assert value == pytest.approx(0.1731452052726, abs=1e-12) and deviation == 0
    options = {"kid_subsets": 1, "kid_subset_size": 500, "verbose": False}
    assert value == pytest.approx(kid_features_to_metric(x, y, **options)["kernel_inception_distance_mean"], abs=1e-9)
    x, y = normal(400, 8, 0), normal(400, 8, 1)
    many = [kernel_distance(x, y, subsets=40, subset_size=100, seed=s)[0] for s in range(5)]
    assert abs(np.mean(many)) < 0.02 and len(set(many)) == 5
    assert kernel_distance(x, y, 7, 50, seed=3) == kernel_distance(x, y, 7, 50, seed=3)


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


@pytest.mark.parametrize("count", [57, 200])
def test_inception_score_vectors_and_torch_fidelity(count):
    from torch_fidelity.metric_isc import isc_features_to_metric

    assert inception_score(torch.eye(10).repeat(10, 1)) == pytest.approx((10, 0))
    assert inception_score(torch.full((40, 7), 1 / 7)) == pytest.approx((1, 0))
    logits = 3 * normal(count, 12, 0)
    theirs = isc_features_to_metric(logits, splits=10, shuffle=False)
    want = theirs["inception_score_mean"], theirs["inception_score_std"]
    assert inception_score(logits.softmax(1)) == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("k", [1, 5])
def test_precision_recall_equals_prdc_and_torch_fidelity(k):
    from prdc import compute_prdc
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, fake = normal(300, 6, 0), normal(1100, 6, 1, 0.3, 0.8)  # more than one chunk
    ours = metrics.precision_recall(real, fake, k)
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


def test_mean_interval_is_scipys_and_covers_the_mean():
    from scipy.stats import bootstrap

    values = normal(200, 1, 0)[:, 0]
    theirs = bootstrap((values.numpy(),), np.mean, method="percentile", n_resamples=4000, rng=0).confidence_interval
    assert mean_interval(values) == pytest.approx((theirs.low, theirs.high), abs=0.02)
    assert mean_interval(values) == mean_interval(values.numpy()) != mean_interval(values, 1)
    assert mean_interval([True]) == (1.0, 1.0) and mean_interval([0.5] * 9) == (0.5, 0.5)
    bounds = [mean_interval(normal(60, 1, seed)[:, 0], seed) for seed in range(100)]
    assert 87 <= sum(low < 0 < high for low, high in bounds) <= 99


def test_rows_of_one_group_count_once_and_means_are_averaged():
    x = normal(60, 1, 0)[:, 0]
    four, names = x.repeat(4), np.arange(60).repeat(4).reshape(60, 4).T.ravel()
    assert mean_interval(four, groups=names) == pytest.approx(mean_interval(x))
    narrow = mean_interval(four)
    assert narrow[1] - narrow[0] < 0.6 * (mean_interval(x)[1] - mean_interval(x)[0])
    few, many = x[:6] + 10, x  # a mean of means moves with the smaller part
    low, high = mean_of_means_interval([(few, ()), (many, ())])
    assert low < (few.mean() + many.mean()) / 2 < high and high - low > 0.8 * float(few.std()) / 6**0.5
    sets = (normal(80, 3, 0).repeat(2, 1), normal(80, 3, 1, 0.5))
    value, groups = frechet_distance(*sets), (np.arange(160) % 80, ())
    low, high = resampled_interval(frechet_distance, sets, value, groups=groups)
    assert low < value < high and resampled_interval(frechet_distance, sets, value) != (low, high)
    sets, groups = (normal(16, 8, 0), normal(16, 8, 1)), ([0] * 4 + [*range(12)],) * 2  # groups of unlike sizes
    low, high = resampled_interval(frechet_distance_infinite, sets, 0.0, groups=groups)  # needs all of 16 rows
    assert low < 0 < high


def whole_kernel_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    return kernel_distance(x, y, 1, len(x))[0]


@pytest.mark.parametrize(
    "distance, kind",
    [(whole_kernel_distance, "kid"), (cmmd, "cmmd"), (frechet_distance, ""), (frechet_distance_infinite, "few")],
)
def test_intervals_of_distances_hold_the_spread_over_new_samples(distance, kind):
    samples = [(normal(150, 6, 2 * seed, 0.3), normal(150, 6, 2 * seed + 1)) for seed in range(40)]
    values = [distance(x, y) for x, y in samples]
    if kind in ("kid", "cmmd"):
        low, high = kernel_interval(*samples[0], kind, values[0])
    else:
        low, high = resampled_interval(distance, samples[0], values[0], few=kind == "few")
    spread = np.quantile(values, [0.025, 0.975])
    assert low < values[0] < high
    assert 0.6 < (high - low) / (spread[1] - spread[0]) < 1.7
