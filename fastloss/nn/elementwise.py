"""Modules of the functions in `fastloss.losses.elementwise`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastloss import functional as F
from fastloss.nn._base import LossModule

__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "HingeLoss",
    "HuberLoss",
    "KLDivLoss",
    "L1Loss",
    "LogCoshLoss",
    "MSELoss",
    "RMSELoss",
    "SigmoidFocalLoss",
    "SmoothL1Loss",
]


class MSELoss(LossModule, torch.nn.MSELoss):
    """Module of `fastloss.functional.mse_loss`, a `torch.nn.MSELoss`.

    Called with predictions and targets, and by keyword a `weight`.
    """

    def __init__(
        self, size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean"
    ) -> None:
        super().__init__(size_average, reduce, reduction)

    def forward(self, input: Tensor, target: Tensor, *, weight: Tensor | None = None) -> Tensor:
        return F.mse_loss(input, target, reduction=self.reduction, weight=weight)


class L1Loss(LossModule, torch.nn.L1Loss):
    """Module of `fastloss.functional.l1_loss`, a `torch.nn.L1Loss`.

    Called with predictions and targets, and by keyword a `weight`.
    """

    def __init__(
        self, size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean"
    ) -> None:
        super().__init__(size_average, reduce, reduction)

    def forward(self, input: Tensor, target: Tensor, *, weight: Tensor | None = None) -> Tensor:
        return F.l1_loss(input, target, reduction=self.reduction, weight=weight)


class SmoothL1Loss(LossModule, torch.nn.SmoothL1Loss):
    """Module of `fastloss.functional.smooth_l1_loss`, a `torch.nn.SmoothL1Loss`.

    Called with predictions and targets.
    """

    def __init__(
        self,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        beta: float = 1.0,
    ) -> None:
        super().__init__(size_average, reduce, reduction, beta)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.smooth_l1_loss(input, target, reduction=self.reduction, beta=self.beta)


class HuberLoss(LossModule, torch.nn.HuberLoss):
    """Module of `fastloss.functional.huber_loss`, a `torch.nn.HuberLoss`.

    Called with predictions and targets, and by keyword a `weight`.
    """

    def __init__(self, reduction: str = "mean", delta: float = 1.0) -> None:
        super().__init__(reduction, delta)

    def forward(self, input: Tensor, target: Tensor, *, weight: Tensor | None = None) -> Tensor:
        return F.huber_loss(input, target, reduction=self.reduction, delta=self.delta, weight=weight)


class BCEWithLogitsLoss(LossModule, torch.nn.BCEWithLogitsLoss):
    """Module of `fastloss.functional.binary_cross_entropy_with_logits`, a `torch.nn.BCEWithLogitsLoss`.

    Called with logits and targets in [0, 1].
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        pos_weight: Tensor | None = None,
    ) -> None:
        super().__init__(weight, size_average, reduce, reduction, pos_weight)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            input, target, weight=self.weight, reduction=self.reduction, pos_weight=self.pos_weight
        )


class BCELoss(LossModule, torch.nn.BCELoss):
    """Module of `fastloss.functional.binary_cross_entropy`, a `torch.nn.BCELoss`.

    Called with probabilities and targets in [0, 1].
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, size_average, reduce, reduction)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy(input, target, weight=self.weight, reduction=self.reduction)


class KLDivLoss(LossModule, torch.nn.KLDivLoss):
    """Module of `fastloss.functional.kl_div`, a `torch.nn.KLDivLoss`.

    Called with log-probabilities and a target distribution.
    """

    def __init__(
        self,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        log_target: bool = False,
    ) -> None:
        super().__init__(size_average, reduce, reduction, log_target)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.kl_div(input, target, reduction=self.reduction, log_target=self.log_target)


class RMSELoss(LossModule):
    """Module of `fastloss.functional.rmse_loss`.

    Called with predictions and targets, and by keyword a `weight`.
    """

    def __init__(self, eps: float = 0.0) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, input: Tensor, target: Tensor, *, weight: Tensor | None = None) -> Tensor:
        return F.rmse_loss(input, target, eps=self.eps, weight=weight)


class LogCoshLoss(LossModule):
    """Module of `fastloss.functional.log_cosh_loss`.

    Called with predictions and targets, and by keyword a `weight`.
    """

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor, *, weight: Tensor | None = None) -> Tensor:
        return F.log_cosh_loss(input, target, reduction=self.reduction, weight=weight)


class HingeLoss(LossModule):
    """Module of `fastloss.functional.hinge_loss`.

    Called with scores and labels of -1 or 1.
    """

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.hinge_loss(input, target, reduction=self.reduction)


class SigmoidFocalLoss(LossModule):
    """Module of `fastloss.functional.sigmoid_focal_loss`.

    Called with logits and targets, and by keyword `weight` and `num_positives`.
    """

    def __init__(
        self,
        alpha: float = 0.25,
        gamma: float = 2.0,
        reduction: str = "none",
        *,
        ignore_index: int = -100,
        background_index: int | None = None,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.background_index = background_index

    def forward(
        self,
        inputs: Tensor,
        targets: Tensor,
        *,
        weight: Tensor | None = None,
        num_positives: float | Tensor | None = None,
    ) -> Tensor:
        return F.sigmoid_focal_loss(
            inputs,
            targets,
            alpha=self.alpha,
            gamma=self.gamma,
            reduction=self.reduction,
            weight=weight,
            num_positives=num_positives,
            ignore_index=self.ignore_index,
            background_index=self.background_index,
        )
