"""How much a code tells of known labels: clusters, linear probes, and disentanglement. The models are scikit-learn's
(the extra `evaluate`), MIG and DCI are computed here."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ldm.metrics.libraries import library

Rows = Tensor | np.ndarray
Labels = Tensor | np.ndarray | Sequence
BINS = 20  # of each dimension of a code, for mutual information


def cluster_scores(features: Rows, labels: Labels, seed: int = 0) -> dict[str, float]:
    """`agreement` of the labels with k-means of as many clusters as there are labels. Features (N, D), labels (N,)."""
    return agreement(labels, clusters(features, len(np.unique(_array(labels))), seed))


def clusters(features: Rows, count: int, seed: int = 0) -> np.ndarray:
    """The k-means cluster, 0 to count - 1, of each of (N, D) features: (N,)."""
    model = library("sklearn.cluster").KMeans(count, n_init=10, random_state=seed)
    return model.fit_predict(_array(features, np.float64))


def agreement(labels: Labels, clusters: Labels) -> dict[str, float]:
    """ "homogeneity", "completeness" and "v_measure" of clusters (N,) given labels (N,), in [0, 1] (Rosenberg &
    Hirschberg 2007, eqs. 1 and 2): a cluster holds one label; a label lies in one cluster; their harmonic mean."""
    scores = library("sklearn.metrics").homogeneity_completeness_v_measure(_array(labels), _array(clusters))
    return dict(zip(("homogeneity", "completeness", "v_measure"), map(float, scores), strict=True))


def linear_probe(train_x: Rows, train_y: Labels, test_x: Rows, test_y: Labels) -> float:
    """Accuracy on the test rows of a logistic regression (L2, C = 1, on standardized features) fitted to the training
    rows (Alain & Bengio 2016). Features (N, D), labels (N,)."""
    regression = library("sklearn.linear_model").LogisticRegression(max_iter=2000)
    scaler = library("sklearn.preprocessing").StandardScaler()
    model = library("sklearn.pipeline").make_pipeline(scaler, regression)
    model.fit(_array(train_x, np.float64), _array(train_y))
    return float(model.score(_array(test_x, np.float64), _array(test_y)))


def mig(codes: Rows, factors: Rows) -> float:
    """Mutual information gap (Chen et al. 2018, eq. 6): over factors, the mutual information with the best dimension
    less that with the second best, over the factor's entropy. Codes (N, D), D >= 2, cut into 20 bins of equal width per
    dimension; factors (N, F) of two classes or more (ValueError). In [0, 1]."""
    codes, factors = _codes_and_factors(codes, factors)
    binned = [np.digitize(code, np.histogram_bin_edges(code, BINS)[1:-1]) for code in codes.T]
    gaps = []
    for factor in factors.T:
        classes = np.unique(factor, return_inverse=True)[1]
        joints = [np.bincount(BINS * classes + bins, minlength=BINS * (classes.max() + 1)) for bins in binned]
        entropy = _entropy(np.bincount(classes))
        shared = sorted(entropy + _entropy(np.bincount(b)) - _entropy(j) for b, j in zip(binned, joints, strict=True))
        gaps.append((shared[-1] - shared[-2]) / entropy)
    return float(np.mean(gaps))


def dci(codes: Rows, factors: Rows, seed: int = 0) -> dict[str, float]:
    """ "disentanglement", "completeness" and "informativeness" (Eastwood & Williams 2018, section 2) from how
    important each dimension is to boosted trees that tell each factor (N, F) from the code (N, D).

    Disentanglement: 1 - entropy of a dimension's importance over factors, weighted by its sum; completeness: 1 -
    entropy of a factor's over dimensions; informativeness: accuracy on the last fifth of the rows. In [0, 1]. Raises
    ValueError for fewer than two dimensions or factors, or a factor of one class.
    """
    codes, factors = _codes_and_factors(codes, factors)
    if factors.shape[1] < 2:
        raise ValueError(f"factors {factors.shape} must be (N, 2 or more): of one nothing can be told apart")
    cut = len(codes) - len(codes) // 5
    importance, accuracy = [], []
    for factor in factors.T:
        trees = library("sklearn.ensemble").GradientBoostingClassifier(n_estimators=30, random_state=seed)
        trees.fit(codes[:cut], factor[:cut])
        importance.append(trees.feature_importances_)
        accuracy.append(trees.score(codes[cut:], factor[cut:]))
    table = np.array(importance)  # (F, D)
    informativeness = float(np.mean(accuracy))
    return {
        "disentanglement": _concentration(table.T),
        "completeness": _concentration(table),
        "informativeness": informativeness,
    }


def _concentration(table: np.ndarray) -> float:
    """1 - entropy of each row's shares (over its maximum), weighted by the rows' sums; 0 where all are 0."""
    table = table[table.sum(1) > 0]
    scores = [1 - _entropy(row) / np.log(len(row)) for row in table]
    return float(np.average(scores, weights=table.sum(1))) if scores else 0.0


def _entropy(counts: np.ndarray) -> float:
    """In nats, of counts in proportion to the shares."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _codes_and_factors(codes: Rows, factors: Rows) -> tuple[np.ndarray, np.ndarray]:
    codes, factors = _array(codes, np.float64), _array(factors)
    if codes.ndim != 2 or codes.shape[1] < 2 or factors.ndim != 2 or len(codes) != len(factors):
        raise ValueError(f"codes {codes.shape} must be (N, 2 or more) beside factors {factors.shape}")
    for i, factor in enumerate(factors.T):
        if len(np.unique(factor)) < 2:
            raise ValueError(f"factor {i} has one class alone, which every code knows")
    return codes, factors


def _array(values: Labels, dtype: type | None = None) -> np.ndarray:
    return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype)
