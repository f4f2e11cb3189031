"""Distances between sets of pictures and their intervals, against torch-fidelity, torchmetrics, prdc, scipy, and closed
forms."""

import math

import numpy as np
import pytest
import torch
from test_metrics import two_sets

from ldm.config import UserError
from ldm.evaluate.records import alignment_records, class_records, frechet_records, picture_records, ratio
from ldm.metrics import (
    GaussianMoments,
    cmmd,
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


def test_kernel_distance_of_subsets_is_unbiased_seeded_and_refuses_too_few():
    x, y = normal(400, 8, 0), normal(400, 8, 1)
    many = [kernel_distance(x, y, subsets=40, subset_size=100, seed=s)[0] for s in range(5)]
    assert abs(np.mean(many)) < 0.02 and len(set(many)) == 5
    assert kernel_distance(x, y, 7, 50, seed=3) == kernel_distance(x.numpy(), y.numpy(), 7, 50, seed=3)
    assert kernel_distance(x, y + 0.5, 10, 100)[0] > 0.2
    with pytest.raises(ValueError, match="2..400"):
        kernel_distance(x, y, subset_size=401)


def test_cmmd_vectors_and_direct_sum():
    one = torch.tensor([[1.0, 0.0]])
    assert cmmd(one, -one) == pytest.approx(39.6026533865, abs=1e-8)
    assert cmmd(one, torch.tensor([[0.0, 2.0]])) == pytest.approx(19.9003325017, abs=1e-8)
    x, y = two_sets()
    assert cmmd(x, 3 * x) == pytest.approx(0, abs=1e-9)
    u, v = (rows / rows.norm(dim=1, keepdim=True) for rows in (x[:40], y[:60]))
    kernel = lambda a, b: np.exp(-((a[:, None] - b[None]).square().sum(-1).numpy()) / 200).mean()  # noqa: E731
    assert cmmd(x[:40], y[:60]) == pytest.approx(1000 * (kernel(u, u) + kernel(v, v) - 2 * kernel(u, v)), abs=1e-8)


def test_inception_score_vectors_and_torch_fidelity():
    from torch_fidelity.metric_isc import isc_features_to_metric

    assert inception_score(torch.eye(10).repeat(10, 1)) == pytest.approx((10, 0))
    assert inception_score(torch.full((40, 7), 1 / 7)) == pytest.approx((1, 0))
    logits = 3 * normal(200, 12, 0)
    theirs = isc_features_to_metric(logits, splits=10, shuffle=False)
    ours = inception_score(logits.softmax(1))
    assert ours == pytest.approx((theirs["inception_score_mean"], theirs["inception_score_std"]), abs=1e-9)
    with pytest.raises(ValueError, match="at least 10"):
        inception_score(torch.full((9, 7), 1 / 7))


def test_precision_recall_vectors():
    real, fake = torch.arange(5.0)[:, None], torch.tensor([[0.5], [10.0], [11.0]])
    want = {"precision": 1 / 3, "recall": 1, "density": 2 / 3, "coverage": 0.4}
    assert precision_recall(real, fake, k=1) == pytest.approx(want)
    x, _ = two_sets()
    assert precision_recall(x, x) == {"precision": 1, "recall": 1, "density": 1, "coverage": 1}
    with pytest.raises(ValueError, match="more than 5 rows"):
        precision_recall(x, x[:5])


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


def test_neighbourhoods_are_a_value_a_row_and_nearest_is_exact():
    real, fake = normal(50, 4, 0), normal(30, 4, 1)
    found = neighbourhoods(real, fake)
    assert {name: len(values) for name, values in found.items()} == {
        "precision": 30,
        "density": 30,
        "recall": 50,
        "coverage": 50,
    }
    distances, which = nearest(fake, real)
    direct = (fake[:, None] - real[None]).norm(dim=-1)
    assert torch.allclose(distances, direct.min(1).values) and torch.equal(which, direct.argmin(1))
    assert nearest(real, real)[0].max() == 0


def test_frechet_of_few_rows_equals_the_long_way():
    x, y = two_sets()
    for count in (20, 63):
        moments = GaussianMoments().update(x[:count]), GaussianMoments().update(y)
        assert frechet_distance(x[:count], y) == pytest.approx(frechet_distance(*moments), rel=1e-6)
    assert frechet_distance(x[:20], x[:20]) == pytest.approx(0, abs=1e-9)


def test_bias_of_the_frechet_distance_is_its_formula():
    d, n = 64, 10_000
    measured = [frechet_distance(normal(n, d, 2 * s), normal(n, d, 2 * s + 1)) for s in range(4)]
    assert np.mean(measured) == pytest.approx(2 * (d + d * (d + 1) / 4) / n, rel=0.05)


def test_infinite_frechet_distance_is_nearer_to_the_truth():
    x, y = normal(10_000, 64, 0, 0.1, 1.2), normal(10_000, 64, 1)
    endless = frechet_distance_infinite(x, y)
    true = 64 * (0.1**2 + 0.2**2)
    assert endless == pytest.approx(true, abs=0.1) and abs(endless - true) < abs(frechet_distance(x, y) - true) / 3
    assert endless == frechet_distance_infinite(x, y) != frechet_distance_infinite(x, y, seed=1)
    with pytest.raises(ValueError, match="128 are not"):
        frechet_distance_infinite(x[:127], y)


def test_distances_grow_with_blur_and_noise():
    x = normal(400, 16, 0)
    for other in (lambda s: x + s * normal(400, 16, 1), lambda s: x * (1 - s) + s * x.roll(1, 1)):
        levels = [other(s) for s in (0.1, 0.2, 0.3, 0.45)]
        for distance in (frechet_distance, cmmd, lambda a, b: kernel_distance(a, b, 1, 400)[0]):
            found = [distance(x, level) for level in levels]
            assert found == sorted(found) and len(set(found)) == 4


def test_mean_interval_is_that_of_statistics():
    from scipy.stats import bootstrap

    values = normal(200, 1, 0)[:, 0]
    theirs = bootstrap((values.numpy(),), np.mean, method="percentile", n_resamples=4000, rng=0).confidence_interval
    assert mean_interval(values) == pytest.approx((theirs.low, theirs.high), abs=0.02)
    covered = 0
    for seed in range(100):
        low, high = mean_interval(normal(60, 1, seed)[:, 0], seed)
        covered += low < 0 < high
    assert 87 <= covered <= 99


def test_intervals_of_distances_hold_the_spread_over_new_samples():
    def sample(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        return normal(150, 6, 2 * seed, 0.3), normal(150, 6, 2 * seed + 1)

    kid = lambda x, y: kernel_distance(x, y, 1, len(x))[0]  # noqa: E731
    new = [sample(seed) for seed in range(60)]
    kinds = ((kid, "kid"), (cmmd, "cmmd"), (frechet_distance, ""), (frechet_distance_infinite, "few"))
    for distance, kind in kinds:
        x, y = new[0]
        value = distance(x, y)
        if kind in ("kid", "cmmd"):
            low, high = kernel_interval(x, y, kind, value)
        else:
            low, high = resampled_interval(distance, (x, y), value, few=kind == "few")
        spread = np.quantile([distance(a, b) for a, b in new], [0.025, 0.975])
        assert low < value < high
        assert 0.6 < (high - low) / (spread[1] - spread[0]) < 1.7


def test_interval_of_the_inception_score_holds_its_spread_over_new_samples():
    new = [(2 * normal(200, 10, seed)).softmax(1) for seed in range(60)]
    (record,) = class_records(new[0], "samples", {})
    low, high = record["interval"]
    spread = np.quantile([inception_score(p)[0] for p in new], [0.025, 0.975])
    assert low < record["value"] < high
    assert 0.6 < (high - low) / (spread[1] - spread[0]) < 1.7


def test_records_say_what_they_are_of_and_unlike_ones_are_not_compared():
    x, y = normal(300, 6, 0), normal(300, 6, 1)
    about = {"extractor": "net", "extractor_sha256": "5" * 64, "resize": "32 px, bicubic"}
    both = lambda a, b: [*frechet_records(a, b, "samples", about), *picture_records(a, b, "samples", about)]  # noqa: E731
    found = {r["metric"]: r for r in both(x, y)}
    assert found["frechet_distance"]["value"] == frechet_distance(x, y) and not found["frechet_distance"]["biased"]
    assert found["frechet_distance_infinite"]["value"] == frechet_distance_infinite(x, y)
    assert {"kernel_distance", "precision", "recall", "density", "coverage"} <= found.keys()
    assert all(r["n"] == 300 and r["extractor"] == "net" and r["of"] == "samples" for r in found.values())
    few = {r["metric"]: r for r in both(x[:11], y[:11])}
    assert (
        few["frechet_distance_infinite"]["value"] is None and "12 pictures" in few["frechet_distance_infinite"]["note"]
    )
    a = found["frechet_distance"]
    assert ratio(a, a | {"of": "real train", "value": 2 * a["value"]}) == 0.5
    assert math.isnan(ratio(a, a | {"value": -0.1}))  # a kernel distance may be below 0
    for key, value in (("n", 299), ("extractor", "other"), ("resize", "64 px"), ("extractor_sha256", "6" * 64)):
        with pytest.raises(UserError, match=f"do not compare: {key} "):
            ratio(a, a | {key: value})
    with pytest.raises(UserError, match="metric frechet_distance and precision"):
        ratio(a, found["precision"])


def test_shuffled_captions_lower_the_clip_score():
    from scipy.stats import ttest_rel

    from ldm.metrics import cosine

    texts = normal(200, 32, 0)
    images = texts + 3 * normal(200, 32, 1)
    right, wrong = cosine(images, texts), cosine(images, texts.roll(1, 0))
    assert ttest_rel(right.numpy(), wrong.numpy(), alternative="greater").pvalue < 0.01
    found = {r["metric"]: r for r in alignment_records(images, texts, torch.eye(200) > 0, "samples", {})}
    assert found["clip_score"]["value"] == pytest.approx(2.5 * right.clamp_min(0).mean().item())
    assert found["clip_score_100"]["value"] == pytest.approx(40 * found["clip_score"]["value"])
    low, high = found["clip_cosine"]["interval"]
    assert low < found["clip_cosine"]["value"] < high
    assert found["clip_cosine"]["value"] == pytest.approx(right.mean().item())
    assert [found[f"text_to_image@{k}"]["chance"] for k in (1, 5)] == pytest.approx([1 / 200, 5 / 200])
