"""Modules of the functions in `fastloss.losses.policy`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastloss import functional as F
from fastloss.nn._base import LossModule

__all__ = ["PolicyLoss", "ValueLoss"]


class PolicyLoss(LossModule):
    """Module of `fastloss.functional.policy_loss`.

    Called with log-probabilities, those of the rollout and advantages, and by keyword the tokens' `mask`, what
    the KL and entropy terms need, and a `normalizer`.
    """

    def __init__(
        self,
        loss_type: str = "ppo",
        loss_agg_mode: str | None = None,
        *,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float | None = None,
        delta: float | None = None,
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        dro_beta: float = 1.0,
        kl_coef: float = 0.0,
        kl_type: str = "k3",
        log_ratio_clamp: float | None = None,
        entropy_coef: float = 0.0,
        horizon: float | None = None,
        cov_ratio: float = 0.0002,
        cov_bounds: tuple[float, float] = (1.0, 5.0),
        cov_kl_coef: float = 1.0,
        generator: torch.Generator | None = None,
        return_metrics: bool = False,
    ) -> None:
        super().__init__()
        self.loss_type = loss_type
        self.loss_agg_mode = loss_agg_mode
        self.clip_low = clip_low
        self.clip_high = clip_high
        self.dual_clip = dual_clip
        self.delta = delta
        self.sapo_temperature_pos = sapo_temperature_pos
        self.sapo_temperature_neg = sapo_temperature_neg
        self.dro_beta = dro_beta
        self.kl_coef = kl_coef
        self.kl_type = kl_type
        self.log_ratio_clamp = log_ratio_clamp
        self.entropy_coef = entropy_coef
        self.horizon = horizon
        self.cov_ratio = cov_ratio
        self.cov_bounds = cov_bounds
        self.cov_kl_coef = cov_kl_coef
        self.generator = generator
        self.return_metrics = return_metrics

    def forward(
        self,
        logps: Tensor,
        old_logps: Tensor,
        advantages: Tensor,
        *,
        mask: Tensor | None = None,
        ref_logps: Tensor | None = None,
        entropies: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        return F.policy_loss(
            logps,
            old_logps,
            advantages,
            mask=mask,
            loss_type=self.loss_type,
            loss_agg_mode=self.loss_agg_mode,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
            delta=self.delta,
            sapo_temperature_pos=self.sapo_temperature_pos,
            sapo_temperature_neg=self.sapo_temperature_neg,
            dro_beta=self.dro_beta,
            ref_logps=ref_logps,
            kl_coef=self.kl_coef,
            kl_type=self.kl_type,
            log_ratio_clamp=self.log_ratio_clamp,
            entropies=entropies,
            entropy_coef=self.entropy_coef,
            normalizer=normalizer,
            horizon=self.horizon,
            cov_ratio=self.cov_ratio,
            cov_bounds=self.cov_bounds,
            cov_kl_coef=self.cov_kl_coef,
            generator=self.generator,
            return_metrics=self.return_metrics,
        )


class ValueLoss(LossModule):
    """Module of `fastloss.functional.value_loss`.

    Called with values, returns and the values of the rollout, and by keyword the tokens' `mask` and a
    `normalizer`.
    """

    def __init__(
        self,
        clip_range: float | None = 0.2,
        loss_agg_mode: str = "token-mean",
        *,
        horizon: float | None = None,
    ) -> None:
        super().__init__()
        self.clip_range = clip_range
        self.loss_agg_mode = loss_agg_mode
        self.horizon = horizon

    def forward(
        self,
        values: Tensor,
        returns: Tensor,
        old_values: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        return F.value_loss(
            values,
            returns,
            old_values,
            mask=mask,
            clip_range=self.clip_range,
            loss_agg_mode=self.loss_agg_mode,
            normalizer=normalizer,
            horizon=self.horizon,
        )
