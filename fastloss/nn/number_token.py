"""Modules of the functions in `fastloss.losses.number_token`."""

from __future__ import annotations

from torch import Tensor

from fastloss import functional as F
from fastloss.nn._base import LossModule

__all__ = ["CrossEntropyWithNumberTokenLoss", "GaussianCrossEntropyLoss", "NumberTokenLoss"]


class CrossEntropyWithNumberTokenLoss(LossModule):
    """Module of `fastloss.functional.cross_entropy_with_number_token_loss`.

    Called with logits and labels.
    """

    def __init__(
        self,
        token_ids: Tensor,
        token_values: Tensor,
        ntl_weight: float = 0.3,
        kind: str = "wasserstein",
        ignore_index: int = -100,
        reduction: str = "mean",
        *,
        reweigh: bool = False,
        squash_factor: float | None = None,
    ) -> None:
        super().__init__()
        self.token_ids = token_ids
        self.token_values = token_values
        self.ntl_weight = ntl_weight
        self.kind = kind
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.reweigh = reweigh
        self.squash_factor = squash_factor

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy_with_number_token_loss(
            logits,
            labels,
            token_ids=self.token_ids,
            token_values=self.token_values,
            ntl_weight=self.ntl_weight,
            kind=self.kind,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            reweigh=self.reweigh,
            squash_factor=self.squash_factor,
        )


class NumberTokenLoss(LossModule):
    """Module of `fastloss.functional.number_token_loss`.

    Called with logits and labels.
    """

    def __init__(
        self,
        token_ids: Tensor,
        token_values: Tensor,
        kind: str = "wasserstein",
        ignore_index: int = -100,
        reduction: str = "mean",
        *,
        reweigh: bool = False,
        squash_factor: float | None = None,
    ) -> None:
        super().__init__()
        self.token_ids = token_ids
        self.token_values = token_values
        self.kind = kind
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.reweigh = reweigh
        self.squash_factor = squash_factor

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.number_token_loss(
            logits,
            labels,
            token_ids=self.token_ids,
            token_values=self.token_values,
            kind=self.kind,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            reweigh=self.reweigh,
            squash_factor=self.squash_factor,
        )


class GaussianCrossEntropyLoss(LossModule):
    """Module of `fastloss.functional.gaussian_cross_entropy`.

    Called with logits and classes.
    """

    def __init__(
        self,
        sigma: float = 1.0,
        token_ids: Tensor | None = None,
        token_values: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.sigma = sigma
        self.token_ids = token_ids
        self.token_values = token_values
        self.ignore_index = ignore_index
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.gaussian_cross_entropy(
            input,
            target,
            sigma=self.sigma,
            token_ids=self.token_ids,
            token_values=self.token_values,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )
