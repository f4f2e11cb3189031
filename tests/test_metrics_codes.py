"""What codes tell of labels, against scikit-learn and codes of known structure."""

import numpy as np
import pytest

from ldm.metrics import cluster_scores, dci, linear_probe, mig
from ldm.metrics.representation import agreement


def test_cluster_scores_vector_and_scikit_learn():
    from sklearn.metrics import v_measure_score

    want = {"homogeneity": 1, "completeness": 2 / 3, "v_measure": 0.8}
    assert agreement([0, 0, 1, 1], [0, 0, 1, 2]) == pytest.approx(want)
    rng = np.random.default_rng(0)
    labels, clusters = rng.choice(["a", "b", "c"], 200), rng.integers(0, 5, 200)
    assert agreement(labels, clusters)["v_measure"] == pytest.approx(v_measure_score(labels, clusters), abs=1e-12)
    points = rng.normal(size=(90, 3)) + 20 * np.repeat(np.eye(3), 30, axis=0)
    assert cluster_scores(points, np.repeat(["x", "y", "z"], 30))["v_measure"] == pytest.approx(1)
    assert cluster_scores(rng.normal(size=(90, 3)), np.repeat([0, 1, 2], 30))["v_measure"] < 0.2


def test_linear_probe_finds_lines_and_no_more():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 4))
    line, wheel = (x @ [1, -2, 0.5, 0] > 0).astype(int), (x[:, 0] * x[:, 1] > 0).astype(int)
    assert linear_probe(x[:400], line[:400], x[400:], line[400:]) > 0.95
    assert linear_probe(x[:400], wheel[:400], x[400:], wheel[400:]) < 0.65


def test_mig_is_the_gap_of_scikit_learns_mutual_information():
    from sklearn.metrics import mutual_info_score

    rng = np.random.default_rng(0)
    codes, factor = rng.integers(0, 4, (300, 3)), rng.choice(["a", "b", "c"], 300)
    codes[:, 0] += 3 * (factor == "a")
    shared = sorted(mutual_info_score(factor, code) for code in codes.T)
    want = (shared[-1] - shared[-2]) / mutual_info_score(factor, factor)
    assert mig(codes, factor[:, None]) == pytest.approx(want, abs=1e-12) and want > 0.1


def test_mig_and_dci_of_known_codes():
    rng = np.random.default_rng(0)
    factors = np.stack([rng.integers(0, n, 1000) for n in (4, 3, 5)], 1)
    noise = 0.01 * rng.normal(size=factors.shape)
    assert mig(factors + noise, factors) >= 0.9
    assert mig(np.concatenate([factors, factors], 1), factors) <= 0.1
    assert 0 <= mig(rng.normal(size=(1000, 4)), factors) < 0.03
    assert all(value == pytest.approx(1, abs=0.02) for value in dci(factors + noise, factors).values())
    assert dci(factors @ rng.normal(size=(3, 3)), factors)["disentanglement"] < 0.6
    twice = dci(np.concatenate([factors, factors + noise], 1), factors)
    assert twice["completeness"] < 0.75 < twice["disentanglement"]
    nothing = np.zeros((1000, 4))
    assert mig(nothing, factors) == dci(nothing, factors)["disentanglement"] == 0
