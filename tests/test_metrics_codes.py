"""Bits, perceptual distance and what codes say, against scikit-learn and closed forms."""

import math

import numpy as np
import pytest
import torch

from ldm.metrics import bits_per_dimension, cluster_scores, dci, linear_probe, mig, perceptual_distance
from ldm.metrics.codecs import curve, encoded
from ldm.metrics.reconstruction import discretized_logistic
from ldm.metrics.representation import agreement


def test_bits_per_dimension_vectors():
    kl = 0.5 * (torch.tensor(0.5) ** 2 + 0.25 - 1 - math.log(0.25))
    assert kl.item() == pytest.approx(0.44314718056)
    zero = torch.zeros(2)
    uniform = bits_per_dimension(torch.full((2,), 12 * math.log(256)), zero, 12)
    assert uniform.tolist() == pytest.approx([8.0, 8.0], abs=1e-6)
    assert bits_per_dimension(zero, torch.full((2,), 12 * math.log(2)), 12).tolist() == pytest.approx([1, 1], abs=1e-6)


@pytest.mark.parametrize("mean, scale", [(0.3, 0.01), (0.999, 1e-4), (-1.2, 0.05), (-0.2, 0.3), (0.0, 50.0)])
def test_discretized_logistic_is_a_distribution_of_256_levels(mean, scale):
    from scipy.stats import logistic

    levels = torch.arange(256, dtype=torch.uint8)
    nll = discretized_logistic(levels, torch.tensor(mean), scale)
    assert torch.isfinite(nll).all() and torch.exp(-nll).sum().item() == pytest.approx(1, abs=1e-9)
    edges = (np.arange(257) - 0.5) / 127.5 - 1
    edges[0], edges[-1] = -np.inf, np.inf
    mass = np.diff(logistic(np.float32(mean), scale).cdf(edges))
    probable = mass > 1e-8
    assert torch.exp(-nll)[probable].numpy() == pytest.approx(mass[probable], rel=1e-5)


def test_a_sharp_right_mean_costs_no_bits_and_a_wrong_one_many():
    pixels = torch.tensor([0, 100, 255], dtype=torch.uint8)
    mean = pixels.double() / 127.5 - 1
    assert discretized_logistic(pixels, mean, 1e-4).max() < 1e-6
    assert discretized_logistic(pixels, -mean, 1e-2).min() > 20


def test_cluster_scores_equal_scikit_learn():
    from sklearn.metrics import homogeneity_completeness_v_measure

    names = ("homogeneity", "completeness", "v_measure")
    assert agreement([0, 0, 1, 1], [0, 0, 1, 2]) == pytest.approx(dict(zip(names, (1, 2 / 3, 0.8), strict=True)))
    rng = np.random.default_rng(0)
    labels, clusters = rng.choice(["a", "b", "c"], 200), rng.integers(0, 5, 200)
    clusters[labels == "a"] = 1
    want = homogeneity_completeness_v_measure(labels, clusters)
    assert agreement(labels, clusters) == pytest.approx(dict(zip(names, want, strict=True)), abs=1e-12)
    points = rng.normal(size=(90, 3)) + 20 * np.repeat(np.eye(3), 30, axis=0)
    assert cluster_scores(points, np.repeat(["x", "y", "z"], 30))["v_measure"] == pytest.approx(1)
    assert cluster_scores(rng.normal(size=(90, 3)), np.repeat([0, 1, 2], 30))["v_measure"] < 0.2


def test_linear_probe_finds_lines_and_no_more():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 4))
    line, wheel = (x @ [1, -2, 0.5, 0] > 0).astype(int), (x[:, 0] * x[:, 1] > 0).astype(int)
    assert linear_probe(x[:400], line[:400], x[400:], line[400:]) > 0.95
    assert linear_probe(x[:400], wheel[:400], x[400:], wheel[400:]) < 0.65


def test_mig_and_dci_of_known_codes():
    rng = np.random.default_rng(0)
    factors = np.stack([rng.integers(0, n, 1500) for n in (4, 3, 5)], 1)
    noise = 0.01 * rng.normal(size=factors.shape)
    assert mig(factors + noise, factors) >= 0.9
    assert mig(np.concatenate([factors, factors], 1), factors) <= 0.1
    assert 0 <= mig(rng.normal(size=(1500, 4)), factors) < 0.02
    good = dci(factors + noise, factors)
    assert all(value == pytest.approx(1, abs=0.02) for value in good.values())
    mixed = dci(factors @ rng.normal(size=(3, 3)), factors)
    assert mixed["disentanglement"] < 0.6
    twice = dci(np.concatenate([factors, factors + noise], 1), factors)
    assert twice["completeness"] < 0.75 < twice["disentanglement"]


def test_mutual_information_equals_scikit_learn():
    from sklearn.metrics import mutual_info_score

    from ldm.metrics.representation import _information, _joint

    rng = np.random.default_rng(0)
    a = rng.integers(0, 4, 300)
    b = (a + rng.integers(0, 2, 300)) % 4
    assert _information(_joint(a, b)) == pytest.approx(mutual_info_score(a, b), abs=1e-12)


def test_perceptual_distance_is_the_networks_without_a_graph():
    net = lambda x, y: (x - y).square().mean((1, 2, 3))  # noqa: E731
    x = torch.rand(2, 3, 16, 16, requires_grad=True)
    found = perceptual_distance(x, x.detach() + 0.5, net)
    assert found.tolist() == pytest.approx([0.25, 0.25]) and found.dtype == torch.float64
    assert not found.requires_grad
    with pytest.raises(ValueError, match="cannot be compared"):
        perceptual_distance(x, x[:1], net)


def test_codecs_trade_bytes_for_quality():
    torch.manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(3, 3, 6, 6) * 255, size=(48, 48), mode="bicubic")
    pixels = smooth.clamp(0, 255).to(torch.uint8)
    for codec in ("JPEG", "WEBP"):
        points = curve(pixels, codec, (5, 50, 95))
        assert points == sorted(points) and points[0][1] < points[1][1] < points[2][1]
        size, decoded = encoded(pixels[0].permute(1, 2, 0).numpy(), codec, 95)
        assert decoded.shape == (48, 48, 3) and 100 < size < 48 * 48 * 3
