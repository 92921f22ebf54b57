"""Modules of the functions in `fastloss.losses.classification`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastloss import functional as F
from fastloss.nn._base import LossModule

__all__ = ["CrossEntropyLoss", "Poly1CrossEntropyLoss", "SoftmaxFocalLoss"]


class CrossEntropyLoss(LossModule, torch.nn.CrossEntropyLoss):
    """Module of `fastloss.functional.cross_entropy`, a `torch.nn.CrossEntropyLoss`.

    Called with logits and classes or probabilities, and by keyword the rows' weights.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.logit_scale = logit_scale
        self.softcap = softcap
        self.z_loss = z_loss
        self.inplace_backward = inplace_backward

    def forward(self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
        return F.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            z_loss=self.z_loss,
            sample_weight=sample_weight,
            inplace_backward=self.inplace_backward,
        )


class SoftmaxFocalLoss(LossModule):
    """Module of `fastloss.functional.softmax_focal_loss`.

    Called with logits and classes.
    """

    def __init__(
        self,
        gamma: float = 2.0,
        alpha: float | Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        *,
        background_class: int | None = None,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__()
        self.gamma = gamma
        self.alpha = alpha
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.background_class = background_class
        self.inplace_backward = inplace_backward

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.softmax_focal_loss(
            input,
            target,
            gamma=self.gamma,
            alpha=self.alpha,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            background_class=self.background_class,
            inplace_backward=self.inplace_backward,
        )


class Poly1CrossEntropyLoss(LossModule):
    """Module of `fastloss.functional.poly1_cross_entropy`.

    Called with logits and classes.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        epsilon: float = 1.0,
        *,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.epsilon = epsilon
        self.inplace_backward = inplace_backward

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.poly1_cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            epsilon=self.epsilon,
            inplace_backward=self.inplace_backward,
        )
