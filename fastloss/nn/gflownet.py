"""Modules of the functions in `fastloss.losses.gflownet`."""

from __future__ import annotations

from torch import Tensor

from fastloss import functional as F
from fastloss.nn._base import LossModule

__all__ = ["DetailedBalanceLoss"]


class DetailedBalanceLoss(LossModule):
    """Module of `fastloss.functional.detailed_balance_loss`.

    Called with flows and logits, and by keyword `mask`, `chosen` and `rewards`.
    """

    def __init__(self, reduction: str = "mean", *, variant: str = "all") -> None:
        super().__init__()
        self.reduction = reduction
        self.variant = variant

    def forward(
        self,
        state_flow: Tensor,
        next_flows: Tensor,
        logits: Tensor,
        *,
        mask: Tensor | None = None,
        chosen: Tensor | None = None,
        rewards: Tensor | None = None,
    ) -> Tensor:
        return F.detailed_balance_loss(
            state_flow,
            next_flows,
            logits,
            mask=mask,
            reduction=self.reduction,
            variant=self.variant,
            chosen=chosen,
            rewards=rewards,
        )
