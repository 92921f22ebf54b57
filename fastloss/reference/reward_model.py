"""Losses of rankings, with all pairs of a row side by side."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastloss.reference.options import accumulation_dtype, reduced, select, softplus, weighed

__all__ = ["bradley_terry_loss", "k_way_ranking_loss"]


def rows_of_ranking(rewards: Tensor, ranks: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return loss and number of pairs of each row [..., K]; ranks of NaN are not compared."""
    acc_dtype = accumulation_dtype(rewards.dtype)
    r = torch.where(ranks.isnan(), 0.0, rewards.to(acc_dtype))
    behind = ranks.unsqueeze(-2) > ranks.unsqueeze(-1)  # [..., i, j]
    pairs = behind.sum((-2, -1))
    delta = r.unsqueeze(-2) - r.unsqueeze(-1)  # r_j - r_i

    def bradley_terry() -> Tensor:
        return torch.where(behind, softplus(delta), 0.0).sum((-2, -1)) / pairs.clamp(min=1)

    def plackett_luce() -> Tensor:
        others = torch.where(behind, delta, -math.inf)
        itself = torch.zeros_like(r).unsqueeze(-1)
        return torch.cat([itself, others], -1).logsumexp(-1).sum(-1)

    formula = select("kind", kind, {"bradley_terry": bradley_terry, "plackett_luce": plackett_luce})
    return formula(), pairs.to(acc_dtype)


def k_way_ranking_loss(
    rewards: Tensor,
    ranks: Tensor,
    kind: str = "bradley_terry",
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute `fastloss.functional.k_way_ranking_loss`."""
    places = ranks.detach().to(accumulation_dtype(rewards.dtype))
    if mask is not None:
        places = torch.where(mask != 0, places, math.nan)
    loss, pairs = rows_of_ranking(rewards, places, kind)
    return reduced(loss, reduction, (pairs > 0).sum().clamp(min=1)).to(rewards.dtype)


def bradley_terry_element(chosen, rejected, margin, label_smoothing, center_coefficient) -> Tensor:
    u = chosen - rejected - margin
    loss = weighed(1 - label_smoothing, softplus(-u)) + weighed(label_smoothing, softplus(u))
    return loss + center_coefficient * (chosen + rejected).square() if center_coefficient else loss


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    center_coefficient: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Compute `fastloss.functional.bradley_terry_loss`."""
    shift: Any = 0.0 if margin is None else margin
    if weight is not None:  # what stands at a weight of 0 has no derivative
        chosen, rejected, shift = (torch.where(weight != 0, x, 0) for x in (chosen, rejected, shift))
    loss = bradley_terry_element(chosen, rejected, shift, label_smoothing, center_coefficient)
    if weight is not None:
        loss = torch.where(weight != 0, weight * loss, 0.0)
    return reduced(loss, reduction)
