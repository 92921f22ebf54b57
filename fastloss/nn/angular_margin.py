"""Modules of the functions in `fastloss.losses.angular_margin`."""

from __future__ import annotations

from torch import Tensor

from fastloss import functional as F
from fastloss.nn._base import LossModule

__all__ = ["ArcFaceLoss", "CosFaceLoss", "HarmonicLoss"]


class ArcFaceLoss(LossModule):
    """Module of `fastloss.functional.arcface_loss`.

    Called with features, the class centres and classes, and by keyword the rows' weights and the `classes` that
    take part in this call.
    """

    def __init__(
        self,
        s: float = 64.0,
        m: float = 0.5,
        reduction: str = "mean",
        *,
        easy_margin: bool = False,
        margin_grad: str = "exact",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        max_extra_bytes: int | None = None,
    ) -> None:
        super().__init__()
        self.s = s
        self.m = m
        self.reduction = reduction
        self.easy_margin = easy_margin
        self.margin_grad = margin_grad
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.max_extra_bytes = max_extra_bytes

    def forward(
        self,
        input: Tensor,
        weight: Tensor,
        target: Tensor,
        *,
        classes: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        return F.arcface_loss(
            input,
            weight,
            target,
            s=self.s,
            m=self.m,
            reduction=self.reduction,
            easy_margin=self.easy_margin,
            margin_grad=self.margin_grad,
            classes=classes,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            sample_weight=sample_weight,
            max_extra_bytes=self.max_extra_bytes,
        )


class CosFaceLoss(LossModule):
    """Module of `fastloss.functional.cosface_loss`.

    Called with features, the class centres and classes, and by keyword the rows' weights and the `classes` that
    take part in this call.
    """

    def __init__(
        self,
        s: float = 64.0,
        m: float = 0.35,
        reduction: str = "mean",
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        max_extra_bytes: int | None = None,
    ) -> None:
        super().__init__()
        self.s = s
        self.m = m
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.max_extra_bytes = max_extra_bytes

    def forward(
        self,
        input: Tensor,
        weight: Tensor,
        target: Tensor,
        *,
        classes: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        return F.cosface_loss(
            input,
            weight,
            target,
            s=self.s,
            m=self.m,
            reduction=self.reduction,
            classes=classes,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            sample_weight=sample_weight,
            max_extra_bytes=self.max_extra_bytes,
        )


class HarmonicLoss(LossModule):
    """Module of `fastloss.functional.harmonic_loss`.

    Called with features, the class centres and classes, and by keyword the rows' weights.
    """

    def __init__(
        self,
        n: float | None = None,
        reduction: str = "mean",
        *,
        eps: float = 1e-08,
        ignore_index: int = -100,
        max_extra_bytes: int | None = None,
    ) -> None:
        super().__init__()
        self.n = n
        self.reduction = reduction
        self.eps = eps
        self.ignore_index = ignore_index
        self.max_extra_bytes = max_extra_bytes

    def forward(
        self, input: Tensor, weight: Tensor, target: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        return F.harmonic_loss(
            input,
            weight,
            target,
            n=self.n,
            reduction=self.reduction,
            eps=self.eps,
            ignore_index=self.ignore_index,
            sample_weight=sample_weight,
            max_extra_bytes=self.max_extra_bytes,
        )
