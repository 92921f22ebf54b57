"""Modules of the functions in `fastloss.losses.retrieval`."""

from __future__ import annotations

from torch import Tensor

from fastloss import functional as F
from fastloss.nn._base import LossModule

__all__ = ["MultipleNegativesRankingLoss"]


class MultipleNegativesRankingLoss(LossModule):
    """Module of `fastloss.functional.multiple_negatives_ranking_loss`.

    Called with the embeddings of queries, documents and hard negatives, and by keyword `ids` and the queries'
    weights; `scale` there replaces that of the constructor for this call.
    """

    def __init__(
        self,
        scale: float | Tensor = 20.0,
        *,
        directions: tuple[str, ...] = ("query_to_doc",),
        partition_mode: str = "joint",
        normalize: bool = True,
        reduction: str = "mean",
        label_offset: int = 0,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.directions = directions
        self.partition_mode = partition_mode
        self.normalize = normalize
        self.reduction = reduction
        self.label_offset = label_offset

    def forward(
        self,
        anchor: Tensor,
        positive: Tensor,
        negatives: Tensor | None = None,
        *,
        scale: float | Tensor | None = None,
        ids: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        return F.multiple_negatives_ranking_loss(
            anchor,
            positive,
            negatives,
            scale=self.scale if scale is None else scale,
            directions=self.directions,
            partition_mode=self.partition_mode,
            ids=ids,
            normalize=self.normalize,
            reduction=self.reduction,
            sample_weight=sample_weight,
            label_offset=self.label_offset,
        )
