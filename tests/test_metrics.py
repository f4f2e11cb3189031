"""Metrics against the vectors of their definitions and the usual libraries."""

import numpy as np
import pytest
import torch
from scipy.ndimage import laplace
from torchvision.transforms.v2 import functional as TF

from ldm.config import UserError
from ldm.data import DataConfig, open_dataset, spread
from ldm.metrics import (
    GaussianMoments,
    clip_score,
    cmmd,
    cosine,
    frechet_distance,
    kernel_distance,
    psnr,
    retrieval,
    sharpness,
    ssim,
)
from ldm.metrics.features import feature_extractor
from ldm.metrics.judges import image_text_model
from ldm.metrics.reconstruction import ROUNDING


def two_sets() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 64, generator=g, dtype=torch.float64)
    return x, 1.3 * torch.randn(500, 64, generator=g, dtype=torch.float64) + 0.2


def rows_with(mean: list[float], covariance: list[list[float]]) -> torch.Tensor:
    """Rows whose mean and covariance (ddof 1) are exactly those."""
    torch.manual_seed(0)
    x = torch.randn(50, len(mean), dtype=torch.float64)
    x = x - x.mean(0)
    whiten = torch.linalg.inv(torch.linalg.cholesky(x.T @ x / 49)).T
    root = torch.linalg.cholesky(torch.tensor(covariance, dtype=torch.float64)).T
    return x @ whiten @ root + torch.tensor(mean, dtype=torch.float64)


def pictures(count: int = 3, size: int = 32) -> torch.Tensor:
    torch.manual_seed(0)
    return TF.gaussian_blur(torch.rand(count, 3, size, size, dtype=torch.float64) * 2 - 1, [5, 5], [1.0, 1.0])


def test_frechet_vectors():
    eye = torch.eye(8).tolist()
    four = (4 * torch.eye(8)).tolist()
    assert frechet_distance(rows_with([0.0] * 8, eye), rows_with([1.0] * 8, four)) == pytest.approx(16, abs=1e-9)
    a, b = rows_with([0.0, 0.0], [[2, 1], [1, 2]]), rows_with([0.0, 0.0], [[1, 0], [0, 3]])
    assert frechet_distance(a, b) == pytest.approx(0.5166852264521, abs=1e-9)
    x, y = two_sets()
    assert frechet_distance(x, y) == pytest.approx(13.952707919131, abs=1e-9)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x.numpy(), y.numpy()) == frechet_distance(x, y)


def test_frechet_equals_scipy_and_torchmetrics():
    from scipy.linalg import sqrtm
    from torchmetrics.image.fid import _compute_fid

    x, y = two_sets()
    s1, s2 = np.cov(x.numpy().T), np.cov(y.numpy().T)
    gap = ((x.mean(0) - y.mean(0)) ** 2).sum().item()
    expected = gap + np.trace(s1 + s2 - 2 * np.real(sqrtm(s1 @ s2)))
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-8)
    oracle = _compute_fid(x.mean(0), x.T.cov(), y.mean(0), y.T.cov()).item()
    assert frechet_distance(x, y) == pytest.approx(oracle, rel=1e-8)


def test_frechet_of_fewer_rows_than_dimensions_is_finite_and_symmetric():
    x, y = two_sets()
    few = frechet_distance(x[:20], y[:20])
    assert np.isfinite(few) and few == pytest.approx(frechet_distance(y[:20], x[:20]), rel=1e-6)


@pytest.mark.parametrize("batch", [1, 7, 500])
def test_moments_do_not_depend_on_the_batching(batch):
    x = two_sets()[0] + 1e4  # a large mean costs the naive formula its digits
    moments = GaussianMoments()
    for part in x.split(batch):
        moments.update(part)
    assert moments.count == 500
    assert torch.allclose(moments.mean, x.mean(0), rtol=1e-12)
    assert torch.allclose(moments.covariance, x.T.cov(), atol=1e-9)


def test_two_processes_equal_one():
    x, y = two_sets()
    first, second = GaussianMoments().update(x[:123]), GaussianMoments().update(x[123:])
    merged = GaussianMoments().merge(first).merge(second).merge(GaussianMoments())
    assert frechet_distance(merged, y) == pytest.approx(frechet_distance(x, y), abs=1e-9)
    assert first.count == 123  # merging changes only its target
    assert torch.allclose(first.covariance, x[:123].T.cov())


def test_frechet_refuses_what_it_cannot_compare():
    x, y = two_sets()
    with pytest.raises(ValueError, match="at least 2 rows"):
        frechet_distance(x[:1], y)
    with pytest.raises(ValueError, match="64 and of 3"):
        frechet_distance(x, y[:, :3])


def test_psnr_vector_and_scikit_image():
    from skimage.metrics import peak_signal_noise_ratio

    x = torch.zeros(2, 3, 8, 8)
    assert psnr(x, x + 2 / 255).tolist() == pytest.approx([48.1308, 48.1308], abs=1e-4)
    assert psnr(x, x).tolist() == [100.0, 100.0]
    a = pictures()
    b = a + 0.1 * torch.randn_like(a)
    expected = [peak_signal_noise_ratio(p.numpy(), q.numpy(), data_range=2) for p, q in zip(a, b, strict=True)]
    assert psnr(a, b).tolist() == pytest.approx(expected, rel=1e-9)


def test_ssim_vector_and_libraries():
    from skimage.metrics import structural_similarity
    from torchmetrics.functional.image import structural_similarity_index_measure

    flat = torch.full((1, 3, 32, 32), 0.25)
    assert ssim(flat, 3 * flat, data_range=1.0).item() == pytest.approx(0.600064, abs=1e-6)
    a = pictures()
    b = a + 0.1 * torch.randn_like(a)
    assert ssim(a, a).tolist() == pytest.approx([1, 1, 1])
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": 0}
    expected = [structural_similarity(p.numpy(), q.numpy(), data_range=2, **options) for p, q in zip(a, b, strict=True)]
    assert ssim(a, b).tolist() == pytest.approx(expected, abs=5e-5)
    _, full = structural_similarity_index_measure(a, b, data_range=2.0, return_full_image=True)
    inner = full[..., 5:-5, 5:-5].mean((1, 2, 3))  # torchmetrics also counts windows over reflected borders
    assert ssim(a, b).tolist() == pytest.approx(inner.tolist(), abs=1e-9)
    with pytest.raises(ValueError, match="11x11"):
        ssim(a[..., :10], b[..., :10])


def test_sharpness_equals_scipy_and_falls_with_blur():
    x = pictures()
    y = TF.gaussian_blur(x, [5, 5], [0.7, 0.7])
    energy = [[np.square(laplace(p.numpy(), axes=(1, 2))[:, 1:-1, 1:-1]).mean() for p in side] for side in (x, y)]
    expected = [(b + ROUNDING) / (a + ROUNDING) for a, b in zip(*energy, strict=True)]
    assert sharpness(x, y).tolist() == pytest.approx(expected, rel=1e-9) and sharpness(x, y).max() < 1
    assert sharpness(x, x).tolist() == [1.0] * len(x) and (sharpness(x, x + 0.1 * torch.randn_like(x)) > 1).all()
    plain = torch.zeros(1, 3, 64, 64)
    assert sharpness(plain, plain + 0.5).tolist() == [1.0]
    many = 127.5 * torch.rand(1, 1, 512, 512, dtype=torch.float64)
    assert sharpness(0 * many, (many.round() - many) / 127.5).item() == pytest.approx(2, rel=0.03)  # rounding alone
    with pytest.raises(ValueError, match="3x3"):
        sharpness(x[..., :2], y[..., :2])


def test_quality_falls_with_blur_and_noise():
    x = pictures()
    noise = torch.randn_like(x)
    for metric in (psnr, ssim):
        blurred = [metric(x, TF.gaussian_blur(x, [9, 9], [s, s])) for s in (0.5, 1.0, 2.0, 4.0)]
        noisy = [metric(x, x + s * noise) for s in (0.05, 0.1, 0.2, 0.4)]
        for levels in (blurred, noisy):
            assert all((a > b).all() for a, b in zip(levels, levels[1:], strict=False))


def test_cosine_and_clip_score():
    torch.manual_seed(0)
    a, b = torch.randn(5, 8), torch.randn(5, 8)
    assert torch.allclose(cosine(a, 3 * b), torch.cosine_similarity(a.double(), b.double()), atol=1e-12)
    assert clip_score([1.0, 0.0, -0.5]).tolist() == [2.5, 0.0, 0.0]
    assert clip_score(np.array([0.25]), weight=100).tolist() == [25.0]
    with pytest.raises(ValueError, match="not pairs"):
        cosine(a, b[:4])


def test_retrieval_equals_a_ranking_by_hand():
    torch.manual_seed(0)
    texts = torch.randn(40, 16)
    images = texts + 1.5 * torch.randn(40, 16)
    found = retrieval(images, texts, k=(1, 5))
    similarity = torch.cosine_similarity(images[:, None].double(), texts[None].double(), dim=-1)
    for name, scores in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        order = scores.argsort(1, descending=True)
        for k in (1, 5):
            hits = [i in order[i, :k] for i in range(40)]
            assert found[f"{name}@{k}"] == pytest.approx(np.mean(hits))
    assert 0.2 < found["image_to_text@1"] < 1
    assert [found["chance@1"], found["chance@5"]] == pytest.approx([1 / 40, 5 / 40])


def test_retrieval_of_constant_embeddings_is_chance_and_shared_captions_count():
    flat = torch.ones(10, 4)
    found = retrieval(flat, flat, k=(1, 5))
    assert found["image_to_text@1"] == pytest.approx(0.1) and found["text_to_image@5"] == pytest.approx(0.5)
    eye = torch.eye(4)
    swapped = eye[[1, 0, 2, 3]]  # the first two take each other's caption
    assert retrieval(eye, swapped, k=(1,))["image_to_text@1"] == 0.5
    same = torch.zeros(4, 4, dtype=torch.bool)
    same[:2, :2] = True
    assert retrieval(eye, swapped, k=(1,), same=same)["image_to_text@1"] == 1.0


@pytest.fixture(scope="module")
def extractor():
    return feature_extractor("effnet-lite0")


def test_extractor_gives_pooled_features_of_any_size(extractor):
    x = pictures(2, 32).float()
    features = extractor(x)
    assert features.shape == (2, 1280) and features.dtype == torch.float32
    assert extractor(pictures(1, 300).float()).shape == (1, 1280)
    assert torch.allclose(extractor(x[:1]), features[:1], atol=1e-4)
    assert (extractor.name, extractor.size) == ("effnet-lite0", 224)
    assert extractor.sha256.startswith("57934424") and len(extractor.sha256) == 64


def test_extractor_refuses_other_ranges_and_names(extractor):
    with pytest.raises(ValueError, match="-1, 1"):
        extractor(torch.full((1, 3, 8, 8), 255.0))
    with pytest.raises(UserError, match="effnet-lite0"):
        feature_extractor("inception-v9")


def test_extractor_knows_a_cat(extractor):
    """With its own classifier on top the network names a photograph: weights and input scaling are right."""
    from efficientnet_lite_pytorch import EfficientNet
    from skimage import data

    from ldm.perceptual import effnet_lite0_file

    net = EfficientNet.from_name("efficientnet-lite0", image_size=None).eval()
    net.load_state_dict(torch.load(effnet_lite0_file(), weights_only=True))
    cat = torch.from_numpy(data.chelsea()[:, 75:375]).permute(2, 0, 1)[None] / 127.5 - 1
    assert net._fc(extractor(cat)).argmax().item() in (
        281,
        282,
        285,
    )  # ImageNet's tabby, tiger and Egyptian cat


def real_emoji(count: int) -> tuple[torch.Tensor, list[list[str]]]:
    """Held-out pictures in [-1, 1] and their captions."""
    dataset = open_dataset(DataConfig(name="emoji", size=64), "test")
    chosen = spread(dataset, count)
    return torch.stack([dataset[i]["image"] for i in chosen]) / 127.5 - 1, [dataset.captions(i) for i in chosen]


def test_distances_of_real_pictures_grow_with_blur_and_noise(extractor):
    """Four levels of each, in the features that evaluations use."""
    x, _ = real_emoji(32)
    judge = image_text_model("emoji")
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(x.shape, generator=g)
    features, embeddings = extractor(x), judge.images(x)
    blurred = [TF.gaussian_blur(x, [15, 15], [s, s]) for s in (0.5, 1.0, 2.0, 4.0)]
    noisy = [(x + s * noise).clamp(-1, 1) for s in (0.1, 0.2, 0.4, 0.8)]
    for levels in (blurred, noisy):
        seen, judged = [extractor(y) for y in levels], [judge.images(y) for y in levels]
        frechet = [frechet_distance(features, y) for y in seen]
        kernel = [kernel_distance(features, y, 1, 32)[0] for y in seen]
        mean = [cmmd(embeddings, y) for y in judged]
        for found in (frechet, kernel, mean):
            assert found == sorted(found) and len(set(found)) == 4, found


def test_shuffled_captions_of_real_pictures_lower_the_clip_score():
    from scipy.stats import ttest_rel

    x, captions = real_emoji(60)
    judge = image_text_model("emoji")
    images, texts = judge.images(x), judge.texts([own[0] for own in captions])
    right, wrong = clip_score(cosine(images, texts)), clip_score(cosine(images, texts.roll(1, 0)))
    assert ttest_rel(right.numpy(), wrong.numpy(), alternative="greater").pvalue < 0.01
