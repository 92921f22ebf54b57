"""Modules of the functions in `fastloss.losses.aggregation`."""

from __future__ import annotations

from torch import Tensor

from fastloss import functional as F
from fastloss.nn._base import LossModule

__all__ = ["CVaRLoss", "Chi2DROLoss", "FloodingLoss", "SoftADLoss", "TiltedLoss"]


class CVaRLoss(LossModule):
    """Module of `fastloss.functional.cvar_loss`.

    Called with the samples' losses, and by keyword their weights and mask; `theta` there replaces that of the
    constructor for this call.
    """

    def __init__(
        self, q: float = 0.9, theta: float | Tensor | None = None, *, flood: float | None = None
    ) -> None:
        super().__init__()
        self.q = q
        self.theta = theta
        self.flood = flood

    def forward(
        self,
        losses: Tensor,
        *,
        theta: float | Tensor | None = None,
        sample_weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        return F.cvar_loss(
            losses,
            q=self.q,
            theta=self.theta if theta is None else theta,
            flood=self.flood,
            sample_weight=sample_weight,
            mask=mask,
        )


class Chi2DROLoss(LossModule):
    """Module of `fastloss.functional.chi2_dro_loss`.

    Called with the samples' losses, and by keyword their weights and mask; `theta` there replaces that of the
    constructor for this call.
    """

    def __init__(
        self, rho: float, theta: float | Tensor | None = None, *, flood: float | None = None
    ) -> None:
        super().__init__()
        self.rho = rho
        self.theta = theta
        self.flood = flood

    def forward(
        self,
        losses: Tensor,
        *,
        theta: float | Tensor | None = None,
        sample_weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        return F.chi2_dro_loss(
            losses,
            rho=self.rho,
            theta=self.theta if theta is None else theta,
            flood=self.flood,
            sample_weight=sample_weight,
            mask=mask,
        )


class FloodingLoss(LossModule):
    """Module of `fastloss.functional.flooding_loss`.

    Called with the samples' losses, and by keyword their weights and mask.
    """

    def __init__(self, level: float) -> None:
        super().__init__()
        self.level = level

    def forward(
        self, losses: Tensor, *, sample_weight: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        return F.flooding_loss(losses, level=self.level, sample_weight=sample_weight, mask=mask)


class SoftADLoss(LossModule):
    """Module of `fastloss.functional.soft_ad_loss`.

    Called with the samples' losses, and by keyword their weights and mask; `theta` there replaces that of the
    constructor for this call.
    """

    def __init__(self, theta: float | Tensor, sigma: float = 1.0, eta: float = 1.0) -> None:
        super().__init__()
        self.theta = theta
        self.sigma = sigma
        self.eta = eta

    def forward(
        self,
        losses: Tensor,
        *,
        theta: float | Tensor | None = None,
        sample_weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        return F.soft_ad_loss(
            losses,
            theta=self.theta if theta is None else theta,
            sigma=self.sigma,
            eta=self.eta,
            sample_weight=sample_weight,
            mask=mask,
        )


class TiltedLoss(LossModule):
    """Module of `fastloss.functional.tilted_loss`.

    Called with the samples' losses, and by keyword their weights and mask.
    """

    def __init__(self, t: float) -> None:
        super().__init__()
        self.t = t

    def forward(
        self, losses: Tensor, *, sample_weight: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        return F.tilted_loss(losses, t=self.t, sample_weight=sample_weight, mask=mask)
