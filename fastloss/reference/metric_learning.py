"""Losses of pairs and triplets of rows of features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "batch_all_triplet_loss",
    "batch_hard_triplet_loss",
    "contrastive_loss",
    "cosine_embedding_loss",
    "kelp_ranking_loss",
    "triplet_margin_loss",
]


def pair_sums(a: Tensor, b: Tensor, c: Tensor | None, eps: float) -> Tensor:
    high = torch.float64 if a.dtype == torch.float64 else torch.float32
    a = a.to(high)
    sums = []
    for x in (b,) if c is None else (b, c):
        x = x.to(high)
        sums += [(a * x).sum(1), a.square().sum(1), x.square().sum(1), (a - x + eps).square().sum(1)]
    return torch.stack(sums)


def triplets(x: Tensor, ids: Tensor, margin: float, root: bool) -> Tensor:
    """Of each anchor the sum over its triplets, and how many of them count."""
    square = (x.unsqueeze(1) - x.unsqueeze(0)).square().sum(-1)
    d = length(square) if root else square
    same = ids.unsqueeze(1) == ids
    positive = same & ~torch.eye(ids.shape[0], dtype=torch.bool, device=ids.device)
    terms = torch.relu(d.unsqueeze(2) - d.unsqueeze(1) + margin)
    terms = terms.masked_fill(~(positive.unsqueeze(2) & ~same.unsqueeze(1)), 0.0)
    return torch.stack([terms.sum((1, 2)), (terms > 0).sum((1, 2)).to(x.dtype)])


def length(square: Tensor) -> Tensor:
    """Square root, the derivative of which is 0 at 0."""
    nothing = square == 0
    return square.masked_fill(nothing, 1.0).sqrt().masked_fill(nothing, 0.0)


def reduced(loss: Tensor, reduction: str) -> Tensor:
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()


def cosine_embedding_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0.0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """As `fastloss.functional.cosine_embedding_loss`."""
    return F.cosine_embedding_loss(input1, input2, target, margin, size_average, reduce, reduction)


def triplet_margin_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    p: float = 2.0,
    eps: float = 1e-6,
    swap: bool = False,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    squared: bool = False,
) -> Tensor:
    """As `fastloss.functional.triplet_margin_loss`."""
    if not squared:
        return F.triplet_margin_loss(
            anchor, positive, negative, margin, p, eps, swap, size_average, reduce, reduction
        )
    near, far = (F.pairwise_distance(anchor, x, p, eps).square() for x in (positive, negative))
    if swap:
        far = torch.minimum(far, F.pairwise_distance(positive, negative, p, eps).square())
    return reduced(torch.relu(near - far + margin), reduction)


def contrastive_loss(
    input1: Tensor, input2: Tensor, label: Tensor, margin: float = 1.0, *, reduction: str = "mean"
) -> Tensor:
    """As `fastloss.functional.contrastive_loss`."""
    square = (input1 - input2).square().sum(1)
    apart = torch.relu(margin - length(square)).square()
    y = label.to(square.dtype)
    return reduced(0.5 * ((1 - y) * square + y * apart), reduction)


def kelp_ranking_loss(
    query: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 0.5,
    *,
    variant: str = "ranking",
    reduction: str = "sum",
) -> Tensor:
    """As `fastloss.functional.kelp_ranking_loss`."""
    near, far = F.cosine_similarity(query, positive), F.cosine_similarity(query, negative)
    if variant == "mean_cosine":
        return torch.relu(1 - near.mean()) + torch.relu(1 + far.mean())
    return reduced(torch.relu(far - near + margin), reduction)


def batch_hard_triplet_loss(
    embeddings: Tensor,
    labels: Tensor,
    margin: float | None = 5.0,
    *,
    distance: str = "euclidean",
    reduction: str = "mean",
) -> Tensor:
    """As `fastloss.functional.batch_hard_triplet_loss`."""
    x = F.normalize(embeddings) if distance == "cosine" else embeddings
    square = (x.unsqueeze(1) - x.unsqueeze(0)).square().sum(-1)
    d = {"euclidean": length(square), "squared": square, "cosine": square / 2}[distance]
    same = labels.unsqueeze(0) == labels.unsqueeze(1)
    positive = same & ~torch.eye(labels.shape[0], dtype=torch.bool, device=labels.device)
    counts = positive.any(1) & (~same).any(1)
    if labels.shape[0] == 0:
        near = far = d.sum(1)
    else:
        near = d.masked_fill(~positive, -torch.inf).amax(1)
        far = d.masked_fill(same, torch.inf).amin(1)
    gap = (near - far).masked_fill(~counts, -torch.inf)
    loss = F.softplus(gap) if margin is None else torch.relu(gap + margin)
    if reduction == "none":
        return loss
    return loss.sum() / (counts.sum().clamp_min(1) if reduction == "mean" else 1)


def batch_all_triplet_loss(
    embeddings: Tensor,
    labels: Tensor,
    margin: float = 5.0,
    *,
    distance: str = "euclidean",
    reduction: str = "mean",
) -> Tensor:
    """As `fastloss.functional.batch_all_triplet_loss`."""
    x = F.normalize(embeddings) if distance == "cosine" else embeddings
    unit = 0.5 if distance == "cosine" else 1.0
    loss, number = triplets(x, labels, margin / unit, distance == "euclidean").unbind(0)
    if reduction == "none":
        return unit * loss
    return unit * loss.sum() / (number.sum() + 1e-16 if reduction == "mean" else 1)
