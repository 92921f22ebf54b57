"""Modules of the functions in `fastloss.losses.survival`."""

from __future__ import annotations

from torch import Tensor

from fastloss import functional as F
from fastloss.nn._base import LossModule

__all__ = ["CoxPHLoss", "DARTLoss"]


class CoxPHLoss(LossModule):
    """Module of `fastloss.functional.cox_ph_loss`.

    Called with log hazards, durations and events, and by keyword `strata`.
    """

    def __init__(self, *, ties: str = "breslow", reduction: str = "mean") -> None:
        super().__init__()
        self.ties = ties
        self.reduction = reduction

    def forward(
        self, log_h: Tensor, durations: Tensor, events: Tensor, *, strata: Tensor | None = None
    ) -> Tensor:
        return F.cox_ph_loss(
            log_h, durations, events, ties=self.ties, strata=strata, reduction=self.reduction
        )


class DARTLoss(LossModule):
    """Module of `fastloss.functional.dart_loss`.

    Called with predictions, durations and events.
    """

    def __init__(self, *, alpha: float = 0.0, beta: float = 0.0, reduction: str = "mean") -> None:
        super().__init__()
        self.alpha = alpha
        self.beta = beta
        self.reduction = reduction

    def forward(self, theta: Tensor, durations: Tensor, events: Tensor) -> Tensor:
        return F.dart_loss(
            theta, durations, events, alpha=self.alpha, beta=self.beta, reduction=self.reduction
        )
