"""Losses as pure functions. Every loss is a mean over elements, so that a weight means the same at any size and batch
(a KL summed over the latent and divided by the batch, which is common, changes with the size)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def reconstruction(prediction: Tensor, target: Tensor, l2_weight: float = 0.0) -> Tensor:
    """Mean absolute error, plus `l2_weight` times the mean squared error, over all elements -> scalar."""
    loss = F.l1_loss(prediction, target)
    return loss + l2_weight * F.mse_loss(prediction, target) if l2_weight else loss


def kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats per latent element -> scalar (Kingma & Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def hinge_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Half the sum of both hinge terms, each a mean over all patches -> scalar (Lim & Ye 2017, halved as in VQGAN).

    1 at zero logits. The fake logits must come from detached images.
    """
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def hinge_generator(fake_logits: Tensor) -> Tensor:
    """Minus the mean logit of the generated images -> scalar (Lim & Ye 2017)."""
    return -fake_logits.mean()


def adaptive_weight(
    reconstruction_loss: Tensor,
    gan_loss: Tensor,
    last_layer_weight: Tensor,
    maximum: float = 1e4,
    mean: Callable[[Tensor], Tensor] = torch.Tensor.detach,
) -> Tensor:
    """Weight that gives the GAN term the reconstruction term's gradient norm at the decoder's last layer (Esser et al.
    2021, VQGAN, eq. 7, with the constant of its published code).

    Returns |grad reconstruction| / (|grad gan| + 1e-4), at most `maximum`, a detached scalar; the graphs of both losses
    are kept for the backward pass. `mean` averages a gradient over the processes that take a step together. Raises
    RuntimeError where a loss does not depend on the weight.
    """
    losses = reconstruction_loss, gan_loss
    gradients = [torch.autograd.grad(loss, last_layer_weight, retain_graph=True)[0] for loss in losses]
    fidelity, gan = (mean(gradient.float()).norm() for gradient in gradients)
    return (fidelity / (gan + 1e-4)).clamp(0, maximum).detach()


def ramp(step: int, start: int, length: int) -> float:
    """0 before `start`, then rising linearly to 1 at `start + length`; a jump at `start` for length 0."""
    return min(max((step - start) / length, 0.0), 1.0) if length > 0 else float(step >= start)


def contrastive(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    scale: Tensor | float,
    same: Tensor | None = None,
) -> Tensor:
    """Symmetric InfoNCE: cross-entropy of the right caption per image and of the right image per caption -> scalar
    (Radford et al. 2021, CLIP, figure 3); log B for unrelated embeddings.

    Embeddings (B, D) of any length, row i of both belonging together; over many processes the gathered global batch.
    `scale` multiplies the cosines (the inverse temperature). `same` (B, B) bool is true where i and j share a caption:
    such pairs are not each other's negatives. In float32 even under autocast: at scale 100 a bfloat16 cosine is off by
    0.4 in the logit.
    """
    with torch.autocast(image_embeddings.device.type, enabled=False):
        images = F.normalize(image_embeddings.float(), dim=-1)
        texts = F.normalize(text_embeddings.float(), dim=-1)
        logits = scale * images @ texts.T  # (B, B)
        target = torch.arange(len(logits), device=logits.device)
        if same is not None:
            logits = logits.masked_fill(same.triu(1) | same.tril(-1), float("-inf"))
        return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def diffusion(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Squared error of (B, ...), averaged over each sample, times `weight` (B,), averaged over the batch -> scalar, in
    float32 (Ho et al. 2020, eq. 14)."""
    error = rearrange((prediction.float() - target.float()).square(), "b ... -> b (...)").mean(1)  # (B,)
    return error.mean() if weight is None else (weight * error).mean()
