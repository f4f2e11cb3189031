"""How much a code tells of known labels: clusters, linear probes, and disentanglement. The models are scikit-learn's
(the extra `evaluate`), MIG and DCI are computed here."""

from collections.abc import Sequence

import numpy as np
from einops import rearrange
from torch import Tensor

from ldm.metrics.inputs import Rows

Labels = Tensor | np.ndarray | Sequence
BINS = 20  # of each dimension of a code, for mutual information


def cluster_scores(features: Rows, labels: Labels, seed: int = 0) -> dict[str, float]:
    """`agreement` of the labels with k-means of as many clusters as there are labels. Features (N, D), labels (N,)."""
    return agreement(labels, clusters(features, len(np.unique(_array(labels))), seed))


def clusters(features: Rows, count: int, seed: int = 0) -> np.ndarray:
    """The k-means cluster, 0 to count - 1, of each of (N, D) features: (N,)."""
    from sklearn.cluster import KMeans

    model = KMeans(count, n_init=10, random_state=seed)
    return model.fit_predict(_array(features, np.float64))


def agreement(labels: Labels, clusters: Labels) -> dict[str, float]:
    """ "homogeneity", "completeness" and "v_measure" of clusters (N,) given labels (N,), in [0, 1] (Rosenberg &
    Hirschberg 2007, eqs. 1 and 2): a cluster holds one label; a label lies in one cluster; their harmonic mean."""
    from sklearn.metrics import homogeneity_completeness_v_measure

    scores = homogeneity_completeness_v_measure(_array(labels), _array(clusters))
    return dict(zip(("homogeneity", "completeness", "v_measure"), map(float, scores), strict=True))


def linear_probe(train_x: Rows, train_y: Labels, test_x: Rows, test_y: Labels) -> float:
    """Accuracy on the test rows of a logistic regression (L2, C = 1, on standardized features) fitted to the training
    rows (Alain & Bengio 2016). Features (N, D), labels (N,)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    model.fit(_array(train_x, np.float64), _array(train_y))
    return float(model.score(_array(test_x, np.float64), _array(test_y)))


def mig(codes: Rows, factors: Rows) -> float:
    """Mutual information gap (Chen et al. 2018, eq. 6): over factors, the mutual information with the best dimension
    less that with the second best, over the factor's entropy. Codes (N, D), D >= 2, cut into 20 bins of equal width per
    dimension; factors (N, F) of two classes or more (ValueError). In [0, 1]."""
    codes, factors = _codes_and_factors(codes, factors)
    binned = np.stack([np.digitize(code, np.histogram_bin_edges(code, BINS)[1:-1]) for code in codes.T], 1)
    bins = (binned[..., None] == np.arange(BINS)).astype(float)  # (N, D, BINS)
    gaps = []
    for factor in factors.T:
        classes = (factor[:, None] == np.unique(factor)).astype(float)  # (N, K)
        joint = np.tensordot(classes.T, bins, 1) / len(codes)  # (K, D, BINS)
        entropy = _entropy(classes.mean(0))
        information = entropy + _entropy(bins.mean(0).T) - _entropy(rearrange(joint, "k d b -> (k b) d"))
        second, first = np.sort(information)[-2:]
        gaps.append((first - second) / entropy)
    return float(np.mean(gaps))


def dci(codes: Rows, factors: Rows, seed: int = 0) -> dict[str, float]:
    """ "disentanglement", "completeness" and "informativeness" (Eastwood & Williams 2018, section 2) from how
    important each dimension is to boosted trees that tell each factor (N, F) from the code (N, D).

    Disentanglement: 1 - entropy of a dimension's importance over factors, weighted by its sum; completeness: 1 -
    entropy of a factor's over dimensions; informativeness: accuracy on the last fifth of the rows. In [0, 1]. Raises
    ValueError for fewer than two dimensions or factors, or a factor of one class.
    """
    from sklearn.ensemble import GradientBoostingClassifier

    codes, factors = _codes_and_factors(codes, factors, least=2)
    cut = len(codes) - len(codes) // 5
    importance, accuracy = [], []
    for factor in factors.T:
        trees = GradientBoostingClassifier(n_estimators=30, random_state=seed)
        trees.fit(codes[:cut], factor[:cut])
        importance.append(trees.feature_importances_)
        accuracy.append(trees.score(codes[cut:], factor[cut:]))
    table = np.array(importance)  # (F, D)
    scores = _concentration(table.T), _concentration(table), float(np.mean(accuracy))
    return dict(zip(("disentanglement", "completeness", "informativeness"), scores, strict=True))


def _concentration(table: np.ndarray) -> float:
    """1 - entropy of each row's shares (over its maximum), weighted by the rows' sums; 0 where all are 0."""
    table = table[table.sum(1) > 0]
    if not len(table):
        return 0.0
    scores = 1 - _entropy((table / table.sum(1, keepdims=True)).T) / np.log(table.shape[1])
    return float(np.average(scores, weights=table.sum(1)))


def _entropy(shares: np.ndarray) -> np.ndarray:
    """In nats, over the first axis."""
    return -(shares * np.log(np.where(shares > 0, shares, 1))).sum(0)


def _codes_and_factors(codes: Rows, factors: Rows, least: int = 1) -> tuple[np.ndarray, np.ndarray]:
    codes, factors = _array(codes, np.float64), _array(factors)
    if codes.ndim != 2 or factors.ndim != 2 or codes.shape[1] < 2 or factors.shape[1] < least:
        shapes = f"codes {codes.shape} and factors {factors.shape}"
        raise ValueError(f"{shapes} must be (N, 2 or more) and (N, {least} or more)")
    if any(len(np.unique(factor)) < 2 for factor in factors.T):
        raise ValueError("a factor has one class alone, which every code knows")
    return codes, factors


def _array(values: Labels, dtype: type | None = None) -> np.ndarray:
    return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype)
