"""The losses against closed forms and their own definitions; the patch discriminator."""

import math

import pytest
import torch
import torch.nn.functional as F

from ldm import losses
from ldm.discriminator import PatchDiscriminator


def test_kl_matches_torch_and_the_vector():
    mean, logvar = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    normal = torch.distributions.Normal
    oracle = torch.distributions.kl_divergence(normal(mean, (0.5 * logvar).exp()), normal(0.0, 1.0)).mean()
    assert losses.kl(mean, logvar).item() == pytest.approx(oracle.item(), rel=1e-5)
    half = torch.full((5,), 0.5, dtype=torch.float64)
    assert losses.kl(half, half.square().log()).item() == pytest.approx(0.44314718056, abs=1e-10)
    assert losses.kl(torch.zeros(3), torch.zeros(3)).item() == 0


def test_adaptive_weight_is_the_ratio_of_gradient_norms_and_is_clamped():
    weight = torch.randn(4, 4, requires_grad=True)
    out = torch.randn(3, 4) @ weight
    reconstruction, gan = out.square().mean(), 3 * out.square().mean()
    found = losses.adaptive_weight(reconstruction, gan, weight)
    assert found.item() == pytest.approx(1 / 3, rel=1e-3) and not found.requires_grad
    assert losses.adaptive_weight(reconstruction, 0 * gan, weight, maximum=50.0).item() == 50.0
    (reconstruction + found * gan).backward()  # the graphs are still there
    assert weight.grad is not None


def test_contrastive_matches_transformers_and_closed_forms():
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    images, texts = torch.randn(6, 8), torch.randn(6, 8)
    logits = 10.0 * F.normalize(texts, dim=-1) @ F.normalize(images, dim=-1).T
    oracle = image_text_contrastive_loss(logits)
    assert losses.contrastive(images, texts, 10.0).item() == pytest.approx(oracle.item(), rel=1e-5)
    assert losses.contrastive(images, texts, 0.0).item() == pytest.approx(math.log(6), rel=1e-5)
    assert losses.contrastive(torch.eye(4), torch.eye(4), 100.0).item() < 1e-6


def test_pairs_that_share_a_caption_are_not_negatives():
    images, texts = torch.randn(4, 8), torch.randn(4, 8)
    texts[1] = texts[0]
    same = torch.zeros(4, 4, dtype=torch.bool)
    same[:2, :2] = True
    found = losses.contrastive(images, texts, 5.0, same)
    logits = 5.0 * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    terms = []
    for i in range(4):
        others = [j for j in range(4) if j == i or not same[i, j]]
        terms.append(logits[i, others].logsumexp(0) + logits[others, i].logsumexp(0) - 2 * logits[i, i])
    assert found.item() == pytest.approx(torch.stack(terms).mean().item() / 2, rel=1e-5)
    assert found < losses.contrastive(images, texts, 5.0)


def test_contrastive_has_finite_gradients_and_ignores_autocast():
    images, texts, scale = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8), torch.tensor(100.0)
    losses.contrastive(images, texts, scale, torch.ones(4, 4, dtype=torch.bool)).backward()
    assert images.grad.isfinite().all()
    plain = losses.contrastive(images, texts, 100.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert losses.contrastive(images, texts, 100.0).item() == plain.item()


@pytest.mark.parametrize(("size", "layers", "side"), [(32, 3, 2), (64, 3, 6), (24, 3, 1), (32, 2, 6), (256, 3, 30)])
def test_one_logit_for_each_patch(size, layers, side):
    net = PatchDiscriminator(channels=8, layers=layers)
    assert net(torch.zeros(1, 3, size, size)).shape == (1, 1, side, side)


def test_pictures_are_judged_alone():
    torch.manual_seed(0)
    net = PatchDiscriminator(channels=8).train()
    x = torch.randn(3, 3, 32, 32)
    together, alone = net(x), torch.cat([net(x[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-6)
    assert not list(net.buffers())


def test_receptive_field_is_70_pixels():
    torch.manual_seed(0)
    net = PatchDiscriminator(channels=4)
    # without the normalization, which sees the whole picture
    net.net = torch.nn.Sequential(*[m for m in net.net if not isinstance(m, torch.nn.GroupNorm)])
    x = torch.randn(1, 3, 256, 256, requires_grad=True)
    net(x)[0, 0, 15, 15].backward()
    seen = x.grad.abs().sum((0, 1))
    assert (seen.sum(0) > 0).sum() == 70 and (seen.sum(1) > 0).sum() == 70
