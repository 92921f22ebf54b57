"""Losses of pairs and triplets of rows of features."""

from __future__ import annotations

from functools import reduce as fold

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction

from fastloss.reference.options import accumulation_dtype, one_of, reduced, select, softplus

__all__ = [
    "batch_all_triplet_loss",
    "batch_hard_triplet_loss",
    "contrastive_loss",
    "cosine_embedding_loss",
    "kelp_ranking_loss",
    "triplet_margin_loss",
]


def pair_sums(a: Tensor, b: Tensor, c: Tensor | None, eps: float) -> Tensor:
    acc_dtype = accumulation_dtype(a.dtype)
    a = a.to(acc_dtype)
    sums = []
    for x in (b,) if c is None else (b, c):
        x = x.to(acc_dtype)
        sums += [(a * x).sum(1), a.square().sum(1), x.square().sum(1), (a - x + eps).square().sum(1)]
    return torch.stack(sums)


def triplets(x: Tensor, ids: Tensor, margin: float, root: bool) -> Tensor:
    """Return for each anchor the sum over its triplets, and how many of them count."""
    square = (x.unsqueeze(1) - x.unsqueeze(0)).square().sum(-1)
    d = length(square) if root else square
    same = ids.unsqueeze(1) == ids
    positive = same & ~torch.eye(ids.shape[0], dtype=torch.bool, device=ids.device)
    terms = torch.relu(d.unsqueeze(2) - d.unsqueeze(1) + margin)
    terms = terms.masked_fill(~(positive.unsqueeze(2) & ~same.unsqueeze(1)), 0.0)
    return torch.stack([terms.sum((1, 2)), (terms > 0).sum((1, 2)).to(x.dtype)])


def length(square: Tensor) -> Tensor:
    """Return the square root, the derivative of which is 0 at 0."""
    nothing = square == 0
    return square.masked_fill(nothing, 1.0).sqrt().masked_fill(nothing, 0.0)


def mode(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """Return the reduction, also where it is given in torch's old way."""
    if size_average is not None or reduce is not None:
        return _reduction.legacy_get_string(size_average, reduce)
    return one_of("reduction", reduction, ("none", "mean", "sum"))


def cosine_embedding_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0.0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute `fastloss.functional.cosine_embedding_loss`."""
    reduction = mode(size_average, reduce, reduction)
    return F.cosine_embedding_loss(input1, input2, target, margin, reduction=reduction)


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
    """Compute `fastloss.functional.triplet_margin_loss`."""
    reduction = mode(size_average, reduce, reduction)
    dtype = fold(torch.promote_types, (x.dtype for x in (anchor, positive, negative)))
    anchor, positive, negative = (x.to(dtype) for x in (anchor, positive, negative))
    if not squared:
        return F.triplet_margin_loss(anchor, positive, negative, margin, p, eps, swap, reduction=reduction)
    to_positive, to_negative = (F.pairwise_distance(anchor, x, p, eps).square() for x in (positive, negative))
    if swap:
        to_negative = torch.minimum(to_negative, F.pairwise_distance(positive, negative, p, eps).square())
    return reduced(torch.relu(to_positive - to_negative + margin), reduction)


def contrastive_loss(
    input1: Tensor, input2: Tensor, label: Tensor, margin: float = 1.0, *, reduction: str = "mean"
) -> Tensor:
    """Compute `fastloss.functional.contrastive_loss`."""
    square = (input1 - input2).square().sum(1)
    apart = torch.relu(margin - length(square)).square()
    y = label.to(square.dtype)
    return reduced(0.5 * (torch.where(y == 1, 0.0, (1 - y) * square) + y * apart), reduction)


def kelp_ranking_loss(
    query: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 0.5,
    *,
    variant: str = "ranking",
    reduction: str = "sum",
) -> Tensor:
    """Compute `fastloss.functional.kelp_ranking_loss`."""
    one_of("reduction", reduction, ("none", "mean", "sum"))  # which the means of cosines do not use
    of_positive, of_negative = F.cosine_similarity(query, positive), F.cosine_similarity(query, negative)
    formula = select("variant", variant, {
        "ranking": lambda: reduced(torch.relu(of_negative - of_positive + margin), reduction),
        "mean_cosine": lambda: torch.relu(1 - of_positive.mean()) + torch.relu(1 + of_negative.mean()),
    })  # fmt: skip
    return formula()


def batch_hard_triplet_loss(
    embeddings: Tensor,
    labels: Tensor,
    margin: float | None = 5.0,
    *,
    distance: str = "euclidean",
    reduction: str = "mean",
) -> Tensor:
    """Compute `fastloss.functional.batch_hard_triplet_loss`."""
    x = F.normalize(embeddings) if distance == "cosine" else embeddings
    square = (x.unsqueeze(1) - x.unsqueeze(0)).square().sum(-1)
    d = select("distance", distance, {"euclidean": length(square), "squared": square, "cosine": square / 2})
    same = labels.unsqueeze(0) == labels.unsqueeze(1)
    positive = same & ~torch.eye(labels.shape[0], dtype=torch.bool, device=labels.device)
    counts = positive.any(1) & (~same).any(1)
    if labels.shape[0] == 0:
        to_positive = to_negative = d.sum(1)
    else:
        to_positive = d.masked_fill(~positive, -torch.inf).amax(1)
        to_negative = d.masked_fill(same, torch.inf).amin(1)
    gap = (to_positive - to_negative).masked_fill(~counts, -torch.inf)
    loss = softplus(gap) if margin is None else torch.relu(gap + margin)
    return reduced(loss, reduction, counts.sum().clamp_min(1))


def batch_all_triplet_loss(
    embeddings: Tensor,
    labels: Tensor,
    margin: float = 5.0,
    *,
    distance: str = "euclidean",
    reduction: str = "mean",
) -> Tensor:
    """Compute `fastloss.functional.batch_all_triplet_loss`."""
    one_of("distance", distance, ("euclidean", "squared", "cosine"))
    x = F.normalize(embeddings) if distance == "cosine" else embeddings
    unit = 0.5 if distance == "cosine" else 1.0
    loss, number = triplets(x, labels, margin / unit, distance == "euclidean").unbind(0)
    return reduced(unit * loss, reduction, number.sum() + 1e-16)
