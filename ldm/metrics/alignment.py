"""Do pictures say what their captions say? From the embeddings of an image-text model, row i with row i."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PART = 1024  # queries whose similarities are held at once


def cosine(image_embeddings: Tensor | np.ndarray, text_embeddings: Tensor | np.ndarray) -> Tensor:
    """Cosine of each picture with its own caption, (N, D) and (N, D) -> (N,) float64 in [-1, 1]."""
    images, texts = _unit(image_embeddings), _unit(text_embeddings)
    if images.shape != texts.shape:
        raise ValueError(f"embeddings {tuple(images.shape)} and {tuple(texts.shape)} are not pairs")
    return (images * texts).sum(1)


def clip_score(cosines: Tensor | np.ndarray, weight: float = 2.5) -> Tensor:
    """weight * max(cos, 0) per sample, (N,) -> (N,); its mean is the score.

    Weight 2.5 as in Hessel et al. 2021, eq. 1; 100 is the other scale in use: print which, and the model.
    """
    return weight * torch.as_tensor(cosines).double().clamp_min(0)


def retrieval(
    image_embeddings: Tensor | np.ndarray,
    text_embeddings: Tensor | np.ndarray,
    k: Sequence[int] = (1, 5),
    same: Tensor | np.ndarray | None = None,
) -> dict[str, float]:
    """Share of queries whose partner is among the k most similar of all N, both ways.

    Embeddings (N, D). `same` (N, N) bool marks further pairs that count as right, as where two pictures share
    a caption. Of a tie each order counts alike, so that constant embeddings score chance. Returns "image_to_text@k",
    "text_to_image@k" and "chance@k", the score of a random order, in [0, 1].
    """
    found = retrieval_hits(image_embeddings, text_embeddings, k, same)
    right = torch.eye(len(found[f"image_to_text@{k[0]}"]), dtype=torch.bool)
    right = right if same is None else right | torch.as_tensor(same).cpu()
    by_chance = {f"chance@{top}": chance(right, top) for top in k}
    return {name: float(hits.mean()) for name, hits in found.items()} | by_chance


def chance(right: Tensor, k: int) -> float:
    """The share of queries (rows) with one of their right partners, `right` (N, N) bool, among the first k of a random
    order of all N."""
    partners = right.sum(1).double()
    return float(_hit(torch.zeros_like(partners), partners, len(right) - partners, k).mean())


def retrieval_hits(
    image_embeddings: Tensor | np.ndarray,
    text_embeddings: Tensor | np.ndarray,
    k: Sequence[int] = (1, 5),
    same: Tensor | np.ndarray | None = None,
) -> dict[str, Tensor]:
    """What `retrieval` takes the means of: each query's 0, 1 or, in a tie, share of a hit; (N,) float64 by name."""
    images, texts = _unit(image_embeddings), _unit(text_embeddings)
    if images.shape != texts.shape or not len(images):
        raise ValueError(f"embeddings {tuple(images.shape)} and {tuple(texts.shape)} are not pairs")
    right = torch.eye(len(images), dtype=torch.bool, device=images.device)
    if same is not None:
        right = right | torch.as_tensor(same, device=images.device)
    result = {}
    for name, queries, others, answers in (
        ("image_to_text", images, texts, right),
        ("text_to_image", texts, images, right.T),
    ):
        parts = zip(queries.split(PART), answers.split(PART), strict=True)
        found = [_rivals(part @ others.T, own) for part, own in parts]  # of (PART, N)
        places = [torch.cat(values) for values in zip(*found, strict=True)]
        result |= {f"{name}@{top}": _hit(*places, top) for top in k}
    return result


def _rivals(scores: Tensor, answers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each row, how many wrong columns beat the best right one, and how many right and wrong ones equal it; (N,)
    float64."""
    best = scores.masked_fill(~answers, float("-inf")).amax(1, keepdim=True)
    close = (scores - best).abs() < 1e-12  # equal but for round-off
    counted = (scores > best) & ~close & ~answers, close & answers, close & ~answers
    return tuple(columns.sum(1).double() for columns in counted)


def _hit(ahead: Tensor, right: Tensor, wrong: Tensor, k: int) -> Tensor:
    """The chance (N,) that one of `right` is among the first k, where `ahead` come first and then right and wrong in
    random order."""
    missed = torch.ones_like(ahead)
    for place in range(k):
        drawn = (place - ahead).clamp_min(0)  # of the random order, all of them wrong
        left = (wrong - drawn).clamp_min(0) / (wrong + right - drawn).clamp_min(1)
        missed = torch.where(ahead > place, missed, missed * left)
    return 1 - missed


def _unit(embeddings: Tensor | np.ndarray) -> Tensor:
    return F.normalize(torch.as_tensor(embeddings).detach().double(), dim=-1)
