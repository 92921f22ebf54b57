"""Modules of the functions in `fastloss.losses.token_statistics`."""

from __future__ import annotations

from torch import Tensor

from fastloss import functional as F
from fastloss.nn._base import LossModule

__all__ = ["EntropyFromLogits", "SelectiveLogSoftmax", "SequenceLogProbs"]


class SelectiveLogSoftmax(LossModule):
    """Module of `fastloss.functional.selective_log_softmax`.

    Called with logits and the classes to look up.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, logits: Tensor, index: Tensor) -> Tensor:
        return F.selective_log_softmax(logits, index, temperature=self.temperature)


class EntropyFromLogits(LossModule):
    """Module of `fastloss.functional.entropy_from_logits`.

    Called with logits, and by keyword a `mask`.
    """

    def __init__(self, *, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, logits: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return F.entropy_from_logits(logits, temperature=self.temperature, mask=mask)


class SequenceLogProbs(LossModule):
    """Module of `fastloss.functional.sequence_log_probs`.

    Called with logits and labels.
    """

    def __init__(self, ignore_index: int = -100, average: bool = False, *, temperature: float = 1.0) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.average = average
        self.temperature = temperature

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.sequence_log_probs(
            logits, labels, ignore_index=self.ignore_index, average=self.average, temperature=self.temperature
        )
