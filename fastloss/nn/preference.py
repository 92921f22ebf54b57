"""Modules of the functions in `fastloss.losses.preference`."""

from __future__ import annotations

from torch import Tensor

from fastloss import functional as F
from fastloss.nn._base import LossModule

__all__ = ["AlphaPOLoss", "CPOLoss", "KTOLoss", "ORPOLoss", "SimPOLoss"]


class KTOLoss(LossModule):
    """Module of `fastloss.functional.kto_loss`.

    Called with the log-probabilities of policy and reference, labels and the KL term.
    """

    def __init__(
        self,
        beta: float = 0.1,
        reduction: str = "mean",
        *,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        loss_type: str = "kto",
    ) -> None:
        super().__init__()
        self.beta = beta
        self.reduction = reduction
        self.desirable_weight = desirable_weight
        self.undesirable_weight = undesirable_weight
        self.loss_type = loss_type

    def forward(
        self, policy_logps: Tensor, reference_logps: Tensor, labels: Tensor, kl: Tensor | None = None
    ) -> Tensor:
        return F.kto_loss(
            policy_logps,
            reference_logps,
            labels,
            kl,
            beta=self.beta,
            reduction=self.reduction,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
            loss_type=self.loss_type,
        )


class SimPOLoss(LossModule):
    """Module of `fastloss.functional.simpo_loss`.

    Called with the mean log-probabilities of both completions.
    """

    def __init__(
        self,
        beta: float = 2.0,
        gamma: float = 0.5,
        label_smoothing: float = 0.0,
        loss_type: str = "sigmoid",
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.beta = beta
        self.gamma = gamma
        self.label_smoothing = label_smoothing
        self.loss_type = loss_type
        self.reduction = reduction

    def forward(self, chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
        return F.simpo_loss(
            chosen_logps,
            rejected_logps,
            beta=self.beta,
            gamma=self.gamma,
            label_smoothing=self.label_smoothing,
            loss_type=self.loss_type,
            reduction=self.reduction,
        )


class CPOLoss(LossModule):
    """Module of `fastloss.functional.cpo_loss`.

    Called with the log-probabilities of both completions and the chosen one's NLL.
    """

    def __init__(
        self,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        loss_type: str = "sigmoid",
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.beta = beta
        self.alpha = alpha
        self.label_smoothing = label_smoothing
        self.loss_type = loss_type
        self.reduction = reduction

    def forward(
        self, chosen_logps: Tensor, rejected_logps: Tensor, chosen_nll: Tensor | None = None
    ) -> Tensor:
        return F.cpo_loss(
            chosen_logps,
            rejected_logps,
            chosen_nll,
            beta=self.beta,
            alpha=self.alpha,
            label_smoothing=self.label_smoothing,
            loss_type=self.loss_type,
            reduction=self.reduction,
        )


class AlphaPOLoss(LossModule):
    """Module of `fastloss.functional.alpha_po_loss`.

    Called with the mean log-probabilities of both completions.
    """

    def __init__(
        self,
        alpha: float = 0.25,
        beta: float = 2.0,
        gamma: float = 0.5,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.beta = beta
        self.gamma = gamma
        self.label_smoothing = label_smoothing
        self.reduction = reduction

    def forward(self, chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
        return F.alpha_po_loss(
            chosen_logps,
            rejected_logps,
            alpha=self.alpha,
            beta=self.beta,
            gamma=self.gamma,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )


class ORPOLoss(LossModule):
    """Module of `fastloss.functional.orpo_loss`.

    Called with the mean log-probabilities of both completions and the chosen one's NLL.
    """

    def __init__(self, beta: float = 0.1, reduction: str = "mean") -> None:
        super().__init__()
        self.beta = beta
        self.reduction = reduction

    def forward(
        self, chosen_logps: Tensor, rejected_logps: Tensor, chosen_nll: Tensor | None = None
    ) -> Tensor:
        return F.orpo_loss(chosen_logps, rejected_logps, chosen_nll, beta=self.beta, reduction=self.reduction)
