"""Every public metric takes arrays as it takes tensors, refuses what it cannot measure, and is right at odd sizes."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from test_metrics import two_sets

from ldm import metrics
from ldm.metrics.alignment import chance

X, Y = (rows[:60, :8] for rows in two_sets())
LABELS = np.arange(60) % 3
FACTORS = np.stack([LABELS, np.arange(60) // 20], 1)
PICTURES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NET = lambda x, y: (x - y).square().mean((1, 2, 3))  # noqa: E731
CALLS = {
    "bits_per_dimension": (partial(metrics.bits_per_dimension, dimensions=3), X[:, 0], Y[:, 0]),
    "clip_score": (metrics.clip_score, X[:, 0]),
    "cluster_scores": (lambda x: metrics.cluster_scores(x, LABELS), X),
    "cmmd": (metrics.cmmd, X, Y),
    "cosine": (metrics.cosine, X, Y),
    "dci": (metrics.dci, X, torch.as_tensor(FACTORS)),
    "frechet_distance": (metrics.frechet_distance, X, Y),
    "frechet_distance_infinite": (metrics.frechet_distance_infinite, X, Y),
    "inception_score": (metrics.inception_score, X.softmax(1)),
    "kernel_distance": (partial(metrics.kernel_distance, subsets=3, subset_size=20), X, Y),
    "linear_probe": (lambda x, y: metrics.linear_probe(x, LABELS, y, LABELS), X, Y),
    "mig": (metrics.mig, X, torch.as_tensor(FACTORS)),
    "perceptual_distance": (partial(metrics.perceptual_distance, network=NET), PICTURES, PICTURES.flip(3)),
    "precision_recall": (metrics.precision_recall, X, Y),
    "psnr": (metrics.psnr, PICTURES, PICTURES.flip(3)),
    "retrieval": (metrics.retrieval, X, Y),
    "sharpness": (metrics.sharpness, PICTURES, PICTURES.flip(3)),
    "ssim": (metrics.ssim, PICTURES, PICTURES.flip(3)),
}


def plain(result) -> list[float]:
    values = result.values() if isinstance(result, dict) else [result]
    return np.concatenate([np.ravel(torch.as_tensor(value).detach().double()) for value in values]).tolist()


@pytest.mark.parametrize("name", CALLS)
def test_arrays_and_tensors_with_gradients_give_what_tensors_give(name):
    call, *inputs = CALLS[name]
    want = plain(call(*inputs))
    assert plain(call(*(x.numpy() for x in inputs))) == want
    with_gradient = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    assert plain(call(*with_gradient)) == want


def test_every_public_metric_is_called_here_and_says_what_it_takes():
    assert CALLS.keys() == set(metrics.__all__) - {"GaussianMoments"}
    for name in metrics.__all__:
        assert any(shape in getattr(metrics, name).__doc__ for shape in ("(N", "(B", "rows")), name


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: metrics.frechet_distance(X, torch.where(Y > 2, torch.nan, Y)), "not finite"),
        (lambda: metrics.frechet_distance(X[:4], torch.where(Y > 2, torch.inf, Y)), "not finite"),
        (lambda: metrics.frechet_distance_infinite(X, Y[:, :3]), "cannot be compared"),
        (lambda: metrics.frechet_distance_infinite(X[:3, :1], Y[:3, :1]), "4 are not"),
        (lambda: metrics.kernel_distance(X, Y[:, :3], 1, 20), r"\(60, 8\) and \(60, 3\)"),
        (lambda: metrics.kernel_distance(X, Y, 0, 20), "subsets 0"),
        (lambda: metrics.cmmd(X, Y[:, :3]), r"\(60, 8\) and \(60, 3\)"),
        (lambda: metrics.cmmd(X, Y[:0]), r"\(0, 8\)"),
        (lambda: metrics.inception_score(X), "softmax"),
        (lambda: metrics.inception_score(X.softmax(1), splits=0), "at least 0"),
        (lambda: metrics.precision_recall(X, Y, k=0), "k 0"),
        (lambda: metrics.precision_recall(X[:, 0], Y[:, 0]), "need one width"),
        (lambda: metrics.psnr(PICTURES, PICTURES[:1]), "cannot be compared"),
        (lambda: metrics.mig(X, FACTORS * 0), "factor 0 has one class"),
        (lambda: metrics.mig(X[:, :1], FACTORS), "2 or more"),
        (lambda: metrics.dci(X, FACTORS[:, :1]), "2 or more"),
        (lambda: metrics.retrieval(X[:0], Y[:0]), "not pairs"),
    ],
)
def test_what_cannot_be_measured_is_said(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_one_dimension_is_extrapolated():
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(400, 1, generator=g, dtype=torch.float64) for _ in range(2))
    assert metrics.frechet_distance_infinite(x + 2, y) == pytest.approx(4, abs=0.5)
    assert np.isfinite(metrics.frechet_distance_infinite(x[:4], y[:4]))


def test_codes_that_are_constant_say_nothing():
    found = metrics.dci(np.zeros((60, 4)), FACTORS)
    assert (found["disentanglement"], found["completeness"]) == (0, 0)
    assert metrics.mig(np.zeros((60, 4)), FACTORS) == 0


def test_frechet_distance_is_torch_fidelitys():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    x, y = two_sets()
    statistics = [fid_features_to_statistics(rows) for rows in (x, y)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert metrics.frechet_distance(x, y) == pytest.approx(theirs, rel=1e-8)


@pytest.mark.parametrize("count", [57, 205])
def test_inception_score_of_a_number_that_ten_does_not_divide_is_torch_fidelitys(count):
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * torch.randn(count, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = isc_features_to_metric(logits, splits=10, shuffle=False)
    want = theirs["inception_score_mean"], theirs["inception_score_std"]
    assert metrics.inception_score(logits.softmax(1)) == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("k", [1, 2, 5, 6, 9])
def test_chance_is_the_share_of_all_orders_and_what_equal_embeddings_score(k):
    same = torch.eye(6) > 0
    same[:3, :3] = True
    drawn = list(itertools.combinations(range(6), min(k, 6)))
    want = np.mean([any(row[i] for i in first) for row in same for first in drawn])
    assert chance(same, k) == pytest.approx(want)
    found = metrics.retrieval(torch.ones(6, 4), torch.ones(6, 4), k=(k,), same=same)
    assert set(found) == {f"image_to_text@{k}", f"text_to_image@{k}", f"chance@{k}"}
    assert all(value == pytest.approx(want) for value in found.values())


def test_a_tie_of_right_and_wrong_is_shared_by_the_orders_it_can_take():
    texts = torch.tensor([[1.0, 0, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0]])
    images = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 0, 1], [0, 1, 0]])
    same = torch.eye(4) > 0
    same[0, 1] = same[1, 0] = True  # two of the three equal captions are right for picture 0
    hits = metrics.alignment.retrieval_hits(images, texts, (1, 2), same)
    assert hits["image_to_text@1"][0].item() == pytest.approx(2 / 3)
    assert hits["image_to_text@2"][0].item() == pytest.approx(1)
