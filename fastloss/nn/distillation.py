"""Modules of the functions in `fastloss.losses.distillation`."""

from __future__ import annotations

from torch import Tensor

from fastloss import functional as F
from fastloss.nn._base import LossModule

__all__ = ["JSDivLogitsLoss", "KLDivLogitsLoss"]


class KLDivLogitsLoss(LossModule):
    """Module of `fastloss.functional.kl_div_logits`.

    Called with the logits of student and teacher, and by keyword what selects and weighs rows.
    """

    def __init__(
        self, temperature: float = 1.0, reduction: str = "batchmean", *, ignore_index: int = -100
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.reduction = reduction
        self.ignore_index = ignore_index

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        return F.kl_div_logits(
            student_logits,
            teacher_logits,
            temperature=self.temperature,
            reduction=self.reduction,
            labels=labels,
            ignore_index=self.ignore_index,
            mask=mask,
            sample_weight=sample_weight,
        )


class JSDivLogitsLoss(LossModule):
    """Module of `fastloss.functional.js_div_logits`.

    Called with the logits of student and teacher, and by keyword what selects and weighs rows.
    """

    def __init__(
        self,
        beta: float = 0.5,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        *,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        self.beta = beta
        self.temperature = temperature
        self.reduction = reduction
        self.ignore_index = ignore_index

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        return F.js_div_logits(
            student_logits,
            teacher_logits,
            beta=self.beta,
            temperature=self.temperature,
            reduction=self.reduction,
            labels=labels,
            ignore_index=self.ignore_index,
            mask=mask,
            sample_weight=sample_weight,
        )
