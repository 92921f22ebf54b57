"""Modules of the functions in `fastloss.losses.supervised_contrastive`."""

from __future__ import annotations

from torch import Tensor

from fastloss import functional as F
from fastloss.nn._base import LossModule

__all__ = ["NTXentLoss", "PairNTXentLoss", "SupConLoss"]


class NTXentLoss(LossModule):
    """Module of `fastloss.functional.nt_xent_loss`.

    Called with two views, and by keyword the samples' weights; `temperature` there replaces that of the
    constructor for this call.
    """

    def __init__(
        self, temperature: float | Tensor = 0.5, *, reduction: str = "mean", normalize: bool = True
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.reduction = reduction
        self.normalize = normalize

    def forward(
        self,
        z1: Tensor,
        z2: Tensor,
        *,
        temperature: float | Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        return F.nt_xent_loss(
            z1,
            z2,
            temperature=self.temperature if temperature is None else temperature,
            reduction=self.reduction,
            sample_weight=sample_weight,
            normalize=self.normalize,
        )


class SupConLoss(LossModule):
    """Module of `fastloss.functional.sup_con_loss`.

    Called with features and labels, and by keyword the rows' weights and other keys; `temperature` there
    replaces that of the constructor for this call.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        reduction: str = "mean",
        normalize: bool = True,
        label_offset: int | None = 0,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.reduction = reduction
        self.normalize = normalize
        self.label_offset = label_offset

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        *,
        temperature: float | Tensor | None = None,
        sample_weight: Tensor | None = None,
        keys: Tensor | None = None,
        key_labels: Tensor | None = None,
    ) -> Tensor:
        return F.sup_con_loss(
            features,
            labels,
            temperature=self.temperature if temperature is None else temperature,
            reduction=self.reduction,
            sample_weight=sample_weight,
            normalize=self.normalize,
            keys=keys,
            key_labels=key_labels,
            label_offset=self.label_offset,
        )


class PairNTXentLoss(LossModule):
    """Module of `fastloss.functional.pair_nt_xent_loss`.

    Called with embeddings and labels, and by keyword the rows' weights and other keys; `temperature` there
    replaces that of the constructor for this call.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        *,
        reduction: str = "mean",
        normalize: bool = True,
        label_offset: int | None = 0,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.reduction = reduction
        self.normalize = normalize
        self.label_offset = label_offset

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        temperature: float | Tensor | None = None,
        sample_weight: Tensor | None = None,
        keys: Tensor | None = None,
        key_labels: Tensor | None = None,
    ) -> Tensor:
        return F.pair_nt_xent_loss(
            embeddings,
            labels,
            temperature=self.temperature if temperature is None else temperature,
            reduction=self.reduction,
            sample_weight=sample_weight,
            normalize=self.normalize,
            keys=keys,
            key_labels=key_labels,
            label_offset=self.label_offset,
        )
