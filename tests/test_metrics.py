"""Metrics of pictures, of captions and of codes against the vectors of their definitions and the usual libraries; and
the inputs that every public metric takes or refuses."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from scipy.ndimage import laplace
from torchvision.transforms.v2 import functional as TF

from ldm import metrics
from ldm.metrics import clip_score, cluster_scores, cosine, dci, linear_probe, mig, psnr, retrieval, sharpness, ssim
from ldm.metrics.alignment import chance, retrieval_hits
from ldm.metrics.reconstruction import ROUNDING, discretized_logistic
from ldm.metrics.representation import agreement


def two_sets() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 64, generator=g, dtype=torch.float64)
    return x, 1.3 * torch.randn(500, 64, generator=g, dtype=torch.float64) + 0.2


def pictures(count: int = 3, size: int = 32) -> torch.Tensor:
    torch.manual_seed(0)
    return TF.gaussian_blur(torch.rand(count, 3, size, size, dtype=torch.float64) * 2 - 1, [5, 5], [1.0, 1.0])


def noisy(x: torch.Tensor, amount: float = 0.1) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return (x + amount * torch.randn(x.shape, generator=g, dtype=x.dtype)).clamp(-1, 1)


def test_psnr_and_ssim_are_scikit_images_on_the_unit_range():
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    x = torch.zeros(2, 3, 32, 32)
    assert psnr(x, x + 2 / 255).tolist() == pytest.approx([48.1308, 48.1308], abs=1e-4)
    assert psnr(x, x).tolist() == [100.0, 100.0] and ssim(x, x).tolist() == pytest.approx([1, 1])
    assert ssim(x - 0.5, x + 0.5)[0].item() == pytest.approx(0.600064, abs=1e-6)  # 0.25 and 0.75 in [0, 1]
    a = pictures()
    b = noisy(a)
    units = [((p.numpy() + 1) / 2, (q.numpy() + 1) / 2) for p, q in zip(a, b, strict=True)]
    expected = [peak_signal_noise_ratio(p, q, data_range=1) for p, q in units]
    assert psnr(a, b).tolist() == pytest.approx(expected, rel=1e-9)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": 0}
    expected = [structural_similarity(p, q, data_range=1, **options) for p, q in units]
    assert ssim(a, b).tolist() == pytest.approx(expected, abs=5e-5)


def test_sharpness_equals_scipy_and_falls_with_blur():
    x = pictures()
    y = TF.gaussian_blur(x, [5, 5], [0.7, 0.7])
    unit = [[(p.numpy() + 1) / 2 for p in side] for side in (x, y)]
    energy = [[np.square(laplace(p, axes=(1, 2))[:, 1:-1, 1:-1]).mean() for p in side] for side in unit]
    expected = [(b + ROUNDING) / (a + ROUNDING) for a, b in zip(*energy, strict=True)]
    assert sharpness(x, y).tolist() == pytest.approx(expected, rel=1e-9) and sharpness(x, y).max() < 1
    assert sharpness(x, x).tolist() == [1.0] * len(x) and (sharpness(x, noisy(x)) > 1).all()
    plain = torch.zeros(1, 3, 64, 64)
    assert sharpness(plain, plain + 0.5).tolist() == [1.0]
    levels = 127.5 * torch.rand(1, 1, 512, 512, dtype=torch.float64)
    assert sharpness(0 * levels, (levels.round() - levels) / 127.5).item() == pytest.approx(2, rel=0.03)  # rounding


@pytest.mark.parametrize("mean, scale", [(0.3, 0.01), (0.999, 1e-4), (-1.2, 0.05), (-0.2, 0.3), (0.0, 50.0)])
def test_discretized_logistic_is_scipys_on_256_levels(mean, scale):
    from scipy.stats import logistic

    levels = torch.arange(256, dtype=torch.uint8)
    nll = discretized_logistic(levels, torch.tensor(mean), scale)
    assert torch.isfinite(nll).all() and torch.exp(-nll).sum().item() == pytest.approx(1, abs=1e-9)
    edges = (np.arange(257) - 0.5) / 127.5 - 1
    edges[0], edges[-1] = -np.inf, np.inf
    mass = np.diff(logistic(np.float32(mean), scale).cdf(edges))
    probable = mass > 1e-8
    assert torch.exp(-nll)[probable].numpy() == pytest.approx(mass[probable], rel=1e-5)


def test_cosine_and_clip_score():
    torch.manual_seed(0)
    a, b = torch.randn(5, 8), torch.randn(5, 8)
    assert torch.allclose(cosine(a, 3 * b), torch.cosine_similarity(a.double(), b.double()), atol=1e-12)
    assert clip_score([1.0, 0.0, -0.5]).tolist() == [2.5, 0.0, 0.0]
    assert clip_score(np.array([0.25]), weight=100).tolist() == [25.0]


def test_retrieval_equals_a_ranking_by_hand():
    torch.manual_seed(0)
    texts = torch.randn(40, 16)
    images = texts + 1.5 * torch.randn(40, 16)
    scores = retrieval(images, texts, k=(1, 5))
    similarity = torch.cosine_similarity(images[:, None].double(), texts[None].double(), dim=-1)
    for name, matrix in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        order = matrix.argsort(1, descending=True)
        for k in (1, 5):
            assert scores[f"{name}@{k}"] == pytest.approx(np.mean([i in order[i, :k] for i in range(40)]))
    assert 0.2 < scores["image_to_text@1"] < 1


@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_chance_is_the_share_of_all_orders_and_the_score_of_equal_embeddings(k):
    same = torch.eye(6) > 0
    same[:3, :3] = True
    drawn = list(itertools.combinations(range(6), min(k, 6)))
    want = np.mean([any(row[i] for i in first) for row in same for first in drawn])
    scores = retrieval(torch.ones(6, 4), torch.ones(6, 4), k=(k,), same=same)
    assert set(scores) == {f"image_to_text@{k}", f"text_to_image@{k}", f"chance@{k}"}
    assert chance(same, k) == pytest.approx(want) and all(value == pytest.approx(want) for value in scores.values())
    texts = torch.tensor([[1.0, 0, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0]])
    images = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 0, 1], [0, 1, 0]])
    same = torch.eye(4) > 0
    same[0, 1] = same[1, 0] = True  # two of the three equal captions are right for picture 0
    hit = retrieval_hits(images, texts, (k,), same)[f"image_to_text@{k}"][0].item()
    assert hit == pytest.approx(2 / 3 if k == 1 else 1)


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


X, Y = (rows[:60, :8] for rows in two_sets())
LABELS = np.arange(60) % 3
FACTORS = np.stack([LABELS, np.arange(60) // 20], 1)
PICTURES = 2 * torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1


def squared_error(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x - y).square().mean((1, 2, 3))


PAIRWISE = {
    "perceptual_distance": partial(metrics.perceptual_distance, network=squared_error),
    "psnr": psnr,
    "sharpness": sharpness,
    "ssim": ssim,
}
CALLS = {
    "bits_per_dimension": (partial(metrics.bits_per_dimension, dimensions=3), X[:, 0], Y[:, 0]),
    "clip_score": (clip_score, X[:, 0]),
    "cluster_scores": (lambda x: metrics.cluster_scores(x, LABELS), X),
    "cmmd": (metrics.cmmd, X, Y),
    "cosine": (cosine, X, Y),
    "dci": (metrics.dci, X, torch.as_tensor(FACTORS)),
    "frechet_distance": (metrics.frechet_distance, X, Y),
    "frechet_distance_infinite": (metrics.frechet_distance_infinite, X, Y),
    "inception_score": (metrics.inception_score, X.softmax(1)),
    "kernel_distance": (partial(metrics.kernel_distance, subsets=3, subset_size=20), X, Y),
    "linear_probe": (lambda x, y: metrics.linear_probe(x, LABELS, y, LABELS), X, Y),
    "mig": (metrics.mig, X, torch.as_tensor(FACTORS)),
    "precision_recall": (metrics.precision_recall, X, Y),
    "retrieval": (retrieval, X, Y),
} | {name: (metric, PICTURES, PICTURES.flip(3)) for name, metric in PAIRWISE.items()}


def plain(result) -> list[float]:
    values = result.values() if isinstance(result, dict) else [result]
    return np.concatenate([np.ravel(torch.as_tensor(value).detach().double()) for value in values]).tolist()


@pytest.mark.parametrize("name", CALLS)
def test_arrays_and_tensors_with_gradients_measure_as_tensors_do(name):
    call, *inputs = CALLS[name]
    want = plain(call(*inputs))
    assert CALLS.keys() == set(metrics.__all__)
    assert plain(call(*(x.numpy() for x in inputs))) == want
    assert plain(call(*(x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs))) == want


@pytest.mark.parametrize("metric", PAIRWISE.values(), ids=PAIRWISE)
def test_pictures_of_another_range_or_shape_are_refused_and_nan_stays(metric):
    for factor, largest in ((127, "127"), (1.01, "1.01")):
        with pytest.raises(ValueError, match=rf"floats in \[-1, 1\], not up to {largest}"):
            metric(PICTURES / PICTURES.abs().max() * factor, PICTURES)
    with pytest.raises(ValueError, match="not torch.uint8; ldm.images.to_float"):
        metric(PICTURES, ((PICTURES + 1) * 127.5).to(torch.uint8))
    with pytest.raises(ValueError, match="cannot be compared"):
        metric(PICTURES, PICTURES[:1])
    assert metric(torch.where(PICTURES > 0.9, torch.nan, PICTURES), PICTURES).isnan().all()
    assert metric(PICTURES / PICTURES.abs().max() * 1.0005, PICTURES).isfinite().all()


NOT_PAIRS = r"\(60, 8\) and \(60, 3\)"


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: metrics.frechet_distance(X[:1], Y), "at least 2 rows"),
        (lambda: metrics.frechet_distance(X, Y[:, :3]), NOT_PAIRS),
        (lambda: metrics.frechet_distance(X, torch.where(Y > 2, torch.nan, Y)), "not finite"),
        (lambda: metrics.frechet_distance_infinite(X[:15], Y), "use 16 or more"),
        (lambda: metrics.kernel_distance(X, Y, subset_size=61), "2..60"),
        (lambda: metrics.inception_score(X), "softmax"),
        (lambda: metrics.inception_score(X[:9].softmax(1)), "at least 10"),
        (lambda: metrics.mig(X, FACTORS * 0), "has one class"),
        (lambda: metrics.dci(X, FACTORS[:, :1]), "2 or more"),
        (lambda: cosine(X, Y[:5]), "not pairs"),
        (lambda: retrieval(X[:0], Y[:0]), "at least 1 rows"),
        (lambda: ssim(PICTURES[..., :10], PICTURES[..., :10]), "11x11"),
        (lambda: sharpness(PICTURES[..., :2], PICTURES[..., :2]), "3x3"),
    ],
)
def test_inputs_that_cannot_be_measured_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
