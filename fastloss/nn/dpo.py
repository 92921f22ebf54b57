"""Modules of the functions in `fastloss.losses.dpo`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastloss import functional as F
from fastloss.nn._base import LossModule

__all__ = ["DPOLoss", "DPOLossFromLogits", "LinearDPOLoss"]


class DPOLoss(LossModule):
    """Module of `fastloss.functional.dpo_loss`.

    Called with the log-probabilities of both completions, and by keyword their lengths and the pairs' `weight`.
    """

    def __init__(
        self,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        loss_type: str | Sequence[str] = "sigmoid",
        reduction: str = "mean",
        *,
        f_divergence: str = "reverse_kl",
        f_alpha: float = 0.5,
        exponent_clamp: float | None = None,
        discopop_tau: float = 0.05,
        loss_weights: Sequence[float] | None = None,
        return_rewards: bool = False,
    ) -> None:
        super().__init__()
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.loss_type = loss_type
        self.reduction = reduction
        self.f_divergence = f_divergence
        self.f_alpha = f_alpha
        self.exponent_clamp = exponent_clamp
        self.discopop_tau = discopop_tau
        self.loss_weights = loss_weights
        self.return_rewards = return_rewards

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
        *,
        chosen_lengths: Tensor | None = None,
        rejected_lengths: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        return F.dpo_loss(
            policy_chosen_logps,
            policy_rejected_logps,
            reference_chosen_logps,
            reference_rejected_logps,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            loss_type=self.loss_type,
            reduction=self.reduction,
            f_divergence=self.f_divergence,
            f_alpha=self.f_alpha,
            exponent_clamp=self.exponent_clamp,
            discopop_tau=self.discopop_tau,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            loss_weights=self.loss_weights,
            weight=weight,
            return_rewards=self.return_rewards,
        )


class DPOLossFromLogits(LossModule):
    """Module of `fastloss.functional.dpo_loss_from_logits`.

    Called with the policy's logits, labels and the reference's log-probabilities.
    """

    def __init__(
        self,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        loss_type: str | Sequence[str] = "sigmoid",
        ignore_index: int = -100,
        reduction: str = "mean",
        *,
        f_divergence: str = "reverse_kl",
        f_alpha: float = 0.5,
        exponent_clamp: float | None = None,
        discopop_tau: float = 0.05,
        loss_weights: Sequence[float] | None = None,
        temperature: float = 1.0,
        ld_alpha: float | None = None,
        use_weighting: bool = False,
        return_rewards: bool = False,
    ) -> None:
        super().__init__()
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.loss_type = loss_type
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.f_divergence = f_divergence
        self.f_alpha = f_alpha
        self.exponent_clamp = exponent_clamp
        self.discopop_tau = discopop_tau
        self.loss_weights = loss_weights
        self.temperature = temperature
        self.ld_alpha = ld_alpha
        self.use_weighting = use_weighting
        self.return_rewards = return_rewards

    def forward(
        self,
        policy_logits: Tensor,
        labels: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        return F.dpo_loss_from_logits(
            policy_logits,
            labels,
            reference_chosen_logps,
            reference_rejected_logps,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            loss_type=self.loss_type,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            f_divergence=self.f_divergence,
            f_alpha=self.f_alpha,
            exponent_clamp=self.exponent_clamp,
            discopop_tau=self.discopop_tau,
            loss_weights=self.loss_weights,
            temperature=self.temperature,
            ld_alpha=self.ld_alpha,
            use_weighting=self.use_weighting,
            return_rewards=self.return_rewards,
        )


class LinearDPOLoss(LossModule):
    """Module of `fastloss.functional.linear_dpo_loss`.

    Called with hidden states, the output layer's weight, labels and the reference's log-probabilities, and by
    keyword the layer's bias.
    """

    def __init__(
        self,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        loss_type: str = "sigmoid",
        reduction: str = "mean",
        *,
        ignore_index: int = -100,
        temperature: float = 1.0,
        softcap: float | None = None,
        max_extra_bytes: int | None = None,
    ) -> None:
        super().__init__()
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.loss_type = loss_type
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.softcap = softcap
        self.max_extra_bytes = max_extra_bytes

    def forward(
        self,
        chosen_input: Tensor,
        rejected_input: Tensor,
        linear_weight: Tensor,
        chosen_labels: Tensor,
        rejected_labels: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
        *,
        linear_bias: Tensor | None = None,
    ) -> Tensor:
        return F.linear_dpo_loss(
            chosen_input,
            rejected_input,
            linear_weight,
            chosen_labels,
            rejected_labels,
            reference_chosen_logps,
            reference_rejected_logps,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            loss_type=self.loss_type,
            reduction=self.reduction,
            linear_bias=linear_bias,
            ignore_index=self.ignore_index,
            temperature=self.temperature,
            softcap=self.softcap,
            max_extra_bytes=self.max_extra_bytes,
        )
