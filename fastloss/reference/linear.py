"""Losses of hidden states: a linear layer, then the loss of its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from fastloss.reference.classification import cross_entropy
from fastloss.reference.preference import dpo_loss
from fastloss.reference.token_statistics import TokenStats, token_stats

__all__ = ["linear_cross_entropy", "linear_dpo_loss", "linear_token_stats"]


def logits_from(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    """(C) or (N, C), and (N, C, d1, ...) for a weight (C, d1, ..., in_features)."""
    logits = input @ linear_weight.reshape(-1, linear_weight.shape[-1]).t()
    logits = logits.reshape(*input.shape[:-1], *linear_weight.shape[:-1])
    return logits if linear_bias is None else logits + linear_bias


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: torch.nn.LinearCrossEntropyOptions | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """As `fastloss.functional.linear_cross_entropy`; `options`, which tell how to compute, change nothing here."""
    return cross_entropy(
        logits_from(input, linear_weight, linear_bias), target, weight, reduction=reduction,
        ignore_index=-100 if ignore_index is None else ignore_index, label_smoothing=label_smoothing,
        logit_scale=logit_scale, softcap=softcap, z_loss=z_loss, sample_weight=sample_weight,
    )  # fmt: skip


def linear_token_stats(
    input: Tensor,
    linear_weight: Tensor,
    index: Tensor | None = None,
    temperature: float = 1.0,
    *,
    linear_bias: Tensor | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> TokenStats:
    """As `fastloss.functional.linear_token_stats`."""
    logits = logits_from(input, linear_weight, linear_bias)
    return token_stats(logits, index, temperature, mask=mask, softcap=softcap)


def linear_dpo_loss(
    chosen_input: Tensor,
    rejected_input: Tensor,
    linear_weight: Tensor,
    chosen_labels: Tensor,
    rejected_labels: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
    reduction: str = "mean",
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """As `fastloss.functional.linear_dpo_loss`."""

    def of_sequences(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        valid = labels != ignore_index
        logp = linear_token_stats(
            hidden, linear_weight, torch.where(valid, labels, 0), temperature, linear_bias=linear_bias,
            mask=valid, softcap=softcap,
        ).logp  # fmt: skip
        return logp.sum(-1), valid.sum(-1).clamp(min=1)

    chosen, chosen_lengths = of_sequences(chosen_input, chosen_labels)
    rejected, rejected_lengths = of_sequences(rejected_input, rejected_labels)
    lengths = {}
    if loss_type in ("ipo", "sigmoid_norm"):
        lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    return dpo_loss(
        chosen, rejected, reference_chosen_logps, reference_rejected_logps, beta, label_smoothing, loss_type,
        reduction, **lengths,
    )  # fmt: skip
