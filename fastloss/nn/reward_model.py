"""Modules of the functions in `fastloss.losses.reward_model`."""

from __future__ import annotations

from torch import Tensor

from fastloss import functional as F
from fastloss.nn._base import LossModule

__all__ = ["BradleyTerryLoss", "KWayRankingLoss"]


class KWayRankingLoss(LossModule):
    """Module of `fastloss.functional.k_way_ranking_loss`.

    Called with rewards and ranks, and by keyword a `mask`.
    """

    def __init__(self, kind: str = "bradley_terry", reduction: str = "mean") -> None:
        super().__init__()
        self.kind = kind
        self.reduction = reduction

    def forward(self, rewards: Tensor, ranks: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return F.k_way_ranking_loss(rewards, ranks, kind=self.kind, mask=mask, reduction=self.reduction)


class BradleyTerryLoss(LossModule):
    """Module of `fastloss.functional.bradley_terry_loss`.

    Called with the rewards of both completions and their margin, and by keyword the pairs' `weight`.
    """

    def __init__(
        self, label_smoothing: float = 0.0, center_coefficient: float = 0.0, reduction: str = "mean"
    ) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.center_coefficient = center_coefficient
        self.reduction = reduction

    def forward(
        self, chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, *, weight: Tensor | None = None
    ) -> Tensor:
        return F.bradley_terry_loss(
            chosen,
            rejected,
            margin,
            weight=weight,
            label_smoothing=self.label_smoothing,
            center_coefficient=self.center_coefficient,
            reduction=self.reduction,
        )
