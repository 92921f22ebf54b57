"""Modules of the functions in `fastloss.losses.ctc`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastloss import functional as F
from fastloss.nn._base import LossModule

__all__ = ["CTCLoss"]


class CTCLoss(LossModule, torch.nn.CTCLoss):
    """Module of `fastloss.functional.ctc_loss`, a `torch.nn.CTCLoss`.

    Called with log-probabilities (with `from_logits`, logits), targets and the lengths of both.
    """

    def __init__(
        self,
        blank: int = 0,
        reduction: str = "mean",
        zero_infinity: bool = False,
        *,
        from_logits: bool = False,
    ) -> None:
        super().__init__(blank, reduction, zero_infinity)
        self.from_logits = from_logits

    def forward(
        self,
        log_probs: Tensor,
        targets: Tensor,
        input_lengths: Tensor | Sequence[int],
        target_lengths: Tensor | Sequence[int],
    ) -> Tensor:
        return F.ctc_loss(
            log_probs,
            targets,
            input_lengths,
            target_lengths,
            blank=self.blank,
            reduction=self.reduction,
            zero_infinity=self.zero_infinity,
            from_logits=self.from_logits,
        )
