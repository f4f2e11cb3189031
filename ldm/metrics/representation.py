"""What a code says of known labels: clusters, linear probes, and disentanglement.

The fitted models are scikit-learn's (the extra `evaluate`), the scores are computed here.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ldm.config import UserError

Rows = Tensor | np.ndarray
Labels = Tensor | np.ndarray | Sequence
BINS = 20  # of each dimension of a code, for mutual information


def cluster_scores(features: Rows, labels: Labels, seed: int = 0) -> dict[str, float]:
    """k-means with as many clusters as there are labels, held against the labels: `agreement` of its clusters.

    Features (N, D), labels (N,). UserError without scikit-learn.
    """
    return agreement(labels, clusters(features, len(set(_codes(labels).tolist())), seed))


def clusters(features: Rows, count: int, seed: int = 0) -> np.ndarray:
    """The k-means cluster, 0 to count - 1, of each of (N, D) features: (N,). UserError without scikit-learn."""
    cluster = _sklearn("cluster")
    return cluster.KMeans(count, n_init=10, random_state=seed).fit_predict(_rows(features))


def agreement(labels: Labels, clusters: Labels) -> dict[str, float]:
    """ "homogeneity", "completeness" and "v_measure" of clusters (N,) given labels (N,), in [0, 1] (Rosenberg &
    Hirschberg 2007, eqs. 1 and 2): a cluster holds one label; a label lies in one cluster; their harmonic mean."""
    joint = _joint(_codes(labels), _codes(clusters))
    shared, label_entropy, cluster_entropy = _information(joint), _entropy(joint.sum(1)), _entropy(joint.sum(0))
    homogeneity = shared / label_entropy if label_entropy else 1.0
    completeness = shared / cluster_entropy if cluster_entropy else 1.0
    total = homogeneity + completeness
    v_measure = 2 * homogeneity * completeness / total if total else 0.0
    return {"homogeneity": homogeneity, "completeness": completeness, "v_measure": v_measure}


def linear_probe(train_x: Rows, train_y: Labels, test_x: Rows, test_y: Labels) -> float:
    """Accuracy on the test rows of a logistic regression (L2, C = 1, on standardized features) fitted to the training
    rows (Alain & Bengio 2016). Features (N, D), labels (N,). UserError without scikit-learn."""
    linear, pipeline, preprocessing = (_sklearn(n) for n in ("linear_model", "pipeline", "preprocessing"))
    model = pipeline.make_pipeline(preprocessing.StandardScaler(), linear.LogisticRegression(max_iter=2000))
    model.fit(_rows(train_x), _array(train_y))
    return float(model.score(_rows(test_x), _array(test_y)))


def mig(codes: Rows, factors: Rows) -> float:
    """Mutual information gap (Chen et al. 2018, eq. 6): over factors, how much more the dimension that knows most of a
    factor knows of it than the next one does, over the factor's entropy. Codes (N, D), D >= 2, cut into 20 bins of
    equal width a dimension; factors (N, F) of two classes or more (ValueError). In [0, 1]."""
    codes, factors = _codes_and_factors(codes, factors)
    binned = [np.digitize(c, np.histogram_bin_edges(c, BINS)[1:-1]) for c in codes.T]
    gaps = []
    for factor in factors.T:
        known = sorted(_information(_joint(_codes(factor), _codes(b))) for b in binned)
        gaps.append((known[-1] - known[-2]) / _entropy(np.bincount(_codes(factor)) / len(factor)))
    return float(np.mean(gaps))


def dci(codes: Rows, factors: Rows, seed: int = 0) -> dict[str, float]:
    """ "disentanglement", "completeness" and "informativeness" (Eastwood & Williams 2018, section 2) from what boosted
    trees look at when they tell each factor (N, F) from the code (N, D).

    Disentanglement: 1 - entropy of what a dimension is used for, weighed by how much it is used; completeness: 1 -
    entropy of the dimensions used for a factor; informativeness: accuracy on the last fifth of the rows. In [0, 1].
    UserError without scikit-learn; ValueError for fewer than two dimensions or factors, or a factor of one class.
    """
    ensemble = _sklearn("ensemble")
    codes, factors = _codes_and_factors(codes, factors)
    if factors.shape[1] < 2:
        raise ValueError(f"factors {factors.shape} must be (N, 2 or more): of one nothing can be told apart")
    cut = len(codes) - len(codes) // 5
    importance, right = [], []
    for factor in factors.T:
        trees = ensemble.GradientBoostingClassifier(n_estimators=30, random_state=seed)
        trees.fit(codes[:cut], factor[:cut])
        importance.append(trees.feature_importances_)
        right.append(trees.score(codes[cut:], factor[cut:]))
    table = np.array(importance).T  # (D, F)
    return {
        "disentanglement": _focus(table),
        "completeness": _focus(table.T),
        "informativeness": float(np.mean(right)),
    }


def _focus(table: np.ndarray) -> float:
    """1 - entropy of each row's shares (in units of its most), weighed by the rows' sums; 0 where all are 0."""
    used = table.sum(1)
    table, used = table[used > 0], used[used > 0]
    focus = [1 - _entropy(row / row.sum()) / np.log(len(row)) for row in table]
    return float(np.average(focus, weights=used)) if len(table) else 0.0


def _codes_and_factors(codes: Rows, factors: Rows) -> tuple[np.ndarray, np.ndarray]:
    codes, factors = _rows(codes), _array(factors)
    if codes.ndim != 2 or codes.shape[1] < 2 or factors.ndim != 2 or len(codes) != len(factors):
        raise ValueError(f"codes {codes.shape} must be (N, 2 or more) beside factors {factors.shape}")
    for i, factor in enumerate(factors.T):
        if len(np.unique(factor)) < 2:
            raise ValueError(f"factor {i} has one class alone, which every code knows")
    return codes, factors


def _array(values: Rows | Labels) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _rows(features: Rows) -> np.ndarray:
    return _array(features).astype(np.float64)


def _codes(labels: Labels) -> np.ndarray:
    """Labels of any kind as 0, 1, 2, ..."""
    return np.unique(_array(labels), return_inverse=True)[1]


def _joint(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How often each pair occurs, as a share: (classes of a, classes of b)."""
    table = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(table, (a, b), 1.0)
    return table / len(a)


def _entropy(shares: np.ndarray) -> float:
    """In nats."""
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum()) + 0.0


def _information(joint: np.ndarray) -> float:
    """Mutual information in nats."""
    return max(_entropy(joint.sum(0)) + _entropy(joint.sum(1)) - _entropy(joint), 0.0)


def _sklearn(part: str):
    try:
        import importlib

        return importlib.import_module(f"sklearn.{part}")
    except ImportError:
        raise UserError("clusters, probes and DCI need scikit-learn: pip install scikit-learn") from None
