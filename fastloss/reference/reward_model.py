"""Losses of rankings, with all pairs of a row side by side."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastloss.reference.dpo import reduced, softplus
from fastloss.reference.options import accumulation_dtype

__all__ = ["bradley_terry_loss", "k_way_ranking_loss"]


def rows_of_ranking(rewards: Tensor, ranks: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Loss and number of pairs of each row [..., K]; ranks of NaN are not compared."""
    high = accumulation_dtype(rewards.dtype)
    r = torch.where(ranks.isnan(), 0.0, rewards.to(high))
    behind = ranks.unsqueeze(-2) > ranks.unsqueeze(-1)  # [..., i, j]
    pairs = behind.sum((-2, -1))
    delta = r.unsqueeze(-2) - r.unsqueeze(-1)  # r_j - r_i
    if kind == "bradley_terry":
        nll = torch.where(behind, softplus(delta), 0.0)
        return nll.sum((-2, -1)) / pairs.clamp(min=1), pairs.to(high)
    if kind != "plackett_luce":
        raise ValueError(f"kind: unknown: {kind!r}")
    others = torch.where(behind, delta, -math.inf)
    itself = torch.zeros_like(r).unsqueeze(-1)
    return torch.cat([itself, others], -1).logsumexp(-1).sum(-1), pairs.to(high)


def k_way_ranking_loss(
    rewards: Tensor,
    ranks: Tensor,
    kind: str = "bradley_terry",
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """As `fastloss.functional.k_way_ranking_loss`."""
    places = ranks.detach().to(accumulation_dtype(rewards.dtype))
    if mask is not None:
        places = torch.where(mask != 0, places, math.nan)
    loss, pairs = rows_of_ranking(rewards, places, kind)
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")
    if reduction != "none":
        loss = loss.sum() / ((pairs > 0).sum().clamp(min=1) if reduction == "mean" else 1)
    return loss.to(rewards.dtype)


def bradley_terry_element(chosen, rejected, margin, label_smoothing, center_coefficient) -> Tensor:
    u = chosen - rejected - margin
    loss = (1 - label_smoothing) * softplus(-u) + label_smoothing * softplus(u)
    return loss + center_coefficient * (chosen + rejected).square()


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    center_coefficient: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """As `fastloss.functional.bradley_terry_loss`."""
    shift: Any = 0.0 if margin is None else margin
    loss = bradley_terry_element(chosen, rejected, shift, label_smoothing, center_coefficient)
    if weight is not None:
        loss = torch.where(weight != 0, weight * loss, 0.0)
    return reduced(loss, reduction)
