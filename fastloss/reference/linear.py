"""Losses of hidden states: a linear layer, then the loss of its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from fastloss.reference.classification import cross_entropy, hidden_without_unweighted, unweighted_rows

__all__ = ["linear_cross_entropy"]


def logits_from(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    """Return (..., C), and (N, C, d1, ...) for a weight (C, d1, ..., in_features)."""
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
    max_extra_bytes: int | None = None,
) -> Tensor:
    """Compute `fastloss.functional.linear_cross_entropy`; `options` and `max_extra_bytes` change nothing here."""
    ignored = -100 if ignore_index is None else ignore_index
    off = unweighted_rows(target, ignored, weight, sample_weight, label_smoothing)
    logits = logits_from(hidden_without_unweighted(input, off), linear_weight, linear_bias)
    if input.dim() > 2:
        logits, target = (
            logits.movedim(-1, 1),
            target.movedim(-1, 1) if target.is_floating_point() else target,
        )
    return cross_entropy(
        logits, target, weight, reduction=reduction, ignore_index=ignored, label_smoothing=label_smoothing,
        logit_scale=logit_scale, softcap=softcap, z_loss=z_loss, sample_weight=sample_weight,
    )  # fmt: skip
