"""Do pictures show what their captions say? From the embeddings of an image-text model, row i with row i."""

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.metrics.inputs import PART, Rows, two_sets


def cosine(image_embeddings: Rows, text_embeddings: Rows) -> Tensor:
    """Cosine of each picture with its own caption, (N, D) and (N, D) -> (N,) float64 in [-1, 1]."""
    return F.cosine_similarity(*two_sets(image_embeddings, text_embeddings, pairs=True))


def clip_score(cosines: Rows, weight: float = 2.5) -> Tensor:
    """weight * max(cos, 0) per sample, (N,) -> (N,); its mean is the score.

    Weight 2.5 as in Hessel et al. 2021, eq. 1; 100 is the other scale in use: print which, and the model.
    """
    return weight * torch.as_tensor(cosines).double().clamp_min(0)


def retrieval(
    image_embeddings: Rows, text_embeddings: Rows, k: Sequence[int] = (1, 5), same: Rows | None = None
) -> dict[str, float]:
    """Share of queries whose partner is among the k most similar of all N, both ways.

    Embeddings (N, D). `same` (N, N) bool marks further pairs that count as right, as where two pictures share
    a caption. The orders of a tie count alike, so that constant embeddings score chance. Returns "image_to_text@k",
    "text_to_image@k" and "chance@k", the score of a random order, in [0, 1].
    """
    hits = retrieval_hits(image_embeddings, text_embeddings, k, same)
    scores = {name: float(values.mean()) for name, values in hits.items()}
    return scores | {f"chance@{top}": chance(_right(len(image_embeddings), same), top) for top in k}


def sharing(captions: Sequence[Sequence[str]]) -> Tensor:
    """(N, N) bool: whether two of N pictures, each with all its captions, share one, as each does with itself."""
    owners = defaultdict(list)
    for row, texts in enumerate(captions):
        for text in texts:
            owners[text].append(row)
    same = torch.eye(len(captions), dtype=torch.bool)
    for rows in map(torch.tensor, owners.values()):
        same[rows[:, None], rows] = True
    return same


def chance(right: Tensor, k: int) -> float:
    """The share of queries (rows) with one of their right partners, `right` (N, N) bool, among the first k of a random
    order of all N."""
    return float(_hits(torch.zeros(right.shape), right, k).mean())


def retrieval_hits(
    image_embeddings: Rows, text_embeddings: Rows, k: Sequence[int] = (1, 5), same: Rows | None = None
) -> dict[str, Tensor]:
    """The values that `retrieval` averages: each query's 0, 1 or, in a tie, share of a hit; (N,) float64 by name."""
    pairs = two_sets(image_embeddings, text_embeddings, pairs=True)
    images, texts = (F.normalize(rows, dim=1) for rows in pairs)
    right, hits = _right(len(images), same).to(images.device), defaultdict(list)
    for name, queries, others, answers in (
        ("image_to_text", images, texts, right),
        ("text_to_image", texts, images, right.T),
    ):
        for part, answer in zip(queries.split(PART), answers.split(PART), strict=True):
            scores = part @ others.T
            for top in k:
                hits[f"{name}@{top}"].append(_hits(scores, answer, top))
    return {name: torch.cat(parts) for name, parts in hits.items()}


def _hits(scores: Tensor, right: Tensor, k: int) -> Tensor:
    """For each row of scores (Q, N) the chance that one of its `right` columns is among the first k, where those that
    tie with its best right one come in random order after those `ahead`: 1 - C(wrong, k - ahead) / C(tied, k - ahead).
    """
    best = scores.masked_fill(~right, float("-inf")).amax(1, keepdim=True)
    ties = (scores - best).abs() < 1e-12  # equal but for round-off
    ahead, tied, wrong = (x.sum(1).double() for x in ((scores > best) & ~ties, ties, ties & ~right))
    missed = torch.ones_like(ahead)
    for i in range(k):
        miss = (wrong - i).clamp_min(0) / (tied - i).clamp_min(1)
        missed = torch.where(i < k - ahead, missed * miss, missed)
    return 1 - missed


def _right(count: int, same: Rows | None) -> Tensor:
    """Which captions are right for which pictures, (N, N) bool."""
    return torch.eye(count, dtype=torch.bool) | torch.as_tensor(False if same is None else same).cpu()
