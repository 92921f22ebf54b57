"""Modules of the functions in `fastloss.losses.metric_learning`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastloss import functional as F
from fastloss.nn._base import LossModule

__all__ = [
    "BatchAllTripletLoss",
    "BatchHardTripletLoss",
    "ContrastiveLoss",
    "CosineEmbeddingLoss",
    "KELPRankingLoss",
    "TripletMarginLoss",
]


class CosineEmbeddingLoss(LossModule, torch.nn.CosineEmbeddingLoss):
    """Module of `fastloss.functional.cosine_embedding_loss`, a `torch.nn.CosineEmbeddingLoss`.

    Called with two sets of embeddings and targets of 1 or -1.
    """

    def __init__(
        self,
        margin: float = 0.0,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(margin, size_average, reduce, reduction)

    def forward(self, input1: Tensor, input2: Tensor, target: Tensor) -> Tensor:
        return F.cosine_embedding_loss(input1, input2, target, margin=self.margin, reduction=self.reduction)


class TripletMarginLoss(LossModule, torch.nn.TripletMarginLoss):
    """Module of `fastloss.functional.triplet_margin_loss`, a `torch.nn.TripletMarginLoss`.

    Called with anchors, positives and negatives.
    """

    def __init__(
        self,
        margin: float = 1.0,
        p: float = 2.0,
        eps: float = 1e-06,
        swap: bool = False,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        *,
        squared: bool = False,
    ) -> None:
        super().__init__(margin, p, eps, swap, size_average, reduce, reduction)
        self.squared = squared

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return F.triplet_margin_loss(
            anchor,
            positive,
            negative,
            margin=self.margin,
            p=self.p,
            eps=self.eps,
            swap=self.swap,
            reduction=self.reduction,
            squared=self.squared,
        )


class ContrastiveLoss(LossModule):
    """Module of `fastloss.functional.contrastive_loss`.

    Called with two sets of embeddings and the pairs' labels.
    """

    def __init__(self, margin: float = 1.0, *, reduction: str = "mean") -> None:
        super().__init__()
        self.margin = margin
        self.reduction = reduction

    def forward(self, input1: Tensor, input2: Tensor, label: Tensor) -> Tensor:
        return F.contrastive_loss(input1, input2, label, margin=self.margin, reduction=self.reduction)


class KELPRankingLoss(LossModule):
    """Module of `fastloss.functional.kelp_ranking_loss`.

    Called with the embeddings of queries, useful and other paths.
    """

    def __init__(self, margin: float = 0.5, *, variant: str = "ranking", reduction: str = "sum") -> None:
        super().__init__()
        self.margin = margin
        self.variant = variant
        self.reduction = reduction

    def forward(self, query: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return F.kelp_ranking_loss(
            query, positive, negative, margin=self.margin, variant=self.variant, reduction=self.reduction
        )


class BatchHardTripletLoss(LossModule):
    """Module of `fastloss.functional.batch_hard_triplet_loss`.

    Called with embeddings and labels.
    """

    def __init__(
        self, margin: float | None = 5.0, *, distance: str = "euclidean", reduction: str = "mean"
    ) -> None:
        super().__init__()
        self.margin = margin
        self.distance = distance
        self.reduction = reduction

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return F.batch_hard_triplet_loss(
            embeddings, labels, margin=self.margin, distance=self.distance, reduction=self.reduction
        )


class BatchAllTripletLoss(LossModule):
    """Module of `fastloss.functional.batch_all_triplet_loss`.

    Called with embeddings and labels.
    """

    def __init__(self, margin: float = 5.0, *, distance: str = "euclidean", reduction: str = "mean") -> None:
        super().__init__()
        self.margin = margin
        self.distance = distance
        self.reduction = reduction

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return F.batch_all_triplet_loss(
            embeddings, labels, margin=self.margin, distance=self.distance, reduction=self.reduction
        )
